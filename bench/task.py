"""What all ways of `bench.loops` train: a tiny model, on data that take the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

WARM, LINE = 100, 250  # steps before the clock starts; steps from line to line
FEATURES, CLASSES, BATCH = 64, 18, 32

Batch = tuple[Tensor, Tensor]
Metrics = dict[str, Tensor]


class Clock(Dataset[Batch]):
    """Data that are at hand, and that take the time as the loop asks for them."""

    def __init__(self, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(8, BATCH, FEATURES, generator=generator).to(device)
        labels = torch.randint(CLASSES, (8, BATCH), generator=generator).to(device)
        self.batches = list(zip(inputs, labels, strict=True))
        self.at: dict[int, Callable[[], Any]] = {}
        self.device = device
        self.seconds = 0.0  # per step
        self.between = 0.0  # of them between two calls of `Task.step`
        self.ended = 0.0  # the last of these calls, while they are timed

    def __len__(self) -> int:
        return 2 * LINE

    def __getitem__(self, index: int) -> Batch:
        if index == WARM:
            self.begun, self.between = self._now(), 0.0
        elif index == WARM + LINE:
            self.seconds = (self._now() - self.begun) / LINE
            self.between /= LINE
            self.ended = 0.0
        elif index in self.at:
            self.at[index]()
        return self.batches[index % len(self.batches)]

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return time.process_time()  # nothing waits, and others may use this machine too


@dataclass
class Task:
    """What is to be trained.

    Args:
        metrics: number of metrics to average, two at least.
        device: to train on.
        bf16: train under bfloat16 autocast.
        compile: compile the model.
    """

    metrics: int = 2
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    bf16: bool = False
    compile: bool = False

    def __post_init__(self) -> None:
        self.data = Clock(self.device)
        self.names = ["loss", "acc", *(f"logit_{i}" for i in range(self.metrics - 2))]
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Linear(FEATURES, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, CLASSES)
        ).to(self.device)
        if self.compile:
            self.model.compile()

    def loader(self) -> DataLoader[Batch]:
        """The batches, as a user has them."""
        return DataLoader(self.data, batch_size=None)

    def optim(self) -> torch.optim.Optimizer:
        """The optimizer."""
        return torch.optim.SGD(self.model.parameters(), lr=1e-3)

    def autocast(self) -> AbstractContextManager[Any]:
        """For loops without a switch for it."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext()

    def forward(self, model: nn.Module, batch: Batch) -> Metrics:
        """The metrics of a batch, of which the loss has a graph."""
        inputs, labels = batch
        logits = model(inputs)
        metrics = {"loss": F.cross_entropy(logits, labels)}
        metrics["acc"] = (logits.argmax(1) == labels).float().mean()
        if self.metrics > 2:
            metrics |= zip(self.names[2:], logits.detach().float().mean(0).unbind(), strict=False)
        return metrics

    def step(self, batch: Batch, optim: torch.optim.Optimizer) -> Metrics:
        """A step of training by hand."""
        if self.data.ended:
            self.data.between += time.process_time() - self.data.ended
        with self.autocast():
            metrics = self.forward(self.model, batch)
        optim.zero_grad()
        metrics["loss"].backward()
        optim.step()
        if not self.data.seconds and self.device.type == "cpu":
            self.data.ended = time.process_time()
        return metrics
