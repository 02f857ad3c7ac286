"""Logging, formatting and trackers, on real files."""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import os
import re
import struct
import subprocess
import sys
import time
import warnings
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from core import (
    BaseSolver,
    Formatter,
    LogProgressBar,
    ResultLogger,
    averager,
    bold,
    log,
    setup_logging,
)
from core.run import FolderXP
from core.trackers import LocalFiles, Tracker
from core.trackers.tensorboard import TensorBoard
from core.trackers.trackio import Trackio
from core.trackers.wandb import WandB
from core.utils import UserError, make_grid, readonly, write_and_rename

from ..commands import ROOT, run


@pytest.fixture
def said() -> Iterator[list[str]]:
    """The lines of the logger `test`."""
    lines: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logger, handler = logging.getLogger("test"), Keep()
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    yield lines
    logger.removeHandler(handler)


LOGGER = logging.getLogger("test")


def test_formatter() -> None:
    metrics = {"loss": 1.23456, "acc": 0.5, "n": 3, "name": "x", "none": None, "t": torch.ones(1)}
    shown = Formatter({"acc*": ".1%", "*": ".2f"})({"acc_top": 0.5, "loss": 1})
    assert shown == {"acc_top": "50.0%", "loss": "1.00"}
    assert Formatter()(metrics) == {
        "loss": "1.235",
        "acc": "0.5",
        "n": "3",
        "name": "x",
        "none": "None",
        "t": "1",
    }
    assert Formatter()({"a": np.float32(2), "b": True}) == {"a": "2", "b": "True"}
    assert list(Formatter(include_keys=["l*"])(metrics)) == ["loss"]
    assert list(Formatter({"acc": ".1f"}, include_keys=["l*"])(metrics)) == ["loss", "acc"]
    assert list(Formatter(exclude_keys=["n*", "t"])(metrics)) == ["loss", "acc"]
    assert list(Formatter(exclude_keys=["*"], include_keys=["n"])(metrics)) == ["n"]


@pytest.mark.parametrize(
    ("total", "updates", "lines"), [(100, 5, 5), (23, 5, 5), (3, 5, 3), (9, 0, 0)]
)
def test_progress_lines(total: int, updates: int, lines: int, said: list[str]) -> None:
    bar = LogProgressBar(LOGGER, range(total), updates=updates, name="Train")
    announced = sum(bar.update(loss=float(i)) for i in bar)
    assert announced == len(said) == lines
    if lines:
        assert said[-1].startswith(f"Train | {total}/{total} | ")
        assert said[-1].endswith(f"loss {total - 1}")
        assert ("ETA" in said[0]) == (lines > 1)


def test_a_loop_that_broke_leaves_no_line_to_the_next(said: list[str]) -> None:
    bar = LogProgressBar(LOGGER, range(100), updates=5, name="Train")
    for i in bar:
        if i == 19:  # a line is due
            break
    assert not bar.update()
    assert sum(bar.update(i=i) for i in bar) == 5
    assert [line.split(" | ")[1] for line in said] == [
        f"{n}/100" for n in (20, *range(20, 101, 20))
    ]


def test_the_last_line_is_not_lost(said: list[str]) -> None:
    bar = LogProgressBar(LOGGER, (i for i in range(10)), updates=1, total=10)
    for i in bar:
        bar.update(i=i)
        if i == 6:
            break
    del bar
    assert "7/10" in said[-1]
    assert list(LogProgressBar(LOGGER, iter("abc"))) == ["a", "b", "c"]
    assert "3/?" in said[-1]


