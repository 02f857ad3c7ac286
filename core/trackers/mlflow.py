"""MLflow."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..run import XP
from ..utils import flatten
from .base import Tracker, to_bytes, write_wav


class MLflow(Tracker):
    """Sends results to the server of `MLFLOW_TRACKING_URI`, or to `mlflow.db` beside the runs.

    A resumed run is found by its signature, and continues; repeated steps come twice.

    Args:
        xp: the run.
        with_media_logging: keep media as well.
        project: name of the experiment; `runs` by default.
        name: of the run; the signature by default.
        options: ignored.
    """

    def __init__(
        self,
        xp: XP,
        with_media_logging: bool = True,
        project: str | None = None,
        name: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(xp, with_media_logging)
        self.project, self.name = project or "runs", name or xp.sig
        self._params: dict[str, Any] = {}
        self._opened: tuple[Any, str] | None = None

    @property
    def _run(self) -> tuple[Any, str]:
        """A client, and the id of the run, which is made by the first value."""
        if self._opened is None:
            from mlflow import MlflowClient

            runs = self.xp.folder.resolve().parent
            client: Any = MlflowClient(
                os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"
            )
            place = None if "MLFLOW_TRACKING_URI" in os.environ else (runs / "mlflow").as_uri()
            known = client.get_experiment_by_name(self.project)
            where = known.experiment_id if known else client.create_experiment(self.project, place)
            found = client.search_runs([where], f"tags.sig = '{self.xp.sig}'")
            tags = {"sig": self.xp.sig}
            run = found[0] if found else client.create_run(where, tags=tags, run_name=self.name)
            self._opened = client, run.info.run_id
            for name, value in () if found else self._params.items():
                client.log_param(run.info.run_id, name, value)
        return self._opened

    def _log(self, group: str, metrics: Mapping[str, Any], step: int) -> None:
        from mlflow.entities import Metric

        client, run = self._run
        now = int(1000 * time.time())
        numbers = {n: v for n, v in metrics.items() if isinstance(v, (int, float))}
        values = [Metric(f"{group}/{n}", float(v), now, step) for n, v in numbers.items()]
        client.log_batch(run, values)

    def log_hyperparams(self, params: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        self._params = flatten(params)

    def log_metrics(self, stage: str, metrics: Mapping[str, Any], step: int) -> None:
        self._log(stage, metrics, step)

    def log_step(self, stage: str, metrics: Mapping[str, Any], step: int, epoch: int) -> None:
        self._log(f"{stage}_steps", metrics, step)

    def log_image(self, stage: str, key: str, image: torch.Tensor, step: int) -> None:
        client, run = self._run
        client.log_image(run, to_bytes(image), f"{stage}_{step}/{key}.png")

    def log_audio(
        self, stage: str, key: str, audio: torch.Tensor, sample_rate: int, step: int
    ) -> None:
        client, run = self._run
        with tempfile.TemporaryDirectory() as folder:
            write_wav(str(path := Path(folder, f"{key}.wav")), audio, sample_rate)
            client.log_artifact(run, str(path), f"{stage}_{step}")

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        client, run = self._run
        client.log_text(run, text, f"{stage}_{step}/{key}.txt")
