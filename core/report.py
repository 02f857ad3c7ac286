"""Compare runs: a table in the terminal, and a page of curves that needs no server.

    python -m my_research.core.report              # all runs
    python -m my_research.core.report SIG SIG      # some

The best value of a metric is the highest if its name says so (accuracy, score, reward, …; see
`HIGHER` in history.py), else the lowest.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
import math
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from fnmatch import fnmatchcase
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any

from . import checkpoint
from .history import is_higher_better
from .utils import UserError, flatten, write_and_rename

# Okabe and Ito's colours, without those that vanish on white or on black; then the kinds of line.
COLOURS = ["#0a83c9", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c8c8c"]
DASHES = {
    "solid": "none",
    "dash": "9 4",
    "dot": "3 3",
    "dashdot": "9 3 3 3",
    "longdash": "15 3",
    "longdashdot": "15 3 3 3",
}
SHOWN_KEYS = 6  # columns of config in the terminal
ABSENT = "-"

Curve = dict[float, float]  # by epoch or by step


def _is_number(value: object) -> bool:
    """Can it be a point of a curve?"""
    return isinstance(value, float) or (isinstance(value, int) and abs(value) < 2**1023)


@dataclass
class Run:
    """What is known of a run from its folder."""

    folder: Path
    history: list[dict[str, dict[str, Any]]] = field(default_factory=list)
    steps: dict[str, Curve] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Run:
        """Read a run's folder; UserError names a file that can't be read."""
        run, path = cls(folder), folder / "history.json"
        try:
            if path.exists():
                run.history = json.loads(path.read_text())
            path = folder / "metrics.jsonl"
            for line in path.read_text().splitlines() if path.exists() else []:
                with suppress(json.JSONDecodeError):  # torn by a kill, or being written
                    run._add_step(json.loads(line))
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise UserError(f"{path} can't be read: {error}; move the run away") from error
        return run

    def _add_step(self, row: dict[str, Any]) -> None:
        stage, step, _ = row.pop("stage"), row.pop("step", None), row.pop("epoch")
        if step is not None:
            for name, value in row.items():
                if _is_number(value):
                    self.steps.setdefault(f"{stage}.{name}", {})[step] = value

    @property
    def sig(self) -> str:
        return self.folder.name

    @cached_property
    def config(self) -> dict[str, Any]:
        """The config by dotted keys, as of the latest checkpoint; empty before there is one.

        Without the keys that do not make another run (`dora.exclude`).
        """
        with suppress(Exception):  # a damaged checkpoint is no reason to hide the curves
            found = flatten(checkpoint.peek(self.folder / "checkpoint.th")["xp.cfg"] or {})
            hidden = ["dora.*", "slurm.*", *found.get("dora.exclude", [])]
            return {k: v for k, v in found.items() if not any(fnmatchcase(k, h) for h in hidden)}
        return {}

    @property
    def progress(self) -> str:
        """Epochs that are committed, of those to come if that is known."""
        total = self.config.get("epochs")
        return f"{len(self.history)}/{total}" if total else str(len(self.history))

    @cached_property
    def epochs(self) -> dict[str, Curve]:
        """Each metric's curve over the epochs, as `stage.metric`."""
        curves: dict[str, Curve] = {}
        for epoch, stages in enumerate(self.history, 1):
            for stage, metrics in stages.items():
                for name, value in metrics.items():
                    if _is_number(value):
                        curves.setdefault(f"{stage}.{name}", {})[epoch] = value
        return curves

    def best(self, metric: str) -> float | None:
        """The best value of a metric; None without one."""
        values = [v for v in self.epochs.get(metric, {}).values() if math.isfinite(v)]
        pick = max if is_higher_better(metric) else min
        return pick(values, default=None)

    def last(self, metric: str) -> float | None:
        """The value of a metric in the last epoch that had its stage; None without one."""
        stage, _, name = metric.partition(".")
        values = (epoch[stage].get(name) for epoch in reversed(self.history) if stage in epoch)
        value = next(values, None)
        return value if isinstance(value, (int, float)) else None


def find_runs(folder: Path, sigs: Sequence[str]) -> list[Run]:
    """The runs in a folder, by signature, or else by age; UserError if one is not there."""
    found = {path.name: path for path in folder.glob("*") if (path / "history.json").exists()}
    for sig in sigs:
        if sig not in found:
            near = difflib.get_close_matches(sig, found, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"no run {sig} with a committed epoch in {folder}{hint}")
    if not found:
        raise UserError(f"no run with a committed epoch in {folder}: train one with `dora run`")
    paths = [found[sig] for sig in dict.fromkeys(sigs)] or sorted(found.values(), key=_age)
    return [Run.read(path) for path in paths]


