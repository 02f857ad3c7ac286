"""The order of the data, its shares, the seeds of workers."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from .. import distrib, loader
from ..utils import UserError
from ..xp import SIGNALS


class Numbers(Dataset[int]):
    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index


class Draws(Numbers):
    def __getitem__(self, index: int) -> Any:
        return torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])


class Stream(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return iter(range(11))


def order(epoch: int, size: int = 10, **options: Any) -> list[int]:
    loader.set_epoch(epoch)
    made = loader.loader(Numbers(size), 2, shuffle=True, **options)
    return torch.cat(list(made)).tolist()


def be_rank(monkeypatch: pytest.MonkeyPatch, rank: int, ranks: int) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", str(ranks))


def test_order_is_a_function_of_seed_and_epoch() -> None:
    first = order(1)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    assert order(1) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert sorted(first) == list(range(10))
    assert order(2) != first
    assert order(1, seed=1) != first


def test_a_second_pass_has_another_order() -> None:
    made = loader.loader(Numbers(10), 10, shuffle=True)
    first, second = (next(iter(made)).tolist() for _ in range(2))
    assert first != second


def test_ranks_share_a_batch_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(loader.loader(Numbers(12), 4, shuffle=True))
    shares = []
    for rank in range(2):
        be_rank(monkeypatch, rank, 2)
        shares.append(list(loader.loader(Numbers(12), 2, shuffle=True)))
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(batch.tolist()) == sorted(torch.cat(parts).tolist())


@pytest.mark.parametrize("size", [0, 1, 2, 10, 11])
def test_shares(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[bool, list[list[int]]] = {True: [], False: []}
    for rank in range(3):
        be_rank(monkeypatch, rank, 3)
        for shuffle, shares in found.items():
            made = loader.loader(Numbers(size), None, shuffle=shuffle)
            shares.append([int(n) for n in made])
            assert len(made) == len(shares[-1])
    assert sorted(itertools.chain(*found[False])) == list(range(size))
    assert set(itertools.chain(*found[True])) == set(range(size))
    assert len({len(share) for share in found[True]}) == 1


def test_an_epoch_of_any_number_of_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    def examples(epochs: range, batch: int = 2) -> list[int]:
        made = loader.loader(Numbers(7), batch, shuffle=True, updates_per_epoch=5)
        assert len(made) == 5
        seen: list[int] = []
        for epoch in epochs:
            loader.set_epoch(epoch)
            seen += torch.cat(list(made)).tolist()
        return seen

    seen = examples(range(7))
    assert len(seen) == 70
    for begin in range(0, 70, 7):  # one order of all data after another
        assert sorted(seen[begin : begin + 7]) == list(range(7))
    assert seen[:7] != seen[7:14]
    assert examples(range(3, 7)) == seen[30:]  # as after a resume
    shares = []
    for rank in range(2):
        be_rank(monkeypatch, rank, 2)
        shares.append(examples(range(7), batch=1))
    assert [n for pair in zip(*shares, strict=True) for n in pair] == seen


def test_a_limit_takes_the_first_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    made = loader.loader(Numbers(20), 3, limit=2)
    assert torch.cat(list(made)).tolist() == list(range(6))
    assert len(loader.loader(Numbers(4), 3, limit=2)) == 2
    shuffled = loader.loader(Numbers(20), 3, shuffle=True, limit=2)
    assert sorted(torch.cat(list(shuffled)).tolist()) == list(range(6))
    same = loader.loader(Numbers(20), 3, shuffle=True, limit=1, updates_per_epoch=4)
    assert [sorted(batch.tolist()) for batch in same] == [[0, 1, 2]] * 4
    be_rank(monkeypatch, 1, 2)
    assert torch.cat(list(loader.loader(Numbers(20), 3, limit=2))).tolist() == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_are_seeded(context: str) -> None:
    def draw(epoch: int) -> torch.Tensor:
        loader.set_epoch(epoch)
        made = loader.loader(Draws(4), 2, num_workers=2, multiprocessing_context=context)
        return torch.cat(list(made))

    first = draw(1)
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)
    assert len(first.unique()) == first.numel()


class Asked(Numbers):
    """Its worker is asked to stop, as Slurm asks all processes of a job."""

    signals = SIGNALS

    def __getitem__(self, index: int) -> int:
        for number in self.signals if index == 0 else []:
            os.kill(os.getpid(), number)
        return super().__getitem__(index)


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_leave_a_request_to_stop_to_the_run(context: str) -> None:
    asked = Asked(6)
    if context == "spawn":
        asked.signals = [number for number in SIGNALS if number != signal.SIGTERM]
    made = loader.loader(asked, 2, num_workers=1, multiprocessing_context=context)
    assert torch.cat(list(made)).tolist() == list(range(6))
    iterator = iter(made)
    next(iterator)
    [worker] = iterator._workers
    worker.terminate()  # as multiprocessing does once, and waits, if a process ends that iterates
    worker.join(20)
    assert worker.exitcode == 0


def test_a_worker_that_is_asked_to_stop_as_it_starts_goes_on() -> None:
    code = f"""
