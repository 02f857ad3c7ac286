"""Run a function on several ranks: real processes, real gloo."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

from .. import distrib


def on_ranks(
    function: Callable[..., Any], *args: Any, ranks: int = 2, timeout: int = 60
) -> list[Any]:
    """Call `function(*args)` on each rank; return what they return, or raised, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_work, args=(function, args, rank, ranks, port, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout)
        if process.is_alive():
            process.kill()
            raise TimeoutError(f"{function.__name__} hangs")
    found = dict(results.get() for _ in processes if not results.empty())
    return [found.get(rank, "no result") for rank in range(ranks)]


def _work(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    ranks: int,
    port: int,
    results: Any,
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    try:
        distrib.init(timeout=60)
        results.put((rank, function(*args)))
    except Exception:
        results.put((rank, traceback.format_exc()))
