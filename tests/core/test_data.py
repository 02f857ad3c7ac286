"""Workers of a loader and the signals that reach them; what a loader refuses."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from core import data, distrib
from core.data import loader
from core.stop import SIGNALS
from core.tests.test_data import Numbers, Stream, be_rank
from core.utils import UserError

from ..commands import ROOT, Command, gone, run

WITH_CORE = os.environ | {"PYTHONPATH": ROOT}


class Asked(Numbers):
    """Its worker is asked to stop, as Slurm asks all processes of a job."""

    signals = SIGNALS

    def __getitem__(self, index: int) -> int:
        for number in self.signals if index == 0 else []:
            os.kill(os.getpid(), number)
        return super().__getitem__(index)


@pytest.mark.parametrize("given", ["a name", "a context"])
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_leave_a_request_to_stop_to_the_run(method: str, given: str) -> None:
    context = method if given == "a name" else multiprocessing.get_context(method)
    asked = Asked(6)
    if method == "forkserver":
        asked.signals = [number for number in SIGNALS if number != signal.SIGTERM]
    made = loader(asked, 2, num_workers=1, multiprocessing_context=context)
    assert torch.cat(list(made)).tolist() == list(range(6))
    iterator = iter(made)
    for _ in range(len(made)):  # so that the worker is idle: killed earlier, it might hold a lock
        next(iterator)
    [worker] = iterator._workers
    worker.terminate()  # as multiprocessing does once, and waits, if a process ends that iterates
    worker.join()
    assert worker.exitcode == (-signal.SIGTERM if method == "forkserver" else 0)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, no worker is forked by default")
def test_workers_are_forked_though_python_would_start_a_server(tmp_path: Path) -> None:
    code = """
import multiprocessing
from multiprocessing import context
context._default_context._default_context = context._concrete_contexts["forkserver"]  # as in 3.14
multiprocessing.get_all_start_methods = lambda: ["forkserver", "fork", "spawn"]
from tqdm import tqdm
from core.data import loader
from core.tests.test_data import Numbers
for _ in tqdm(range(2)):  # asks for the default method
    made = loader(Numbers(6), 2, num_workers=1)
    print(sum(int(batch.sum()) for batch in made), made.multiprocessing_context.get_start_method())
"""
    assert run(tmp_path, "-c", code, env=WITH_CORE).count("15 fork\n") == 2


def test_workers_of_a_server_live(tmp_path: Path) -> None:
    (tmp_path / "served.py").write_text("""
import multiprocessing
from core.data import loader
from core.tests.test_data import Numbers
if __name__ == "__main__":
    multiprocessing.set_start_method("forkserver", force=True)
    print(sum(int(batch.sum()) for batch in loader(Numbers(6), 2, num_workers=2)))
""")
    assert run(tmp_path, "-m", "served", env=WITH_CORE).endswith("15\n")


def test_a_worker_that_is_asked_to_stop_as_it_starts_goes_on(tmp_path: Path) -> None:
    code = """
import os, signal
from core.data import loader
from core.tests.test_data import Numbers
os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
print(sum(int(batch.sum()) for batch in loader(Numbers(6), 2, num_workers=2)))
assert signal.SIGTERM not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
"""
    assert run(tmp_path, "-c", code, env=WITH_CORE) == "15\n"


def test_a_spawned_worker_that_is_asked_to_stop_as_it_starts_goes_on(tmp_path: Path) -> None:
    (tmp_path / "spawned.py").write_text("""
import os
from core.data import loader
from core.stop import SIGNALS
from core.tests.test_data import Numbers
if __name__ == "__main__":
    made = loader(Numbers(6), 2, num_workers=2, multiprocessing_context="spawn")
    print(sum(int(batch.sum()) for batch in made))
else:  # a worker imports this file before it works
    for number in SIGNALS:
        os.kill(os.getpid(), number)
