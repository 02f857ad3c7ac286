"""Gradients, averaged over ranks after the backward pass or during it."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .board import check_same_call, wait
from .collectives import average_tensors, broadcast_tensors, describe, flatten, grouped, put_back
from .ranks import is_distributed, world_size
from .watch import note_call


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
    buckets = _buckets(params, owner) if is_distributed() else []
    # The last bucket fills when the backward pass ends: no hooks. Most models have no other.
    waiting = buckets[:-1]
    bucket_of: dict[torch.Tensor, _Bucket] = {p: b for b in waiting for p in b.params}

    def arrive(param: torch.Tensor) -> None:
        if bucket_of[param].work is not None:
            raise RuntimeError("a second backward pass in eager_sync_gradients: wrap the last only")
        bucket_of[param].missing.discard(param)
        # All ranks must send in the same order, so a full bucket waits for those before.
        while waiting and not waiting[0].missing:
            waiting.pop(0).send()

    with ExitStack() as hooks:
        for param in bucket_of:
            hooks.enter_context(param.register_post_accumulate_grad_hook(arrive))
        yield  # on an exception no rank is waited for
    if buckets:
        _average(buckets)


def sync_model(model: nn.Module, sync_buffers: bool = True, average_buffers: bool = True) -> None:
    """Synchronise a model after its backward pass: an alternative to DistributedDataParallel.

    Args:
        sync_buffers: synchronise the buffers as well.
        average_buffers: average floating point buffers over ranks; else copy from rank zero.
            Integer buffers (such as counters) are always copied.
    """
    sync_gradients(model.parameters(), model)
    _sync_buffers(model, sync_buffers, average_buffers)


@contextmanager
def eager_sync_model(
    model: nn.Module, sync_buffers: bool = True, average_buffers: bool = True
) -> Iterator[None]:
    """Synchronise a model like `sync_model`, but during the backward pass in the body."""
    with eager_sync_gradients(model.parameters(), model):
        yield
    _sync_buffers(model, sync_buffers, average_buffers)


def _sync_buffers(model: nn.Module, sync: bool, average: bool) -> None:
    """Average floating point buffers, if so asked, and copy all others from rank zero."""
    buffers = list(model.buffers()) if sync else []
    copied = [b for b in buffers if not average or not (b.is_floating_point() or b.is_complex())]
    if len(copied) < len(buffers):
        average_tensors(buffers)  # leaves integers alone
    if copied:
        broadcast_tensors(copied)


class _Bucket:
    """Gradients that travel together in a step.

    Each step makes new buckets, as messages of a failed step may still arrive.

    Args:
        params: with their descriptions.
    """

    def __init__(self, params: dict[nn.Parameter, str]) -> None:
        self.params = params
        self.missing: set[torch.Tensor] = set(params)
        self.work: Any = None

    def send(self) -> None:
        """Start to average the gradients, once all are there."""
        for param, name in self.params.items():
            if param.grad is not None and param.grad.is_sparse:
                raise RuntimeError(f"{name} has a sparse gradient: build it with sparse=False")
        # Divided before the sum, which might overflow in half precision.
        self.flat = flatten(self.gradients()).div_(world_size())
        self.work = dist.all_reduce(self.flat, async_op=True)

    def receive(self, call: str) -> None:
        """Wait for the averages, and put all in place; `call` names the wait in errors."""
        wait(self.work, self.flat, call)
        put_back(self.flat, self.gradients())

    def gradients(self) -> list[torch.Tensor]:
        """Return the present gradients; some may have been replaced since `send`."""
        return [p.grad for p in self.params if p.grad is not None]


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
        check_same_call("sync_gradients for the first time", described.values())
        backward = grouped(reversed(trained))
        groups = [{weakref.ref(p): described[p] for p in group} for group in backward]
        if trained:
            _groups[trained[0]] = groups
    return [_Bucket({ref(): name for ref, name in group.items()}) for group in groups]


def _average(buckets: list[_Bucket]) -> None:
    """Send the remaining buckets, and put all averages in place."""
    params = [p for bucket in buckets for p in bucket.params]
    # On the CPU, and apart from the gradients: to read the flags waits for no GPU.
    used = torch.tensor([p.grad is not None for p in params], dtype=torch.uint8)
    unused = [i for i, p in enumerate(params) if p.grad is None]
    for i in unused:
        params[i].grad = torch.zeros_like(params[i])
    for bucket in [b for b in buckets if b.work is None]:
        bucket.send()
    flags = dist.all_reduce(used, dist.ReduceOp.MAX, async_op=True)
    name = f"sync_gradients of {len(params)} parameters"
    for bucket in buckets:
        note_call(bucket.flat, name, flags)
        bucket.receive(name)
    for i in unused:  # a rank that uses all parameters does not wait
        flags.wait()
        if not used[i]:
            params[i].grad = None


def wrap(model: nn.Module) -> nn.Module:
    """Wrap a model in DistributedDataParallel; return the bare model in a single process."""
    return nn.parallel.DistributedDataParallel(model) if is_distributed() else model
