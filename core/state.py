"""What the state of a run is: named sources, gathered to be saved and given back when restored."""

from __future__ import annotations

import logging
import random
import weakref
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch

from . import distrib

logger = logging.getLogger(__name__)

StateDict = dict[str, Any]

_PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}


@runtime_checkable
class StateDictSource(Protocol):
    """Anything that can tell its state and take it back, such as a module or an optimizer."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class AttributeWrapper:
    """A (dotted) attribute of an object, seen as a source of state.

    An attribute with a `state_dict` of its own is asked for it; lists and dicts are copied out and
    restored in place; anything else is set. The owner is not kept alive.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.name = name
        self._owner = weakref.ref(owner)
        self._get()

    def _parent(self) -> tuple[Any, str]:
        *path, last = self.name.split(".")
        parent = self._owner()
        for part in path:
            parent = getattr(parent, part)
        return parent, last

    def _get(self) -> Any:
        try:
            parent, last = self._parent()
            return getattr(parent, last)
        except AttributeError as error:
            raise AttributeError(f"can't register {self.name!r} as state: {error}") from None

    def state_dict(self) -> Any:
        """The attribute's state; a list or dict is copied, so later changes don't reach it."""
        value = self._get()
        if isinstance(value, StateDictSource):
            return value.state_dict()
        return value.copy() if isinstance(value, (list, dict)) else value

    def load_state_dict(self, state: Any) -> None:
        """Restore the attribute, in place where it can be."""
        value = self._get()
        if isinstance(value, StateDictSource):
            value.load_state_dict(state)
        elif isinstance(value, list):
            value[:] = list(state)
        elif isinstance(value, dict):
            restored = dict(state)
            value.clear()
            value.update(restored)
        elif value is None and isinstance(state, (dict, list)):
            raise TypeError(f"{self.name!r} is None here, but has a state: build it before restore")
        else:
            parent, last = self._parent()
            setattr(parent, last, state)


class WriteOnlyWrapper:
    """A source whose state is saved, for people to read, and never restored."""

    def __init__(self, source: StateDictSource) -> None:
        self.source = source

    def state_dict(self) -> Any:
        """The state of the source."""
        return self.source.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Do nothing."""


class StateManager:
    """Sources of state by name; itself a source."""

    def __init__(self) -> None:
        self.sources: dict[str, StateDictSource] = {}

    def register(self, name: str, source: StateDictSource, write_only: bool = False) -> None:
        """Add a source; ValueError if the name is taken."""
        if name in self.sources:
            raise ValueError(f"{name!r} is registered as state already")
        self.sources[name] = WriteOnlyWrapper(source) if write_only else source

    def state_dict(self) -> StateDict:
        """Gather the state of all sources, as tensors and plain containers.

        All ranks must call it: a source may need its siblings on the other ranks.
        """
        return {name: plain(source.state_dict(), name) for name, source in self.sources.items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Give each source its state back.

        Args:
            strict: if names are missing or unexpected, raise a KeyError that lists them and change
                nothing; otherwise warn and load the rest.
        """
        readable = {n for n, s in self.sources.items() if not isinstance(s, WriteOnlyWrapper)}
        missing = sorted(readable - state.keys())
        unexpected = sorted(state.keys() - self.sources.keys())
        if missing or unexpected:
            message = (
                f"state and checkpoint disagree: missing from the checkpoint: {missing or 'none'}; "
                f"in the checkpoint but not registered: {unexpected or 'none'}"
            )
            if strict:
                raise KeyError(message)
            logger.warning(message)
        for name, source in self.sources.items():
            if name in state:
                source.load_state_dict(state[name])


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy, torch and CUDA; each rank gets a stream of its own."""
    seed += distrib.rank()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class RNGState:
    """The random number generators of Python, NumPy, torch and CUDA, of every rank."""

    def state_dict(self) -> StateDict:
        """Gather the generators of all ranks."""
        numpy = np.random.get_state(legacy=False)
        numpy["state"]["key"] = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
        mine = {
            "python": random.getstate(),
            "numpy": numpy,
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        }
        return {"ranks": distrib.gather_objects(mine)}

    def load_state_dict(self, state: StateDict) -> None:
        """Set this rank's generators; those of a rank that did not exist are left alone."""
        ranks = state["ranks"]
        if len(ranks) != distrib.world_size():
            logger.warning(
                "Saved by %d processes, restored by %d: random numbers will not be the same",
                len(ranks),
                distrib.world_size(),
            )
        if distrib.rank() >= len(ranks):
            return
        mine = ranks[distrib.rank()]
        random.setstate(mine["python"])
        numpy = mine["numpy"]
        key = numpy["state"]["key"].numpy().astype(np.uint32)
        np.random.set_state(numpy | {"state": numpy["state"] | {"key": key}})
        torch.set_rng_state(mine["torch"])
        if mine["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(mine["cuda"])


def plain(value: Any, name: str = "state") -> Any:
    """Convert a state to tensors and plain containers, which are all that a checkpoint may hold.

    Configs, enums, paths and NumPy values are converted; TypeError names anything else.
    """
    if isinstance(value, torch.Tensor) or type(value) in _PLAIN:
        return value
    if isinstance(value, OrderedDict) and hasattr(value, "_metadata"):  # of a module, has versions
        state = OrderedDict((key, plain(v, f"{name}.{key}")) for key, v in value.items())
        state._metadata = value._metadata  # type: ignore[attr-defined]
        return state
    if isinstance(value, Mapping):
        return {plain(key, name): plain(v, f"{name}.{key}") for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(v, f"{name}.{i}") for i, v in enumerate(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v, f"{name}.{i}") for i, v in enumerate(value)]
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Namespace):
        return plain(vars(value), name)
    raise TypeError(
        f"{name} is a {type(value).__qualname__}, which a checkpoint can't hold: "
        "keep tensors, numbers, strings, lists and dicts in the state"
    )
