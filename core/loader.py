"""Data loading: order, sharding over ranks, and seeds of workers.

The order of the data depends on a seed, the epoch and the place in it alone, never on the global
generators or on what was read before, so a resumed run sees what an undisturbed one would have
seen. The solver announces epoch and place through `set_epoch`; nobody has to tell the loaders.
"""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from contextlib import suppress
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    get_worker_info,
)

from . import distrib
from .rng import derive_seed
from .utils import UserError
from .xp import SIGNALS

logger = logging.getLogger(__name__)

Place = tuple[int, ...]

_epoch = 0
_place: Callable[[], Place] = tuple


def set_epoch(epoch: int, place: Callable[[], Place] = tuple) -> None:
    """Announce the epoch to all loaders; takes effect when one is iterated from the start.

    Args:
        epoch: that begins, or goes on.
        place: tells where in the epoch the run is. A loader that is iterated at another place than
            the first gives another order, whatever was iterated before: a run that resumes there
            may have skipped that.
    """
    global _epoch, _place
    _epoch, _place = epoch, place


def split_batch(batch_size: int) -> int:
    """Return this rank's share of a global batch size; UserError if ranks can't share it."""
    share, rest = divmod(batch_size, distrib.world_size())
    if rest or share < 1:
        raise UserError(
            f"batch size {batch_size}: it must be a positive multiple of the number of processes, "
            f"which is {distrib.world_size()}"
        )
    return share


def loader(
    dataset: Dataset[Any],
    *args: Any,
    shuffle: bool = False,
    klass: Callable[..., Any] = DataLoader,
    seed: int = 0,
    updates_per_epoch: int | None = None,
    sampler: Callable[..., EpochSampler] | None = None,
    limit: int = 0,
    worker_init_fn: Callable[[int], None] | None = None,
    **kwargs: Any,
) -> Any:
    """Return a DataLoader over this rank's part of a dataset.

    When shuffling, all ranks get equally many examples (a few come twice, as in DistributedSampler)
    in an order that changes each epoch. Without shuffling, each example comes exactly once over all
    ranks, so the last rank may have one less: no collective belongs in such a loop. The examples of
    an iterable dataset are dealt out over ranks and workers.

    Args:
        dataset: map-style or iterable.
        args: positional arguments of `klass` after the dataset; the batch size is per rank.
        shuffle: for training.
        klass: `torch.utils.data.DataLoader` or one that takes the same arguments.
        seed: of the order, and of the random numbers drawn in workers.
        updates_per_epoch: number of batches in an epoch, rather than once all data. The next epoch
            starts after the last example of this one, in an endless sequence of shuffled datasets.
        sampler: a subclass of `EpochSampler` with another `order`.
        limit: use only the first n batches of the dataset, to find mistakes with; 0 for all.
        worker_init_fn: called in each worker after it is seeded.
        kwargs: keyword arguments of `klass`.
    """
    batch_size = kwargs.get("batch_size", args[0] if args else 1)
    given = kwargs | {"batch_size": batch_size}
    _check(dataset, shuffle, sampler, updates_per_epoch, limit, given)
    if isinstance(dataset, IterableDataset):
        dataset = _IterableShard(dataset)
    else:
        batch = (batch_size or 1) * distrib.world_size()
        if limit:
            size = len(cast(Sized, dataset))
            dataset = Subset(dataset, range(min(limit * batch, size)))
        examples = None if updates_per_epoch is None else updates_per_epoch * batch
        kind = sampler or EpochSampler
        kwargs["sampler"] = kind(cast(Sized, dataset), shuffle, seed, examples)
    if kwargs.get("num_workers") and _forks(kwargs.get("multiprocessing_context")):
        kwargs["multiprocessing_context"] = _fork_context()
    # A generator of its own keeps the loader from drawing on the global one.
    kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
    return klass(dataset, *args, worker_init_fn=_WorkerStart(seed, worker_init_fn), **kwargs)


