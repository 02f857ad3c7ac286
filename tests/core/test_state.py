"""States of modules and optimizers as researchers have them, saved and restored."""

from __future__ import annotations

import gc
import os
import signal
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.ao.quantization.observer import PerChannelMinMaxObserver
from torch.optim.lr_scheduler import (
    CosineAnnealingWarmRestarts,
    CyclicLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
)
from torch.optim.swa_utils import AveragedModel

from core import BaseSolver
from core.state import AttributeWrapper
from core.stop import Stopped
from core.utils import UserError


class Part(BaseSolver):
    """Trains a model in some precision."""

    def __init__(
        self,
        folder: Path,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
        schedule: Callable[[Any], Any] = lambda optim: LambdaLR(optim, lambda step: 1.0),
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(folder)
        torch.manual_seed(0)
        self.model = nn.Linear(2, 1).to(dtype)
        self.optim = optimizer(self.model.parameters(), lr=0.1)
        self.schedule = schedule(self.optim)
        self.register_stateful("model", "optim", "schedule")

    def train(self) -> dict[str, float]:
        self.optim.zero_grad()
        loss = self.model(torch.full((3, 2), 0.1 * self.epoch, dtype=self.model.weight.dtype)).sum()
        loss.backward()
        self.optim.step()
        plateau = isinstance(self.schedule, ReduceLROnPlateau)
        self.schedule.step(*[loss.item()] if plateau else [])
        return {"lr": self.optim.param_groups[0]["lr"], "loss": loss.item()}

    def until(self, epochs: int) -> list[Any]:
        with warnings.catch_warnings(), self.running():
            warnings.simplefilter("ignore")
            while self.epoch <= epochs:
                self.run_stage("train", self.train)
                self.commit()
        return [{n: v for n, v in e["train"].items() if n != "duration"} for e in self.history]


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "SequentialLR": lambda optim: SequentialLR(
        optim, [LinearLR(optim, total_iters=4), MultiStepLR(optim, [1, 2])], milestones=[4]
    ),
    "MultiStepLR": lambda optim: MultiStepLR(optim, [2, 2, 5]),
    "OneCycleLR": lambda optim: OneCycleLR(optim, 0.2, total_steps=8),
    "CyclicLR": lambda optim: CyclicLR(optim, 0.1, 0.2, 2, cycle_momentum=False),
    "restarts": lambda optim: CosineAnnealingWarmRestarts(optim, 3),
    "ReduceLROnPlateau": lambda optim: ReduceLROnPlateau(optim, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("after", [2, 4, 6])
def test_a_schedule_goes_on(name: str, after: int, tmp_path: Path) -> None:
    whole = Part(tmp_path / "whole", schedule=SCHEDULES[name]).until(8)
    Part(tmp_path / "parts", schedule=SCHEDULES[name]).until(after)
    resumed = Part(tmp_path / "parts", schedule=SCHEDULES[name])
    assert resumed.until(8) == whole
    again = Part(tmp_path / "parts", schedule=SCHEDULES[name])
    again.restore()
    assert isinstance(resumed.schedule, (LRScheduler, ReduceLROnPlateau))
    for ours, theirs in zip(vars(again.schedule), vars(resumed.schedule), strict=True):
        assert type(vars(again.schedule)[ours]) is type(vars(resumed.schedule)[theirs])


class Wide(torch.optim.SGD):
    """Keeps a float32 copy of weights of half precision, and a count of bytes."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for param in self.param_groups[0]["params"]:
            state = self.state[param]
            if not state:
                state["master"] = param.detach().float()
                state["bytes"] = torch.zeros(3, dtype=torch.uint8)
            state["master"] -= 0.01 * param.grad.float()
            state["bytes"] += 1
            param.data.copy_(state["master"])


@pytest.mark.parametrize("kind", [torch.optim.NAdam, torch.optim.Adam, torch.optim.RAdam, Wide])
def test_an_optimizer_of_half_precision_goes_on_exactly(kind: Any, tmp_path: Path) -> None:
    whole = Part(tmp_path / "whole", kind, dtype=torch.float16).until(6)
    Part(tmp_path / "parts", kind, dtype=torch.float16).until(3)
    assert Part(tmp_path / "parts", kind, dtype=torch.float16).until(6) == whole


class Scales(nn.Module):
    """Extra state that changes its size, as scales of FP8 do."""

    def __init__(self) -> None:
        super().__init__()
        self.history = torch.zeros(1)

    def get_extra_state(self) -> torch.Tensor:
        return self.history

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.history = state


class Resizing(BaseSolver):
    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = nn.Sequential(PerChannelMinMaxObserver(), Scales(), nn.BatchNorm1d(2))
        self.average = AveragedModel(nn.Linear(1, 1))
        self.register_stateful("model", "average")


def test_modules_that_resize_their_state_are_restored(tmp_path: Path) -> None:
    solver = Resizing(tmp_path)
    solver.model[0](torch.ones(3, 5))
    solver.model[1].history = torch.ones(4)
    solver.average.update_parameters(nn.Linear(1, 1))
    solver.run_stage("train", dict)
    solver.commit()
    again = Resizing(tmp_path)
    assert again.model[0].min_val.shape != solver.model[0].min_val.shape
    assert again.restore()
    for ours, theirs in zip(
        again.state_dict()["model"].values(), solver.state_dict()["model"].values(), strict=True
    ):
        assert torch.equal(ours, theirs)
    assert again.average.n_averaged == 1


def test_other_tensors_still_have_to_fit(tmp_path: Path) -> None:
    solver = Resizing(tmp_path)
    solver.run_stage("train", dict)
    solver.commit()
    other = Resizing(tmp_path)
    other.model[2] = nn.BatchNorm1d(3)
    with pytest.raises(UserError, match=r"model\.2\.running_mean"):
        other.restore()


def test_a_state_that_fails_is_named(tmp_path: Path) -> None:
    class Consolidated(torch.optim.SGD):
        def state_dict(self) -> Any:
            raise RuntimeError("call consolidate_state_dict() first")

    with pytest.raises(RuntimeError, match="consolidate") as error:
        Part(tmp_path, Consolidated).until(1)
    assert "optim" in error.value.__notes__[0]


def test_a_module_without_state_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    solver = BaseSolver(tmp_path)
    solver.metric = nn.Identity()
    solver.register_stateful("metric")
    assert "metric has an empty state_dict" in caplog.text


def test_the_owner_is_not_kept_alive() -> None:
    owner = nn.Module()
    wrapper = AttributeWrapper(owner, "training")
    gone = weakref.ref(owner)
    gc.disable()
    try:
        del owner
        assert gone() is None
    finally:
        gc.enable()
    assert wrapper.name == "training"


@pytest.mark.parametrize(
    ("saved", "here"),
    [
        (None, nn.Linear(1, 1)),
        (None, torch.optim.SGD([nn.Parameter(torch.ones(1))])),
        ({"a": 1}, [1]),
        ([1], {"a": 1}),
        (nn.Linear(1, 1), [1]),
    ],
)
def test_another_kind_of_state_is_named(saved: Any, here: Any, tmp_path: Path) -> None:
    class Holder(BaseSolver):
        def __init__(self, value: Any) -> None:
            super().__init__(tmp_path)
            self.value = value
            self.register_stateful("value")

    solver = Holder(saved)
    solver.run_stage("train", dict)
    solver.commit()
    with pytest.raises(UserError, match=r"value: \w+ in the checkpoint, \w+ here"):
        Holder(here).restore()
    assert Holder(here).restore(strict=False)


class Filled(BaseSolver):
    """Fills a tensor and an array through variables from before the loop; has own generators."""

    def __init__(self, folder: Path, stop_at: int = 0) -> None:
        super().__init__(folder)
        self.tensor, self.array, self.drawn = torch.zeros(6), np.zeros(6), list[float]()
        self.stop_at = stop_at
        self.numpy_generator = np.random.default_rng(0)
        self.generator = torch.Generator().manual_seed(0)
        self.register_stateful("tensor", "array", "drawn", "numpy_generator", "generator")

    def run(self) -> None:
        with self.running():
            self.run_stage("train", self.train)
            self.commit()

    def train(self) -> None:
        tensor, array, numpy_generator = self.tensor, self.array, self.numpy_generator
        for number in (steps := self.steps(range(6), every=0)):
            tensor[number] = array[number] = number + 1
            drawn = torch.rand(1, generator=self.generator).item() + numpy_generator.random()
            self.drawn.append(drawn)
            if steps.step + 1 == self.stop_at:
                os.kill(os.getpid(), signal.SIGTERM)


def test_variables_from_before_the_loop_are_the_state_after_a_resume(tmp_path: Path) -> None:
    whole, stopped = Filled(tmp_path / "whole"), Filled(tmp_path / "stopped", stop_at=3)
    whole.run()
    with pytest.raises(Stopped):
        stopped.run()
    resumed = Filled(tmp_path / "stopped")
    resumed.run()
    assert resumed.tensor.tolist() == resumed.array.tolist() == [1, 2, 3, 4, 5, 6]
    assert resumed.drawn == whole.drawn


def test_an_expanded_tensor_is_replaced(tmp_path: Path) -> None:
    solver = Filled(tmp_path)
    solver.tensor = torch.zeros(1).expand(6)
    solver.load_state_dict({"tensor": torch.arange(6.0)})
    assert solver.tensor.tolist() == [0, 1, 2, 3, 4, 5]


def test_what_no_checkpoint_can_hold_is_refused_as_it_is_registered(tmp_path: Path) -> None:
    solver = BaseSolver(tmp_path)
    solver.environment = object()
    with pytest.raises(TypeError, match=r"environment is a object.*without state_dict"):
        solver.register_stateful("environment")
