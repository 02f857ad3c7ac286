"""Collectives and gradient synchronisation, on real gloo processes."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from .. import distrib, gradients, loader, process_group
from ..rng import seed_everything
from ..utils import UserError, averager
from ..weights import EMA, load_module_state, module_state
from .processes import on_ranks


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
    with pytest.raises(UserError, match="CUDA is not available"):
        distrib.device("cuda")
    with pytest.raises(UserError, match="device=gpu: there are auto"):
        distrib.device("gpu")


def test_nccl_without_cuda_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="use gloo"):
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
    process_group.leave()
    threads = Path("/proc/self/task").iterdir()
    return [name for t in threads if "runloop" in (name := (t / "comm").read_text())]


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are listed by Linux only")
def test_leaving_ends_the_threads_of_the_group() -> None:
    """One that is left may need Python after its end, and abort the process."""
    assert on_ranks(_threads_after_leaving) == [[], []]


LAUNCHED = """
import sys
sys.path.insert(0, {root!r})
from {package} import distrib
distrib.init()
sys.stdout.write(f"{{distrib.gather_objects(distrib.rank())}}\\n")
"""


def test_torchrun_starts_us(tmp_path: Path) -> None:
    package = distrib.__name__.rpartition(".")[0]
    root = Path(distrib.__file__).parents[package.count(".") + 1]
    script = tmp_path / "script.py"
    script.write_text(LAUNCHED.format(root=str(root), package=package))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    done = subprocess.run([*torchrun, script], capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["[0, 1, 2]"] * 3, done.stderr


def test_workers_without_a_meeting_point(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_PORT", "SUBMITIT_EXECUTOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match="rank 1 of 2 does not know where to meet"):
        distrib.init()


def test_a_port_that_is_taken_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        here = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in here.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError, match=f"rank 0 of 2 can't meet .*{port}.* the port free"):
            distrib.init()


def test_a_forgotten_init_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RuntimeError, match=r"barrier: call distrib\.init\(\) first"):
        distrib.barrier()
    with pytest.raises(RuntimeError, match=r"broadcast_tensors .* call distrib\.init"):
        distrib.broadcast_model(nn.Linear(1, 1))


def _disagree(kind: str) -> str:
    rank = distrib.rank()
    tensors = {
        "number": [torch.ones(2)] * (rank + 1),
        "none": [torch.ones(2)] * rank,
        "shape": [torch.ones(2 + rank)],
        "dtype": [torch.ones(2, dtype=torch.float64 if rank else torch.float32)],
        "name": [],
    }[kind]
    names = ["a", "b"] if rank else ["b", "a"]
    try:
        if kind == "name":
            distrib.sync_model(nn.ModuleDict({n: nn.PReLU() for n in names}))
        distrib.average_tensors(tensors)
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize(
    ("kind", "difference"),
    [
        ("number", "rank 0 is in average_tensors with none; rank 1 with [2] float32 on cpu"),
        ("none", "rank 0 is in average_tensors with none; rank 1 with [2] float32 on cpu"),
        ("shape", "with [2] float32 on cpu; rank 1 with [3] float32 on cpu"),
        ("dtype", "with [2] float32 on cpu; rank 1 with [2] float64 on cpu"),
        ("name", "with b.weight: [1] float32 on cpu; rank 1 with a.weight: [1] float32 on cpu"),
    ],
)
def test_ranks_that_disagree_are_told_how(kind: str, difference: str) -> None:
    zero, one = on_ranks(_disagree, kind, timeout=20)
    assert difference in zero
    assert "ranks disagree" in one


def _model() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Linear(6, 300_000), nn.Linear(300_000, 1)]
    return nn.Sequential(*layers).double()


def _data() -> torch.Tensor:
    return torch.randn(8, 6, generator=torch.Generator().manual_seed(1)).double()


def _gradients(how: str) -> list[list[float]]:
    model = _model().eval()
    shares = [_data()[distrib.rank() :: distrib.world_size()]]
    if how == "accumulate":
        shares = list(shares[0].chunk(2))
    for share in shares[:-1]:
        torch.autograd.backward(model(share).pow(2).mean() / len(shares))

    def last() -> torch.Tensor:
        loss: torch.Tensor = model(shares[-1]).pow(2).mean() / len(shares)
        return loss

    if how == "plain":
        last().backward()
        distrib.sync_model(model)
    elif how == "ddp":
        wrapped = distrib.wrap(model)
        torch.autograd.backward(wrapped(shares[-1]).pow(2).mean())
    else:
        with distrib.eager_sync_model(model):
            last().backward()
    return [p.grad.flatten()[:50].tolist() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("how", ["plain", "eager", "accumulate", "ddp"])
def test_gradients_equal_those_of_the_full_batch(how: str) -> None:
    model = _model().eval()
    model(_data()).pow(2).mean().backward()
    expected = [p.grad.flatten()[:50].tolist() for p in model.parameters() if p.grad is not None]
    for found in on_ranks(_gradients, how):
        assert isinstance(found, list), found
        assert len(found) == len(expected)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours == pytest.approx(theirs, rel=1e-12, abs=1e-12)


def _train_and_evaluate() -> dict[str, Any]:
    """Two epochs of 48 examples in global batches of 12, then an evaluation of 13 examples."""
    points = torch.randn(48, 6, generator=torch.Generator().manual_seed(2)).double()
    data = torch.utils.data.TensorDataset(points, points.sum(1, keepdim=True))
    batches = loader.loader(data, loader.split_batch(12), shuffle=True)
    torch.manual_seed(distrib.rank())  # ranks begin with different weights
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    distrib.broadcast_model(model)
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for epoch in (1, 2):
        loader.set_epoch(epoch)
        for x, y in batches:
            optim.zero_grad()
            with distrib.eager_sync_model(model):
                loss = (model(x) - y).pow(2).mean()
                loss.backward()
            optim.step()
            losses.append(distrib.average_metrics({"loss": loss}, len(x))["loss"])
    seen: list[float] = []
    average = averager()
    metrics: Mapping[str, float] = {}
    for x, y in loader.loader(torch.utils.data.Subset(data, range(13)), 2):
        metrics = average({"loss": (model(x) - y).pow(2).mean().detach()}, weight=len(x))
        seen += y.flatten().tolist()
    return {
        "losses": losses,
        "weights": torch.cat([p.detach().flatten() for p in model.parameters()]).tolist(),
        "valid": distrib.average_metrics(metrics, len(seen)),
        "seen": sorted(itertools.chain(*distrib.gather_objects(seen))),
    }


def test_any_number_of_ranks_gives_the_same_numbers() -> None:
    [alone] = on_ranks(_train_and_evaluate, ranks=1)
    assert isinstance(alone, dict), alone
    assert alone["losses"][-1] < alone["losses"][0] / 1.2
    assert len(alone["seen"]) == 13
    for ranks in (2, 3):
        for found in on_ranks(_train_and_evaluate, ranks=ranks):
            assert isinstance(found, dict), found
            for name, expected in alone.items():
                assert found[name] == pytest.approx(expected, rel=1e-9, abs=1e-9), name


def _partly_unused() -> list[Any]:
    a, b, c = (nn.Parameter(torch.ones(2)) for _ in range(3))
    frozen = nn.Parameter(torch.ones(2), requires_grad=False)
    with distrib.eager_sync_gradients([a, b, c, frozen]):
        used = b if distrib.rank() else a
        (used.sum() + 0 * a.detach().sum()).backward()
    return [None if p.grad is None else p.grad.tolist() for p in (a, b, c, frozen)]


def test_unused_and_frozen_parameters() -> None:
    for found in on_ranks(_partly_unused):
        assert found == [[0.5, 0.5], [0.5, 0.5], None, None], found


def _unusual() -> dict[str, Any]:
    """Tied weights, buffers and parameters of all types; and no parameter at all."""
    rank = distrib.rank()
    tied = nn.Linear(2, 2, bias=False)
    model = nn.Sequential(tied, tied)
    model.register_buffer("wave", torch.full((2,), complex(rank, 1)))
    model.register_buffer("count", torch.tensor(rank + 5))
    model.short = nn.Parameter(torch.zeros(3, dtype=torch.bfloat16))
    model.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    with torch.no_grad():
        tied.weight.fill_(1.0)
    with distrib.eager_sync_model(model):
        loss = model(torch.full((1, 2), rank + 1.0)).sum()
        loss = loss + (model.short * (60000.0 * rank)).sum() + (model.phase * 1j * rank).real.sum()
        loss.backward()
    distrib.sync_gradients([])
    named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {
        **{name: grad.flatten().tolist() for name, grad in named.items()},
        "wave": model.wave.tolist(),  # type: ignore[operator]
        "count": int(model.count),  # type: ignore[arg-type]
    }


def test_unusual_models() -> None:
    for found in on_ranks(_unusual):
        assert isinstance(found, dict), found
        assert found["0.weight"] == pytest.approx([6.0] * 4)
        assert found["short"] == pytest.approx([30000.0] * 3, rel=0.01)
        assert found["phase"] == [-0.5j, -0.5j]
        assert found["wave"] == [0.5 + 1j] * 2
        assert found["count"] == 5


def _misuse() -> list[Any]:
    said: list[Any] = []
    p = nn.Parameter(torch.ones(2))
    with distrib.eager_sync_gradients([p]):
        p.sum().backward()
        (distrib.rank() * p).sum().backward()
    said.append(p.grad.tolist() if p.grad is not None else None)
    big = [nn.Parameter(torch.ones(gradients.ALONE_BYTES // 4)) for _ in range(2)]
    try:
        with distrib.eager_sync_gradients(big):
            sum(p.sum() for p in big).backward()  # type: ignore[union-attr]
            sum(p.sum() for p in big).backward()  # type: ignore[union-attr]
    except RuntimeError as error:
        said.append(str(error))
    for p in big:
        p.grad = torch.full_like(p, distrib.rank())
    distrib.sync_gradients(big)  # what was on its way is forgotten
    said.append([float(p.grad[0]) for p in big if p.grad is not None])
    q = nn.Parameter(torch.ones(2))
    try:
        with distrib.eager_sync_gradients([q]):
            raise ValueError("mine")
    except ValueError as error:
        said.append(str(error))
    embedding = nn.Embedding(3, 2, sparse=True)
    embedding(torch.tensor([1])).sum().backward()
    try:
        distrib.sync_model(embedding)
    except RuntimeError as error:
        said.append(str(error))
    return said


def test_misuse_and_exceptions_in_the_body() -> None:
    for both, second, after, mine, sparse in on_ranks(_misuse, timeout=20):
        assert both == [1.5, 1.5]  # nothing was sent before the end
        assert "second backward pass" in second
        assert after == [0.5, 0.5]
        assert mine == "mine"
        assert "weight: [3, 2] float32 on cpu has a sparse gradient" in sparse


def _buffers(average: bool) -> list[float]:
    model = nn.BatchNorm1d(1)
    for buffer in model.buffers():
        buffer.fill_(distrib.rank() + 1)
    model(torch.ones(2, 1)).sum().backward()
    for buffer in model.buffers():
        buffer.fill_(distrib.rank() + 1)
    distrib.sync_model(model, average_buffers=average)
    return [float(b) for b in model.buffers()]


def test_buffers() -> None:
    assert on_ranks(_buffers, True) == [[1.5, 1.5, 1.0]] * 2
    assert on_ranks(_buffers, False) == [[1.0, 1.0, 1.0]] * 2


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
