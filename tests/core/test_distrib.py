"""Collectives, and how ranks meet, on real gloo processes."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core import averager, distrib
from core.distrib import board, watch
from core.ema import EMA
from core.modules import load_module_state, module_state
from core.rng import seed_everything
from core.tests.processes import on_ranks
from core.utils import UserError

from ..commands import ROOT, Command, run


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def test_alone_everything_is_the_identity() -> None:
    distrib.init()
    assert (distrib.rank(), distrib.world_size()) == (0, 1)
    assert distrib.is_rank_zero()
    assert not distrib.is_distributed()
    distrib.barrier()
    tensor = torch.ones(2)
    distrib.all_reduce(tensor)
    distrib.average_tensors([tensor])
    distrib.broadcast_tensors([tensor])
    assert torch.equal(tensor, torch.ones(2))
    assert distrib.broadcast_object("x") == "x"
    assert distrib.average_metrics({"a": torch.tensor(2.0)}) == {"a": 2.0}
    model = nn.Linear(2, 1)
    assert distrib.wrap(model) is model
    assert distrib.rank_zero_only(lambda: 3)() == 3


def test_rank_is_right_before_init(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert (distrib.rank(), distrib.world_size()) == (1, 2)
    assert not distrib.is_rank_zero()
    assert distrib.rank_zero_only(lambda: 3)() is None


def test_missing_cuda_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    assert distrib.device("auto").type in ("cpu", "mps")
    with pytest.raises(UserError, match="device=cuda"):
        distrib.device("cuda")
    with pytest.raises(UserError, match="device=gpu"):
        distrib.device("gpu")


def test_nccl_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="nccl"):
        distrib.init(backend="nccl")


def _collectives() -> dict[str, Any]:
    rank = distrib.rank()
    distrib.barrier()
    total = torch.tensor([float(rank + 1)])
    distrib.all_reduce(total)
    mean = [torch.full((2, 3), float(rank)), torch.tensor(rank), torch.tensor(rank * 2.0)]
    distrib.average_tensors(mean)
    half = torch.full((4,), 60000.0, dtype=torch.float16)
    distrib.average_tensors([half])
    sent = [torch.full((3, 2), rank).T, torch.tensor(rank * 1.0), torch.empty(0)]
    distrib.broadcast_tensors(sent, src=1)
    obj = ["mine", rank]
    received = distrib.broadcast_object(obj, src=1)
    model = nn.Linear(3, 3)
    distrib.broadcast_model(model)
    average = averager()
    for correct, of_cats in [(5, 5), (0, 1)][rank : rank + 1]:
        average({"loss": float(rank)}, weight=8)
        average({"acc_of_cats": correct / of_cats}, weight=of_cats)
    average({"loss": float("nan")} if rank else {}, weight=8)
    return {
        "total": total.item(),
        "mean": [mean[0].tolist(), mean[1].item(), mean[2].item()],
        "half": half.isfinite().all().item(),
        "sent": [sent[0].tolist(), sent[1].item()],
        "object": received,
        "own": received is obj,
        "all": distrib.gather_objects(rank),
        "weight": model.weight.tolist(),
        "metrics": distrib.average_metrics(
            {"a": 16777217, "b": rank} if rank else {"b": torch.tensor(rank), "a": 16777217},
            rank + 1,
        ),
        "one": distrib.average_metrics({"x": 2.0} if rank else {}),
        "zero": distrib.average_metrics({"x": float(rank)}, count=rank),
        "averages": distrib.average_metrics(average),
        "counted": distrib.average_metrics(average, 3 - 2 * rank),
    }


def test_collectives_on_two_ranks() -> None:
    zero, one = on_ranks(_collectives)
    assert isinstance(zero, dict), zero
    assert isinstance(one, dict), one
    for result in (zero, one):
        assert result["total"] == 3
        assert result["mean"][0] == [[0.5] * 3] * 2
        assert result["mean"][2] == 1.0
        assert result["half"]
        assert result["sent"] == [[[1] * 3] * 2, 1.0]
        assert result["object"] == ["mine", 1]
        assert result["all"] == [0, 1]
        assert result["weight"] == zero["weight"]
        assert result["metrics"] == {"a": 16777217.0, "b": 2 / 3}
        assert result["one"] == {"x": 2.0}
        assert result["zero"] == {"x": 1.0}
        assert result["averages"] == {"loss": 0.5, "acc_of_cats": 5 / 6, "loss.nonfinite": 1.0}
        assert result["counted"] == {"loss": 0.25, "acc_of_cats": 0.75, "loss.nonfinite": 1.0}
    assert (zero["mean"][1], one["mean"][1]) == (0, 1)
    assert (zero["own"], one["own"]) == (False, True)


def _names() -> list[list[str]]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            compiled: Any = torch.compile(nn.Linear(2, 2))
            self.encoder = distrib.wrap(compiled)
            self.module = nn.Linear(2, 2)

    compiled: Any = torch.compile(distrib.wrap(nn.Linear(2, 2)))
    for model in (compiled, Model(), distrib.wrap(nn.Sequential(nn.Linear(1, 1)))):
        load_module_state(model, module_state(model))
        EMA({"model": model}).update()
    return [[*module_state(compiled)], [*EMA({"": Model()}).states[""]]]


def test_a_part_that_is_wrapped_keeps_its_names() -> None:
    names = ["weight", "bias"]
    whole = [f"{part}.{name}" for part in ("encoder", "module") for name in names]
    assert on_ranks(_names) == [[names, whole]] * 2


def _threads_after_leaving() -> list[str]:
    model = nn.Linear(2, 1)
    optim = torch.optim.Adam(model.parameters())  # imports more of torch, with the group alive
    with distrib.eager_sync_model(model):
        model(torch.ones(1, 2)).sum().backward()
    optim.step()
    distrib.leave()
    threads = Path("/proc/self/task").iterdir()
    return [name for t in threads if "runloop" in (name := (t / "comm").read_text())]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux only")
def test_leaving_ends_the_threads_of_the_group() -> None:
    """One that is left may need Python after its end, and abort the process."""
    assert on_ranks(_threads_after_leaving) == [[], []]


LAUNCHED = """
import sys
from core import distrib
distrib.init()
sys.stdout.write(f"{distrib.gather_objects(distrib.rank())}\\n")
"""


def test_torchrun_starts_us(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(LAUNCHED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", "script.py"]
    said = run(tmp_path, *torchrun, env=os.environ | {"PYTHONPATH": ROOT})
    assert said.count("[0, 1, 2]\n") == 3, said


RESTARTED = """
import os, time
from core import distrib
distrib.init()
distrib.barrier()
if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
    if distrib.rank() == 1:
        os.abort()
    distrib.barrier()
