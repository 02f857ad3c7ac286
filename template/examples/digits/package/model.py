"""The model: a small convolutional network. It knows nothing of training."""

import torch
from torch import nn


class ConvNet(nn.Module):
    """Two convolutions, pooling, two linear layers.

    Args:
        classes: number of classes.
        channels: of the first convolution; the second has twice as many.
        dropout: probability of dropping a hidden unit.
    """

    def __init__(self, classes: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(channels, 2 * channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(2 * channels * 4 * 4, 128),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(128, classes),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits `[B, classes]` for images `[B, 1, 8, 8]`."""
        logits: torch.Tensor = self.classifier(self.features(images))
        return logits
