"""The training loop of a stage: position, progress and averages, and where a run may stop."""

from __future__ import annotations

import itertools
import logging
import math
import time
import warnings
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import IterableDataset

from . import distrib
from .checkpoint import Cursor
from .data import EpochSampler
from .log import LogProgressBar
from .metrics import Averages, added, number
from .results import to_numbers
from .rng import Position, derive_seed, get_rng_state, seed_process, set_rng_state
from .state import StateDict, StateManager
from .stop import Requests, Stopped
from .utils import UserError, length

T = TypeVar("T")
logger = logging.getLogger(__name__)


@dataclass
class Epoch:
    """The running epoch: its finished stages, and the way back to where a run resumes.

    Args:
        counts: steps of each stage since the run began.
        cursor: where the run resumes, until the run has come there again.
        mine: this rank's entry of the cursor; see `share`.
        load: loads the state at the cursor once more.
        done: names and metrics of the finished stages.
    """

    counts: dict[str, int] = field(default_factory=dict)
    cursor: Cursor | None = None
    mine: StateDict = field(default_factory=dict)
    load: Callable[[], None] = lambda: None
    done: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    def arrive(self) -> None:
        """Load the state at the cursor once more, as the run has come there again."""
        if self.cursor is not None:
            self.load()
            self.cursor, self.load = None, lambda: None  # lets go of the state

    def skip(self, name: str) -> dict[str, Any] | None:
        """Return the metrics of a stage finished before the checkpoint, in place of a run."""
        if self.cursor is None:
            return None
        known, number = self.cursor.done, len(self.done)
        then, metrics = known[number] if number < len(known) else (self.cursor.stage, None)
        if then != name:
            raise UserError(f"the run resumes at {then!r}, not {name!r}: run the same stages again")
        if metrics is None:
            return None
        self.done.append((name, metrics))
        return dict(metrics)


@dataclass(eq=False)
class Stage:
    """A running stage: its begin, its loop, and ways to save.

    Args:
        name: of the stage.
        number: of the epoch, from 1.
        epoch: of the stage.
        requests: to be answered between two steps.
        stateful: the registered state.
        save: saves the state, with the position in this stage.
    """

    name: str
    number: int
    epoch: Epoch
    requests: Requests
    stateful: StateManager
    save: Callable[[Stage], None]

    def __post_init__(self) -> None:
        self.has_loop = False
        self.step = 0  # finished steps of the loop
        self.logged = 0  # number of the last step whose metrics were logged
        self.layout: tuple[int, ...] = ()  # of the data: numbers that change their order
        self.averages = Averages()
        self.at_begin: StateDict = {}  # the generators when the loop began
        # By name: a rank may have run a stage of its own before. A second run has another order.
        again = sum(done == self.name for done, _ in self.epoch.done)
        self.here = Position(self.number, zlib.crc32(f"{self.name} {again}".encode()))
        self.counted = self.epoch.counts.get(self.name, 0)  # steps of this stage in earlier epochs
        self._began = time.monotonic()
        if (cursor := self.epoch.cursor) is not None:
            self._began -= cursor.seconds
            self.counted -= cursor.step
            self.step = cursor.step
            if not cursor.step:  # an evaluation, which begins again
                self.epoch.arrive()
            set_rng_state(self.epoch.mine["start"])
        self.at_start = get_rng_state()

    @property
    def seconds(self) -> float:
        """Time since the stage began."""
        return time.monotonic() - self._began

    @property
    def counts(self) -> dict[str, int]:
        """Steps of each stage since the run began."""
        done = max(self.step, self.logged)  # the latter of a loop that was left early
        return self.epoch.counts | {self.name: self.counted + done}

    def rank_state(self) -> StateDict:
        """Return the entry of this rank in `Cursor.ranks`."""
        mine = {"start": self.at_start, "loop": self.at_begin, "layout": self.layout}
        return mine | {"averages": self.averages.state_dict()}

    def cursor(self, ranks: list[StateDict], logged: dict[str, Any]) -> Cursor:
        """Return the position in the stage; see `Cursor` for `ranks` and `logged`."""
        place = self.name, self.step, self.seconds
        return Cursor([*self.epoch.done], *place, self.counts, ranks, logged)

    def finish(self, returned: Any) -> dict[str, Any]:
        """End the stage; return its metrics as numbers, with its duration."""
        if not isinstance(returned, Mapping | None):
            raise TypeError(f"stage {self.name!r} returned a {type(returned).__name__}: no metrics")
        if returned is None and self.averages:
            logger.warning("Stage %s logged metrics and returned none: no return?", self.name)
        if returned and "duration" in returned:
            raise ValueError(f"stage {self.name!r}: run_stage adds `duration`: rename yours")
        metrics = to_numbers(returned or {}) | {"duration": self.seconds}
        self.epoch.counts = self.counts
        self.epoch.done.append((self.name, dict(metrics)))  # the caller may change its own
        return metrics


