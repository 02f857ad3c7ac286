"""The way of a state to the disk and back: damage, failure, keeping, and the time it takes."""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from .. import BaseSolver, checkpoint, distrib
from ..checkpoint import CheckpointError, Policy
from ..utils import UserError
from ..writer import Writer, wait_for_writes
from .processes import on_ranks


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoint.th"


def history(*values: float) -> list[dict[str, Any]]:
    return [{"valid": {"loss": value}} for value in values]


def save(path: Path, epoch: int, policy: Policy | None = None) -> None:
    state = {"epoch": epoch, "x": torch.ones(64)}
    checkpoint.save(state, path, history(*range(epoch)), policy)


def names(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


# --------------------------------------------------------------------------------------- reading


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    data = bytearray(whole)
    data[data.index(b"\x00\x00\x80?" * 8)] ^= 1  # a bit of a weight
    broken = {"truncated": whole[: len(whole) // 2], "empty": b"", "foreign": b"hi"}
    path.write_bytes(broken.get(how, bytes(data)))


def test_the_state_comes_back(path: Path) -> None:
    assert checkpoint.load(path) is None
    for epoch in (1, 2, 3):
        save(path, epoch)
    state = checkpoint.load(path)
    assert state is not None
    assert state["epoch"] == 3
    assert state.keys() == {"checkpoint", "epoch", "x"}
    assert names(path) == ["checkpoint.2.th", "checkpoint.th"]


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "foreign"])
def test_damage_is_noticed(how: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for epoch in (1, 2, 3):
        save(path, epoch, Policy(last=3))
    damage(path, how)
    bad = path.read_bytes()
    for _ in range(2):  # to look is not to touch
        state = checkpoint.load(path, read_only=True)
        assert state is not None
        assert state["epoch"] == 2
        assert path.read_bytes() == bad
    caplog.clear()
    assert (checkpoint.load(path) or {})["epoch"] == 2
    assert str(path) in caplog.text
    aside = path.with_name("checkpoint.damaged-1.th")
    assert aside.read_bytes() == bad
    assert not path.exists()
    save(path, 3, Policy(last=3))
    assert names(path) == [
        "checkpoint.1.th",
        "checkpoint.2.th",
        "checkpoint.damaged-1.th",
        "checkpoint.th",
    ]


def test_with_nothing_left_it_is_refused_and_nothing_touched(path: Path) -> None:
    for epoch in (1, 2):
        save(path, epoch)
    damage(path, "flipped")
    damage(path.with_name("checkpoint.1.th"), "truncated")
    before = {p.name: p.read_bytes() for p in path.parent.iterdir()}
    for _ in range(2):
        with pytest.raises(CheckpointError, match=r"checkpoint\.th: checksum.*checkpoint\.1\.th: "):
            checkpoint.load(path)
    assert before == {p.name: p.read_bytes() for p in path.parent.iterdir()}


def test_a_damaged_file_that_nobody_read_is_not_overwritten(path: Path) -> None:
    save(path, 1)
    damage(path, "empty")
    save(path, 2)
    assert names(path) == ["checkpoint.damaged-1.th", "checkpoint.th"]
    path.with_name("checkpoint.damaged-1.th").rename(path.with_name("checkpoint.damaged-2.th"))
    for epoch in (3, 4):
        damage(path, "empty")
        save(path, epoch)
    assert names(path) == [*(f"checkpoint.damaged-{n}.th" for n in (1, 2, 3)), "checkpoint.th"]


def test_any_flipped_bit_is_noticed_or_harmless(path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Any] = {"x": torch.randn(50, generator=generator), "list": list(range(100))}
    checkpoint.save(state, path)
    whole = path.read_bytes()
    noticed = 0
    for offset in torch.randint(len(whole), (300,), generator=generator).tolist():
        flipped = bytearray(whole)
        flipped[offset] ^= 1 << (offset % 8)
        path.write_bytes(flipped)
        try:
            found = checkpoint.read(path)
        except Exception:
            noticed += 1
        else:  # the flip was in the padding, or in a date
            assert torch.equal(found["x"], state["x"]), offset
            assert found["list"] == state["list"]
    assert noticed > 100


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def test_a_checkpoint_runs_no_code(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    torch.save({"x": Evil()}, path)
    with pytest.raises(CheckpointError):
        checkpoint.load(path)
    assert not (path.parent / "evil").exists()


def test_what_is_not_ours_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"model": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="not a checkpoint of this project"):
        checkpoint.load(path)
    for number, cure in ((1, "older core"), (checkpoint.FORMAT + 1, "update")):
        monkeypatch.setattr(checkpoint, "FORMAT", number)
        save(path, 2)
        monkeypatch.undo()
        with pytest.raises(CheckpointError, match=f"format {number} .*{cure}"):
            checkpoint.pop_cursor(checkpoint.load(path) or {})


# --------------------------------------------------------------------------------------- keeping


@pytest.mark.parametrize(
    ("policy", "kept"),
    [
        (Policy(), [6]),
        (Policy(last=1), []),
        (Policy(last=3), [5, 6]),
        (Policy(last=20), [1, 2, 3, 4, 5, 6]),
        (Policy(last=1, every=3), [3, 6]),
        (Policy(last=1, best="min valid.loss"), [4]),
        (Policy(last=1, best="max valid.loss"), [2]),
        (Policy(last=2, every=4, best="max valid.loss"), [2, 4, 6]),
        (Policy(last=1, best="max valid.acc"), [2]),
        (Policy(last=1, best="min valid.acc"), [4]),
        (Policy(last=1, best="min valid.unknown"), []),
    ],
)
def test_what_is_kept(policy: Policy, kept: list[int], path: Path) -> None:
    values = [3.0, 4.0, float("nan"), 1.0, 2.0, 1.0, 3.0]
    epochs = [{"valid": {"loss": value, "acc": value}} for value in values]
    for epoch in range(1, 8):
        checkpoint.save({"epoch": epoch}, path, epochs[:epoch], policy)
    assert list(checkpoint.older(path)) == kept
    for epoch, file in checkpoint.older(path).items():
        assert checkpoint.read(file)["epoch"] == epoch


def test_arrays_that_are_converted_for_a_moment_are_not_confused(path: Path) -> None:
    writer = Writer()
    state = {str(value): np.full(1000, value) for value in range(8)}
    writer.submit(state, lambda copied: checkpoint.save(copied, path))
    writer.wait()
    saved = checkpoint.read(path)
    assert all((saved[str(value)] == value).all() for value in range(8))


def test_without_hard_links_older_checkpoints_are_copies(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no hard links here")

    monkeypatch.setattr(os, "link", refuse)
    for epoch in (1, 2):
        checkpoint.save({"epoch": epoch}, path, history(*[1.0] * epoch))
    assert checkpoint.read(checkpoint.older(path)[1])["epoch"] == 1


def test_too_little_memory_is_no_damage(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save({"epoch": 1}, path, history(1.0))

    def refuse(*_: Any, **__: Any) -> None:
        raise MemoryError("no memory")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(CheckpointError, match="can't be read: no memory"):
        checkpoint.load(path)
    assert path.exists()


def test_a_best_metric_that_nobody_logs_is_said(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint.save({}, path, history(1.0), Policy(best="min valid.loss"))
    assert not caplog.messages
    checkpoint.save({}, path, history(1.0, 2.0), Policy(best="min valid.los"))
    assert "valid.los;" in caplog.text


@pytest.mark.parametrize(
    "wrong", [{"last": 0}, {"every": -1}, {"minutes": -1}, {"best": "valid.loss"}]
)
def test_a_wrong_policy_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="last="):
        Policy(**wrong)


# ----------------------------------------------------------------------------------- background


class Solver(BaseSolver):
    def __init__(self, folder: Path, background: bool = True) -> None:
        super().__init__(folder, Policy(background=background))
        self.weight = torch.zeros(1000)
        self.big = torch.zeros(200_000)
        self.register_stateful("weight", "big")

    def run(self, epochs: int = 3, hold: Callable[[], None] = lambda: None) -> None:
        with self.running():
            while self.epoch <= epochs:
                self.run_stage("train", self.train)
                self.commit()
                hold()

    def train(self) -> dict[str, float]:
        self.weight += 1
        return {"loss": float(self.weight[0])}


def slowly(monkeypatch: pytest.MonkeyPatch, until: threading.Event) -> None:
    real = checkpoint.save

    def slow(*args: Any) -> None:
        until.wait()
        real(*args)

    monkeypatch.setattr(checkpoint, "save", slow)


def test_training_goes_on_during_the_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    slowly(monkeypatch, go)
    solver = Solver(tmp_path)
    solver.run_stage("train", solver.train)
    solver.commit()
    assert solver.epoch == 2
    solver.run_stage("train", solver.train)
    assert not solver.checkpoint_path.exists()
    # What is not safe is not published either.
    assert not (tmp_path / "history.json").exists()
    go.set()
    wait_for_writes()
    saved = checkpoint.read(solver.checkpoint_path)
    assert saved["weight"].unique().tolist() == [1.0], "it saw the second epoch"
    assert solver.xp.link.history == solver.history[:1]


def test_the_end_of_run_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go = threading.Event()
    slowly(monkeypatch, go)
    threading.Timer(0.3, go.set).start()
    Solver(tmp_path).run(epochs=1)
    assert (tmp_path / "checkpoint.th").exists()


def test_an_interrupt_during_the_write_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    slowly(monkeypatch, go)

    def interrupt() -> None:
        threading.Timer(0.3, go.set).start()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Solver(tmp_path).run(hold=interrupt)
    again = Solver(tmp_path)
    assert again.restore()
    assert again.epoch == 2


@pytest.mark.parametrize("background", [True, False])
def test_a_full_disk_is_told_and_the_last_checkpoint_is_whole(
    tmp_path: Path, background: bool
) -> None:
    solver = Solver(tmp_path, background)
    solver.run(epochs=1)
    before = solver.checkpoint_path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"epoch 2 .*checkpoint\.th: .*too large"):
            Solver(tmp_path, background).run(epochs=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert solver.checkpoint_path.read_bytes() == before
    assert not list(tmp_path.glob("*.tmp"))
    solver.run(epochs=3)
    assert len(solver.xp.link.history) == 3


def test_a_commit_that_fails_does_not_advance(tmp_path: Path) -> None:
    solver = Solver(tmp_path, background=False)
    solver.run_stage("train", solver.train)
    tmp_path.rename(tmp_path.with_name("away"))
    with pytest.raises(CheckpointError, match="No such file"):
        solver.commit()
    assert (solver.epoch, solver.history) == (1, [])
    tmp_path.with_name("away").rename(tmp_path)
    solver.commit()
    assert solver.epoch == 2


def _fail_on_rank_zero(folder: str) -> str:
    solver = Solver(Path(folder))
    try:
        solver.run(epochs=2, hold=lambda: None)
    except UserError as error:
        return f"{solver.epoch}: {error}"
    return "no error"


def test_a_failure_is_raised_on_all_ranks(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoint.th.tmp").mkdir(parents=True)
    for said in on_ranks(_fail_on_rank_zero, str(tmp_path / "run")):
        assert said.startswith("2: epoch 1 could not be saved"), said


def test_a_copy_is_small_and_keeps_ties(path: Path) -> None:
    large = torch.zeros(1_000_000)
    layer = nn.Linear(2, 2, dtype=torch.float64)
    state = {"view": large[:3], "a": layer.weight, "tied": layer.weight, "t": layer.weight.T}
    writer = Writer()
    copies: list[Any] = []
    for _ in range(2):
        writer.submit(state, copies.append)
        writer.wait()
        with torch.no_grad():
            layer.weight += 1
    copy = copies[0]
    assert copy["view"].untyped_storage().nbytes() == 12
    assert copy["a"] is copy["tied"]
    assert torch.equal(copy["t"], copy["a"].T)
    assert copies[1]["a"] is copy["a"], "the memory is used again"
    assert not copy["a"].requires_grad
    torch.testing.assert_close(copy["a"], layer.weight.detach() - 1)


def test_ranks_read_the_same_file(tmp_path: Path) -> None:
    solver = Solver(tmp_path)
    solver.run()
    damage_weights = solver.checkpoint_path.read_bytes()
    solver.checkpoint_path.write_bytes(damage_weights[: len(damage_weights) // 2])
    assert on_ranks(_restored_epoch, str(tmp_path)) == [3, 3]
    assert len(list(tmp_path.glob("checkpoint.damaged-*.th"))) == 1


def _restored_epoch(folder: str) -> int:
    solver = Solver(Path(folder))
    assert solver.restore()
    distrib.barrier()
    return solver.epoch
