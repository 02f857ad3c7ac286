"""The base of trackers that open their run with the first value (optional)."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import cached_property
from typing import Any

from ..run import XP
from ..utils import flatten
from .base import Tracker


class Service(Tracker):
    """A tracker with a run in a store of its own, opened by the first value.

    Subclasses define `_open`, which returns the run, `_log` and `_close`. What opening and closing
    print goes to stderr: stdout is for scripts.

    Args:
        xp: the run.
        with_media_logging: keep media as well.
        project: name of a group of runs; `runs` by default.
        name: of the run; the signature by default.
        options: of the store; unknown ones are ignored.
    """

    def __init__(
        self,
        xp: XP,
        with_media_logging: bool = True,
        project: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(xp, with_media_logging)
        self.project, self.name = project or "runs", name or xp.sig
        self.options = {name: value for name, value in options.items() if value is not None}
        self.params: dict[str, Any] = {}

    @cached_property
    def _run(self) -> Any:
        with redirect_stdout(sys.stderr):
            return self._open()

    def _open(self) -> Any:
        raise NotImplementedError

    def _log(self, stage: str, values: Mapping[str, Any], step: int) -> None:
        raise NotImplementedError

    def _close(self, run: Any) -> None:
        raise NotImplementedError

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self.params = flatten(params)

    def log_metrics(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        self._log(stage, metrics, step)

    def log_step(self, stage: str, metrics: Mapping[str, Any], step: int, epoch: int) -> None:
        self._log(f"{stage}_steps", metrics, step)

    def finish(self) -> None:
        if run := vars(self).pop("_run", None):  # a later value would open it again
            with redirect_stdout(sys.stderr):
                self._close(run)
