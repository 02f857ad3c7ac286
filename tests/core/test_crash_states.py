"""A power cut at any instant of a save: every state that may be on disk then is restored.

The operations of a real save are recorded. After a cut, a file that was written since its last
fsync may be empty, cut or zeros. Of the names that were made, moved or deleted since the folder's
last fsync, any may be on disk, for POSIX promises no order.
"""

from __future__ import annotations

import builtins
import io
import itertools
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import pytest
import torch

from core import checkpoint
from core.checkpoint import CheckpointError, Cursor, Policy
from core.utils import sync_folder

FOLDER = 0  # its number among the files
BUFFER = 128  # bytes, so that a small checkpoint takes many writes
Files = frozenset[tuple[str, bytes]]  # of a folder: names and contents
Names = dict[str, int | None]  # changed names and their files; None for one that is gone


class Data(NamedTuple):
    """A change of a file: its content halfway and after."""

    file: int
    halfway: bytes
    after: bytes


class Recorder:
    """A record of what is done to a folder, while it is really done.

    Attributes:
        log: changes of files and of names; a bare number is a file after its fsync.
        opened: descriptors, and the numbers of their files.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.log: list[Data | Names | int] = []
        self.opened: dict[int, int] = {}
        self.names = {path.name: path.stat().st_ino for path in folder.iterdir()}
        self.contents = {path.stat().st_ino: path.read_bytes() for path in folder.iterdir()}
        self.before = self.names, dict(self.contents)

        def wrap(name: str, changes: Callable[..., Names]) -> None:
            real = getattr(os, name)

            def wrapper(*paths: Any) -> None:
                real(*paths)
                self.note_names(changes(*(Path(path).name for path in paths)))

            patch.setattr(os, name, wrapper)

        for name in ("rename", "replace"):
            wrap(name, lambda old, new: {old: None, new: self.names[old]})
        for name in ("unlink", "remove"):
            wrap(name, lambda old: {old: None})
        wrap("link", lambda old, new: {new: self.names[old]})
        self.real = open, os.open, os.fsync
        patch.setattr(builtins, "open", self.open)
        patch.setattr(os, "open", self.open_folder)
        patch.setattr(os, "fsync", self.fsync)

    def note_data(self, file: int, data: bytes) -> None:
        old = self.contents[file] if data else b""  # without data, it is opened
        self.contents[file] = old + data
        self.log.append(Data(file, old + data[: len(data) // 2], old + data))

    def note_names(self, names: Names) -> None:
        self.log.append(names)
        self.names = renamed(self.names, [names])

    def open(self, path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> IO[Any]:
        if mode != "wb" or Path(path).parent != self.folder:
            return self.real[0](path, mode, *args, **kwargs)
        name, recorder = Path(path).name, self

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                written = super().write(data)
                recorder.note_data(file, bytes(data)[:written])
                return written

        raw = Raw(str(path), "wb")
        if name in self.names:
            self.note_data(self.names[name], b"")
        else:
            new = -1 - len(self.contents)
            self.contents[new] = self.before[1][new] = b""
            self.note_names({name: new})
        file = self.opened[raw.fileno()] = self.names[name]
        return io.BufferedWriter(raw, BUFFER)

    def open_folder(self, path: Any, *args: Any, **kwargs: Any) -> int:
        descriptor = self.real[1](path, *args, **kwargs)
        self.opened |= {descriptor: FOLDER} if Path(path) == self.folder else {}
        return descriptor

    def fsync(self, descriptor: int) -> None:
        self.real[2](descriptor)
        self.log.append(self.opened[descriptor])


def renamed(names: dict[str, int], changes: Sequence[Names]) -> dict[str, int]:
    """Return the names after some changes, in their order."""
    found: Names = {**names}
    for change in changes:
        found |= change
    return {name: file for name, file in found.items() if file is not None}


def filled(contents: list[bytes]) -> set[bytes]:
    """Return the contents as they are, and with zeros up to the length of the last."""
    return {*contents, *(content.ljust(len(contents[-1]), b"\0") for content in contents)}


def crash_states(record: Recorder) -> dict[Files, bool]:
    """Return all states that a cut may leave, and whether a cut after the save may leave them."""
    names, contents = record.before
    may_be = {file: [content] for file, content in contents.items()}
    sure: list[Names] = []
    unsure: list[Names] = []
    states: dict[Files, bool] = {}
    for end, operation in enumerate([FOLDER, *record.log]):
        if isinstance(operation, Data):
            may_be[operation.file] += [operation.halfway, operation.after]
        elif isinstance(operation, dict):
            unsure.append(operation)
        elif operation == FOLDER:
            sure, unsure = sure + unsure, []
        else:
            may_be[operation] = may_be[operation][-1:]
        for taken in itertools.product([True, False], repeat=len(unsure)):
            there = renamed(names, sure + list(itertools.compress(unsure, taken)))
            files = sorted(set(there.values()))
            for some in itertools.product(*(filled(may_be[file]) for file in files)):
                content = dict(zip(files, some, strict=True))
                state = frozenset((name, content[file]) for name, file in there.items())
                states[state] = states.get(state, False) or end == len(record.log)
    return states


# ------------------------------------------------------------------------------------- restoring

Place = tuple[int, int]  # epochs that are finished, and steps in the next


class Case(NamedTuple):
    """A save, and what it finds on disk."""

    saved: list[Place]
    place: Place
    policy: Policy
    links: bool = True  # the file system has hard links
    damaged: bool = False  # the latest checkpoint is
    cut: bool = False  # such a save was cut before, and left a link and a temporary file


LAST, BEST = Policy(last=1), Policy(last=1, best="min valid.loss")  # the best is the first epoch
CASES = {
    "a commit over a commit": Case([(1, 0), (2, 0)], (3, 0), Policy()),
    "only the last is kept": Case([(1, 0)], (2, 0), LAST),
    "the best is kept": Case([(1, 0)], (2, 0), BEST),
    "over one within an epoch": Case([(1, 0), (2, 0), (2, 3)], (3, 0), Policy()),
    "within an epoch": Case([(1, 0), (2, 0)], (2, 3), Policy()),
    "within an epoch again": Case([(1, 0), (1, 3)], (1, 6), Policy()),
    "the first": Case([], (1, 0), Policy()),
    "the first, within an epoch": Case([], (0, 3), Policy()),
    "a commit, without hard links": Case([(1, 0), (2, 0)], (3, 0), Policy(), links=False),
    "the best, without hard links": Case([(1, 0)], (2, 0), BEST, links=False),
    "over a damaged one": Case([(1, 0), (2, 0)], (3, 0), LAST, damaged=True),
    "after a cut": Case([(1, 0), (2, 0)], (3, 0), LAST, cut=True),
}


def save(path: Path, place: Place, policy: Policy, more: float = 0.0) -> None:
    epoch, step = place
    history = [{"valid": {"loss": float(past)}} for past in range(epoch)]
    cursor = Cursor(stage="train", step=step) if step else None
    state = {"history": history, "weights": torch.full((64,), epoch + step / 8 + more)}
    checkpoint.save(state, path, history, policy, cursor)


def load(path: Path) -> Any:
    """Return the state that a resumed run gets, with weights as bytes."""
    state = checkpoint.load(path)
    return state and state | {"weights": state["weights"].numpy().tobytes()}


def read(folder: Path) -> Files:
    return frozenset((path.name, path.read_bytes()) for path in folder.iterdir())


def write(files: Files, folder: Path) -> Path:
    folder.mkdir()
    for name, data in files:
        (folder / name).write_bytes(data)
    return folder / "checkpoint.th"


def refuse(*_: Any) -> None:
    raise PermissionError("no hard links here")


def outcomes(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **mistake: Any
) -> Counter[str]:
    """Return what is lost in the states after a cut, and in how many."""
    case, path = CASES[name], write(frozenset(), folder / "run")
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # power is cut on paper only
    if not case.links:
        monkeypatch.setattr(os, "link", refuse)
    for place in case.saved:
        save(path, place, Policy())
    if case.damaged:
        path.write_bytes(path.read_bytes()[:-1])
    if case.cut:
        os.link(path, path.with_stem(f"checkpoint.{case.saved[-1][0]}"))
        path.with_name("checkpoint.th.tmp").write_bytes(b"torn")
    before = read(path.parent)
    with pytest.MonkeyPatch.context() as patch:
        for called, value in mistake.items():
            patch.setattr(checkpoint, called, value)
        record = Recorder(path.parent, patch)
        save(path, case.place, case.policy)
    after = read(path.parent)
    replayed = {(name, record.contents[file]) for name, file in record.names.items()}
    assert replayed == after, "an operation was not recorded"
    old, new = (load(write(s, folder / n)) for s, n in ((before, "old"), (after, "new")))
    kept = {data for _, data in before} & {data for _, data in after}

    def lost(path: Path, state: Files, is_saved: bool) -> str:
        try:
            found = load(path)
        except CheckpointError:
            return "all"
        is_there = path.exists() or not case.saved or case.damaged
        if found != new and (is_saved or found != old or not is_there):
            return "the latest"
        if not kept <= {data for name, data in state if name.endswith(".th")}:
            return "an older one"
        save(path, case.place, case.policy, more=0.5)
        again = load(path)
        assert again != new == again | {"weights": new["weights"]}
        assert not list(path.parent.glob("*.tmp"))
        return "nothing"

    counts: Counter[str] = Counter()
    for state, is_saved in crash_states(record).items():
        path = write(state, folder / "cut")
        counts[lost(path, state, is_saved)] += 1
        shutil.rmtree(path.parent)
    print(f"{len(record.log)} operations, {counts.total()} states, lost: {dict(counts)}")
    return counts


@pytest.mark.parametrize("name", CASES)
def test_a_power_cut_loses_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outcomes(name, tmp_path, monkeypatch).keys() == {"nothing"}


def careless(mistake: str) -> dict[str, Any]:
    """Return a function of the core with a mistake, by name."""

    @contextmanager
    def write(path: Path) -> Iterator[IO[Any]]:
        temporary = path if mistake == "in place" else path.with_name(f"{path.name}.tmp")
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            if mistake == "renamed too early":
                os.replace(temporary, path)
            if mistake != "file not synced":
                os.fsync(file.fileno())
        if temporary.exists():
            os.replace(temporary, path)
        if mistake != "folder not synced":
            sync_folder(path.parent)

    if mistake == "link not synced":
        return {"sync_folder": lambda folder: None}
    return {"write_and_rename": write}


@pytest.mark.parametrize(
    ("mistake", "name", "loss"),
    [
        ("file not synced", "the first", "all"),
        ("file not synced", "only the last is kept", "all"),
        ("file not synced", "a commit, without hard links", "all"),
        ("file not synced", "over one within an epoch", "the latest"),
        ("renamed too early", "the first", "all"),
        ("renamed too early", "over one within an epoch", "the latest"),
        ("in place", "only the last is kept", "all"),
        ("in place", "over one within an epoch", "the latest"),
        ("folder not synced", "a commit over a commit", "the latest"),
        ("link not synced", "the best is kept", "an older one"),
        ("link not synced", "over a damaged one", "an older one"),
    ],
)
def test_a_mistake_is_found(
    mistake: str, name: str, loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert outcomes(name, tmp_path, monkeypatch, **careless(mistake))[loss]
