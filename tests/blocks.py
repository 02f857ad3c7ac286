"""The fenced blocks of a Markdown page."""

import re
from pathlib import Path
from typing import NamedTuple

from .conftest import ROOT

DOCS = ROOT / "docs"


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
