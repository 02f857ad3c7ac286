"""Compare runs: a table in the terminal, and a page of curves that needs no server.

    python -m my_research.tools.report              # all runs
    python -m my_research.tools.report SIG SIG      # some
    python -m my_research.tools.report --json       # all, as JSON for scripts

A run is its files: `config.json`, `history.json` and `metrics.jsonl`. Of each metric the table has
the lowest and the highest value of all epochs, and that of the last.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from functools import cached_property
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from . import escape_output, flatten, write_text

# Okabe and Ito's colours, without those that vanish on white or on black; then the kinds of line.
COLOURS = ["#0a83c9", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c8c8c"]
DASHES = ["solid", "9px,4px", "3px,3px", "9px,3px,3px,3px", "15px,3px", "15px,3px,3px,3px"]
SHOWN_KEYS = 6  # columns of config in the terminal
STATISTICS = ("min", "max", "last")
ABSENT = "-"

Curve = dict[float, float]  # by epoch or by step


@dataclass
class Run:
    """The files of a run."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    steps: dict[str, Curve] = field(default_factory=dict)

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
        for row in read_rows(folder / "metrics.jsonl"):
            for name, value in row["metrics"].items():
                if is_number(value):
                    run.steps.setdefault(f"{row['stage']}.{name}", {})[row["step"]] = value
        return run

    @property
    def sig(self) -> str:
        return self.folder.name

    @cached_property
    def keys(self) -> dict[str, Any]:
        """The config by dotted keys, without those that make no other run."""
        flat = flatten(self.config)
        excluded = flat.get("dora.exclude")
        hidden = ["dora.*", "slurm.*", *(excluded if isinstance(excluded, list) else [])]
        return {k: v for k, v in flat.items() if not any(fnmatchcase(k, str(h)) for h in hidden)}

    @property
    def progress(self) -> str:
        """Epochs that are committed, of the total if that is known."""
        total = self.config.get("epochs")
        return f"{len(self.history)}/{total}" if total else str(len(self.history))

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
    found = {path.name: path for path in folder.glob("*") if (path / "history.json").exists()}
    if missing := [sig for sig in sigs if sig not in found]:
        near = difflib.get_close_matches(missing[0], found, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        sys.exit(f"report: no run {missing[0]} with a committed epoch in {folder}{hint}")
    if not found:
        sys.exit(f"report: no run with a committed epoch in {folder}: train one with `dora run`")
    by_age = sorted(found.values(), key=lambda path: (path / "history.json").stat().st_mtime)
    return [Run.read(path) for path in [found[sig] for sig in dict.fromkeys(sigs)] or by_age]


# ----------------------------------------------------------------------------------------- table


def differences(runs: Sequence[Run]) -> list[str]:
    """Return the keys of the config in which runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.keys if key != "epochs")
    known = [run for run in runs if run.keys]
    return [key for key in keys if len({repr(run.keys.get(key, ABSENT)) for run in known}) > 1]


def columns(runs: Sequence[Run], of: str) -> list[str]:
    """Return the names of all curves, `epochs` or `steps`; those of the last stage come first."""
    names = list(dict.fromkeys(name for run in runs for name in getattr(run, of)))
    stages = list(dict.fromkeys(name.partition(".")[0] for name in names))[::-1]
    return sorted(names, key=lambda name: stages.index(name.partition(".")[0]))


def choose(names: Sequence[str]) -> list[str]:
    """Choose metrics for a table: those of `valid`, or else of the last stage; no durations."""
    stages = [name.partition(".")[0] for name in names]
    stage = "valid" if "valid" in stages else "".join(stages[:1])
    return [n for n in names if n.startswith(f"{stage}.") and not n.endswith(".duration")]


def row(run: Run, keys: Sequence[str], metrics: Sequence[str]) -> list[str]:
    """Return the cells of a run."""
    values = [run.statistics(metric)[name] for metric in metrics for name in STATISTICS]
    numbers = [ABSENT if value is None else f"{value:.4g}" for value in values]
    return [run.sig, *(cell(run.keys.get(key, ABSENT)) for key in keys), run.progress, *numbers]


def cell(value: object) -> str:
    """Return a value of a config as text on one line."""
    text = str(value)
    return text if text.isprintable() else ascii(text)


def table(runs: Sequence[Run], keys: Sequence[str], metrics: Sequence[str]) -> str:
    """Return the table for the terminal; a metric's name stands above its three columns."""
    left = ["run", *map(cell, keys), "epochs"]
    names = [part for metric in metrics for part in (cell(metric), "", "")]
    heads = [[*left, *names], [*([""] * len(left)), *STATISTICS * len(metrics)]]
    rows = [*heads, *(row(run, keys, metrics) for run in runs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(c.ljust(w) for c, w in zip(cells, widths, strict=True)) for cells in rows)
    return "\n".join(line.rstrip() for line in lines)


# ------------------------------------------------------------------------------------------ page


def style(index: int) -> tuple[str, str]:
    """Return the colour and kind of line of a run: no two of 42 are alike."""
    return COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)]


