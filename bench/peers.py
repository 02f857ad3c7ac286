"""What some peers need before they can be used outside of a project of theirs."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader


def hush() -> None:
    """Let peers say errors only."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric", "lightning_fabric", "ignite"):
        logging.getLogger(name).setLevel(logging.ERROR)


def dora_xp(folder: Path) -> Any:
    """A run of Dora without its command, for Flashy."""
    from dora.conf import DoraConfig
    from dora.xp import XP
    from omegaconf import OmegaConf

    xp = XP(DoraConfig(dir=folder / "dora"), OmegaConf.create({"seed": 0}), [], [])
    xp.folder.mkdir(parents=True, exist_ok=True)
    return xp


def lightning_trainer(
    model: nn.Module, optim: torch.optim.Optimizer, folder: Path, batch: torch.Tensor
) -> Any:
    """A Trainer that has done one step, so that it can save."""
    from lightning.pytorch import LightningModule, Trainer

    hush()

    class Module(LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(batch).square().mean()
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return optim

    on = next(model.parameters()).device.type
    trainer = Trainer(
        accelerator="gpu" if on == "cuda" else "cpu",
        devices=1,
        max_steps=1,
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    data: Any = [batch]
    trainer.fit(Module(), DataLoader(data, batch_size=None))
    return trainer
