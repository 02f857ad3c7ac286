"""Aim."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from ..utils import write_and_rename
from .base import to_bytes
from .service import Service


class Aim(Service):
    """Keeps results in the folder `.aim` beside the runs: `aim up --repo outputs/xps` shows them.

    The file `aim` in the run's folder names its page, so a resumed run continues there. A repeated
    step replaces the one before; points that are not repeated stay.
    """

    def _open(self) -> Any:
        from aim.sdk.errors import MissingRunError

        aim = import_module("aim")  # mypy takes its names for private
        options = {"repo": self.xp.folder.resolve().parent, "experiment": self.project}
        options |= {"system_tracking_interval": None, "capture_terminal_logs": False}
        page = self.xp.folder / "aim"
        try:
            known = page.read_text() if page.exists() else None
            # The run's own lock keeps others out: a lock here is of a process that was killed.
            run = aim.Run(known, force_resume=known is not None, **options)
        except MissingRunError:  # somebody deleted it
            run = aim.Run(**options)
        with write_and_rename(page, "w") as file:
            file.write(run.hash)
        run.name, run["config"] = self.name, self.params
        return run

    def _close(self, run: Any) -> None:
        run.close()

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        super().log_hyperparams(params, metrics)
        if "_run" in vars(self):
            self._run["config"] = self.params

    def _log(self, stage: str, values: Mapping[str, Any], step: int) -> None:
        for name, value in values.items():
            if not isinstance(value, str):  # a metric may be a text
                self._run.track(value, name, step, context={"stage": stage})

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
