"""Break real runs of a rendered project, start them again, and see what is lost.

`nox -s faults` writes the results to docs/reliability.md. A run counts as recovered if its last
checkpoint and the rows of its metrics are bitwise those of an undisturbed run.
"""

import ctypes
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .commands import Command, gone
from .gate import Gate

# Shuffling and dropout are in the digits; this adds random numbers that are drawn in workers.
AUGMENTATION = '''

class Jittered(torch.utils.data.Dataset):  # type: ignore
    """Adds noise from every generator there is."""

    def __init__(self, data):  # type: ignore
        self.data, self.shape = data, data.shape

    def __len__(self):  # type: ignore
        return len(self.data)

    def __getitem__(self, index):  # type: ignore
        import random

        import numpy

        image, label = self.data[index]
        return image + torch.rand(1) * random.random() * numpy.random.rand(), label


plain_digits = load_digits


def load_digits():  # type: ignore
    train, valid = plain_digits()
    return Jittered(train), valid
'''

# Random numbers that are drawn before the loop, by its iterator and in a step; accumulation; and a
# line of time for each step, to count those that were done again.
NOISE = """

import os, random, time  # type: ignore

import numpy  # type: ignore

plain_loader, plain_train, plain_predict = loader, Solver.train, Solver.predict


class Scaled(DataLoader):  # type: ignore
    def __iter__(self):  # type: ignore
        scale = 1 + 0.1 * random.random() * numpy.random.rand() * torch.rand(1).item()
        return ((images * scale, labels) for images, labels in super().__iter__())


def loader(*args, **kwargs):  # type: ignore
    return plain_loader(*args, klass=Scaled, **kwargs)


def train(self):  # type: ignore
    self.brightness = random.random() * numpy.random.rand() * torch.rand(1)
    return plain_train(self)


def predict(self, images, labels):  # type: ignore
    if self.model.training:
        noise = random.random() * numpy.random.rand() * torch.rand(1)
        images = images + self.brightness + noise
        loss, _ = plain_predict(self, images[::2], labels[::2])
        loss.backward()
        if distrib.is_rank_zero():
            with open(os.path.join(os.environ["MY_RESEARCH_DIR"], "steps"), "a") as file:
                file.write(f"{time.monotonic()}\\n")
    return plain_predict(self, images, labels)


Solver.train, Solver.predict = train, predict
"""

EPOCHS, STEPS = 6, 6  # steps of an epoch
STARTED = re.compile(" (?:starts|resumes) in epoch ")  # a line of each start of a run
CONFIG = [
    f"epochs={EPOCHS}",
    "device=cpu",
    "trackers=[]",
    "log_every=1",
    "checkpoint.minutes=0.001",
    "data.batch_size=240",
    "data.num_workers=1",
    "model.channels=48",
    "optim.ema=0.9",
]
OUTCOMES = ["recovered exactly", "recovered with a warning", "refused clearly", "lost silently"]


