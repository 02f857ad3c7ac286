"""Iterable datasets, dealt out over workers and ranks by the loader or by themselves."""

from __future__ import annotations

import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchdata.stateful_dataloader import StatefulDataLoader

from core.data import loader, set_epoch
from core.rng import Position, position
from core.stop import Stopped
from core.tests.test_data import Numbers, be_rank
from core.utils import UserError

from .test_steps import TwoEpochs, ask


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


class Noise(IterableDataset[float]):
    """Numbers with noise from the generator of a worker; ends after so many."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __iter__(self) -> Iterator[float]:
        for number in range(self.length):
            yield number + torch.rand(()).item() / 2


def test_epochs_of_a_stream_go_on_where_the_last_one_ended() -> None:
    made = loader(Endless(), 2, updates_per_epoch=3)
    assert len(made) == 3
    seen = {}
    for epoch in (1, 2, 4, 3, 3):  # as after a resume, and in a second pass
        set_epoch(epoch)
        seen[epoch] = [int(number) for batch in made for number in batch]
        assert seen[epoch] == [*range(6 * (epoch - 1), 6 * epoch)]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stream_that_ends_begins_again(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in range(ranks):
        be_rank(monkeypatch, rank, ranks)
        made = loader(Whole(0, 5), 1, updates_per_epoch=4)
        set_epoch(1)
        first = [int(number) for number in made]
        set_epoch(2)
        mine = [*range(rank, 5, ranks)]
        assert first + [int(number) for number in made] == [
            *itertools.islice(itertools.cycle(mine), 8)
        ]


def test_a_stream_without_epochs_of_n_updates_is_refused() -> None:
    with pytest.raises(UserError, match="the stream is empty on rank 0"):
        next(iter(loader(Whole(0, 0), 2, updates_per_epoch=3)))
    with pytest.raises(UserError, match="updates_per_epoch= of a stream"):
        loader(Whole(), 2, updates_per_epoch=3, klass=StatefulDataLoader)
    with pytest.raises(UserError, match="updates_per_epoch=0: give at least 1"):
        loader(Endless(), 2, updates_per_epoch=0)


class Failing(IterableDataset[int]):
    """Can't be read once."""

    failed = False

    def __iter__(self) -> Iterator[int]:
        for number in range(100):
            if number == 6 and not self.failed:
                self.failed = True
                raise OSError("the network is gone")
            yield number


def test_a_stream_that_failed_is_read_again() -> None:
    made = loader(Failing(), 2, updates_per_epoch=3)
    set_epoch(1)
    assert torch.cat([*made]).tolist() == [*range(6)]
    set_epoch(2)
    with pytest.raises(OSError, match="the network is gone"):
        next(iter(made))
    assert torch.cat([*made]).tolist() == [*range(6, 12)]


