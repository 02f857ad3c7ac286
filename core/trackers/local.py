"""Plain files in the run's folder: always on, readable without any tool."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from ..utils import write_and_rename
from ..xp import XP
from .base import Tracker, to_bytes, write_wav


class LocalFiles(Tracker):
    """Writes `metrics.jsonl`, `hyperparams.json`, and media to `outputs/<stage>_<epoch>/`.

    In `metrics.jsonl`, a line without a `step` is the summary of a stage.

    Args:
        xp: the run.
        with_media_logging: write media as well.
    """

    def __init__(self, xp: XP, with_media_logging: bool = True) -> None:
        super().__init__(xp, with_media_logging)
        self._keep: Callable[[dict[str, Any]], bool] | None = None

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        with write_and_rename(self.xp.folder / "hyperparams.json", "w") as file:
            json.dump({"params": params, "metrics": metrics}, file, indent=2, default=str)

    def log_metrics(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        self._write({"stage": stage, "epoch": step, **metrics})

    def log_step(self, stage: str, metrics: Mapping[str, Any], step: int, epoch: int) -> None:
        self._write({"stage": stage, "epoch": epoch, "step": step, **metrics})

    def resume(self, epoch: int, done: Collection[str], steps: Mapping[str, int]) -> None:
        def keep(row: dict[str, Any]) -> bool:
            step, stage = row.get("step"), row["stage"]
            if row["epoch"] != epoch:
                return bool(row["epoch"] < epoch)
            return stage in done if step is None else bool(step <= steps.get(stage, 0))

        self._keep = keep

    def _write(self, row: dict[str, Any]) -> None:
        path = self.xp.folder / "metrics.jsonl"
        if self._keep and path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if (old := _parse(line)) and self._keep(old)]
            with write_and_rename(path, "w") as file:
                file.writelines(kept)
        self._keep = None
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def log_audio(
        self, stage: str, key: str, audio: torch.Tensor, sample_rate: int, step: int
    ) -> None:
        with self._media(stage, key, step, ".wav").open("wb") as file:
            write_wav(file, audio, sample_rate)

    def log_image(self, stage: str, key: str, image: torch.Tensor, step: int) -> None:
        from PIL import Image

        Image.fromarray(to_bytes(image)).save(self._media(stage, key, step, ".png"))

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        self._media(stage, key, step, ".txt").write_text(text)

    def _media(self, stage: str, key: str, step: int, suffix: str) -> Path:
        path = self.xp.folder / "outputs" / f"{stage}_{step}" / f"{key}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _parse(line: str) -> dict[str, Any] | None:
    """The row in a line; None if the line was torn when a run was killed."""
    with suppress(ValueError):
        row = json.loads(line)
        if line.endswith("\n") and isinstance(row, dict) and {"stage", "epoch"} <= row.keys():
            return row
    return None
