"""The solver's further ways, what it says, and the order of the core's modules."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from core import BaseSolver, averager, checkpoint
from core.adversarial import AdversarialLoss
from core.tests.test_solver import Solver, guarded
from core.utils import UserError
from core.weights import EMA, Best

from ..conftest import ROOT

CORE = ROOT / "core"


def test_a_start_is_described(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    solver = Solver(tmp_path)
    solver.xp.cfg = {"optim": {"lr": 0.01}, "path": Path("x")}
    solver.log_start()
    assert f"Config of run {tmp_path.name}:\noptim:\n  lr: 0.01\npath: x" in caplog.text
    assert "model: Sequential, 49 parameters" in caplog.text
    assert f"starts in epoch 1: {tmp_path}" in caplog.text


def test_an_end_tells_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    solver = Solver(tmp_path, epochs=3)
    solver.run()
    solver.log_end()
    assert f"Run {tmp_path.name} is complete after epoch 3: {tmp_path}" in caplog.text
    solver.checkpoints = checkpoint.Policy(best="train.loss")
    losses = [epoch["train"]["loss"] for epoch in solver.history]
    best, at = min(losses), losses.index(min(losses)) + 1
    solver.log_end()
    assert f"epoch 3, best train.loss {best:.3f} in epoch {at}: " in caplog.text


def test_a_resumed_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Solver(tmp_path, epochs=1).run()
    caplog.set_level("INFO")
    solver = Solver(tmp_path)
    solver.restore()
    solver.log_start()
    assert "resumes in epoch 2: " in caplog.text
    assert "Config of run" not in caplog.text


def test_a_key_that_is_new_is_told_and_one_that_is_gone_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guarded(tmp_path).run()
    assert guarded(tmp_path, dropout=0.0).restore()
    assert "The config has changed: dropout: absent -> 0.0" in caplog.text
    guarded(tmp_path / "gone", dropout=0.5).run()
    with pytest.raises(UserError, match=r"checkpoint: dropout: 0\.5 -> absent\."):
        guarded(tmp_path / "gone").restore()


def test_averages_of_a_module_that_has_more_state_than_tensors(tmp_path: Path) -> None:
    class Noted(nn.Linear):
        note = ""

        def get_extra_state(self) -> dict[str, str]:
            return {"note": self.note}

        def set_extra_state(self, state: dict[str, str]) -> None:
            self.note = state["note"]

    def build(name: str, note: str) -> Any:
        solver: Any = BaseSolver(tmp_path / "xps" / name)
        solver.model = Noted(1, 1)
        solver.model.note = note
        solver.model.register_buffer("edges", torch.eye(2).to_sparse())
        solver.ema = EMA({"model": solver.model}, 0.0)
        solver.register_stateful("model", "ema")
        return solver

    old, new = build("old", "old"), build("new", "new")
    with torch.no_grad():
        old.model.weight.fill_(7.0)
    old.commit()
    old.ema.update()
    old.commit()
    old.wait()
    new.continue_from("old", version="ema")
    assert new.model.note == "old"
    assert new.model.weight.item() == 7.0


def test_what_was_not_committed_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    class Forgetful(Solver):
        def run(self) -> None:
            self.run_stage("train", self.train)

    Solver(tmp_path / "good").run()
    assert "commit" not in caplog.text
    Forgetful(tmp_path / "bad").run()
    said = "Stages after the last commit are in no history and no checkpoint: train"
    assert said in caplog.text
    with pytest.raises(UserError, match="ends without an epoch: is `epochs` at least 1, and does"):
        Forgetful(tmp_path / "bad").log_end()

    class Tested(Solver):
        def run(self) -> None:
            super().run()
            self.run_stage("test", self.train)

    caplog.clear()
    Tested(tmp_path / "good", epochs=5).run()
    assert "commit" not in caplog.text


def test_a_forgotten_super_is_named(tmp_path: Path) -> None:
    class Forgetful(BaseSolver):
        def __init__(self) -> None:
            self.register_stateful("model")

    with pytest.raises(
        RuntimeError, match=r"Forgetful.__init__ must call super\(\).__init__\(xp\)"
    ):
        Forgetful()


def test_a_run_whose_checkpoints_are_gone_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Solver(tmp_path, epochs=2).run()
    for path in tmp_path.glob("*.th"):
        path.unlink()
    assert not Solver(tmp_path).restore()
    assert "No checkpoint of epochs 1 to 2: training that again" in caplog.text


def test_a_stage_that_runs_again_in_an_epoch_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    solver = Solver(tmp_path)
    for stage in ("train", "valid"):
        solver.run_stage(stage, solver.train)
    solver.commit()
    solver.run_stage("train", solver.train)
    assert "runs again" not in caplog.text
    solver.run_stage("train", solver.train)
    assert "Stage train runs again in epoch 2: is self.commit() missing?" in caplog.text


def test_a_stage_that_is_repeated_has_one_row(tmp_path: Path) -> None:
    def start() -> BaseSolver:
        solver = BaseSolver(tmp_path)
        solver.restore()
        solver.run_stage("train", dict)
        return solver

    for _ in range(2):
        solver = start()
        solver.commit()
        solver.wait()
        start()  # and is killed
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_a_stage_that_forgets_to_return_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    solver = Solver(tmp_path)

    def forgetful() -> None:
        solver.averager()({"loss": 1.0})

    solver.run_stage("look", lambda: None)
    solver.run_stage("valid", lambda: dict(solver.averager()({"loss": 1.0})))
    assert "return" not in caplog.text
    solver.run_stage("train", forgetful)
    assert "Stage train averaged metrics but returned none: is a return missing?" in caplog.text


def test_a_loop_over_nothing_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    solver = Solver(tmp_path)

    def stage(size: int) -> None:
        assert len(list(solver.log_progress("valid", range(size)))) == size

    solver.run_stage("one", stage, 1)
    assert "no data" not in caplog.text
    solver.run_stage("none", stage, 0)
    assert "Stage none looped over no data" in caplog.text


def test_a_metric_that_is_no_number_stops_the_stage(tmp_path: Path) -> None:
    solver = Solver(tmp_path)

    def stage(*checked: str) -> None:
        average = solver.averager()
        for loss in (1.0, float("nan"), float("inf")):
            metrics = average({"loss": loss, "fine": 1.0})
        solver.check_finite(metrics, *checked)

    solver.run_stage("train", stage, "fine")
    with pytest.raises(ValueError, match="no metric absent to check: there are loss, "):
        solver.run_stage("train", stage, "absent")
    said = "train, epoch 1: on rank 0, loss was NaN or infinite in 2 of the steps; the last commit"
    with pytest.raises(UserError, match=said):
        solver.run_stage("train", stage, "fine", "loss")


def test_what_trains_and_is_no_state_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Forgetful(Solver):
        def __init__(self, folder: Path) -> None:
            super().__init__(folder, epochs=2)
            self.same = self.model[0]  # a part of what is registered
            self.teacher = nn.Linear(2, 2).requires_grad_(False)
            self.loss = nn.MSELoss()
            self.ema = EMA({"model": self.model})
            critic = nn.Linear(2, 2)
            self.critic_optim = torch.optim.SGD(critic.parameters(), lr=0.1)
            self.adversarial = AdversarialLoss(critic, self.critic_optim)
            self.register_stateful("adversarial", "ema")
            self.head = nn.Linear(2, 2)
            self.schedule = torch.optim.lr_scheduler.ConstantLR(self.optim)
            self.averaged, self.best = EMA({"model": self.model}), Best({"model": self.model})

    Solver(tmp_path / "good").run()
    assert "Not registered" not in caplog.text
    Forgetful(tmp_path / "bad").run()
    said = "Not registered as state, so not saved: head, schedule, averaged, best; see register_"
    assert caplog.text.count(said) == 1


def test_what_is_no_metric_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="stage 'train' returned a float, not a dict of metrics"):
        Solver(tmp_path).run_stage("train", lambda: 1.0)
    with pytest.raises(TypeError, match="a step gave None, not a dict of metrics"):
        averager()(None)  # type: ignore[arg-type]


def test_names_of_columns_are_no_metrics(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a metric is called epoch, as a column of metrics\.jsonl"
    ):
        Solver(tmp_path).log_metrics("train", {"epoch": 3})


def test_unknown_tracker_and_missing_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tensorbord'"):
        Solver(tmp_path).init_trackers(["tensorbord"])
    with pytest.raises(NotImplementedError, match="BaseSolver has no run"):
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


def test_the_map_holds_all_files_and_imports_go_down_it() -> None:
    rows = re.findall(r"^\|[^|]*\| `(\w+)(?:\.py|/)` \|", (CORE / "README.md").read_text(), re.M)
    files = {path.stem for path in CORE.glob("*.py")} - {"__init__"} | {"trackers"}
    assert sorted(rows) == sorted(files)
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
                    assert rows.index(name) > rows.index(me), f"{path.name} imports {name}"
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
