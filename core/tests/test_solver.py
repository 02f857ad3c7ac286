"""The solver: epochs, stages, commits; and that a stopped run ends like one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from .. import BaseSolver, run
from ..checkpoint import Policy
from ..ema import EMA
from ..rng import seed_everything
from ..utils import UserError
from ..writer import wait_for_writes


class Solver(BaseSolver):
    def __init__(self, folder: Path, epochs: int = 4, width: int = 8, **policy: Any) -> None:
        super().__init__(folder, Policy(**policy))
        self.epochs = epochs
        self.model: Any = nn.Sequential(nn.Linear(4, width), nn.Dropout(0.5), nn.Linear(width, 1))
        self.optim = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.register_stateful("model", "optim")

    def run(self) -> None:
        with self.running():
            while self.epoch <= self.epochs:
                self.run_stage("train", self.train)
                self.commit()

    def train(self) -> dict[str, Any]:
        steps = self.steps(range(5), every=2)
        for _ in steps:
            loss = self.model(torch.randn(3, 4)).pow(2).mean()
            self.optim.zero_grad()
            loss.backward()
            self.optim.step()
            steps.log({"loss": loss})
        return dict(steps.metrics())


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
    wait_for_writes()
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
    with pytest.raises(RuntimeError, match=r"'inner'.*'outer'"):
        solver.run_stage("outer", solver.run_stage, "inner", dict)
    with pytest.raises(ValueError, match="stage 'slow': run_stage adds `duration`"):
        solver.run_stage("slow", lambda: {"duration": 3.0})
    solver.commit()
    wait_for_writes()
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
    with pytest.raises(RuntimeError, match="read_only"):
        solver.commit()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == files


class FakeXP(run.FolderXP):
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
    assert "has changed" not in caplog.text
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


class Kept(Solver):
    def __init__(self, folder: Path, width: int = 8) -> None:
        super().__init__(folder, epochs=3, width=width, best="min train.epoch")
        self.ema = EMA({"model": self.model}, 0.5)
        self.register_stateful("ema")

    def train(self) -> dict[str, Any]:
        metrics = super().train()
        self.ema.update()
        return metrics | {"epoch": self.epoch}  # the first epoch is the best


def test_a_run_continues_from_another(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    old = Kept(tmp_path / "xps" / "old")
    old.run()
    latest = old.model[0].weight.detach().clone()
    best = torch.load(old.folder / "checkpoint.1.th")["model"]["0.weight"]
    ema = old.ema.states["model"]["0.weight"]
    assert not torch.equal(latest, best)
    assert not torch.equal(latest, ema)
    for version, expected in {"latest": latest, "best": best, "ema": ema}.items():
        looked = Kept(old.folder)
        assert looked.restore(read_only=True, version=version)
        assert torch.equal(looked.model[0].weight, expected)
        with old.weights(version):
            assert torch.equal(old.model[0].weight, expected)
        assert torch.equal(old.model[0].weight, latest)
        for source in ("old", old.folder, old.checkpoint_path):
            new = Kept(tmp_path / "xps" / "new")
            new.continue_from(source, version=version)
            assert torch.equal(new.model[0].weight, expected)
            assert new.epoch == 1
            assert not new.optim.state_dict()["state"]
    new.continue_from("old", ["model", "optim"])
    assert new.optim.state_dict()["state"]
    with pytest.raises(UserError, match="nothing"):
        new.continue_from("nothing")
    with pytest.raises(UserError, match="gone: missing"):
        new.continue_from("old", ["model", "gone"])
    Solver(tmp_path / "xps" / "plain", epochs=1).run()
    new.continue_from("plain")
    for version in ("ema", "best", "worst"):
        with pytest.raises(UserError, match=version):
            new.continue_from("plain", version=version)
    wider = Kept(tmp_path / "xps" / "wider", width=9)
    said = r"^continue from .*: the checkpoint does not fit .*model\.0\.weight: \(8, 4\) in the "
    with pytest.raises(UserError, match=said):
        wider.continue_from("old")
    wider.continue_from("old", strict=False)
    assert "Skipped" in caplog.text


def test_a_run_that_was_not_restored_is_not_overwritten(tmp_path: Path) -> None:
    Solver(tmp_path, epochs=3).run()
    forgetful = Solver(tmp_path)
    forgetful.run_stage("train", forgetful.train)
    forgetful.commit()
    forgetful.run_stage("train", forgetful.train)
    with pytest.raises(UserError, match=r"epoch 1 could not .* it is of epoch 3: call restore"):
        forgetful.commit()
    solver = Solver(tmp_path)
    assert solver.restore()
    assert solver.epoch == 4
    assert len(json.loads((tmp_path / "history.json").read_text())) == 3


def test_lost_epochs_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Solver(tmp_path, epochs=3).run()
    (tmp_path / "checkpoint.th").write_bytes(b"")
    solver = Solver(tmp_path)
    assert solver.restore()
    assert "Epochs 3 to 3 were not saved" in caplog.text
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


def test_two_processes_do_not_train_one_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "LOCK_SECONDS", 0.2)

    solver = Solver(tmp_path)
    with solver.running():
        with pytest.raises(UserError, match=tmp_path.name):
            Solver(tmp_path).run()
        solver.run_stage("train", solver.train)
        solver.commit()
    Solver(tmp_path, epochs=2).run()
    assert len(json.loads((tmp_path / "history.json").read_text())) == 2


def test_what_fits_of_a_changed_model_is_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Kept(tmp_path).run()
    with pytest.raises(UserError, match=r"ema\.model\.0\.weight: \(8, 4\) in the checkpoint"):
        Kept(tmp_path, width=16).restore()
    changed = Kept(tmp_path, width=16)
    assert changed.restore(strict=False)
    assert "optim: of other weights" in caplog.text
    saved = torch.load(tmp_path / "checkpoint.th")
    assert torch.equal(changed.model[2].bias, saved["model"]["2.bias"])
    assert torch.equal(changed.ema.states["model"]["2.bias"], saved["ema"]["model"]["2.bias"])
    changed.run_stage("train", changed.train)
    with changed.ema.swapped():
        pass
