"""Memory of ranks that save and load a model spread over them: `python -m bench.sharded`."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import harness
from .harness import ROOT, Row, Section, Spread

RANKS, LAYERS, WIDTH = 2, 20, 2048  # weights of 336 MB, a state of 1 GB
MB = 2**20


class Peak:
    """The highest memory of this process above that at the start, without mapped files."""

    def __enter__(self) -> Peak:
        self.before = self.highest = self.now()
        self.ended = threading.Event()
        self.watch = threading.Thread(target=self.look, daemon=True)
        self.watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.watch.join()
        self.above = (max(self.highest, self.now()) - self.before) / MB

    def look(self) -> None:
        while not self.ended.wait(0.002):
            self.highest = max(self.highest, self.now())

    @staticmethod
    def now() -> float:
        """Bytes."""
        lines = Path("/proc/self/status").read_text().splitlines()
        [anonymous] = [line.split()[1] for line in lines if line.startswith("RssAnon")]
        return float(anonymous) * 1024


def make(folder: Path, sharded: bool) -> Any:
    """Return a solver with a model under `fully_shard`, and the state of its optimizer."""
    import torch
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    from core import BaseSolver, checkpoint, distrib

    class Solver(BaseSolver):
        def __init__(self) -> None:
            super().__init__(folder, checkpoint.Policy(sharded=sharded, background=False))
            layers = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)]
            self.model = nn.Sequential(*layers)
            mesh = init_device_mesh("cpu", (distrib.world_size(),))
            for part in (*layers, self.model):
                fully_shard(part, mesh=mesh)
            self.optim = torch.optim.AdamW(self.model.parameters())
            self.register_stateful("model", "optim")

    return Solver()


def work(folder: Path, sharded: bool, what: str) -> dict[str, float]:
    """Save or load on this rank; return the size of its share, and what is added, in MB."""
    import torch

    from core import distrib

    torch.set_num_threads(1)
    distrib.init()
    solver = make(folder, sharded)
    if what == "load":
        with Peak() as peak:
            solver.restore()
    else:
        for parameter in solver.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        solver.optim.step()
        solver.optim.zero_grad()
        solver.restore()
        with Peak() as peak:
            solver.commit()
    distrib.barrier()
    tensors = [*solver.model.parameters()]
    tensors += [value for state in solver.optim.state.values() for value in state.values()]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return {"share": sum(tensor.nbytes for tensor in local) / MB, "peak": peak.above}


def ranks(*args: str) -> list[dict[str, float]]:
    """Run `work` on all ranks; return what they found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(RANKS)}
    env |= {"MALLOC_MMAP_THRESHOLD_": str(MB)}  # so that freed memory goes back to the system
    command = [sys.executable, "-m", "bench.sharded", "--work", *args]
    processes = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"RANK": str(r)}, stdout=subprocess.PIPE)
        for r in range(RANKS)
    ]
    said = [process.communicate()[0].decode() for process in processes]
    return [json.loads(text.splitlines()[-1]) for text in said]


def measure(quick: bool = False) -> Iterator[Section]:
    """Save and load, in both ways."""
    rows = []
    tensor = WIDTH * WIDTH * 4 / MB
    for name, sharded in (("one file", "0"), ("`checkpoint.sharded`", "1")):
        with tempfile.TemporaryDirectory() as folder:
            for what in ("save", "load"):
                for rank, found in enumerate(ranks(folder, sharded, what)):
                    target = found["share"] + tensor if rank else None
                    taken = Spread.of([found["peak"]])
                    note = f"its share is {found['share']:.0f} MB"
                    rows.append(
                        Row(f"{name}: {what}, rank {rank}", taken, target=target, note=note)
                    )
    about = (
        f"What a save and a load of 1 GB of state add to the memory of {RANKS} ranks, without "
        f"mapped files. The model is under `fully_shard`; a tensor has {tensor:.0f} MB."
    )
    yield Section("Memory of a model spread over ranks", about, ("MB", ".0f"), ("", ""), rows)


if __name__ == "__main__":
    if "--work" in sys.argv:
        place, kind, action = sys.argv[-3:]
        print("\n" + json.dumps(work(Path(place), kind == "1", action)))
    else:
        harness.main(measure)