@dataclass(eq=False, repr=False)
class Steps(Generic[T]):
    """A pass over data. The run may be saved or stopped between two of its steps.

    Args:
        data: a loader, or anything to iterate.
        stage: of this loop.
        make_bar: makes a progress bar from a name and an iterator, as `log_progress` does.
        log_step: records a point of the curves by step.
        every: number of steps between two points; 0 for none.
        beta: forgetting factor of the averages; 1 weighs all steps alike.
        finite: names of metrics that must not be NaN or infinite: `log` refuses such a step.
        skip: let `log` return False in such a step instead, on all ranks.
        total: number of steps, if the data has no length.
    """

    data: Iterable[T]
    stage: Stage
    make_bar: Callable[..., LogProgressBar[T]]
    log_step: Callable[[str, Mapping[str, Any], int, int], None]
    every: int = 10
    beta: float = 1.0
    finite: Collection[str] = ()
    skip: bool = False
    total: int | None = None

    def __post_init__(self) -> None:
        if self.skip and not self.finite:
            raise ValueError("skip=True: name the metrics in finite=")
        if self.stage.has_loop:
            raise UserError(f"stage {self.stage.name} has a second loop: make it another stage")
        self.stage.has_loop = True
        self.stage.averages = Averages(self.beta)
        self.total = length(self.data) if self.total is None else self.total
        self._waits = False  # a save was asked for, and was not possible yet
        self._bar: LogProgressBar[T] | None = None

    @property
    def step(self) -> int:
        """Number of finished steps, also of those before a resume."""
        return self.stage.step

    @property
    def count(self) -> int:
        """Number of finished steps of this stage since the run began, over all epochs."""
        return self.stage.counted + self.stage.step

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError("the data has no length: give self.steps total=")
        return self.total

    def __iter__(self) -> Iterator[T]:
        """Yield the items after the finished steps, and answer requests between two items."""
        stage, here, requests = self.stage, self.stage.here, self.stage.requests
        if self._bar is not None:
            raise UserError(f"stage {stage.name} iterates twice: make it two stages")
        self._bar = self.make_bar(stage.name, self._begin(), total=self.total)
        self._bar.update(stage.averages)
        self._bar.done = stage.step
        with requests.loop((here.epoch, here.stage), stage.step, torch.is_grad_enabled()):
            for item in self._bar:
                here.step = stage.step + 1
                yield item
                here.step = 0  # so that the order of the data depends on no step
                stage.step = requests.step = stage.step + 1
                if stage.step >= requests.due and stage.step != self.total:
                    self._answer(stage, requests)

    def log(self, metrics: Mapping[str, Any], weight: Any = 1.0) -> bool:
        """Average and show the metrics of this step, and record a point of the curves.

        With `finite`, call this before `optimizer.step()`, so that no bad step reaches the weights.
        With `skip`, all ranks must take part.

        Args:
            metrics: numbers, or tensors of one element; no device is waited for, but with `skip`.
            weight: of the step in the averages, such as the number of examples.

        Returns:
            False if the step is to be skipped: such a step is only counted, as `skipped`.

        Raises:
            UserError: if a metric in `finite` is NaN or infinite; names step, rank and metric. A
                device asserts that instead: it names them on stderr, and a later call raises.
        """
        stage = self.stage
        stage.logged = stage.step + 1
        good = not self.finite or self._accepts(metrics)
        if good:
            stage.averages(metrics, weight)
        if self.skip:
            stage.averages.count("skipped", not good)
        counted = stage.counted + stage.logged
        if good and self.every and counted % self.every == 0:
            self.log_step(stage.name, metrics, counted, stage.number)
        return good

    def _accepts(self, metrics: Mapping[str, Any]) -> bool:
        """Return whether the metrics in `finite` are finite on all ranks; without `skip`, raise."""
        wanted = {name: number(name, metrics[name]) for name in self.finite if name in metrics}
        if self.skip:
            bad = not all(map(math.isfinite, wanted.values()))
            return not any(distrib.gather_objects(bad, "steps.log with skip"))
        for name, value in wanted.items():
            on_device = isinstance(value, torch.Tensor)
            if on_device and (value.is_mps or torch.version.hip):  # know no assertion
                on_device, value = False, float(value)
            if on_device or not math.isfinite(value):
                step, rank = self.stage.logged, distrib.rank()
                why = f"{name} is NaN or infinite in step {step} of {self.stage.name}, rank {rank}"
                if not on_device:
                    raise UserError(f"{why}: lower the learning rate, or limit the gradient's norm")
                torch._assert_async(torch.isfinite(value).all(), why[:200])  # waits for nothing
        return True

    def metrics(self) -> dict[str, float]:
        """Return the averages over all steps of all ranks. All ranks must take part.

        Raises:
            ValueError: if no metric has a name in `finite`.
        """
        found = distrib.average_metrics(self.stage.averages)
        for name in self.finite if found else ():
            if name not in found and not found.get("skipped"):
                raise ValueError(f"finite={name}: no metric has this name; there are {[*found]}")
        return found

    def _answer(self, stage: Stage, requests: Requests) -> None:
        """Save, and end the run if asked to. Without gradients the stage begins again instead."""
        training = torch.is_grad_enabled()
        ready = not training or stage.stateful.is_complete()
        request = requests.answer(ready)
        if not (ready or self._waits):
            self._waits = True
            logger.warning("A save waits: gradients are pending, or weights are lent")
        if request and training:
            stage.save(stage)
        if request not in ("", "save"):
            if not training:
                stage.step = stage.logged = 0
            raise Stopped(request)

    def _begin(self) -> Iterator[T]:
        """Return the data's iterator; resume generators, state and averages as they were."""
        stage = self.stage
        stage.at_begin, stage.layout = get_rng_state(), layout(self.data)
        dealt_out = isinstance(sampler := getattr(self.data, "sampler", None), EpochSampler)
        if stage.requests.listens:
            self._check_data(dealt_out)
        if (cursor := stage.epoch.cursor) is None:
            return iter(self.data)
        mine = stage.epoch.mine
        known = stage.stateful.holds(self.data)  # its position, when its state is loaded
        if (self.beta != 1 or known) and len(cursor.ranks) != distrib.world_size():
            why = "averages with beta=, or a loader with a state, need the same number of processes"
            raise UserError(f"{stage.name}: {why}")
        if cursor.ranks[0]["layout"] != stage.layout:
            raise UserError(
                f"{stage.name} was saved with another dataset or batch size over all processes, "
                "or, of a stream, with another number of workers or processes: restore that"
            )
        stage.averages.load_state_dict(mine["averages"])
        stage.at_begin = mine["loop"]
        if known:
            stage.epoch.arrive()
        elif isinstance(sampler, EpochSampler):
            sampler.skip(stage.step * stage.layout[0])
        set_rng_state(mine["loop"])
        iterator = iter(self.data)
        if again := 0 if known or dealt_out else stage.step:
            logger.info("Reading %d batches of %s again", again, stage.name)
        for _ in range(again):
            next(iterator, None)
        stage.epoch.arrive()
        set_rng_state(mine["now"])
        return iterator

    def _check_data(self, dealt_out: bool) -> None:
        """Refuse or name data that would be other data after a resume."""
        known = self.stage.stateful.holds(self.data)
        if hasattr(self.data, "load_state_dict") and known == dealt_out:
            cure = "loader() resumes by itself: do not register it" if known else "register it"
            raise UserError(f"{self.stage.name}: the data loader has a state of its own; {cure}")
        stream = isinstance(getattr(self.data, "dataset", None), IterableDataset)
        if isinstance(self.data, itertools.islice) and torch.is_grad_enabled():
            warnings.warn("islice begins anew: use loader(..., updates_per_epoch=)", stacklevel=4)
        if not (known or dealt_out or stream) and getattr(self.data, "generator", None) is not None:
            warnings.warn("a DataLoader with a generator resumes with other data", stacklevel=4)


