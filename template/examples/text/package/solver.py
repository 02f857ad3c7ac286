"""The solver: data, model and optimizer, and what one epoch does with them."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .core import BaseSolver, Formatter, distrib
from .core.data import loader, split_batch
from .core.run import XP
from .core.utils import UserError
from .data import Windows, load_text
from .model import Transformer
from .schema import Config


class Solver(BaseSolver):
    """Trains a language model, character by character."""

    def __init__(self, cfg: Config, xp: XP | None = None) -> None:
        super().__init__(xp, cfg.checkpoint)
        self.cfg = cfg
        self.device = distrib.device(cfg.device)

        self.alphabet, train_text, valid_text = load_text()
        try:
            self.prompt = self.alphabet.encode(cfg.sample.prompt).to(self.device)
        except ValueError as error:
            raise UserError(f"sample.prompt: {error}") from error
        context = cfg.data.context
        self.train_loader = self.make_loader(
            Windows(train_text, context, stride=1), cfg.data.updates_per_epoch
        )
        self.valid_loader = self.make_loader(Windows(valid_text, context, stride=context))

        size = cfg.model
        self.model = Transformer(
            len(self.alphabet), context, size.layers, size.width, size.heads, size.dropout
        ).to(self.device)
        distrib.broadcast_model(self.model)
        self.optim = torch.optim.AdamW(
            self.model.parameters(), lr=cfg.optim.lr, weight_decay=cfg.optim.weight_decay
        )
        updates, warmup = max(1, cfg.epochs * len(self.train_loader)), max(1, cfg.optim.warmup)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optim,  # linear warm-up, then cosine decay to zero
            lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * step / updates)),
        )
        self.register_stateful("model", "optim", "schedule")
        self.init_trackers(cfg.trackers, **cfg.wandb)

    def make_loader(self, windows: Windows, updates: int | None = None) -> DataLoader[Any]:
        """Return a loader of this process's share: of all data, or of some updates at random."""
        batches: DataLoader[Any] = loader(
            windows,
            split_batch(self.cfg.data.batch_size),
            shuffle=updates is not None,
            seed=self.cfg.seed,
            updates_per_epoch=updates,
            limit=self.cfg.data.limit,
            num_workers=self.cfg.data.num_workers,
        )
        return batches

    def train(self) -> dict[str, float]:
        """Train one epoch, on stretches from anywhere in the text."""
        self.model.train()
        steps = self.steps(
            self.train_loader, self.cfg.log_updates, self.cfg.log_every, finite=["grad_norm"]
        )
        for stretches in steps:
            loss = self.loss(stretches)
            with distrib.eager_sync_model(self.model):  # averages gradients over processes
                loss.backward()
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.optim.clip)
            bpc, lr = loss.detach() / math.log(2), self.optim.param_groups[0]["lr"]
            metrics = {"loss": loss, "bpc": bpc, "grad_norm": norm, "lr": lr}
            steps.log(metrics, weight=len(stretches))  # refuses a NaN before the weights have it
            self.optim.step()
            self.optim.zero_grad()
            self.schedule.step()
        return steps.metrics()

    @torch.no_grad()
    def valid(self) -> dict[str, float]:
        """Validate on the whole held-out text, and show what the model would write."""
        self.model.eval()
        steps = self.steps(self.valid_loader, self.cfg.log_updates, every=0)
        for stretches in steps:
            loss = self.loss(stretches)
            steps.log({"loss": loss, "bpc": loss / math.log(2)}, weight=len(stretches))
        self.log_text("valid", "sample", self.write())
        return steps.metrics()

    def loss(self, stretches: Tensor) -> Tensor:
        """Return the loss of a batch, `[B, T + 1]`, whose last characters are only predicted."""
        stretches = stretches.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.optim.bf16):
            logits = self.model(stretches[:, :-1])
            return F.cross_entropy(logits.flatten(0, 1), stretches[:, 1:].flatten())

    def write(self) -> str:
        """Return a text that begins with the prompt; always with the same random numbers."""
        generator = torch.Generator().manual_seed(self.cfg.seed)
        numbers = self.model.continue_text(self.prompt, self.cfg.sample.length, generator)
        return self.alphabet.decode(numbers)

    def get_formatter(self, stage_name: str) -> Formatter:
        """Return how metrics are shown."""
        return Formatter({"loss": ".4f", "bpc": ".3f", "lr": ".1e", "duration": ".1f"})
