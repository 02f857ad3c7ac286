"""The extension of Jinja in cookiecutter.json, a front door to `hooks/answers.py` and `record.py`.

Where the user stands, any module or package called `hooks` would come before the template's own. So
cookiecutter imports a name of nobody else's, and the rest is loaded by path, from the very version
of the template in use.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from jinja2 import Environment
from jinja2.ext import Extension


class Hooks(Extension):
    """Adds the filters of `hooks/answers.py` and `hooks/record.py`."""

    def __init__(self, environment: Environment) -> None:
        super().__init__(environment)
        repo = Path(sys.path[-1])  # where cookiecutter puts the template that is rendered
        for name in ("answers", "record"):
            runpy.run_path(str(repo / "hooks" / f"{name}.py"))["add_filters"](environment, repo)
