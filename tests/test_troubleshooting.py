"""docs/troubleshooting.md has twenty situations; names and commands on the pages exist."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from core import distrib
from core.solver import BaseSolver
from core.steps import Steps

from .blocks import DOCS, blocks
from .conftest import ROOT, Copy

SITUATION = r"## .+\n\n[^*\n].+\n\n\*\*Cause\.\*\* (.+\n)+\n\*\*Cure\.\*\* (.+\n)+"
PAGES = sorted(page.name for page in DOCS.glob("*.md") if page.name != "migrating.md")
OF_DORA = {"run", "launch", "grid", "info"}
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
        command, *options = span.split()[1:]
        keys = [key[1] for option in options if (key := re.match(r"(\w[\w.]*)=", option))]
        return command in OF_DORA and all(has(config, key) or key == "debug" for key in keys)
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
