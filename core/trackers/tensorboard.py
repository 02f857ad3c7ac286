"""TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..utils import flatten
from ..xp import XP
from .base import Tracker


class TensorBoard(Tracker):
    """Writes TensorBoard event files.

    Args:
        xp: the run.
        with_media_logging: write media as well.
        name: of the folder in the run's folder, `tensorboard` by default.
        sub_dir: a folder in that folder.
    """

    def __init__(
        self,
        xp: XP,
        with_media_logging: bool = True,
        name: str | None = None,
        sub_dir: str | None = None,
    ) -> None:
        super().__init__(xp, with_media_logging)
        self.folder = xp.folder / (name or "tensorboard") / (sub_dir or "")
        self._hyperparams: list[Any] = []
        self._opened: Any = None

    def _writer(self, step: int) -> Any:
        """The event writer, opened by the first value: a run that logs none leaves no file.

        That value is of the epoch the run starts with: whatever a killed run wrote of this epoch
        and later ones is about to be repeated, and TensorBoard is told to forget it.
        """
        if self._opened is None:
            from torch.utils.tensorboard import SummaryWriter

            self._opened = SummaryWriter(str(self.folder), purge_step=step)
        while self._hyperparams:
            self._opened._get_file_writer().add_summary(self._hyperparams.pop(0))
        return self._opened

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        flat = flatten(params)
        values = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in flat.items()}
        # SummaryWriter.add_hparams would make a run of its own each time.
        self._hyperparams += hparams(values, dict(metrics))

    def log_metrics(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        for name, value in metrics.items():
            if isinstance(value, (int, float)):
                self._writer(step).add_scalar(f"{stage}/{name}", value, step)
        self._writer(step).flush()

    def log_audio(
        self, stage: str, key: str, audio: torch.Tensor, sample_rate: int, step: int
    ) -> None:
        if self.with_media_logging:
            mono = audio.mean(0, keepdim=True)  # all that the writer can encode
            self._writer(step).add_audio(f"{stage}/{key}", mono, step, sample_rate)

    def log_image(self, stage: str, key: str, image: torch.Tensor, step: int) -> None:
        if self.with_media_logging:
            self._writer(step).add_image(f"{stage}/{key}", image.nan_to_num(0.0).clamp(0, 1), step)

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        if self.with_media_logging:
            self._writer(step).add_text(f"{stage}/{key}", text, step)
