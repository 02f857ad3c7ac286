"""Random number generators: seeds, and the state of all generators of a process."""

from __future__ import annotations

import random
from collections.abc import MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch

from . import distrib


@dataclass
class Position:
    """The place of a run. Besides the seed, the order of data depends on nothing else.

    Args:
        epoch: from 1.
        stage: checksum of the stage's name and repetition in the epoch.
        step: of its loop; 0 while data is fetched.
        passes: of each sampler, where its last pass was, and the number of this pass there.
    """

    epoch: int = 0
    stage: int = 0
    step: int = 0
    passes: MutableMapping[Any, Any] = field(default_factory=WeakKeyDictionary)


# A solver sets it; each solver of a process has its own, as one may run in a stage of another.
position: ContextVar[Position] = ContextVar("position", default=Position())  # noqa: B039


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and its device; each rank gets a stream of its own."""
    if distrib.rank():
        seed = derive_seed(seed, distrib.rank(), *b"rank")  # not a sum, which other seeds have too
    seed_process(seed)


def seed_process(seed: int) -> None:
    """Seed the generators of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derive_seed(*numbers: int) -> int:
    """Return a well-mixed 63-bit seed from several numbers."""
    state = np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


def get_rng_state() -> dict[str, Any]:
    """Return the state of this process's generators, as tensors and plain containers."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    state = {"python": random.getstate(), "numpy": numpy, "torch": torch.get_rng_state()}
    device = accelerator()
    return state | {"device": device.get_rng_state() if device else None}


def set_rng_state(state: dict[str, Any]) -> None:
    """Set this process's generators."""
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy | {"state": numpy["state"] | {"key": key}})
    torch.set_rng_state(state["torch"])
    device = accelerator()
    if state["device"] is not None and device:
        device.set_rng_state(state["device"])


def accelerator() -> Any:
    """Return the module of the accelerator in use, such as `torch.cuda`, if any."""
    device = torch.accelerator.current_accelerator()
    if device is None:
        return None
    module = torch.get_device_module(device)
    in_use = getattr(module, "is_initialized", lambda: True)()  # a query would start it
    return module if in_use else None
