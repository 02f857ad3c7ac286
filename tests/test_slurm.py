"""Run a rendered project on a real Slurm cluster: `nox -s slurm`."""

import json
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import faults
from .cluster import cluster, missing
from .commands import Command, run
from .conftest import Copy
from .gate import Gate

pytestmark = pytest.mark.skipif("SLURM_TESTS" not in os.environ, reason="run by `nox -s slurm`")

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
    launcher({"epochs": 3, "seed": 6, "data.num_workers": 1})
""",
    # Slurm's signal, due 90 s before the end, may come a minute earlier: with two minutes, at once.
    "limited": """
    launcher.slurm_(time=3)
    launcher({"epochs": 3, "seed": 3})
""",
}
CANCELLED = ("epochs=3", "seed=6", "data.num_workers=1")
LIMITED = ("epochs=3", "seed=3")
PREEMPTED = ("epochs=3", "seed=4")
REQUEUED = ("epochs=3", "seed=5", "data.num_workers=1")


class Lab:
    """A project, and a cluster to run it on."""

    def __init__(self, project: Path, env: dict[str, str]) -> None:
        self.project = project
        self.env = env
        # A gate for each run that a test stops, by the run's overrides.
        self.gates: dict[tuple[str, ...], Gate] = {
            overrides: Gate(project, f"self.epoch == 2 and self.cfg.seed == {seed}")
            for seed, overrides in enumerate((LIMITED, PREEMPTED, REQUEUED, CANCELLED), 3)
        }

    def run(self, *command: str) -> str:
        done = subprocess.run(
            command, cwd=self.project, env=self.env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def dora(self, *args: str) -> str:
        return run(self.project, "-m", "dora", "-P", "my_research", *args, env=self.env)

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

    def wait(self, job: str, wanted: str) -> None:
        while not (state := self.state(job)).startswith(wanted):
            # The accounting does not know a new job at once.
            goes_on = not state or state.startswith(("PEND", "RUN", "COMPLETING", "REQUEUED"))
            assert goes_on, f"job {job} is {state}\n{self.said(job)}"
            time.sleep(0.2)

    def said(self, job: str) -> str:
        """What a job's processes wrote beside their runs' logs."""
        paths = (self.project / "outputs").rglob(f"{job}_*_log.out")
        return "\n".join(f"{path.name}:\n{path.read_text()[-3000:]}" for path in paths)

    def log(self, folder: Path) -> str:
        paths = sorted(folder.glob("solver.log.*"))
        return "\n".join(path.read_text() for path in paths)

    def reach(self, job: str, overrides: tuple[str, ...], processes: int = 1) -> None:
        """Wait until the processes of a run are at its gate."""
        while not self.gates[overrides].reached(processes):
            assert self.state(job) in ("", "PENDING", "RUNNING"), self.said(job)
            time.sleep(0.1)

    def stopped(self, job: str, folder: Path, by: str = "") -> None:
        """Wait until a run has said that a signal stopped it."""
        while f"Stopped by {by}" not in self.log(folder):
            assert not self.state(job).startswith(("COMPLETED", "FAILED")), self.said(job)
            time.sleep(0.1)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory, copy: Copy) -> Iterator[Lab]:
    assert not missing(), missing()
    folder = tmp_path_factory.mktemp("slurm")
    project = copy(folder)
    package = project / "my_research"
    config = package / "config" / "config.yaml"
    text = re.sub(r"epochs: 15", "epochs: 2", config.read_text())
    config.write_text(re.sub(r"trackers: \[.*?\]", "trackers: []", text))
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
        command = ["-m", "dora", "-P", "my_research", "run", *distributed, *overrides]
        env = lab.env | {"MY_RESEARCH_DIR": str(self.outputs)}
        self.process = Command(lab.project, *command, env=env)

    def end(self) -> object:
        self.process.finish()
        [path] = self.outputs.glob("xps/*/checkpoint.th")
        return faults.load(path)


@pytest.fixture(scope="module", autouse=True)
def out_of_time(lab: Lab) -> str:
    """The longest job, which all other tests run beside."""
    said = lab.dora("grid", "limited", "--no_monitoring")
    [job] = re.findall(r"Scheduled job (\d+)", said)
    return str(job)


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
    states = re.findall(r" (UNK|PEN|RUN|COM|FAI) ", said)
    assert states[-3:] == ["COM", "COM", "FAI"], said
    assert "Invalid learning rate" in lab.log(lab.folder("optim.lr=-1.0"))
    assert epochs(lab.folder("optim.lr=0.001")) == 2


def test_a_cancelled_job_stays_cancelled_and_can_go_on(lab: Lab) -> None:
    said = lab.dora("grid", "long", "--no_monitoring")
    [job] = re.findall(r"Scheduled job (\d+)", said)
    lab.reach(job, CANCELLED)
    lab.dora("grid", "long", "--cancel")
    lab.wait(job, "CANCELLED")
    folder = lab.folder(*CANCELLED)
    lab.stopped(job, folder)
    lab.gates[CANCELLED].open()
    lab.wait(lab.launch("-r", *CANCELLED), "COMPLETED")
    assert lab.state(job).startswith("CANCELLED")
    assert epochs(folder) == 3


def test_preempted_and_requeued_no_step_is_lost(lab: Lab) -> None:
    preempted = lab.launch("-g", "2", *PREEMPTED)
    requeued = lab.launch(*REQUEUED)
    lab.reach(preempted, PREEMPTED, processes=2)
    lab.run("scancel", "--signal=USR2", preempted)
    lab.reach(requeued, REQUEUED)
    lab.run("scontrol", "requeue", requeued)
    for job, overrides, ranks in ((preempted, PREEMPTED, 2), (requeued, REQUEUED, 1)):
        folder = lab.folder(*overrides)
        lab.stopped(job, folder)
        lab.gates[overrides].open()
        whole = Reference(lab, f"whole-{ranks}", ranks, *overrides)
        lab.wait(job, "COMPLETED")
        assert faults.same(faults.load(folder / "checkpoint.th"), whole.end()), folder


def test_out_of_time_no_step_is_lost(lab: Lab, out_of_time: str) -> None:
    folder = lab.folder(*LIMITED)
    lab.stopped(out_of_time, folder, by="SIGUSR2")
    lab.gates[LIMITED].open()
    whole = Reference(lab, "whole-limited", 1, *LIMITED)
    lab.wait(out_of_time, "COMPLETED")
    assert faults.same(faults.load(folder / "checkpoint.th"), whole.end())
