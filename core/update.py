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
lines there are conflict markers, and the exit code is 1; it is 2 if there is no update, and why is
said. `git reset --hard` gives back the start.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

RECORD = ".template.json"
CLASHES = {
    "UU": "both changed the same lines",
    "DU": "you deleted it, the template changed it",
    "UD": "you changed it, the template deleted it",
    "UA": "new in the template, in a folder that you moved",
}
BACK = "`git reset --hard` gives back the start"
# Git may have started us, with what holds for its own repo and not for the others in use here.
OURS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")
ENVIRONMENT = {name: value for name, value in os.environ.items() if name not in OURS}
SETTINGS = {
    "core.fsmonitor": "false",
    "core.hooksPath": "/dev/null",
    "core.quotePath": "false",
    "merge.conflictStyle": "diff3",
    "merge.renames": "true",
    "user.name": "cookiecutter-solver",
    "user.email": "cookiecutter-solver@localhost",
}


class UpdateError(Exception):
    """Why there is no update: one line for the user."""


@dataclass
class Record:
    """Where a project came from."""

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

    @property
    def sha(self) -> str | None:
        """The commit, or the last one before changes that were not committed."""
        return self.commit and self.commit.removesuffix("-dirty")

    def __str__(self) -> str:
        return f"{self.version} ({self.sha[:7] if self.sha else 'no commit'})"


class Template:
    """A git repo with all versions of a template, or a folder or zip with one.

    Args:
        address: a path or URL, as cookiecutter takes it.
        scratch: a temporary folder.
    """

    def __init__(self, address: str, scratch: Path) -> None:
        self.address, self.scratch = address, scratch
        self.clone: Path | None = None
        where = address.removeprefix("git+")
        if ":" not in where and not Path(where).exists():
            raise UpdateError(f"there is no template at {where}: say where, with --template")
        plain = Path(where, "cookiecutter.json").exists() and not Path(where, ".git").exists()
        if not (plain or where.endswith(".zip")):
            self.clone = Path(tempfile.mkdtemp(dir=scratch))
            git(scratch, "clone", "-qn", "--origin=origin", "--", where, str(self.clone))

    def find(self, ref: str | None) -> str | None:
        """The commit of a tag, branch or commit, or else of HEAD; None where there is no git."""
        if self.clone is None:
            return None
        if ref:  # a commit may be on no branch any more
            git(self.clone, "fetch", "--quiet", "origin", ref, check=False)
        for name in (ref, f"origin/{ref}") if ref else ("HEAD",):
            commit = f"{name}^{{commit}}"
            if found := git(self.clone, "rev-parse", "--verify", "--quiet", commit, check=False):
                return found
        # By date, and of one second by version: the last order given counts first.
        newest = "--sort=-version:refname", "--sort=-creatordate"
        tags = git(self.clone, "tag", *newest).split()[:5]
        known = f"; the newest tags are {', '.join(tags)}" if tags else ""
        raise UpdateError(f"no tag, branch or commit {ref or 'HEAD'} in {self.address}{known}")

    def render(self, commit: str | None, answers: Mapping[str, Any]) -> Path:
        """Render in a process of its own, away from all that cookiecutter keeps of the user's."""
        folder = Path(tempfile.mkdtemp(dir=self.scratch))
        source, config = self.address, folder / "config.yaml"
        if self.clone and commit:
            source = str(folder / "source")
            git(self.clone, "worktree", "add", "--quiet", "--detach", source, commit)
        keep = {f"{what}_dir": str(folder / what) for what in ("cookiecutters", "replay")}
        config.write_text(json.dumps(keep), encoding="utf-8")  # JSON is YAML
        options = ["--no-input", "--config-file", str(config), "--output-dir", str(folder / "out")]
        given = [f"{name}={value}" for name, value in answers.items()]
        command = [sys.executable, "-m", "cookiecutter", source, *options, *given]
        done = run(command, folder, dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder)))
        if done.returncode:
            raise UpdateError(f"{commit or self.address} does not render: {reason(done)}")
        [project] = (folder / "out").iterdir()
        shutil.rmtree(project / ".git", ignore_errors=True)
        record = Record.read(project)
        record = replace(record, template=self.address, commit=commit or record.commit)
        text = json.dumps(vars(record), indent=2, ensure_ascii=False)
        (project / RECORD).write_text(text + "\n", encoding="utf-8")
        return project


