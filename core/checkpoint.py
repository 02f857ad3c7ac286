"""Checkpoints: state on disk, written atomically in the background, and verified when read.

`checkpoint.th` is the latest. `checkpoint.<epoch>.th` are older commits; the latest may have been
saved within an epoch.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from . import distrib
from .plain import to_plain
from .replicas import restore_own
from .state import StateDict
from .utils import UserError, flatten, read_tensors, sync_folder, write_and_rename
from .writer import wait_for_writes

logger = logging.getLogger(__name__)

FILE = "checkpoint.th"  # the latest, in the folder of a run
FORMAT = 2  # of the files; raise it when runs can't resume from older ones
BEST = re.compile(r"((min|max) (\w+)\.(\S+))?")


class CheckpointError(UserError):
    """A checkpoint can't be used, or not be written."""


@dataclass
class Policy:
    """A policy of saving and keeping checkpoints.

    Args:
        last: number of the most recent commits to keep.
        every: keep each commit whose epoch is a multiple of this; 0 for none.
        best: keep the commit with the best value of a metric, as in `max valid.acc`, too.
        minutes: save within an epoch as well, when this time has passed; 0 for never.
        background: write while the training continues; costs host memory for a second state.
        sharded: let each rank write its shards of a model under `fully_shard`, into a folder.
    """

    last: int = 2
    every: int = 0
    best: str = ""
    minutes: float = 10.0
    background: bool = True
    sharded: bool = False

    def __post_init__(self) -> None:
        wrong = self.last < 1 or self.every < 0 or self.minutes < 0
        if wrong or not BEST.fullmatch(self.best):
            needs = "last >= 1, every >= 0, minutes >= 0, best such as `max valid.acc` or empty"
            raise UserError(f"checkpoint needs {needs}, not {self}")

    def best_epoch(
        self, history: Sequence[dict[str, Any]], kept: Collection[int] | None = None
    ) -> int | None:
        """Return the best of all or the kept epochs, the first of equals; None without numbers."""
        stage, _, metric = self.best.partition(" ")[2].partition(".")
        sign = -1 if self.best.startswith("max") else 1
        epochs = range(1, len(history) + 1) if kept is None else sorted(kept)
        values = {epoch: history[epoch - 1].get(stage, {}).get(metric) for epoch in epochs}
        known = [(sign * v, e) for e, v in values.items() if isinstance(v, Real) and v == v]
        return min(known)[1] if known else None


@dataclass
class Cursor:
    """Where a run is.

    Args:
        done: names and metrics of the epoch's finished stages.
        stage: name of the running stage; empty between two epochs, in a commit.
        step: finished steps of its loop.
        seconds: since the stage began.
        counts: steps since the run began, by stage.
        ranks: of each rank, the loop's averages, and the generators where the stage began (`start`)
            and where its loop began (`loop`), and its `own` parts of the state.
        logged: metrics of the epoch so far, by stage, as `log_metrics` has them.
    """

    done: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    stage: str = ""
    step: int = 0
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    ranks: list[StateDict] = field(default_factory=list)
    logged: dict[str, Any] = field(default_factory=dict)


# --------------------------------------------------------------------------------------- writing


def save(
    state: StateDict,
    path: Path,
    history: Sequence[dict[str, Any]] = (),
    policy: Policy | None = None,
    cursor: Cursor | None = None,
) -> None:
    """Write a state to `path`, durably; older commits are kept by the policy.

    After the first save there is a whole checkpoint at `path` at every instant.

    Args:
        state: tensors and plain containers, such as `StateManager.state_dict()` returns.
        path: in an existing folder.
        history: metrics of all epochs so far; their number is the epoch.
        cursor: where the run is; a commit by default.
    """
    cursor, policy, epoch = cursor or Cursor(), policy or Policy(), len(history)
    is_commit = not cursor.stage
    try:
        known = _keep_previous(path, epoch) if path.exists() else None
        sync_folder(path.parent)  # else the new file may reach the disk without the old one
        kept = older(path).keys() | ({epoch} if is_commit and epoch else set())
        # Without a metric in the policy, what was the best is kept.
        best = policy.best_epoch(history, kept) if policy.best else known
        about = {"format": FORMAT, "epoch": epoch, "best": best, "commit": is_commit}
        about |= {"ranks": distrib.world_size(), "cursor": to_plain(vars(cursor))}
        with write_and_rename(path) as file:
            torch.save({"checkpoint": about, **state}, file)
    except (OSError, RuntimeError) as error:
        why: BaseException | None = error
        while why is not None and not isinstance(why, OSError):  # such as a full disk
            why = why.__context__
        raise CheckpointError(
            f"epoch {epoch} could not be saved to {path}: {why or error}; "
            "earlier checkpoints are intact: fix the cause, then resume with the same command"
        ) from error
    if is_commit:
        _prune(path, history, policy, best)
    _prune_shards(path.parent)


def older(path: Path) -> dict[int, Path]:
    """Return the older checkpoints, by epoch in rising order."""
    found = path.parent.glob(f"{path.stem}.*{path.suffix}")
    marks = {p.name[len(path.stem) + 1 : -len(path.suffix)]: p for p in found if p.is_file()}
    return dict(sorted((int(mark), p) for mark, p in marks.items() if mark.isdecimal()))


def _keep_previous(path: Path, epoch: int) -> int | None:
    """Keep the latest checkpoint under its epoch's name, if a commit; return its best epoch."""
    try:
        about = read_about(path)
    except MemoryError:
        raise
    except Exception as error:
        _report_damage(path, error)
        return None
    if (found := about["epoch"]) > epoch:
        raise CheckpointError(
            f"it is of epoch {found}: call restore() first, or start anew (`dora run --clear`)"
        )
    if about["commit"] and found:
        name = path.with_stem(f"{path.stem}.{found}")
        name.unlink(missing_ok=True)
        try:
            os.link(path, name)
        except OSError:  # some file systems have no hard links
            with write_and_rename(name) as file, path.open("rb") as source:
                shutil.copyfileobj(source, file)
    best: int | None = about["best"]
    return best


