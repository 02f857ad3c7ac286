"""Experiments: folder, signature, config and history of a run.

This is the only file that knows Dora, and it imports it when used. Without Dora a plain folder
serves as well: see `FolderXP`.
"""

from __future__ import annotations

import difflib
import functools
import getpass
import importlib
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, NoReturn, Protocol, cast

from . import config
from .history import FileLink, HistoryFile
from .plain import to_plain
from .utils import UserError, flatten

logger = logging.getLogger(__name__)

# They ask a run to stop.
SIGNALS = [
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
]
GRACE = 60.0  # seconds in which a process that was asked to stop must have saved


class XP(Protocol):
    """What a solver asks of an experiment; Dora's XP and `FolderXP` both answer."""

    cfg: Any
    sig: str

    @property
    def folder(self) -> Path: ...

    @property
    def link(self) -> Any: ...


@dataclass
class FolderXP:
    """An experiment that is just a folder: for tests, notebooks and scripts without Dora.

    Args:
        folder: made if missing.
        cfg: any config; it is kept in the checkpoint.
        sig: defaults to the folder's name.
    """

    folder: Path
    cfg: Any = field(default_factory=dict)
    sig: str = ""

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.sig = self.sig or self.folder.name
        self.link = FileLink(self.folder / "history.json")


class Preempted(KeyboardInterrupt):
    """A run was asked to stop by a signal, has saved, and ends."""


def get_xp() -> XP:
    """Return the experiment that is running under Dora; UserError if there is none."""
    from dora.xp import get_xp, is_xp

    if not is_xp():
        raise UserError(
            "no experiment is running: start with `dora run`, "
            "or give the solver a folder, as in BaseSolver(xp='some/folder')"
        )
    xp: XP = get_xp()
    return xp


def in_signature(xp: XP, key: str) -> bool:
    """Does a (dotted) key of the config tell this run from others?"""
    dora = getattr(xp, "dora", None)
    return dora is None or not dora.is_excluded(key)


def config_changes(xp: XP, saved: Mapping[str, Any]) -> dict[str, bool]:
    """What has changed in a run's config, each with whether the run would be another one.

    That is so unless the key is new, or does not count in signatures.
    """
    known, changes = flatten(saved), config.changes(saved, to_plain(xp.cfg, "the config"))
    return {text: key in known and in_signature(xp, key) for key, text in changes.items()}


def resume_command(xp: XP, distributed: bool) -> str:
    """The command that resumes a run, from the root of the repo; empty outside of Dora."""
    if not hasattr(xp, "dora"):
        return ""
    return f"dora run {'-d ' if distributed else ''}-f {xp.sig}"


def rendezvous_file() -> Path | None:
    """Where processes that Dora started on one machine meet; None outside of Dora.

    Dora removes what an earlier start left there, and unlike ports no two runs share it.
    """
    if "dora" not in sys.modules:
        return None
    from dora.xp import get_xp, is_xp

    return Path(get_xp().rendezvous_file).absolute() if is_xp() else None


def hydra_main(
    config_path: str, config_name: str, schema: type | None = None, version_base: str = "1.3"
) -> Callable[[Callable[[Any], None]], Any]:
    """Decorate `main(cfg)`: Hydra composes the config, Dora names the run, then `main` starts.

    Beyond Dora's decorator of the same name: a `schema` (a dataclass, to be listed first in the
    config's defaults as `schema`) gives every key a type; a wrong override ends in one line;
    Ctrl-C says how to resume; a relative `dora.dir` is relative to the repo, wherever one stands.

    Args:
        config_path: folder of the config files, relative to the decorated function's file.
        config_name: name of the main config file, without `.yaml`.
        schema: dataclass with the config's keys and types.
        version_base: compatibility level of Hydra.

    Returns:
        What Dora's commands work on: call it to run; `.get_xp(argv)` and `.get_xp_from_sig(sig)`
        find a run.
    """
    from hydra.core.config_store import ConfigStore

    if schema is not None:
        ConfigStore.instance().store(name="schema", node=schema)

    def decorate(main: Callable[[Any], None]) -> Any:
        try:
            kind = _main_class(typed=schema is not None)
            return kind(main, config_name, config_path, version_base=version_base)
        except Exception as error:
            raise SystemExit(
                f"Config error in {config_name}.yaml: {config.explain_error(error)}"
            ) from error

    return decorate


