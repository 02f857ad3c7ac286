"""Records where a project comes from, in its `.template.json`: a filter of Jinja.

`pre_prompt.py` knows the version and the commit, cookiecutter the address and the answers; nothing
of it passes through the questions, so a replayed file of answers can't bring in a stale value.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from jinja2 import Environment


def add_filters(environment: Environment, repo: Path) -> None:
    """Make `record` available as a filter."""
    # The environment that renders files is made while we are still where the user is.
    environment.filters["record"] = partial(record, folder=Path.cwd())


def record(context: Mapping[str, str], version: str, commit: str, folder: Path) -> str:
    """Return what `tools/update.py` reads, as JSON.

    Args:
        context: all that cookiecutter knows.
        version: of the template.
        commit: of the template; what begins with a dollar sign was not filled in.
        folder: where the user is.
    """
    found = {
        "template": address(context["_template"], context["_repo_dir"], folder),
        "version": version,
        "commit": None if commit.startswith("$") else commit,
        "answers": {name: value for name, value in context.items() if not name.startswith("_")},
    }
    return json.dumps(found, indent=2, ensure_ascii=False)


def address(template: str, repo: str, folder: Path) -> str:
    """Where the template will be found from any folder, without anybody's password.

    Args:
        template: what the user typed: a path, a URL or an abbreviation of one.
        repo: cookiecutter's copy of it.
        folder: where the user is.
    """
    if "://" not in template and (folder / template).exists():
        return os.path.abspath(folder / template)
    if not template.endswith(".zip"):
        command = ["git", "-C", repo, "remote", "get-url", "origin"]
        done = subprocess.run(command, capture_output=True, text=True)
        template = done.stdout.strip() or template
    return re.sub(r"^((?:git\+)?https?://)[^/?#\\]*@", r"\1", template)
