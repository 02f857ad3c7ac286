"""Let runs wait for what a test does to them, so that no test depends on how fast a machine is."""

import shutil
import tempfile
from pathlib import Path

CODE = """

def _held(run_stage):  # type: ignore
    import os, select, signal
    from pathlib import Path

    def wait_and_run(self, *args, **kwargs):  # type: ignore
        gate = Path({gate!r})
        if self.epoch == 2 and {when} and gate.exists():
            read, write = os.pipe()
            os.set_blocking(write, False)
            signal.set_wakeup_fd(write)
            (gate / str(os.getpid())).touch()
            while gate.exists():
                if select.select([read], [], [], 0.01)[0] and os.read(read, 1)[0] != signal.SIGCHLD:
                    break
        return run_stage(self, *args, **kwargs)

    return wait_and_run


Solver.run_stage = _held(Solver.run_stage)  # type: ignore
"""


class Gate:
    """Where each process of a project's runs waits, before the first stage of epoch 2.

    It waits until it is sent a signal, which it then heeds as at any step, or the gate is opened.
    """

    def __init__(self, project: Path, when: str = "True") -> None:
        """Put it into a project; `when` is code that tells if `self`, a solver, is to wait."""
        self.folder = Path(tempfile.mkdtemp(prefix="gate-", dir=project))
        with (project / "my_research" / "solver.py").open("a") as file:
            file.write(CODE.format(gate=str(self.folder), when=when))

    def reached(self, processes: int = 1) -> bool:
        """Whether so many processes have come here since it was made."""
        return len(list(self.folder.iterdir())) >= processes

    def open(self) -> None:
        """Let all pass, now and from now on."""
        shutil.rmtree(self.folder)
