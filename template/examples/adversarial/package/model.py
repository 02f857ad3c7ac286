"""The models: one makes images from noise, one tells them from real ones. They know no training."""

import torch
from torch import Tensor, nn

SHAPE = (1, 8, 8)


class Generator(nn.Module):
    """Makes images from noise.

    Args:
        noise: numbers that an image is made from.
        width: of the hidden layers.
    """

    def __init__(self, noise: int, width: int) -> None:
        super().__init__()
        self.noise = noise
        self.layers = nn.Sequential(
            nn.Linear(noise, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, 64),
            nn.Tanh(),
            nn.Unflatten(1, SHAPE),
        )

    def forward(self, noise: Tensor) -> Tensor:
        """Return images `[B, 1, 8, 8]` in -1..1 for noise `[B, noise]`."""
        images: Tensor = self.layers(noise)
        return images


class Discriminator(nn.Module):
    """Tells real images from others.

    Args:
        width: of the hidden layers.
        dropout: probability of dropping a hidden unit.
    """

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(),
            nn.Linear(64, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Linear(width, width),
            nn.LeakyReLU(0.2),
            nn.Dropout(dropout),
            nn.Linear(width, 1),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits `[B, 1]` for images `[B, 1, 8, 8]`: high means fake."""
        logits: Tensor = self.layers(images)
        return logits


def frechet_distance(one: Tensor, other: Tensor) -> Tensor:
    """Return the Fréchet distance of two sets of images, each taken for normally distributed.

    After Heusel et al. (2017), https://arxiv.org/abs/1706.08500, but on the pixels themselves.

    Args:
        one: images `[N, ...]`.
        other: images `[M, ...]` of the same shape.
    """
    one, other = one.flatten(1).double(), other.flatten(1).double()
    cov, other_cov = torch.cov(one.T), torch.cov(other.T)
    # The trace of the root of cov @ other_cov, by way of symmetric matrices.
    values, vectors = torch.linalg.eigh(cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    overlap = torch.linalg.eigvalsh(root @ other_cov @ root).clamp(min=0).sqrt().sum()
    means = (one.mean(0) - other.mean(0)).square().sum()
    distance: Tensor = means + cov.trace() + other_cov.trace() - 2 * overlap
    return distance
