"""Runs that are asked to stop where it is less usual."""

from __future__ import annotations

import itertools
import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from core import BaseSolver, averager, checkpoint, distrib, preemption
from core.loader import loader
from core.tests.processes import on_ranks
from core.tests.test_midway import Solver, assert_same, curves, history, run_until, solver_of
from core.xp import Preempted


def test_after_the_last_step_the_stage_ends_before_the_stop(tmp_path: Path) -> None:
    solver_of(tmp_path / "whole").run()
    run_until(solver_of(tmp_path / "stopped"), (1, "train", 10))
    rows = curves(tmp_path / "stopped")
    assert [row.get("step", "summary") for row in rows] == [*range(1, 12), "summary"]
    solver_of(tmp_path / "stopped").run()
    assert_same(tmp_path / "whole", tmp_path / "stopped")


class Again(BaseSolver):
    """Goes several times over the same shuffled data in an epoch, in all ways there are."""

    def __init__(self, folder: Path, stop_at: int = -1, workers: int = 0) -> None:
        super().__init__(folder)
        self.x, self.y = (
            loader(range(8), 2, shuffle=True, seed=seed, num_workers=workers)  # type: ignore[arg-type]
            for seed in range(2)
        )
        self.stop_at = stop_at
        self.seen: list[tuple[int, list[int]]] = []
        self.steps["all"] = 0

    def run(self) -> None:
        self.restore()
        while self.epoch == 1:
            self.run_stage("first", self.loop, self.x)
            self.run_stage("twice", self.twice)
            self.run_stage("last", self.loop, self.x)
            self.commit()

    def see(self, batch: torch.Tensor) -> None:
        self.seen.append((self.steps["all"], batch.tolist()))
        if self.steps["all"] == self.stop_at:
            os.kill(os.getpid(), signal.SIGUSR1)
        self.steps["all"] += 1

    def loop(self, data: Any) -> Any:
        average = self.averager()
        for batch in self.log_progress(self.current_stage, data):
            self.see(batch)
            average({"mean": batch.float().mean()})
        return average

    def twice(self) -> Any:
        average = self.averager()
        for index, batch in self.log_progress("twice", enumerate(self.y)):
            self.see(torch.cat([batch, next(iter(self.x))]))  # and others, within a step
            average(self.averager()({"index": index}))  # the latter is the step's own
        return {**average, "y": self.loop(itertools.chain(self.y, self.x))["mean"]}


def test_data_that_come_again_in_an_epoch_come_in_the_same_order(tmp_path: Path) -> None:
    whole = Again(tmp_path / "whole")
    whole.run()
    with_workers = Again(tmp_path / "workers", workers=1)
    with_workers.run()
    assert whole.seen == with_workers.seen
    assert len({str(batch) for _, batch in whole.seen}) > 15
    for stop_at in range(len(whole.seen)):
        stopped = Again(tmp_path / str(stop_at), stop_at)
        with suppress(Preempted):
            stopped.run()
        resumed = Again(tmp_path / str(stop_at))
        resumed.run()
        assert stopped.seen + resumed.seen == whole.seen
        assert history(tmp_path / str(stop_at)) == history(tmp_path / "whole")


class Loops(BaseSolver):
    """Stages that are left early, or average on their own."""

    def __init__(self, folder: Path, stop: bool = False, averages: bool = True) -> None:
        super().__init__(folder)
        self.stop = stop
        self.averages = averages
        self.seen: list[tuple[str, int]] = []

    def run(self) -> None:
        self.restore()
        self.run_stage("train", self.train)
        self.commit()

    def train(self) -> dict[str, float]:
        average = self.averager() if self.averages else averager()
        self.bar = self.log_progress("train", range(9))
        for step in self.bar:
            self.seen.append(("first", step))
            if step == 3:
                break
        for step in self.log_progress("trian", range(6)):  # a slip that costs nothing
            self.seen.append(("second", step))
            average({"x": step})
            self.log_step({"x": step}, every=2)
            if self.stop and step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
        return dict(average)


def test_a_loop_that_was_left_early_leaves_the_next_one_to_stop(tmp_path: Path) -> None:
    solver = Loops(tmp_path, stop=True)
    with pytest.raises(Preempted):
        solver.run()
    assert solver.seen[-1] == ("second", 2)
    solver = Loops(tmp_path)
    solver.run()
    assert solver.seen == [("second", 3), ("second", 4), ("second", 5)]
    assert solver.history[0]["train"]["x"] == 2.5
    assert [row["step"] for row in curves(tmp_path) if "step" in row] == [6, 8, 10]


def test_without_averages_of_the_solver_the_epoch_is_repeated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(Preempted):
        Loops(tmp_path, stop=True, averages=False).run()
    assert not (tmp_path / "midway.th").exists()
    assert "Stopped by SIGTERM in epoch 1, which will be repeated: train has no" in caplog.text
    solver = Loops(tmp_path, averages=False)
    solver.run()
    assert len(solver.seen) == 4 + 6
    assert solver.history[0]["train"]["x"] == 2.5


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_without_batches_resumes_with_the_next_example(
    tmp_path: Path, workers: int
) -> None:
    class Single(BaseSolver):
        def run(self) -> None:
            self.restore()
            self.run_stage("train", self.train)

        def train(self) -> dict[str, float]:
            self.seen: list[int] = []
            average = self.averager()
            data = loader(Numbers(), None, shuffle=True, num_workers=workers)
            for number in self.log_progress("train", data):
                self.seen.append(int(number))
                average({"x": number})
                if len(self.seen) == stop:
                    os.kill(os.getpid(), signal.SIGTERM)
            return dict(average)

    stop, first = 5, Single(tmp_path)
    with pytest.raises(Preempted):
        first.run()
    stop, second = 0, Single(tmp_path)
    second.run()
    assert sorted(first.seen + second.seen) == list(range(12))


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> int:
        return index