def layout(data: Any) -> tuple[int, ...]:
    """Return the numbers besides the seed on which the order of data depends.

    Of `loader` the global batch and the size of the dataset; of a stream the batch and the numbers
    of workers and ranks.
    """
    batch, ranks = getattr(data, "batch_size", None) or 1, distrib.world_size()
    if isinstance(sampler := getattr(data, "sampler", None), EpochSampler):
        return batch * ranks, len(sampler.dataset)
    if isinstance(getattr(data, "dataset", None), IterableDataset):
        return batch, getattr(data, "num_workers", 0), ranks
    return ()


def share(cursor: Cursor, *seeds: int) -> StateDict:
    """Return this rank's entry of a cursor; on another number of ranks, seed this process anew.

    On another number of ranks, rank zero takes over the averages of all, and generators are seeded
    anew, by the seed of the run and `seeds`.
    """
    if len(cursor.ranks) == distrib.world_size():
        return cursor.ranks[distrib.rank()]
    seed_process(derive_seed(torch.initial_seed(), *seeds, cursor.step))
    ranks = cursor.ranks if distrib.is_rank_zero() else ()
    sums = added(theirs.get("averages", {}) for theirs in ranks)
    return dict.fromkeys(("start", "loop", "now"), get_rng_state()) | {"averages": sums}
