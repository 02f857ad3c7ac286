"""Provenance: how, where and from what code a run was started, in its `run.json` (optional)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from . import distrib
from .run import XP
from .utils import flatten, write_and_rename

logger = logging.getLogger(__name__)

HERE = Path(__file__).parent
KEPT_BYTES = 2**20  # of changes that are not committed
SOURCES = {".py", ".yaml", ".yml", ".toml"}  # kinds of files that git may not know yet


def record_start(xp: XP) -> None:
    """Append this start to `run.json`; name the changes of code and versions since the last one.

    All ranks must take part.
    """
    ranks = distrib.gather_objects(f"{device_name()} of {socket.gethostname()}")
    if not distrib.is_rank_zero():
        return
    path = xp.folder / "run.json"
    start = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "ranks": ranks,
        "code": read_code(xp.folder),
        "template": read_template(),
        "versions": {"python": platform.python_version(), **read_versions()},
    }
    starts = read_starts(path)
    if starts and (changes := ", ".join(find_changes(starts[-1], start))):
        logger.warning("Changed since the last start: %s", changes)
    with write_and_rename(path, "w") as file:
        json.dump([*starts, start], file, indent=1)


def read_starts(path: Path) -> list[dict[str, Any]]:
    """Return the earlier starts; rename a damaged file, with a warning."""
    try:
        starts = json.loads(path.read_bytes()) if path.is_file() else []
        if not isinstance(starts, list) or any(type(start) is not dict for start in starts):
            raise ValueError("no list of starts")
    except (RecursionError, ValueError) as error:
        kept = path.replace(path.with_name("run.damaged.json"))
        logger.warning("Damaged: %s, kept as %s: %s", path, kept.name, error)
        return []
    return starts


def find_changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """Yield the code and the versions that differ, of those that both starts know."""
    for part in ("code", "template", "versions"):
        old, new = (flatten(start[part]) if part in start else {} for start in (then, now))
        prefix = "" if part == "versions" else f"{part} "
        for key in old.keys() & new.keys():
            if old[key] != new[key]:
                yield f"{prefix}{key} {old[key] or 'none'} -> {new[key] or 'none'}"


def device_name() -> str:
    """Return the name of the accelerator, or `cpu` if none is in use."""
    device = distrib.device()
    module = torch.get_device_module(device)
    if not getattr(module, "is_initialized", lambda: True)():  # to ask for its name would do so
        return "cpu"
    return str(getattr(module, "get_device_name", str)(device))


def read_versions() -> dict[str, str]:
    """Return the versions of all imported packages."""
    packages = {n: m for n, m in [*sys.modules.items()] if n.partition(".")[0] == n}
    known = {n: vars(m).get("__version__") for n, m in packages.items() if hasattr(m, "__dict__")}
    others = known.keys() - sys.stdlib_module_names
    return {name: str(known[name]) for name in sorted(others) if isinstance(known[name], str)}


def read_template() -> dict[str, Any]:
    """Return version and commit of the template."""
    try:
        record = json.loads((HERE.parents[1] / ".template.json").read_bytes())
        return {"version": record["version"], "commit": record["commit"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def read_code(folder: Path) -> dict[str, str]:
    """Return the commit, and the file in `folder` with the changes that are not committed.

    Empty without git. Changes of more than a megabyte have a name, but no file.
    """
    try:
        commit = git("rev-parse", "--short=12", "HEAD").decode().strip()
        diff = git("diff", "HEAD", "--no-ext-diff", "--no-textconv", "--binary")
        root = Path(os.fsdecode(git("rev-parse", "--show-toplevel")).strip())
        new = git("ls-files", "--others", "--exclude-standard", "--full-name", "-z", ":/")
        names = [name for name in os.fsdecode(new).split("\0") if Path(name).suffix in SOURCES]
        diff += b"".join(as_patch(root, name) for name in names)
    except (OSError, subprocess.SubprocessError):
        return {}
    patch = f"changes.{hashlib.sha256(diff).hexdigest()[:8]}.patch" if diff else ""
    if patch and len(diff) <= KEPT_BYTES:
        (folder / patch).write_bytes(diff)
    return {"commit": commit, "changes": patch}


def git(*arguments: str) -> bytes:
    """Return what git says of the project, without an effect on its files."""
    command = ["git", "-C", str(HERE), *arguments]
    env = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    return subprocess.run(command, capture_output=True, check=True, timeout=60, env=env).stdout


def as_patch(root: Path, name: str) -> bytes:
    """Return a new file as a patch that makes it; empty for a large file."""
    path = root / name
    if path.stat().st_size > KEPT_BYTES:
        return b""
    lines = path.read_bytes().removesuffix(b"\n").split(b"\n")
    head = f"--- /dev/null\n+++ b/{name}\n@@ -0,0 +1,{len(lines)} @@\n"
    return os.fsencode(head) + b"".join(b"+" + line + b"\n" for line in lines)
