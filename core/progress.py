"""Progress: a loop's log lines, or its bar in a terminal."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from . import distrib
from .formatter import Formatter, format_items
from .utils import length

T = TypeVar("T")


class LogProgressBar(Generic[T]):
    """Iterate, with a log line now and then: position, speed, time left, metrics.

    A line tells of the steps that are done, and how much of the time they waited for data if that
    is over a tenth; the last one is not lost, even if the loop breaks. Nothing is formatted between
    lines. A terminal shows a bar instead, refreshed twice a second at most.

    Args:
        logger: where the lines go.
        iterable: what to iterate.
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
        min_seconds: least time between two lines.
        done: number of steps that were done before.
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
        min_seconds: float = 0.0,
        done: int = 0,
        on_log: Callable[[], None] | None = None,
    ) -> None:
        self._logger = logger
        self._iterable = iterable
        self._total = total if total is not None else length(iterable)
        if self._total is None:
            self._every, self._seconds = max(1, min_interval), max(10.0, min_seconds)
        else:
            self._every = max(1, min_interval, -(-self._total // max(1, updates)))
            self._seconds = min_seconds
        self._silent = updates <= 0
        self._time_per_it = time_per_it
        self._name = name
        self._level = level
        self._delimiter = f" {delimiter} "
        self._items_delimiter = items_delimiter
        self._formatter = formatter or Formatter()
        self._done = done
        self._on_log = on_log
        self._metrics: Mapping[str, Any] = {}
        self._will_log = False

    def __len__(self) -> int:
        if self._total is None:
            raise TypeError("the iterable of this progress bar has no length: give it total=")
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
        """A bar if stderr is a terminal; else None."""
        if self._silent or not (sys.stderr.isatty() and distrib.is_rank_zero()):
            return None
        from tqdm import tqdm

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
        """Give the metrics to show; return whether a line will follow this step.

        What `averager` returns is best given as it is: then it is read only when a line is due.
        """
        self._metrics = more if metrics is None else {**metrics, **more} if more else metrics
        return self._will_log

    def _log(self, done: int, steps: int, seconds: float, waited: float) -> None:
        parts = [self._name, f"{done}/{self._total or '?'}", self._speed(seconds / steps)]
        if self._total and done < self._total:
            parts.append(f"ETA {_clock((self._total - done) * seconds / steps)}")
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
            return "oo it/sec"
        if not self._time_per_it and seconds < 10:
            return f"{1 / seconds:.2f} it/sec"
        return f"{seconds:.2f} sec/it" if seconds >= 1 else f"{1000 * seconds:.1f} ms/it"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
