"""What is rendered: which files, from where, and what git makes of it."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from core import __version__
from hooks.record import address
from noxfile import PARTS

from .commands import run
from .conftest import ROOT, Render

QUESTIONS = json.loads((ROOT / "cookiecutter.json").read_text())

COMMON = {
    ".gitattributes",
    ".github/dependabot.yml",
    ".github/workflows/ci.yml",
    ".gitignore",
    ".pre-commit-config.yaml",
    ".template.json",
    "AGENTS.md",
    "CITATION.cff",
    "LICENSE",
    "README.md",
    "my_research/__init__.py",
    "my_research/config/config.yaml",
    "my_research/config/debug/anomaly.yaml",
    "my_research/config/debug/limit.yaml",
    "my_research/grids/__init__.py",
    "my_research/grids/lr.py",
    "my_research/py.typed",
    "my_research/schema.py",
    "my_research/solver.py",
    "my_research/train.py",
    "pyproject.toml",
    "tests/__init__.py",
    "tests/helpers.py",
    "tests/test_config.py",
    "tests/test_train.py",
}
TOOLS = Path("template", "package", "tools")
MODEL = {"my_research/data.py", "my_research/model.py"}
OWN = {
    "digits": MODEL
    | {
        "my_research/config/data/cifar10.yaml",
        "my_research/config/data/digits.yaml",
        "my_research/config/debug/overfit.yaml",
        "my_research/config/experiment/averaged.yaml",
        "notebooks/results.ipynb",
        "tests/test_cifar10.py",
        "tests/test_digits.py",
    },
    "basic": {"my_research/config/experiment/gentle.yaml"},
    "adversarial": MODEL
    | {"my_research/config/experiment/short.yaml", "tests/test_adversarial_digits.py"},
    "text": MODEL
    | {
        "my_research/config/debug/overfit.yaml",
        "my_research/config/experiment/small.yaml",
        "tests/test_text.py",
    },
}


def files(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if path.parts[0] != ".git"}


def git(*arguments: str, cwd: Path) -> str:
    return subprocess.check_output(["git", *arguments], cwd=cwd, text=True).strip()


@pytest.mark.parametrize("example", QUESTIONS["example"])
def test_exactly_these_files(example: str, render: Render, template: Path, tmp_path: Path) -> None:
    render(example=example)
    project = tmp_path / "out" / "my-research"
    core = {f"my_research/core/{name}" for name in files(template / "core")}
    tools = {f"my_research/tools/{name}" for name in files(template / TOOLS)}
    assert files(project) == COMMON | OWN[example] | core | tools


@pytest.mark.promise
def test_core_and_tools_are_copied_byte_for_byte(
    render: Render, template: Path, tmp_path: Path
) -> None:
    render()
    package = tmp_path / "out" / "my-research" / "my_research"
    for folder in (template / "core", template / TOOLS):
        for name in files(folder):
            assert (package / folder.name / name).read_bytes() == (folder / name).read_bytes()


def test_tools_and_the_rest_do_not_import_each_other() -> None:
    """But `report` and `sweep` import the project's `train`, by its name."""
    for path in [*(ROOT / "template").rglob("*.py"), *(ROOT / "core").rglob("*.py")]:
        imports = re.findall(r"^\s*((?:from|import) .*)", path.read_text(), re.M)
        inside = path.parent == ROOT / TOOLS
        others = re.compile(r"from \.\.|\bcore\b|cookiecutter" if inside else r"\btools\b")
        assert [line for line in imports if others.search(line)] == [], path


@pytest.mark.parametrize("license", QUESTIONS["license"])
@pytest.mark.parametrize("tracker", QUESTIONS["tracker"])
@pytest.mark.parametrize("example", QUESTIONS["example"])
def test_every_answer_renders(
    example: str, tracker: str, license: str, render: Render, tmp_path: Path
) -> None:
    render(example=example, tracker=tracker, license=license)
    project = tmp_path / "out" / "my-research"
    assert (project / "LICENSE").exists() == (license != "none")
    needs = tomllib.loads((project / "pyproject.toml").read_text())["project"]["dependencies"]
    needs = [need.partition(">")[0] for need in needs]
    assert ("wandb" in needs) == (tracker in ("wandb", "both"))
    assert ("tensorboard" in needs) == (tracker in ("tensorboard", "both"))
    for name in files(project):
        if "/core/" not in name and "/tools/" not in name:
            text = (project / name).read_text()
            assert not re.search(r"(?<!\$)\{\{|\{%|cookiecutter\.", text), name
    assert len((project / "README.md").read_text().split()) <= 1100


