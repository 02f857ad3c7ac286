"""Aim."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from ..run import XP
from ..utils import flatten, write_and_rename
from .base import Tracker, to_bytes


class Aim(Tracker):
    """Keeps results in the folder `.aim` beside the runs: `aim up --repo outputs/xps` shows them.

    The file `aim` in the run's folder names its page, so a resumed run continues there. A repeated
    step replaces the one before; points that are not repeated stay.

    Args:
        xp: the run.
        with_media_logging: keep media as well.
        project: name of the experiment; `runs` by default.
        name: of the run; the signature by default.
        options: ignored.
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
        self._params: dict[str, Any] = {}
        self._opened: Any = None

    def _log(self, stage: str, values: Mapping[str, Any], step: int) -> None:
        if self._opened is None:
            self._opened = self._open()
        for name, value in values.items():
            if not isinstance(value, str):  # a metric may be a text
                self._opened.track(value, name, step, context={"stage": stage})

    def _open(self) -> Any:
        from aim.sdk.errors import MissingRunError

        aim = import_module("aim")  # mypy takes its names for private
        options = {"repo": self.xp.folder.resolve().parent, "experiment": self.project}
        options |= {"system_tracking_interval": None, "capture_terminal_logs": False}
        page = self.xp.folder / "aim"
        try:
            known = page.read_text() if page.exists() else None
            # Only a killed process leaves a lock, as the run's own lock keeps others out.
            run = aim.Run(known, force_resume=known is not None, **options)
        except MissingRunError:  # somebody deleted it
            run = aim.Run(**options)
        with write_and_rename(page, "w") as file:
            file.write(run.hash)
        run.name = self.name
        run["config"] = self._params
        return run

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self._params = flatten(params)
        if self._opened is not None:
            self._opened["config"] = self._params

    def log_metrics(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        self._log(stage, metrics, step)

    def log_step(self, stage: str, metrics: Mapping[str, Any], step: int, epoch: int) -> None:
        self._log(f"{stage}_steps", metrics, step)

    def log_image(self, stage: str, key: str, image: torch.Tensor, step: int) -> None:
        self._log(stage, {key: import_module("aim").Image(to_bytes(image))}, step)

    def log_audio(
        self, stage: str, key: str, audio: torch.Tensor, sample_rate: int, step: int
    ) -> None:
        samples = audio.nan_to_num().clamp(-1, 1).mul(32767).short().T.numpy()
        sound = import_module("aim").Audio(samples, rate=sample_rate, format="wav")
        self._log(stage, {key: sound}, step)

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        self._log(stage, {key: import_module("aim").Text(text)}, step)
