"""Runs that are asked to stop, and resume with the very next step."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .. import BaseSolver, checkpoint, distrib
from ..loader import loader
from ..weights import EMA
from ..xp import Preempted
from .processes import on_ranks


class Noisy(Dataset[torch.Tensor]):
    """Draws from every generator there is, in whatever process loads it."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(4) * random.random() * np.random.rand() + index / 22


class Solver(BaseSolver):
    """Two stages, one of them with two loops; every kind of data."""

    def __init__(self, folder: Path, workers: int = 0, plain: bool = False) -> None:
        super().__init__(folder)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
        distrib.broadcast_model(self.model)
        self.optim = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.ema = EMA({"model": self.model}, 0.9)
        self.between: dict[str, list[int]] = {"stages": []}  # what happens between stages
        self.register_stateful("model", "optim", "ema", "between")
        kwargs: dict[str, Any] = {"num_workers": workers}
        self.data = (
            DataLoader(Noisy(), 4, shuffle=True, **kwargs)
            if plain
            else loader(Noisy(), 2, shuffle=True, seed=1, **kwargs)
        )
        self.seen: list[tuple[int, str, int]] = []
        self.stop_at: set[tuple[int, str, int]] = set()

    def run(self) -> None:
        self.restore()
        while self.epoch <= 3:
            self.between["stages"].append(self.epoch)
            self.run_stage("train", self.train)
            self.optim.step()  # once more, by the last gradients
            self.run_stage("valid", self.valid)
            self.commit()

    def train(self) -> dict[str, float]:
        return self.loop("train")

    def valid(self) -> dict[str, float]:
        scale = torch.rand(())  # drawn before the loop
        first = self.loop("first")
        with self.ema.swapped():
            second = self.loop("second", scale, learn=False)
        return {
            "scale": scale.item(),
            **second,
            "first": first["loss"],
            "between": len(self.between["stages"]),
        }

    def loop(self, name: str, scale: Any = 1.0, learn: bool = True) -> dict[str, float]:
        average = self.averager()
        steps = self.log_progress(name, self.data)
        for batch in steps:
            loss = (self.model(batch.double()) * scale).pow(2).mean()
            if learn:
                self.optim.zero_grad()
                loss.backward()
                distrib.sync_model(self.model)
                self.optim.step()
                self.ema.update()
            steps.update(average({"loss": loss}, len(batch)))
            self.log_step({"loss": loss})
            position = (self.epoch, name, sum(s[:2] == (self.epoch, name) for s in self.seen))
            self.seen.append(position)
            if position in self.stop_at:
                os.kill(os.getpid(), signal.SIGUSR1)
        return distrib.average_metrics(average)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = checkpoint.load(folder / "checkpoint.th", read_only=True)
    assert state is not None
    return dict(state["model"])


def history(folder: Path) -> list[Any]:
    found: list[Any] = json.loads((folder / "history.json").read_text())
    for epoch in found:
        for stage in epoch.values():
            assert stage.pop("duration") > 0
    return found


def curves(folder: Path) -> list[Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "duration"} for row in rows]


def assert_same(one: Path, other: Path) -> None:
    assert history(one) == history(other)
    assert curves(one) == curves(other)
    ours = weights(other)
    assert all(torch.equal(value, ours[name]) for name, value in weights(one).items())


def solver_of(folder: Path, solver: type[Solver] = Solver, **kwargs: Any) -> Solver:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return solver(folder, **kwargs)


def run_until(solver: Solver, at: tuple[int, str, int]) -> None:
    """Train, and be asked to stop in a step: epoch, loop, number."""
    solver.stop_at = {at}
    with pytest.raises(Preempted):
        solver.run()


KINDS = [{"workers": 0}, {"workers": 2}, {"plain": True}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_stopped_run_goes_on_with_the_next_step(tmp_path: Path, kind: dict[str, Any]) -> None:
    whole = solver_of(tmp_path / "whole", **kind)
    whole.run()
    stops = [(1, "train", 0), (2, "train", 3), (2, "second", 1), (2, "second", 4), (3, "first", 2)]
    seen: list[tuple[int, str, int]] = []
    stopped = 0
    for stop in [*stops, None]:
        solver = solver_of(tmp_path / "stopped", **kind)
        solver.stop_at = {stop} if stop else set()
        # What a new process counts from, for the test to know where it is.
        solver.seen = list(seen)
        if stop is None:
            solver.run()
        else:
            with pytest.raises(Preempted, match="SIGUSR1"):
                solver.run()
            stopped += 1
        seen = solver.seen
    assert stopped == len(stops)
    assert seen == whole.seen
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    assert not (tmp_path / "stopped" / "midway.th").exists()


def test_a_damaged_stop_costs_no_more_than_the_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    solver_of(tmp_path / "whole").run()
    run_until(solver_of(tmp_path / "stopped"), (2, "train", 3))
    saved = tmp_path / "stopped" / "midway.th"
    saved.write_bytes(saved.read_bytes()[:-100])
    solver_of(tmp_path / "stopped").run()
    assert "Damaged" in caplog.text
    assert (tmp_path / "stopped" / "midway.damaged-1.th").exists()
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def train_and_stop(folder: str, stop: Any) -> str:
    """On each rank: train; only one of them is asked to stop."""
    torch.set_num_threads(1)
    distrib.init()
    solver = solver_of(Path(folder))
    if stop is not None:
        epoch, name, step, rank = stop
        if distrib.rank() == rank:
            solver.stop_at = {(epoch, name, step)}
    try:
        solver.run()
    except Preempted as error:
        return f"stopped by {error}"
    return "done"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_stop_after_the_same_step(tmp_path: Path, ranks: int) -> None:
    assert on_ranks(train_and_stop, str(tmp_path / "whole"), None, ranks=ranks) == ["done"] * ranks
    stops = [(1, "train", 1, 0), (2, "second", 1, 1)]
    for stop in stops:
        said = on_ranks(train_and_stop, str(tmp_path / "stopped"), stop, ranks=ranks)
        assert said == ["stopped by SIGUSR1"] * ranks, said
    assert (
        on_ranks(train_and_stop, str(tmp_path / "stopped"), None, ranks=ranks) == ["done"] * ranks
    )
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_another_number_of_ranks_resumes_after_the_commit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    said = on_ranks(train_and_stop, str(tmp_path), (2, "train", 1, 0))
    assert said == ["stopped by SIGUSR1"] * 2
    solver = solver_of(tmp_path)
    solver.run()
    assert "2 processes saved the steps since, and 1 can't resume" in caplog.text
    assert solver.seen[0] == (2, "train", 0)
    assert len(history(tmp_path)) == 3
