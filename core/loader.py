"""Data loading: order, sharding over ranks, and seeds of workers.

The order of the data depends on a seed and on the epoch alone, never on the global generators, so
a resumed run sees what an undisturbed one would have seen. The solver announces each epoch through
`set_epoch`; nobody has to tell the loaders.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, get_worker_info

from . import distrib

logger = logging.getLogger(__name__)

_epoch = 0


def set_epoch(epoch: int) -> None:
    """Announce the epoch to all loaders; takes effect when one is iterated from the start."""
    global _epoch
    _epoch = epoch


def split_batch(batch_size: int) -> int:
    """Return this rank's share of a global batch size; ValueError if ranks can't share it."""
    share, rest = divmod(batch_size, distrib.world_size())
    if rest or not share:
        raise ValueError(
            f"a batch of {batch_size} can't be shared by {distrib.world_size()} processes: "
            "choose a multiple of their number"
        )
    return share


def loader(
    dataset: Dataset[Any],
    *args: Any,
    shuffle: bool = False,
    klass: Callable[..., Any] = DataLoader,
    seed: int = 0,
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
        worker_init_fn: called in each worker after it is seeded.
        kwargs: keyword arguments of `klass`.
    """
    for taken in ("sampler", "batch_sampler"):
        if kwargs.get(taken) is not None:
            raise ValueError(f"loader: {taken}= and sharding exclude each other; use {klass}")
    if kwargs.get("persistent_workers"):
        logger.warning("persistent_workers: random numbers of workers will differ after a resume")
    if isinstance(dataset, IterableDataset):
        if shuffle:
            raise ValueError("loader: an iterable dataset has its own order; shuffle inside of it")
        dataset = _IterableShard(dataset)
    else:
        kwargs["sampler"] = EpochSampler(cast(Sized, dataset), shuffle, seed)
    # A generator of its own keeps the loader from drawing on the global one.
    kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
    return klass(dataset, *args, worker_init_fn=_SeedWorker(seed, worker_init_fn), **kwargs)


class EpochSampler(Sampler[int]):
    """This rank's indices, in an order that is a function of the seed and the epoch.

    Iterated again within an epoch, it goes on to another order.
    """

    def __init__(self, dataset: Sized, shuffle: bool, seed: int) -> None:
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self._last = (-1, 0)  # epoch, passes in it

    def __len__(self) -> int:
        ranks, size = distrib.world_size(), len(self.dataset)
        return -(-size // ranks) if self.shuffle else len(range(distrib.rank(), size, ranks))

    def __iter__(self) -> Iterator[int]:
        epoch, passes = self._last
        self._last = (_epoch, passes + 1 if epoch == _epoch else 0)
        order = self._order(*self._last)
        return iter(order[distrib.rank() :: distrib.world_size()])

    def _order(self, epoch: int, passes: int) -> list[int]:
        size = len(self.dataset)
        if not self.shuffle or not size:
            return list(range(size))
        generator = torch.Generator().manual_seed(_mix(self.seed, epoch, passes))
        order: list[int] = torch.randperm(size, generator=generator).tolist()
        padded = len(self) * distrib.world_size()
        return list(itertools.islice(itertools.cycle(order), padded))


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


class _SeedWorker:
    """Seed Python, NumPy and torch in a worker by (seed, epoch, rank, worker)."""

    def __init__(
        self, seed: int, then: Callable[[int], None] | None, epoch: int | None = None
    ) -> None:
        self.seed = seed
        self.then = then
        self.epoch = epoch
        self.rank = distrib.rank()

    def __call__(self, worker: int) -> None:
        epoch = _epoch if self.epoch is None else self.epoch
        seed = _mix(self.seed, epoch, self.rank, worker)
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        if self.then is not None:
            self.then(worker)

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker that is spawned, not forked, knows nothing of our epoch: send it along.
        return type(self), (self.seed, self.then, _epoch)


def _mix(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several numbers."""
    state = np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))
