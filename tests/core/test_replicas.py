"""Ranks that should be replicas of one another: real gloo processes."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core import BaseSolver, checkpoint, distrib
from core.data import loader
from core.replicas import _checksums
from core.rng import seed_everything
from core.stop import Stopped
from core.tests.processes import on_ranks
from core.utils import UserError


class Solver(BaseSolver):
    """Trains a model whose statistics are those of this rank's data."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        seed_everything(0)
        self.data = loader(torch.randn(24, 4), batch_size=2, shuffle=True)
        self.model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        distrib.broadcast_model(self.model)
        self.optim = torch.optim.SGD(self.model.parameters(), 0.1)
        self.register_stateful("model", "optim")

    def train(self) -> dict[str, float]:
        steps = self.steps(self.data)
        for batch in steps:
            loss = self.model(batch).square().mean()
            self.optim.zero_grad()
            loss.backward()
            distrib.sync_gradients(self.model.parameters())
            self.optim.step()
            steps.log({"loss": loss})
        return steps.metrics()


def _train(folder: Path, stop: int, epochs: int = 3) -> Any:
    """Train, be asked to stop in step `stop`; return the weights of this rank."""
    solver = Solver(folder)
    count = 0

    def step(*_: Any) -> None:
        nonlocal count
        count += 1
        if count == stop and distrib.is_rank_zero():
            os.kill(os.getpid(), signal.SIGUSR1)

    solver.optim.register_step_pre_hook(step)
    try:
        with solver.running():
            for _ in range(solver.epoch, epochs + 1):
                solver.run_stage("train", solver.train)
                solver.commit()
    except Stopped:
        return None
    return [value.tolist() for value in solver.model.state_dict().values()]


def test_buffers_that_differ_are_kept_per_rank(tmp_path: Path) -> None:
    whole = on_ranks(_train, tmp_path / "whole", 0)
    assert whole[0] != whole[1]
    assert whole[0][:2] == whole[1][:2]  # the weights do not
    assert on_ranks(_train, tmp_path / "stopped", 2) == [None, None]
    state = checkpoint.read(tmp_path / "stopped" / "checkpoint.th")
    for rank in state["checkpoint"]["cursor"]["ranks"]:
        names = [".".join(keys) for keys, _ in rank["own"]]
        assert names == (["model.1.running_mean", "model.1.running_var"] if rank["own"] else [])
    assert [bool(rank["own"]) for rank in state["checkpoint"]["cursor"]["ranks"]] == [False, True]
    assert on_ranks(_train, tmp_path / "stopped", 0) == whole
    # And at a commit.
    on_ranks(_train, tmp_path / "ended", 0, 2)
    assert on_ranks(_train, tmp_path / "ended", 0) == whole


def _say(folder: Path) -> tuple[list[str], list[Any]]:
    """Commit metrics of which one is of this rank alone; return warnings and history."""
    solver, said = BaseSolver(folder), list[str]()
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("core.replicas").addHandler(handler)
    with solver.running():
        for _ in range(2):
            solver.run_stage("valid", lambda: {"acc": 0.5 + distrib.rank(), "loss": 1.0})
            if distrib.is_rank_zero():
                solver.run_stage("look", lambda: {"loss": 3.0})
            solver.commit()
    return said, solver.history


def test_metrics_that_differ_are_named_and_those_of_rank_zero_kept(tmp_path: Path) -> None:
    (said, history), (other, same) = on_ranks(_say, tmp_path)
    assert other == []
    assert [line for line in said if "rank 0's are kept: valid.acc. " in line] == said
    assert len(said) == 1
    assert history == same
    assert history[0]["valid"]["acc"] == 0.5
    assert "look" in history[0]


def test_another_number_of_ranks_takes_the_buffers_of_rank_zero(tmp_path: Path) -> None:
    on_ranks(_train, tmp_path, 0, 1)
    saved = checkpoint.read(tmp_path / "checkpoint.th")["model"]
    [alone] = on_ranks(_train, tmp_path, 0, 1, ranks=1)
    assert alone == [value.tolist() for value in saved.values()]


