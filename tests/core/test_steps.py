"""Training loops that are stopped, saved and resumed where it is less usual."""

from __future__ import annotations

import gc
import itertools
import math
import os
import random
import signal
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from core import BaseSolver, checkpoint, distrib, stop
from core.checkpoint import Policy
from core.data import loader, split_batch
from core.rng import position
from core.stop import Stopped
from core.tests.processes import on_ranks
from core.tests.test_steps import (
    Solver,
    assert_same,
    curves,
    history,
    run_until,
    solver_of,
    train_and_stop,
)
from core.trackers import Tracker
from core.utils import UserError

from ..commands import ROOT, run


def ask() -> None:
    """Ask this process to stop."""
    os.kill(os.getpid(), signal.SIGUSR1)


def _skipped(folder: Path) -> dict[str, float]:
    solver = BaseSolver(folder)

    def stage() -> dict[str, float]:
        steps = solver.steps(range(4), finite=["loss"], skip=True)
        for step in steps:
            steps.log({"loss": math.nan if step == 1 + distrib.rank() else 1.0, "step": step})
        return steps.metrics()

    return solver.run_stage("train", stage)


def test_all_ranks_skip_a_bad_step(tmp_path: Path) -> None:
    for metrics in on_ranks(_skipped, tmp_path):
        assert metrics["skipped"] == 2
        assert metrics["step"] == 1.5  # of 0 and 3


class Numbers(Dataset[int]):
    def __init__(self, size: int = 12) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


def cursor_of(folder: Path) -> Any:
    return checkpoint.read(folder / "checkpoint.th")["checkpoint"]["cursor"]


# ------------------------------------------------------------------------------- where a run stops


def test_after_the_last_step_the_stage_ends_before_the_stop(tmp_path: Path) -> None:
    solver_of(tmp_path / "whole").run()
    run_until(solver_of(tmp_path / "stopped"), (1, "train", 10))
    rows = curves(tmp_path / "stopped")
    found = [row.get("step", "summary") for row in rows if row["stage"] == "train"]
    assert found == [*range(1, 12), "summary"]
    solver_of(tmp_path / "stopped").run()
    assert_same(tmp_path / "whole", tmp_path / "stopped")


class TwoEpochs(BaseSolver):
    """Trains for two epochs."""

    def run(self) -> None:
        with self.running():
            while self.epoch <= 2:
                self.run_stage("train", self.train)
                self.commit()

    def train(self) -> dict[str, float]:
        raise NotImplementedError


class Again(BaseSolver):
    """Goes several times over the same shuffled data in an epoch, in all ways there are."""

    def __init__(self, folder: Path, stop_at: int = -1, workers: int = 0) -> None:
        super().__init__(folder)
        self.x, self.y = (
            loader(Numbers(8), 2, shuffle=True, seed=seed, num_workers=workers) for seed in range(2)
        )
        self.stop_at = stop_at
        self.count = 0
        self.register_stateful("count")
        self.seen: list[tuple[int, list[int]]] = []

    def run(self) -> None:
        with self.running():
            while self.epoch == 1:
                self.run_stage("first", self.loop, self.x)
                self.run_stage("twice", self.twice)
                self.run_stage("both", self.loop, itertools.chain(self.y, self.x))
                self.run_stage("last", self.loop, self.x)
                self.commit()

    def see(self, batch: torch.Tensor) -> None:
        self.seen.append((self.count, batch.tolist()))
        if self.count == self.stop_at:
            ask()
        self.count += 1

    def loop(self, data: Any) -> dict[str, float]:
        steps = self.steps(data)
        for batch in steps:
            self.see(batch)
            steps.log({"mean": batch.float().mean()})
        return steps.metrics()

    def twice(self) -> dict[str, float]:
        before = torch.cat([*self.log_progress("before", self.y)])  # a pass that is no loop
        steps = self.steps(enumerate(self.y))
        for index, batch in steps:
            self.see(torch.cat([batch, next(iter(self.x))]))  # and other data, within a step
            steps.log(self.averager()({"index": index}))
        return {**steps.metrics(), "before": (before * torch.arange(8)).sum().item()}


def test_data_that_come_again_in_an_epoch_come_in_the_same_order(tmp_path: Path) -> None:
    whole = Again(tmp_path / "whole")
    whole.run()
    with_workers = Again(tmp_path / "workers", workers=1)
    with_workers.run()
    assert whole.seen == with_workers.seen
    assert len({str(batch) for _, batch in whole.seen}) > 15
    for stop_at in range(len(whole.seen)):
        stopped = Again(tmp_path / str(stop_at), stop_at)
        with suppress(Stopped):
            stopped.run()
        resumed = Again(tmp_path / str(stop_at))
        resumed.run()
        assert stopped.seen + resumed.seen == whole.seen
        assert history(tmp_path / str(stop_at)) == history(tmp_path / "whole")


