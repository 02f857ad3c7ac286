"""Local files: results without a service or a package."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..run import XP
from ..utils import write_and_rename
from .base import Tracker, to_bytes, write_wav

logger = logging.getLogger(__name__)


class LocalFiles(Tracker):
    """Writes `metrics.jsonl`, `hyperparams.json`, and media to `outputs/<stage>_<epoch>/`.

    A row of `metrics.jsonl` has `stage`, `epoch`, `metrics`, and the `step` of a point of the
    curves by step; a row without a step is the summary of a stage.

    Args:
        xp: the run.
        with_media_logging: write media as well.
    """

    def __init__(self, xp: XP, with_media_logging: bool = True) -> None:
        super().__init__(xp, with_media_logging)
        self._keeps: Callable[[dict[str, Any]], bool] | None = None

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        with write_and_rename(self.xp.folder / "hyperparams.json", "w") as file:
            json.dump({"params": params, "metrics": metrics}, file, indent=2, default=str)

    def log_metrics(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        self._write({"stage": stage, "epoch": step, "metrics": metrics})

    def log_step(self, stage: str, metrics: Mapping[str, Any], step: int, epoch: int) -> None:
        self._write({"stage": stage, "epoch": epoch, "step": step, "metrics": metrics})

    def resume(self, epoch: int, done: Collection[str], steps: Mapping[str, int] | None) -> None:
        def keeps(row: dict[str, Any]) -> bool:
            step, stage = row.get("step"), row["stage"]
            if row["epoch"] != epoch:
                return bool(row["epoch"] < epoch)
            return stage in done if step is None else bool(step <= (steps or {}).get(stage, 0))

        self._keeps = keeps

    def _write(self, row: dict[str, Any]) -> None:
        path = self.xp.folder / "metrics.jsonl"
        if self._keeps and path.exists():
            with write_and_rename(path) as file:
                file.writelines(line for line, old in _rows(path) if self._keeps(old))
        self._keeps = None
        with path.open("a", encoding="utf-8") as file:
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
        self._media(stage, key, step, ".txt").write_text(text, encoding="utf-8")

    def _media(self, stage: str, key: str, step: int, suffix: str) -> Path:
        path = self.xp.folder / "outputs" / f"{stage}_{step}" / f"{key}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _rows(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield the intact lines of a file and their rows; damaged lines are counted."""
    damaged = 0
    for line in path.read_bytes().splitlines(keepends=True):
        try:
            row = json.loads(line) if line.endswith(b"\n") else {}
            row["stage"], row["epoch"] + 0  # raises if they are not there
            yield line, row
        except (ValueError, TypeError, LookupError):
            damaged += 1
    if damaged:
        logger.warning("%s: dropped %d damaged lines, such as one torn by a kill", path, damaged)
