"""How long a training step on two processes takes, beside DDP: `python -m bench.sync`.

Three models: many small tensors, a transformer, a few big tensors. All ways take turns within one
pair of gloo processes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.spawn import spawn

from . import harness
from .harness import OURS, Section, compare, interleave

STEPS = 2  # in a turn

Model = Callable[[], tuple[nn.Module, torch.Tensor]]
Way = Callable[[], float]


def small() -> tuple[nn.Module, torch.Tensor]:
    """240 small tensors, 0.5 million parameters."""
    layers = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(120)]
    return nn.Sequential(*layers), torch.randn(32, 64)


def transformer() -> tuple[nn.Module, torch.Tensor]:
    """A transformer of 48 tensors, 3.2 million parameters."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False), torch.randn(4, 32, 256)


def big() -> tuple[nn.Module, torch.Tensor]:
    """6 big tensors, 12.6 million parameters."""
    layers = [nn.Linear(2048, 2048) for _ in range(3)]
    return nn.Sequential(*layers), torch.randn(8, 2048)


TARGETS = {small: 1.0, transformer: 1.0, big: 0.9}


def ways(build: Model) -> dict[str, Way]:
    """Some steps of training of a model, in each way to average the gradients."""
    from core import distrib

    def way(
        around: Callable[[nn.Module], AbstractContextManager[Any]] = lambda model: nullcontext(),
        after: Callable[[nn.Module], Any] = lambda model: None,
        wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    ) -> Way:
        torch.manual_seed(0)
        model, batch = build()
        wrapped = wrap(model)
        optim = torch.optim.SGD(model.parameters(), lr=1e-6)

        def step() -> None:
            optim.zero_grad()
            loss = wrapped(batch).pow(2).mean()
            with around(model):
                loss.backward()
            after(model)
            optim.step()

        def turn() -> float:
            distrib.barrier()
            begin = time.perf_counter()
            for _ in range(STEPS):
                step()
            return (time.perf_counter() - begin) / STEPS

        return turn

    found = {
        "DDP": way(wrap=nn.parallel.DistributedDataParallel),
        f"{OURS}, `eager_sync_model`": way(around=distrib.eager_sync_model),
        f"{OURS}, `sync_model`": way(after=distrib.sync_model),
    }
    try:
        from flashy import distrib as flashy
    except ImportError as error:
        return found | {"Flashy": _absent(error)}
    found["Flashy, `eager_sync_model`"] = way(around=flashy.eager_sync_model)
    found["Flashy, `sync_model`"] = way(after=flashy.sync_model)
    return found


def _absent(error: ImportError) -> Way:
    def turn() -> float:
        raise error

    return turn


def work(rank: int, port: int, quick: bool, results: str) -> None:
    """One of two processes; the first writes the results."""
    from core import distrib

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    torch.set_num_threads(1)
    distrib.init()
    sections = []
    for build, target in [*TARGETS.items()][: 1 if quick else 3]:
        rounds = 2 if quick else 20
        times, failed = interleave(ways(build), rounds, warmup=2)
        targets = {f"{OURS}, `eager_sync_model`": target}
        rows = compare(times, failed, "DDP", 1e3, ratio=True, targets=targets)
        title = f"Gradient sync, {(build.__doc__ or '').split(',')[0].removeprefix('A ')}"
        about = (
            f"{build.__doc__} Two gloo processes on one machine, a whole step of training; "
            f"{rounds} rounds of {STEPS} steps."
        )
        compared = "times DDP, in its round", ".2f"
        sections.append(Section(title, about, ("ms a step", ".1f"), compared, rows, plot=title))
    if rank == 0:
        Path(results).write_text(json.dumps([dataclasses.asdict(s) for s in sections]))


def measure(quick: bool = False) -> Iterator[Section]:
    """The three models; the first alone if it is to be quick."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder, "results.json")
        spawn(work, (port, quick, str(results)), 2)
        for found in json.loads(results.read_text()):
            yield Section.from_dict(found)


if __name__ == "__main__":
    harness.main(measure)