def _main_class(typed: bool) -> Any:
    """Dora's entry point, with what `hydra_main` promises beyond it."""
    from dora.hydra import HydraMain
    from omegaconf import OmegaConf

    _patch_dora()

    class Main(HydraMain):
        _requested = ""  # signature that `-f` or `get_xp_from_sig` asked for

        def get_xp(self, argv: Iterable[str]) -> Any:
            keys = flatten(cast(Any, OmegaConf.to_container(self._base_cfg)))
            groups = [name for name in self._config_groups if not name.startswith("hydra")]
            known, argv = [*keys, *groups], list(argv)
            config.check_overrides(argv, known, typed)
            try:
                xp = super().get_xp(argv)
            except Exception as error:
                raise SystemExit(f"Config error: {config.explain_error(error, known)}") from None
            requested, self._requested = self._requested, ""
            if requested not in ("", xp.sig):
                logger.warning("Run %s with these overrides is another run: %s", requested, xp.sig)
            return xp

        def get_argv_from_sig(self, sig: str) -> Any:
            self._requested = sig
            try:
                argv = super().get_argv_from_sig(sig)
                return [arg for arg in argv if not config.is_without_effect(arg)]
            except RuntimeError:
                _refuse_signature(sig, self.dora.dir / self.dora.xps)

        def get_names(self, xps: Any) -> tuple[list[str], str]:
            names, base = super().get_names(xps)
            return [name or "base" for name in names], base

        def init_xp(self, xp: Any) -> Any:
            with _explain_write_error():
                return super().init_xp(xp)

        def _get_base_config(self, overrides: Any = ()) -> Any:
            base, delta = super()._get_base_config(overrides)
            return base, _omit_default_choices(self, delta)

        def _get_dora(self) -> Any:
            dora = super()._get_dora()
            wanted = Path(self._base_cfg.get("dora", {}).get("dir", dora.dir))
            repo = self.full_config_path.parent.parent
            # A git-saved run starts in a clone, but its results belong to the original folder.
            cloned = "_DORA_ORIGINAL_DIR" in os.environ
            if not wanted.is_absolute() and (repo / "pyproject.toml").exists() and not cloned:
                dora.dir = repo / wanted
            return dora

        def get_slurm_config(self) -> Any:
            _omit_gpus_without_any()
            return super().get_slurm_config()

        def _is_active(self, argv: list[str]) -> bool:
            return not any(arg.startswith("-") for arg in argv)  # such as Hydra's own --help

        def _main(self) -> Any:
            from dora.xp import is_xp

            if not is_xp():
                return super()._main()  # type: ignore[no-untyped-call]
            return _run_main(self.main)

    return Main


def _refuse_signature(sig: str, folder: Path) -> NoReturn:
    runs = [path.parent.name for path in folder.glob("*/history.json")]
    near = difflib.get_close_matches(sig, runs, n=1)
    hint = f"did you mean {near[0]}?" if near else "the report lists the runs"
    raise UserError(f"no run {sig} in {folder}: {hint}") from None


