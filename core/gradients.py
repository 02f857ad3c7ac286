"""Gradients: averaged over ranks after the backward pass, or during it."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from .collectives import BUCKET_BYTES, average_tensors, broadcast_tensors, describe, finish
from .process_group import is_distributed, world_size
from .watchdog import check_same_call

# Copying into a bucket has a cost as well, so large tensors travel alone, as they are. See
# `bench/sync.py`.
ALONE_BYTES = 4 * 2**20


def sync_gradients(params: Iterable[nn.Parameter], owner: nn.Module | None = None) -> None:
    """Average gradients over ranks, after the backward pass.

    A parameter without a gradient on some ranks counts as zero there; one without on all ranks
    stays without.

    Args:
        params: the same on all ranks, in the same order.
        owner: knows their names, which are then compared as well.
    """
    if is_distributed():
        trained = _to_average(params)
        _layout_of(trained, owner).average(trained)


def _to_average(params: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Those that are trained; without sharded ones, whose gradients `fully_shard` averages."""
    return [p for p in params if p.requires_grad and not hasattr(p, "placements")]


@contextmanager
def eager_sync_gradients(
    params: Iterable[nn.Parameter], owner: nn.Module | None = None
) -> Iterator[None]:
    """Like `sync_gradients`, but around the backward pass and overlapped with it.

    To accumulate gradients, wrap the backward pass of the last micro-batch only.
    """
    if not is_distributed():
        yield
        return
    trained = _to_average(params)
    layout = _layout_of(trained, owner)
    with layout.watching(trained):
        yield  # on an exception no rank is waited for
    layout.average(trained)


def sync_model(model: nn.Module, sync_buffers: bool = True, average_buffers: bool = True) -> None:
    """Synchronise a model after its backward pass: an alternative to DistributedDataParallel.

    Args:
        sync_buffers: synchronise the buffers as well.
        average_buffers: average floating point buffers over ranks; else take those of rank zero.
            Integer buffers (such as counters) are always those of rank zero.
    """
    sync_gradients(model.parameters(), model)
    if sync_buffers:
        _sync_buffers(model, average_buffers)


@contextmanager
def eager_sync_model(
    model: nn.Module, sync_buffers: bool = True, average_buffers: bool = True
) -> Iterator[None]:
    """Like `sync_model`, but around the backward pass and overlapped with it."""
    with eager_sync_gradients(model.parameters(), model):
        yield
    if sync_buffers:
        _sync_buffers(model, average_buffers)


def _sync_buffers(model: nn.Module, average: bool) -> None:
    buffers = list(model.buffers())
    averaged = [b for b in buffers if average and (b.is_floating_point() or b.is_complex())]
    chosen = {id(b) for b in averaged}
    if averaged:
        average_tensors(averaged)
    if copied := [b for b in buffers if id(b) not in chosen]:
        broadcast_tensors(copied)


# Laid out once, by the first parameter; a layout does not keep its parameters alive.
_layouts: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _layout_of(params: list[nn.Parameter], owner: nn.Module | None) -> _Layout:
    layout: _Layout | None = _layouts.get(params[0]) if params else None
    if layout is None or not layout.fits(params):
        if layout is not None:
            layout.forget()
        layout = _Layout(params, owner)
        if params:
            _layouts[params[0]] = layout
    return layout


