"""Run a rendered project on a real Slurm cluster: `nox -s slurm`."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import faults
from .cluster import cluster, missing
from .conftest import clean_environment, cookiecutter

pytestmark = [
    pytest.mark.skipif("SLURM_TESTS" not in os.environ, reason="run by `nox -s slurm`"),
    pytest.mark.timeout(400),
]

GRIDS = {
    "three": """
    with launcher.job_array():
        launcher({"optim.lr": 1e-3})
        launcher({"optim.lr": 2e-3})
    launcher({"optim.lr": -1.0})
""",
    "nodes": """
    # Slurm's nodes get eight processes each, or one for eight GPUs.
    launcher.slurm_(gpus=16, one_task_per_node=True, cpus_per_gpu=1, mem_per_gpu=1)
    launcher({"optim.lr": 3e-3})
""",
    "long": """
    launcher({"epochs": 30, "seed": 6, "data.num_workers": 1})
""",
    # Slurm's signal, due 90 s before the end, may come a minute earlier: with two minutes, at once.
    "limited": """
    launcher.slurm_(time=3)
    launcher({"epochs": 110, "seed": 3})
""",
}
LIMITED = ("epochs=110", "seed=3")


class Lab:
    """A project, and a cluster to run it on."""

    def __init__(self, project: Path, env: dict[str, str]) -> None:
        self.project = project
        self.env = env

    def run(self, *command: str, code: int = 0, timeout: float = 180) -> str:
        done = subprocess.run(
            command, cwd=self.project, env=self.env, capture_output=True, text=True, timeout=timeout
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def dora(self, *args: str, code: int = 0) -> str:
        return self.run(sys.executable, "-m", "dora", "-P", "my_research", *args, code=code)

    def launch(self, *args: str) -> str:
        """Start a run as a job; return the job's id."""
        said = self.dora("launch", "--no_tail", *args)
        found = re.search(r"Scheduled job (\d+)", said)
        assert found, said
        return found[1]

    def folder(self, *overrides: str) -> Path:
        """The folder of a run."""
        said = self.dora("info", *overrides)
        found = re.search(r"(/\S+/xps/\w+)", said)
        assert found, said
        return Path(found[1])

    def state(self, job: str) -> str:
        return self.run("sacct", "-j", job, "-n", "-X", "-P", "-o", "State").strip()

    def wait(self, job: str, wanted: str, seconds: float = 180) -> None:
        deadline = time.monotonic() + seconds
        while not (state := self.state(job)).startswith(wanted):
            ended = not state.startswith(("PENDING", "RUNNING", "COMPLETING", "REQUEUED"))
            if ended or time.monotonic() > deadline:
                pytest.fail(f"job {job} is {state}\n{self.said(job)}")
            time.sleep(0.5)

    def said(self, job: str) -> str:
        """What a job's processes wrote beside their runs' logs."""
        paths = (self.project / "outputs").rglob(f"{job}_*_log.out")
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in paths)

    def log(self, folder: Path) -> str:
        paths = sorted(folder.glob("solver.log.*"))
        return "\n".join(path.read_text() for path in paths)

    def wait_for(self, folder: Path, text: str, seconds: float = 90) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.log(folder):
            assert time.monotonic() < deadline, f"{text!r} is not in the log:\n{self.log(folder)}"
            time.sleep(0.1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[Lab]:
    assert not missing(), missing()
    folder = tmp_path_factory.mktemp("slurm")
    rendered = cookiecutter(template, folder / "out", clean_environment(folder))
    assert rendered.returncode == 0, rendered.stderr
    project = folder / "out" / "my-research"
    package = project / "my_research"
    config = package / "config" / "config.yaml"
    text = re.sub(r"epochs: 15", "epochs: 2", config.read_text())
    config.write_text(re.sub(r"trackers: \[.*?\]", "trackers: []", text))
    # Long enough to be stopped, without keeping the machine busy.
    solver = (
        (package / "solver.py").read_text().replace("import math\n", "import math\nimport time\n")
    )
    pause = "            time.sleep(0.01)\n            step = self.run_step("
    (package / "solver.py").write_text(solver.replace("            step = self.run_step(", pause))
    for name, body in GRIDS.items():
        head = "from my_research.grids.lr import Digits\n\n\n@Digits\ndef explorer(launcher):"
        (package / "grids" / f"{name}.py").write_text(head + body)
    with cluster(folder / "cluster") as env:
        yield Lab(project, env)


class Reference:
    """A run that nothing befalls, on this machine."""

    def __init__(self, lab: Lab, name: str, ranks: int, *overrides: str) -> None:
        self.outputs = lab.project.parent / name
        distributed = ["-d", f"--ddp_workers={ranks}"] if ranks > 1 else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "dora", "-P", "my_research", "run", *distributed, *overrides],
            cwd=lab.project,
            env=lab.env | {"MY_RESEARCH_DIR": str(self.outputs)},
            stderr=subprocess.DEVNULL,
        )

    def end(self) -> object:
        assert self.process.wait(180) == 0
        [path] = self.outputs.glob("xps/*/checkpoint.th")
        return faults.load(path)