def chart(runs: Sequence[Run], name: str, of: str) -> str:
    """Return one metric of all runs as a piece of HTML."""
    import plotly.graph_objects as go

    figure, markers = go.Figure(), 30 if len(runs) <= len(COLOURS) else 1
    for index, run in enumerate(runs):
        curve = getattr(run, of).get(name, {})
        colour, dash = style(index)
        figure.add_scatter(
            x=list(curve),
            y=[value if math.isfinite(value) else None for value in curve.values()],
            name=run.sig,
            mode="lines" if len(curve) > markers else "lines+markers",
            line={"color": colour, "dash": dash, "width": 2},
            marker={"size": 5},
            hovertemplate=f"<b>{run.sig}</b><br>{of[:-1]} %{{x}}: %{{y:.5g}}<extra></extra>",
        )
    figure.update_layout(**layout(name, of[:-1]))
    shown = {"displayModeBar": False, "responsive": True}
    return str(figure.to_html(full_html=False, include_plotlyjs=False, config=shown))


def layout(name: str, unit: str) -> dict[str, Any]:
    """Return the looks of a chart."""
    axis = {"showline": True, "zeroline": False, "ticks": "outside", "automargin": True}
    title = name.replace(".", " ", 1) + (" (s)" if name.endswith(".duration") else "")
    return {
        "template": "none",
        "height": 320,
        "margin": {"l": 48, "r": 12, "t": 12, "b": 40},
        "showlegend": False,
        "hovermode": "closest",
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, sans-serif", "size": 13},
        "xaxis": {**axis, "title": {"text": unit}, "tickformat": "~d"},
        "yaxis": {**axis, "title": {"text": title, "standoff": 10}, "tickformat": "~g"},
    }


def table_head(keys: Sequence[str], metrics: Sequence[str]) -> str:
    left = "".join(f'<th rowspan="2">{escape(k)}</th>' for k in ("run", *keys, "epochs"))
    names = "".join(f'<th colspan="3">{escape(metric)}</th>' for metric in metrics)
    below = "".join(f"<th>{name}</th>" for name in STATISTICS * len(metrics))
    return f"<tr>{left}{names}</tr>\n<tr>{below}</tr>"


def table_row(index: int, run: Run, cells: Sequence[str]) -> str:
    """Return a row of the page's table, with a box that shows and hides the run's curves."""
    colour, dash = style(index)
    line = (
        '<svg width="36" height="10" aria-hidden="true"><line x2="36" y1="5" y2="5" '
        f'stroke="{colour}" stroke-width="3" stroke-dasharray="{dash}"/></svg>'
    )
    box = (
        f'<label><input type="checkbox" checked data-run="{index}"> {line} '
        f'<code title="{escape(str(run.folder))}">{escape(run.sig)}</code></label>'
    )
    others = "".join(f"<td>{escape(text)}</td>" for text in cells[1:])
    return f'<tr data-run="{index}"><td>{box}</td>{others}</tr>'


def page(runs: Sequence[Run], title: str) -> str:
    """Return the whole page, with all that it needs inside."""
    from plotly.offline import get_plotlyjs

    keys, metrics = differences(runs), choose(columns(runs, "epochs"))
    rows = [table_row(i, run, row(run, keys, metrics)) for i, run in enumerate(runs)]
    sections = []
    for of, heading in (("epochs", "By epoch"), ("steps", "By step")):
        charts = "".join(f"<figure>{chart(runs, n, of)}</figure>" for n in columns(runs, of))
        if charts:
            sections.append(f'<h2>{heading}</h2><div class="charts">{charts}</div>')
    return Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        about=f"{len(runs)} run{'s' * (len(runs) > 1)}, {datetime.now():%Y-%m-%d %H:%M}",
        head=table_head(keys, metrics),
        body="\n".join(rows),
        sections="\n".join(sections),
        plotly=get_plotlyjs(),
    )


# --------------------------------------------------------------------------------------- command


def summary(run: Run) -> dict[str, Any]:
    """Return a run for `--json`."""
    return {
        "sig": run.sig,
        "folder": str(run.folder.resolve()),
        "epochs": len(run.history),
        "config": run.config,
        "metrics": {metric: run.statistics(metric) for metric in run.epochs},
    }


def runs_folder() -> Path:
    """Return the folder of the project's runs."""
    package = (__package__ or "").rpartition(".")[0]
    dora = importlib.import_module(f"{package}.train").main.dora
    return Path(dora.dir, dora.xps)


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table and write the page; see the head of this file."""
    parser = argparse.ArgumentParser(description="Compare runs: a table, and a page of curves.")
    parser.add_argument("sig", nargs="*", help="signatures of runs; all by default")
    parser.add_argument("--json", action="store_true", help="print the runs as JSON, no more")
    parser.add_argument("--dir", type=Path, help="folder of the runs; the project's by default")
    parser.add_argument("--out", type=Path, help="the page; report.html above the runs by default")
    args = parser.parse_args(argv)
    escape_output()
    runs_in = (args.dir or runs_folder()) / "xps"
    folder = runs_in if runs_in.is_dir() else runs_in.parent
    runs = find_runs(folder, args.sig)
    if args.json:
        print(json.dumps([summary(run) for run in runs], indent=2))
        return
    keys = differences(runs)
    print(table(runs, keys[:SHOWN_KEYS], choose(columns(runs, "epochs"))))
    if more := keys[SHOWN_KEYS:]:
        print(f"They also differ in {', '.join(map(cell, more))}.")
    out = args.out or folder.parent / "report.html"
    try:
        write_text(out, page(runs, f"Runs in {folder.parent.resolve().parent.name or folder}"))
    except OSError as error:
        sys.exit(f"report: the page can't be written: {error}; choose a place with --out")
    print(f"Curves: {out}")


if __name__ == "__main__":
    main()