class Left(BaseSolver):
    """Leaves its loops early, and is asked to stop in the first."""

    def __init__(self, folder: Path, asked: bool = False) -> None:
        super().__init__(folder)
        self.asked = asked
        self.seen: list[tuple[str, int]] = []

    def run(self) -> None:
        with self.running():
            while self.epoch <= 2:
                self.run_stage("left", self.left)
                self.run_stage("train", self.train)
                self.commit()

    def left(self) -> dict[str, float]:
        for step in self.log_progress("plain", range(9)):
            if step == 3:
                break
        here = position.get()
        steps = self.steps(range(9), every=1)
        for step in steps:
            self.seen.append(("left", step))
            steps.log({"x": step})
            if step == 3:
                break
        assert position.get() == here
        if self.asked:
            ask()
        return steps.metrics()

    def train(self) -> dict[str, float]:
        steps = self.steps(range(6), every=2)
        for step in steps:
            self.seen.append(("train", step))
            steps.log({"x": step})
        return steps.metrics()


def test_a_loop_that_was_left_early_leaves_the_next_one_to_stop(tmp_path: Path) -> None:
    Left(tmp_path / "whole").run()
    solver = Left(tmp_path / "stopped", asked=True)
    with pytest.raises(Stopped):
        solver.run()
    assert solver.seen[-1] == ("train", 0)
    solver = Left(tmp_path / "stopped")
    solver.run()
    assert solver.seen[:6] == [*(("train", step) for step in range(1, 6)), ("left", 0)]
    assert [epoch["left"]["x"] for epoch in solver.history] == [1.5, 1.5]
    assert [epoch["train"]["x"] for epoch in solver.history] == [2.5, 2.5]
    for folder in (tmp_path / "whole", tmp_path / "stopped"):
        points = {"left": [*range(1, 9)], "train": [*range(2, 13, 2)]}
        for stage, expected in points.items():
            rows = [row for row in curves(folder) if row["stage"] == stage and "step" in row]
            assert [row["step"] for row in rows] == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_a_loader_without_batches_resumes_with_the_next_example(
    tmp_path: Path, workers: int
) -> None:
    class Single(BaseSolver):
        def run(self) -> None:
            with self.running():
                self.run_stage("train", self.train)
                self.commit()

        def train(self) -> dict[str, float]:
            self.seen: list[int] = []
            steps = self.steps(loader(Numbers(), None, shuffle=True, num_workers=workers))
            for number in steps:
                self.seen.append(int(number))
                steps.log({"x": number})
                if len(self.seen) == stop_after:
                    ask()
            return steps.metrics()

    stop_after, first = 5, Single(tmp_path)
    with pytest.raises(Stopped):
        first.run()
    stop_after, second = 0, Single(tmp_path)
    second.run()
    assert len(first.seen) == 5
    assert sorted(first.seen + second.seen) == list(range(12))
    assert second.history[0]["train"]["x"] == 5.5