@pytest.fixture(scope="module", autouse=True)
def out_of_time(lab: Lab) -> Iterator[tuple[str, Reference]]:
    """The longest job, which all other tests run beside, and the same run with time enough."""
    said = lab.dora("grid", "limited", "--no_monitoring")
    [job] = re.findall(r"Scheduled job (\d+)", said)
    whole = Reference(lab, "whole-limited", 1, *LIMITED)
    yield job, whole
    whole.process.kill()


def epochs(folder: Path) -> int:
    return len(json.loads((folder / "history.json").read_text()))


def test_launch_with_one_task_and_with_two(lab: Lab) -> None:
    jobs = [lab.launch("seed=1"), lab.launch("-g", "2", "seed=2")]
    for job in jobs:
        lab.wait(job, "COMPLETED")
    one, two = lab.folder("seed=1"), lab.folder("seed=2")
    assert epochs(one) == epochs(two) == 2
    assert not (one / "solver.log.1").exists()
    assert "rank 1 of 2, gloo" in (two / "solver.log.1").read_text()


def test_a_job_on_two_nodes(lab: Lab) -> None:
    said = lab.dora("grid", "nodes", "-i", "0.05")
    [job] = re.findall(r"Scheduled job (\d+)", said)
    assert (
        lab.run("sacct", "-j", job, "-n", "-X", "-P", "-o", "NNodes,State").strip() == "2|COMPLETED"
    )
    assert "rank 1 of 2, gloo" in lab.log(lab.folder("optim.lr=0.003"))


def test_a_grid_with_an_array_and_a_failure(lab: Lab) -> None:
    said = lab.dora("grid", "three", "-i", "0.05")
    assert len(re.findall(r"Scheduled job \d+_\d", said)) == 2
    states = re.findall(r" (UNK|PEN|RUN|COM|FAI) ", said.split("Grid:")[0])
    assert states[-3:] == ["COM", "COM", "FAI"], said
    assert "Invalid learning rate" in lab.log(lab.folder("optim.lr=-1.0"))
    assert epochs(lab.folder("optim.lr=0.001")) == 2


def test_a_cancelled_job_stays_cancelled_and_can_go_on(lab: Lab) -> None:
    overrides = ("epochs=30", "seed=6", "data.num_workers=1")
    said = lab.dora("grid", "long", "--no_monitoring")
    [job] = re.findall(r"Scheduled job (\d+)", said)
    folder = lab.folder(*overrides)
    lab.wait_for(folder, "Train | Epoch 2 ")
    lab.dora("grid", "long", "--cancel")
    lab.wait(job, "CANCELLED")
    lab.wait_for(folder, "Stopped by ")
    time.sleep(3)
    assert lab.state(job).startswith("CANCELLED")
    lab.wait(lab.launch("-r", *overrides), "COMPLETED")
    assert epochs(folder) == 30


def test_preempted_and_requeued_no_step_is_lost(lab: Lab) -> None:
    preempted = ("-g", "2", "epochs=24", "seed=4")
    requeued = ("epochs=24", "seed=5", "data.num_workers=1")
    folders = [lab.folder(*preempted[2:]), lab.folder(*requeued)]
    jobs = []
    ask = [("scancel", "--signal=USR2"), ("scontrol", "requeue")]
    for overrides, folder, command in zip((preempted, requeued), folders, ask, strict=True):
        jobs.append(lab.launch(*overrides))
        lab.wait_for(folder, "Train | Epoch 2 ")
        lab.run(*command, jobs[-1])
    wholes = [
        Reference(lab, "whole-preempted", 2, *preempted[2:]),
        Reference(lab, "whole-requeued", 1, *requeued),
    ]
    for job in jobs:
        lab.wait(job, "COMPLETED")
    for folder, whole in zip(folders, wholes, strict=True):
        assert "Stopped by " in lab.log(folder), folder
        assert faults.same(faults.load(folder / "checkpoint.th"), whole.end()), folder


def test_out_of_time_no_step_is_lost(lab: Lab, out_of_time: tuple[str, Reference]) -> None:
    job, whole = out_of_time
    lab.wait(job, "COMPLETED", seconds=300)
    folder = lab.folder(*LIMITED)
    assert "Stopped by SIGUSR2" in lab.log(folder)
    assert faults.same(faults.load(folder / "checkpoint.th"), whole.end())
