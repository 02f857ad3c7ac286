"""Trackio, a local-first tracker."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

import torch

from .base import to_bytes
from .service import Service


class Trackio(Service):
    """Keeps results in Trackio's store here, for `trackio show`, or sends them to a Space.

    The store is in the folder `TRACKIO_DIR`. The run's name is always its signature, so a resumed
    run continues; repeated steps come twice. Options are `group`, `space_id` and `server_url`.
    """

    def _open(self) -> Any:
        options = {n: self.options.get(n) for n in ("group", "space_id", "server_url")}
        options |= {"name": self.xp.sig, "config": self.params, "embed": False}
        return import_module("trackio").init(self.project, resume="allow", **options)

    def _close(self, run: Any) -> None:
        trackio = import_module("trackio")
        # The newest run of the process would be finished once more at exit, and print then.
        is_newest = trackio.context_vars.current_run.get() is run
        (trackio.finish if is_newest else run.finish)()

    def _log(self, stage: str, values: Mapping[str, Any], step: int) -> None:
        self._run.log({f"{stage}/{name}": value for name, value in values.items()}, step=step)

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
