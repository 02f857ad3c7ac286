"""The recipes of the README are run as they stand there, and do what they say.

Those that need a whole project are run by the tests of the template.
"""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from core import BaseSolver, data, distrib
from core.checkpoint import Policy
from core.data import loader
from core.rng import seed_everything
from core.stop import Stopped
from core.tests.processes import on_ranks
from core.utils import UserError

from ..conftest import ROOT

README = ROOT / "core" / "README.md"


def recipe_text(title: str) -> str:
    """Return the block under a heading."""
    [text] = re.findall(rf"^### {title}\n(.*?)(?=^##|\Z)", README.read_text(), re.M | re.S)
    [block] = re.findall(r"```python\n(.*?)```", text, re.S)
    return str(block.replace("from .core", "from core"))


def recipe(title: str, **names: Any) -> dict[str, Any]:
    """Run the block under a heading; return all that it defines, or was given."""
    exec(compile(recipe_text(title), str(README), "exec"), names)
    return names


def test_blocks_are_short() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.S)
    assert len(blocks) == 8
    for block in blocks:
        assert len([line for line in block.splitlines() if line.strip()]) < 15, block


LABELS = torch.tensor([0] * 20 + [1] * 4)
Seen = dict[tuple[int, int], list[int]]


class Solver(BaseSolver):
    """Learns to tell few from many; can be stopped within an epoch, or killed there."""

    sampler: Any = None
    policy = Policy()

    def __init__(self, folder: Path, seen: Seen, stop: Any = None) -> None:
        super().__init__(folder, self.policy)
        self.seen, self.stop = seen, stop
        self.cfg = SimpleNamespace(epochs=5, valid_every=5)
        self.data = TensorDataset(torch.arange(24), LABELS)
        self.train_loader = loader(self.data, 4, shuffle=True, sampler=self.sampler)
        self.model: Any = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.2), nn.Linear(4, 2)).double()
        distrib.broadcast_model(self.model)
        self.register_stateful("model")
        self.build_optimizers()

    def build_optimizers(self) -> None:
        self.optim = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.register_stateful("optim")

    def run(self) -> None:
        with self.running():
            while self.epoch <= self.cfg.epochs:
                self.run_stage("train", self.train)
                self.run_stage("valid", self.valid)
                self.commit()

    def train(self) -> dict[str, float]:
        steps = self.steps(self.train_loader)
        for numbers, labels in steps:
            loss = self.loss(numbers, labels)
            with distrib.eager_sync_model(self.model):
                loss.backward()
            self.update()
            steps.log({"loss": loss}, len(labels))
            self.see((self.epoch, steps.step), numbers.tolist())
        return steps.metrics()

    def see(self, position: tuple[int, int], numbers: list[int]) -> None:
        assert self.seen.setdefault(position, numbers) == numbers
        if self.stop and self.stop[0] == position:
            if self.stop[1] is KeyboardInterrupt:
                raise KeyboardInterrupt
            os.kill(os.getpid(), signal.SIGUSR1)

    def loss(self, numbers: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(numbers[:, None].double() / 24), labels)

    def update(self) -> None:
        self.optim.step()
        self.optim.zero_grad()

    @torch.no_grad()
    def valid(self) -> dict[str, float]:
        if self.stop and self.stop[0] == (self.epoch, "valid"):
            raise KeyboardInterrupt
        return {"loss": self.loss(*self.data.tensors).item()}


def interrupted(kind: type[Solver], folder: Path) -> tuple[Solver, Solver]:
    """Run a solver twice, once with three interruptions; check that both end alike."""
    solvers: list[Solver] = []
    seen: list[Seen] = [{}, {}]
    stops = [((2, 2), Stopped), ((3, 2), KeyboardInterrupt), ((5, "valid"), KeyboardInterrupt)]
    for name, reasons in (("whole", [None]), ("stopped", [*stops, None])):
        for stop in reasons:
            seed_everything(0)
            solver = kind(folder / name, seen[len(solvers)], stop)
            if stop is None:
                solver.run()
            else:
                with pytest.raises(stop[1]):
                    solver.run()
        solvers.append(solver)
    whole, resumed = solvers
    assert seen[0] == seen[1]
    assert plain_history(whole) == plain_history(resumed)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)
    return whole, resumed


def plain_history(solver: BaseSolver) -> list[Any]:
    return [
        {stage: {k: v for k, v in of.items() if k != "duration"} for stage, of in epoch.items()}
        for epoch in solver.history
    ]


