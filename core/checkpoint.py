"""Checkpoints: state on disk, written atomically and verified when read.

`checkpoint.th` is the latest; older ones lie beside it, as `checkpoint.<epoch>.th`. `midway.th` is
what a run saved within an epoch after it, because it was asked to stop.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import background, distrib
from .history import is_higher_better
from .plain import Records, to_plain
from .state import StateDict
from .utils import UserError, write_and_rename

logger = logging.getLogger(__name__)

FORMAT = 1  # of the files; to be raised when older code could not read newer files


class CheckpointError(UserError):
    """A checkpoint can't be used, or not be written."""


@dataclass
class Policy:
    """Which checkpoints stay on disk, and how they get there.

    Args:
        last: number of the most recent to keep.
        every: keep each whose epoch is a multiple of this; 0 for none.
        best: keep that with the best value of this metric, such as `valid.loss`; empty for none.
        mode: whether the best is the `min` or the `max`; `auto` goes by the metric's name.
        background: write while the training continues; costs host memory for one more state.
    """

    last: int = 2
    every: int = 0
    best: str = ""
    mode: str = "auto"
    background: bool = True

    def __post_init__(self) -> None:
        if self.last < 1 or self.every < 0 or self.mode not in ("auto", "min", "max"):
            raise UserError(
                "checkpoint: last must be at least 1, every at least 0, mode auto, min or max; not "
                f"last={self.last}, every={self.every}, mode={self.mode}"
            )

    @classmethod
    def from_config(cls, cfg: Any) -> Policy:
        """The policy of a config with these keys; a wrong value is refused."""
        return cls(**cfg)

    def best_epoch(self, epochs: Sequence[int], history: Sequence[dict[str, Any]]) -> int | None:
        """The best of some epochs, the earliest of equals; None if the metric is never a number."""
        stage, _, metric = self.best.partition(".")
        highest = is_higher_better(self.best) if self.mode == "auto" else self.mode == "max"
        sign = -1 if highest else 1
        values = {e: history[e - 1].get(stage, {}).get(metric, math.nan) for e in epochs}
        known = [(sign * v, e) for e, v in values.items() if not math.isnan(v)]
        return min(known)[1] if known else None


# --------------------------------------------------------------------------------------- writing


def save(
    state: StateDict,
    path: Path,
    history: Sequence[dict[str, Any]] = (),
    policy: Policy | None = None,
) -> None:
    """Write a state to `path`, durably; older checkpoints are kept by the policy.

    At every instant there is a whole checkpoint at `path`, once there has been one.

    Args:
        state: tensors and plain containers, such as `StateManager.state_dict()` gives.
        path: in an existing folder.
        history: metrics of all epochs up to this one; their number is the epoch.
    """
    _write(state, path, len(history), f"epoch {len(history)}", keep=True)
    midway(path).unlink(missing_ok=True)
    _prune(path, history, policy or Policy())


def save_midway(state: StateDict, path: Path) -> None:
    """Write what the run is within an epoch, beside the latest checkpoint, durably.

    It is read again only as long as that checkpoint is the latest: whoever goes back to an older
    one need not know of it.

    Args:
        state: as for `save`.
        path: of the latest checkpoint.
    """
    epoch = 0
    for candidate in (*older(path).values(), path):  # as `load` does, from the other end
        with suppress(Exception):
            epoch = _epoch_of(candidate)
    _write(state, midway(path), epoch, f"what was done after epoch {epoch}")


def midway(path: Path) -> Path:
    """The file for what is saved within an epoch."""
    return path.with_name("midway.th")


def _write(state: StateDict, path: Path, epoch: int, what: str, keep: bool = False) -> None:
    about = {"format": FORMAT, "epoch": epoch, "ranks": distrib.world_size()}
    try:
        if keep and path.exists():
            _keep_previous(path, epoch)
        whole = {n: to_plain([*v], n) if isinstance(v, Records) else v for n, v in state.items()}
        with write_and_rename(path) as file:
            torch.save({"checkpoint": about, **whole}, file)
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{what} could not be saved to {path}: {error.__context__ or error}; "
            "what was saved before is intact: mend that, and the same command resumes"
        ) from error


def older(path: Path) -> dict[int, Path]:
    """The checkpoints that are kept beside the latest, by epoch in rising order."""
    marks = {p.name[len(path.stem) + 1 : -len(path.suffix)]: p for p in _siblings(path, "*")}
    return dict(sorted((int(mark), p) for mark, p in marks.items() if mark.isdecimal()))


def _siblings(path: Path, mark: object) -> list[Path]:
    return list(path.parent.glob(f"{path.stem}.{mark}{path.suffix}"))


def _keep_previous(path: Path, epoch: int) -> None:
    """Give the latest checkpoint the name of an older one too, if it is older than this epoch."""
    try:
        found = _epoch_of(path)
    except MemoryError:
        raise
    except Exception:
        _set_aside(path)
        return
    if found > epoch:
        raise CheckpointError(
            f"it is of epoch {found}, and was not restored: call restore() before you train, or "
            "start anew with `dora run --clear`"
        )
    name = path.with_name(f"{path.stem}.{found}{path.suffix}")
    name.unlink(missing_ok=True)
    try:
        os.link(path, name)
    except OSError:  # some file systems have no hard links
        shutil.copyfile(path, name)


