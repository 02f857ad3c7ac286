"""The solver: what is built, what an epoch is made of, what a step does."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from .core import BaseSolver, Formatter, distrib
from .core.checkpoint import Policy
from .core.loader import loader, split_batch
from .core.utils import UserError
from .core.xp import XP
from .data import Windows, load_text
from .model import Transformer
from .schema import Config


class Solver(BaseSolver):
    """Trains a language model, character by character."""

    def __init__(self, cfg: Config, xp: XP | None = None) -> None:
        super().__init__(xp)
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
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optim, warmup_cosine(cfg.optim.warmup, cfg.epochs * len(self.train_loader))
        )
        self.register_stateful("model", "optim", "schedule")
        self.checkpoints = Policy.from_config(cfg.checkpoint)
        self.init_trackers(cfg.trackers, project=__package__)

    def make_loader(self, windows: Windows, updates: int | None = None) -> DataLoader[Any]:
        """Batches of this process's share of the data: all of it, or so many in random order."""
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

    def run(self) -> None:
        """Train until all epochs are committed, from wherever the run stands."""
        self.restore()
        if self.epoch <= self.cfg.epochs:
            self.log_start()
            self.log_hyperparams(self.xp.cfg)
        for _ in range(self.epoch, self.cfg.epochs + 1):
            self.run_stage("train", self.train)
            self.run_stage("valid", self.valid)
            self.commit()
        self.log_end()

    def train(self) -> dict[str, float]:
        """So many updates, on stretches from anywhere in the text."""
        self.model.train()
        return self.loop(self.train_loader)

    @torch.no_grad()
    def valid(self) -> dict[str, float]:
        """Validation on the whole held-out text, and a look at what the model would write."""
        self.model.eval()
        metrics = self.loop(self.valid_loader)
        self.log_text("valid", "sample", self.write())
        return metrics

    def loop(self, data: DataLoader[Any]) -> dict[str, float]:
        """Go once through the data; return the metrics over all characters of all processes."""
        average = self.averager()
        batches = self.log_progress(self.current_stage, data, updates=self.cfg.log_updates)
        for stretches in batches:
            step = self.run_step(stretches.to(self.device))
            batches.update(average(step, weight=len(stretches)))
            if self.model.training:
                self.log_step(step, every=self.cfg.log_every)
        self.check_finite(average, "loss")
        return distrib.average_metrics(average)

    def run_step(self, stretches: Tensor) -> dict[str, Any]:
        """One batch, `[B, T + 1]`; its metrics stay on the device, unawaited."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.cfg.optim.bf16):
            logits = self.model(stretches[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), stretches[:, 1:].flatten())
        metrics = {"loss": loss, "bpc": loss.detach() / math.log(2)}
        if not self.model.training:
            return metrics
        with distrib.eager_sync_model(self.model):
            loss.backward()
        largest = self.cfg.optim.clip if self.cfg.optim.clip > 0 else math.inf
        grad_norm = nn.utils.clip_grad_norm_(self.model.parameters(), largest)
        [lr] = self.schedule.get_last_lr()
        self.optim.step()
        self.optim.zero_grad()
        self.schedule.step()
        return {**metrics, "grad_norm": grad_norm, "lr": lr}

    def write(self) -> str:
        """A text that begins with the prompt; always by the same dice."""
        generator = torch.Generator().manual_seed(self.cfg.seed)
        numbers = self.model.continue_text(self.prompt, self.cfg.sample.length, generator)
        return self.alphabet.decode(numbers)

    def get_formatter(self, stage_name: str) -> Formatter:
        """How metrics are shown."""
        return Formatter({"loss": ".4f", "bpc": ".3f", "lr": ".1e", "duration": ".1f"})


def warmup_cosine(warmup: int, updates: int) -> Callable[[int], float]:
    """Return the factor on the learning rate at each update: linear warm-up, then cosine decay.

    After Loshchilov & Hutter (2017), https://arxiv.org/abs/1608.03983, without restarts.

    Args:
        warmup: updates until the factor is 1.
        updates: updates until it is 0.
    """

    def factor(update: int) -> float:
        if update < warmup:
            return (update + 1) / warmup
        progress = (update - warmup) / max(1, updates - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))

    return factor
