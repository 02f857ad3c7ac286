"""Replace the example of a rendered project, by the steps of its README."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from .commands import run
from .conftest import ROOT, Copy

EXAMPLES = json.loads((ROOT / "cookiecutter.json").read_text())["example"]

# A project of one's own: a line, through noise. It validates now and then, tests at the end, and
# has functions without types, as research code does.
OWN = {
    "data.py": """
import torch

def load() -> torch.utils.data.TensorDataset:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
""",
    "model.py": """
import sklearn
import torch

class Line(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.out = torch.nn.Linear(2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(x)
""",
    "schema.py": """
from dataclasses import dataclass
from typing import Any

@dataclass
class Optim:
    lr: float

@dataclass
class Config:
    epochs: int
    seed: int
    device: str
    detect_anomaly: bool
    trackers: list[str]
    length: int
    optim: Optim
    slurm: dict[str, Any]
    dora: dict[str, Any]
""",
    "solver.py": """
import torch

from .core import BaseSolver, distrib
from .core.data import loader
from .core.run import XP
from .data import load
from .model import Line
from .schema import Config

class Solver(BaseSolver):
    def __init__(self, cfg: Config, xp: XP | None = None) -> None:
        super().__init__(xp)
        self.cfg = cfg
        self.model = Line()
        self.optim = torch.optim.SGD(self.model.parameters(), lr=cfg.optim.lr)
        self.loader = loader(load(), 8, shuffle=True, limit=cfg.length)
        self.register_stateful("model", "optim")
        self.init_trackers(cfg.trackers)

    def run(self):
        with self.running():
            while self.epoch <= self.cfg.epochs:
                self.run_stage("train", self.train)
                if self.epoch % 2 == 0:
                    self.run_stage("valid", self.valid)
                self.commit()
            if "test" not in self.history[-1]:
                self.run_stage("test", self.test)
                self.commit()

    def test(self):
        return {"frechet": self.valid()["loss"]}

    def train(self) -> dict[str, float]:
        steps = self.steps(self.loader)
        for x, y in steps:
            loss = (self.model(x) - y).square().mean()
            self.optim.zero_grad()
            with distrib.eager_sync_model(self.model):
                loss.backward()
            self.optim.step()
            steps.log({"loss": loss})
        return steps.metrics()

    @torch.no_grad()
    def valid(self) -> dict[str, float]:
        x, y = load().tensors
        return {"loss": (self.model(x) - y).square().mean().item()}
""",
    "config/config.yaml": """
defaults: [schema, _self_, experiment: null, debug: null]

epochs: 3
seed: 0
device: cpu
detect_anomaly: false
trackers: []
length: 0
optim: {lr: 0.1}
slurm: {gpus: 1}
dora: {dir: "${oc.env:MY_RESEARCH_DIR,outputs}", exclude: [device, detect_anomaly, trackers]}
""",
    "config/experiment/far.yaml": """# @package _global_
# dora run experiment=far
# Expected: test frechet <= 0.1

optim: {lr: 0.2}
""",
    "config/debug/limit.yaml": """# @package _global_
# dora run debug=limit

epochs: 2
length: 3
""",
}


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_is_replaced(example: str, copy: Copy, tmp_path: Path) -> None:
    project = copy(tmp_path, example=example)
    dora = ["-m", "dora", "run", "epochs=1"]
    [sig] = re.findall(r"Run (\w+) starts in epoch 1:", run(project, *dora, "trackers=[]"))
    readme = (project / "README.md").read_text()
    [snippet] = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    run(project, "-c", snippet.replace("SIG", sig))
    [tree] = re.findall(r"```\noutputs/xps/<sig>/\n(.*?)```", readme, re.DOTALL)
    listed = [re.sub(r"<\w+>", "*", line.split()[0]) for line in tree.splitlines()]
    folder = project / "outputs" / "xps" / sig
    known = {path for pattern in listed for path in folder.glob(pattern.split("/")[0])}
    assert {*folder.iterdir()} == known

    [delete] = re.findall(r"```sh\n(.*?)```", readme, re.DOTALL)
    # Without the first line, the run of the example is in the way.
    first, *others = delete.splitlines()
    assert first == "rm -rf outputs"
    subprocess.run(["bash", "-euc", "\n".join(others)], cwd=project, check=True)
    for name, text in OWN.items():
        path = project / "my_research" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert "has changed since its last checkpoint" in run(project, *dora, code=1)
    subprocess.run(["bash", "-euc", first], cwd=project, check=True)
    assert "is complete" in run(project, *dora)
    left = [*project.glob("my_research/config/**/*.yaml"), *project.glob("tests/test_*.py")]
    assert sorted(path.name for path in left) == [
        *("anomaly.yaml", "config.yaml", "far.yaml", "limit.yaml"),
        *("test_config.py", "test_train.py"),
    ]
    # By now the projects are alike, but for the grid.
    some = [] if example == "digits" else ["-k", "killed or head or wrong"]
    run(project, "-m", "pytest", "-q", "tests", *some)
    if example == "digits":
        check_types(project)


def check_types(project: Path) -> None:
    """Accept functions without types in one's own files, and not in the core or the tools."""
    mypy = ["-m", "mypy", "--cache-dir", str(project / "cache")]
    assert "Success" in run(project, *mypy)
    for name in ("core/utils.py", "tools/runs.py", "core/tests/test_data.py"):
        path = project / "my_research" / name
        text = path.read_text()
        path.write_text(text + "\n\ndef untyped(x):\n    return x\n")
        assert "Function is missing a type annotation" in run(project, *mypy, code=1)
        path.write_text(text)
