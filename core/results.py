"""Results: metrics and media, to the log and to all trackers."""

from __future__ import annotations

import json
import logging
from collections.abc import Collection, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, TypeVar

import torch

from . import distrib
from .checkpoint import Policy
from .log import LogProgressBar, bold, format_items
from .metrics import Averages, Formatter, Metrics, fetch, number
from .plain import to_plain
from .provenance import record_start
from .run import XP, get_xp, record_config, resume_command
from .trackers import LocalFiles, Tracker, check_audio, check_image, check_names
from .utils import UserError, flatten

T = TypeVar("T")
# Classes in `trackers/`, by the name of their file.
TRACKERS = {name.lower(): name for name in ("TensorBoard", "WandB", "Trackio", "MLflow", "Aim")}
MEDIA = "log_audio", "log_image", "log_text"
RESULTS = "log_metrics", "log_step", *MEDIA


@dataclass(eq=False)
class ResultLogger:
    """Results, sent to the log and to all trackers; on ranks above zero, nowhere.

    A failing tracker is reported once, and the run continues.

    Args:
        logger: of the summaries.
        level: of the summaries.
        delimiter: between the parts of a line.
        items_delimiter: between a metric's name and value.
        xp: the run; the one running under Dora by default.
    """

    logger: logging.Logger
    level: int = logging.INFO
    delimiter: str = "|"
    items_delimiter: str = " "
    xp: XP = field(default_factory=get_xp)

    def __post_init__(self) -> None:
        self._failed: set[Tracker] = set()
        self._points: list[tuple[str, dict[str, Any], int, int]] = []
        self._resumed: tuple[Any, ...] | None = None
        self.paused = False  # drops all results, on the way to where a run resumes
        self.trackers: list[Tracker] = []
        self.add_tracker(LocalFiles(self.xp))

    def add_tracker(self, tracker: Tracker) -> None:
        """Send results to another tracker."""
        if distrib.is_rank_zero():
            self.trackers.append(tracker)
            if self._resumed is not None:
                tracker.resume(*self._resumed)

    def init_tensorboard(self, with_media_logging: bool = True, **kwargs: Any) -> None:
        """Send results to TensorBoard; see `trackers.TensorBoard`."""
        from .trackers.tensorboard import TensorBoard

        self.add_tracker(TensorBoard(self.xp, with_media_logging, **kwargs))

    def init_wandb(self, with_media_logging: bool = True, **kwargs: Any) -> None:
        """Send results to Weights & Biases; see `trackers.WandB`."""
        from .trackers.wandb import WandB

        self.add_tracker(WandB(self.xp, with_media_logging, **kwargs))

    def resume(self, epoch: int, done: Collection[str], steps: Mapping[str, int] | None) -> None:
        """Make trackers forget the results about to be repeated: see `Tracker.resume`."""
        self._resumed = epoch, done, steps
        self._points = []  # of a loop that was interrupted
        self._send("resume", *self._resumed)

    def log_hyperparams(self, params: Metrics, metrics: Mapping[str, float] | None = None) -> None:
        """Log the config, and metrics to compare runs by."""
        self._send("log_hyperparams", to_plain(params, "hyperparams"), metrics or {})

    def log_metrics(
        self,
        stage: str,
        metrics: Metrics,
        step: int,
        step_name: str = "epoch",
        formatter: Formatter | None = None,
    ) -> None:
        """Log the metrics of a stage, and write a summary line."""
        self.flush()
        if not self.paused:
            self._log_summary(stage, metrics, step, step_name, formatter)
        self._send("log_metrics", stage, to_numbers(metrics), step)

    def log_step(self, stage: str, metrics: Metrics, step: int, epoch: int) -> None:
        """Keep a point of the stage's curves by step: tensors stay on their device until `flush`.

        Only rank zero has trackers, so the metrics are of its data.
        """
        if self.trackers:
            values = {name: number(name, value) for name, value in metrics.items()}
            self._points.append((stage, values, step, epoch))

    def flush(self) -> None:
        """Send the waiting points, as each progress line and summary does."""
        points, self._points = self._points, []
        fetch(values for _, values, _, _ in points)
        for point in points:
            self._send("log_step", *point)

    def log_audio(self, stage: str, key: str, audio: Any, sample_rate: int, step: int) -> None:
        """Log audio `[C, T]`, floats in -1..1."""
        audio = check_audio(audio)
        self._send("log_audio", *check_names(stage, key), audio, sample_rate, step)

    def log_image(self, stage: str, key: str, image: Any, step: int) -> None:
        """Log an image: `[C, H, W]`, `[H, W, C]` or `[H, W]`, floats in 0..1 or bytes.

        An image of Pillow or a figure of matplotlib will do as well.
        """
        self._send("log_image", *check_names(stage, key), check_image(image), step)

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        """Log a text."""
        if not isinstance(text, str):
            raise ValueError(f"log_text: a text must be a str, not a {type(text).__name__}")
        self._send("log_text", *check_names(stage, key), text, step)

    def get_log_progress_bar(
        self,
        stage: str,
        iterable: Iterable[T],
        step: int | None = None,
        step_name: str | None = None,
        **kwargs: Any,
    ) -> LogProgressBar[T]:
        """Return a progress bar for a stage; for `kwargs` see `LogProgressBar`."""
        kwargs |= {"delimiter": self.delimiter, "items_delimiter": self.items_delimiter}
        kwargs["name"] = self._line(stage.capitalize(), step, step_name or "step")
        return LogProgressBar(self.logger, iterable, level=self.level, on_log=self.flush, **kwargs)

    def _log_summary(
        self,
        stage: str,
        metrics: Metrics,
        step: int | None = None,
        step_name: str = "epoch",
        formatter: Formatter | None = None,
    ) -> None:
        items = format_items(metrics, formatter, self.items_delimiter)
        line = self._line(f"{stage.capitalize()} Summary", step, step_name, items)
        self.logger.log(self.level, bold(line))

    def _line(self, title: str, step: int | None, step_name: str, items: Iterable[str] = ()) -> str:
        place = [] if step is None else [f"{step_name.capitalize()} {step}"]
        return f" {self.delimiter} ".join([title, *place, *items])

    def _send(self, method: str, *args: Any) -> None:
        for tracker in () if self.paused and method in RESULTS else self.trackers:
            if method in MEDIA and not tracker.with_media_logging:
                continue
            try:
                getattr(tracker, method)(*args)
            except Exception as error:
                if tracker not in self._failed:
                    self._failed.add(tracker)
                    note = f"{type(tracker).__name__} failed; the run continues. Said once: {error}"
                    if isinstance(error, ModuleNotFoundError) and error.name in TRACKERS:
                        note += f": pip install {error.name}"
                    # An ImportError says all in its message.
                    self.logger.error(note, exc_info=not isinstance(error, ImportError))


