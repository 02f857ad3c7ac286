"""One training that can resume, written in each way: what `bench.reliability` runs."""

from __future__ import annotations

import hashlib
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from .harness import OURS
from .peers import dora_xp, hush

STEPS = 8  # an epoch
BATCH = 16


class Killer:
    """Ends the process, without a chance to clean up, inside of a step."""

    def __init__(self, step: int) -> None:
        self.left = step

    def __call__(self) -> None:
        """A step is running."""
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


class Training:
    """The same for all: a model with dropout, shuffled data, Adam, a schedule."""

    def __init__(self, folder: Path, epochs: int, kill_at: int) -> None:
        self.folder, self.epochs, self.in_step = folder, epochs, Killer(kill_at)
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(STEPS * BATCH, 128, generator=generator)
        self.data = TensorDataset(inputs, inputs.roll(1, 1))
        self.model = nn.Sequential(nn.Linear(128, 128), nn.Dropout(0.2), nn.Linear(128, 128))
        self.optim = torch.optim.Adam(self.model.parameters(), lr=1e-3)
        self.schedule = torch.optim.lr_scheduler.ExponentialLR(self.optim, 0.99)

    def loader(self) -> DataLoader[Any]:
        """The data, shuffled."""
        return DataLoader(self.data, BATCH, shuffle=True)

    def loss(self, batch: Any, model: nn.Module | None = None) -> torch.Tensor:
        """Of one batch."""
        self.in_step()
        return F.mse_loss((model or self.model)(batch[0]), batch[1])

    def step(self, batch: Any) -> None:
        """By hand."""
        self.optim.zero_grad()
        self.loss(batch).backward()
        self.optim.step()
        self.schedule.step()

    @property
    def parts(self) -> dict[str, Any]:
        """All that has a state."""
        return {"model": self.model, "optim": self.optim, "schedule": self.schedule}


def ours(training: Training) -> None:
    """A solver; the same command resumes."""
    from core import BaseSolver, setup_logging
    from core.data import loader

    class Solver(BaseSolver):
        def __init__(self) -> None:
            super().__init__(training.folder)
            self.__dict__.update(training.parts)
            self.register_stateful(*training.parts)
            self.loader = loader(training.data, BATCH, shuffle=True, seed=0)

        def train(self) -> None:
            for batch in self.steps(self.loader):
                training.step(batch)

        def run(self) -> None:
            with self.running():
                for _ in range(self.epoch, training.epochs + 1):
                    self.run_stage("train", self.train)
                    self.commit()

    setup_logging(folder=training.folder)
    Solver().run()


def flashy(training: Training) -> None:
    """Its solver and its loader, in a run of Dora; the same command resumes."""
    from flashy import BaseSolver, distrib

    class Solver(BaseSolver):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.__dict__.update(training.parts)
            self.register_stateful(*training.parts)
            self.loader = distrib.loader(training.data, batch_size=BATCH, shuffle=True)

        def train(self) -> dict[str, float]:
            for batch in self.log_progress("train", self.loader):
                training.step(batch)
            return {}

        def get_formatter(self, stage_name: str) -> Any:
            from flashy import Formatter

            return Formatter()

        def run(self) -> None:
            self.restore()
            for _ in range(self.epoch, training.epochs + 1):
                self.run_stage("train", self.train)
                self.commit()

    with dora_xp(training.folder).enter():
        Solver().run()


def flashy_patched(training: Training) -> None:
    """The same, with a `torch.load` that takes anything, as before torch 2.6."""
    load = torch.load
    torch.load = lambda *args, **kwargs: load(*args, **{**kwargs, "weights_only": False})
    flashy(training)


def fabric(training: Training) -> None:
    """Its `save` and `load` of model, optimizer, schedule and epoch, after each epoch."""
    from lightning_fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    fabric.seed_everything(0)
    model, optim = fabric.setup(training.model, training.optim)
    loader = fabric.setup_dataloaders(training.loader())
    state: dict[str, Any] = {"model": model, "optim": optim, "schedule": training.schedule}
    state["epoch"] = 0
    path = training.folder / "fabric.ckpt"
    if path.exists():
        fabric.load(path, state)
    for epoch in range(state["epoch"], training.epochs):
        for batch in loader:
            optim.zero_grad()
            fabric.backward(training.loss(batch, model))
            optim.step()
            training.schedule.step()
        fabric.save(path, state | {"epoch": epoch + 1})


