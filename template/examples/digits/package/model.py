"""The model: a small convolutional network. It knows nothing of training."""

from collections.abc import Sequence

import torch
from torch import nn


class ConvNet(nn.Module):
    """Two convolutions, pooling, two linear layers.

    Args:
        shape: of an image, `[C, H, W]`.
        classes: number of classes.
        channels: of the first convolution; the second has twice as many.
        dropout: probability of dropping a hidden unit.
    """

    def __init__(self, shape: Sequence[int], classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        colours, height, width = shape
        self.features = nn.Sequential(
            nn.Conv2d(colours, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(2 * channels * (height // 2) * (width // 2), 128),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(128, classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits `[B, classes]` for images `[B, C, H, W]`."""
        logits: torch.Tensor = self.classifier(self.features(images))
        return logits
