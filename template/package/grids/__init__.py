"""Dora grids: files here with an `explorer`, run by `dora grid <name>`; and what they share."""

from typing import Any

from dora.explore import Explorer


class LastEpoch(Explorer):
    """Shows the latest metrics of each stage of a run, and the number of epochs with training."""

    def process_history(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        """Values for the columns, from the metrics of all epochs so far."""
        latest: dict[str, Any] = {"train": {}, "valid": {}}
        for epoch in history:
            latest |= epoch
        trained = sum("train" in epoch for epoch in history) or len(history)
        return latest | {"train": latest["train"] | {"epoch": trained}}
