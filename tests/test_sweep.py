"""Sweep over a grid in a rendered project, without Slurm."""

import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest

from .commands import Command, run
from .faults import STARTED
from .gate import Gate

GRID = """
from {package}.grids.lr import {explorer} as Columns


@Columns
def explorer(launcher):
    launcher.bind_({{"epochs": {epochs}, "trackers": []}})
    for lr in ({rates}):
        launcher({{"optim.lr": lr}})
"""

WIDE = "Launcher) -> None:\n    launcher.slurm_(gpus=8)"


def add_grid(project: Path, name: str, rates: str, epochs: int = 3) -> None:
    text = GRID.format(package="my_research", explorer="Digits", rates=rates, epochs=epochs)
    (project / "my_research" / "grids" / f"{name}.py").write_text(text)


def start(project: Path, *args: str) -> Command:
    return Command(project, "-m", "my_research.tools.sweep", *args)


def sweep(project: Path, *args: str, code: int = 0) -> str:
    return start(project, *args).finish(code)


def epochs(project: Path) -> list[int]:
    paths = sorted(project.glob("outputs/xps/*/history.json"))
    return [len(json.loads(path.read_text())) for path in paths]


def started(project: Path) -> int:
    logs = project.glob("outputs/xps/*/solver.log.0")
    return sum(len(STARTED.findall(log.read_text())) for log in logs)


@pytest.mark.promise
def test_a_sweep_is_stopped_resumed_and_then_left_alone(project: Path) -> None:
    add_grid(project, "three", "1e-3, 3e-3, 1e-2")
    said = sweep(project, "three", "--dry-run")
    assert said.count(" PENDING ") == 3
    assert "In all runs: epochs=3\n" in said
    assert re.search(r"^ *index *name *state .* \| *epoch *loss *\| *loss *acc", said, re.M)
    assert re.search(r"^ *2  optim.lr=0.01 ", said, re.M)
    assert not (project / "outputs" / "xps").exists()

    gate = Gate(project)
    process = start(project, "three", "--workers", "2")
    process.until(lambda: gate.reached(processes=2))
    process.send(signal.SIGINT)
    said = process.finish(130)
    assert "Stopping 2 runs" in said
    assert "The same command resumes" in said
    assert not re.search(r"\x1b|Traceback", said)
    logs = [path.read_text() for path in project.glob("outputs/xps/*/solver.log.0")]
    assert all("Stopped by SIGTERM after" in log for log in logs)
    assert started(project) == 2

    gate.open()
    gate = Gate(project)
    process = start(project, "three", "--workers", "2")
    process.until(lambda: gate.reached(processes=2))
    process.send(signal.SIGTERM)
    assert "The same command resumes" in process.finish(130)

    gate.open()
    said = sweep(project, "three", "--workers", "2")
    assert said.split("\n\n")[-1].count(" COMPLETED ") == 3
    assert epochs(project) == [3, 3, 3]
    for path in project.glob("outputs/xps/*/sweep.json"):
        whole = path.read_text()
        path.write_text("{")  # as if a disk had been full
        assert sweep(project, "three", "--dry-run").count(" COMPLETED ") == 2
        path.write_text(whole)
    count = started(project)
    assert sweep(project, "three").count(" COMPLETED ") == 3
    assert started(project) == count

    config = project / "my_research" / "config" / "config.yaml"
    config.write_text(config.read_text().replace("dropout: 0.2", "dropout: 0.5"))
    said = sweep(project, "three", "--workers", "2", code=1)
    assert said.split("\n\n")[-1].count(" FAILED ") == 3  # as `dora run` would refuse each
    assert "has changed since its last checkpoint: model.dropout: 0.2 -> 0.5" in said


def test_a_run_that_trains_elsewhere_is_left_alone(project: Path) -> None:
    add_grid(project, "one", "1e-3,")
    gate = Gate(project)
    options = ["optim.lr=1e-3", "epochs=3", "trackers=[]"]
    elsewhere = Command(project, "-m", "dora", "run", *options)
    elsewhere.until(gate.reached)
    said = sweep(project, "one", code=1)
    [sig] = [path.name for path in project.glob("outputs/xps/*")]
    assert re.search(f"Run {sig} .*another process", said)
    assert " ELSEWHERE " in said
    gate.open()
    elsewhere.finish()
    assert started(project) == 1
    assert epochs(project) == [3]


