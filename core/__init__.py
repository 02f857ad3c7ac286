"""The solver core: state, checkpoints, logging, distributed training and data loading.

These files are yours to read and edit. Start with `solver.py`.
"""

from . import adversarial, checkpoint, data, distrib, launch, rng, state, trackers, utils
from .log import LogProgressBar, bold, setup_logging
from .metrics import Formatter, averager
from .results import ResultLogger
from .solver import BaseSolver

__version__ = "0.2.0"

# fmt: off
__all__ = [
    "BaseSolver", "Formatter", "LogProgressBar", "ResultLogger", "adversarial", "averager", "bold",
    "checkpoint", "data", "distrib", "launch", "rng", "setup_logging", "state", "trackers",
    "utils",
]
# fmt: on
