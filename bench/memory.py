"""Memory of a training process above that of the bare loop: `python -m bench.memory`."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from . import harness
from .harness import OURS, ROOT, Section, compare, interleave

TARGET = 30.0  # MB
LEFT_OUT = ("by hand, `.item()`", "Lightning, silent")


def train(way: str) -> None:
    """Train once in this process, and print its highest resident memory, in bytes."""
    import tempfile

    import torch

    from . import loops
    from .task import Task

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        loops.quiet(Path(folder))
        loops.WAYS[way](Task())
    status = Path("/proc/self/status").read_text()
    [peak] = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    print(f"\npeak {int(peak) * 1024}")


def peak(way: str) -> Callable[[], float]:
    """Bytes, in a process of its own."""

    def run() -> float:
        command = [sys.executable, "-m", "bench.memory", "--way", way]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no word"])[-1])
        return float(done.stdout.rpartition("peak ")[2])

    return run


def measure(quick: bool = False) -> Iterator[Section]:
    """Each way, in processes of its own."""
    from .loops import WAYS

    names = ["bare loop", OURS] if quick else [n for n in WAYS if n not in LEFT_OUT]
    ways = {name: peak(name) for name in names}
    times, failed = interleave(ways, 1 if quick else 2, warmup=0)
    rows = compare(times, failed, "bare loop", 1e-6, targets={OURS: TARGET})
    about = "Highest resident memory of a process that trains the tiny MLP, with 2 metrics."
    taken, compared = ("MB", ".0f"), ("MB above the bare loop", ".1f")
    yield Section("Memory", about, taken, compared, rows, plot="Memory")


if __name__ == "__main__":
    if "--way" in sys.argv:
        train(sys.argv[-1])
    else:
        harness.main(measure)
