"""Every example, and every tracker: installed, checked, tested, killed and resumed, spread, swept.

An example is the same code with every tracker (see test_render.py), so trackers only have to write.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

from .commands import Command, run
from .conftest import ROOT, Copy
from .faults import load, same
from .gate import Gate

QUESTIONS = json.loads((ROOT / "cookiecutter.json").read_text())
# Epochs as short as they can be.
SHORT = {
    "digits": ["debug=limit"],
    "basic": [],
    "text": ["debug=limit", "data.updates_per_epoch=5", "sample.length=9"],
    "adversarial": ["debug=limit"],
}
FILES = {"tensorboard": {"tensorboard"}, "wandb": {"wandb"}, "both": {"tensorboard", "wandb"}}
GRID = """
from .lr import explorer as columns


@type(columns)
def explorer(launcher):
    launcher.bind_(["epochs=3", *{overrides}])
    for seed in (2, 3):
        launcher({{"seed": seed}})
"""


@pytest.fixture(params=QUESTIONS["example"])
def example(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def project(example: str, copy: Copy, tmp_path: Path) -> Path:
    return copy(tmp_path, example=example, tracker="both")


def only_run(project: Path, outputs: str = "outputs") -> Path:
    [folder] = (project / outputs / "xps").iterdir()
    return folder


def epochs(folder: Path) -> int:
    return len(json.loads((folder / "history.json").read_text()))


def test_it_is_installed_with_what_it_needs(project: Path, tmp_path: Path) -> None:
    """In an environment of its own, whose packages are ours: so nothing is to be downloaded."""
    venv.create(tmp_path / "venv", symlinks=True)
    [site] = tmp_path.glob("venv/lib/*/site-packages")
    (site / "ours.pth").write_text(sysconfig.get_path("purelib"))
    python = tmp_path / "venv" / "bin" / "python"
    install = ["-m", "pip", "install", "--quiet", "--no-index", "--no-build-isolation"]
    for command in ([*install, "-e", ".[dev]"], ["-m", "pip", "check"]):
        subprocess.run([python, *command], cwd=project, check=True)
    subprocess.run([python, "-c", "import my_research.train"], cwd=tmp_path, check=True)


def test_own_rules_hold(project: Path) -> None:
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        run(project, "-m", *command)


@pytest.mark.promise
def test_own_tests_pass(example: str, project: Path) -> None:
    if example == "basic":  # the tools are of use, not needed
        shutil.rmtree(project / "my_research" / "tools")
    run(project, "-m", "pytest", "-q", "tests")


@pytest.mark.promise
def test_killed_resumed_and_loaded(example: str, project: Path) -> None:
    gate = Gate(project)
    train = ["-m", "dora", "run", "epochs=3", "trackers=[]", *SHORT[example]]
    killed = Command(project, *train)
    killed.until(lambda: gate.reached() and list(project.glob("outputs/xps/*/history.json")))
    killed.send(signal.SIGKILL)
    killed.finish(-signal.SIGKILL)
    folder = only_run(project)
    assert epochs(folder) == 1
    gate.open()
    assert "resumes in epoch 2:" in run(project, *train)
    # Started afresh: a fork would have, with the others, the same seed of hashes.
    env = os.environ | {"MY_RESEARCH_DIR": "whole"}
    subprocess.run([sys.executable, *train], cwd=project, env=env, check=True)
    states = [load(run / "checkpoint.th") for run in (folder, only_run(project, "whole"))]
    assert same(*states)

    ask = f"from my_research.train import load_solver as load; print(len(load('{folder.name}')."
    assert "3 epochs" in run(project, "-c", f"{ask}history), 'epochs')")


@pytest.mark.parametrize("tracker", QUESTIONS["tracker"])
def test_trackers_write(tracker: str, copy: Copy, tmp_path: Path) -> None:
    project = copy(tmp_path, example="basic", tracker=tracker)
    run(project, "-m", "dora", "run", "epochs=1", env=os.environ | {"WANDB_MODE": "offline"})
    written = {path.name for path in only_run(project).iterdir()}
    assert FILES.get(tracker, set()) == {"tensorboard", "wandb"} & written
    assert "metrics.jsonl" in written


def test_spread_over_processes_and_swept(example: str, project: Path) -> None:
    train = ["-m", "dora", "run", "epochs=3", "trackers=[]", *SHORT[example]]
    run(project, *train, "-d", "--ddp_workers=2")
    folder = only_run(project)
    assert epochs(folder) == 3
    assert (folder / "solver.log.1").exists()

    grid = GRID.format(overrides=["trackers=[]", *SHORT[example]])
    (project / "my_research" / "grids" / "seeds.py").write_text(grid)
    said = run(project, "-m", "my_research.tools.sweep", "seeds", "--workers", "1")
    assert said.split("\n\n")[-1].count(" COMPLETED ") == 2
    assert [epochs(path) for path in folder.parent.iterdir()] == [3, 3, 3]
