"""The training loop of a stage: position, progress and averages, and where a run may stop."""

from __future__ import annotations

import logging
import time
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

import torch

from . import distrib
from .checkpoint import Cursor
from .data import EpochSampler
from .log import LogProgressBar
from .metrics import Averages, added
from .results import to_numbers
from .rng import Position, derive_seed, get_rng_state, seed_process, set_rng_state
from .state import StateDict
from .stop import Requests, Stopped
from .utils import UserError, length

T = TypeVar("T")
logger = logging.getLogger(__name__)


class Epoch:
    """The running epoch: its finished stages, and the way back to where a run resumes.

    Args:
        number: from 1.
        counts: steps of each stage since the run began.
        cursor: of the checkpoint, until the run has come there again.
        load: loads the state of this checkpoint once more.
    """

    def __init__(
        self,
        number: int,
        counts: Mapping[str, int],
        cursor: Cursor | None = None,
        load: Callable[[], None] = lambda: None,
    ) -> None:
        self.number, self.counts = number, dict(counts)
        self.cursor, self._load = cursor, load
        self.done: list[tuple[str, dict[str, Any]]] = []

    def arrive(self) -> None:
        """Load the checkpoint's state and generators once more: the run has arrived there."""
        if self.cursor is not None:
            self._load()
            self._load = lambda: None  # lets go of the state
            set_rng_state(share(self.cursor, self.number)["now"])
            self.cursor = None

    def skip(self, name: str) -> dict[str, Any] | None:
        """Return the metrics of a stage finished before the checkpoint, in place of a run."""
        if self.cursor is None:
            return None
        known, number = self.cursor.done, len(self.done)
        then = known[number][0] if number < len(known) else self.cursor.stage
        if then != name:
            raise UserError(
                f"epoch {self.number} resumes at {then!r}, not {name!r}: run the same stages again"
            )
        if number == len(known):
            return None
        self.done.append(known[number])
        if len(self.done) == len(known) and not self.cursor.stage:
            self.arrive()
        return dict(known[number][1])

    def finish(self, stage: Stage, metrics: dict[str, Any]) -> None:
        """Add a stage to the finished ones."""
        self.counts[stage.name] = stage.counted + stage.step
        self.done.append((stage.name, dict(metrics)))  # the caller may change its own

    def position(self, stage: Stage, ranks: list[StateDict], logged: dict[str, Any]) -> Cursor:
        """Return a cursor in a stage; see `Cursor` for `ranks` and `logged`."""
        counts = self.counts | {stage.name: stage.counted + stage.step}
        place = stage.name, stage.step, stage.seconds
        return Cursor([*self.done], *place, counts, ranks, logged)


class Stage:
    """A running stage: its begin, its loop, and ways to save.

    Args:
        name: of the stage.
        epoch: of the stage.
        requests: to be answered between two steps.
        save: saves the state, with the position in this stage.
        is_ready: whether a save is possible: no weights lent, no gradients pending.
        is_registered: whether an object is registered as state.
    """

    def __init__(
        self,
        name: str,
        epoch: Epoch,
        requests: Requests,
        save: Callable[[Stage], None],
        is_ready: Callable[[], bool],
        is_registered: Callable[[object], bool],
    ) -> None:
        self.name, self.epoch, self.requests = name, epoch, requests
        self.save, self.is_ready, self.is_registered = save, is_ready, is_registered
        # By name: a rank may have run a stage of its own before. A second run has another order.
        again = sum(done == name for done, _ in epoch.done)
        self.here = Position(epoch.number, zlib.crc32(f"{name} {again}".encode()))
        self.counted = epoch.counts.get(name, 0)  # steps of this stage in earlier epochs
        self.steps: Steps[Any] | None = None
        self.unwound = False  # an evaluation that was asked to stop, and begins again
        self._began = time.monotonic()
        if (cursor := epoch.cursor) is not None:
            self._began -= cursor.seconds
            self.counted -= cursor.step
            if not cursor.step:  # an evaluation, which begins again
                epoch.arrive()
            set_rng_state(share(cursor, epoch.number)["start"])
        self._at_start = get_rng_state()

    @property
    def seconds(self) -> float:
        """Time since the stage began."""
        return time.monotonic() - self._began

    @property
    def step(self) -> int:
        """Finished steps of the loop, not to be repeated."""
        if self.steps is None or self.unwound:
            return 0
        return max(self.steps.step, self.steps.logged)  # the latter of a loop that was left early

    def unwind(self) -> None:
        """Undo an unfinished evaluation: nothing but the generators has changed."""
        if self.unwound:
            set_rng_state(self._at_start)
            self.save(self)

    def rank_state(self) -> StateDict:
        """Return the entry of this rank in `Cursor.ranks`."""
        mine: StateDict = {"start": self._at_start}
        if self.steps is not None and self.step:
            mine |= {"loop": self.steps.at_begin, "averages": self.steps.averages.state_dict()}
            mine["batch"] = self.steps.global_batch
        return mine

    def result(self, returned: Any) -> dict[str, Any]:
        """Return the metrics of the stage as numbers, with its duration."""
        if not isinstance(returned, Mapping | None):
            kind = type(returned).__name__
            raise TypeError(f"stage {self.name!r} returned a {kind}, not a dict of metrics")
        if returned is None and self.steps is not None and self.steps.averages:
            logger.warning("Stage %s logged metrics and returned none: no return?", self.name)
        if returned and "duration" in returned:
            raise ValueError(f"stage {self.name!r}: `duration` is what run_stage measures")
        return to_numbers(returned or {}) | {"duration": self.seconds}


