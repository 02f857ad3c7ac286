"""Stands in for torchvision, as far as Flashy's example `cifar` uses it.

The data can't be downloaded everywhere, and a ResNet takes long on a CPU: so there are coloured
noise images, and a small network that learns to tell them apart.
"""

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset


def _cifar10(root: str, train: bool, download: bool, transform: Any) -> TensorDataset:
    """Images `[3, 32, 32]` whose class can be seen from their colours."""
    generator = torch.Generator().manual_seed(int(train))
    labels = torch.randint(10, (600 if train else 240,), generator=generator)
    colours = torch.randn(10, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    images = colours[labels] + torch.randn(len(labels), 3, 32, 32, generator=generator)
    return TensorDataset(images, labels)


def _network(num_classes: int) -> nn.Module:
    """With batch normalisation, whose statistics have to be synchronised as well."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=4),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, num_classes),
    )


def _nothing(*args: Any) -> None:
    """The images are made as they are to be."""


datasets = SimpleNamespace(CIFAR10=_cifar10)
models = SimpleNamespace(resnet18=_network)
transforms = SimpleNamespace(
    Compose=_nothing,
    Normalize=lambda mean, std: None,
    RandomCrop=lambda size, padding: None,
    RandomHorizontalFlip=_nothing,
    ToTensor=_nothing,
)
