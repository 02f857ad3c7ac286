"""What all measurements share: turns in random order, spreads rather than numbers, tables."""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import random
import statistics
import subprocess
import sys
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
OURS = "this template"

Times = dict[str, dict[int, float]]  # by way and round


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of measured values, one at least."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(low, median, high)

    def times(self, factor: float) -> Spread:
        """In another unit."""
        return Spread(self.low * factor, self.median * factor, self.high * factor)


@dataclass
class Row:
    """One way to do a thing.

    Args:
        way: its name.
        taken: what it took.
        compared: the difference or ratio to the base, each round with its own; or nothing.
        target: what `compared`, or else `taken`, should be at most.
        note: what else is to be said, such as why it can't run.
    """

    way: str
    taken: Spread | None = None
    compared: Spread | None = None
    target: float | None = None
    note: str = ""

    @property
    def judged(self) -> float | None:
        """The number that the target is for."""
        spread = self.compared or self.taken
        return spread.median if spread else None


@dataclass
class Section:
    """A table of results.

    Args:
        title: its heading.
        about: how it was measured.
        taken: heading and format of what was taken, such as `"ms"` and `".1f"`.
        compared: heading and format of the comparison.
        rows: the results.
        plot: short name for the picture; empty to leave it out.
        texts: a table of words instead, of which the first row is its head.
    """

    title: str
    about: str
    taken: tuple[str, str]
    compared: tuple[str, str]
    rows: list[Row] = field(default_factory=list)
    plot: str = ""
    texts: list[list[str]] = field(default_factory=list)

    def markdown(self) -> str:
        """The table, and how it was measured."""
        if self.texts:
            return self._page([self.texts[0], ["---"] * len(self.texts[0]), *self.texts[1:]])
        head = ["way", self.taken[0], self.compared[0], "target", ""]
        lines = [head, ["---", "---:", "---:", "---:", "---"]]
        if not any(row.compared for row in self.rows):
            del head[2], lines[1][2]
        for row in self.rows:
            number = self.compared[1] if row.compared else self.taken[1]
            target = "" if row.target is None else f"<= {row.target:{number}}{self._verdict(row)}"
            cells = [row.way, spelled(row.taken, self.taken[1])]
            cells += [spelled(row.compared, self.compared[1])] if len(head) == 5 else []
            lines.append([*cells, target, row.note])
        return self._page(lines)

    def _page(self, lines: list[list[str]]) -> str:
        table = "\n".join(f"| {' | '.join(line)} |".replace("  |", " |") for line in lines)
        return f"## {self.title}\n\n{self.about}\n\n{table}\n"

    @staticmethod
    def _verdict(row: Row) -> str:
        if row.judged is None or row.target is None:
            return ""
        return ", met" if row.judged <= row.target else ", **missed**"

    @classmethod
    def from_dict(cls, values: dict[str, object]) -> Section:
        """What `dataclasses.asdict` gave, and JSON kept."""

        def row(found: dict[str, object]) -> Row:
            spreads = {
                key: Spread(**found[key]) if found[key] else None  # type: ignore[arg-type]
                for key in ("taken", "compared")
            }
            return Row(**{**found, **spreads})  # type: ignore[arg-type]

        rows = [row(found) for found in values["rows"]]  # type: ignore[attr-defined]
        return cls(**{**values, "rows": rows})  # type: ignore[arg-type]


def spelled(spread: Spread | None, number: str) -> str:
    """Median, and quartiles if they tell more."""
    if spread is None:
        return ""
    low, median, high = (f"{v:{number}}" for v in (spread.low, spread.median, spread.high))
    return median if low == median == high else f"**{median}** ({low} to {high})"


# ---------------------------------------------------------------------------------------- rounds


def interleave(
    ways: Mapping[str, Callable[[], float]],
    rounds: int,
    warmup: int = 1,
    seldom: Container[str] = (),
) -> tuple[Times, dict[str, str]]:
    """Let all ways take turns, in an order that changes from round to round.

    Args:
        ways: each returns what it took.
        rounds: to be kept.
        warmup: rounds before those.
        seldom: ways that take part in each fourth round only, for they are slow.

    Returns:
        What each way took, by round; and why the others can't run.
    """
    times: Times = {name: {} for name in ways}
    failed: dict[str, str] = {}
    for number in range(-warmup, rounds):
        turns = [n for n in ways if n not in failed and (n not in seldom or number % 4 == 0)]
        random.Random(number).shuffle(turns)
        if number == 0:
            gc.collect()
            gc.freeze()  # what all have imported need not be looked through in each turn
        for name in turns:
            gc.collect()
            try:
                taken = ways[name]()
            except Exception as error:  # a peer that can't run is said, and the others continue
                failed[name] = f"cannot run: {type(error).__name__}: {error}".splitlines()[0]
                continue
            if number >= 0:
                times[name][number] = taken
    return {name: taken for name, taken in times.items() if name not in failed}, failed


def compare(
    times: Times,
    failed: Mapping[str, str],
    base: str,
    scale: float,
    ratio: bool = False,
    targets: Mapping[str, float] | None = None,
    notes: Mapping[str, str] | None = None,
) -> list[Row]:
    """Rows of a table: each way beside the base of its own round, for the machine is noisy.

    Args:
        times: as `interleave` gives.
        failed: likewise.
        base: the way to compare with.
        scale: of the unit, such as 1e6 for microseconds.
        ratio: compare by it, rather than by the difference.
        targets: for some ways.
        notes: for some ways.
    """
    targets, notes, rows = targets or {}, notes or {}, []
    for name, taken in times.items():
        pairs = [(t, times[base][number]) for number, t in taken.items()]
        beside = [t / b if ratio else (t - b) * scale for t, b in pairs]
        rows.append(
            Row(
                name,
                Spread.of([*taken.values()]).times(scale),
                Spread.of(beside) if name != base else None,
                targets.get(name),
                notes.get(name, ""),
            )
        )
    return rows + [Row(name, note=why) for name, why in failed.items()]


# -------------------------------------------------------------------------------------- commands


def copy_of_the_repo(folder: Path) -> Path:
    """What git knows or would add, for cookiecutter copies all that it is given."""
    copy = folder / "template"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    return copy


def render(folder: Path) -> Path:
    """A rendered project, of the default answers."""
    template = str(copy_of_the_repo(folder))
    command = [sys.executable, "-m", "cookiecutter", template, "--no-input", "-o", str(folder)]
    env = {**os.environ, "TMPDIR": str(folder)}  # cookiecutter leaves something there
    subprocess.run(command, check=True, capture_output=True, env=env)
    return folder / "my-research"


def main(measure: Callable[[bool], Iterable[Section]]) -> None:
    """The command of a module of measurements."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--quick", action="store_true", help="few rounds: shows that it runs")
    parser.add_argument("--json", type=Path, help="write the results to this file as well")
    args = parser.parse_args()
    sections = list(measure(args.quick))
    print("\n".join(section.markdown() for section in sections))
    if args.json:
        args.json.write_text(json.dumps([dataclasses.asdict(section) for section in sections]))
