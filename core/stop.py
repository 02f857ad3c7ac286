"""Requests to save or to stop a run, and the step after which all ranks answer.

Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 ask for a stop, the clock asks for a save. After each step, a
loop compares the number of the step with `due`, and calls `answer` only when the step has come.

With several ranks, rank zero proposes a step ahead of all. A rank vetoes if it has passed the step,
is in no loop or in another loop, or can't save there; a rank whose loop ends earlier vetoes too.
Each rank waits at the step for all others, or for a veto. So nobody waits in vain, and the
collectives of a save begin only when all ranks are there.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from . import distrib
from .utils import UserError

logger = logging.getLogger(__name__)

ASKING = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in ASKING if hasattr(signal, name)]
SILENCE = 10.0  # seconds without a sign of life of a rank that others wait for
POLL = 0.25  # seconds between two looks of the background thread
# Within these seconds a second signal is a duplicate, as launchers send; later, it insists.
REPEAT, REPEAT_OF_CTRL_C = 10.0, 1.0

_scopes = itertools.count()  # keeps the notes of one scope apart from those of the next


class Stopped(SystemExit):
    """The end of a run after a request to stop, when all is saved, with exit status 130.

    Args:
        asked: name of the signal.
    """

    def __init__(self, asked: str) -> None:
        super().__init__(asked)
        self.code = 130


class Requests:
    """Requests to this run; there are none without `listening`.

    Args:
        minutes: between two saves at most; 0 for none.
        is_busy: returns whether a save is still being written; then no other is asked for.
    """

    def __init__(self, minutes: float = 0, is_busy: Callable[[], bool] = bool) -> None:
        self.listens = False
        self.due: float = math.inf  # the step of the running loop after which to call `answer`
        self.step = 0  # steps of the running loop that are done
        self.signal = ""  # name of the signal that asked this rank, or another, for a stop
        self.agreed = ""  # the signal for which all ranks stop at the next stage
        self._seconds = 60 * minutes or math.inf
        self._is_busy = is_busy
        self._loop: tuple[int, ...] = ()  # epoch and stage of the running loop
        self._saves = False  # in the running loop
        self._open: tuple[int, str] = -1, ""  # number and kind of the newest proposal
        self._asked = 0.0  # when the signal came
        self._lock = threading.Lock()  # between the two threads, but for `step` and `due`
        self._scope = ""  # of notes, the same on all ranks
        self.renew()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals and the clock as requests for the time of the body."""
        self._scope, handlers = f"{next(_scopes)} ", {}
        if threading.current_thread() is threading.main_thread():
            heard = [n for n in SIGNALS if signal.getsignal(n) is not signal.SIG_IGN]
            handlers = {number: signal.signal(number, self._on_signal) for number in heard}
        self.listens, ended = True, threading.Event()
        watch = threading.Thread(target=self._watch, args=(ended,), daemon=True, name="requests")
        watch.start()
        try:
            yield
        finally:
            ended.set()
            watch.join(SILENCE)  # a thread that runs into the end of Python may crash it
            self.listens = False
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def renew(self) -> None:
        """Count the minutes from now, as all is saved."""
        self._saved = time.monotonic()

    # ------------------------------------------------------------------------- in the main thread

    def agree(self) -> None:
        """Agree to stop at the next stage if a signal has asked any rank; all must take part."""
        self.agreed = next(filter(None, distrib.gather_objects(self.signal)), "")

    @contextmanager
    def loop(self, place: tuple[int, ...], step: int, saves: bool) -> Iterator[None]:
        """Answer requests in a loop for the time of the body.

        Args:
            place: epoch and checksum of the stage.
            step: finished steps.
            saves: whether the loop can be saved between two steps.
        """
        self.step, self._saves, self._loop = step, saves, place
        self._ask()
        try:
            yield
        finally:
            with self._lock:
                self._loop = ()
                if self.due != math.inf:
                    self._veto()

    def answer(self, ready: bool) -> str:
        """Return `save`, or the signal to stop, if all ranks are ready after this step; else ""."""
        if not distrib.is_distributed():
            self.due = math.inf if ready else self.due
            return self._wanted() if ready else ""
        with self._lock:
            number, kind = self._open
            if self.step < self.due:  # a new proposal has come since the loop looked
                return ""
        distrib.post(f"{self._scope}{number} {distrib.rank()}", "ready" if ready else "veto")
        heard: dict[tuple[int, str], float] = {}  # when a rank's sign of life was first seen
        while (replies := self._replies(number)).count("ready") < distrib.world_size():
            if "veto" in replies:
                kind = ""
                break
            for other in (rank for rank, reply in enumerate(replies) if not reply):
                beat = distrib.read(f"{self._scope}alive {other}")
                since = heard.setdefault((other, beat), time.monotonic())
                if time.monotonic() - since > SILENCE:
                    distrib.this_process.broken = True
                    raise UserError(f"no word from rank {other}, which ended or hangs: see its log")
            time.sleep(0.005)
        with self._lock:
            if self._open[0] == number:  # else a new proposal is there
                self.due = math.inf
        return kind

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal, self._asked = signal.Signals(number).name, time.monotonic()
            self._ask()
            return
        repeat = REPEAT_OF_CTRL_C if number == signal.SIGINT else REPEAT
        if time.monotonic() - self._asked > repeat:
            raise KeyboardInterrupt

    # -------------------------------------------------------------------------- in the background

    def _watch(self, ended: threading.Event) -> None:
        step, polls, announced = 0, 1, False
        while not ended.wait(POLL):
            if self.signal and not announced:
                announced = True
                limit = REPEAT_OF_CTRL_C if self.signal == "SIGINT" else REPEAT
                note = "%s: saving and stopping after this step; repeat after %d s to stop at once"
                logger.warning(note, self.signal, limit)
            self._ask()
            if not distrib.is_distributed():
                continue
            if self.signal:
                distrib.post(f"{self._scope}signal", self.signal)
            elif name := distrib.read(f"{self._scope}signal"):
                self.signal, self._asked = name, time.monotonic()
            if distrib.is_rank_zero() and self.due == math.inf and self._wanted() and self._loop:
                # So far ahead that the other ranks read it before; further if they did not.
                polls = polls + 1 if "veto" in self._replies(self._open[0]) else 1
                ahead = 2 + polls * max(0, self.step - step)
                proposal = self._open[0] + 1, self._wanted(), self._loop, self.step + ahead
                distrib.post(f"{self._scope}proposal", json.dumps(proposal))
            step = self.step
            distrib.post(f"{self._scope}alive {distrib.rank()}", str(time.monotonic()))
            self._read_proposal()

    def _ask(self) -> None:
        """Ask for an answer after this step, if there is no other rank to agree with."""
        if not distrib.is_distributed() and self._loop and self._wanted():
            self.due = 0

    def _wanted(self) -> str:
        if self.signal:
            return self.signal
        late = time.monotonic() - self._saved > self._seconds
        return "save" if late and self._saves and not self._is_busy() else ""

    def _read_proposal(self) -> None:
        """Agree to a new proposal, or veto."""
        if not (note := distrib.read(f"{self._scope}proposal")):
            return
        number, kind, loop, step = json.loads(note)
        if number == self._open[0]:
            return
        with self._lock:
            self._open = number, kind
            self.due = step
            # The loop notes its step, then reads `due`; here it is the other way round. So one of
            # the two notices if the step is just being passed.
            if self._loop != tuple(loop) or self.step >= step:
                self._veto()

    def _veto(self) -> None:
        self.due = math.inf
        distrib.post(f"{self._scope}{self._open[0]} {distrib.rank()}", "veto")

    def _replies(self, number: int) -> list[str]:
        ranks = range(distrib.world_size())
        return [distrib.read(f"{self._scope}{number} {rank}") for rank in ranks]
