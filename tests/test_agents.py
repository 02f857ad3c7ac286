"""Follow AGENTS.md of a rendered project, as a coding agent would: by commands and their output."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from .conftest import Copy


def start(project: Path, *command: str, code: int = 0) -> str:
    """Run Python in a project; return its output, without its log."""
    done = subprocess.run(
        [sys.executable, *command], cwd=project, capture_output=True, text=True, check=False
    )
    assert done.returncode == code, done.stderr
    return done.stdout


def end(said: str) -> dict[str, str]:
    """Return the `key: value` lines at the end of a run."""
    return dict(line.split(": ", 1) for line in said.split("---\n")[-1].splitlines())


def test_the_commands_of_the_page(copy: Copy, tmp_path: Path) -> None:
    project = copy(tmp_path, tracker="none")
    page = (project / "AGENTS.md").read_text()
    assert len(page.split()) <= 420
    [block] = re.findall(r"```bash\n(.*?)```", page, re.S)
    commands = [line.split("#")[0].split() for line in block.splitlines()]
    assert len(commands) == 9
    for command in commands[1:5]:  # the others are those of CI
        said = start(project, *(command[1:] if command[0] == "python" else ["-m", *command]))
        assert json.loads(said) if "--json" in command else end(said)["valid.acc"]
    for place in re.findall(r"^\| `(.*?)`", page.split("## Commands")[0], re.M):
        assert [*project.glob(place.split(",")[0].replace("<sig>", "*"))], place
    for key in re.findall(r"on stdout: (.*?) and the latest", page.replace("\n", " ")):
        again = start(project, "-m", *commands[2])
        assert {*re.findall(r"`(\w+)`", key)} <= end(again).keys()


def test_a_script_tunes_for_three_rounds(copy: Copy, tmp_path: Path) -> None:
    project = copy(tmp_path, tracker="none")
    losses: dict[float, float] = {}
    rates, best = [3e-4, 3e-3], 0.0
    for _ in range(3):
        for lr in rates:
            said = start(
                project, "-m", "dora", "run", "epochs=1", "optim.warmup=1", f"optim.lr={lr}"
            )
            losses[lr] = float(end(said)["valid.loss"])
        best = min(losses, key=lambda lr: losses[lr])
        rates = [rate for rate in (best / 2, best * 2) if rate not in losses][:1]
    assert len(losses) == 4
    runs: list[dict[str, Any]] = json.loads(
        start(project, "-m", "my_research.tools.report", "--json")
    )
    found = {run["config"]["optim"]["lr"]: run["metrics"]["valid.loss"]["last"] for run in runs}
    assert found == losses


def test_a_sweep_for_scripts(copy: Copy, tmp_path: Path) -> None:
    project = copy(tmp_path, tracker="none")
    grid = project / "my_research" / "grids" / "lr.py"
    grid.write_text(grid.read_text().replace('{"epochs": 5}', '{"epochs": 1, "data.limit": 3}'))
    sweep = ["-m", "my_research.tools.sweep", "lr", "--json"]
    runs = json.loads(start(project, *sweep, "--dry-run"))
    assert [run["state"] for run in runs] == ["PENDING"] * 4
    assert "optim.lr=0.01" in runs[2]["overrides"]
    runs = json.loads(start(project, *sweep))
    assert {run["state"] for run in runs} == {"COMPLETED"}
    assert all(0 < run["metrics"]["valid"]["loss"] < 9 for run in runs)
    assert all((project / "outputs" / "xps" / run["sig"]).is_dir() for run in runs)