class Steps(Generic[T]):
    """A pass over data. The run may be saved or stopped between two of its steps.

    Args:
        data: a loader, or anything to iterate.
        stage: the running stage, if this is its loop; outside of a stage a pass just iterates.
        bar: makes a progress bar from a name and an iterator, as `log_progress` does.
        log_step: records a point of the curves by step.
        every: number of steps between two points; 0 for none.
        beta: forgetting factor of the averages; 1 weighs all steps alike.
        finite: names of metrics that must not be NaN or infinite.
        total: number of steps, if the data has no length.
    """

    def __init__(
        self,
        data: Iterable[T],
        stage: Stage | None,
        bar: Callable[..., LogProgressBar[T]],
        log_step: Callable[[str, Mapping[str, Any], int, int], None],
        every: int = 10,
        beta: float = 1.0,
        finite: Iterable[str] = (),
        total: int | None = None,
    ) -> None:
        cursor = stage.epoch.cursor if stage else None
        if stage is not None:
            if stage.steps is not None:
                raise UserError(
                    f"stage {stage.name} has a second loop of steps: make it a stage of its own"
                )
            stage.steps = self
        self.averages = Averages(beta)
        self.at_begin: StateDict = {}  # the generators
        self.step = cursor.step if cursor else 0
        self.logged = 0  # number of the last step whose metrics were logged
        self._waits = False  # a save was asked for, and was not possible yet
        self.name = stage.name if stage else "steps"
        self._data, self._stage, self._log_step, self._make_bar = data, stage, log_step, bar
        self._every, self._finite = every, tuple(finite)
        self._total = length(data) if total is None else total
        self._bar: LogProgressBar[T] | None = None

    def __len__(self) -> int:
        if self._total is None:
            raise TypeError("the data has no length: give self.steps total=")
        return self._total

    def __iter__(self) -> Iterator[T]:
        if self._bar is not None and self._stage is not None:
            raise UserError(f"stage {self.name} iterates twice: make it two stages")
        iterator = self._iterate()
        self._bar = self._make_bar(self.name, iterator, total=self._total)
        self._bar.done = self.step
        try:
            yield from self._bar
        finally:
            iterator.close()  # now, also if the loop is left early

    def log(self, metrics: Mapping[str, Any], weight: Any = 1.0) -> None:
        """Average and show the metrics of this step, and record a point of the curves.

        Args:
            metrics: numbers, or tensors of one element; no device is waited for.
            weight: of the step in the averages, such as the number of examples.
        """
        averages = self.averages(metrics, weight)
        self.logged = self.step + 1
        if self._bar is not None:
            self._bar.update(averages)
        if (stage := self._stage) is not None and self._every:
            counted = stage.counted + self.logged
            if counted % self._every == 0:
                self._log_step(stage.name, metrics, counted, stage.epoch.number)

    def metrics(self) -> dict[str, float]:
        """Return the averages over all steps of all ranks. All ranks must take part.

        Raises:
            UserError: if a metric in `finite` was NaN or infinite in some step.
            ValueError: if none has this name.
        """
        found = distrib.average_metrics(self.averages)
        for name in self._finite:
            if found and not {name, f"{name}.nonfinite"} & found.keys():
                raise ValueError(f"finite={name}: no metric has this name; there are {[*found]}")
            if count := found.get(f"{name}.nonfinite"):
                raise UserError(
                    f"{self.name}: {name} was NaN or infinite {count:.0f} times: "
                    "lower the learning rate, or limit the gradient's norm"
                )
        return found

    def _iterate(self) -> Generator[T, None, None]:
        """Yield the items after the finished steps, and answer requests between two items."""
        stage = self._stage
        requests = stage.requests if stage else Requests()
        here = stage.here if stage else Position()
        iterator = self._begin()
        with requests.loop((here.epoch, here.stage), self.step, torch.is_grad_enabled()):
            for item in iterator:
                here.step = self.step + 1
                yield item
                here.step = 0  # so that the order of the data depends on no step
                self.step = requests.step = self.step + 1
                if stage and self.step >= requests.due and self.step != self._total:
                    self._answer(stage, requests)

    def _answer(self, stage: Stage, requests: Requests) -> None:
        """Save, and end the run if asked to. Without gradients the stage begins again instead."""
        training = torch.is_grad_enabled()
        ready = not training or stage.is_ready()
        request = requests.answer(ready)
        if not (ready or self._waits):
            self._waits = True
            logger.warning("A save waits: gradients are pending, or weights are lent")
        if request and training:
            stage.save(stage)
        if request == "stop":
            stage.unwound = not training
            raise Stopped(requests.signal)

    def _begin(self) -> Iterator[T]:
        """Return the data's iterator; resume generators, state and averages as they were."""
        stage = self._stage
        if stage is None or (cursor := stage.epoch.cursor) is None:
            self.at_begin = get_rng_state()
            return iter(self._data)
        mine = share(cursor, stage.epoch.number)
        if self.averages.beta != 1 and len(cursor.ranks) != distrib.world_size():
            raise UserError(f"{stage.name}: averages with beta= need the same number of processes")
        self.averages.load_state_dict(mine["averages"])
        set_rng_state(mine["loop"])
        self.at_begin = mine["loop"]
        if cursor.ranks[0].get("batch") != self.global_batch:
            raise UserError(f"{stage.name} was saved with another batch size over all processes")
        if stage.is_registered(self._data):  # knows where it is, when its state is loaded
            stage.epoch.arrive()
            set_rng_state(mine["loop"])
            iterator = iter(self._data)
        else:
            iterator = self._skip()
            stage.epoch.arrive()
        set_rng_state(mine["now"])
        return iterator

    @property
    def global_batch(self) -> int:
        """Examples of a step over all ranks, if dealt out by our sampler; else 0."""
        if not isinstance(getattr(self._data, "sampler", None), EpochSampler):
            return 0
        return (getattr(self._data, "batch_size", None) or 1) * distrib.world_size()

    def _skip(self) -> Iterator[T]:
        """Iterate over the data without the finished steps."""
        sampler = getattr(self._data, "sampler", None)
        if isinstance(sampler, EpochSampler):
            sampler.skip(self.step * (getattr(self._data, "batch_size", None) or 1))
            return iter(self._data)
        iterator = iter(self._data)
        for _ in range(self.step):
            next(iterator, None)
        return iterator


def share(cursor: Cursor, *seeds: int) -> StateDict:
    """Return this rank's entry of a cursor.

    On another number of ranks, rank zero takes over the averages of all, and generators are seeded
    anew, by the seed of the run and `seeds`.
    """
    if len(cursor.ranks) == distrib.world_size():
        return cursor.ranks[distrib.rank()]
    seed_process(derive_seed(torch.initial_seed(), *seeds, cursor.step))
    averages = [theirs.get("averages", {}) for theirs in cursor.ranks]
    sums = added(averages) if distrib.is_rank_zero() else {}
    return dict.fromkeys(("start", "loop", "now"), get_rng_state()) | {"averages": sums}
