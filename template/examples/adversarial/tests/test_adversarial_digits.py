"""The data and the models of the digits, and that they are learned to be made."""

from pathlib import Path

import torch

from {{ cookiecutter.package_name }}.data import load_digits
from {{ cookiecutter.package_name }}.model import Discriminator, Generator, frechet_distance

from .helpers import make_solver, train


def test_data_is_split_without_overlap() -> None:
    train, valid = load_digits()
    assert (len(train), len(valid)) == (1438, 359)
    [image] = train[0]
    assert image.shape == (1, 8, 8)
    assert image.min() == -1
    assert image.max() <= 1


def test_models_have_matching_shapes() -> None:
    images = Generator(noise=5, width=16)(torch.randn(3, 5))
    assert images.shape == (3, 1, 8, 8)
    assert images.abs().max() <= 1
    assert Discriminator(width=16, dropout=0.5)(images).shape == (3, 1)


def test_frechet_distance() -> None:
    train, valid = (data.tensors[0] for data in load_digits())
    assert frechet_distance(valid, valid).abs() < 1e-6
    assert 0.1 < frechet_distance(train, valid) < 1
    assert frechet_distance(torch.rand(2000, 1, 8, 8) * 2 - 1, valid) > 20
    # Of normal distributions it is known; here, for each of two independent numbers, 2**2 + 2**2.
    one, other = torch.randn(2, 200_000, 2).unbind()
    assert abs(frechet_distance(one, 3 * other + 2) - 16) < 0.3


def test_a_step_trains_both(tmp_path: Path) -> None:
    solver = make_solver(tmp_path, "data.limit=1")
    models = solver.model, solver.adversarial.adversary
    weights = [next(iter(model.parameters())).clone() for model in models]
    solver.run_stage("train", solver.train)
    after = [next(iter(model.parameters())) for model in models]
    assert all(not torch.equal(one, two) for one, two in zip(weights, after, strict=True))


def test_digits_are_learned(tmp_path: Path) -> None:
    solver = train(tmp_path, "epochs=40", "samples=1000")
    distances = [epoch["valid"]["frechet"] for epoch in solver.history]
    assert distances[-1] < 15 < distances[0]
    assert (tmp_path / "outputs" / "valid_40" / "samples.png").exists()
