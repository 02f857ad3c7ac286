"""Adversarial training: discriminator, optimizer and loss in a module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from . import distrib
from .utils import readonly

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class AdversarialLoss(nn.Module):
    """The loss of a generator by a discriminator, and the training of the discriminator.

    After Goodfellow et al. (2014), https://arxiv.org/abs/1406.2661, with the non-saturating
    generator loss. The state of the optimizer travels in `state_dict()`.

    Args:
        adversary: returns logits for examples; high means "fake", as in Flashy.
        optimizer: over the adversary's parameters, and no others.
        loss: takes logits and targets (1 for fake, 0 for real) and returns a mean loss.
    """

    def __init__(
        self,
        adversary: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: Loss = F.binary_cross_entropy_with_logits,
    ) -> None:
        super().__init__()
        self.adversary = adversary
        self.optimizer = optimizer
        self.loss = loss
        distrib.broadcast_model(adversary)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the entry `_extra_state` of `state_dict()`: the state of the optimizer."""
        return {"optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore the state of the optimizer."""
        self.optimizer.load_state_dict(state["optimizer"])

    def train_adv(self, fake: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """Train the adversary one step on fake and real examples, both `[B, ...]`; return its loss.

        In eval mode the loss is computed, and nothing is trained.
        """
        logits_fake, logits_real = self.adversary(fake.detach()), self.adversary(real.detach())
        loss = self.loss(logits_fake, torch.ones_like(logits_fake))
        loss = loss + self.loss(logits_real, torch.zeros_like(logits_real))
        if self.training:
            self.optimizer.zero_grad()
            with distrib.eager_sync_model(self.adversary):
                loss.backward()
            self.optimizer.step()
        return loss.detach()

    def forward(self, fake: torch.Tensor) -> torch.Tensor:
        """Return the generator's loss on fake examples `[B, ...]`: low if they pass for real."""
        with readonly(self.adversary):
            logits = self.adversary(fake)
            return self.loss(logits, torch.zeros_like(logits))
