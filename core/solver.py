"""The solver: epochs are made of stages and end with a commit, from which a run can go on.

Subclass `BaseSolver`, register what is state, write `run()`. Everything here may be overridden.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from . import checkpoint, distrib, loader
from .formatter import Formatter
from .logging import LogProgressBar, ResultLogger, to_numbers
from .state import AttributeWrapper, RNGState, StateDict, StateManager
from .xp import XP, FolderXP, get_xp

T = TypeVar("T")


class BaseSolver:
    """Takes care of state, checkpoints, history and logging; the training is yours.

    Args:
        xp: the run; the one running under Dora by default. A path makes a run of a plain folder.
    """

    def __init__(self, xp: XP | str | Path | None = None) -> None:
        self.xp: XP = FolderXP(Path(xp)) if isinstance(xp, (str, Path)) else xp or get_xp()
        self.logger = logging.getLogger(type(self).__name__)
        self.result_logger = ResultLogger(self.logger, xp=self.xp)
        self.history: list[dict[str, Any]] = []
        self.stateful = StateManager()
        self.register_stateful("history")
        self.register_stateful("xp.cfg", "xp.sig", write_only=True)
        self.stateful.register("rng", RNGState())
        self._current_stage: str | None = None
        self._start_epoch()

    # ----------------------------------------------------------------------------------- the run

    def run(self) -> None:
        """Train: to be written by you."""
        raise NotImplementedError(f"{type(self).__name__} has no run()")

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.xp.folder

    @property
    def checkpoint_path(self) -> Path:
        """File of the latest checkpoint."""
        return self.folder / "checkpoint.th"

    @property
    def epoch(self) -> int:
        """The epoch that is running, from 1; that is one more than were committed."""
        return len(self.history) + 1

    def commit(self, save_checkpoint: bool = True) -> None:
        """End the epoch: save the state, then publish the history; all ranks must call it.

        If saving fails the epoch is not ended, and nothing is published.

        Args:
            save_checkpoint: else a run that stops before the next checkpoint repeats this epoch.
        """
        self.history.append(self._pending_metrics)
        try:
            if save_checkpoint:
                state = self.state_dict()
                if distrib.is_rank_zero():
                    checkpoint.save(state, self.checkpoint_path)
        except BaseException:
            self.history.pop()
            raise
        self._publish_history()
        self._start_epoch()

    def restore(self, strict: bool = True, read_only: bool = False) -> bool:
        """Go on from the latest checkpoint; return whether there is one.

        Args:
            strict: refuse a checkpoint that lacks a registered state, or has another.
            read_only: to look at a run rather than go on with it: the generators of this process
                and the files of the run stay as they are.
        """
        state = checkpoint.load(self.checkpoint_path)
        if state is None:
            return False
        if read_only:
            state["rng"] = self.stateful.sources["rng"].state_dict()
        self.load_state_dict(state, strict)
        if not read_only:
            self._publish_history()
            self._start_epoch()
            self.replay_history()
        return True

    def replay_history(self) -> None:
        """Repeat the summaries of all committed epochs in the log."""
        for epoch, stages in enumerate(self.history, 1):
            for stage, metrics in stages.items():
                self.result_logger._log_summary(
                    stage, metrics, step=epoch, formatter=self.get_formatter(stage)
                )

    def _publish_history(self) -> None:
        if distrib.is_rank_zero():
            self.xp.link.update_history(self.history)

    def _start_epoch(self) -> None:
        self._pending_metrics: dict[str, Any] = {}

    # ------------------------------------------------------------------------------------- state

    def register_stateful(self, *names: str, write_only: bool = False) -> None:
        """Make attributes part of the state that is saved and restored.

        Modules, optimizers and whatever else has a `state_dict`, lists, dicts, and plain values.

        Args:
            names: of attributes, dotted ones too (`"model.encoder"`).
            write_only: save, for people to read, but never restore.
        """
        for name in names:
            self.stateful.register(name, AttributeWrapper(self, name), write_only)

    def state_dict(self) -> StateDict:
        """All that is registered; all ranks must call it."""
        return self.stateful.state_dict()

    def load_state_dict(self, state: StateDict, strict: bool = True) -> None:
        """Take back what `state_dict` gave."""
        self.stateful.load_state_dict(state, strict)

    # ------------------------------------------------------------------------------------ stages

    @property
    def current_stage(self) -> str:
        """Name of the stage that is running; RuntimeError outside of one."""
        if self._current_stage is None:
            raise RuntimeError("no stage is running: current_stage is for use inside run_stage")
        return self._current_stage

    def run_stage(
        self, stage_name: str, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Run one stage of the epoch, such as training, and log the metrics that it returns.

        Args:
            stage_name: under which metrics are logged.
            method: called with the remaining arguments; returns a dict of metrics, or None.

        Returns:
            The metrics as plain numbers, with the `duration` in seconds.
        """
        if self._current_stage is not None:
            raise RuntimeError(
                f"stage {stage_name!r} was started inside of stage {self._current_stage!r}; "
                "stages come one after another"
            )
        self._current_stage = stage_name
        loader.set_epoch(self.epoch)
        begin = time.monotonic()
        try:
            returned = method(*args, **kwargs)
            metrics = to_numbers({**(returned or {}), "duration": time.monotonic() - begin})
            self.log_metrics(stage_name, metrics)
        finally:
            self._current_stage = None
        return metrics

    def get_formatter(self, stage_name: str) -> Formatter:
        """How the metrics of a stage are shown; override to your taste."""
        return Formatter()

    @property
    def formatter(self) -> Formatter:
        """The formatter of the stage that is running."""
        return self.get_formatter(self.current_stage)

    # ----------------------------------------------------------------------------------- logging

    def init_tensorboard(
        self, with_media_logging: bool = True, name: str | None = None, sub_dir: str | None = None
    ) -> None:
        """Send results to TensorBoard; see `trackers.TensorBoard`."""
        self.result_logger.init_tensorboard(with_media_logging, name, sub_dir)

    def init_wandb(
        self,
        with_media_logging: bool = True,
        project: str | None = None,
        name: str | None = None,
        group: str | None = None,
    ) -> None:
        """Send results to Weights & Biases; see `trackers.WandB`."""
        self.result_logger.init_wandb(with_media_logging, project, name, group)

    def init_trackers(self, names: Iterable[str], project: str | None = None) -> None:
        """Send results to trackers by name, as a config lists them: `tensorboard`, `wandb`."""
        known: dict[str, Callable[[], None]] = {
            "tensorboard": self.init_tensorboard,
            "wandb": lambda: self.init_wandb(project=project),
        }
        for name in names:
            if name not in known:
                raise ValueError(f"no tracker is called {name!r}; there are {', '.join(known)}")
            known[name]()

    def log_progress(
        self, stage_name: str, iterable: Iterable[T], total: int | None = None, updates: int = 5
    ) -> LogProgressBar[T]:
        """Iterate with progress lines.

        Args:
            stage_name: shown in the lines.
            iterable: usually a data loader.
            total: number of steps, if the iterable has no length.
            updates: number of lines.
        """
        return self.result_logger.get_log_progress_bar(
            stage_name,
            iterable,
            updates=updates,
            total=total,
            step=self.epoch,
            step_name="epoch",
            formatter=self.get_formatter(stage_name),
        )

    def log_metrics(
        self, stage_name: str, metrics: Mapping[str, Any], formatter: Formatter | None = None
    ) -> None:
        """Log metrics of this epoch; they are part of the history from the commit on."""
        numbers = to_numbers(metrics)
        self._pending_metrics.setdefault(stage_name, {}).update(numbers)
        self.result_logger.log_metrics(
            stage_name, numbers, self.epoch, formatter=formatter or self.get_formatter(stage_name)
        )

    def log_hyperparams(
        self, params: Mapping[str, Any], metrics: Mapping[str, float] | None = None
    ) -> None:
        """Log the config, and metrics to compare runs by."""
        self.result_logger.log_hyperparams(params, metrics)

    def log_audio(self, stage_name: str, key: str, audio: Any, sample_rate: int) -> None:
        """Log audio `[C, T]`, floats in -1..1."""
        self.result_logger.log_audio(stage_name, key, audio, sample_rate, self.epoch)

    def log_image(self, stage_name: str, key: str, image: Any) -> None:
        """Log an image `[C, H, W]`, floats in 0..1 or bytes."""
        self.result_logger.log_image(stage_name, key, image, self.epoch)

    def log_text(self, stage_name: str, key: str, text: str) -> None:
        """Log a text."""
        self.result_logger.log_text(stage_name, key, text, self.epoch)
