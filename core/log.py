"""Logging: the terminal, log files, and the progress of loops."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from tqdm import tqdm
from tqdm.contrib import DummyTqdmFile

from . import distrib
from .metrics import Formatter, Metrics
from .run import get_xp
from .utils import UserError, length

T = TypeVar("T")

_COLOURS = {"WARNING": "33", "ERROR": "31", "CRITICAL": "31;1"}
_CODES = re.compile(r"\x1b\[[0-9;]*m")


def bold(text: str) -> str:
    """Make text bold in a terminal; log files drop the codes."""
    return colorize(text, "1")


def colorize(text: str, color: str) -> str:
    """Wrap text in an ANSI colour code, such as `31` for red."""
    return f"\x1b[{color}m{text}\x1b[0m"


def setup_logging(
    with_file_log: bool = True,
    folder: str | Path | None = None,
    log_name: str = "solver.log.{rank}",
    level: int | str = logging.INFO,
) -> None:
    """Send log records to stderr, and to a file for each rank.

    Ranks above zero write their file in full, and to stderr warnings and errors only. An exception
    that nobody catches is logged as well, and shown by rank zero; of a `UserError`, one line.
    Replaces the handlers of an earlier call, of Hydra and of `logging.basicConfig`.

    Args:
        with_file_log: write the file.
        folder: of the file; the run's folder by default.
        log_name: of the file; `{rank}` stands for the rank.
        level: of the records to keep.
    """
    if not sys.stderr or sys.stderr.closed:  # as some daemons start a program
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    root, shown = logging.getLogger(), in_terminal()
    root.setLevel(level)
    for handler in [*root.handlers]:
        if type(handler) in (logging.StreamHandler, logging.FileHandler):
            root.removeHandler(handler)
            handler.close()
    # In a terminal, lines go above a live bar.
    stderr = logging.StreamHandler(DummyTqdmFile(sys.stderr) if shown else sys.stderr)
    stderr.setFormatter(_Coloured() if shown else _Plain())
    stderr.addFilter(lambda record: not getattr(record, "file_only", False))
    stderr.setLevel(root.level if distrib.is_rank_zero() else max(root.level, logging.WARNING))
    root.addHandler(stderr)
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    if with_file_log:
        folder = get_xp().folder if folder is None else folder
        root.addHandler(_file_handler(Path(folder, log_name.format(rank=distrib.rank()))))


def in_terminal() -> bool:
    """Return whether stderr is a terminal, rather than a file, or closed."""
    return bool(sys.stderr) and not sys.stderr.closed and sys.stderr.isatty()


def _file_handler(path: Path) -> logging.FileHandler:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise UserError(f"no log file, {error}: make room there, or choose a folder") from error
    file.setFormatter(_Plain())
    return file


def _log_uncaught(kind: type, error: BaseException, trace: TracebackType | None) -> None:
    if isinstance(error, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    log, is_slip = logging.getLogger(__name__), isinstance(error, UserError)
    if is_slip:
        log.critical("%s", error)
    log.critical("The run failed", exc_info=error, extra={"file_only": is_slip})
    distrib.report_failure(error)


class _Coloured(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        when = colorize(self.formatTime(record, "%m-%d %H:%M:%S"), "36")
        level = colorize(record.levelname, _COLOURS.get(record.levelname, "32"))
        return f"[{when}][{colorize(record.name, '34')}][{level}] - {super().format(record)}"


class _Plain(_Coloured):
    def format(self, record: logging.LogRecord) -> str:
        return _CODES.sub("", super().format(record))


def format_items(metrics: Metrics, formatter: Formatter | None, delimiter: str) -> list[str]:
    """Return the metrics as `name value`, formatted."""
    return [f"{n}{delimiter}{v}" for n, v in (formatter or Formatter())(metrics).items()]


@dataclass(eq=False, repr=False)
class LogProgressBar(Generic[T]):
    """An iterator with a log line now and then: position, speed, time left, metrics.

    Also for `next()`, which continues the running loop, or begins one.

    A line tells of the finished steps, and of the time spent waiting for data if that is over a
    tenth; the last line is not lost, even if the loop breaks. Nothing is formatted between lines. A
    terminal shows a bar instead, refreshed twice a second at most.

    Args:
        logger: of the lines.
        iterable: to iterate.
        updates: number of lines; 0 for none.
        min_interval: least number of steps between two lines.
        time_per_it: show the time of a step rather than steps per second.
        total: number of steps, if the iterable has no length. If none is known, or beyond it, there
            is at most one line every 10 seconds.
        name: the start of each line.
        level: of the lines.
        delimiter: between the parts of a line.
        items_delimiter: between a metric's name and value.
        formatter: of the metrics.
        done: number of earlier steps.
        on_log: called with each line.
    """

    logger: logging.Logger
    iterable: Iterable[T]
    updates: int = 5
    min_interval: int = 1
    time_per_it: bool = False
    total: int | None = None
    name: str = "LogProgressBar"
    level: int = logging.INFO
    delimiter: str = "|"
    items_delimiter: str = " "
    formatter: Formatter | None = None
    done: int = 0
    on_log: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.total = length(self.iterable) if self.total is None else self.total
        self._every = max(1, self.min_interval, -(-(self.total or 0) // max(1, self.updates)))
        self._metrics: Metrics = {}
        self._will_log = False
        self._running: Callable[[], Iterator[T] | None] = lambda: None

    def __len__(self) -> int:
        if self.total is None:
            raise TypeError("the iterable has no length: give the progress bar total=")
        return self.total

    def __iter__(self) -> Iterator[T]:
        iterator = self._iterate()
        self._running = weakref.ref(iterator)  # a loop that breaks ends its iterator
        return iterator

    def __next__(self) -> T:
        self._kept = self._running() or iter(self)
        return next(self._kept)

    def _iterate(self) -> Iterator[T]:
        done, logged, waited = self.done, self.done, 0.0
        every, total, shown = self._every, self.total or 0, self.updates > 0
        live = self._live_bar()
        asked = last = time.perf_counter()
        try:
            for item in self.iterable:
                given = time.perf_counter()
                waited += given - asked
                done += 1
                due = done % every == 0 and (done <= total or given - last >= 10)
                self._will_log = shown and (due or done == total)
                yield item
                if self._will_log:
                    last = self._log(done, done - logged, last, waited)
                    logged, waited = done, 0.0
                if live is not None and live.update():  # now and then it shows itself
                    live.set_postfix_str(self._line(), refresh=False)
                asked = time.perf_counter()
        finally:
            self._will_log = False
            if live is not None:
                live.close()
            if shown and done > logged:
                self._log(done, done - logged, last, waited)

    def _live_bar(self) -> Any:
        """Return a bar if stderr is a terminal; else None."""
        shown = self.updates > 0 and self.logger.isEnabledFor(self.level)
        if not (shown and in_terminal() and distrib.is_rank_zero()):
            return None
        options = {"leave": False, "dynamic_ncols": True, "mininterval": 0.5}
        return tqdm(desc=self.name, total=self.total, initial=self.done, **options)

    def update(self, metrics: Metrics | None = None, /, **more: Any) -> bool:
        """Set the metrics to show; return whether a line will follow this step.

        Averages of `averager` are best given as they are: they are read only when a line is due.
        """
        self._metrics = more if metrics is None else {**metrics, **more} if more else metrics
        return self._will_log

    def _log(self, done: int, steps: int, last: float, waited: float) -> float:
        """Log the steps since the last line; return the time."""
        now = time.perf_counter()
        seconds = max(now - last, 1e-9)
        pace = seconds / steps
        speed = f"{pace:.2f} sec/it" if pace >= 1 else f"{1000 * pace:.1f} ms/it"
        if pace < 10 and not self.time_per_it:
            speed = f"{1 / pace:.2f} it/sec"
        parts = [self.name, f"{done}/{self.total or '?'}", speed]
        if self.total and done < self.total:
            parts.append(f"ETA {tqdm.format_interval((self.total - done) * pace)}")
        if waited > 0.1 * seconds and seconds > 1:
            parts.append(f"waits for data {waited / seconds:.0%}")
        # A terminal has the bar.
        self.logger.log(self.level, self._line(*parts), extra={"file_only": in_terminal()})
        self.on_log()
        return now

    def _line(self, *parts: str) -> str:
        items = format_items(self._metrics, self.formatter, self.items_delimiter)
        return f" {self.delimiter} ".join([*parts, *items])