def _age(path: Path) -> float:
    return (path / "history.json").stat().st_mtime


def differences(runs: Sequence[Run]) -> list[str]:
    """Keys of the config in which the runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key != "epochs")
    known = [run for run in runs if run.config]
    return [key for key in keys if len({repr(run.config.get(key, ABSENT)) for run in known}) > 1]


def columns(runs: Sequence[Run], of: str) -> list[str]:
    """Names of all curves of the runs, `epochs` or `steps`; those of the last stage come first."""
    names = list(dict.fromkeys(name for run in runs for name in getattr(run, of)))
    stages = list(dict.fromkeys(name.partition(".")[0] for name in names))[::-1]
    return sorted(names, key=lambda name: stages.index(name.partition(".")[0]))


def choose(names: Sequence[str]) -> list[str]:
    """Metrics for a narrow table: those of `valid`, else of the last stage; without durations."""
    stages = [name.partition(".")[0] for name in names]
    stage = "valid" if "valid" in stages else "".join(stages[:1])
    return [n for n in names if n.startswith(f"{stage}.") and not n.endswith(".duration")]


def table(runs: Sequence[Run], keys: Sequence[str], metrics: Sequence[str]) -> list[list[str]]:
    """Rows of a table, of which the first is its head."""
    head = ["run", *keys, "epochs"]
    for metric in metrics:
        best = "highest" if is_higher_better(metric) else "lowest"
        head += [f"{best} {metric}", f"last {metric}"]
    rows = [head]
    for run in runs:
        row = [run.sig, *(str(run.config.get(key, ABSENT)) for key in keys), run.progress]
        for metric in metrics:
            row += [number(run.best(metric)), number(run.last(metric))]
        rows.append(row)
    return rows


def number(value: float | None) -> str:
    """Four significant digits."""
    return ABSENT if value is None else f"{value:.4g}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows as lines of text."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


# ------------------------------------------------------------------------------------------ page


def style(index: int) -> tuple[str, str]:
    """Colour and kind of line of a run: no two of 42 are alike."""
    return COLOURS[index % len(COLOURS)], [*DASHES][index // len(COLOURS) % len(DASHES)]


def chart(runs: Sequence[Run], name: str, of: str) -> str:
    """One metric of all runs, as a piece of HTML."""
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
    unit = " (s)" if name.endswith(".duration") else ""
    axis = {"showline": True, "zeroline": False, "ticks": "outside", "automargin": True}
    figure.update_layout(
        template="none",
        height=320,
        margin={"l": 48, "r": 12, "t": 12, "b": 40},
        showlegend=False,
        hovermode="closest",
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        font={"family": "system-ui, sans-serif", "size": 13},
        xaxis=axis | {"title": {"text": of[:-1]}, "tickformat": "~d"},
        yaxis=axis
        | {"title": {"text": name.replace(".", " ", 1) + unit, "standoff": 10}, "tickformat": "~g"},
    )
    return str(
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            config={"displayModeBar": False, "responsive": True},
        )
    )


def page(runs: Sequence[Run], title: str) -> str:
    """The whole page, with all that it needs inside."""
    from plotly.offline import get_plotlyjs

    names = columns(runs, "epochs")
    head, *rows = table(runs, differences(runs), choose(names))
    body = []
    for index, (run, row) in enumerate(zip(runs, rows, strict=True)):
        colour, dash = style(index)
        line = (
            '<svg width="36" height="10" aria-hidden="true"><line x2="36" y1="5" y2="5" '
            f'stroke="{colour}" stroke-width="3" stroke-dasharray="{DASHES[dash]}"/></svg>'
        )
        box = (
            f'<label><input type="checkbox" checked data-run="{index}"> {line} '
            f'<code title="{escape(str(run.folder))}">{escape(run.sig)}</code></label>'
        )
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        body.append(f'<tr data-run="{index}"><td>{box}</td>{cells}</tr>')
    sections = []
    for of, heading in (("epochs", "By epoch"), ("steps", "By step")):
        charts = "".join(f"<figure>{chart(runs, n, of)}</figure>" for n in columns(runs, of))
        if charts:
            sections.append(f'<h2>{heading}</h2><div class="charts">{charts}</div>')
    return PAGE.format(
        title=escape(title),
        about=f"{len(runs)} run{'s' * (len(runs) > 1)}, {datetime.now():%Y-%m-%d %H:%M}",
        head="".join(f"<th>{escape(cell)}</th>" for cell in head),
        body="\n".join(body),
        sections="\n".join(sections),
        plotly=get_plotlyjs(),
        style=STYLE,
        script=SCRIPT,
    )


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
<script>{plotly}</script>
</head>
<body>
<header><h1>{title}</h1><p>{about}</p></header>
<div class="table"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<p class="tools">
<button id="all">Show all</button> <button id="none">Hide all</button>
<label><input type="checkbox" id="log"> logarithmic</label>
<span>Point at a row, and its curves stand out. Drag to zoom, double-click to go back.</span>
</p>
{sections}
<script>{script}</script>
</body>
</html>
"""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #57606a; --rule: #d8dee4;
  --row: #f3f6f9; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e6e9ec; --soft: #a0a8b1;
  --rule: #353b43; --row: #1e2329; } }
