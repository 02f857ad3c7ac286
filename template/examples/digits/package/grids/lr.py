"""A sweep over learning rates and widths: one run for each call of the launcher.

`dora grid lr` runs it on a Slurm cluster, and on this machine, without Slurm, that is what
`python -m {{ cookiecutter.package_name }}.tools.sweep lr` does.
"""

from typing import Any

import treetable as tt
from dora.explore import Launcher

from . import LastEpoch


class Digits(LastEpoch):
    """Says what the table shows."""

    def get_grid_metrics(self) -> list[Any]:
        """Columns, with their formats."""
        return [
            tt.group("train", [tt.leaf("epoch"), tt.leaf("loss", ".4f")]),
            tt.group("valid", [tt.leaf("loss", ".4f"), tt.leaf("acc", ".2%")]),
        ]


@Digits
def explorer(launcher: Launcher) -> None:
    """Define the runs."""
    # Overrides that all runs share. Likewise, `launcher.slurm_(gpus=2)` gives each two processes.
    launcher.bind_({"epochs": 5})
    for lr in (1e-3, 3e-3, 1e-2):
        launcher({"optim.lr": lr})
    # `bind` is for some of the runs only.
    launcher.bind({"model.channels": 16})({"optim.lr": 3e-3})
