"""Weights & Biases."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from typing import Any

import torch

from ..xp import XP
from .base import Tracker, to_bytes, write_wav


class WandB(Tracker):
    """Sends everything to Weights & Biases; offline too, with `WANDB_MODE=offline`.

    The run's id is its signature, so a resumed run goes on in the same page.

    Args:
        xp: the run.
        with_media_logging: send media as well.
        project: defaults to W&B's own default.
        name: shown for the run; defaults to the signature.
        group: to gather runs under.
    """

    def __init__(
        self,
        xp: XP,
        with_media_logging: bool = True,
        project: str | None = None,
        name: str | None = None,
        group: str | None = None,
    ) -> None:
        super().__init__(xp, with_media_logging)
        self.project = project
        self.name = name or xp.sig
        self.group = group
        self._opened: Any = None

    def _run(self) -> Any:
        """W&B's run, opened by the first value: a run that logs none starts none."""
        if self._opened is None:
            import wandb

            self._opened = wandb.init(
                project=self.project,
                name=self.name,
                group=self.group,
                id=self.xp.sig,
                dir=self.xp.folder,
                resume="allow",
            )
            # An axis of our own: W&B's step only grows, also when an epoch is repeated.
            self._opened.define_metric("epoch")
            self._opened.define_metric("*", step_metric="epoch")
        return self._opened

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self._run().config.update(dict(params), allow_val_change=True)
        self._run().summary.update(dict(metrics))

    def log_metrics(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        self._log(stage, metrics, step)

    def log_audio(
        self, stage: str, key: str, audio: torch.Tensor, sample_rate: int, step: int
    ) -> None:
        if self.with_media_logging:
            import wandb

            # Given samples rather than a file, W&B would ask for one more package.
            with tempfile.NamedTemporaryFile(suffix=".wav") as file:
                write_wav(file, audio, sample_rate)
                file.flush()
                self._log(stage, {key: wandb.Audio(file.name)}, step)

    def log_image(self, stage: str, key: str, image: torch.Tensor, step: int) -> None:
        if self.with_media_logging:
            import wandb

            self._log(stage, {key: wandb.Image(to_bytes(image))}, step)

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        if self.with_media_logging:
            import wandb

            self._log(stage, {key: wandb.Table(columns=["text"], data=[[text]])}, step)

    def _log(self, stage: str, values: Mapping[str, Any], step: int) -> None:
        self._run().log(
            {f"{stage}/{key}": value for key, value in values.items()} | {"epoch": step}
        )
