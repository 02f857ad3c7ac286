"""Iterable datasets, dealt out over workers and ranks by the loader or by themselves."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset, get_worker_info

from core.data import loader
from core.tests.test_data import be_rank


class Whole(IterableDataset[int]):
    """Counts from a start to an end."""

    def __init__(self, start: int = 0, end: int = 25) -> None:
        self.start, self.end = start, end

    def __len__(self) -> int:
        return self.end - self.start

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start, self.end))


class Splitting(Whole):
    """As the first example of PyTorch's documentation."""

    def __iter__(self) -> Iterator[int]:
        info, start, end = get_worker_info(), self.start, self.end
        if info is not None:
            share = math.ceil((end - start) / info.num_workers)
            start, end = start + info.id * share, min(start + (info.id + 1) * share, end)
        return iter(range(start, end))


class Striding(Whole):
    """A generator, which asks for its worker at the first example."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        first, step = (info.id, info.num_workers) if info else (0, 1)
        yield from itertools.islice(range(self.start, self.end), first, None, step)


class Seeding(Whole):
    """Asks for the number of its worker, but not for how many there are."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        assert info is None or info.id >= 0
        return super().__iter__()


def split(worker: int) -> None:
    """As the second example of PyTorch's documentation."""
    info: Any = get_worker_info()
    data = info.dataset
    share = math.ceil((data.end - data.start) / info.num_workers)
    data.start += worker * share
    data.end = min(data.start + share, data.end)


CASES: list[tuple[Callable[[], Whole], Any]] = [
    (Whole, None),
    (Splitting, None),
    (Striding, None),
    (Seeding, None),
    (Whole, split),
]


@pytest.mark.parametrize(
    ("make", "init"), CASES, ids=["whole", "splitting", "striding", "seeding", "split"]
)
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [1, 2])
def test_each_example_comes_once(
    make: Any, init: Any, workers: int, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    for rank in range(ranks):
        be_rank(monkeypatch, rank, ranks)
        made = loader(make(), 2, num_workers=workers, worker_init_fn=init)
        for _ in range(2):
            seen += torch.cat(list(made)).tolist()
    assert sorted(seen) == sorted([*range(25)] * 2)


def test_workers_that_live_on_deal_out_alike() -> None:
    made = loader(Striding(), 2, num_workers=2, persistent_workers=True)
    first, second = (torch.cat(list(made)).tolist() for _ in range(2))
    assert first == second
    assert sorted(first) == [*range(25)]


def test_a_stream_with_a_length_gives_a_loader_with_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(loader(Whole(), 2)) == 13
    be_rank(monkeypatch, 1, 2)
    assert len(loader(Whole(), 2)) == 6
    with pytest.raises(TypeError):
        len(loader(Endless(), 2))


class Endless(IterableDataset[int]):
    def __iter__(self) -> Iterator[int]:
        return itertools.count()


def test_the_seed_of_a_worker_is_given_by_the_epoch_alone() -> None:
    class Seeds(IterableDataset[int]):
        def __iter__(self) -> Iterator[int]:
            info = get_worker_info()
            assert info is not None
            yield info.seed

    torch.manual_seed(1)
    first = [int(seed) for seed in loader(Seeds(), 1, num_workers=1)]
    torch.manual_seed(2)
    assert [int(seed) for seed in loader(Seeds(), 1, num_workers=1)] == first