import os, signal
from {__package__} import test_loader
from {__package__.removesuffix(".tests")} import loader
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
print(sum(int(batch.sum()) for batch in loader.loader(test_loader.Numbers(6), 2, num_workers=2)))
assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""
    command = [sys.executable, "-c", code]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    said = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (said.returncode, said.stdout) == (0, "15\n"), said.stderr


def test_what_makes_a_resume_inexact_is_said(caplog: pytest.LogCaptureFixture) -> None:
    loader.loader(Numbers(4), batch_size=None)
    loader.loader(Stream(), None, num_workers=1)
    assert not caplog.text
    loader.loader(Numbers(4), None, num_workers=1)
    loader.loader(Numbers(4), 2, num_workers=1, persistent_workers=True)
    said = [message.partition(":")[0] for message in caplog.messages]
    assert said == ["batch_size=None", "persistent_workers"]


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_datasets_are_dealt_out(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    for rank in range(2):
        be_rank(monkeypatch, rank, 2)
        seen += [int(n) for n in loader.loader(Stream(), None, num_workers=workers)]
    assert sorted(seen) == list(range(11))


class Half(loader.EpochSampler):
    def order(self, generator: torch.Generator) -> list[int]:
        return [*range(len(self.dataset) // 2)]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="an order and an end"):
        loader.loader(Stream(), shuffle=True)
    with pytest.raises(ValueError, match="an end of its own"):
        loader.loader(Stream(), updates_per_epoch=1)
    with pytest.raises(ValueError, match="an end of its own"):
        loader.loader(Stream(), limit=1)
    with pytest.raises(UserError, match="limit=-1; give a number"):
        loader.loader(Numbers(3), limit=-1)
    with pytest.raises(ValueError, match="at least one update"):
        loader.loader(Numbers(3), updates_per_epoch=0)
    with pytest.raises(ValueError, match=r"sampler= is a subclass.*DataLoader"):
        loader.loader(Numbers(3), sampler=range(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_sampler, is not shared"):
        loader.loader(Numbers(3), batch_sampler=[[0], [1, 2]])
    with pytest.raises(ValueError, match=r"Half\.order gave 1 indices for 3 examples: one each"):
        list(loader.loader(Numbers(3), sampler=Half).sampler)
    be_rank(monkeypatch, 0, 2)
    assert loader.split_batch(8) == 4
    with pytest.raises(UserError, match="positive multiple"):
        loader.split_batch(7)


def test_any_class_of_loader_and_flashys_address() -> None:
    class Mine(torch.utils.data.DataLoader[int]):
        pass

    assert isinstance(distrib.loader(Numbers(3), klass=Mine), Mine)


def test_a_worker_whose_parent_was_killed_while_forking_ends(tmp_path: Path) -> None:
    module = __package__.rpartition(".")[0] + ".loader"
    code = f"""
import multiprocessing, os, pathlib, sys, time
from {module} import _WorkerStart
def work():
    pathlib.Path("pid").write_text(str(os.getpid()))
    time.sleep(1)
    _WorkerStart(0, None)(0)
    pathlib.Path("alive").touch()
    time.sleep(60)
multiprocessing.get_context("fork").Process(target=work).start()
while not pathlib.Path("pid").exists():
    time.sleep(0.01)
if len(sys.argv) > 1:
    os._exit(0)
time.sleep(3)
os._exit(0)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    for orphan in (True, False):
        command = [sys.executable, "-c", code, *(["die"] if orphan else [])]
        subprocess.run(command, cwd=tmp_path, env=env, timeout=60, check=True)
        pid = int((tmp_path / "pid").read_text())
        if orphan:
            time.sleep(2.5)
            assert not Path(f"/proc/{pid}/cmdline").exists() or not (tmp_path / "alive").exists()
        else:
            assert (tmp_path / "alive").exists()
            os.kill(pid, signal.SIGKILL)
        (tmp_path / "pid").unlink()
