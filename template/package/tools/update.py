"""Take a newer template, an older one, or other answers, by a merge that is git's own.

    python -m my_research.tools.update                       # the newest version
    python -m my_research.tools.update --check               # is there one? if so, exit code 1
    python -m my_research.tools.update --dry-run             # show what it would do, do nothing
    python -m my_research.tools.update --to v0.2.0           # another tag, branch or commit
    python -m my_research.tools.update --set license=none    # another answer
    python -m my_research.tools.update --example             # changes of the example's files too
    python -m my_research.tools.update --template ADDRESS    # a folder, git URL or zip elsewhere

This file fetches the wanted version of the template and starts `hooks/update.py` there, which
merges. So code from the template's address runs here. `.template.json` names the address, and comes
with a clone of anybody's repo: an address is confirmed once in each clone, and the clone's own git
config remembers the answer. `--check` runs nothing of the template. Nothing else in the record can
bring in code: an entry is plain text, or refused.

The exit code is 1 if there are conflicts (with `--check`, if there is something to take) and 2 if
there is no update. While the package can't be imported, run `python my_research/tools/update.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RECORD = ".template.json"
KINDS: dict[str, Any] = {"template": str, "version": str, "commit": str | None, "answers": dict}
CONFIRMED = "cookiecutter-solver.template"  # in the git config of a clone, which no clone inherits


class UpdateError(ValueError):
    """A reason why there is no update, for the user."""


def check_answers(answers: Mapping[str, Any]) -> None:
    """Refuse names like options, and values with code for cookiecutter to render."""
    for name, value in answers.items():
        if not name.isidentifier():
            raise UpdateError(f"the answer {name!r} has no name of a question: remove it")
        if not isinstance(value, str | bool) or re.search(r"\{[{%#]", str(value)):
            raise UpdateError(f"the answer {name} is no plain text: leave out {{{{, {{% and {{#")


def read(project: Path) -> dict[str, Any]:
    """Read the record of a project, open to anybody's edits, and refuse all but plain text."""
    path = project / RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        record: dict[str, Any] = {name: dict(found).get(name) for name in KINDS}
        for name, kind in KINDS.items():
            if not isinstance(record[name], kind):
                raise UpdateError(f"{name} is missing, or of the wrong type")
        for name in ("version", "commit"):
            if not re.fullmatch(r"\w[\w./+-]*", record[name] or "none"):
                raise UpdateError(f"{record[name]!r} is no {name}")
        if not record["template"].isprintable():
            raise UpdateError(f"{record['template']!r} is no address")
        check_answers(record["answers"])
        return record
    except (ValueError, TypeError, RecursionError) as error:
        raise UpdateError(f"{path} can't be used: {error}; git has earlier versions") from error


def is_url(address: str) -> bool:
    """Whether an address is a URL, by git's rule: a colon comes before any slash."""
    return re.match("[^/]*:", address) is not None


def git(folder: Path, *arguments: str, check: bool = True) -> str:
    """Run git in a folder, whatever repo may have started this process; return its output."""
    others = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
    env = {k: v for k, v in os.environ.items() if k not in others} | {"LC_ALL": "C"}
    # A folder of a repo can look like a bare repo, whose settings a commit would bring in.
    settings = ["-c", "core.hooksPath=/dev/null", "-c", "safe.bareRepository=explicit"]
    command = ["git", *settings, *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    if check and done.returncode:
        reason = re.search("^(?:fatal|error): .*|$", done.stderr, re.M)
        raise UpdateError(f"git {arguments[0]} failed, {reason and reason[0]}")
    return done.stdout.strip()


def fetch(address: str, ref: str | None, scratch: Path) -> Path:
    """Return a folder with a version of the template: a git repo with all others, if there is one.

    Args:
        address: a folder, by its absolute path, a git URL or a zip.
        ref: tag, branch or commit, which takes a git repo; by default the newest commit.
        scratch: a temporary folder.
    """
    where, source = address.removeprefix("git+"), Path(tempfile.mkdtemp(dir=scratch))
    if where.endswith(".zip") and not ref:
        if is_url(where):
            where, _ = urllib.request.urlretrieve(where, scratch / "template.zip")
        shutil.unpack_archive(where, source, "zip")
        [source] = source.iterdir()
    elif ref or is_url(where) or not is_plain(Path(where)):
        git(scratch, "clone", "--quiet", "--no-checkout", "--", where, str(source))
        git(source, "checkout", "--quiet", ref or "HEAD", "--")
    else:
        source = Path(where)
    return source


def is_plain(folder: Path) -> bool:
    """Whether a folder holds the template outside of git."""
    return (folder / "cookiecutter.json").exists() and not (folder / ".git").exists()


def confirm(address: str) -> None:
    """Ask whether to use an address that is new to this clone; UpdateError if not."""
    if sys.stdin.isatty():
        print(f"Run code from {address!r}, which is new to this clone? [y/N] ", end="", flush=True)
        if sys.stdin.readline().strip().lower() in ("y", "yes"):
            return
    raise UpdateError(
        f"{RECORD} names {address!r}, which is new to this clone, and code from there would run: "
        "if you trust it, confirm it with --template ADDRESS"
    )


def check(recorded: str, commit: str | None, source: Path) -> int:
    """Compare the recorded version with a fetched one; return 1 if they differ."""
    about = (source / "core" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'__version__ = "([\w.+-]+)"', about)
    if not found:
        raise UpdateError("that is no template with a version: give another by --template")
    newest = found[1]
    if commit and (source / ".git").exists():
        recorded += f" {commit:.40}"
        newest += " " + git(source, "rev-parse", "HEAD")
    print(f"The template is at {newest}, this project at {recorded}")
    return int(newest != recorded)


def update(project: Path, args: argparse.Namespace, options: list[str], scratch: Path) -> int:
    """Do what the command line says; return the exit code."""
    record = read(project)
    address = args.template or record["template"]
    if not is_url(address) and Path(address).exists():
        address = os.path.abspath(address)
    if (args.to or "").startswith("-"):
        raise UpdateError(f"--to {args.to} is an option: give a tag, branch or commit")
    # Nobody's password is remembered. What follows ?, # or \ before an @ is no password.
    name = re.sub(r"^((?:git\+)?https?://)[^/?#\\]*@", r"\1", address)
    known = git(project, "config", "--get-all", CONFIRMED, check=False).splitlines()
    if not args.template and name not in known:
        confirm(name)
    source = fetch(address, args.to, scratch)
    if name not in known:
        git(project, "config", "--local", "--add", CONFIRMED, name, check=False)
    if args.check:
        return check(record["version"], record["commit"], source)
    hook = source / "hooks" / "update.py"
    return subprocess.run([sys.executable, hook, project, name, *options]).returncode


def main() -> None:
    """Update the project that this file is in; see the head of this file."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("--to", metavar="REF", help="tag, branch or commit; the newest by default")
    parser.add_argument("--template", metavar="ADDRESS", help="where it is now; as recorded")
    parser.add_argument("--check", action="store_true", help="only say, by exit code 1, if newer")
    args, options = parser.parse_known_args()  # the others are those of the template's hook
    above = [*Path(__file__).resolve().parents]
    project = next((path for path in above if (path / RECORD).exists()), above[2])
    try:
        with tempfile.TemporaryDirectory(prefix="update-") as scratch:
            sys.exit(update(project, args, options, Path(scratch).resolve()))
    except (OSError, ValueError) as error:
        print(f"update: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