def test_a_longer_training_of_the_same_run_is_not_complete(project: Path) -> None:
    config = project / "my_research" / "config" / "config.yaml"
    config.write_text(config.read_text().replace("exclude: [", "exclude: [epochs, "))
    for number in (1, 2):
        add_grid(project, "one", "1e-3,", epochs=number)
        assert " COMPLETED " in sweep(project, "one")
        assert epochs(project) == [number]


def test_a_failure_shows_the_end_of_its_log(project: Path) -> None:
    add_grid(project, "bad", "-1.0,")
    said = sweep(project, "bad", code=1)
    assert "Invalid learning rate: -1.0" in said
    assert " FAILED " in said
    assert "sweep.log" in said


def test_an_unknown_grid_is_named(project: Path) -> None:
    said = sweep(project, "lrr", code=1)
    [line] = said.splitlines()
    assert re.match("sweep: .*lrr.* lr$", line)


def test_what_is_wrong_is_said_in_a_line(project: Path) -> None:
    assert sweep(project, "lr", "--workers=0", code=1).startswith("sweep: --workers ")
    grids = project / "my_research" / "grids"
    (grids / "empty.py").write_text("")
    assert "empty.py" in sweep(project, "empty", code=1)
    (grids / "broken.py").write_text("import nowhere")
    assert "No module named 'nowhere'" in sweep(project, "broken", code=1)
    slip = (grids / "lr.py").read_text().replace("optim.lr", "optim.lrr")
    (grids / "slip.py").write_text(slip)
    [line] = sweep(project, "slip", code=1).splitlines()
    assert "did you mean 'optim.lr'?" in line
    wide = slip.replace("optim.lrr", "optim.lr").replace("Launcher) -> None:", WIDE)
    (grids / "wide.py").write_text(wide)
    pretend = "import torch; torch.cuda.is_available = lambda: True; "
    pretend += "torch.cuda.device_count = lambda: 2; from my_research.tools import sweep; "
    said = run(project, "-c", f"{pretend}sweep.main(['wide', '--dry-run'])", code=1)
    assert re.fullmatch("sweep: .*wide.* 8 .* 2 .*\n", said)


def test_a_run_without_an_epoch_is_a_slip(project: Path) -> None:
    add_grid(project, "none", "1e-3,", epochs=0)
    assert "ends without a commit" in sweep(project, "none", code=1)


def test_without_slurm_dora_names_the_other_way(project: Path) -> None:
    env = os.environ | {"PATH": str(Path(sys.executable).parent)}
    for command in (["grid", "lr"], ["launch"]):
        said = run(project, "-m", "dora", *command, code=1, env=env)
        assert ".sweep GRID" in said
        assert "Traceback" not in said


def test_damage_costs_the_damaged_run(project: Path) -> None:
    add_grid(project, "two", "1e-3, 3e-3", epochs=1)
    assert sweep(project, "two", "--workers=1").split("\n\n")[-1].count(" COMPLETED ") == 2
    first, _ = sorted(project.glob("outputs/xps/*"))
    for name, text in (
        ("sweep.json", "[]"),
        ("sweep.json", '{"epochs": "x", "config": {}}'),
        ("history.json", "3"),
        ("history.json", '"\udcff'),
    ):
        whole = (first / name).read_bytes()
        (first / name).write_bytes(text.encode(errors="surrogateescape"))
        assert sweep(project, "two", "--dry-run").count(" COMPLETED ") == 1
        (first / name).unlink()
        (first / name).mkdir()
        assert sweep(project, "two", "--dry-run").count(" COMPLETED ") == 1
        (first / name).rmdir()
        (first / name).write_bytes(whole)
    assert sweep(project, "two", "--dry-run").count(" COMPLETED ") == 2
    (first / "sweep.json").unlink()
    (first / "sweep.log").unlink()
    (first / "sweep.log").mkdir()
    said = sweep(project, "two", code=1)
    assert re.search(rf"Run {first.name} can't be started: .*sweep\.log", said)
    table = said.split("\n\n")[-1]
    assert table.count(" COMPLETED ") == table.count(" FAILED ") == 1
