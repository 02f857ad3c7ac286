"""State, and its way to the disk and back."""

from __future__ import annotations

import io
import random
from argparse import Namespace
from collections import deque
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from ..ema import EMA
from ..modules import fit_tensors
from ..plain import to_plain
from ..rng import get_rng_state, set_rng_state
from ..state import AttributeWrapper, StateManager, WriteOnlyWrapper
from ..utils import UserError


class Owner:
    def __init__(self) -> None:
        self.model: Any = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
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
    state = AttributeWrapper(owner, "optim").state_dict()
    with pytest.raises(TypeError, match="None here, with the state of a Adam"):
        AttributeWrapper(owner, "nothing").load_state_dict(state)


def test_strict_names_all_differences_and_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    owner = Owner()
    states = manager(owner, "model", "count", "items")
    state = {"count": 7, "other": 1, "model": states.sources["model"].state_dict()}
    fine = state["model"].pop("0.weight") + 1
    state["model"] |= {"0.bias": torch.ones(3), "2.bias": torch.ones(2)}
    state["model"]["1.weight"] = torch.full((2,), 5.0)
    before = owner.model[1].weight.clone()
    with pytest.raises(RuntimeError) as error:
        states.load_state_dict(state)
    for problem in (
        "other: unexpected",
        "model.0.weight: missing",
        "model.2.bias: unexpected",
        "model.0.bias: (3,) in the checkpoint, (2,) here",
    ):
        assert problem in str(error.value)
    assert owner.count == 3
    assert torch.equal(owner.model[1].weight, before)
    assert states.missing(state) == ["items: missing"]
    states.load_state_dict(state, strict=False)
    assert owner.count == 7
    assert owner.model[1].weight.tolist() == [5.0, 5.0]
    assert not torch.equal(owner.model[0].weight, fine)
    assert "model.2.bias: unexpected" in caplog.text


def test_names_do_not_tell_whether_a_module_is_compiled() -> None:
    owner, other = Owner(), Owner()
    bare = AttributeWrapper(owner, "model").state_dict()
    linear: Any = torch.compile(other.model[0])
    other.model = torch.compile(nn.Sequential(linear, other.model[1]))
    wrapper = AttributeWrapper(other, "model")
    compiled = wrapper.state_dict()
    assert compiled.keys() == bare.keys()
    assert set(bare._metadata) == set(compiled._metadata) == {"", "0", "1"}
    assert fit_tensors(owner.model.state_dict(), bare, "model")[1] == []
    wrapper.load_state_dict(bare)
    assert torch.equal(linear.weight, owner.model[0].weight)
    AttributeWrapper(owner, "model").load_state_dict(compiled)


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def test_averages_of_weights() -> None:
    model = nn.BatchNorm1d(1).to(torch.bfloat16)
    ema = EMA({"model": model}, decay=0.9)
    address = ema.states["model"]["weight"].data_ptr()
    for step in range(1, 4):
        with torch.no_grad():
            model.weight.fill_(1 + step)
        assert model.num_batches_tracked is not None
        model.num_batches_tracked += 1
        ema.update()
    expected = 1.0
    for step in range(1, 4):
        expected = 0.9 * expected + 0.1 * (1 + step)
    assert ema.states["model"]["weight"].item() == pytest.approx(expected, rel=1e-6)
    assert ema.states["model"]["num_batches_tracked"].item() == 3
    with suppress(KeyError), ema.swapped():
        assert model.weight.item() == pytest.approx(expected, rel=1e-2)
        raise KeyError
    assert model.weight.item() == 4
    state = through_file(to_plain(ema.state_dict()))
    ema.states["model"]["weight"].zero_()
    ema.load_state_dict(state)
    assert ema.states["model"]["weight"].item() == pytest.approx(expected)
    ema.reset()
    assert ema.states["model"]["weight"].item() == 4
    assert ema.states["model"]["weight"].data_ptr() == address
    with pytest.raises(UserError, match="below 1"):
        EMA({}, decay=1)


def test_averages_follow_buffers_that_are_replaced() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean: torch.Tensor
            self.register_buffer("mean", torch.zeros(1))

        def forward(self, x: torch.Tensor) -> None:
            self.mean = 0.5 * self.mean + 0.5 * x

    model: Any = nn.Sequential(Running(), nn.BatchNorm1d(1))
    ema = EMA({"model": model}, decay=0.0)
    model.double()
    model[0](torch.ones(1))
    model[1].running_mean.fill_(3.0)
    ema.update()
    assert ema.states["model"]["0.mean"].item() == 0.5
    assert ema.states["model"]["1.running_mean"].item() == 3.0
    ema.states["model"]["0.mean"].zero_()
    ema.reset()
    assert ema.states["model"]["0.mean"].item() == 0.5


