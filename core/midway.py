"""Progress within an epoch, so that a stopped run resumes at the next step."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, NoReturn, TypeVar

from . import distrib, preemption
from .loader import EpochSampler
from .rng import get_rng_state, set_rng_state
from .state import StateDict
from .utils import Averages, UserError, length
from .xp import Preempted

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass
class Loop(Generic[T]):
    """A loop within which a run can stop and resume; it ends where its `for` statement does.

    Args:
        midway: of the run.
        iterable: the data.
        name: of the entry in `steps` to count in.
        steps: begun since the run began, by stage.
    """

    midway: Midway
    iterable: Iterable[T]
    name: str
    steps: dict[str, int]

    def __iter__(self) -> Iterator[T]:
        return self.midway.loop(self.iterable, self.name, self.steps)

    def __len__(self) -> int:
        return len(self.iterable)  # type: ignore[arg-type]


@dataclass
class _Stage:
    """The stage that is running."""

    begun: float  # in seconds, on the monotonic clock
    rng_at_start: StateDict
    loop: int = -1  # number of the loop that is running, or ended last
    step: int = 0  # of that loop, done
    in_step: bool = False
    rng_at_loop: StateDict = field(default_factory=dict)  # at the loop's begin
    rng_now: StateDict = field(default_factory=dict)  # generators, as it was interrupted
    averages: list[Averages] = field(default_factory=list)


class Midway:
    """The stages of the epoch that are done, and the position in the one that is running.

    It is state. A run that resumes is given the metrics of the stages that are done, without
    running them; the interrupted stage is called again, but its loops resume where they were:
    those that had ended yield nothing, and the generators are set as they had been.
    """

    def __init__(self) -> None:
        self.start_epoch(1)

    def start_epoch(self, epoch: int) -> None:
        """Forget the last epoch."""
        self._epoch = epoch
        self._done: list[tuple[str, dict[str, Any]]] = []
        self._replay: list[tuple[str, dict[str, Any]]] = []  # done before the run resumed
        self._saved: StateDict | None = None  # of the stage that was interrupted
        self._stage: _Stage | None = None
        self._depth = 0

    # ------------------------------------------------------------------------------------ stages

    def done_before(self, name: str) -> dict[str, Any] | None:
        """The metrics of the stage that is next, if it was done before the run resumed."""
        if not self._replay:
            return None
        then, metrics = self._replay[0]
        if then != name:
            raise UserError(
                f"the run stopped in epoch {self._epoch} after stage {then!r}, and now comes "
                f"{name!r} in its place: run the same stages in the same order, or delete "
                "midway.th in its folder to resume after the last commit"
            )
        self._done.append(self._replay.pop(0))
        return metrics

    def is_done(self, name: str) -> bool:
        """Has a stage of this name ended in this epoch?"""
        return any(done == name for done, _ in self._done)

    def start_stage(self) -> float:
        """Begin, or resume; return the time it began at, on the monotonic clock."""
        self._stage = _Stage(time.monotonic(), get_rng_state())
        if self._saved is not None:
            mine = self._mine
            self._stage.begun -= self._saved["seconds"]
            self._stage.rng_at_start = mine["rng_at_start"]
            set_rng_state(mine["rng_at_start"])
        return self._stage.begun

    def stage_done(self, name: str, metrics: dict[str, Any]) -> None:
        """Note that the stage that is running is done, and what it returned."""
        self._done.append((name, metrics))

    def leave_stage(self) -> None:
        """Forget the stage that was running, be it done or not."""
        self._stage = self._saved = None

    def place(self) -> tuple[int, ...]:
        """Stage, loop and step that are running or are next, from 0, for the order of data.

        A loop begins, and gets its data, at step 0; the body of its first step is step 1.
        """
        if self._stage is None:
            return ()
        loop = self._stage.loop + (not self._depth)  # the running one, or else the next
        step = self._stage.step + 1 if self._stage.in_step else 0
        return len(self._done), loop, step

    @property
    def _mine(self) -> StateDict:
        """What this rank saved of the interrupted stage; empty if none was."""
        mine: StateDict = self._saved["ranks"][distrib.rank()] if self._saved is not None else {}
        return mine

    # ------------------------------------------------------------------------------------- loops

    def averager(self, beta: float) -> Averages:
        """Averages that are part of the state until the stage ends."""
        averages = Averages(beta)
        if self._stage is not None and not self._depth:  # else it is a step's own
            number = len(self._stage.averages)
            if number < len(saved := self._mine.get("averages", ())):
                averages.load_state_dict(saved[number])
            self._stage.averages.append(averages)
        return averages

    def steps_before(self) -> int:
        """Steps of the next loop that were done before the run resumed."""
        next_is_it = self._stage and self._saved and self._saved["loop"] == self._stage.loop + 1
        return int(self._saved["step"]) if self._saved and next_is_it else 0

    def loop(self, iterable: Iterable[T], name: str, steps: dict[str, int]) -> Iterator[T]:
        """Iterate, from where the loop was; raise Preempted between two steps if asked to stop.

        See `Loop` for the arguments. There is no stop after the last step, if that is known: what
        follows the loop may need what a step defined.
        """
        steps.setdefault(name, 0)
        stage = self._stage
        if stage is None or self._depth:  # a run stops between steps of the outermost loop only
            for item in iterable:
                steps[name] += 1
                yield item
            return
        before = self.steps_before()
        stage.loop += 1
        if self._saved is not None and stage.loop < self._saved["loop"]:
            return
        self._depth += 1
        last = length(iterable)
        try:
            iterator = self._begin(stage, iterable, before)
            where = self._epoch, len(self._done), stage.loop
            stage.step = before
            if preemption.should_stop(where, before):
                _stop(stage)
            for item in iterator:
                steps[name] += 1
                stage.in_step = True
                yield item
                stage.in_step = False
                stage.step += 1
                if stage.step != last and preemption.should_stop(where, stage.step):
                    _stop(stage)
            if not stage.step:
                logger.warning("Stage %s looped over no data", name)
        finally:
            self._depth -= 1
            stage.in_step = False
            if not stage.rng_now:  # else this rank stays where it stopped, until all are there
                preemption.mark_passed((self._epoch, len(self._done), stage.loop, preemption.LAST))

    def _begin(self, stage: _Stage, iterable: Iterable[T], before: int) -> Iterator[T]:
        """Iterate from the start or from where the loop was, with the generators as they were."""
        sampler = getattr(iterable, "sampler", None)
        saved = self._mine
        if saved:
            set_rng_state(saved["rng_at_loop"])
        stage.step, stage.rng_at_loop = before, get_rng_state()
        if isinstance(sampler, EpochSampler):
            sampler.skip(before * (getattr(iterable, "batch_size", None) or 1))
        iterator = iter(iterable)
        if not isinstance(sampler, EpochSampler):
            for _ in range(before):
                next(iterator, None)
        if saved:
            set_rng_state(saved["rng_now"])
            self._saved = None
        return iterator

    # ------------------------------------------------------------------------------------- state

    @property
    def is_within_stage(self) -> bool:
        """Was the run stopped within a stage, and has not come there again?"""
        return self._saved is not None

    @property
    def can_resume(self) -> bool:
        """Would the stage that is running be resumed exactly? One without averages has others."""
        return self._stage is not None and bool(self._stage.averages)

    def state_dict(self) -> StateDict:
        """All ranks must call it, and be in the same stage or in none."""
        stage, running = self._stage, None
        if stage is not None:
            mine = {
                "rng_at_start": stage.rng_at_start,
                "rng_at_loop": stage.rng_at_loop,
                "rng_now": stage.rng_now,
                "averages": [average.state_dict() for average in stage.averages],
            }
            running = {
                "loop": stage.loop,
                "step": stage.step,
                "seconds": time.monotonic() - stage.begun,
                "ranks": distrib.gather_objects(mine),
            }
        return {"epoch": self._epoch, "done": [*self._done, *self._replay], "stage": running}

    def load_state_dict(self, state: StateDict) -> None:
        """Resume from there."""
        self.start_epoch(state["epoch"])
        self._replay = [(name, dict(metrics)) for name, metrics in state["done"]]
        self._saved = state["stage"]


def _stop(stage: _Stage) -> NoReturn:
    # `run_stage` saves, not we: until it is there, a `swapped()` may have lent a model its weights.
    stage.rng_now = get_rng_state()
    raise Preempted(preemption.stop_signal())
