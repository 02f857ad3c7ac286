"""Move projects here by the steps of docs/migrating.md, as they are written there.

Flashy's own two examples come from its archive on the package index, and are skipped where that is
out of reach; the one of its README is in `flashy_readme.md`.
"""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from core import checkpoint

from .blocks import DOCS, Block, blocks
from .commands import Command
from .commands import run as python
from .conftest import ROOT, Copy
from .gate import Gate

SDIST = (
    "flashy==0.0.2 --hash=sha256:e7f5afc3130d5af5ddbce1d22f4a729f1900055488cb0b531cdbc190dc79e9fd"
)
PAGE = blocks(DOCS / "migrating.md")
STEPS = {block.name: block for block in PAGE if block.language == "bash"}
PEERS = {
    "From a bare loop": "torch",
    "From Lightning": "lightning",
}
BIN = Path(sys.executable).parent


def environment(**more: str) -> dict[str, str]:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "USER": "me"} | more


def run(project: Path, *command: str, **env: str) -> str:
    """Run a command in a project; return all that it says."""
    done = subprocess.run(
        command,
        cwd=project,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def dora(project: Path, *options: str, **env: str) -> str:
    """Train; return all that is said."""
    return python(project, "-m", "dora", "run", *options, env=environment(**env))


def follow(project: Path, old: Path, *steps: str) -> str:
    """Take the steps of these names; return what the last one says."""
    said = ""
    for step in steps:
        said = run(project, "bash", "-euc", STEPS[step].text, OLD=str(old))
    return said


def folder(project: Path, outputs: str = "outputs") -> Path:
    """That of the only run."""
    [found] = (project / outputs / "xps").iterdir()
    return found


def history(run: Path) -> list[dict[str, dict[str, float]]]:
    return list(json.loads((run / "history.json").read_text()))


def state(run: Path) -> dict[str, Any]:
    """All that is in the checkpoint, but for where the run is."""
    found = checkpoint.read(run / "checkpoint.th")
    del found["xp.cfg"]["dora"]
    return found


def learns(run: Path) -> None:
    """See that all three epochs of a toy were trained, each better than the last."""
    losses = [epoch["train"]["loss"] for epoch in history(run)]
    assert len(losses) == 3
    assert losses == sorted(losses, reverse=True)


def same(one: Any, other: Any) -> None:
    """See that two states are equal, bit for bit, but for what tells time."""
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one.keys() - {"duration"}:
            same(one[key], other[key])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other)
        for mine, theirs in zip(one, other, strict=True):
            same(mine, theirs)
    elif isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)
    else:
        assert one == other


@pytest.fixture(scope="module")
def rendered(copy: Copy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("rendered")
    return copy(where, example="basic")


@pytest.fixture
def project(rendered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered, tmp_path / "my-research"))


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `examples` of Flashy, which holds `basic` and `cifar`."""
    where = tmp_path_factory.mktemp("flashy")
    (where / "wanted.txt").write_text(SDIST)
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:"]
    done = subprocess.run([*pip, "-r", "wanted.txt"], cwd=where, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"Flashy's archive is out of reach: {done.stderr.strip().splitlines()[-1]}")
    shutil.unpack_archive(where / "flashy-0.0.2.tar.gz", where, filter="data")
    return where / "flashy-0.0.2" / "examples"


def test_the_example_of_flashys_readme(project: Path, tmp_path: Path) -> None:
    config, code = blocks(ROOT / "tests" / "flashy_readme.md")
    old = tmp_path / "old" / "basic"
    (old / "config").mkdir(parents=True)
    (old / "__init__.py").touch()
    (old / "train.py").write_text(code.text)
    # In a folder of the test's own, rather than in /tmp.
    kept = config.text.replace("/tmp/", f"{tmp_path}/")
    (old / "config" / "config.yaml").write_text(kept)

    follow(project, old, "move", "imports")
    dora(project)  # with nothing but the import changed, and so one epoch short
    [first] = tmp_path.glob("flashy_basic_me/outputs/xps/*")
    assert [[*epoch] for epoch in history(first)] == [["train"]] * 9

    assert follow(project, old, "config", "scope", "check") == "Nothing is left.\n"
    dora(project)
    moved = folder(project)
    whole = history(moved)
    assert len(whole) == 10
    assert any((moved / "tensorboard").iterdir())
    # The last epoch was committed without a checkpoint: the same command repeats it, exactly.
    dora(project)
    same(history(moved), whole)


def test_flashys_basic(project: Path, examples: Path) -> None:
    follow(project, examples / "basic", "move", "imports", "config", "scope")
    dora(project, "-d", "--ddp_workers=2")
    assert len(history(folder(project))) == 10
    assert {path.name for path in folder(project).glob("solver.log.*")} == {
        "solver.log.0",
        "solver.log.1",
    }


SPELLINGS = """
import flashy.distrib as fdist
import flashy as f
from dora import get_xp, hydra_main
from flashy import averager
from flashy.distrib import rank  # noqa
from flashy.loggers import TensorboardLogger

