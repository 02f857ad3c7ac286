"""The watchdog: notices ranks that call different collectives, and says which.

A rank that waits for long writes down where, and reads where the others are. Nothing of this is
done, or paid for, as long as collectives take less than WATCHDOG_SECONDS.
"""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist

from .process_group import (
    failures,
    is_distributed,
    is_initialized,
    mark_broken,
    rank,
    store,
    world_size,
)

# Seconds in one collective after which a rank tells the others where it is.
WATCHDOG_SECONDS = 2.0

_count = 0  # collectives that this rank has waited for


def check_same_call(what: str, items: Sequence[str] = ()) -> None:
    """Check that all ranks are about to do the same, else raise.

    Args:
        what: is about to be done, in words.
        items: descriptions of what it is done to.

    Raises:
        RuntimeError: on all ranks, within seconds; names the ranks and the first difference.
    """
    if not is_distributed():
        return
    if not is_initialized():
        raise RuntimeError(f"{what}: call distrib.init() first, at the start of each process")
    mine = torch.tensor([zlib.crc32("\n".join([what, *items]).encode())])
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    wait(dist.all_gather(everyone, mine, async_op=True), what)
    if any(other != mine for other in everyone):
        _post_status(what, items)
        raise RuntimeError(_differences(what, items))


def wait(work: Any, what: str) -> None:
    """Wait for an asynchronous collective between CPUs.

    Raises:
        RuntimeError: within seconds if another rank is gone, or waits in another collective.
    """
    global _count
    _count += 1
    reports = conflicts = 0
    failed = False
    while True:
        try:
            work.wait(timedelta(seconds=WATCHDOG_SECONDS))
            break
        except RuntimeError as error:
            if work.is_completed() and not failed:
                failed = True  # unless it ended well just now, after the time: wait again
                continue
            _post_status(what)
            reports += 1
            # Twice, for what another rank has posted may be out of date just now.
            conflicts = conflicts + 1 if _is_elsewhere(what) else 0
            if failed or conflicts == 2 or store() is None:
                mark_broken()
                raise RuntimeError(_differences(what)) from error
    if reports:
        _post_status("")


def _post_status(what: str, items: Sequence[str] = ()) -> None:
    """Tell the other ranks in which collective this one is; an empty name if it is done."""
    board = store()
    if board is not None:
        with suppress(RuntimeError):  # rank zero may keep the store, and be gone
            board.set(str(rank()), json.dumps([_count, what, list(items)]))


def _read_statuses() -> dict[int, tuple[int, str, list[str]]]:
    """What each rank has posted: the number of its collective, its name, its items."""
    board, statuses = store(), {}
    for other in range(world_size()):
        with suppress(RuntimeError):
            if board is not None and board.check([str(other)]):
                count, what, items = json.loads(board.get(str(other)))
                if what:
                    statuses[other] = (count, what, items)
    return statuses


def _is_elsewhere(what: str) -> bool:
    return any(status[:2] != (_count, what) for status in _read_statuses().values())


def _differences(what: str, items: Sequence[str] = ()) -> str:
    """Say where each rank is, once all have posted it or had the time to."""
    deadline = time.monotonic() + 1.5 * WATCHDOG_SECONDS
    while len(statuses := _read_statuses()) < world_size() and time.monotonic() < deadline:
        if failed := failures():
            return "; ".join(f"rank {other} failed: {error}" for other, error in failed.items())
        time.sleep(0.05)
    parts = [f"rank {rank()} is in {what}"]
    for other in range(world_size()):
        _, there, theirs = statuses.get(other, (0, "", []))
        if not there and other != rank():
            parts.append(f"no word from rank {other}, which has ended or hangs")
        elif there != what:
            parts.append(f"rank {other} in {there}")
        for ours, their in zip_longest(items, theirs, fillvalue="none"):
            if there == what and ours != their:
                parts[0] += f" with {ours}"
                parts.append(f"rank {other} with {their}")
                break
    return f"ranks disagree: {'; '.join(parts)}. All ranks must call the same collectives"
