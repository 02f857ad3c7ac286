"""State: named sources, gathered to be saved and given back when restored."""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .plain import to_plain
from .utils import UserError
from .weights import (
    EMA,
    Best,
    is_parameter,
    load_module_state,
    load_optimizer_state,
    module_state,
    reconcile,
    shard_like,
)

logger = logging.getLogger(__name__)

StateDict = dict[str, Any]


@runtime_checkable
class StateDictSource(Protocol):
    """Anything that can tell its state and take it back, such as a module or an optimizer."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


class AttributeWrapper:
    """A (dotted) attribute of an object, seen as a source of state.

    An attribute with a `state_dict` of its own is asked for it; lists, dicts and parameters are
    copied out and restored in place; anything else is set, as the type that it was. Of a module
    that is compiled, or wrapped for distributed training, it or a part of it, the original names
    are kept. The owner is not kept alive.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.name = name
        self._owner = weakref.ref(owner)
        self.value  # noqa: B018 (raises now rather than when it is saved)

    def _parent(self) -> tuple[Any, str]:
        *path, last = self.name.split(".")
        parent = self._owner()
        for part in path:
            parent = getattr(parent, part)
        return parent, last

    @property
    def value(self) -> Any:
        """The attribute."""
        try:
            parent, last = self._parent()
            return getattr(parent, last)
        except AttributeError as error:
            raise AttributeError(f"can't register {self.name!r} as state: {error}") from None

    def state_dict(self) -> Any:
        """The attribute's state; a list or dict is copied, so later changes don't reach it."""
        value = self.value
        if isinstance(value, nn.Module):
            return module_state(value)
        if isinstance(value, StateDictSource):
            return value.state_dict()
        return value.copy() if isinstance(value, (list, dict)) else value

    def load_state_dict(self, state: Any) -> None:
        """Restore the attribute, in place where it can be."""
        value = self.value
        if isinstance(value, nn.Module):
            load_module_state(value, state)
        elif isinstance(value, Optimizer):
            load_optimizer_state(value, state)
        elif isinstance(value, StateDictSource):
            value.load_state_dict(state)
        elif is_parameter(value):
            with torch.no_grad():
                value.copy_(shard_like(value, state))
        elif isinstance(value, (list, deque)):
            items = list(state)
            value.clear()
            value.extend(items)
        elif isinstance(value, dict):
            restored = dict(state)
            value.clear()
            value.update(restored)
        elif value is None and isinstance(state, (dict, list)):
            raise TypeError(f"{self.name!r} is None here, but has a state: build it before restore")
        else:
            parent, last = self._parent()
            setattr(parent, last, _typed(value, state))

    @property
    def follows_weights(self) -> bool:
        """Is the state of no use without the very weights that it was saved with?"""
        return isinstance(self.value, (Optimizer, Best))


def _typed(value: Any, state: Any) -> Any:
    """What a checkpoint made of such a value, as that type again."""
    if isinstance(value, np.ndarray) and isinstance(state, torch.Tensor):
        return state.numpy()
    if isinstance(value, torch.Tensor) and isinstance(state, torch.Tensor):
        return state.to(value.device)
    if isinstance(value, Enum):
        return type(value)[state]
    if isinstance(value, Path):
        return type(value)(state)
    if hasattr(value, "_fields"):  # a named tuple
        return type(value)(*state)
    return state


def unregistered(owner: Any, manager: StateManager) -> list[str]:
    """Names of the owner's attributes that change as it trains, but are in no registered source."""
    known = [s.value for s in manager.sources.values() if isinstance(s, AttributeWrapper)]
    known += [part for value in known for part in getattr(value, "__dict__", {}).values()]
    known += [p for value in known if isinstance(value, nn.Module) for p in value.parameters()]
    saved = {id(value) for value in known}

    def trains(value: Any) -> bool:
        if isinstance(value, nn.Module):
            return any(p.requires_grad and id(p) not in saved for p in value.parameters())
        return isinstance(value, (Optimizer, LRScheduler, Best, EMA))

    return [name for name, v in vars(owner).items() if id(v) not in saved and trains(v)]


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
        """Add a source; ValueError if the name is taken or reserved."""
        if name == "checkpoint":
            raise ValueError("'checkpoint' is what a checkpoint calls its own entry: rename it")
        if name in self.sources:
            raise ValueError(f"{name!r} is registered as state already: once is enough")
        self.sources[name] = WriteOnlyWrapper(source) if write_only else source

    def subset(self, names: Iterable[str]) -> StateManager:
        """A manager of some of the sources; ValueError names those that are not registered."""
        part = StateManager()
        for name in names:
            if name not in self.sources:
                raise ValueError(f"{name!r} is no registered state; {', '.join(self.sources)} are")
            part.register(name, self.sources[name])
        return part

    def state_dict(self) -> StateDict:
        """Gather the state of all sources, as tensors and plain containers.

        All ranks must call it: a source may need its siblings on the other ranks.
        """
        return {name: to_plain(source.state_dict(), name) for name, source in self.sources.items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Give each source its state back.

        Args:
            strict: if entries are missing, unexpected or of another shape, raise a UserError that
                lists them all, and change nothing; otherwise warn and load the rest.
        """
        readable = {n: s for n, s in self.sources.items() if not isinstance(s, WriteOnlyWrapper)}
        problems = [f"{n}: missing" for n in sorted(readable.keys() - state.keys())]
        problems += [f"{n}: unexpected" for n in sorted(state.keys() - self.sources.keys())]
        usable = {name: state[name] for name in readable if name in state}
        attributes = {n: s for n, s in readable.items() if isinstance(s, AttributeWrapper)}
        differ: list[str] = []
        for name in attributes.keys() & usable.keys():
            usable[name], found = reconcile(attributes[name].value, usable[name], name)
            differ += found
        for name in [n for n, s in attributes.items() if differ and s.follows_weights]:
            if usable.pop(name, None) is not None:
                differ.append(f"{name}: of other weights")
        if problems := problems + sorted(differ):
            if strict:
                raise UserError(
                    f"the checkpoint does not fit this code and config: {'; '.join(problems)}. Go "
                    "back to those that it was made with; or load what fits, by strict=False in "
                    "`restore` or `continue_from`; or start anew, by `dora run --clear` or another "
                    "value in the config"
                )
            logger.warning("Skipped, for it differs in the checkpoint: %s", "; ".join(problems))
        for name, value in usable.items():
            readable[name].load_state_dict(value)