def test_lent_and_restored_weights_keep_the_versions_of_their_modules() -> None:
    class Versioned(nn.Linear):
        _version = 2

        def _load_from_state_dict(self, state: Any, prefix: str, metadata: Any, *args: Any) -> None:
            if metadata.get("version", 1) < 2:
                state[f"{prefix}weight"] = state[f"{prefix}weight"] * 100
            super()._load_from_state_dict(state, prefix, metadata, *args)

    model = Versioned(1, 1)
    nn.init.ones_(model.weight)
    with EMA({"model": model}).swapped():
        assert model.weight.item() == 1
    owner = Owner()
    owner.model = model
    states = manager(owner, "model")
    states.load_state_dict(through_file(states.state_dict()))
    assert model.weight.item() == 1


class Mode(Enum):
    warm = 1
    cold = 2


class Range(NamedTuple):
    low: float
    high: float


def test_values_keep_their_type_and_place() -> None:
    def build(n: int) -> Any:
        values: Any = Owner()
        values.queue = deque([n], maxlen=2)
        values.array = np.full(3, n)
        values.mode = Mode(n)
        values.path = Path(str(n))
        values.half = np.float16(n / 2)
        values.options = Namespace(n=n)
        values.span = Range(n, n)
        values.scale = nn.Parameter(torch.full((2,), float(n)))
        values.bank = torch.zeros(n, 2)
        names = ("queue", "array", "mode", "path", "span", "scale", "bank", "half", "options")
        values.manager = manager(values, *names)
        return values

    one, two = build(1), build(2)
    queue, scale = one.queue, one.scale
    one.manager.load_state_dict(through_file(two.manager.state_dict()))
    assert one.queue is queue == two.queue
    assert one.queue.maxlen == 2
    assert isinstance(one.array, np.ndarray)
    assert one.array.tolist() == [2, 2, 2]
    assert (one.mode, one.path, one.span.high) == (Mode.cold, Path("2"), 2)
    assert (one.half, type(one.half), one.options) == (1, np.float16, Namespace(n=2))
    assert one.scale is scale  # as an optimizer knows it
    assert scale.tolist() == [2, 2]
    assert scale.requires_grad
    assert one.bank.shape == (2, 2)
    one.scale = nn.Parameter(torch.zeros(3))
    with pytest.raises(UserError, match=r"scale: \(2,\) in the checkpoint, \(3,\) here"):
        one.manager.load_state_dict(two.manager.state_dict())
    with pytest.raises(ValueError, match="rename yours"):
        one.manager.register("checkpoint", AttributeWrapper(one, "path"))


def test_other_groups_of_parameters_are_named_before_anything_is_loaded() -> None:
    def build(*sizes: int) -> Any:
        owner: Any = Owner()
        groups = [{"params": [nn.Parameter(torch.zeros(1)) for _ in range(n)]} for n in sizes]
        owner.optim = torch.optim.SGD(groups, lr=0.1)
        owner.manager = manager(owner, "model", "optim")
        return owner

    other, owner = build(3), build(2, 1)
    saved = other.manager.state_dict()
    before = weights(owner.model)
    said = r"optim: groups of \[3\] parameters in the checkpoint, of \[2, 1\] here"
    with pytest.raises(UserError, match=said):
        owner.manager.load_state_dict(saved)
    assert torch.equal(weights(owner.model), before)
    owner.manager.load_state_dict(saved, strict=False)
    assert not torch.equal(weights(owner.model), before)


def test_write_only_is_saved_and_never_loaded() -> None:
    owner = Owner()
    states = StateManager()
    states.register("count", AttributeWrapper(owner, "count"), write_only=True)
    assert isinstance(states.sources["count"], WriteOnlyWrapper)
    assert states.state_dict() == {"count": 3}
    states.load_state_dict({})
    states.load_state_dict({"count": 8})
    assert owner.count == 3


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
    assert through_file(to_plain(value)) == expected
    assert torch.equal(to_plain(np.arange(3)), torch.arange(3))
    assert hasattr(to_plain(nn.BatchNorm1d(2).state_dict()), "_metadata")
    with pytest.raises(TypeError, match=r"state\.a\.0 is a object"):
        to_plain({"a": [object()]})


def test_generators_are_restored_exactly() -> None:
    def draw() -> list[float]:
        return [random.random(), float(np.random.randn()), torch.rand(()).item()]

    np.random.randn()
    state = through_file(to_plain(get_rng_state()))
    first = draw()
    set_rng_state(state)
    assert draw() == first
    set_rng_state(state)
    assert draw() == first
