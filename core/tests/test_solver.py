"""The solver: epochs, stages, commits; and that a stopped run ends like one that was not."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from .. import BaseSolver, averager, checkpoint
from ..state import seed_everything

CORE = Path(__file__).parent.parent


class Solver(BaseSolver):
    def __init__(self, folder: Path, epochs: int = 4) -> None:
        super().__init__(folder)
        self.epochs = epochs
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.optim = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.register_stateful("model", "optim")

    def run(self) -> None:
        self.restore()
        while self.epoch <= self.epochs:
            self.run_stage("train", self.train)
            self.commit()

    def train(self) -> dict[str, Any]:
        average = averager()
        steps = self.log_progress("train", range(5))
        for _ in steps:
            loss = self.model(torch.randn(3, 4)).pow(2).mean()
            self.optim.zero_grad()
            loss.backward()
            self.optim.step()
            metrics = average({"loss": loss})
            steps.update(**metrics)
        return metrics


def losses(solver: BaseSolver) -> list[float]:
    return [epoch["train"]["loss"] for epoch in solver.history]


def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path: Path) -> None:
    seed_everything(0)
    whole = Solver(tmp_path / "whole")
    whole.run()
    seed_everything(0)
    Solver(tmp_path / "parts", epochs=2).run()
    torch.randn(7)
    resumed = Solver(tmp_path / "parts")
    resumed.run()
    assert losses(resumed) == losses(whole)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert json.loads((tmp_path / "parts" / "history.json").read_text()) == resumed.history


def test_a_commit_that_fails_does_not_advance(tmp_path: Path, monkeypatch: Any) -> None:
    solver = Solver(tmp_path)
    solver.run_stage("train", solver.train)

    def full(*_: Any) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save", full)
        with pytest.raises(OSError, match="disk full"):
            solver.commit()
    assert (solver.epoch, solver.history) == (1, [])
    assert not (tmp_path / "history.json").exists()
    solver.commit()
    assert solver.epoch == 2
    solver.run_stage("train", solver.train)
    solver.commit(save_checkpoint=False)
    again = Solver(tmp_path)
    assert again.restore()
    assert again.epoch == 2
    assert len(json.loads((tmp_path / "history.json").read_text())) == 1


def test_stages(tmp_path: Path) -> None:
    solver = Solver(tmp_path)
    mine = {"a": np.float32(1), "b": torch.tensor(2), "c": 3}
    returned = solver.run_stage("valid", lambda: mine)
    assert returned.pop("duration") >= 0
    assert returned == {"a": 1.0, "b": 2, "c": 3}
    assert sorted(mine) == ["a", "b", "c"]
    assert list(solver.run_stage("empty", lambda: None)) == ["duration"]
    assert solver.run_stage("named", lambda: {"ok": solver.current_stage == "named"})["ok"]
    with pytest.raises(RuntimeError, match="no stage"):
        _ = solver.current_stage
    with pytest.raises(RuntimeError, match="'inner' was started inside of stage 'outer'"):
        solver.run_stage("outer", solver.run_stage, "inner", dict)
    solver.commit()
    assert json.loads((tmp_path / "history.json").read_text())[0]["valid"]["b"] == 2


def test_reading_leaves_everything_alone(tmp_path: Path) -> None:
    Solver(tmp_path, epochs=2).run()
    (tmp_path / "history.json").unlink()
    before = torch.get_rng_state()
    solver = Solver(tmp_path)
    torch.set_rng_state(before)
    assert solver.restore(read_only=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(solver.history) == 2
    assert not (tmp_path / "history.json").exists()


def test_unknown_tracker_and_missing_run(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="'tensorbord'"):
        Solver(tmp_path).init_trackers(["tensorbord"])
    with pytest.raises(NotImplementedError):
        BaseSolver(tmp_path).run()
    with pytest.raises(RuntimeError, match="dora run"):
        BaseSolver()


class Deep(Solver):
    """What subclasses in the wild override."""

    def commit(self, save_checkpoint: bool = True) -> None:
        self.history.append(self._pending_metrics)
        if save_checkpoint:
            checkpoint.save(self.state_dict(), self.checkpoint_path(self.epoch - 1))
        self._start_epoch()
        self.xp.link.update_history(self.history)

    def checkpoint_path(self, epoch: int) -> Path:  # type: ignore[override]
        return self.folder / f"checkpoint_{epoch}.th"

    def restore(self, strict: bool = True, read_only: bool = False) -> bool:
        for epoch, stages in enumerate(self.history):
            for stage, metrics in stages.items():
                self.result_logger._log_summary(
                    stage, metrics, step=epoch + 1, step_name="epoch", formatter=self.formatter
                )
        return False


def test_a_deep_subclass_runs_unchanged(tmp_path: Path) -> None:
    solver = Deep(tmp_path, epochs=2)
    solver.run()
    assert {"history", "model", "optim", "xp.cfg", "xp.sig"} <= set(solver.stateful.sources)
    assert (tmp_path / "checkpoint_2.th").exists()
    assert solver.xp.link.history == solver.history


def test_imports_go_downwards_and_dora_is_in_one_file() -> None:
    floors = [
        ["report", "sweep"],
        ["solver"],
        ["logging", "loader", "adversarial"],
        ["checkpoint", "trackers"],
        ["state"],
        ["distrib"],
        ["xp"],
        ["formatter", "utils"],
    ]
    height = {name: -floor for floor, names in enumerate(floors) for name in names}
    for path in [*CORE.glob("*.py"), *CORE.glob("trackers/*.py")]:
        if path.parent == CORE and path.name == "__init__.py":
            continue
        me = "trackers" if path.parent != CORE else path.stem
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                if node.level == 1 and me == "trackers":
                    continue
                for name in (
                    [node.module.split(".")[0]] if node.module else [a.name for a in node.names]
                ):
                    assert height[name] < height[me], f"{path.name} imports {name}"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                modules = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                if any(m.split(".")[0] == "dora" for m in modules):
                    assert path.name == "xp.py"


def test_heavy_packages_are_imported_when_used() -> None:
    code = f"import sys, {CORE.name}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.check_output(command, text=True, cwd=CORE.parent).split()
    assert "torch" in loaded
    assert not {"dora", "hydra", "wandb", "tensorboard", "PIL"} & set(loaded)
