"""Name ranks that hang in a collective on their devices (optional).

The host does not wait for such a collective. Each is therefore paired with a small collective on
the CPU, and a thread watches whether all ranks have reached that one.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from .board import SECONDS, Call, differences, elsewhere, exchange, notes, post, this_process
from .ranks import rank

logger = logging.getLogger(__name__)

POLL = 0.25  # seconds between two looks


def note_call(tensor: torch.Tensor, name: str, work: Any = None) -> None:
    """Register a collective on a device, for the thread to watch.

    Args:
        tensor: of the collective; nothing is done for one on the CPU.
        name: of the collective, with its arguments.
        work: of a collective on the CPU beside it; by default, one that compares the names.
    """
    if not tensor.is_cpu:
        this_process.pending.append(Call(name, work) if work else Call(name, *exchange(name)))


def watch_device(kind: str) -> None:
    """Start the thread, unless the device is the CPU, whose collectives the host waits for."""
    this_process.pending.clear()
    if kind != "cpu":
        threading.Thread(target=_watch, daemon=True, name="devices").start()


def _watch() -> None:
    """Post the collective in which this rank hangs; end it if other ranks are in another one."""
    pending = this_process.pending
    begin, before, posted = time.monotonic(), False, False
    while dist.is_initialized():
        time.sleep(POLL)
        while pending and pending[0].has_ended():
            call = pending.popleft()
            begin, before = time.monotonic(), False
            if any(other != call.mine for other in call.everyone):
                _end(differences(call.name))
        if not pending:
            begin = time.monotonic()
            if posted:
                posted = False
                post(f"status {rank()}", "")
        elif time.monotonic() - begin > SECONDS:
            begin, posted = time.monotonic(), True
            call = pending[0]
            post(f"status {rank()}", call.name)
            now = elsewhere(call.name) or bool(notes("failed"))
            if (call.work.is_completed() and not call.has_ended()) or (now and before):
                _end(differences(call.name))
            before = now


def _end(error: Exception) -> None:
    """End this process unless the main thread does, which its device may block for ever."""
    this_process.broken = True
    time.sleep(2 * SECONDS)
    logger.critical("%s", error)
    logging.shutdown()
    os._exit(1)
