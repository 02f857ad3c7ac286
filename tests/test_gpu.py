"""On a real GPU: `nox -s gpu`. Elsewhere these tests are skipped; TEST_DEVICE=cpu tries them there.

What a fake device can show is in core/test_devices.py.
"""

from __future__ import annotations

import os
import re
import signal
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from core import BaseSolver, distrib
from core.checkpoint import Policy
from core.data import loader
from core.ema import EMA
from core.plain import from_plain
from core.stop import Stopped
from core.tests.processes import on_ranks
from core.writer import wait_for_writes

from .commands import Command, run
from .conftest import Copy
from .core.test_steps import TwoEpochs
from .faults import load, same

DEVICE = os.environ.get("TEST_DEVICE", "cuda")
GPUS = torch.cuda.device_count() if DEVICE == "cuda" else 2
pytestmark = pytest.mark.skipif(DEVICE == "cuda" and not GPUS, reason="there is no GPU here")
two_gpus = pytest.mark.skipif(GPUS < 2, reason="there is one GPU only")


class Trainer(TwoEpochs):
    """Trains a model with dropout, random numbers of the device, and averaged weights."""

    def __init__(self, folder: Path, device: str = DEVICE, stop: int = 0) -> None:
        super().__init__(folder, Policy(minutes=0))
        torch.manual_seed(0)
        self.device = distrib.device(device)
        layers = nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.5), nn.Linear(256, 1)
        self.model = nn.Sequential(*layers).to(self.device)
        distrib.broadcast_model(self.model)
        self.optim = torch.optim.AdamW(self.model.parameters())
        self.ema = EMA({"model": self.model}, 0.9)
        self.seen = {"noise": torch.zeros(1, device=self.device)}
        self.register_stateful("model", "optim", "ema", "seen")
        self.loader = loader(TensorDataset(torch.randn(512, 64)), 8, shuffle=True)
        self.stop = stop  # in this step of the second epoch
        self.waits: list[str] = []  # of the host, in steps without a line

    def train(self) -> dict[str, float]:
        steps = self.steps(self.loader, updates=0, finite=["loss"])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for (batch,) in steps:
                if DEVICE == "cuda":
                    torch.cuda.set_sync_debug_mode("warn" if 8 < steps.step < 48 else "default")
                noise = torch.rand(1, device=self.device)
                self.seen["noise"] += noise
                loss = (self.model(batch.to(self.device, non_blocking=True)) + noise).pow(2).mean()
                with distrib.eager_sync_model(self.model):
                    loss.backward()
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                steps.log({"loss": loss, "norm": norm})
                self.optim.step()
                self.optim.zero_grad()
                self.ema.update()
                if self.epoch == 2 and steps.step == self.stop > 0:
                    signal.raise_signal(signal.SIGTERM)
        self.waits += [str(w.message) for w in caught if "synchronizing CUDA op" in str(w.message)]
        return steps.metrics()


def numbers(solver: Trainer) -> list[Any]:
    return [solver.model.state_dict(), solver.optim.state_dict(), solver.ema.states, solver.seen]


@pytest.fixture(autouse=True)
def no_warnings_from_waits() -> Any:
    yield
    if DEVICE == "cuda":
        torch.cuda.set_sync_debug_mode("default")


def test_a_step_waits_for_nothing(tmp_path: Path) -> None:
    solver = Trainer(tmp_path)
    solver.run()
    assert solver.waits == []


@pytest.mark.parametrize("device", [DEVICE, pytest.param(f"{DEVICE}:1", marks=two_gpus)])
def test_a_run_stopped_within_an_epoch_is_the_whole_run(tmp_path: Path, device: str) -> None:
    device = "cpu" if DEVICE == "cpu" else device
    whole = Trainer(tmp_path / "whole", device)
    whole.run()
    with suppress(Stopped):
        Trainer(tmp_path / "parts", device, stop=20).run()
    resumed = Trainer(tmp_path / "parts", device)
    torch.rand(5, device=resumed.device)
    resumed.run()
    assert resumed.seen["noise"].device == resumed.device
    assert same(numbers(resumed), numbers(whole))


def test_a_commit_holds_what_the_next_step_overwrites(tmp_path: Path) -> None:
    class Large(BaseSolver):
        def __init__(self) -> None:
            super().__init__(tmp_path)
            self.large = torch.arange(2.0**24, device=distrib.device(DEVICE))
            self.register_stateful("large")

    solver = Large()
    wanted = solver.large.cpu().clone()
    with solver.running():
        for _ in range(3):  # later saves use the memory of the first again
            solver.commit()
            solver.large += 1
            wait_for_writes()
            assert torch.equal(from_plain(load(solver.checkpoint_path)["large"]), wanted)
            wanted += 1


def test_a_nan_is_named_by_the_device(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from tests import test_gpu\n"
        "solver = test_gpu.Trainer(Path('run'))\n"
        "with solver.running():\n"
        "    solver.model[0].weight.data[0, 0] = float('nan')\n"
        "    solver.run_stage('train', solver.train)\n"
    )
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    command = Command(tmp_path, "-c", code, env=env)
    assert command.wait() != 0
    assert "loss is NaN or infinite in step 1 of train, rank 0" in command.said


OPTIONS = {
    "basic": [],
    "digits": ["debug=limit", "data.num_workers=2"],
    "text": ["debug=limit", "data.updates_per_epoch=5"],
    "adversarial": ["debug=limit"],
}


@pytest.mark.parametrize("example", OPTIONS)
def test_an_example_trains_and_is_loaded(example: str, copy: Copy, tmp_path: Path) -> None:
    project = copy(tmp_path, example=example, tracker="none")
    train = ["-m", "dora", "run", f"device={DEVICE}", *OPTIONS[example]]
    run(project, *train, "epochs=2")
    [folder] = (project / "outputs" / "xps").iterdir()
    run(project, "-c", f"from my_research.train import load_solver as load; load({folder.name!r})")
    assert len(load(folder / "checkpoint.th")["history"]) == 2


@pytest.mark.parametrize("options", [["model.compile=true"], ["optim.bf16=true"]])
def test_digits_compiled_and_in_half_precision(
    options: list[str], copy: Copy, tmp_path: Path
) -> None:
    project = copy(tmp_path, tracker="none")
    run(project, "-m", "dora", "run", "epochs=2", f"device={DEVICE}", *options)
    [folder] = (project / "outputs" / "xps").iterdir()
    [*_, last] = load(folder / "checkpoint.th")["history"]
    assert last["valid"]["acc"] > 0.5


def average(folder: Path) -> list[float]:
    solver = Trainer(folder)
    solver.run()
    return [solver.history[-1]["train"]["loss"], next(solver.model.parameters()).sum().item()]


@two_gpus
def test_two_ranks_train_alike(tmp_path: Path) -> None:
    zero, one = on_ranks(average, tmp_path)
    assert isinstance(zero, list), zero
    assert zero == one


def disagree() -> str:
    tensor = torch.ones(3, device=distrib.device(DEVICE))
    distrib.all_reduce(tensor)
    try:
        if distrib.rank():
            distrib.average_metrics({"loss": 1.0})
        distrib.all_reduce(tensor)
        return str(tensor.tolist())
    except RuntimeError as error:
        return str(error)


@two_gpus
def test_ranks_that_disagree_are_named() -> None:
    found = on_ranks(disagree)
    assert re.search("rank 1 is in average_metrics; rank 0 in all_reduce", found[1]), found