class Stream:
    """Data that knows where it is, as do the loaders of torchdata."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[int]:
        while self.next < 10:
            self.next += 1
            yield self.next - 1
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@pytest.mark.parametrize("stop_at", [2, 7])
def test_data_with_a_state_resumes_where_it_is(tmp_path: Path, stop_at: int) -> None:
    class Streaming(TwoEpochs):
        def __init__(self) -> None:
            super().__init__(tmp_path)
            self.stream = Stream()
            self.register_stateful("stream")
            self.seen: list[int] = []

        def train(self) -> dict[str, float]:
            steps = self.steps(self.stream, total=10)
            for number in steps:
                self.seen.append(number)
                steps.log({"x": number})
                if (self.epoch, number) == asked:
                    ask()
            return steps.metrics()

    asked, first = (2, stop_at), Streaming()
    with pytest.raises(Stopped):
        first.run()
    asked, second = (0, 0), Streaming()
    second.run()
    assert first.seen + second.seen == [*range(10), *range(10)]
    assert [epoch["train"]["x"] for epoch in second.history] == [4.5, 4.5]


def test_a_stop_after_commits_that_saved_nothing(tmp_path: Path) -> None:
    class Rare(Solver):
        def commit(self, save_checkpoint: bool = True) -> None:
            super().commit(save_checkpoint=self.epoch == 3)

    solver_of(tmp_path / "whole", Rare).run()
    run_until(solver_of(tmp_path / "stopped", Rare), (2, "train", 3))
    solver = solver_of(tmp_path / "stopped", Rare)
    solver.run()
    assert solver.seen[0] == (2, "train", 4)
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_what_a_stop_saved_is_forgotten_with_its_epoch(tmp_path: Path) -> None:
    solver_of(tmp_path / "whole").run()
    keep = Policy(last=3)
    run_until(solver_of(tmp_path / "back", policy=keep), (3, "train", 3))
    (tmp_path / "back" / "checkpoint.1.th").replace(tmp_path / "back" / "checkpoint.th")
    solver = solver_of(tmp_path / "back", policy=keep)
    solver.run()
    assert solver.seen[0] == (2, "train", 0)
    assert_same(tmp_path / "whole", tmp_path / "back")


def test_a_stage_that_is_not_called_again_is_forgotten(tmp_path: Path) -> None:
    run_until(solver_of(tmp_path), (2, "train", 3))
    solver = solver_of(tmp_path)
    solver.restore()
    solver.commit()
    solver.run_stage("train", solver.train)
    assert solver.epoch == 3
    assert {"stage": "train", "epoch": 3} in [
        {key: row[key] for key in ("stage", "epoch")} for row in curves(tmp_path)
    ]


class Told(Tracker):
    """Keeps what it is told of the run."""

    def __init__(self, xp: Any) -> None:
        super().__init__(xp)
        self.told: list[str] = []

    def log_hyperparams(self, *_: Any) -> None:
        self.told.append("config")

    def log_metrics(self, stage: str, metrics: Any, step: int) -> None:
        self.told.append(f"{stage} {step}")

    def finish(self) -> None:
        self.told.append("finish")


def test_trackers_are_told_of_a_run_that_resumes_within_an_epoch(tmp_path: Path) -> None:
    run_until(solver_of(tmp_path), (3, "train", 3))
    solver = solver_of(tmp_path)
    solver.result_logger.add_tracker(told := Told(solver.xp))
    solver.run()
    assert told.told == ["config", "train 3", "valid 3", "finish"]


def test_a_stopped_solver_runs_again_in_the_same_process(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a notebook, where a cell was interrupted."""
    solver_of(tmp_path / "whole").run()
    caplog.set_level("INFO")
    caplog.clear()
    solver = solver_of(tmp_path / "stopped")
    for at in [(1, "train", 3), (2, "valid", 10)]:  # the latter is met by the commit
        run_until(solver, at)
    solver.run()
    said = [line.partition(":")[0] for line in caplog.messages]
    assert [line for line in said if "starts" in line or "resumes in" in line] == [
        "Run stopped starts in epoch 1",
        "Run stopped resumes in epoch 1",
        "Run stopped resumes in epoch 3",
    ]
    assert said.count("Config of run stopped") == 1
    trained = [at for at in solver.seen if at[1] == "train"]
    assert trained == [(epoch, "train", step) for epoch in (1, 2, 3) for step in range(11)]
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_a_solver_that_was_interrupted_before_a_save_trains_no_second_time(tmp_path: Path) -> None:
    class Interrupted(Solver):
        def valid(self) -> dict[str, float]:
            raise KeyboardInterrupt

    solver = solver_of(tmp_path, Interrupted)
    with pytest.raises(KeyboardInterrupt):
        solver.run()
    with pytest.raises(UserError, match="make a new one"):
        solver.run()
    resumed = solver_of(tmp_path)
    resumed.run()
    assert resumed.seen[0] == (1, "train", 0)
    assert [[*epoch] for epoch in history(tmp_path)] == [["train", "valid"]] * 3


def test_metrics_logged_in_a_stage_that_was_stopped_are_kept(tmp_path: Path) -> None:
    class Logging(Solver):
        def train(self) -> dict[str, float]:
            if self.epoch == 1:
                self.log_metrics("before", {"number": 1})
            return super().train()

        def note(self, stage: str, step: int) -> None:
            super().note(stage, step)
            if step == 1:
                self.log_metrics("early", {"number": 2})

    run_until(solver_of(tmp_path, Logging), (1, "train", 3))
    solver_of(tmp_path, Logging).run()
    [first, *_] = checkpoint.read(tmp_path / "checkpoint.th")["history"]
    assert first["before"] == {"number": 1}
    assert first["early"] == {"number": 2}
    rows = [row["stage"] for row in curves(tmp_path) if "step" not in row and row["epoch"] == 1]
    assert rows.count("before") == 1


def test_a_solver_for_looking_trains_nothing(tmp_path: Path) -> None:
    solver_of(tmp_path).run()
    solver = solver_of(tmp_path)
    solver.restore(read_only=True)
    with pytest.raises(UserError, match="read_only"):
        solver.run()
    assert not solver.seen


