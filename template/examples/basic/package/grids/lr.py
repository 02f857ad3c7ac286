"""A sweep over learning rates: one run for each call of the launcher.

`dora grid lr` runs it on a Slurm cluster, and on this machine, without Slurm, that is what
`python -m {{ cookiecutter.package_name }}.tools.sweep lr` does.
"""

from typing import Any

import treetable as tt
from dora.explore import Launcher

from . import LastEpoch


class Losses(LastEpoch):
    """Says what the table shows."""

    def get_grid_metrics(self) -> list[Any]:
        """Columns, with their formats."""
        return [
            tt.group("train", [tt.leaf("epoch"), tt.leaf("loss", ".4f")]),
            tt.group("valid", [tt.leaf("loss", ".4f")]),
        ]


@Losses
def explorer(launcher: Launcher) -> None:
    """Define the runs."""
    for lr in (0.01, 0.1, 1.0):
        launcher({"optim.lr": lr})
