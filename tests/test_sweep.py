"""Sweep over a grid in a rendered project, without Slurm."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import Render

GRID = """
from {package}.grids.lr import {explorer} as Columns


@Columns
def explorer(launcher):
    launcher.bind_({{"epochs": 60, "trackers": []}})
    for lr in ({rates}):
        launcher({{"optim.lr": lr}})
"""


@pytest.fixture
def project(render: Render, tmp_path: Path) -> Path:
    assert render().returncode == 0
    return tmp_path / "out" / "my-research"


def add_grid(project: Path, name: str, rates: str) -> None:
    text = GRID.format(package="my_research", explorer="Digits", rates=rates)
    (project / "my_research" / "grids" / f"{name}.py").write_text(text)


def start(project: Path, *args: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "my_research.core.sweep", *args],
        cwd=project,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # As from a terminal: started in the background, it would ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )


def finish(process: subprocess.Popen[str], code: int) -> str:
    said, _ = process.communicate(timeout=240)
    assert process.returncode == code, said
    return said


def epochs(project: Path) -> list[int]:
    paths = sorted(project.glob("outputs/xps/*/history.json"))
    return [len(json.loads(path.read_text())) for path in paths]


def started(project: Path) -> int:
    logs = project.glob("outputs/xps/*/solver.log.0")
    return sum(log.read_text().count(" starts with epoch ") for log in logs)


@pytest.mark.timeout(600)
def test_a_sweep_is_stopped_resumed_and_then_left_alone(project: Path) -> None:
    add_grid(project, "three", "1e-3, 3e-3, 1e-2")
    assert finish(start(project, "three", "--dry-run"), 0).count(" PEN ") == 3
    assert not (project / "outputs" / "xps").exists()

    sweep = start(project, "three", "--workers", "2")
    while len(epochs(project)) < 2:
        assert sweep.poll() is None
        time.sleep(0.05)
    sweep.send_signal(signal.SIGINT)
    said = finish(sweep, 130)
    assert "Stopping 2 runs" in said
    assert "The same command goes on" in said
    assert not re.search(r"\x1b|Traceback", said)
    assert list(project.glob("outputs/xps/*/midway.th")), "no run stopped behind a step"
    assert started(project) == 2

    said = finish(start(project, "three", "--workers", "2"), 0)
    assert said.split("\n\n")[-1].count(" COM ") == 3
    assert epochs(project) == [60, 60, 60]
    count = started(project)
    begin = time.monotonic()
    assert finish(start(project, "three"), 0).count(" COM ") == 3
    assert time.monotonic() - begin < 30
    assert started(project) == count


def test_a_failure_shows_the_end_of_its_log(project: Path) -> None:
    add_grid(project, "bad", "-1.0,")
    said = finish(start(project, "bad"), 1)
    assert "Invalid learning rate: -1.0" in said
    assert " FAI " in said
    assert "sweep.log" in said


def test_an_unknown_grid_is_named(project: Path) -> None:
    said = finish(start(project, "lrr"), 1)
    assert said.startswith("sweep: no grid lrr in ")
    assert said.endswith("; there are lr\n")


def test_without_slurm_dora_names_the_other_way(project: Path) -> None:
    env = os.environ | {"PATH": str(Path(sys.executable).parent)}
    for command in (["grid", "lr"], ["launch"]):
        done = subprocess.run(
            [sys.executable, "-m", "dora", *command],
            cwd=project,
            env=env,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 1
        assert "core.sweep GRID" in done.stderr
        assert "Traceback" not in done.stderr
