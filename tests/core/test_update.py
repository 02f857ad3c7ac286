"""The update command, on a small project and a template as small; real git, real cookiecutter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from core import update

pytest.importorskip("cookiecutter")


def git(cwd: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgSign=false"]
    return subprocess.check_output(["git", *identity, *arguments], cwd=cwd, text=True).strip()


def commit(repo: Path) -> str:
    git(repo, "init", "-q")
    git(repo, "add", "--all")
    git(repo, "commit", "-qm", "x")
    return git(repo, "rev-parse", "HEAD")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of two files, whose template has changed one line in each since."""
    answers = {"name": "toy"}
    template = tmp_path / "template"
    files = template / "{{ cookiecutter.name }}"
    project = tmp_path / "toy"
    for folder in (files, project):
        folder.mkdir(parents=True)
        for name in ("a.txt", "b.txt"):
            (folder / name).write_text("1\n2\n3\n4\n5\n")
    record = {"template": str(template), "version": "1", "commit": None, "answers": answers}
    (template / "cookiecutter.json").write_text(json.dumps(answers))
    (files / update.RECORD).write_text(json.dumps(record))
    record["commit"] = commit(template)
    for name in ("a.txt", "b.txt"):
        (files / name).write_text("1\n2\n3\n4\nfive\n")
    commit(template)
    (project / update.RECORD).write_text(json.dumps(record))
    (project / "update.py").write_text(Path(update.__file__).read_text())
    return project


def run(project: Path, *arguments: str) -> tuple[int, str]:
    command = [sys.executable, str(project / "update.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_a_record_that_is_missing_or_in_the_wrong_place_is_said(
    project: Path, tmp_path: Path
) -> None:
    with pytest.raises(update.UpdateError, match=r"no \.template\.json: that version is older"):
        update.Record.read(tmp_path)
    template = tmp_path / "plain"
    (tmp_path / "template").rename(template)
    (template / ".git").rename(tmp_path / "git")
    commit(project)
    code, said = run(project, "--template", str(template), "--to", "v1")
    assert code == 2
    assert "plain is no git repo and holds one version: leave out --to" in said


def test_edits_are_merged(project: Path) -> None:
    (project / "a.txt").write_text("one\n2\n3\n4\n5\n")
    (project / "b.txt").write_text("1\n2\n3\n4\nmine\n")
    code, said = run(project)
    assert code == 2
    assert said.startswith("update: ")
    assert "in no git repo" in said
    before = commit(project)
    assert run(project, "--check")[0] == 1

    code, said = run(project)
    assert code == 1
    assert "UU b.txt  <- both changed the same lines" in said
    assert (project / "a.txt").read_text() == "one\n2\n3\n4\nfive\n"
    assert "=======\nfive\n>>>>>>> " in (project / "b.txt").read_text()
    assert git(project, "rev-parse", "HEAD") == before

    (project / "b.txt").write_text("1\n2\n3\n4\nfive, mine\n")
    commit(project)
    code, said = run(project)
    assert code == 0
    assert said.startswith("Up to date: 1 (")