@dataclass
class Run:
    """One run of the project, in a folder of outputs of its own."""

    project: Path
    outputs: Path
    gate: Gate  # in the epoch and stage that the environment variable HOLD tells
    ranks: int = 1
    has_rows: bool = True  # whether no row of `metrics.jsonl` was taken away

    @property
    def folder(self) -> Path:
        [found] = (self.outputs / "xps").iterdir()
        return found

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.th"

    @property
    def command(self) -> list[str]:
        """Arguments of `python`."""
        distributed = ["-d", f"--ddp_workers={self.ranks}"] if self.ranks > 1 else []
        return ["-m", "dora", "-P", "my_research", "run", *distributed, *CONFIG]

    @property
    def env(self) -> dict[str, str]:
        return os.environ | {"MY_RESEARCH_DIR": str(self.outputs)}

    def start(self, prepare: Callable[[], Any] | None = None, hold: str = "") -> Command:
        """Train; wait for ever in the epoch and stage of `hold`, such as `4train`."""
        env = self.env | {"HOLD": hold}
        return Command(self.project, *self.command, env=env, prepare=prepare)

    def finish(self, prepare: Callable[[], Any] | None = None) -> tuple[int, str]:
        process = self.start(prepare)
        return process.wait(), process.said

    def started(self, process: Command, times: int) -> bool:
        """Wait until training has begun for the so-many-th time; False if the process ended."""
        while process.poll() is None:
            logs = list(self.outputs.glob("xps/*/solver.log.0"))
            if logs and len(STARTED.findall(logs[0].read_text(errors="replace"))) >= times:
                return True
            time.sleep(0.002)
        return False

    def interrupt(self, epochs: int = 3) -> None:
        """Train, and kill in the epoch after so many are committed."""
        process = self.start(hold=f"{epochs + 1}train")
        process.until(lambda: self.gate.holds(process.pid) and self.committed() == epochs)
        process.send(signal.SIGKILL)
        process.wait()

    def stop(self, hold: str) -> None:
        """Train, and ask for a stop in an epoch and stage."""
        process = self.start(hold=hold)
        process.until(lambda: self.gate.holds(process.pid))
        process.send(signal.SIGUSR1)
        process.wait()

    def steps(self) -> list[float]:
        """Return the times of all steps, those that were done again as well."""
        path = self.outputs / "steps"
        return [*map(float, path.read_text().split())] if path.exists() else []

    def rows(self) -> list[Any]:
        """Return the rows of `metrics.jsonl`, but for durations."""
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        return [row | {"metrics": {**row["metrics"], "duration": 0}} for row in rows]

    def committed(self) -> int:
        """Number of epochs in the published history."""
        histories = list(self.outputs.glob("xps/*/history.json"))
        return len(json.loads(histories[0].read_text())) if histories else 0

    def check_history(self) -> None:
        """A history must never tell of an epoch that is not safe."""
        published = self.committed()
        if published:
            safe = len(load(self.checkpoint)["history"])
            assert published <= safe, f"{published} published, {safe} safe"


