"""Starts of a run, recorded in its `run.json`: in real git repositories."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import core
from core import BaseSolver, provenance
from core.tests.processes import on_ranks


def git(repo: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(["git", *identity, *arguments], cwd=repo, check=True, capture_output=True)


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> Path:
    """A repository with the core, and a solver that is committed; only warnings are captured."""
    caplog.set_level("WARNING")
    here = tmp_path / "repo" / "package" / "core"
    here.mkdir(parents=True)
    (here / "steps.py").write_text("two = 2\n")
    (here.parent / "solver.py").write_text("one = 1\n")
    (tmp_path / "repo" / ".template.json").write_text('{"version": "1.0", "commit": null}')
    git(tmp_path, "init", "repo")
    git(tmp_path / "repo", "add", ".")
    git(tmp_path / "repo", "commit", "-m", "one")
    monkeypatch.setattr(provenance, "PROJECT", tmp_path / "repo")
    return tmp_path / "repo"


def start(folder: Path) -> dict[str, Any]:
    """Start a run once more; return the record."""
    solver = BaseSolver(folder)
    with solver.running():
        solver.commit()
    last: dict[str, Any] = json.loads((folder / "run.json").read_text())[-1]
    return last


def test_each_start_is_recorded(tmp_path: Path, repo: Path) -> None:
    record = start(tmp_path / "run")
    assert record["command"] == shlex.join(sys.orig_argv)
    assert record["versions"]["torch"] == torch.__version__
    assert record["versions"]["core"] == core.__version__
    assert record["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert "json" not in record["versions"]  # of Python itself
    assert record["template"] == {"version": "1.0", "commit": None}
    assert len(record["code"]["commit"]) == 12
    assert record["code"]["changes"] == ""
    [rank] = record["ranks"]
    assert rank.startswith("cpu on ")
    start(tmp_path / "run")
    assert len(json.loads((tmp_path / "run" / "run.json").read_text())) == 2


def test_changed_code_is_kept_and_told(
    tmp_path: Path, repo: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old = start(tmp_path / "run")
    start(tmp_path / "run")
    assert not caplog.messages
    (repo / "package" / "solver.py").write_text("one = 2\n")
    (repo / "package" / "new.py").write_text("two = 2\nthree = 3")
    (repo / "package" / "data.bin").write_bytes(b"\xff" * 10)
    changed = start(tmp_path / "run")["code"]["changes"]
    [said] = caplog.messages
    assert changed in said
    git(repo, "stash", "-u")
    git(repo, "apply", str(tmp_path / "run" / changed))
    assert (repo / "package" / "solver.py").read_text() == "one = 2\n"
    assert (repo / "package" / "new.py").read_text() == "two = 2\nthree = 3"
    assert start(tmp_path / "run")["code"]["changes"] == changed
    caplog.clear()
    git(repo, "add", ".")
    git(repo, "commit", "-m", "two")
    new = start(tmp_path / "run")
    assert f"commit {old['code']['commit']} -> {new['code']['commit']}" in caplog.messages[-1]


def test_other_versions_are_told(
    tmp_path: Path, repo: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path)
    monkeypatch.setattr(torch, "__version__", "9.9")
    start(tmp_path)
    [said] = caplog.messages
    assert "-> 9.9" in said


@pytest.mark.parametrize("name", [None, "big.py"])
def test_without_git_or_with_large_changes(
    tmp_path: Path, repo: Path, monkeypatch: pytest.MonkeyPatch, name: str | None
) -> None:
    if name is None:
        monkeypatch.setattr(provenance, "PROJECT", tmp_path)
        assert start(tmp_path / "run")["code"] == {}
        return
    (repo / "package" / "solver.py").write_text("x = 1\n" * 200_000)
    assert start(tmp_path / "run")["code"]["changes"]
    assert not list((tmp_path / "run").glob("*.patch"))


@pytest.mark.parametrize("text", ["{", "{}", "[1]", "\x00"])
def test_a_damaged_record_costs_itself(
    tmp_path: Path, repo: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    start(tmp_path)
    (tmp_path / "run.json").write_text(text)
    start(tmp_path)
    [said] = caplog.messages
    assert "run.damaged.json" in said
    assert (tmp_path / "run.damaged.json").read_text() == text
    assert len(json.loads((tmp_path / "run.json").read_text())) == 1


def test_all_ranks_are_recorded(tmp_path: Path) -> None:
    on_ranks(start, tmp_path)
    [record] = json.loads((tmp_path / "run.json").read_text())
    assert [*record["ranks"].values()] == [2]
