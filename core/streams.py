"""Streams: iterable datasets, dealt out over ranks and workers, and epochs of any length."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sized
from typing import Any, cast

from torch.utils.data import IterableDataset, get_worker_info

from . import distrib
from .rng import Position, position
from .utils import UserError


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
    """Epochs of so many batches of a stream, each from where the one before ended.

    A stream that ends begins again. Where an epoch is not the next one, as after a resume, the
    batches of all earlier epochs are read again, and dropped.

    Args:
        loader: of the stream; other attributes are its own.
        updates: batches in an epoch.
    """

    def __init__(self, loader: Any, updates: int) -> None:
        if updates < 1 or hasattr(loader, "load_state_dict"):
            raise UserError(
                "loader: updates_per_epoch= of a stream needs 1 at least, and DataLoader"
            )
        self.loader, self.updates = loader, updates
        self._place = 0  # number of the next batch
        self._batches: Iterator[Any] = self._endless()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def __len__(self) -> int:
        return self.updates

    def __iter__(self) -> Iterator[Any]:
        first = max(0, position.get().epoch - 1) * self.updates
        if self._place != first:
            self._place, self._batches = first, itertools.islice(self._endless(), first, None)
        for batch in itertools.islice(self._batches, self.updates):
            self._place += 1
            yield batch

    def _endless(self) -> Iterator[Any]:
        for number in itertools.count():
            # Seeds of workers depend on the pass, not on the epoch in which it happens to begin.
            token = position.set(Position(number))
            batches = iter(self.loader)
            position.reset(token)
            first = [*itertools.islice(batches, 1)]
            if not first:
                raise UserError("loader: the stream has no batch for this process")
            yield from itertools.chain(first, batches)
