"""Other versions of a state: the best commit of a run, its averaged weights, another run."""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from . import checkpoint
from .state import StateDict, StateManager
from .utils import UserError
from .writer import wait_for_writes

logger = logging.getLogger(__name__)


def read_version(path: Path, version: str) -> StateDict:
    """Read the states of the `latest` commit of a run, its `best`, or the `latest` with its `ema`.

    They are as in the file: see `from_plain`. UserError if there is no such version.
    """
    state = _best(path) if version == "best" else checkpoint.load(path, read_only=True)
    if state is None:
        raise UserError(f"no checkpoint yet: {path}")
    if not state.get("checkpoint", {}).get("commit", True):
        logger.warning("%s is from within the first epoch: none was committed yet", path)
    if version == "ema":
        averages = state.get("ema")
        if not isinstance(averages, dict):
            raise UserError(f"{path} has no averaged weights: register an EMA as `ema`")
        if other := averages.keys() - state.keys():
            raise UserError(f"EMA: name its modules as they are registered, not {', '.join(other)}")
        for name in averages:
            state[name].update(averages[name])  # keeps the versions of the modules
    elif version not in ("latest", "best"):
        raise UserError(f"version {version!r}: there are latest, best and ema")
    return {n: s for n, s in state.items() if n not in ("checkpoint", "rng")}


def _best(path: Path) -> StateDict | None:
    wait_for_writes()
    older = checkpoint.older(path)
    # The latest is absent after damage, until the next save.
    if (newest := next(filter(Path.exists, (path, *reversed(older.values()))), None)) is None:
        return None
    about = checkpoint.read_about(newest)
    is_newest = about["best"] == about["epoch"] and about["commit"]
    if (file := newest if is_newest else older.get(about["best"])) is None:
        raise UserError(f"{path.parent} keeps no best checkpoint: set checkpoint.best")
    return checkpoint.read(file, mmap=True)


def load_part(
    stateful: StateManager,
    source: str | Path,
    runs: Path,
    names: Collection[str],
    version: str,
    strict: bool,
) -> Path:
    """Restore some states from another run in `runs`; see `BaseSolver.continue_from`."""
    tried = Path(source), Path(source, checkpoint.FILE), runs / source / checkpoint.FILE
    if (path := next(filter(Path.is_file, tried), None)) is None:
        raise UserError(f"{source}: no signature, folder or checkpoint of a run; tried {tried[-1]}")
    try:
        state = read_version(path, version)
        stateful.refuse([f"{name}: missing" for name in names if name not in state], strict=True)
        stateful.load_state_dict({name: state[name] for name in names}, strict)
    except UserError as error:
        raise UserError(f"continue from {path}: {error}") from None
    return path
