"""Ranks that wait in a collective of their devices, for ever: named from a thread (optional).

The host does not wait for such a collective. So each has a small one on the CPU beside it, of which
a thread sees when all ranks have come there.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from .board import SECONDS, differences, elsewhere, exchange, notes, post, this_process
from .ranks import rank

logger = logging.getLogger(__name__)

POLL = 0.25  # seconds between two looks


class _Call(NamedTuple):
    name: str
    work: Any  # of a collective on the CPU
    mine: Any = None
    everyone: Any = ()  # should be like mine

    def has_ended(self) -> bool:
        """Return whether all ranks have come."""
        with suppress(RuntimeError):
            return bool(self.work.is_completed() and self.work.wait())
        return False  # another rank is gone


_pending: deque[_Call] = deque()


def note_call(tensor: torch.Tensor, name: str, work: Any = None) -> None:
    """Let the thread see when all ranks have come to a collective of their devices.

    Args:
        tensor: of the collective; nothing is done for one on the CPU.
        name: of the collective, with its arguments.
        work: of a collective on the CPU beside it; by default, one that compares the names.
    """
    if not tensor.is_cpu:
        _pending.append(_Call(name, work) if work else _Call(name, *exchange(name)))


def watch_device(kind: str) -> None:
    """Start the thread, for collectives of a kind of device that the host does not wait for."""
    if kind != "cpu":
        threading.Thread(target=_watch, daemon=True, name="devices").start()


def _watch() -> None:
    """Tell other ranks where this one has waited for long; end it if they are elsewhere."""
    begin, before, posted = time.monotonic(), False, False
    while dist.is_initialized():
        time.sleep(POLL)
        while _pending and _pending[0].has_ended():
            call = _pending.popleft()
            begin, before = time.monotonic(), False
            if any(other != call.mine for other in call.everyone):
                _end(differences(call.name))
        if not _pending:
            begin = time.monotonic()
            if posted:
                posted = False
                post(f"status {rank()}", "")
        elif time.monotonic() - begin > SECONDS:
            begin, posted = time.monotonic(), True
            call = _pending[0]
            post(f"status {rank()}", call.name)
            now = elsewhere(call.name) or bool(notes("failed"))
            if call.work.is_completed() or (now and before):
                _end(differences(call.name))
            before = now


def _end(error: Exception) -> None:
    """End this process, if the main thread does not: it may never come back from its device."""
    this_process.broken = True
    time.sleep(2 * SECONDS)
    logger.critical("%s", error)
    logging.shutdown()
    os._exit(1)
