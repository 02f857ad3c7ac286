"""How long tools and a resume take with many runs and rows: `python -m bench.many`."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import harness
from .harness import Row, Section, Spread, interleave, render
from .startup import process

RUNS, EPOCHS, POINTS = 1_000, 100, 3  # points by step in an epoch
ROWS, STEPS = 1_000_000, 1_000  # of a long run; rows in an epoch
SWEPT = 200  # runs of a grid
REPORT_TARGET, ROWS_TARGET = 10.0, 1.0  # seconds

GRID = """
from .lr import Digits

@Digits
def explorer(launcher):
    for seed in range({}):
        launcher(seed=seed)
"""


def line(stage: str, epoch: int, loss: float, step: int | None = None) -> str:
    """A row of `metrics.jsonl`."""
    place = {"stage": stage, "epoch": epoch} | ({} if step is None else {"step": step})
    return json.dumps(place | {"metrics": {"loss": loss, "acc": 1 - loss}}) + "\n"


def make_run(folder: Path, number: int, epochs: int) -> None:
    """The files of a run that the report reads."""
    folder.mkdir(parents=True)
    config = {"epochs": epochs, "seed": number}
    (folder / "config.json").write_text(json.dumps(config))
    history, rows = [], []
    for epoch in range(1, epochs + 1):
        metrics = {"loss": 1 / (epoch + number), "acc": epoch / epochs}
        history.append(dict.fromkeys(("train", "valid"), metrics))
        steps = range(POINTS * epoch - POINTS + 1, POINTS * epoch + 1)
        rows += [line("train", epoch, metrics["loss"], 10 * step) for step in steps]
        rows += [line(stage, epoch, metrics["loss"]) for stage in ("train", "valid")]
    (folder / "history.json").write_text(json.dumps(history))
    (folder / "metrics.jsonl").write_text("".join(rows))


def resume(folder: Path, rows: int) -> Callable[[], float]:
    """Seconds that a resume within the last epoch takes to forget what will be repeated."""
    from core.run import FolderXP
    from core.trackers import LocalFiles

    folder.mkdir()
    written = [line("train", step // STEPS + 1, 0.5, step + 1) for step in range(rows)]
    whole = folder / "whole.jsonl"
    whole.write_text("".join(written))

    def run() -> float:
        shutil.copy(whole, folder / "metrics.jsonl")
        tracker = LocalFiles(FolderXP(folder))
        tracker.resume(rows // STEPS, (), {"train": rows - STEPS // 2})
        begin = time.perf_counter()
        tracker.log_step("train", {"loss": 0.5}, rows - STEPS // 2 + 1, rows // STEPS)
        return time.perf_counter() - begin

    return run


def measure(quick: bool = False) -> Iterator[Section]:
    """The report, a sweep's table, and a resume."""
    runs, swept, rows = (20, 5, 10_000) if quick else (RUNS, SWEPT, ROWS)
    with tempfile.TemporaryDirectory() as temporary:
        project = render(Path(temporary))
        for number in range(runs):
            make_run(project / "outputs" / "xps" / f"{number:08x}", number, EPOCHS)
        for name, count in (("one", 1), ("many", swept)):
            (project / "my_research" / "grids" / f"{name}.py").write_text(GRID.format(count))
        sweep = ("-m", "my_research.tools.sweep")
        report = f"`report` of {runs:,} runs of {EPOCHS} epochs"
        cut = f"a resume with {rows:,} rows in `metrics.jsonl`"
        ways = {
            report: process(project, "-m", "my_research.tools.report"),
            "`sweep --dry-run` of one run": process(project, *sweep, "one", "--dry-run"),
            f"`sweep --dry-run` of {swept} runs": process(project, *sweep, "many", "--dry-run"),
            cut: resume(Path(temporary, "long"), rows),
        }
        times, failed = interleave(ways, 1 if quick else 4, warmup=0 if quick else 1)
    targets = {report: REPORT_TARGET, cut: ROWS_TARGET}
    found = [
        Row(name, Spread.of([*taken.values()]), target=targets.get(name))
        for name, taken in times.items()
    ]
    found += [Row(name, note=why) for name, why in failed.items()]
    about = "Whole commands; of a resume, the time to forget the rows that will be repeated."
    yield Section("Many runs and rows", about, ("s", ".2f"), ("", ""), found)


if __name__ == "__main__":
    harness.main(measure)
