"""Worker processes of a loader: seeds, and requests to stop the run."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from multiprocessing.context import SpawnProcess
from typing import Any, cast

from torch.utils.data import IterableDataset, get_worker_info
from torch.utils.data._utils import worker as torch_worker

from . import distrib
from .rng import derive_seed, position, seed_process
from .stop import SIGNALS


def options(seed: int, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return a DataLoader's keyword arguments, with seeded workers, unmoved by a request to stop.

    Args:
        seed: of the random numbers drawn in workers.
        kwargs: of the user; a `worker_init_fn` is called in each worker after the seeding.
    """
    start = _WorkerStart(seed, kwargs.get("worker_init_fn"))
    kwargs = kwargs | {"worker_init_fn": start}
    if kwargs.get("num_workers"):
        if "sampler" in kwargs:
            kwargs["sampler"].index = Index
        kwargs["multiprocessing_context"] = _context(kwargs.get("multiprocessing_context"))
    return kwargs


class _WorkerStart:
    """The first call in a worker: seed Python, NumPy and torch by (seed, epoch, rank, worker).

    They are seeded again before each batch, by its examples: so the numbers drawn for a batch do
    not depend on earlier batches, never loaded by a run resumed within an epoch.
    """

    def __init__(
        self, seed: int, then: Callable[[int], None] | None, epoch: int | None = None
    ) -> None:
        self.seed = seed
        self.then = then
        self.epoch = epoch
        self.rank = distrib.rank()

    def __call__(self, worker: int) -> None:
        _end_without_parent()
        _leave_signals_to_the_run()
        epoch = position.get().epoch if self.epoch is None else self.epoch
        seed = derive_seed(self.seed, epoch, self.rank, worker)
        seed_process(seed)
        if (info := get_worker_info()) is not None:
            object.__setattr__(info, "seed", seed)
            dataset: Any = info.dataset
            if isinstance(dataset, IterableDataset):
                # Returned by `get_worker_info` from now on, in this process.
                ours: Any = WorkerOfAll(info, dataset)
                torch_worker._worker_info = ours
                worker = ours.id
            else:
                with suppress(AttributeError):  # of a class with slots
                    # A loader asks this method for a whole batch, if there is one.
                    object.__setattr__(dataset, "__getitems__", _SeededBatches(dataset, self.seed))
        if self.then is not None:
            self.then(worker)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is spawned, not forked, knows nothing of our epoch: send it along.
        return type(self), (self.seed, self.then, position.get().epoch)


class WorkerOfAll:
    """The worker of an iterable dataset, numbered among the workers of all ranks.

    Args:
        info: PyTorch's own.
        shard: of the loader, with the dataset.
    """

    def __init__(self, info: Any, shard: Any) -> None:
        self.id = shard.rank * info.num_workers + info.id
        self.count: int = shard.world_size * info.num_workers
        self.seed, self.dataset = info.seed, shard.dataset
        self.was_asked = False  # for the number of workers: the dataset deals out its examples

    @property
    def num_workers(self) -> int:
        """The number of workers, for the dataset."""
        self.was_asked = True
        return self.count


class Index(int):
    """The index of an example, with the place of this reading in the run."""

    place: tuple[int, ...]

    def __new__(cls, index: int, place: tuple[int, ...]) -> Index:
        new = super().__new__(cls, index)
        new.place = place
        return new

    def __reduce__(self) -> tuple[Any, ...]:
        return Index, (int(self), self.place)


class _SeededBatches:
    """A fetcher of batches, with generators seeded by the place of the first example."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.fetch = getattr(dataset, "__getitems__", None)
        self.dataset = dataset
        self.seed = seed

    def __call__(self, indices: list[Any]) -> list[Any]:
        seed_process(derive_seed(self.seed, *indices[0].place))
        indices = [int(index) for index in indices]
        if self.fetch is not None:
            return cast(list[Any], self.fetch(indices))
        return [self.dataset[index] for index in indices]


class _Blocking:
    """A process that starts with requests to stop blocked, as all its threads inherit."""

    def start(self) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            super().start()  # type: ignore[misc]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


_ForkProcess: Any = getattr(multiprocessing.context, "ForkProcess", object)  # absent on Windows


class ForkedWorker(_Blocking, _ForkProcess):  # type: ignore[misc]
    """A worker that is forked."""


class SpawnedWorker(_Blocking, SpawnProcess):
    """A worker in a new Python."""


def _context(given: Any) -> Any:
    """Return a context whose workers start with requests to stop blocked, where that is possible.

    A fork server may serve other code too, so its workers are left alone.
    """
    method = given
    if given is None:
        default = multiprocessing.get_all_start_methods()[0]
        method = multiprocessing.get_start_method(allow_none=True) or default
        # Since Python 3.14, Linux's default is a fork server, whose workers start slowly.
        if sys.platform == "linux" and method == default:
            method = "fork"
    known = multiprocessing.get_context(method) if isinstance(method, str) else method
    process = getattr(known, "Process", None)
    kind = {_ForkProcess: ForkedWorker, SpawnProcess: SpawnedWorker}.get(process)
    if kind is None or not hasattr(signal, "sigwaitinfo"):
        return given
    context: Any = copy(known)
    context.Process = kind
    return context


def _end_without_parent() -> None:
    """End a worker whose parent was killed before PyTorch's first look at the parent."""
    parent, worker = multiprocessing.parent_process(), multiprocessing.current_process()
    if parent is None:
        return
    # A server's worker is no child of the run. Else the id is surer: while other workers live, a
    # dead parent may seem alive.
    method = getattr(worker, "_start_method", None) or multiprocessing.get_start_method()
    gone = not parent.is_alive() if method == "forkserver" else parent.pid != os.getppid()
    if gone:
        os._exit(1)


def _leave_signals_to_the_run() -> None:
    """Make a worker outlive a request to stop: until the run has stopped, it needs its data.

    Slurm, a sweep and others ask all processes of a run; only its own parent ends a worker. Where
    signals are not blocked, SIGTERM is left to PyTorch, and ends the worker.
    """
    if not hasattr(signal, "sigwaitinfo") or not {*SIGNALS} <= signal.pthread_sigmask(
        signal.SIG_BLOCK, ()
    ):
        for number in {*SIGNALS} - {signal.SIGTERM}:
            signal.signal(number, signal.SIG_IGN)
        return

    def watch() -> None:
        while True:
            info = signal.sigtimedwait(SIGNALS, 5)
            _end_without_parent()
            if info is not None and info.si_signo == signal.SIGTERM and info.si_pid == os.getppid():
                os._exit(0)

    threading.Thread(target=watch, daemon=True, name="signals").start()
