"""Collectives: gather, broadcast, reduce and average over ranks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors

from ..metrics import Averages, added, number
from ..utils import UserError
from .board import check_same_call, wait
from .ranks import T, is_distributed, world_size
from .watch import note_call

Tensor = TypeVar("Tensor", bound=torch.Tensor)

# A collective has a fixed cost, so small tensors travel together, as in DDP. To copy has a cost as
# well, so large ones travel alone, as they are. See `bench/sync.py`.
BUCKET_BYTES = 25 * 2**20
ALONE_BYTES = 4 * 2**20


def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce a tensor over ranks, in place."""
    if is_distributed():
        name = f"all_reduce of {describe(tensor)}"
        note_call(tensor, name)
        wait(dist.all_reduce(tensor, op, async_op=True), tensor, name)


def gather_objects(obj: T, name: str = "gather_objects") -> list[T]:
    """Return the objects of all ranks, by rank. Keep objects small, as they travel pickled.

    Args:
        obj: anything to be pickled.
        name: of the operation, for the message if ranks disagree.
    """
    objects = [obj] * world_size()
    if check_same_call(name):
        dist.all_gather_object(objects, obj)
    return objects


def broadcast_object(obj: T, src: int = 0) -> T:
    """Return the object of rank `src` on all ranks; other objects are ignored."""
    box = [obj]
    if check_same_call(f"broadcast_object from rank {src}"):
        dist.broadcast_object_list(box, src)
    return box[0]


@contextmanager
def raised_everywhere() -> Iterator[None]:
    """Raise an error of rank zero in the body on all ranks; any other raises on its own rank."""
    try:
        yield
    except Exception as error:
        broadcast_object(str(error) or repr(error))
        raise
    if message := broadcast_object(""):
        raise UserError(message)


def average_metrics(metrics: Mapping[str, Any], count: float | None = None) -> dict[str, float]:
    """Average metrics over ranks, in double precision.

    A metric of some ranks is averaged over these ranks; a rank with a zero count (no example) does
    not count.

    Args:
        metrics: of `averager`, or numbers and tensors of one element.
        count: weight of this rank, usually its number of examples. By default, `averager`'s have
            the weights of their steps, and a dict weighs 1.
    """
    numbers = {name: float(number(name, value)) for name, value in metrics.items()}
    if not is_distributed():
        return numbers
    weight = 1.0 if count is None else float(count)
    mine = {name: (value * weight, weight) for name, value in numbers.items() if weight}
    if count is None and isinstance(metrics, Averages):
        mine = metrics.sums()
    sums = added(gather_objects(mine, "average_metrics"))
    return {name: total / weight for name, (total, weight) in sums.items()}


def average_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Average floating point and complex tensors over ranks, in place; others are left alone."""
    averaged = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    if check_same_call("average_tensors", map(describe, averaged)):
        for group in grouped(averaged):
            flat = flatten(group).div_(world_size())
            all_reduce(flat)
            put_back(flat, group)


def broadcast_tensors(tensors: Iterable[torch.Tensor], src: int = 0) -> None:
    """Copy tensors from rank `src` to all ranks, in place."""
    tensors = list(tensors)
    if check_same_call(f"broadcast_tensors from rank {src}", map(describe, tensors)):
        for group in grouped(tensors):
            flat = flatten(group)
            dist.broadcast(flat.view(torch.uint8), src)  # bytes, as gloo lacks some types
            put_back(flat, group)


def broadcast_model(model: nn.Module, src: int = 0) -> None:
    """Copy the parameters and buffers of rank `src` to all ranks."""
    broadcast_tensors([*model.parameters(), *model.buffers()], src)


def describe(tensor: torch.Tensor) -> str:
    """Return shape, type and device of a tensor, to compare ranks by."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{list(tensor.shape)} {dtype} on {tensor.device.type}"


def grouped(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Group tensors to travel together, in order: large tensors alone, others by the bucket."""
    groups: dict[Any, list[Tensor]] = {}
    sizes: Counter[Any] = Counter()
    for tensor in tensors:
        alone = tensor.nbytes >= ALONE_BYTES
        kind = tensor.dtype, tensor.device, alone
        groups.setdefault(kind, []).append(tensor)
        sizes[kind] += tensor.nbytes
        if alone or sizes[kind] >= BUCKET_BYTES:
            del sizes[kind]
            yield groups.pop(kind)
    yield from groups.values()


@torch.no_grad()
def flatten(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Return a flat copy of tensors; if there is a single contiguous tensor, a view."""
    return _flatten_dense_tensors(tensors).detach()  # type: ignore[no-any-return]


@torch.no_grad()
def put_back(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy new values of `flatten(tensors)` back into the tensors; nothing for a view."""
    if len(tensors) > 1 or flat.data_ptr() != tensors[0].data_ptr():
        torch._foreach_copy_(tensors, _unflatten_dense_tensors(flat, tensors))
