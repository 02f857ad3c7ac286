"""Run a Dora grid on this machine, without Slurm: the grid file is the same as for `dora grid`.

    python -m my_research.tools.sweep GRID

Several runs train at a time. Each is the `dora run` that one would type, and its output goes to
`sweep.log` in its folder. Started again, a sweep resumes the runs that are not complete, and leaves
the rest alone.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from . import escape_output, flatten, write_text
from .grid import Grid

TAIL = 15  # lines of the log of a run that failed
GRACE = 60.0  # seconds for a run to save before it is killed
COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Worker:
    """A run, in a process of its own.

    Args:
        xp: the run.
        command: starts it.
        cwd: where it is started.
        env: additions to its environment.

    Raises:
        BlockingIOError: if another `dora run` or sweep trains it.
    """

    def __init__(self, xp: Any, command: list[str], cwd: Path, env: dict[str, str]) -> None:
        self.folder, self.config = xp.folder, _config(xp)
        self.log = self.folder / "sweep.log"
        self.folder.mkdir(parents=True, exist_ok=True)
        if not _is_free(self.folder):
            raise BlockingIOError
        with self.log.open("ab") as log:
            # Held by the process that writes there for as long as it lives, whether we do or not.
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.process = subprocess.Popen(
                command,
                cwd=cwd,
                env=os.environ | env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is ours to pass on
            )

    def stop(self, number: int) -> None:
        """Send a signal to the process and its children."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, number)

    def tail(self) -> str:
        """Return the last lines of its log."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL:]
        return "\n".join(f"    {line}" for line in lines)

    def complete(self) -> None:
        """Note that the run ended well, for the next sweep."""
        end = {"epochs": len(_read(self.folder / "history.json", [])), "config": self.config}
        with suppress(OSError):  # without the note, the next sweep starts the run once more
            write_text(self.folder / "sweep.json", json.dumps(end))


def _is_free(folder: Path) -> bool:
    """Say whether no process trains the run of a folder."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            return True
    except (OSError, NotImplementedError) as error:  # some file systems have no locks
        return not isinstance(error, Timeout)


def _is_complete(xp: Any) -> bool:
    """Say whether a run ended well, with the present config, and was not cleared since."""
    end = _read(xp.folder / "sweep.json", {})
    epochs, config = end.get("epochs"), end.get("config")
    if not (isinstance(epochs, int) and isinstance(config, dict)):
        return False
    now, done = _config(xp), len(_read(xp.folder / "history.json", []))
    # A key that is new since, or that makes no other run, does not count.
    return epochs <= done and all(repr(now.get(k)) == repr(value) for k, value in config.items())


def _config(xp: Any) -> dict[str, Any]:
    """Return what makes a run this run: its config, as it is read back from JSON."""
    plain = OmegaConf.to_container(xp.cfg, resolve=True, enum_to_str=True)
    flat = flatten(json.loads(json.dumps(plain, default=str)))
    kept = [key for key in flat if not key.startswith(("dora.", "slurm."))]
    return {key: flat[key] for key in kept if key == "epochs" or not xp.dora.is_excluded(key)}


def _read(path: Path, default: Any) -> Any:
    """Return the content of a JSON file; the default if there is none, or it is damaged."""
    try:
        found = json.loads(path.read_bytes())
    except (OSError, RecursionError, ValueError):
        return default
    return found if isinstance(found, type(default)) else default


