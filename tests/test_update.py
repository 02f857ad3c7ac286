"""Update rendered projects, by real renders and real git, from a template with a history."""

import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tomllib
import venv
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
    "core/data.py": "my_research/core/data.py",
    "core/metrics.py": "my_research/core/metrics.py",
    "core/ema.py": "my_research/core/ema.py",
    "core/tests/test_data.py": "my_research/core/tests/test_data.py",
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
        command = [sys.executable, project / "my_research" / "tools" / "update.py", *arguments]
        return finish(command, project, versions.env | env, code)

    return run


def finish(command: list[Any], cwd: Path, env: dict[str, str], code: int) -> str:
    nobody = subprocess.DEVNULL
    done = subprocess.run(command, cwd=cwd, env=env, stdin=nobody, capture_output=True, text=True)
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
    append(core / "data.py", MINE)
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
    said = update(project, "--example", "--dry-run")
    assert " M  my_research/net.py\n" in said
    assert snapshot(project) == before

    command = [sys.executable, "-m", "my_research.tools.update", "--example"]
    finish(command, project, versions.env, 0)
    for name in (*CHANGED.values(),):
        path = project / name.replace("model.py", "net.py")
        assert path.read_text().startswith(UPSTREAM), name
    assert (core / "data.py").read_text().endswith(MINE)
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

    assert ".github/" in update(project, code=2), "it is not committed yet"
    git(project, "commit", "-q", "--no-edit")
    assert OLD in git(project, "log", "-1", "--format=%s")
    after = files(project)
    assert versions.new[:7] in update(project)
    assert versions.new in update(project, "--check")
    assert files(project) == after

    update(project, "--example", "--to", f"v{OLD}")
    assert record(project)["commit"] == versions.old
    assert "colour" not in record(project)["answers"]
    commit(project)
    assert files(project).keys() == {k for k in before if "/.git/" not in k}


def test_files_of_the_example_are_left_alone(project: Path, update: Update) -> None:
    mine = project / "my_research" / "model.py"
    mine.write_text("mine = 1\n")
    (project / "tests" / "test_digits.py").unlink()
    commit(project)
    said = update(project)
    assert "left as they are: my_research/model.py\n" in said
    assert mine.read_text() == "mine = 1\n"
    assert not (project / "tests" / "test_digits.py").exists()
    for name in CHANGED.values():
        if name != "my_research/model.py":
            assert (project / name).read_text().startswith(UPSTREAM), name


def test_a_clash_is_marked_and_nothing_is_lost(project: Path, update: Update) -> None:
    core = project / "my_research" / "core"
    prepend(core / "data.py", MINE)
    (core / "ema.py").unlink()
    commit(project)
    before = snapshot(project)

    said = update(project, "--dry-run", code=1)
    assert "UU my_research/core/data.py" in said
    assert snapshot(project) == before

    said = update(project, code=1)
    assert "UU my_research/core/data.py" in said
    assert "DU my_research/core/ema.py" in said
    assert re.match(
        rf"<<<<<<< .*\n{MINE}\|\|\|\|\|\|\| .*\n=======\n{UPSTREAM}>>>>>>> .*\n",
        (core / "data.py").read_text(),
    )
    assert (core / "metrics.py").read_text().startswith(UPSTREAM)
    update(project, code=2)

    git(project, "reset", "-q", "--hard")
    assert files(project) == {k: v for k, v in before.items() if "/.git/" not in k}
    assert git(project, "status", "--porcelain") == ""


