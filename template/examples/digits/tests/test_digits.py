"""The data and the model of the digits, and that they are learned."""

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from {{ cookiecutter.package_name }}.core.utils import UserError
from {{ cookiecutter.package_name }}.data import CLASSES, load_digits
from {{ cookiecutter.package_name }}.model import ConvNet
from {{ cookiecutter.package_name }}.solver import warmup_cosine

from .helpers import train


def test_data_is_split_without_overlap() -> None:
    train, valid = load_digits()
    assert (len(train), len(valid)) == (1438, 359)
    image, label = train[0]
    assert image.shape == (1, 8, 8)
    assert image.min() >= 0
    assert image.max() <= 1
    assert label.dtype == torch.int64
    again, _ = load_digits()
    assert torch.equal(train.images, again.images)


def test_model_gives_one_logit_a_class() -> None:
    model = ConvNet((3, 10, 12), CLASSES, channels=4, dropout=0.5)
    assert model(torch.zeros(5, 3, 10, 12)).shape == (5, CLASSES)


def test_learning_rate_warms_up_and_decays() -> None:
    factor = warmup_cosine(warmup=10, updates=110, cosine=True)
    assert factor(0) == 0.1
    assert factor(9) == factor(10) == 1.0
    assert abs(factor(60) - 0.5) < 1e-9
    assert abs(factor(110)) < 1e-9
    assert warmup_cosine(warmup=0, updates=10, cosine=False)(9) == 1.0


def test_digits_are_learned_in_a_few_epochs(tmp_path: Path) -> None:
    solver = train(tmp_path, "epochs=4")
    accuracies = [epoch["valid"]["acc"] for epoch in solver.history]
    assert accuracies[-1] > 0.93
    assert (tmp_path / "outputs" / "valid_4" / "hardest.png").exists()


def test_one_batch_is_learned_by_heart(tmp_path: Path) -> None:
    solver = train(tmp_path, "debug=overfit")
    assert solver.history[-1]["train"]["loss"] < 0.01


def test_best_and_averaged_weights_are_kept(tmp_path: Path) -> None:
    overrides = ["optim.ema=0.9", "checkpoint.best=valid.loss", "checkpoint.last=1"]
    solver = train(tmp_path, "epochs=3", *overrides)
    assert solver.best.value == max(epoch["valid"]["acc"] for epoch in solver.history)
    solver.model.eval()
    with solver.best.swapped():
        again = solver.run_stage("best", solver.loop, solver.valid_loader)
    assert again["acc"] == solver.best.value
    losses = [epoch["valid"]["loss"] for epoch in solver.history]
    expected = {3, losses.index(min(losses)) + 1} - {3}
    assert len(list(tmp_path.glob("checkpoint.*.th"))) == len(expected)


def test_a_batch_in_parts_gives_the_same_weights(tmp_path: Path) -> None:
    quick = ["epochs=1", "data.limit=8"]
    whole = train(tmp_path / "whole", *quick, "model.dropout=0")
    parts = train(tmp_path / "parts", *quick, "model.dropout=0", "optim.accumulate=3")
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)
    assert abs(whole.history[0]["train"]["loss"] - parts.history[0]["train"]["loss"]) < 1e-4


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="on rank 0, loss was NaN or infinite in 22 of"):
        train(tmp_path, "epochs=1", "optim.lr=1e30", "optim.clip=0", "optim.warmup=0")
    assert not (tmp_path / "checkpoint.th").exists()


def test_a_compiled_model_trains_and_is_saved_by_its_bare_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With another backend than the default one, which takes long and needs a compiler of C++.
    compile_quickly = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", compile_quickly)
    quick = ["epochs=1", "data.limit=2"]
    compiled = train(tmp_path, "model.compile=true", *quick)
    assert "features.0.weight" in torch.load(tmp_path / "checkpoint.th")["model"]
    plain = train(tmp_path / "plain", *quick)
    assert abs(compiled.history[0]["train"]["loss"] - plain.history[0]["train"]["loss"]) < 0.1


def test_bfloat16_trains(tmp_path: Path) -> None:
    solver = train(tmp_path, "epochs=1", "data.limit=2", "optim.bf16=true")
    assert next(solver.model.parameters()).dtype == torch.float32
    assert solver.history[0]["train"]["loss"] < 2.4
