"""Puts the template together, in the temporary copy of the repo that cookiecutter makes.

The repo keeps readable names; cookiecutter wants a folder whose name is a template. So `template/`
and every `package/` in it get such names, and the core goes into the package.
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

SLUG = "{{ cookiecutter.project_slug }}"
PACKAGE = "{{ cookiecutter.package_name }}"
RENDERED = ("core", "template", "hooks", "cookiecutter.json", "cookiecutter_solver_hooks.py")
LITTER = ("__pycache__", ".mypy_cache", ".ruff_cache", ".pytest_cache")


def main() -> None:
    """Assemble, in the current folder."""
    root = Path.cwd()
    if not root.parent.name.startswith("cookiecutter") or not in_temporary_folder(root):
        sys.exit("hooks/pre_prompt.py rearranges cookiecutter's copy: run `cookiecutter <repo>`.")
    stamp(root)
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


def stamp(root: Path) -> None:
    """Write the version, and the commit if there is one, into the record that will be rendered."""
    record = root / "template" / ".template.json"
    source = (root / "core" / "__init__.py").read_text(encoding="utf-8")
    version = re.findall(r'__version__ = "(.+)"', source)[0]
    text = record.read_text(encoding="utf-8").replace("$Version$", version)
    if (root / ".git").exists() and shutil.which("git") and (commit := git("rev-parse", "HEAD")):
        changes = git("status", "--porcelain", "--", *RENDERED)
        text = text.replace("$Format:%H$", commit + ("-dirty" if changes else ""))
    record.write_text(text, encoding="utf-8")


def git(*arguments: str) -> str:
    """Run git here, in no other repo, and without writing; return what it prints."""
    env = {k: v for k, v in os.environ.items() if k not in ("GIT_DIR", "GIT_WORK_TREE")}
    env.pop("GIT_INDEX_FILE", None)
    # Cookiecutter makes the hooks executable.
    command = ["git", "--no-optional-locks", "-c", "core.fileMode=false", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env).stdout.strip()


def in_temporary_folder(path: Path) -> bool:
    """Is the path somewhere below the folder for temporary files?"""
    return Path(tempfile.gettempdir()).resolve() in path.resolve().parents


if __name__ == "__main__":
    main()
