"""Weights & Biases."""

from __future__ import annotations

import functools
import itertools
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..run import XP
from .base import Tracker, to_bytes, write_wav

logger = logging.getLogger(__name__)

OFFLINE_ROWS = 10**6  # that one start of a run may log


class WandB(Tracker):
    """Sends everything to Weights & Biases; offline too, with `WANDB_MODE=offline`.

    The run's id is its signature, so a resumed run continues in the same page. Environment
    variables, such as `WANDB_PROJECT` and `WANDB_NAME`, take precedence over `options`.

    Args:
        xp: the run.
        with_media_logging: send media as well.
        options: of `wandb.init`, such as `project`, `group`, `job_type` and `name`, which is the
            signature by default; None counts as not given.
    """

    def __init__(self, xp: XP, with_media_logging: bool = True, **options: Any) -> None:
        super().__init__(xp, with_media_logging)
        tags = getattr(xp.cfg, "tags", None) or ()
        chosen: dict[str, Any] = {
            "id": xp.sig,
            "name": xp.sig,
            "dir": xp.folder,
            "tags": [tags] if isinstance(tags, str) else [*map(str, tags)],
            "notes": getattr(xp.cfg, "note", None) or None,
            "resume": "allow",
            "reinit": "finish_previous",  # else a second run of this process would join it
        }
        chosen |= {name: value for name, value in options.items() if value is not None}
        self._options = {name: value for name, value in chosen.items() if not _told(name)}
        self._hyperparams: dict[str, Mapping[str, Any]] = {}
        self._axes: set[str] = set()
        self._rows = itertools.count()
        self._opened: Any = None

    def _run(self) -> Any:
        """W&B's run, opened by the first value: until then, nothing is asked of the network."""
        if self._opened is None:
            self._opened = self._open()
            # W&B's step may only grow, also when an epoch is repeated: so axes are of our own, and
            # rows just get numbers. Offline, W&B does not know how far an earlier start came.
            starts = len(
                [*Path(self._opened.dir).parents[1].glob(f"offline-run-*-{self._opened.id}")]
            )
            earlier = OFFLINE_ROWS * (starts - 1) if starts else 0
            self._rows = itertools.count(max(self._opened.step, earlier))
            self._opened.define_metric("epoch")
            self._opened.define_metric("*", step_metric="epoch")
        if self._hyperparams:
            self._opened.config.update(self._hyperparams["params"], allow_val_change=True)
            self._opened.summary.update(self._hyperparams["metrics"])
            self._hyperparams = {}
        return self._opened

    def _open(self) -> Any:
        import wandb

        start = functools.partial(wandb.init, **self._options)
        if _told("disabled").lower() in ("1", "true", "yes", "on"):
            return start(mode="disabled")
        if (self._options.get("mode") or wandb.setup().settings.mode) != "online":
            return start()
        try:
            # Whoever is not logged in would be asked for a key, and the training would wait.
            if not wandb.login(prompt=False, verify=False):
                raise wandb.errors.UsageError("not logged in, see `wandb login`")
            return start()
        except wandb.errors.Error as error:
            wandb.teardown()
            logger.warning("W&B: %s. The run is kept here; `wandb sync` sends it later.", error)
            return start(mode="offline")

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self._hyperparams = {"params": dict(params), "metrics": dict(metrics)}

    def log_step(self, stage: str, metrics: Mapping[str, Any], step: int, epoch: int) -> None:
        axis = f"{stage}_steps/step"
        values = {f"{stage}_steps/{name}": value for name, value in metrics.items()}
        for name in values.keys() - self._axes:
            self._run().define_metric(name, step_metric=axis)
            self._axes.add(name)
        self._log(values | {axis: step, "epoch": epoch})

    def log_metrics(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        self._log_of(stage, metrics, step)

    def log_audio(
        self, stage: str, key: str, audio: torch.Tensor, sample_rate: int, step: int
    ) -> None:
        import wandb

        # Given samples rather than a file, W&B would ask for one more package.
        with tempfile.NamedTemporaryFile(suffix=".wav") as file:
            write_wav(file.name, audio, sample_rate)
            self._log_of(stage, {key: wandb.Audio(file.name)}, step)

    def log_image(self, stage: str, key: str, image: torch.Tensor, step: int) -> None:
        import wandb

        self._log_of(stage, {key: wandb.Image(to_bytes(image))}, step)

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        import wandb

        self._log_of(stage, {key: wandb.Table(columns=["text"], data=[[text]])}, step)

    def _log_of(self, stage: str, values: Mapping[str, Any], epoch: int) -> None:
        self._log({f"{stage}/{key}": value for key, value in values.items()} | {"epoch": epoch})

    def _log(self, row: dict[str, Any]) -> None:
        self._run().log(row, step=next(self._rows))


def _told(name: str) -> str:
    """Return the environment's value of an argument of `wandb.init`, if any."""
    prefix = "WANDB_RUN_" if name in ("id", "group") else "WANDB_"
    return os.environ.get(prefix + name.upper(), "")
