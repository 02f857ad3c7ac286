"""The type of every config key; the values are in config/config.yaml.

A key on the command line that is not here, or of another type, is refused before anything is built.
"""

from dataclasses import dataclass
from typing import Any

from .core.checkpoint import Policy


@dataclass
class DataConfig:
    name: str
    folder: str | None
    batch_size: int
    num_workers: int
    limit: int


@dataclass
class ModelConfig:
    channels: int
    dropout: float
    compile: bool


@dataclass
class OptimConfig:
    lr: float
    weight_decay: float
    warmup: int
    clip: float
    bf16: bool
    ema: float


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
    continue_from: str | None
    continue_with: str
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    checkpoint: Policy
    slurm: dict[str, Any]
    dora: dict[str, Any]
