"""How long an import and the start of a run take: `python -m bench.startup`."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from . import harness
from .harness import OURS, Row, Section, Spread, compare, interleave, render

IMPORT_TARGET = 100.0  # milliseconds
START_TARGET = 2.0  # times `import torch`
IMPORTS = {
    OURS: "my_research.core",
    "Flashy": "flashy",
    "ignite": "ignite.engine, ignite.metrics, ignite.handlers",
    "Fabric": "lightning_fabric",
    "Accelerate": "accelerate",
    "Lightning": "lightning",
}
IMPORT = """
import time
begin = time.process_time()
import torch
torch_done = time.process_time()
import {}
print(torch_done - begin, time.process_time() - torch_done)
"""
STEP = re.compile(rb"Train \| .*\| \d+/\d+ \|")  # the progress line of a step
RUN = ("-m", "dora", "run", "log_updates=1000")  # a line for each step
IMPORTED = re.compile(r"import time:\s+(\d+) \|\s+\d+ \| (\s*)(\S+)")

PLAIN = """
import torch
model = torch.nn.Linear(64, 10)
optim = torch.optim.AdamW(model.parameters())
model(torch.randn(64, 64)).square().mean().backward()
optim.step()
"""
EMPTY_MAIN = """
from dora import hydra_main

@hydra_main(config_path="config", config_name="config", version_base="1.3")
def main(cfg):
    pass

if __name__ == "__main__":
    main()
"""


class Import:
    """What an import adds to that of torch, in a process of its own."""

    def __init__(self, modules: str, project: Path) -> None:
        self.code, self.project = IMPORT.format(modules), project
        self.torch: list[float] = []

    def __call__(self) -> float:
        """Seconds of CPU time."""
        command = [sys.executable, "-c", self.code]
        done = subprocess.run(command, cwd=self.project, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr.strip().splitlines()[-1])
        torch, above = map(float, done.stdout.split())
        self.torch.append(torch)
        return above


def imports(project: Path, rounds: int) -> Section:
    """Ours and the peers'."""
    ways = {name: Import(modules, project) for name, modules in IMPORTS.items()}
    times, failed = interleave(ways, rounds, warmup=0 if rounds == 1 else 1)
    torch = Spread.of([t for way in ways.values() for t in way.torch]).times(1e3)
    rows = [Row("`import torch`", torch)]
    for name, taken in times.items():
        beside = f"`import {IMPORTS[name].split(',')[0]}`"
        target = IMPORT_TARGET if name == OURS else None
        rows.append(Row(name, Spread.of([*taken.values()]).times(1e3), target=target, note=beside))
    rows += [Row(name, note=why) for name, why in failed.items()]
    about = f"In new processes, their bytecode compiled before; CPU time; {rounds} rounds."
    heading = "ms above `import torch`", ".0f"
    return Section("Import", about, heading, ("", ""), rows, plot="Import")


# ---------------------------------------------------------------------------------- start of a run


def process(project: Path, *command: str) -> Callable[[], float]:
    """Seconds that a command takes."""

    def run() -> float:
        begin = time.perf_counter()
        done = subprocess.run([sys.executable, *command], cwd=project, capture_output=True)
        if done.returncode:
            raise RuntimeError(done.stderr.decode().strip().splitlines()[-1])
        return time.perf_counter() - begin

    return run


def first_step(
    project: Path, *options: str, log: Path | None = None, before: Path | None = None
) -> float:
    """Seconds from `dora run` to the progress line of the first step; the run is then killed.

    Args:
        project: where to run.
        options: of Python.
        log: file for the lines until then.
        before: folder of runs, of which one resumes.
    """
    with tempfile.TemporaryDirectory() as folder:
        if before is not None:
            shutil.copytree(before, folder, dirs_exist_ok=True)
        env = {**os.environ, "MY_RESEARCH_DIR": folder}
        begin = time.perf_counter()
        run = subprocess.Popen(
            [sys.executable, *options, *RUN], cwd=project, env=env, stderr=subprocess.PIPE
        )
        assert run.stderr is not None
        lines = []
        for line in run.stderr:
            lines.append(line)
            if STEP.search(line):
                break
        taken = time.perf_counter() - begin
        run.kill()
        rest = run.communicate()[1]
    if log is not None:
        log.write_bytes(b"".join(lines))
    if not lines or not STEP.search(lines[-1]):
        raise RuntimeError(f"no step was done: {(lines or [rest])[-1].decode().strip()}")
    return taken


