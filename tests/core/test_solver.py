"""The solver's further ways, what it says, and the order of the core's modules."""

from __future__ import annotations

import ast
import io
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from core import BaseSolver, averager, checkpoint
from core.ema import EMA
from core.run import FolderXP
from core.tests.test_solver import Solver, guarded
from core.utils import UserError

from ..conftest import ROOT

CORE = ROOT / "core"


def test_a_start_is_described(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    solver = Solver(tmp_path, epochs=1)
    solver.xp.cfg = {"optim": {"lr": 0.01}, "path": Path("x")}
    solver.run()
    [config] = [message for message in caplog.messages if '"lr": 0.01' in message]
    assert tmp_path.name in config
    assert '"path": "x"' in config
    assert any(f"starts in epoch 1: {tmp_path}" in message for message in caplog.messages)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written == {"optim": {"lr": 0.01}, "path": "x"}


def test_an_end_tells_the_best(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    solver = Solver(tmp_path, epochs=3)
    solver.run()
    end = caplog.messages[-1]
    assert f"{tmp_path.name} is complete after epoch 3" in end
    assert "train.loss" not in end
    solver = Solver(tmp_path, epochs=3, best="min train.loss")
    solver.run()
    losses = [epoch["train"]["loss"] for epoch in solver.history]
    at = losses.index(min(losses)) + 1
    assert f"train.loss in epoch {at}" in caplog.messages[-2]


def test_a_script_reads_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Rarely(Solver):
        def run(self) -> None:
            with self.running():
                for loss in (2.0, 0.5, 1.0):
                    self.run_stage("train", lambda loss: {"loss": loss}, loss)
                    if self.epoch == 1:
                        self.run_stage("valid", lambda: {"acc": 0.25})
                    self.commit()

    Rarely(tmp_path, epochs=3, best="min train.loss").run()
    end = capsys.readouterr().out.split("---\n")[-1]
    said = dict(line.split(": ", 1) for line in end.splitlines())
    assert said["folder"] == str(tmp_path)
    assert (said["epochs"], said["best_epoch"], said["best.train.loss"]) == ("3", "2", "0.5")
    assert (said["train.loss"], said["valid.acc"]) == ("1.0", "0.25")


def test_a_closed_stdout_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.StringIO()
    stdout.close()
    monkeypatch.setattr("sys.stdout", stdout)
    Solver(tmp_path, epochs=1).run()


def test_the_best_is_kept_by_a_policy_without_one(tmp_path: Path) -> None:
    Solver(tmp_path, epochs=3, best="max train.loss").run()
    kept = checkpoint.older(tmp_path / "checkpoint.th")
    Solver(tmp_path, epochs=6).run()
    [best, *_] = sorted(kept)
    assert best in checkpoint.older(tmp_path / "checkpoint.th")


def test_a_resumed_run_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    Solver(tmp_path, epochs=1).run()
    caplog.clear()
    Solver(tmp_path, epochs=2).run()
    assert "resumes in epoch 2: " in caplog.text
    assert "Config of run" not in caplog.text


def test_a_key_that_is_new_is_told_and_one_that_is_gone_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guarded(tmp_path).run()
    assert guarded(tmp_path, dropout=0.0).restore()
    assert "dropout: absent -> 0.0" in caplog.text
    guarded(tmp_path / "gone", dropout=0.5).run()
    with pytest.raises(UserError, match=r"dropout: 0\.5 -> absent"):
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
    new.continue_from("old", version="ema")
    assert new.model.note == "old"
    assert new.model.weight.item() == 7.0


def test_a_run_without_a_commit_is_an_error(tmp_path: Path) -> None:
    class Forgetful(Solver):
        def run(self) -> None:
            with self.running():
                self.run_stage("train", self.train)

    with pytest.raises(UserError, match=tmp_path.name):
        Forgetful(tmp_path).run()


def test_a_forgotten_super_is_named(tmp_path: Path) -> None:
    class Forgetful(BaseSolver):
        def __init__(self) -> None:
            self.register_stateful("model")

    with pytest.raises(RuntimeError, match=r"Forgetful.__init__"):
        Forgetful()


def test_a_run_whose_checkpoints_are_gone_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Solver(tmp_path, epochs=2).run()
    for path in tmp_path.glob("*.th"):
        path.unlink()
    assert not Solver(tmp_path).restore()
    assert "Epochs 1 to 2" in caplog.text


def test_a_stage_that_is_repeated_has_one_row(tmp_path: Path) -> None:
    def start() -> BaseSolver:
        solver = BaseSolver(tmp_path)
        solver.restore()
        solver.run_stage("train", dict)
        return solver

    for _ in range(2):
        solver = start()
        solver.commit()
        start()  # and is killed
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_a_stage_that_forgets_to_return_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    solver = Solver(tmp_path)

    def stage(returns: bool) -> dict[str, float] | None:
        steps = solver.steps(range(2))
        for _ in steps:
            steps.log({"loss": 1.0})
        return steps.metrics() if returns else None

    caplog.set_level("WARNING")
    solver.run_stage("look", lambda: None)
    solver.run_stage("valid", stage, True)
    assert not caplog.messages
    solver.run_stage("train", stage, False)
    [said] = caplog.messages
    assert "train" in said
    assert "return" in said


@pytest.mark.parametrize("bad", [float("nan"), torch.tensor(float("inf"))])
def test_a_bad_step_never_reaches_the_weights(tmp_path: Path, bad: float | torch.Tensor) -> None:
    solver = Solver(tmp_path)
    taken = []

    def stage(*checked: str, skip: bool = False) -> dict[str, float]:
        steps = solver.steps(range(4), every=1, finite=checked, skip=skip)
        for step in steps:
            if steps.log({"loss": 1.0 if step % 2 == 0 else bad, "step": step}):
                taken.append(step)
        return steps.metrics()

    with pytest.raises(UserError, match=r"loss.* step 2 of train, rank 0"):
        solver.run_stage("train", stage, "step", "loss")
    assert taken == [0]
    metrics = solver.run_stage("train", stage, "loss", skip=True)
    assert taken == [0, 0, 2]
    assert {**metrics, "duration": 0} == {"loss": 1, "step": 1, "skipped": 2, "duration": 0}
    assert solver.run_stage("valid", stage, "step", skip=True)["skipped"] == 0
    with pytest.raises(ValueError, match=r"absent.*loss"):
        solver.run_stage("test", stage, "absent")


def test_weights_of_a_version_wait_for_the_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, real = threading.Event(), checkpoint.save

    def slow(*args: Any) -> None:
        go.wait()
        real(*args)

    monkeypatch.setattr(checkpoint, "save", slow)
    solver = Solver(tmp_path, best="max valid.acc")
    saved = []
    for acc in (0.5, 0.9, 0.7):
        torch.nn.init.constant_(solver.model[0].weight, acc)
        solver.run_stage("valid", lambda acc=acc: {"acc": acc})
        go.clear()
        solver.commit()
        threading.Timer(0.1, go.set).start()
        for version in ("best", "latest"):
            with solver.weights(version):
                saved.append(round(solver.model[0].weight[0, 0].item(), 3))
        assert solver.model[0].weight[0, 0].item() == pytest.approx(acc)
    assert saved == [0.5, 0.5, 0.9, 0.9, 0.9, 0.7]
    looked = Solver(tmp_path)
    assert looked.restore(read_only=True, version="best")
    assert looked.model[0].weight[0, 0].item() == pytest.approx(0.9)


def test_what_is_no_metric_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'train'.* float"):
        Solver(tmp_path).run_stage("train", lambda: 1.0)
    with pytest.raises(TypeError, match="None"):
        averager()(None)  # type: ignore[arg-type]


def test_a_version_is_for_looking(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="read_only"):
        Solver(tmp_path).restore(version="best")


def test_a_metric_of_one_element_is_a_number(tmp_path: Path) -> None:
    found = Solver(tmp_path).run_stage("valid", lambda: {"a": torch.ones(1), "b": torch.ones(2)})
    assert (found["a"], found["b"]) == (1.0, [1.0, 1.0])


def test_a_config_of_the_solver_says_how_many_epochs(tmp_path: Path) -> None:
    """Such as of a solver that a notebook makes, with a folder for its run."""

    class Own(BaseSolver):
        def __init__(self) -> None:
            super().__init__(tmp_path)
            self.cfg = OmegaConf.create({"epochs": 2})

        def train(self) -> dict[str, float]:
            return {"loss": 1.0}

        valid = train

    solver = Own()
    solver.run()
    assert len(solver.history) == 2


def test_unknown_tracker_and_missing_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'tensorbord'"):
        Solver(tmp_path).init_trackers(["tensorbord"])
    with pytest.raises(AttributeError, match="train"):
        BaseSolver(FolderXP(tmp_path, OmegaConf.create({"epochs": 1}))).run()
    with pytest.raises(RuntimeError, match="dora run"):
        BaseSolver()


class Deep(Solver):
    """What subclasses in the wild override."""

    def run(self) -> None:
        self.restore()
        for _ in range(self.epoch, self.epochs + 1):
            self.run_stage("train", self.train)
            self.commit()

    def commit(self, save_checkpoint: bool = True) -> None:
        self.history.append(self._pending_metrics)
        if save_checkpoint:
            checkpoint.save(self.state_dict(), self.checkpoint_path(self.epoch - 1))
        self._start_epoch()
        self.xp.link.update_history(self.history)

    def checkpoint_path(self, epoch: int) -> Path:  # type: ignore[override]
        return self.folder / f"checkpoint_{epoch}.th"

    def restore(
        self, strict: bool = True, read_only: bool = False, version: str = "latest"
    ) -> bool:
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


def test_the_map_holds_all_files() -> None:
    readme = (CORE / "README.md").read_text()
    [shown] = re.findall(r"^## Reading order\n.*?```text\n(.*?)```", readme, re.M | re.S)
    rows = re.findall(r"^(\w+)(?:\.py|/) ", shown, re.M)
    folders = {path.parent.name for path in CORE.glob("*/__init__.py")} - {"tests"}
    files = {path.stem for path in CORE.glob("*.py")} - {"__init__"}
    assert sorted(rows) == sorted(files | folders)


def test_dora_and_hydra_are_known_to_one_file() -> None:
    for path in CORE.rglob("*.py"):
        if "tests" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0):
                modules = [getattr(node, "module", None) or "", *(a.name for a in node.names)]
                known = any(m.split(".")[0] in ("dora", "hydra") for m in modules)
                assert not known or path.name == "launch.py", path


def test_heavy_packages_are_imported_when_used() -> None:
    code = f"import sys, {CORE.name}; print(*sys.modules)"
    command = [sys.executable, "-c", code]
    loaded = subprocess.check_output(command, text=True, cwd=CORE.parent).split()
    assert "torch" in loaded
    assert not {"dora", "hydra", "wandb", "tensorboard", "PIL"} & set(loaded)
