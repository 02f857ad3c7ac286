"""Run a function on several ranks: real processes, real gloo."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.multiprocessing as mp

from .. import distrib

# Forked from a process that has imported torch already, which takes seconds, and no more.
CONTEXT: Any = mp.get_context("forkserver" if sys.platform == "linux" else "spawn")
if sys.platform == "linux":
    CONTEXT.set_forkserver_preload(["torch._dynamo", __name__])


def on_ranks(function: Callable[..., Any], *args: Any, ranks: int = 2) -> list[Any]:
    """Call `function(*args)` on each rank; return what they return, or raised, by rank.

    There is no limit of time here but pytest's own, `timeout` in pyproject.toml.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    env["WORLD_SIZE"] = str(ranks)
    results = CONTEXT.SimpleQueue()
    processes = [
        CONTEXT.Process(target=_work, args=(function, args, env | {"RANK": str(rank)}, results))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.kill()
    found = dict(results.get() for _ in processes if not results.empty())
    return [found.get(rank, "no result") for rank in range(ranks)]


def _work(
    function: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], results: Any
) -> None:
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    rank = distrib.rank()
    try:
        distrib.init()
        results.put((rank, function(*args)))
    except Exception:
        results.put((rank, traceback.format_exc()))
