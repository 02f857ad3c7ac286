"""Run a rendered project as its owner would, from the shell."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from .conftest import ROOT, Render


@pytest.fixture
def project(render: Render, tmp_path: Path) -> Path:
    assert render().returncode == 0
    return tmp_path / "out" / "my-research"


def start(project: Path, *command: str) -> subprocess.Popen[str]:
    full = [sys.executable, "-m", *command]
    return subprocess.Popen(full, cwd=project, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str], code: int = 0, timeout: float = 120) -> str:
    _, said = process.communicate(timeout=timeout)
    assert process.returncode == code, said
    return said


def history(project: Path) -> list[dict[str, Any]]:
    [path] = project.glob("outputs/xps/*/history.json")
    found: list[dict[str, Any]] = json.loads(path.read_text())
    return found


def test_digits_reach_their_score_and_two_processes_agree(project: Path) -> None:
    finish(start(project, "dora", "run"))
    alone = history(project)[-1]["valid"]["acc"]
    assert alone >= 0.98
    [run] = (project / "outputs" / "xps").iterdir()
    assert {"checkpoint.th", "history.json", "solver.log.0", "metrics.jsonl", "tensorboard"} <= {
        path.name for path in run.iterdir()
    }
    command = [sys.executable, "-m", "my_research.core.report"]
    said = subprocess.check_output(command, cwd=project, text=True, timeout=60)
    assert f"{run.name}  15/15 " in said
    assert "train grad_norm" in (project / "outputs" / "report.html").read_text()
    run.rename(project / "alone")
    finish(start(project, "dora", "run", "-d", "--ddp_workers=2"))
    assert abs(history(project)[-1]["valid"]["acc"] - alone) <= 0.01


@pytest.mark.timeout(700)
@pytest.mark.parametrize(
    ("example", "metric", "limit"), [("text", "bpc", 2.0), ("adversarial", "frechet", 3.0)]
)
def test_other_examples_reach_their_scores(
    example: str, metric: str, limit: float, render: Render, tmp_path: Path
) -> None:
    assert render(example=example).returncode == 0
    project = tmp_path / "out" / "my-research"
    finish(start(project, "dora", "run", "trackers=[]"), timeout=600)
    assert history(project)[-1]["valid"][metric] < limit


def test_ctrl_c_and_on(project: Path) -> None:
    command = ["my_research.train", "epochs=40", "trackers=[]"]
    process = start(project, *command)
    while not list(project.glob("outputs/xps/*/history.json")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = finish(process, code=130)
    assert "Traceback" not in said
    done = len(history(project))
    assert 0 < done < 40
    [resume] = set(re.findall(r"To resume it, whenever it stops: (dora run -f \w+)", said))
    assert f"Interrupted. The same command resumes after epoch {done}." in said
    said = finish(start(project, *resume.split()))
    assert f"resumes in epoch {done + 1}:" in said
    assert "Config of run" not in said
    assert "is complete after epoch 40: " in said
    assert len(history(project)) == 40


def test_doras_other_commands(project: Path) -> None:
    overrides = ["epochs=2", "trackers=[]"]
    finish(start(project, "dora", "run", *overrides))
    [run] = (project / "outputs" / "xps").iterdir()

    def dora(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, *command],
            cwd=project,
            env=os.environ | {"DORA_PACKAGE": "my_research"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    assert str(run) in dora("-m", "dora", "info", "epochs=2")
    assert "is complete after epoch" in dora("-m", "dora", "run", "-f", run.name)

    said = dora("-m", "dora", "run", "-f", run.name, "epochs=1")
    assert f"Run {run.name} with these overrides is another run: " in said

    # `--git_save` trains in a clone of the commit.
    dora("-m", "dora", "run", "--git_save", "epochs=3")
    [code] = project.glob("outputs/xps/*/code")
    assert (code / "my_research" / "train.py").exists()
    assert code.parent != run

    pytest.importorskip("hiplot")
    show = f"import dora.hiplot as h; print(len(h.load('{run.name}').datapoints), 'points')"
    assert "2 points" in dora("-c", show)


def test_two_commands_do_not_train_one_run(project: Path) -> None:
    command = ["dora", "run", "epochs=100", "trackers=[]"]
    first = start(project, *command)
    while not list(project.glob("outputs/xps/*/history.json")):
        assert first.poll() is None
        time.sleep(0.05)
    said = finish(start(project, *command), code=1)
    assert "is training in another process: wait for its end, or stop it first" in said
    assert "Traceback" not in said
    first.send_signal(signal.SIGINT)
    finish(first, code=130)


def test_all_processes_of_a_run_are_asked_to_stop(project: Path) -> None:
    options = ["-d", "--ddp_workers=2", "trackers=[]", "device=cpu", "epochs=99"]
    process = subprocess.Popen(
        [sys.executable, "-m", "dora", "run", *options, "data.num_workers=1"],
        cwd=project,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list(project.glob("outputs/xps/*/history.json")):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)  # the launcher, two ranks and their loaders' workers
    process.wait(60)
    [log] = project.glob("outputs/xps/*/solver.log.0")
    assert "saved. The same command resumes" in log.read_text()
    assert "Traceback" not in finish(process, 130)


def test_an_error_on_another_rank_is_shown_and_ends_the_run(project: Path) -> None:
    solver = project / "my_research" / "solver.py"
    fails = 'if distrib.rank() == 1 and self.epoch == 2:\n            raise ValueError("mine")\n'
    text = solver.read_text().replace("        self.model.train()\n", f"        {fails}", 1)
    solver.write_text(text)
    process = start(project, "dora", "run", "-d", "--ddp_workers=2", "trackers=[]", "device=cpu")
    said = finish(process, code=1)
    assert "Rank 1 failed: ValueError: mine" in said
    assert "The run failed" in said
    [log] = project.glob("outputs/xps/*/solver.log.1")
    assert "ValueError: mine" in log.read_text()
    assert len(history(project)) == 1


def test_a_slip_that_all_ranks_notice_is_said_once(project: Path) -> None:
    slip = ["-d", "--ddp_workers=2", "trackers=[]", "device=cpu", "data.batch_size=63"]
    said = finish(start(project, "dora", "run", *slip), code=1)
    assert (
        said.count("batch size 63: it must be a positive multiple of the number of processes") == 1
    )
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
        start(project, "torch.distributed.run", *told, f"--node-rank={rank}", *dora)
        for rank in range(2)
    ]
    for node in nodes:
        finish(node)
    assert [sorted(epoch) for epoch in history(project)] == [["train", "valid"]] * 2
    assert len(list(project.glob("outputs/xps/*/solver.log.*"))) == 2


def test_readme_is_true() -> None:
    """The test command is what CI runs; the solver shown is the solver rendered."""
    readme = (ROOT / "README.md").read_text()
    commands = [block.strip() for block in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL)]
    assert (ROOT / ".ci" / "run").read_text().strip().splitlines()[-1] == commands[1]
    [shown] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert shown in (ROOT / "template/examples/digits/package/solver.py").read_text()
