"""Trains for real: through a config, through an interruption, on two processes, from the shell."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from {{ cookiecutter.package_name }}.core.state import seed_everything
from {{ cookiecutter.package_name }}.core.xp import FolderXP
from {{ cookiecutter.package_name }}.solver import Solver
from {{ cookiecutter.package_name }}.train import load_solver, main

REPO = Path(__file__).parent.parent


def make_solver(folder: Path, *overrides: str) -> Solver:
    """A freshly seeded solver, on CPU, whose run is the folder."""
    cfg = main.get_xp(["epochs=3", "device=cpu", "trackers=[]", *overrides]).cfg
    seed_everything(cfg.seed)
    return Solver(cfg, FolderXP(folder))


def dora(*args: str, outputs: Path, code: int = 0) -> str:
    """Run a Dora command in a process of its own; return what it says."""
    env = os.environ | {"{{ cookiecutter.package_name | upper }}_DIR": str(outputs), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "dora", *args], cwd=REPO, env=env, capture_output=True, text=True
    )
    assert done.returncode == code, done.stderr
    return done.stderr


def only_history(outputs: Path) -> list[dict[str, Any]]:
    """The history of the only run."""
    [path] = outputs.glob("xps/*/history.json")
    history: list[dict[str, Any]] = json.loads(path.read_text())
    return history


def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole = make_solver(tmp_path / "whole")
    whole.run()

    killed = make_solver(tmp_path / "killed")
    with pytest.MonkeyPatch.context() as patch:

        def valid() -> None:
            if killed.epoch == 2:
                raise KeyboardInterrupt
            return Solver.valid(killed)  # type: ignore[return-value]

        patch.setattr(killed, "valid", valid)
        with pytest.raises(KeyboardInterrupt):
            killed.run()
    assert len(killed.history) == 1

    resumed = make_solver(tmp_path / "killed")
    resumed.run()
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)
    losses = [[epoch["valid"]["loss"] for epoch in s.history] for s in (whole, resumed)]
    assert losses[0] == losses[1]


def test_the_same_command_goes_on_and_then_is_complete(tmp_path: Path) -> None:
    command = ["run", "epochs=2", "device=cpu", "trackers=[]"]
    dora(*command, outputs=tmp_path)
    assert len(only_history(tmp_path)) == 2
    assert "is complete" in dora(*command, outputs=tmp_path)
    assert len(only_history(tmp_path)) == 2


def test_two_processes_train_one_run(tmp_path: Path) -> None:
    dora("run", "-d", "--ddp_workers=2", "epochs=2", "device=cpu", "trackers=[]", outputs=tmp_path)
    assert [sorted(epoch) for epoch in only_history(tmp_path)] == [["train", "valid"]] * 2


def test_a_run_is_loaded_by_its_signature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.dora, "dir", tmp_path)
    xp = main.get_xp(["epochs=1", "device=cpu", "trackers=[]"])
    main.init_xp(xp)
    Solver(xp.cfg, xp).run()
    loaded = load_solver(xp.sig)
    assert len(loaded.history) == 1
    with pytest.raises(RuntimeError, match="0123abcd"):
        load_solver("0123abcd")


@pytest.mark.parametrize("override", ["optim.lrr=1", "optim.lr=abc", "epochs=2.5"])
def test_a_wrong_override_is_refused_in_one_line(override: str, tmp_path: Path) -> None:
    said = dora("run", override, outputs=tmp_path, code=1)
    assert override.split("=")[0] in said
    assert len(said.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
