"""What each way adds to a step of training: `python -m bench.steps`."""

from __future__ import annotations

import functools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from . import harness, loops
from .harness import OURS, Section, compare, interleave
from .loops import WAYS
from .task import BATCH, LINE, WARM, Task

TARGETS = {2: 5.0, 20: 15.0}  # microseconds, on a CPU


def seconds(
    way: Callable[[Task], None], task: Callable[[], Task], between: list[float]
) -> Callable[[], float]:
    """What a step takes, measured anew at each call; the time between steps goes to a list."""

    def run() -> float:
        fresh = task()
        way(fresh)
        between.append(fresh.data.between)
        return fresh.data.seconds

    return run


def section(title: str, task: Callable[[], Task], rounds: int, target: float | None) -> Section:
    """All ways on one task."""
    between: dict[str, list[float]] = {name: [] for name in WAYS}
    ways = {name: seconds(way, task, between[name]) for name, way in WAYS.items()}
    slow = [name for name in ways if "Lightning" in name]
    times, failed = interleave(ways, rounds, seldom=slow)
    kind = "wall" if task().device.type == "cuda" else "CPU"
    about = (
        f"A tiny MLP on batches of {BATCH} that are at hand; the metrics are averaged over the "
        f"epoch, and shown every {LINE} steps. Mean {kind} time over "
        f"{LINE} steps, {rounds} rounds (a fourth for Lightning). Between steps: from the "
        "return of `optim.step()` to the next forward pass, above the bare loop."
    )
    targets = {OURS: target} if target is not None else {}
    rows = compare(times, failed, "bare loop", 1e6, targets=targets)
    # Without the round that warms up.
    spent = {name: 1e6 * statistics.median(taken[1:] or [0.0]) for name, taken in between.items()}
    for row in rows:
        if spent[row.way] and row.way != "bare loop":
            row.note = f"{spent[row.way] - spent['bare loop']:.1f} us between steps"
    taken, compared = (f"us a step, {kind} time", ".0f"), ("us above the bare loop", ".1f")
    return Section(title, about, taken, compared, rows)


def syncs(task: Callable[[], Task]) -> dict[str, float]:
    """How often a step between two lines waits for the GPU, in each way."""
    found = {}
    first, last = WARM + LINE + 25, 2 * LINE - 25
    for name, way in WAYS.items():
        fresh = task()
        fresh.data.at = {
            first: lambda: torch.cuda.set_sync_debug_mode("warn"),
            last: lambda: torch.cuda.set_sync_debug_mode("default"),
        }
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                way(fresh)
            except Exception:
                continue  # is said where it is timed
            finally:
                torch.cuda.set_sync_debug_mode("default")
        waits = [w for w in caught if "synchronizing CUDA" in str(w.message)]
        found[name] = len(waits) / (last - first)
    return found


def on_cuda(rounds: int) -> Iterator[Section]:
    """The same on a GPU, in bfloat16, compiled and not; with how often the host waits for it."""
    for compiled in (False, True):

        def task(compiled: bool = compiled) -> Task:
            return Task(2, device=torch.device("cuda"), bf16=True, compile=compiled)

        title = (
            f"Step on {torch.cuda.get_device_name()}, bf16, compile {'on' if compiled else 'off'}"
        )
        found = section(title, task, rounds, None)
        counts = syncs(task)
        for row in found.rows:
            if row.way in counts:
                row.note = f"the host waits {counts[row.way]:.2g} times a step"
        yield found


def measure(quick: bool = False) -> Iterator[Section]:
    """With 2 metrics and with 20."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        loops.quiet(Path(folder))
        for metrics, target in TARGETS.items():
            title = f"Step overhead, {metrics} metrics"
            rounds = 1 if quick else 36 if metrics == 2 else 16
            task = functools.partial(Task, metrics)
            found = section(title, task, rounds, target)
            found.plot = title
            yield found
        if torch.cuda.is_available():
            yield from on_cuda(1 if quick else 16)


if __name__ == "__main__":
    harness.main(measure)
