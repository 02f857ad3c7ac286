"""Values of all kinds, through a commit and a resume, at the top and in containers."""

from __future__ import annotations

import enum
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from core import BaseSolver
from core.plain import from_plain, to_plain


class Phase(enum.IntEnum):
    warm = 1


class Point(NamedTuple):
    x: int
    y: Any


class MyTensor(torch.Tensor):
    pass


class MyDict(dict[str, int]):
    pass


class Holder(BaseSolver):
    def __init__(self, folder: Path, value: Any = None) -> None:
        super().__init__(folder)
        self.value = value
        self.inner: dict[str, Any] = {"list": [value]}
        self.register_stateful("value", "inner")


KINDS = {
    "None": None,
    "text": "a",
    "complex": 1 + 2j,
    "tuple": (1, (2.0, None)),
    "set": {1, 2},
    "frozenset": frozenset({1, 2}),
    "Counter": Counter("aab"),
    "OrderedDict": OrderedDict(b=1, a=2),
    "deque": deque([1, 2], maxlen=3),
    "Enum": Phase.warm,
    "named tuple": Point(1, Phase.warm),
    "Path": Path("a/b"),
    "Namespace": Namespace(a=Path("c")),
    "float32": np.float32(0.1),
    "bool of NumPy": np.bool_(True),
    "text of NumPy": np.str_("a"),
    "a default": [defaultdict(list, a=[1])],
    "keys": {(1, "a"): 1, Phase.warm: 2},
}
TENSORS = {
    "array": np.arange(6, dtype=np.uint16).reshape(2, 3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "conjugated": torch.tensor([1 + 2j, 3]).conj(),
    "negated": torch.tensor([1 + 2j, 3]).conj().imag,
    "sparse": torch.eye(3).to_sparse(),
}


def resumed(folder: Path, value: Any) -> list[Any]:
    solver = Holder(folder, value)
    solver.run_stage("train", dict)
    solver.commit()
    again = Holder(folder)
    again.inner = {}
    assert again.restore()
    return [again.value, again.inner["list"][0]]


@pytest.mark.parametrize("name", KINDS)
def test_a_value_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    value = KINDS[name]
    for found in resumed(tmp_path, value):
        assert type(found) is type(value)
        assert found == value
        assert repr(found) == repr(value)


@pytest.mark.parametrize("name", TENSORS)
def test_an_array_comes_back_as_it_was(name: str, tmp_path: Path) -> None:
    value: Any = TENSORS[name]
    for found in resumed(tmp_path, value):
        assert type(found) is type(value)
        assert found.dtype == value.dtype
        assert (found.to_dense() == value.to_dense() if name == "sparse" else found == value).all()


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2).as_subclass(MyTensor),
        MyDict(a=1),
        OmegaConf.create({"a": 1}),
        np.ma.masked_array([1, 2]),
        np.array(["a"]),
        np.longdouble(1),
        np.timedelta64(5, "ns"),
        np.ones(2, dtype=">f4"),
        PurePosixPath("a"),
        defaultdict(lambda: 1),
        torch.return_types.max((torch.ones(1), torch.ones(1))),
        object(),
        enum.Enum("Local", "a").a,  # type: ignore[attr-defined]
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_value_that_could_not_come_back_is_refused_by_name(value: Any, tmp_path: Path) -> None:
    solver = Holder(tmp_path)
    solver.inner = {"list": [value]}
    solver.run_stage("train", dict)
    with pytest.raises(TypeError, match=r"inner\.list\.0 is a"):
        solver.commit()
    assert not solver.checkpoint_path.exists()


def test_a_parameter_in_a_container_is_refused(tmp_path: Path) -> None:
    """It would be replaced, and its optimizer would train the old one."""
    solver = Holder(tmp_path)
    solver.inner["weight"] = nn.Parameter(torch.zeros(1))
    with pytest.raises(TypeError, match="ParameterList"):
        solver.state_dict()


def test_a_file_names_no_code(tmp_path: Path) -> None:
    forged: Any = OrderedDict({"enum": "a"})
    for address in ("os:system", "gone:Phase", "builtins:int", ""):
        forged.mark = address
        with pytest.raises(RuntimeError, match="enum"):
            from_plain(forged)


def test_a_plain_state_is_read_with_the_defaults_of_torch(tmp_path: Path) -> None:
    everything = {**KINDS, **TENSORS}
    path = tmp_path / "state.th"
    torch.save(to_plain(everything, exact=True), path)
    again = from_plain(torch.load(path, weights_only=True))
    assert {name: type(value) for name, value in again.items()} == {
        name: type(value) for name, value in everything.items()
    }
