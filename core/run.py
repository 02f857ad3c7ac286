"""A run: folder, config, history, and the lock of the process in training."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from . import distrib
from .plain import to_plain
from .utils import UserError, flatten, write_and_rename

logger = logging.getLogger(__name__)

History = list[dict[str, Any]]  # a dict of stages for each epoch, a dict of metrics for each stage

ALLOW_CONFIG_CHANGE = "ALLOW_CONFIG_CHANGE"  # environment variable
LOCK_SECONDS = 10.0  # to wait for the end of another process that trains the run
NO_EFFECT = ("dora", "slurm")  # sections of the config that change nothing in a run


class XP(Protocol):
    """A run, as needed by a solver: an experiment of Dora, or a `FolderXP`."""

    cfg: Any
    sig: str
    link: Any

    @property
    def folder(self) -> Path: ...


finders: list[Callable[[], XP | None]] = []  # of the running experiment: `launch.py` adds Dora's


def get_xp() -> XP:
    """Return the running experiment; UserError if there is none."""
    for find in finders:
        if (xp := find()) is not None:
            return xp
    raise UserError("no experiment is running: start with `dora run`, or give BaseSolver a folder")


def resume_command(xp: XP) -> str:
    """Return the command to resume a run, from the root of the repo; empty without Dora."""
    option = "-d " if distrib.is_distributed() else ""
    return f"dora run {option}-f {xp.sig}" if hasattr(xp, "dora") else ""


@dataclass
class FolderXP:
    """A run in a plain folder: for tests, notebooks and scripts without Dora.

    Args:
        folder: made if missing.
        cfg: any config, kept in the checkpoint.
        sig: defaults to the folder's name.
    """

    folder: Path
    cfg: Any = field(default_factory=dict)
    sig: str = ""

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sig = self.sig or self.folder.name
        self.link = FileLink(self.folder / "history.json")


@dataclass
class FileLink:
    """A history kept in one JSON file, with the methods of Dora's link."""

    history_file: Path
    history: History = field(default_factory=list)

    def load(self) -> None:
        """Read the published history, if any."""
        if self.history_file.exists():
            self.history = json.loads(self.history_file.read_bytes())

    def update_history(self, history: History) -> None:
        """Publish a history."""
        write_history(self, history)


def read_history(link: Any) -> History:
    """Return the published history, or the last known if its file is damaged, with a warning."""
    known = link.history
    try:
        link.load()
        if not isinstance(link.history, list) or any(type(e) is not dict for e in link.history):
            raise ValueError("no list of epochs")
    except (OSError, RecursionError, TypeError, ValueError) as error:
        link.history = known
        note = "%s can't be read: %s; the checkpoint has it as well"
        logger.warning(note, link.history_file, error)
    return [*link.history]


def write_history(link: Any, history: History) -> None:
    """Replace the published history, in which Dora and `tools/report.py` look."""
    if (path := getattr(link, "history_file", None)) is None:
        link.update_history(history)  # writes by itself
        return
    link.history[:] = history
    with write_and_rename(path, "w") as file:
        file.write("[\n" + ",\n".join(map(json.dumps, history)) + "\n]\n")


@contextmanager
def locked(xp: XP) -> Iterator[None]:
    """Hold a run's lock on rank zero; UserError on all ranks if another process has the lock."""
    from filelock import FileLock

    with ExitStack() as held:
        with distrib.raised_everywhere():
            if distrib.is_rank_zero():
                try:  # released by a process that dies
                    held.enter_context(FileLock(xp.folder / ".lock", timeout=LOCK_SECONDS))
                except TimeoutError:
                    raise UserError(
                        f"run {xp.sig} is training in another process: wait for its end, or stop it"
                    ) from None
                except (OSError, NotImplementedError) as error:  # some file systems know no locks
                    logger.warning("Two processes could train this run: no lock, %s", error)
        yield


# ---------------------------------------------------------------------------------------- config


def record_config(xp: XP) -> None:
    """Write the config to the run's folder, for people and for `tools/`."""
    if (path := getattr(xp.link, "history_file", None)) is not None and path.is_dir():
        raise UserError(f"{path} is a folder in the way of a file: move it")  # before an epoch
    with write_and_rename(xp.folder / "config.json", "w") as file:
        json.dump(to_plain(xp.cfg, "the config"), file, indent=2, default=str)


def check_config(xp: XP, saved: Mapping[str, Any], strict: bool) -> None:
    """Refuse to resume with other values than the run began with, such as an edited default.

    A new key, or a key without a part in signatures, only gives a warning.
    """
    then, now = flatten(saved), flatten(to_plain(xp.cfg, "the config"))
    dora, refused = getattr(xp, "dora", None), []
    for key in sorted(then.keys() | now.keys()):
        old, new = then.get(key, "absent"), now.get(key, "absent")
        if key.partition(".")[0] in NO_EFFECT or old == new or repr(old) == repr(new):  # NaN
            continue
        logger.warning("The config has changed: %s: %s -> %s", key, old, new)
        if key in then and not (dora and dora.is_excluded(key)):
            refused.append(f"{key}: {old} -> {new}")
    if refused and strict and not os.environ.get(ALLOW_CONFIG_CHANGE):
        raise UserError(
            f"the config of run {xp.sig} has changed since its last checkpoint: "
            f"{'; '.join(refused)}. Undo that, start anew (`dora run --clear`), or set "
            f"{ALLOW_CONFIG_CHANGE}=1 to resume anyway, with the saved state"
        )
