"""Distributed training: collectives, gradients and the process group, under one name.

Every function here also works, as a no-op, in a single process. Collectives must be
called by all ranks, in the same order; ranks that disagree are named within seconds.
"""

from collections.abc import Callable
from typing import Any

from .board import barrier, check_same_call, post, read, report_failure, this_process
from .collectives import (
    all_reduce,
    average_metrics,
    average_tensors,
    broadcast_model,
    broadcast_object,
    broadcast_tensors,
    gather_objects,
    raised_everywhere,
)
from .gradients import eager_sync_gradients, eager_sync_model, sync_gradients, sync_model, wrap
from .group import GRACE, init, leave
from .ranks import device, is_distributed, is_rank_zero, rank, rank_zero_only, world_size

# fmt: off
__all__ = [
    "GRACE", "all_reduce", "average_metrics", "average_tensors", "barrier", "broadcast_model",
    "broadcast_object", "broadcast_tensors", "check_same_call", "device", "eager_sync_gradients",
    "eager_sync_model", "gather_objects", "init", "is_distributed", "is_rank_zero", "leave",
    "loader", "post", "raised_everywhere", "rank", "rank_zero_only", "read", "report_failure",
    "sync_gradients", "sync_model", "this_process", "world_size", "wrap",
]
# fmt: on

loader: Callable[..., Any]  # of data.py, a floor above, which puts it here for Flashy's users
