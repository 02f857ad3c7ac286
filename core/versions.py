"""Other versions of a state: the best commit of a run, its averaged weights, another run."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from . import checkpoint
from .state import StateDict, StateManager
from .utils import UserError


def read_version(path: Path, version: str) -> StateDict:
    """Read the `latest` commit of a run, its `best`, or the `latest` with `ema` as its weights.

    UserError if there is no such version.
    """
    if version == "best":
        checkpoint.wait_for_writes()
        if not path.exists():
            raise UserError(f"no checkpoint yet: {path}")
        about = checkpoint.read_about(path)
        is_latest = about["best"] == about["epoch"] and about["commit"]
        if (file := path if is_latest else checkpoint.older(path).get(about["best"])) is None:
            raise UserError(f"{path.parent} keeps no best checkpoint: set checkpoint.best")
        return checkpoint.read(file)
    if (state := checkpoint.load(path, read_only=True)) is None:
        raise UserError(f"no checkpoint yet: {path}")
    if version == "ema":
        averages = state.get("ema")
        if not isinstance(averages, dict):
            raise UserError(f"{path} has no averaged weights: register an EMA as `ema`")
        if other := averages.keys() - state.keys():
            raise UserError(f"EMA: name its modules as they are registered, not {', '.join(other)}")
        for name in averages:
            state[name].update(averages[name])  # keeps the versions of the modules
    elif version != "latest":
        raise UserError(f"version {version!r}: there are latest, best and ema")
    return state


def find(source: str | Path, runs: Path) -> Path:
    """Return the latest checkpoint of a run; UserError if there is none.

    Args:
        source: signature of the run, its folder, or a checkpoint file.
        runs: folder of all runs.
    """
    tried = Path(source), Path(source, "checkpoint.th"), runs / source / "checkpoint.th"
    for path in tried:
        if path.is_file():
            return path
    raise UserError(f"{source}: no signature, folder or checkpoint of a run; tried {tried[-1]}")


def load_part(
    stateful: StateManager, path: Path, names: Collection[str], version: str, strict: bool
) -> None:
    """Restore some states from a version of another run; see `BaseSolver.continue_from`."""
    try:
        state = read_version(path, version)
        stateful.refuse([f"{name}: missing" for name in names if name not in state], strict=True)
        stateful.load_state_dict({name: state[name] for name in names}, strict)
    except UserError as error:
        raise UserError(f"continue from {path}: {error}") from None
