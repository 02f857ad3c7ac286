"""Negative controls: would the campaign notice if an entry of the state were left out?

A run is stopped within an epoch. In its checkpoint, one entry becomes that of an earlier stop. The
run must then end differently from an undisturbed run, or refuse to resume: a campaign that does
not notice the loss of an entry proves nothing about this entry.
"""

import shutil
from typing import Any

import torch

from .faults import Campaign, Run, load, same

CURSOR = ("checkpoint", "cursor")
GENERATORS = ("python", "numpy", "torch")
Keys = tuple[str | int, ...]

# Entries of a checkpoint within training, and within validation.
IN_TRAIN: list[Keys] = [
    *((name,) for name in ("model", "optim", "schedule", "ema", "history")),
    *(("rng", "ranks", 0, name) for name in GENERATORS),
    *((*CURSOR, "ranks", 0, when, name) for when in ("start", "loop") for name in GENERATORS),
    *((*CURSOR, "ranks", 0, name) for name in ("averages", "layout")),
    *((*CURSOR, name) for name in ("stage", "step", "counts")),
]
IN_VALID: list[Keys] = [(*CURSOR, "done"), (*CURSOR, "logged")]
OTHERS: dict[Any, Any] = {"done": [], "step": 2, "stage": "valid", "layout": (120, 1)}
CONTROLS = {".".join(map(str, path)): ("train", path) for path in IN_TRAIN}
CONTROLS |= {".".join(map(str, path)): ("valid", path) for path in IN_VALID}


def stopped(campaign: Campaign, hold: str) -> Run:
    """Return a run that was asked to stop in an epoch and stage."""
    run = Run(campaign.project, campaign.work / f"stopped-{hold}", campaign.gate)
    if not run.outputs.exists():
        run.stop(hold)
    return run


def notices(campaign: Campaign, control: str) -> bool:
    """Return whether the loss of an entry is noticed; with an empty name, nothing is lost."""
    stage, path = CONTROLS.get(control, ("train", ()))
    base, other = (stopped(campaign, f"{epoch}{stage}") for epoch in (4, 3))
    name = "-".join(map(str, path)) or "none"
    run = Run(campaign.project, campaign.work / f"control-{name}", campaign.gate)
    shutil.copytree(base.outputs, run.outputs)
    state = load(run.checkpoint)
    if path:
        replace(state, load(other.checkpoint), path)
        torch.save(state, run.checkpoint)
    code, _ = run.finish()
    return code != 0 or not campaign.is_exact(run)


def replace(state: Any, other: Any, path: Keys) -> None:
    """Replace an entry by that of another state, or by another value if both are the same."""
    *parents, last = path
    for step in parents:
        state, other = state[step], other[step]
    new = OTHERS.get(last, other[last])
    assert not same(state[last], new), f"{path} is the same in both"
    state[last] = new
