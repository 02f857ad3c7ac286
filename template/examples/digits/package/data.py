"""The data: scikit-learn's handwritten digits, 1,797 real images of 8 x 8 pixels."""

import torch
from sklearn.datasets import load_digits as load_bunch
from torch.utils.data import TensorDataset

CLASSES = 10


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the validation set, the latter a held-out fifth.

    Both give images `[1, 8, 8]`, floats in 0..1, and labels 0..9. The split is always the same.
    """
    bunch = load_bunch()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(bunch.target).long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    valid, train = order.tensor_split([len(order) // 5])
    return TensorDataset(images[train], labels[train]), TensorDataset(images[valid], labels[valid])
