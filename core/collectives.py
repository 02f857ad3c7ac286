"""Collectives: gather, broadcast, reduce and average over ranks.

Every function here also works in a single process, where it does nothing.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from .process_group import is_distributed, is_rank_zero, rank, world_size
from .utils import Averages, UserError
from .watchdog import check_same_call, wait

T = TypeVar("T")

# A collective has a fixed cost, so small tensors travel together, as in DDP.
BUCKET_BYTES = 25 * 2**20


def rank_zero_only(function: Callable[..., T]) -> Callable[..., T | None]:
    """Decorate a function to run on rank zero alone; elsewhere it returns None."""

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
    """Return the objects of all ranks, by rank. They travel pickled: keep them small.

    Args:
        obj: anything that can be pickled.
        name: of what is being done, for the message if ranks disagree.
    """
    if not is_distributed():
        return [obj]
    check_same_call(name)
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, obj)
    return objects


def broadcast_object(obj: T, src: int = 0) -> T:
    """Return the object of rank `src` on all ranks; what other ranks pass is ignored."""
    if not is_distributed():
        return obj
    check_same_call(f"broadcast_object from rank {src}")
    box = [obj]
    dist.broadcast_object_list(box, src)
    return obj if rank() == src else box[0]


@contextmanager
def raised_everywhere() -> Iterator[None]:
    """Let an error of rank zero in the body raise on all ranks; that of another raises there."""
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

    A metric that only some ranks have is averaged over those; a rank with a zero count (it saw no
    example) does not count.

    Args:
        metrics: what `averager` gave, or numbers and tensors of one element.
        count: weight of this rank, usually the number of examples it saw. By default, what
            `averager` gave has the weights of its steps; a dict, also one made from that, weighs 1.
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
    sums: dict[str, tuple[float, float]] = {}
    for theirs in gather_objects(mine, "average_metrics"):
        for name, (total, weight) in theirs.items():
            before = sums.get(name, (0.0, 0.0))
            sums[name] = before[0] + total, before[1] + weight
    return {name: total / weight for name, (total, weight) in sums.items()}


def average_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Average floating point and complex tensors over ranks, in place; others are left alone."""
    if not is_distributed():
        return
    averaged = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    check_same_call("average_tensors", [describe(t) for t in averaged])
    for bucket in _buckets(averaged):
        flat = torch.cat([t.detach().reshape(-1) for t in bucket]).div_(world_size())
        all_reduce(flat)
        _unflatten(flat, bucket)


def broadcast_tensors(tensors: Iterable[torch.Tensor], src: int = 0) -> None:
    """Copy tensors from rank `src` to all ranks, in place."""
    if not is_distributed():
        return
    tensors = list(tensors)
    check_same_call(f"broadcast_tensors from rank {src}", [describe(t) for t in tensors])
    for bucket in _buckets(tensors):
        flat = torch.cat([t.detach().reshape(-1) for t in bucket])
        dist.broadcast(flat, src)
        _unflatten(flat, bucket)


def broadcast_model(model: nn.Module, src: int = 0) -> None:
    """Give all ranks the parameters and buffers of rank `src`."""
    broadcast_tensors([*model.parameters(), *model.buffers()], src)


def describe(tensor: torch.Tensor) -> str:
    return (
        f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')} on {tensor.device.type}"
    )


def finish(work: Any, tensor: torch.Tensor, what: str) -> None:
    """Wait for a collective: the device does on CUDA, this process elsewhere."""
    if tensor.is_cuda:
        work.wait()
    else:
        wait(work, what)


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group tensors of one dtype and device, in order, until a bucket is full."""
    buckets: dict[Any, list[torch.Tensor]] = {}
    sizes: Counter[Any] = Counter()
    for tensor in tensors:
        kind = tensor.dtype, tensor.device
        buckets.setdefault(kind, []).append(tensor)
        sizes[kind] += tensor.nbytes
        if sizes[kind] >= BUCKET_BYTES:
            del sizes[kind]
            yield buckets.pop(kind)
    yield from buckets.values()


def _unflatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy the parts of a flat tensor back to where they came from."""
    with torch.no_grad():
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))
