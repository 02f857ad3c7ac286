"""Render for real: cookiecutter's own command, in a process of its own, with a home of its own."""

import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import core.tests.processes  # noqa: F401  (first, as its list of modules to preload is shorter)

from .commands import Command

ROOT = Path(__file__).parent.parent

# Shells let what they start in the background ignore Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

Render = Callable[..., str]


@pytest.fixture(autouse=True)
def nothing_left_running() -> Iterator[None]:
    """End the commands that a test started and, because it failed, did not wait for."""
    yield
    while Command.started:
        Command.started.pop().send(signal.SIGKILL)


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the repo: what git knows or would add."""
    copy = tmp_path_factory.mktemp("copy") / "cookiecutter-solver"
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)
    return copy


def clean_environment(folder: Path) -> dict[str, str]:
    """An environment in which nothing of the user's is read or written."""
    home = folder / "home"
    temporary = folder / "tmp"
    home.mkdir()
    temporary.mkdir()
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("GIT_", "COOKIECUTTER"))}
    return keep | {"HOME": str(home), "TMPDIR": str(temporary), "GIT_CONFIG_NOSYSTEM": "1"}


def cookiecutter(
    source: str | Path,
    folder: Path,
    environment: dict[str, str],
    *options: str,
    code: int = 0,
    **answers: str,
) -> str:
    """Render into a folder, which is made, with these answers; return what is said."""
    folder.mkdir(exist_ok=True)
    given = [f"{name}={value}" for name, value in answers.items()]
    arguments = ["-m", "cookiecutter", str(source), "--no-input", *options, *given]
    return Command(folder, *arguments, env=environment).finish(code)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A clean environment of the test's own."""
    return clean_environment(tmp_path)


@pytest.fixture
def render(template: Path, environment: dict[str, str], tmp_path: Path) -> Render:
    """Run cookiecutter into `tmp_path / "out"` with these answers."""

    def run(*options: str, code: int = 0, source: str | Path = template, **answers: str) -> str:
        folder = tmp_path / "out"
        return cookiecutter(source, folder, environment, *options, code=code, **answers)

    (tmp_path / "out").mkdir()
    return run


Copy = Callable[..., Path]


@pytest.fixture(scope="session")
def copy(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Copy a project into a folder; each set of answers is rendered once."""
    rendered: dict[str, Path] = {}

    def run(folder: Path, **answers: str) -> Path:
        key = str(answers)
        if key not in rendered:
            place = tmp_path_factory.mktemp("rendered")
            cookiecutter(template, place / "out", clean_environment(place), code=0, **answers)
            rendered[key] = place / "out" / answers.get("project_slug", "my-research")
        return Path(shutil.copytree(rendered[key], folder / rendered[key].name))

    return run


@pytest.fixture
def project(copy: Copy, tmp_path: Path) -> Path:
    """A project with the digits, to be changed."""
    return copy(tmp_path)
