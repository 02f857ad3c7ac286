"""How long the training waits for a checkpoint, beside `torch.save`: `python -m bench.checkpoint`.

All save the same model and its Adam state, to the same disk.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from . import harness
from .harness import OURS, Section, Spread, compare, interleave
from .peers import dora_xp, lightning_trainer

MEGABYTES = 300
TARGET = 0.15

Save = Callable[[], Any]


class State:
    """A model and its optimizer: together so many megabytes."""

    def __init__(self, megabytes: int, device: torch.device) -> None:
        size = 2**10
        layers = megabytes * 2**20 // (3 * 4 * size * size)  # weights, and two moments of each
        self.device = device
        self.model = nn.Sequential(*(nn.Linear(size, size) for _ in range(layers))).to(device)
        self.optim = torch.optim.Adam(self.model.parameters(), lr=1e-6)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn_like(parameter)
        self.optim.step()
        self.optim.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """All of it."""
        return {"model": self.model.state_dict(), "optim": self.optim.state_dict()}


def plain(state: State, folder: Path) -> Save:
    """What most loops do."""
    return lambda: torch.save(state.state_dict(), folder / "plain.th")


def flashy(state: State, folder: Path) -> Save:
    """The commit of its solver, within a run of Dora."""
    from flashy import BaseSolver

    class Solver(BaseSolver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model, self.optim = state.model, state.optim
            self.register_stateful("model", "optim")

    with dora_xp(folder).enter():
        solver: Any = Solver()
    return lambda: solver.commit()


def fabric(state: State, folder: Path) -> Save:
    """Its `save`."""
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator=state.device.type, devices=1)
    model, optim = fabric.setup(state.model, state.optim)
    return lambda: fabric.save(folder / "fabric.ckpt", {"model": model, "optim": optim})


def accelerate(state: State, folder: Path) -> Save:
    """Its `save_state`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=state.device.type == "cpu")
    accelerator.prepare(state.model, state.optim)
    return lambda: accelerator.save_state(str(folder / "accelerate"))


def ignite(state: State, folder: Path) -> Save:
    """Its `Checkpoint`, with a `DiskSaver`."""
    from ignite.engine import Engine
    from ignite.handlers import Checkpoint, DiskSaver

    saver = DiskSaver(str(folder / "ignite"), require_empty=False)
    save = Checkpoint({"model": state.model, "optim": state.optim}, saver, include_self=False)
    engine = Engine(lambda engine, batch: None)

    def run() -> None:
        engine.state.iteration += 1
        save(engine)

    return run


def lightning(state: State, folder: Path) -> Save:
    """Its `save_checkpoint`, after a step of training."""
    trainer = lightning_trainer(state.model, state.optim, folder, torch.zeros(1, 2**10))
    return lambda: trainer.save_checkpoint(folder / "lightning.ckpt")


PEERS: dict[str, Callable[[State, Path], Save]] = {
    "`torch.save`": plain,
    "Flashy": flashy,
    "ignite": ignite,
    "Fabric": fabric,
    "Accelerate": accelerate,
    "Lightning": lightning,
}


class Ours:
    """A solver with that state."""

    def __init__(self, state: State, folder: Path) -> None:
        from core import BaseSolver

        self.solver: Any = BaseSolver(folder)
        self.solver.model, self.solver.optim = state.model, state.optim
        self.solver.register_stateful("model", "optim")

    def commit(self) -> float:
        """Seconds that the training waits."""
        from core.writer import wait_for_writes

        begin = time.perf_counter()
        self.solver.commit()
        waited = time.perf_counter() - begin
        wait_for_writes()
        return waited

    def slowdown(self) -> float:
        """How much longer a step of a small model takes while a checkpoint is written."""
        from core.writer import wait_for_writes

        step = small_step()
        path = self.solver.checkpoint_path
        alone, begin = 0, time.perf_counter()
        while (usual := time.perf_counter() - begin) < 0.5:
            step()
            alone += 1
        usual /= alone
        self.solver.commit()
        before, steps, begin = path.stat().st_ino, 0, time.perf_counter()
        while path.stat().st_ino == before:
            step()
            steps += 1
        taken = time.perf_counter() - begin
        wait_for_writes()
        return taken / max(1, steps) / usual


def small_step() -> Save:
    """A step of training that takes well under a millisecond."""
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    optim, batch = torch.optim.SGD(model.parameters(), lr=1e-6), torch.randn(64, 256)

    def step() -> None:
        optim.zero_grad()
        model(batch).square().mean().backward()
        optim.step()

    return step


def timed(make: Callable[[State, Path], Save], state: State, folder: Path) -> Callable[[], float]:
    """Seconds that a save takes; it makes what it needs once, and has no old file to overwrite."""
    made: list[Save] = []
    folder.mkdir()

    def run() -> float:
        if not made:
            made.append(make(state, folder))
        for path in folder.rglob("*"):
            if make is not ignite and path.is_file() and path.stat().st_size > 2**20:
                path.unlink()  # ignite deletes its own
        begin = time.perf_counter()
        made[0]()
        return time.perf_counter() - begin

    return run


def section(megabytes: int, device: torch.device, rounds: int) -> Section:
    """All ways, from one device."""
    state = State(megabytes, device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ways = {
            name: timed(make, state, folder / str(number))
            for number, (name, make) in enumerate(PEERS.items())
        }
        ours = Ours(state, folder / "ours")
        first = ours.commit() * 1e3
        ways[OURS] = ours.commit
        times, failed = interleave(ways, rounds)
        slowdown = Spread.of([ours.slowdown() for _ in range(rounds)])
    notes = dict.fromkeys(ways, "not durable, not verified")
    notes[OURS] = (
        f"durable, verified; the first commit takes {first:.0f} ms; "
        f"a step takes {slowdown.median:.1f} times as long while it is written"
    )
    targets = {OURS: TARGET}
    rows = compare(times, failed, "`torch.save`", 1e3, ratio=True, targets=targets, notes=notes)
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the host"
    threads = f"{torch.get_num_threads()} threads"
    about = f"Model and Adam state of {megabytes} MB, on {where}; {threads}, {rounds} rounds."
    title = f"A checkpoint of {megabytes} MB from {where}"
    found = Section(title, about, ("ms", ".0f"), ("times `torch.save`", ".2f"), rows)
    found.plot = "Wait for a checkpoint" if device.type == "cpu" else ""
    return found


def measure(quick: bool = False) -> Iterator[Section]:
    """From the host, and from a GPU if there is one."""
    torch.set_num_threads(os.cpu_count() or 1)  # although `OMP_NUM_THREADS` is 1
    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    for device in devices:
        yield section(60 if quick else MEGABYTES, torch.device(device), 3 if quick else 7)


if __name__ == "__main__":
    harness.main(measure)
