"""The data and the model of the text, and that it is learned."""

from pathlib import Path

import pytest
import torch

from {{ cookiecutter.package_name }}.core.utils import UserError
from {{ cookiecutter.package_name }}.data import Alphabet, Windows, load_text
from {{ cookiecutter.package_name }}.model import Transformer

from .helpers import make_solver, train


def test_an_alphabet_gives_texts_back() -> None:
    alphabet = Alphabet("hello")
    assert len(alphabet) == 4
    assert alphabet.decode(alphabet.encode("hole")) == "hole"


def test_windows_hold_the_next_character() -> None:
    windows = Windows(torch.arange(10), length=3, stride=3)
    found = [windows[index].tolist() for index in range(len(windows))]
    assert found == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7, 8, 9]]
    assert len(Windows(torch.arange(10), length=3, stride=1)) == 7


def test_the_held_out_text_is_the_end() -> None:
    alphabet, train, valid = load_text()
    assert len(train) > 400_000
    assert 0.09 < len(valid) / len(train) < 0.12
    assert len(alphabet) > 90
    assert "statement" in alphabet.decode(train)


def test_the_model_does_not_look_ahead() -> None:
    model = Transformer(10, context=6, layers=2, width=8, heads=2, dropout=0.0)
    one, other = torch.zeros(2, 6).long(), torch.zeros(2, 6).long()
    other[:, 4:] = 5
    logits, others = model(one), model(other)
    assert logits.shape == (2, 6, 10)
    torch.testing.assert_close(logits[:, :4], others[:, :4])
    assert not torch.allclose(logits[:, 4:], others[:, 4:])


def test_texts_are_continued_by_the_same_dice(tmp_path: Path) -> None:
    solver = make_solver(tmp_path, "sample.prompt=def", "sample.length=20")
    solver.model.eval()
    state = torch.get_rng_state()
    text = solver.write()
    assert text.startswith("def")
    assert len(text) == 23
    assert solver.write() == text
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(UserError, match="no 'é' in the alphabet"):
        make_solver(tmp_path, "sample.prompt='é'")


def test_one_batch_is_learned_by_heart(tmp_path: Path) -> None:
    solver = train(tmp_path, "debug=overfit")
    assert solver.history[-1]["train"]["loss"] < 0.1


def test_text_is_learned(tmp_path: Path) -> None:
    solver = train(tmp_path, "experiment=small", "epochs=2", "data.updates_per_epoch=30")
    first, last = (epoch["valid"]["bpc"] for epoch in solver.history)
    # Single characters, by their frequency, take about 4.4 bits.
    assert last < first < 4.4
    assert last < 3.8
    assert len((tmp_path / "outputs" / "valid_2" / "sample.txt").read_text()) == 304
