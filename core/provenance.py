"""Provenance: how, where and from what code a run was started, in its `run.json` (optional)."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from . import distrib
from .rng import accelerator
from .run import XP
from .utils import flatten, write_and_rename

logger = logging.getLogger(__name__)

PROJECT = Path(__file__).parents[2]
MAX_PATCH_BYTES = 2**20
NEW_FILES = "*.py", "*.yaml"  # that belong to a patch before git knows them; others may be secret


def record_start(xp: XP) -> None:
    """Append this start to `run.json`; name the changes of code and versions since the last one.

    All ranks must take part.
    """
    ranks = distrib.gather_objects(f"{device_name()} on {socket.gethostname()}")
    if not distrib.is_rank_zero():
        return
    path = xp.folder / "run.json"
    start = {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(sys.orig_argv),
        "ranks": Counter(ranks),
        "code": record_code(xp.folder),
        "template": read_template(),
        "versions": read_versions(),
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
        found = (start.get(part) for start in (then, now))
        old, new = (flatten(known) if isinstance(known, dict) else {} for known in found)
        prefix = "" if part == "versions" else f"{part} "
        for key in new:
            if key in old and old[key] != new[key]:
                yield f"{prefix}{key} {old[key] or 'none'} -> {new[key] or 'none'}"


def device_name() -> str:
    """Return the name of the accelerator, or `cpu` if none is in use."""
    if (module := accelerator()) is None:
        return "cpu"
    return str(getattr(module, "get_device_name", torch.accelerator.current_accelerator)())


def read_versions() -> dict[str, str]:
    """Return the versions of Python, the core and all imported packages."""
    packages = {n: m for n, m in [*sys.modules.items()] if n.partition(".")[0] == n}
    packages["core"] = sys.modules[__package__]
    known = {n: vars(m).get("__version__") for n, m in packages.items() if hasattr(m, "__dict__")}
    others = known.keys() - sys.stdlib_module_names
    found = {name: str(known[name]) for name in sorted(others) if isinstance(known[name], str)}
    return {"python": platform.python_version(), **found}


def read_template() -> dict[str, Any]:
    """Return version and commit of the template."""
    try:
        record = json.loads((PROJECT / ".template.json").read_bytes())
        return {"version": record["version"], "commit": record["commit"]}
    except (OSError, ValueError, LookupError, TypeError):
        return {}


def record_code(folder: Path) -> dict[str, str]:
    """Return the commit, and the name of a patch in `folder` with the uncommitted changes.

    Empty without git. A patch of more than a megabyte has a name, but no file.
    """
    code: dict[str, str] = {}
    with suppress(OSError, subprocess.SubprocessError):
        code["commit"] = git("rev-parse", "--short=12", "HEAD").decode().strip()
        diff = read_changes()
        code["changes"] = f"changes.{hashlib.sha256(diff).hexdigest()[:8]}.patch" if diff else ""
        if 0 < len(diff) <= MAX_PATCH_BYTES:
            (folder / code["changes"]).write_bytes(diff)
    return code


def read_changes() -> bytes:
    """Return the changes in the project since its commit, with new files, as a patch for git."""
    with tempfile.TemporaryDirectory() as temporary:
        index = Path(temporary, "index")  # a copy, so that new files join no index of the user
        shutil.copy(PROJECT / os.fsdecode(git("rev-parse", "--git-path", "index")).strip(), index)
        new = git("ls-files", "--others", "--exclude-standard", "-z", "--", *NEW_FILES)
        if names := os.fsdecode(new).split("\0")[:-1]:
            git("add", "--intent-to-add", "--", *names, index=index)
        options = ["--no-ext-diff", "--no-textconv", "--src-prefix=a/", "--dst-prefix=b/"]
        return git("diff", "--no-color", *options, "HEAD", "--", ".", index=index)


def git(*arguments: str, index: Path | None = None) -> bytes:
    """Return the output of git in the project, whose files and index are left alone."""
    command = ["git", "-C", str(PROJECT), *arguments]
    env = os.environ | {"GIT_OPTIONAL_LOCKS": "0"}
    env |= {"GIT_INDEX_FILE": str(index)} if index else {}
    return subprocess.run(command, capture_output=True, check=True, timeout=60, env=env).stdout