class Stream:
    """Numbers of this rank, with a state of its own."""

    def __init__(self) -> None:
        self.position = 100 * distrib.rank()

    def __iter__(self) -> Iterator[int]:
        while self.position % 100 < 20:
            self.position += 1
            yield self.position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position} | ({"first": 1} if distrib.is_rank_zero() else {})

    def load_state_dict(self, state: dict[str, int]) -> None:
        assert ("first" in state) == distrib.is_rank_zero()
        self.position = state["position"]


def _read(folder: Path, stop: int) -> Any:
    """Read a stream of this rank, to its end or to a stop; return the numbers of all processes."""
    solver: Any = BaseSolver(folder)
    solver.stream, solver.seen = Stream(), []
    solver.register_stateful("stream", "seen")

    def train() -> dict[str, float]:
        steps = solver.steps(solver.stream, total=20)
        for number in steps:
            if steps.step == stop:
                os.kill(os.getpid(), signal.SIGUSR1)
                while solver._current_stage.requests.due == math.inf:
                    time.sleep(0.01)
                distrib.barrier()  # all know after which step to stop
            solver.seen.append(number)
            steps.log({"number": number})
        return dict(steps.metrics())

    try:
        with solver.running():
            solver.run_stage("train", train)
            solver.commit()
    except Stopped:
        return None
    except UserError as error:
        return str(error)
    return solver.seen


def test_a_loader_with_a_state_resumes_on_each_rank(tmp_path: Path) -> None:
    assert on_ranks(_read, tmp_path, 2) == [None, None]
    [said] = on_ranks(_read, tmp_path, -1, ranks=1)
    assert "same number of processes" in said
    assert on_ranks(_read, tmp_path, -1) == [[*range(1, 21)], [*range(101, 121)]]


def _flip(folder: Path, name: str) -> list[str]:
    """Flip a bit on rank one between two saves; return what is logged at the second."""
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("core").addHandler(handler)
    solver = Solver(folder)
    with solver.running():
        solver.run_stage("train", solver.train)
        solver.commit()
        assert said == []
        if distrib.rank() == 1:
            tensor = solver.model.state_dict()[name]
            tensor.view(torch.int32).view(-1)[0] ^= 1
        solver.commit()
    return said


@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_a_flipped_bit_is_named_at_the_next_save(tmp_path: Path, name: str) -> None:
    for said in on_ranks(_flip, tmp_path, name):
        assert len(said) == 1
        assert f"model.{name} of rank 1 (1 in all)" in said[0]
    before, after = (checkpoint.read(tmp_path / f"checkpoint{e}.th")["model"] for e in (".1", ""))
    assert torch.equal(before[name], after[name])  # of rank zero


KINDS = [torch.bool, torch.int8, torch.int16, torch.uint16, torch.int64, torch.bfloat16]
KINDS += [torch.float16, torch.float64, torch.complex64, torch.complex128, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
def test_every_bit_counts(dtype: torch.dtype) -> None:
    whole = torch.zeros(7 * dtype.itemsize, dtype=torch.uint8)
    tensors: Any = {("x",): whole.view(dtype)}
    seen = set()
    for byte in range(len(whole)):
        whole[byte] = 1
        seen.add(_checksums(tensors)[("x",)])
        whole[byte] = 0
    assert 0 not in seen


def test_tensors_of_any_shape_have_a_checksum() -> None:
    matrix = torch.arange(6.0).reshape(2, 3)
    tensors = [matrix.T, matrix[1], matrix[:, 1:], torch.tensor(1.0), torch.empty(0)]
    parts: dict[Any, Any] = dict(enumerate(tensors))
    assert _checksums(parts) == _checksums({n: part.clone() for n, part in parts.items()})
    assert _checksums({}) == {}
    one, other = ({("x",): (1, name)} for name in "ab")
    assert _checksums(one) != _checksums(other)


def test_order_counts() -> None:
    numbers = torch.arange(1000)
    one, other = ({("x",): part} for part in (numbers, numbers.flip(0)))
    assert _checksums(one) != _checksums(other)
    one, other = ({("x",): part} for part in (numbers[:5], numbers[:5].flip(0)))
    assert _checksums(one) != _checksums(other)
