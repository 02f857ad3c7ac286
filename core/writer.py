"""A background writer: it copies a state to host memory, and the training continues."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

from . import distrib
from .modules import gathered
from .plain import to_plain
from .state import StateDict

logger = logging.getLogger(__name__)

LIMIT = 600.0  # seconds of a write that needs other ranks, after which this process ends

# One thread is enough for a process; Python waits for it before it ends.
_threads = ThreadPoolExecutor(1, "checkpoint")


def wait_for_writes() -> None:
    """Wait for all writes of this process."""
    _threads.submit(int).result()


class Writer:
    """A background writer of states, one at a time, from a copy in host memory.

    The memory of a copy is used again for the next state, as new memory takes time.

    Args:
        shards: folder for sharded tensors; by default, rank zero gathers them, one at a time.
    """

    def __init__(self, shards: Path | None = None) -> None:
        self._folder = shards
        self._copies: dict[Any, torch.Tensor] = {}
        self._pending: Future[None] | None = None

    def submit(self, state: StateDict, write: Callable[[StateDict], None]) -> None:
        """Copy the state; later, `write` the copy on rank zero. All ranks must take part."""
        self.wait()
        spare, self._copies = self._copies, {}
        sources: list[torch.Tensor] = []  # alive until all are copied, or two may share an address
        shards = self._shards()

        def part(tensor: Any, name: str) -> Any:
            if hasattr(tensor, "placements"):
                return shards.add(name, tensor, copy) if shards else gathered(tensor, False)
            return copy(tensor) if distrib.is_rank_zero() else tensor

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.layout != torch.strided:  # such as a sparse one
                return tensor.detach().to("cpu", copy=True)
            sources.append(tensor)
            # Tied tensors stay tied; a view does not drag along all of its storage.
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if key not in self._copies:
                pin = tensor.device.type not in ("cpu", "mps")
                if key not in spare:
                    spare[key] = torch.empty_like(tensor, device="cpu", pin_memory=pin)
                self._copies[key] = spare[key].copy_(tensor.detach(), non_blocking=pin)
            return self._copies[key]

        copied = to_plain(state, copy=part)
        devices = {tensor.device for tensor in sources if not tensor.is_cpu}
        ends = [torch.accelerator.current_stream(device).record_event() for device in devices]

        def work() -> None:
            time.sleep(0.005)  # else Python lets this thread run first, and the training waits
            for end in ends:
                end.synchronize()
            if shards is not None:
                shards.save(copied, write)
            elif distrib.is_rank_zero():
                write(copied)

        self._pending = _threads.submit(work)

    def _shards(self) -> Any:
        if self._folder is None or not distrib.is_distributed():
            return None
        from .sharded import Shards  # a slow import

        return Shards(self._folder)

    def is_busy(self) -> bool:
        """Return whether a write is in flight."""
        return self._pending is not None and not self._pending.done()

    def settle(self) -> None:
        """Wait for the write in flight, if any; log its error."""
        pending = [] if self._pending is None else [self._pending]
        if self._folder is not None and wait(pending, LIMIT).not_done:
            logger.critical("A save did not end: another rank hangs, see its log")
            os._exit(1)
        try:
            self.wait()
        except Exception as error:
            logger.error("%s", error)

    def wait(self) -> None:
        """Wait for the write in flight, if any; raise its error, once."""
        if self._pending is not None:
            self._pending.exception()  # waits; if Ctrl-C ends the wait, `settle` waits again
            ended, self._pending = self._pending, None
            ended.result()
