"""What the tests share: a solver to train here, and commands run as from a shell."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from {{ cookiecutter.package_name }}.core.rng import seed_everything
from {{ cookiecutter.package_name }}.core.run import FolderXP
from {{ cookiecutter.package_name }}.core.stop import Stopped
from {{ cookiecutter.package_name }}.solver import Solver
from {{ cookiecutter.package_name }}.train import main

REPO = Path(__file__).parent.parent


def make_solver(folder: Path, *overrides: str) -> Solver:
    """A freshly seeded solver, on the CPU and without trackers, whose run is the folder."""
    cfg = main.get_xp(["device=cpu", "trackers=[]", *overrides]).cfg
    seed_everything(cfg.seed)
    return Solver(cfg, FolderXP(folder, cfg))


def train(folder: Path, *overrides: str) -> Solver:
    """Such a solver, after its run."""
    solver = make_solver(folder, *overrides)
    solver.run()
    return solver


def interrupt(solver: Solver, epoch: int, ask: bool) -> None:
    """Run, and stop in an epoch: asked to, after its first step; else at once, after a stage."""
    run_stage = Solver.run_stage

    def interrupted(solver: Solver, *args: Any, **kwargs: Any) -> dict[str, Any]:
        if ask and solver.epoch == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
        metrics = run_stage(solver, *args, **kwargs)
        if solver.epoch == epoch:
            raise KeyboardInterrupt
        return metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Solver, "run_stage", interrupted)
        with pytest.raises(Stopped if ask else KeyboardInterrupt):
            solver.run()
    assert len(solver.history) == epoch - 1


def run(*args: str, outputs: Path, code: int = 0) -> str:
    """Run Python in a process of its own; return what it says."""
    env = os.environ | {"{{ cookiecutter.package_name | upper }}_DIR": str(outputs), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *args], cwd=REPO, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done.stderr
