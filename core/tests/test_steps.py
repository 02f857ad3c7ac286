"""Runs that are stopped, killed or saved within an epoch, and resume with the very next step."""

from __future__ import annotations

import json
import math
import os
import random
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from .. import BaseSolver, checkpoint, distrib
from ..checkpoint import Policy
from ..data import loader
from ..ema import EMA
from ..stop import Stopped
from ..writer import wait_for_writes
from .processes import on_ranks

At = tuple[int, str, int]  # an epoch, a stage, a step


class Noisy(Dataset[torch.Tensor]):
    """Draws from every generator there is, in whatever process loads it."""

    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.randn(4) * random.random() * np.random.rand() + index / 22


class Solver(BaseSolver):
    """Two stages, one with averaged weights lent; every kind of data."""

    def __init__(
        self, folder: Path, workers: int = 0, plain: bool = False, policy: Policy | None = None
    ) -> None:
        super().__init__(folder, policy)
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
        distrib.broadcast_model(self.model)
        self.optim = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.ema = EMA({"model": self.model}, 0.9)
        self.between: list[int] = []  # what happens between stages
        self.register_stateful("model", "optim", "ema", "between")
        kwargs: dict[str, Any] = {"num_workers": workers}
        self.data = (
            DataLoader(Noisy(), 4, shuffle=True, **kwargs)
            if plain
            else loader(Noisy(), 2, shuffle=True, seed=1, **kwargs)
        )
        self.seen: list[At] = []
        self.stop_at: At | None = None

    def run(self) -> None:
        with self.running():
            while self.epoch <= 3:
                self.between.append(self.epoch)
                self.run_stage("train", self.train)
                self.optim.step()  # once more, by the last gradients
                self.run_stage("valid", self.valid)
                self.commit()

    def train(self) -> dict[str, float]:
        scale = torch.rand(())  # drawn before the loop
        steps = self.steps(self.data, every=1)
        for batch in steps:
            loss = (self.model(batch.double()) * scale).pow(2).mean()
            self.optim.zero_grad()
            loss.backward()
            distrib.sync_model(self.model)
            self.optim.step()
            self.ema.update()
            steps.log({"loss": loss}, len(batch))
            self.note("train", steps.step)
        return {**steps.metrics(), "scale": scale.item(), "between": len(self.between)}

    @torch.no_grad()
    def valid(self) -> dict[str, float]:
        steps = self.steps(self.data, every=1)
        with self.ema.swapped():
            for batch in steps:
                loss = self.model(batch.double()).pow(2).mean() * torch.rand(())
                steps.log({"loss": loss}, len(batch))
                self.note("valid", steps.step)
        return steps.metrics()

    def note(self, stage: str, step: int) -> None:
        at = (self.epoch, stage, step)
        self.seen.append(at)
        if at == self.stop_at:
            os.kill(os.getpid(), signal.SIGUSR1)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return dict(checkpoint.read(folder / "checkpoint.th")["model"])


def history(folder: Path) -> list[Any]:
    found: list[Any] = json.loads((folder / "history.json").read_text())
    for epoch in found:
        for stage in epoch.values():
            assert stage.pop("duration") > 0
    return found


def curves(folder: Path) -> list[Any]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row["metrics"].pop("duration", None)
    return rows


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


def run_until(solver: Solver, at: At) -> None:
    """Train, and be asked to stop in a step."""
    solver.stop_at = at
    with pytest.raises(Stopped):
        solver.run()


KINDS = [{"workers": 0}, {"workers": 2}, {"plain": True}]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_stopped_run_goes_on_with_the_next_step(tmp_path: Path, kind: dict[str, Any]) -> None:
    whole = solver_of(tmp_path / "whole", **kind)
    whole.run()
    stops = [(1, "train", 0), (2, "train", 3), (2, "valid", 1), (2, "valid", 4), (3, "train", 2)]
    seen: list[At] = []
    for stop in stops:
        solver = solver_of(tmp_path / "stopped", **kind)
        run_until(solver, stop)
        seen += solver.seen
    last = solver_of(tmp_path / "stopped", **kind)
    last.run()
    seen += last.seen
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    # An evaluation that is stopped begins again; no step of training is repeated.
    trained = [[at for at in found if at[1] == "train"] for found in (seen, whole.seen)]
    assert trained[0] == trained[1]
    assert len(seen) == len(whole.seen) + 2 + 5
    # A commit holds no position within an epoch.
    assert checkpoint.read(tmp_path / "whole" / "checkpoint.th")["checkpoint"]["commit"]


