"""The data: scikit-learn's handwritten digits, 1,797 real images of 8 x 8 pixels."""

import torch
from sklearn.datasets import load_digits as load_bunch
from torch.utils.data import TensorDataset


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the validation set, the latter a held-out fifth.

    Both give images `[1, 8, 8]`, floats in -1..1. The split is always the same.
    """
    images = torch.from_numpy(load_bunch().images).float().unsqueeze(1) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    valid, train = order.tensor_split([len(order) // 5])
    return TensorDataset(images[train]), TensorDataset(images[valid])
