"""Replace the example of a rendered project, by the steps of its README."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from .commands import run
from .conftest import ROOT, Copy

EXAMPLES = json.loads((ROOT / "cookiecutter.json").read_text())["example"]

# A project of one's own: a line, through noise.
OWN = {
    "data.py": """
import torch

def load() -> torch.utils.data.TensorDataset:
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True))
""",
    "model.py": """
import torch

class Line(torch.nn.Linear):
    pass
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
        self.model = Line(2, 1)
        self.optim = torch.optim.SGD(self.model.parameters(), lr=cfg.optim.lr)
        self.loader = loader(load(), 8, shuffle=True, limit=cfg.length)
        self.register_stateful("model", "optim")
        self.init_trackers(cfg.trackers)

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
        (project / "my_research" / name).write_text(text)
    assert "has changed since its last checkpoint" in run(project, *dora, code=1)
    subprocess.run(["bash", "-euc", first], cwd=project, check=True)
    assert "is complete" in run(project, *dora)
    left = [*project.glob("my_research/config/**/*.yaml"), *project.glob("tests/test_*.py")]
    assert sorted(path.name for path in left) == [
        *("anomaly.yaml", "config.yaml", "limit.yaml", "test_config.py", "test_train.py")
    ]
    # By now the projects are alike, but for the grid.
    some = [] if example == "digits" else ["-k", "killed or head or wrong"]
    run(project, "-m", "pytest", "-q", "tests", *some)
