"""docs/troubleshooting.md has twenty situations; names and commands on the pages exist."""

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from dora.__main__ import get_parser
from omegaconf import OmegaConf

import noxfile
from core import distrib
from core.solver import BaseSolver
from core.steps import Steps

from .blocks import DOCS, blocks
from .conftest import ROOT, Copy

SITUATION = r"## .+\n\n.+\n\n(.+\n)+\n(.+\n)+"
PAGES = sorted(page.name for page in DOCS.glob("*.md") if page.name != "migrating.md")
READMES = ["README.md", "template/README.md", "core/README.md", "CONTRIBUTING.md"]
TEXTS = [ROOT / name for name in READMES] + sorted(DOCS.glob("*.md"))
ATTRIBUTES = {
    "self": {*dir(BaseSolver), "cfg", "result_logger"},
    "steps": {*dir(Steps), "step"},
    "distrib": {*dir(distrib)},
}


def test_each_situation_has_symptom_cause_and_cure() -> None:
    page = (DOCS / "troubleshooting.md").read_text()
    _, *situations = re.split(r"^(?=## )", page, flags=re.M)
    assert len(situations) == 20
    wrong = [text for text in situations if not re.fullmatch(SITUATION, f"{text.strip()}\n")]
    assert wrong == []


@pytest.fixture(scope="module")
def project(copy: Copy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with the digits."""
    return copy(tmp_path_factory.mktemp("names"))


def has(config: Any, key: str) -> bool:
    """Whether a config has a dotted key."""
    for part in key.split("."):
        if not isinstance(config, dict) or part not in config:
            return False
        config = config[part]
    return True


def is_known(span: str, project: Path) -> bool:
    """Whether a name, a key or a command exists; true of all that is none of these."""
    package = project / "my_research"
    config = OmegaConf.to_container(OmegaConf.load(package / "config" / "config.yaml"))
    if module := re.match(r"python -m my_research\.(\S+)", span):
        return package.joinpath(*module[1].split(".")).with_suffix(".py").exists()
    if span.startswith("dora "):
        keys = re.findall(r" (\w[\w.]*)=", span)
        return all(has(config, key) or key == "debug" for key in keys)
    if key := re.match(r"((?:checkpoint|data|optim|dora|slurm)\.\w+)(?=$|=)", span):
        return has(config, key[1]) or (package / "core" / span).exists()
    if name := re.match(r"(self|steps|distrib)\.(\w+)", span):
        return name[2] in ATTRIBUTES[name[1]]
    if re.fullmatch(r"[\w/]+\.py", span):
        return any(project.rglob(span)) or (ROOT / span).exists()
    return True


@pytest.mark.parametrize("page", PAGES)
def test_names_and_commands_exist(page: str, project: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", (DOCS / page).read_text(), flags=re.M | re.S)
    own = {block.name for block in blocks(DOCS / page)}
    spans = {*re.findall(r"`([^`\n]+)`", text)} - own
    assert [span for span in sorted(spans) if not is_known(span, project)] == []


def commands(text: str, name: str) -> list[str]:
    """All commands in spans and blocks that begin with a name, without what the shell adds."""
    text = re.sub(r"\{\{.*?\}\}", "x", re.sub(r"\{%.*?%\}", "", text))
    found = re.findall(rf"(?:^|`|-m |[A-Z]=\S+ )({name} [^`\n]+)", text, re.M)
    return [re.split(r" (?:#|&|\|\||2?>)", command)[0] for command in found]


@pytest.mark.parametrize("page", TEXTS, ids=lambda page: f"{page.parent.name}/{page.name}")
def test_options_and_sessions_exist(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of Dora, of nox and of the tools."""
    text = page.read_text()
    for command in commands(text, "dora"):
        try:
            assert get_parser().parse_args(shlex.split(command)[1:]).action, command
        except SystemExit:
            pytest.fail(f"{command}: {capsys.readouterr().err}")
    assert [name for name in re.findall(r"nox -s (\w+)", text) if not hasattr(noxfile, name)] == []
    sources = {tool: source(tool) for tool in ("report", "sweep", "update")}
    for command in commands(text, r"\S+\.tools\.\w+"):
        name = re.findall(r"\.tools\.(\w+)", command)[0]
        for option in re.findall(r" (--[\w-]+)", command):
            assert f'"{option}"' in sources[name], command


def source(tool: str) -> str:
    """The code with a tool's options."""
    files = [ROOT / "template" / "package" / "tools" / f"{tool}.py", ROOT / "hooks" / f"{tool}.py"]
    return "".join(path.read_text() for path in files if path.exists())
