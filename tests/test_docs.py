"""Run each block of docs/ as it stands there, page by page, in a rendered project.

A page is followed from top to bottom in a copy of the project of its own. Blocks of

- `bash` are run, and must end well;
- `python` are run in a process of their own; those with a name are written to that file instead;
- `text` show some lines of what the block before said; numbers and `...` stand for any,
  signatures for themselves;
- `yaml` are laid over the config, which has types, or written to the file that they name;
- `diff` are applied.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bench import size

from .blocks import DOCS, Block, blocks
from .commands import run
from .conftest import ROOT, clean_environment, cookiecutter

# Pages that other tests run.
ELSEWHERE = {"migrating.md": "test_migration.py", "troubleshooting.md": "test_troubleshooting.py"}
README = ROOT / "README.md"
PAGES = sorted(page for page in DOCS.glob("*.md") if page.name not in ELSEWHERE)

# Commands that need a cluster, and the tests of `nox -s slurm` that run them.
ON_SLURM = {
    "dora launch optim.lr=1e-3": "test_launch_with_one_task_and_with_two",
    "dora grid lr": "test_a_grid_with_an_array_and_a_failure",
    "dora grid lr --cancel": "test_a_cancelled_job_stays_cancelled_and_can_go_on",
}
# Edits of the config that make runs quick. What pages show is not about these.
QUICK = {
    "epochs: 15": "epochs: 2",
    "size: 64": "size: 240",
    "channels: 32": "channels: 8",
}
CHECK_CONFIG = """
import json, sys
from omegaconf import OmegaConf
from my_research.train import main
for text in json.load(sys.stdin):
    OmegaConf.merge(main.get_xp([]).cfg, OmegaConf.create(text))
