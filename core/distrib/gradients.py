"""Gradients, averaged over ranks after the backward pass or during it."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .board import check_same_call
from .collectives import average_tensors, broadcast_tensors, describe, finish, grouped
from .group import is_distributed, world_size

# Copying into a bucket has a cost as well, so large tensors travel alone, as they are. See
# `bench/sync.py`.
ALONE_BYTES = 4 * 2**20


def sync_gradients(params: Iterable[nn.Parameter], owner: nn.Module | None = None) -> None:
    """Average gradients over ranks, after the backward pass.

    A gradient absent on some ranks counts as zero there; absent on all ranks, it stays absent.

    Args:
        params: the same on all ranks, in the same order.
        owner: knows their names, for comparing ranks and for errors.
    """
    if is_distributed():
        _average(_buckets(params, owner))


@contextmanager
def eager_sync_gradients(
    params: Iterable[nn.Parameter], owner: nn.Module | None = None
) -> Iterator[None]:
    """Average gradients like `sync_gradients`, but during the backward pass in the body.

    To accumulate gradients, wrap the backward pass of the last micro-batch only.
    """
    if not is_distributed():
        yield
        return
    buckets = _buckets(params, owner)
    # The last bucket fills when the backward pass ends: no hooks. Most models have no other.
    with _sent_when_full(buckets[:-1]):
        yield  # on an exception no rank is waited for
    _average(buckets)


def sync_model(model: nn.Module, sync_buffers: bool = True, average_buffers: bool = True) -> None:
    """Synchronise a model after its backward pass: an alternative to DistributedDataParallel.

    Args:
        sync_buffers: synchronise the buffers as well.
        average_buffers: average floating point buffers over ranks; else copy from rank zero.
            Integer buffers (such as counters) are always copied.
    """
    sync_gradients(model.parameters(), model)
    if sync_buffers:
        _sync_buffers(model, average_buffers)


@contextmanager
def eager_sync_model(
    model: nn.Module, sync_buffers: bool = True, average_buffers: bool = True
) -> Iterator[None]:
    """Synchronise a model like `sync_model`, but during the backward pass in the body."""
    with eager_sync_gradients(model.parameters(), model):
        yield
    if sync_buffers:
        _sync_buffers(model, average_buffers)


def _sync_buffers(model: nn.Module, average: bool) -> None:
    """Average floating point buffers, if so asked, and copy all others from rank zero."""
    buffers = list(model.buffers())
    copied = [b for b in buffers if not average or not (b.is_floating_point() or b.is_complex())]
    if len(copied) < len(buffers):
        average_tensors(buffers)  # leaves integers alone
    if copied:
        broadcast_tensors(copied)


class _Bucket:
    """Gradients that travel together in a step: small ones in a flat copy, a large one alone.

    Each step makes new buckets, as messages of a failed step may still arrive.

    Args:
        params: with their descriptions.
    """

    def __init__(self, params: dict[nn.Parameter, str]) -> None:
        self.params = params
        self.missing: set[torch.Tensor] = set(params)
        self.work: Any = None

    @torch.no_grad()
    def send(self) -> None:
        """Start to average the gradients, once all are there."""
        for param, name in self.params.items():
            if param.grad is not None and param.grad.is_sparse:
                raise RuntimeError(
                    f"sync_gradients: parameter {name} has a sparse gradient, which can't "
                    "be averaged; build its embedding with sparse=False"
                )
        # Views of the gradients, if contiguous; else copies.
        self.parts = [p.grad.flatten() for p in self.params if p.grad is not None]
        self.flat = torch.cat(self.parts) if len(self.parts) > 1 else self.parts[0]
        # Divided before the sum, which might overflow in half precision.
        self.flat.div_(world_size())
        self.work = dist.all_reduce(self.flat, async_op=True)

    @torch.no_grad()
    def receive(self, call: str) -> None:
        """Wait for the averages, and put all in place; `call` names the wait in errors."""
        finish(self.work, self.flat, call)
        if len(self.parts) > 1:
            torch._foreach_copy_(self.parts, self.flat.split([p.numel() for p in self.parts]))
        for param, part in zip(self.params, self.parts, strict=True):
            # Where the part was a copy, or the gradient was replaced since.
            if (grad := param.grad) is not None and grad.data_ptr() != part.data_ptr():
                grad.copy_(part.view_as(grad))


# Groups of parameters, by the first of all. Weak references, so that no model is kept alive.
_groups: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _buckets(params: Iterable[nn.Parameter], owner: nn.Module | None) -> list[_Bucket]:
    """Return the buckets of a step, in the order of the backward pass.

    On first use, check for the same parameters on all ranks.
    """
    # Without sharded ones, whose gradients `fully_shard` averages.
    trained = [p for p in params if p.requires_grad and not hasattr(p, "placements")]
    groups = _groups.get(trained[0]) if trained else None
    if groups is None or {ref() for group in groups for ref in group} != set(trained):
        names = {p: n for n, p in owner.named_parameters()} if owner is not None else {}
        described = {p: f"{names.get(p, i)}: {describe(p)}" for i, p in enumerate(trained)}
        check_same_call("sync_gradients for the first time", [*described.values()])
        backward = grouped(reversed(trained), ALONE_BYTES)
        groups = [{weakref.ref(p): described[p] for p in group} for group in backward]
        if trained:
            _groups[trained[0]] = groups
    return [_Bucket({ref(): name for ref, name in group.items()}) for group in groups]


@contextmanager
def _sent_when_full(buckets: list[_Bucket]) -> Iterator[None]:
    """Send each bucket when the backward pass in the body has filled the bucket."""
    bucket_of: dict[torch.Tensor, _Bucket] = {p: b for b in buckets for p in b.params}
    waiting = deque(buckets)

    def arrive(param: torch.Tensor) -> None:
        bucket = bucket_of[param]
        if bucket.work is not None:
            raise RuntimeError(
                "a second backward pass inside eager_sync_gradients: "
                "wrap the last one only, gradients of earlier ones add up by themselves"
            )
        bucket.missing.discard(param)
        # All ranks must send in the same order, so a full bucket waits for those before.
        while waiting and not waiting[0].missing:
            waiting.popleft().send()

    with ExitStack() as hooks:
        for param in bucket_of:
            hooks.enter_context(param.register_post_accumulate_grad_hook(arrive))
        yield


def _average(buckets: list[_Bucket]) -> None:
    """Send the remaining buckets, and put all averages in place."""
    params = [p for bucket in buckets for p in bucket.params]
    # On the CPU, and apart from the gradients: to read the flags waits for no GPU.
    used = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8)
    unused = [i for i, p in enumerate(params) if p.grad is None]
    for i in unused:
        params[i].grad = torch.zeros_like(params[i])
    for bucket in buckets:
        if bucket.work is None:
            bucket.send()
    flags = dist.all_reduce(used, dist.ReduceOp.MAX, async_op=True)
    for bucket in buckets:
        bucket.receive(f"sync_gradients of {len(params)} parameters")
    for i in unused:  # a rank that uses all parameters does not wait
        flags.wait()
        if not used[i]:
            params[i].grad = None


def wrap(model: nn.Module) -> nn.Module:
    """Wrap a model in DistributedDataParallel; return the bare model in a single process."""
    if not is_distributed():
        return model
    device = next(model.parameters()).device
    ids = None if device.type == "cpu" else [device]
    return nn.parallel.DistributedDataParallel(model, device_ids=ids)
