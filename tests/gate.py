"""Let runs wait for what a test does to them, so that no test depends on how fast a machine is."""

import os
import tempfile
from pathlib import Path

CODE = """

def _add_gate(init):  # type: ignore
    import math, os, time
    from pathlib import Path

    folder = Path({folder!r})

    def tests_go_on():  # type: ignore
        try:
            os.kill({test}, 0)
        except ProcessLookupError:
            return False
        return True

    def is_asked(self):  # type: ignore
        stage = self._current_stage
        requests = stage and stage.requests
        return bool(requests and requests.signal) and requests.due < math.inf

    def init_and_wait(self, *args, **kwargs):  # type: ignore
        init(self, *args, **kwargs)
        steps = 0

        def wait(*_):  # type: ignore
            nonlocal steps
            steps += bool({when})
            if steps == ({calls}):
                (folder / str(os.getpid())).touch()
                while not (folder / "open").exists() and not is_asked(self) and tests_go_on():
                    time.sleep(0.01)

        self.model.register_forward_pre_hook(wait)

    return init_and_wait


Solver.__init__ = _add_gate(Solver.__init__)  # type: ignore
"""


class Gate:
    """A place where each process of a project's runs waits, in the second step of epoch 2.

    The wait is in the model's second call, or as many as given. It ends when the run is asked to
    stop, or by `open`.
    """

    def __init__(self, project: Path, when: str = "self.epoch == 2", calls: str = "2") -> None:
        """Add it to a project.

        Args:
            project: of the digits, or with a solver like theirs.
            when: code about the solver `self`; a call counts if this is true.
            calls: code for the number of the call that waits.
        """
        self.folder = Path(tempfile.mkdtemp(prefix="gate-", dir=project))
        code = CODE.format(folder=str(self.folder), test=os.getpid(), when=when, calls=calls)
        with (project / "my_research" / "solver.py").open("a") as file:
            file.write(code)

    def reached(self, processes: int = 1) -> bool:
        """Whether so many processes have come here."""
        return len(list(self.folder.iterdir())) >= processes

    def holds(self, pid: int) -> bool:
        """Whether this process has come here."""
        return (self.folder / str(pid)).exists()

    def open(self) -> None:
        """Let all pass, now and from now on."""
        (self.folder / "open").touch()
