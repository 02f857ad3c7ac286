"""The shape of the core: its size, its floors, and the files that can be left out."""

import ast
import re
import shutil
from pathlib import Path

import pytest

from bench.size import code_lines

from .commands import run
from .conftest import ROOT, Copy

CORE = ROOT / "core"
LIMIT = 2912  # code lines without `launch.py` and the optional files
OPTIONAL = ["workers", "ema", "adversarial", "hints", "provenance", "replicas"]
OPTIONAL += ["sharded", "streams", "distrib/watch", "trackers/tensorboard", "trackers/wandb"]
OPTIONAL += ["trackers/trackio", "trackers/mlflow", "trackers/aim", "trackers/service"]
READING_PATH = ["solver", "steps", "checkpoint", "state", "data", "metrics", "log", "run"]
# From the ground up: a file imports from those before, a folder is entered by its `__init__`.
FLOORS = [
    "metrics",
    "utils",
    "plain",
    "distrib",
    "rng",
    "stop",
    "modules",
    "replicas",
    "state",
    "run",
    "provenance",
    "workers",
    "streams",
    "data",
]
FLOORS += [
    "sharded",
    "writer",
    "checkpoint",
    "versions",
    "trackers",
    "log",
    "results",
    "steps",
    "solver",
    "ema",
    "adversarial",
]
FLOORS += ["hints", "launch", "__init__"]


def sources() -> dict[str, str]:
    """Return the files of the core by name, without tests."""
    paths = [path for path in CORE.rglob("*.py") if "tests" not in path.parts]
    return {str(path.relative_to(CORE).with_suffix("")): path.read_text() for path in paths}


def test_the_core_can_be_read_in_one_sitting() -> None:
    lines = {name: code_lines(text) for name, text in sources().items()}
    counted = {name: n for name, n in lines.items() if name not in [*OPTIONAL, "launch"]}
    assert sum(counted.values()) <= LIMIT, counted
    assert sum(lines[name] for name in READING_PATH) <= 1500, lines
    assert [name for name, n in lines.items() if n > 250] == []
    tools = (ROOT / "template" / "package" / "tools").glob("*.py")
    assert [path.name for path in tools if code_lines(path.read_text()) > 250] == []


def test_the_model_page_fits_on_a_page() -> None:
    solver = ROOT / "template" / "examples" / "digits" / "package" / "solver.py"
    assert code_lines(solver.read_text()) <= 100


@pytest.mark.parametrize("name", sources())
def test_functions_are_short_and_nothing_is_global(name: str) -> None:
    text = sources()[name]
    for node in ast.walk(ast.parse(text)):
        assert not isinstance(node, ast.Global), node.lineno
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 40, node.name


def test_imports_go_downwards() -> None:
    for name, text in sources().items():
        folder = name.rpartition("/")[0]
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            outside = node.level == 2 or not folder
            module = (node.module or "").split(".")
            found = [module[0]] if module[0] else [alias.name for alias in node.names]
            if outside:
                here = FLOORS.index(folder or name)
                known = [target for target in found if target in FLOORS]
                assert all(FLOORS.index(target) < here for target in known), (name, found)
                assert len(module) == 1 or module[0] == "trackers", (name, module)


@pytest.mark.parametrize("name", [*OPTIONAL, "tools"])
def test_an_optional_file_can_be_deleted(name: str, copy: Copy, tmp_path: Path) -> None:
    example = "adversarial" if name == "ema" else "digits"
    project = copy(tmp_path, example=example, tracker="none")
    package = project / "my_research"
    if name == "tools":
        shutil.rmtree(package / "tools")
    else:
        (package / "core" / f"{name}.py").unlink()
    if name == "workers":
        data = package / "core" / "data.py"
        text = data.read_text().replace(
            "from . import distrib, workers\n", "from . import distrib\n"
        )
        data.write_text(
            text.replace("**workers.options(seed, defaults | kwargs)", "**(defaults | kwargs)")
        )
    if name == "streams":
        data = package / "core" / "data.py"
        use = r"from .streams import.*\n|    if isinstance.*\n.*\n        return stream_loader.*\n"
        data.write_text(re.sub(use, "", data.read_text()))
    if name == "hints":
        launch = package / "core" / "launch.py"
        text = launch.read_text().replace("from .hints import explain\n", "")
        launch.write_text(text.replace("{explain(error, known)}", "{error}"))
    uses = {"provenance": "record_start", "replicas": "add_own|restore_own|shared_metrics"}
    uses["distrib/watch"] = "note_call|watch_device"
    for file in (package / "core").rglob("*.py") if name in uses else ():
        text = file.read_text()
        file.write_text(re.sub(rf".*(import ({uses[name]})|({uses[name]})\().*\n", "", text))
    if name == "adversarial":
        init = package / "core" / "__init__.py"
        init.write_text(re.sub(r"adversarial, |    \"adversarial\",\n", "", init.read_text()))
    said = run(project, "-m", "dora", "run", "debug=limit", "data.num_workers=1")
    assert "is complete" in said