def _set_aside(path: Path) -> Path:
    """Rename a damaged file, so that it is neither read again nor overwritten."""
    names = (f"{path.stem}.damaged-{number}{path.suffix}" for number in itertools.count(1))
    return path.rename(next(new for name in names if not (new := path.with_name(name)).exists()))


def _prune(path: Path, history: Sequence[dict[str, Any]], policy: Policy) -> None:
    """Delete the older checkpoints that the policy does not ask for."""
    files, latest = older(path), len(history)
    before = [e for e in files if e < latest]
    wanted: set[int | None] = set(before[::-1][: policy.last - 1])
    if policy.every:
        wanted |= {e for e in files if e % policy.every == 0}
    if policy.best:
        best = policy.best_epoch([e for e in (*files, latest) if 0 < e <= latest], history)
        if best is None:
            known = ", ".join(f"{s}.{n}" for s, m in (history or [{}])[-1].items() for n in m)
            logger.warning(
                "The best checkpoint is not kept: no epoch has %s; there are %s", policy.best, known
            )
        wanted.add(best)
    for epoch, file in files.items():
        if epoch not in wanted:
            file.unlink()


# --------------------------------------------------------------------------------------- reading


def load(path: Path, read_only: bool = False) -> StateDict | None:
    """Read the latest checkpoint, or the newest older one that is whole; all ranks must call it.

    If the run was stopped within an epoch after it, by the same number of ranks, read that rather.
    Tensors come to the CPU. Nothing in a file is executed. A damaged file is set aside under
    another name, never deleted, as soon as there is one to resume from instead.

    Args:
        path: of the latest.
        read_only: the last commit, and rename nothing, for another process may be writing here.

    Returns:
        The state, or None if there is no checkpoint at all.

    Raises:
        CheckpointError: if there are checkpoints and none can be used.
    """
    found: Path | CheckpointError | None = None
    state: StateDict | None = None
    if distrib.is_rank_zero():
        background.wait()  # a write of this process may be on its way
        try:
            found, state = _newest(path, read_only) or (None, None)
            if not read_only:
                found, state = _within(path, found) or (found, state)
        except CheckpointError as error:
            found = error
    found = distrib.broadcast_object(found)
    if isinstance(found, CheckpointError):
        raise found
    return state if found is None or state is not None else read(found)


def _newest(path: Path, read_only: bool) -> tuple[Path, StateDict] | None:
    damaged: dict[Path, str] = {}
    for candidate in (path, *reversed(older(path).values())):
        if not candidate.exists():
            continue
        try:
            state = read(candidate)
        except (OSError, MemoryError, CheckpointError) as error:
            raise CheckpointError(f"{candidate} can't be read: {error}") from error
        except Exception as error:
            damaged[candidate] = str(error).splitlines()[0]
            continue
        for bad, why in damaged.items():
            where = bad if read_only else _set_aside(bad)
            logger.warning("Damaged: %s, kept as %s: %s", bad, where.name, why)
        return candidate, state
    if damaged:
        raise CheckpointError(
            "no checkpoint can be read, and none was touched; move these files away to start anew: "
            + "; ".join(f"{bad}: {why}" for bad, why in damaged.items())
        )
    return None


def _within(path: Path, latest: Path | None) -> tuple[Path, StateDict] | None:
    """What was saved within an epoch after a checkpoint, if it can be used."""
    file = midway(path)
    if not file.exists():
        return None
    epoch = _epoch_of(latest) if latest else 0
    try:
        about, state = _load(file, mmap=True)["checkpoint"], read(file)
    except MemoryError:
        raise
    except Exception as error:
        where = _set_aside(file)
        logger.warning("Damaged: %s, kept as %s: %s", file, where.name, error)
        return None
    if about["epoch"] != epoch:
        return None
    if about["ranks"] != distrib.world_size():
        logger.warning(
            "Resuming after the last commit: %d processes saved the steps since, and %d can't "
            "resume within an epoch of theirs",
            about["ranks"],
            distrib.world_size(),
        )
        return None
    return file, state


def read(path: Path) -> StateDict:
    """Read and verify one checkpoint file; any damage raises.

    `torch.load` does not notice flipped bits, but the checksums of the zip archive tell.
    """
    with zipfile.ZipFile(path) as archive:
        if (bad := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"checksum of {bad} does not match")
    state = _load(path)
    if not isinstance(state, dict) or "format" not in state.get("checkpoint", {}):
        raise ValueError("not a checkpoint of this project")
    if (found := state.pop("checkpoint")["format"]) > FORMAT:
        raise CheckpointError(
            f"format {found} is newer than this code, which knows {FORMAT}: update the core"
        )
    return state


def peek(path: Path) -> StateDict:
    """The state in a checkpoint file, unverified, with tensors that are read when used."""
    state: StateDict = _load(path, mmap=True)
    return state


def _epoch_of(path: Path) -> int:
    epoch: int = _load(path, mmap=True)["checkpoint"]["epoch"]
    return epoch


def _load(path: Path, mmap: bool = False) -> Any:
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
