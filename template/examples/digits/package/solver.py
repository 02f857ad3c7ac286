"""The solver: data, model and optimizer, and what one epoch does with them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .core import BaseSolver, Formatter, distrib
from .core.data import loader, split_batch
from .core.ema import EMA
from .core.run import XP
from .core.utils import UserError, make_grid
from .data import CLASSES, Images, load
from .model import ConvNet
from .schema import Config


class Solver(BaseSolver):
    """Trains a classifier of images."""

    def __init__(self, cfg: Config, xp: XP | None = None) -> None:
        super().__init__(xp, cfg.checkpoint)
        self.cfg = cfg
        self.device = distrib.device(cfg.device)

        try:
            train_set, valid_set = load(cfg.data.name, cfg.data.folder)
        except (OSError, ValueError) as error:
            raise UserError(str(error)) from error
        self.train_loader = self.make_loader(train_set, shuffle=True)
        self.valid_loader = self.make_loader(valid_set)

        model = ConvNet(train_set.shape, CLASSES, cfg.model.channels, cfg.model.dropout)
        self.model = model.to(self.device)
        distrib.broadcast_model(self.model)
        if cfg.model.compile:
            self.model.compile()
        self.optim = torch.optim.AdamW(
            self.model.parameters(), lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay
        )
        updates, warmup = max(1, cfg.epochs * len(self.train_loader)), max(1, cfg.optim.warmup)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optim,  # linear warm-up, then cosine decay to zero
            lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / updates)),
        )
        self.register_stateful("model", "optim", "schedule")
        if cfg.continue_from and not self.checkpoint_path.exists():
            self.continue_from(cfg.continue_from, version=cfg.continue_with)
        if cfg.optim.ema:
            self.ema = EMA({"model": self.model}, cfg.optim.ema)
            self.register_stateful("ema")
        self.init_trackers(cfg.trackers, **cfg.wandb)

    def make_loader(self, dataset: Images, shuffle: bool = False) -> DataLoader[Any]:
        """Return a loader of this process's share of a dataset."""
        batches: DataLoader[Any] = loader(
            dataset,
            split_batch(self.cfg.data.batch_size),
            shuffle=shuffle,
            seed=self.cfg.seed,
            limit=self.cfg.data.limit,
            num_workers=self.cfg.data.num_workers,
        )
        return batches

    def train(self) -> dict[str, float]:
        """Train one epoch."""
        self.model.train()
        steps = self.steps(
            self.train_loader, self.cfg.log_updates, self.cfg.log_every, finite=["grad_norm"]
        )
        for images, labels in steps:
            loss, hits = self.predict(images, labels)
            with distrib.eager_sync_model(self.model):  # averages gradients over processes
                loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optim.clip)
            lr = self.optim.param_groups[0]["lr"]
            metrics = {"loss": loss, "acc": hits.mean(), "grad_norm": norm, "lr": lr}
            steps.log(metrics, weight=len(labels))  # refuses a NaN before the weights have it
            self.optim.step()
            self.optim.zero_grad()
            self.schedule.step()
            if self.cfg.optim.ema:
                self.ema.update()
        return steps.metrics()

    def valid(self) -> dict[str, float]:
        """Validate with the averaged weights, if there are any, and show some mistakes."""
        if not self.cfg.optim.ema:
            return self.evaluate()
        with self.ema.swapped():
            return self.evaluate()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Return the metrics of the validation set."""
        self.model.eval()
        steps = self.steps(self.valid_loader, self.cfg.log_updates, every=0)
        wrong = []
        for images, labels in steps:
            loss, hits = self.predict(images, labels)
            steps.log({"loss": loss, "acc": hits.mean()}, weight=len(labels))
            wrong += images[hits.cpu() == 0]
        if wrong:
            self.log_image(self.current_stage, "wrong", make_grid(torch.stack(wrong[:64])))
        return steps.metrics()

    def predict(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of a batch, `[B, C, H, W]` and `[B]`, and 1.0 for each right answer."""
        images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.optim.bf16):
            logits = self.model(images)
            loss = F.cross_entropy(logits, labels)
        return loss, (logits.argmax(1) == labels).float()

    def get_formatter(self, stage_name: str) -> Formatter:
        """Return how metrics are shown."""
        return Formatter({"loss": ".4f", "acc": ".2%", "lr": ".1e", "duration": ".1f"})
