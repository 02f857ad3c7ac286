"""Trackers of metrics and media: local files, TensorBoard, Weights & Biases, or your own.

`tensorboard.py` and `wandb.py` are imported when used.
"""

from .base import Tracker, check_audio, check_image, check_names
from .local import LocalFiles

__all__ = ["LocalFiles", "Tracker", "check_audio", "check_image", "check_names"]