class Clock:
    """Time that passes when a test says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """That of progress bars."""
    clock = Clock()
    monkeypatch.setattr(log, "time", clock)
    return clock


def test_lines_tell_the_speed_and_without_a_length_come_by_time(
    said: list[str], clock: Clock
) -> None:
    for size, length in ((40, 40), (100, None)):
        bar = LogProgressBar(LOGGER, iter(range(size)), updates=4, total=length)
        for _ in bar:
            clock.sleep(0.25)
        assert not bar.update()
    known, unknown = said[:4], said[4:]
    for _ in LogProgressBar(LOGGER, iter(range(50)), updates=4, total=4):  # too small
        clock.sleep(0.25)
    beyond = [line.split(" | ")[1] for line in said[7:]]
    assert beyond == ["1/4", "2/4", "3/4", "4/4", "45/4", "50/4"]
    assert [line.split(" | ")[1] for line in known] == ["10/40", "20/40", "30/40", "40/40"]
    assert [line.split(" | ")[1] for line in unknown] == ["41/?", "82/?", "100/?"]
    assert all("4.00 it/sec" in line for line in said)


def test_nothing_is_formatted_between_lines() -> None:
    class Forbidding:
        def __format__(self, spec: str) -> str:
            raise AssertionError("formatted")

        __str__ = __format__  # type: ignore[assignment]

    bar = LogProgressBar(LOGGER, range(10), updates=1)
    for i in bar:
        bar.update(loss=1.0 if i == 9 else Forbidding())


def test_files_hold_no_colours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        setup_logging(folder=tmp_path / "run")
    logging.getLogger("x").warning(bold("hello"))
    text = (tmp_path / "run" / "solver.log.0").read_text()
    assert text.count("hello") == 1
    assert "\x1b" not in text + capsys.readouterr().err
    setup_logging(with_file_log=False)


def test_a_users_slip_is_one_line_and_a_mistake_in_code_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    shown = {}
    for kind in (UserError, ValueError):
        setup_logging(folder=tmp_path, log_name=kind.__name__)
        try:
            raise kind("no such lr")
        except kind as error:
            sys.excepthook(kind, error, error.__traceback__)
        shown[kind] = capsys.readouterr().err
        assert 'raise kind("no such lr")' in (tmp_path / kind.__name__).read_text()
    setup_logging(with_file_log=False)
    assert len(shown[UserError].splitlines()) == 1
    assert shown[UserError].endswith("[CRITICAL] - no such lr\n")
    assert 'raise kind("no such lr")' in shown[ValueError]


def test_a_tracker_that_is_not_installed_is_one_line(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("torch.utils.tensorboard", "trackio"):
        monkeypatch.setitem(sys.modules, name, None)
    results = ResultLogger(logging.getLogger("test"), xp=FolderXP(tmp_path))
    results.init_tensorboard()
    results.add_tracker(Trackio(results.xp))
    for epoch in (1, 2):
        results.log_metrics("train", {"loss": 1.0}, epoch)
    board, other = (line for line in said if "failed" in line)
    assert "TensorBoard" in board
    assert "torch.utils.tensorboard" in board
    assert other.endswith("pip install trackio")


def in_a_terminal(code: str, folder: Path) -> str:
    """What a program shows in a real (pseudo) terminal; `logging` and `core` are imported."""
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
    seen, stderr = pty.openpty()
    termios.tcsetwinsize(stderr, (20, 120))
    env = os.environ | {"PYTHONPATH": ROOT}
    full = f"import logging, core; core.setup_logging(folder='.'); {code}"
    subprocess.run([sys.executable, "-c", full], cwd=folder, env=env, stderr=stderr, check=True)
    shown = os.read(seen, 100_000).decode()
    os.close(seen)
    os.close(stderr)
    return shown


def test_a_terminal_shows_colours(tmp_path: Path) -> None:
    shown = in_a_terminal("logging.getLogger('x').warning(core.bold('hello'))", tmp_path)
    assert "\x1b[1mhello\x1b[0m" in shown
    assert "\x1b[33mWARNING" in shown
    assert "\x1b" not in (tmp_path / "solver.log.0").read_text()


LOOP = """
import time
bar = core.LogProgressBar(logging.getLogger('x'), range(4), name='Train', updates=2)
for step in bar:
    bar.update(loss=step / 3)
    time.sleep(0.6)
    if step == 2:
        logging.getLogger('x').info('a line of its own')
