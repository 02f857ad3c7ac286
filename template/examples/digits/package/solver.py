"""The solver: what is built, what an epoch is made of, what a step does."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .core import BaseSolver, Formatter, distrib
from .core.checkpoint import Policy
from .core.loader import loader, split_batch
from .core.utils import UserError, make_grid
from .core.weights import EMA, Best
from .core.xp import XP
from .data import CLASSES, Images, load
from .model import ConvNet
from .schema import Config


class Solver(BaseSolver):
    """Trains a classifier of images."""

    def __init__(self, cfg: Config, xp: XP | None = None) -> None:
        super().__init__(xp)
        self.cfg = cfg
        self.device = distrib.device(cfg.device)

        try:
            train_set, valid_set = load(cfg.data.name, cfg.data.folder)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        self.train_loader = self.make_loader(train_set, shuffle=True)
        self.valid_loader = self.make_loader(valid_set)

        size = cfg.model
        self.model = ConvNet(train_set.shape, CLASSES, size.channels, size.dropout).to(self.device)
        distrib.broadcast_model(self.model)
        if cfg.model.compile:
            self.model.compile()
        self.optim = torch.optim.AdamW(
            self.model.parameters(), lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay
        )
        updates = cfg.epochs * len(self.train_loader)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optim, warmup_cosine(cfg.optim.warmup, updates, cfg.optim.cosine)
        )

        self.ema = EMA({"model": self.model}, cfg.optim.ema)
        self.best = Best({"model": self.model}, mode="max")

        self.register_stateful("model", "optim", "schedule", "ema", "best")
        self.checkpoints = Policy.from_config(cfg.checkpoint)
        self.init_trackers(cfg.trackers, project=__package__)

    def make_loader(self, dataset: Images, shuffle: bool = False) -> DataLoader[Any]:
        """Batches of this process's share of a dataset."""
        batches: DataLoader[Any] = loader(
            dataset,
            split_batch(self.cfg.data.batch_size),
            shuffle=shuffle,
            seed=self.cfg.seed,
            limit=self.cfg.data.limit,
            num_workers=self.cfg.data.num_workers,
        )
        return batches

    def run(self) -> None:
        """Train until all epochs are committed, from wherever the run stands."""
        if not self.restore() and self.cfg.continue_from:
            self.continue_from(self.cfg.continue_from, version=self.cfg.continue_with)
            self.ema.reset()
        if self.epoch <= self.cfg.epochs:
            self.log_start()
            self.log_hyperparams(self.xp.cfg)
        for _ in range(self.epoch, self.cfg.epochs + 1):
            self.run_stage("train", self.train)
            self.run_stage("valid", self.valid)
            self.commit()
        self.log_end()

    def train(self) -> dict[str, float]:
        """One epoch of training."""
        self.model.train()
        return self.loop(self.train_loader)

    @torch.no_grad()
    def valid(self) -> dict[str, float]:
        """Validation, and a look at what is hard."""
        self.model.eval()
        with self.ema.swapped():
            metrics = self.loop(self.valid_loader)
            self.best.update(metrics["acc"])
            self.log_hardest()
        return metrics

    def loop(self, data: DataLoader[Any]) -> dict[str, float]:
        """Go once through the data; return the metrics over all examples of all processes."""
        average = self.averager()
        batches = self.log_progress(self.current_stage, data, updates=self.cfg.log_updates)
        for images, labels in batches:
            step = self.run_step(images.to(self.device), labels.to(self.device))
            batches.update(average(step, weight=len(labels)))
            if self.model.training:
                self.log_step(step, every=self.cfg.log_every)
        self.check_finite(average, "loss")
        return distrib.average_metrics(average)

    def run_step(self, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """One batch, `[B, C, H, W]` and `[B]`; its metrics stay on the device, unawaited."""
        if not self.model.training:
            return self.forward(images, labels)
        metrics: dict[str, Any] = {}
        count = max(1, self.cfg.optim.accumulate)
        parts = list(zip(images.chunk(count), labels.chunk(count), strict=True))
        for number, (some, their_labels) in enumerate(parts, 1):
            share = len(some) / len(images)
            step = self.forward(some, their_labels)
            # Gradients of the parts add up; they are averaged over processes once, with the last.
            last = number == len(parts)
            with distrib.eager_sync_model(self.model) if last else nullcontext():
                (step["loss"] * share).backward()
            for name, value in step.items():
                metrics[name] = metrics.get(name, 0) + value.detach() * share
        return metrics | self.update()

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The loss, and what else is to be known."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.optim.bf16):
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
        return {"loss": loss, "acc": (logits.argmax(1) == labels).float().mean()}

    def update(self) -> dict[str, Any]:
        """One update of the weights, by their gradients."""
        largest = self.cfg.optim.clip if self.cfg.optim.clip > 0 else math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        [lr] = self.schedule.get_last_lr()
        self.optim.step()
        self.optim.zero_grad()
        self.schedule.step()
        self.ema.update()
        return {"grad_norm": grad_norm, "lr": lr}

    def log_hardest(self, count: int = 16) -> None:
        """Show the images of the first validation batch that have the highest loss."""
        images, labels = next(iter(self.valid_loader))
        logits = self.model(images.to(self.device)).cpu()
        losses = F.cross_entropy(logits, labels, reduction="none")
        hardest = losses.topk(min(count, len(losses))).indices
        self.log_image(self.current_stage, "hardest", make_grid(images[hardest]))

    def get_formatter(self, stage_name: str) -> Formatter:
        """How metrics are shown."""
        return Formatter({"loss": ".4f", "acc": ".2%", "lr": ".1e", "duration": ".1f"})


def warmup_cosine(warmup: int, updates: int, cosine: bool) -> Callable[[int], float]:
    """Return the factor on the learning rate at each update: linear warm-up, then cosine decay.

    After Loshchilov & Hutter (2017), https://arxiv.org/abs/1608.03983, without restarts.

    Args:
        warmup: updates until the factor is 1.
        updates: updates until it is 0.
        cosine: decay at all; else it stays at 1.
    """

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        progress = (update - warmup) / max(1, updates - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress))) if cosine else 1.0

    return factor
