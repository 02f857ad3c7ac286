"""Preemption: a signal sets a flag, and all ranks stop after the same step.

The signals are SIGTERM, SIGUSR1 and SIGUSR2; Slurm sends one before it preempts a job or ends its
time. The training loop calls `should_stop` after each step; without a signal, that costs one lock
that nobody else holds.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from . import process_group
from .xp import SIGNALS

# Seconds in which another signal counts as the same request: a rank in a collective notices late.
REPEAT = 10.0
POLL = 0.5  # seconds between checks whether another rank got a signal
ANSWER = 30.0  # seconds in which all ranks must notice that one got a signal
LAST = 2**62  # a number after that of all steps of a loop, and of all stages of an epoch

Position = tuple[int, ...]  # of a step: epoch, stage, loop, step; grows with the training

_signal = ""  # name of the signal that asked to stop; empty without one
_signal_at = 0.0
_position: Position = ()  # of the step that was started last
_lock = threading.Lock()  # so that the position that others see is never too old
_round = 0  # how many times signals were listened to; keeps the store's entries of the rounds apart
_listening = False


@contextmanager
def listening() -> Iterator[None]:
    """Take signals as requests to stop, for the time of the body, in the main thread."""
    global _signal, _position, _round, _listening
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    _signal, _position, _round, _listening = "", (), _round + 1, True
    before = {number: signal.signal(number, _on_signal) for number in SIGNALS}
    ended = threading.Event()
    if process_group.is_distributed():
        threading.Thread(target=_watch, args=(ended,), daemon=True, name="preemption").start()
    try:
        yield
    finally:
        ended.set()
        _signal, _listening = "", False
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_signal() -> str:
    """Name of the signal that asked to stop; empty if none did."""
    return _signal


def should_stop(loop: Position, step: int) -> bool:
    """Note that `step` steps of a loop are done; return whether all ranks stop before the next.

    Args:
        loop: position of the loop: epoch, stage, number.
        step: number of steps that are done.

    Raises:
        RuntimeError: if a rank does not answer a request to stop.
    """
    global _position
    with _lock:
        if not _signal:
            _position = *loop, step + 1
            return False
        _position = *loop, step
    if not process_group.is_distributed() or _all_ranks_here((*loop, step)):
        return True
    with _lock:
        _position = *loop, step + 1
    return False


def mark_passed(position: Position) -> None:
    """Note a position at which no rank can stop, such as the end of a loop."""
    global _position
    with _lock:
        _position = position


def _on_signal(number: int, frame: FrameType | None) -> None:
    """Note the first signal; a second one, after a while, ends the run at once."""
    global _signal, _signal_at
    if not _signal:
        _signal, _signal_at = signal.Signals(number).name, time.monotonic()
    elif time.monotonic() - _signal_at > REPEAT:
        raise KeyboardInterrupt


def _all_ranks_here(position: Position) -> bool:
    """Wait until all ranks know of the request; return whether none is ahead of this position.

    Once all know, no rank leaves the foremost position, so the others catch up with it.
    """
    deadline = time.monotonic() + ANSWER
    while True:
        _post_position()
        positions = _read_positions()
        if any(other > position for other in positions.values()):
            return False
        if len(positions) == process_group.world_size():
            return True
        if time.monotonic() > deadline:
            silent = sorted({*range(process_group.world_size())} - positions.keys())
            raise RuntimeError(
                f"asked to stop by {_signal}, but no word from ranks {silent}, which hang or have "
                "ended; the last commit is safe"
            )
        time.sleep(0.02)


def _watch(ended: threading.Event) -> None:
    """Check for signals to other ranks; once there is one, keep posting where this rank is."""
    global _signal, _signal_at
    with suppress(RuntimeError):  # rank zero may keep the store, and be gone
        while not ended.wait(0.05 if _signal else POLL):
            if not _signal and (signal_name := _read("signal")):
                _signal, _signal_at = signal_name, time.monotonic()
            if _signal:
                _post_position()


def _post_position() -> None:
    store = process_group.store()
    if store is not None:
        with _lock:
            store.set(f"{_round} signal", _signal)
            store.set(f"{_round} at {process_group.rank()}", json.dumps(_position))


def _read_positions() -> dict[int, Position]:
    found = {rank: _read(f"at {rank}") for rank in range(process_group.world_size())}
    return {rank: tuple(json.loads(text)) for rank, text in found.items() if text}


def _read(what: str) -> str:
    """An entry of the store; empty if there is none."""
    store: Any = process_group.store()
    key = f"{_round} {what}"
    return store.get(key).decode() if store is not None and store.check([key]) else ""