"""


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True)


def replace(path: Path, old: str, new: str) -> None:
    """Replace what must be there."""
    text = path.read_text()
    assert old in text, f"{path.name} has no {old!r}"
    path.write_text(text.replace(old, new))


class Reader:
    """Somebody who follows a page in a project."""

    def __init__(self, project: Path, env: dict[str, str]) -> None:
        self.project = project
        self.env = env
        self.said = ""

    def run(self, *command: str, given: str = "") -> None:
        """Run a command, and keep what it says."""
        done = subprocess.run(
            command,
            cwd=self.project,
            env=self.env,
            input=given,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.said = done.stdout
        assert done.returncode == 0, self.said

    def bash(self, block: Block) -> None:
        if block.name == "slurm":
            assert [line for line in block.text.splitlines() if line not in ON_SLURM] == []
        else:
            self.run("bash", "-euo", "pipefail", "-c", block.text)

    def python(self, block: Block) -> None:
        if block.name:
            (self.project / block.name).write_text(block.text)
        else:
            self.said = run(self.project, "-c", block.text, env=self.env)

    def text(self, block: Block) -> None:
        for line in block.text.splitlines():
            assert re.search(pattern(line), self.said), f"{line!r} is not in:\n{self.said}"

    def yaml(self, block: Block) -> None:
        """Checked with those of all pages; one with a name is written to that file, too."""
        if block.name:
            (self.project / block.name).write_text(block.text)

    def diff(self, block: Block) -> None:
        [name] = re.findall(r"^\+\+\+ b/(.*)$", block.text, re.M)
        [old], [new] = (re.findall(rf"^\{mark}([^+-].*)$", block.text, re.M) for mark in "-+")
        replace(self.project / name, old, new)


def pattern(line: str) -> str:
    """What a line looks like: numbers and `...` stand for any, but not in names of files."""
    parts = []
    names = r"\b[0-9a-f]{8}\b|\S+\.th$"
    for part in re.split(rf"(\.\.\.|{names}|\d+(?:\.\d+)?|\s+)", line.strip()):
        if part == "...":
            parts.append(".*")
        elif re.fullmatch(r"\d+(\.\d+)?", part) and len(part) != 8:
            parts.append(r"[\d.]+")
        else:
            parts.append(r"\s+" if part.isspace() else re.escape(part))
    return "".join(parts)


@pytest.fixture(scope="module")
def start(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Reader]:
    """Begin to read, in a project made from a template that meanwhile has a newer version."""
    folder = tmp_path_factory.mktemp("docs")
    env = clean_environment(folder)
    repo = Path(shutil.copytree(template, folder / "cookiecutter-solver"))
    git(repo, "init", "-qb", "main")
    git(repo, "add", "--all")
    git(repo, "commit", "-qm", "old")
    cookiecutter(repo, folder / "out", env)
    replace(
        repo / "core" / "metrics.py", 'default_format: str = ".4g"', 'default_format: str = ".5f"'
    )
    for file, line in {"data": "import itertools", "metrics": "import math"}.items():
        replace(repo / "core" / f"{file}.py", f"{line}\n", f"{line}  # newer\n")
    git(repo, "commit", "-qam", "new")

    project = folder / "out" / "my-research"
    for old, new in QUICK.items():
        replace(project / "my_research" / "config" / "config.yaml", old, new)
    git(project, "init", "-qb", "main")
    git(project, "add", "--all")
    git(project, "commit", "-qm", "rendered")
    env |= {
        f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"

    def begin(where: Path) -> Reader:
        return Reader(Path(shutil.copytree(project, where / "my-research")), env)

    return begin


@pytest.mark.parametrize("page", [page.name for page in PAGES])
def test_a_page_can_be_followed(page: str, start: Callable[[Path], Reader], tmp_path: Path) -> None:
    reader = start(tmp_path)
    for block in blocks(DOCS / page):
        try:
            getattr(reader, block.language)(block)
        except AssertionError as error:
            pytest.fail(f"{block.where}: {error}")
    if page == "updating.md":  # what did not clash is taken, in a file with a clash too
        merged = (reader.project / "my_research" / "core" / "metrics.py").read_text()
        assert 'default_format: str = ".4f"' in merged
        assert merged.count("# newer") == 1
        assert "<<<" not in merged


def test_configs_have_known_keys_and_types(start: Callable[[Path], Reader], tmp_path: Path) -> None:
    shown = [b.text for page in PAGES for b in blocks(page) if b.language == "yaml"]
    assert shown
    reader = start(tmp_path)
    reader.run(sys.executable, "-c", CHECK_CONFIG, given=json.dumps(shown))


def test_what_needs_a_cluster_is_run_on_one() -> None:
    tests = (ROOT / "tests" / "test_slurm.py").read_text()
    assert [name for name in ON_SLURM.values() if f"def {name}(" not in tests] == []
    shown = [b for page in PAGES for b in blocks(page) if b.name == "slurm"]
    assert {line for block in shown for line in block.text.splitlines()} == {*ON_SLURM}


def test_pages_are_few_and_short() -> None:
    pages = [*DOCS.glob("*.md")]
    assert len(pages) <= 11
    assert sum(len(page.read_text().split()) for page in pages) <= 6000
    for readme in (ROOT / "README.md", ROOT / "core" / "README.md"):
        assert len(readme.read_text().split()) <= 1200, readme


def test_the_core_has_as_many_lines_as_the_readme_says() -> None:
    lines = size.total(size.required(size.files(ROOT / "core")))
    said = re.findall(r"([\d,]+) lines of code|lines of code \| ([\d,]+),", README.read_text())
    assert len(said) == 2
    for one, other in said:
        assert abs(int((one or other).replace(",", "")) - lines) <= 100, lines


# What the README's comparison says in its own words, and how a cell of the bench begins.
SAID = {"fails to load": "fails: ", "other weights": "resumes, with other weights"}
SAID |= {"unnoticed, if patched to load": "unnoticed"}
SAID |= {"noticed; the previous one is used": "noticed; the checkpoint before is used"}


def rows(text: str, heading: str) -> list[list[str]]:
    """The cells of the table below a line that begins so."""
    _, found, below = text.partition(f"\n{heading}")
    assert found, heading
    table = re.findall(r"^\|(.*)\|$", below.partition("\n#")[0], re.M)
    return [[cell.strip() for cell in row.split("|")] for row in table]


def test_the_comparison_is_what_the_bench_measured() -> None:
    results = (ROOT / "bench" / "RESULTS.md").read_text()
    text = README.read_text()
    (_, *names), _, *said = rows(text, "## Compared with others")
    kinds, _, *measured = rows(results, "## Reliability")
    found = {way: dict(zip(kinds[1:], cells, strict=True)) for way, *cells in measured}
    *behaviour, lines = said
    assert len(behaviour) == len(kinds) - 1
    for kind, (_, *cells) in zip(kinds[1:], behaviour, strict=True):
        for name, cell in zip(names, cells, strict=True):
            way = "Flashy, patched" if "patched" in cell else name
            assert found[way][kind].startswith(SAID.get(cell, cell)), (kind, name)
    counted = {way: code for way, code, *_ in rows(results, "## Size")}
    for name, cell in zip(names[1:], lines[2:], strict=True):
        assert abs(int(cell.replace(",", "")) - int(counted[name].replace(",", ""))) <= 100, name
    [(measured_on, versions)] = re.findall(r"measured .* on (.*?): ([^`]*?)\.\n\n", text, re.S)
    assert f"- {measured_on}, in " in results
    of_peers = re.findall(r"(\w+)(?: and (\w+))? (\d[\d.]*\d)", versions)
    found_in = {name: version for *pair, version in of_peers for name in pair if name}
    assert {*found_in} == {*names[1:]}
    for name, version in found_in.items():
        package = {"ignite": "pytorch-ignite", "Fabric": "lightning-fabric"}.get(name, name.lower())
        assert f", {package} {version}," in results


def heading(line: str) -> str:
    """The anchor of a heading, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", line.lstrip("# ").lower()).strip().replace(" ", "-")


def test_links_lead_somewhere() -> None:
    broken = []
    for page in (README, *DOCS.glob("*.md")):
        for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            text = path.read_text() if path.suffix == ".md" and path.is_file() else ""
            anchors = {heading(line) for line in re.findall(r"^#+ .*$", text, re.M)}
            if not path.is_file() or (anchor and anchor not in anchors):
                broken.append(f"{page.name}: {target}")
    assert broken == []
