"""CIFAR-10: read from, and trained on, a small set in its own format."""

import pickle
import struct
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from {{ cookiecutter.package_name }}.data import load_cifar10
from {{ cookiecutter.package_name }}.train import main

from .helpers import interrupt, make_solver, train

FILES = {**{f"data_batch_{number}": 20 for number in range(1, 6)}, "test_batch": 30}


ARRAY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
BYTE = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN" + 2 * b"J\xff\xff\xff\xff" + b"K\x00tb"


def pickled(value: Any) -> bytes:
    """As the Python 2 and the NumPy 1 wrote it that CIFAR-10 was made with."""
    if isinstance(value, dict):
        return b"}(" + b"".join(pickled(part) for pair in value.items() for part in pair) + b"u"
    if isinstance(value, list | tuple):
        begin, end = (b"](", b"e") if isinstance(value, list) else (b"(", b"t")
        return begin + b"".join(map(pickled, value)) + end
    if isinstance(value, np.ndarray):
        state = pickled(value.shape), BYTE, pickle.NEWFALSE, pickled(value.tobytes())
        return ARRAY + b"(K\x01" + b"".join(state) + b"tb"
    if isinstance(value, int):
        return pickle.BININT + struct.pack("<i", value)
    text = value.encode() if isinstance(value, str) else value
    return pickle.BINSTRING + struct.pack("<i", len(text)) + text


def write_cifar10(folder: Path) -> None:
    """Write a small set, in which the brightness of an image is that of its class."""
    batches = folder / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name, size in FILES.items():
        labels = [number % 10 for number in range(size)]
        data = np.repeat(np.array(labels, np.uint8) * 25, 3072).reshape(size, 3072)
        data[0, :1024] = 255  # the first image's red
        names = [f"{number}.png" for number in labels]
        batch = {"batch_label": name, "labels": labels, "data": data, "filenames": names}
        (batches / name).write_bytes(b"\x80\x02" + pickled(batch) + b".")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_cifar10(tmp_path / "data")
    return tmp_path / "data"


def test_it_is_read(folder: Path) -> None:
    train_set, valid_set = load_cifar10(folder)
    assert (len(train_set), len(valid_set)) == (100, 30)
    assert train_set.shape == (3, 32, 32)
    image, label = train_set[0]
    assert (image.dtype, label.dtype) == (torch.float32, torch.int64)
    assert image.mean((1, 2)).tolist() == [1.0, 0.0, 0.0]
    image, label = valid_set[13]
    assert label == 3
    assert torch.equal(image, torch.full((3, 32, 32), 75 / 255))


def test_a_file_that_would_run_code_is_refused(folder: Path) -> None:
    path = folder / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(b"\x80\x02cos\nmkdir\n(" + pickled(str(folder / "harm")) + b"tR.")
    with pytest.raises(ValueError, match=r"data_batch_3 is no batch .* it asks for os.mkdir"):
        load_cifar10(folder)
    assert not (folder / "harm").exists()


def test_a_file_that_was_cut_off_is_named(folder: Path) -> None:
    path = folder / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="test_batch is no batch of CIFAR-10, delete it"):
        load_cifar10(folder)


def test_without_the_data_the_cure_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    with pytest.raises(FileNotFoundError, match=r"pip install -e '\.\[cifar10\]'") as error:
        load_cifar10(tmp_path)
    assert len(str(error.value).splitlines()) == 1


def test_it_is_trained_on_and_gone_on_with(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("{{ cookiecutter.package_name | upper }}_DATA", str(folder))
    overrides = ["data=cifar10", "epochs=2", "data.batch_size=20", "model.channels=4"]
    whole = train(tmp_path / "whole", *overrides)
    assert [len(epoch["valid"]) for epoch in whole.history] == [3, 3]

    interrupt(make_solver(tmp_path / "killed", *overrides), epoch=2, ask=True)
    resumed = train(tmp_path / "killed", *overrides)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value)


def test_it_makes_another_run_than_digits() -> None:
    runs = [main.get_xp(argv) for argv in ([], ["data=digits"], ["data=cifar10"])]
    assert runs[0].sig == runs[1].sig != runs[2].sig
    assert runs[2].cfg.data.batch_size == 128
    assert main.get_xp(["data=cifar10", "data.batch_size=64"]).cfg.data.batch_size == 64
