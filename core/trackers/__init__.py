"""Trackers of metrics and media: local files, TensorBoard, W&B, Trackio, MLflow, Aim, or your own.

The files of services are imported when used.
"""

from .base import Tracker, check_audio, check_image, check_names
from .local import LocalFiles

__all__ = ["LocalFiles", "Tracker", "check_audio", "check_image", "check_names"]
