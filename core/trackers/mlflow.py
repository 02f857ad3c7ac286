"""MLflow."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .base import to_bytes, write_wav
from .service import Service


class MLflow(Service):
    """Sends results to the server of `MLFLOW_TRACKING_URI`, or to `mlflow.db` beside the runs.

    A resumed run is found by its signature, and continues; repeated steps come twice. A run is
    RUNNING until it is complete.
    """

    def _open(self) -> tuple[Any, str]:
        """Return a client, and the id of the run."""
        from mlflow import MlflowClient

        runs = self.xp.folder.resolve().parent
        client: Any = MlflowClient(
            os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{runs / 'mlflow.db'}"
        )
        place = None if "MLFLOW_TRACKING_URI" in os.environ else (runs / "mlflow").as_uri()
        known = client.get_experiment_by_name(self.project)
        where = known.experiment_id if known else client.create_experiment(self.project, place)
        if found := client.search_runs([where], f"tags.sig = '{self.xp.sig}'"):
            run = found[0].info.run_id
            client.update_run(run, "RUNNING")
            return client, run
        made = client.create_run(where, tags={"sig": self.xp.sig}, run_name=self.name)
        for name, value in self.params.items():
            client.log_param(made.info.run_id, name, value)
        return client, made.info.run_id

    def _close(self, run: tuple[Any, str]) -> None:
        client, run_id = run
        client.set_terminated(run_id)

    def _log(self, stage: str, values: Mapping[str, Any], step: int) -> None:
        from mlflow.entities import Metric

        client, run = self._run
        now = int(1000 * time.time())
        numbers = {n: v for n, v in values.items() if isinstance(v, (int, float))}
        metrics = [Metric(f"{stage}/{n}", float(v), now, step) for n, v in numbers.items()]
        client.log_batch(run, metrics)

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
