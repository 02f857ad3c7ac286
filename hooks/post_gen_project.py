"""Finishes the rendered project: lays the example over it, keeps one licence, makes a commit.

Cookiecutter renders this file; the answers in it were checked and hold no quotes. Standard library
only.
"""

import sys

sys.path.pop(0)  # cookiecutter runs this in the folder for temporary files, where anybody writes

import json
import os
import shutil
import subprocess
from pathlib import Path

SLUG = "{{ cookiecutter.project_slug }}"
AUTHOR = "{{ cookiecutter.author_name }}"
EXAMPLE = "{{ cookiecutter.example }}"
LICENSE = "{{ cookiecutter.license }}"

# Cookiecutter may run inside of another git command, whose repo is not ours.
ENVIRONMENT = {
    name: value
    for name, value in os.environ.items()
    if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
}


def main() -> None:
    """Finish the project in the current folder."""
    shutil.copytree(Path("examples", EXAMPLE), ".", dirs_exist_ok=True)
    shutil.rmtree("examples")
    if LICENSE != "none":
        Path("licenses", LICENSE).rename("LICENSE")
    shutil.rmtree("licenses")
    print(commit())
    print(f'\nNext:\n  cd {SLUG}\n  pip install -e ".[dev]"\n  dora run')


def commit() -> str:
    """Make the project a git repo with one commit; return a word on it."""
    if shutil.which("git") is None:
        return "git was not found: the project is no git repo yet."
    if git("rev-parse", "--is-inside-work-tree") == "true":
        return "The folder is inside of a git repo: no other one was made."
    try:
        git("init", "--initial-branch=main", check=True)
        # The project's own .gitignore decides, not what the user ignores everywhere.
        names = git("ls-files", "-z", "--others", "--exclude-per-directory=.gitignore")
        literal = ("--pathspec-from-file=-", "--pathspec-file-nul")
        git("--literal-pathspecs", "add", "--force", *literal, check=True, given=names)
        options = ["core.hooksPath=/dev/null", "commit.gpgSign=false"]
        if not (git("config", "user.name") and git("config", "user.email")):
            options += [f"user.name={AUTHOR}", f"user.email={SLUG}@localhost"]
        settings = [part for option in options for part in ("-c", option)]
        record = json.loads(Path(".template.json").read_text(encoding="utf-8"))
        # So `tools/update.py` takes newer versions from there without asking.
        git("config", "--local", "--add", "cookiecutter-solver.template", record["template"])
        message = f"Start from cookiecutter-solver {record['version']}"
        git(*settings, "commit", "-m", message, check=True)
    except subprocess.CalledProcessError as error:
        return f"git failed, so there is no first commit: {error.stderr.strip()}"
    return "A git repo with a first commit was made."


def git(*arguments: str, check: bool = False, given: str = "") -> str:
    """Run git here on an input; return its output."""
    done = subprocess.run(
        ["git", *arguments],
        input=given,
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",  # names of files are bytes
        check=check,
        env=ENVIRONMENT,
    )
    return done.stdout.strip()


if __name__ == "__main__":
    main()
