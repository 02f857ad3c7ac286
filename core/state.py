"""State: the part of an object in a checkpoint, and an adapter for each kind of object.

A checkpoint holds tensors and plain containers only. `KINDS` lists the adapters; the first that
matches a value is taken. To add a kind, put an adapter before the first that would match it.
"""

from __future__ import annotations

import logging
import weakref
from argparse import Namespace
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from .modules import fit_tensors, load_module_state, module_state, other_shape, shard_like
from .utils import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
StateDict = dict[str, Any]
Problems = list[str]
PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}


class StateDictSource(Protocol):
    """An object with state."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


@dataclass(frozen=True)
class Adapter:
    """Functions to save and restore a kind of value.

    Args:
        matches: whether a value is of this kind.
        get: return the state of a value.
        set: restore a value in place; with `replaces`, return a new value instead.
        fit: return the fitting part of a state, and the problems with the rest.
    """

    matches: Callable[[Any], bool]
    get: Callable[[Any], Any]
    set: Callable[[Any, Any], Any]
    fit: Callable[[Any, Any, str], tuple[Any, Problems]] = lambda value, state, name: (state, [])
    replaces: bool = False


def to_plain(
    value: Any,
    name: str = "state",
    copy: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Any:
    """Convert a state to tensors and plain containers; TypeError names a value of another type.

    Args:
        value: the state.
        name: of the state in errors.
        copy: applied to each tensor.
    """
    if isinstance(value, torch.Tensor):
        # A tensor that is sharded across ranks (`fully_shard`) is gathered, on all of them.
        return copy(value.full_tensor() if hasattr(value, "full_tensor") else value)
    if type(value) in PLAIN:
        return value
    if isinstance(value, OrderedDict) and hasattr(value, "_metadata"):  # of a module, has versions
        state = OrderedDict((key, to_plain(v, f"{name}.{key}", copy)) for key, v in value.items())
        state._metadata = value._metadata  # type: ignore[attr-defined]
        return state
    if isinstance(value, Mapping):
        return {to_plain(key, name): to_plain(v, f"{name}.{key}", copy) for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(to_plain(v, f"{name}.{i}", copy) for i, v in enumerate(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(v, f"{name}.{i}", copy) for i, v in enumerate(value)]
    if isinstance(value, np.ndarray):
        return copy(torch.from_numpy(value.copy()))
    for kind, convert in _CONVERSIONS.items():
        if isinstance(value, kind):
            return to_plain(convert(value), name, copy)
    found = type(value).__qualname__
    raise TypeError(f"{name} is a {found}: a checkpoint holds tensors and plain containers only")


_CONVERSIONS: dict[type, Callable[[Any], Any]] = {
    np.generic: lambda value: value.item(),
    Enum: lambda value: value.name,
    Path: str,
    Namespace: vars,
}


# ----------------------------------------------------------------------------------- other kinds


def _load_optimizer(optim: Optimizer, state: Mapping[str, Any]) -> None:
    params = [p for group in optim.param_groups for p in group["params"]]
    sharded = {
        i: {k: shard_like(params[i], v) for k, v in about.items()}
        for i, about in state["state"].items()
    }
    optim.load_state_dict({**state, "state": sharded})


def _fit_optimizer(optim: Optimizer, state: Any, name: str) -> tuple[Any, Problems]:
    then, now = (
        [len(group["params"]) for group in groups]
        for groups in (state["param_groups"], optim.param_groups)
    )
    groups = f"{name}: groups of {then} parameters in the checkpoint, of {now} here"
    return state, [groups] if then != now else []


def _set_parameter(value: torch.Tensor, state: torch.Tensor) -> None:
    with torch.no_grad():
        value.copy_(shard_like(value, state))


def _fit_parameter(value: torch.Tensor, state: Any, name: str) -> tuple[Any, Problems]:
    difference = other_shape(value, state)
    return (value, [f"{name}: {difference}"]) if difference else (state, [])


def _refill(value: Any, state: Any) -> None:
    kept = state.copy()  # may be the value itself
    value.clear()
    (value.update if isinstance(value, dict) else value.extend)(kept)


def _typed(value: Any, state: Any) -> Any:
    """Return a plain state as the type of the value."""
    if value is None and isinstance(state, (dict, list)):
        raise TypeError("it is None here, but has a state: build it before restore")
    if isinstance(state, torch.Tensor):
        return (
            state.numpy()
            if isinstance(value, np.ndarray)
            else state.to(getattr(value, "device", "cpu"))
        )
    if isinstance(value, Enum):
        return type(value)[state]
    if isinstance(value, Path):
        return type(value)(state)
    return type(value)(*state) if hasattr(value, "_fields") else state


KINDS = [
    Adapter(
        lambda v: isinstance(v, nn.Module),
        module_state,
        load_module_state,
        lambda v, state, name: fit_tensors(module_state(v), state, name),
    ),
    Adapter(
        lambda v: isinstance(v, Optimizer),
        lambda v: v.state_dict(),
        _load_optimizer,
        _fit_optimizer,
    ),
    Adapter(
        lambda v: hasattr(v, "state_dict") and hasattr(v, "load_state_dict"),
        lambda v: v.state_dict(),
        lambda v, state: v.load_state_dict(state),
        lambda v, state, name: v.fit_state(state, name) if hasattr(v, "fit_state") else (state, []),
    ),
    Adapter(
        lambda v: isinstance(v, torch.Tensor) and v.requires_grad,
        lambda v: v,
        _set_parameter,
        _fit_parameter,
    ),
    Adapter(lambda v: isinstance(v, (list, dict, deque)), lambda v: v.copy(), _refill),
    Adapter(lambda v: True, lambda v: v, _typed, replaces=True),
]


# --------------------------------------------------------------------------------------- manager


class AttributeWrapper:
    """A (dotted) attribute of an object, as a source of state; the object is not kept alive."""

    def __init__(self, owner: Any, name: str) -> None:
        self.name = name
        self._owner = weakref.ref(owner)
        self.value  # noqa: B018 (raises now rather than when it is saved)

    @property
    def owner(self) -> Any:
        """The object."""
        return self._owner()

    @property
    def value(self) -> Any:
        """The attribute; AttributeError names the missing part."""
        try:
            parent, last = self._parent()
            return getattr(parent, last)
        except AttributeError as error:
            raise AttributeError(f"can't register {self.name!r} as state: {error}") from None

    def _parent(self) -> tuple[Any, str]:
        *path, last = self.name.split(".")
        parent = self.owner
        for part in path:
            parent = getattr(parent, part)
        return parent, last

    @property
    def _adapter(self) -> Adapter:
        return next(kind for kind in KINDS if kind.matches(self.value))

    def state_dict(self) -> Any:
        """Return the state; of later changes, only tensors' show in the state."""
        return self._adapter.get(self.value)

    def load_state_dict(self, state: Any) -> None:
        """Restore the attribute, in place where possible."""
        adapter = self._adapter
        new = adapter.set(self.value, state)
        if adapter.replaces:
            setattr(*self._parent(), new)

    def fit_state(self, state: Any, name: str) -> tuple[Any, Problems]:
        """Return the fitting part of a state, and the problems with the rest."""
        return self._adapter.fit(self.value, state, name)