@pytest.mark.parametrize("example", QUESTIONS["example"])
def test_trackers_differ_in_no_code(example: str, render: Render, tmp_path: Path) -> None:
    """So what is checked with one tracker holds with all."""
    project, seen = tmp_path / "out" / "my-research", []
    for tracker in QUESTIONS["tracker"]:
        render(example=example, tracker=tracker)
        seen.append({name: (project / name).read_bytes() for name in files(project)})
        shutil.rmtree(project)
    differ = {name for name in seen[0] if len({one.get(name) for one in seen}) > 1}
    assert all(one.keys() == seen[0].keys() for one in seen)
    assert differ == {
        ".template.json",
        "README.md",
        "my_research/config/config.yaml",
        "pyproject.toml",
    }


@pytest.mark.parametrize("python", ["python3.12", "python3.13", "python3.14"])
def test_newer_pythons_read_it_without_a_warning(
    python: str, render: Render, tmp_path: Path
) -> None:
    folders = [*map(str, Path.home().glob(".pyenv/versions/*/bin")), os.environ["PATH"]]
    found = shutil.which(python, path=os.pathsep.join(folders))
    if not found or subprocess.run([found, "-c", ""]).returncode:
        pytest.skip(f"no {python} here")
    render()
    command = [found, "-W", "error", "-m", "compileall", "-q", str(tmp_path / "out")]
    assert subprocess.run(command).returncode == 0


def test_from_a_git_url(render: Render, template: Path, tmp_path: Path) -> None:
    repo = tmp_path / "repo"
    shutil.copytree(template, repo)
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "x"]):
        git(*command, cwd=repo)
    render(source=f"git+file://{repo}")
    assert (tmp_path / "out" / "my-research" / "pyproject.toml").exists()


def test_from_a_zip(render: Render, template: Path, tmp_path: Path) -> None:
    archive = shutil.make_archive(str(tmp_path / "archive"), "zip", template.parent, template.name)
    render(source=archive)
    assert (tmp_path / "out" / "my-research" / "pyproject.toml").exists()


@pytest.mark.parametrize("options", [[], ["-f"], ["-f", "-s"]])
def test_a_second_render_is_refused(options: list[str], render: Render, tmp_path: Path) -> None:
    render()
    project = tmp_path / "out" / "my-research"
    (project / "my_research" / "core" / "solver.py").write_text("edited")
    before = {name: (project / name).read_bytes() for name in files(project)}
    said = render(*options, code=1)
    assert ("my_research.tools.update" in said) == bool(options)
    assert {name: (project / name).read_bytes() for name in files(project)} == before


def test_rendering_over_a_project_without_its_core_is_refused(
    render: Render, tmp_path: Path
) -> None:
    render()
    project = tmp_path / "out" / "my-research"
    shutil.rmtree(project / "my_research" / "core")
    (project / "my_research" / "solver.py").write_text("edited")
    render("-f", code=1)
    assert (project / "my_research" / "solver.py").read_text() == "edited"


def test_without_hooks_one_line_tells_what_is_missing(render: Render, tmp_path: Path) -> None:
    [line] = render("--accept-hooks", "no", code=1).splitlines()
    assert "hooks, which did not run" in line
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("typed", "kept"),
    [
        ("https://me:secret@host/solver.zip", "https://host/solver.zip"),
        ("git+https://secret@host/solver.git", "git+https://host/solver.git"),
        ("git@host:me/solver.git", "git@host:me/solver.git"),
        ("ssh://git@host/solver.git", "ssh://git@host/solver.git"),
        ("https://me:p@ss@host/solver.zip", "https://host/solver.zip"),
        ("https://host#@other/solver.zip", "https://host#@other/solver.zip"),
    ],
)
def test_a_password_is_not_recorded(typed: str, kept: str, tmp_path: Path) -> None:
    assert address(typed, str(tmp_path), tmp_path) == kept