def to_numbers(metrics: Metrics) -> dict[str, Any]:
    """Convert metrics to plain numbers: tensors and NumPy values of one element too."""
    values: dict[str, Any] = to_plain(metrics, "metrics")
    tensors = {n: v.squeeze().tolist() for n, v in values.items() if isinstance(v, torch.Tensor)}
    return values | tensors


class Logs:
    """The metrics and the logging of a solver; each method may be overridden."""

    averager = Averages

    def __init__(self, xp: XP) -> None:
        self.xp = xp
        self.logger = logging.getLogger(type(self).__name__)
        self.result_logger = ResultLogger(self.logger, xp=xp)
        self.history: list[dict[str, Any]] = []
        self._pending_metrics: dict[str, Any] = {}  # of this epoch, by stage
        self._current_stage: Any = None  # the running one, if any
        self._started_in = 0  # the epoch

    @property
    def epoch(self) -> int:
        """The running epoch, from 1: the number of commits, plus one."""
        return len(self.history) + 1

    @property
    def current_stage(self) -> str:
        """Name of the running stage; RuntimeError outside of one."""
        if self._current_stage is None:
            raise RuntimeError("no stage is running: write run_stage('train', self.train)")
        return str(self._current_stage.name)

    @property
    def formatter(self) -> Formatter:
        """The formatter of the running stage."""
        return self.get_formatter(self.current_stage)

    def get_formatter(self, stage_name: str) -> Formatter:
        """Return how the metrics of a stage are shown; override to your taste."""
        return Formatter()

    def init_tensorboard(self, *args: Any, **kwargs: Any) -> None:
        """Send results to TensorBoard; see `trackers.tensorboard.TensorBoard`."""
        self.result_logger.init_tensorboard(*args, **kwargs)

    def init_wandb(self, *args: Any, **kwargs: Any) -> None:
        """Send results to Weights & Biases; see `trackers.wandb.WandB`."""
        self.result_logger.init_wandb(*args, **kwargs)

    def init_trackers(self, names: Iterable[str], **options: Any) -> None:
        """Send results to trackers by name, as a config lists them.

        Args:
            names: `tensorboard`, `wandb`, `trackio`, `mlflow` or `aim`.
            options: of all but the first, such as `project`; see `trackers.WandB`.
        """
        for name in names:
            if name not in TRACKERS:
                raise UserError(f"no tracker is called {name!r}; there are {', '.join(TRACKERS)}")
            kind = getattr(import_module(f".trackers.{name}", __package__), TRACKERS[name])
            given = {} if name == "tensorboard" else options
            self.result_logger.add_tracker(kind(self.xp, **given))

    def log_progress(
        self, stage_name: str, iterable: Iterable[T], total: int | None = None, updates: int = 5
    ) -> LogProgressBar[T]:
        """Iterate with progress lines, and no more: a run is not stopped here.

        Args:
            stage_name: shown in the lines.
            iterable: usually a data loader.
            total: number of steps, if the iterable has no length.
            updates: number of lines.
        """
        options = {"updates": updates, "formatter": self.get_formatter(stage_name)}
        return self.result_logger.get_log_progress_bar(
            stage_name, iterable, self.epoch, "epoch", total=total, **options
        )

    def log_metrics(
        self, stage_name: str, metrics: Metrics, formatter: Formatter | None = None
    ) -> None:
        """Log metrics of this epoch; they are part of the history from the commit on."""
        numbers, formatter = to_numbers(metrics), formatter or self.get_formatter(stage_name)
        self._pending_metrics.setdefault(stage_name, {}).update(numbers)
        self.result_logger.log_metrics(stage_name, numbers, self.epoch, formatter=formatter)

    def log_hyperparams(self, params: Metrics, metrics: Mapping[str, float] | None = None) -> None:
        """Log the config, and metrics to compare runs by."""
        self.result_logger.log_hyperparams(params, metrics)

    def log_audio(self, stage_name: str, key: str, audio: Any, sample_rate: int) -> None:
        """Log audio `[C, T]`, floats in -1..1."""
        self.result_logger.log_audio(stage_name, key, audio, sample_rate, self.epoch)

    def log_image(self, stage_name: str, key: str, image: Any) -> None:
        """Log an image: `[C, H, W]`, `[H, W, C]` or `[H, W]`, floats in 0..1 or bytes.

        An image of Pillow or a figure of matplotlib will do as well.
        """
        self.result_logger.log_image(stage_name, key, image, self.epoch)

    def log_text(self, stage_name: str, key: str, text: str) -> None:
        """Log a text."""
        self.result_logger.log_text(stage_name, key, text, self.epoch)

    def replay_history(self) -> None:
        """Repeat the summaries of all committed epochs in the log."""
        for epoch, stages in enumerate(self.history, 1):
            for stage, metrics in stages.items():
                formatter = self.get_formatter(stage)
                self.result_logger._log_summary(stage, metrics, epoch, formatter=formatter)

    def _log_start(self, resumes: bool) -> None:
        """Log and record the start, the config, and how to resume."""
        record_start(self.xp)
        self._started_in = self.epoch
        if distrib.is_rank_zero():
            record_config(self.xp)
        self.log_hyperparams(self.xp.cfg)
        verb = "resumes" if resumes else "starts"
        if not resumes:
            tree = json.dumps(to_plain(self.xp.cfg, "the config"), indent=1)
            self.logger.info("Config of run %s:\n%s", self.xp.sig, tree)
        self.logger.info(f"Run {self.xp.sig} {verb} in epoch {self.epoch}: {self.xp.folder}")
        if command := resume_command(self.xp):
            self.logger.info("To resume it, whenever it stops: %s", command)

    def _log_end(self, policy: Policy) -> None:
        """Log the end of the run, and print it, for scripts; UserError without any epoch."""
        if not self.history:
            raise UserError(f"run {self.xp.sig} ends without a commit: is `epochs` at least 1?")
        epoch = policy.best_epoch(self.history)
        best = f", {policy.best} in epoch {epoch}" if epoch else ""
        where = f"epoch {len(self.history)}{best}: {self.xp.folder}"
        self.logger.info(f"Run {self.xp.sig} is complete after {where}")
        if self._started_in == self.epoch:
            cure = "raise `epochs`, or start anew with `dora run --clear`"
            self.logger.info(f"Nothing left to train: {cure}")
        end = {"sig": self.xp.sig, "folder": self.xp.folder, "epochs": len(self.history)}
        if epoch and (name := policy.best.partition(" ")[2]):
            end |= {"best_epoch": epoch, f"best.{name}": flatten(self.history[epoch - 1])[name]}
        for stages in self.history:
            end |= flatten(stages)  # the latest of each stage
        self.result_logger._send("finish")
        if distrib.is_rank_zero():
            with suppress(OSError, ValueError):  # stdout may be closed
                print("---", *(f"{k}: {v}" for k, v in end.items()), sep="\n", flush=True)
