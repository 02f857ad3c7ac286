"""Every command that a developer or CI runs: `nox`, or `nox -s` with a name from `nox -l`."""

import itertools
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cookiecutter-solver"
QUESTIONS = json.loads((ROOT / "cookiecutter.json").read_text())
RUNTIME = (
    "dora-search",
    "filelock",
    "hydra-core",
    "numpy",
    "pillow",
    "plotly",
    "scikit-learn",
    "tensorboard",
    "torch",
    "tqdm",
    "wandb",
)
PEERS = ("accelerate", "flashy", "lightning", "lightning-fabric", "pytorch-ignite")

PYTEST = ("pytest", "pytest-timeout", "pytest-xdist")
SHARED = ("-n", "3", "--dist", "worksteal")  # tests wait more than they work

nox.options.sessions = ["lint", "tests", "matrix", "slurm"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"
# Cookiecutter copies the whole repo folder each time it renders: environments live elsewhere.
nox.options.envdir = os.environ.get("NOX_ENVDIR") or str(CACHE / "nox")


def install(session: nox.Session, *requirements: str) -> None:
    """Install at the pinned versions."""
    session.install("-q", "-c", str(ROOT / "constraints.txt"), *requirements)


def render(session: nox.Session, folder: Path, **answers: str) -> Path:
    """Render a project into the folder, from a copy of the files that git knows or would add."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, "template")
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        given = [f"{name}={value}" for name, value in answers.items()]
        session.run("cookiecutter", str(copy), "--no-input", "-o", str(folder), *given)
    return folder / answers.get("project_slug", "my-research")


@nox.session
def demo(session: nox.Session) -> None:
    """Render a project, install it, train it on real data, and say where everything is."""
    install(session, "cookiecutter")
    folder = Path(session.posargs[0] if session.posargs else tempfile.mkdtemp(prefix="demo-"))
    project = render(session, folder.resolve())
    install(session, "-e", str(project))
    with session.chdir(project):
        session.run("dora", "run")
    [run] = (project / "outputs" / "xps").iterdir()
    accuracy = json.loads((run / "history.json").read_text())[-1]["valid"]["acc"]
    tensorboard = Path(session.bin, "tensorboard")
    session.log(f"Final validation accuracy: {accuracy:.2%}")
    session.log(f"Run folder: {run}")
    session.log(f"Curves: {tensorboard} --logdir {project / 'outputs'}")
    session.log(f"Again: cd {project} && {Path(session.bin, 'dora')} run")


@nox.session
def lint(session: nox.Session) -> None:
    """Lint and type-check the repo and a rendered project."""
    install(session, *RUNTIME, "cookiecutter", "mypy", "nox", "pytest", "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy", "core", "tests", "bench", "noxfile.py")
    for hook in sorted((ROOT / "hooks").glob("*.py")):
        session.run("mypy", str(hook))
    with tempfile.TemporaryDirectory() as folder:
        check_rendered(session, render(session, Path(folder)))


@nox.session
def tests(session: nox.Session) -> None:
    """Test the core and the template; arguments go to pytest."""
    tools = (
        "build",
        "hatchling",
        "hiplot",
        "optuna",
        "pre-commit",
        "sp-repo-review[cli]",
        "zizmor",
    )
    install(session, *RUNTIME, *PYTEST, *tools, "cookiecutter")
    session.run("python", "-m", "pytest", *(session.posargs or SHARED))


@nox.session
def faults(session: nox.Session) -> None:
    """Break 200 real runs (or as many as said), start them again, and tell what was lost."""
    install(session, *RUNTIME, "cookiecutter")
    with tempfile.TemporaryDirectory() as folder:
        project = render(session, Path(folder))
        session.run("python", "-m", "tests.faults", str(project), *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure beside the peers and write bench/RESULTS.md; `-- --quick` shows that it runs."""
    install(session, *RUNTIME, "cookiecutter", *PEERS)
    session.run("python", "-m", "bench", *session.posargs)


@nox.session
def slurm(session: nox.Session) -> None:
    """Run a rendered project on a real Slurm cluster of two nodes, made on this machine."""
    install(session, *RUNTIME, *PYTEST, "cookiecutter")
    python = Path(session.bin, "python")
    if subprocess.run([python, "-m", "tests.cluster"], cwd=ROOT).returncode != 0:
        session.skip("there can be no Slurm cluster here; the line above says why")
    session.run("python", "-m", "pytest", "tests/test_slurm.py", env={"SLURM_TESTS": "1"})


@nox.session
def matrix(session: nox.Session) -> None:
    """Check, test, spread and sweep every example; train and kill it with every tracker.

    Arguments go to pytest, such as `-k digits-wandb`.
    """
    install(session, *RUNTIME, *PYTEST, "cookiecutter", "editables", "hatchling", "mypy", "ruff")
    with tempfile.TemporaryDirectory() as folder:
        options = []
        for example, tracker in itertools.product(QUESTIONS["example"], QUESTIONS["tracker"]):
            slug = f"{example}-{tracker}"
            answers = {"project_slug": slug, "example": example, "tracker": tracker}
            options += ["-e", str(render(session, Path(folder), **answers))]
        # What they depend on is there, at the pinned versions; `pip check` says if not.
        session.install("-q", "--no-deps", "--no-build-isolation", *options)
        session.run("python", "-m", "pip", "check")
        command = ("python", "-m", "pytest", "tests/test_matrix.py")
        session.run(*command, *(session.posargs or ("-n", "3")), env={"MATRIX": folder})


@nox.session
def pictures(session: nox.Session) -> None:
    """Take the README's pictures of a terminal and of the report, from real runs."""
    install(session, *RUNTIME, "cookiecutter")
    with tempfile.TemporaryDirectory() as folder:
        project = render(session, Path(folder))
        install(session, "-e", str(project))
        session.run("python", "docs/pictures.py", str(project))


def check_rendered(session: nox.Session, project: Path) -> None:
    """Lint and type-check a rendered project by its own rules."""
    # What mypy learned of the installed packages holds for all projects.
    env = {"MYPY_CACHE_DIR": str(CACHE / "mypy")}
    with session.chdir(project):
        session.run("ruff", "check", ".")
        session.run("ruff", "format", "--check", ".")
        session.run("mypy", env=env)
