"""Update rendered projects, by real renders and real git, from a template with a history."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from .conftest import clean_environment, cookiecutter

OLD, NEW = "1.0.0", "1.1.0"
UPSTREAM = "# upstream\n"
MINE = "# mine\n"
# Files of the template, and where they are in a project: each has a new first line in NEW.
CHANGED = {
    "core/loader.py": "my_research/core/loader.py",
    "core/formatter.py": "my_research/core/formatter.py",
    "core/midway.py": "my_research/core/midway.py",
    "core/tests/test_loader.py": "my_research/core/tests/test_loader.py",
    "template/examples/digits/package/model.py": "my_research/model.py",
    "template/package/train.py": "my_research/train.py",
}


class Versions(NamedTuple):
    """A template with two tagged commits, and the project that came from the first."""

    repo: Path
    old: str
    new: str
    project: Path
    env: dict[str, str]


Update = Callable[..., str]


def git(cwd: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    return subprocess.check_output(["git", *identity, *arguments], cwd=cwd, text=True).strip()


def prepend(path: Path, line: str) -> None:
    path.write_text(line + path.read_text())


def append(path: Path, line: str) -> None:
    path.write_text(path.read_text() + line)


def release(repo: Path, version: str) -> str:
    """Commit and tag all that is in the repo; return the commit."""
    source = repo / "core" / "__init__.py"
    stated = f'__version__ = "{version}"'
    source.write_text(re.sub('__version__ = ".*"', stated, source.read_text()))
    git(repo, "add", "--all")
    git(repo, "commit", "-qm", version)
    git(repo, "tag", f"v{version}")
    return git(repo, "rev-parse", "HEAD")


def change(repo: Path) -> None:
    """What the newer version of the template has."""
    for name in CHANGED:
        prepend(repo / name, UPSTREAM)
    (repo / "core" / "added.py").write_text("ADDED = True\n")
    tool = repo / "template" / "tool.sh"
    tool.write_text("#!/bin/sh\necho {{ cookiecutter.colour }}\n")
    tool.chmod(0o755)
    shutil.rmtree(repo / "template" / ".github")
    questions = json.loads((repo / "cookiecutter.json").read_text())
    (repo / "cookiecutter.json").write_text(json.dumps({"colour": "blue"} | questions))


@pytest.fixture(scope="module")
def versions(template: Path, tmp_path_factory: pytest.TempPathFactory) -> Versions:
    folder = tmp_path_factory.mktemp("versions")
    env = clean_environment(folder)
    repo = folder / "solver"
    shutil.copytree(template, repo)
    git(repo, "init", "-qb", "main")
    old = release(repo, OLD)
    cookiecutter("../solver", folder / "out", env)
    change(repo)
    return Versions(repo, old, release(repo, NEW), folder / "out" / "my-research", env)


@pytest.fixture
def project(versions: Versions, tmp_path: Path) -> Path:
    """The project as it was rendered from the older version."""
    return Path(shutil.copytree(versions.project, tmp_path / "my-research"))


@pytest.fixture
def update(versions: Versions) -> Update:
    """Run the command as a script, which does without the second that importing torch takes."""

    def run(project: Path, *arguments: str, code: int = 0, **env: str) -> str:
        command = [sys.executable, project / "my_research" / "core" / "update.py", *arguments]
        return finish(command, project, versions.env | env, code)

    return run


def finish(command: list[Any], cwd: Path, env: dict[str, str], code: int) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == code, done.stdout + done.stderr
    assert not list(Path(env["TMPDIR"]).glob("update-*"))
    assert len(done.stderr.splitlines()) <= 1
    return done.stdout + done.stderr


def commit(project: Path, message: str = "mine") -> None:
    git(project, "add", "--all")
    git(project, "commit", "-qm", message)


def record(project: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((project / ".template.json").read_text())
    return found


def snapshot(folder: Path) -> dict[str, bytes]:
    """All that is in a folder, git's own files included."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path): path.read_bytes() for path in found if path.parent.name != "__pycache__"}


def files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in snapshot(folder).items() if "/.git/" not in name}