def build():
    import flashy  # noqa
    average = averager(beta=0.9)
    both = [f.averager(), flashy.utils.averager()]

@hydra_main(config_path="config", config_name="config", version_base="1.1")
def main(cfg):
    pass
"""
MOVED = """
import my_research.core.distrib as fdist
from my_research import core as f
from dora import get_xp
from my_research.core.launch import hydra_main
from my_research.core import averager
from my_research.core.distrib import rank  # noqa
from my_research.core.loggers import TensorboardLogger

def build():
    from my_research import core as flashy
    average = averager(beta=0.9)
    both = [f.averager(), flashy.utils.averager()]

@hydra_main(config_path="config", config_name="config")
def main(cfg):
    pass
"""


def test_other_spellings(project: Path, tmp_path: Path) -> None:
    old = tmp_path / "old"
    (old / "config").mkdir(parents=True)
    (old / "config" / "config.yaml").write_text("dora:\n  dir: here\n")
    (old / "train.py").write_text(SPELLINGS)
    (old / "more.py").write_text("from dora import hydra_main\nimport flashy, torch\n")
    said = follow(project, old, "move", "imports", "config", "scope", "check")
    assert (project / "my_research" / "train.py").read_text() == MOVED
    assert sorted(said.splitlines()) == [
        "my_research/more.py:2:import flashy, torch",
        "my_research/train.py:8:from my_research.core.loggers import TensorboardLogger",
    ]
    more = (project / "my_research" / "more.py").read_text()
    assert more == "from my_research.core.launch import hydra_main\nimport flashy, torch\n"
    assert [path.name for path in (project / "tests").iterdir()] == ["__init__.py"]


def parameters(path: Path) -> Iterator[tuple[str, str]]:
    """Each public function of a module, or method of a class there, and each of its arguments."""

    def arguments(function: ast.FunctionDef, name: str) -> Iterator[tuple[str, str]]:
        args = function.args
        yield name, ""
        for arg in (*args.posonlyargs, *args.args, *args.kwonlyargs, args.kwarg):
            if arg is not None and arg.arg not in ("self", "cls"):
                yield name, arg.arg

    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef) and node.name[0] != "_":
            yield from arguments(node, node.name)
        for method in node.body if isinstance(node, ast.ClassDef) else ():
            if isinstance(method, ast.FunctionDef) and not re.match("_(?!_)", method.name):
                yield from arguments(method, f"{node.name}.{method.name}")  # type: ignore[attr-defined]
            if isinstance(method, ast.AnnAssign) and node.decorator_list:  # type: ignore[attr-defined]
                made = f"{node.name}.__init__"  # type: ignore[attr-defined]  # by `@dataclass`
                yield from ((made, ""), (made, ast.unparse(method.target)))


def test_all_that_differs_is_listed(examples: Path) -> None:
    text = (DOCS / "migrating.md").read_text()
    [table] = re.findall(r"### What differs\n(.*?)^## ", text, re.M | re.S)
    files = [*(ROOT / "core").glob("*.py"), *(ROOT / "core" / "distrib").glob("*.py")]
    found = {pair for path in files for pair in parameters(path)}
    # A solver inherits what it logs.
    ours = {(name.replace("Logs.", "BaseSolver."), arg) for name, arg in found}
    paths = (examples.parent / "flashy").glob("*.py")
    released = {pair for path in paths for pair in parameters(path)}
    # As `parameters` finds them in commit 8eaefb5 of kyutai-labs/flashy, version 0.1.1a3.
    fork = json.loads((ROOT / "tests" / "flashy_fork.json").read_text())
    theirs = released | {(name, arg) for name, args in fork.items() for arg in ("", *args)}
    names = {name.removesuffix(".__init__").split(".")[-1] for name, _ in theirs - ours} - {
        *("history", "owner"),  # attributes rather than properties
        "init_tensorboard",  # whose `**kwargs` are the same, by name
        "__next__",  # by a generator
        "__metrics_source",  # of `update`, which takes it by position as well
        "rank_zero_only",  # whose argument is called otherwise
    }
    assert {"broadcast_object", "to_dict"} <= names
    assert sorted(name for name in names if name not in table) == []


@pytest.fixture(scope="module")
def cifar(rendered: Path, examples: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Flashy's `cifar`, with nothing but the import changed."""
    where = tmp_path_factory.mktemp("cifar") / "my-research"
    project = Path(shutil.copytree(rendered, where))
    shutil.copy(ROOT / "tests" / "torchvision.py", project)
    follow(project, examples / "cifar", "move", "imports")
    config = project / "my_research" / "config" / "config.yaml"
    config.write_text(config.read_text().replace("/tmp/", f"{project.parent}/"))
    return project


def test_flashys_cifar_with_one_line_changed(cifar: Path) -> None:
    dora(cifar, "epochs=1")
    [only] = history(folder(cifar.parent / "flashy_cifar_me"))
    assert [*only] == ["train", "valid"]