def test_a_damaged_stop_costs_no_more_than_the_epoch(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    solver_of(tmp_path / "whole").run()
    run_until(solver_of(tmp_path / "stopped"), (3, "train", 3))
    saved = tmp_path / "stopped" / "checkpoint.th"
    assert (saved.parent / "checkpoint.2.th").exists()
    saved.write_bytes(saved.read_bytes()[:-100])
    solver_of(tmp_path / "stopped").run()
    assert "Damaged" in caplog.text
    assert (tmp_path / "stopped" / "checkpoint.damaged-1.th").exists()
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_readers_prefer_a_commit(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_until(solver_of(tmp_path), (1, "train", 3))
    within = solver_of(tmp_path)
    assert within.restore(read_only=True)  # nothing else is there yet
    assert "none was committed" in caplog.text
    assert within.history == []
    run_until(solver_of(tmp_path), (3, "train", 3))
    committed: Any = solver_of(tmp_path)
    assert committed.restore(read_only=True)
    assert len(committed.history) == 2
    saved = checkpoint.read(tmp_path / "checkpoint.2.th")
    assert torch.equal(committed.model[0].weight, saved["model"]["0.weight"])


class Held(Solver):
    """Waits in some steps until a save within the epoch is due, or on disk."""

    hold_at: At = (0, "", 0)
    kill_at: At = (0, "", 0)

    def note(self, stage: str, step: int) -> None:
        super().note(stage, step)
        at = (self.epoch, stage, step)
        if at == self.kill_at:
            wait_for_writes()
            os.kill(os.getpid(), signal.SIGKILL)
        if at == self.hold_at:
            while self._current_stage and self._current_stage.requests.due == math.inf:
                threading.Event().wait(0.01)


def train_and_die(folder: str, hold: At, kill: At) -> list[At]:
    """Train with saves within the epoch; wait for one in a step, and die in a later one."""
    torch.set_num_threads(1)
    distrib.init()
    solver = solver_of(Path(folder), Held, policy=Policy(minutes=1e-4))
    assert isinstance(solver, Held)
    solver.hold_at, solver.kill_at = hold, kill
    solver.run()
    return solver.seen


def test_a_killed_run_repeats_no_more_than_since_the_last_save(tmp_path: Path) -> None:
    solver_of(tmp_path / "whole").run()
    said = on_ranks(
        train_and_die, str(tmp_path / "killed"), (2, "train", 3), (2, "train", 5), ranks=1
    )
    assert said == ["no result"]
    cursor = checkpoint.read(tmp_path / "killed" / "checkpoint.th")["checkpoint"]["cursor"]
    assert (cursor["stage"], cursor["step"] >= 4) == ("train", True)
    resumed = solver_of(tmp_path / "killed")
    resumed.run()
    assert resumed.seen[0] == (2, "train", cursor["step"])
    assert_same(tmp_path / "whole", tmp_path / "killed")


def test_ranks_save_after_the_same_step(tmp_path: Path) -> None:
    whole = on_ranks(train_and_stop, str(tmp_path / "whole"), None)
    assert whole == ["done"] * 2
    # Both ranks wait in their second step until a later one is proposed.
    hold, kill = (2, "train", 1), (2, "train", 5)
    assert on_ranks(train_and_die, str(tmp_path / "killed"), hold, kill) == ["no result"] * 2
    cursor = checkpoint.read(tmp_path / "killed" / "checkpoint.th")["checkpoint"]["cursor"]
    assert (cursor["stage"], len(cursor["ranks"])) == ("train", 2)
    assert on_ranks(train_and_stop, str(tmp_path / "killed"), None) == ["done"] * 2
    assert_same(tmp_path / "whole", tmp_path / "killed")


class Together(Solver):
    """Waits in the step that asks for a stop until all ranks have heard of it."""

    def note(self, stage: str, step: int) -> None:
        super().note(stage, step)
        asks = self.stop_at is not None and (self.epoch, stage, step) == self.stop_at
        if any(distrib.gather_objects(asks)):
            while self._current_stage and not self._current_stage.requests.signal:
                threading.Event().wait(0.01)


def train_and_stop(folder: str, stop: Any) -> str:
    """On each rank: train; only one of them is asked to stop."""
    torch.set_num_threads(1)
    distrib.init()
    solver = solver_of(Path(folder), Together)
    if stop is not None and distrib.rank() == stop[3]:
        solver.stop_at = stop[:3]
    try:
        solver.run()
    except Stopped as error:
        return f"stopped by {error}"
    return "done"


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_stop_together(tmp_path: Path, ranks: int) -> None:
    assert on_ranks(train_and_stop, str(tmp_path / "whole"), None, ranks=ranks) == ["done"] * ranks
    for stop in [(1, "train", 1, 0), (2, "valid", 1, 1)]:
        said = on_ranks(train_and_stop, str(tmp_path / "stopped"), stop, ranks=ranks)
        assert said == ["stopped by SIGUSR1"] * ranks, said
    said = on_ranks(train_and_stop, str(tmp_path / "stopped"), None, ranks=ranks)
    assert said == ["done"] * ranks
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_names_of_methods_are_refused_and_others_are_the_users(tmp_path: Path) -> None:
    solver: Any = solver_of(tmp_path)
    for name in ("steps", "commit", "restore"):
        with pytest.raises(AttributeError, match=name):
            setattr(solver, name, 3)
    solver.epochs = solver.wait = solver.checkpoints = solver.stage = 3
    mine = {"epoch": 1.0, "step": 2.0, "stage": 3.0}
    assert mine.items() <= solver.run_stage("valid", lambda: mine).items()
    assert curves(tmp_path) == [{"stage": "valid", "epoch": 1, "metrics": mine}]


def test_steps_outside_of_a_run_iterate_and_average(tmp_path: Path) -> None:
    def numbers() -> Iterator[int]:
        yield from range(4)

    steps = solver_of(tmp_path).steps(numbers())
    for number in steps:
        steps.log({"number": number, "half": torch.tensor(number / 2)}, weight=number)
    assert steps.metrics() == {"number": pytest.approx(14 / 6), "half": pytest.approx(7 / 6)}
    assert steps.step == 4