@pytest.mark.promise
def test_edits_are_kept_and_the_rest_follows(
    versions: Versions, project: Path, update: Update
) -> None:
    assert record(project)["template"] == str(versions.repo), "it was typed as a relative path"
    assert record(project)["commit"] == versions.old
    assert record(project)["version"] == OLD
    core = project / "my_research" / "core"
    append(core / "loader.py", MINE)
    git(project, "mv", "tests/test_digits.py", "tests/test_cnn.py")
    git(project, "mv", "my_research/model.py", "my_research/net.py")
    append(project / "my_research" / "net.py", MINE)
    (project / "LICENSE").unlink()
    (project / "my_research" / "losses.py").write_text("mine = 1\n")
    commit(project)
    (project / "notes.txt").write_text("mine")
    (project / "outputs").mkdir()
    (project / "outputs" / "x").write_text("mine")
    before = snapshot(project)

    assert update(project, "--check", code=1).count("\n") == 1
    said = update(project, "--dry-run")
    assert " M  my_research/net.py\n" in said
    assert "Dry run: 0 would await your decision" in said
    assert snapshot(project) == before

    command = [sys.executable, "-m", "my_research.core.update"]
    assert "git commit" in finish(command, project, versions.env, 0)
    for name in (*CHANGED.values(),):
        path = project / name.replace("model.py", "net.py")
        assert path.read_text().startswith(UPSTREAM), name
    assert (core / "loader.py").read_text().endswith(MINE)
    assert (project / "my_research" / "net.py").read_text().endswith(MINE)
    assert not (project / "my_research" / "model.py").exists()
    assert not (project / "LICENSE").exists()
    assert not (project / ".github").exists()
    assert (core / "added.py").exists()
    assert os.access(project / "tool.sh", os.X_OK)
    assert (project / "tool.sh").read_text().endswith("echo blue\n")
    assert record(project)["commit"] == versions.new
    assert record(project)["version"] == NEW
    assert record(project)["answers"]["colour"] == "blue"
    assert (project / "outputs" / "x").read_text() == "mine"

    assert "changed since the last commit" in update(project, code=2)
    git(project, "commit", "-q", "--no-edit")
    assert OLD in git(project, "log", "-1", "--format=%s")
    after = files(project)
    assert update(project).startswith(f"Up to date: {NEW} ({versions.new[:7]}) of /")
    assert files(project) == after

    update(project, "--to", f"v{OLD}")
    assert record(project)["commit"] == versions.old
    assert "colour" not in record(project)["answers"]
    commit(project)
    assert files(project).keys() == {k for k in before if "/.git/" not in k}


def test_a_clash_is_marked_and_nothing_is_lost(project: Path, update: Update) -> None:
    core = project / "my_research" / "core"
    prepend(core / "loader.py", MINE)
    (core / "midway.py").unlink()
    commit(project)
    before = snapshot(project)

    said = update(project, "--dry-run", code=1)
    assert "UU my_research/core/loader.py" in said
    assert snapshot(project) == before

    said = update(project, code=1)
    assert re.search("UU my_research/core/loader.py .*both", said)
    assert re.search("DU my_research/core/midway.py .*you deleted it", said)
    assert re.match(
        rf"<<<<<<< .*\n{MINE}\|\|\|\|\|\|\| .*\n=======\n{UPSTREAM}>>>>>>> .*\n",
        (core / "loader.py").read_text(),
    )
    assert (core / "formatter.py").read_text().startswith(UPSTREAM)
    assert "changed since the last commit" in update(project, code=2)

    git(project, "reset", "-q", "--hard")
    assert files(project) == {k: v for k, v in before.items() if "/.git/" not in k}
    assert git(project, "status", "--porcelain") == ""