def test_flashys_cifar(cifar: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(cifar, tmp_path / "my-research"))
    follow(project, tmp_path, *[*STEPS][2:])
    options = ["epochs=4", "optim.lr=0.1"]
    dora(project, *options, MY_RESEARCH_DIR="whole")
    whole = folder(project, "whole")
    losses = [epoch["train"]["loss"] for epoch in history(whole)]
    assert losses[-1] < 0.8 * losses[0], losses  # real training
    assert (whole / "outputs" / "valid_4" / "sample.png").is_file()

    gate = Gate(project)
    killed = Command(project, "-m", "dora", "run", *options, env=environment())
    killed.until(lambda: gate.reached() and list(project.glob("outputs/xps/*/history.json")))
    killed.send(signal.SIGKILL)
    killed.wait()
    assert len(history(folder(project))) == 1
    gate.open()
    dora(project, *options)
    resumed = folder(project)
    same(state(resumed), state(whole))

    load = "from my_research.train import get_solver_from_sig as load; solver = load({!r});"
    show = "print(len(solver.history), next(solver.model.parameters()).device)"
    said = python(project, "-c", load.format(resumed.name) + show, env=environment())
    assert said.splitlines()[-1] == "4 cpu"


WEIGHTS = """

def log_weights(self):
    import hashlib

    values = [tensor.tolist() for tensor in self.model.state_dict().values()]
    self.logger.info("weights %s", hashlib.sha256(repr(values).encode()).hexdigest())
"""


def test_flashys_cifar_on_two_processes(cifar: Path, tmp_path: Path) -> None:
    project = Path(shutil.copytree(cifar, tmp_path / "my-research"))
    follow(project, tmp_path, *[*STEPS][2:])
    # Each process says which weights it has, before and after.
    solver = project / "my_research" / "solver.py"
    text = solver.read_text().replace("self.commit()", "self.commit(); log_weights(self)")
    solver.write_text(text.replace("self.log_hyper", "log_weights(self); self.log_hyper") + WEIGHTS)
    dora(project, "-d", "--ddp_workers=2", "epochs=1")
    logs = [(folder(project) / f"solver.log.{rank}").read_text() for rank in (0, 1)]
    weights = [re.findall(r" weights (\w+)", log) for log in logs]
    assert len(weights[0]) == len({*weights[0]}) == 2
    assert weights[0] == weights[1]
    assert len(history(folder(project))) == 1


@pytest.fixture(scope="module")
def toys(rendered: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered repo with the files that the page's shorter parts have in common."""
    project = Path(shutil.copytree(rendered, tmp_path_factory.mktemp("toys") / "my-research"))
    for block in PAGE:
        if block.name.endswith(".py"):
            (project / block.name).write_text(block.text)
    return project


def pairs() -> dict[str, list[Block]]:
    """The blocks to compare, `before` and `after`, by the title above them."""
    text = (DOCS / "migrating.md").read_text()
    found: dict[str, list[Block]] = {title: [] for title in PEERS}
    titles = {text.count("\n", 0, text.index(f"\n## {title}\n")): title for title in PEERS}
    for block in PAGE:
        above = [line for line in titles if line < int(block.where.split(":")[1])]
        if above:
            found[titles[max(above)]].append(block)
    return found


@pytest.mark.parametrize("title", PEERS)
def test_what_a_loop_was_before(toys: Path, title: str) -> None:
    pytest.importorskip(PEERS[title])
    [before] = [block for block in pairs()[title] if block.name == "before"]
    python(toys, "-c", before.text, env=environment())


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("From a bare loop", "bare"),
        ("From Lightning", "from_lightning"),
    ],
)
def test_what_a_loop_is_after(toys: Path, title: str, name: str) -> None:
    [after] = [b for b in pairs()[title] if b.name == "after" or b.name == f"{name}.py"]
    python(toys, "-c", after.text, env=environment())
    learns(toys / "outputs" / name)


def test_a_loop_that_was_moved_trains_on_two_processes(toys: Path, tmp_path: Path) -> None:
    project = Path(
        shutil.copytree(toys, tmp_path / "two", ignore=shutil.ignore_patterns("outputs"))
    )
    run(project, str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "bare.py")
    learns(project / "outputs" / "bare")


def test_weights_of_flashy_are_taken_over(tmp_path: Path) -> None:
    model = torch.nn.Linear(3, 1)
    # What a checkpoint of Flashy holds, which `weights_only=True` refuses.
    cfg = OmegaConf.create({"epochs": 10})
    torch.save({"model": model.state_dict(), "xp.cfg": cfg}, tmp_path / "checkpoint.th")
    [block] = [block for block in PAGE if block.name == "weights"]
    python(tmp_path, "-c", block.text, env=environment())
    kept = torch.load(tmp_path / "weights.th")["model"]
    torch.testing.assert_close(kept["weight"], model.weight.data, rtol=0, atol=0)