def test_a_first_commit_without_an_identity(render: Render, tmp_path: Path) -> None:
    render()
    project = tmp_path / "out" / "my-research"
    assert git("log", "--format=%s", cwd=project) == f"Start from cookiecutter-solver {__version__}"
    assert git("status", "--porcelain", cwd=project) == ""


def test_signing_and_hooks_of_the_user_are_left_out(
    render: Render, environment: dict[str, str], tmp_path: Path
) -> None:
    hook = tmp_path / "hooks" / "pre-commit"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    config = f"[commit]\ngpgsign = true\n[core]\nhooksPath = {hook.parent}\n"
    Path(environment["HOME"], ".gitconfig").write_text(config)
    assert "first commit was made" in render()


@pytest.fixture
def ignored(environment: dict[str, str], tmp_path: Path) -> None:
    """A user who ignores `core`, as the name of memory dumps, and much else in all repos."""
    template = tmp_path / "init"
    (template / "info").mkdir(parents=True)
    (template / "info" / "exclude").write_text("tests\nREADME.md\n")
    (tmp_path / "ignore").write_text("core\ndata.py\n*.yaml\n.*\n")
    config = f"[core]\nexcludesFile = {tmp_path / 'ignore'}\n[init]\ntemplateDir = {template}\n"
    Path(environment["HOME"], ".gitconfig").write_text(config)


@pytest.mark.usefixtures("ignored")
def test_the_first_commit_has_what_the_user_ignores_everywhere(
    render: Render, environment: dict[str, str], tmp_path: Path
) -> None:
    render()
    project = tmp_path / "out" / "my-research"
    assert set(git("ls-files", cwd=project).splitlines()) == files(project)

    for name in ("my_research/core/mine.py", "outputs/x", "my_research/core/__pycache__/x"):
        (project / name).parent.mkdir(exist_ok=True)
        (project / name).write_text("")
    status = ["git", "status", "--porcelain"]
    said = subprocess.check_output(status, cwd=project, env=environment, text=True)
    assert said == "?? my_research/core/mine.py\n"