def test_a_folder_in_a_larger_repo(project: Path, update: Update, tmp_path: Path) -> None:
    root = tmp_path / "all"
    inner = root / "apps" / "vision"
    shutil.copytree(project, inner)
    shutil.rmtree(inner / ".git")
    (root / "README.md").write_text("others'\n")
    (root / "notes.txt").write_text("not committed")
    git(root, "init", "-q")
    assert "git add --all" in update(inner, code=2)
    append(inner / "my_research" / "core" / "loader.py", MINE)
    git(root, "add", "apps", "README.md")
    git(root, "commit", "-qm", "mine")
    before = files(root)
    (root / "README.md").write_text("changed\n")
    assert "README.md changed" in update(inner, code=2)
    git(root, "checkout", "-q", "README.md")

    update(inner)
    text = (inner / "my_research" / "core" / "loader.py").read_text()
    assert text.startswith(UPSTREAM)
    assert text.endswith(MINE)
    staged = git(root, "diff", "--staged", "--name-only").splitlines()
    assert "apps/vision/tool.sh" in staged
    assert all(name.startswith("apps/vision/") for name in staged)
    git(root, "reset", "-q", "--hard")
    assert files(root) == before
    assert git(root, "status", "--porcelain") == "?? notes.txt"


def test_other_answers_and_none_of_cookiecutters_own_files(
    versions: Versions, project: Path, update: Update
) -> None:
    home = Path(versions.env["HOME"])
    rc = home / ".cookiecutterrc"
    rc.write_text("default_context: {colour: red}\n")
    before = snapshot(home)
    append(project / "my_research" / "core" / "loader.py", MINE)
    prepend(project / "my_research" / "solver.py", MINE)
    commit(project)
    answers = {"license": "none", "tracker": "wandb", "package_name": "other"}
    kept = {"colour": "blue", "example": "digits"}
    given = [part for name, value in answers.items() for part in ("--set", f"{name}={value}")]
    update(project, *given)
    assert snapshot(home) == before
    rc.unlink()
    assert not (project / "LICENSE").exists()
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    assert "license" not in about
    assert "wandb" in about["dependencies"]
    assert "tensorboard" not in about["dependencies"]
    assert record(project)["answers"].items() >= (answers | kept).items()
    text = (project / "other" / "core" / "loader.py").read_text()
    assert text.startswith(UPSTREAM)
    assert text.endswith(MINE)
    assert (project / "other" / "solver.py").read_text().startswith(MINE)
    assert not list((project / "my_research").rglob("*.py"))


def edit(project: Path) -> None:
    append(project / "README.md", MINE)


def forget(project: Path) -> None:
    shutil.rmtree(project / ".git")


def uncommitted(project: Path) -> None:
    forget(project)
    git(project, "init", "-q")


def unrecorded(project: Path) -> None:
    (project / ".template.json").unlink()


def spoilt(project: Path) -> None:
    (project / ".template.json").write_text("{")


def in_the_way(project: Path) -> None:
    (project / "my_research" / "core" / "added.py").write_text(MINE)
    append(project / ".git" / "info" / "exclude", "added.py\n")


@pytest.mark.parametrize(
    ("spoil", "arguments", "word"),
    [
        (edit, [], "README.md changed since the last commit"),
        (forget, [], "is in no git repo"),
        (uncommitted, [], "is not committed"),
        (unrecorded, [], "no .template.json"),
        (spoilt, [], "can't be read"),
        (in_the_way, [], "my_research/core/added.py is not committed, and in the way"),
        (None, ["--to", "nope"], f"no tag, branch or commit nope in .*v{NEW}, v{OLD}"),
        (None, ["--template", "/nowhere"], "no template at /nowhere"),
        (None, ["--template", "git+file:///nowhere.git"], "nowhere.git' does not "),
        (None, ["--set", "licence=none"], "no answer is called licence: .*license"),
        (None, ["--set", "license=GPL"], "GPL.*MIT"),
        (None, ["--set", "package_name=torch"], "would hide a package"),
        (None, ["--set", "license"], "ANSWER=VALUE"),
    ],
)
def test_refused_in_one_line(
    spoil: Callable[[Path], None] | None,
    arguments: list[str],
    word: str,
    project: Path,
    update: Update,
) -> None:
    if spoil:
        spoil(project)
    before = files(project)
    [*_, line] = update(project, *arguments, code=2).splitlines()
    assert re.match(f"update: .*{word}", line), line
    assert files(project) == before


def test_refused_without_its_tools(versions: Versions, project: Path, update: Update) -> None:
    assert update(project, code=2, PATH="/nowhere").startswith("update: git was not found")
    command = [sys.executable, "-S", project / "my_research" / "core" / "update.py"]
    said = finish(command, project, versions.env, 2)
    assert said.startswith("update: cookiecutter was not found")


