"""Training on several processes: the process group, collectives, gradient synchronisation.

Every function here also works in a single process, where it does nothing. Collectives must be
called by all ranks, in the same order.
"""

from __future__ import annotations

import atexit
import functools
import importlib
import logging
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from .xp import rendezvous_file

logger = logging.getLogger(__name__)

T = TypeVar("T")

# Data loading sits a floor above; `core/__init__.py` hangs it here for those who look for it here.
loader: Callable[..., Any]

# A collective has a fixed cost, so small tensors travel together; copying has a cost as well, so
# large ones need not wait for company.
BUCKET_BYTES = 4 * 2**20


# ------------------------------------------------------------------------------------ who am I


class Place(NamedTuple):
    """Where this process stands among all processes of the run, and on its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def _place() -> Place:
    """Read our place from what started us: Dora, torchrun or a script (environment), Slurm."""
    env = os.environ
    if "WORLD_SIZE" in env:
        rank, world = int(env.get("RANK", 0)), int(env["WORLD_SIZE"])
        local_rank = int(env.get("LOCAL_RANK", rank))
        return Place(rank, world, local_rank, int(env.get("LOCAL_WORLD_SIZE", world)))
    if "SUBMITIT_EXECUTOR" in env:
        from submitit import JobEnvironment

        job = JobEnvironment()
        tasks_here = job.num_tasks // job.num_nodes
        return Place(job.global_rank, job.num_tasks, job.local_rank, tasks_here)
    return Place(0, 1, 0, 1)


def is_distributed() -> bool:
    """Is this one of several processes of a run?"""
    return world_size() > 1


def rank() -> int:
    """Index of this process; right also before `init`."""
    return dist.get_rank() if _initialized() else _place().rank


def world_size() -> int:
    """Number of processes; right also before `init`."""
    return dist.get_world_size() if _initialized() else _place().world_size


def is_rank_zero() -> bool:
    """Is this the process that writes files and speaks to the user?"""
    return rank() == 0


def rank_zero_only(function: Callable[..., T]) -> Callable[..., T | None]:
    """Decorate a function to run on rank zero alone; elsewhere it returns None."""

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> T | None:
        return function(*args, **kwargs) if is_rank_zero() else None

    return wrapped


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


# --------------------------------------------------------------------------------------- start


def init(backend: str | None = None, timeout: float = 1800.0) -> None:
    """Join the process group, if this process was started as one of several.

    Args:
        backend: defaults to nccl where CUDA is available, and gloo elsewhere.
        timeout: seconds after which a collective that misses a rank fails.
    """
    place = _place()
    if _initialized() or place.world_size == 1:
        return
    cuda = torch.cuda.is_available()
    if backend == "nccl" and not cuda:
        raise RuntimeError("backend nccl needs CUDA, which is not available: use gloo")
    if cuda:
        torch.cuda.set_device(place.local_rank % torch.cuda.device_count())
    elif "OMP_NUM_THREADS" not in os.environ:
        # Processes that each take all cores slow one another down manyfold.
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // place.local_world_size))
    # Its functions have the process group of the moment of their import as a default argument.
    # Were that ours, it would outlive `_leave`, and its threads might crash the end of Python.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group(
        backend or ("nccl" if cuda else "gloo"),
        init_method=_rendezvous(place),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=timeout),
    )
    atexit.register(_leave)
    logger.info("Process group: rank %d of %d, %s", rank(), world_size(), dist.get_backend())


def _rendezvous(place: Place) -> str:
    """Where the ranks meet: at a given address, at Slurm's first node, or at a file of the run."""
    if "MASTER_PORT" in os.environ:
        return "env://"
    if "SLURM_JOB_NODELIST" in os.environ and "SUBMITIT_EXECUTOR" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        job = TorchDistributedEnvironment()
        return f"tcp://{os.environ.get('MASTER_ADDR', job.master_addr)}:{job.master_port}"
    if (meeting := rendezvous_file()) is not None:
        return f"file://{meeting}"
    raise RuntimeError(
        f"rank {place.rank} of {place.world_size} does not know where to meet the others: "
        "set MASTER_ADDR and MASTER_PORT, or start with `dora run -d` or torchrun"
    )


def _leave() -> None:
    if _initialized():
        dist.destroy_process_group()


def device(name: str = "auto") -> torch.device:
    """Return this process's device.

    Args:
        name: `auto` (CUDA, else Apple's MPS, else CPU), or a device name such as `cuda` or `cpu`.
    """
    if name == "auto":
        accelerated = torch.backends.mps.is_available() and not is_distributed()
        name = "cuda" if torch.cuda.is_available() else "mps" if accelerated else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise RuntimeError("device=cuda: CUDA is not available here; use device=cpu or auto")
        return torch.device("cuda", _place().local_rank % torch.cuda.device_count())
    return torch.device(name)