def test_a_solver_that_has_trained_is_freed_at_once(tmp_path: Path) -> None:
    solver = solver_of(tmp_path)
    solver.run()
    alive = weakref.ref(solver.model)
    gc.disable()
    try:
        del solver
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("number", "limit"),
    [(signal.SIGTERM, "REPEAT"), (signal.SIGINT, "REPEAT_OF_CTRL_C")],
)
def test_a_second_signal_ends_the_run_at_once(
    number: int, limit: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stop, limit, 3600.0)

    class Stubborn(Solver):
        def train(self) -> dict[str, float]:
            for _ in self.steps(range(2)):
                os.kill(os.getpid(), number)
                os.kill(os.getpid(), number)  # the same request again
                monkeypatch.setattr(stop, limit, -1.0)  # as if it were much later
                os.kill(os.getpid(), number)
            raise AssertionError("the run goes on")

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        Stubborn(tmp_path).run()
    assert signal.getsignal(number) is before


SCRIPT = """
import os, signal, sys
from core import BaseSolver, setup_logging

class Solver(BaseSolver):
    def run(self):
        with self.running():
            self.run_stage("train", self.train)
            self.commit()

    def train(self):
        for step in self.steps(range(5)):
            if step == 2 and sys.argv[1] == "stop":
                os.kill(os.getpid(), signal.SIGINT)

setup_logging(with_file_log=False)
Solver("run").run()
print("the end")
"""


def test_ctrl_c_ends_a_script_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    code = "import runpy, sys; sys.argv = ['script.py', {!r}]; runpy.run_path('script.py')"
    said = run(tmp_path, "-c", code.format("stop"), code=130, env=env)
    assert "Stopped by SIGINT after step 3 of train in epoch 1: saved" in said
    assert "Traceback" not in said
    assert "the end" not in said
    assert "the end" in run(tmp_path, "-c", code.format("resume"), env=env)


def stop_after_a_solver_of_its_own(folder: str, stop: Any) -> str:
    """On each rank; rank zero has looked at another run before."""
    if int(os.environ["RANK"]) == 0:
        BaseSolver(Path(folder) / "other")
    return train_and_stop(folder, stop)


def test_a_solver_on_one_rank_alone_disturbs_no_stop(tmp_path: Path) -> None:
    said = on_ranks(stop_after_a_solver_of_its_own, str(tmp_path), (1, "train", 1, 1))
    assert said == ["stopped by SIGUSR1"] * 2


class Late(Solver):
    """Rank one is asked to stop where no rank waits for it, and comes late to the next epoch."""

    def commit(self, save_checkpoint: bool = True) -> None:
        super().commit(save_checkpoint)
        time.sleep(0.5 * distrib.rank())


def stop_late(folder: str) -> str:
    torch.set_num_threads(1)
    solver = solver_of(Path(folder), Late)
    solver.stop_at = (1, "valid", 5) if distrib.rank() == 1 else None
    with pytest.raises(Stopped) as stopped:
        solver.run()
    return f"{stopped.value} in epoch {solver.epoch} after {len(solver.seen)} steps"


def test_a_rank_that_stopped_waits_for_one_that_is_late(tmp_path: Path) -> None:
    one, other = on_ranks(stop_late, str(tmp_path))
    assert one == other
    assert one.startswith("SIGUSR1 in epoch")


class Plain(Solver):
    """Has no loop in which it could stop, and is asked to in some epoch."""

    def train(self) -> dict[str, float]:
        if (self.epoch, "train", 0) == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        numbers = [float(number) for number in self.log_progress("train", range(3))]
        return {"loss": torch.rand(()).item(), "done": sum(numbers)}

    valid = train

    def commit(self, save_checkpoint: bool = False) -> None:
        super().commit(save_checkpoint)
        self.after = self.epoch


def stop_without_steps(folder: str, epoch: int) -> str:
    torch.set_num_threads(1)
    solver = Plain(Path(folder))
    last = distrib.rank() == distrib.world_size() - 1
    solver.stop_at = (epoch, "train", 0) if last else None
    try:
        solver.run()
    except Stopped as error:
        assert solver.after == solver.epoch  # what follows a commit was done
        assert all(stages["valid"]["done"] == 3 for stages in solver.history)
        return f"stopped by {error} after epoch {len(solver.history)}"
    return "done"


def test_a_stage_without_steps_is_not_interrupted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert stop_without_steps(str(tmp_path / "one"), 2) == "stopped by SIGTERM after epoch 2"
    [said] = [message for message in caplog.messages if "SIGTERM" in message]
    assert "epoch 2" in said
    solver = Plain(tmp_path / "one")
    assert solver.restore()  # although no commit was to be saved
    assert solver.epoch == 3
    assert stop_without_steps(str(tmp_path / "last"), 3) == "done"
    assert len(checkpoint.read(tmp_path / "last" / "checkpoint.th")["history"]) == 3
    ends = on_ranks(stop_without_steps, str(tmp_path / "two"), 1)
    # The rank that was not asked may be a commit further before it knows.
    assert ends[0] == ends[1]
    assert ends[0] in {f"stopped by SIGTERM after epoch {epoch}" for epoch in (1, 2)}, ends


