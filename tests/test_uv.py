"""Render, install, lock and train with uv alone, as README.md of a rendered project says."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from .conftest import ROOT

UV = Path(sys.executable).with_name("uv")


def at_hand() -> str:
    """Return the folder of wheels that pip is told of; without, need the index of PyTorch."""
    told = [sys.executable, "-m", "pip", "config", "get", "global.find-links"]
    configured = subprocess.run(told, capture_output=True, text=True, check=False).stdout.strip()
    if not (found := os.environ.get("PIP_FIND_LINKS") or configured):
        try:
            socket.create_connection(("download.pytorch.org", 443), timeout=10).close()
        except OSError:
            pytest.skip("no PyTorch without CUDA is in reach")
    return found


@pytest.mark.skipif(not UV.exists(), reason="uv is not installed")
def test_with_uv_alone(template: Path, tmp_path: Path) -> None:
    temporary = {"VIRTUAL_ENV": "", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    cache = subprocess.check_output([UV, "cache", "dir"], text=True).strip()
    env = os.environ | temporary | {"UV_CACHE_DIR": cache, "UV_PYTHON": sys.executable}
    env |= {"UV_SYSTEM_CERTS": "1", "UV_NATIVE_TLS": "1"}  # two names, of new and old versions

    def uv(*arguments: str, folder: Path) -> str:
        done = subprocess.run(
            [UV, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    wheels = at_hand()
    uv("tool", "run", "cookiecutter", str(template), "--no-input", folder=tmp_path)
    project = tmp_path / "my-research"
    about = project / "pyproject.toml"
    text = about.read_text().replace(
        '# torch = { index = "pytorch" }', 'torch = { index = "pytorch" }'
    )
    if wheels:  # a build without CUDA
        index = "https://download.pytorch.org/whl/cpu"
        assert index in text
        text = text.replace(f'"{index}"', f'"{wheels}"\nformat = "flat"')
    about.write_text(text)
    uv("sync", folder=project)
    assert 'name = "torch"' in (project / "uv.lock").read_text()
    assert "valid.acc: " in uv("run", "dora", "run", "debug=limit", folder=project)
    uv("run", "pytest", "-q", "tests/test_config.py", "-k", "refused", folder=project)
    shutil.rmtree(project / ".venv")  # large

    # What the Dockerfile of docs/elsewhere does with what is committed, without a container.
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "add", "-A"], cwd=project, check=True)
    subprocess.run([*git, "commit", "-qm", "lock"], cwd=project, check=True)
    recipe = (ROOT / "docs" / "elsewhere" / "Dockerfile").read_text()
    packages, project_too = re.findall("^RUN uv (.*)", recipe, re.M)
    [first] = re.findall("^COPY --chown=1000 (.*) \\./$", recipe, re.M)
    (tmp_path / "image").mkdir()
    for name in first.split():
        shutil.copy(project / name, tmp_path / "image")
    uv(*packages.split(), folder=tmp_path / "image")
    archive = subprocess.check_output([*git, "archive", "HEAD"], cwd=project)
    subprocess.run(["tar", "-x"], cwd=tmp_path / "image", input=archive, check=True)
    uv(*project_too.split(), folder=tmp_path / "image")
    entry = json.loads(re.findall("^ENTRYPOINT (.*)", recipe, re.M)[0])
    command = tmp_path / "image" / ".venv" / "bin" / entry[0]
    subprocess.run(
        [command, *entry[1:], "debug=limit"],
        cwd=tmp_path / "image",
        env=env | {"MY_RESEARCH_DIR": str(tmp_path)},
        check=True,
    )
    assert list(tmp_path.glob("xps/*/history.json"))
    shutil.rmtree(tmp_path / "image")