class _Layout:
    """How the gradients of some parameters travel: in which buckets, in which order."""

    def __init__(self, params: list[nn.Parameter], owner: nn.Module | None) -> None:
        names = {p: n for n, p in owner.named_parameters()} if owner is not None else {}
        described = [f"{names.get(p, i)}: {describe(p)}" for i, p in enumerate(params)]
        check_same_call("sync_gradients for the first time", described)
        self._params = [weakref.ref(p) for p in params]
        *early, last = _grouped(params)
        self._buckets = [_Bucket(params, described, places) for places in early]
        self._buckets.append(_Bucket(params, described, last, flags=len(params)))
        self._bucket_of = {i: bucket for bucket in self._buckets[:-1] for i in bucket.places}
        self._watched: list[nn.Parameter] | None = None
        self._hooks: list[Any] = []
        self._start()

    def fits(self, params: list[nn.Parameter]) -> bool:
        """Is this the layout of these very parameters?"""
        return len(params) == len(self._params) and all(
            known() is param for known, param in zip(self._params, params, strict=True)
        )

    @contextmanager
    def watching(self, params: list[nn.Parameter]) -> Iterator[None]:
        """Send off each bucket as soon as the backward pass in the body has filled it."""
        if not self._hooks:  # they stay, for there may be many
            for i in self._bucket_of:
                hook = functools.partial(self._arrive, i)
                self._hooks.append(params[i].register_post_accumulate_grad_hook(hook))
        self._watched = params
        try:
            yield
        except BaseException:
            self._start()  # what is on its way belongs to a step that never was
            raise
        finally:
            self._watched = None

    def forget(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    def _start(self) -> None:
        """Expect the gradients of the next step."""
        for bucket in self._buckets:
            bucket.start()
        self._next = 0

    def _arrive(self, place: int, param: torch.Tensor) -> None:
        if self._watched is None:
            return
        self._bucket_of[place].arrive(place)
        # All ranks send the buckets in the same order; the last one waits for the end.
        while self._next < len(self._buckets) - 1 and not self._buckets[self._next].missing:
            self._buckets[self._next].send(self._watched)
            self._next += 1

    @torch.no_grad()
    def average(self, params: list[nn.Parameter]) -> None:
        """Send off what was not yet, and put the averages in place."""
        for bucket in self._buckets:
            if bucket.work is None:
                bucket.send(params)
        for bucket in self._buckets:
            bucket.wait(f"sync_gradients of {len(params)} parameters")
        for bucket in self._buckets:
            bucket.put(params, self._buckets[-1].flags)
        self._start()


def _grouped(params: list[nn.Parameter]) -> list[list[int]]:
    """Places of parameters whose gradients travel together, in the order backward reaches them.

    The last group has small ones only, or none.
    """
    groups: list[list[int]] = []
    small: dict[Any, list[int]] = {}
    for i in reversed(range(len(params))):
        if params[i].nbytes >= ALONE_BYTES:
            groups.append([i])
            continue
        kind = params[i].dtype, params[i].device
        small.setdefault(kind, []).append(i)
        if sum(params[j].nbytes for j in small[kind]) >= BUCKET_BYTES:
            groups.append(small.pop(kind))
    return [*groups, *(small.values() or [[]])]


class _Bucket:
    """Gradients that travel together, copied into one flat tensor; or a large one, as it is.

    Args:
        params: all that are synchronised.
        names: of all, for errors.
        places: of those in this bucket.
        flags: elements to add that tell which of all parameters has a gradient on any rank.
    """

    def __init__(
        self, params: list[nn.Parameter], names: list[str], places: list[int], flags: int = 0
    ) -> None:
        self.names = names
        self.places = places
        chosen = [params[i] for i in places]
        self.alone = not flags and len(places) == 1
        sizes = [0 if self.alone else p.numel() for p in chosen]
        like = chosen[0] if chosen else params[0] if params else torch.empty(0)
        self._flat = like.detach().new_empty(sum(sizes) + flags)
        *parts, self.flags = self._flat.split([*sizes, flags])
        self._parts = []
        if not self.alone:
            self._parts = [p.view_as(like) for p, like in zip(parts, chosen, strict=True)]

    def start(self) -> None:
        """Expect the gradients."""
        self.missing = set(self.places)
        self.work: Any = None

    def arrive(self, place: int) -> None:
        """Note that a parameter has its gradient."""
        if self.work is not None:
            raise RuntimeError(
                "a second backward pass inside eager_sync_gradients: "
                "wrap the last one only, gradients of earlier ones add up by themselves"
            )
        self.missing.discard(place)

    def send(self, params: list[nn.Parameter]) -> None:
        """Start to average the gradients; those that are not there count as zero."""
        grads = []
        for i in self.places:
            grad = params[i].grad
            if grad is not None and grad.is_sparse:
                raise RuntimeError(
                    f"sync_gradients: parameter {self.names[i]} has a sparse gradient, which can't "
                    "be averaged; build its embedding with sparse=False"
                )
            grads.append(torch.zeros_like(params[i]) if grad is None else grad)
        if self.alone:
            self.sent = grads[0].contiguous()
        else:
            self.sent = self._flat
            if grads:
                torch._foreach_copy_(self._parts, grads)
        if len(self.flags):
            self.flags.fill_(1)
            if absent := [i for i, param in enumerate(params) if param.grad is None]:
                self.flags[absent] = 0
        # Divided before the sum, which might overflow in half precision.
        self.sent.div_(world_size())
        self.work = dist.all_reduce(self.sent, async_op=True)

    def wait(self, what: str) -> None:
        """Wait for the averages."""
        finish(self.work, self.sent, what)

    def put(self, params: list[nn.Parameter], flags: torch.Tensor) -> None:
        """Give the parameters their averages."""
        parts = [self.sent] if self.alone else self._parts
        grads, averages = [], []
        for i, part in zip(self.places, parts, strict=True):
            grad = params[i].grad
            if grad is None:
                if flags[i] != 0:  # waits for the device, where a parameter is unused on this rank
                    params[i].grad = part.clone()
            elif grad is not part:
                grads.append(grad)
                averages.append(part)
        if grads:
            torch._foreach_copy_(grads, averages)
