"""Refuses bad answers, before anything is written: filters of Jinja for cookiecutter.json.

Each refusal is one line that names the answer and the cure. `cookiecutter.json` asks for the checks
as soon as the answers are known; `pre_gen_project.py` asks again, since a replayed file of answers
does not pass through there.
"""

from __future__ import annotations

import json
import keyword
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from cookiecutter.exceptions import FailedHookException
from jinja2 import Environment

# Packages that the rendered project uses, and names that mean something in it.
DEPENDENCIES = {
    "absl", "antlr4", "click", "cloudpickle", "cookiecutter", "dora", "dora_search", "filelock",
    "fsspec", "git", "google", "grpc", "hatchling", "hydra", "hydra_core", "iniconfig", "jinja2",
    "joblib", "markdown", "markupsafe", "mpmath", "mypy", "narwhals", "networkx", "nox", "numpy",
    "omegaconf", "packaging", "pil", "pillow", "pip", "pkg_resources", "platformdirs", "plotly",
    "pluggy", "pre_commit", "pydantic", "pygments", "pytest", "pytest_timeout", "requests",
    "retrying", "ruff", "scikit_learn", "scipy", "sentry_sdk", "setuptools", "six", "sklearn",
    "submitit", "sympy", "tensorboard", "tensorflow", "threadpoolctl", "torch", "torchaudio",
    "torchvision", "tqdm", "treetable", "typing_extensions", "wandb", "werkzeug", "yaml",
}  # fmt: skip
FOLDERS = {
    "bin", "build", "conf", "config", "conftest", "core", "dist", "docs", "example", "examples",
    "grids", "lib", "main", "model", "outputs", "package", "setup", "solver", "src", "template",
    "test", "tests", "train", "venv",
}  # fmt: skip
WINDOWS = {"aux", "con", "nul", "prn", *(f"{p}{n}" for p in ("com", "lpt") for n in range(10))}

MAX_NAME = 60
MAX_TEXT = 200


def add_filters(environment: Environment, repo: Path) -> None:
    """Make the checks, and `quoted` for TOML and Python, available as filters."""
    check_hooks(repo)
    environment.filters["check_names"] = check_names
    environment.filters["check_texts"] = check_texts
    environment.filters["quoted"] = quoted


def check_hooks(repo: Path) -> None:
    """Refuse to render where `pre_prompt.py` did not put the template, `repo`, together."""
    if (repo / "hooks" / "pre_prompt.py").exists() and (repo / "template").exists():
        raise FailedHookException(
            "This template is put together by its hooks, which did not run: render it with "
            "cookiecutter itself, 2.4 or newer, and without `--accept-hooks no`."
        )


def quoted(text: str) -> str:
    """A string literal that TOML, JSON and Python read alike."""
    return json.dumps(text, ensure_ascii=False)


def check_names(answers: Mapping[str, str]) -> str:
    """Refuse names that can't be a folder and a package that one can import and install."""
    name, slug, package = (answers[k] for k in ("project_name", "project_slug", "package_name"))
    _check_text("project_name", name, MAX_NAME)
    _check_slug(slug)
    _check_package(package)
    return "checked"


def check_texts(answers: Mapping[str, str]) -> str:
    """Refuse texts that would break the files they go into."""
    _check_text("description", answers["description"], MAX_TEXT)
    _check_text("author_name", answers["author_name"], MAX_NAME)
    return "checked"


def _check_slug(slug: str) -> None:
    if not slug:
        _refuse("project_slug", slug, "is empty", "give a name such as my-research")
    if len(slug) > MAX_NAME:
        _refuse("project_slug", slug, f"is longer than {MAX_NAME} characters", "shorten it")
    if not re.fullmatch(r"[a-z0-9]+([-_][a-z0-9]+)*", slug):
        cure = "use lower case letters and digits, joined by single hyphens, as in my-research"
        _refuse("project_slug", slug, "is no plain folder name", cure)
    if slug.replace("-", "_") in DEPENDENCIES:
        _refuse("project_slug", slug, "is a package that it depends on", "choose another name")
    if slug.replace("-", "_") in WINDOWS:
        _refuse("project_slug", slug, "is a reserved name on Windows", "choose another name")


def _check_package(package: str) -> None:
    def refuse(problem: str, cure: str = "choose another name, such as my_research") -> None:
        _refuse("package_name", package, problem, cure)

    if not package:
        refuse("is empty")
    if len(package) > MAX_NAME:
        refuse(f"is longer than {MAX_NAME} characters", "shorten it")
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", package):
        cure = "use lower case letters, digits and single underscores, as in my_research"
        refuse("is no plain package name", cure)
    if keyword.iskeyword(package) or keyword.issoftkeyword(package):
        refuse("is a keyword of Python")
    if package in sys.stdlib_module_names:
        refuse("would hide a module of Python's standard library")
    if package in DEPENDENCIES:
        refuse("would hide a package that the project uses")
    if package in FOLDERS or package in WINDOWS:
        refuse("has a meaning of its own")


def _check_text(answer: str, text: str, longest: int) -> None:
    if not text.strip():
        _refuse(answer, text, "is empty", "write something")
    if len(text) > longest:
        _refuse(answer, text, f"is longer than {longest} characters", "shorten it")
    if not text.isprintable():
        _refuse(answer, text, "holds a line break or a control character", "write one plain line")
    if found := [c for c in ('"', "\\", "{{", "{%", "{#", "`", "<", ">", "$") if c in text]:
        _refuse(answer, text, f"holds {found[0]}", "leave it out")


def _refuse(answer: str, value: str, problem: str, cure: str) -> None:
    shown = value if len(value) <= MAX_NAME else value[: MAX_NAME - 3] + "..."
    raise FailedHookException(f"{answer} {shown!r} {problem}: {cure}.")