def test_a_tracker(tmp_path: Path) -> None:
    csv = recipe("A tracker of your own")["Csv"]

    class Tracked(Solver):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.result_logger.add_tracker(csv(self.xp))

        def valid(self) -> dict[str, float]:
            self.log_text("valid", "sample", "goes nowhere")
            return super().valid()

    for solver in interrupted(Tracked, tmp_path):
        rows = (solver.folder / "metrics.csv").read_text().splitlines()
        for stage in ("train", "valid"):
            values = [row for row in rows if f",{stage},loss," in row]
            losses = [epoch[stage]["loss"] for epoch in solver.history]
            assert values == [f"{i},{stage},loss,{loss}" for i, loss in enumerate(losses, 1)]


def test_a_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    balanced = recipe("A sampler of your own")["Balanced"]

    class Sampled(Solver):
        sampler = balanced

    whole, _ = interrupted(Sampled, tmp_path)
    drawn = LABELS[torch.tensor([*whole.seen.values()])]
    assert drawn.shape == (30, 4)
    assert 0.35 < drawn.double().mean() < 0.65

    data.set_epoch(1)
    first = [*balanced(whole.data, shuffle=True, seed=0)]
    shares = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        data.set_epoch(1)
        shares.append([*balanced(whole.data, shuffle=True, seed=0)])
    assert torch.tensor(shares).T.flatten().tolist() == first


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has it from 2.9 on")
def test_two_optimizers(tmp_path: Path) -> None:
    class Both(Solver):
        def build_optimizers(self) -> None:
            parameters = [*self.model.parameters()]
            self.muon: Any = torch.optim.Muon([p for p in parameters if p.ndim == 2], lr=2e-2)
            self.adamw = torch.optim.AdamW([p for p in parameters if p.ndim != 2], lr=3e-3)
            self.register_stateful("muon", "adamw")

        def update(self) -> None:
            for optim in (self.muon, self.adamw):
                optim.step()
                optim.zero_grad()

    whole, resumed = interrupted(Both, tmp_path)
    for name in ("muon", "adamw"):
        one, other = (solver.state_dict()[name]["state"] for solver in (whole, resumed))
        assert len(one) == len(other) == 2
        for key, of in one.items():
            assert all(torch.equal(value, other[key][k]) for k, value in of.items())


def stopping_early(folder: Path, losses: list[float], stop: Any = None, **how: Any) -> Solver:
    """A solver with these losses, the same on all ranks or, as if by mistake, on rank zero only."""
    stalled = recipe("Early stopping")["stalled"]
    line = re.findall(r"`(while .*stalled.*)` in `run`", README.read_text())
    assert line == [
        'while self.epoch <= self.cfg.epochs and not stalled(self.history, "min valid.loss"):'
    ]
    best = how.pop("best", "min valid.loss")

    class Early(Solver):
        def run(self) -> None:
            self.cfg.epochs = len(losses)
            with self.running():
                while self.epoch <= self.cfg.epochs and not stalled(self.history, best, **how):
                    self.run_stage("train", self.train)
                    self.run_stage("valid", self.valid)
                    self.commit()

        def valid(self) -> dict[str, float]:
            return {"loss": losses[self.epoch - 1] * (1 - 2 * distrib.rank())}

    solver = Early(folder, {}, stop)
    solver.run()
    return solver


NAN = math.nan


@pytest.mark.parametrize(
    ("losses", "how", "epochs"),
    [
        ([3.0, 2.0, NAN, 2.5, 2.1, 1.0, 1.0], {}, 5),
        ([3.0, 2.0, NAN, 2.5, 2.1, 1.0, 1.0], {"patience": 4}, 7),
        ([NAN] * 9, {}, 3),
        ([NAN, 1.0, 2.0, 3.0, 2.0, NAN, 2.0, 9.0], {"best": "max valid.loss"}, 7),
        ([4.0, 3.0, 2.0, 1.0], {}, 4),
        ([4.0, 3.0, 3.0, 1.0], {"patience": 0}, 3),
    ],
)
def test_early_stopping(
    losses: list[float], how: dict[str, Any], epochs: int, tmp_path: Path
) -> None:
    assert len(stopping_early(tmp_path, losses, **how).history) == epochs
    again = stopping_early(tmp_path, losses, **how)
    assert (len(again.history), again.seen) == (epochs, {})
    with pytest.raises(KeyboardInterrupt):
        stopping_early(tmp_path / "killed", losses, ((3, 1), KeyboardInterrupt), **how)
    killed = stopping_early(tmp_path / "killed", losses, **how)
    assert len(killed.history) == epochs
    assert min(killed.seen) == (3, 0)


def test_early_stopping_by_a_metric_that_is_not_there(tmp_path: Path) -> None:
    stalled = recipe("Early stopping")["stalled"]
    history = [{"train": {"loss": 1.0}}, {"train": {"loss": 1.0}, "valid": {"loss": 1.0}}]
    assert not stalled(history, "max valid.acc")
    with pytest.raises(UserError, match=r"valid\.acc.*'valid'"):
        stalled([*history, *history], "max valid.acc")


