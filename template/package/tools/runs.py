"""The files of runs, as the report reads them."""

from __future__ import annotations

import difflib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path
from typing import Any

from . import flatten

STATISTICS = ("min", "max", "last")

Curve = dict[float, float]  # by epoch or by step


@dataclass
class Run:
    """The files of a run."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    steps: dict[str, Curve] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)  # with command, code and versions

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run's folder; what is damaged there is left out, with a warning."""
        run = cls(folder, read_json(folder / "config.json", {}))
        history = read_json(folder / "history.json", [])
        stages = [s for e in history for s in (e.values() if isinstance(e, dict) else [None])]
        if all(isinstance(metrics, dict) for metrics in stages):
            run.history = history
        else:
            warn(folder / "history.json", "is no list of epochs with stages")
        run.starts = read_json(folder / "run.json", [])
        if not all(isinstance(start, dict) for start in run.starts):
            warn(folder / "run.json", "is no list of starts")
            run.starts = []
        for row in read_rows(folder / "metrics.jsonl"):
            for name, value in row["metrics"].items():
                if is_number(value):
                    run.steps.setdefault(f"{row['stage']}.{name}", {})[row["step"]] = value
        return run

    @property
    def sig(self) -> str:
        return self.folder.name

    @property
    def tags(self) -> list[str]:
        """The words in `tags` of the config."""
        tags = self.config.get("tags") or []
        return list(map(str, tags)) if isinstance(tags, list) else [str(tags)]

    @cached_property
    def keys(self) -> dict[str, Any]:
        """The keys of the config that tell runs apart, dotted, with tags and note."""
        flat = flatten(self.config)
        excluded = flat.get("dora.exclude")
        hidden = ["dora.*", "slurm.*", *(excluded if isinstance(excluded, list) else [])]
        about = {"tags": " ".join(self.tags), "note": flat.get("note") or ""}
        found = {k: v for k, v in flat.items() if not any(fnmatchcase(k, str(h)) for h in hidden)}
        return found | about

    @cached_property
    def media(self) -> list[Path]:
        """The first 20 images and sounds of each stage's newest epoch, none above 2 MB."""
        newest: dict[str, tuple[int, Path]] = {}
        for folder in self.folder.glob("outputs/*_*"):
            stage, _, epoch = folder.name.rpartition("_")
            if epoch.isdecimal():
                newest[stage] = max(newest.get(stage, (0, folder)), (int(epoch), folder))
        found = [path for _, folder in newest.values() for path in sorted(folder.rglob("*"))]
        fits = (p for p in found if p.is_file() and p.stat().st_size < 2**21)
        return [p for p in fits if p.suffix in (".png", ".wav")][:20]

    @property
    def progress(self) -> str:
        """Epochs of training that are committed, of the total if that is known."""
        total, done = self.config.get("epochs"), len(self.history)
        trained = sum("train" in epoch for epoch in self.history) or done
        return f"{trained}/{total}" if total else str(done)

    @cached_property
    def epochs(self) -> dict[str, Curve]:
        """Each metric's curve over the epochs, as `stage.metric`."""
        curves: dict[str, Curve] = {}
        for epoch, stages in enumerate(self.history, 1):
            for stage, metrics in stages.items():
                for name, value in metrics.items():
                    if is_number(value):
                        curves.setdefault(f"{stage}.{name}", {})[epoch] = value
        return curves

    def statistics(self, metric: str) -> dict[str, float | None]:
        """Return a metric's lowest, highest and last value; None for what there is not."""
        values = [v for v in self.epochs.get(metric, {}).values() if math.isfinite(v)]
        stage, _, name = metric.partition(".")
        with_stage = [epoch[stage].get(name) for epoch in self.history if stage in epoch]
        last = next((v for v in with_stage[-1:] if v in values), None)
        found = min(values, default=None), max(values, default=None), last
        return dict(zip(STATISTICS, found, strict=True))


def is_number(value: object) -> bool:
    """Say whether a value can be a point of a curve."""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1023)


def warn(path: Path, problem: str) -> None:
    print(f"report: {path} {problem}: left out", file=sys.stderr)


def read(path: Path) -> bytes | None:
    """Return the content of a file; None if there is none or, with a warning, if it fails."""
    try:
        return path.read_bytes() if path.exists() else None
    except OSError as error:
        warn(path, f"can't be read ({error})")
        return None


def read_json(path: Path, empty: Any) -> Any:
    """Return the value in a JSON file; `empty` if there is none or, with a warning, if damaged."""
    try:
        found = empty if (data := read(path)) is None else json.loads(data)
        if not isinstance(found, type(empty)):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except (ValueError, RecursionError) as error:
        warn(path, f"can't be read ({error})")
        return empty


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows by step; a warning counts the lines that are damaged, or being written."""
    damaged = []
    for number, line in enumerate((read(path) or b"").split(b"\n"), 1):
        try:
            row = json.loads(line.decode()) if line.strip() else {"stage": "", "metrics": {}}
            shape = isinstance(row["stage"], str) and isinstance(row["metrics"], dict)
            if not shape or not is_number(row.get("step", 0)):
                raise ValueError
        except (ValueError, LookupError, TypeError, RecursionError):
            damaged.append(number)
        else:
            if "step" in row:
                yield row
    if damaged:
        warn(path, f"has {len(damaged)} damaged rows, the first in line {damaged[0]}")


def find_runs(folder: Path, sigs: Sequence[str]) -> list[Run]:
    """Return the runs in a folder by signature, or all by age; exit if one is not there."""
    files = [*folder.glob("*/config.json"), *folder.glob("*/history.json")]  # history.json wins
    found = {path.parent.name: path for path in sorted(files)}
    if missing := [sig for sig in sigs if sig not in found]:
        near = difflib.get_close_matches(missing[0], found, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        sys.exit(f"report: no run {missing[0]} in {folder}{hint}")
    if not found:
        sys.exit(f"report: no run in {folder}: train one with `dora run`")
    by_age = sorted(found.values(), key=lambda path: path.stat().st_mtime)
    chosen = [found[sig] for sig in dict.fromkeys(sigs)] or by_age
    return [Run.read(path.parent) for path in chosen]
