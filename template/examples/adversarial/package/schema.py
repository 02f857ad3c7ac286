"""The type of every config key; the values are in config/config.yaml.

A key on the command line that is not here, or of another type, is refused before anything is built.
"""

from dataclasses import dataclass
from typing import Any

from .core.checkpoint import Policy


@dataclass
class DataConfig:
    batch_size: int
    num_workers: int
    limit: int


@dataclass
class ModelConfig:
    noise: int
    width: int
    dropout: float


@dataclass
class OptimConfig:
    lr: float
    momentum: float


@dataclass
class Config:
    epochs: int
    seed: int
    device: str
    detect_anomaly: bool
    log_updates: int
    log_every: int
    trackers: list[str]
    wandb: dict[str, Any]
    tags: list[str]
    note: str
    samples: int
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    checkpoint: Policy
    slurm: dict[str, Any]
    dora: dict[str, Any]
