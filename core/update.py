"""Take a newer template, an older one, or other answers, by a merge that is git's own.

    python -m my_research.core.update                       # the newest version
    python -m my_research.core.update --check               # is there one? if so, exit code 1
    python -m my_research.core.update --dry-run             # show what it would do, do nothing
    python -m my_research.core.update --to v0.2.0           # another tag, branch or commit
    python -m my_research.core.update --set license=none    # another answer
    python -m my_research.core.update --template ADDRESS    # a folder, git URL or zip elsewhere

The version that the project came from, as `.template.json` records it, and the wanted one are
rendered with the same answers. What differs between the two is merged into the project as
`git cherry-pick` would, and staged, not committed. Your edits stay; where both changed the same
lines there are conflict markers, and the exit code is 1. `git reset --hard` gives back the start.

Nothing of the core is imported here: while it is broken, run `python my_research/core/update.py`.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RECORD = ".template.json"
CLASHES = {
    "UU": "both changed the same lines",
    "DU": "you deleted it, the template changed it",
    "UD": "you changed it, the template deleted it",
}
# What git is told by its environment holds for another repo than those in use here.
OUTER = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OUTER} | {
    "GIT_AUTHOR_NAME": "cookiecutter-solver",
    "GIT_AUTHOR_EMAIL": "cookiecutter-solver@localhost",
    "GIT_COMMITTER_NAME": "cookiecutter-solver",
    "GIT_COMMITTER_EMAIL": "cookiecutter-solver@localhost",
}


class UpdateError(Exception):
    """Why there is no update: one line for the user."""


@dataclass
class Record:
    """What a rendered project knows of where it came from."""

    template: str
    version: str
    commit: str | None  # None if the template was in no git repo; may end in -dirty
    answers: dict[str, Any]

    @classmethod
    def read(cls, project: Path) -> Record:
        """Read it from a project's folder."""
        try:
            return cls(**json.loads((project / RECORD).read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise UpdateError(f"no {RECORD}: that version is older than this command") from None
        except (ValueError, TypeError) as error:
            raise UpdateError(f"{project / RECORD} can't be read: {error}") from error

    def write(self, project: Path) -> None:
        """Write it as cookiecutter renders it."""
        text = json.dumps(vars(self), indent=2, ensure_ascii=False)
        (project / RECORD).write_text(text + "\n", encoding="utf-8")

    @property
    def sha(self) -> str | None:
        """The commit, or the last one before changes that were not committed."""
        return self.commit and self.commit.removesuffix("-dirty")

    def __str__(self) -> str:
        return f"{self.version} ({self.sha[:7]})" if self.sha else self.version


class Template:
    """A template: a git repo with all of its versions, or a folder or zip with one.

    Args:
        address: a path or URL, as cookiecutter takes it.
        scratch: a temporary folder.
    """

    def __init__(self, address: str, scratch: Path) -> None:
        self.address, self.scratch = address, scratch
        self.clone: Path | None = None
        where = address.removeprefix("git+")
        if "://" not in where and "@" not in where and not Path(where).exists():
            raise UpdateError(f"there is no template at {where}: say where, with --template")
        plain = Path(where, "cookiecutter.json").exists() and not Path(where, ".git").exists()
        if not (plain or where.endswith(".zip")):
            self.clone = Path(tempfile.mkdtemp(dir=scratch))
            git(scratch, "clone", "--quiet", "--no-checkout", where, str(self.clone))

    def find(self, ref: str) -> str | None:
        """The commit of a tag, branch or commit; None if it isn't there."""
        assert self.clone
        for name in (ref, f"origin/{ref}"):
            command = ["rev-parse", "--verify", "--quiet", f"{name}^{{commit}}"]
            if found := git(self.clone, *command, check=False):
                return found
        return None

    def choose(self, ref: str | None) -> str | None:
        """The commit of the wanted version, or of the newest; None where there is but one."""
        if self.clone is None and ref:
            raise UpdateError(f"{self.address} is no git repo and holds one version: omit --to")
        if self.clone is None:
            return None
        if commit := self.find(ref or "HEAD"):
            return commit
        tags = git(self.clone, "tag", "--sort=-creatordate").split()[:5]
        known = f"; the newest tags are {', '.join(tags)}" if tags else ""
        raise UpdateError(f"no tag, branch or commit {ref!r} in {self.address}{known}")

    def recall(self, record: Record) -> Path | None:
        """Render the version that a project came from; None if it isn't here."""
        if self.clone:
            commit = self.find(record.sha or f"v{record.version}")
            return self.render(commit, record.answers) if commit else None
        project = self.render(None, record.answers)
        found = Record.read(project)
        same = found.sha == record.sha if record.sha else found.version == record.version
        return project if same else None

    def render(self, commit: str | None, answers: Mapping[str, Any]) -> Path:
        """Render in a process of its own, away from all that cookiecutter keeps of the user's."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        source, out, config = self.address, folder / "out", folder / "config.yaml"
        if self.clone and commit:
            source = str(folder / "source")
            git(self.clone, "worktree", "add", "--quiet", "--detach", source, commit)
        keep = {f"{what}_dir": str(folder / what) for what in ("cookiecutters", "replay")}
        config.write_text(json.dumps(keep), encoding="utf-8")  # JSON is YAML
        command = [sys.executable, "-m", "cookiecutter", source, "--no-input"]
        command += ["--config-file", str(config), "--output-dir", str(out)]
        done = subprocess.run(
            [*command, *(f"{name}={value}" for name, value in answers.items())],
            cwd=folder,
            env=ENVIRONMENT | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder)),
            capture_output=True,
            text=True,
        )
        if done.returncode:
            version = f" at {commit[:7]}" if commit else ""
            raise UpdateError(f"{self.address}{version} does not render: {reason(done)}")
        [project] = out.iterdir()
        shutil.rmtree(project / ".git", ignore_errors=True)
        record = Record.read(project)
        record.template, record.commit = self.address, commit or record.commit
        record.write(project)
        return project


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that matters of what a failed command said."""
    lines = done.stderr.strip().splitlines() or ["it says nothing"]
    fatal = [line for line in lines if line.startswith(("fatal: ", "error: "))]
    return (fatal or lines[-1:])[0].removeprefix("ValueError: ")


def git(cwd: Path, *arguments: str, check: bool = True, env: Mapping[str, str] = {}) -> str:
    """Run git, without anybody's hooks; return what it prints, but for the last line break."""
    command = ["git", "-c", "core.hooksPath=/dev/null", "-c", "core.quotePath=false", *arguments]
    done = subprocess.run(
        command, cwd=cwd, env={**ENVIRONMENT, **env}, capture_output=True, text=True
    )
    if check and done.returncode:
        raise UpdateError(f"git failed: {reason(done)}")
    return done.stdout.rstrip("\n")


def check_project(project: Path) -> Path:
    """Refuse where a merge could lose something; return the root of the git repo."""
    if git(project, "rev-parse", "--is-inside-work-tree", check=False) != "true":
        cure = "`git init`, `git add --all` and `git commit` first"
        raise UpdateError(f"{project} is in no git repo: {cure}")
    if not git(project, "ls-tree", "--name-only", "HEAD", RECORD, check=False):
        raise UpdateError(f"{project} is not committed: `git add --all` and `git commit` first")
    root = Path(git(project, "rev-parse", "--show-toplevel"))
    if changed := git(root, "status", "--porcelain", "--untracked-files=no").splitlines():
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UpdateError(f"{changed[0][3:]}{more} changed since the last commit: commit first")
    return root


def store(repo: Path, tree: Path, message: str, *options: str) -> str:
    """Keep a folder as a commit that no branch knows, by an index of its own; return its name."""
    with tempfile.TemporaryDirectory() as folder:
        places = [
            f"--git-dir={git(repo, 'rev-parse', '--absolute-git-dir')}",
            f"--work-tree={tree}",
        ]
        env = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        sparse = ["-c", "core.sparseCheckout=false"]
        git(tree, *places, *sparse, "add", "--all", "--force", ".", env=env)
        written = git(tree, *places, "write-tree", env=env)
    return git(repo, "commit-tree", written, "-m", message, *options)


def merge(repo: Path, base: Path, wanted: Path, message: str) -> list[str]:
    """Merge what differs between two trees into a repo's index and files; return git's status."""
    parent = store(repo, base, message)
    commit = store(repo, wanted, message, "-p", parent)
    options = ["-c", "merge.renames=true", "-c", "merge.conflictStyle=diff3"]
    failure = None
    try:
        git(repo, *options, "cherry-pick", "--no-commit", commit)
    except UpdateError as error:
        failure = error
    status = git(repo, "status", "--porcelain", "--untracked-files=no").splitlines()
    if failure and not any(map(is_clash, status)):
        raise failure
    return [line for line in status if line[0] != " "]


def is_clash(line: str) -> bool:
    """Does this line of git's status await a decision?"""
    return "U" in line[:2] or line[:2] in ("AA", "DD")


def check_untracked(root: Path, trial: Path) -> None:
    """Refuse a merge, tried elsewhere, that would write over a file that is not committed."""
    tracked = set(git(root, "ls-files", "-z").split("\0"))
    for name in sorted(set(git(trial, "ls-files", "-z").split("\0")) - tracked):
        for path in (Path(name), *Path(name).parents):
            there = root / path
            blocks = os.path.lexists(there) and (path == Path(name) or not there.is_dir())
            if blocks and path.as_posix() not in tracked:
                raise UpdateError(f"{path} is not committed, and in the way: move it elsewhere")


def recall(record: Record, template: Template, scratch: Path) -> Path:
    """Render the version that the project came from, from wherever it still is."""
    if project := template.recall(record):
        return project
    if record.template != template.address:
        with suppress(UpdateError):
            if project := Template(record.template, scratch).recall(record):
                return project
    places = " or ".join(dict.fromkeys((template.address, record.template)))
    cure = f"write into {RECORD} where that version is, as template, or its commit, and commit that"
    raise UpdateError(f"{record}, which this project came from, is not in {places}: {cure}")


def update(project: Path, args: argparse.Namespace, scratch: Path) -> int:
    """Do what the command line says; return the exit code."""
    record = Record.read(project)
    root = project if args.check else check_project(project)
    if wrong := [pair for pair in args.set if "=" not in pair]:
        raise UpdateError(f"--set wants answer=value, not {wrong[0]}")
    given = dict(pair.split("=", 1) for pair in args.set)
    address = args.template or record.template
    template = Template(os.path.abspath(address) if Path(address).exists() else address, scratch)
    wanted = template.render(template.choose(args.to), record.answers | given)
    new = Record.read(wanted)
    if unknown := set(given) - set(new.answers):
        raise UpdateError(f"no answer is called {min(unknown)}: there are {', '.join(new.answers)}")
    if new == replace(record, commit=record.sha):
        print(f"Up to date: {new}")
        return 0
    title = ", ".join([f"{record} to {new}", *args.set])
    print(f"Template {title}")
    if args.check:
        return 1
    base = recall(record, template, scratch)
    shutil.copy(project / RECORD, base)
    prefix = git(project, "rev-parse", "--show-prefix")
    for tree, name in ((base, "base"), (wanted, "wanted")):
        shutil.copytree(tree, scratch / name / prefix)
    trees = scratch / "base", scratch / "wanted"
    trial = scratch / "trial"
    git(root, "clone", "--quiet", "--shared", "--no-checkout", str(root), str(trial))
    git(trial, "read-tree", git(root, "rev-parse", "HEAD"))
    message = f"Update the template from {title}"
    status = merge(trial, *trees, message)
    check_untracked(root, trial)
    return tell(status if args.dry_run else merge(root, *trees, message), args.dry_run)


def tell(status: list[str], dry_run: bool) -> int:
    """Print what a merge did, or would do; return the exit code."""
    for line in status:
        why = CLASHES.get(line[:2], "moved or added by both") if is_clash(line) else ""
        print(f"  {line}" + (f"  <- {why}" if why else ""))
    clashes = sum(map(is_clash, status))
    if dry_run:
        print(f"Dry run: {len(status)} files would change, {clashes} await your decision.")
    elif clashes:
        print(f"{clashes} await your decision: mend, `git add` and `git commit` them.")
    else:
        print("Merged: look with `git diff --staged`, then `git commit`.")
    if not dry_run:
        print("`git reset --hard` gives back the start.")
    return 1 if clashes else 0


def main(argv: Iterable[str] | None = None) -> None:
    """Update the project that this file is in; see the head of this file."""
    parser = argparse.ArgumentParser(description="Take a newer template, by a three-way merge.")
    parser.add_argument("--to", metavar="REF", help="tag, branch or commit; the newest by default")
    parser.add_argument("--set", metavar="ANSWER=VALUE", action="append", default=[])
    parser.add_argument("--template", metavar="ADDRESS", help="where it is now; as recorded")
    parser.add_argument("--check", action="store_true", help="only say, by exit code 1, if newer")
    parser.add_argument("--dry-run", action="store_true", help="show what would change")
    args = parser.parse_args(None if argv is None else list(argv))
    found = [path for path in Path(__file__).resolve().parents if (path / RECORD).exists()]
    try:
        if not found:
            raise UpdateError(f"no {RECORD} above {__file__}: not rendered by cookiecutter-solver?")
        if shutil.which("git") is None:
            raise UpdateError("git was not found: install it first")
        if importlib.util.find_spec("cookiecutter") is None:
            raise UpdateError('cookiecutter was not found: pip install "cookiecutter>=2.4" first')
        with tempfile.TemporaryDirectory(prefix="update-") as scratch:
            code = update(found[0], args, Path(scratch).resolve())
    except UpdateError as error:
        sys.exit(f"update: {error}")
    sys.exit(code)


if __name__ == "__main__":
    main()