body { margin: 0 auto; max-width: 1320px; padding: 1.5rem; background: var(--paper);
  color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
header p, .tools span { color: var(--soft); margin: 0; }
.table { overflow: auto; max-height: 50vh; margin: 1.2rem 0 .8rem; border: 1px solid var(--rule);
  border-radius: 8px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: left; white-space: nowrap; }
th { position: sticky; top: 0; background: var(--row); font-weight: 600; }
tbody tr { border-top: 1px solid var(--rule); } tbody tr:hover { background: var(--row); }
td:first-child label { display: flex; align-items: center; gap: .5rem; cursor: pointer; }
.tools { display: flex; flex-wrap: wrap; gap: .6rem 1rem; align-items: center; }
.charts { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(400px, 1fr)); }
figure { margin: 0; min-width: 0; border: 1px solid var(--rule); border-radius: 8px;
  padding: .4rem; }
figure text { fill: var(--ink) !important; }
figure .gridlayer path { stroke: var(--rule) !important; }
figure :is(.xlines-above, .ylines-above, path.xtick, path.ytick) { stroke: var(--soft) !important; }
figure .hoverlayer text { fill: #fff !important; }
@media (max-width: 480px) { .charts { grid-template-columns: 1fr; } body { padding: .8rem; } }
"""

SCRIPT = """
const charts = [...document.querySelectorAll(".js-plotly-plot")];
const boxes = [...document.querySelectorAll("input[data-run]")];
const show = (indices, visible) =>
  charts.forEach(chart => Plotly.restyle(chart, {visible}, indices));
boxes.forEach((box, index) => box.onchange = () => show([index], box.checked));
const setAll = checked => {
  boxes.forEach(box => box.checked = checked);
  show(boxes.map((_, index) => index), checked);
};
document.getElementById("all").onclick = () => setAll(true);
document.getElementById("none").onclick = () => setAll(false);
document.getElementById("log").onchange = event => charts.forEach(chart =>
  Plotly.relayout(chart, {"yaxis.type": event.target.checked ? "log" : "linear"}));
const fade = chosen => charts.forEach(chart =>
  chart.querySelectorAll(".scatterlayer .trace").forEach((trace, position) => {
    const index = chart.calcdata?.[position]?.[0]?.trace.index ?? position;
    trace.style.opacity = chosen === null || index === chosen ? 1 : 0.12;
  }));
document.querySelectorAll("tr[data-run]").forEach((row, index) => {
  row.onmouseenter = () => fade(index);
  row.onmouseleave = () => fade(null);
});
"""


# --------------------------------------------------------------------------------------- command


def runs_folder() -> Path:
    """Where the runs of the project are that this core is part of."""
    package = __package__.rpartition(".")[0]
    if not package:
        raise UserError("this core is in no project: say where the runs are, with --dir FOLDER")
    dora = importlib.import_module(f"{package}.train").main.dora
    return Path(dora.dir, dora.xps)


def main(argv: Iterable[str] | None = None) -> None:
    """Print the table and write the page; see the head of this file."""
    parser = argparse.ArgumentParser(description="Compare runs: a table, and a page of curves.")
    parser.add_argument("sig", nargs="*", help="signatures of runs; all by default")
    parser.add_argument("--dir", type=Path, help="folder of the runs; the project's by default")
    parser.add_argument("--out", type=Path, help="the page; report.html above the runs by default")
    args = parser.parse_args(None if argv is None else list(argv))
    try:
        folder = args.dir or runs_folder()
        folder = folder / "xps" if (folder / "xps").is_dir() else folder
        runs = find_runs(folder, args.sig)
        keys = differences(runs)
        print(aligned(table(runs, keys[:SHOWN_KEYS], choose(columns(runs, "epochs")))))
        if more := keys[SHOWN_KEYS:]:
            print(f"They also differ in {', '.join(more)}.")
        out = args.out or folder.parent / "report.html"
        with write_and_rename(out, "w") as file:
            file.write(page(runs, f"Runs in {folder.parent.resolve().parent.name or folder}"))
    except (OSError, UserError) as error:
        sys.exit(f"report: {error}")
    print(f"Curves: {out}")


if __name__ == "__main__":
    main()
