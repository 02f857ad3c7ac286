"""Where metrics and media go: local files, TensorBoard, Weights & Biases, or your own."""

from .base import Tracker
from .local import LocalFiles
from .tensorboard import TensorBoard
from .wandb import WandB

__all__ = ["LocalFiles", "TensorBoard", "Tracker", "WandB"]