# --------------------------------------------------------------- what a save holds, and when it is


class Lent(Solver):
    """Trains with averaged weights lent, then without; is asked to stop meanwhile."""

    def train(self) -> dict[str, float]:
        if self.epoch == 1:
            return super().train()
        steps = self.steps(range(5), every=0)
        with self.ema.swapped():
            for _ in steps:
                steps.log({"x": 1.0})
                self.note("train", steps.step)
        return steps.metrics()

    def valid(self) -> dict[str, float]:
        steps = self.steps(range(5), every=0)
        for _ in steps:
            steps.log({"x": 1.0})
            self.note("valid", steps.step)
        return steps.metrics()


def test_nothing_is_saved_or_loaded_while_weights_are_lent(tmp_path: Path) -> None:
    solver = solver_of(tmp_path, Lent)
    run_until(solver, (2, "train", 1))
    assert solver.seen[-2:] == [(2, "train", 4), (2, "valid", 0)]
    cursor = cursor_of(tmp_path)
    assert (cursor["stage"], cursor["step"]) == ("valid", 1)
    saved = checkpoint.read(tmp_path / "checkpoint.th")
    own, averaged = (solver.state_dict()["model"], solver.state_dict()["ema"]["model"])
    for name, value in saved["model"].items():
        assert torch.equal(value, own[name])
        assert not torch.equal(value, averaged[name])
    other = solver_of(tmp_path, Lent)
    with other.ema.swapped():
        with pytest.raises(RuntimeError, match="lent"):
            other.commit()
        with pytest.raises(RuntimeError, match="lent"):
            other.restore()
    assert other.history == []


class Recorder(Tracker):
    """Keeps what it is told."""

    def __init__(self, xp: Any, told: list[Any]) -> None:
        super().__init__(xp)
        self.told = told

    def log_metrics(self, stage: str, metrics: Any, step: int) -> None:
        self.told.append(("metrics", stage, step, {**metrics, "duration": 0.0}))

    def log_step(self, stage: str, metrics: Any, step: int, epoch: int) -> None:
        self.told.append(("step", stage, step, dict(metrics)))

    def log_image(self, stage: str, key: str, image: torch.Tensor, step: int) -> None:
        self.told.append(("image", stage, step, image.tolist()))

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        self.told.append(("text", stage, step, text))


class Prepared(Solver):
    """Changes state and logs before its loops, and between its stages."""

    def __init__(self, folder: Path, told: list[Any] | None = None) -> None:
        super().__init__(folder)
        self.result_logger.add_tracker(Recorder(self.xp, [] if told is None else told))
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optim, 1, gamma=0.5)
        self.register_stateful("schedule")
        self.told_before = 0
        self.restored = 0

    def run(self) -> None:
        with self.running():
            while self.epoch <= 3:
                self.log_text("train", "begin", f"epoch {self.epoch}")
                self.schedule.step()
                self.run_stage("first", self.first)
                self.log_text("train", "between", f"epoch {self.epoch}")
                self.run_stage("train", self.train)
                self.commit()

    def first(self) -> dict[str, float]:
        return {"x": torch.rand(()).item()}

    def train(self) -> dict[str, float]:
        self.schedule.step()
        self.log_image("train", "before", torch.rand(1, 2, 2))
        return super().train() | {"lr": self.optim.param_groups[0]["lr"]}

    def on_restore(self) -> None:
        self.restored += 1


def test_reaching_the_cursor_logs_and_changes_nothing_twice(tmp_path: Path) -> None:
    told: dict[str, list[Any]] = {"whole": [], "stopped": []}
    solver_of(tmp_path / "whole", Prepared, told=told["whole"]).run()
    for at in [(1, "train", 0), (2, "train", 3), (2, "train", 4)]:
        run_until(solver_of(tmp_path / "stopped", Prepared, told=told["stopped"]), at)
    last = solver_of(tmp_path / "stopped", Prepared, told=told["stopped"])
    assert isinstance(last, Prepared)
    last.run()
    assert told["stopped"] == told["whole"]
    assert {kind for kind, *_ in told["whole"]} == {"metrics", "step", "image", "text"}
    assert_same(tmp_path / "whole", tmp_path / "stopped")
    assert last.restored == 2  # in restore, and where the loop begins


class Accumulating(Solver):
    """Steps once in three batches; `zeros` says when, and to what, gradients are set back."""

    zeros = "none after"

    def train(self) -> dict[str, float]:
        steps = self.steps(self.data, every=1)
        for number, batch in enumerate(steps, steps.step):
            if self.zeros == "before" and number % 3 == 0:
                self.optim.zero_grad()
            loss = self.model(batch.double()).pow(2).mean() / 3
            loss.backward()
            if number % 3 == 2:
                self.optim.step()
                self.ema.update()
                if self.zeros != "before":
                    self.optim.zero_grad(set_to_none=self.zeros == "none after")
            steps.log({"loss": loss}, len(batch))
            self.note("train", number)
        self.optim.zero_grad()
        return steps.metrics()


