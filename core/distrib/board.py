"""The board: notes of all ranks on where they are, outside of collectives.

A rank in a long wait posts its place and reads the notes of others. As long as collectives take
less than SECONDS, nothing is posted or paid for.
"""

from __future__ import annotations

import itertools
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _get_default_store

from ..utils import UserError
from .ranks import is_distributed, is_rank_zero, rank, world_size

SECONDS = 2.0  # in one collective, after which a rank tells the others where it is


class Call(NamedTuple):
    """A collective on devices, and one on the CPU beside it.

    Args:
        name: of the former, with its arguments.
        work: of the latter.
        mine: checksum of the name.
        everyone: checksums of all ranks; all should equal `mine`.
    """

    name: str
    work: Any
    mine: Any = None
    everyone: Any = ()

    def has_ended(self) -> bool:
        """Return whether all ranks have reached the collective."""
        with suppress(RuntimeError):
            return bool(self.work.is_completed() and self.work.wait())
        return False  # another rank is gone


@dataclass
class ThisProcess:
    """Knowledge of this process about its group.

    Args:
        pending: collectives on devices that other ranks may not have reached yet.
        broken: a collective failed, and may never end.
        cut_off: the rank with the store of the group is gone.
        meeting_point: returns the address of the group, for torch; `launch.py` knows Dora's.
    """

    pending: deque[Call] = field(default_factory=deque)
    broken: bool = False
    cut_off: bool = False
    meeting_point: Callable[[], str] = lambda: "env://"


this_process = ThisProcess()


def post(key: str, note: str) -> None:
    """Write a note, for all ranks to read; nothing in a single process."""
    _ask("set", key, note)


def read(key: str) -> str:
    """Return a note; empty if there is none."""
    return str((_ask("get", key) or b"").decode()) if _ask("check", [key]) else ""


def _ask(method: str, *args: Any) -> Any:
    """Call the group's store; None without a group, or after the end of the rank with the store."""
    if not dist.is_initialized() or this_process.cut_off:
        return None
    try:
        return getattr(_get_default_store(), method)(*args)
    except (RuntimeError, ValueError):
        this_process.cut_off = True  # torch writes a page of frames for each failing call
        return None


def notes(kind: str) -> dict[int, str]:
    """Return the notes of a kind by rank, but for empty ones."""
    return {other: note for other in range(world_size()) if (note := read(f"{kind} {other}"))}


def report_failure(error: BaseException) -> None:
    """Post the error of this rank, for rank zero to show."""
    post(f"failed {rank()}", f"{type(error).__name__}: {error}")


def check_same_call(what: str, items: Iterable[str] = ()) -> bool:
    """Check that all ranks are about to do the same, else raise.

    Args:
        what: the operation, in words.
        items: descriptions of its arguments.

    Returns:
        Whether there are other ranks.

    Raises:
        RuntimeError: on all ranks, within seconds; names the ranks and the first difference.
    """
    if not is_distributed():
        return False
    if not dist.is_initialized():
        raise RuntimeError(f"{what}: call distrib.init() first, at the start of each process")
    call = "\n".join([what, *items])
    work, mine, everyone = exchange(call)
    wait(work, mine, what)
    if any(other != mine for other in everyone):
        raise differences(call)
    return True


def exchange(call: str) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """Start to gather the checksums of a call; return the work, this rank's, and all."""
    mine = torch.tensor([zlib.crc32(call.encode())])
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    return dist.all_gather(everyone, mine, async_op=True), mine, everyone


def barrier() -> None:
    """Wait until all ranks are here."""
    check_same_call("barrier")


def wait(work: Any, tensor: torch.Tensor, what: str) -> None:
    """Wait for an asynchronous collective: an accelerator does by itself, a CPU here.

    Raises:
        RuntimeError: within seconds if another rank is gone, or waits in another collective.
    """
    if not tensor.is_cpu:
        work.wait()
        return
    before: bool | None = None  # whether others were elsewhere when last looked for
    while True:
        ended = work.is_completed()
        try:
            work.wait(timedelta(seconds=SECONDS))
            break
        except RuntimeError as error:
            # The host runs ahead of its device: a rank is where its oldest collective is.
            place = next((call.name for call in [*this_process.pending]), what)
            post(f"status {rank()}", place)
            now = elsewhere(place)
            # Twice, for what another rank has posted may be out of date just now. And this
            # collective may have ended well just now, after the time: wait again.
            if ended or (now and before):
                this_process.broken = True
                raise differences(place) from error
            before = now
    if before is not None:
        post(f"status {rank()}", "")


def elsewhere(what: str) -> bool:
    """Return whether other ranks wait in another operation."""
    return any(call.split("\n")[0] != what for call in notes("status").values())


def differences(call: str) -> RuntimeError:
    """Return an error with the place of each rank, once all have posted or had the time to."""
    post(f"status {rank()}", call)
    deadline = time.monotonic() + 1.5 * SECONDS
    while len(calls := notes("status")) < world_size() and time.monotonic() < deadline:
        if failed := notes("failed"):
            lines = [f"rank {other} failed: {error}" for other, error in failed.items()]
            return UserError("; ".join(lines))
        time.sleep(0.05)
    post(f"told {rank()}", call)
    while is_rank_zero() and len(notes("told")) < len(calls) and time.monotonic() < deadline:
        time.sleep(0.05)  # the store of all may end with this process
    ours = call.split("\n")
    parts = [f"rank {rank()} is in {ours[0]}"]
    for other, theirs in calls.items():
        pairs = itertools.zip_longest(ours, theirs.split("\n"), fillvalue="none")
        mine, its = next((pair for pair in pairs if pair[0] != pair[1]), ("", ""))
        if mine == ours[0]:
            parts.append(f"rank {other} in {its}")
        elif mine:
            parts[0] += f" with {mine}"
            parts.append(f"rank {other} with {its}")
    silent = {*range(world_size())} - {rank(), *calls}
    if silent:
        return UserError(
            f"{'; '.join(parts)}; no word from rank {', '.join(map(str, sorted(silent)))}, "
            "which ended or hangs: see its log"
        )
    return RuntimeError(f"ranks disagree: {'; '.join(parts)}. All must call the same collectives")