def accelerate(training: Training) -> None:
    """Its `save_state` and `load_state`, after each epoch."""
    from accelerate import Accelerator
    from accelerate.utils import set_seed

    accelerator = Accelerator(cpu=True)
    set_seed(0)
    model, optim, loader, schedule = accelerator.prepare(
        training.model, training.optim, training.loader(), training.schedule
    )
    saved = sorted(training.folder.glob("epoch_*"))
    if saved:
        accelerator.load_state(str(saved[-1]))
    for epoch in range(len(saved), training.epochs):
        for batch in loader:
            optim.zero_grad()
            accelerator.backward(training.loss(batch, model))
            optim.step()
            schedule.step()
        accelerator.save_state(str(training.folder / f"epoch_{epoch}"))


def ignite(training: Training) -> None:
    """Its `Checkpoint` of all parts and the engine, after each epoch."""
    from ignite.engine import Events
    from ignite.engine.deterministic import DeterministicEngine
    from ignite.handlers import Checkpoint, DiskSaver
    from ignite.utils import manual_seed

    manual_seed(0)
    trainer = DeterministicEngine(lambda engine, batch: training.step(batch))
    parts = {**training.parts, "trainer": trainer}
    saver = DiskSaver(str(training.folder), require_empty=False)
    trainer.add_event_handler(Events.EPOCH_COMPLETED, Checkpoint(parts, saver, n_saved=1))
    for saved in training.folder.glob("checkpoint_*.pt"):
        Checkpoint.load_objects(parts, torch.load(saved, weights_only=False))
    trainer.run(training.loader(), max_epochs=training.epochs)


def lightning(training: Training) -> None:
    """A Trainer with `save_last`, and `ckpt_path="last"`."""
    from lightning.pytorch import LightningModule, Trainer, seed_everything
    from lightning.pytorch.callbacks import ModelCheckpoint

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = training.model

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            return training.loss(batch)

        def configure_optimizers(self) -> Any:
            schedule = {"scheduler": training.schedule, "interval": "step"}
            return {"optimizer": training.optim, "lr_scheduler": schedule}

    seed_everything(0)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=training.epochs,
        logger=False,
        callbacks=[ModelCheckpoint(training.folder, save_last=True)],
        enable_progress_bar=False,
        default_root_dir=training.folder,
    )
    trainer.fit(Module(), training.loader(), ckpt_path="last")


WAYS: dict[str, Callable[[Training], None]] = {
    OURS: ours,
    "Flashy": flashy,
    "Flashy, patched": flashy_patched,
    "ignite": ignite,
    "Fabric": fabric,
    "Accelerate": accelerate,
    "Lightning": lightning,
}
# What a process imports before it forks one for each start of the training.
MODULES = {
    OURS: "core",
    "Flashy": "flashy",
    "Flashy, patched": "flashy",
    "ignite": "ignite.handlers",
    "Fabric": "lightning_fabric",
    "Accelerate": "accelerate",
    "Lightning": "lightning",
}


def train(way: str, folder: Path, epochs: int, kill_at: int = 0) -> str:
    """Train up to so many epochs, from wherever the folder stands; return a digest of the weights.

    Args:
        way: one of `WAYS`.
        folder: for all files.
        epochs: in all.
        kill_at: step, counted from the start of this process, to be killed in; 0 for none.
    """
    hush()
    torch.set_num_threads(1)
    # As in a new process: only what the way seeds itself is the same each time.
    random.seed()
    np.random.seed()
    torch.manual_seed(0)
    training = Training(folder, epochs, kill_at)
    WAYS[way](training)
    weights = torch.cat([p.detach().flatten() for p in training.model.parameters()])
    return hashlib.sha256(weights.numpy().tobytes()).hexdigest()