def test_a_folder_in_a_larger_repo(
    versions: Versions, project: Path, update: Update, tmp_path: Path
) -> None:
    root = tmp_path / "all"
    inner = root / "apps" / "vision"
    shutil.copytree(project, inner)
    shutil.rmtree(inner / ".git")
    (root / "README.md").write_text("others'\n")
    (root / "notes.txt").write_text("not committed")
    git(root, "init", "-q")
    here = "--template", str(versions.repo)
    assert str(inner) in update(inner, *here, code=2), "nothing is committed yet"
    append(inner / "my_research" / "core" / "data.py", MINE)
    git(root, "add", "apps", "README.md")
    git(root, "commit", "-qm", "mine")
    before = files(root)
    (root / "README.md").write_text("changed\n")
    assert "README.md" in update(inner, code=2)
    git(root, "checkout", "-q", "README.md")

    update(inner)
    text = (inner / "my_research" / "core" / "data.py").read_text()
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
    append(project / "my_research" / "core" / "data.py", MINE)
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
    needs = [need.partition(">")[0] for need in about["dependencies"]]
    assert "wandb" in needs
    assert "tensorboard" not in needs
    assert record(project)["answers"].items() >= (answers | kept).items()
    text = (project / "other" / "core" / "data.py").read_text()
    assert text.startswith(UPSTREAM)
    assert text.endswith(MINE)
    assert (project / "other" / "solver.py").read_text().startswith(MINE)
    assert not (project / "other" / "model.py").read_text().startswith(UPSTREAM)
    config = (project / "other" / "config" / "config.yaml").read_text()
    assert "trackers: [wandb]" in config
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
    ("spoil", "arguments", "culprit"),
    [
        (edit, [], "README.md"),
        (forget, ["--template", "{repo}"], "my-research"),
        (uncommitted, ["--template", "{repo}"], "my-research"),
        (unrecorded, [], ".template.json"),
        (spoilt, [], ".template.json"),
        (in_the_way, [], "my_research/core/added.py"),
        (None, ["--to", "nope"], "nope"),
        (None, ["--to=--orphan=x"], "--orphan=x"),
        (None, ["--template", "/nowhere"], "/nowhere"),
        (None, ["--template", "/nowhere.zip"], "/nowhere.zip"),
        (None, ["--template", "git+file:///nowhere.git"], "/nowhere.git"),
        (None, ["--set", "licence=none"], "licence"),
        (None, ["--set", "license=GPL"], "GPL"),
        (None, ["--set", "package_name=torch"], "torch"),
        (None, ["--set", "author_name={% x %}"], "author_name"),
        (None, ["--set", "license"], "license"),
    ],
)
def test_refused_in_one_line(
    spoil: Callable[[Path], None] | None,
    arguments: list[str],
    culprit: str,
    versions: Versions,
    project: Path,
    update: Update,
) -> None:
    if spoil:
        spoil(project)
    before = files(project)
    given = [argument.replace("{repo}", str(versions.repo)) for argument in arguments]
    [*_, line] = update(project, *given, code=2).splitlines()
    assert line.startswith("update: ")
    assert culprit in line
    assert files(project) == before


def test_refused_without_its_tools(versions: Versions, project: Path, tmp_path: Path) -> None:
    script = project / "my_research" / "tools" / "update.py"
    said = finish([sys.executable, script], project, versions.env | {"PATH": "/nowhere"}, 2)
    assert "git" in said
    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    said = finish([tmp_path / "bare" / "bin" / "python", script], project, versions.env, 2)
    assert "cookiecutter" in said


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
    assert old.name in update(project, "--to", "v2", code=2)
    update(project, "--check")
    assert OLD in update(project)
    update(project, "--check", "--template", f"../../{new.name}", code=1)
    update(project, "--template", f"../../{new.name}")
    assert record(project)["template"] == str(new)
    assert record(project)["commit"] == versions.new
    assert (project / "my_research" / "train.py").read_text().startswith(UPSTREAM)

    git(project, "reset", "-q", "--hard")
    shutil.move(new, old)
    assert versions.old[:7] in update(project, code=2), "no place has that version any more"


def test_from_a_folder_without_git(versions: Versions, update: Update, tmp_path: Path) -> None:
    plain = tmp_path / "plain"
    git(versions.repo, "worktree", "add", "--quiet", "--detach", str(plain), versions.old)
    (plain / ".git").unlink()
    git(versions.repo, "worktree", "prune")
    project = render(versions, tmp_path / "out", plain)
    assert record(project)["commit"] is None
    update(project, "--check")
    assert OLD in update(project)
    assert str(plain) in update(project, "--to", "v2", code=2)
    update(project, "--set", "license=none")
    assert not (project / "LICENSE").exists()
    git(project, "reset", "-q", "--hard")

    release_text = (plain / "core" / "__init__.py").read_text().replace(OLD, NEW)
    (plain / "core" / "__init__.py").write_text(release_text)
    update(project, "--check", code=1)
    assert OLD in update(project, code=2), "the folder has no longer the version it came from"
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
    append(repo / "core" / "data.py", MINE)
    project = render(versions, tmp_path / "dirty", repo)
    assert record(project)["commit"] == f"{versions.new}-dirty"
    update(project, "--check")
    before = files(project)
    update(project)
    assert files(project) == before
    update(project, "--to", f"v{OLD}")
    assert record(project)["commit"] == versions.old
    text = (project / "my_research" / "core" / "data.py").read_text()
    assert text.endswith(MINE)
    assert not text.startswith(UPSTREAM)


@pytest.fixture
def mark(tmp_path: Path) -> Path:
    """A file that is there once code from a hostile template or record has run."""
    return tmp_path / "mark"


@pytest.fixture
def hostile(versions: Versions, mark: Path, tmp_path: Path) -> Path:
    """A template whose hooks leave the mark."""
    repo = tmp_path / "hostile"
    git(tmp_path, "clone", "-q", str(versions.repo), str(repo))
    for hook in (repo / "hooks").glob("*.py"):
        append(hook, f"\n__import__('pathlib').Path({str(mark)!r}).touch()\n")
    git(repo, "commit", "-qam", "hostile")
    return repo


