"""What follows a training: export a run, read it without the core, look at it in a notebook."""

import ast
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from .commands import run
from .conftest import ROOT

pytest.importorskip("safetensors")
READ = """
import json, sys, torch
from safetensors.torch import load_file
from my_research.data import CLASSES, load
from my_research.model import ConvNet

config = json.load(open("exported/config.json"))
_, valid = load(config["data"]["name"], config["data"]["folder"])
model = ConvNet(valid.shape, CLASSES, config["model"]["channels"], config["model"]["dropout"])
model.load_state_dict(load_file("exported/model.safetensors"))
model.eval()
images, labels = (torch.stack(part) for part in zip(*((i, torch.as_tensor(l)) for i, l in valid)))
print((model(images).argmax(1) == labels).double().mean().item())
exported = torch.export.export(model, (images[:2],), dynamic_shapes=({0: torch.export.Dim.AUTO},))
assert torch.allclose(exported.module()(images[:5]), model(images[:5]), atol=1e-5)
print([name for name in sys.modules if name.startswith("my_research.core")])
"""


def test_weights_are_read_without_the_core(project: Path) -> None:
    run(project, "-m", "dora", "run", "epochs=3", "trackers=[]", "checkpoint.best=max valid.acc")
    [folder] = project.glob("outputs/xps/*")
    history = json.loads((folder / "history.json").read_text())
    best = max(history, key=lambda epoch: float(epoch["valid"]["acc"]))["valid"]["acc"]
    command = ["-m", "my_research.tools.export", folder.name, "--version", "best"]
    run(project, *command, "--out", "exported")
    card = (project / "exported" / "README.md").read_text()
    assert f"| valid.acc | {best:.4g} |" in card
    *_, accuracy, modules = run(project, "-c", READ).splitlines()
    assert float(accuracy) == pytest.approx(best)
    assert modules == "[]"

    env = {k: v for k, v in os.environ.items() if not k.startswith("HF_")}
    env |= {"HF_HOME": str(project / "nobody"), "HF_HUB_OFFLINE": "1"}
    said = run(project, *command, "--push", "ann/digits", code=1, env=env)
    assert "not logged in" in said
    assert (project / "exported" / folder.name / "model.safetensors").exists()
    said = run(project, *command[:2], "0123abcd", code=1)
    assert re.match(r".*export: .*0123abcd", said.splitlines()[-1])


def test_the_notebook_shows_the_newest_run(project: Path) -> None:
    nbformat, nbclient = map(pytest.importorskip, ("nbformat", "nbclient"))
    run(project, "-m", "dora", "run", "epochs=2", "trackers=[]")
    name = Path("notebooks", "results.ipynb")
    cells = nbformat.read(project / name, as_version=4)
    shipped = [cell.pop("outputs", None) for cell in cells.cells]
    client = nbclient.NotebookClient(cells, resources={"metadata": {"path": project / "notebooks"}})
    client.execute(env=os.environ | {"PYTHONPATH": str(project)})
    shown = [cell.get("outputs") for cell in cells.cells]

    def kinds(outputs: list[Any]) -> list[Any]:
        return [
            [(o["output_type"], *sorted(o.get("data", ()))) for o in cell or ()] for cell in outputs
        ]

    assert kinds(shown) == kinds(shipped), "run `nox -s pictures`"
    assert sum("image/png" in str(kind) for kind in kinds(shown)) == 2
    [history] = project.glob("outputs/xps/*/history.json")
    newest = json.loads(history.read_text())[-1]
    assert ast.literal_eval(shown[1][0]["data"]["text/plain"]) == newest
    assert str(Path.home()) not in (ROOT / "template/examples/digits" / name).read_text()
