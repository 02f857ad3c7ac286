"""The board: notes of all ranks on where they are, outside of collectives.

A rank in a long wait posts its place and reads the notes of others. As long as collectives take
less than SECONDS, nothing is posted or paid for.
"""

from __future__ import annotations

import itertools
import json
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .group import is_distributed, is_initialized, rank, this_process, world_size

SECONDS = 2.0  # in one collective, after which a rank tells the others where it is

_numbers = itertools.count(1)  # of the collectives that this rank waits for


def post(key: str, note: str) -> None:
    """Write a note, for all ranks to read; nothing in a single process."""
    if this_process.store is not None:
        with suppress(RuntimeError):  # rank zero may keep the store, and be gone
            this_process.store.set(key, note)


def read(key: str) -> str:
    """Return a note; empty if there is none."""
    with suppress(RuntimeError):
        if this_process.store is not None and this_process.store.check([key]):
            return str(this_process.store.get(key).decode())
    return ""


def report_failure(error: BaseException) -> None:
    """Post the error of this rank, for rank zero to show."""
    post(f"failed {rank()}", f"{type(error).__name__}: {error}")


def failures() -> dict[int, str]:
    """Return the posted errors, by rank."""
    notes = {other: read(f"failed {other}") for other in range(world_size())}
    return {other: note for other, note in notes.items() if note}


def check_same_call(what: str, items: Sequence[str] = ()) -> None:
    """Check that all ranks are about to do the same, else raise.

    Args:
        what: the operation, in words.
        items: descriptions of its arguments.

    Raises:
        RuntimeError: on all ranks, within seconds; names the ranks and the first difference.
    """
    if not is_distributed():
        return
    if not is_initialized():
        raise RuntimeError(f"{what}: call distrib.init() first, at the start of each process")
    mine = torch.tensor([zlib.crc32("\n".join([what, *items]).encode())])
    everyone = [torch.empty_like(mine) for _ in range(world_size())]
    number = wait(dist.all_gather(everyone, mine, async_op=True), what)
    if any(other != mine for other in everyone):
        _post_status(number, what, items)
        raise RuntimeError(_differences(what, items))


def wait(work: Any, what: str) -> int:
    """Wait for an asynchronous collective between CPUs; return its number on this rank.

    Raises:
        RuntimeError: within seconds if another rank is gone, or waits in another collective.
    """
    number, conflicts = next(_numbers), 0
    posted = failed = False
    while True:
        try:
            work.wait(timedelta(seconds=SECONDS))
            break
        except RuntimeError as error:
            if work.is_completed() and not failed:
                failed = True  # unless it ended well just now, after the time: wait again
                continue
            _post_status(number, what)
            posted = True
            # Twice, for what another rank has posted may be out of date just now.
            elsewhere = any(there[:2] != (number, what) for there in _statuses().values())
            conflicts = conflicts + 1 if elsewhere else 0
            if failed or conflicts == 2 or this_process.store is None:
                this_process.broken = True
                raise RuntimeError(_differences(what)) from error
    if posted:
        _post_status(number, "")
    return number


def _post_status(number: int, what: str, items: Sequence[str] = ()) -> None:
    """Post the collective of this rank; an empty name once it is done."""
    post(f"status {rank()}", json.dumps([number, what, list(items)]))


def _statuses() -> dict[int, tuple[int, str, list[str]]]:
    """Return, by rank, the number, name and items of the collective where the rank waits."""
    notes = {other: read(f"status {other}") for other in range(world_size())}
    statuses = {other: tuple(json.loads(note)) for other, note in notes.items() if note}
    return {other: status for other, status in statuses.items() if status[1]}


def _differences(what: str, items: Sequence[str] = ()) -> str:
    """Say where each rank is, once all have posted or had the time to."""
    deadline = time.monotonic() + 1.5 * SECONDS
    while len(statuses := _statuses()) < world_size() and time.monotonic() < deadline:
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
        for ours, their in itertools.zip_longest(items, theirs, fillvalue="none"):
            if there == what and ours != their:
                parts[0] += f" with {ours}"
                parts.append(f"rank {other} with {their}")
                break
    return f"ranks disagree: {'; '.join(parts)}. All ranks must call the same collectives"
