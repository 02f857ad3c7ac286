"""The fenced blocks of a Markdown page, and a way to run those of Python."""

import multiprocessing
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from .conftest import ROOT

DOCS = ROOT / "docs"

# Processes that need not import PyTorch once more.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["sklearn.datasets", "torch", __name__])


class Block(NamedTuple):
    """A fenced block: its language, the rest of its first line, its text and where it begins."""

    language: str
    name: str
    text: str
    where: str


def blocks(page: Path) -> list[Block]:
    """All blocks of a page, in order; ValueError if one is not closed or has no language."""
    text = page.read_text()
    found = []
    for match in re.finditer(r"^```(\w+) ?(.*)\n((?:.*\n)*?)```$", text, re.M):
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match[1], match[2], match[3], f"{page.name}:{line}"))
    if 2 * len(found) != (fences := len(re.findall(r"^\s*```", text, re.M))):
        raise ValueError(f"{page}: {fences} fences make {len(found)} blocks")
    return found


def run_python(block: Block, folder: Path, env: Mapping[str, str]) -> str:
    """Run a block in a process of its own, in a folder; return all that it says."""
    said = folder.parent / "said.txt"
    process = FORKS.Process(target=_execute, args=(block, folder, dict(env), said))
    process.start()
    process.join(200)
    process.kill()
    assert process.exitcode == 0, said.read_text()
    return said.read_text()


def _execute(block: Block, folder: Path, env: dict[str, str], said: Path) -> None:
    """Run a block in this process, as if it had been started for that."""
    multiprocessing.set_start_method("fork", force=True)  # as on Linux by default
    os.environ.clear()
    os.environ.update(env)
    os.chdir(folder)
    sys.path.insert(0, str(folder))
    with said.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    exec(compile(block.text, block.where, "exec"), {"__name__": "__main__"})
