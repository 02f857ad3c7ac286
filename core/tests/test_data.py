"""The order of the data, its shares, the seeds of workers."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, IterableDataset

from .. import data


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
    data.set_epoch(epoch)
    made = data.loader(Numbers(size), 2, shuffle=True, **options)
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
    made = data.loader(Numbers(10), 10, shuffle=True)
    first, second = (next(iter(made)).tolist() for _ in range(2))
    assert first != second


def test_ranks_share_a_batch_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(data.loader(Numbers(12), 4, shuffle=True))
    shares = []
    for rank in range(2):
        be_rank(monkeypatch, rank, 2)
        shares.append(list(data.loader(Numbers(12), 2, shuffle=True)))
    for batch, *parts in zip(whole, *shares, strict=True):
        assert sorted(batch.tolist()) == sorted(torch.cat(parts).tolist())


@pytest.mark.parametrize("size", [0, 1, 2, 10, 11])
def test_shares(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[bool, list[list[int]]] = {True: [], False: []}
    for rank in range(3):
        be_rank(monkeypatch, rank, 3)
        for shuffle, shares in found.items():
            made = data.loader(Numbers(size), None, shuffle=shuffle)
            shares.append([int(n) for n in made])
            assert len(made) == len(shares[-1])
    assert sorted(itertools.chain(*found[False])) == list(range(size))
    assert set(itertools.chain(*found[True])) == set(range(size))
    assert len({len(share) for share in found[True]}) == 1


def test_an_epoch_of_any_number_of_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    def examples(epochs: range, batch: int = 2) -> list[int]:
        made = data.loader(Numbers(7), batch, shuffle=True, updates_per_epoch=5)
        assert len(made) == 5
        seen: list[int] = []
        for epoch in epochs:
            data.set_epoch(epoch)
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
    made = data.loader(Numbers(20), 3, limit=2)
    assert torch.cat(list(made)).tolist() == list(range(6))
    assert len(data.loader(Numbers(4), 3, limit=2)) == 2
    shuffled = data.loader(Numbers(20), 3, shuffle=True, limit=2)
    assert sorted(torch.cat(list(shuffled)).tolist()) == list(range(6))
    same = data.loader(Numbers(20), 3, shuffle=True, limit=1, updates_per_epoch=4)
    assert [sorted(batch.tolist()) for batch in same] == [[0, 1, 2]] * 4
    be_rank(monkeypatch, 1, 2)
    assert torch.cat(list(data.loader(Numbers(20), 3, limit=2))).tolist() == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_are_seeded(context: str) -> None:
    def draw(epoch: int) -> torch.Tensor:
        data.set_epoch(epoch)
        made = data.loader(Draws(4), 2, num_workers=2, multiprocessing_context=context)
        return torch.cat(list(made))

    first = draw(1)
    assert torch.equal(draw(1), first)
    assert not torch.equal(draw(2), first)
    assert len(first.unique()) == first.numel()


@pytest.mark.parametrize("workers", [0, 2])
def test_iterable_datasets_are_dealt_out(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    for rank in range(2):
        be_rank(monkeypatch, rank, 2)
        seen += [int(n) for n in data.loader(Stream(), None, num_workers=workers)]
    assert sorted(seen) == list(range(11))
