"""The recipes of the core's README that need a whole project, run in one as they stand there."""

import json
import os
import re
import shutil
import textwrap
from pathlib import Path

import pytest

from .commands import run as python
from .conftest import ROOT, Copy

README = (ROOT / "core" / "README.md").read_text()


def section(title: str) -> str:
    """What the README has under a heading."""
    [text] = re.findall(rf"^### {title}\n(.*?)(?=^##|\Z)", README, re.M | re.S)
    return str(text)


def block(title: str) -> str:
    [found] = re.findall(r"```python\n(.*?)```", section(title), re.S)
    return str(found)


@pytest.fixture(scope="module")
def project(copy: Copy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits, for two short epochs."""
    project = copy(tmp_path_factory.mktemp("recipes"), tracker="none")
    config = project / "my_research" / "config" / "config.yaml"
    text = config.read_text().replace("epochs: 15", "epochs: 2").replace("size: 64", "size: 240")
    config.write_text(
        text.replace("channels: 32", "channels: 8").replace("warmup: 50", "warmup: 0")
    )
    return project


def contents(folder: Path) -> dict[str, bytes]:
    """The files in a folder."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_each_recipe_is_run_by_a_test() -> None:
    _, recipes = README.split("\n## Recipes\n")
    ours, cores = Path(__file__), ROOT / "tests" / "core" / "test_recipes.py"
    tests = ours.read_text() + cores.read_text()
    titles = re.findall(r"^### (.*)$", recipes.split("\n## ")[0], re.M)
    assert len(titles) >= 8
    assert [title for title in titles if f'("{title}"' not in tests] == []


def test_a_flag_for_one_stage(project: Path) -> None:
    solver = project / "my_research" / "solver.py"
    text = solver.read_text().replace("import math\n", "import math\nimport os\n")
    solver.write_text(text + "\n" + textwrap.indent(block("A flag for one stage"), "    "))
    flag = os.environ | {"ONLY_VALID": "1"}
    command = ["-m", "dora", "run", "optim.ema=0.5", "checkpoint.best=max valid.acc"]
    python(project, *command)
    [run] = (project / "outputs" / "xps").iterdir()
    before = contents(run)
    said = python(project, "-m", "dora", "run", "-f", run.name, env=flag)
    history = json.loads((run / "history.json").read_text())
    best = max(history, key=lambda epoch: float(epoch["valid"]["acc"]))
    assert f"Valid Summary | Epoch 3 | loss {best['valid']['loss']:.4f} | acc" in said
    assert contents(run) | {"solver.log.0": b""} == before | {"solver.log.0": b""}
    said = python(project, "-m", "dora", "run", "optim.lr=1e-5", env=flag, code=1)
    assert "nothing to validate" in said


def test_optuna(project: Path) -> None:
    optuna = pytest.importorskip("optuna")
    lines = re.findall(r"`(study[^`]+)`", section("Optuna"))
    (project / "my_research" / "tune.py").write_text("\n".join([block("Optuna"), *lines, ""]))
    python(project, "-m", "my_research.tune")
    study = optuna.load_study(study_name="lr", storage=f"sqlite:///{project / 'tune.db'}")
    ends = [trial.state.name for trial in study.trials]
    assert len(ends) == 20
    assert {*ends} == {"COMPLETE", "PRUNED"}, ends

    def history(trial: object) -> list[dict[str, dict[str, float]]]:
        """Of the run of a trial, which Dora finds by its parameter."""
        lr = f"optim.lr={trial.params['lr']}"  # type: ignore[attr-defined]
        found = [
            path.parent
            for path in project.glob("outputs/xps/*/.argv.json")
            if lr in json.loads(path.read_text())
        ]
        [run] = found
        return list(json.loads((run / "history.json").read_text()))

    for trial in study.trials:
        losses = [epoch["valid"]["loss"] for epoch in history(trial)]
        assert losses == [*trial.intermediate_values.values()]
        assert trial.state.name == "PRUNED" or len(losses) == 2
        assert trial.state.name == "PRUNED" or trial.value == losses[-1]

    # The run of a trial that was pruned after its first epoch resumes.
    pruned = next(trial for trial in study.trials if len(trial.intermediate_values) == 1)
    study.enqueue_trial(pruned.params)
    before = history(pruned)
    again = "from my_research.tune import *; study.optimize(objective, n_trials=1)"
    tune = project / "my_research" / "tune.py"
    tune.write_text(tune.read_text().replace(lines[1], "study.pruner = optuna.pruners.NopPruner()"))
    python(project, "-c", again)
    assert history(pruned)[:1] == before
    assert study.trials[-1].value == history(pruned)[1]["valid"]["loss"]


def remove_dora(project: Path) -> None:
    """Do what the recipe says."""
    package = project / "my_research"
    train = (package / "train.py").read_text()
    [old] = re.findall(r"^@hydra_main.*?(?=^def load_solver)", train, re.M | re.S)
    [load] = re.findall(r"    xp = main.get_xp_from_sig.*?(?=    if not)", train, re.S)
    [config] = re.findall(r"`(cfg = [^`]+)`", section("Without Dora"))
    new = [config, "cfg.device = device", "solver = Solver(cfg, FolderXP(Path(folder), cfg))"]
    hydra = "from .core.launch import hydra_main\n"
    assert hydra in train
    train = train.replace(hydra, "from omegaconf import OmegaConf\n")
    train = train.replace("import distrib,", "import checkpoint, distrib,")
    train = train.replace(old, block("Without Dora") + "\n\n").replace(
        load, "".join(f"    {line}\n" for line in new)
    )
    train = train.replace("load_solver(sig:", "load_solver(folder:").replace("run {sig} ", "it ")
    (package / "train.py").write_text(train.replace("    main()\n", "    main(*sys.argv[1:])\n"))
    shutil.rmtree(package / "grids")
    for name in ("sweep", "grid"):
        (package / "tools" / f"{name}.py").unlink()
    (package / "core" / "launch.py").unlink()
    init = package / "core" / "__init__.py"
    init.write_text(re.sub(r' launch,|"launch", ', "", init.read_text()))
    # There is no Dora now.
    (project / "dora.py").write_text("raise ImportError('Dora is gone')\n")


def test_without_dora(project: Path, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("outputs", "tune*")
    project = Path(shutil.copytree(project, tmp_path / "free", ignore=ignored))
    remove_dora(project)
    command = ["-m", "my_research.train", "outputs/first", "optim.lr=1e-3"]
    assert "Run first starts in epoch 1" in python(project, *command)
    (project / "outputs" / "first" / "checkpoint.th").unlink()  # so the one of epoch 1 is left
    then = (
        "from my_research import core, train; import my_research.tools.report as report;"
        "train.main('outputs/first', 'optim.lr=1e-3');"
        "solver = train.load_solver('outputs/first'); print(len(solver.history), solver.cfg.optim);"
        "report.main(['--dir', 'outputs'])"
    )
    said = python(project, "-c", then)
    assert "resumes in epoch 2" in said
    assert "2 {'lr': 0.001" in said
    assert re.search(r"^first .* 2", said, re.M)
    history = json.loads((project / "outputs" / "first" / "history.json").read_text())
    assert [[*epoch] for epoch in history] == [["train", "valid"]] * 2
