"""Compare runs: a table in the terminal, and a page of curves that needs no server.

    python -m my_research.tools.report                            # all runs
    python -m my_research.tools.report SIG SIG                    # some
    python -m my_research.tools.report --tag debug                # those with this tag
    python -m my_research.tools.report --metrics "test.*" "*.acc" # other columns
    python -m my_research.tools.report --json                     # all, as JSON for scripts

A run is its files: `config.json`, `history.json`, `metrics.jsonl` and `run.json`. Of each metric
the table has the lowest and the highest value of all epochs, and that of the last. Runs tagged
`debug` are left out, unless named or asked for.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import sys
from base64 import b64encode
from collections.abc import Sequence
from datetime import datetime
from fnmatch import fnmatchcase
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from . import escape_output, flatten, write_text
from .runs import STATISTICS, Run, find_runs, read

# Okabe and Ito's colours, without those that vanish on white or on black; then the kinds of line.
COLOURS = ["#0a83c9", "#e69f00", "#009e73", "#d55e00", "#56b4e9", "#cc79a7", "#8c8c8c"]
DASHES = ["solid", "9px,4px", "3px,3px", "9px,3px,3px,3px", "15px,3px", "15px,3px,3px,3px"]
SHOWN_KEYS = 6  # columns of config in the terminal
ABSENT = "-"
STARTS = {  # columns of the page's table of starts, and their keys in `run.json`
    "time": "time",
    "commit": "code.commit",
    "changes": "code.changes",
    "torch": "versions.torch",
    "command": "command",
}

# ----------------------------------------------------------------------------------------- table


def differences(runs: Sequence[Run]) -> list[str]:
    """Return the keys of the config in which runs differ."""
    keys = dict.fromkeys(key for run in runs for key in run.keys if key != "epochs")
    known = [run for run in runs if run.config]
    return [key for key in keys if len({repr(run.keys.get(key, ABSENT)) for run in known}) > 1]


def columns(runs: Sequence[Run], of: str) -> list[str]:
    """Return the names of all curves, `epochs` or `steps`; those of the last stage come first."""
    names = list(dict.fromkeys(name for run in runs for name in getattr(run, of)))
    stages = list(dict.fromkeys(name.partition(".")[0] for name in names))[::-1]
    return sorted(names, key=lambda name: stages.index(name.partition(".")[0]))


def choose(names: Sequence[str], wanted: Sequence[str] = ()) -> list[str]:
    """Choose metrics for a table, by patterns in their order.

    By default those of `valid` and `test`, or else of the last stage, without durations.
    """
    if wanted := [pattern for given in wanted for pattern in given.split(",")]:
        found = {name: None for pattern in wanted for name in names if fnmatchcase(name, pattern)}
        if missing := [p for p in wanted if not any(fnmatchcase(name, p) for name in names)]:
            known = ", ".join(names) or "none"
            sys.exit(f"report: no metric is called {missing[0]}; there are {known}")
        return [*found]
    stages = [name.partition(".")[0] for name in names]
    shown = {"valid", "test"} & {*stages} or {*stages[:1]}
    return [n for n in names if n.partition(".")[0] in shown and not n.endswith(".duration")]


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
    import plotly.io

    plotly.io.json.config.default_engine = "json"  # orjson, where installed, refuses some names

    lines, markers = [], 30 if len(runs) <= len(COLOURS) else 1
    for index, run in enumerate(runs):
        curve = getattr(run, of).get(name, {})
        colour, dash = style(index)
        line = {
            "type": "scatter",
            "x": list(curve),
            "y": [value if math.isfinite(value) else None for value in curve.values()],
            "name": run.sig,
            "mode": "lines" if len(curve) > markers else "lines+markers",
            "line": {"color": colour, "dash": dash, "width": 2},
            "marker": {"size": 5},
            "hovertemplate": f"<b>{run.sig}</b><br>{of[:-1]} %{{x}}: %{{y:.5g}}<extra></extra>",
        }
        lines.append(line)
    figure = {"data": lines, "layout": layout(name, of[:-1])}
    shown = {"displayModeBar": False, "responsive": True}
    return str(
        plotly.io.to_html(
            figure, config=shown, full_html=False, include_plotlyjs=False, validate=False
        )
    )


def layout(name: str, unit: str) -> dict[str, Any]:
    """Return the looks of a chart."""
    axis = {"showline": True, "zeroline": False, "ticks": "outside", "automargin": True}
    title = name.replace(".", " ", 1) + (" (s)" if name.endswith(".duration") else "")
    return {
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


def starts(runs: Sequence[Run]) -> str:
    """Return the table of all recorded starts as a piece of HTML."""
    rows = []
    for run in runs:
        for start in map(flatten, run.starts):
            texts = [run.sig, *(cell(start.get(key) or ABSENT) for key in STARTS.values())]
            rows.append("".join(f"<td>{escape(text)}</td>" for text in texts))
    head = "".join(f"<th>{name}</th>" for name in ("run", *STARTS))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>Starts</h2><div class="table">{table}</div>' if rows else ""


def media(run: Run) -> str:
    """Return the newest images and sounds of each stage of a run as a piece of HTML."""
    figures = []
    for path in run.media:
        kind = "image/png" if path.suffix == ".png" else "audio/wav"
        data = f"data:{kind};base64,{b64encode(read(path) or b'').decode()}"
        what = (
            f'<img alt="" src="{data}">'
            if path.suffix == ".png"
            else f'<audio controls src="{data}">'
        )
        text = escape(f"{run.sig}: {path.relative_to(run.folder / 'outputs')}")
        end = "</audio>" if path.suffix == ".wav" else ""
        figures.append(f"<figure>{what}{end}<figcaption>{text}</figcaption></figure>")
    return "".join(figures)


def page(runs: Sequence[Run], title: str, metrics: Sequence[str]) -> str:
    """Return the whole page, with all that it needs inside."""
    from plotly.offline import get_plotlyjs

    keys = differences(runs)
    rows = [table_row(i, run, row(run, keys, metrics)) for i, run in enumerate(runs)]
    sections = []
    for of, heading in (("epochs", "By epoch"), ("steps", "By step")):
        charts = "".join(f"<figure>{chart(runs, n, of)}</figure>" for n in columns(runs, of))
        if charts:
            sections.append(f'<h2>{heading}</h2><div class="charts">{charts}</div>')
    if logged := "".join(map(media, runs)):
        sections.append(f'<h2>Media</h2><div class="charts">{logged}</div>')
    return Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8")).substitute(
        title=escape(title),
        about=f"{len(runs)} run{'s' * (len(runs) > 1)}, {datetime.now():%Y-%m-%d %H:%M}",
        head=table_head(keys, metrics),
        body="\n".join(rows),
        sections="\n".join([*sections, starts(runs)]),
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
        "starts": run.starts,
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
    parser.add_argument("--tag", help="only runs with this tag")
    parser.add_argument(
        "--metrics", nargs="+", default=[], help="such as test.acc or 'test.*'; after signatures"
    )
    parser.add_argument("--json", action="store_true", help="print the runs as JSON, no more")
    parser.add_argument("--dir", type=Path, help="folder of the runs; the project's by default")
    parser.add_argument("--out", type=Path, help="the page; report.html above the runs by default")
    args = parser.parse_args(argv)
    escape_output()
    runs_in = (args.dir or runs_folder()) / "xps"
    folder = runs_in if runs_in.is_dir() else runs_in.parent
    runs = find_runs(folder, args.sig)
    if args.tag and not (runs := [run for run in runs if args.tag in run.tags]):
        sys.exit(f"report: no run has the tag {args.tag}")
    if args.json:
        print(json.dumps([summary(run) for run in runs], indent=2))
        return
    others = [run for run in runs if "debug" not in run.tags]
    if not (args.sig or args.tag) and 0 < len(others) < len(runs):
        count = len(runs) - len(others)
        print(f"{count} debug run{'s are' if count > 1 else ' is'} left out: see --tag debug")
        runs = others
    keys, metrics = differences(runs), choose(columns(runs, "epochs"), args.metrics)
    print(table(runs, keys[:SHOWN_KEYS], metrics))
    if more := keys[SHOWN_KEYS:]:
        print(f"They also differ in {', '.join(map(cell, more))}.")
    out = args.out or folder.parent / "report.html"
    try:
        name = folder.parent.resolve().parent.name or folder
        write_text(out, page(runs, f"Runs in {name}", metrics))
    except OSError as error:
        sys.exit(f"report: the page can't be written: {error}; choose a place with --out")
    print(f"Curves: {out}")


if __name__ == "__main__":
    main()
