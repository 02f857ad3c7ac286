"""How long a commit waits after many epochs, beside Dora's own: `python -m bench.history`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from . import harness
from .harness import OURS, Row, Section, Spread, interleave

LENGTHS = [10, 100, 1_000, 10_000]
TARGET = 2.0  # milliseconds


def epoch(number: int) -> dict[str, dict[str, float]]:
    """Two stages of ten metrics."""
    return {
        stage: {f"metric_{i}": 1 / (number + i + 1) for i in range(10)}
        for stage in ("train", "valid")
    }


class Dora:
    """What Flashy and others do: hand the history to Dora, which rewrites its file."""

    def __init__(self, length: int, folder: Path) -> None:
        from dora.link import Link

        self.link = Link(folder / "history.json")
        self.history: list[Any] = [epoch(i) for i in range(length)]

    def commit(self) -> float:
        """Seconds."""
        self.history.append(epoch(len(self.history)))
        begin = time.perf_counter()
        self.link.update_history(self.history)
        return time.perf_counter() - begin


class Ours:
    """A solver whose history is Dora's to read, as under `dora run`."""

    def __init__(self, length: int, folder: Path) -> None:
        from dora.link import Link

        from core import BaseSolver
        from core.run import FolderXP

        xp = FolderXP(folder)
        self.file = folder / "history.json"
        xp.link = Link(self.file)  # type: ignore[assignment]
        self.solver: Any = BaseSolver(xp)
        self.solver.weight = torch.randn(1000)
        self.solver.register_stateful("weight")
        self.solver.history += [epoch(i) for i in range(length)]
        self.written: list[float] = []

    def commit(self) -> float:
        """Seconds that the loop waits."""
        for stage, metrics in epoch(self.solver.epoch).items():
            self.solver.log_metrics(stage, metrics)
        from core.writer import wait_for_writes

        begin = time.perf_counter()
        self.solver.commit()
        waited = time.perf_counter() - begin
        wait_for_writes()
        self.written.append(time.perf_counter() - begin)
        return waited

    def right(self) -> bool:
        """Does Dora read the very history?"""
        from dora.link import Link

        link = Link(self.file)
        link.load()
        return bool(link.history == self.solver.history)


def measure(quick: bool = False) -> Iterator[Section]:
    """Commits at some lengths of history."""
    torch.set_num_threads(1)
    rounds, lengths = (2, LENGTHS[:3]) if quick else (7, LENGTHS)
    ways: dict[str, Callable[[], float]] = {}
    ours: dict[str, Ours] = {}
    with tempfile.TemporaryDirectory() as folder:
        for length in lengths:
            dora = Path(folder, f"dora-{length}")
            dora.mkdir()
            ways[f"Dora, epoch {length:,}"] = Dora(length, dora).commit
            name = f"{OURS}, epoch {length:,}"
            ours[name] = Ours(length, Path(folder, f"ours-{length}"))
            ways[name] = ours[name].commit
        times, failed = interleave(ways, rounds)
        rows = []
        for name, taken in times.items():
            row = Row(name, Spread.of([*taken.values()]).times(1e3))
            if name in ours:
                row.target = TARGET
                written = Spread.of(ours[name].written).median * 1e3
                verdict = "right" if ours[name].right() else "**not right**"
                row.note = f"on disk after {written:.0f} ms; `history.json` is {verdict}"
            rows.append(row)
        rows += [Row(name, note=why) for name, why in failed.items()]
    about = (
        f"Two stages of ten metrics an epoch, written to Dora's `history.json`; {rounds} rounds. "
        "Ours saves a small checkpoint as well."
    )
    yield Section(
        "A commit with a long history", about, ("ms that the loop waits", ".1f"), ("", ""), rows
    )


if __name__ == "__main__":
    harness.main(measure)
