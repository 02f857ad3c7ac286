"""Puts the template together, in the temporary copy of the repo that cookiecutter makes.

The repo keeps readable names; cookiecutter wants a folder whose name is a template. So `template/`
and every `package/` in it get such names, and the core goes into the package.
"""

import shutil
import sys
import tempfile
from pathlib import Path

SLUG = "{{ cookiecutter.project_slug }}"
PACKAGE = "{{ cookiecutter.package_name }}"
LITTER = ("__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")


def main() -> None:
    """Assemble, in the current folder."""
    root = Path.cwd()
    if not root.parent.name.startswith("cookiecutter") or not in_temporary_folder(root):
        sys.exit("hooks/pre_prompt.py rearranges cookiecutter's copy: run `cookiecutter <repo>`.")
    project = root / SLUG
    (root / "template").rename(project)
    for folder in LITTER:
        for found in [*project.rglob(folder), *(root / "core").rglob(folder)]:
            shutil.rmtree(found)
    for package in sorted(project.rglob("package"), reverse=True):
        package.rename(package.with_name(PACKAGE))
    # What several files share is included by Jinja, and is no file of the project.
    (project / "partials").rename(root / "templates")
    (root / "core").rename(project / PACKAGE / "core")


def in_temporary_folder(path: Path) -> bool:
    """Is the path somewhere below the folder for temporary files?"""
    return Path(tempfile.gettempdir()).resolve() in path.resolve().parents


if __name__ == "__main__":
    main()
