"""One training loop, written in each way as that way's documentation shows it.

All train the same tiny model on the same batches, average the same metrics over the epoch, and
show them every `LINE` steps. What is timed is what happens between two looks at the data.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .harness import OURS
from .task import BATCH, LINE, Batch, Metrics, Task

logger = logging.getLogger("bench")


def log_line(done: int, metrics: Mapping[str, float]) -> None:
    """A progress line, as people write one by hand."""
    parts = [f"step {done}", *(f"{name} {value:.3f}" for name, value in metrics.items())]
    logger.info(" | ".join(parts))


class Means:
    """Averages as most loops of examples have them."""

    def __init__(self) -> None:
        self.sums: dict[str, float] = {}
        self.done = 0

    def take(self, metrics: Metrics) -> None:
        """Add the metrics of a step; write a line when it is time."""
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value.item() * BATCH
        self.done += 1
        if self.done % LINE == 0:
            log_line(self.done, {k: v / BATCH / self.done for k, v in self.sums.items()})


# ------------------------------------------------------------------------------------------ ways


def bare(task: Task) -> None:
    """No averages, no lines."""
    optim = task.optim()
    for batch in task.loader():
        task.step(batch, optim)


def by_hand(task: Task) -> None:
    """Sums of `.item()`, which wait for a GPU in every step."""
    optim, means = task.optim(), Means()
    for batch in task.loader():
        means.take(task.step(batch, optim))


def ours(task: Task) -> None:
    """As in the `train` of a rendered solver."""
    from core import BaseSolver

    class Solver(BaseSolver):
        def train(self) -> Mapping[str, float]:
            optim = task.optim()
            steps = self.steps(task.loader(), updates=len(task.data) // LINE, every=0)
            for batch in steps:
                steps.log(task.step(batch, optim), weight=BATCH)
            return steps.metrics()

    with tempfile.TemporaryDirectory() as folder:
        solver = Solver(folder)
        solver.run_stage("train", solver.train)


def flashy(task: Task) -> None:
    """As in its examples."""
    from flashy import LogProgressBar, averager

    optim, average = task.optim(), averager()
    batches = LogProgressBar(logger, task.loader(), updates=len(task.data) // LINE, name="Train")
    for batch in batches:
        batches.update(**average(task.step(batch, optim), BATCH))


def accelerate(task: Task) -> None:
    """A loop by hand around `prepare` and `backward`."""
    from accelerate import Accelerator

    accelerator = Accelerator(
        cpu=task.device.type == "cpu", mixed_precision="bf16" if task.bf16 else "no"
    )
    model, optim, loader = accelerator.prepare(task.model, task.optim(), task.loader())
    means = Means()
    for batch in loader:
        with accelerator.autocast() if task.bf16 else nullcontext():
            metrics = task.forward(model, batch)
        optim.zero_grad()
        accelerator.backward(metrics["loss"])
        optim.step()
        means.take(metrics)
    accelerator.free_memory()


def fabric(task: Task) -> None:
    """A loop by hand around `setup` and `backward`."""
    from lightning_fabric import Fabric

    fabric = Fabric(
        accelerator=task.device.type, devices=1, precision="bf16-mixed" if task.bf16 else "32-true"
    )
    model, optim = fabric.setup(task.model, task.optim())
    loader, means = fabric.setup_dataloaders(task.loader()), Means()
    for batch in loader:
        with fabric.autocast() if task.bf16 else nullcontext():
            metrics = task.forward(model, batch)
        optim.zero_grad()
        fabric.backward(metrics["loss"])
        optim.step()
        means.take(metrics)


def ignite(task: Task) -> None:
    """An engine with running averages."""
    from ignite.engine import Engine, Events
    from ignite.metrics import RunningAverage

    optim = task.optim()
    trainer = Engine(lambda engine, batch: task.step(batch, optim))
    for name in task.names:
        average = RunningAverage(output_transform=lambda output, name=name: output[name].item())
        average.attach(trainer, name)

    trainer.add_event_handler(
        Events.ITERATION_COMPLETED(every=LINE),
        lambda engine: log_line(engine.state.iteration, engine.state.metrics),
    )
    trainer.run(task.loader(), max_epochs=1)


def torchtnt(task: Task) -> None:
    """An `AutoUnit`, which leaves averages and lines to its user."""
    from torchtnt.framework.auto_unit import AutoUnit
    from torchtnt.framework.train import train

    means = Means()

    class Unit(AutoUnit):  # type: ignore[misc]
        def compute_loss(self, state: Any, data: Batch) -> tuple[Tensor, Metrics]:
            metrics = task.forward(self.module, data)
            return metrics["loss"], metrics

        def configure_optimizers_and_lr_scheduler(self, module: Any) -> tuple[Any, None]:
            return task.optim(), None

        def on_train_step_end(self, state: Any, data: Batch, step: int, results: Any) -> None:
            means.take(results.outputs)

    precision = "bf16" if task.bf16 else None
    train(
        Unit(module=task.model, device=task.device, precision=precision),
        task.loader(),
        max_epochs=1,
    )


def lightning(task: Task, show: bool = True) -> None:
    """A Trainer that averages by `log_dict`; its bar and CSV file follow every `LINE` steps."""
    from lightning.pytorch import LightningModule, Trainer
    from lightning.pytorch.callbacks import TQDMProgressBar
    from lightning.pytorch.loggers import CSVLogger

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def training_step(self, batch: Batch, index: int) -> Tensor:
            metrics = task.forward(self.model, batch)
            self.log_dict(metrics, on_step=show, on_epoch=True, prog_bar=show, batch_size=BATCH)
            return metrics["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return task.optim()

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            accelerator="gpu" if task.device.type == "cuda" else "cpu",
            devices=1,
            precision="bf16-mixed" if task.bf16 else "32-true",
            max_epochs=1,
            logger=CSVLogger(folder) if show else False,
            callbacks=[TQDMProgressBar(refresh_rate=LINE)] if show else None,
            enable_progress_bar=show,
            log_every_n_steps=LINE,
            enable_checkpointing=False,
            enable_model_summary=False,
            default_root_dir=Path(folder),
        )
        trainer.fit(Module(), task.loader())


def lightning_silent(task: Task) -> None:
    """A Trainer that averages, but has no bar, no file and no curves by step."""
    lightning(task, show=False)


WAYS: dict[str, Callable[[Task], None]] = {
    "bare loop": bare,
    "by hand, `.item()`": by_hand,
    OURS: ours,
    "Flashy": flashy,
    "ignite": ignite,
    "Fabric": fabric,
    "Accelerate": accelerate,
    "torchtnt": torchtnt,
    "Lightning, silent": lightning_silent,
    "Lightning": lightning,
}


def quiet(folder: Path) -> None:
    """Send the lines of all ways to one file, and what peers say beside them nowhere."""
    logging.basicConfig(filename=folder / "log", level=logging.INFO, force=True)
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