def test_without_an_epoch_a_stream_just_goes_on() -> None:
    token = position.set(Position())
    made = loader(Endless(), 2, updates_per_epoch=2)
    assert [torch.cat([*made]).tolist() for _ in range(2)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    position.reset(token)


# --------------------------------------------------------------------------- stopped and resumed


class Reader(TwoEpochs):
    """Reads its data for two epochs."""

    def __init__(self, folder: Path, data: Iterable[Any], registered: bool = False) -> None:
        super().__init__(folder)
        self.data = data
        if registered:
            self.register_stateful("data")
        self.seen: list[tuple[int, list[int]]] = []
        self.stop_after = 0

    def train(self) -> dict[str, float]:
        steps = self.steps(self.data)
        for batch in steps:
            self.seen.append((self.epoch, torch.as_tensor(batch).tolist()))
            steps.log({"x": 0.0})
            if len(self.seen) == self.stop_after:
                ask()
        return steps.metrics()


def stateful(workers: int) -> Any:
    return StatefulDataLoader(Numbers(24), 2, shuffle=True, num_workers=workers)


def dealt_out(workers: int) -> Any:
    return loader(Numbers(24), 2, shuffle=True, klass=StatefulDataLoader, num_workers=workers)


@pytest.mark.parametrize(("make", "registered"), [(stateful, True), (dealt_out, False)])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_after", [3, 12, 15])
def test_a_stateful_loader_resumes(
    make: Any, registered: bool, workers: int, stop_after: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    whole = Reader(tmp_path / "whole", make(workers), registered)
    whole.run()
    torch.manual_seed(0)
    stopped = Reader(tmp_path / "parts", make(workers), registered)
    stopped.stop_after = stop_after
    with pytest.raises(Stopped):
        stopped.run()
    resumed = Reader(tmp_path / "parts", make(workers), registered)
    resumed.run()
    assert stopped.seen + resumed.seen == whole.seen


@pytest.mark.parametrize(("make", "registered"), [(stateful, False), (dealt_out, True)])
def test_a_loader_that_would_resume_wrongly_is_refused(
    make: Any, registered: bool, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"train: .*register it"):
        Reader(tmp_path, make(0), registered).run()


def test_a_stream_needs_as_many_workers_as_before(tmp_path: Path) -> None:
    stopped = Reader(tmp_path, loader(Whole(), 2, num_workers=2))
    stopped.stop_after = 3
    with pytest.raises(Stopped):
        stopped.run()
    with pytest.raises(UserError, match="another number of workers"):
        Reader(tmp_path, loader(Whole(), 2, num_workers=1)).run()
    resumed = Reader(tmp_path, loader(Whole(), 2, num_workers=2))
    resumed.run()
    first = [n for epoch, batch in stopped.seen + resumed.seen if epoch == 1 for n in batch]
    assert sorted(first) == [*range(25)]


def test_a_generator_of_the_data_alone_is_named(tmp_path: Path) -> None:
    own = DataLoader(Numbers(4), 2, shuffle=True, generator=torch.Generator())
    with pytest.warns(UserWarning, match="DataLoader with a generator"):
        Reader(tmp_path / "own", own).run()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Reader(tmp_path / "plain", DataLoader(Numbers(4), 2, shuffle=True)).run()
        Reader(tmp_path / "ours", loader(Numbers(4), 2, shuffle=True)).run()
        Reader(tmp_path / "stream", loader(Whole(), 2)).run()


def test_an_iterator_that_lives_on_is_named(tmp_path: Path) -> None:
    class Cycling:
        def __init__(self) -> None:
            self.batches = self.cycle(loader(Numbers(6), 2, shuffle=True))

        def cycle(self, made: Any) -> Iterator[Any]:
            while True:
                yield from made

        def __iter__(self) -> Iterator[Any]:
            return itertools.islice(self.batches, 2)

    with pytest.warns(UserWarning, match="updates_per_epoch"):
        Reader(tmp_path, Cycling()).run()


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop_after", [3, 7, 8, 11])
def test_epochs_of_a_stream_resume(workers: int, stop_after: int, tmp_path: Path) -> None:
    def make() -> Any:
        return loader(Noise(11), 2, updates_per_epoch=7, num_workers=workers)

    torch.manual_seed(0)
    whole = Reader(tmp_path / "whole", make())
    whole.run()
    assert len(whole.seen) == 14
    torch.manual_seed(0)
    stopped = Reader(tmp_path / "parts", make())
    stopped.stop_after = stop_after
    with pytest.raises(Stopped):
        stopped.run()
    torch.rand(3)
    resumed = Reader(tmp_path / "parts", make())
    resumed.run()
    assert stopped.seen + resumed.seen == whole.seen


def test_a_run_goes_on_with_a_stream_in_the_same_process(tmp_path: Path) -> None:
    whole = Reader(tmp_path / "whole", loader(Endless(), 2, updates_per_epoch=7))
    whole.run()
    stopped = Reader(tmp_path / "parts", loader(Endless(), 2, updates_per_epoch=7))
    stopped.stop_after = 9
    with pytest.raises(Stopped):
        stopped.run()
    stopped.run()
    assert stopped.seen == whole.seen


def test_islice_of_a_stream_is_named(tmp_path: Path) -> None:
    class Sliced(Reader):
        def train(self) -> dict[str, float]:
            for _ in self.steps(itertools.islice(Endless(), 3)):
                pass
            return {}

    with pytest.warns(UserWarning, match="islice begins anew"):
        Sliced(tmp_path, []).run()
