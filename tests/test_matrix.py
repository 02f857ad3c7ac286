"""Every example with every tracker is killed and resumed: `nox -s matrix`, which installs them all.

Each project in the folder that `MATRIX` names is called `<example>-<tracker>`.
"""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from .conftest import ROOT

if "MATRIX" not in os.environ:
    pytest.skip("only under `nox -s matrix`", allow_module_level=True)

QUESTIONS = json.loads((ROOT / "cookiecutter.json").read_text())
COMBINATIONS = [f"{e}-{t}" for e, t in product(QUESTIONS["example"], QUESTIONS["tracker"])]
# Long enough to be killed on the way.
SHORT = {
    "digits": ["epochs=8"],
    "basic": ["epochs=100"],
    "text": ["epochs=6", "data.updates_per_epoch=5", "data.limit=2", "sample.length=9"],
    "adversarial": ["epochs=30"],
}
FILES = {"tensorboard": {"tensorboard"}, "wandb": {"wandb"}, "both": {"tensorboard", "wandb"}}
GRID = """
from .lr import explorer as columns


@type(columns)
def explorer(launcher):
    launcher.bind_({overrides})
    for seed in (2, 3):
        launcher({{"seed": seed}})
"""


class Project:
    """A rendered project, and the runs in a folder."""

    def __init__(self, name: str, outputs: Path) -> None:
        self.folder = Path(os.environ["MATRIX"], name)
        self.package = name.replace("-", "_")
        self.overrides = SHORT[name.split("-")[0]]
        self.epochs = int(self.overrides[0].partition("=")[2])
        self.outputs = outputs
        self.env = os.environ | {
            f"{self.package.upper()}_DIR": str(outputs),
            "DORA_PACKAGE": self.package,
            "WANDB_MODE": "offline",
        }

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *command: str) -> str:
        process = self.start(*command)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        return said

    def runs(self) -> list[Path]:
        """The folders of the runs that committed an epoch, by age."""
        found = [path.parent for path in self.outputs.glob("xps/*/history.json")]
        return sorted(found, key=lambda folder: (folder / "solver.log.0").stat().st_ino)


def epochs(run: Path) -> int:
    return len(json.loads((run / "history.json").read_text()))


@pytest.fixture(params=COMBINATIONS[:: len(QUESTIONS["tracker"])])
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Project:
    """Each example with one tracker: with others, its code is the same (see test_render.py)."""
    return Project(request.param, tmp_path)


@pytest.fixture(params=COMBINATIONS)
def project(request: pytest.FixtureRequest, tmp_path: Path) -> Project:
    return Project(request.param, tmp_path)


def test_own_rules_hold(example: Project) -> None:
    for command in (["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"]):
        example.run("-m", *command)


def test_own_tests_pass(example: Project) -> None:
    example.run("-m", "pytest", "-q", "tests")


def test_killed_resumed_and_loaded(project: Project) -> None:
    train = ["-m", "dora", "run", *project.overrides]
    killed = project.start(*train)
    while not project.runs():
        assert killed.poll() is None, killed.communicate()
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    [run] = project.runs()
    assert 0 < (done := epochs(run)) < project.epochs
    assert f"resumes in epoch {done + 1}:" in project.run(*train)
    assert epochs(run) == project.epochs
    tracker = project.folder.name.partition("-")[2]
    assert FILES.get(tracker, set()) == {"tensorboard", "wandb"} & {p.name for p in run.iterdir()}

    load = f"from {project.package}.train import load_solver as load; "
    load += f"print(len(load('{run.name}').history), 'epochs')"
    assert f"{project.epochs} epochs" in project.run("-c", load)


def test_spread_over_processes_and_swept(example: Project) -> None:
    example.run("-m", "dora", "run", "-d", "--ddp_workers=2", *example.overrides)
    [run] = example.runs()
    assert epochs(run) == example.epochs
    assert (run / "solver.log.1").exists()

    overrides = dict(override.split("=") for override in example.overrides)
    grid = GRID.format(overrides={k: int(v) for k, v in overrides.items()})
    package = example.folder / example.package
    (package / "grids" / "seeds.py").write_text(grid)
    said = example.run("-m", f"{example.package}.core.sweep", "seeds", "--workers", "1")
    assert said.split("\n\n")[-1].count(" COM ") == 2
    assert [epochs(path) for path in example.runs()] == [example.epochs] * 3
