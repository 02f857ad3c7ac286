"""The solver core: state, checkpoints, logging, distributed training and data loading.

These files are yours: read them, edit them. Start with `solver.py`.
"""

from . import adversarial, checkpoint, distrib, loader, rng, state, trackers, utils, weights, xp
from .formatter import Formatter
from .logging import LogProgressBar, ResultLogger, bold, setup_logging
from .solver import BaseSolver
from .utils import averager

__version__ = "0.1.0"

__all__ = [
    "BaseSolver",
    "Formatter",
    "LogProgressBar",
    "ResultLogger",
    "adversarial",
    "averager",
    "bold",
    "checkpoint",
    "distrib",
    "loader",
    "rng",
    "setup_logging",
    "state",
    "trackers",
    "utils",
    "weights",
    "xp",
]

distrib.loader = loader.loader
