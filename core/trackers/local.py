"""Local files: results without a service or a package."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from itertools import compress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..metrics import Metrics
from .base import Tracker, to_bytes, write_wav

logger = logging.getLogger(__name__)

BEGIN = re.compile(rb'{"stage": "[^"\\]*", "epoch": (\d+), ')  # of a row


class LocalFiles(Tracker):
    """Writes `metrics.jsonl`, and media to `outputs/<stage>_<epoch>/`.

    A row of `metrics.jsonl` has `stage`, `epoch`, `metrics`, and the `step` of a point of the
    curves by step; a row without a step is the summary of a stage.

    Args:
        xp: the run.
        with_media_logging: write media as well.
    """

    _resumed: tuple[int, Collection[str], Mapping[str, int]] | None = None  # until the next row

    def log_metrics(self, stage: str, metrics: Metrics, step: int) -> None:
        self._write({"stage": stage, "epoch": step, "metrics": metrics})

    def log_step(self, stage: str, metrics: Metrics, step: int, epoch: int) -> None:
        self._write({"stage": stage, "epoch": epoch, "step": step, "metrics": metrics})

    def resume(self, epoch: int, done: Collection[str], steps: Mapping[str, int] | None) -> None:
        self._resumed = epoch, done, steps or {}

    def _write(self, row: dict[str, Any]) -> None:
        path = self.xp.folder / "metrics.jsonl"
        if self._resumed and path.exists():
            _cut(path, *self._resumed)
        self._resumed = None
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def log_audio(self, stage: str, key: str, audio: Tensor, sample_rate: int, step: int) -> None:
        write_wav(str(self._media(stage, key, step, ".wav")), audio, sample_rate)

    def log_image(self, stage: str, key: str, image: Tensor, step: int) -> None:
        from PIL import Image

        Image.fromarray(to_bytes(image)).save(self._media(stage, key, step, ".png"))

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        self._media(stage, key, step, ".txt").write_text(text, "utf-8", "backslashreplace")

    def _media(self, stage: str, key: str, step: int, suffix: str) -> Path:
        path = self.xp.folder / "outputs" / f"{stage}_{step}" / f"{key}{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


def _cut(path: Path, epoch: int, done: Collection[str], steps: Mapping[str, int]) -> None:
    """Drop the rows after the point of a resume, and damaged rows."""

    def stays(line: bytes) -> bool:
        if (begin := BEGIN.match(line)) and int(begin[1]) < epoch and line.endswith(b"}\n"):
            return True  # not parsed: there may be millions
        try:
            row = json.loads(line) if line.endswith(b"\n") else {}
            stage, step = row["stage"], row.get("step")
            is_before = stage in done if step is None else step <= steps.get(stage, 0)
            return bool(row["epoch"] <= (epoch if is_before else epoch - 1))
        except (ValueError, TypeError, LookupError):
            logger.warning("%s: dropped a damaged line, such as one torn by a kill", path)
            return False

    lines = path.read_bytes().splitlines(keepends=True)
    stay = [stays(line) for line in lines]
    first = stay.index(False) if False in stay else len(lines)
    with path.open("r+b") as file:
        file.seek(sum(map(len, lines[:first])))
        # Rows move towards the beginning: a kill here may repeat some, and loses none.
        file.writelines(compress(lines[first:], stay[first:]))
        file.truncate()
