"""The process group: ranks, rendezvous, device."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..utils import UserError

logger = logging.getLogger(__name__)

GRACE = 60.0  # seconds in which a process that was asked to stop must have saved


@dataclass
class ThisProcess:
    """Knowledge of this process about its group.

    Args:
        store: of notes for all ranks, outside of collectives.
        broken: a collective failed, and may never end.
        meeting_file: returns the file where Dora's processes on a machine meet, else None.
    """

    store: Store | None = None
    broken: bool = False
    meeting_file: Callable[[], Path | None] = lambda: None


this_process = ThisProcess()


class Launched(NamedTuple):
    """The rank of this process in the run, and on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1


def launched() -> Launched:
    """Read our ranks from the launcher: Dora, torchrun or a script (environment), or Slurm."""
    env = os.environ
    if "WORLD_SIZE" in env:
        rank, world = int(env.get("RANK", 0)), int(env["WORLD_SIZE"])
        local_rank = int(env.get("LOCAL_RANK", rank))
        return Launched(rank, world, local_rank, int(env.get("LOCAL_WORLD_SIZE", world)))
    if "SUBMITIT_EXECUTOR" in env:
        from submitit import JobEnvironment

        job = JobEnvironment()
        tasks_here = job.num_tasks // job.num_nodes
        return Launched(job.global_rank, job.num_tasks, job.local_rank, tasks_here)
    return Launched()


def is_distributed() -> bool:
    """Return whether the run has several processes."""
    return world_size() > 1


def rank() -> int:
    """Return the index of this process; right also before `init`."""
    return dist.get_rank() if is_initialized() else launched().rank


def world_size() -> int:
    """Return the number of processes; right also before `init`."""
    return dist.get_world_size() if is_initialized() else launched().world_size


def is_rank_zero() -> bool:
    """Return whether this process writes files and speaks to the user."""
    return rank() == 0


def is_initialized() -> bool:
    """Return whether this process has joined the process group."""
    return dist.is_available() and dist.is_initialized()


def init(backend: str | None = None, timeout: float = 1800.0) -> None:
    """Join the process group, if the run has several processes.

    Args:
        backend: defaults to NCCL for tensors on CUDA, and gloo for others.
        timeout: of a collective, in seconds. Ranks in different collectives, or gone, are noticed
            within seconds.
    """
    here = launched()
    if is_initialized() or here.world_size == 1:
        return
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if backend == "nccl" and (accelerator is None or accelerator.type != "cuda"):
        raise UserError("backend nccl needs CUDA, which is not available: use gloo")
    if accelerator is not None:
        torch.accelerator.set_device_index(here.local_rank % torch.accelerator.device_count())
        if backend in (None, "nccl"):  # objects travel between CPUs, and never wait for a device
            default = dist.get_default_backend_for_device(accelerator)
            backend = f"cpu:gloo,{accelerator.type}:{default}"
    elif "OMP_NUM_THREADS" not in os.environ:
        # Processes that each take all cores slow one another down manyfold.
        torch.set_num_threads(max(1, torch.get_num_threads() // here.local_world_size))
    _join(here, backend or "gloo", timedelta(seconds=timeout))
    atexit.register(_leave_at_exit)
    if sys.version_info < (3, 12):
        # Gloo's threads free the tensors of a collective that just ended. A child forked at this
        # moment, such as a loader's worker, would hang (CPython's issue 112275).
        os.register_at_fork(before=lambda: time.sleep(0.002))
    _end_with_launcher()
    logger.info("Process group: rank %d of %d, %s", rank(), world_size(), dist.get_backend())


def _join(here: Launched, backend: str, timeout: timedelta) -> None:
    """Meet the other ranks, and open a store for notes."""
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
    dist.init_process_group(
        backend,
        store=PrefixStore("group", store),
        rank=here.rank,
        world_size=here.world_size,
        timeout=timeout,
    )
    this_process.store = PrefixStore("notes", store)


def _rendezvous(here: Launched) -> str:
    """Return where ranks meet: a given address, Slurm's first node, or a file of the run."""
    if "MASTER_PORT" in os.environ:
        return "env://"
    if "SLURM_JOB_NODELIST" in os.environ and "SUBMITIT_EXECUTOR" in os.environ:
        from submitit.helpers import TorchDistributedEnvironment

        job = TorchDistributedEnvironment()
        return f"tcp://{os.environ.get('MASTER_ADDR', job.master_addr)}:{job.master_port}"
    if (file := this_process.meeting_file()) is not None:
        return f"file://{file}"
    raise UserError(
        f"rank {here.rank} of {here.world_size} does not know where to meet the others: "
        "set MASTER_ADDR and MASTER_PORT, or start with `dora run -d` or torchrun"
    )


def _end_with_launcher() -> None:
    """Stop this process when its launcher, Dora or torchrun, was killed, not to train unseen."""
    if this_process.meeting_file() is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    launcher = os.getppid()

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)  # a request to stop, and to save
        time.sleep(GRACE)
        os._exit(1)  # it may be stuck in a collective; a checkpoint is safe at any time

    threading.Thread(target=watch, daemon=True, name="launcher").start()


def leave() -> None:
    """Leave the process group, if in one."""
    if is_initialized():
        dist.destroy_process_group()
        this_process.store = None


def _leave_at_exit() -> None:
    from .board import failures

    failed = failures()
    for other, error in failed.items():
        if is_rank_zero() and error != failed.get(rank()):  # nor what all ranks have met
            logger.error("Rank %d failed: %s", other, error)
    if this_process.broken:  # the collective would hold us here until its timeout
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(1)
    leave()


def device(name: str = "auto") -> torch.device:
    """Return this process's device.

    Args:
        name: `auto` (the accelerator, if any), or a device such as `cuda` or `cpu`.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    found = accelerator.type if accelerator else "cpu"
    if name == "auto":
        name = "cpu" if found == "mps" and is_distributed() else found  # no collectives there
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise UserError(f"device={name}: there are auto, cpu, cuda and mps") from None
    if wanted.type not in ("cpu", found):
        raise UserError(f"device={name}: not available here; use device=cpu or auto")
    if wanted.type == "cpu" or ":" in name:
        return wanted
    return torch.device(found, launched().local_rank % torch.accelerator.device_count())
