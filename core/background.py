"""Writing in the background, from a copy of the state, while the training continues."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from .plain import to_plain

# One thread is enough for a process; Python waits for it before it ends.
_threads = ThreadPoolExecutor(1, "checkpoint")


def wait() -> None:
    """Wait for all writes of this process; their errors are raised by `Writer.wait`."""
    _threads.submit(int).result()


class Writer:
    """Saves in the background, one state at a time, from a copy in host memory.

    The copy's memory is kept for the next one, which spares the time to get it from the system.
    """

    def __init__(self) -> None:
        self._copies: dict[Any, torch.Tensor] = {}
        self._pending: Future[None] | None = None

    def submit(self, state: dict[str, Any], write: Callable[[dict[str, Any]], None]) -> None:
        """Copy the state, then call `write` with the copy in the background."""
        self.wait()
        spare, self._copies = self._copies, {}
        sources: list[torch.Tensor] = []  # alive until all are copied, or two may share an address

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.layout != torch.strided:  # such as a sparse one
                return tensor.detach().to("cpu", copy=True)
            sources.append(tensor)
            # Tied tensors stay tied; a view does not drag along all of its storage.
            key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if key not in self._copies:
                pin = tensor.is_cuda
                empty = spare.get(key)
                if empty is None:
                    empty = torch.empty_like(tensor, device="cpu", pin_memory=pin)
                self._copies[key] = empty.copy_(tensor.detach(), non_blocking=pin)
            return self._copies[key]

        copied = to_plain(state, copy=copy)
        done = torch.cuda.Event() if torch.cuda.is_initialized() else None
        if done is not None:
            done.record()

        def work() -> None:
            time.sleep(0.005)  # else Python lets this thread run first, and the training waits
            if done is not None:
                done.synchronize()
            write(copied)

        self._pending = _threads.submit(work)

    def wait(self) -> None:
        """Wait for the write in flight, if any; raise its error, once."""
        if self._pending is None:
            return
        try:
            self._pending.result()
        finally:
            if self._pending.done():
                self._pending = None
