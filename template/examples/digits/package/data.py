"""The data: images of ten classes, from what comes with scikit-learn or from CIFAR-10."""

import pickle
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

REPO = Path(__file__).parent.parent
CLASSES = 10


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Images and their classes.

    Args:
        images: bytes, `[N, C, H, W]`.
        labels: `[N]`, from 0.
        white: the value that becomes 1.0.
    """

    def __init__(self, images: Tensor, labels: Tensor, white: int) -> None:
        self.images = images
        self.labels = labels
        self.white = white

    @property
    def shape(self) -> torch.Size:
        """Of an image: `[C, H, W]`."""
        return self.images.shape[1:]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return image number `index`, `[C, H, W]`, floats in 0..1, and its class."""
        return self.images[index].float() / self.white, self.labels[index]


def load(name: str, folder: str | None) -> tuple[Images, Images]:
    """Return the training and the validation set of that name; ValueError if there is none.

    Args:
        name: `digits` or `cifar10`.
        folder: where files are kept that were downloaded; a relative one is in the repo.
    """
    if name == "digits":
        return load_digits()
    if name == "cifar10":
        return load_cifar10(REPO / (folder or "data"))
    raise ValueError(f"data.name={name}: there are digits and cifar10")


def load_digits() -> tuple[Images, Images]:
    """Scikit-learn's handwritten digits, 1,797 of 8 x 8 pixels; every fifth is held out.

    The split is always the same.
    """
    # Where it lies: to import scikit-learn, and SciPy with it, takes half as long as PyTorch.
    path = distribution("scikit-learn").locate_file("sklearn/datasets/data/digits.csv.gz")
    rows = torch.from_numpy(np.loadtxt(str(path), np.uint8, delimiter=","))
    images, labels = rows[:, :64].view(-1, 1, 8, 8), rows[:, 64].long()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    valid, train = order.tensor_split([len(order) // 5])
    return Images(images[train], labels[train], 16), Images(images[valid], labels[valid], 16)


def load_cifar10(folder: Path) -> tuple[Images, Images]:
    """CIFAR-10: 60,000 photographs of 32 x 32 pixels in colour, the last 10,000 held out.

    Downloaded by torchvision, if they are not in `folder / "cifar-10-batches-py"`.
    """
    batches = folder / "cifar-10-batches-py"
    train = [batches / f"data_batch_{number}" for number in range(1, 6)]
    valid = [batches / "test_batch"]
    if not all(path.is_file() for path in train + valid):
        download_cifar10(folder)
    return read_cifar10(train), read_cifar10(valid)


def read_cifar10(paths: list[Path]) -> Images:
    """Read files of CIFAR-10's version for Python: pickled dicts with `data` and `labels`."""
    images, labels = [], []
    for path in paths:
        try:
            with path.open("rb") as file:
                batch = ArraysOnly(file, encoding="bytes").load()
            images.append(torch.from_numpy(batch[b"data"]).view(-1, 3, 32, 32))
            labels.append(torch.tensor(batch[b"labels"]))
        except (pickle.UnpicklingError, EOFError, KeyError, RuntimeError, TypeError) as error:
            raise ValueError(f"{path} is no batch of CIFAR-10, delete it: {error}") from None
    return Images(torch.cat(images), torch.cat(labels), 255)


class ArraysOnly(pickle.Unpickler):
    """Reads pickles of arrays and plain values; others, which could run code, are refused."""

    def find_class(self, module: str, name: str) -> Any:
        """Return a class or function, if pickles of NumPy arrays need it."""
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return np.empty(0).__reduce__()[0]  # the same function, wherever NumPy has it now
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def download_cifar10(folder: Path) -> None:
    """Download the files with torchvision, once if several processes ask."""
    import fcntl

    try:
        from torchvision.datasets import CIFAR10
    except (ImportError, RuntimeError) as error:  # the latter, if it was built for another torch
        raise FileNotFoundError(
            f"CIFAR-10 is not in {folder / 'cifar-10-batches-py'}, and torchvision can't download "
            f"it ({error}): pip install -e '.[cifar10]', or unpack cifar-10-python.tar.gz from "
            f"https://www.cs.toronto.edu/~kriz/cifar.html in {folder}"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "cifar10.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        CIFAR10(str(folder), download=True)
