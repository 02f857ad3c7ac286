"""The data: scikit-learn's handwritten digits, 1,797 real images of 8 x 8 pixels."""

from importlib.metadata import distribution

import numpy as np
import torch
from torch.utils.data import TensorDataset


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the training and the validation set, the latter a held-out fifth.

    Both give images `[1, 8, 8]`, floats in -1..1. The split is always the same.
    """
    # Where it lies: to import scikit-learn, and SciPy with it, takes half as long as PyTorch.
    path = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(str(path), np.float32, delimiter=","))
    images = rows[:, :64].view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    valid, train = order.tensor_split([len(order) // 5])
    return TensorDataset(images[train]), TensorDataset(images[valid])
