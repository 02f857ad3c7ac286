"""How long a training step on two processes takes, as a multiple of one under DDP.

Three models: many small tensors, a transformer, a few big tensors. All ways take turns within one
pair of gloo processes: `python -m bench.sync [rounds]`. Flashy takes part where it is installed.
"""

import os
import random
import socket
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.spawn import spawn

from core import distrib

Step = Callable[[], None]


def small() -> tuple[nn.Module, torch.Tensor]:
    """240 tensors, 0.5 million parameters."""
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(120)]
    return nn.Sequential(*layers), torch.randn(32, 64)


def transformer() -> tuple[nn.Module, torch.Tensor]:
    """48 tensors, 3.2 million parameters."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(4, 32, 256)


def big() -> tuple[nn.Module, torch.Tensor]:
    """6 tensors, 12.6 million parameters."""
    layers = [nn.Linear(2048, 2048) for _ in range(3)]
    return nn.Sequential(*layers), torch.randn(8, 2048)


MODELS = [small, transformer, big]


def ways(build: Callable[[], tuple[nn.Module, torch.Tensor]]) -> dict[str, Step]:
    """One step of training of a model, in each way to average the gradients."""

    def step(
        around: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext(),
        after: Callable[[nn.Module], Any] = lambda model: None,
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> Step:
        torch.manual_seed(0)
        model, batch = build()
        wrapped = wrap(model)
        optim = torch.optim.SGD(model.parameters(), lr=1e-6)

        def run() -> None:
            optim.zero_grad()
            loss = wrapped(batch).pow(2).mean()
            with around(model):
                loss.backward()
            after(model)
            optim.step()

        return run

    found = {
        "DDP": step(wrap=nn.parallel.DistributedDataParallel),
        "sync_model": step(after=distrib.sync_model),
        "eager_sync_model": step(around=distrib.eager_sync_model),
    }
    try:
        from flashy import distrib as flashy
    except ImportError:
        return found
    found["Flashy sync_model"] = step(after=flashy.sync_model)
    found["Flashy eager_sync_model"] = step(around=flashy.eager_sync_model)
    return found


def measure(rank: int, port: int, rounds: int) -> None:
    """Print the ratios, from rank zero."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    distrib.init()
    for build in MODELS:
        steps = ways(build)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(rounds + 3):
            turns = list(steps.items())
            random.Random(number).shuffle(turns)
            for name, step in turns:
                distrib.barrier()
                begin = time.perf_counter()
                for _ in range(3):
                    step()
                if number >= 3:
                    times[name].append((time.perf_counter() - begin) / 3)
        if rank == 0:
            base = statistics.median(times["DDP"])
            print(f"{build.__name__}: {build.__doc__} DDP takes {base * 1e3:.1f} ms a step.")
            for name, taken in times.items():
                # Rounds are compared with their own DDP, for the machine is now fast, now slow.
                ratios = [t / d for t, d in zip(taken, times["DDP"], strict=True)]
                low, ratio, high = statistics.quantiles(ratios, n=4)
                print(f"    {name:26}{ratio:6.2f}   ({low:.2f} to {high:.2f})")


def main(rounds: str = "60") -> None:
    """Start two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(measure, (port, int(rounds)), 2)


if __name__ == "__main__":
    main(*sys.argv[1:])
