"""Telling people how the run goes: log files, progress lines, and results to all trackers."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch

from . import distrib, process_group
from .formatter import Formatter
from .plain import plain
from .trackers import LocalFiles, TensorBoard, Tracker, WandB
from .trackers.base import check_audio, check_image
from .utils import UserError, length
from .xp import XP, get_xp

T = TypeVar("T")

_ANSI = re.compile(r"\x1b\[[0-9;]*m")
_COLOURS = {"WARNING": "33", "ERROR": "31", "CRITICAL": "31;1"}


# ------------------------------------------------------------------------------------ log lines


def bold(text: str) -> str:
    """Make text bold in a terminal; log files drop the codes."""
    return colorize(text, "1")


def colorize(text: str, code: str) -> str:
    """Wrap text in an ANSI colour code, such as `31` for red."""
    return f"\x1b[{code}m{text}\x1b[0m"


def plain_text(text: str) -> str:
    """Drop the codes of colours and the like."""
    return _ANSI.sub("", text)


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
    log, trouble = logging.getLogger(__name__), (kind, error, trace)
    if slip := isinstance(error, UserError):
        log.critical("%s", error)
    log.critical("The run failed", exc_info=trouble, extra={"file_only": True} if slip else None)
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


# ------------------------------------------------------------------------------------- progress


class LogProgressBar(Generic[T]):
    """Iterate, with a log line now and then: position, speed, time left, metrics.

    A line tells of the steps that are done, and how much of the time they waited for data if that
    is over a tenth; the last one is not lost, even if the loop breaks. Nothing is formatted between
    lines. Who sits at a terminal sees a bar instead, twice a second at most.

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
        """A bar for whoever sits at the terminal; elsewhere, none."""
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

        What `averager` returns is best given as it is: then it is only looked at for a line.
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


def format_items(metrics: Mapping[str, Any], formatter: Formatter, delimiter: str) -> list[str]:
    """The metrics as `name value`, formatted."""
    return [f"{name}{delimiter}{value}" for name, value in formatter(metrics).items()]


# -------------------------------------------------------------------------------------- results


