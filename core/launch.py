"""From the command line to a run: Dora's signature, Hydra's config.

No other file imports Dora or Hydra; this one does so when it needs them. To do without, delete it
and its name in `__init__.py`, and give each solver a `FolderXP` or a path.
"""

from __future__ import annotations

import difflib
import functools
import getpass
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import FrameType
from typing import Any
from urllib.parse import quote

from torch.distributed import FileStore  # type: ignore[attr-defined]
from torch.distributed.rendezvous import register_rendezvous_handler

from .distrib import GRACE, rank, this_process, world_size
from .hints import explain
from .run import NO_EFFECT, FolderXP, finders, locked, read_history
from .stop import SIGNALS, Stopped
from .utils import UserError, flatten

logger = logging.getLogger(__name__)

_VOLATILE = re.compile(r"\$\{(now:|oc\.env:\w*(RANK|PROCID|JOB_ID))")


def _running() -> Any:
    """Return the experiment running under Dora, if any."""
    if "dora" not in sys.modules:
        return None
    from dora.xp import get_xp, is_xp

    return get_xp() if is_xp() else None


def _meeting_point() -> str:
    """Return where Dora's processes on a machine meet: at a file; others at an address.

    Dora removes the file of an earlier start, and unlike ports no two runs share it.
    """
    return f"dora://{quote(str(xp.rendezvous_file))}" if (xp := _running()) else "env://"


def _meet(url: str, **_: Any) -> Iterator[tuple[FileStore, int, int]]:
    """Yield the store in Dora's file: for PyTorch's `file://`, a path ends at a `#` or `?`."""
    yield FileStore(str(_running().rendezvous_file.absolute()), world_size()), rank(), world_size()


finders.append(_running)
this_process.meeting_point = _meeting_point
with suppress(RuntimeError):  # known already, to another copy of this file
    register_rendezvous_handler("dora", _meet)

# A process of a job on Slurm: ranks and address go to the environment, as torchrun leaves them.
if "SUBMITIT_EXECUTOR" in os.environ and "WORLD_SIZE" not in os.environ:
    from submitit.helpers import TorchDistributedEnvironment

    _job = TorchDistributedEnvironment()
    _job.master_addr = os.environ.get("MASTER_ADDR", _job.master_addr)
    _job.export(set_cuda_visible_devices=False, overwrite=True)


def hydra_main(
    config_path: str, config_name: str, schema: type | None = None, version_base: str = "1.3"
) -> Callable[[Callable[[Any], None]], Any]:
    """Decorate `main(cfg)`: Hydra composes the config, Dora names the run, then `main` starts.

    Beyond Dora's decorator of the same name: a `schema` (a dataclass, to be listed first in the
    config's defaults as `schema`) gives every key a type; a wrong override ends in one line;
    Ctrl-C says how to resume; a relative `dora.dir` starts at the repo, wherever the user stands.

    Args:
        config_path: folder of the config files, relative to the decorated function's file.
        config_name: name of the main config file, without `.yaml`.
        schema: dataclass with the config's keys and types.
        version_base: compatibility level of Hydra 1.3; not passed to newer ones, which warn of it.

    Returns:
        The object that Dora's commands work on: call it to run; `.get_xp(argv)` and
        `.get_xp_from_sig(sig)` find a run.
    """
    from hydra.core.config_store import ConfigStore

    if schema is not None:
        ConfigStore.instance().store(name="schema", node=schema)

    def decorate(main: Callable[[Any], None]) -> Any:
        import hydra
        from dora.hydra import HydraMain

        _patch_dora()
        level = {"version_base": version_base} if hydra.__version__.startswith("1.3.") else {}
        kind: Any = type("Main", (_Additions, HydraMain), {"typed": schema is not None})
        with _hydra(f" in {config_name}.yaml"):
            return kind(main, config_name, config_path, **level)

    return decorate


_Base: Any = object  # `HydraMain` follows it, which is imported when used