def run(command: list[str], cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command with these additions to the environment, and keep what it says."""
    full = {**ENVIRONMENT, **env}
    return subprocess.run(
        command, cwd=cwd, env=full, capture_output=True, encoding="utf-8", errors="replace"
    )


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """The one line that matters of what a failed command said."""
    lines = (done.stderr.strip() or done.stdout.strip() or "no reason is given").splitlines()
    fatal = [line for line in lines if line.startswith(("fatal: ", "error: "))]
    return (fatal or lines[-1:])[0].removeprefix("ValueError: ")


def git(cwd: Path, *arguments: str, check: bool = True, env: Mapping[str, str] = {}) -> str:
    """Run git; return what it prints, but for the last line break."""
    settings = [part for item in SETTINGS.items() for part in ("-c", "=".join(item))]
    done = run(["git", *settings, *arguments], cwd, env)
    if check and done.returncode:
        raise UpdateError(f"git failed: {reason(done)}")
    return done.stdout.rstrip("\n")


def check_project(project: Path) -> Path:
    """Refuse where a merge could lose something; return the root of the git repo."""
    if git(project, "rev-parse", "--is-inside-work-tree", check=False) != "true":
        raise UpdateError(f"{project} is in no git repo: `git init` and commit it first")
    if not git(project, "ls-tree", "--name-only", "HEAD", RECORD, check=False):
        raise UpdateError(f"{project} is not committed: `git add --all` and `git commit` first")
    root = Path(git(project, "rev-parse", "--show-toplevel"))
    if changed := git(root, "status", "--porcelain", "--untracked-files=no").splitlines():
        more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
        raise UpdateError(f"{changed[0][3:]}{more} changed since the last commit: commit first")
    return root


def check_untracked(root: Path, trial: Path) -> None:
    """Refuse a merge, tried elsewhere, that would write over a file that is not committed."""
    known = set(git(root, "ls-files", "-z").split("\0"))
    for name in sorted(set(git(trial, "ls-files", "-z").split("\0")) - known):
        for path in (Path(name), *Path(name).parents):
            is_folder = path != Path(name) and (root / path).is_dir()
            if os.path.lexists(root / path) and not is_folder and path.as_posix() not in known:
                raise UpdateError(f"{path} is not committed, and in the way: move it elsewhere")


def render_base(record: Record, template: Template) -> Path:
    """Render the version that a project came from, from wherever it still is."""
    errors = []
    for address in dict.fromkeys((template.address, record.template)):
        try:
            source = template
            if address != template.address:
                source = Template(address, template.scratch)
            commit = source.find(record.sha or f"v{record.version}")
            project = source.render(commit, record.answers)
            found = Record.read(project)
            if commit or (found.sha == record.sha if record.sha else str(found) == str(record)):
                return project
            errors.append(f"{address} holds {found}")
        except UpdateError as error:
            errors.append(str(error))
    cure = f"say in {RECORD} which commit it was, or where it is as template, and commit that"
    why = "; ".join(errors)
    raise UpdateError(f"{record}, which this project came from, was not found ({why}): {cure}")


def commit_tree(repo: Path, tree: Path, message: str, *parent: str) -> str:
    """Make a folder a commit that no branch knows, by an index of its own; return its name."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        there = f"--git-dir={git(repo, 'rev-parse', '--absolute-git-dir')}", f"--work-tree={tree}"
        whole = "-c", "core.sparseCheckout=false"
        git(tree, *there, *whole, "add", "--all", "--force", ".", env=env)
        written = git(tree, *there, "write-tree", env=env)
    return git(repo, "commit-tree", written, "-m", message, *parent)


def merge(repo: Path, base: Path, wanted: Path, message: str) -> list[str]:
    """Merge what differs between two trees into a repo's index and files; return git's status."""
    commit = commit_tree(repo, wanted, message, "-p", commit_tree(repo, base, message))
    failure = None
    try:
        git(repo, "cherry-pick", "--no-commit", commit)
    except UpdateError as error:
        failure = error
    status = git(repo, "status", "--porcelain", "--untracked-files=no").splitlines()
    if failure and not any(map(is_clash, status)):
        raise failure
    return [line for line in status if line[0] != " "]


def is_clash(line: str) -> bool:
    """Does this line of git's status await a decision?"""
    return "U" in line[:2] or line[:2] in ("AA", "DD")


def update(project: Path, args: argparse.Namespace, scratch: Path) -> int:
    """Do what the command line says; return the exit code."""
    record = Record.read(project)
    root = project if args.check else check_project(project)
    if wrong := [pair for pair in args.set if "=" not in pair]:
        raise UpdateError(f"--set wants ANSWER=VALUE, not {wrong[0]}")
    given = dict(pair.split("=", 1) for pair in args.set)
    address = args.template or record.template
    template = Template(os.path.abspath(address) if Path(address).exists() else address, scratch)
    if args.to and not template.clone:
        raise UpdateError(f"{address} is no git repo and holds one version: leave out --to")
    wanted = template.render(template.find(args.to), record.answers | given)
    new = Record.read(wanted)
    if unknown := set(given) - set(new.answers):
        raise UpdateError(f"no answer is called {min(unknown)}: there are {', '.join(new.answers)}")
    if new == replace(record, commit=record.sha):
        print(f"Up to date: {new} of {template.address}")
        return 0
    title = ", ".join([f"{record} to {new}", *args.set])
    print(f"Template {title}")
    if args.check:
        return 1
    base, prefix = render_base(record, template), git(project, "rev-parse", "--show-prefix")
    shutil.copy(project / RECORD, base)
    for tree, name in ((base, "base"), (wanted, "wanted")):
        shutil.copytree(tree, scratch / name / prefix)
    trial = scratch / "trial"
    git(root, "clone", "-qn", "--shared", str(root), str(trial))
    git(trial, "read-tree", git(root, "rev-parse", "HEAD"))
    trees, message = (scratch / "base", scratch / "wanted"), f"Update the template, {title}"
    status = merge(trial, *trees, message)
    check_untracked(root, trial)
    if not args.dry_run:
        status = merge(root, *trees, message)
    return report(status, args.dry_run)


def report(status: list[str], dry_run: bool) -> int:
    """Print what a merge did, or would do; return the exit code."""
    for line in status:
        why = f"  <- {CLASHES.get(line[:2], 'both moved or added it')}" if is_clash(line) else ""
        print(f"  {line}{why}")
    clashes = sum(map(is_clash, status))
    if dry_run:
        print(f"Dry run: {clashes} would await your decision, and nothing was changed.")
    elif clashes:
        print(f"{clashes} await your decision: mend, `git add` and `git commit` them; {BACK}.")
    else:
        print(f"Merged: look with `git diff --staged`, then `git commit`; {BACK}.")
    return 1 if clashes else 0


def main(argv: Iterable[str] | None = None) -> None:
    """Update the project that this file is in; see the head of this file."""
    parser = argparse.ArgumentParser(description="Take a newer template, by a three-way merge.")
    parser.add_argument("--to", metavar="REF", help="tag, branch or commit; the newest by default")
    parser.add_argument(
        "--set", metavar="ANSWER=VALUE", action="append", default=[], help="another answer"
    )
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
        print(f"update: {error}", file=sys.stderr)
        code = 2
    sys.exit(code)


if __name__ == "__main__":
    main()
