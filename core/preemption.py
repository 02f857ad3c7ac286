"""Being asked to stop: signals set a flag, and all ranks stop after the same step.

SIGTERM, SIGUSR1 and SIGUSR2 ask; so Slurm does before it takes a job's place or time away. Whoever
trains tells `stop_here` of each step; while nobody asks, that costs a lock that nobody else holds.
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

SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]
REPEAT = 10.0  # seconds in which another signal is taken for the same request: a collective may
# hold up the first one for a while
POLL = 0.5  # seconds between looks at whether another rank was asked
ANSWER = 30.0  # seconds in which all ranks must notice that one was asked

Position = tuple[int, ...]  # of a step: epoch, stage, loop, step; grows with the training


_asked: str = ""  # the signal
_asked_at = 0.0
_position: Position = ()  # of the step that was begun last
_lock = threading.Lock()  # so that the position that others see is never too old
_round = 0  # how many times signals were listened to; keeps the words of the rounds apart
_listening = False


@contextmanager
def listening() -> Iterator[None]:
    """Take signals as requests to stop, for the time of the body, in the main thread."""
    global _asked, _position, _round, _listening
    if _listening or threading.current_thread() is not threading.main_thread():
        yield
        return
    _asked, _position, _round, _listening = "", (), _round + 1, True
    before = {number: signal.signal(number, _ask) for number in SIGNALS}
    ended = threading.Event()
    if process_group.is_distributed():
        threading.Thread(target=_watch, args=(ended,), daemon=True, name="preemption").start()
    try:
        yield
    finally:
        _listening = False
        ended.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def asked() -> str:
    """Name of the signal that asked to stop; empty as long as none did."""
    return _asked


def stop_here(loop: Position, step: int) -> bool:
    """Tell that so many steps of a loop are done, and another is next; do all ranks stop between?

    Args:
        loop: position of the loop: epoch, stage, number.
        step: number of steps that are done.
    """
    global _position
    with _lock:
        if not _asked:
            _position = *loop, step + 1
            return False
        _position = *loop, step
    if not process_group.is_distributed() or _all_are_here((*loop, step)):
        return True
    with _lock:
        _position = *loop, step + 1
    return False


def passed(position: Position) -> None:
    """Tell of a position at which nobody can stop, such as the end of a loop."""
    global _position
    with _lock:
        _position = position


def _ask(number: int, frame: FrameType | None) -> None:
    """Note the first signal; a second one, after a while, ends the run at once."""
    global _asked, _asked_at
    if not _asked:
        _asked, _asked_at = signal.Signals(number).name, time.monotonic()
    elif time.monotonic() - _asked_at > REPEAT:
        raise KeyboardInterrupt


def _all_are_here(position: Position) -> bool:
    """Wait until all ranks know of the request; are they here, or will they be, rather than ahead?

    Nobody leaves the foremost position, once all know: so all meet there.
    """
    deadline = time.monotonic() + ANSWER
    while True:
        _tell()
        positions = _positions()
        if any(other > position for other in positions.values()):
            return False
        if len(positions) == process_group.world_size():
            return True
        if time.monotonic() > deadline:
            silent = sorted({*range(process_group.world_size())} - positions.keys())
            raise RuntimeError(
                f"asked to stop by {_asked}, but no word from ranks {silent}, which hang or are in "
                "no log_progress loop; the last commit is safe"
            )
        time.sleep(0.02)


def _watch(ended: threading.Event) -> None:
    """Learn of requests to other ranks; once there is one, keep telling where this rank is."""
    global _asked, _asked_at
    with suppress(RuntimeError):  # rank zero may keep the store, and be gone
        while not ended.wait(0.05 if _asked else POLL):
            if not _asked and (signal_name := _read("asked")):
                _asked, _asked_at = signal_name, time.monotonic()
            if _asked:
                _tell()


def _tell() -> None:
    store = process_group.store()
    if store is not None:
        with _lock:
            store.set(f"{_round} asked", _asked)
            store.set(f"{_round} at {process_group.rank()}", json.dumps(_position))


def _positions() -> dict[int, Position]:
    found = {rank: _read(f"at {rank}") for rank in range(process_group.world_size())}
    return {rank: tuple(json.loads(word)) for rank, word in found.items() if word}


def _read(what: str) -> str:
    store: Any = process_group.store()
    key = f"{_round} {what}"
    return store.get(key).decode() if store is not None and store.check([key]) else ""
