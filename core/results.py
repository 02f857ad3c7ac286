"""Results: metrics and media, to the log and to all trackers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch

from . import distrib
from .ansi import bold
from .formatter import Formatter, format_items
from .plain import to_plain
from .progress import LogProgressBar
from .trackers import LocalFiles, TensorBoard, Tracker, WandB
from .trackers.base import check_audio, check_image
from .xp import XP, get_xp

T = TypeVar("T")


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
        resumed = self._resumed = epoch, tuple(done), dict(steps or {})
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
        values = to_plain(params, "hyperparams")
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
    values = to_plain(metrics, "metrics")
    return {n: v.tolist() if isinstance(v, torch.Tensor) else v for n, v in values.items()}
