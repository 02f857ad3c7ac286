"""Trains for real: through an interruption, on two processes, from the shell, and loaded back.

On few batches, so that it takes seconds.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from {{ cookiecutter.package_name }}.solver import Solver
from {{ cookiecutter.package_name }}.train import load_solver, main

from .helpers import interrupt, make_solver, run, train

QUICK = ["debug=limit", "device=cpu", "trackers=[]"]


def only_history(outputs: Path) -> list[dict[str, Any]]:
    """The history of the only run."""
    [path] = outputs.glob("xps/*/history.json")
    history: list[dict[str, Any]] = json.loads(path.read_text())
    return history


def without_durations(history: list[dict[str, Any]]) -> list[Any]:
    return [{n: {**stage, "duration": 0} for n, stage in epoch.items()} for epoch in history]


def test_a_killed_run_ends_like_one_that_was_not(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "debug=limit", "epochs=3")

    interrupt(make_solver(tmp_path / "killed", "debug=limit", "epochs=3"), epoch=2)
    resumed = train(tmp_path / "killed", "debug=limit", "epochs=3")
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)
    assert without_durations(resumed.history) == without_durations(whole.history)


def test_two_processes_train_one_run_which_one_then_finds_complete(tmp_path: Path) -> None:
    run("-m", "dora", "run", "-d", "--ddp_workers=2", *QUICK, outputs=tmp_path)
    history = only_history(tmp_path)
    assert len(history) >= 2
    assert "is complete" in run("-m", "dora", "run", *QUICK, outputs=tmp_path)
    assert only_history(tmp_path) == history


def test_a_run_is_loaded_by_its_signature(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main.dora, "dir", tmp_path)
    xp = main.get_xp(QUICK)
    main.init_xp(xp)
    solver = Solver(xp.cfg, xp)
    solver.run()
    assert load_solver(xp.sig).history == solver.history
    with pytest.raises(RuntimeError, match="0123abcd"):
        load_solver("0123abcd")