def _report_damage(path: Path, why: object, set_aside: bool = True) -> None:
    """Warn of a damaged file; rename the file, to be neither read again nor overwritten."""
    names = (path.with_stem(f"{path.stem}.damaged-{number}") for number in itertools.count(1))
    kept = path.rename(next(n for n in names if not n.exists())) if set_aside else path
    logger.warning("Damaged: %s, kept as %s: %s", path, kept.name, why)


def _prune(path: Path, history: Sequence[dict[str, Any]], policy: Policy, best: int | None) -> None:
    """Delete the older commits beyond the policy."""
    files = older(path)
    recent = [epoch for epoch in files if epoch < len(history)][::-1][: policy.last - 1]
    wanted = {best, *recent, *(e for e in files if policy.every and e % policy.every == 0)}
    if policy.best and best is None:
        note = "The best checkpoint is not kept: no epoch has a number for %s; there are %s"
        logger.warning(note, policy.best, ", ".join(flatten(history[-1] if history else {})))
    for epoch in files.keys() - wanted:
        files[epoch].unlink()


def _prune_shards(run: Path) -> None:
    if any(run.glob("shards.*")):
        from .sharded import prune  # a slow import

        prune(run)


# --------------------------------------------------------------------------------------- reading


def load(path: Path, read_only: bool = False) -> StateDict | None:
    """Read the latest whole checkpoint; all ranks must take part.

    Tensors are on the CPU, memory-mapped to the file, which rank zero verifies. Nothing in a file
    is executed. A damaged file is set aside under another name, never deleted, as soon as an older
    file can be resumed from.

    Args:
        path: of the latest.
        read_only: prefer a commit, and rename nothing, for another process may be writing here.

    Returns:
        The state, or None if there is no checkpoint at all.

    Raises:
        UserError: if there are checkpoints and none can be used; of rank zero a CheckpointError.
    """
    wait_for_writes()
    with distrib.raised_everywhere():
        found, state = _newest(path, read_only) if distrib.is_rank_zero() else (None, None)
    found = distrib.broadcast_object(found)
    return _open(found) if found is not None and state is None else state


def _newest(path: Path, read_only: bool) -> tuple[Path | None, StateDict | None]:
    damaged: dict[Path, str] = {}
    paths = [path, *reversed(older(path).values())]
    with suppress(Exception):
        if read_only and not read_about(path)["commit"]:
            paths.append(paths.pop(0))
    for candidate in filter(Path.exists, paths):
        try:
            state = read(candidate, mmap=True)
        except (OSError, MemoryError, CheckpointError) as error:
            raise CheckpointError(f"{candidate} can't be read: {error}") from error
        except Exception as error:
            damaged[candidate] = str(error).splitlines()[0]
            continue
        for bad, why in damaged.items():
            _report_damage(bad, why, set_aside=not read_only)
        return candidate, state
    if damaged:
        raise CheckpointError(
            "no checkpoint can be read, and none was touched; move these files away to start anew: "
            + "; ".join(f"{bad}: {why}" for bad, why in damaged.items())
        )
    return None, None


def read(path: Path, mmap: bool = False) -> StateDict:
    """Read and verify one checkpoint file, into mapped memory with `mmap`; any damage raises.

    `torch.load` does not notice flipped bits, but the checksums of the zip archive tell.
    """
    with zipfile.ZipFile(path) as archive:
        if (bad := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"checksum of {bad} does not match")
    return _open(path, mmap, verify=True)


def _open(path: Path, mmap: bool = True, verify: bool = False) -> StateDict:
    state = read_tensors(path, mmap)
    if not isinstance(state, dict) or not {"checkpoint", "history"} & state.keys():
        raise ValueError("not a checkpoint of this project")
    if (found := state.get("checkpoint", {}).get("format", FORMAT)) > FORMAT:
        raise CheckpointError(f"format {found} is newer than this code's {FORMAT}: update the core")
    if "shards" in state:
        from .sharded import attach

        attach(state, path.parent, verify)
    return state


def pop_cursor(state: StateDict) -> Cursor:
    """Take the position out of a checkpoint, with generators and own parts of all ranks.

    A file whose position is absent, or does not fit the history, was written by the user's own
    code: a commit of unknown generators, without `ranks`.
    """
    about, rng = state.pop("checkpoint", None), state.pop("rng", {"ranks": []})
    if about is not None and about["format"] != FORMAT:
        cure = "go back to the older core, or start anew with continue_from"
        raise CheckpointError(f"a run saved in format {about['format']} can't resume here: {cure}")
    if about is None or about["epoch"] != len(state["history"]):
        return Cursor()
    cursor = Cursor(**about["cursor"])
    if (saved := len(cursor.ranks)) != distrib.world_size():
        note = "Saved by %d processes: each example comes once; random numbers differ from here, "
        note += "and state that differed between ranks is taken from rank 0"
        logger.warning(note, saved)
    for theirs, now in zip(cursor.ranks, rng["ranks"], strict=True):
        theirs["now"] = now
    restore_own(state, cursor.ranks)
    return cursor


def read_about(path: Path) -> Mapping[str, Any]:
    """Return the entry `checkpoint` of a file, unverified."""
    state = read_tensors(path)
    # Without an entry, a commit by the user's own code.
    own = {"epoch": len(state.get("history", ())), "commit": True, "best": None}
    return state.get("checkpoint", own)  # type: ignore[no-any-return]
