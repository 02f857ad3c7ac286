"""Logging: the terminal, log files, and the progress of loops."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

from tqdm import tqdm

from . import distrib
from .metrics import Formatter
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
    root = logging.getLogger()
    root.setLevel(level)
    usual = logging.StreamHandler, logging.FileHandler, _Terminal
    for handler in [h for h in root.handlers if type(h) in usual]:
        root.removeHandler(handler)
        handler.close()
    stderr = _Terminal() if sys.stderr.isatty() else logging.StreamHandler(sys.stderr)
    stderr.setFormatter(_LineFormatter(colours=sys.stderr.isatty()))
    stderr.addFilter(lambda record: not hasattr(record, "file_only"))
    stderr.setLevel(root.level if distrib.is_rank_zero() else max(root.level, logging.WARNING))
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
    log, extra = logging.getLogger(__name__), {}
    if isinstance(error, UserError):
        log.critical("%s", error)
        extra["file_only"] = True
    log.critical("The run failed", exc_info=(kind, error, trace), extra=extra)
    distrib.report_failure(error)


class _Terminal(logging.Handler):
    """A handler of lines above a live bar; the bar replaces progress lines."""

    def emit(self, record: logging.LogRecord) -> None:
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
            return _CODES.sub("", line)
        level = record.levelname
        return line.replace(f"[{level}]", f"[{colorize(level, _COLOURS.get(level, '32'))}]", 1)


def format_items(metrics: Mapping[str, Any], formatter: Formatter, delimiter: str) -> list[str]:
    """Return the metrics as `name value`, formatted."""
    return [f"{name}{delimiter}{value}" for name, value in formatter(metrics).items()]


class LogProgressBar(Generic[T]):
    """An iterator with a log line now and then: position, speed, time left, metrics.

    A line tells of the finished steps, and of the time spent waiting for data if that is over a
    tenth; the last line is not lost, even if the loop breaks. Nothing is formatted between lines. A
    terminal shows a bar instead, refreshed twice a second at most.

    Args:
        logger: of the lines.
        iterable: to iterate.
        updates: number of lines; 0 for none.
        min_interval: least number of steps between two lines.
        time_per_it: show the time of a step rather than steps per second.
        total: number of steps, if the iterable has no length. If none is known, there is a line
            every 10 seconds.
        name: the start of each line.
        level: of the lines.
        delimiter: between the parts of a line.
        items_delimiter: between a metric's name and value.
        formatter: of the metrics.
        done: number of earlier steps.
        on_log: called with each line.
    """

    def __init__(
        self,
        logger: logging.Logger,
        iterable: Iterable[T],
        updates: int = 5,
        min_interval: int = 1,
        time_per_it: bool = False,
        total: int | None = None,
        name: str = "LogProgressBar",
        level: int = logging.INFO,
        delimiter: str = "|",
        items_delimiter: str = " ",
        formatter: Formatter | None = None,
        done: int = 0,
        on_log: Callable[[], None] | None = None,
    ) -> None:
        self._logger, self._level, self._name = logger, level, name
        self._iterable, self._done, self._on_log = iterable, done, on_log
        self._total = length(iterable) if total is None else total
        self._silent, self._time_per_it = updates <= 0, time_per_it
        self._every = max(1, min_interval, -(-(self._total or 0) // max(1, updates)))
        self._seconds = 0.0 if self._total is not None else 10.0
        self._delimiter, self._items_delimiter = f" {delimiter} ", items_delimiter
        self._formatter = formatter or Formatter()
        self._metrics: Mapping[str, Any] = {}
        self._will_log = False

    def __len__(self) -> int:
        if self._total is None:
            raise TypeError("the iterable has no length: give the progress bar total=")
        return self._total

    def __iter__(self) -> Iterator[T]:
        done, logged, waited = self._done, self._done, 0.0
        self._metrics = {}
        live = self._live_bar()
        asked = last = time.perf_counter()
        try:
            for item in self._iterable:
                given = time.perf_counter()
                waited += given - asked
                done += 1
                due = done % self._every == 0 and given - last >= self._seconds
                self._will_log = (due or done == self._total) and not self._silent
                yield item
                if self._will_log:
                    now = time.perf_counter()
                    self._log(done, done - logged, now - last, waited)
                    last, logged, waited = now, done, 0.0
                if live is not None and live.update():  # now and then it shows itself
                    live.set_postfix_str(self._delimiter.join(self._items()), refresh=False)
                asked = time.perf_counter()
        finally:
            if live is not None:
                live.close()
            if done > logged and not self._silent:
                self._log(done, done - logged, time.perf_counter() - last, waited)
            self._will_log = False

    def _live_bar(self) -> Any:
        """Return a bar if stderr is a terminal; else None."""
        if self._silent or not (sys.stderr.isatty() and distrib.is_rank_zero()):
            return None
        return tqdm(
            desc=self._name,
            total=self._total,
            initial=self._done,
            disable=not self._logger.isEnabledFor(self._level),
            leave=False,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def update(self, metrics: Mapping[str, Any] | None = None, /, **more: Any) -> bool:
        """Set the metrics to show; return whether a line will follow this step.

        Averages of `averager` are best given as they are: they are read only when a line is due.
        """
        self._metrics = more if metrics is None else {**metrics, **more} if more else metrics
        return self._will_log

    def _log(self, done: int, steps: int, seconds: float, waited: float) -> None:
        parts = [self._name, f"{done}/{self._total or '?'}", self._speed(seconds / steps)]
        if self._total and done < self._total:
            parts.append(f"ETA {tqdm.format_interval((self._total - done) * seconds / steps)}")
        if waited > 0.1 * seconds and seconds > 1:
            parts.append(f"waits for data {waited / seconds:.0%}")
        parts += self._items()
        # A terminal has the bar instead.
        self._logger.log(self._level, self._delimiter.join(parts), extra={"progress": True})
        if self._on_log is not None:
            self._on_log()

    def _items(self) -> list[str]:
        return format_items(self._metrics, self._formatter, self._items_delimiter)

    def _speed(self, seconds: float) -> str:
        if seconds <= 0:
            return "inf it/sec"
        if not self._time_per_it and seconds < 10:
            return f"{1 / seconds:.2f} it/sec"
        return f"{seconds:.2f} sec/it" if seconds >= 1 else f"{1000 * seconds:.1f} ms/it"
