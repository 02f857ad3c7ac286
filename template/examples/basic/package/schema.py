"""The type of every config key; the values are in config/config.yaml.

A key on the command line that is not here, or of another type, is refused before anything is built.
"""

from dataclasses import dataclass
from typing import Any

from .core.checkpoint import Policy


@dataclass
class OptimConfig:
    lr: float


@dataclass
class Config:
    epochs: int
    updates_per_epoch: int
    seed: int
    device: str
    detect_anomaly: bool
    log_updates: int
    trackers: list[str]
    wandb: dict[str, Any]
    tags: list[str]
    note: str
    optim: OptimConfig
    checkpoint: Policy
    slurm: dict[str, Any]
    dora: dict[str, Any]