def _check(
    dataset: Dataset[Any],
    shuffle: bool,
    sampler: object,
    updates: int | None,
    limit: int,
    arguments: Mapping[str, Any],
) -> None:
    if arguments.get("batch_sampler") is not None or not (sampler is None or callable(sampler)):
        raise ValueError(
            "loader: sampler= is a subclass of EpochSampler. What is an object already, or a "
            "batch_sampler, is not shared among ranks: give it to DataLoader itself"
        )
    if limit < 0:
        raise UserError(f"loader: limit={limit}; give a number of batches, or 0 for all")
    given = shuffle or sampler or limit or updates is not None
    if isinstance(dataset, IterableDataset) and given:
        raise ValueError(
            "loader: an iterable dataset has an order and an end of its own; shuffle=, sampler=, "
            "limit= and updates_per_epoch= are for those with a length"
        )
    one_by_one = arguments["batch_size"] is None and arguments.get("num_workers")
    for option, is_on in {
        "persistent_workers": arguments.get("persistent_workers"),
        "batch_size=None": one_by_one and not isinstance(dataset, IterableDataset),
    }.items():
        if is_on:
            logger.warning("%s: random numbers of workers will differ after a resume", option)


class EpochSampler(Sampler[int]):
    """This rank's indices, in an order that is a function of the seed and the epoch.

    Iterated again within an epoch, or at another place in it, it gives another order.

    Args:
        dataset: anything with a length.
        shuffle: else the order is that of the dataset.
        seed: of the orders.
        examples: in an epoch, of all ranks, from where the last epoch ended; all data by default.
    """

    def __init__(
        self, dataset: Sized, shuffle: bool, seed: int, examples: int | None = None
    ) -> None:
        if examples is not None and (examples < 1 or not len(dataset)):
            raise ValueError("loader: updates_per_epoch= needs at least one update and one example")
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.examples = examples
        self._last: tuple[Place, int] = ((), -1)  # epoch and place, number of the pass there
        self._skip = 0

    def skip(self, examples: int) -> None:
        """Leave out the first so many examples of this rank in the next pass."""
        self._skip = examples

    def __len__(self) -> int:
        ranks, size = distrib.world_size(), self.examples or len(self.dataset)
        return -(-size // ranks) if self.shuffle else len(range(distrib.rank(), size, ranks))

    def __iter__(self) -> Iterator[int]:
        place = _place()
        before, number = self._last
        number = number + 1 if before == (_epoch, *place) else 0
        self._last = (_epoch, *place), number
        salt = (number, *(place if any(place) else ()))
        order = self._window(_epoch, salt) if self.examples else self._full_pass(_epoch, salt)
        skipped, self._skip = self._skip, 0
        ranks = distrib.world_size()
        yield from itertools.islice(order, distrib.rank() + skipped * ranks, None, ranks)

    def _full_pass(self, epoch: int, salt: tuple[int, ...]) -> Iterable[int]:
        """All examples; when shuffling, some again so that the ranks' shares are equal."""
        order = self._order(epoch, salt)
        padded = len(self) * distrib.world_size() if self.shuffle else len(order)
        return itertools.islice(itertools.cycle(order), padded)

    def _window(self, epoch: int, salt: tuple[int, ...]) -> Iterable[int]:
        """The epoch's window on an endless sequence of shuffled datasets."""
        size, examples = len(self.dataset), self.examples or 0
        number, skipped = divmod(epoch * examples, size)
        orders = (self._order(n, salt) for n in itertools.count(number))
        return itertools.islice(itertools.chain.from_iterable(orders), skipped, skipped + examples)

    def order(self, generator: torch.Generator) -> list[int]:
        """Indices for a pass over the data, of all ranks together, as many as there are examples.

        Override it for another order, and draw on `generator` alone: it is seeded for each pass.
        """
        size = len(self.dataset)
        if not self.shuffle:
            return list(range(size))
        order: list[int] = torch.randperm(size, generator=generator).tolist()
        return order

    def _order(self, number: int, salt: tuple[int, ...]) -> list[int]:
        seed = derive_seed(self.seed, number, *salt)
        order = self.order(torch.Generator().manual_seed(seed))
        if len(order) != (size := len(self.dataset)):
            name = type(self).__name__
            raise ValueError(
                f"{name}.order gave {len(order)} indices for {size} examples: one each"
            )
        return order


class _IterableShard(IterableDataset[Any]):
    """Every n-th example of an iterable dataset, n being the workers of all ranks."""

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self.dataset = dataset
        # Known here, but not in a worker process.
        self.rank, self.world_size = distrib.rank(), distrib.world_size()

    def __iter__(self) -> Iterator[Any]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        start, step = self.rank * workers + worker, self.world_size * workers
        return itertools.islice(iter(self.dataset), start, None, step)


class _WorkerStart:
    """What a worker does first: it seeds Python, NumPy and torch by (seed, epoch, rank, worker).

    And before each batch again, by its examples: so what is drawn for a batch does not depend
    on those before, which a run that resumes within an epoch never loads.
    """

    def __init__(
        self, seed: int, then: Callable[[int], None] | None, epoch: int | None = None
    ) -> None:
        self.seed = seed
        self.then = then
        self.epoch = epoch
        self.rank = distrib.rank()

    def __call__(self, worker: int) -> None:
        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid != os.getppid():
            # It was killed meanwhile, and PyTorch would look out for its death too late.
            os._exit(1)
        _leave_signals_to_the_run()
        epoch = _epoch if self.epoch is None else self.epoch
        _seed(self.seed, epoch, self.rank, worker)
        info = get_worker_info()
        if info is not None and not isinstance(info.dataset, IterableDataset):
            # What a loader asks for a whole batch, if there is such a method.
            dataset: Any = info.dataset
            with suppress(AttributeError):
                dataset.__getitems__ = _SeededBatches(dataset, (self.seed, epoch, self.rank))
        if self.then is not None:
            self.then(worker)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is spawned, not forked, knows nothing of our epoch: send it along.
        return type(self), (self.seed, self.then, _epoch)


def _forks(context: Any) -> bool:
    """Would workers be forked, rather than spawned, and can such a one wait for a signal?"""
    method = context or multiprocessing.get_start_method(allow_none=True)
    default = multiprocessing.get_all_start_methods()[0]
    return (method or default) == "fork" and hasattr(signal, "sigwaitinfo")


def _fork_context() -> multiprocessing.context.BaseContext:
    """Forks workers with the signals blocked that ask a run to stop; see `_WorkerStart`."""

    class Worker(multiprocessing.context.ForkProcess):
        def start(self) -> None:
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                super().start()
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    class Context(multiprocessing.context.ForkContext):
        Process = Worker

    return Context()


def _leave_signals_to_the_run() -> None:
    """Let a worker outlive a request to stop: until the run has stopped, it needs its data.

    Slurm, a sweep and others ask all processes of a run; only its own parent ends a worker. One
    that was spawned, not forked, may have threads that take signals: it leaves SIGTERM to PyTorch,
    and ends.
    """
    if not hasattr(signal, "sigwaitinfo") or not {*SIGNALS} <= signal.pthread_sigmask(
        signal.SIG_BLOCK, ()
    ):
        for number in {*SIGNALS} - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)
        return

    def watch() -> None:
        while True:
            info = signal.sigwaitinfo(SIGNALS)
            if info.si_signo == signal.SIGTERM and info.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=watch, daemon=True, name="signals").start()


class _SeededBatches:
    """Fetches the examples of a batch after seeding the generators."""

    def __init__(self, dataset: Any, seeds: tuple[int, ...]) -> None:
        self.fetch = getattr(dataset, "__getitems__", None)
        self.dataset = dataset
        self.seeds = seeds

    def __call__(self, indices: list[int]) -> list[Any]:
        _seed(*self.seeds, 0, *indices)
        if self.fetch is not None:
            return cast(list[Any], self.fetch(indices))
        return [self.dataset[index] for index in indices]


def _seed(*numbers: int) -> None:
    seed = derive_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
