"""The solver: an epoch consists of stages and ends with a commit, from which a run can resume.

Subclass `BaseSolver`, register the state, write `run()`. Everything here may be overridden.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from . import checkpoint, distrib, versions
from .checkpoint import Cursor, Policy
from .modules import lending, lent
from .plain import from_plain, to_plain
from .replicas import add_own, shared_metrics
from .results import Logs
from .rng import get_rng_state, position, set_rng_state
from .run import XP, FolderXP, check_config, get_xp, locked, read_history, write_history
from .state import AttributeWrapper, StateDict, StateManager
from .steps import Epoch, Stage, Steps, T, share
from .stop import Requests, Stopped
from .utils import Accumulation, UserError
from .writer import Writer


class BaseSolver(Logs):
    """The base of all solvers: state, checkpoints, history and logging; the training is yours.

    Args:
        xp: the run; the one running under Dora by default. A path makes a run of a plain folder.
        checkpoint: a `Policy`, or a config with its keys.
    """

    _current_stage: Stage | None

    def __init__(
        self,
        xp: XP | str | Path | None = None,
        checkpoint: Policy | Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(FolderXP(Path(xp)) if isinstance(xp, (str, Path)) else xp or get_xp())
        self.stateful = StateManager()
        self.register_stateful("history")
        self.register_stateful("xp.cfg", "xp.sig", write_only=True)
        self.__policy = checkpoint if isinstance(checkpoint, Policy) else Policy(**checkpoint or {})
        self.__writer = Writer(self.folder if self.__policy.sharded else None)
        self.__requests, self.__epoch = Requests(), Epoch()
        self.__read_only = self.__trained = False
        # A commit that is overridden may write files of its own: none is written within an epoch
        # before one has come to the commit of this class.
        self.__commits_here = type(self).commit is BaseSolver.commit

    def __setattr__(self, name: str, value: Any) -> None:
        if callable(getattr(BaseSolver, name, None)) and not name.startswith("__"):
            raise AttributeError(f"self.{name} would hide a method of BaseSolver: rename it")
        super().__setattr__(name, value)

    # ----------------------------------------------------------------------------------- the run

    def run(self) -> None:
        """Train in epochs of `train` and `valid`, until `cfg.epochs` of them are committed.

        The config is `self.cfg`, else the run's. Override for other stages, or another order.
        """
        epochs = getattr(self, "cfg", self.xp.cfg).epochs
        with self.running():
            for _ in range(self.epoch, epochs + 1):
                for name in ("train", "valid"):
                    self.run_stage(name, getattr(self, name))
                self.commit()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Restore the run and train it in the body; at the end, wait until all is on disk.

        In the body no other process trains this run, and SIGTERM, SIGUSR1, SIGUSR2 and the clock
        ask for saves. All ranks must take part.

        Raises:
            UserError: if another process trains the run, or if no epoch was committed.
            Stopped: after a request to stop, when all is saved.
        """
        if self.__read_only:
            raise UserError(f"run {self.xp.sig} was restored with read_only=True: no training")
        with locked(self.xp):
            if (found := self.restore()) is False and self.__trained:
                raise UserError("nothing was saved, and this solver has trained: make a new one")
            self.__trained = True
            self.__requests = Requests(self.__policy.minutes, self.__writer.is_busy)
            try:
                # Within a stage of another run, that run takes the requests to stop.
                with nullcontext() if position.get().stage else self.__requests.listening():
                    self._log_start(bool(found or self.history))
                    yield
                    self.__wait()
                    self._log_end(self.__policy)
            finally:
                self.__writer.settle()  # without the other ranks, which may be elsewhere
                self.__requests = Requests()

    @property
    def folder(self) -> Path:
        """Folder of the run."""
        return self.xp.folder

    @property
    def checkpoint_path(self) -> Path:
        """File of the latest checkpoint."""
        return self.folder / checkpoint.FILE

    def commit(self, save_checkpoint: bool = True) -> None:
        """End the epoch: save the state, then publish the history; all ranks must take part.

        Both happen in the background, unless `checkpoint.background` says otherwise. If they fail,
        the next commit raises on all ranks, or else the end of `running()`.

        Args:
            save_checkpoint: else a run that stops before the next checkpoint repeats this epoch.
        """
        if self.__read_only:
            raise RuntimeError(f"run {self.xp.sig} was restored with read_only=True: no commits")
        self.__commits_here = True
        self.__wait()
        self.__requests.agree()
        if not self.stateful.is_complete():
            self.logger.warning("Gradients are pending at a commit, and are not saved")
        self._pending_metrics = shared_metrics(self._pending_metrics)
        self.history.append(self._pending_metrics)
        try:
            json.dumps(self.history[-1])  # raises before a checkpoint holds what JSON can't
            if save_checkpoint or self.__requests.agreed:
                self.__save()
                if not self.__policy.background:
                    self.__wait()
            elif distrib.is_rank_zero():
                write_history(self.xp.link, self.history)
        except BaseException:
            self.history.pop()
            raise
        self._start_epoch()

    def __wait(self) -> None:
        """Wait until all saves are on disk; their error raises on all ranks."""
        with distrib.raised_everywhere():
            self.__writer.wait()

    def __save(self, stage: Stage | None = None) -> None:
        """Save the state and where the run is; all ranks must be there."""
        if lending.get():
            raise RuntimeError("weights are lent: leave `swapped()` or `weights()` before a save")
        self.__requests.renew()  # before the state is gathered, which may take long
        with self.stateful.keeping_shards():
            state = self.state_dict()
        history = [*self.history]
        past = {"history": state.pop("history", history)}  # may be long, and is a copy already
        mine = {"rng": get_rng_state()} | (stage.rank_state() if stage else {})
        ranks = distrib.gather_objects(to_plain(mine))
        add_own(ranks, state, self.stateful.values(nn.Module))
        state |= {"rng": {"ranks": [theirs.pop("rng") for theirs in ranks]}}
        cursor = Cursor(counts=self.__epoch.counts, ranks=ranks)
        if stage is not None:
            cursor = stage.cursor(ranks, deepcopy(self._pending_metrics))
        self.result_logger.flush()

        def write(state: StateDict) -> None:
            checkpoint.save(state | past, self.checkpoint_path, history, self.__policy, cursor)
            write_history(self.xp.link, history)

        self.__writer.submit(state, write)

    def restore(
        self, strict: bool = True, read_only: bool = False, version: str = "latest"
    ) -> bool:
        """Resume from the latest checkpoint; return whether it exists. All ranks must take part.

        Args:
            strict: refuse missing, unexpected or wrongly shaped entries, and other values in the
                config; otherwise warn, and load the rest.
            read_only: to inspect a run: the generators of this process and the files of the run
                stay untouched, also by stages. Commits are refused. The config may differ.
            version: to inspect: the `latest` commit, the `best`, or the latest with the weights of
                its `ema`.
        """
        if read_only:
            return self.__look(strict, version)
        if version != "latest":
            raise UserError(f"version={version!r} needs read_only=True; see weights()")
        state = checkpoint.load(self.checkpoint_path)
        saved, later = len(state["history"]) if state else 0, len(read_history(self.xp.link))
        if later > saved:
            self.logger.warning("Epochs %d to %d were not saved: repeated", saved + 1, later)
        if state is None:
            self._start_epoch()
            self.result_logger.resume(1, (), {})
            return False
        cursor = checkpoint.pop_cursor(state)
        check_config(self.xp, state.get("xp.cfg") or {}, strict)
        state = self.__usable(state, strict)
        # What comes before the cursor may change what is loaded here; there it is loaded once more.
        self.__load(to_plain(state, exact=not strict))
        if distrib.is_rank_zero():
            write_history(self.xp.link, self.history)
        self._start_epoch()
        counts = cursor.counts if cursor.ranks else None
        self.result_logger.resume(self.epoch, [*cursor.logged], counts)
        self.replay_history()
        if cursor.ranks:
            self.__resume(state, cursor)
            self.__commits_here = True
        return True

    def __resume(self, state: StateDict, cursor: Cursor) -> None:
        """Continue at a cursor, as soon as the run has come there again."""
        mine = share(cursor, self.epoch)
        if cursor.stage:
            self.__epoch = Epoch(cursor.counts, cursor, mine, partial(self.__load, state))
            self._pending_metrics = cursor.logged
            self.result_logger.paused = True
        else:
            self.__epoch = Epoch(cursor.counts)
            set_rng_state(mine["now"])

    def __usable(self, state: StateDict, strict: bool) -> StateDict:
        """Return the part of a state to load, and insist on completeness."""
        missing = self.stateful.missing(state)
        fitting, problems = self.stateful.fitting(state)
        # With strict, `load_state_dict` judges what does not fit: an override may mend it first.
        if missing or not strict:
            self.stateful.refuse(missing + problems, strict)
        return state if strict else fitting

    def __load(self, state: StateDict) -> None:
        """Load a state; the run is there, so results are logged from here on."""
        self.load_state_dict(state)
        for optimizer in self.stateful.values(Optimizer).values():
            optimizer.zero_grad()  # of a step that was interrupted in this process
        self.on_restore()
        self.result_logger.paused = False

    def on_restore(self) -> None:
        """Change restored state, such as a learning rate: called after each load."""

    def __look(self, strict: bool, version: str) -> bool:
        """Restore a version to be inspected."""
        self.__read_only = any(self.folder.glob("checkpoint*.th"))
        if self.__read_only:
            self.__load(self.__usable(versions.read_version(self.checkpoint_path, version), strict))
        self.result_logger.trackers.clear()
        return self.__read_only

    def continue_from(
        self,
        source: str | Path,
        names: Collection[str] = ("model",),
        version: str = "latest",
        strict: bool = True,
    ) -> None:
        """Start this run with the weights, or more, of another run.

        An `EMA` keeps its averages: call its `reset` too.

        Args:
            source: signature of the run, its folder, or a checkpoint file.
            names: of the states to take.
            version: the `latest` commit, the `best`, or the latest with the weights of its `ema`.
            strict: refuse missing, unexpected or wrongly shaped entries; else warn and skip.
        """
        path = versions.load_part(self.stateful, source, self.folder.parent, names, version, strict)
        self.logger.info("Continue from %s of %s: %s", version, path, ", ".join(names))

    @contextmanager
    def weights(self, version: str = "best") -> Iterator[None]:
        """Lend the registered modules the weights of another version of this run in the body.

        All ranks must take part.

        Args:
            version: the `best` commit, the `latest`, or the latest with the weights of its `ema`.
        """
        self.__wait()  # so that all ranks read the same files
        state = versions.read_version(self.checkpoint_path, version)
        modules = self.stateful.values(nn.Module)
        with lent(modules, {name: from_plain(state[name]) for name in modules.keys() & state}):
            yield

    def _start_epoch(self) -> None:
        """Forget the stages of the last epoch. A commit of your own ends with this call."""
        self._pending_metrics = {}
        self.__epoch = Epoch(self.__epoch.counts)
        self.result_logger.paused = False

    # ------------------------------------------------------------------------------------- state

    def register_stateful(self, *names: str, write_only: bool = False) -> None:
        """Make attributes part of the saved and restored state.

        Modules, optimizers and other objects with a `state_dict`, lists, dicts, and plain values.

        Args:
            names: of attributes, dotted ones too (`"model.encoder"`).
            write_only: save, for people to read, but never restore.
        """
        if not hasattr(self, "stateful"):
            raise RuntimeError(f"{type(self).__name__}.__init__: call super().__init__(xp) first")
        for name in names:
            self.stateful.register(name, AttributeWrapper(self, name), write_only)

    def state_dict(self) -> StateDict:
        """Return all registered state of this rank, as tensors and plain containers."""
        return self.stateful.state_dict()

    def load_state_dict(self, state: StateDict) -> None:
        """Restore the given part of the registered state."""
        if lending.get():
            raise RuntimeError("weights are lent: leave `swapped()` or `weights()` before a load")
        self.stateful.load_state_dict(state)

    # ------------------------------------------------------------------------------------ stages

    def run_stage(
        self, stage_name: str, method: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Run a stage of the epoch, such as training; log and return its metrics and `duration`.

        Args:
            stage_name: of the metrics in logs.
            method: called with the remaining arguments; returns a dict of metrics, or None.
        """
        if self._current_stage is not None:
            raise RuntimeError(
                f"stage {stage_name!r} begins within {self.current_stage!r}: run one by one"
            )
        if self.__requests.listens and not self.__commits_here and not self.__epoch.done:
            self.__requests.agree()
        if self.__requests.agreed:
            self.__stop(self.__requests.agreed, f"epoch {self.epoch - 1}")
        if (known := self.__epoch.skip(stage_name)) is not None:
            return known
        for optimizer in self.stateful.values(Optimizer).values():
            Accumulation.of(optimizer)
        # With weights lent by the caller, nothing could be saved in this stage.
        can_save = self.__commits_here and not lending.get()
        requests = self.__requests if can_save else Requests()
        stage = Stage(stage_name, self.epoch, self.__epoch, requests, self.stateful, self.__save)
        self._current_stage, token = stage, position.set(stage.here)
        try:
            metrics = stage.finish(method(*args, **kwargs))
        except Stopped as stopped:
            if not stage.step:  # an evaluation, which has changed nothing but generators
                set_rng_state(stage.at_start)
                self.__save(stage)
            self.__stop(str(stopped), f"step {stage.step} of {stage_name} in epoch {self.epoch}")
        finally:
            self._current_stage = None
            position.reset(token)
        self.log_metrics(stage_name, metrics)
        return metrics

    def __stop(self, asked: str, where: str) -> None:
        self.__wait()
        self.logger.warning(f"Stopped by {asked} after {where}: saved. The same command resumes")
        raise Stopped(asked)

    def steps(
        self, data: Iterable[T], updates: int = 5, every: int = 10, **options: Any
    ) -> Steps[T]:
        """Return the loop of the running stage, to be iterated, with each step's metrics to `log`.

        The run can be saved and stopped between two of its steps while gradients are enabled, and
        resumes with the next. Whatever a step leaves to the next must be registered, or logged.
        Without gradients, a stopped loop begins again.

        Args:
            data: usually a loader.
            updates: number of progress lines.
            every: number of steps between two points of the curves by step; 0 for none.
            options: `finite`, names of metrics that must not be NaN or infinite, with `skip` to
                skip such steps; `beta`, forgetting factor of the averages; `total`, number of
                steps, if the data has no length.
        """
        bar, log_step = partial(self.log_progress, updates=updates), self.result_logger.log_step
        if (stage := self._current_stage) is None:  # a pass that iterates and averages, no more
            stage = Stage("steps", self.epoch, Epoch(), Requests(), self.stateful, self.__save)
            every = 0
        return Steps(data, stage, bar, log_step, every, **options)
