"""Trackio, a local-first tracker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..run import XP
from ..utils import flatten
from .base import Tracker, to_bytes


class Trackio(Tracker):
    """Keeps results in Trackio's store here, for `trackio show`, or sends them to a Space.

    The run's name is its signature, so a resumed run continues; repeated steps come twice.

    Args:
        xp: the run.
        with_media_logging: keep media as well.
        project: of Trackio; `runs` by default.
        options: of `trackio.init`, such as `group` and `name`; others are ignored.
    """

    def __init__(
        self,
        xp: XP,
        with_media_logging: bool = True,
        project: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(xp, with_media_logging)
        known = ("group", "name", "space_id", "server_url")
        self._options = {n: v for n, v in options.items() if n in known and v is not None}
        self._options = {"project": project or "runs", "name": xp.sig} | self._options
        self._params: dict[str, Any] = {}
        self._opened: Any = None

    def _log(self, stage: str, values: Mapping[str, Any], step: int) -> None:
        import trackio

        if self._opened is None:
            options = self._options | {"config": self._params, "embed": False}
            self._opened = trackio.init(resume="allow", **options)
        self._opened.log({f"{stage}/{name}": value for name, value in values.items()}, step=step)

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self._params = flatten(params)

    def log_metrics(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        self._log(stage, metrics, step)

    def log_step(self, stage: str, metrics: Mapping[str, Any], step: int, epoch: int) -> None:
        self._log(f"{stage}_steps", metrics, step)

    def log_image(self, stage: str, key: str, image: torch.Tensor, step: int) -> None:
        import trackio
        from PIL import Image

        self._log(stage, {key: trackio.Image(Image.fromarray(to_bytes(image)))}, step)

    def log_audio(
        self, stage: str, key: str, audio: torch.Tensor, sample_rate: int, step: int
    ) -> None:
        import trackio

        samples = audio.nan_to_num().clamp(-1, 1).mul(32767).short().T.numpy()
        self._log(stage, {key: trackio.Audio(samples, sample_rate=sample_rate)}, step)

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        import trackio

        self._log(stage, {key: trackio.Markdown(text)}, step)
