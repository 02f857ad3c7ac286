"""Start Python commands in processes forked from one that has imported PyTorch already.

Importing PyTorch, Hydra and Dora takes seconds, and the tests start hundreds of commands. A forked
command has its own folder, environment, arguments, signals, exit status and output, as if started
by `python -m NAME` or `python -c CODE`. What Python and its libraries read from the environment
when they start, such as PYTHONHASHSEED, is the same for all.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy

T = TypeVar("T")
ROOT = str(Path(__file__).parent.parent)
FORKS: Any = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
# Of cookiecutter only the dependencies: its own code reads HOME when it is imported.
PRELOAD = [
    "arrow",
    "binaryornot",
    "click",
    "dora.grid",
    "dora.launch",
    "hydra",
    "jinja2",
    "requests",
    "rich.prompt",
    "sklearn.datasets",
    "slugify",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "yaml",
]
os.environ["OMP_NUM_THREADS"] = "1"  # the processes of the tests share few cores
FORKS.set_forkserver_preload(PRELOAD)


class Command:
    """A running command of Python, or one that has ended.

    Waiting has no limit here: pytest's `timeout` is the one limit of all tests.
    """

    started: ClassVar[list["Command"]] = []

    def __init__(
        self,
        folder: Path,
        *arguments: str,
        env: Mapping[str, str] = os.environ,
        prepare: Callable[[], Any] | None = None,
    ) -> None:
        """Start it in a folder.

        Args:
            folder: the working directory.
            arguments: those of `python`, beginning with -m or -c.
            env: all of its environment.
            prepare: called first in the new process; a function that can be pickled.
        """
        self._file = tempfile.NamedTemporaryFile()  # noqa: SIM115
        how = (folder, arguments, dict(env), self._file.name, prepare)
        self._process = FORKS.Process(target=_execute, args=how)
        self._process.start()
        self.started.append(self)

    @property
    def pid(self) -> int:
        return int(self._process.pid)

    @property
    def said(self) -> str:
        """What it has written so far to its output and its errors."""
        return Path(self._file.name).read_text()

    def poll(self) -> int | None:
        """The exit status, as `subprocess` gives it; None while it runs."""
        code: int | None = self._process.exitcode
        return code

    def send(self, number: signal.Signals) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def until(self, event: Callable[[], T]) -> T:
        """Wait until `event()` is true and return its value; fail if the command ends first."""
        while not (found := event()):
            assert self.poll() is None, f"it has ended:\n{self.said}"
            time.sleep(0.01)
        return found

    def wait(self) -> int:
        """Wait for its end; return its exit status."""
        self._process.join()
        return int(self._process.exitcode)

    def finish(self, code: int = 0) -> str:
        """Wait for its end, with this exit status; return all that it said."""
        assert self.wait() == code, f"exit status {self.poll()}:\n{self.said}"
        return self.said


def run(folder: Path, *arguments: str, code: int = 0, env: Mapping[str, str] = os.environ) -> str:
    """Run a command to its end, with this exit status; return all that it said."""
    return Command(folder, *arguments, env=env).finish(code)


def gone(pid: int | str) -> bool:
    """Whether a process has ended; a zombie, which nobody may ever reap, has."""
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def _execute(
    folder: Path,
    arguments: tuple[str, ...],
    env: dict[str, str],
    said: str,
    prepare: Callable[[], Any] | None,
) -> None:
    """Run the command in this process."""
    if prepare is not None:
        prepare()
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None
    numpy.random.seed()
    os.chdir(folder)
    output = os.open(said, os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    # Nothing of this repo is there to be imported in place of the project's own.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("core", "tests")]:
        del sys.modules[name]
    path = env.get("PYTHONPATH", "").split(os.pathsep)
    path = [str(folder), *filter(None, path), *(p for p in sys.path if p not in ("", ROOT))]
    sys.path[:] = path
    multiprocessing.set_start_method(None, force=True)
    option, what, *rest = arguments
    sys.argv = [what if option == "-m" else option, *rest]
    try:
        if option == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # which `multiprocessing` does not