def stopped_run(project: Path, folder: Path) -> Path:
    """A folder of runs, with one that was stopped within its second epoch."""
    env = {**os.environ, "MY_RESEARCH_DIR": str(folder)}
    run = subprocess.Popen(
        [sys.executable, *RUN], cwd=project, env=env, stderr=subprocess.PIPE, text=True
    )
    assert run.stderr is not None
    last = ""
    for last in run.stderr:
        if "Train | Epoch 2 | 5/" in last:
            break
    run.terminate()
    run.communicate()
    if run.returncode != 130:
        raise RuntimeError(f"the run was not stopped: {last.strip()}")
    return folder


def empty_run(folder: Path) -> Callable[[], float]:
    """Seconds of a Dora run that does nothing."""
    package = folder / "empty" / "empty"
    (package / "config").mkdir(parents=True)
    (package / "config" / "config.yaml").write_text(f"dora:\n  dir: {folder}/outputs\n")
    (package / "__init__.py").touch()
    (package / "train.py").write_text(EMPTY_MAIN)
    return process(package.parent, "-m", "dora", "-P", "empty", "run")


def starts(project: Path, folder: Path, rounds: int) -> Section:
    """From the shell to the first step, by parts that add up."""
    base = "`import torch`"
    ours = f"{OURS}: `dora run` to the first step"
    resumed = f"{OURS}: the same, resumed within an epoch"
    before = stopped_run(project, folder / "stopped")
    ways: dict[str, Callable[[], float]] = {
        base: process(project, "-c", "import torch"),
        "and the core": process(project, "-c", "import my_research.core"),
        "and the project, its config composed": process(project, "-c", "import my_research.train"),
        "torch alone, to a first step": process(project, "-c", PLAIN),
        "an empty `dora run`": empty_run(folder),
        ours: lambda: first_step(project),
        resumed: lambda: first_step(project, before=before),
    }
    times, failed = interleave(ways, rounds, warmup=0)
    rows = compare(
        times, failed, base, 1.0, ratio=True, targets=dict.fromkeys((ours, resumed), START_TARGET)
    )
    about = (
        f"Whole processes, of the digits project; {rounds} rounds. Torch alone takes so long, for "
        "the first optimizer imports `torch._dynamo`."
    )
    taken, compared = ("s", ".2f"), (f"times {base}", ".2f")
    return Section("From the shell to the first step", about, taken, compared, rows)


def where(project: Path, folder: Path) -> Section:
    """What is imported before the first step, by package, as Python counts it."""
    log = folder / "imports"
    taken = first_step(project, "-X", "importtime", log=log)
    packages: dict[str, float] = {}
    for micros, _, module in IMPORTED.findall(log.read_text(errors="replace")):
        top = module.partition(".")[0]
        packages[top] = packages.get(top, 0.0) + int(micros) / 1e3
    ranked = sorted(packages.items(), key=lambda item: -item[1])
    rows = [Row(name, Spread.of([taken])) for name, taken in ranked[:12]]
    rows.append(Row("all others", Spread.of([sum(taken for _, taken in ranked[12:])])))
    rest = taken * 1e3 - sum(packages.values())
    rows.append(Row("what is not import", Spread.of([rest])))
    about = (
        "One run under `python -X importtime`, which makes it slower: the time of each package's "
        "modules, without what they import in turn."
    )
    return Section("Where the start goes", about, ("ms", ".0f"), ("", ""), rows)


def measure(quick: bool = False) -> Iterator[Section]:
    """Imports, and the start of a run."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        project = render(folder)
        rounds = 1 if quick else 4
        yield imports(project, rounds)
        yield starts(project, folder, rounds)
        yield where(project, folder)


if __name__ == "__main__":
    harness.main(measure)
