"""Run a Dora grid on this machine, without Slurm: the grid file is the same as for `dora grid`.

    python -m my_research.core.sweep GRID

Several runs at a time; each is the `dora run` that one would type, and what it says goes to
`sweep.log` in its folder. Started again, it resumes what is not complete, and leaves the rest
alone.
"""

from __future__ import annotations

import argparse
import fcntl
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from .ansi import plain_text
from .lock import RunLock
from .plain import to_plain
from .utils import UserError, write_and_rename
from .xp import GRACE, Grid, config_changes

TAIL = 15  # lines of the log of a run that failed


class Worker:
    """One run, in a process of its own.

    Args:
        xp: the run.
        command: what starts it.
        cwd: where.
        env: what is particular of its environment.

    Raises:
        BlockingIOError: if another `dora run` or sweep trains it.
    """

    def __init__(self, xp: Any, command: list[str], cwd: Path, env: dict[str, str]) -> None:
        self.xp = xp
        self.log = xp.folder / "sweep.log"
        xp.folder.mkdir(parents=True, exist_ok=True)
        if not RunLock(xp).is_free():
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
        """The last lines it wrote."""
        lines = self.log.read_text(errors="replace").splitlines()[-TAIL:]
        return "\n".join(f"    {line}" for line in lines)


class Sweep:
    """All runs of a grid.

    Args:
        grid: the runs.
        command: what starts a run, but for its arguments.
        cwd: where.
        workers: runs at a time.
        gpus: names of the GPUs to share out; none, to train on CPUs.
        interval: seconds between tables, if no state changes.
    """

    def __init__(
        self,
        grid: Grid,
        command: list[str],
        cwd: Path,
        workers: int,
        gpus: list[str],
        interval: float = 60.0,
    ) -> None:
        self.grid = grid
        self.command = command
        self.cwd = cwd
        self.workers = workers
        self.free = list(gpus)
        self.used: dict[str, list[str]] = {}
        self.interval = interval
        self.running: dict[str, Worker] = {}

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
        """The runs that are not complete; the state of the others is set."""
        return [xp for xp in self.grid.runs if not self._is_complete(xp)]

    def show(self) -> None:
        """Print the table."""
        table = self.grid.table()
        print(f"\n{table if sys.stdout.isatty() else plain_text(table)}", flush=True)

    def _is_complete(self, xp: Any) -> bool:
        """Has it ended well, with this config, and was not cleared since?"""
        end = _read(xp.folder / "sweep.json", {"epochs": math.inf})
        changes = config_changes(xp, end.get("config", {}))
        history = _read(xp.folder / "history.json", [])
        done: bool = end["epochs"] <= len(history) and not any(changes.values())
        if done:
            self.grid.states[xp.sig] = "COMPLETED"
        return done

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
                continue
            history = _read(worker.xp.folder / "history.json", [])
            with write_and_rename(worker.xp.folder / "sweep.json", "w") as file:
                json.dump({"epochs": len(history), "config": to_plain(worker.xp.cfg)}, file)

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


def _read(path: Path, default: Any) -> Any:
    """What a JSON file holds; the default if there is none, or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return default


def main(argv: Iterable[str] | None = None) -> None:
    """Run the grid; see the head of this file."""
    parser = argparse.ArgumentParser(description="Run a Dora grid on this machine, without Slurm.")
    parser.add_argument("grid", help="name of a file in grids/, without .py")
    parser.add_argument("--workers", type=int, help="runs at a time; one a GPU, or one a CPU core")
    parser.add_argument("--interval", type=float, default=60, help="seconds between tables")
    parser.add_argument("--dry-run", action="store_true", help="show the runs, start none")
    args = parser.parse_args(None if argv is None else list(argv))
    if args.workers is not None and args.workers < 1:
        sys.exit(f"sweep: --workers must be at least 1, not {args.workers}")
    package = __package__.rpartition(".")[0]
    train = importlib.import_module(f"{package}.train")
    try:
        grid = Grid(train.main, args.grid)
    except UserError as error:
        sys.exit(f"sweep: {error}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    gpus = visible.split(",") if visible else list(map(str, range(torch.cuda.device_count())))
    gpus = gpus if torch.cuda.is_available() else []
    if (most := max(grid.processes.values(), default=0)) > len(gpus) > 0:
        sys.exit(f"sweep: a run of {args.grid} wants {most} GPUs, and there are {len(gpus)} here")
    workers = args.workers or len(gpus) or os.cpu_count() or 1
    command = [sys.executable, "-m", "dora", "-P", package, "run"]
    repo = Path(train.__file__ or "").resolve().parent.parent
    sweep = Sweep(grid, command, repo, workers, gpus, args.interval)
    if args.dry_run:
        sweep.incomplete()
        sweep.show()
        return
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: no run is to train unseen
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under `nohup`
            signal.signal(number, signal.default_int_handler)
    try:
        complete = sweep.run()
    except KeyboardInterrupt:
        print("Stopped. The same command resumes.")
        sys.exit(130)
    sys.exit(0 if complete else 1)


if __name__ == "__main__":
    main()
