"""Collectives: gather, broadcast, reduce and average over ranks."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..metrics import Averages, added
from ..utils import UserError
from .board import check_same_call, wait
from .group import is_distributed, is_rank_zero, rank, world_size

T = TypeVar("T")
Tensor = TypeVar("Tensor", bound=torch.Tensor)

# A collective has a fixed cost, so small tensors travel together, as in DDP.
BUCKET_BYTES = 25 * 2**20


def rank_zero_only(function: Callable[..., T]) -> Callable[..., T | None]:
    """Decorate a function to run on rank zero alone, and return None elsewhere."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> T | None:
        return function(*args, **kwargs) if is_rank_zero() else None

    return wrapped


def barrier() -> None:
    """Wait until all ranks are here."""
    check_same_call("barrier")


def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> None:
    """Reduce a tensor over ranks, in place."""
    if is_distributed():
        work = dist.all_reduce(tensor, op, async_op=True)
        finish(work, tensor, f"all_reduce of {describe(tensor)}")


def gather_objects(obj: T, name: str = "gather_objects") -> list[T]:
    """Return the objects of all ranks, by rank. Keep objects small, as they travel pickled.

    Args:
        obj: anything to be pickled.
        name: of the operation, for the message if ranks disagree.
    """
    if not is_distributed():
        return [obj]
    check_same_call(name)
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, obj)
    return objects


def broadcast_object(obj: T, src: int = 0) -> T:
    """Return the object of rank `src` on all ranks; other objects are ignored."""
    if not is_distributed():
        return obj
    check_same_call(f"broadcast_object from rank {src}")
    box = [obj]
    dist.broadcast_object_list(box, src)
    return obj if rank() == src else box[0]


@contextmanager
def raised_everywhere() -> Iterator[None]:
    """Raise an error of rank zero in the body on all ranks; any other raises on its own rank."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:
        error = caught
    message = broadcast_object((str(error) or repr(error)) if error else "")
    if error or message:
        raise error or UserError(message)


def average_metrics(metrics: Mapping[str, Any], count: float | None = None) -> dict[str, float]:
    """Average metrics over ranks, in double precision.

    A metric of some ranks is averaged over these ranks; a rank with a zero count (no example) does
    not count.

    Args:
        metrics: of `averager`, or numbers and tensors of one element.
        count: weight of this rank, usually its number of examples. By default, `averager`'s have
            the weights of their steps, and a dict weighs 1.
    """
    numbers = {
        k: float(v.detach() if isinstance(v, torch.Tensor) else v) for k, v in metrics.items()
    }
    if not is_distributed():
        return numbers
    if count is None and isinstance(metrics, Averages):
        mine = metrics.sums()
    else:
        weight = 1.0 if count is None else float(count)
        mine = {name: (value * weight, weight) for name, value in numbers.items() if weight}
    sums = added(gather_objects(mine, "average_metrics"))
    return {name: total / weight for name, (total, weight) in sums.items()}


def average_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Average floating point and complex tensors over ranks, in place; others are left alone."""
    if not is_distributed():
        return
    averaged = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    check_same_call("average_tensors", [describe(t) for t in averaged])
    for flat in _flattened(averaged):
        all_reduce(flat.div_(world_size()))


def broadcast_tensors(tensors: Iterable[torch.Tensor], src: int = 0) -> None:
    """Copy tensors from rank `src` to all ranks, in place."""
    if not is_distributed():
        return
    tensors = list(tensors)
    check_same_call(f"broadcast_tensors from rank {src}", [describe(t) for t in tensors])
    for flat in _flattened(tensors):
        dist.broadcast(flat, src)


def broadcast_model(model: nn.Module, src: int = 0) -> None:
    """Copy the parameters and buffers of rank `src` to all ranks."""
    broadcast_tensors([*model.parameters(), *model.buffers()], src)


def describe(tensor: torch.Tensor) -> str:
    """Return shape, type and device of a tensor, to compare ranks by."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    return f"{list(tensor.shape)} {dtype} on {tensor.device.type}"


def finish(work: Any, tensor: torch.Tensor, what: str) -> None:
    """Wait for a collective: an accelerator does by itself, between CPUs this process."""
    if tensor.is_cpu:
        wait(work, what)
    else:
        work.wait()


@torch.no_grad()
def _flattened(tensors: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield tensors of one kind as one flat tensor, bucket by bucket; copy its new values back."""
    for bucket in grouped(tensors):
        flat = torch.cat([t.detach().reshape(-1) for t in bucket])
        yield flat
        for tensor, part in zip(bucket, flat.split([t.numel() for t in bucket]), strict=True):
            tensor.copy_(part.view_as(tensor))


def grouped(tensors: Iterable[Tensor], alone: float = math.inf) -> Iterator[list[Tensor]]:
    """Group tensors of one dtype and device, in order, until a group fills a bucket.

    Args:
        alone: size in bytes of tensors in a group of their own.
    """
    groups: dict[Any, list[Tensor]] = {}
    sizes: Counter[Any] = Counter()
    for tensor in tensors:
        if tensor.nbytes >= alone:
            yield [tensor]
            continue
        kind = tensor.dtype, tensor.device
        groups.setdefault(kind, []).append(tensor)
        sizes[kind] += tensor.nbytes
        if sizes[kind] >= BUCKET_BYTES:
            del sizes[kind]
            yield groups.pop(kind)
    yield from groups.values()