@dataclass
class Sweep:
    """All runs of a grid.

    Args:
        grid: the runs.
        command: starts a run, but for its arguments.
        cwd: where runs are started.
        workers: number of runs at a time.
        free: names of the GPUs to share out; none, to train on CPUs.
        interval: seconds between tables, if no state changes.
        used: the GPUs of each run.
        running: a process for each run.
    """

    grid: Grid
    command: list[str]
    cwd: Path
    workers: int
    free: list[str]
    interval: float = 60.0
    used: dict[str, list[str]] = field(default_factory=dict)
    running: dict[str, Worker] = field(default_factory=dict)

    def run(self) -> bool:
        """Run all that is not complete; return whether all is, in the end."""
        waiting = self.incomplete()
        shown, reported = "", 0.0
        try:
            while waiting or self.running:
                self._collect()
                while waiting and len(self.running) < self.workers and self._has_gpus(waiting[0]):
                    self._start(waiting.pop(0))
                states = repr(self.grid.states)
                if states != shown or time.monotonic() - reported > self.interval:
                    self.show()
                    shown, reported = states, time.monotonic()
                time.sleep(0.1)
        except BaseException:  # also a mistake in the explorer: nothing is to train unseen
            self._stop()
            raise
        if not shown:
            self.show()
        return set(self.grid.states.values()) <= {"COMPLETED"}

    def incomplete(self) -> list[Any]:
        """Return the runs that are not complete, and set the state of the others."""
        waiting = [xp for xp in self.grid.runs if not _is_complete(xp)]
        pending = {xp.sig for xp in waiting}
        self.grid.states |= {s: "COMPLETED" for s in self.grid.states if s not in pending}
        return waiting

    def show(self) -> None:
        """Print the table, without colours if it is not for a terminal."""
        table = self.grid.table()
        print("\n" + (table if sys.stdout.isatty() else COLOURS.sub("", table)), flush=True)

    def _has_gpus(self, xp: Any) -> bool:
        return not (self.free or self.used) or len(self.free) >= self.grid.processes[xp.sig]

    def _start(self, xp: Any) -> None:
        env, flags = {}, []
        if self.free:
            count = self.grid.processes[xp.sig]
            gpus = self.used[xp.sig] = [self.free.pop(0) for _ in range(count)]
            env["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
            flags = ["-d", f"--ddp_workers={count}"] if count > 1 else []
        elif "OMP_NUM_THREADS" not in os.environ:
            env["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // self.workers))
        command = [*self.command, *flags, *xp.argv]
        try:
            self.running[xp.sig] = Worker(xp, command, self.cwd, env)
        except BlockingIOError:
            print(f"Run {xp.sig} is training in another process: left alone", flush=True)
            self.grid.states[xp.sig] = "ELSEWHERE"
            self.free += self.used.pop(xp.sig, [])
        except OSError as error:
            print(f"Run {xp.sig} can't be started: {error}", flush=True)
            self.grid.states[xp.sig] = "FAILED"
            self.free += self.used.pop(xp.sig, [])
        else:
            self.grid.states[xp.sig] = "RUNNING"

    def _collect(self) -> None:
        """Take note of the runs that ended."""
        for sig, worker in list(self.running.items()):
            if (code := worker.process.poll()) is None:
                continue
            del self.running[sig]
            self.free += self.used.pop(sig, [])
            self.grid.states[sig] = "FAILED" if code else "COMPLETED"
            if code:
                print(f"\nRun {sig} failed, see {worker.log}:\n{worker.tail()}", flush=True)
            else:
                worker.complete()

    def _stop(self) -> None:
        """Ask all runs to stop between two steps; after a while, or if asked again, kill them."""
        deadline = time.monotonic() + GRACE
        try:
            for worker in self.running.values():
                worker.stop(signal.SIGTERM)
            with suppress(OSError):  # the terminal may be gone
                print(f"\nStopping {len(self.running)} runs; once more kills them.", flush=True)
            while any(worker.process.poll() is None for worker in self.running.values()):
                if time.monotonic() > deadline:
                    raise KeyboardInterrupt
                time.sleep(0.1)
        except KeyboardInterrupt:
            for worker in self.running.values():
                worker.stop(signal.SIGKILL)


def gpus_here() -> list[str]:
    """Return the names of the GPUs that this process may use."""
    if not torch.cuda.is_available():
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Run a Dora grid on this machine, without Slurm.")
    parser.add_argument("grid", help="name of a file in grids/, without .py")
    parser.add_argument("--workers", type=int, help="runs at a time; one a GPU, or one a CPU core")
    parser.add_argument("--interval", type=float, default=60, help="seconds between tables")
    parser.add_argument("--dry-run", action="store_true", help="show the runs, start none")
    parser.add_argument("--json", action="store_true", help="print the runs at the end, as JSON")
    args = parser.parse_args(argv)
    if args.workers is not None and args.workers < 1:
        sys.exit(f"sweep: --workers must be at least 1, not {args.workers}")
    return args


def prepare(args: argparse.Namespace) -> Sweep:
    """Return the sweep of a command line; exit if the GPUs here do not suffice."""
    package = (__package__ or "").rpartition(".")[0]
    train = importlib.import_module(f"{package}.train")
    grid, gpus = Grid(train.main, args.grid), gpus_here()
    if (most := max(grid.processes.values(), default=0)) > len(gpus) > 0:
        sys.exit(f"sweep: a run of {args.grid} wants {most} GPUs, and there are {len(gpus)} here")
    workers = args.workers or len(gpus) or os.cpu_count() or 1
    command = [sys.executable, "-m", "dora", "-P", package, "run"]
    repo = Path(train.__file__ or "").resolve().parent.parent
    return Sweep(grid, command, repo, workers, gpus, args.interval)


def follow(sweep: Sweep, dry_run: bool) -> int:
    """Run a sweep, or only show it; return the exit status."""
    if dry_run:
        sweep.incomplete()
        sweep.show()
        return 0
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: no run is to train unseen
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under `nohup`
            signal.signal(number, signal.default_int_handler)
    try:
        return 0 if sweep.run() else 1
    except KeyboardInterrupt:
        print("Stopped. The same command resumes.")
        return 130


def main(argv: Sequence[str] | None = None) -> None:
    """Run the grid; see the head of this file."""
    args = parse(argv)
    escape_output()
    with redirect_stdout(sys.stderr) if args.json else nullcontext():
        sweep = prepare(args)
        code = follow(sweep, args.dry_run)
    if args.json:
        print(json.dumps(sweep.grid.summary(), indent=2))
    sys.exit(code)


if __name__ == "__main__":
    main()
