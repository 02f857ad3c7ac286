"""State, and its way to the disk and back."""

from __future__ import annotations

import gc
import io
import os
import random
import weakref
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from .. import checkpoint
from ..state import AttributeWrapper, RNGState, StateManager, WriteOnlyWrapper, plain


class Owner:
    def __init__(self) -> None:
        self.model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        self.optim = torch.optim.Adam(self.model.parameters())
        self.items = [1, 2]
        self.best: dict[str, Any] = {"a": 1}
        self.count = 3
        self.nothing = None


def manager(owner: Owner, *names: str) -> StateManager:
    made = StateManager()
    for name in names:
        made.register(name, AttributeWrapper(owner, name))
    return made


def through_file(state: Any) -> Any:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_attributes_of_all_kinds_are_restored_in_place() -> None:
    names = ("model", "model.0", "optim", "items", "best", "count", "nothing")
    owner, other = Owner(), Owner()
    owner.items, owner.best, owner.count = [9], {"b": 2}, 4
    owner.model(torch.randn(4, 2)).sum().backward()
    owner.optim.step()
    items, best = other.items, other.best
    manager(other, *names).load_state_dict(through_file(manager(owner, *names).state_dict()))
    assert other.items is items
    assert other.best is best
    assert (items, best, other.count) == ([9], {"b": 2}, 4)
    theirs = owner.model.state_dict()
    assert all(torch.equal(v, theirs[k]) for k, v in other.model.state_dict().items())
    assert other.optim.state_dict()["state"][0]["step"] == 1


def test_own_state_does_not_empty_and_is_a_copy() -> None:
    owner = Owner()
    states = manager(owner, "items", "best")
    state = states.state_dict()
    states.load_state_dict(state)
    assert (owner.items, owner.best) == ([1, 2], {"a": 1})
    owner.items.append(3)
    assert state["items"] == [1, 2]


def test_mistakes_are_named() -> None:
    owner = Owner()
    with pytest.raises(AttributeError, match=r"'model\.gone'"):
        manager(owner, "model.gone")
    states = manager(owner, "count")
    with pytest.raises(ValueError, match="'count' is registered"):
        states.register("count", AttributeWrapper(owner, "count"))
    with pytest.raises(TypeError, match="'nothing' is None"):
        AttributeWrapper(owner, "nothing").load_state_dict({"a": 1})


def test_strict_names_all_differences_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    owner = Owner()
    states = manager(owner, "count", "items")
    with pytest.raises(KeyError, match=r"'items'.*'other'"):
        states.load_state_dict({"count": 7, "other": 1})
    assert owner.count == 3
    states.load_state_dict({"count": 7, "other": 1}, strict=False)
    assert owner.count == 7
    assert "other" in caplog.text


def test_write_only_is_saved_and_never_loaded() -> None:
    owner = Owner()
    states = StateManager()
    states.register("count", AttributeWrapper(owner, "count"), write_only=True)
    assert isinstance(states.sources["count"], WriteOnlyWrapper)
    assert states.state_dict() == {"count": 3}
    states.load_state_dict({})
    states.load_state_dict({"count": 8})
    assert owner.count == 3


def test_the_owner_is_not_kept_alive() -> None:
    owner = Owner()
    wrapper = AttributeWrapper(owner, "model")
    gone = weakref.ref(owner)
    gc.disable()
    try:
        del owner
        assert gone() is None
    finally:
        gc.enable()
    assert wrapper.name == "model"


def test_plain_converts_what_researchers_have() -> None:
    class Colour(Enum):
        red = 1

    config = OmegaConf.create({"a": {"lr": 0.1}, "b": "${a.lr}", "c": [1, 2]})
    value = {"cfg": config, "e": Colour.red, "n": np.float32(2), "p": Path("x"), "t": (1, [None])}
    expected = {
        "cfg": {"a": {"lr": 0.1}, "b": 0.1, "c": [1, 2]},
        "e": "red",
        "n": 2.0,
        "p": "x",
        "t": (1, [None]),
    }
    assert through_file(plain(value)) == expected
    assert torch.equal(plain(np.arange(3)), torch.arange(3))
    assert hasattr(plain(nn.BatchNorm1d(2).state_dict()), "_metadata")
    with pytest.raises(TypeError, match=r"state\.a\.0 is a object"):
        plain({"a": [object()]})


def test_generators_are_restored_exactly() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.randn()), torch.rand(()).item()]

    np.random.randn()
    state = through_file(plain(RNGState().state_dict()))
    first = draw()
    RNGState().load_state_dict(state)
    assert draw() == first
    RNGState().load_state_dict(state)
    assert draw() == first


def test_checkpoints_come_back_and_the_previous_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.th"
    assert checkpoint.load(path) is None
    for epoch in range(3):
        checkpoint.save({"epoch": epoch, "x": torch.ones(4)}, path)
    state = checkpoint.load(path)
    assert state is not None
    assert state["epoch"] == 2
    assert checkpoint.read(checkpoint.previous_path(path))["epoch"] == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.previous.th", "checkpoint.th"]


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    data[data.index(b"\x00\x00\x80?" * 8)] ^= 1  # a bit of a weight
    whole = path.read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "empty": b"", "foreign": b"hi"}
    path.write_bytes(broken.get(how, bytes(data)))


@pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "foreign"])
def test_damage_is_noticed(how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "checkpoint.th"
    for epoch in range(2):
        checkpoint.save({"epoch": epoch, "x": torch.ones(64)}, path)
    damage(path, how)
    state = checkpoint.load(path)
    assert state is not None
    assert state["epoch"] == 0
    assert str(path) in caplog.text
    damage(checkpoint.previous_path(path), how)
    before = path.read_bytes()
    with pytest.raises(checkpoint.CheckpointError, match=r"checkpoint\.previous"):
        checkpoint.load(path)
    assert path.read_bytes() == before


class Evil:
    def __reduce__(self) -> Any:
        return os.mkdir, ("evil",)


def test_a_checkpoint_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"x": Evil()}, "checkpoint.th")
    with pytest.raises(checkpoint.CheckpointError):
        checkpoint.load(tmp_path / "checkpoint.th")
    assert not (tmp_path / "evil").exists()