def claim(project: Path, **fields: Any) -> None:
    """Commit another record, as somebody's repo may have it."""
    (project / ".template.json").write_text(json.dumps(record(project) | fields))
    commit(project)


ANYHOW = pytest.mark.parametrize("option", ["--check", "--dry-run"])


@ANYHOW
@pytest.mark.parametrize(
    "address",
    ["{repo}", "{repo}.zip", "file://{repo}", "ext::sh -c 'touch {mark}'", "-u=touch {mark}"],
)
def test_a_new_address_is_not_used_unasked(
    address: str, option: str, hostile: Path, mark: Path, project: Path, update: Update
) -> None:
    shutil.make_archive(str(hostile), "zip", hostile.parent, hostile.name)
    named = address.format(repo=hostile, mark=mark)
    claim(project, template=named)
    before = snapshot(project)
    assert repr(named) in update(project, option, code=2)
    assert snapshot(project) == before
    assert not mark.exists()


def test_an_address_is_confirmed_once_in_a_clone(
    versions: Versions, project: Path, update: Update, tmp_path: Path
) -> None:
    git(tmp_path, "clone", "-q", str(project), "clone")
    clone = tmp_path / "clone"
    script = clone / "my_research" / "tools" / "update.py"
    for answer, code in (("\n", 2), ("n\n", 2), ("yes\n", 1)):
        there, here = pty.openpty()
        os.write(there, answer.encode())
        command = [sys.executable, str(script), "--check"]
        done = subprocess.run(command, stdin=here, env=versions.env, capture_output=True, text=True)
        assert done.returncode == code, done.stderr
        assert str(versions.repo) in done.stdout
        os.close(there)
        os.close(here)
    update(clone, "--check", code=1)

    git(tmp_path, "clone", "-q", str(project), "other")
    other = tmp_path / "other"
    update(other, code=2)
    update(other, "--check", "--template", str(versions.repo), code=1)
    update(other)
    assert record(other)["commit"] == versions.new


def test_check_runs_nothing_of_the_template(
    hostile: Path, mark: Path, project: Path, update: Update
) -> None:
    update(project, "--check", "--template", str(hostile), code=1)
    assert not mark.exists()
    update(project, "--template", str(hostile))
    assert mark.exists(), "the hooks leave no mark, so the test shows nothing"


CODE = "{{ cycler.__init__.__globals__.os.popen('touch MARK').read() }}"


@ANYHOW
@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"commit": "--upload-pack=touch MARK; git-upload-pack"}, "--upload-pack"),
        ({"commit": None, "version": "0.0.1; touch MARK"}, "0.0.1; touch"),
        ({"answers": {"author_name": CODE}}, "author_name"),
        ({"answers": {"author_name": [CODE]}}, "author_name"),
        ({"answers": {"author_name": None}}, "author_name"),
        ({"answers": {"project_slug": "../../../mark"}}, "project_slug"),
        ({"answers": {"--config-file": "MARK.yaml"}}, "--config-file"),
        ({"answers": {"--debug-file": "MARK"}}, "--debug-file"),
    ],
)
def test_the_rest_of_a_record_is_not_trusted(
    fields: dict[str, Any],
    culprit: str,
    option: str,
    mark: Path,
    project: Path,
    update: Update,
) -> None:
    fields = json.loads(json.dumps(fields).replace("MARK", str(mark)))
    fields |= {"answers": record(project)["answers"] | fields.get("answers", {})}
    claim(project, **fields)
    before = snapshot(project)
    if (option, culprit) == ("--check", "project_slug"):
        update(project, option, code=1)  # nothing is rendered, so the template is not asked
    else:
        assert culprit in update(project, option, code=2)
    assert snapshot(project) == before
    assert not mark.exists()


@ANYHOW
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("template", []),
        ("template", None),
        ("template", "two\nlines"),
        ("version", 1),
        ("version", None),
        ("commit", ["x"]),
        ("answers", None),
        ("answers", []),
        ("answers", "x"),
    ],
)
def test_a_record_of_other_types_is_refused(
    name: str, value: Any, option: str, project: Path, update: Update
) -> None:
    claim(project, **{name: value})
    assert ".template.json" in update(project, option, code=2)


def test_an_answer_on_the_command_line_does_not_hide_a_recorded_one(
    mark: Path, project: Path, update: Update
) -> None:
    """The version that the project came from is rendered with the recorded answers."""
    hidden = {"author_name": CODE.replace("MARK", str(mark))}
    claim(project, answers=record(project)["answers"] | hidden)
    assert "author_name" in update(project, "--dry-run", "--set", "author_name=Me", code=2)
    assert not mark.exists()


def confirm(project: Path, address: str) -> None:
    """Do as if the user had confirmed an address in this clone."""
    git(project, "config", "--add", "cookiecutter-solver.template", address)


