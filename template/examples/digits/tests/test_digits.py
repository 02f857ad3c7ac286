"""The data and the model of the digits, and that they are learned."""

from pathlib import Path

import torch

from {{ cookiecutter.package_name }}.core.state import seed_everything
from {{ cookiecutter.package_name }}.core.xp import FolderXP
from {{ cookiecutter.package_name }}.data import CLASSES, load_digits
from {{ cookiecutter.package_name }}.model import ConvNet
from {{ cookiecutter.package_name }}.solver import Solver, warmup_cosine
from {{ cookiecutter.package_name }}.train import main


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
    cfg = main.get_xp(["epochs=4", "device=cpu", "trackers=[]"]).cfg
    seed_everything(cfg.seed)
    solver = Solver(cfg, FolderXP(tmp_path))
    solver.run()
    accuracies = [epoch["valid"]["acc"] for epoch in solver.history]
    assert accuracies[-1] > 0.93
    assert (tmp_path / "outputs" / "valid_4" / "hardest.png").exists()


def test_best_and_averaged_weights_are_kept(tmp_path: Path) -> None:
    overrides = ["optim.ema=0.9", "checkpoint.best=valid.loss", "checkpoint.last=1"]
    cfg = main.get_xp(["epochs=3", "device=cpu", "trackers=[]", *overrides]).cfg
    solver = Solver(cfg, FolderXP(tmp_path))
    solver.run()
    assert solver.best.value == max(epoch["valid"]["acc"] for epoch in solver.history)
    solver.model.eval()
    with solver.best.swapped():
        again = solver.run_stage("best", solver.loop, solver.valid_loader)
    assert again["acc"] == solver.best.value
    losses = [epoch["valid"]["loss"] for epoch in solver.history]
    expected = {3, losses.index(min(losses)) + 1} - {3}
    assert len(list(tmp_path.glob("checkpoint.*.th"))) == len(expected)


def test_bfloat16_trains(tmp_path: Path) -> None:
    cfg = main.get_xp(["epochs=1", "device=cpu", "trackers=[]", "optim.bf16=true"]).cfg
    solver = Solver(cfg, FolderXP(tmp_path))
    solver.run()
    assert next(solver.model.parameters()).dtype == torch.float32
    assert solver.history[0]["train"]["loss"] < 2.3
