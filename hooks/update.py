"""Merge a version of the template into a project: started by the project's `tools/update.py`.

    python hooks/update.py PROJECT ADDRESS [--set ANSWER=VALUE] [--example] [--dry-run]

The wanted version is the one that this file is part of. It and the version that the project came
from, as `.template.json` records, are rendered with the same answers. The difference between the
two is merged into the project as `git cherry-pick` would, and staged, not committed. The user's
edits stay; where both sides changed the same lines there are conflict markers, and the exit code is
1; it is 2 if there is no update, with the reason. `git reset --hard` gives back the start. The
files of the example are the user's own: without --example, only other answers change them.

The command line is a contract: projects of any age start this file. They trust the address, but
not the rest of the record, which comes with a clone of anybody's repo: an answer is data, never
rendered, and a commit is one of a branch or tag of the address.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STUB = runpy.run_path(str(ROOT / "template" / "package" / "tools" / "update.py"))
RECORD, UpdateError = STUB["RECORD"], STUB["UpdateError"]
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
    "safe.bareRepository": "explicit",  # no commit brings in settings
    "merge.conflictStyle": "diff3",
    "merge.renames": "true",
    "user.name": "cookiecutter-solver",
    "user.email": "cookiecutter-solver@localhost",
}


@dataclass
class Record:
    """The origin of a project."""

    template: str
    version: str
    commit: str | None  # None if the template was in no git repo; may end in -dirty
    answers: dict[str, Any]

    @classmethod
    def read(cls, project: Path) -> Record:
        """Read the record in a project's folder."""
        try:
            return cls(**STUB["read"](project))
        except FileNotFoundError:
            raise UpdateError(f"no {RECORD}: that version is older than this command") from None

    @property
    def sha(self) -> str | None:
        """The commit, or the last one before changes that were not committed."""
        return self.commit and self.commit.removesuffix("-dirty")

    def __str__(self) -> str:
        return f"{self.version} ({self.sha[:7] if self.sha else 'no commit'})"


def render(source: Path, address: str, answers: Mapping[str, Any], scratch: Path) -> Path:
    """Render a folder in a process of its own, away from all that cookiecutter keeps of the user's.

    Args:
        source: a version of the template, checked out if it is in git.
        address: where the record is to say that it comes from.
        answers: those to questions of other versions are left out.
        scratch: a temporary folder.
    """
    folder = Path(tempfile.mkdtemp(dir=scratch))
    config = folder / "config.yaml"
    keep = {f"{kind}_dir": str(folder / kind) for kind in ("cookiecutters", "replay")}
    config.write_text(json.dumps(keep), encoding="utf-8")  # JSON is YAML
    options = ["--no-input", "--config-file", str(config), "--output-dir", str(folder / "out")]
    given = [f"{name}={answers[name]}" for name in questions(source) if name in answers]
    command = [sys.executable, "-m", "cookiecutter", *options, "--", str(source), *given]
    done = run(command, folder, dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder)))
    if done.returncode:
        raise UpdateError(f"{address} does not render: {reason(done)}")
    [project] = (folder / "out").iterdir()
    shutil.rmtree(project / ".git", ignore_errors=True)
    record = Record.read(project)
    record = replace(record, template=address, commit=head(source) or record.commit)
    text = json.dumps(vars(record), indent=2, ensure_ascii=False)
    (project / RECORD).write_text(text + "\n", encoding="utf-8")
    return project


def questions(source: Path) -> list[str]:
    """Return the names of the answers that a version of the template knows."""
    known = json.loads((source / "cookiecutter.json").read_text(encoding="utf-8"))
    return [name for name in known if not name.startswith("_")]


def head(source: Path) -> str | None:
    """Return the commit of a version of the template; None if it is in no git repo."""
    return git(source, "rev-parse", "HEAD") if (source / ".git").exists() else None


def check_out(source: Path, record: Record, scratch: Path) -> Path:
    """Return a folder with the recorded version of a template, or its only one without git.

    A commit must be in a branch or tag: hosts such as GitHub also give out commits of forks, and a
    local repo everything fetched before.
    """
    if not (source / ".git").exists():
        return source
    ref = f"{record.sha or 'v' + record.version}^{{commit}}"
    commit = git(source, "rev-parse", "--verify", "--quiet", ref, check=False)
    within = ["--contains", commit]
    if not commit or not (git(source, "branch", "-a", *within) or git(source, "tag", *within)):
        raise UpdateError("no such tag, branch or commit")
    folder = Path(tempfile.mkdtemp(dir=scratch), "source")
    git(source, "worktree", "add", "--quiet", "--detach", str(folder), commit)
    return folder


