"""Render for real: cookiecutter's own command, in a process of its own, with a home of its own."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# Of every process that the tests start: they share few cores.
os.environ["OMP_NUM_THREADS"] = "1"

# Shells let what they start in the background ignore Ctrl-C, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)

Render = Callable[..., subprocess.CompletedProcess[str]]


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
    source: str | Path, folder: Path, environment: dict[str, str], *options: str, **answers: str
) -> subprocess.CompletedProcess[str]:
    """Render into a folder, which is made, with these answers."""
    folder.mkdir(exist_ok=True)
    given = [f"{name}={value}" for name, value in answers.items()]
    return subprocess.run(
        [sys.executable, "-m", "cookiecutter", str(source), "--no-input", *options, *given],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A clean environment of the test's own."""
    return clean_environment(tmp_path)


@pytest.fixture
def render(template: Path, environment: dict[str, str], tmp_path: Path) -> Render:
    """Run cookiecutter into `tmp_path / "out"` with these answers."""

    def run(
        *options: str, source: str | Path = template, **answers: str
    ) -> subprocess.CompletedProcess[str]:
        return cookiecutter(source, tmp_path / "out", environment, *options, **answers)

    (tmp_path / "out").mkdir()
    return run