class _Additions(_Base):  # type: ignore[misc]
    """Methods of Dora's entry point, with the additions of `hydra_main`."""

    typed: bool
    requested = ""  # signature that `-f` or `get_xp_from_sig` asked for

    def get_xp(self, argv: Iterable[str]) -> Any:
        xp = _composed(self, super().get_xp, list(argv), self.typed)
        requested, self.requested = self.requested, ""
        if requested not in ("", xp.sig):
            logger.warning("Run %s with these overrides is another run: %s", requested, xp.sig)
        return xp

    def get_argv_from_sig(self, sig: str) -> Any:
        try:
            argv = super().get_argv_from_sig(sig)
        except RuntimeError:
            raise UserError(_unknown(sig, self.dora.dir / self.dora.xps)) from None
        self.requested = sig
        return [arg for arg in argv if not has_no_effect(arg)]

    def init_xp(self, xp: Any) -> Any:
        with _write_errors():
            return super().init_xp(xp)

    def _get_base_config(self, overrides: Any = ()) -> Any:
        base, delta = super()._get_base_config(overrides)
        return base, _without_defaults(self, delta)

    def _get_delta(self, init: Any, other: Any) -> Any:
        from omegaconf import OmegaConf

        for key, value in super()._get_delta(init, other):  # a signature knows no Enum
            plain: Any = OmegaConf.to_container(OmegaConf.create([value]), enum_to_str=True)
            yield key, plain[0]

    def get_xp_history(self, xp: Any) -> Any:
        return read_history(xp.link)

    def _get_dora(self) -> Any:
        dora = super()._get_dora()
        dora.dir = _runs_folder(self, dora.dir)
        return dora

    def get_slurm_config(self) -> Any:
        _omit_gpus_without_any()
        return super().get_slurm_config()

    def _is_active(self, argv: list[str]) -> bool:
        return not any(arg.startswith("-") for arg in argv)  # such as Hydra's own --help

    def _main(self) -> Any:
        return _run(self.main) if _running() is not None else super()._main()


def _run(main: Callable[[Any], Any]) -> Any:
    """Call `main` with the config of the run; tell how to resume after an interrupt."""
    xp = _running()
    # A terminated run ends as an interrupted one does: with its last checkpoint on disk.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        # The config was composed for the signature: no need for Hydra to do it again.
        return main(xp.cfg)
    except Stopped as stopped:
        _requeue(by=str(stopped))
        raise
    except KeyboardInterrupt:
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # of Dora, which ends its processes
        logger.warning("Interrupted. The same command resumes from the last checkpoint, if any.")
        raise SystemExit(130) from None


def _requeue(by: str) -> None:
    """In a job on Slurm, ask to be started again, and end.

    Slurm itself does so after a SIGTERM, unless that meant to cancel the job, as SIGINT does.
    """
    if "SUBMITIT_EXECUTOR" not in os.environ or by in ("SIGTERM", "SIGINT"):
        return
    from submitit import JobEnvironment

    # As submitit would have done when the signal came: it counts how often, and ends rank zero.
    number = getattr(signal, f"SIG{JobEnvironment.USR_SIG}")
    handler = signal.getsignal(number)
    if callable(handler):
        handler(number, None)
    time.sleep(60)  # to end before rank zero has asked would fail the job


# ---------------------------------------------------------------------------------------- config


def _composed(main: Any, get_xp: Callable[..., Any], argv: list[str], typed: bool) -> Any:
    """Compose a config from overrides; SystemExit names a wrong override in a line."""
    known = [
        *_values(main._base_cfg, resolve=False),
        *(name for name in main._config_groups if not name.startswith("hydra")),
    ]
    for override in argv:
        if has_no_effect(override):
            raise SystemExit(
                f"Config error: {override}: set it in config.yaml, which is read before overrides; "
                "for jobs there are `dora launch -g` and, in a grid, `launcher.slurm_`"
            )
        key = override.strip("+").partition("=")[0]
        if typed and override.startswith("+") and key not in known:
            raise SystemExit(f"Config error: {override}: add it to schema.py and config.yaml first")
    with _hydra("", known):
        xp = get_xp(argv)
        changing = [key for key in _changing(xp.cfg) if not xp.dora.is_excluded(key)]
    if changing:
        cure = "write a value there, or add the key to dora.exclude"
        raise SystemExit(f"Config error: {changing[0]} has another value at each start: {cure}")
    return xp


def _changing(cfg: Any) -> Iterator[str]:
    """Yield the keys whose values change by themselves, from start to start or rank to rank."""
    once, again = _values(cfg, resolve=True), _values(cfg, resolve=True)
    yield from (key for key, value in once.items() if value != again.get(key))
    written = _values(cfg, resolve=False)
    yield from (key for key, value in written.items() if _VOLATILE.search(value))


def _values(cfg: Any, resolve: bool) -> dict[str, str]:
    """Return the values of a config, or what is written there, by their dotted keys."""
    from omegaconf import OmegaConf

    OmegaConf.clear_cache(cfg)
    plain: Any = OmegaConf.to_container(cfg, resolve=resolve)
    return {key: repr(value) for key, value in flatten(plain).items()}


@contextmanager
def _hydra(where: str, known: Sequence[str] = ()) -> Iterator[None]:
    """Use Hydra in the body, beside that of a notebook; SystemExit has a line on an error there."""
    from hydra.core.global_hydra import GlobalHydra

    theirs = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        yield
    except Exception as error:
        raise SystemExit(f"Config error{where}: {explain(error, known)}") from None
    finally:
        GlobalHydra.instance().hydra = theirs


