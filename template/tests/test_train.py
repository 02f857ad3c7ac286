"""Trains for real: through an interruption, on two processes, from the shell, and loaded back.

On few batches, so that it takes seconds.
"""

import json
import re
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


def without_times(history: list[dict[str, Any]]) -> list[Any]:
    """The history, but for metrics of speed: add yours."""
    left_out = re.compile("duration|.*_per_second")
    return [
        {n: {k: v for k, v in stage.items() if not left_out.fullmatch(k)} for n, stage in e.items()}
        for e in history
    ]


@pytest.mark.parametrize("ask", [True, False], ids=["asked_to_stop", "killed"])
def test_a_resumed_run_ends_like_one_that_was_not_stopped(ask: bool, tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "debug=limit", "epochs=3")

    interrupt(make_solver(tmp_path / "stopped", "debug=limit", "epochs=3"), epoch=2, ask=ask)
    resumed = train(tmp_path / "stopped", "debug=limit", "epochs=3")
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], value, rtol=0, atol=0)
    assert without_times(resumed.history) == without_times(whole.history)


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