""")
    assert run(tmp_path, "-m", "spawned", env=WITH_CORE) == "15\n"


def test_what_makes_a_resume_inexact_is_said(caplog: pytest.LogCaptureFixture) -> None:
    loader(Numbers(4), batch_size=None)
    loader(Stream(), None, num_workers=1)
    assert not caplog.text
    loader(Numbers(4), None, num_workers=1)
    assert len(caplog.messages) == 1
    assert "batch_size=None" in caplog.messages[0]


class Drawing(Numbers):
    """Draws a random number for each example."""

    def __getitem__(self, index: int) -> Any:
        assert type(index) is int
        return index, torch.rand(())


def crop(examples: list[int]) -> list[float]:
    """A collation that draws a random number for each example."""
    return [torch.rand(()).item() for _ in examples]


def test_random_numbers_of_a_list_resume_too() -> None:
    def read(skipped: int) -> list[Any]:
        made = loader([0] * 6, 2, num_workers=1, collate_fn=crop)
        made.sampler.skip(skipped)
        return list(made)

    assert read(2) == read(0)[1:]


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}])
def test_each_reading_of_an_example_draws_other_numbers(options: dict[str, Any]) -> None:
    made = loader(Drawing(4), 1, num_workers=1, updates_per_epoch=8, **options)
    drawn = []
    for epoch in (1, 2):
        data.set_epoch(epoch)
        drawn += [(int(index), float(number)) for index, number in made]
    assert [index for index, _ in drawn] == [0, 1, 2, 3] * 4
    assert len({number for _, number in drawn}) == 16


class Half(data.EpochSampler):
    def order(self, generator: torch.Generator) -> list[int]:
        return [*range(len(self.dataset) // 2)]


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    refused: list[dict[str, Any]] = [{"shuffle": True}, {"limit": 1}]
    for options in refused:
        with pytest.raises(ValueError, match="iterable"):
            loader(Stream(), **options)
    with pytest.raises(UserError, match="limit=-1"):
        loader(Numbers(3), limit=-1)
    with pytest.raises(ValueError, match="updates_per_epoch"):
        loader(Numbers(3), updates_per_epoch=0)
    with pytest.raises(ValueError, match="sampler="):
        loader(Numbers(3), sampler=range(3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_sampler"):
        loader(Numbers(3), batch_sampler=[[0], [1, 2]])
    with pytest.raises(ValueError, match=r"Half\.order"):
        list(loader(Numbers(3), sampler=Half).sampler)
    be_rank(monkeypatch, 0, 2)
    assert data.split_batch(8) == 4
    with pytest.raises(UserError, match="batch size 7"):
        data.split_batch(7)


def test_any_class_of_loader_and_flashys_address() -> None:
    class Mine(torch.utils.data.DataLoader[int]):
        pass

    assert isinstance(distrib.loader(Numbers(3), klass=Mine), Mine)


FORKING = """
import multiprocessing, os, pathlib, signal, sys, time
from core.workers import _WorkerStart

def work():
    pathlib.Path("part").write_text(str(os.getpid()))
    os.rename("part", "pid")
    while not pathlib.Path("go").exists():
        time.sleep(0.01)
    _WorkerStart(0, None)(0)
    pathlib.Path("alive").touch()
    signal.pause()

worker = multiprocessing.get_context("fork").Process(target=work)
worker.start()
if {killed}:
    while not pathlib.Path("pid").exists():
        time.sleep(0.01)
    os._exit(0)
worker.join()
"""


@pytest.mark.parametrize("killed", [True, False])
def test_a_worker_whose_parent_was_killed_while_forking_ends(killed: bool, tmp_path: Path) -> None:
    parent = Command(tmp_path, "-c", FORKING.format(killed=killed), env=WITH_CORE)
    alive = tmp_path / "alive"
    if killed:
        parent.finish()
    else:
        parent.until((tmp_path / "pid").exists)
    pid = int((tmp_path / "pid").read_text())
    (tmp_path / "go").touch()
    while not (gone(pid) if killed else alive.exists()):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert alive.exists() == (not killed)
    parent.finish()