def _omit_default_choices(main: Any, delta: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Keep a choice from a group out of the signature if it is the default."""
    from hydra import compose, initialize_config_dir

    if not delta:
        return delta
    with initialize_config_dir(config_dir=str(main.full_config_path), **main.hydra_kwargs):
        cfg = compose(main.config_name, return_hydra_config=True)
    chosen = {group: str(name) for group, name in cfg.hydra.runtime.choices.items()}
    return [(group, name) for group, name in delta if chosen.get(group) != name]


def _run_main(main: Callable[[Any], Any]) -> Any:
    """Call `main` with the config of the run; say how to resume it if it is interrupted."""
    # A terminated run ends as an interrupted one does: with its last checkpoint on disk.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # The config was composed for the signature: no need for Hydra to do it again.
        return main(get_xp().cfg)
    except Preempted as stopped:
        _requeue(by=str(stopped))
        raise SystemExit(130) from None
    except KeyboardInterrupt:
        for number in (signal.SIGINT, signal.SIGTERM):  # of Dora, which ends its processes
            signal.signal(number, signal.SIG_IGN)
        epoch = len(HistoryFile(get_xp().link).read())
        where = f"resumes after epoch {epoch}" if epoch else "starts anew: no epoch was committed"
        logger.warning("Interrupted. The same command %s.", where)
        raise SystemExit(130) from None


def _patch_dora() -> None:
    """Work around what fails in Dora 0.1.13; a test tells when it no longer does."""
    from dora import git_save
    from dora.executor import ChildrenManager
    from dora.shep import Shepherd

    # It asks who is logged in at the terminal, but a job has none.
    try:
        os.getlogin()
    except OSError:
        os.getlogin = getpass.getuser

    # It links the code of `--git_save` into a folder that a new run does not have yet.
    assign = git_save.assign_clone

    @functools.wraps(assign)
    def assign_clone(xp: Any, clone: Any) -> None:
        xp.folder.mkdir(parents=True, exist_ok=True)
        assign(xp, clone)

    # It makes its folders before our own code can catch an error.
    start = Shepherd.__init__

    @functools.wraps(start)
    def init(*args: Any, **kwargs: Any) -> None:
        with _explain_write_error():
            start(*args, **kwargs)

    # The launcher of several processes ends while they save.
    leave: Any = ChildrenManager.__exit__

    @functools.wraps(leave)
    def leave_together(self: Any, *error: Any) -> None:
        with _asking_to_stop([*self.children]):
            leave(self, *error)

    if not hasattr(assign, "__wrapped__"):
        ChildrenManager.__exit__ = leave_together  # type: ignore[method-assign]
        git_save.assign_clone = assign_clone
        Shepherd.__init__ = init  # type: ignore[method-assign]


@contextmanager
def _asking_to_stop(processes: list[subprocess.Popen[bytes]]) -> Iterator[None]:
    """Pass signals on to processes, wait for these at the end, and exit if there was a signal."""
    received: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for process in processes:
            process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    yield
    deadline = time.monotonic() + GRACE
    for process in processes:
        with suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(max(0.0, deadline - time.monotonic()))
    if received:
        raise SystemExit(130)


@contextmanager
def _explain_write_error() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SystemExit(
            f"Runs can't be written: {error}. Make room there, or choose another dora.dir"
        ) from None


def _omit_gpus_without_any() -> None:
    """Let Dora start jobs on a cluster without GPUs: there, `slurm.gpus` just counts processes."""
    from dora.shep import Shepherd

    if shutil.which("srun") is None:
        if "--dry_run" not in sys.argv:
            raise SystemExit(
                "There is no Slurm here (no srun). `dora run` trains on this machine, and "
                "`python -m <package>.core.sweep GRID` runs a grid on it"
            )
        return
    original = Shepherd._get_submitit_executor

    @functools.wraps(original)
    def get_executor(*args: Any, **kwargs: Any) -> Any:
        executor = original(*args, **kwargs)
        listed = subprocess.run(["sinfo", "-h", "-o", "%G"], capture_output=True, timeout=60)
        if listed.returncode == 0 and b"gpu" not in listed.stdout:
            executor.parameters.pop("gres", None)
        return executor

    if not hasattr(original, "__wrapped__"):
        Shepherd._get_submitit_executor = get_executor  # type: ignore[method-assign]


class Grid:
    """The runs of a Dora grid, for who starts them without Slurm.

    Args:
        main: what `hydra_main` made of a function.
        name: of a file in the package `grids` beside it, without `.py`.
    """

    def __init__(self, main: Any, name: str) -> None:
        from dora.conf import SlurmConfig, update_from_hydra
        from dora.explore import Explorer, Herd, Launcher
        from dora.shep import Sheep
        from omegaconf import OmegaConf

        class LocalSheep(Sheep):
            """A run that is no job of Slurm's."""

            def state(self, mode: str = "standard") -> str:
                return grid.states[self.xp.sig]

            def is_done(self, mode: str = "standard") -> bool:
                return False

        grid = self
        module = self._import(f"{main.package}.grids", name)
        self._explorer: Any = getattr(module, "explorer", None)
        if not isinstance(self._explorer, Explorer):
            raise UserError(
                f"{module.__file__} has no `explorer`, a function under a dora.Explorer"
            )
        slurm = SlurmConfig()
        update_from_hydra(slurm, main._base_cfg.get("slurm", OmegaConf.create()))
        herd, self._main = Herd(), main
        shepherd: Any = SimpleNamespace(
            main=main, get_sheep_from_argv=lambda argv: LocalSheep(main.get_xp(argv))
        )
        self._explorer(Launcher(shepherd, slurm, herd))
        self._sheeps = list(herd.sheeps.values())
        self.states = {sheep.xp.sig: "PENDING" for sheep in self._sheeps}
        self.runs = [sheep.xp for sheep in self._sheeps]
        self.processes = {sig: int(slurm.gpus) for sig, slurm in herd.slurm_configs.items()}

    @staticmethod
    def _import(package: str, name: str) -> Any:
        try:
            return importlib.import_module(f"{package}.{name}")
        except ModuleNotFoundError as error:
            if error.name not in (package, f"{package}.{name}"):
                raise
            folder = Path(importlib.import_module(package).__file__ or "").parent
            known = sorted(path.stem for path in folder.glob("[!_]*.py"))
            raise UserError(f"no grid {name} in {folder}; there are {', '.join(known)}") from None

    def table(self) -> str:
        """The runs with their states and what the grid's explorer shows of their histories."""
        from dora.grid import RunGridArgs, monitor

        lines: list[str] = []

        def write(*words: Any, **_: Any) -> None:
            lines.append(" ".join(map(str, words)))

        monitor(RunGridArgs(), self._main, self._explorer, self._sheeps, write)
        return "\n".join(lines)


def _requeue(by: str) -> None:
    """In a job on Slurm, ask to be started again, and end.

    Slurm itself does so after a SIGTERM, unless that meant to cancel the job.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ or by == "SIGTERM":
        return
    from submitit import JobEnvironment

    # As submitit would have done when the signal came: it counts how often, and ends rank zero.
    number = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")
    handler = signal.getsignal(number)
    if callable(handler):
        handler(number, None)
    time.sleep(60)  # to end before rank zero has asked would fail the job
