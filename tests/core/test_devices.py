"""Runs on an accelerator: what waits for it, and what comes back to it.

Each test runs in a process of its own, where the devices of `fake_accelerator` exist.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import time
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import TensorDataset

from core import BaseSolver, checkpoint, distrib, provenance, rng
from core.checkpoint import Policy
from core.data import loader
from core.distrib import board
from core.ema import EMA
from core.stop import Stopped
from core.utils import UserError
from core.writer import wait_for_writes

from .. import fake_accelerator as fake
from ..commands import ROOT, Command, run
from ..conftest import Copy

PINNED = "".join(re.findall(r"^torch==(.*)", Path(ROOT, "constraints.txt").read_text(), re.M))
pytestmark = pytest.mark.skipif(
    torch.__version__.partition("+")[0] != PINNED,
    reason=f"the fake accelerator uses private parts of PyTorch {PINNED}",
)
Test = Callable[..., None]


def start(folder: Path, code: str) -> None:
    """Run code in a process with fake devices."""
    begin = "from tests import fake_accelerator as fake; fake.install()"
    run(folder, "-c", f"{begin}\n{code}", env=os.environ | {"PYTHONPATH": str(ROOT)})


def on_fake_devices(test: Test) -> Test:
    """Run a test in a process with fake devices. Its arguments besides the folder are literals."""

    @wraps(test)
    def started(tmp_path: Path, **options: Any) -> None:
        given = "".join(f", {name}={value!r}" for name, value in options.items())
        code = "from pathlib import Path; from tests.core import test_devices\n"
        start(tmp_path, f"{code}test_devices.{test.__name__}.__wrapped__(Path.cwd(){given})")

    return started


class Trainer(BaseSolver):
    """Trains a model with dropout on a device, and counts waits before each step."""

    def __init__(self, folder: Path, device: str = "fake:0", stop: int = 0) -> None:
        super().__init__(folder, Policy(minutes=0))
        torch.manual_seed(0)
        self.device = distrib.device(device)
        layers = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)
        self.model = nn.Sequential(*layers).to(self.device)
        self.optim = torch.optim.AdamW(self.model.parameters())
        self.ema = EMA({"model": self.model}, 0.9)
        self.register_stateful("model", "optim", "ema")
        data = TensorDataset(torch.randn(48, 8))
        self.loader = loader(data, 4, shuffle=True)
        self.bad = self.updates = 0  # a step with a NaN, and steps so far in this process
        self.stop = stop  # after this step
        self.waits: list[int] = []  # since the first step of an epoch: before each, and at the end

    def run(self, epochs: int = 2) -> None:
        with self.running():
            while self.epoch <= epochs:
                self.run_stage("train", self.train)
                self.commit()

    def train(self) -> dict[str, float]:
        steps = self.steps(self.loader, updates=3, every=0, finite=["loss"])
        self.waits = []
        with fake.syncs("MainThread") as seen:
            for (batch,) in steps:
                if not self.waits:
                    seen.clear()  # a resume loads the state
                self.waits.append(len(seen))
                loss = self.model(batch.to(self.device, non_blocking=True)).pow(2).mean()
                self.updates += 1
                if self.updates == self.bad:
                    loss = loss * float("nan")
                self.optim.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
                steps.log({"loss": loss, "norm": norm})
                self.optim.step()
                self.ema.update()
                if self.updates == self.stop:
                    signal.raise_signal(signal.SIGTERM)
            self.waits.append(len(seen))
        return steps.metrics()


# ----------------------------------------------------------------------------------------- waits


@on_fake_devices
def test_a_step_waits_for_nothing_and_a_progress_line_once(tmp_path: Path) -> None:
    solver = Trainer(tmp_path)
    with solver.running():
        solver.run_stage("train", solver.train)
        # There is a line after the steps 4, 8 and 12.
        assert solver.waits == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3]
        solver.commit()


@on_fake_devices
def test_points_of_curves_are_fetched_with_a_progress_line(tmp_path: Path) -> None:
    class Curves(Trainer):
        def train(self) -> dict[str, float]:
            steps = self.steps(self.loader, updates=3, every=1)
            for (batch,) in steps:
                with fake.syncs() as seen:
                    loss = self.model(batch.to(self.device, non_blocking=True)).pow(2).mean()
                    steps.log({"loss": loss, "twice": 2 * loss})
                assert not seen, seen[0]
            return {}

    solver = Curves(tmp_path)
    with fake.syncs() as seen, solver.running():
        solver.run_stage("train", solver.train)
        assert len(seen) == 6, [*map(str, seen)]  # the averages and the points of three lines
        solver.commit()


@on_fake_devices
def test_a_commit_waits_in_the_background_only(tmp_path: Path) -> None:
    solver = Trainer(tmp_path)
    with solver.running():
        for _ in range(2):  # the second uses the memory of the first again
            solver.run_stage("train", solver.train)
            with fake.syncs() as seen:
                with fake.syncs("MainThread") as ours:
                    solver.commit()
                    kept = {n: fake.peek(v).clone() for n, v in solver.model.state_dict().items()}
                    with torch.no_grad():
                        for parameter in solver.model.parameters():
                            parameter.zero_()  # as the next step might, while the copies fly
                wait_for_writes()
            assert not ours, ours[0]
            assert [sync.kind for sync in seen] == ["event"], [*map(str, seen)]
            saved = checkpoint.read(solver.checkpoint_path)["model"]
            assert all(torch.equal(saved[name], value) for name, value in kept.items())


# ----------------------------------------------------------------------------------------- state


def described(values: Any) -> Any:
    """Return values with the device and the numbers of each tensor in its place."""

    def of(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        host = leaf if leaf.is_cpu else fake.peek(leaf)
        return str(leaf.device), host.detach().tolist()

    return tree_map(of, values)


@on_fake_devices
def test_a_run_stopped_within_an_epoch_is_the_whole_run(tmp_path: Path) -> None:
    whole = Trainer(tmp_path / "whole")
    whole.run()
    with suppress(Stopped):
        Trainer(tmp_path / "parts", stop=17).run()
    resumed = Trainer(tmp_path / "parts")
    torch.manual_seed(17)  # the numbers of another process
    resumed.run()
    assert (whole.updates, resumed.updates) == (24, 24 - 17)
    assert described(resumed.state_dict()["model"]) == described(whole.state_dict()["model"])
    assert described(resumed.optim.state_dict()) == described(whole.optim.state_dict())
    assert described(resumed.ema.states) == described(whole.ema.states)
    losses = [[epoch["train"]["loss"] for epoch in run.history] for run in (whole, resumed)]
    assert losses[0] == losses[1]


class Dice(BaseSolver):
    """Adds numbers drawn on a device."""

    def __init__(self, folder: Path, device: str, stop: int = 0) -> None:
        super().__init__(folder)
        self.stop = stop  # in the second epoch
        self.device = distrib.device(device)
        self.sum = torch.zeros(1, device=self.device)
        self.register_stateful("sum")

    def run(self) -> None:
        with self.running():
            while self.epoch <= 2:
                self.run_stage("train", self.train)
                self.commit()

    def train(self) -> None:
        for number in self.steps(range(4)):
            self.sum += torch.rand(1, device=self.device)
            if self.stop and (self.epoch, number) == (2, self.stop):
                signal.raise_signal(signal.SIGTERM)


@pytest.mark.parametrize("device", ["fake", "fake:0", "fake:1"])
@on_fake_devices
def test_the_generator_of_the_device_in_use_is_state(tmp_path: Path, device: str) -> None:
    torch.manual_seed(0)
    whole = Dice(tmp_path / "whole", device)
    whole.run()
    torch.manual_seed(0)
    with suppress(Stopped):
        Dice(tmp_path / "parts", device, stop=2).run()
    torch.manual_seed(1)
    resumed = Dice(tmp_path / "parts", device)
    resumed.run()
    assert described(resumed.sum) == described(whole.sum)


@on_fake_devices
def test_a_run_on_the_cpu_starts_no_device(tmp_path: Path) -> None:
    solver = Dice(tmp_path, "cpu")
    solver.run()
    assert not torch.get_device_module("fake").is_initialized()
    assert (provenance.device_name(), rng.get_rng_state()["device"]) == ("cpu", None)
    assert not loader([1]).pin_memory
    assert distrib.device().index == 0
    assert loader([1]).pin_memory
    assert not loader([1], pin_memory=False).pin_memory
    assert not loader(TensorDataset(torch.ones(1, device="fake:0"))).pin_memory
    assert (provenance.device_name(), rng.accelerator() is None) == ("fake", False)


class Pair(NamedTuple):
    """Two values."""

    first: Any
    second: Any


class Values(BaseSolver):
    """Holds each kind of value, on a device and on the host."""

    def __init__(self, folder: Path, device: str, filled: bool = False) -> None:
        super().__init__(folder)
        self.model = nn.Linear(2, 1).to(device)
        self.optim = torch.optim.AdamW(self.model.parameters(), amsgrad=True)
        self.ema = EMA({"model": self.model})
        self.weight = torch.zeros(2, device=device, requires_grad=True)
        self.tensor, self.here = torch.zeros(2, device=device), torch.zeros(2)
        self.list: list[Any] = []
        self.dict: dict[str, Any] = {}
        self.ordered: OrderedDict[str, Any] = OrderedDict()
        self.lists: defaultdict[str, list[Any]] = defaultdict(list)
        self.deque: deque[Any] = deque(maxlen=3)
        self.pair, self.late = Pair(None, None), None
        if filled:
            self.fill(torch.device(device))
        self.names = "model optim ema weight tensor here list dict ordered lists deque pair late"
        self.register_stateful(*self.names.split())

    def fill(self, device: torch.device) -> None:
        self.model.weight.grad = torch.ones_like(self.model.weight)
        self.optim.step()
        self.optim.zero_grad()
        for number, tensor in enumerate((self.weight, self.tensor, self.here)):
            tensor.data.add_(number + 1.5)

        def new(number: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.full((2,), number, dtype=dtype, device=device)

        half = torch.bfloat16
        self.list += [new(1), torch.ones(2), [new(2), (new(3, half), "text")], {4: new(4)}]
        self.dict |= {"best": {"weight": new(5), "host": torch.ones(1)}, "none": None}
        self.ordered["a"], self.ordered["shared"] = new(6), self.list[0]
        self.lists["b"].append(new(7))
        self.deque += [new(8), deque([new(9), Pair(new(10), 1)], 2), new(11, torch.int64)]
        self.pair, self.late = Pair(new(12), [new(13)]), new(14)  # type: ignore[assignment]

    def values(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.names.split()[3:]}
        states = self.model.state_dict(), self.optim.state_dict(), self.ema.states
        return found | dict(zip(("model", "optim", "ema"), states, strict=True))


def save_values(folder: Path) -> Any:
    solver = Values(folder, "fake:0", filled=True)
    with solver.running():
        with fake.syncs("MainThread") as seen:
            solver.commit()
        assert not seen, seen[0]
    return described(solver.values())


@pytest.mark.parametrize("device", ["fake:0", "fake:1", "cpu"])
@on_fake_devices
def test_each_kind_of_value_comes_back_to_its_device(tmp_path: Path, device: str) -> None:
    saved = str(save_values(tmp_path)).replace("fake:0", device)
    for read_only in (False, True):
        solver = Values(tmp_path, device)
        assert solver.restore(read_only=read_only)
        assert str(described(solver.values())) == saved
        kinds = [type(value) for value in (solver.lists, solver.deque, solver.pair)]
        assert kinds == [defaultdict, deque, Pair]
        assert solver.deque.maxlen == 3


def test_values_of_a_device_can_be_read_without(tmp_path: Path) -> None:
    code = "from pathlib import Path; from tests.core import test_devices\n"
    start(tmp_path, code + "test_devices.save_values(Path.cwd())")
    state = torch.load(tmp_path / "checkpoint.th", weights_only=True)
    assert all(tensor.is_cpu for tensor in tree_leaves(state) if torch.is_tensor(tensor))
    assert isinstance(state["model"]["weight"], torch.Tensor)  # of modules there are no marks
    solver = Values(tmp_path, "cpu")
    assert solver.restore(read_only=True)
    assert described(solver.dict["best"]) == {"weight": ("cpu", [5, 5]), "host": ("cpu", [1])}
    tensors = [leaf for leaf in tree_leaves(solver.values()) if torch.is_tensor(leaf)]
    assert all(tensor.is_cpu for tensor in tensors)


@pytest.mark.parametrize("current", [0, 1])
@on_fake_devices
def test_the_current_device_is_not_that_of_the_tensors(tmp_path: Path, current: int) -> None:
    class Two(BaseSolver):
        def __init__(self) -> None:
            super().__init__(tmp_path)
            self.tensors = [torch.full((3,), 1.5, device=f"fake:{index}") for index in (0, 1)]
            self.register_stateful("tensors")

    solver = Two()
    torch.accelerator.set_device_index(current)
    with solver.running():
        solver.commit()
        wait_for_writes()
        assert torch.accelerator.current_device_index() == current
    state = checkpoint.read(solver.checkpoint_path)["tensors"]
    found = [leaf.tolist() for leaf in tree_leaves(state) if torch.is_tensor(leaf)]
    assert found == 2 * [3 * [1.5]], found


# ----------------------------------------------------------------------------------------- ranks


def start_ranks(folder: Path, code: str, *args: Any, ranks: int = 2) -> list[Command]:
    """Run code on ranks with a fake device each, to its end."""
    begin = "from tests import fake_accelerator as fake; fake.install()"
    begin += "; from core import distrib; from tests.core import test_devices"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = os.environ | {"PYTHONPATH": str(ROOT), "WORLD_SIZE": str(ranks)}
    env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    places = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    started = [Command(folder, "-c", f"{begin}; {code}", env=env | place) for place in places]
    for command in started:
        command.wait()
    return started


def average_on_devices() -> None:
    distrib.init()
    device = distrib.device()
    model = nn.ModuleList(nn.Linear(3, 1) for _ in range(3)).to(device)
    parameters = [*model.parameters()]
    distrib.broadcast_model(model)
    used = model[0](torch.ones(2, 3, device=device))
    if distrib.rank():
        used = used + model[1](torch.ones(2, 3, device=device))
    with fake.syncs("MainThread") as seen:
        with distrib.eager_sync_model(model):
            (used.sum() * (1 + distrib.rank())).backward()
        assert not seen, seen[0]
    grads = [None if p.grad is None else fake.peek(p.grad).tolist() for p in parameters]
    assert grads == [[[3.0] * 3], [3.0], [[2.0] * 3], [2.0], None, None]
    print("averaged")


def test_gradients_on_devices_are_averaged_without_a_wait(tmp_path: Path) -> None:
    # Gradients that are computed on the second device are more than the fake can do: see there.
    code = "import os; os.environ['LOCAL_RANK'] = '0'; test_devices.average_on_devices()"
    for command in start_ranks(tmp_path, code):
        assert "averaged\n" in command.finish()


def go_wrong(how: str) -> None:
    """Reduce a tensor of a device on rank zero; let rank one do something else."""
    distrib.init()
    tensor, wrong = torch.ones(3, device="fake:0"), distrib.rank() == 1
    distrib.all_reduce(tensor)
    if wrong and how == "calls something else":
        distrib.average_metrics({"loss": 1.0})
    elif wrong and how == "has another tensor":
        tensor = tensor[:2]
    elif wrong and how == "was killed":
        signal.raise_signal(signal.SIGKILL)
    elif wrong and how == "is slow":
        time.sleep(2.5 * board.SECONDS)
    distrib.all_reduce(tensor)
    distrib.barrier()
    assert fake.peek(tensor).tolist() == 3 * [4.0]
    print("no error")


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("calls something else", "rank 0 is in all_reduce of .3.*; rank 1 in average_metrics"),
        ("has another tensor", r"rank 0 is in all_reduce of .3.*; rank 1 in all_reduce of .2"),
        ("was killed", "no word from rank 1, which ended or hangs"),
        ("is slow", "no error"),
    ],
)
def test_a_rank_that_hangs_on_its_device_is_named(tmp_path: Path, how: str, told: str) -> None:
    zero, one = start_ranks(tmp_path, f"test_devices.go_wrong({how!r})")
    assert re.search(told, zero.said), zero.said
    assert [command.poll() for command in (zero, one)] == {
        "was killed": [1, -signal.SIGKILL],
        "is slow": [0, 0],
    }.get(how, [1, 1])
    if "rank 1 in" in told:
        assert "ranks disagree: rank 1 is in " in one.said


def test_ranks_on_the_cpu_start_no_device(tmp_path: Path) -> None:
    code = "distrib.init(); distrib.device('cpu'); distrib.barrier(); print(fake.device.started)"
    for command in start_ranks(tmp_path, code):
        assert "False\n" in command.finish()


def test_each_rank_has_a_device_of_its_own(tmp_path: Path) -> None:
    *_, third = start_ranks(tmp_path, "print(distrib.device())", ranks=3)
    assert "local rank 2 has no device, there are 2 of fake" in third.said


# -------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(("bad", "stop"), [(16, 0), (17, 0), (17, 17), (24, 0)])
@on_fake_devices
def test_no_step_with_a_nan_is_saved(tmp_path: Path, bad: int, stop: int) -> None:
    # It is before a line, after one, before a save, or the last step of all.
    solver = Trainer(tmp_path, stop=stop)
    solver.bad = bad
    with pytest.raises(RuntimeError, match=f"loss is NaN or infinite in step {bad - 12} of train"):
        solver.run()
    assert solver.waits == [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2][: len(solver.waits)]
    with suppress(UserError):
        wait_for_writes()
    fake.device.failed = ""  # as in another process
    saved = checkpoint.read(solver.checkpoint_path)
    tensors = [leaf for leaf in tree_leaves(saved) if torch.is_tensor(leaf)]
    assert all(tensor.isfinite().all() for tensor in tensors)
    again = Trainer(tmp_path)
    again.run()
    assert again.updates == 24 - 12


# -------------------------------------------------------------------------------------- examples

# A stage trains without lines; its averages are read once, at the end.
TRAIN = """
import fake_accelerator as fake
fake.install()
from my_research.train import main
from my_research.solver import Solver
xp = main.get_xp(OVERRIDES)
main.init_xp(xp)
solver = Solver(xp.cfg, xp)
assert str(solver.device) == "fake:0", solver.device

def train():
    with fake.syncs("MainThread") as seen:
        metrics = solver.train()
    assert len(seen) == 1, "\\n".join(map(str, seen))
    return metrics

with solver.running():
    solver.run_stage("train", train)
    solver.run_stage("valid", solver.valid)
    solver.commit()
print("trained")
"""


WITH_DATA = ["log_every=0", "debug=limit", "data.num_workers=0"]
WITH_WORKER = [*WITH_DATA[:2], "data.num_workers=1"]


@pytest.mark.parametrize("options", [WITH_DATA, WITH_WORKER], ids=["alone", "worker"])
@pytest.mark.parametrize("example", ["digits", "text", "adversarial", "basic"])
def test_no_training_step_of_an_example_waits(
    example: str, options: list[str], copy: Copy, tmp_path: Path
) -> None:
    project = copy(tmp_path, example=example, tracker="none")
    options = ["log_updates=0", *(options if example != "basic" else [])]  # which has no data
    shutil.copy(fake.__file__, project)  # whose own tests hide ours
    said = run(project, "-c", TRAIN.replace("OVERRIDES", repr(options)))
    assert said.endswith("trained\n")