def render(versions: Versions, folder: Path, source: str | Path, *options: str) -> Path:
    cookiecutter(source, folder, versions.env, *options)
    return folder / "my-research"


def archive(versions: Versions, version: str, folder: Path) -> Path:
    path = folder / f"solver-{version}.zip"
    git(versions.repo, "archive", f"--prefix=solver-{version}/", f"--output={path}", f"v{version}")
    return path


def test_from_a_git_url_and_from_a_replay(
    versions: Versions, update: Update, tmp_path: Path
) -> None:
    url = f"git+file://{versions.repo}"
    project = render(versions, tmp_path / "out", url, "--checkout", f"v{OLD}")
    assert record(project)["template"] == f"file://{versions.repo}"
    assert record(project)["commit"] == versions.old
    update(project)
    assert record(project)["commit"] == versions.new

    replay = tmp_path / "replay.json"
    Path(versions.env["HOME"], ".cookiecutter_replay", "solver.json").rename(replay)
    (tmp_path / "again").mkdir()
    subprocess.run(
        [sys.executable, "-m", "cookiecutter", str(versions.repo), "--replay-file", str(replay)],
        input=b"\n",  # the newer version asks for a colour
        cwd=tmp_path / "again",
        env=versions.env,
        check=True,
        capture_output=True,
    )
    found = record(tmp_path / "again" / "my-research")
    assert (found["template"], found["commit"]) == (str(versions.repo), versions.new)


def test_from_a_zip(versions: Versions, update: Update, tmp_path: Path) -> None:
    old, new = (archive(versions, version, tmp_path) for version in (OLD, NEW))
    project = render(versions, tmp_path / "out", f"../{old.name}")
    assert record(project)["template"] == str(old)
    assert record(project)["commit"] == versions.old
    assert "leave out --to" in update(project, "--to", "v2", code=2)
    assert "Up to date" in update(project)
    update(project, "--template", f"../../{new.name}")
    assert record(project)["template"] == str(new)
    assert record(project)["commit"] == versions.new
    assert (project / "my_research" / "train.py").read_text().startswith(UPSTREAM)

    git(project, "reset", "-q", "--hard")
    shutil.move(new, old)
    said = update(project, code=2)
    assert (
        f"update: {OLD} ({versions.old[:7]}), which this project came from, was not found" in said
    )


def test_from_a_folder_without_git(versions: Versions, update: Update, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    git(versions.repo, "worktree", "add", "--quiet", "--detach", str(plain), versions.old)
    (plain / ".git").unlink()
    git(versions.repo, "worktree", "prune")
    project = render(versions, tmp_path / "out", plain)
    assert record(project)["commit"] is None
    assert update(project).startswith(f"Up to date: {OLD} (no commit) of /")
    update(project, "--set", "license=none")
    assert not (project / "LICENSE").exists()
    git(project, "reset", "-q", "--hard")

    release_text = (plain / "core" / "__init__.py").read_text().replace(OLD, NEW)
    (plain / "core" / "__init__.py").write_text(release_text)
    assert f"update: {OLD} (no commit), which this project came from" in update(project, code=2)
    update(project, "--template", str(versions.repo))
    assert record(project)["commit"] == versions.new
    assert (project / "my_research" / "train.py").read_text().startswith(UPSTREAM)


def test_changes_of_the_template_without_a_commit_count_as_the_users(
    versions: Versions, update: Update, tmp_path: Path
) -> None:
    repo = tmp_path / "solver"
    git(tmp_path, "clone", "-q", str(versions.repo), str(repo))
    (repo / "notes.txt").write_text("not rendered")
    project = render(versions, tmp_path / "clean", repo)
    assert record(project)["commit"] == versions.new
    append(repo / "core" / "loader.py", MINE)
    project = render(versions, tmp_path / "dirty", repo)
    assert record(project)["commit"] == f"{versions.new}-dirty"
    assert "Up to date" in update(project)
    update(project, "--to", f"v{OLD}")
    assert record(project)["commit"] == versions.old
    text = (project / "my_research" / "core" / "loader.py").read_text()
    assert text.endswith(MINE)
    assert not text.startswith(UPSTREAM)
