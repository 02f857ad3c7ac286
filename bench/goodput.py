"""What saves and restarts cost, and the share of time that trains: `python -m bench.goodput`."""

from __future__ import annotations

import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler

from core import BaseSolver
from core.checkpoint import read_about
from core.data import loader

from . import harness
from .harness import OURS, ROOT, Row, Section, Spread, compare, interleave

MEGABYTES = 100
OVERHEAD = 1.015  # times a training without saves
MTBF = {"10 minutes": 600, "3 hours": 3 * 3600, "1 week": 7 * 24 * 3600}
BATCH, FIRST_BATCH, WHOLE_EPOCH, BYTES = 64, 1.1, 1.05, 8.0
ORDER = """
import sys
from torch.utils.data import RandomSampler
from core.data import EpochSampler
peaks = []
for data in (range(8), range(int(sys.argv[1]))):
    next(iter(eval(sys.argv[2])))
    [peak] = [line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")]
    peaks.append(1024 * int(peak))
print((peaks[1] - peaks[0]) / len(data))
"""


class Training(BaseSolver):
    """So many steps in one epoch, timed from within; weights and Adam state of some megabytes."""

    def __init__(self, folder: Path, megabytes: int, minutes: float, number: int) -> None:
        super().__init__(folder, {"minutes": minutes})
        self.model = nn.Sequential(*(nn.Linear(1024, 1024) for _ in range(megabytes // 12)))
        self.optim = torch.optim.Adam(self.model.parameters(), lr=1e-6)
        self.register_stateful("model", "optim")
        self.number = number
        self.begun, self.files = 0, set[int]()  # saves, as they begin and as they come to the disk
        self.gaps: tuple[list[float], list[float]] = [], []  # between two steps: usual, with a save
        self.taken: tuple[list[float], list[float]] = [], []  # by steps: usual, while a file grows

    def state_dict(self) -> dict[str, Any]:
        """The state, asked for by each save."""
        self.begun += 1
        return super().state_dict()

    def look(self) -> None:
        """Note a new file."""
        if self.checkpoint_path.exists():
            self.files.add(self.checkpoint_path.stat().st_mtime_ns)

    def train(self) -> Mapping[str, float]:
        """The stage; prints the number of each step."""
        steps = self.steps([torch.ones(16, 1024)] * self.number)
        begun, ended = self.begun, time.perf_counter()
        for batch in steps:
            begin = time.perf_counter()
            self.gaps[self.begun > begun].append(begin - ended)
            begun = self.begun
            loss = self.model(batch).square().mean()
            self.optim.zero_grad()
            loss.backward()
            self.optim.step()
            steps.log({"loss": loss})
            ended = time.perf_counter()
            self.taken[begun > len(self.files)].append(ended - begin)
            self.look()
            print(steps.step + 1, flush=True)
        return steps.metrics()

    def run(self) -> None:
        """Train; print the seconds, the numbers of saves and files, and what the saves took."""
        with self.running():
            begin = time.perf_counter()
            self.run_stage("train", self.train)
            taken = time.perf_counter() - begin
            self.commit(save_checkpoint=False)
        self.look()
        usual, step = statistics.median(self.gaps[0]), statistics.mean(self.taken[0])
        waits = [gap - usual for gap in self.gaps[1]]
        slower = sum(taken - step for taken in self.taken[1])
        print(json.dumps([taken, self.begun, len(self.files), waits, slower]))


def process(folder: Path, megabytes: int, minutes: float, steps: int) -> subprocess.Popen[bytes]:
    """Train in a process of its own, which keeps freed memory: see `saves`."""
    numbers = map(str, (megabytes, minutes, steps))
    command = [sys.executable, "-m", "bench.goodput", "--train", str(folder), *numbers]
    env = os.environ | dict.fromkeys(
        ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"), str(2**32)
    )
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE)


def saves(seconds: float, interval: float, rounds: int, megabytes: int) -> Iterator[Section]:
    """The same training, with saves and without; and what each save took."""
    lost: list[tuple[float, list[float], float]] = []  # of each run: seconds in all, waits, slower

    def train(steps: int, interval: float) -> float:
        with tempfile.TemporaryDirectory() as folder:
            told, _ = process(Path(folder), megabytes, interval / 60, steps).communicate()
        taken, begun, files, waits, slower = json.loads(told.splitlines()[-1])
        fewest, most = (taken / (interval + 1) - 1, taken / interval) if interval else (0, 0)
        assert fewest <= begun == files == len(waits) <= most, f"{begun} saves, {files} files"
        lost.extend([(taken, waits, slower)] if interval else [])
        return float(taken)

    steps = round(seconds * 100 / train(100, 0))
    base, ours = "no saves", f"{OURS}, a save every {interval:g} s"
    ways = {base: partial(train, steps, 0), ours: partial(train, steps, interval)}
    times, failed = interleave(ways, rounds, warmup=0)
    notes = {ours: f"saves of each run: {', '.join(str(len(waits)) for _, waits, _ in lost)}"}
    rows = compare(times, failed, base, 1.0, True, {ours: OVERHEAD}, notes)
    own = Spread.of([taken / (taken - sum(waits) - slower) for taken, waits, slower in lost])
    rows.append(Row(f"{OURS}, beside its own other steps", None, own, OVERHEAD))
    about = (
        f"{steps:,} steps, {megabytes} MB of weights and Adam state, one thread; {rounds} rounds, "
        "in new processes. Saves are counted twice: as they begin, and as files on the disk. Whole "
        "runs may differ by more than saves cost: the last row compares steps of the same run. The "
        "processes keep freed memory, else glibc gives back that of gradients in some runs and not "
        "in others, which takes up to a third of a step."
    )
    compared = (f"times {base}", ".3f")
    yield Section("Saves within an epoch", about, ("s", ".1f"), compared, rows)
    parts = {
        "the wait for the first save of a process": [waits[0] for _, waits, _ in lost],
        "the wait for a later save": [wait for _, waits, _ in lost for wait in waits[1:]],
        "slower steps while a file is written, by save": [
            slower / len(waits) for _, waits, slower in lost
        ],
    }
    rows = [Row(way, Spread.of(found).times(1e3)) for way, found in parts.items()]
    about = (
        "From the same runs. A wait is the time between two steps, above the usual. The first save "
        "makes the memory of the copy as well."
    )
    yield Section("What a save takes from the training", about, ("ms", ".0f"), ("", ""), rows)


def start(folder: Path, megabytes: int, minutes: float = 10) -> tuple[float, int]:
    """Seconds from the start of a process to the end of its first step, and the step's number.

    Then the process is killed; with less than a minute between saves, soon after the first save.
    """
    begin = time.perf_counter()
    with process(folder, megabytes, minutes, 10**6) as run:
        assert run.stdout is not None
        step, taken = int(run.stdout.readline()), time.perf_counter() - begin
        while minutes < 1 and not (folder / "checkpoint.th").exists():
            run.stdout.readline()
        run.kill()
    assert run.returncode == -signal.SIGKILL, f"ended by itself: {run.returncode}"
    return taken, step


def restarts(megabytes: int, rounds: int, save: float) -> Iterator[Section]:
    """A resume beside a fresh start; and what follows from it, with the seconds of a save."""
    base, ours = "a fresh start", f"{OURS}, resumed within an epoch"
    with tempfile.TemporaryDirectory() as temporary:
        killed = Path(temporary, "killed")
        start(killed, megabytes, 1 / 60)
        wanted = read_about(killed / "checkpoint.th")["cursor"]["step"] + 1

        def fresh() -> float:
            taken, step = start(Path(tempfile.mkdtemp(dir=temporary)), megabytes)
            assert step == 1, f"began with step {step}"
            return taken

        def resumed() -> float:
            taken, step = start(killed, megabytes)
            assert step == wanted > 1, f"began with step {step}, not {wanted}"
            return taken

        times, failed = interleave({base: fresh, ours: resumed}, rounds)
    notes = {ours: f"killed by SIGKILL; continues with step {wanted}"}
    about = (
        f"From the start of a process to the end of its first step, {megabytes} MB of weights and "
        f"Adam state, files in the system's cache; {rounds} rounds."
    )
    rows = compare(times, failed, base, 1.0, ratio=True, notes=notes)
    yield Section("A restart", about, ("s", ".2f"), (f"times {base}", ".2f"), rows)
    restart = statistics.median(times[ours].values())
    texts = [["a failure every", "a save every 10 minutes", "a save every minute", "best interval"]]
    for name, mtbf in MTBF.items():
        shares = [1 - (save / t + t / 2 / mtbf + restart / mtbf) for t in (600, 60)]
        best = (2 * save * mtbf) ** 0.5
        texts.append([name, *(f"{share:.2%}" for share in shares), f"{best:.0f} s"])
    about = (
        "The share of time in steps that last: `1 - (blocked / interval + (interval / 2) / MTBF + "
        f"restart / MTBF)`, with {save * 1e3:.0f} ms of a later save (wait and slower steps) and "
        f"{restart:.1f} s of a restart. A failure loses half an interval on average; the time to "
        "get a new machine is left out. The formula is too dark where interval and MTBF are "
        "close. The best interval is `sqrt(2 * blocked * MTBF)`."
    )
    yield Section("Goodput", about, ("", ""), ("", ""), texts=texts)


class Examples(list[int]):
    """Examples that cost next to nothing; unlike a plain list, a loader takes them as they are."""


def batches(data: Any, skipped: int = 0, most: int | None = None) -> float:
    """Seconds to read all, or so many, batches after some skipped examples."""
    if skipped:
        data.sampler.skip(skipped)
    begin = time.perf_counter()
    reader = iter(data)  # ends its workers after the time is taken
    count = sum(1 for _ in itertools.islice(reader, most))
    taken = time.perf_counter() - begin
    assert count == (most or len(data)), f"{count} batches"
    return taken


def loading(size: int, rounds: int, indices: int) -> Iterator[Section]:
    """The first batch, all batches, and the memory of an order."""
    examples: Any = Examples(range(size))
    rows = []
    for workers in (0, 2):
        data = loader(examples, BATCH, shuffle=True, num_workers=workers)
        base, ours = (f"{way}, {workers} workers" for way in ("fresh", f"{OURS}, resumed"))
        ways = {base: partial(batches, data, 0, 1), ours: partial(batches, data, size * 9 // 10, 1)}
        times, failed = interleave(ways, 4 * rounds)
        rows += compare(times, failed, base, 1e3, ratio=True, targets={ours: FIRST_BATCH})
    about = f"`loader` over {size:,} shuffled examples, batches of {BATCH}; resumed at 90 %."
    compared = ("times fresh", ".2f")
    yield Section("Time to the first batch", about, ("ms", ".1f"), compared, rows)
    plain = DataLoader(examples, BATCH, sampler=RandomSampler(examples))
    ways = {"plain": partial(batches, plain)}
    ways[OURS] = partial(batches, loader(examples, BATCH, shuffle=True))
    times, failed = interleave(ways, rounds)
    rows = compare(times, failed, "plain", 1.0, ratio=True, targets={OURS: WHOLE_EPOCH})
    about = f"The same {size:,} examples in the main process; plain: with a `RandomSampler`."
    compared = ("times plain", ".3f")
    yield Section("A whole epoch of data", about, ("s", ".2f"), compared, rows)
    rows = []
    for name, count, sampler, target in (
        ("plain", indices // 10, "RandomSampler(data)", None),
        (OURS, indices, "EpochSampler(data, True, 0)", BYTES),
    ):
        command = [sys.executable, "-c", ORDER, str(count), sampler]
        found = Spread.of([round(float(subprocess.check_output(command, cwd=ROOT)), 1)])
        rows.append(Row(name, found, target=target, note=f"{count:,} indices"))
    about = "What the first index of a shuffled pass adds to the highest memory of a process."
    yield Section("Memory of an order", about, ("bytes an index", ".1f"), ("", ""), rows)


def measure(quick: bool = False) -> Iterator[Section]:
    """Saves, restarts, what follows from them, and the loader."""
    torch.set_num_threads(1)
    megabytes = 24 if quick else MEGABYTES
    found = [*saves(*((2.0, 0.5, 1) if quick else (60.0, 10.0, 4)), megabytes=megabytes)]
    yield from found
    _, wait, slower = (row.judged or 0.0 for row in found[1].rows)
    yield from restarts(megabytes, 1 if quick else 5, (wait + max(0.0, slower)) / 1e3)
    yield from loading(*((10**5, 1, 10**7) if quick else (10**6, 5, 10**8)))


if __name__ == "__main__":
    if "--train" in sys.argv:
        torch.set_num_threads(1)
        folder, megabytes, minutes, number = sys.argv[2:]
        Training(Path(folder), int(megabytes), float(minutes), int(number)).run()
    else:
        harness.main(measure)
