"""The data and the model of the digits, and that they are learned."""

import shutil
from pathlib import Path

import pytest
import torch

from {{ cookiecutter.package_name }}.core.state import seed_everything
from {{ cookiecutter.package_name }}.core.xp import FolderXP
from {{ cookiecutter.package_name }}.data import CLASSES, load_digits
from {{ cookiecutter.package_name }}.model import ConvNet
from {{ cookiecutter.package_name }}.solver import Solver, warmup_cosine
from {{ cookiecutter.package_name }}.train import main


def train(folder: Path, *overrides: str, epochs: int = 1) -> Solver:
    cfg = main.get_xp([f"epochs={epochs}", "device=cpu", "trackers=[]", *overrides]).cfg
    seed_everything(cfg.seed)
    solver = Solver(cfg, FolderXP(folder))
    solver.run()
    return solver


def test_data_is_split_without_overlap() -> None:
    train, valid = load_digits()
    assert (len(train), len(valid)) == (1438, 359)
    image, label = train[0]
    assert image.shape == (1, 8, 8)
    assert image.min() >= 0
    assert image.max() <= 1
    assert label.dtype == torch.int64
    again, _ = load_digits()
    assert torch.equal(train.tensors[0], again.tensors[0])


def test_model_gives_one_logit_a_class() -> None:
    model = ConvNet(CLASSES, channels=4, dropout=0.5)
    assert model(torch.zeros(3, 1, 8, 8)).shape == (3, CLASSES)


def test_learning_rate_warms_up_and_decays() -> None:
    factor = warmup_cosine(warmup=10, updates=110, cosine=True)
    assert factor(0) == 0.1
    assert factor(9) == factor(10) == 1.0
    assert abs(factor(60) - 0.5) < 1e-9
    assert abs(factor(110)) < 1e-9
    assert warmup_cosine(warmup=0, updates=10, cosine=False)(9) == 1.0


def test_digits_are_learned_in_a_few_epochs(tmp_path: Path) -> None:
    solver = train(tmp_path, epochs=4)
    accuracies = [epoch["valid"]["acc"] for epoch in solver.history]
    assert accuracies[-1] > 0.93
    assert (tmp_path / "outputs" / "valid_4" / "hardest.png").exists()


def test_best_and_averaged_weights_are_kept(tmp_path: Path) -> None:
    overrides = ["optim.ema=0.9", "checkpoint.best=valid.loss", "checkpoint.last=1"]
    solver = train(tmp_path, *overrides, epochs=3)
    assert solver.best.value == max(epoch["valid"]["acc"] for epoch in solver.history)
    solver.model.eval()
    with solver.best.swapped():
        again = solver.run_stage("best", solver.loop, solver.valid_loader)
    assert again["acc"] == solver.best.value
    losses = [epoch["valid"]["loss"] for epoch in solver.history]
    expected = {3, losses.index(min(losses)) + 1} - {3}
    assert len(list(tmp_path.glob("checkpoint.*.th"))) == len(expected)


def test_a_batch_in_parts_gives_the_same_weights(tmp_path: Path) -> None:
    whole = train(tmp_path / "whole", "model.dropout=0")
    parts = train(tmp_path / "parts", "model.dropout=0", "optim.accumulate=3")
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert abs(whole.history[0]["train"]["loss"] - parts.history[0]["train"]["loss"]) < 1e-4


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(FloatingPointError, match="train, epoch 1: on rank 0, the loss of 22 steps"):
        train(tmp_path, "optim.lr=1e30", "optim.clip=0", "optim.warmup=0")
    assert not (tmp_path / "checkpoint.th").exists()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler here")
def test_a_compiled_model_trains_and_is_saved_by_its_bare_names(tmp_path: Path) -> None:
    compiled = train(tmp_path, "model.compile=true", "data.batch_size=719")
    assert "features.0.weight" in torch.load(tmp_path / "checkpoint.th")["model"]
    plain = train(tmp_path / "plain", "data.batch_size=719")
    assert abs(compiled.history[0]["train"]["loss"] - plain.history[0]["train"]["loss"]) < 0.1


def test_bfloat16_trains(tmp_path: Path) -> None:
    solver = train(tmp_path, "optim.bf16=true")
    assert next(solver.model.parameters()).dtype == torch.float32
    assert solver.history[0]["train"]["loss"] < 2.3
