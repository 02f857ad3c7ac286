"""A rendered repo as a home: its README's commands, its CI, its config groups, what it builds."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf

from .conftest import ROOT, Copy, clean_environment

EXAMPLES = json.loads((ROOT / "cookiecutter.json").read_text())["example"]

# Commands of the README that are run elsewhere, and where.
ELSEWHERE = {
    'pip install -e ".[dev]"': "tests/test_matrix.py: def test_it_is_installed",
    "pytest": "tests/test_matrix.py: def test_own_tests_pass",
    "ruff check .": "noxfile.py: def check(",
    "mypy": "noxfile.py: def check(",
    "dora run -d --ddp_workers=2": "tests/test_run.py: def test_digits_reach_their_score",
    "torchrun --nnodes=2 --node-rank=0 --master-addr=ADDRESS --master-port=29500 "
    "--nproc-per-node=2 -m dora run": "tests/test_run.py: def test_torchrun_on_two_machines",
    "dora run data=cifar10": "template/examples/digits/tests/test_cifar10.py: def test_it_is_tr",
    "dora info optim.lr=1e-3": "tests/test_run.py: def test_doras_other_commands",
    "dora run --git_save": "tests/test_run.py: def test_doras_other_commands",
    "python -m my_research.tools.export SIG": "tests/test_export.py: def test_weights_are_read",
    "python -m my_research.tools.report": "tests/test_run.py: def test_digits_reach_their_score",
    "python -m my_research.tools.sweep lr": "tests/test_home.py: def test_groups_in_a_grid",
    "dora launch": "tests/test_slurm.py: def test_launch_with_one_task_and_with_two",
    "dora grid lr": "tests/test_slurm.py: lab.dora(",
}


class Home:
    """A rendered project, and a shell in it."""

    def __init__(self, copy: Copy, folder: Path, example: str) -> None:
        self.env = clean_environment(folder)
        self.env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{self.env['PATH']}"
        self.path = copy(folder, example=example)
        self.config = self.path / "my_research" / "config"
        self.readme = (self.path / "README.md").read_text()

    def shell(self, command: str, code: int = 0, **env: str) -> str:
        """Run a command as a CI runner does; return what it says."""
        done = subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", command],
            cwd=self.path,
            env=self.env | env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == code, f"{command}\n{done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def sig(self, *overrides: str) -> str:
        """The signature of a run."""
        [sig] = re.findall(r"Sheep\((\w+),", self.shell(f"dora info {shlex.join(overrides)}"))
        return str(sig)

    def history(self, sig: str) -> list[dict[str, Any]]:
        """The metrics of a run."""
        text = (self.path / "outputs" / "xps" / sig / "history.json").read_text()
        history: list[dict[str, Any]] = json.loads(text)
        return history

    def commands(self) -> list[str]:
        """All of the README: in blocks, and in the first column of the table."""
        blocks = re.findall(r"```bash\n(.*?)```", self.readme, re.DOTALL)
        lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
        rows = re.findall(r"^\| (`.*?) \|", self.readme, re.MULTILINE)
        table = [command for row in rows for command in re.findall(r"`([^-].*?)`", row)]
        return list(dict.fromkeys(lines + table))

    def workflow(self) -> Any:
        """The workflow of CI."""
        text = (self.path / ".github" / "workflows" / "ci.yml").read_text()
        # Not what OmegaConf takes for an interpolation.
        return OmegaConf.to_container(OmegaConf.create(text.replace("${{", "$(")))


@pytest.fixture(scope="module", params=EXAMPLES)
def home(
    request: pytest.FixtureRequest, copy: Copy, tmp_path_factory: pytest.TempPathFactory
) -> Home:
    return Home(copy, tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def digits(copy: Copy, tmp_path_factory: pytest.TempPathFactory) -> Home:
    return Home(copy, tmp_path_factory.mktemp("readme"), "digits")


def serve(home: Home, command: str) -> str:
    """Start a server, wait until it names its address, and end it."""
    server = subprocess.Popen(
        [*shlex.split(command), "--port", "0"],
        cwd=home.path,
        env=home.env,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert server.stderr is not None
    try:
        return next((line for line in server.stderr if "http://" in line), "")
    finally:
        server.terminate()
        server.wait()


@pytest.mark.promise
def test_the_commands_of_the_readme(digits: Home) -> None:
    """Each runs as written, with keys added that make it quick, but for those run elsewhere."""
    sig = ""
    for command in digits.commands():
        if command in ELSEWHERE:
            continue
        if command.startswith("tensorboard"):
            said = serve(digits, command)
        elif "SIG" in command:
            limit = "epochs=1 debug=limit" if "continue_from" in command else ""
            said = digits.shell(f"{command} {limit}".replace("SIG", sig))
            assert "is complete" in said
        elif command.startswith("dora run"):
            limit = "" if "debug=" in command else "debug=limit"
            said = digits.shell(f"{command} epochs=1 {limit}")
            sig = sig or re.findall(r"Run (\w+) starts in epoch 1:", said)[0]
        else:
            said = digits.shell(command)
        assert said


def test_what_is_run_elsewhere_is_run_there(digits: Home) -> None:
    assert set(ELSEWHERE) <= set(digits.commands())
    for where in ELSEWHERE.values():
        file, found = where.split(": ")
        assert found in (ROOT / file).read_text(), where


def test_no_example_has_other_commands(home: Home, digits: Home) -> None:
    own = [command for command in home.commands() if "experiment=" in command]
    assert set(home.commands()) - {*own} <= set(digits.commands())
    assert len(own) == 1


def test_groups_are_what_the_heads_of_their_files_say(home: Home) -> None:
    for path in (home.config / "debug").glob("*.yaml"):
        assert path.read_text().splitlines()[1] == f"# dora run debug={path.stem}"
    [path] = (home.config / "experiment").glob("*.yaml")
    head = path.read_text().splitlines()
    [command] = re.findall(r"^# (dora run experiment=\w+)$", head[1])
    assert command in home.commands()
    [(metric, sign, value)] = re.findall(r"# Expected: valid (\w+) ([<>])= ([\d.]+)", head[2])
    said = home.shell(command)
    [sig] = re.findall(r"Run (\w+) starts in epoch 1:", said)
    reached = home.history(sig)[-1]["valid"][metric]
    assert reached >= float(value) if sign == ">" else reached <= float(value)


def test_groups_in_a_grid_in_a_notebook_and_when_edited(digits: Home) -> None:
    grid = digits.path / "my_research" / "grids" / "lr.py"
    head, _ = grid.read_text().split("    # Overrides that all runs share.")
    calls = 'launcher({"experiment": "averaged"})\n    launcher({"data": "digits"})\n'
    grid.write_text(f'{head}    launcher.bind_({{"debug": "limit"}})\n    {calls}')
    said = digits.shell("python -m my_research.tools.sweep lr")
    sig = digits.sig("debug=limit", "experiment=averaged")
    assert sig in said
    runs = sorted((digits.path / "outputs" / "xps").glob("*/sweep.json"))
    assert [len(digits.history(run.parent.name)) for run in runs] == [2, 2]

    [snippet] = re.findall(r"```python\n(.*?)```", digits.readme, re.DOTALL)
    script = snippet.replace("SIG", sig) + "print(len(solver.history), 'epochs')"
    assert "2 epochs" in digits.shell(f"python -c {shlex.quote(script)}")

    path = digits.config / "experiment" / "averaged.yaml"
    path.write_text(path.read_text().replace("0.98", "0.9"))
    assert "optim.ema: 0.98 -> 0.9" in digits.shell(f"dora run -f {sig}", code=1)


def test_without_cifar10_one_line_names_the_cure(digits: Home) -> None:
    said = digits.shell("dora run data=cifar10 2>&1", 1, MY_RESEARCH_DATA="nowhere")
    assert "Traceback" not in said
    assert "][CRITICAL] - CIFAR-10 is not in" in said
    assert "pip install -e '.[cifar10]'" in said


def test_ci_is_safe_and_does_what_the_matrix_does(home: Home) -> None:
    workflow = home.workflow()
    assert workflow["permissions"] == {"contents": "read"}
    steps = workflow["jobs"]["check"]["steps"]
    assert steps[0]["with"] == {"persist-credentials": False}
    text = (home.path / ".github" / "workflows" / "ci.yml").read_text()
    uses = [line for line in text.splitlines() if "uses:" in line]
    assert all(re.search(r"@[0-9a-f]{40} # v\d+\.\d+\.\d+$", line) for line in uses)
    # What test_matrix.py runs in every example.
    runs = [line for step in steps for line in step.get("run", "").splitlines()]
    assert runs[2:6] == ["ruff check .", "ruff format --check .", "mypy", "pytest"]


@pytest.mark.parametrize("example", ["digits", "basic"])
def test_ci_trains_is_killed_and_goes_on(example: str, copy: Copy, tmp_path: Path) -> None:
    home = Home(copy, tmp_path, example)
    step = home.workflow()["jobs"]["check"]["steps"][-1]
    assert "is complete after epoch" in home.shell(step["run"], **step["env"])
    assert home.shell("git status --porcelain") == ""


def test_it_passes_the_review_and_needs_each_exception(home: Home) -> None:
    home.shell("repo-review .")
    ignored = tomllib.loads((home.path / "pyproject.toml").read_text())["tool"]["repo-review"]
    said = home.shell("repo-review . --select '*' --ignore NONE", code=3)
    assert set(ignored["ignore"]) == set(re.findall(r"([A-Z]+\d+) .*❌", said))


def test_its_hooks_and_workflow_are_sound(home: Home) -> None:
    for reader in ("pre-commit", "prek"):
        home.shell(f"{reader} validate-config .pre-commit-config.yaml")
    home.shell("zizmor --offline .")


def test_what_is_built_holds_all_and_nothing_of_runs(home: Home) -> None:
    for litter in ("outputs/xps/0/checkpoint.th", "data/cifar-10-batches-py/x", "wandb/x"):
        (home.path / litter).parent.mkdir(parents=True, exist_ok=True)
        (home.path / litter).write_text("")
    home.shell("python -m build --wheel --sdist --no-isolation")
    [wheel] = (home.path / "dist").glob("*.whl")
    [sdist] = (home.path / "dist").glob("*.tar.gz")
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    with tarfile.open(sdist) as archive:
        source = {name.split("/", 1)[1] for name in archive.getnames()}

    files = set(home.shell("git ls-files").splitlines())
    package = {name for name in files if name.startswith("my_research/")}
    groups = {name.split("/")[2] for name in package if name.endswith(".yaml")}
    assert groups >= {"config.yaml", "debug", "experiment"}
    assert held == package >= {"my_research/py.typed", "my_research/grids/lr.py"}
    assert source == files | {"PKG-INFO"} >= {"tests/test_train.py"}


def test_each_release_is_published_as_a_sample(template: Path, tmp_path: Path) -> None:
    """The workflow's own lines, with folders for GitHub's repos; `pip` has nothing to install."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/sample.yml").read_text())
    job = workflow["jobs"]["publish"]
    source, remote = tmp_path / "cookiecutter-solver", tmp_path / "remote.git"
    shutil.copytree(template, source)
    env = clean_environment(tmp_path) | job["env"]
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"
    env |= {"TEMPLATE": str(source), "REMOTE": str(remote)}

    def git(*arguments: str, folder: Path = source) -> str:
        return subprocess.check_output(["git", *arguments], cwd=folder, env=env, text=True)

    git("init", "-q", "--bare", str(remote), folder=tmp_path)
    git("init", "-q")
    for tag in ("v0.1.0", "v0.2.0"):
        readme = source / "template" / "README.md"
        readme.write_text(f"{readme.read_text()}Release {tag}.\n")
        git("add", "-A")
        git("commit", "-qm", tag)
        git("tag", tag)
        env |= {"GITHUB_REF_NAME": tag, "RUNNER_TEMP": str(tmp_path / tag)}
        for step in job["steps"]:
            if "run" in step:
                shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
                subprocess.run(shell, cwd=tmp_path, env=env, check=True)
    log = git("log", "--format=%s", "sample", folder=remote).splitlines()
    assert log == ["Render v0.2.0", "Render v0.1.0"]
    assert git("diff", "--stat", "sample^", "sample", "--", "README.md", folder=remote)
    names = git("ls-tree", "-r", "--name-only", "sample", folder=remote).splitlines()
    assert "my_research/solver.py" in names
    assert not [name for name in names if name.startswith(".github/workflows")]
    record = json.loads(git("show", "sample:.template.json", folder=remote))
    assert record["template"] == str(source)
    subprocess.run(["zizmor", "--offline", "-q", ROOT / ".github"], env=env, check=True)