def run(command: list[str], cwd: Path, env: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run a command with these additions to the environment, and keep its output."""
    full = {**ENVIRONMENT, **env}
    return subprocess.run(
        command, cwd=cwd, env=full, capture_output=True, encoding="utf-8", errors="replace"
    )


def reason(done: subprocess.CompletedProcess[str]) -> str:
    """Return the line that matters in the output of a failed command."""
    lines = (done.stderr.strip() or done.stdout.strip() or "no reason is given").splitlines()
    fatal = [line for line in lines if line.startswith(("fatal: ", "error: "))]
    return (fatal or lines[-1:])[0].removeprefix("ValueError: ")


def git(cwd: Path, *arguments: str, check: bool = True, env: Mapping[str, str] = {}) -> str:
    """Run git; return its output without the last line break."""
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


def render_base(project: Path, record: Record, address: str, scratch: Path) -> tuple[Path, Path]:
    """Render the version that a project came from, from a confirmed address that still has it.

    Returns:
        The rendered folder, and that of the version.
    """
    known = git(project, "config", "--get-all", STUB["CONFIRMED"], check=False).splitlines()
    errors = []
    for place in dict.fromkeys((address, record.template)):
        if place not in (address, *known):
            errors.append(f"{place} was not confirmed in this clone")
            continue
        try:
            source = ROOT if place == address else STUB["fetch"](place, None, scratch)
            source = check_out(source, record, scratch)
            base = render(source, place, record.answers, scratch)
            found = Record.read(base)
            same = found.sha == record.sha if record.sha else str(found) == str(record)
            if head(source) or same:
                return base, source
            errors.append(f"{place} holds {found}")
        except (UpdateError, OSError) as error:
            errors.append(f"{place}: {error}")
    cure = f"say in {RECORD} which commit it was, or where it is as template, and commit that"
    why = "; ".join(errors)
    raise UpdateError(f"{record}, which this project came from, was not found ({why}): {cure}")


def of_example(source: Path, answers: Mapping[str, Any]) -> set[Path]:
    """Return the files that a version of the template renders from the example."""
    folder = source / "template" / "examples" / str(answers.get("example"))
    places = {"package": str(answers.get("package_name")), "tests": "tests"}
    names = [path.relative_to(folder).parts for path in folder.rglob("*") if path.is_file()]
    return {Path(places[part], *rest) for part, *rest in names if part in places}


def leave_alone(names: set[Path], project: Path, kept: Path, wanted: Path) -> None:
    """Give some files in `wanted` the content in `kept`; name those that the project has."""
    changed = []
    for name in sorted(names):
        old, new = kept / name, wanted / name
        if old.exists() != new.exists() or (old.exists() and old.read_bytes() != new.read_bytes()):
            changed += [str(name)] if (project / name).exists() else []
        new.unlink(missing_ok=True)
        if old.exists():
            new.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(old, new)
    if changed:
        print(f"Example files changed by the template, left as they are: {', '.join(changed)}")
        print("To take these changes: `git reset --hard`, and update again with --example")


def commit_tree(repo: Path, tree: Path, message: str, *parent: str) -> str:
    """Commit a folder on no branch, by an index of its own; return the name of the commit."""
    with tempfile.TemporaryDirectory() as folder:
        env = {"GIT_INDEX_FILE": str(Path(folder, "index"))}
        there = f"--git-dir={git(repo, 'rev-parse', '--absolute-git-dir')}", f"--work-tree={tree}"
        whole = "-c", "core.sparseCheckout=false"
        git(tree, *there, *whole, "add", "--all", "--force", ".", env=env)
        written = git(tree, *there, "write-tree", env=env)
    return git(repo, "commit-tree", written, "-m", message, *parent)


def merge(repo: Path, base: Path, wanted: Path, message: str) -> list[str]:
    """Merge the difference of two trees into a repo's index and files; return git's status."""
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
    """Say whether a line of git's status awaits a decision."""
    return "U" in line[:2] or line[:2] in ("AA", "DD")


def update(project: Path, args: argparse.Namespace, scratch: Path) -> int:
    """Do what the command line says; return the exit code."""
    record, root = Record.read(project), check_project(project)
    if wrong := [pair for pair in args.set if "=" not in pair]:
        raise UpdateError(f"--set wants ANSWER=VALUE, not {wrong[0]}")
    given = dict(pair.split("=", 1) for pair in args.set)
    if unknown := given.keys() - questions(ROOT):
        names = ", ".join(questions(ROOT))
        raise UpdateError(f"no answer is called {min(unknown)}: there are {names}")
    STUB["check_answers"](given)
    wanted = render(ROOT, args.address, record.answers | given, scratch)
    new = Record.read(wanted)
    if new == replace(record, commit=record.sha):
        print(f"Up to date: {new} of {args.address}")
        return 0
    title = ", ".join([f"{record} to {new}", *args.set])
    print(f"Template {title}")
    base, source = render_base(project, record, args.address, scratch)
    if not (args.example or "example" in given):
        example = of_example(source, record.answers) | of_example(ROOT, new.answers)
        place, answers = Record.read(base).template, record.answers | given
        kept = render(source, place, answers, scratch) if given else base
        leave_alone(example, project, kept, wanted)
    prefix = git(project, "rev-parse", "--show-prefix")
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
    """Print the result of a merge, done or tried; return the exit code."""
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


def main() -> None:
    """Merge the version that this file is part of; see the head of this file."""
    parser = argparse.ArgumentParser(description="Merge this version of the template.")
    parser.add_argument("project", type=Path, help="folder of the project")
    parser.add_argument("address", help="where this version comes from, to be recorded")
    parser.add_argument("--set", metavar="ANSWER=VALUE", action="append", default=[])
    parser.add_argument("--example", action="store_true", help="take the files of the example too")
    parser.add_argument("--dry-run", action="store_true", help="show what would change")
    args = parser.parse_args()
    try:
        if importlib.util.find_spec("cookiecutter") is None:
            raise UpdateError('cookiecutter was not found: pip install "cookiecutter>=2.4" first')
        with tempfile.TemporaryDirectory(prefix="update-") as scratch:
            sys.exit(update(args.project, args, Path(scratch).resolve()))
    except UpdateError as error:
        print(f"update: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
