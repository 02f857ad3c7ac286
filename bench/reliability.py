"""What becomes of a run that is stopped, killed, or damaged: `python -m bench.reliability`.

Each way trains the same small model, with dropout and shuffled data, in one process on the CPU.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from . import harness, resume
from .harness import OURS, ROOT, Section
from .resume import MODULES, STEPS

EPOCHS, STOP = 4, 2  # in all, and before the stop
HEAD = ["way", "stopped after an epoch", "SIGKILL inside of an epoch", "a flipped bit"]


@dataclass
class End:
    """How a process ended."""

    code: int | None
    digest: str = ""
    error: str = ""


def _target(way: str, folder: Path, epochs: int, kill_at: int, told: Path) -> None:
    try:
        end = End(0, resume.train(way, folder, epochs, kill_at))
    except BaseException as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        end = End(1, error=f"{type(error).__name__}: {lines[0]}")
    told.write_text(json.dumps(vars(end)))
    os._exit(end.code or 0)


def train(way: str, folder: Path, epochs: int, kill_at: int = 0) -> End:
    """Train, or resume training, in a process of its own."""
    told = folder.with_suffix(".end")
    told.unlink(missing_ok=True)
    process = multiprocessing.get_context("fork").Process(
        target=_target, args=(way, folder, epochs, kill_at, told)
    )
    process.start()
    process.join()
    return End(**json.loads(told.read_text())) if told.exists() else End(process.exitcode)


def flip_a_bit(folder: Path) -> None:
    """Damage the newest checkpoint, amid the data of its largest tensor."""
    found = [p for p in folder.rglob("*") if p.is_file() and p.stat().st_size > 2**16]
    newest = max(found, key=lambda p: (p.stat().st_mtime_ns, p.name))
    where = newest.stat().st_size // 2
    if zipfile.is_zipfile(newest):
        with zipfile.ZipFile(newest) as archive:
            entry = max(archive.infolist(), key=lambda info: info.file_size)
        where = entry.header_offset + 1024 + entry.file_size // 2
    content = bytearray(newest.read_bytes())
    content[where // 4 * 4 + 2] ^= 64  # the highest bit of a float's mantissa
    newest.write_bytes(content)


def verdict(end: End, wanted: str) -> str:
    """Does a run end as it should have?"""
    if end.code:
        return f"fails: {end.error[:70]}".replace("|", "/")
    return "exact" if end.digest == wanted else "resumes, with other weights"


def examine(way: str, folder: Path) -> list[str]:
    """A row of the table."""
    folders = {name: folder / name for name in ("whole", "stopped", "killed", "flipped")}
    for path in folders.values():
        path.mkdir(parents=True)
    whole = train(way, folders["whole"], EPOCHS)
    if whole.code:
        return [way, verdict(whole, ""), "", ""]
    train(way, folders["stopped"], STOP)
    shutil.copytree(folders["stopped"], folders["flipped"], dirs_exist_ok=True)
    resumed = train(way, folders["stopped"], EPOCHS)
    killed = train(way, folders["killed"], EPOCHS, kill_at=STOP * STEPS + 3)
    assert killed.code == -signal.SIGKILL, killed
    restarted = train(way, folders["killed"], EPOCHS)
    flipped = ""
    if not resumed.code:
        flip_a_bit(folders["flipped"])
        end = train(way, folders["flipped"], EPOCHS)
        same = end.digest == resumed.digest
        flipped = "noticed; the checkpoint before is used; exact" if same else "unnoticed"
        flipped = f"noticed: {end.error[:70]}".replace("|", "/") if end.code else flipped
    return [way, verdict(resumed, whole.digest), verdict(restarted, whole.digest), flipped]


def examined(way: str) -> list[str]:
    """The same, in a process that imports what the way needs."""
    command = [sys.executable, "-m", "bench.reliability", "--way", way]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        return [way, f"cannot run: {done.stderr.strip().splitlines()[-1][:90]}", "", ""]
    row: list[str] = json.loads(done.stdout.splitlines()[-1])
    return row


def measure(quick: bool = False) -> Iterator[Section]:
    """All ways, two at a time, for nothing is timed."""
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(examined, [OURS, "Flashy"] if quick else MODULES))
    about = (
        f"{EPOCHS} epochs of a small model with dropout and shuffled data, in one process on the "
        f"CPU; saved after each epoch; stopped, killed or damaged after {STOP}, and started again. "
        "`exact`: it ends with the weights, bit for bit, of a run that was left alone."
    )
    yield Section("Reliability", about, ("", ""), ("", ""), texts=[HEAD, *rows])


if __name__ == "__main__":
    if "--way" in sys.argv:
        importlib.import_module(MODULES[sys.argv[-1]])
        with tempfile.TemporaryDirectory() as temporary:
            print("\n" + json.dumps(examine(sys.argv[-1], Path(temporary))))
    else:
        harness.main(measure)
