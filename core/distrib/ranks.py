"""Ranks: which process this is, of how many, and its device."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from ..utils import UserError

T = TypeVar("T")


def launched(name: str, alone: int) -> int:
    """Return a number from the environment, left by the launcher; `alone` without launcher."""
    return int(os.environ.get(name, alone)) if "WORLD_SIZE" in os.environ else alone


def is_distributed() -> bool:
    """Return whether the run has several processes."""
    return world_size() > 1


def rank() -> int:
    """Return the index of this process; right also before `init`."""
    return dist.get_rank() if dist.is_initialized() else launched("RANK", 0)


def world_size() -> int:
    """Return the number of processes; right also before `init`."""
    return dist.get_world_size() if dist.is_initialized() else launched("WORLD_SIZE", 1)


def is_rank_zero() -> bool:
    """Return whether this process writes files and speaks to the user."""
    return rank() == 0


def rank_zero_only(function: Callable[..., T]) -> Callable[..., T | None]:
    """Decorate a function to run on rank zero alone, and return None elsewhere."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> T | None:
        return function(*args, **kwargs) if is_rank_zero() else None

    return wrapped


def device_kind() -> str:
    """Return the kind of device this process would use, without initializing one."""
    found = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return "cpu" if found == "mps" and is_distributed() else found  # MPS has no collectives


def device(name: str = "auto") -> torch.device:
    """Return this process's device; an accelerator becomes the current one, with its generator.

    Args:
        name: `auto` (the accelerator, if any), or a device such as `cuda`, `cuda:1` or `cpu`.
    """
    found = device_kind()
    name = found if name == "auto" else name
    if name.partition(":")[0] not in ("cpu", found):
        raise UserError(f"device={name}: not available here; use device=cpu or auto")
    if name.startswith("cpu"):
        return torch.device(name)
    count = torch.accelerator.device_count()
    number = launched("LOCAL_RANK", rank() % count)
    if number >= count > 1 and ":" not in name:
        raise UserError(
            f"local rank {number} has no device, there are {count} of {found}: start {count} "
            "processes at most, or use device=cpu"
        )
    number %= count  # a launcher may show each process its own device only
    ours = torch.device(name if ":" in name else f"{found}:{number}")
    torch.accelerator.set_device_index(ours.index)
    return ours
