"""Lint the recipes for containers and clusters; test_uv.py follows the one for Docker."""

import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

RECIPES = ROOT / "docs" / "elsewhere"


@pytest.mark.parametrize(
    "command",
    [("hadolint", "Dockerfile"), ("kubernetes-validate", "--strict", "kubernetes.yaml")],
    ids=lambda command: command[-1],
)
def test_a_recipe_has_no_mistake(command: tuple[str, ...]) -> None:
    linter = Path(sys.executable).with_name(command[0])
    if not linter.exists():
        pytest.skip(f"{command[0]} is not installed")
    done = subprocess.run(
        [linter, *command[1:]], cwd=RECIPES, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