@pytest.mark.parametrize("other", ["127.0.0.1:9#", "127.0.0.1:9?", "127.0.0.1:9\\"])
def test_what_looks_like_a_password_is_no_other_host(
    other: str, project: Path, update: Update
) -> None:
    confirm(project, "https://good.example/solver.git")
    named = f"https://{other}@good.example/solver.git"
    claim(project, template=named)
    assert repr(named) in update(project, "--check", code=2)


def test_the_user_of_ssh_is_part_of_a_confirmed_address(project: Path, update: Update) -> None:
    address = "ssh://git@good.example/solver.git"
    confirm(project, address)
    claim(project, template=address)
    said = update(project, "--check", code=2, GIT_SSH_COMMAND="false")
    assert "clone" in said, "it was not fetched"
    assert "--template" not in said, "it had to be confirmed once more"


@pytest.fixture
def planted(versions: Versions, hostile: Path, project: Path) -> str:
    """A confirmed URL, recorded in a project that holds a hostile folder of that name."""
    url = f"file://{versions.repo}"
    confirm(project, url)
    shutil.rmtree(hostile / ".git")
    shutil.copytree(hostile, project / url)
    claim(project, template=url)
    return url


def test_a_folder_in_the_project_is_not_taken_for_a_url(
    planted: str, mark: Path, project: Path, update: Update
) -> None:
    update(project, "--dry-run")
    update(project, "--dry-run", "--template", planted)
    assert not mark.exists()


def test_nor_for_that_of_the_version_it_came_from(
    versions: Versions, planted: str, mark: Path, project: Path, update: Update, tmp_path: Path
) -> None:
    update(project, "--dry-run", "--template", str(archive(versions, NEW, tmp_path)))
    assert not mark.exists()


def test_a_commit_of_no_branch_or_tag_is_not_rendered(
    versions: Versions, hostile: Path, mark: Path, project: Path, update: Update
) -> None:
    loose = git(hostile, "rev-parse", "HEAD")
    git(hostile, "reset", "-q", "--hard", versions.new)
    claim(project, commit=loose)
    said = update(project, "--dry-run", "--template", str(hostile), code=2)
    assert loose[:7] in said
    assert not mark.exists()


@ANYHOW
def test_files_that_look_like_a_bare_repo_bring_in_no_settings(
    option: str, hostile: Path, mark: Path, project: Path, update: Update, tmp_path: Path
) -> None:
    root = tmp_path / "all"
    inner = root / "app"
    shutil.copytree(project, inner)
    shutil.rmtree(inner / ".git")
    claimed = json.dumps(record(inner) | {"template": str(hostile)})
    (inner / ".template.json").write_text(claimed)
    git(root, "init", "-q")
    git(inner, "init", "-q", "--bare", ".")
    confirm(inner, str(hostile))
    for settings in (["bare", "false"], ["worktree", "."], ["fsmonitor", f"touch {mark};:"]):
        git(inner, "config", f"core.{settings[0]}", settings[1])
    git(root, "add", "--force", "app")
    git(root, "commit", "-qm", "mine")
    assert repr(str(hostile)) in update(inner, option, code=2)
    assert not mark.exists()


@ANYHOW
def test_files_of_the_project_are_not_run(
    option: str, mark: Path, project: Path, update: Update
) -> None:
    """Modules where the user stands, and a filter of git's that a commit chooses."""
    for name in ("cookiecutter", "hooks", "jinja2", "json"):
        (project / f"{name}.py").write_text(f"open({str(mark)!r}, 'w')\n")
    (project / ".gitattributes").write_text("* filter=x\n")
    commit(project)
    git(project, "config", "filter.x.smudge", f"touch {mark}; cat")
    update(project, option, code=int(option == "--check"))
    assert not mark.exists()


def test_what_the_user_ignores_everywhere_is_updated(
    versions: Versions, project: Path, update: Update, tmp_path: Path
) -> None:
    (tmp_path / "ignore").write_text("*\n")
    config = tmp_path / "config"
    config.write_text(f"[core]\n excludesFile = {tmp_path / 'ignore'}\n")
    update(project, GIT_CONFIG_GLOBAL=str(config))
    git(project, "commit", "-q", "--no-edit")
    listed = git(project, "ls-files").splitlines()
    assert {"my_research/core/added.py", "tool.sh"} <= {*listed}
    assert git(project, "status", "--porcelain") == ""


def test_a_base_is_rendered_from_confirmed_addresses_only(
    versions: Versions, hostile: Path, mark: Path, project: Path, update: Update
) -> None:
    claim(project, template=str(hostile), commit=git(hostile, "rev-parse", "HEAD"))
    assert str(hostile) in update(project, "--template", str(versions.repo), code=2)
    assert not mark.exists()
