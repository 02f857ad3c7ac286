"""Run a rendered project as its owner would, from the shell."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .commands import Command, run
from .conftest import ROOT, Copy
from .faults import load, same
from .gate import Gate


def history(project: Path) -> list[dict[str, Any]]:
    [path] = project.glob("outputs/xps/*/history.json")
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


@pytest.mark.promise
def test_digits_reach_their_score_and_two_processes_agree(project: Path) -> None:
    subprocess.run([sys.executable, "-m", "dora", "run"], cwd=project, check=True)
    alone = history(project)[-1]["valid"]["acc"]
    assert alone >= 0.98
    [folder] = (project / "outputs" / "xps").iterdir()
    assert {"checkpoint.th", "history.json", "solver.log.0", "metrics.jsonl", "tensorboard"} <= {
        path.name for path in folder.iterdir()
    }
    said = run(project, "-m", "my_research.tools.report")
    assert f"{folder.name}  15" in said
    assert "train grad_norm" in (project / "outputs" / "report.html").read_text()
    folder.rename(project / "alone")
    run(project, "-m", "dora", "run", "-d", "--ddp_workers=2")
    assert abs(history(project)[-1]["valid"]["acc"] - alone) <= 0.01


@pytest.mark.parametrize(
    ("example", "metric", "limit"), [("text", "bpc", 2.0), ("adversarial", "frechet", 3.0)]
)
def test_other_examples_reach_their_scores(
    example: str, metric: str, limit: float, copy: Copy, tmp_path: Path
) -> None:
    project = copy(tmp_path, example=example)
    run(project, "-m", "dora", "run", "trackers=[]")
    assert history(project)[-1]["valid"][metric] < limit


def test_ctrl_c_and_on(project: Path) -> None:
    gate = Gate(project)
    process = Command(project, "-m", "my_research.train", "epochs=3", "trackers=[]")
    process.until(gate.reached)
    process.send(signal.SIGINT)
    said = process.finish(130)
    assert "Traceback" not in said
    assert len(history(project)) == 1
    [resume] = set(re.findall(r"To resume it, whenever it stops: (dora run -f \w+)", said))
    assert "Stopped by SIGINT after step 2 of train in epoch 2: saved" in said
    gate.open()
    said = run(project, "-m", *resume.split())
    assert "resumes in epoch 2:" in said
    assert "Config of run" not in said
    end = dict(line.split(": ", 1) for line in said.splitlines() if re.match(r"[\w.]+: \S+$", line))
    assert (end["epochs"], Path(end["folder"]).name) == ("3", end["sig"])
    assert float(end["valid.acc"]) == history(project)[-1]["valid"]["acc"]
    assert "is complete after epoch 3: " in said
    assert len(history(project)) == 3


@pytest.mark.promise
def test_asked_to_stop_it_goes_on_with_the_next_step(project: Path) -> None:
    gate = Gate(project)
    train = ["-m", "dora", "run", "epochs=3", "trackers=[]", "data.num_workers=1"]
    process = Command(project, *train)
    process.until(gate.reached)
    process.send(signal.SIGTERM)
    assert "Stopped by SIGTERM after step 2 of train in epoch 2: saved" in process.finish(130)
    gate.open()
    run(project, *train)
    run(project, *train, env=os.environ | {"MY_RESEARCH_DIR": "whole"})
    stopped, whole = (project.glob(f"{name}/xps/*/checkpoint.th") for name in ("outputs", "whole"))
    assert same(load(next(stopped)), load(next(whole)))


def test_a_run_is_trained_longer(project: Path) -> None:
    config = project / "my_research" / "config" / "config.yaml"
    config.write_text(config.read_text().replace("exclude: [", "exclude: [epochs, "))
    run(project, "-m", "dora", "run", "epochs=1", "trackers=[]")
    said = run(project, "-m", "dora", "run", "epochs=2", "trackers=[]")
    assert "The config has changed: epochs: 1 -> 2" in said
    assert "resumes in epoch 2" in said
    assert len(history(project)) == 2


def test_doras_other_commands(project: Path) -> None:
    overrides = ["epochs=2", "trackers=[]"]
    run(project, "-m", "dora", "run", *overrides)
    [folder] = (project / "outputs" / "xps").iterdir()
    assert str(folder) in run(project, "-m", "dora", "info", "epochs=2")
    model = project / "my_research" / "model.py"
    text = model.read_text()
    model.write_text(text + "# edited\n")
    said = run(project, "-m", "dora", "run", "-f", folder.name)
    assert "is complete after epoch" in said
    assert "Nothing left to train: raise `epochs`, or start anew with `dora run --clear`" in said
    assert "Changed since the last start: code" in said
    model.write_text(text)

    said = run(project, "-m", "dora", "run", "-f", folder.name, "epochs=1")
    assert f"Run {folder.name} with these overrides is another run: " in said

    # `--git_save` trains in a clone of the commit.
    run(project, "-m", "dora", "run", "--git_save", "epochs=3")
    [code] = project.glob("outputs/xps/*/code")
    assert (code / "my_research" / "train.py").exists()
    assert code.parent != folder

    pytest.importorskip("hiplot")
    show = f"import dora.hiplot as h; print(len(h.load('{folder.name}').datapoints), 'points')"
    env = os.environ | {"DORA_PACKAGE": "my_research"}
    assert "2 points" in run(project, "-c", show, env=env)


def test_two_commands_do_not_train_one_run(project: Path) -> None:
    gate = Gate(project)
    command = ["-m", "dora", "run", "trackers=[]"]
    first = Command(project, *command)
    first.until(gate.reached)
    said = run(project, *command, code=1)
    assert "is training in another process" in said
    assert "Traceback" not in said
    first.send(signal.SIGINT)
    first.finish(130)


def test_a_run_that_trains_is_not_cleared(project: Path) -> None:
    gate = Gate(project)
    command = ["-m", "dora", "run", "trackers=[]", "epochs=2"]
    first = Command(project, *command)
    first.until(gate.reached)
    [folder] = project.glob("outputs/xps/*")
    said = run(project, *command[:3], "--clear", *command[3:], code=1)
    assert f"run {folder.name} is training in another process" in said
    assert "Traceback" not in said
    gate.open()
    first.finish()
    assert len(history(project)) == 2
    said = run(project, *command[:3], "--clear", *command[3:])
    assert "starts in epoch 1" in said


@pytest.mark.parametrize("asked", [signal.SIGTERM, signal.SIGINT])
def test_all_processes_of_a_run_are_asked_to_stop(project: Path, asked: signal.Signals) -> None:
    gate = Gate(project)
    options = ["-d", "--ddp_workers=2", "trackers=[]", "device=cpu", "data.num_workers=1"]
    process = Command(project, "-m", "dora", "run", *options, prepare=os.setsid)
    process.until(lambda: gate.reached(processes=2))
    os.killpg(process.pid, asked)  # the launcher, two ranks and their loaders' workers
    said = process.finish(130)
    assert "Traceback" not in said
    assert "died" not in said
    [log] = project.glob("outputs/xps/*/solver.log.0")
    assert "saved. The same command resumes" in log.read_text()
    assert len(history(project)) == 1


def test_an_error_on_another_rank_is_shown_and_ends_the_run(project: Path) -> None:
    solver = project / "my_research" / "solver.py"
    fails = 'if distrib.rank() == 1 and self.epoch == 2:\n            raise ValueError("mine")\n'
    text = solver.read_text().replace("        self.model.train()\n", f"        {fails}", 1)
    solver.write_text(text)
    options = ["-d", "--ddp_workers=2", "trackers=[]", "device=cpu"]
    said = run(project, "-m", "dora", "run", *options, code=1)
    assert "rank 1 failed: ValueError: mine" in said
    assert "Traceback" not in said
    [log] = project.glob("outputs/xps/*/solver.log.1")
    assert "Traceback" in log.read_text()
    assert len(history(project)) == 1


def test_a_slip_that_all_ranks_notice_is_said_once(project: Path) -> None:
    slip = ["-d", "--ddp_workers=2", "trackers=[]", "device=cpu", "data.batch_size=63"]
    said = run(project, "-m", "dora", "run", *slip, code=1)
    assert said.count("batch size 63: ") == 1
    assert "Traceback" not in said
    [log] = project.glob("outputs/xps/*/solver.log.0")
    assert "Traceback" in log.read_text()


def test_torchrun_on_two_machines_that_are_one(project: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    told = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={port}"]
    dora = ["-m", "dora", "run", "epochs=2", "trackers=[]"]
    nodes = [
        Command(project, "-m", "torch.distributed.run", *told, f"--node-rank={rank}", *dora)
        for rank in range(2)
    ]
    for node in nodes:
        node.finish()
    assert [sorted(epoch) for epoch in history(project)] == [["train", "valid"]] * 2
    assert len(list(project.glob("outputs/xps/*/solver.log.*"))) == 2


def test_torchrun_starts_a_killed_rank_again(project: Path) -> None:
    gate = Gate(project)
    told = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    dora = ["-m", "dora", "run", "epochs=3", "trackers=[]"]
    process = Command(project, "-m", "torch.distributed.run", *told, *dora)
    process.until(lambda: gate.reached(processes=2))
    os.kill(max(int(path.name) for path in gate.folder.iterdir()), signal.SIGKILL)
    gate.open()
    process.finish()
    assert len(history(project)) == 3
    [log] = project.glob("outputs/xps/*/solver.log.0")
    assert "resumes in epoch 2" in log.read_text()


def test_readme_is_true() -> None:
    """The test command is what CI runs first; the solver shown is the solver rendered."""
    readme = (ROOT / "README.md").read_text()
    commands = [block.strip() for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)]
    *_, first, second = (ROOT / ".ci" / "run").read_text().strip().splitlines()
    assert (first, second) == (commands[1], "python3 -m nox -s full")
    [shown] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert shown in (ROOT / "template/examples/digits/package/solver.py").read_text()
