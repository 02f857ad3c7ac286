"""Gradients of several ranks, on real gloo processes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from .. import data, distrib
from ..distrib import collectives
from ..utils import averager
from .processes import on_ranks


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
    zero, one = on_ranks(_disagree, kind)
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
    numbers = torch.utils.data.TensorDataset(points, points.sum(1, keepdim=True))
    batches = data.loader(numbers, data.split_batch(12), shuffle=True)
    torch.manual_seed(distrib.rank())  # ranks begin with different weights
    model = nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 1)).double()
    distrib.broadcast_model(model)
    optim = torch.optim.AdamW(model.parameters(), lr=0.01)
    losses = []
    for epoch in (1, 2):
        data.set_epoch(epoch)
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
    for x, y in data.loader(torch.utils.data.Subset(numbers, range(13)), 2):
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
    big = [nn.Parameter(torch.ones(collectives.ALONE_BYTES // 4)) for _ in range(2)]
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
    for both, second, after, mine, sparse in on_ranks(_misuse):
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