@pytest.mark.parametrize(
    ("command", "path"),
    [
        (["-m", "cookiecutter"], "hooks.py"),
        (["-m", "cookiecutter"], "hooks/__init__.py"),
        ([str(Path(sys.executable).parent / "cookiecutter")], "hooks/__init__.py"),
    ],
)
def test_modules_where_the_user_stands_do_not_hide_the_templates(
    command: list[str], path: str, template: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    for name in (path, "answers.py", "record.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("raise SystemExit('hidden')\n")
    subprocess.run(
        [sys.executable, *command, str(template), "--no-input"],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(folder)},
        check=True,
    )
    assert (folder / "my-research" / "my_research" / "core").exists()


@pytest.mark.parametrize("name", ["json", "pathlib", "shutil", "subprocess"])
def test_modules_among_temporary_files_are_not_run(
    name: str, render: Render, environment: dict[str, str], tmp_path: Path
) -> None:
    """Cookiecutter runs hooks there, and on a shared machine anybody can write there."""
    Path(environment["TMPDIR"], f"{name}.py").write_text("raise SystemExit('run')\n")
    assert "first commit was made" in render()


def test_no_commit_inside_another_repo(render: Render, tmp_path: Path) -> None:
    git("init", "-q", cwd=tmp_path)
    assert "inside of a git repo" in render()
    assert not (tmp_path / "out" / "my-research" / ".git").exists()


def test_no_commit_without_git(render: Render, environment: dict[str, str], tmp_path: Path) -> None:
    environment["PATH"] = str(tmp_path)
    assert "git was not found" in render()


def test_an_author_with_an_accent(render: Render, tmp_path: Path) -> None:
    render(author_name="Zoé D'Arcy", description="It's déjà vu")
    project = tmp_path / "out" / "my-research"
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert about["authors"] == [{"name": "Zoé D'Arcy"}]
    assert about["description"] == "It's déjà vu"
    cited = OmegaConf.load(project / "CITATION.cff")
    assert cited.authors == [{"name": "Zoé D'Arcy"}]
    assert cited.abstract == "It's déjà vu"
    assert "Zoé D'Arcy" in (project / "LICENSE").read_text()
    compile((project / "my_research" / "__init__.py").read_text(), "", "exec")


def test_versions_agree() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f'__version__ = "{version}"' in (ROOT / "core" / "__init__.py").read_text()
    assert OmegaConf.load(ROOT / "CITATION.cff").version == version
    headings = re.findall(r"^## (\S+)(.*)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    for newest, date in headings[1:2]:  # none before the first release
        assert newest == version
        assert re.fullmatch(r" - \d{4}-\d\d-\d\d", date)


def test_ci_runs_pinned_actions_on_what_is_supported() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    actions = re.findall(r"uses: (.*)", workflow)
    assert actions
    assert all(re.fullmatch(r"\S+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in actions)
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    oldest = about["requires-python"].removeprefix(">=")
    assert f'python: ["{oldest}", ' in workflow
    assert re.search(r"os: \[ubuntu-\S+, macos-\S+\]", workflow)
    [sessions] = re.findall(r"session: (\[.*\])", workflow)
    assert json.loads(sessions) == ["lint tests", *(f"full -- {part}" for part in PARTS), "slurm"]


OWN_SESSIONS = {"tests/test_slurm.py", "tests/test_gpu.py"}


def test_each_test_belongs_to_a_part() -> None:
    paths = [path for part in PARTS.values() for path in part]
    files = {f"tests/{path.name}" for path in (ROOT / "tests").glob("test_*.py")}
    assert sorted(paths) == sorted(files - OWN_SESSIONS | {"core/tests", "tests/core"})


def test_models_and_data_do_not_import_the_core() -> None:
    paths = [*(ROOT / "template").glob("examples/*/package/*.py")]
    apart = [path for path in paths if path.stem in ("model", "data")]
    assert len(apart) >= 6
    assert [path for path in apart if "from .core" in path.read_text()] == []


def test_an_abbreviation_with_the_answers_of_ones_own(
    render: Render, template: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    repo, home = tmp_path / "hub" / "solver.git", Path(environment["HOME"])
    shutil.copytree(template, repo)
    git("init", "-q", cwd=repo)
    git("add", "-A", cwd=repo)
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qm", "x", cwd=repo)
    hub = f'[url "file://{repo.parent}/"]\n\tinsteadOf = https://github.com/me/\n'
    (home / ".gitconfig").write_text(hub)
    (home / ".cookiecutterrc").write_text("default_context: {author_name: Ann, example: text}\n")
    render(source="gh:me/solver")
    project = tmp_path / "out" / "my-research"
    record = json.loads((project / ".template.json").read_text())
    assert record["answers"].items() >= {"author_name": "Ann", "example": "text"}.items()
    assert record["template"].endswith("/solver.git")
    assert "Ann" in (project / "LICENSE").read_text()


def test_a_replay_gives_the_same_project(render: Render, template: Path, tmp_path: Path) -> None:
    render(project_name="Small Words", example="text")
    project, first = tmp_path / "out" / "small-words", tmp_path / "first"
    shutil.move(project, first)
    command = [sys.executable, "-m", "cookiecutter", str(template), "--replay"]
    env = os.environ | {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    subprocess.run(command, cwd=tmp_path / "out", env=env, check=True)
    assert files(project) == files(first)
    assert all(
        (project / name).read_bytes() == (first / name).read_bytes() for name in files(first)
    )


def test_from_python_into_a_folder_with_spaces(
    template: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    place = tmp_path / "my own projects"
    place.mkdir()
    code = (
        "from cookiecutter.main import cookiecutter; print(cookiecutter("
        f"{str(template)!r}, no_input=True, extra_context={{'tracker': 'none'}}, output_dir='.'))"
    )
    said = run(place, "-c", code, env=environment)
    project = place / "my-research"
    assert said.splitlines()[-1] == str(project)
    said = run(project, "-m", "dora", "run", "debug=limit")
    assert "is complete" in said
    assert [*project.glob("outputs/xps/*/checkpoint.th")]