# --------------------------------------------------------------------------------- collectives


def barrier() -> None:
    """Wait until all ranks are here."""
    if is_distributed():
        dist.barrier()


def all_reduce(tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM) -> Any:
    """Reduce a tensor over ranks, in place."""
    return dist.all_reduce(tensor, op) if is_distributed() else None


def gather_objects(obj: T) -> list[T]:
    """Return the objects of all ranks, by rank. They travel pickled: keep them small."""
    if not is_distributed():
        return [obj]
    objects: list[Any] = [None] * world_size()
    dist.all_gather_object(objects, obj)
    return objects


def broadcast_object(obj: T, src: int = 0) -> T:
    """Return the object of rank `src` on all ranks; what other ranks pass is ignored."""
    if not is_distributed():
        return obj
    box = [obj]
    dist.broadcast_object_list(box, src)
    return obj if rank() == src else box[0]


def average_metrics(metrics: Mapping[str, Any], count: float = 1.0) -> dict[str, float]:
    """Average metrics over ranks, in double precision.

    A metric that only some ranks have is averaged over those; a rank with a zero count (it saw no
    example) does not count.

    Args:
        metrics: numbers or tensors of one element.
        count: weight of this rank, usually the number of examples it saw.
    """
    sums: dict[str, float] = {}
    counts: dict[str, float] = {}
    mine = {name: float(value) for name, value in metrics.items()}
    if not is_distributed():
        return mine
    for values, weight in gather_objects((mine, float(count))):
        for name, value in values.items() if weight else ():
            sums[name] = sums.get(name, 0.0) + value * weight
            counts[name] = counts.get(name, 0.0) + weight
    return {name: sums[name] / counts[name] for name in sums}


def average_tensors(tensors: Iterable[torch.Tensor]) -> None:
    """Average floating point and complex tensors over ranks, in place; others are left alone."""
    if not is_distributed():
        return
    averaged = [t for t in tensors if t.is_floating_point() or t.is_complex()]
    _check_alike(averaged, "average_tensors")
    for bucket in _buckets(averaged):
        flat = torch.cat([t.detach().reshape(-1) for t in bucket]).div_(world_size())
        all_reduce(flat)
        _unflatten(flat, bucket)


def broadcast_tensors(tensors: Iterable[torch.Tensor], src: int = 0) -> None:
    """Copy tensors from rank `src` to all ranks, in place."""
    if not is_distributed():
        return
    tensors = list(tensors)
    _check_alike(tensors, "broadcast_tensors")
    for bucket in _buckets(tensors):
        flat = torch.cat([t.detach().reshape(-1) for t in bucket])
        dist.broadcast(flat, src)
        _unflatten(flat, bucket)


def broadcast_model(model: nn.Module, src: int = 0) -> None:
    """Give all ranks the parameters and buffers of rank `src`."""
    broadcast_tensors([*model.parameters(), *model.buffers()], src)


def _check_alike(tensors: Sequence[torch.Tensor], what: str) -> None:
    """Refuse tensors that differ between ranks: a collective would hang, or mix them up.

    Ranks with no tensor at all take part too, so the check itself can't hang.
    """
    described = ";".join(f"{tuple(t.shape)}{t.dtype}" for t in tensors)
    mine = [len(tensors), zlib.crc32(described.encode())]
    everyone = _gather_ints(mine)
    if any(other != mine for other in everyone):
        counts = ", ".join(f"rank {r}: {count}" for r, (count, _) in enumerate(everyone))
        raise RuntimeError(
            f"{what}: ranks disagree on the tensors (number of tensors by rank: {counts}); "
            "number, order, shapes and dtypes must be the same on all ranks"
        )


def _gather_ints(values: list[int]) -> list[list[int]]:
    """Return a list of integers of each rank, all of the same length; cheaper than objects."""
    where = torch.device("cuda") if dist.get_backend() == "nccl" else torch.device("cpu")
    mine = torch.tensor(values, dtype=torch.int64, device=where)
    all_ranks = [torch.empty_like(mine) for _ in range(world_size())]
    dist.all_gather(all_ranks, mine)
    return [other.tolist() for other in all_ranks]


