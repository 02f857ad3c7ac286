"""Bad answers: one line that names the answer, a failure, and nothing left behind."""

import json
import re
import tomllib
from pathlib import Path

import pytest

from hooks.answers import DEPENDENCIES

from .conftest import Render

NAMES = [
    *("", "keyword-", "My", "a b", "a--b", "../x", "/tmp/x", "a/b", ".", "..", "é", "nul", "torch"),
    *('a"b', "a'b", "a\nb", "x" * 61, "{{ 7*7 }}!"),
]
PACKAGES = [
    *("", "class", "match", "json", "torch", "hydra", "dora", "core", "tests", "yaml", "1a"),
    *("My", "a b", "a-b", "../x", "/tmp/x", "é", "x" * 61, 'a"b', "a\nb"),
]
TEXTS = ["", " ", 'a"b', "a\\b", "a\nb", "\x07", "x" * 201]


def refused(render: Render, tmp_path: Path, answer: str, value: str) -> None:
    [line] = render(code=1, **{answer: value}).strip().splitlines()
    assert answer in line
    assert not list((tmp_path / "out").iterdir())
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", NAMES)
def test_slug(value: str, render: Render, tmp_path: Path) -> None:
    refused(render, tmp_path, "project_slug", value)


@pytest.mark.parametrize("value", PACKAGES)
def test_package(value: str, render: Render, tmp_path: Path) -> None:
    refused(render, tmp_path, "package_name", value)


@pytest.mark.parametrize("value", TEXTS)
@pytest.mark.parametrize("answer", ["project_name", "description", "author_name"])
def test_text(answer: str, value: str, render: Render, tmp_path: Path) -> None:
    refused(render, tmp_path, answer, value)


def test_a_replayed_bad_answer_is_refused(
    render: Render, environment: dict[str, str], tmp_path: Path
) -> None:
    render()
    [replay] = Path(environment["HOME"], ".cookiecutter_replay").glob("*.json")
    context = json.loads(replay.read_text())
    context["cookiecutter"] |= {"package_name": "torch", "project_slug": "other"}
    replay.write_text(json.dumps(context))
    render("--replay-file", str(replay), code=1)
    assert not (tmp_path / "out" / "other").exists()


def test_no_dependency_can_be_hidden(render: Render, tmp_path: Path) -> None:
    """The names that are refused include everything that the rendered project depends on."""
    render(tracker="both")
    text = (tmp_path / "out" / "my-research" / "pyproject.toml").read_text()
    about = tomllib.loads(text)
    needs = about["project"]["dependencies"] + about["dependency-groups"]["dev"]
    distributions = {re.split(r"[<>=]", need)[0].replace("-", "_") for need in needs}
    modules = {"dora_search": "dora", "hydra_core": "hydra"}
    assert {modules.get(name, name) for name in distributions} <= DEPENDENCIES
