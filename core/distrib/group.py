"""The process group: where ranks meet, and how they leave."""

from __future__ import annotations

import atexit
import importlib
import logging
import os
import signal
import sys
import threading
import time
from concurrent.futures import Future, wait
from contextlib import suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from ..utils import UserError
from .board import notes, this_process
from .ranks import device_kind, is_distributed, is_rank_zero, launched, rank, world_size
from .watch import watch_device

logger = logging.getLogger(__name__)

GRACE = 60.0  # seconds in which a process that was asked to stop must have saved
WAIT = 30.0  # seconds between two notes that other ranks are missing
# At a timeout, NCCL writes the last collectives of each rank to a file, for `torchfrtrace`.
NCCL = {"TORCH_NCCL_DUMP_ON_TIMEOUT": "1", "TORCH_FR_BUFFER_SIZE": "2000"}


def init(backend: str | None = None, timeout: float = 1800.0) -> None:
    """Join the process group, if the run has several processes.

    Args:
        backend: defaults to NCCL for tensors on CUDA, and gloo for others.
        timeout: of a collective, in seconds. Ranks in different collectives, or gone, are noticed
            within seconds.
    """
    if dist.is_initialized() or not is_distributed():
        return
    found = device_kind()
    if backend == "nccl" and found != "cuda":
        raise UserError("backend nccl needs CUDA, which is not available: use gloo")
    if found != "cpu":
        if backend in (None, "nccl"):  # objects travel between CPUs, and never wait for a device
            if (name := dist.Backend.default_device_backend_map.get(found)) is None:
                raise UserError(f"{found}: PyTorch knows no backend, pass init(backend=...)")
            backend = f"cpu:gloo,{found}:{name}"
    elif "OMP_NUM_THREADS" not in os.environ:
        # Processes that each take all cores slow one another down manyfold.
        here = launched("LOCAL_WORLD_SIZE", world_size())
        torch.set_num_threads(max(1, torch.get_num_threads() // here))
    atexit.register(_leave_at_exit)
    if this_process.meeting_point() != "env://" or "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    for name, value in NCCL.items():
        os.environ.setdefault(name, value)
    _join(backend or "gloo", timedelta(seconds=timeout))
    watch_device(found)
    if sys.version_info < (3, 12):
        # Gloo's threads free the tensors of a collective that just ended. A child forked at this
        # moment, such as a loader's worker, would hang (CPython's issue 112275).
        os.register_at_fork(before=lambda: time.sleep(0.002))
    logger.info("Process group: rank %d of %d, %s", rank(), world_size(), dist.get_backend())


def _join(backend: str, timeout: timedelta) -> None:
    """Meet the other ranks, at the address in the environment or in Dora's file."""
    where = "env://" if "MASTER_PORT" in os.environ else this_process.meeting_point()
    here = f"rank {rank()} of {world_size()}"
    meeting = Future[None]()
    # In a thread, so that this one hears signals; torch would not end the wait for them.
    threading.Thread(target=_meet, args=(meeting, where, backend, timeout), daemon=True).start()
    this_process.broken = True  # so that an exit does not wait for the thread
    while not meeting.done():
        wait([meeting], WAIT)
        if not meeting.done():
            logger.warning("%s waits for the others at %s", here.capitalize(), where)
    this_process.broken = False
    try:
        meeting.result()
    except (dist.DistError, ValueError) as error:
        raise UserError(
            f"{here} can't meet the others at {where}: {str(error).splitlines()[0]}. "
            "Are address and port right? `dora run -d` sets both"
        ) from error


def _meet(meeting: Future[None], where: str, backend: str, timeout: timedelta) -> None:
    # Its functions have the process group of the moment of their import as a default argument. Were
    # that ours, it would outlive `leave`, and its threads might crash the end of Python.
    importlib.import_module("torch.distributed.nn.functional")
    try:
        store, number, size = next(rendezvous(where, rank(), world_size(), timeout=timeout))
        store.set_timeout(timeout)
        # After a restart by torchrun, its store still holds the notes of the failed processes.
        store = PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        dist.init_process_group(backend, timeout=timeout, world_size=size, rank=number, store=store)
        meeting.set_result(None)
    except BaseException as error:
        meeting.set_exception(error)


def _end_with(launcher: int) -> None:
    """Stop this process when its launcher, Dora or torchrun, was killed, not to train unseen."""
    while os.getppid() == launcher:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGTERM)  # a request to stop, and to save
    time.sleep(GRACE)
    os._exit(1)  # it may be stuck in a collective; a checkpoint is safe at any time


def leave() -> None:
    """Leave the process group, if in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _leave_at_exit() -> None:
    failed = notes("failed")
    for other, error in failed.items():
        if is_rank_zero() and error not in failed.get(0, ""):  # nor what all ranks have met
            logger.error("Rank %d failed: %s", other, error)
    if this_process.broken:  # the collective would hold us here until its timeout
        logging.shutdown()  # flushes stderr too
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(1)
    leave()