"""


def test_a_terminal_shows_a_live_bar_and_files_the_lines(tmp_path: Path) -> None:
    shown = in_a_terminal(f"exec({LOOP!r})", tmp_path)
    assert "Train:  75%" in shown
    assert "loss 0.3333" in shown
    assert "INFO\x1b[0m] - a line of its own" in shown
    assert "Train | " not in shown
    lines = (tmp_path / "solver.log.0").read_text()
    assert "Train | 2/4 | " in lines
    assert "Train | 4/4 | " in lines
    assert "a line of its own" in lines


def test_waiting_for_data_is_said(said: list[str], clock: Clock) -> None:
    def data(seconds: float) -> Iterator[int]:
        for step in range(4):
            clock.sleep(seconds)
            yield step

    for seconds in (0.3, 0.02):
        for _ in LogProgressBar(LOGGER, data(seconds), total=4, updates=1):
            clock.sleep(0.5)
    assert "waits for data 37%" in said[0]
    assert "waits for data" not in said[1]


def test_averages() -> None:
    average = averager()
    average({"a": 1.0, "t": torch.tensor(1.0)}, weight=1)
    found = average({"a": 4.0, "t": torch.tensor([4.0]), "b": 7}, weight=2)
    assert found == {"a": 3.0, "t": 3.0, "b": 7.0}
    assert all(type(value) is float for value in found.values())
    moving = averager(beta=0.5)
    moving({"a": 0.0})
    assert moving({"a": 3.0})["a"] == 2.0
    assert found | {"c": 1} == {**found, "c": 1}
    with pytest.raises(TypeError, match="Averages"):
        found["c"] = 1  # type: ignore[index]
    with pytest.raises(KeyError, match="bad"):
        averager()({"bad": float("nan")})["bad"]
    with pytest.raises(ValueError, match=r" x: .*\[2\]"):
        average({"x": torch.zeros(2)})
    with pytest.raises(ValueError, match=r" x: .*'high'"):
        average({"x": "high"})
    with pytest.raises(ValueError, match=r"weight: .*None"):
        average({"x": 1.0}, weight=None)


def test_averages_of_metrics_of_many_kinds() -> None:
    average = averager()
    large = 2**24 + 1  # no float32
    found = average({"n": torch.tensor(large), "x": torch.tensor(0.5, dtype=torch.bfloat16)})
    assert found == {"n": large, "x": 0.5}
    found = average({"x": torch.tensor([[1.5]]), "hit": torch.tensor(True)})
    assert found == {"n": large, "x": 1.0, "hit": 1.0}
    buffer = torch.tensor(1.0)
    average({"y": buffer})
    assert average({"y": buffer.add_(2)}) == {"n": large, "x": 1.0, "hit": 1.0, "y": 2.0}


def test_a_metric_forgets_in_its_own_steps() -> None:
    average, alone = averager(0.5), averager(0.5)
    for step in range(600):
        if step % 7 == 0:
            expected = alone({"x": float(step)})["x"]
            average({"x": float(step), "y": torch.tensor(0.0)})
        found = average({"y": torch.tensor(1.0)})
    assert found["x"] == expected


@pytest.mark.parametrize("beta", [1.0, 0.99])
def test_averages_over_many_steps(beta: float) -> None:
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = range(1, 1001)
    looked, unseen = averager(beta), averager(beta)
    total = scale = 0.0
    for step, (value, weight) in enumerate(zip(values, weights, strict=True)):
        mixed: Any = value if step % 3 else value.item()
        found = looked({"x": mixed}, torch.tensor(weight) if step % 5 == 0 else weight)
        assert found["x"] > 0
        last = unseen({"x": mixed}, weight)
        total, scale = total * beta + value.item() * weight, scale * beta + weight
    assert found["x"] == pytest.approx(total / scale, rel=1e-12)
    assert found["x"] == last["x"]  # to the last bit, whoever looked


def test_averages_leave_out_and_count_what_is_no_number() -> None:
    average = averager()
    for value in (1.0, float("nan"), 3.0, float("inf")):
        found = average({"x": torch.tensor(value), "y": 1.0})
    average({"x": float("nan")}, weight=0)  # a mean over nothing
    assert found == {"x": 2.0, "x.nonfinite": 2.0, "y": 1.0}


class Unread(torch.Tensor):
    """As if on a GPU, and must not be waited for."""

    is_cpu = False
    readable = False

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        waits = func in (torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.__float__)
        assert cls.readable or not waits, "a step waits for the device"
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def test_no_step_waits_for_the_device(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    average = averager()
    bar = LogProgressBar(logging.getLogger("bar"), range(600), updates=1)
    for step in bar:
        loss, weight = torch.tensor(1.0), torch.tensor(2)
        found = average({"x": loss.as_subclass(Unread), "step": step}, weight.as_subclass(Unread))
        bar.update(found)
        Unread.readable = step == 599  # a line follows
    assert found == {"x": 1.0, "step": 299.5}
    assert found.sums() == {"x": (1200, 1200), "step": (359400, 1200)}
    assert "x 1 |" in caplog.text


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with write_and_rename(path, "w") as file:
        file.write("old")

    def fail() -> None:
        with write_and_rename(path, "w", pid=True) as file:
            file.write("new")
            raise ValueError("mine")

    with pytest.raises(ValueError, match="mine"):
        fail()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_next_continues_a_progress_bar(said: list[str]) -> None:
    bar = LogProgressBar(LOGGER, range(4), updates=4, name="Train")
    assert isinstance(bar, Iterator)
    assert [next(bar), next(bar)] == [0, 1]
    assert "1/4" in said[-1]
    assert [next(bar), next(bar), next(bar, None), next(bar, None)] == [2, 3, None, None]
    assert "4/4" in said[-1]
    pairs = [(item, next(bar)) for item in bar]  # also of a loop that runs
    assert pairs == [(0, 1), (2, 3)]
    for item in bar:
        if item == 2:
            break
    assert "3/4" in said[-1], "a loop that breaks has its last line"


def test_averages_can_be_kept() -> None:
    average = averager()
    found = average({"loss": torch.tensor(1.0), "n": 2})
    kept = [found.copy(), dict(found), copy.copy(found), copy.deepcopy(found), {**found}]
    average({"loss": 3.0, "n": 2})
    assert found["loss"] == 2.0
    assert all(snapshot == {"loss": 1.0, "n": 2.0} for snapshot in kept)
    assert json.loads(json.dumps(dict(found))) == {"loss": 2.0, "n": 2.0}


def test_colours_by_keyword() -> None:
    assert log.colorize(text="x", color="31") == "\x1b[31mx\x1b[0m"
    assert bold(text="x") == log.colorize("x", "1")


@pytest.mark.parametrize("level", ["INFO", "DEBUG", "ERROR", logging.INFO])
@pytest.mark.parametrize("rank", ["0", "1"])
def test_levels_by_name(
    level: str | int,
    rank: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    setup_logging(folder=tmp_path, level=level)
    for name in ("DEBUG", "INFO", "WARNING", "ERROR"):
        logging.getLogger("x").log(getattr(logging, name), "said at %s", name)
    shown = capsys.readouterr().err
    monkeypatch.undo()
    setup_logging(with_file_log=False)
    kept = (tmp_path / f"solver.log.{rank}").read_text()
    least = getattr(logging, level) if isinstance(level, str) else level
    for name in ("DEBUG", "INFO", "WARNING", "ERROR"):
        number = getattr(logging, name)
        assert (f"said at {name}" in kept) == (number >= least)
        assert (f"said at {name}" in shown) == (number >= max(least, 30 * int(rank)))


def test_readonly_and_grid() -> None:
    model = torch.nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    with readonly(model):
        assert not model.weight.requires_grad
    assert (model.weight.requires_grad, model.bias.requires_grad) == (True, False)
    assert make_grid(torch.ones(5, 1, 2, 2), columns=3).shape == (1, 8, 12)


def log_all(tracker: Tracker, epochs: range) -> None:
    """Epochs of three steps each, by a run that was killed and resumes."""
    tracker.resume(epochs[0], (), {"train": 3 * epochs[0] - 3})
    tracker.log_hyperparams({"optim": {"lr": 0.1}, "name": "x"}, {})
    for epoch in epochs:
        for step in range(3 * epoch - 2, 3 * epoch + 1):
            tracker.log_step("train", {"loss": 10.0 * step}, step, epoch)
        tracker.log_metrics("train", {"loss": 1.0 / epoch}, epoch)
    tracker.log_audio("train", "a", torch.zeros(2, 10), 8000, epochs[-1])
    tracker.log_image("train", "i", torch.tensor([[[float("nan"), 1.0]]]), epochs[-1])
    tracker.log_text("train", "t", "hello", epochs[-1])


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_a_resume_drops_what_comes_after_it(tmp_path: Path) -> None:
    tracker = LocalFiles(FolderXP(tmp_path))
    for epoch in (1, 2):
        tracker.log_metrics("first", {"loss": 1}, epoch)
        for step in range(3 * epoch - 2, 3 * epoch + 1):
            tracker.log_step("train", {"loss": step}, step, epoch)
        tracker.log_metrics("train", {"loss": 1}, epoch)
    tracker.log_metrics("own", {"loss": 1}, 0)  # of no epoch
    written = rows(tmp_path)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"half\n')
    tracker.resume(2, ["first"], {"train": 5})
    tracker.log_step("train", {"loss": 6}, 6, 2)
    after = [n for n, row in enumerate(written) if row["epoch"] == 2 and row.get("step", 6) == 6]
    repeated = written[after[1]]
    assert repeated["step"] == 6
    del written[after[1]], written[after[1]]  # the step, and the summary of its stage
    assert rows(tmp_path) == [*written, {**repeated, "metrics": {"loss": 6}}]


def test_local_files(tmp_path: Path) -> None:
    xp = FolderXP(tmp_path)
    log_all(LocalFiles(xp), range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"half')
    log_all(LocalFiles(xp), range(3, 5))
    epochs = [row for row in rows(tmp_path) if "step" not in row]
    assert [row["epoch"] for row in epochs] == [1, 2, 3, 4]
    assert epochs[1] == {"stage": "train", "epoch": 2, "metrics": {"loss": 0.5}}
    steps = [row for row in rows(tmp_path) if "step" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    assert steps[3] == {"stage": "train", "epoch": 2, "step": 4, "metrics": {"loss": 40.0}}
    media = tmp_path / "outputs" / "train_4"
    assert np.array(Image.open(media / "i.png")).tolist() == [[0, 255]]
    with wave.open(str(media / "a.wav")) as sound:
        assert (sound.getnchannels(), sound.getframerate(), sound.getnframes()) == (2, 8000, 10)
    assert (media / "t.txt").read_text() == "hello"


def test_tensorboard(tmp_path: Path) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    xp = FolderXP(tmp_path)
    log_all(TensorBoard(xp), range(1, 4))
    log_all(TensorBoard(xp), range(3, 5))
    folder = tmp_path / "tensorboard"
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["train_steps"]
    steps = events.EventAccumulator(str(folder / "train_steps"), size_guidance={"scalars": 0})
    steps.Reload()
    points = [(point.step, point.value) for point in steps.Scalars("train_steps/loss")]
    assert points == [(step, 10.0 * step) for step in range(1, 13)]
    read = events.EventAccumulator(str(folder), size_guidance={"scalars": 0})
    read.Reload()
    points = [(point.step, point.value) for point in read.Scalars("train/loss")]
    assert [step for step, _ in points] == [1, 2, 3, 4]
    assert points[1][1] == 0.5
    assert read.Tags()["images"] == ["train/i"]
    assert read.Tags()["audio"] == ["train/a"]
    assert any("train/t" in name for name in read.Tags()["tensors"])


def read_wandb(folder: Path) -> Iterator[Any]:
    """The records in a run's file: a LevelDB log, of blocks of 32 KiB, after 7 bytes of W&B's."""
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    [path] = folder.glob("*.wandb")
    data, position, whole = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        if 0 < (room := -position % 2**15) < 7:
            position += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, position)
        whole += data[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # a record, or the last part of one
            yield messages.Record.FromString(whole)
            whole = b""


def wandb_rows(records: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            ".".join([i.key, *i.nested_key]).strip("."): json.loads(i.value_json)
            for i in r.history.item
        }
        for r in records
        if r.HasField("history")
    ]


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_RUN_GROUP", "theirs")
    numbers = []
    for epochs in (range(1, 4), range(3, 5)):
        before = set(tmp_path.glob("wandb/offline-run-*-abc"))
        solver = BaseSolver(FolderXP(tmp_path, sig="abc"))
        solver.init_trackers(["wandb"], project="p", group="ours", job_type="train", name=None)
        tracker = next(t for t in solver.result_logger.trackers if isinstance(t, WandB))
        tracker.log_hyperparams({"lr": 1}, {})
        assert set(tmp_path.glob("wandb/offline-run-*-abc")) == before, "a run without a value"
        log_all(tracker, epochs)
        tracker._opened.finish()
        [folder] = set(tmp_path.glob("wandb/offline-run-*-abc")) - before
        records: list[Any] = []
        while not any(record.HasField("exit") for record in records):
            records = list(read_wandb(folder))
            time.sleep(0.1)
        run = next(record.run for record in records if record.HasField("run"))
        assert (run.run_id, run.display_name) == ("abc", "abc")
        assert (run.project, run.run_group, run.job_type) == ("p", "theirs", "train")
        changed = [
            item
            for record in records
            for item in (*record.run.config.update, *record.config.update)
        ]
        assert {item.key for item in changed} >= {"optim", "name"}
        axes = {r.metric.name: r.metric.step_metric for r in records if r.HasField("metric")}
        assert axes["train_steps/loss"] == "train_steps/step"

        logged = wandb_rows(records)
        numbers += [row["_step"] for row in logged]
        assert [row["epoch"] for row in logged if "train/loss" in row] == list(epochs)
        steps = [row["train_steps/step"] for row in logged if "train_steps/loss" in row]
        assert steps == list(range(3 * epochs[0] - 2, 3 * epochs[-1] + 1))
        media = {row[key] for row in logged for key in row if key.endswith("._type")}
        assert media == {"audio-file", "image-file", "table-file"}
        time.sleep(1)  # W&B names a folder by the second
    assert numbers == sorted(set(numbers)), "steps go backwards"


LOG = """
from pathlib import Path
from core import BaseSolver
from core.run import FolderXP
from tests.core.test_logging import log_all
for epochs in (range(1, 4), range(3, 5)):
    solver = BaseSolver(FolderXP(Path("runs", "abc")))
    solver.init_trackers(["{name}"], project="p", job_type="train", name=None)
    tracker = solver.result_logger.trackers[-1]
    log_all(tracker, epochs)
    tracker.finish()
    assert "_run" not in vars(tracker)