print(distrib.average_metrics({"rank": distrib.rank()}))
"""


def test_torchrun_starts_us_again(tmp_path: Path) -> None:
    (tmp_path / "restarted.py").write_text(RESTARTED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    args = [*torchrun, "--max-restarts=1", "restarted.py"]
    said = run(tmp_path, *args, env=os.environ | {"PYTHONPATH": ROOT})
    assert said.count("{'rank': 0.5}") == 2


def test_workers_without_a_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_PORT", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="rank 1 of 2"):
        distrib.init()


def _copied() -> list[Any]:
    rank = distrib.rank()
    kinds = [torch.int16, torch.uint16, torch.bool, torch.complex64, torch.float8_e4m3fn]
    model = nn.Module()
    for kind in (*kinds, torch.float32):
        model.register_buffer(str(kind)[6:], torch.tensor([rank, 1]).to(kind))
    model.register_buffer("empty", torch.zeros(0, dtype=torch.int16))
    distrib.broadcast_model(model)
    return [buffer.float().tolist() for buffer in model.buffers()]


def test_buffers_of_any_type_are_copied() -> None:
    for found in on_ranks(_copied):
        assert found == [[0, 1]] * 6 + [[]]


WAITING = """
import signal, sys
from core import distrib, setup_logging
from core.distrib import group
signal.signal(signal.SIGTERM, signal.default_int_handler)
setup_logging(with_file_log=False)
group.WAIT = 0.1
distrib.init()
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_waits_for_others_says_so_and_hears_signals(rank: int, tmp_path: Path) -> None:
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": "2"}
    env = os.environ | {"PYTHONPATH": ROOT, "RANK": str(rank)} | group
    waiting = Command(tmp_path, "-c", WAITING, env=env)
    waiting.until(lambda: "waits for the others" in waiting.said)
    waiting.send(signal.SIGTERM)
    assert "KeyboardInterrupt" in waiting.finish(1)


def test_a_port_that_is_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        here = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in here.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"rank 0 of 2 .*{port}"):
            distrib.init()


def test_a_forgotten_init_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"barrier.*distrib\.init"):
        distrib.barrier()
    with pytest.raises(RuntimeError, match=r"broadcast_tensors.*distrib\.init"):
        distrib.broadcast_model(nn.Linear(1, 1))


def _seeded() -> list[float]:
    distrib.init()
    drawn = []
    for seed in (0, 1):
        seed_everything(seed)
        drawn.append(torch.rand(()).item())
    return drawn


def test_seeds_of_ranks_do_not_overlap() -> None:
    one, other = on_ranks(_seeded)
    assert len({*one, *other}) == 4
    torch.manual_seed(1)
    assert torch.rand(()).item() == one[1]


class OnDevice:
    """A tensor of a device, as far as `note_call` looks."""

    is_cpu = False


def come_late() -> dict[str, float]:
    """Reduce on a device, and go on to a collective on the CPU; rank zero is late for both."""
    board.SECONDS = watch.SECONDS = 0.3  # type: ignore[attr-defined]
    watch.watch_device("fake")
    if distrib.is_rank_zero():
        time.sleep(12 * board.SECONDS)
    watch.note_call(OnDevice(), "all_reduce")  # type: ignore[arg-type]
    found = distrib.average_metrics({"loss": 1.0})  # nobody waits for the device
    time.sleep(4 * board.SECONDS)
    return found


def test_a_rank_that_is_late_is_not_accused() -> None:
    assert on_ranks(come_late, ranks=3) == 3 * [{"loss": 1.0}]
