"""Distributed training: collectives, gradients and the process group, under one name.

Every function here also works in a single process, where it does nothing. Collectives must be
called by all ranks, in the same order; ranks that do not are told so within seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .collectives import (
    all_reduce,
    average_metrics,
    average_tensors,
    barrier,
    broadcast_model,
    broadcast_object,
    broadcast_tensors,
    gather_objects,
    raised_everywhere,
    rank_zero_only,
)
from .gradients import eager_sync_gradients, eager_sync_model, sync_gradients, sync_model
from .process_group import device, init, is_distributed, is_rank_zero, rank, world_size

__all__ = [
    "all_reduce",
    "average_metrics",
    "average_tensors",
    "barrier",
    "broadcast_model",
    "broadcast_object",
    "broadcast_tensors",
    "device",
    "eager_sync_gradients",
    "eager_sync_model",
    "gather_objects",
    "init",
    "is_distributed",
    "is_rank_zero",
    "loader",
    "raised_everywhere",
    "rank",
    "rank_zero_only",
    "sync_gradients",
    "sync_model",
    "world_size",
    "wrap",
]

# Data loading is a floor above; `core/__init__.py` sets this, for Flashy's users expect it here.
loader: Callable[..., Any]


def wrap(model: nn.Module) -> nn.Module:
    """Wrap a model in DistributedDataParallel; alone, return it as it is."""
    if not is_distributed():
        return model
    on_cuda = next(model.parameters()).device.type == "cuda"
    return nn.parallel.DistributedDataParallel(
        model, device_ids=[torch.cuda.current_device()] if on_cuda else None
    )
