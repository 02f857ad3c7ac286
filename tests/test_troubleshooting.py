"""docs/troubleshooting.md knows every message that we raise, and no other."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from .conftest import ROOT

PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = [
    *ROOT.glob("core/*.py"),
    *ROOT.glob("core/trackers/*.py"),
    *ROOT.glob("hooks/*.py"),
    *ROOT.glob("template/package/*.py"),
    *ROOT.glob("template/examples/*/package/solver.py"),
]
LOGGED = re.compile(r"log(ger)?\.(warning|error|critical|exception)$")
REFUSED = ("sys.exit", "_refuse", "refuse")  # the latter two are those of hooks/answers.py


def words(node: ast.expr) -> str:
    """A literal, with … for what is filled in; empty for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return re.sub(r"%[sd]", "…", node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            words(part) if isinstance(part, ast.Constant) else "…" for part in node.values
        )
    if isinstance(node, ast.BinOp):
        return (words(node.left) or "…") + (words(node.right) or "…")
    return ""


def messages(path: Path) -> Iterator[tuple[str, str]]:
    """Where a message is raised or logged, and its words."""
    for node in ast.walk(ast.parse(path.read_text())):
        call = node.exc if isinstance(node, ast.Raise) else node
        if not isinstance(call, ast.Call):
            continue
        name = ast.unparse(call.func)
        if isinstance(node, ast.Raise) or name in REFUSED or LOGGED.search(name):
            for argument in call.args:
                if re.search("[a-z] |: …", text := words(argument)):
                    yield f"{path.relative_to(ROOT)}:{call.lineno}", text


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, re.split("…+", message.replace("`", "")))))


def cells() -> list[str]:
    """The messages on the page, but for those of others."""
    ours, _ = PAGE.read_text().split("## What others say")
    rows = [
        line.split(" | ")[0].removeprefix("| ") for line in ours.splitlines() if line[:2] == "| "
    ]
    return [row.replace("`", "") for row in rows if row != "message"]


def test_every_message_is_on_the_page_and_no_other() -> None:
    known = [found for path in SOURCES for found in messages(path)]
    assert len(known) > 100
    page = cells()
    missing = [found for found in known if not any(map(pattern(found[1]).search, page))]
    assert not missing
    # What is put together from several literals, in `watchdog._differences`.
    patterns = [pattern(text) for _, text in known] + [pattern("ranks disagree: …")]
    assert not [cell for cell in page if not any(p.search(cell) for p in patterns)]