@pytest.mark.parametrize("zeros", ["none after", "zeros after", "before"])
def test_pending_gradients_delay_a_save(tmp_path: Path, zeros: str) -> None:
    class Kind(Accumulating):
        pass

    Kind.zeros = zeros
    solver_of(tmp_path / "whole", Kind).run()
    for epoch, asked, done in [(1, 0, 3), (2, 3, 6), (2, 8, 9)]:
        run_until(solver_of(tmp_path / "stopped", Kind), (epoch, "train", asked))
        assert cursor_of(tmp_path / "stopped")["step"] == done
    solver_of(tmp_path / "stopped", Kind).run()
    assert_same(tmp_path / "whole", tmp_path / "stopped")


def test_a_commit_with_pending_gradients_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    solver = Solver(tmp_path)
    solver.run_stage("train", solver.train)
    solver.commit()
    assert "radients" not in caplog.text
    solver.run_stage("none", dict)
    solver.model(torch.ones(1, 4).double()).sum().backward()
    solver.commit()
    assert "radients" in caplog.text


class Gan(Solver):
    """Two optimizers; the second loss leaves gradients in the first model."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.critic = nn.Linear(4, 1).double()
        self.critic_optim = torch.optim.Adam(self.critic.parameters())
        self.register_stateful("critic", "critic_optim")

    def train(self) -> dict[str, float]:
        steps = self.steps(self.data)
        for batch in steps:
            examples = batch.double()
            self.critic_optim.zero_grad()
            self.critic(examples).mean().backward()
            self.critic_optim.step()
            self.optim.zero_grad()
            loss = self.critic(self.model(examples).expand(-1, 4)).mean()
            loss.backward()
            self.optim.step()
            steps.log({"loss": loss}, len(batch))
            self.note("train", steps.step)
        return steps.metrics()


def test_gradients_that_another_loss_leaves_delay_a_save_by_a_step(tmp_path: Path) -> None:
    solver_of(tmp_path / "whole", Gan).run()
    run_until(solver_of(tmp_path / "stopped", Gan), (1, "train", 3))
    assert cursor_of(tmp_path / "stopped")["step"] == 5
    solver_of(tmp_path / "stopped", Gan).run()
    assert_same(tmp_path / "whole", tmp_path / "stopped")


# ------------------------------------------------------------------------------------- own commits


class Own(Solver):
    """Commits as Flashy's users do."""

    def commit(self, save_checkpoint: bool = True) -> None:
        self.history.append(self._pending_metrics)
        torch.save(self.state_dict(), self.checkpoint_path)
        self._start_epoch()
        self.xp.link.update_history(self.history)


class Bare(Own):
    """Runs as Flashy's users do, too."""

    def run(self) -> None:
        self.restore()
        while self.epoch <= 3:
            self.run_stage("train", self.train)
            self.run_stage("valid", self.valid)
            self.commit()


class Extended(Solver):
    """A commit that calls the commit of the base."""

    def commit(self, save_checkpoint: bool = True) -> None:
        super().commit(save_checkpoint)


def test_an_extended_commit_stops_within_the_first_epoch_after_a_resume(tmp_path: Path) -> None:
    solver_of(tmp_path / "whole", Extended).run()
    run_until(solver_of(tmp_path / "stopped", Extended), (2, "train", 3))
    assert cursor_of(tmp_path / "stopped")["step"] == 4
    run_until(solver_of(tmp_path / "stopped", Extended), (2, "train", 6))
    assert cursor_of(tmp_path / "stopped")["step"] == 7
    solver_of(tmp_path / "stopped", Extended).run()
    assert_same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.parametrize("kind", [Own, Bare])
