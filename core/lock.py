"""The lock of a run: one process trains it at a time; two would overwrite each other's files."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from .collectives import raised_everywhere
from .process_group import is_rank_zero
from .utils import UserError
from .xp import XP

logger = logging.getLogger(__name__)

SECONDS = 10.0  # to wait for the end of another process that trains the run


class RunLock:
    """A locked file in the run's folder; a process that dies releases it."""

    def __init__(self, xp: XP) -> None:
        from filelock import FileLock

        self._sig = xp.sig
        self._file = FileLock(xp.folder / ".lock")

    def is_free(self) -> bool:
        """Is no other process training the run?"""
        try:
            with self._file.acquire(timeout=0):
                return True
        except TimeoutError:
            return False
        except (OSError, NotImplementedError):  # see `_acquire`
            return True

    @contextmanager
    def held(self) -> Iterator[None]:
        """Hold it on rank zero, also if held already; all ranks raise if another process does."""
        with raised_everywhere():
            if is_rank_zero():
                self._acquire()
        try:
            yield
        finally:
            self._file.release()

    def _acquire(self) -> None:
        try:
            self._file.acquire(timeout=SECONDS)
        except TimeoutError:
            raise UserError(
                f"run {self._sig} is training in another process: wait for its end, or stop it "
                "first"
            ) from None
        except (OSError, NotImplementedError) as error:  # some file systems know no locks
            logger.warning("Two processes could train this run: no lock, %s", error)