def early_on_a_rank(folder: Path) -> int:
    torch.set_num_threads(1)
    return len(stopping_early(folder, [3.0, 2.0, NAN, 2.5, 2.1, 1.0, 1.0]).history)


def test_ranks_stop_early_together(tmp_path: Path) -> None:
    assert on_ranks(early_on_a_rank, tmp_path) == [5, 5]


def test_evaluation_now_and_then(tmp_path: Path) -> None:
    parts = {
        "run": recipe("Evaluation at first and every n epochs, and a test at the end")["run"],
        "test": Solver.valid,
        "policy": Policy(last=1, best="min valid.loss"),
    }
    for solver in interrupted(type("Rarely", (Solver,), parts), tmp_path):
        stages = [[*epoch] for epoch in solver.history]
        train = ["train"]
        assert stages == [["untrained", *train], *3 * [train], [*train, "valid"], ["test"]]
        assert len([*solver.folder.glob("checkpoint*.th")]) <= 2


def early_with_test(folder: Path) -> list[list[str]]:
    """Stop early, and test then, on each rank; return the stages of each epoch."""
    torch.set_num_threads(1)
    [loop] = re.findall(r"`(while .*stalled.*)` in `run`", README.read_text())
    names = recipe("Early stopping") | {"valid": 0}
    block = recipe_text("Evaluation at first and every n epochs, and a test at the end").replace(
        "while self.epoch <= self.cfg.epochs:", loop
    )
    exec(block, names)

    class Early(Solver):
        run = names["run"]
        policy = Policy(best="min valid.loss")

        def valid(self) -> dict[str, float]:
            return {"loss": [9.0, 3.0, 2.0, 2.5, 2.1, 2.2, 1.0][self.epoch]}

        def test(self) -> dict[str, float]:
            return {"epoch": self.epoch}

    for _ in range(2):  # the second has nothing left to do
        solver = Early(folder, {})
        solver.cfg.valid_every = 1
        solver.run()
    return [[*epoch] for epoch in solver.history]


def test_early_stopping_with_a_test_at_the_end(tmp_path: Path) -> None:
    both = ["train", "valid"]
    wanted = [["untrained", *both], both, both, both, both, ["test"]]
    assert on_ranks(early_with_test, tmp_path) == [wanted, wanted]


class Spread(Solver):
    def __init__(self, folder: Path) -> None:
        self.shard = recipe("FSDP")["shard"]
        super().__init__(folder, {})

    def build_optimizers(self) -> None:
        self.model[1].p = 0.0
        self.shard(self.model, [self.model[0], self.model[2]], torch.device("cpu"))
        super().build_optimizers()

    def train(self) -> dict[str, float]:
        rank, ranks = distrib.rank(), distrib.world_size()
        for _ in range(3):
            with distrib.eager_sync_model(self.model):
                self.loss(*(tensor[rank::ranks] for tensor in self.data.tensors)).backward()
            norm: Any = nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
            self.update()
        return {"norm": (norm.full_tensor() if ranks > 1 else norm).item()}


def spread(folder: Path, epochs: int) -> tuple[list[Any], list[float]]:
    seed_everything(0)
    solver = Spread(folder)
    if distrib.is_distributed():
        # Of the four tensors each rank has half.
        assert all(p.to_local().numel() == p.numel() / 2 for p in solver.model.parameters())
    solver.cfg.epochs = epochs
    solver.run()
    weights = solver.state_dict()["model"]
    return plain_history(solver), torch.cat([w.flatten() for w in weights.values()]).tolist()


def spread_on_a_rank(folder: Path) -> list[Any]:
    torch.set_num_threads(1)
    ends = [spread(folder / "whole", 4), spread(folder / "stopped", 2)]
    if distrib.is_rank_zero():
        shutil.copytree(folder / "stopped", folder / "saved")
    return [*ends, spread(folder / "stopped", 4)]


def test_fsdp(tmp_path: Path) -> None:
    whole, half, resumed = on_ranks(spread_on_a_rank, tmp_path)[0]
    assert resumed == whole
    # What two ranks saved is loaded by a single process, which resumes as if it had been alone.
    saved = Spread(tmp_path / "saved")
    assert saved.restore(read_only=True)
    weights = saved.state_dict()["model"].values()
    assert torch.cat([w.flatten() for w in weights]).tolist() == half[1]
    for folder in ("saved", "alone"):
        history, weights = spread(tmp_path / folder, 4)
        assert weights == pytest.approx(whole[1])
        norms = [[epoch["train"]["norm"] for epoch in h] for h in (history, whole[0])]
        assert norms[0] == pytest.approx(norms[1])