def has_no_effect(override: str) -> bool:
    """Return whether an override is of a section read by Dora before all overrides."""
    return override.lstrip("+~").partition("=")[0].partition(".")[0] in NO_EFFECT


def _unknown(sig: str, folder: Path) -> str:
    """Return the message for a signature without a run."""
    runs = [path.parent.name for path in folder.glob("*/history.json")]
    near = difflib.get_close_matches(sig, runs, n=1)
    return f"no run {sig} in {folder}: " + (f"did you mean {near[0]}?" if near else "see report")


def _without_defaults(main: Any, delta: list[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """Keep the default choices of groups out of the signature."""
    from hydra import compose, initialize_config_dir

    if not delta:
        return delta
    with initialize_config_dir(config_dir=str(main.full_config_path), **main.hydra_kwargs):
        cfg = compose(main.config_name, return_hydra_config=True)
    chosen = {group: str(name) for group, name in cfg.hydra.runtime.choices.items()}
    return [(group, name) for group, name in delta if chosen.get(group) != name]


def _runs_folder(main: Any, default: Path) -> Path:
    """Return the folder of all runs: a relative path starts at the repo."""
    wanted = Path(main._base_cfg.get("dora", {}).get("dir", default))
    repo = main.full_config_path.parent.parent
    # A git-saved run starts in a clone, but its results belong to the original folder.
    cloned = "_DORA_ORIGINAL_DIR" in os.environ
    beside = not wanted.is_absolute() and (repo / "pyproject.toml").exists() and not cloned
    return repo / wanted if beside else default


# --------------------------------------------------------------------------------------- patches

# Of https://github.com/facebookresearch/dora, version 0.1.13: newer ones are not allowed.


def _patch_dora() -> None:
    """Work around faults of Dora, each named by its file and function."""
    from dora import git_save, grid, launch, run
    from dora.executor import ChildrenManager
    from dora.shep import Shepherd

    # dora/shep.py, `Shepherd._check_orphans`: asks who is logged in at the terminal of a job.
    try:
        os.getlogin()
    except OSError:
        os.getlogin = getpass.getuser

    # dora/git_save.py, `assign_clone`: links code into a folder that a new run does not have yet.
    _within(git_save, "assign_clone", lambda xp, _: nullcontext(xp.folder.mkdir(0o777, True, True)))
    # dora/shep.py, `Shepherd.__init__`: makes its folders before our own code can catch an error.
    _within(Shepherd, "__init__", lambda *_: _write_errors())
    # dora/executor.py, `ChildrenManager.__exit__`: ends the launcher while its processes save.
    _within(ChildrenManager, "__exit__", lambda self, error, *_: _passing_signals_on(self, error))
    # `--clear`, in three files: deletes a run that trains.
    for module, name in ((run, "rmtree"), (launch, "reliable_rmtree"), (grid, "reliable_rmtree")):
        _within(module, name, _not_training)


def _within(owner: Any, name: str, context: Callable[..., Any]) -> None:
    """Enter a context, made from the arguments, at each call of a function of Dora."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> None:
        with context(*args):
            original(*args, **kwargs)

    if not hasattr(original, "__wrapped__"):
        setattr(owner, name, patched)


def _not_training(folder: Path) -> Any:
    """End with one line if another process trains the run of a folder."""
    with _write_errors(), locked(FolderXP(folder)):
        return nullcontext()


@contextmanager
def _passing_signals_on(manager: Any, error: Any) -> Iterator[None]:
    """Forward signals to the processes, and let all save before Dora ends them."""
    processes: list[subprocess.Popen[bytes]] = [*manager.children]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in processes:
            process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, pass_on)
    while not error and all(process.poll() is None for process in processes):
        time.sleep(0.05)
    if any(process.poll() == 130 for process in processes):  # else Dora ends the others
        manager.children, manager.failed = [], 130
    yield
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        process.kill()


@contextmanager
def _write_errors() -> Iterator[None]:
    """End with one line if the folder of runs can't be written, or a run is locked."""
    try:
        yield
    except UserError as error:
        raise SystemExit(str(error)) from None
    except OSError as error:
        raise SystemExit(f"No runs, {error}: make room there, or change dora.dir") from None


def _omit_gpus_without_any() -> None:
    """Make Dora start jobs on a cluster without GPUs: there, `slurm.gpus` just counts processes.

    dora/shep.py, `Shepherd._get_submitit_executor`, asks for `gres` since Dora's pull request 42.
    """
    from dora.shep import Shepherd

    if shutil.which("srun") is None:
        if "--dry_run" not in sys.argv:
            cure = "`dora run` and `python -m <package>.tools.sweep GRID` do without"
            raise SystemExit(f"There is no Slurm here (no srun): {cure}")
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
