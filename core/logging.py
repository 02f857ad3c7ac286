"""Logging: terminal and log files."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import TracebackType

from . import distrib, process_group
from .ansi import bold, colorize, plain_text
from .progress import LogProgressBar
from .results import ResultLogger
from .utils import UserError
from .xp import get_xp

# Flashy's users look for all of these here.
__all__ = ["LogProgressBar", "ResultLogger", "bold", "colorize", "setup_logging"]

_COLOURS = {"WARNING": "33", "ERROR": "31", "CRITICAL": "31;1"}


def setup_logging(
    with_file_log: bool = True,
    folder: str | Path | None = None,
    log_name: str = "solver.log.{rank}",
    level: int = logging.INFO,
) -> None:
    """Send log records to stderr, and to one file for each rank.

    Ranks above zero write their file in full, and to stderr warnings and errors only. An exception
    that nobody catches is logged as well, and shown by rank zero; of a `UserError`, one line.
    Replaces what an earlier call, Hydra or `logging.basicConfig` set up.

    Args:
        with_file_log: write the file.
        folder: of the file; the run's folder by default.
        log_name: of the file; `{rank}` stands for the rank.
        level: of the records to keep.
    """
    root = logging.getLogger()
    root.setLevel(level)
    usual = logging.StreamHandler, logging.FileHandler, _Terminal
    for handler in [h for h in root.handlers if type(h) in usual]:
        root.removeHandler(handler)
        handler.close()
    stderr = _Terminal() if sys.stderr.isatty() else logging.StreamHandler(sys.stderr)
    stderr.setFormatter(_LineFormatter(colours=sys.stderr.isatty()))
    stderr.addFilter(lambda record: not hasattr(record, "file_only"))
    stderr.setLevel(level if distrib.is_rank_zero() else max(level, logging.WARNING))
    root.addHandler(stderr)
    if with_file_log:
        folder = Path(folder) if folder is not None else get_xp().folder
        folder.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(folder / log_name.format(rank=distrib.rank()))
        file.setFormatter(_LineFormatter(colours=False))
        root.addHandler(file)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught


def _log_uncaught(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    log, exc_info = logging.getLogger(__name__), (kind, error, trace)
    if is_user_error := isinstance(error, UserError):
        log.critical("%s", error)
    extra = {"file_only": True} if is_user_error else None
    log.critical("The run failed", exc_info=exc_info, extra=extra)
    process_group.report_failure(error)


class _Terminal(logging.Handler):
    """Writes lines above a live bar, and leaves out those that it replaces."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if not hasattr(record, "progress"):
            tqdm.write(self.format(record), file=sys.stderr)


class _LineFormatter(logging.Formatter):
    def __init__(self, colours: bool) -> None:
        super().__init__(
            f"[{colorize('%(asctime)s', '36')}][{colorize('%(name)s', '34')}]"
            "[%(levelname)s] - %(message)s",
            "%m-%d %H:%M:%S",
        )
        self.colours = colours

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        if not self.colours:
            return plain_text(line)
        level = record.levelname
        return line.replace(f"[{level}]", f"[{colorize(level, _COLOURS.get(level, '32'))}]", 1)