def load(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(path, weights_only=True)
    return state


def same(one: Any, other: Any) -> bool:
    """Bitwise the same, durations aside."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        keys = one.keys() - {"duration", "xp.cfg"}
        return keys == other.keys() - {"duration", "xp.cfg"} and all(
            same(one[k], other[k]) for k in keys
        )
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


# ---------------------------------------------------------------------------------------- faults
# Each leaves a run behind that is broken in some way, and may return what mends it afterwards.

Mend = Callable[[], None]


def kills_at_random(
    run: Run, rng: random.Random, signal_: signal.Signals = signal.SIGKILL, seconds: float = 1.2
) -> None:
    for times in range(1, rng.randint(2, 4)):
        process = run.start()
        if run.started(process, times):
            time.sleep(rng.uniform(0, seconds))
        process.send(signal_)
        process.wait()
        run.check_history()


def killed_within_an_epoch(run: Run, rng: random.Random) -> None:
    kills_at_random(run, rng, seconds=0.3)


def terminated_at_random(run: Run, rng: random.Random) -> None:
    kills_at_random(run, rng, signal.SIGTERM)


def asked_to_stop_at_random(run: Run, rng: random.Random) -> None:
    kills_at_random(run, rng, rng.choice([signal.SIGUSR1, signal.SIGUSR2]))


def one_of_two_ranks_asked_to_stop(run: Run, rng: random.Random) -> None:
    run.ranks = 2
    for times in range(1, rng.randint(3, 5)):
        process = run.start()
        if run.started(process, times):
            time.sleep(rng.uniform(0, 0.8))
        if children := children_of(process):
            asked = rng.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2])
            os.kill(int(rng.choice(children)), asked)
        process.wait()
        run.check_history()


def interrupted_at_random(run: Run, rng: random.Random) -> None:
    kills_at_random(run, rng, signal.SIGINT)


def killed_inside_the_write(run: Run, rng: random.Random) -> None:
    process = run.start()
    skip = rng.randint(0, EPOCHS - 1)
    while process.poll() is None:
        if run.committed() >= skip and list(run.outputs.glob("xps/*/*.tmp")):
            time.sleep(rng.choice([0, rng.uniform(0, 0.02)]))
            break
    process.send(signal.SIGKILL)
    process.wait()
    run.check_history()


def children_of(process: Command) -> list[str]:
    with suppress(OSError):  # it may have ended
        return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return []


def one_of_three_ranks_killed(run: Run, rng: random.Random) -> None:
    one_of_two_ranks_killed(run, rng, ranks=3)


def one_of_two_ranks_killed(run: Run, rng: random.Random, ranks: int = 2) -> None:
    run.ranks = ranks
    process = run.start()
    if run.started(process, 1):
        time.sleep(rng.uniform(0, 1.5))
    children = children_of(process)
    if children:
        os.kill(int(rng.choice(children)), signal.SIGKILL)
    assert process.wait() != 0 or not children, process.said
    run.check_history()


def launcher_of_two_ranks_killed(run: Run, rng: random.Random) -> None:
    run.ranks = 2
    process = run.start()
    run.started(process, 1)
    children = children_of(process)
    process.send(signal.SIGKILL)
    process.wait()
    while not all(map(gone, children)):
        time.sleep(0.01)  # until they see that they are alone, and have saved
    [log] = run.outputs.glob("xps/*/solver.log.0")
    stopped = re.search("Stopped by SIGTERM after (step|epoch)", log.read_text())
    assert stopped or run.committed() == EPOCHS, "the orphans ended otherwise"


def bit_flipped(run: Run, rng: random.Random) -> None:
    run.interrupt()
    data = bytearray(run.checkpoint.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    run.checkpoint.write_bytes(data)


def truncated(run: Run, rng: random.Random) -> None:
    run.interrupt()
    with run.checkpoint.open("r+b") as file:
        file.truncate(rng.randrange(run.checkpoint.stat().st_size))


def any_file_damaged(run: Run, rng: random.Random) -> None:
    run.interrupt(rng.randint(1, 4))
    path = rng.choice(sorted(path for path in run.folder.glob("*.*") if path.is_file()))
    run.has_rows = path.name != "metrics.jsonl"
    path.write_bytes(damage(path.read_bytes(), rng))


def damage(data: bytes, rng: random.Random) -> bytes:
    """Return the content of a file after a failure of a disk."""
    first, last = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    flipped = bytes([data[first - 1] ^ 1 << rng.randrange(8)]) if first else b""
    return rng.choice(
        [
            data[:first],
            data[: max(0, first - 1)] + flipped + data[first:],
            data[:first] + bytes(last - first) + data[last:],
            data[:first] + rng.randbytes(last - first) + data[last:],
            data + rng.randbytes(last),
        ]
    )


def older_in_place_of_the_newest(run: Run, rng: random.Random) -> None:
    run.interrupt(rng.randint(2, 4))
    [older, *_] = sorted(run.folder.glob("checkpoint.*.th"))
    shutil.copy(older, run.checkpoint)


def of_another_run(run: Run, rng: random.Random) -> Mend:
    run.interrupt()
    mine = run.checkpoint.read_bytes()
    other = load(run.checkpoint)
    other["xp.cfg"]["optim"]["lr"] *= 2
    torch.save(other, run.checkpoint)

    def mend() -> None:
        run.checkpoint.write_bytes(mine)

    return mend


def file_times_jumped(run: Run, rng: random.Random) -> None:
    run.interrupt(rng.randint(1, 4))
    for path in run.folder.rglob("*"):
        years = rng.uniform(-30, 30)
        os.utime(path, (time.time() + years * 3e7,) * 2)


def jump(seed: float) -> None:
    """Let the clock of this process jump by months, back and forth."""
    now, rng, months = time.time, random.Random(seed), [0.0]

    def jumping() -> float:
        if rng.random() < 0.05:
            months.append(rng.uniform(-30, 30))
        return now() + months[-1] * 2.6e6

    time.time = jumping


def clock_jumped(run: Run, rng: random.Random) -> None:
    process = run.start(partial(jump, rng.random()))
    if run.started(process, 1):
        time.sleep(rng.uniform(0, 1.2))
    process.send(signal.SIGKILL)
    process.wait()
    run.check_history()


def all_damaged(run: Run, rng: random.Random) -> Mend:
    run.interrupt()
    copies = {path: path.read_bytes() for path in run.folder.glob("checkpoint*.th")}
    for path, data in copies.items():
        path.write_bytes(data[: rng.randrange(len(data))])

    def mend() -> None:
        for path, data in copies.items():
            assert path.stat().st_size < len(data), "a damaged file was overwritten"
            path.write_bytes(data)

    return mend


def limit_files(size: int) -> None:
    """Let no file of this process grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def disk_full(run: Run, rng: random.Random) -> None:
    code, said = run.finish(partial(limit_files, rng.randrange(50_000, 2_000_000)))
    assert code != 0, "nobody noticed the full disk"
    assert "checkpoint.th" in said, said


def folder_read_only(run: Run, rng: random.Random) -> Mend:
    run.interrupt(rng.randint(1, 4))
    run.folder.chmod(0o555)

    def mend() -> None:
        run.folder.chmod(0o755)

    return mend


class Evil:
    """Its pickle makes a folder when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def malicious_pickle(run: Run, rng: random.Random) -> None:
    run.interrupt()
    evil = Evil(run.outputs / "evil")
    run.checkpoint.unlink()
    torch.save({"checkpoint": {"format": 2}, "model": evil}, run.checkpoint)


def history_removed(run: Run, rng: random.Random) -> None:
    run.interrupt(rng.randint(1, 4))
    (run.folder / "history.json").unlink()


def checkpoint_removed(run: Run, rng: random.Random) -> None:
    run.interrupt()
    run.checkpoint.unlink()


Fault = Callable[[Run, random.Random], Mend | None]

EXACT, WARNED, REFUSED, LOST = OUTCOMES

# What may become of a run. Some bits of a file are padding, and flipping them harms nobody.
FAULTS: dict[Fault, set[str]] = {
    kills_at_random: {EXACT},
    killed_within_an_epoch: {EXACT},
    killed_inside_the_write: {EXACT},
    one_of_two_ranks_killed: {EXACT},
    one_of_three_ranks_killed: {EXACT},
    launcher_of_two_ranks_killed: {EXACT},
    terminated_at_random: {EXACT},
    asked_to_stop_at_random: {EXACT},
    one_of_two_ranks_asked_to_stop: {EXACT},
    interrupted_at_random: {EXACT},
    bit_flipped: {WARNED, EXACT},
    truncated: {WARNED},
    any_file_damaged: {WARNED, EXACT},
    older_in_place_of_the_newest: {WARNED, EXACT},
    of_another_run: {REFUSED},
    file_times_jumped: {EXACT},
    clock_jumped: {EXACT},
    all_damaged: {REFUSED},
    disk_full: {EXACT},
    folder_read_only: {REFUSED},
    malicious_pickle: {WARNED},
    history_removed: {EXACT},
    checkpoint_removed: {WARNED, EXACT},
}


# -------------------------------------------------------------------------------------- campaign


def drop_privilege() -> None:
    """Let file modes hold for root as well, as they do for everybody else."""
    if os.getuid() == 0:
        libc = ctypes.CDLL(None)
        libc.prctl(24, 1)  # PR_CAPBSET_DROP, CAP_DAC_OVERRIDE: for what this process starts
        header, sets = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
        libc.capget(header, sets)
        sets[0] &= ~(1 << 1)  # and for itself, in the effective set
        libc.capset(header, sets)


@dataclass
class Result:
    """What became of a run.

    Args:
        fault: name of what befell the run.
        outcome: one of `OUTCOMES`.
        repeated: steps that were done again.
        seconds: from the last start to the first new step, without the imports of Python.
        said: a report, if something was lost.
    """

    fault: str
    outcome: str
    repeated: int
    seconds: float
    said: str = ""


@dataclass
class Campaign:
    """Faults on runs of one project, each with a seed of its own."""

    project: Path
    work: Path
    seed: int = 0

    def __post_init__(self) -> None:
        """Give the project random numbers everywhere, and a gate in the third step."""
        for name, code in (("data", AUGMENTATION), ("solver", NOISE)):
            with (self.project / "my_research" / f"{name}.py").open("a") as file:
                file.write(code)
        when = 'f"{self.epoch}{self.current_stage}" == os.environ.get("HOLD")'
        self.gate = Gate(self.project, when, calls='6 if "train" in self.current_stage else 1')

    def reference(self, ranks: int) -> Run:
        """Return an undisturbed run."""
        run = Run(self.project, self.work / f"reference-{ranks}", self.gate, ranks)
        if not run.outputs.exists():
            # Started afresh: a fork would have, with the others, the same seed of hashes.
            subprocess.run([sys.executable, *run.command], cwd=run.project, env=run.env, check=True)
        return run

    def is_exact(self, run: Run) -> bool:
        """Return whether a run ended as an undisturbed one."""
        whole = self.reference(run.ranks)
        ended = run.committed() == EPOCHS and same(load(run.checkpoint), load(whole.checkpoint))
        return ended and (not run.has_rows or run.rows() == whole.rows())

    def attempt(self, fault: Fault, number: int = 0) -> Result:
        """Break a run, start it again, and return what became of it."""
        name = fault.__name__
        run = Run(self.project, self.work / f"{name}-{number}", self.gate)
        mend = fault(run, random.Random(f"{self.seed} {name} {number}"))
        done, begin = len(run.steps()), time.monotonic()
        code, said = run.finish(drop_privilege)
        outcome = WARNED if "[WARNING]" in said else EXACT
        if code != 0:
            clear = re.search(r"Error: |\[CRITICAL\]", said) and run.folder.name in said
            outcome = REFUSED if clear and mend else LOST
        if mend:
            mend()
            if code != 0:
                begin = time.monotonic()
                code, said = run.finish()
        left = list(run.folder.rglob("*.tmp*")) + list(run.outputs.glob("evil"))
        steps = run.steps()
        result = Result(name, outcome, len(steps) - EPOCHS * STEPS, 0.0)
        result.seconds = steps[done] - begin if len(steps) > done else 0.0
        if code != 0 or left or not self.is_exact(run):
            result.outcome = LOST
            result.said = f"{name} {number}: code {code}, left {left}, see {run.folder}\n{said}"
        else:
            shutil.rmtree(run.outputs)
        return result


def table(results: list[Result]) -> str:
    """Return the faults by outcome, as a table of Markdown."""
    counts = Counter((result.fault, result.outcome) for result in results)
    lines = [f"|fault|tried|{'|'.join(OUTCOMES)}|", "|---|" + "---:|" * 5]
    for name in dict.fromkeys(result.fault for result in results):
        found = [counts[name, outcome] for outcome in OUTCOMES]
        numbers = "|".join(str(n or "") for n in (sum(found), *found))
        lines.append(f"|{name.replace('_', ' ')}|{numbers}|")
    return "\n".join(lines)


def break_runs(campaign: Campaign, trials: int) -> list[Result]:
    """Go through the faults again and again, until so many were tried; two at a time."""
    for ranks in (1, 2, 3):
        campaign.reference(ranks)
    tried = [(fault, n) for n in range(trials) for fault in FAULTS][:trials]
    results: list[Result] = []
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for result in pool.map(campaign.attempt, *zip(*tried, strict=True)):
            results.append(result)
            note = f"{len(results)} of {trials}: {result.fault}: {result.outcome}"
            print(note, result.repeated, f"{result.seconds:.2f}", result.said, flush=True)
    return results
