"""Takes the README's pictures from a real run, and executes the notebook: `nox -s pictures`.

The terminal is recorded through a pseudo-terminal; the report's page needs Chromium.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
NOTEBOOK = HERE.parent / "template" / "examples" / "digits" / "notebooks" / "results.ipynb"
COLUMNS = 118


def record(project: Path, command: str, stop: str = "") -> list[str]:
    """Run a command in a terminal; return its lines, with their colours.

    Args:
        project: the folder to run it in.
        command: without its Python.
        stop: press Ctrl-C when it has printed this.
    """
    primary, secondary = pty.openpty()
    env = os.environ | {"COLUMNS": str(COLUMNS), "OMP_NUM_THREADS": "1"}
    full = [sys.executable, "-m", *command.split()]
    # As from a terminal: what is started in the background may have to ignore Ctrl-C.
    restore = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    process = subprocess.Popen(
        full, cwd=project, env=env, stdout=secondary, stderr=secondary, preexec_fn=restore
    )
    os.close(secondary)
    said = b""
    while True:
        try:
            part = os.read(primary, 4096)
        except OSError:  # the other end was closed
            break
        if not part:
            break
        said += part
        if stop and stop in said.decode(errors="replace"):
            time.sleep(0.1)
            process.send_signal(signal.SIGINT)
            stop = ""
    process.wait()
    lines = said.decode(errors="replace").replace("\r\n", "\n").split("\n")
    return [line.rpartition("\r")[2] for line in lines if line.strip()]


def terminal(project: Path, target: Path) -> None:
    """A run that is interrupted, and resumed; then all runs in a table."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115

    def show(typed: str, lines: list[str], pattern: str = "") -> None:
        console.print(Text.assemble(("$ ", "bold green"), (typed, "bold")))
        for line in lines:
            if re.search(pattern, line):
                text = Text.from_ansi(line.replace(str(project.parent), "~"))
                console.print(text, no_wrap=True, overflow="ellipsis")
        console.print()

    stopped = record(project, "dora run", stop="Valid Summary | Epoch 3")
    show("dora run", stopped, "(starts|resumes) in|Stopped by|Summary")
    show(
        "dora run",
        record(project, "dora run"),
        r"resumes in|is complete|Summary \| Epoch (3|4|14|15)\b",
    )
    record(project, "dora run optim.lr=1e-3")
    show("dora run optim.lr=1e-3", ["..."])
    table = record(project, "my_research.tools.report")
    show("python -m my_research.tools.report", table)
    target.write_text(console.export_svg(title="my-research"))


def page(project: Path, target: Path) -> None:
    """The report's page, as a browser shows it."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        print("no Chromium here: the picture of the report stays as it is")
        return
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--disable-background-networking", "--no-first-run"),
                *(f"--user-data-dir={profile}", "--virtual-time-budget=8000"),
                *("--window-size=1280,900", f"--screenshot={target}"),
                (project / "outputs" / "report.html").as_uri(),
            ],
            check=True,
            capture_output=True,
            timeout=120,
        )


def notebook(project: Path, target: Path) -> None:
    """The notebook of the digits, with what its cells show, as a template again."""
    path = project / "notebooks" / target.name
    found = nbformat.read(path, as_version=4)
    NotebookClient(
        found, resources={"metadata": {"path": path.parent}}, record_timing=False
    ).execute()
    found.metadata.language_info = {"name": "python"}  # without a version
    text = nbformat.writes(found).replace("my_research", "{{ cookiecutter.package_name }}")
    target.write_text(text + "\n")


if __name__ == "__main__":
    terminal(Path(sys.argv[1]), HERE / "terminal.svg")
    page(Path(sys.argv[1]), HERE / "report.png")
    notebook(Path(sys.argv[1]), NOTEBOOK)
