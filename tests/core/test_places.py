"""Runs in unusual places: closed outputs, other locales, folders in place of files."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from core import BaseSolver, setup_logging
from core.utils import UserError

from ..commands import ROOT

SOLVER = """
import logging, sys
from core import BaseSolver, LogProgressBar, setup_logging

class Solver(BaseSolver):
    def train(self):
        for number in self.log_progress("train", range(3)):
            logging.getLogger("x").info("step %d in Z\\u00fcrich", number)
        self.log_text("train", "note", "Z\\u00fcrich")
        return {"l\\u00f6ss": 1.0}

    def run(self, epochs=1):
        with self.running():
            while self.epoch <= epochs:
                self.run_stage("train", self.train)
                self.commit()
"""


class Solver(BaseSolver):
    """Commits epochs that have a metric."""

    def run(self, epochs: int = 1) -> None:
        with self.running():
            while self.epoch <= epochs:
                self.run_stage("train", lambda: {"loss": 1.0})
                self.commit()


def train(folder: Path, code: str, shell: str = 'exec "$@"', **env: str) -> str:
    """Return what a program with `SOLVER` says to stdout, started by a shell."""
    command = ["sh", "-c", shell, "sh", sys.executable, "-c", SOLVER + textwrap.dedent(code)]
    full = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(command, cwd=folder, env=full, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("shell", "before"),
    [
        ('exec "$@" 2>&-', ""),
        ('exec "$@"', "sys.stderr = None"),
        ('exec "$@"', "sys.stderr.close()"),
    ],
)
@pytest.mark.parametrize("setup", ["setup_logging(folder='run')", "setup_logging(False)", ""])
def test_a_run_does_without_stderr(tmp_path: Path, shell: str, before: str, setup: str) -> None:
    train(tmp_path, f"{before}\n{setup}\nSolver('run').run()", shell)
    assert json.loads((tmp_path / "run" / "history.json").read_text())
    if "folder" in setup:
        assert "step 2 in Z" in (tmp_path / "run" / "solver.log.0").read_text("utf-8")


@pytest.mark.parametrize(
    "env",
    [{"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"PYTHONIOENCODING": "ascii"}],
)
def test_another_locale_loses_no_text(tmp_path: Path, env: dict[str, str]) -> None:
    folder = tmp_path / "\u00e9tude"
    folder.mkdir()
    code = "setup_logging(folder='.'); Solver('.').run(); Solver('.').run(2)"
    train(folder, code, **env)
    log = (folder / "solver.log.0").read_text("utf-8")
    assert log.count("step 2 in Z\u00fcrich") == 2
    assert "is complete after epoch 2" in log, "a line with the folder's name"
    assert (folder / "outputs" / "train_2" / "note.txt").read_text("utf-8") == "Z\u00fcrich"
    assert "l\u00f6ss" in json.loads((folder / "history.json").read_text())[1]["train"]


@pytest.mark.parametrize(
    "name", ["history.json", "history.json.tmp", "config.json", "config.json.tmp"]
)
def test_a_folder_in_place_of_a_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(UserError, match=f"{name} is a folder") as error:
        Solver(tmp_path).run()
    assert "\n" not in str(error.value)
    (tmp_path / name).rmdir()
    Solver(tmp_path).run()
    assert json.loads((tmp_path / "history.json").read_text()) != []


@pytest.mark.parametrize("name", ["", "solver.log.0"])
def test_a_log_that_cannot_be_written_is_a_line(tmp_path: Path, name: str) -> None:
    place = tmp_path / "run" / name
    if name:
        place.mkdir(parents=True)
    else:
        place.touch()
    with pytest.raises(UserError, match=r"run"):
        setup_logging(folder=tmp_path / "run")
    said = subprocess.run(
        [sys.executable, "-c", "import core; core.setup_logging(folder='run')"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": ROOT},
        capture_output=True,
        text=True,
    )
    assert said.returncode == 1
    assert len(said.stderr.splitlines()) == 1
    setup_logging(with_file_log=False)


@pytest.mark.parametrize(
    "damage", ["\ud800", "[{", "3", "null", "[1]", "{}", '"text"', "[" * 10**5]
)
def test_a_damaged_history_costs_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    Solver(tmp_path).run()
    (tmp_path / "history.json").write_bytes(damage.encode(errors="surrogatepass"))
    (tmp_path / "config.json").write_bytes(b"\xff")
    solver = Solver(tmp_path)
    solver.run(2)
    assert len(solver.history) == 2
    assert json.loads((tmp_path / "history.json").read_text()) == solver.history
    json.loads((tmp_path / "config.json").read_text())
    assert sum("history.json can't be read" in line for line in caplog.messages) == 1


BEGUN = b'{"stage": "train", "epoch": 1, "metrics": {"'


@pytest.mark.parametrize(
    ("begin", "between", "first"),
    # The last makes two rows one.
    [(b'{"sta', b"\xff", 2), (b'{"stage": "tr', b"\xff", 2), (BEGUN, b"\xff", 2), (BEGUN, b"", 3)],
)
def test_a_damaged_byte_costs_its_row(
    tmp_path: Path, begin: bytes, between: bytes, first: int, caplog: pytest.LogCaptureFixture
) -> None:
    Solver(tmp_path).run(2)
    path = tmp_path / "metrics.jsonl"
    row, rest = path.read_bytes().split(b"\n", 1)
    assert row.startswith(begin)
    end = row[len(begin) + 1 :] + b"\n" if between else b""
    path.write_bytes(begin + between + end + rest)
    Solver(tmp_path).run(4)
    Solver(tmp_path).run(6)
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [row["epoch"] for row in rows] == [*range(first, 7)]
    assert sum(str(path) in line for line in caplog.messages) == 1


@pytest.mark.parametrize("name", ["metrics.jsonl", "outputs", ".lock", "tensorboard"])
def test_other_things_in_the_way_cost_themselves(
    tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    if name in ("outputs", "tensorboard"):
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()

    class Media(Solver):
        def commit(self, *args: Any) -> None:
            self.log_text("train", "note", "text")
            super().commit(*args)

    solver = Media(tmp_path)
    solver.init_tensorboard()
    solver.run(2)
    assert len(json.loads((tmp_path / "history.json").read_text())) == 2
    failures = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert len(failures) == 1, caplog.messages
