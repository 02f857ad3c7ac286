"""Data loading: order, shares of ranks, seeds of workers.

The order of the data is a function of a seed, the epoch and the stage, never of the global
generators or of earlier reads: so a resumed run sees the data of an uninterrupted run.
The solver announces epoch and stage; nobody has to tell the loaders.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, IterableDataset, Sampler, Subset, TensorDataset

from . import distrib, workers
from .rng import Position, accelerator, derive_seed, position
from .streams import stream_loader
from .utils import UserError

logger = logging.getLogger(__name__)

CHUNK = 2**16  # indices that are made Python numbers at a time


def set_epoch(epoch: int) -> None:
    """Tell loaders the epoch, from 1, where no solver does; it holds from their next iteration."""
    position.set(Position(epoch))


def split_batch(batch_size: int) -> int:
    """Return this rank's share of a global batch size; UserError if ranks can't share."""
    share, rest = divmod(batch_size, distrib.world_size())
    if rest or share < 1:
        raise UserError(
            f"batch size {batch_size}: give a multiple of the {distrib.world_size()} processes"
        )
    return share


def loader(
    dataset: Any,
    *args: Any,
    shuffle: bool = False,
    klass: Callable[..., Any] = DataLoader,
    seed: int = 0,
    updates_per_epoch: int | None = None,
    sampler: Callable[..., EpochSampler] | None = None,
    limit: int = 0,
    **kwargs: Any,
) -> Any:
    """Return a DataLoader over this rank's part of a dataset.

    Shuffled, ranks get equally many examples, a few twice; else each comes once, and no collective
    belongs in the loop. Iterable datasets are dealt out over workers too.

    Args:
        dataset: map-style, such as a `Dataset` or a list, or iterable.
        args, kwargs: of `klass` after the dataset; batch size per rank, memory pinned on a GPU.
        klass: `torch.utils.data.DataLoader`, or a class with the same arguments.
        seed: of the order, and of the random numbers drawn in workers.
        updates_per_epoch: batches in an epoch, which continues where the last one ended.
        sampler: a subclass of `EpochSampler` with another `order`.
        limit: use only the first n batches of the dataset; 0 for all.
    """
    size = kwargs.get("batch_size", args[0] if args else 1)
    _check(sampler, limit, kwargs)
    make = partial(_make, klass, seed, args, kwargs)
    if isinstance(dataset, IterableDataset):
        ordered = bool(shuffle or sampler or limit)
        return stream_loader(dataset, make, updates_per_epoch, ordered=ordered)
    if size is None and kwargs.get("num_workers"):
        logger.warning("batch_size=None: random numbers of workers differ after a resume")
    batch = (size or 1) * distrib.world_size()
    if limit or not hasattr(dataset, "__dict__"):  # such as a list: workers set an attribute
        dataset = Subset(dataset, range(len(dataset))[: limit * batch or None])
    examples = updates_per_epoch and updates_per_epoch * batch
    multiple, kind = batch if kwargs.get("drop_last") else 1, sampler or EpochSampler
    kwargs["sampler"] = kind(cast(Sized, dataset), shuffle, seed, examples, multiple)
    return make(dataset)


def _make(klass: Any, seed: int, args: Any, kwargs: dict[str, Any], dataset: Any) -> Any:
    """Return a DataLoader with a generator of its own, and memory pinned for a device."""
    source = dataset
    while isinstance(source, Subset):
        source = source.dataset
    tensors = source.tensors if isinstance(source, TensorDataset) else ()
    pins = all(t.is_cpu for t in tensors) and accelerator() not in (None, torch.mps)
    defaults = {"generator": torch.Generator().manual_seed(seed), "pin_memory": pins}
    return klass(dataset, *args, **workers.options(seed, defaults | kwargs))


def _check(sampler: object, limit: int, options: dict[str, Any]) -> None:
    if options.get("batch_sampler") is not None or not (sampler is None or callable(sampler)):
        raise ValueError("loader: batch_sampler= and other samplers are for DataLoader itself")
    if limit < 0:
        raise UserError(f"loader: limit={limit}; give a number of batches, or 0 for all")


@dataclass(eq=False, repr=False)
class EpochSampler(Sampler[int]):
    """This rank's indices, in an order given by seed and epoch.

    A second pass within an epoch, or a pass in another stage, has another order.

    Args:
        dataset: anything with a length.
        shuffle: else in the order of the dataset.
        seed: of the orders.
        examples: in an epoch, of all ranks, from where the last epoch ended; all data by default.
        multiple: the size of a pass is cut to a multiple of this.
        index: makes an index for a worker, from the example's and its place in the run.
    """

    dataset: Sized
    shuffle: bool
    seed: int
    examples: int | None = None
    multiple: int = 1
    index: Callable[[int, tuple[int, ...]], int] | None = None

    def __post_init__(self) -> None:
        if self.examples is not None and (self.examples < 1 or not len(self.dataset)):
            raise ValueError("loader: updates_per_epoch= needs at least one update and one example")
        self._skipped = 0

    def skip(self, examples: int) -> None:
        """Skip the first examples, of all ranks, in the next pass."""
        self._skipped = examples

    @property
    def _size(self) -> int:
        """Indices in a pass of all ranks; shuffled, some come twice for equal shares."""
        size = self.examples or len(self.dataset) // self.multiple * self.multiple
        return size + -size % distrib.world_size() if self.shuffle else size

    def __len__(self) -> int:
        return len(range(distrib.rank(), self._size, distrib.world_size()))

    def __iter__(self) -> Iterator[int]:
        here = position.get()
        step, number = here.passes.get(self, (here.step, -1))
        number = number + 1 if step == here.step else 0
        here.passes[self] = here.step, number
        salt = number, *filter(None, (here.stage, here.step))
        first, ranks = self._skipped + distrib.rank(), distrib.world_size()
        self._skipped = 0
        mine = itertools.islice(self._pass(here.epoch, salt, first), 0, None, ranks)
        if self.index is None:
            yield from mine
        else:
            for place, example in zip(itertools.count(first, ranks), mine, strict=False):
                yield self.index(example, (here.epoch, *salt, place))
        if position.get() is not here:
            warnings.warn(
                "a pass over loader() began in an earlier stage: after a resume it begins anew; "
                "iterate over the loader in each stage, if need be with updates_per_epoch=",
                stacklevel=2,
            )

    def _pass(self, epoch: int, salt: tuple[int, ...], first: int) -> Iterator[int]:
        """Yield the indices of all ranks from `first` on: a window on endless orders."""
        left, size = self._size - first, len(self.dataset)
        begin = epoch * (self.examples or size) + first
        while left > 0:
            number, skipped = divmod(begin, size)
            order = self._order(number, salt)[skipped : skipped + left]
            for at in range(0, len(order), CHUNK):
                part = order[at : at + CHUNK]
                yield from part.tolist() if isinstance(part, torch.Tensor) else part
            begin, left = begin + len(order), left - len(order)

    def order(self, generator: torch.Generator) -> Sequence[int] | torch.Tensor:
        """Return an index for each example, for a pass of all ranks together.

        Override for another order, and draw on `generator` alone, seeded for each pass.
        """
        size = len(self.dataset)
        return torch.randperm(size, generator=generator) if self.shuffle else range(size)

    def _order(self, number: int, salt: tuple[int, ...]) -> Sequence[int] | torch.Tensor:
        seed = derive_seed(self.seed, number, *salt)
        order = self.order(torch.Generator().manual_seed(seed))
        if len(order) != (size := len(self.dataset)):
            raise ValueError(f"{type(self).__name__}.order: {len(order)} indices, {size} examples")
        return order


distrib.loader = loader  # where Flashy's users look for it
