"""The process group: ranks, rendezvous, device.

Everything here also works in a single process, where it does nothing.
"""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from .utils import UserError
from .xp import GRACE, rendezvous_file

logger = logging.getLogger(__name__)

_store: Store | None = None  # entries of each rank, outside of all collectives
_broken = False  # a collective failed, and may never end


# --------------------------------------------------------------------------------------- ranks


class Place(NamedTuple):
    """Where this process stands among all processes of the run, and on its machine."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int


def place() -> Place:
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
    return dist.get_rank() if is_initialized() else place().rank


def world_size() -> int:
    """Number of processes; right also before `init`."""
    return dist.get_world_size() if is_initialized() else place().world_size


def is_rank_zero() -> bool:
    """Is this the process that writes files and speaks to the user?"""
    return rank() == 0


def store() -> Store | None:
    """Small entries that all ranks can write and read, outside of collectives; None if alone."""
    return _store


def is_initialized() -> bool:
    """Has this process joined the process group?"""
    return dist.is_available() and dist.is_initialized()


# --------------------------------------------------------------------------------------- start


def init(backend: str | None = None, timeout: float = 1800.0) -> None:
    """Join the process group, if this process was started as one of several.

    Args:
        backend: defaults to nccl for tensors on CUDA, and gloo for others.
        timeout: seconds after which a collective that misses a rank fails. Ranks that are in
            different collectives, or gone, are noticed within seconds.
    """
    global _store
    here = place()
    if is_initialized() or here.world_size == 1:
        return
    cuda = torch.cuda.is_available()
    if backend == "nccl" and not cuda:
        raise UserError("backend nccl needs CUDA, which is not available: use gloo")
    if cuda:
        torch.cuda.set_device(here.local_rank % torch.cuda.device_count())
    elif "OMP_NUM_THREADS" not in os.environ:
        # Processes that each take all cores slow one another down manyfold.
        torch.set_num_threads(max(1, torch.get_num_threads() // here.local_world_size))
    _store = _join(here, backend, timedelta(seconds=timeout))
    atexit.register(_leave_at_exit)
    if sys.version_info < (3, 12):
        os.register_at_fork(before=_settle_before_fork)
    _end_with_launcher()
    logger.info("Process group: rank %d of %d, %s", rank(), world_size(), dist.get_backend())


def _join(here: Place, backend: str | None, timeout: timedelta) -> Store:
    """Meet the other ranks; return a store for small entries outside of collectives."""
    # Its functions have the process group of the moment of their import as a default argument.
    # Were that ours, it would outlive `leave`, and its threads might crash the end of Python.
    importlib.import_module("torch.distributed.nn.functional")
    where = _rendezvous(here)
    try:
        store, _, _ = next(rendezvous(where, here.rank, here.world_size, timeout=timeout))
    except (dist.DistError, ValueError) as error:
        why = str(error).splitlines()[0]
        raise UserError(
            f"rank {here.rank} of {here.world_size} can't meet the others at {where}: {why}. Is "
            "the address right, the port free, and does each process run?"
        ) from error
    store.set_timeout(timeout)
    # Python objects travel between CPUs and never wait for a GPU.
    if torch.cuda.is_available() and backend in (None, "nccl"):
        backend = "cpu:gloo,cuda:nccl"
    dist.init_process_group(
        backend or "gloo",
        store=PrefixStore("group", store),
        rank=here.rank,
        world_size=here.world_size,
        timeout=timeout,
    )
    return PrefixStore("whereabouts", store)


def _rendezvous(here: Place) -> str:
    """Where the ranks meet: at a given address, at Slurm's first node, or at a file of the run."""
    if "MASTER_PORT" in os.environ:
        return "env://"
    if "SLURM_JOB_NODELIST" in os.environ and "SUBMITIT_EXECUTOR" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        job = TorchDistributedEnvironment()
        return f"tcp://{os.environ.get('MASTER_ADDR', job.master_addr)}:{job.master_port}"
    if (meeting := rendezvous_file()) is not None:
        return f"file://{meeting}"
    raise UserError(
        f"rank {here.rank} of {here.world_size} does not know where to meet the others: "
        "set MASTER_ADDR and MASTER_PORT, or start with `dora run -d` or torchrun"
    )


def _end_with_launcher() -> None:
    """Stop this process if what started it, Dora or torchrun, is killed: else it trains unseen."""
    if rendezvous_file() is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)  # a request to stop, and to save
        time.sleep(GRACE)
        os._exit(1)  # it may be stuck in a collective; a checkpoint is safe at any time

    threading.Thread(target=watch, daemon=True, name="launcher").start()


def _settle_before_fork() -> None:
    """Let gloo's threads end what they do before a fork, such as that of a loader's worker.

    Until 3.12, a child hangs if another thread was creating its Python state at that moment
    (CPython's issue 112275), as gloo's do to free the tensors of a collective that just ended.
    """
    time.sleep(0.002)


def leave() -> None:
    """Leave the process group, if in one."""
    global _store
    if is_initialized():
        dist.destroy_process_group()
        _store = None


def report_failure(error: BaseException) -> None:
    """Post that this rank ends with an error, for rank zero to show it."""
    if _store is not None:
        with suppress(RuntimeError):
            _store.set(f"failed {rank()}", f"{type(error).__name__}: {error}")


def failures() -> dict[int, str]:
    """The error of each rank that posted one."""
    failed = {}
    for other in range(world_size()):
        with suppress(RuntimeError):
            if _store is not None and _store.check([f"failed {other}"]):
                failed[other] = _store.get(f"failed {other}").decode()
    return failed


def mark_broken() -> None:
    """Let this process end without waiting for a collective that failed, and may never end."""
    global _broken
    _broken = True


def _leave_at_exit() -> None:
    failed = failures()
    for other, error in failed.items():
        if is_rank_zero() and error != failed.get(rank()):  # nor what all ranks have met
            logger.error("Rank %d failed: %s", other, error)
    if _broken:  # the collective would hold us here until its timeout
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)
    leave()


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
            raise UserError("device=cuda: CUDA is not available here; use device=cpu or auto")
        return torch.device("cuda", place().local_rank % torch.cuda.device_count())
    try:
        return torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: there are auto, cpu, cuda and mps") from None
