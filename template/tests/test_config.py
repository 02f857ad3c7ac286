"""The config: what is wrong is refused in one line, and its groups are what they say."""

import re
from pathlib import Path

import pytest

from {{ cookiecutter.package_name }}.train import main

from .helpers import REPO, run

CONFIG = REPO / "{{ cookiecutter.package_name }}" / "config"
GROUPS = sorted(CONFIG.glob("*/*.yaml"), key=str)
# A training whose gradient is no number: zero times the infinite slope of a root.
BROKEN = """
import torch
from {{ cookiecutter.package_name }}.train import Solver, main

def broken(self):
    weight = torch.zeros(1, requires_grad=True)
    (weight.sqrt() * 0).backward()

Solver.run = broken
main()
"""
EXPERIMENTS = sorted(CONFIG.glob("experiment/*.yaml"))


def command(path: Path) -> list[str]:
    """The arguments of the `dora run` at the head of a file."""
    found = re.search(r"^# dora run( [^:\n]*)?", path.read_text(), re.MULTILINE)
    assert found, f"{path} does not begin with a command"
    return (found[1] or "").split()


@pytest.mark.parametrize("path", GROUPS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_the_command_at_the_head_of_a_file_chooses_it(path: Path) -> None:
    xp, chosen = main.get_xp(command(path)), f"{path.parent.name}={path.stem}"
    assert chosen in xp.argv or xp.sig == main.get_xp([chosen]).sig


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_an_experiment_is_a_run_of_its_own_and_says_what_to_expect(path: Path) -> None:
    assert main.get_xp(command(path)).sig != main.get_xp([]).sig
    assert re.search(r"^# Expected: \w+ \S+ [<>]=? [\d.]+", path.read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("override", "cure"),
    [
        ("optim.lrr=1", "did you mean 'optim.lr'?"),
        ("optim.lr=abc", "'abc'"),
        ("epochs=2.5", "'2.5'"),
        ("debug=limits", "debug is one of anomaly, limit"),
    ],
)
def test_a_wrong_override_is_refused_in_one_line(override: str, cure: str) -> None:
    with pytest.raises(SystemExit) as refused:
        main.get_xp([override])
    [line] = str(refused.value).splitlines()
    assert override.split("=")[0] in line
    assert cure in line


def test_an_anomaly_is_traced_to_its_line(tmp_path: Path) -> None:
    said = run("-c", BROKEN, "debug=anomaly", "device=cpu", outputs=tmp_path, code=1)
    assert "'SqrtBackward0' returned nan values" in said
    assert "line 7, in broken" in said.split("Traceback of forward call that caused the error")[1]
