"""How long it takes to render a project: `python -m bench.render`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from . import harness
from .harness import OURS, Section, compare, copy_of_the_repo, interleave

TARGET = 1.0  # seconds


def empty_template(folder: Path) -> Path:
    """One that renders a single file, and has hooks that do nothing."""
    template = folder / "empty"
    inner = template / "{{ cookiecutter.project_slug }}"
    inner.mkdir(parents=True)
    (inner / "README.md").write_text("{{ cookiecutter.project_slug }}\n")
    (template / "cookiecutter.json").write_text(json.dumps({"project_slug": "my-research"}))
    (template / "hooks").mkdir()
    for hook in ("pre_prompt", "pre_gen_project", "post_gen_project"):
        (template / "hooks" / f"{hook}.py").write_text("")
    return template


def rendering(template: Path, folder: Path) -> Callable[[], float]:
    """Seconds of CPU time that the command takes, hooks included."""

    def run() -> float:
        out = folder / "out"
        command = [sys.executable, "-m", "cookiecutter", str(template), "--no-input"]
        env = {**os.environ, "TMPDIR": str(folder)}  # cookiecutter leaves something there
        before = os.times()
        subprocess.run([*command, "-o", str(out)], check=True, capture_output=True, env=env)
        after = os.times()
        shutil.rmtree(out)
        user = after.children_user - before.children_user
        return user + after.children_system - before.children_system

    return run


def measure(quick: bool = False) -> Iterator[Section]:
    """The default project, beside a template with nothing in it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = "a template of one line"
        ways = {base: rendering(empty_template(folder), folder)}
        ways[OURS] = rendering(copy_of_the_repo(folder), folder)
        rounds = 2 if quick else 7
        times, failed = interleave(ways, rounds)
    rows = compare(times, failed, base, 1.0, targets={OURS: TARGET})
    about = (
        f"`cookiecutter TEMPLATE --no-input`, from a folder; CPU time; {rounds} rounds. What "
        "is above a template of one line, with three empty hooks, is our own time."
    )
    taken, compared = ("s", ".2f"), ("s above it", ".2f")
    yield Section("Rendering a project", about, taken, compared, rows)


if __name__ == "__main__":
    harness.main(measure)
