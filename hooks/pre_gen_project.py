"""Refuses bad answers again (a replayed file of answers was not checked before), and lost work."""

# The checks happen while cookiecutter renders this line:
# {{ cookiecutter | check_names }}, {{ cookiecutter | check_texts }}

import sys

sys.path.pop(0)  # cookiecutter runs this in the folder for temporary files, where anybody writes

from pathlib import Path

package = "{{ cookiecutter.package_name }}"
core = Path(package, "core")
if Path(".template.json").exists() or (core.is_dir() and any(core.iterdir())):
    sys.exit(
        f"project_slug: {Path.cwd().name} is a project, and may hold your edits: choose another "
        f"name, or update it in place, from inside of it, with `python -m {package}.tools.update`."
    )