def test_a_stop_after_commits_that_saved_nothing(tmp_path: Path) -> None:
    class Rare(Solver):
        def commit(self, save_checkpoint: bool = True) -> None:
            super().commit(save_checkpoint=self.epoch == 3)

    solver_of(tmp_path / "whole", Rare).run()
    run_until(solver_of(tmp_path / "stopped", Rare), (2, "train", 3))
    solver = solver_of(tmp_path / "stopped", Rare)
    solver.run()
    assert solver.seen[0] == (2, "train", 0)  # as a new process counts: it is step 4
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_what_a_stop_saved_is_forgotten_with_its_epoch(tmp_path: Path) -> None:
    run_until(solver_of(tmp_path), (2, "train", 3))
    kept = (tmp_path / "midway.th").read_bytes()
    solver_of(tmp_path).run()
    (tmp_path / "midway.th").write_bytes(kept)  # as if a crash had come before its removal
    solver = solver_of(tmp_path)
    solver.run()
    assert (solver.epoch, solver.seen) == (4, [])

    run_until(solver_of(tmp_path / "back"), (3, "train", 3))
    (tmp_path / "back" / "checkpoint.1.th").replace(tmp_path / "back" / "checkpoint.th")
    solver = solver_of(tmp_path / "back")
    solver.run()
    assert solver.seen[0] == (2, "train", 0)
    assert_same(tmp_path, tmp_path / "back")


def test_a_stage_that_is_not_called_again_is_forgotten(tmp_path: Path) -> None:
    run_until(solver_of(tmp_path), (2, "train", 3))
    solver = solver_of(tmp_path)
    solver.restore()
    solver.commit()
    solver.run_stage("train", solver.train)
    assert solver.epoch == 3


def test_another_order_of_stages_is_refused(tmp_path: Path) -> None:
    run_until(solver_of(tmp_path), (1, "first", 0))
    solver = solver_of(tmp_path)
    solver.restore()
    with pytest.raises(RuntimeError, match="after stage 'train', and now comes 'valid'"):
        solver.run_stage("valid", solver.valid)


def test_a_second_signal_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preemption, "REPEAT", 3600.0)

    class Stubborn(Solver):
        def loop(self, name: str, scale: Any = 1.0, learn: bool = True) -> dict[str, float]:
            for _ in self.log_progress(name, range(2)):
                os.kill(os.getpid(), signal.SIGTERM)
                os.kill(os.getpid(), signal.SIGTERM)  # the same request again
                monkeypatch.setattr(preemption, "REPEAT", -1.0)  # as if it were much later
                os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("the run goes on")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt) as ended:
        Stubborn(tmp_path).run()
    assert not isinstance(ended.value, Preempted)
    assert signal.getsignal(signal.SIGTERM) is before


class Late(Solver):
    """Rank one is asked to stop where no rank waits for it, and comes late to the next epoch."""

    def commit(self, save_checkpoint: bool = True) -> None:
        super().commit(save_checkpoint)
        time.sleep(0.5 * distrib.rank())


def stop_late(folder: str) -> str:
    torch.set_num_threads(1)
    distrib.init()
    solver = Late(Path(folder))
    solver.stop_at = {(1, "second", 4)} if distrib.rank() == 1 else set()
    with pytest.raises(Preempted):
        solver.run()
    return f"epoch {solver.epoch} after {len(solver.seen)} steps"


def test_a_rank_that_stopped_waits_for_one_that_is_late(tmp_path: Path) -> None:
    one, other = on_ranks(stop_late, str(tmp_path))
    assert one == other


class Plain(Solver):
    """Has no `log_progress` in which it could stop, and is asked to in some epoch."""

    def loop(self, name: str, scale: Any = 1.0, learn: bool = True) -> dict[str, float]:
        if (self.epoch, name, 0) in self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return {"loss": torch.rand(()).item()}

    def commit(self, save_checkpoint: bool = False) -> None:
        super().commit(save_checkpoint)
        self.after = self.epoch


def stop_without_progress(folder: str, epoch: int) -> str:
    torch.set_num_threads(1)
    distrib.init()
    solver = Plain(Path(folder))
    last = distrib.rank() == distrib.world_size() - 1
    solver.stop_at = {(epoch, "train", 0)} if last else set()
    try:
        solver.run()
    except Preempted as error:
        assert solver.after == solver.epoch  # what follows a commit was done
        return f"stopped by {error} after epoch {len(solver.history)}"
    return "done"


def test_without_log_progress_a_run_stops_at_the_commit(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert stop_without_progress(str(tmp_path / "one"), 2) == "stopped by SIGTERM after epoch 2"
    assert "Stopped by SIGTERM after epoch 2: saved. The same command resumes" in caplog.text
    solver = solver_of(tmp_path / "one")
    assert solver.restore()  # although no commit was to be saved
    assert solver.epoch == 3
    assert stop_without_progress(str(tmp_path / "last"), 3) == "done"
    assert len(checkpoint.read(tmp_path / "last" / "checkpoint.th")["history"]) == 3
    said = on_ranks(stop_without_progress, str(tmp_path / "two"), 1)
    # The rank that was not asked may be a commit further before it knows.
    assert said[0] == said[1]
    assert said[0] in {f"stopped by SIGTERM after epoch {epoch}" for epoch in (1, 2)}, said
