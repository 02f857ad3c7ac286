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
from .faults import STARTED

GRID = """
from {package}.grids.lr import {explorer} as Columns


@Columns
def explorer(launcher):
    launcher.bind_({{"epochs": 60, "trackers": []}})
    for lr in ({rates}):
        launcher({{"optim.lr": lr}})
"""

WIDE = "Launcher) -> None:\n    launcher.slurm_(gpus=8)"


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
    return sum(len(STARTED.findall(log.read_text())) for log in logs)


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
    assert "The same command resumes" in said
    assert not re.search(r"\x1b|Traceback", said)
    logs = [path.read_text() for path in project.glob("outputs/xps/*/solver.log.0")]
    assert all("Stopped by SIGTERM after" in log for log in logs)
    assert started(project) == 2

    sweep = start(project, "three", "--workers", "2")
    while started(project) < 4:
        assert sweep.poll() is None
        time.sleep(0.05)
    sweep.send_signal(signal.SIGTERM)
    assert "The same command resumes" in finish(sweep, 130)

    said = finish(start(project, "three", "--workers", "2"), 0)
    assert said.split("\n\n")[-1].count(" COM ") == 3
    assert epochs(project) == [60, 60, 60]
    for path in project.glob("outputs/xps/*/sweep.json"):
        whole = path.read_text()
        path.write_text("{")  # as if a disk had been full
        assert finish(start(project, "three", "--dry-run"), 0).count(" COM ") == 2
        path.write_text(whole)
    count = started(project)
    begin = time.monotonic()
    assert finish(start(project, "three"), 0).count(" COM ") == 3
    assert time.monotonic() - begin < 30
    assert started(project) == count

    config = project / "my_research" / "config" / "config.yaml"
    config.write_text(config.read_text().replace("dropout: 0.2", "dropout: 0.5"))
    said = finish(start(project, "three", "--workers", "2"), 1)
    assert said.split("\n\n")[-1].count(" FAI ") == 3  # as `dora run` would refuse each
    assert "has changed since its last checkpoint: model.dropout: 0.2 -> 0.5" in said


def test_a_run_that_trains_elsewhere_is_left_alone(project: Path) -> None:
    add_grid(project, "one", "1e-3,")
    run = ["run", "optim.lr=1e-3", "epochs=60", "trackers=[]"]
    elsewhere = subprocess.Popen(
        [sys.executable, "-m", "dora", *run], cwd=project, stderr=subprocess.DEVNULL
    )
    while not epochs(project):
        assert elsewhere.poll() is None
        time.sleep(0.05)
    said = finish(start(project, "one"), 1)
    assert "is training in another process: left alone" in said
    assert elsewhere.wait(120) == 0
    assert started(project) == 1
    assert epochs(project) == [60]


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


def test_what_is_wrong_is_said_in_a_line(project: Path) -> None:
    assert finish(start(project, "lr", "--workers=0"), 1).startswith("sweep: --workers must be")
    grids = project / "my_research" / "grids"
    (grids / "empty.py").write_text("")
    assert "empty.py has no `explorer`" in finish(start(project, "empty"), 1)
    slip = (grids / "lr.py").read_text().replace("optim.lr", "optim.lrr")
    (grids / "slip.py").write_text(slip)
    [line] = finish(start(project, "slip"), 1).splitlines()
    assert "did you mean 'optim.lr'?" in line
    wide = slip.replace("optim.lrr", "optim.lr").replace("Launcher) -> None:", WIDE)
    (grids / "wide.py").write_text(wide)
    pretend = "import torch; torch.cuda.is_available = lambda: True; "
    pretend += "torch.cuda.device_count = lambda: 2; from my_research.core import sweep; "
    done = subprocess.run(
        [sys.executable, "-c", f"{pretend}sweep.main(['wide', '--dry-run'])"],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stderr == "sweep: a run of wide wants 8 GPUs, and there are 2 here\n"


def test_a_run_without_an_epoch_is_a_slip(project: Path) -> None:
    add_grid(project, "none", "1e-3,")
    path = project / "my_research" / "grids" / "none.py"
    path.write_text(path.read_text().replace("60", "0"))
    assert "ends without an epoch: is `epochs` at least 1" in finish(start(project, "none"), 1)


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
