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
    context: int
    updates_per_epoch: int


@dataclass
class ModelConfig:
    layers: int
    width: int
    heads: int
    dropout: float


@dataclass
class OptimConfig:
    lr: float
    weight_decay: float
    warmup: int
    clip: float
    bf16: bool


@dataclass
class SampleConfig:
    prompt: str
    length: int


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
    data: DataConfig
    model: ModelConfig
    optim: OptimConfig
    sample: SampleConfig
    checkpoint: Policy
    slurm: dict[str, Any]
    dora: dict[str, Any]
