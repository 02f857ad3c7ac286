"""The solver: epochs, stages, commits; and that a stopped run ends like one that was not."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from .. import BaseSolver, averager, checkpoint, lock
from ..adversarial import AdversarialLoss
from ..rng import seed_everything
from ..utils import UserError
from ..weights import EMA, Best
from ..xp import FolderXP

CORE = Path(__file__).parent.parent


class Solver(BaseSolver):
    def __init__(self, folder: Path, epochs: int = 4, width: int = 8) -> None:
        super().__init__(folder)
        self.epochs = epochs
        self.model: Any = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 1))
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
            steps.update(metrics)
            self.log_step({"loss": loss}, every=2)
        return dict(metrics)


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


def test_curves_by_step_go_on_after_a_stop(tmp_path: Path) -> None:
    def curve() -> list[tuple[int, int]]:
        rows = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
        return [(row["epoch"], row["step"]) for row in rows if "step" in row]

    class Stopped(Solver):
        def commit(self, save_checkpoint: bool = True) -> None:
            if self.epoch == 3:
                raise KeyboardInterrupt
            super().commit(save_checkpoint)

    whole = [(1, 2), (1, 4), (2, 6), (2, 8), (2, 10), (3, 12), (3, 14)]
    with pytest.raises(KeyboardInterrupt):
        Stopped(tmp_path).run()
    assert curve() == whole
    solver = Solver(tmp_path)
    solver.run()
    assert curve() == [*whole, (4, 16), (4, 18), (4, 20)]
    assert solver.steps == {"train": 20}


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


def test_a_commit_without_a_checkpoint_is_repeated(tmp_path: Path) -> None:
    solver = Solver(tmp_path)
    solver.run_stage("train", solver.train)
    solver.commit()
    solver.run_stage("train", solver.train)
    solver.commit(save_checkpoint=False)
    solver.wait()
    assert len(json.loads((tmp_path / "history.json").read_text())) == 2
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
    with pytest.raises(ValueError, match="stage 'slow': `duration` is what run_stage measures"):
        solver.run_stage("slow", lambda: {"duration": 3.0})
    solver.commit()
    solver.wait()
    assert json.loads((tmp_path / "history.json").read_text())[0]["valid"]["b"] == 2


def test_reading_leaves_everything_alone(tmp_path: Path) -> None:
    Solver(tmp_path, epochs=2).run()
    (tmp_path / "history.json").unlink()
    files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    before = torch.get_rng_state()
    solver = Solver(tmp_path)
    torch.set_rng_state(before)
    assert solver.restore(read_only=True)
    assert torch.equal(torch.get_rng_state(), before)
    assert len(solver.history) == 2
    assert solver.run_stage("train", solver.train)["loss"] > 0
    with pytest.raises(RuntimeError, match="was restored to be looked at: to train on, start"):
        solver.commit()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


class FakeXP(FolderXP):
    """A folder that says, as Dora does, which keys are in its signature."""

    class dora:
        @staticmethod
        def is_excluded(key: str) -> bool:
            return key == "workers"


def guarded(folder: Path, **cfg: Any) -> Solver:
    solver = Solver(folder)
    solver.xp = FakeXP(folder, cfg={"optim": {"lr": 0.1, "betas": [0.9, 0.99]}, "workers": 1} | cfg)
    return solver


def test_another_config_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    guarded(tmp_path).run()
    assert guarded(tmp_path).restore()
    assert "config" not in caplog.text
    assert guarded(tmp_path, workers=2).restore()
    assert "workers: 1 -> 2" in caplog.text
    changed = {"optim": {"lr": 0.2, "betas": [0.9, 0.99]}, "new": 3}
    solver = guarded(tmp_path, **changed)
    before = solver.state_dict()["model"]["0.weight"].clone()
    with pytest.raises(UserError, match=r"checkpoint: optim\.lr: 0\.1 -> 0\.2\. .*=1"):
        solver.restore()
    assert torch.equal(solver.state_dict()["model"]["0.weight"], before)
    assert guarded(tmp_path, **changed).restore(read_only=True)
    assert guarded(tmp_path, **changed).restore(strict=False)
    monkeypatch.setenv("ALLOW_CONFIG_CHANGE", "1")
    assert guarded(tmp_path, **changed).restore()
    assert "optim.lr: 0.1 -> 0.2" in caplog.text


def test_a_key_that_is_new_is_told_and_one_that_is_gone_refused(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    guarded(tmp_path).run()
    assert guarded(tmp_path, dropout=0.0).restore()
    assert "The config has changed: dropout: absent -> 0.0" in caplog.text
    guarded(tmp_path / "gone", dropout=0.5).run()
    with pytest.raises(UserError, match=r"checkpoint: dropout: 0\.5 -> absent\."):
        guarded(tmp_path / "gone").restore()


class Kept(Solver):
    def __init__(self, folder: Path, width: int = 8) -> None:
        super().__init__(folder, epochs=2, width=width)
        self.best = Best({"model": self.model})
        self.ema = EMA({"model": self.model}, 0.5)
        self.register_stateful("best", "ema")

    def train(self) -> dict[str, Any]:
        metrics = super().train()
        self.ema.update()
        self.best.update(self.epoch)  # the first epoch is the best
        return dict(metrics)


def test_a_run_continues_from_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = Kept(tmp_path / "xps" / "old")
    old.run()
    latest = old.model[0].weight
    best, ema = (s["model"]["0.weight"] for s in (old.best.states, old.ema.states))
    assert not torch.equal(latest, best)
    assert not torch.equal(latest, ema)
    for version, expected in {"latest": latest, "best": best, "ema": ema}.items():
        for source in ("old", old.folder, old.checkpoint_path):
            new = Kept(tmp_path / "xps" / "new")
            new.continue_from(source, version=version)
            assert torch.equal(new.model[0].weight, expected)
            assert new.epoch == 1
            assert not new.optim.state_dict()["state"]
    new.continue_from("old", ["model", "optim"])
    assert new.optim.state_dict()["state"]
    with pytest.raises(UserError, match=r"from nothing: there is no nothing nor .*nothing"):
        new.continue_from("nothing")
    with pytest.raises(UserError, match=r"no ema optim in it, which has latest \(.*model"):
        new.continue_from("old", ["optim"], version="ema")
    plain: Any = Solver(tmp_path / "xps" / "plain", epochs=1)
    plain.best = plain.ema = 0.5  # names like any other
    plain.register_stateful("best", "ema")
    plain.run()
    new.continue_from("plain")
    with pytest.raises(UserError, match=r"no ema model in it, which has latest \(.*model"):
        new.continue_from("plain", version="ema")
    wider = Kept(tmp_path / "xps" / "wider", width=9)
    said = r"^continue from .*: the checkpoint does not fit .*model\.0\.weight: \(8, 4\) in the "
    with pytest.raises(UserError, match=said):
        wider.continue_from("old")
    wider.continue_from("old", strict=False)
    assert "Skipped" in caplog.text


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


def test_a_run_that_was_not_restored_is_not_overwritten(tmp_path: Path) -> None:
    Solver(tmp_path, epochs=3).run()
    forgetful = Solver(tmp_path)
    forgetful.run_stage("train", forgetful.train)
    forgetful.commit()
    with pytest.raises(UserError, match=r"epoch 1 could not .* it is of epoch 3, .* call restore"):
        forgetful.wait()
    solver = Solver(tmp_path)
    assert solver.restore()
    assert solver.epoch == 4
    assert len(json.loads((tmp_path / "history.json").read_text())) == 3


def test_lost_epochs_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Solver(tmp_path, epochs=3).run()
    (tmp_path / "checkpoint.th").write_bytes(b"")
    solver = Solver(tmp_path)
    assert solver.restore()
    assert "No checkpoint of epoch 3: training that again" in caplog.text
    assert len(json.loads((tmp_path / "history.json").read_text())) == 2


def test_a_damaged_history_is_taken_from_the_checkpoint(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Solver(tmp_path, epochs=2).run()
    file = tmp_path / "history.json"
    whole = file.read_text()
    file.write_text(whole[:20])
    assert Solver(tmp_path).restore()
    assert "history.json can't be read: " in caplog.text
    assert file.read_text() == whole


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


def test_two_processes_do_not_train_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SECONDS", 0.2)

    class Nested(Solver):
        def run(self) -> None:
            super().run()  # its own lock is not in its way
            with pytest.raises(UserError, match=r"run \S+ is training in another process: wait"):
                Solver(tmp_path).run()

    Nested(tmp_path, epochs=1).run()
    Solver(tmp_path, epochs=2).run()
    assert len(json.loads((tmp_path / "history.json").read_text())) == 2


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


def test_what_fits_of_a_changed_model_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Kept(tmp_path).run()
    with pytest.raises(UserError, match=r"ema\.model\.0\.weight: \(8, 4\) in the checkpoint"):
        Kept(tmp_path, width=16).restore()
    changed = Kept(tmp_path, width=16)
    assert changed.restore(strict=False)
    assert "optim: of other weights" in caplog.text
    assert "best: of other weights" in caplog.text
    saved = torch.load(tmp_path / "checkpoint.th")
    assert torch.equal(changed.model[2].bias, saved["model"]["2.bias"])
    assert torch.equal(changed.ema.states["model"]["2.bias"], saved["ema"]["model"]["2.bias"])
    changed.run_stage("train", changed.train)
    with changed.ema.swapped():
        pass


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