class WriteOnlyWrapper:
    """A source whose state is saved, for people to read, and never restored."""

    def __init__(self, source: StateDictSource) -> None:
        self.source = source

    def state_dict(self) -> Any:
        """Return the state."""
        return self.source.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Ignore the state."""


class StateManager:
    """The states of several sources, by name; itself a source."""

    def __init__(self) -> None:
        self.sources: dict[str, StateDictSource] = {}

    def register(self, name: str, source: StateDictSource, write_only: bool = False) -> None:
        """Add a source; ValueError if the name is taken or reserved.

        Args:
            name: of the entry in a checkpoint.
            source: an object with `state_dict` and `load_state_dict`.
            write_only: save, for people to read, but never restore.
        """
        if name in ("checkpoint", "rng"):
            raise ValueError(f"{name!r} is an entry of each checkpoint: rename yours")
        if name in self.sources:
            raise ValueError(f"{name!r} is registered as state already: once is enough")
        self.sources[name] = WriteOnlyWrapper(source) if write_only else source

    def subset(self, names: Iterable[str]) -> StateManager:
        """Return a manager of some of the sources; ValueError names an unknown name."""
        part = StateManager()
        for name in names:
            if name not in self.sources:
                raise ValueError(f"{name!r} is no registered state; {', '.join(self.sources)} are")
            part.register(name, self.sources[name])
        return part

    def state_dict(self) -> StateDict:
        """Return the states of all sources, as tensors and plain containers."""
        return {name: to_plain(source.state_dict(), name) for name, source in self.sources.items()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Restore the sources whose states are given; the others stay as they are.

        Args:
            state: of some sources, by name.
            strict: raise a UserError with all misfits, and change nothing; else warn, and load the
                rest.
        """
        usable, problems = self.fitting(state)
        self.refuse(problems, strict)
        for name, value in usable.items():
            self.sources[name].load_state_dict(value)

    @staticmethod
    def refuse(problems: Problems, strict: bool) -> None:
        """Raise a UserError with all problems, if any, or warn."""
        if problems and strict:
            raise UserError(
                f"the checkpoint does not fit this code and config: {'; '.join(problems)}. Go back "
                "to those, load the rest with strict=False, or start anew (`dora run --clear`)"
            )
        if problems:
            logger.warning("Skipped, for it differs in the checkpoint: %s", "; ".join(problems))

    def fitting(self, state: Mapping[str, Any]) -> tuple[StateDict, Problems]:
        """Return the fitting part of a state, and the problems with the rest."""
        problems = [f"{n}: unexpected" for n in sorted(state.keys() - self.sources.keys())]
        usable, differ = {n: state[n] for n in self.sources if n in state}, []
        for name in usable:
            if isinstance(source := self.sources[name], AttributeWrapper):
                usable[name], found = source.fit_state(usable[name], name)
                differ += found
        for name in usable.keys() & self.values(Optimizer) if differ else ():
            differ.append(f"{name}: of other weights")
            del usable[name]
        return usable, problems + sorted(differ)

    def missing(self, state: Mapping[str, Any]) -> Problems:
        """Return the sources absent from a state."""
        readable = (n for n, s in self.sources.items() if not isinstance(s, WriteOnlyWrapper))
        return [f"{name}: missing" for name in readable if name not in state]

    def holds(self, value: object) -> bool:
        """Return whether an object with a state of its own is registered."""
        return hasattr(value, "load_state_dict") and any(
            value is known for known in self.values(object).values()
        )

    def values(self, kind: type[T]) -> dict[str, T]:
        """Return the registered attributes of a type, by name."""
        known = {n: s.value for n, s in self.sources.items() if isinstance(s, AttributeWrapper)}
        return {name: value for name, value in known.items() if isinstance(value, kind)}
