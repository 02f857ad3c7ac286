"""The adversarial loss: who is trained, and what is state."""

from __future__ import annotations

import io

import torch
import torch.nn.functional as F
from torch import nn

from core.adversarial import AdversarialLoss


def make() -> AdversarialLoss:
    torch.manual_seed(0)
    adversary = nn.Linear(3, 1)
    return AdversarialLoss(adversary, torch.optim.Adam(adversary.parameters(), lr=0.1))


def weight(adversarial: AdversarialLoss) -> torch.Tensor:
    return next(adversarial.adversary.parameters())


def test_the_adversary_learns_to_tell() -> None:
    adversarial = make()
    fake, real = torch.zeros(4, 3), torch.ones(4, 3)
    losses = [adversarial.train_adv(fake, real).item() for _ in range(50)]
    assert losses[-1] < 0.5 * losses[0]
    assert adversarial.adversary(fake).mean() > adversarial.adversary(real).mean()
    adversarial.eval()
    before = weight(adversarial).clone()
    adversarial.train_adv(fake, real)
    assert torch.equal(weight(adversarial), before)


def test_the_generator_gets_gradients_and_the_adversary_none() -> None:
    adversarial = make()
    fake = torch.zeros(4, 3, requires_grad=True)
    loss = adversarial(fake)
    expected = F.softplus(adversarial.adversary(fake)).mean()  # high logits are of fakes
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert fake.grad is not None
    assert all(p.grad is None and p.requires_grad for p in adversarial.adversary.parameters())


def test_the_optimizer_is_part_of_the_state() -> None:
    adversarial = make()
    adversarial.train_adv(torch.zeros(4, 3), torch.ones(4, 3))
    file = io.BytesIO()
    torch.save(adversarial.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    names = set(state)
    restored = make()
    restored.load_state_dict(state)
    assert set(state) == names
    for one in (adversarial, restored):
        one.train_adv(torch.zeros(4, 3), torch.ones(4, 3))
    assert torch.equal(weight(adversarial), weight(restored))
