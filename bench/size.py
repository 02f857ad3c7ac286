"""Code lines, without tests, docstrings, comments and blank lines: `python -m bench.size`."""

from __future__ import annotations

import ast
import importlib.util
import io
import tokenize
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import harness
from .harness import OURS, ROOT, Row, Section, Spread

TARGET = 2000.0
# Files of the core that can be deleted, and the one that knows Dora and Hydra.
OPTIONAL = {"adversarial.py", "ema.py", "hints.py", "launch.py", "tensorboard.py", "wandb.py"}
OPTIONAL |= {"provenance.py", "replicas.py", "sharded.py", "streams.py", "watch.py"}
OPTIONAL |= {"workers.py", "trackio.py", "mlflow.py", "aim.py", "service.py"}
PEERS = {
    "Flashy": "flashy",
    "ignite": "ignite",
    "Fabric": "lightning_fabric",
    "Accelerate": "accelerate",
    "Lightning": "pytorch_lightning",
}
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(source: str) -> int:
    """Lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NOT_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            first = node.body[0] if node.body else None
            if (
                isinstance(first, ast.Expr)
                and isinstance(first.value, ast.Constant)
                and isinstance(first.value.value, str)
            ):
                lines -= set(range(first.lineno, (first.end_lineno or first.lineno) + 1))
    return len(lines)


def files(folder: Path) -> list[Path]:
    """The Python files of a package, without tests."""
    found = sorted(folder.rglob("*.py"))
    return [path for path in found if "tests" not in path.relative_to(folder).parts]


def total(paths: Iterable[Path]) -> int:
    """Code lines of files."""
    return sum(code_lines(path.read_text()) for path in paths)


def required(paths: Iterable[Path]) -> list[Path]:
    """The files of the core without `launch.py` and optional ones."""
    return [path for path in paths if path.name not in OPTIONAL]


def measure(quick: bool = False) -> Iterator[Section]:
    """Ours and the peers' packages."""
    core, tools = files(ROOT / "core"), files(ROOT / "template" / "package" / "tools")
    counts = {
        OURS: total(required(core)),
        f"{OURS}, with `launch.py` and optional files": total(core),
        f"{OURS}, with its three commands as well": total([*core, *tools]),
    }
    rows = []
    for name, package in PEERS.items():
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            rows.append(Row(name, note=f"cannot be counted: no {package} is installed"))
        else:
            counts[name] = total(files(Path(spec.origin).parent))
    for name, lines in counts.items():
        rows.append(Row(name, Spread.of([float(lines)]), target=TARGET if name == OURS else None))
    about = "Without tests, docstrings, comments and blank lines."
    yield Section("Size", about, ("code lines", ",.0f"), ("", ""), rows)


if __name__ == "__main__":
    harness.main(measure)
