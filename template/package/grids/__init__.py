"""Dora grids: files here with an `explorer`, run by `dora grid <name>`; and what they share."""

from typing import Any

from dora.explore import Explorer


class LastEpoch(Explorer):
    """Shows, of each run, the metrics of its last epoch by stage; its number is a metric too."""

    def process_history(self, history: list[dict[str, Any]]) -> dict[str, Any]:
        """Values for the columns, from the metrics of all epochs so far."""
        last = history[-1] if history else {"train": {}, "valid": {}}
        return last | {"train": last.get("train", {}) | {"epoch": len(history)}}