class ResultLogger:
    """Sends results to the log and to all trackers; on ranks above zero, nowhere.

    A tracker that fails is reported once, and the run continues.

    Args:
        logger: where summaries go.
        level: of the summaries.
        delimiter: between the parts of a line.
        items_delimiter: between a metric's name and value.
        xp: the run; the one running under Dora by default.
    """

    def __init__(
        self,
        logger: logging.Logger,
        level: int = logging.INFO,
        delimiter: str = "|",
        items_delimiter: str = " ",
        xp: XP | None = None,
    ) -> None:
        self._logger = logger
        self._level = level
        self._delimiter = delimiter
        self._items_delimiter = items_delimiter
        self._xp = xp or get_xp()
        self._failed: set[Tracker] = set()
        self._points: list[tuple[str, dict[str, Any], int, int]] = []
        self._resumed: tuple[int, Collection[str], Mapping[str, int]] | None = None
        self.trackers: list[Tracker] = []
        self.add_tracker(LocalFiles(self._xp))

    def add_tracker(self, tracker: Tracker) -> None:
        """Send results to one more tracker."""
        if distrib.is_rank_zero():
            self.trackers.append(tracker)
            if self._resumed is not None:
                tracker.resume(*self._resumed)

    def resume(
        self, epoch: int, done: Collection[str] = (), steps: Mapping[str, int] | None = None
    ) -> None:
        """Let trackers forget what is about to be repeated; see `Tracker.resume`.

        If nobody calls it, the first value that is logged tells where the run resumes.
        """
        resumed = self._resumed = epoch, done, dict(steps or {})
        self._send(lambda tracker: tracker.resume(*resumed))

    def init_tensorboard(
        self, with_media_logging: bool = True, name: str | None = None, sub_dir: str | None = None
    ) -> None:
        """Send results to TensorBoard; see `trackers.TensorBoard`."""
        self.add_tracker(TensorBoard(self._xp, with_media_logging, name, sub_dir))

    def init_wandb(
        self,
        with_media_logging: bool = True,
        project: str | None = None,
        name: str | None = None,
        group: str | None = None,
    ) -> None:
        """Send results to Weights & Biases; see `trackers.WandB`."""
        self.add_tracker(WandB(self._xp, with_media_logging, project, name, group))

    def log_hyperparams(
        self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Log the config, and metrics to compare runs by."""
        values = plain(params, "hyperparams")
        self._send(lambda tracker: tracker.log_hyperparams(values, metrics or {}))

    def log_metrics(
        self,
        stage: str,
        metrics: Mapping[str, Any],
        step: int,
        step_name: str = "epoch",
        formatter: Formatter | None = None,
    ) -> None:
        """Log the metrics of a stage, and write them as one summary line."""
        self.flush()
        self._log_summary(stage, metrics, step, step_name, formatter)
        values = to_numbers(metrics)
        self._send(lambda tracker: tracker.log_metrics(stage, values, step), step)

    def log_step(self, stage: str, metrics: Mapping[str, Any], step: int, epoch: int) -> None:
        """Keep a point of the stage's curves by step: tensors stay on their device until `flush`.

        Only trackers of rank zero get it, so the metrics are those of this rank's data.
        """
        if self.trackers:
            copies = {
                n: v.detach().clone() if isinstance(v, torch.Tensor) else v
                for n, v in metrics.items()
            }
            self._points.append((stage, copies, step, epoch))

    def flush(self) -> None:
        """Send the points that wait, as each progress line and summary does."""
        points, self._points = self._points, []
        for point in points:
            self._send_point(*point)

    def _send_point(self, stage: str, metrics: Mapping[str, Any], step: int, epoch: int) -> None:
        values = to_numbers(metrics)
        if self._resumed is None:
            self.resume(epoch, steps={stage: step - 1})
        self._send(lambda tracker: tracker.log_step(stage, values, step, epoch))

    def log_audio(self, stage: str, key: str, audio: Any, sample_rate: int, step: int) -> None:
        """Log audio `[C, T]`, floats in -1..1."""
        audio = check_audio(audio)
        self._send(
            lambda tracker: tracker.log_audio(stage, key, audio, sample_rate, step),
            step,
            media=True,
        )

    def log_image(self, stage: str, key: str, image: Any, step: int) -> None:
        """Log an image `[C, H, W]`, floats in 0..1 or bytes."""
        image = check_image(image)
        self._send(lambda tracker: tracker.log_image(stage, key, image, step), step, media=True)

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        """Log a text."""
        if not isinstance(text, str):
            raise ValueError(f"log_text: a text must be a str, not a {type(text).__name__}")
        self._send(lambda tracker: tracker.log_text(stage, key, text, step), step, media=True)

    def get_log_progress_bar(
        self,
        stage: str,
        iterable: Iterable[T],
        updates: int = 5,
        total: int | None = None,
        step: int | None = None,
        step_name: str | None = None,
        formatter: Formatter | None = None,
        min_seconds: float = 0.0,
        done: int = 0,
    ) -> LogProgressBar[T]:
        """Return a progress bar for a stage."""
        name = stage.capitalize()
        if step is not None:
            name += f" {self._delimiter} {(step_name or 'step').capitalize()} {step}"
        return LogProgressBar(
            self._logger,
            iterable,
            updates=updates,
            total=total,
            name=name,
            level=self._level,
            delimiter=self._delimiter,
            items_delimiter=self._items_delimiter,
            formatter=formatter,
            min_seconds=min_seconds,
            done=done,
            on_log=self.flush,
        )

    def _log_summary(
        self,
        stage: str,
        metrics: Mapping[str, Any],
        step: int | None = None,
        step_name: str = "epoch",
        formatter: Formatter | None = None,
    ) -> None:
        parts = [f"{stage.capitalize()} Summary"]
        if step is not None:
            parts.append(f"{step_name.capitalize()} {step}")
        parts += format_items(metrics, formatter or Formatter(), self._items_delimiter)
        self._logger.log(self._level, bold(f" {self._delimiter} ".join(parts)))

    def _send(
        self, log: Callable[[Tracker], None], epoch: int | None = None, media: bool = False
    ) -> None:
        if epoch is not None and self._resumed is None:
            self.resume(epoch)
        for tracker in self.trackers:
            if media and not tracker.with_media_logging:
                continue
            try:
                log(tracker)
            except Exception as error:
                if tracker not in self._failed:
                    self._failed.add(tracker)
                    self._logger.error(
                        "%s failed; the run continues. Said only once: %s",
                        type(tracker).__name__,
                        error,
                        exc_info=not isinstance(error, ImportError),  # which says it all
                    )


def to_numbers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Convert metrics to plain numbers: tensors and NumPy values of one element too."""
    if taken := {"stage", "epoch", "step"} & metrics.keys():
        raise ValueError(f"a metric is called {', '.join(taken)}, as a column of metrics.jsonl is")
    values = plain(metrics, "metrics")
    return {n: v.tolist() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
