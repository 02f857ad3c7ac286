"""A model that is spread over ranks goes through the same solver, on real gloo processes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core import BaseSolver, distrib
from core.checkpoint import Policy
from core.ema import EMA
from core.tests.processes import on_ranks


class Solver(BaseSolver):
    def __init__(self, folder: Path, epochs: int, sharded: bool) -> None:
        super().__init__(folder, Policy(best="min valid.loss", sharded=sharded))
        self.epochs = epochs
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()
        if distrib.is_distributed():
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(self.model, mesh=init_device_mesh("cpu", (distrib.world_size(),)))
        self.optim = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.ema = EMA({"model": self.model}, decay=0.5)
        first: Any = self.model[0]
        self.kept = {"first": first.weight.detach().clone()}  # sharded, in a container
        self.register_stateful("model", "optim", "ema", "kept")

    def run(self) -> None:
        with self.running():
            while self.epoch <= self.epochs:
                self.run_stage("train", self.train)
                self.run_stage("valid", self.valid)
                self.commit()

    def loss(self) -> torch.Tensor:
        points = torch.linspace(-1, 1, 24, dtype=torch.float64).view(6, 4)
        share = points[distrib.rank() :: distrib.world_size()]
        outputs: torch.Tensor = self.model(share)
        return (outputs - 1).pow(2).mean()

    def train(self) -> dict[str, float]:
        self.optim.zero_grad()
        loss = self.loss()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optim.step()
        self.ema.update()
        return distrib.average_metrics({"loss": loss.detach()})

    @torch.no_grad()
    def valid(self) -> dict[str, float]:
        with self.ema.swapped():
            metrics = distrib.average_metrics({"loss": self.loss()})
        if self.history:
            with self.weights("best"):
                metrics["best"] = distrib.average_metrics({"loss": self.loss()})["loss"]
        return metrics


def _train(folder: Path, epochs: int, sharded: bool) -> dict[str, Any]:
    solver = Solver(folder, epochs, sharded)
    solver.run()
    state = solver.state_dict()
    tensors = [*state["model"].values(), *state["ema"]["model"].values()]
    tensors += [s["exp_avg"] for s in state["optim"]["state"].values()]
    solver.load_state_dict(state)  # as of weights kept in memory
    return {
        "numbers": torch.cat([t.flatten() for t in tensors]).tolist(),
        "losses": [e["valid"]["loss"] for e in solver.history],
        "best": [e["valid"]["best"] for e in solver.history[1:]],
    }


def run(folder: Path, epochs: int, sharded: bool, ranks: int = 2) -> dict[str, Any]:
    """Train on several ranks, and return what rank zero found."""
    found = on_ranks(_train, folder, epochs, sharded, ranks=ranks)
    assert all(isinstance(one, dict) for one in found), found
    assert all(one == found[0] for one in found)
    first: dict[str, Any] = found[0]
    return first


@pytest.mark.parametrize("sharded", [False, True])
def test_a_spread_model_trains_is_saved_and_resumed_anywhere(tmp_path: Path, sharded: bool) -> None:
    undisturbed = run(tmp_path / "undisturbed", 4, sharded)
    run(tmp_path / "stopped", 2, sharded)
    for ranks in (1, 3):
        shutil.copytree(tmp_path / "stopped", tmp_path / f"on {ranks}")
    assert run(tmp_path / "stopped", 4, sharded) == undisturbed
    alone = run(tmp_path / "alone", 4, sharded, ranks=1)
    assert len([*(tmp_path / "stopped").glob("shards.*")]) == (2 if sharded else 0)
    for found in (alone, *(run(tmp_path / f"on {n}", 4, sharded, ranks=n) for n in (1, 3))):
        for name, expected in undisturbed.items():
            assert found[name] == pytest.approx(expected, rel=1e-9), name