print("---")
"""


def test_trackio(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "store"), "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", LOG.format(name="trackio")]
    said = subprocess.run(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, check=True)
    assert said.stdout == b"---\n"  # nothing gets between the lines for scripts
    read = "import json; from trackio.sqlite_storage import SQLiteStorage as S; "
    read += "print(S.get_runs('p'), json.dumps(S.get_logs('p', 'abc')), sep=chr(10))"
    runs, rows = run(tmp_path, "-c", read, env=env).splitlines()[-2:]
    assert runs == "['abc']"
    found = json.loads(rows)
    points = {row["step"]: row["train/loss"] for row in found if "train/loss" in row}
    assert points == {epoch: 1 / epoch for epoch in range(1, 5)}
    points = {row["step"]: row["train_steps/loss"] for row in found if "train_steps/loss" in row}
    assert points == {step: 10.0 * step for step in range(1, 13)}
    assert {"train/a", "train/i", "train/t"} <= {key for row in found for key in row}
    assert {path.suffix for path in tmp_path.glob("store/media/p/abc/*/*")} == {".png", ".wav"}


TWO = """
from pathlib import Path
from core.run import FolderXP
from core.trackers.trackio import Trackio
one, two = (Trackio(FolderXP(Path(name)), project="p") for name in ("one", "two"))
for tracker in (one, two):
    tracker.log_metrics("train", {"loss": 1.0}, 1)
