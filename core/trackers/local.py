"""Local files: results without a service or a package."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..metrics import Metrics
from ..utils import write_and_rename
from .base import Tracker, to_bytes, write_wav

logger = logging.getLogger(__name__)

# A row as it is written, with the epoch: damage to it is noticed, unless within the metrics.
ROW = re.compile(rb'{"stage": "[\w.-]*", "epoch": (\d+), ("step": \d+, )?"metrics": {[ -z|~]*}}\n')


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
    """Drop damaged rows, and rows after the point of a resume."""
    lines, kept, damaged = path.read_bytes().splitlines(keepends=True), [], 0
    for line in lines:
        try:
            known = ROW.match(line)
            if known is None or int(known[1]) >= epoch:  # to parse all may take long
                row = json.loads(line) if line.endswith(b"\n") else {}
                stage, step = row["stage"], row.get("step")
                is_before = stage in done if step is None else step <= steps.get(stage, 0)
                if row["epoch"] > (epoch if is_before else epoch - 1):
                    continue
            kept.append(line)
        except (ValueError, TypeError, LookupError):
            damaged += 1
    if len(kept) < len(lines):
        with write_and_rename(path) as file:
            file.writelines(kept)
    if damaged:
        logger.warning("%s: dropped %d damaged line(s), such as one torn by a kill", path, damaged)
