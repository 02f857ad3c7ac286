"""Plain files in the run's folder: always on, readable without any tool."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from ..utils import write_and_rename
from ..xp import XP
from .base import Tracker, to_bytes, write_wav


class LocalFiles(Tracker):
    """Writes `metrics.jsonl`, `hyperparams.json`, and media to `outputs/<stage>_<epoch>/`.

    Args:
        xp: the run.
        with_media_logging: write media as well.
    """

    def __init__(self, xp: XP, with_media_logging: bool = True) -> None:
        super().__init__(xp, with_media_logging)
        self._resumed = False

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        with write_and_rename(self.xp.folder / "hyperparams.json", "w") as file:
            json.dump({"params": params, "metrics": metrics}, file, indent=2, default=str)

    def log_metrics(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        path = self.xp.folder / "metrics.jsonl"
        if not self._resumed:
            self._forget_from(path, step)
        with path.open("a") as file:
            file.write(json.dumps({"stage": stage, "epoch": step, **metrics}) + "\n")

    def _forget_from(self, path: Path, step: int) -> None:
        """Drop what a run that was killed wrote of the epochs that are about to be repeated."""
        self._resumed = True
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _precedes(line, step)]
            with write_and_rename(path, "w") as file:
                file.writelines(kept)

    def log_audio(
        self, stage: str, key: str, audio: torch.Tensor, sample_rate: int, step: int
    ) -> None:
        for path in self._media(stage, key, step, ".wav"):
            with path.open("wb") as file:
                write_wav(file, audio, sample_rate)

    def log_image(self, stage: str, key: str, image: torch.Tensor, step: int) -> None:
        from PIL import Image

        for path in self._media(stage, key, step, ".png"):
            Image.fromarray(to_bytes(image)).save(path)

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        for path in self._media(stage, key, step, ".txt"):
            path.write_text(text)

    def _media(self, stage: str, key: str, step: int, suffix: str) -> Iterator[Path]:
        """The path for a medium; none if media are off."""
        if self.with_media_logging:
            path = self.xp.folder / "outputs" / f"{stage}_{step}" / f"{key}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            yield path


def _precedes(line: str, step: int) -> bool:
    """Is this a whole line of an earlier epoch?"""
    try:
        return line.endswith("\n") and bool(json.loads(line)["epoch"] < step)
    except (ValueError, KeyError):
        return False
