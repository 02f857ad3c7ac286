"""The data and the model of the digits, and that they are learned."""

import functools
from pathlib import Path

import pytest
import torch
from torch import nn

from {{ cookiecutter.package_name }}.core.utils import UserError
from {{ cookiecutter.package_name }}.data import CLASSES, load_digits
from {{ cookiecutter.package_name }}.model import ConvNet

from .helpers import make_solver, train


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


def test_digits_are_learned_in_a_few_epochs(tmp_path: Path) -> None:
    solver = train(tmp_path, "epochs=4")
    accuracies = [epoch["valid"]["acc"] for epoch in solver.history]
    assert accuracies[-1] > 0.93
    assert (tmp_path / "outputs" / "valid_4" / "wrong.png").exists()


def test_one_batch_is_learned_by_heart(tmp_path: Path) -> None:
    solver = train(tmp_path, "debug=overfit")
    assert solver.history[-1]["train"]["loss"] < 0.01


def test_best_and_averaged_weights_are_kept(tmp_path: Path) -> None:
    overrides = ["optim.ema=0.9", "checkpoint.best=max valid.acc", "checkpoint.last=1"]
    solver = train(tmp_path, "epochs=3", *overrides)
    accuracies = [epoch["valid"]["acc"] for epoch in solver.history]
    best = accuracies.index(max(accuracies)) + 1
    assert [*tmp_path.glob("checkpoint.*.th")] == [
        tmp_path / f"checkpoint.{epoch}.th" for epoch in {best} - {3}
    ]
    loaded = make_solver(tmp_path, "epochs=3", *overrides)
    assert loaded.restore(read_only=True, version="best")
    assert len(loaded.history) == best
    with loaded.ema.swapped():
        assert loaded.run_stage("again", loaded.evaluate)["acc"] == max(accuracies)


def test_a_loss_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="grad_norm is NaN or infinite"):
        train(tmp_path, "epochs=1", "optim.lr=1e30", "optim.clip=inf")
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
