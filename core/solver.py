"""The solver: an epoch consists of stages and ends with a commit, from which a run can resume.

Subclass `BaseSolver`, register what is state, write `run()`. Everything here may be overridden.
"""

from __future__ import annotations

import functools
import logging
import os
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from . import checkpoint, distrib, loader, preemption
from .background import Writer
from .formatter import Formatter
from .history import HistoryFile
from .lock import RunLock
from .midway import Loop, Midway
from .plain import Records, to_plain
from .progress import LogProgressBar
from .results import ResultLogger, to_numbers
from .rng import RNGState
from .state import AttributeWrapper, StateDict, StateManager, unregistered
from .utils import Averages, UserError
from .weights import summary, versions
from .xp import XP, FolderXP, Preempted, config_changes, get_xp, resume_command

T = TypeVar("T")

ALLOW_CONFIG_CHANGE = "ALLOW_CONFIG_CHANGE"  # name of an environment variable


class BaseSolver:
    """Takes care of state, checkpoints, history and logging; the training is yours.

    Args:
        xp: the run; the one running under Dora by default. A path makes a run of a plain folder.
    """

    checkpoints = checkpoint.Policy()

    def __init_subclass__(cls) -> None:
        """Wrap the `run` of a subclass; see `_managed`."""
        if "run" in vars(cls):
            cls.run = _managed(cls.run)  # type: ignore[method-assign]

    def __init__(self, xp: XP | str | Path | None = None) -> None:
        self.xp: XP = FolderXP(Path(xp)) if isinstance(xp, (str, Path)) else xp or get_xp()
        self.logger = logging.getLogger(type(self).__name__)
        self.result_logger = ResultLogger(self.logger, xp=self.xp)
        self.history: list[dict[str, Any]] = Records()
        self._history_file = HistoryFile(self.xp.link)
        self.steps: dict[str, int] = {}
        self.stateful = StateManager()
        self.register_stateful("history", "steps")
        self.register_stateful("xp.cfg", "xp.sig", write_only=True)
        self.stateful.register("rng", RNGState())
        self._midway = Midway()
        self.stateful.register("midway", self._midway)
        self._writer = Writer()
        self._lock = RunLock(self.xp)
        self._restored = self._read_only = False
        self._stopping = False  # all ranks have agreed on that, in a commit
        self._midway_state: StateDict | None = None  # until the interrupted stage is called again
        self._current_stage: str | None = None
        self._start_epoch()

    # ----------------------------------------------------------------------------------- the run

    def run(self) -> None:
        """Train: to be written by you."""
        raise NotImplementedError(f"{type(self).__name__} has no run(): write it, to train")

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

        Both happen in the background, unless the policy in `self.checkpoints` says otherwise. If
        they fail, the next commit raises on all ranks, or else the end of `run`. A run that was
        asked to stop since its last step of `log_progress` stops where the next stage would start.

        Args:
            save_checkpoint: else a run that stops before the next checkpoint repeats this epoch.
        """
        self._refuse_if_read_only()
        self.wait()
        if not self.history and (names := unregistered(self, self.stateful)):
            self.logger.warning(
                "Not registered as state, so not saved: %s; see register_stateful", ", ".join(names)
            )
        self._stopping = preemption.should_stop((self.epoch,), preemption.LAST)
        self.history.append(self._pending_metrics)
        self._midway.start_epoch(self.epoch)
        try:
            if save_checkpoint or self._stopping:
                self._save(self.state_dict())
                if not self.checkpoints.background:
                    self.wait()
            else:
                self._publish(self.history)
        except BaseException:
            self.history.pop()
            raise
        self._start_epoch()

    def wait(self) -> None:
        """Wait until all that was committed is on disk; an error in that raises on all ranks."""
        with distrib.raised_everywhere():
            self._writer.wait()

    def _save(self, state: StateDict) -> None:
        if not distrib.is_rank_zero():
            return
        path, history = self.checkpoint_path, [*self.history]

        def write(state: StateDict) -> None:
            checkpoint.save(state, path, history, self.checkpoints)
            self._publish(history)

        self._writer.submit(state, write)

    def _save_midway(self) -> None:
        """Save what was done of this epoch; all ranks stopped after the same step."""
        self.result_logger.flush()
        self.wait()
        if not self._midway.can_resume:
            self.logger.warning(
                "Stopped by %s in epoch %d, which will be repeated: %s has no self.averager()",
                preemption.stop_signal(),
                self.epoch,
                self.current_stage,
            )
            return
        state = self.state_dict()
        state["midway"]["pending"] = to_plain(self._pending_metrics)
        with distrib.raised_everywhere():
            if distrib.is_rank_zero():
                checkpoint.save_midway(state, self.checkpoint_path)
        step = state["midway"]["stage"]["step"]
        self._log_stop(f"step {step} of {self.current_stage} in epoch {self.epoch}")

    def _stop_after_commit(self) -> NoReturn:
        self.wait()
        self._log_stop(f"epoch {self.epoch - 1}")
        raise Preempted(preemption.stop_signal())

    def _log_stop(self, where: str) -> None:
        self.logger.warning(
            "Stopped by %s after %s: saved. The same command resumes there",
            preemption.stop_signal(),
            where,
        )

    def restore(self, strict: bool = True, read_only: bool = False) -> bool:
        """Resume from the latest checkpoint; return whether there is one. All ranks must call it.

        Args:
            strict: refuse a checkpoint with missing, unexpected or wrongly shaped entries, or one
                of a config with other values; otherwise warn, and load the rest.
            read_only: to inspect a run rather than resume it: the generators of this process
                and the files of the run stay as they are, whatever stage is then run: results go
                to the log only, and a commit is refused. The config may differ.
        """
        if not read_only:
            self._refuse_if_read_only()
        state = checkpoint.load(self.checkpoint_path, read_only)
        if state is None:
            if not read_only:
                self._warn_of_later_epochs()
            return False
        if read_only:
            state["rng"] = self.stateful.sources["rng"].state_dict()
            self.result_logger.trackers.clear()
            self._read_only = True
        else:
            self._check_config(state.get("xp.cfg") or {}, strict)
        self.load_state_dict(state, strict)
        if not read_only:
            self._warn_of_later_epochs()
            self._publish(self.history)
            self._start_epoch()
            self._midway_state = deepcopy(state) if self._midway.is_within_stage else None
            self._pending_metrics.update(state.get("midway", {}).get("pending", {}))
            self.result_logger.resume(self.epoch, self._pending_metrics, self.steps)
            self.replay_history()
            self._restored = True
        return True

    def _warn_of_later_epochs(self) -> None:
        """Tell which epochs have metrics but no checkpoint."""
        if (later := len(self._history_file.read())) >= self.epoch:
            lost = f"epochs {self.epoch} to {later}" if later > self.epoch else f"epoch {later}"
            self.logger.warning("No checkpoint of %s: training that again", lost)

    def _refuse_if_read_only(self) -> None:
        if self._read_only:
            raise RuntimeError(
                f"run {self.xp.sig} was restored to be looked at: to train on, start another run "
                "that continues from it"
            )

    def _check_config(self, saved: dict[str, Any], strict: bool) -> None:
        """Refuse to resume with other values than the run began with, such as an edited default.

        A key that is new in the config only gives a warning: nothing says that it changes anything.
        """
        changes = config_changes(self.xp, saved)
        refused = [change for change, is_another_run in changes.items() if is_another_run]
        if refused and strict and not os.environ.get(ALLOW_CONFIG_CHANGE):
            raise UserError(
                f"the config of run {self.xp.sig} has changed since its last checkpoint: "
                f"{'; '.join(refused)}. Undo that; or start anew (`dora run --clear`); or resume "
                f"all the same by setting {ALLOW_CONFIG_CHANGE}=1 in the environment: what is "
                "state, such as the learning rate in an optimizer, stays as it was"
            )
        for change in changes:
            self.logger.warning("The config has changed: %s", change)

    def continue_from(
        self,
        source: str | Path,
        names: Collection[str] = ("model",),
        version: str = "latest",
        strict: bool = True,
    ) -> None:
        """Take the weights, or more, of another run, to start this one with.

        An `EMA` of them keeps its averages: call its `reset` too.

        Args:
            source: signature of the run, its folder, or a checkpoint file.
            names: of the states to take.
            version: `latest`; or those that a state called `best` or `ema` keeps of them.
            strict: refuse missing, unexpected or wrongly shaped entries; else warn and skip them.
        """
        tried = [Path(source), Path(source) / "checkpoint.th"]
        tried.append(self.folder.parent / source / "checkpoint.th")
        path = next((p for p in tried if p.is_file()), None)
        if path is None:
            raise UserError(
                f"continue from {source}: there is no {' nor '.join(map(str, tried))}; give the "
                "signature or the folder of a run, or a checkpoint file"
            )
        kept = versions(checkpoint.load(path, read_only=True) or {})
        found = kept.get(version, {})
        if absent := [name for name in names if name not in found]:
            there = ", ".join(f"{v} ({', '.join(states)})" for v, states in kept.items() if states)
            raise UserError(
                f"continue from {path}: no {version} {', '.join(absent)} in it, which has {there}"
            )
        try:
            self.stateful.subset(names).load_state_dict({n: found[n] for n in names}, strict)
        except UserError as error:
            raise UserError(f"continue from {path}: {error}") from None
        self.logger.info("Continue from %s of %s: %s", version, path, ", ".join(names))

    def replay_history(self) -> None:
        """Repeat the summaries of all committed epochs in the log."""
        for epoch, stages in enumerate(self.history, 1):
            for stage, metrics in stages.items():
                self.result_logger._log_summary(
                    stage, metrics, step=epoch, formatter=self.get_formatter(stage)
                )

    def _publish(self, history: list[dict[str, Any]]) -> None:
        if distrib.is_rank_zero():
            self._history_file.write(history)

    def _start_epoch(self) -> None:
        self._pending_metrics: dict[str, Any] = {}
        self._midway_state = None

    def log_start(self) -> None:
        """Log what starts: config, modules, folder, how to resume. All ranks must call it.

        The config of a run that resumes is in its log already.
        """
        from omegaconf import OmegaConf

        if not self._restored:
            tree = OmegaConf.to_yaml(to_plain(self.xp.cfg, "the config"))
            self.logger.info("Config of run %s:\n%s", self.xp.sig, tree.rstrip())
        for name, source in self.stateful.sources.items():
            if isinstance(source, AttributeWrapper) and (about := summary(source.value)):
                self.logger.info("%s: %s", name, about)
        verb = "resumes" if self._restored else "starts"
        self.logger.info("Run %s %s in epoch %d: %s", self.xp.sig, verb, self.epoch, self.folder)
        if command := resume_command(self.xp, distrib.is_distributed()):
            self.logger.info("To resume it, whenever it stops: %s", command)

    def log_end(self) -> None:
        """Log that the run is complete, and its best epoch if that is kept. All ranks call it.

        UserError if no epoch was committed.
        """
        self.wait()
        if not self.history:
            raise UserError(
                f"run {self.xp.sig} ends without an epoch: is `epochs` at least 1, and does each "
                "end with self.commit()?"
            )
        best = ""
        if epoch := self.checkpoints.best_epoch(range(1, self.epoch), self.history):
            stage, _, metric = self.checkpoints.best.partition(".")
            shown = self.get_formatter(stage)({metric: self.history[epoch - 1][stage][metric]})
            best = "".join(f", best {stage}.{n} {v} in epoch {epoch}" for n, v in shown.items())
        done = self.epoch - 1
        self.logger.info(
            "Run %s is complete after epoch %d%s: %s", self.xp.sig, done, best, self.folder
        )

    # ------------------------------------------------------------------------------------- state

    def register_stateful(self, *names: str, write_only: bool = False) -> None:
        """Make attributes part of the state that is saved and restored.

        Modules, optimizers and whatever else has a `state_dict`, lists, dicts, and plain values.

        Args:
            names: of attributes, dotted ones too (`"model.encoder"`).
            write_only: save, for people to read, but never restore.
        """
        if not hasattr(self, "stateful"):
            kind = type(self).__name__
            raise RuntimeError(f"{kind}.__init__ must call super().__init__(xp) before all else")
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
            raise RuntimeError(
                "no stage is running: current_stage is for use inside run_stage, which is given "
                "the method, not its result: run_stage('train', self.train)"
            )
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
        if self._stopping:
            self._stop_after_commit()
        if (known := self._midway.done_before(stage_name)) is not None:
            return known
        if self._midway.is_done(stage_name):
            self.logger.warning(
                "Stage %s runs again in epoch %d: is self.commit() missing?", stage_name, self.epoch
            )
        self._current_stage = stage_name
        loader.set_epoch(self.epoch, self._midway.place)
        try:
            begin = self._start_stage()
            metrics = self._check_metrics(method(*args, **kwargs))
            metrics["duration"] = time.monotonic() - begin
            self.log_metrics(stage_name, metrics)
            self._midway.stage_done(stage_name, metrics)
        except Preempted:
            self._save_midway()
            raise
        finally:
            self._current_stage = None
            self._midway.leave_stage()
        return metrics

    def _check_metrics(self, returned: Any) -> dict[str, Any]:
        """What the stage returned, as numbers."""
        stage = self.current_stage
        if not isinstance(returned, Mapping | None):
            kind = type(returned).__name__
            raise TypeError(f"stage {stage!r} returned a {kind}, not a dict of metrics")
        if returned is None and self._midway.can_resume:
            self.logger.warning(
                "Stage %s averaged metrics but returned none: is a return missing?", stage
            )
        if returned and "duration" in returned:
            raise ValueError(f"stage {stage!r}: `duration` is what run_stage measures")
        return to_numbers(returned or {})

    def _start_stage(self) -> float:
        """Begin the stage, or resume it with the state as it was; return the time it began at.

        Between the stages that were skipped, the run has repeated the rest of the epoch, such as
        the step of a schedule.
        """
        state, self._midway_state = self._midway_state, None
        if state is not None:
            others = self.stateful.sources.keys() & state.keys() - {"midway"}
            self.stateful.subset(others).load_state_dict({n: state[n] for n in others}, False)
        return self._midway.start_stage()

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
                raise UserError(f"no tracker is called {name!r}; there are {', '.join(known)}")
            known[name]()

    def averager(self, beta: float = 1.0) -> Averages:
        """Like `utils.averager`, and part of the state: a stage that is interrupted keeps it."""
        return self._midway.averager(beta)

    def check_finite(self, averages: Mapping[str, float], *names: str) -> None:
        """Stop before a commit if a metric was NaN or infinite in any step of the stage.

        Args:
            averages: of the stage, as `averager` gives.
            names: of metrics, such as `loss`.

        Raises:
            UserError: that names the metric, on the ranks where it was.
            ValueError: if the steps had other metrics, but none of that name.
        """
        for name in names:
            if averages and not averages.keys() & {name, f"{name}.nonfinite"}:
                raise ValueError(f"no metric {name} to check: there are {', '.join(averages)}")
            if steps := averages.get(f"{name}.nonfinite"):
                raise UserError(
                    f"{self.current_stage}, epoch {self.epoch}: on rank {distrib.rank()}, {name} "
                    f"was NaN or infinite in {steps:.0f} of the steps; the last commit is safe. "
                    "Try a lower learning rate, or a limit on the gradient's norm"
                )

    def log_progress(
        self,
        stage_name: str,
        iterable: Iterable[T],
        total: int | None = None,
        updates: int = 5,
        min_seconds: float = 0.0,
    ) -> LogProgressBar[T]:
        """Iterate with progress lines.

        Asked to stop, by SIGTERM, SIGUSR1, SIGUSR2 or Slurm, the run does so between two steps, and
        resumes there when it is started again: what one step leaves to the next must be state, or
        in averages of `self.averager()`. In a stage without such averages, it repeats the epoch.

        Args:
            stage_name: shown in the lines.
            iterable: usually a data loader.
            total: number of steps, if the iterable has no length.
            updates: number of lines.
            min_seconds: least time between two lines.
        """
        return self.result_logger.get_log_progress_bar(
            stage_name,
            Loop(self._midway, iterable, self._current_stage or stage_name, self.steps),
            updates=updates,
            total=total,
            done=self._midway.steps_before(),
            step=self.epoch,
            step_name="epoch",
            formatter=self.get_formatter(stage_name),
            min_seconds=min_seconds,
        )

    def log_step(self, metrics: Mapping[str, Any], every: int = 1) -> None:
        """Log the metrics of one step: points of the running stage's curves by step.

        For use in a loop over `log_progress`, which counts the steps in `self.steps`. Tensors are
        read, and reach the trackers, when the next line is logged; they are those of rank zero.

        Args:
            metrics: numbers, or tensors of one element.
            every: log each n-th step only; 0 logs none.
        """
        stage = self.current_stage
        step = self.steps.get(stage, 0)
        if every and step % every == 0:
            self.result_logger.log_step(stage, metrics, step, self.epoch)

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


def _managed(run: Callable[..., T]) -> Callable[..., T]:
    """Let `run` be the only one, take signals as requests to stop, and end with all on disk."""

    @functools.wraps(run)
    def wrapped(self: BaseSolver, *args: Any, **kwargs: Any) -> T:
        try:
            with self._lock.held(), preemption.listening():
                result = run(self, *args, **kwargs)
                self.wait()  # within it: a rank that is asked to stop now asks the others
        except BaseException:
            try:
                self._writer.wait()  # not `wait`: other ranks may be elsewhere
            except Exception as error:
                self.logger.error("%s", error)
            raise
        later = self._pending_metrics
        # A stage of another name, such as a test after the training, needs no commit.
        if later and (not self.history or later.keys() & self.history[-1].keys()):
            self.logger.warning(
                "Stages after the last commit are in no history and no checkpoint: %s",
                ", ".join(later),
            )
        return result

    return wrapped
