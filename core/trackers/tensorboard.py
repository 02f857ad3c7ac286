"""TensorBoard."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch

from ..run import XP
from ..utils import flatten
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
        self._writers: dict[str, Any] = {}
        self._epoch: int | None = None
        self._steps: Mapping[str, int] | None = None

    def resume(self, epoch: int, done: Collection[str], steps: Mapping[str, int] | None) -> None:
        # TensorBoard can be told to forget all from some step on. Of an epoch that is half done,
        # nothing can be told apart: a point may then come twice, with the same value.
        self._epoch = None if done else epoch
        self._steps = steps

    def _writer(self, folder: str = "", forget: int | None = None) -> Any:
        """An event writer, opened by the first value: a run that logs none leaves no file."""
        if folder not in self._writers:
            from torch.utils.tensorboard import SummaryWriter

            path = str(self.folder / folder)
            self._writers[folder] = SummaryWriter(path, purge_step=forget)
        return self._writers[folder]

    @property
    def writer(self) -> Any:
        """The `SummaryWriter` whose steps are epochs: for histograms and more, within stages."""
        writer = self._writer(forget=self._epoch)
        while self._hyperparams:
            writer._get_file_writer().add_summary(self._hyperparams.pop(0))
        return writer

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import hparams

        flat = flatten(params)
        values = {k: v if isinstance(v, (int, float, str)) else str(v) for k, v in flat.items()}
        # SummaryWriter.add_hparams would make a run of its own each time.
        self._hyperparams += hparams(values, dict(metrics))

    def log_metrics(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        _add(self.writer, stage, metrics, step)
        for writer in self._writers.values():
            writer.flush()

    def log_step(self, stage: str, metrics: Mapping[str, Any], step: int, epoch: int) -> None:
        # In a folder of their own, for what is to be forgotten is a number of steps, not of epochs.
        name = f"{stage}_steps"
        forget = None if self._steps is None else self._steps.get(stage, 0) + 1
        _add(self._writer(name.replace("/", "_"), forget), name, metrics, step)

    def log_audio(
        self, stage: str, key: str, audio: torch.Tensor, sample_rate: int, step: int
    ) -> None:
        mono = audio.mean(0, keepdim=True)  # all that the writer can encode
        self.writer.add_audio(f"{stage}/{key}", mono, step, sample_rate)

    def log_image(self, stage: str, key: str, image: torch.Tensor, step: int) -> None:
        self.writer.add_image(f"{stage}/{key}", image.nan_to_num(0.0).clamp(0, 1), step)

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        self.writer.add_text(f"{stage}/{key}", text, step)


def _add(writer: Any, group: str, metrics: Mapping[str, Any], step: int) -> None:
    for name, value in metrics.items():
        if isinstance(value, (int, float)):
            writer.add_scalar(f"{group}/{name}", value, step)
