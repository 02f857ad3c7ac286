"""Random number generators: seeds, and their state on every rank."""

from __future__ import annotations

import logging
import random
from typing import Any

import numpy as np
import torch

from . import distrib

logger = logging.getLogger(__name__)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and CUDA; each rank gets a stream of its own."""
    if distrib.rank():
        seed = derive_seed(seed, distrib.rank(), *b"rank")  # not a sum, which other seeds have too
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def derive_seed(*numbers: int) -> int:
    """One well-mixed 63-bit seed from several numbers."""
    state = np.random.SeedSequence([n % 2**32 for n in numbers]).generate_state(1, np.uint64)
    return int(state[0] >> np.uint64(1))


class RNGState:
    """The random number generators of Python, NumPy, torch and its device, of every rank."""

    def state_dict(self) -> dict[str, Any]:
        """Gather the generators of all ranks."""
        return {"ranks": distrib.gather_objects(get_rng_state())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set this rank's generators; those of a rank that did not exist are left alone."""
        ranks = state["ranks"]
        if len(ranks) != distrib.world_size() and distrib.is_rank_zero():
            logger.warning(
                "Saved by %d processes, restored by %d: random numbers, the shares of the data and "
                "the order of sums differ from here on, so the rest is not bitwise the same",
                len(ranks),
                distrib.world_size(),
            )
        if distrib.rank() < len(ranks):
            set_rng_state(ranks[distrib.rank()])


def get_rng_state() -> dict[str, Any]:
    """The state of this process's random number generators."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "mps": torch.mps.get_rng_state() if torch.backends.mps.is_available() else None,
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Set this process's random number generators."""
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy | {"state": numpy["state"] | {"key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
    if state.get("mps") is not None and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
