"""Streams: iterable datasets, dealt out over ranks and workers; epochs of any length (optional)."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sized
from typing import Any, cast

from torch.utils.data import IterableDataset, get_worker_info

from . import distrib
from .rng import Position, get_rng_state, position, set_rng_state
from .utils import UserError

logger = logging.getLogger(__name__)


def stream_loader(
    dataset: IterableDataset[Any], make: Callable[[Any], Any], updates: int | None, *, ordered: bool
) -> Any:
    """Return a loader of this rank's part of a stream.

    Args:
        dataset: the same stream on all ranks.
        make: builds a DataLoader from a dataset.
        updates: batches in an epoch; None for the whole stream.
        ordered: whether an order or a limit was asked for, which is refused.
    """
    if ordered:
        raise ValueError("loader: an iterable dataset has an order and an end of its own")
    if updates is not None and updates < 1:
        raise UserError(f"loader: updates_per_epoch={updates}: give at least 1")
    batches = make(StreamShard(dataset))
    return batches if updates is None else StreamEpochs(batches, updates)


class StreamShard(IterableDataset[Any]):
    """Every n-th example of an iterable dataset, n being the number of workers of all ranks.

    A dataset that asks `get_worker_info` for the number of workers deals out its examples itself,
    and is told of the workers of all ranks.
    """

    def __init__(self, dataset: IterableDataset[Any]) -> None:
        self.dataset = dataset
        # Known here, but not in a worker process.
        self.rank, self.world_size = distrib.rank(), distrib.world_size()

    def __len__(self) -> int:
        return len(range(self.rank, len(cast(Sized, self.dataset)), self.world_size))

    def __iter__(self) -> Iterator[Any]:
        number, count = self.rank, self.world_size
        info: Any = get_worker_info()
        if hasattr(info, "count"):  # of the workers of all ranks, as `workers.py` tells
            number, count = info.id, info.count
        elif info is not None:
            number, count = number * info.num_workers + info.id, count * info.num_workers
        examples = iter(self.dataset)
        first = [*itertools.islice(examples, 1)]  # a generator asks for its worker only now
        if getattr(info, "was_asked", False):
            number, count = 0, 1
        yield from itertools.islice(itertools.chain(first, examples), number, None, count)


class StreamEpochs:
    """Split a stream into epochs of n batches, each starting where the previous one ended.

    An exhausted stream begins again. After a resume, the batches of earlier epochs are read again,
    and dropped.

    Args:
        loader: reads the stream; unknown attributes are looked up there.
        updates: batches in an epoch.
    """

    def __init__(self, loader: Any, updates: int) -> None:
        if hasattr(loader, "load_state_dict") or getattr(loader, "persistent_workers", False):
            raise UserError(
                "loader: updates_per_epoch= of a stream needs a DataLoader without a state, and "
                "without persistent_workers, as its workers live on anyway"
            )
        self.loader, self.updates = loader, updates
        self._place = 0  # number of the next batch; -1 after a failed read
        self._batches: Iterator[Any] = self._endless()

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # in a copy that is being made
            raise AttributeError(name)
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return self.updates

    def __iter__(self) -> Iterator[Any]:
        epoch = position.get().epoch  # 0 where nobody tells
        first = (epoch - 1) * self.updates if epoch else max(0, self._place)
        generators = get_rng_state()  # as if nothing was read again
        if not 0 <= self._place <= first:
            self._place, self._batches = 0, self._endless()
        if first - self._place > 0:
            logger.info(
                "Reading the stream again, %d batches of earlier epochs", first - self._place
            )
        for _ in range(first - self._place):
            next(self._batches)
        self._place = first
        set_rng_state(generators)
        return self._epoch(first)

    def _epoch(self, first: int) -> Iterator[Any]:
        for place in range(first, first + self.updates):
            self._place = -1  # a read may fail, and end the iterator
            batch = next(self._batches)
            self._place = place + 1
            yield batch

    def _endless(self) -> Iterator[Any]:
        for number in itertools.count():
            # Seeds of workers depend on the pass, not on the epoch in which it happens to begin.
            token = position.set(Position(number))
            batches = iter(self.loader)
            position.reset(token)
            first = [*itertools.islice(batches, 1)]
            if not first:
                raise UserError(f"loader: the stream is empty on rank {distrib.rank()}")
            yield from itertools.chain(first, batches)
