"""How state reaches the disk and comes back: whole, verified, and never without a predecessor."""

from __future__ import annotations

import logging
import os
import zipfile
from pathlib import Path

import torch

from .state import StateDict
from .utils import write_and_rename

logger = logging.getLogger(__name__)


class CheckpointError(RuntimeError):
    """No checkpoint could be read, though there is at least one."""


def previous_path(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def save(state: StateDict, path: Path) -> None:
    """Write a state to `path`, durably; the file that was there becomes the previous one.

    At every instant there is a whole checkpoint at `path`, once there has been one.

    Args:
        state: tensors and plain containers, such as `StateManager.state_dict()` gives.
        path: in an existing folder.
    """
    with write_and_rename(path) as file:
        torch.save(state, file)
        file.flush()
        if path.exists():
            previous = previous_path(path)
            previous.unlink(missing_ok=True)
            os.link(path, previous)


def load(path: Path) -> StateDict | None:
    """Read the checkpoint at `path`, or the previous one if that is damaged.

    Tensors come to the CPU. Nothing in the file is executed.

    Returns:
        The state, or None if there is no checkpoint at all.

    Raises:
        CheckpointError: if there are checkpoints and none can be read.
    """
    errors: list[str] = []
    for candidate in (path, previous_path(path)):
        if not candidate.exists():
            continue
        try:
            state = read(candidate)
        except Exception as error:
            errors.append(f"{candidate}: {error}")
            logger.error("This checkpoint is damaged: %s", errors[-1])
            continue
        if candidate != path:
            logger.warning("Going on from the previous checkpoint, %s: work was lost", candidate)
        return state
    if errors:
        raise CheckpointError(
            "no checkpoint can be read; move these files away to start anew: " + "; ".join(errors)
        )
    return None


def read(path: Path) -> StateDict:
    """Read and verify one checkpoint file; any damage raises.

    `torch.load` does not notice flipped bits, but the checksums of the zip archive tell.
    """
    with zipfile.ZipFile(path) as archive:
        if (damaged := archive.testzip()) is not None:
            raise zipfile.BadZipFile(f"checksum of {damaged} does not match")
    state: StateDict = torch.load(path, map_location="cpu", weights_only=True)
    return state