def _buckets(tensors: Iterable[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Group tensors of one dtype and device, in order, until a bucket is full."""
    open_buckets: dict[Any, list[torch.Tensor]] = {}
    for tensor in tensors:
        bucket = open_buckets.setdefault((tensor.dtype, tensor.device), [])
        bucket.append(tensor)
        if sum(t.nbytes for t in bucket) >= BUCKET_BYTES:
            yield open_buckets.pop((tensor.dtype, tensor.device))
    yield from open_buckets.values()


def _unflatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """Copy the parts of a flat tensor back to where they came from."""
    with torch.no_grad():
        for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))


# ------------------------------------------------------------------------ gradients and models


def wrap(model: nn.Module) -> nn.Module:
    """Wrap a model in DistributedDataParallel; alone, return it as it is."""
    if not is_distributed():
        return model
    on_cuda = next(model.parameters()).device.type == "cuda"
    return nn.parallel.DistributedDataParallel(
        model, device_ids=[torch.cuda.current_device()] if on_cuda else None
    )


def sync_gradients(params: Iterable[nn.Parameter]) -> None:
    """Average gradients over ranks, after the backward pass.

    A parameter without a gradient on some ranks counts as zero there; one without on all ranks
    stays without.
    """
    with eager_sync_gradients(params):
        pass


@contextmanager
def eager_sync_gradients(params: Iterable[nn.Parameter]) -> Iterator[None]:
    """Average gradients over ranks while the backward pass in the body is still computing others.

    To accumulate gradients, wrap the backward pass of the last micro-batch only.
    """
    if not is_distributed():
        yield
        return
    trained = [p for p in params if p.requires_grad]
    _check_alike(trained, "sync_gradients")
    # Backward reaches the last parameters first.
    buckets = [_GradientBucket(bucket) for bucket in _buckets(reversed(trained))]  # type: ignore[arg-type]
    owner = {param: bucket for bucket in buckets for param in bucket.params}

    def ready(param: nn.Parameter) -> None:
        owner[param].arrive(param)
        for bucket in buckets:  # all ranks start the buckets in this order
            if bucket.missing:
                return
            if bucket.work is None:
                bucket.start()

    hooks = [param.register_post_accumulate_grad_hook(ready) for param in trained]
    try:
        yield  # on an exception no rank is waited for
    finally:
        for hook in hooks:
            hook.remove()
    for bucket in buckets:
        bucket.finish()


class _GradientBucket:
    """Gradients that travel together, with one element each that tells who has a gradient."""

    def __init__(self, params: list[nn.Parameter]) -> None:
        self.params = params
        self.missing = set(params)
        self.work: Any = None

    def arrive(self, param: nn.Parameter) -> None:
        """Note that a parameter has its gradient."""
        if param not in self.missing:
            raise RuntimeError(
                "a second backward pass inside eager_sync_gradients: "
                "wrap the last one only, gradients of earlier ones add up by themselves"
            )
        self.missing.discard(param)

    def start(self) -> None:
        """Send the gradients off; those that are not there count as zero."""
        flags = [0.0 if p.grad is None else 1.0 for p in self.params]
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.params]
        parts = [g.reshape(-1) for g in grads] + [grads[0].new_tensor(flags)]
        # Divided before the sum, which might overflow in half precision.
        self.flat = torch.cat(parts).div_(world_size())
        self.work = dist.all_reduce(self.flat, async_op=True)

    def finish(self) -> None:
        """Wait for the average and put it in place."""
        if self.work is None:
            self.start()
        self.work.wait()
        *grads, flags = self.flat.split([p.numel() for p in self.params] + [len(self.params)])
        for param, grad, flag in zip(self.params, grads, flags, strict=True):
            if param.grad is not None:
                param.grad.copy_(grad.view_as(param))
            elif flag != 0:  # waits for the device, where a parameter is unused on this rank
                param.grad = grad.view_as(param).clone()


def sync_model(model: nn.Module, sync_buffers: bool = True, average_buffers: bool = True) -> None:
    """Synchronise a model after its backward pass: an alternative to DistributedDataParallel.

    Args:
        sync_buffers: synchronise the buffers as well.
        average_buffers: average floating point buffers over ranks; else take those of rank zero.
            Integer buffers (such as counters) are always those of rank zero.
    """
    sync_gradients(model.parameters())
    if sync_buffers:
        _sync_buffers(model, average_buffers)


@contextmanager
def eager_sync_model(
    model: nn.Module, sync_buffers: bool = True, average_buffers: bool = True
) -> Iterator[None]:
    """Like `sync_model`, but around the backward pass and overlapped with it."""
    with eager_sync_gradients(model.parameters()):
        yield
    if sync_buffers:
        _sync_buffers(model, average_buffers)


def _sync_buffers(model: nn.Module, average: bool) -> None:
    buffers = list(model.buffers())
    averaged = [b for b in buffers if average and (b.is_floating_point() or b.is_complex())]
    average_tensors(averaged)
    chosen = {id(b) for b in averaged}
    broadcast_tensors([b for b in buffers if id(b) not in chosen])