for tracker in (one, two):
    tracker.finish()
"""


def test_two_runs_of_a_process_are_finished_apart(tmp_path: Path) -> None:
    pytest.importorskip("trackio")
    env = os.environ | {"TRACKIO_DIR": str(tmp_path / "store"), "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", TWO]
    said = subprocess.run(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, check=True)
    assert said.stdout == b""


def test_mlflow(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    env = {k: v for k, v in os.environ.items() if not k.startswith("MLFLOW_")}
    run(tmp_path, "-c", LOG.format(name="mlflow"), env=env | {"PYTHONPATH": ROOT})
    client = importlib.import_module("mlflow").MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    experiment = client.get_experiment_by_name("p").experiment_id
    [found] = client.search_runs([experiment])
    assert (found.info.run_name, found.data.params["optim.lr"]) == ("abc", "0.1")
    assert found.info.status == "FINISHED"
    points = {p.step: p.value for p in client.get_metric_history(found.info.run_id, "train/loss")}
    assert points == {epoch: 1 / epoch for epoch in range(1, 5)}
    history = client.get_metric_history(found.info.run_id, "train_steps/loss")
    assert {p.step for p in history} == {*range(1, 13)}
    names = {path.name for path in tmp_path.glob("runs/mlflow/*/artifacts/train_4/*")}
    assert names == {"a.wav", "i.png", "t.txt"}


def test_aim(tmp_path: Path) -> None:
    aim = pytest.importorskip("aim")
    run(tmp_path, "-c", LOG.format(name="aim"), env=os.environ | {"PYTHONPATH": ROOT})
    # As `aim up` does.
    index = [
        str(Path(sys.executable).with_name("aim")),
        "storage",
        "--repo",
        "runs",
        "reindex",
        "-y",
    ]
    subprocess.run(index, cwd=tmp_path, check=True)
    [found] = aim.Repo(str(tmp_path / "runs")).iter_runs()
    assert (found.name, found.experiment, found["config"]["optim.lr"]) == ("abc", "p", 0.1)
    curves = {(m.context["stage"], m.name): m.data.items_list() for m in found.metrics()}
    points = {key: (steps, columns[0]) for key, (steps, columns) in curves.items()}
    assert points["train", "loss"] == ([1, 2, 3, 4], [1 / epoch for epoch in range(1, 5)])
    assert points["train_steps", "loss"] == ([*range(1, 13)], [10.0 * n for n in range(1, 13)])
    media = found.collect_sequence_info(("images", "audios", "texts"))
    assert {kind: [each["name"] for each in found] for kind, found in media.items()} == {
        "images": ["i"],
        "audios": ["a"],
        "texts": ["t"],
    }


def test_two_runs_of_a_process_are_two_pages_of_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for sig in ("one", "two"):
        tracker = WandB(FolderXP(tmp_path / sig), project="p")
        tracker.log_metrics("train", {"loss": 1.0}, 1)
        assert tracker._opened.id == sig
    tracker._opened.finish()
    assert list((tmp_path / "two").glob("wandb/offline-run-*-two"))


@pytest.fixture
def wandb() -> Iterator[Any]:
    """W&B, as if just started: it reads the environment once."""
    module = pytest.importorskip("wandb")
    module.teardown()
    yield module
    module.teardown()


def test_wandb_listens_to_its_environment(
    wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    env = {"MODE": "offline", "SILENT": "true", "PROJECT": "theirs", "NAME": "named"}
    env |= {"RUN_ID": "chosen", "DIR": str(tmp_path / "elsewhere")}
    for name, value in env.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    tracker = WandB(FolderXP(tmp_path / "run", sig="abc"), project="ours")
    tracker.log_metrics("train", {"loss": 1.0}, 1)
    run = tracker._opened
    assert (run.project, run.name) == ("theirs", "named")
    assert run.id == "chosen"
    run.finish()
    assert list(tmp_path.glob("elsewhere/wandb/offline-run-*-chosen"))
    assert not (tmp_path / "run" / "wandb").exists()


@pytest.mark.parametrize("name", ["WANDB_MODE", "WANDB_DISABLED"])
def test_wandb_can_be_disabled(
    name: str, wandb: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "disabled" if name == "WANDB_MODE" else "true")
    log_all(tracker := WandB(FolderXP(tmp_path, sig="abc")), range(1, 3))
    assert tracker._opened.disabled
    assert not (tmp_path / "wandb").exists()


def test_wandb_without_a_server(tmp_path: Path, said: list[str]) -> None:
    pytest.importorskip("wandb")
    code = "from core.trackers.wandb import WandB; from core.run import FolderXP; import logging;"
    code += "logging.basicConfig(); t = WandB(FolderXP('.', sig='abc'));"
    code += "t.log_hyperparams(dict(lr=1), dict()); t.log_metrics('train', dict(loss=1.0), 1)"
    env = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    env |= {"HOME": str(tmp_path), "NETRC": str(tmp_path / "none"), "PYTHONPATH": ROOT}
    assert "not logged in" in run(tmp_path, "-c", code, env=env)
    assert list(tmp_path.glob("wandb/offline-run-*-abc"))


def test_results_reach_trackers_and_failures_are_said_once(tmp_path: Path, said: list[str]) -> None:
    class Broken(LocalFiles):
        def log_metrics(self, *_: Any) -> None:
            raise OSError("disk full")

    results = ResultLogger(LOGGER, xp=FolderXP(tmp_path))
    results.add_tracker(Broken(FolderXP(tmp_path)))
    for epoch in (1, 2):
        results.log_metrics("train", {"loss": torch.tensor(2.0)}, epoch)
    assert sum("Broken" in line for line in said) == 1
    assert any("Train Summary | Epoch 2 | loss 2" in line for line in said)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
    with pytest.raises(ValueError, match=r"\[C, H, W\].*\(5, 5, 5\)"):
        results.log_image("train", "x", torch.zeros(5, 5, 5), 1)
    with pytest.raises(ValueError, match=r"\[C, T\].*\(5, 5, 5\)"):
        results.log_audio("train", "x", torch.zeros(5, 5, 5), 8000, 1)
    with pytest.raises(ValueError, match=r"log_text.* int"):
        results.log_text("train", "x", 3, 1)  # type: ignore[arg-type]


class Seen(Tracker):
    """Keeps the last image."""

    def log_image(self, stage: str, key: str, image: torch.Tensor, step: int) -> None:
        self.image = image


@pytest.fixture
def results(tmp_path: Path) -> ResultLogger:
    results = ResultLogger(LOGGER, xp=FolderXP(tmp_path / "run"))
    results.add_tracker(Seen(results.xp))
    return results


@pytest.mark.parametrize("name", ["{data}/cat", "../cat", "a/b", "a\\b", "..", "", "a\0b", "/cat"])
@pytest.mark.parametrize("place", ["stage", "key"])
def test_a_key_of_media_is_no_path(
    name: str, place: str, tmp_path: Path, results: ResultLogger
) -> None:
    name = name.format(data=tmp_path)
    before = sorted(tmp_path.rglob("*"))
    stage, key = (name, "key") if place == "stage" else ("stage", name)
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        results.log_image(stage, key, torch.zeros(3, 8, 8), 1)
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        results.log_audio(stage, key, torch.zeros(1, 8), 8000, 1)
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        results.log_text(stage, key, "text", 1)
    assert sorted(tmp_path.rglob("*")) == before
    results.log_text("valid.clean", "cat.1 of 3..", "text", 1)
    assert (tmp_path / "run" / "outputs" / "valid.clean_1" / "cat.1 of 3...txt").exists()


def test_a_stage_that_is_a_path_leads_nowhere_else(tmp_path: Path) -> None:
    tracker = TensorBoard(FolderXP(tmp_path / "a" / "b"))
    tracker.log_step("../../../x", {"loss": 1.0}, 1, 1)
    tracker.log_metrics("../../../x", {"loss": 1.0}, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["tensorboard"]


def pillow(mode: str) -> Any:
    return Image.new("RGB", (3, 5), "red").convert(mode)


WHITE = np.full((1, 8, 8), 255, np.uint8)


@pytest.mark.parametrize(
    ("image", "shape", "mean"),
    [
        (WHITE, (1, 8, 8), 1.0),
        (WHITE[:, ::-1], (1, 8, 8), 1.0),
        (WHITE > 3, (1, 8, 8), 1.0),
        (WHITE / 510, (1, 8, 8), 0.5),
        (torch.full((3, 8, 8), 0.5, dtype=torch.bfloat16, requires_grad=True), (3, 8, 8), 0.5),
        (WHITE[0], (1, 8, 8), 1.0),
        (torch.ones(28, 3), (1, 28, 3), 1.0),
        ([[0.0, 1.0]], (1, 1, 2), 0.5),
        (WHITE[0, :, :, None].repeat(3, 2), (3, 8, 8), 1.0),
        (torch.ones(640, 480, 4), (4, 640, 480), 1.0),
        (pillow("RGB"), (3, 5, 3), 1 / 3),
        (pillow("RGBA"), (4, 5, 3), 1 / 2),
        (pillow("P"), (3, 5, 3), 1 / 3),
        (pillow("CMYK"), (3, 5, 3), 1 / 3),
        (pillow("LA"), (4, 5, 3), None),
        (pillow("L"), (3, 5, 3), None),
        (pillow("1"), (3, 5, 3), None),
    ],
)
def test_images_of_many_kinds(
    image: Any, shape: tuple[int, ...], mean: float | None, results: ResultLogger
) -> None:
    results.log_image("valid", "x", image, 1)
    [tracker] = [tracker for tracker in results.trackers if isinstance(tracker, Seen)]
    assert tracker.image.shape == shape
    assert tracker.image.dtype == torch.float32
    if mean is not None:
        assert tracker.image.mean().item() == pytest.approx(mean, abs=0.01)


def test_an_image_that_is_cut_is_said(results: ResultLogger) -> None:
    with pytest.warns(UserWarning, match=r"outside 0\.\.1"):
        results.log_image("valid", "x", torch.full((8, 8), -40.0), 1)
    with warnings.catch_warnings(action="error"):
        results.log_image("valid", "x", torch.linspace(-0.1, 1.1, 64).view(8, 8), 1)


def test_a_figure_is_an_image(results: ResultLogger) -> None:
    figure = importlib.import_module("matplotlib.figure").Figure(figsize=(2, 1), dpi=50)
    figure.subplots().plot([1, 2])
    results.log_image("valid", "curve", figure, 1)
    [tracker] = [tracker for tracker in results.trackers if isinstance(tracker, Seen)]
    assert tracker.image.shape == (4, 50, 100)
    assert 0.5 < tracker.image.mean() < 1


@pytest.mark.parametrize(
    ("image", "culprit"),
    [
        (WHITE.astype("int64"), r"0\.\.255.*int64"),
        (torch.full((1, 8, 8), 300, dtype=torch.int16), r"0\.\.255.*int16"),
        (WHITE.astype("uint16"), r"0\.\.255.*uint16"),
        (WHITE.astype("complex64"), r"complex64"),
        (torch.zeros(3, 640, 3), r"\[H, W, C\]"),
        (torch.zeros(1, 28, 4), r"\[H, W, C\]"),
        (torch.zeros(28, 28, 2), r"\(28, 28, 2\)"),
        (torch.zeros(8, 3, 28, 28), r"\(8, 3, 28, 28\).*make_grid"),
        ([torch.zeros(28, 28)] * 2, "a list"),
        (pillow("I"), "a Image"),
        (pillow("F"), "a Image"),
        ("cat.png", "a str"),
        (None, "a NoneType"),
        ([[1], [1, 2]], "a list"),
    ],
)
def test_an_image_that_cannot_be_told_is_refused(
    image: Any, culprit: str, results: ResultLogger
) -> None:
    with pytest.raises(ValueError, match=rf"log_image: needs \[C, H, W\].*{culprit}"):
        results.log_image("valid", "x", image, 1)


def test_audio_of_one_channel(results: ResultLogger) -> None:
    results.log_audio("valid", "x", torch.zeros(10), 8000, 1)
    with wave.open(str(results.xp.folder / "outputs" / "valid_1" / "x.wav")) as sound:
        assert (sound.getnchannels(), sound.getnframes()) == (1, 10)


@pytest.mark.parametrize("audio", [torch.zeros(1, 5, dtype=torch.int16), [0], "a.wav", None])
def test_audio_that_cannot_be_told_is_refused(audio: Any, results: ResultLogger) -> None:
    with pytest.raises(ValueError, match=r"log_audio: needs a float tensor \[C, T\]"):
        results.log_audio("valid", "x", audio, 8000, 1)


def test_other_ranks_have_no_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ResultLogger(LOGGER, xp=FolderXP(tmp_path)).trackers == []
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    setup_logging(folder=tmp_path)
    logging.getLogger("x").info("quiet")
    logging.getLogger("x").warning("loud")
    assert "loud" in stream.getvalue()
    assert "quiet" not in stream.getvalue()
    assert "quiet" in (tmp_path / "solver.log.1").read_text()
    monkeypatch.undo()
    setup_logging(with_file_log=False)
