"""Refuses bad answers again (a replayed file of answers was not checked before), and lost work."""

# The checks happen while cookiecutter renders this line:
# {{ cookiecutter | check_names }}, {{ cookiecutter | check_texts }}

import sys
from pathlib import Path

core = Path("{{ cookiecutter.package_name }}", "core")
if core.is_dir() and any(core.iterdir()):
    sys.exit(
        f"project_slug: {Path.cwd().name}/{core} exists and may hold your edits: choose another."
    )
