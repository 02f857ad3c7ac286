"""The runs of a Dora grid, as `sweep` runs them: states, a table, and the same for scripts."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import treetable as tt
from dora.explore import Explorer, Herd, Launcher
from dora.hydra import HydraMain
from dora.shep import Sheep


class Grid:
    """The runs of a Dora grid, with their states.

    Args:
        main: the project's entry point, which Dora decorated.
        name: of a module with an `explorer`, in the package `grids`.
    """

    def __init__(self, main: Any, name: str) -> None:
        self._main = main
        self._explorer: Any = _explorer(f"{main.package}.grids", name)
        shepherd: Any = SimpleNamespace(main=main)
        shepherd.get_sheep_from_argv = lambda argv: Sheep(main.get_xp(argv))
        herd = Herd()
        # Not that of the project, which asks for Slurm.
        slurm = HydraMain.get_slurm_config(main)
        self._explorer(Launcher(shepherd, slurm, herd))
        if not herd.sheeps:
            sys.exit(f"sweep: the explorer of {name} has no runs: let it call its launcher")
        self._sheeps = list(herd.sheeps.values())
        self.runs = [sheep.xp for sheep in self._sheeps]
        self.states = {xp.sig: "PENDING" for xp in self.runs}
        self.processes = {sig: int(slurm.gpus) for sig, slurm in herd.slurm_configs.items()}

    def table(self) -> str:
        """Return the states, and the columns that the explorer makes of the histories."""
        named = [[f"{key}={value}" for key, value in xp.delta or ()] for xp in self.runs]
        common = [part for part in named[0] if all(part in parts for parts in named)]
        rows = []
        for index, (sheep, parts) in enumerate(zip(self._sheeps, named, strict=True)):
            history = self._main.get_xp_history(sheep.xp)
            try:
                columns = self._explorer.process_sheep(sheep, history)
            except NotImplementedError:
                columns = self._explorer.process_history(history)
            name = " ".join(part for part in parts if part not in common)
            meta = {"index": index, "name": name, "sig": sheep.xp.sig, "sid": ""}
            rows.append({"Meta": meta | {"state": self.states[sheep.xp.sig]}, **columns})
        groups = [tt.group("Meta", self._explorer.get_grid_meta())]
        groups += self._explorer.get_grid_metrics()
        table = tt.treetable(rows, tt.table(groups), colors=self._explorer.get_colors())
        return "\n".join([*(["In all runs: " + " ".join(common)] if common else []), table])

    def summary(self) -> list[dict[str, Any]]:
        """Return of each run its signature, overrides, state, and latest metrics by stage."""
        found = []
        for xp in self.runs:
            latest: dict[str, Any] = {}
            for epoch in self._main.get_xp_history(xp):
                latest |= epoch
            about = {"sig": xp.sig, "overrides": xp.argv, "state": self.states[xp.sig]}
            found.append(about | {"metrics": latest})
        return found


def _explorer(package: str, name: str) -> Explorer:
    """Return the explorer of a grid; exit, and name the grids, if there is none."""
    folder = Path(importlib.import_module(package).__file__ or "").parent
    if not folder.joinpath(*name.split(".")).with_suffix(".py").is_file():
        known = sorted(path.stem for path in folder.glob("[!_]*.py"))
        sys.exit(f"sweep: no grid {name} in {folder}; there are {', '.join(known)}")
    module = importlib.import_module(f"{package}.{name}")
    if not isinstance(explorer := getattr(module, "explorer", None), Explorer):
        sys.exit(f"sweep: {module.__file__} has no `explorer`, a function under a dora.Explorer")
    return explorer
