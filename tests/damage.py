"""Damage the files of a run at random, thousands of times, and resume each time.

`python -m tests.damage [trials] [seed]` prints a table. All is done in one process, by the core.
"""

import logging
import os
import random
import re
import shutil
import signal
import sys
import tempfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from core import BaseSolver, checkpoint, provenance
from core.plain import to_plain
from core.stop import Stopped
from core.utils import UserError

from .faults import damage, same

OUTCOMES = [
    "unharmed",
    "newest state, with a warning",
    "newest intact commit, with a warning",
    "refused clearly",
    "lost silently",
]
NEWEST, WARNED, OLDER, REFUSED, LOST = OUTCOMES
EPOCHS = 4


class Solver(BaseSolver):
    """A small training, that can be stopped in the third step of an epoch."""

    def __init__(self, folder: Path, stop: int = 0) -> None:
        super().__init__(folder, {"last": 3})
        torch.manual_seed(0)
        self.stop = stop
        self.model = torch.nn.Linear(4, 4)
        self.optim = torch.optim.Adam(self.model.parameters(), 0.01)
        self.register_stateful("model", "optim")

    def train(self) -> dict[str, float]:
        steps = self.steps(range(4), every=1)
        for step in steps:
            loss = self.model(torch.randn(8, 4)).square().mean()
            loss.backward()
            self.optim.step()
            self.optim.zero_grad()
            steps.log({"loss": loss})
            if self.epoch == self.stop and step == 2:
                os.kill(os.getpid(), signal.SIGUSR1)
        return steps.metrics()

    def run(self) -> None:
        """Train to the end; keep the state in which the run began or resumed."""
        with self.running():
            self.begin: dict[str, Any] = to_plain(
                self.state_dict(), copy=lambda tensor, _: tensor.clone()
            )
            for _ in range(self.epoch, EPOCHS + 1):
                self.run_stage("train", self.train)
                self.commit()


class Warnings(logging.Handler):
    """Collects the warnings of the core."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.said.append(record.getMessage())


def attempt(stopped: Path, whole: Path, copy: Path, rng: random.Random) -> tuple[str, str, str]:
    """Damage one or two files of a copy of a run, and resume the run.

    Returns:
        The first file, the outcome, and all that was said.
    """
    shutil.copytree(stopped, copy)
    files = sorted(path.name for path in copy.glob("*.*"))
    chosen = rng.sample(files, rng.choice([1, 1, 1, 2]))
    for name in chosen:
        (copy / name).write_bytes(damage((copy / name).read_bytes(), rng))
    warnings = Warnings()
    logging.getLogger().addHandler(warnings)
    try:
        solver = Solver(copy)
        solver.run()
    except UserError as error:
        clear = any(str(copy / name) in str(error) for name in chosen)
        return chosen[0], REFUSED if clear else LOST, repr(error)
    except Exception as error:
        return chosen[0], LOST, f"{error!r}, a traceback"
    finally:
        logging.getLogger().removeHandler(warnings)
    said = "; ".join(warnings.said)
    if not same(ended(copy), ended(whole)):
        return chosen[0], LOST, f"another end: {said}"
    if same(solver.begin["model"], checkpoint.read(stopped / "checkpoint.th")["model"]):
        return chosen[0], WARNED if said else NEWEST, said
    return chosen[0], OLDER if said else LOST, said


def ended(folder: Path) -> dict[str, Any]:
    """Return the state at the end of a run, but for its name."""
    return checkpoint.read(folder / "checkpoint.th") | {"xp.sig": ""}


def campaign(trials: int, seed: int = 0) -> dict[str, Counter[str]]:
    """Damage so many runs; return the outcomes by the kind of file, and print what is lost."""
    found: dict[str, Counter[str]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        provenance.PROJECT = folder  # where no code can change meanwhile
        Solver(folder / "whole").run()
        with suppress(Stopped):
            Solver(folder / "stopped", EPOCHS).run()
        for number in range(trials):
            rng, copy = random.Random(f"{seed} {number}"), folder / str(number)
            name, outcome, said = attempt(folder / "stopped", folder / "whole", copy, rng)
            found.setdefault(re.sub(r"\.[0-9a-f]+\.", ".*.", name), Counter())[outcome] += 1
            if outcome == LOST:
                print(f"{number}: {name}: {said}")
            shutil.rmtree(copy)
    return found


def table(found: dict[str, Counter[str]]) -> str:
    """Return the outcomes by the kind of file, as a table of Markdown."""
    lines = [f"|damaged|tried|{'|'.join(OUTCOMES)}|", "|---|" + "---:|" * 6]
    for name, counts in sorted(found.items()):
        numbers = [counts.total(), *(counts[outcome] for outcome in OUTCOMES)]
        lines.append(f"|{name}|{'|'.join(str(n or '') for n in numbers)}|")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(campaign(*map(int, sys.argv[1:] or ["2000"]))))