def test_own_commits_resume_and_skip_nothing(tmp_path: Path, kind: type[Own]) -> None:
    class Interrupted(kind):  # type: ignore[valid-type,misc]
        killed_in = 0

        def valid(self) -> dict[str, float]:
            if self.epoch == self.killed_in:
                raise KeyboardInterrupt
            found: dict[str, float] = super().valid()
            return found

    solver_of(tmp_path / "whole", kind).run()
    seen: list[tuple[int, str]] = []
    for killed_in in (1, 2, 3, 0):
        solver = solver_of(tmp_path / "killed", Interrupted)
        assert isinstance(solver, Interrupted)
        solver.killed_in = killed_in
        with suppress(KeyboardInterrupt):
            solver.run()
        seen += dict.fromkeys(at[:2] for at in solver.seen)
    assert seen == [(e, s) for e in (1, 2, 3) for s in ("train", "train", "valid")]
    for folder in ("whole", "killed"):
        found = history(tmp_path / folder)
        assert [[*epoch] for epoch in found] == [["train", "valid"]] * 3
    done = solver_of(tmp_path / "killed", kind)
    done.run()
    assert (done.epoch, done.seen) == (4, [])
    loaded = solver_of(tmp_path / "killed", kind)
    assert loaded.restore(read_only=True)
    for one, other in zip(loaded.model.parameters(), done.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_stop_between_own_commits_skips_nothing(tmp_path: Path) -> None:
    run_until(solver_of(tmp_path, Own), (2, "train", 3))
    assert "rng" not in torch.load(tmp_path / "checkpoint.th")  # a file of the user's own
    solver = solver_of(tmp_path, Own)
    solver.run()
    assert solver.seen[0] == (3, "train", 0)
    assert [[*epoch] for epoch in history(tmp_path)] == [["train", "valid"]] * 3


def test_a_position_of_another_epoch_is_ignored(tmp_path: Path) -> None:
    """As of a user's commit that adds to the history of a file that was saved within an epoch."""
    run_until(solver_of(tmp_path), (2, "train", 3))
    file = tmp_path / "checkpoint.th"
    state = torch.load(file, weights_only=True)
    state["history"].append(state["history"][0])
    torch.save(state, file)
    solver = solver_of(tmp_path)
    solver.run()
    assert solver.seen[0] == (3, "train", 0)
    assert len(history(tmp_path)) == 3


# ------------------------------------------------------------------------------------------ nested


class Inner(BaseSolver):
    """A solver that another one makes and trains in each of its steps."""

    def __init__(self, folder: Path, asked: bool = False) -> None:
        super().__init__(folder)
        self.asked = asked
        self.data = loader(Numbers(), 4, shuffle=True, seed=3)
        self.seen: list[list[int]] = []

    def train(self) -> dict[str, float]:
        steps = self.steps(self.data)
        for batch in steps:
            self.seen.append(batch.tolist())
            steps.log({"mean": batch.float().mean()})
            if self.asked:
                ask()
        return steps.metrics()


class Outer(BaseSolver):
    """Trains others in its steps, and is asked to stop while it does."""

    def __init__(
        self, folder: Path, nests: bool = True, stop_at: int = -1, scope: bool = False
    ) -> None:
        super().__init__(folder)
        self.nests, self.stop_at, self.scope = nests, stop_at, scope
        self.data = loader(Numbers(), 3, shuffle=True, seed=3)
        self.seen: list[list[int]] = []
        self.inner: list[list[list[int]]] = []

    def run(self) -> None:
        with self.running():
            while self.epoch <= 2:
                self.run_stage("other", dict)
                self.run_stage("train", self.train)
                self.commit()

    def train(self) -> dict[str, float]:
        steps = self.steps(self.data)
        for batch in steps:
            if self.nests:
                here = position.get()
                number = len(self.inner) if self.scope else 0
                inner = Inner(self.folder / f"inner{number}", steps.step == self.stop_at)
                with inner.running() if self.scope else nullcontext():
                    found = inner.run_stage("train", inner.train)
                    if self.scope:
                        inner.commit()
                self.inner.append(inner.seen)
                assert found["mean"] == 5.5
                assert self.current_stage == "train"
                assert position.get() == here
            self.seen.append(batch.tolist())
            steps.log({"mean": batch.float().mean()})
        return steps.metrics()


@pytest.mark.parametrize("scope", [False, True])
def test_nested_solvers_have_positions_of_their_own(tmp_path: Path, scope: bool) -> None:
    alone, plain = Inner(tmp_path / "alone"), Outer(tmp_path / "plain", nests=False)
    alone.run_stage("train", alone.train)
    plain.run()
    whole = Outer(tmp_path / "whole", scope=scope)
    whole.run()
    assert whole.seen == plain.seen
    assert whole.inner == [alone.seen] * 8
    stopped = Outer(tmp_path / "stopped", stop_at=1, scope=scope)
    with pytest.raises(Stopped):
        stopped.run()
    assert len(stopped.seen) == 2
    assert [len(seen) for seen in stopped.inner] == [3, 3]  # it was not stopped in the inner loop
    resumed = Outer(tmp_path / "stopped")
    resumed.run()
    assert stopped.seen + resumed.seen == whole.seen
    assert stopped.inner + resumed.inner == whole.inner


# ------------------------------------------------------------------------ another number of ranks


class Elastic(TwoEpochs):
    """Sees each example once an epoch, on any number of ranks."""

    def __init__(self, folder: Path, stop_at: int, beta: float) -> None:
        super().__init__(folder)
        self.stop_at, self.beta = stop_at, beta
        self.data = loader(Numbers(132), split_batch(6), shuffle=True, seed=1)
        self.weight = nn.Linear(1, 1)
        distrib.broadcast_model(self.weight)
        self.register_stateful("weight")
        self.seen: list[int] = []

    def train(self) -> dict[str, float]:
        steps = self.steps(self.data, every=0, beta=self.beta)
        for batch in steps:
            self.seen += batch.tolist()
            steps.log({"mean": batch.double().mean()}, len(batch))
            if (self.epoch, steps.step) == (2, self.stop_at):
                distrib.barrier()
                ask()
                while self._current_stage and self._current_stage.requests.due == math.inf:
                    threading.Event().wait(0.01)
                distrib.barrier()  # all know after which step to stop
        return steps.metrics()


def elastic(folder: str, stop_at: int, beta: float = 1.0) -> Any:
    """Train on each rank; return what this one saw and how it ended."""
    torch.set_num_threads(1)
    random.seed(distrib.rank())
    np.random.seed(distrib.rank())
    torch.manual_seed(distrib.rank())
    solver = Elastic(Path(folder), stop_at, beta)
    try:
        solver.run()
    except Stopped:
        return solver.seen, "stopped"
    except UserError as error:
        return solver.seen, str(error)
    return solver.seen, [epoch["train"]["mean"] for epoch in solver.history]


@pytest.mark.parametrize("ranks", [(1, 2, 3), (3, 2, 1), (2, 1, 3), (3, 1, 2)], ids=str)
def test_another_number_of_ranks_resumes_within_the_epoch(
    tmp_path: Path, ranks: tuple[int, int, int]
) -> None:
    seen: list[int] = []
    for number, stop_at in zip(ranks, (2, 9, -1), strict=True):
        said = on_ranks(elastic, str(tmp_path), stop_at, ranks=number)
        seen += [example for examples, _ in said for example in examples]
        if stop_at > 0:
            assert [end for _, end in said] == ["stopped"] * number
            step = cursor_of(tmp_path)["step"]
            assert stop_at < step < 22
            assert len(seen) == 132 + 6 * step
    assert [end for _, end in said] == [[65.5, 65.5]] * number
    assert sorted(seen) == sorted([*range(132)] * 2)


def test_another_dataset_is_refused(tmp_path: Path) -> None:
    def make(size: int) -> Elastic:
        solver = Elastic(tmp_path, 2, 1.0)
        solver.data = loader(Numbers(size), 6, shuffle=True, seed=1)
        return solver

    with pytest.raises(Stopped):
        make(132).run()
    with pytest.raises(UserError, match=r"train .*dataset"):
        make(120).run()
    make(132).run()


def test_moving_averages_need_the_same_number_of_ranks(tmp_path: Path) -> None:
    [(_, end)] = on_ranks(elastic, str(tmp_path), 2, 0.9, ranks=1)
    assert end == "stopped"
    for seen, end in on_ranks(elastic, str(tmp_path), -1, 0.9):
        assert seen == []
        assert "train" in end
        assert "beta" in end


def test_a_second_loop_is_refused_and_a_bar_is_not(tmp_path: Path) -> None:
    class Twice(Solver):
        def train(self) -> dict[str, float]:
            assert [*self.log_progress("first", range(3))] == [0, 1, 2]
            self.steps(range(3))
            self.steps(range(3))
            return {}

    solver = solver_of(tmp_path, Twice)
    with pytest.raises(UserError, match="train"):
        solver.run_stage("train", solver.train)


def test_other_stages_than_before_are_named(tmp_path: Path) -> None:
    run_until(solver_of(tmp_path), (2, "valid", 1))
    solver = solver_of(tmp_path)
    with solver.running():
        with pytest.raises(UserError, match=r"'train'.*'other'"):
            solver.run_stage("other", dict)
        solver.run_stage("train", solver.train)
        with pytest.raises(UserError, match=r"'valid'.*'other'"):
            solver.run_stage("other", dict)


class Counter(nn.Module):
    """Has a state that is no tensor, and is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = {"count": torch.zeros(1)}

    def get_extra_state(self) -> Any:
        return self.seen

    def set_extra_state(self, state: Any) -> None:
        self.seen = state


def test_a_state_that_a_module_keeps_is_loaded_again_at_the_cursor(tmp_path: Path) -> None:
    class Counting(TwoEpochs):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder)
            self.model = Counter()
            self.register_stateful("model")

        def train(self) -> dict[str, float]:
            self.model.seen["count"] += 100
            for step in self.steps(range(3)):
                self.model.seen["count"] += 1
                if step == 1 and self.epoch == 2 and not resumed:
                    ask()
            return {"count": self.model.seen["count"].item()}

    resumed = False
    with pytest.raises(Stopped):
        Counting(tmp_path).run()
    resumed = True
    solver = Counting(tmp_path)
    solver.run()
    assert [epoch["train"]["count"] for epoch in solver.history] == [103, 206]
