"""State: the part of an object in a checkpoint, and an adapter for each kind of object.

A checkpoint holds tensors and plain containers only. `KINDS` lists the adapters; the first that
matches a value is taken. To add a kind, put an adapter before the first that would match it.
"""

from __future__ import annotations

import logging
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy, deepcopy
from dataclasses import dataclass
from functools import partial
from operator import attrgetter, methodcaller
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
from torch import Generator, nn
from torch.optim import Optimizer

from .modules import (
    fit_module,
    gathered,
    lending,
    load_module_state,
    module_state,
    other_shape,
    shard_like,
)
from .plain import from_plain, on_device, to_plain
from .utils import Accumulation, UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")
StateDict = dict[str, Any]
Problems = list[str]


class StateDictSource(Protocol):
    """An object with state."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state: Any) -> Any: ...


def fit(source: Any, state: Any, name: str) -> tuple[Any, Problems]:
    """Return the fitting part of a state, and the problems with the rest, if a source can tell."""
    return source.fit_state(state, name) if hasattr(source, "fit_state") else (state, [])


@dataclass(frozen=True)
class Adapter:
    """Functions to save and restore a kind of value; by default the value's own methods.

    Args:
        matches: whether a value is of this kind.
        get: return the state of a value.
        set: restore a value in place; with `replaces`, return a new value instead.
        fit: return the fitting part of a state, and the problems with the rest.
        marks: mark tensors of an accelerator in the state, to come back to one.
    """

    matches: Callable[[Any], bool]
    get: Callable[[Any], Any] = methodcaller("state_dict")
    set: Callable[[Any, Any], Any] = lambda value, state: value.load_state_dict(state)
    fit: Callable[[Any, Any, str], tuple[Any, Problems]] = fit
    replaces: bool = False
    marks: bool = False


# -------------------------------------------------------------------------------------- adapters


def _load_optimizer(optim: Optimizer, state: Mapping[str, Any]) -> None:
    params = [p for group in optim.param_groups for p in group["params"]]
    if any(hasattr(param, "placements") for param in params):
        optim.state.clear()  # no room for two states
    states = {
        i: {k: _own_value(params[i], v) for k, v in about.items()}
        for i, about in state["state"].items()
    }
    optim.load_state_dict({**state, "state": states})
    for i, about in states.items():
        ours = optim.state[params[i]]
        for key, saved in about.items():
            now = ours.get(key)
            # PyTorch rounds to the precision of the weights, or keeps the tensor of the file.
            kept = now is state["state"][i][key]
            if isinstance(now, torch.Tensor) and (now.dtype != saved.dtype or kept):
                ours[key] = saved.to(now.device, copy=True)


def _own_value(param: torch.Tensor, value: Any) -> Any:
    return shard_like(param, value) if isinstance(value, torch.Tensor) else deepcopy(value)


def _fit_optimizer(optim: Optimizer, state: Any, name: str) -> tuple[Any, Problems]:
    then = [len(group["params"]) for group in state["param_groups"]]
    now = [len(group["params"]) for group in optim.param_groups]
    groups = f"{name}: groups of {then} parameters in the checkpoint, of {now} here"
    return state, [groups] if then != now else []


def _is_trained(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.requires_grad


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


def _contents(value: Any) -> Any:
    """Return a copy of a container; the type stays with the attribute, to be filled again."""
    parts = value.values() if isinstance(value, dict) else value
    if any(isinstance(part, nn.Parameter) for part in parts):
        raise TypeError("a container of parameters: make it an nn.ParameterList or ParameterDict")
    if type(value) in (list, dict, OrderedDict, Counter, deque):
        return copy(value)
    return dict(value) if isinstance(value, dict) else list(value)


def _replace(value: Any, state: Any) -> Any:
    """Return the state for an attribute; fill and return its tensor or array, if alike.

    So variables that refer to it stay valid.
    """
    if value is None and (owner := isinstance(state, OrderedDict) and vars(state).get("owner")):
        raise TypeError(f"it is None here, with the state of a {owner}: build it before restore")
    array = isinstance(value, (torch.Tensor, np.ndarray)) and type(state) is type(value)
    if array and (value.shape, value.dtype) == (state.shape, state.dtype):
        with suppress(RuntimeError, ValueError), torch.no_grad():  # such as an expanded tensor
            value[...] = state
            return value
    both = isinstance(value, torch.Tensor) and isinstance(state, torch.Tensor)
    return state.to(value.device) if both else state


_bits = attrgetter("bit_generator.state")


def _set_bits(generator: np.random.Generator, state: Any) -> None:
    generator.bit_generator.state = state


KINDS = [
    Adapter(lambda v: isinstance(v, nn.Module), module_state, load_module_state, fit_module),
    Adapter(lambda v: isinstance(v, Optimizer), set=_load_optimizer, fit=_fit_optimizer),
    Adapter(lambda v: hasattr(v, "state_dict") and hasattr(v, "load_state_dict")),
    Adapter(_is_trained, lambda v: v, _set_parameter, _fit_parameter),
    Adapter(lambda v: isinstance(v, Generator), Generator.get_state, Generator.set_state),
    Adapter(lambda v: isinstance(v, np.random.Generator), _bits, _set_bits),
    Adapter(lambda v: isinstance(v, (list, dict, deque)), _contents, _refill, marks=True),
    Adapter(lambda v: True, lambda v: v, _replace, replaces=True, marks=True),
]


# --------------------------------------------------------------------------------------- manager


class AttributeWrapper:
    """A (dotted) attribute of an object, as a source of state; the object is not kept alive."""

    def __init__(self, owner: Any, name: str) -> None:
        self.name = name
        self.owner = weakref.proxy(owner)
        if isinstance(self.value, nn.Module) and not self.value.state_dict():
            logger.warning("%s has an empty state_dict: nothing of it is saved", name)

    @property
    def value(self) -> Any:
        """The attribute; AttributeError names the missing part."""
        try:
            return attrgetter(self.name)(self.owner)
        except AttributeError as error:
            raise AttributeError(f"can't register {self.name!r} as state: {error}") from None

    @property
    def adapter(self) -> Adapter:
        """The adapter of the value's kind."""
        return next(kind for kind in KINDS if kind.matches(self.value))

    def state_dict(self) -> Any:
        """Return the state; of later changes, only tensors' show in the state."""
        value = self.value
        state = self.adapter.get(value)
        if type(state) in (dict, OrderedDict) and not isinstance(value, dict):
            about = getattr(state, "__dict__", {}) | {"owner": type(value).__name__}
            vars(state := OrderedDict(state)).update(about)
        return state

    @property
    def fits(self) -> bool:
        """Whether a loaded state is copied into the value's own tensors."""
        return self.adapter.fit is not fit or hasattr(self.value, "fit_state")

    def load_state_dict(self, state: Any) -> None:
        """Restore the attribute, in place where possible."""
        adapter = self.adapter
        new = adapter.set(self.value, state)
        if adapter.replaces:
            path, _, last = self.name.rpartition(".")
            setattr(attrgetter(path)(self.owner) if path else self.owner, last, new)

    def fit_state(self, state: Any, name: str) -> tuple[Any, Problems]:
        """Return the fitting part of a state, and the problems with the rest."""
        adapter, own = self.adapter, self.state_dict()
        if not adapter.replaces and isinstance(own, dict) != isinstance(state, dict):
            kinds = f"{type(state).__name__} in the checkpoint, {type(own).__name__} here"
            return own, [f"{name}: {kinds}"]
        return adapter.fit(self.value, state, name)


class WriteOnlyWrapper:
    """A source whose state is saved, for people to read, and never restored."""

    def __init__(self, source: StateDictSource) -> None:
        self.source = source

    def state_dict(self) -> Any:
        """Return the state."""
        return self.source.state_dict()

    def load_state_dict(self, state: Any) -> None:
        """Ignore the state."""


def _saved(keeps: bool, marks: bool, tensor: Any, name: str) -> Any:
    """Return a tensor as it is saved: a shard or whole, marked if from an accelerator."""
    whole = tensor if keeps else gathered(tensor)
    return on_device(whole) if marks and not tensor.is_cpu else whole


def _owned(tensor: Any) -> Any:
    """Return a copy of a tensor read from a file, for an object that keeps what it is given."""
    return shard_like(None, tensor).clone()


class StateManager:
    """The states of several sources, by name; itself a source."""

    def __init__(self) -> None:
        self.sources: dict[str, StateDictSource] = {}
        self.keeps_shards = False

    def register(self, name: str, source: StateDictSource, write_only: bool = False) -> None:
        """Add a source; ValueError if the name is taken or reserved.

        Args:
            name: of the entry in a checkpoint.
            source: an object with `state_dict` and `load_state_dict`.
            write_only: save, for people to read, but never restore.
        """
        if name in ("checkpoint", "rng", "shards"):
            raise ValueError(f"{name!r} is an entry of each checkpoint: rename yours")
        if name in self.sources:
            raise ValueError(f"{name!r} is registered as state already: once is enough")
        if not write_only and isinstance(source, AttributeWrapper) and source.adapter.replaces:
            to_plain(source.value, name, exact=True)  # refuses it before anything is trained
        self.sources[name] = WriteOnlyWrapper(source) if write_only else source

    def state_dict(self) -> StateDict:
        """Return the states of all sources, as tensors and plain containers."""
        states = {}
        for name, source in self.sources.items():
            try:
                state = source.state_dict()
            except Exception as error:
                error.add_note(f"raised by the state of {name}")
                raise
            keeps = self.keeps_shards and getattr(source, "fits", False)
            marks = isinstance(source, AttributeWrapper) and source.adapter.marks
            copy = partial(_saved, keeps, marks)
            states[name] = to_plain(state, name, copy, not isinstance(source, WriteOnlyWrapper))
        return states

    @contextmanager
    def keeping_shards(self) -> Iterator[None]:
        """In the body, leave the tensors of modules and optimizers sharded, not gathered."""
        self.keeps_shards = True
        try:
            yield
        finally:
            self.keeps_shards = False

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
        """Return the fitting part of a state, and the problems with the rest.

        Marked tensors come to the accelerator of the registered weights, if those are on one.
        """
        usable: StateDict = {}
        differ: Problems = []
        held = [*self.values(torch.Tensor).values()]
        held += [p for module in self.values(nn.Module).values() for p in module.parameters()]
        home = next((tensor.device for tensor in held if not tensor.is_cpu), None)
        for name in (name for name in self.sources if name in state):
            source = self.sources[name]
            copy = (lambda tensor: tensor) if getattr(source, "fits", False) else _owned
            usable[name], found = fit(source, from_plain(state[name], home, copy), name)
            differ += found
        for name in usable.keys() & self.values(Optimizer) if differ else ():
            differ.append(f"{name}: of other weights")
            del usable[name]
        unexpected = [f"{name}: unexpected" for name in state.keys() - self.sources.keys()]
        return usable, sorted(unexpected + differ)

    def missing(self, state: Mapping[str, Any]) -> Problems:
        """Return the sources absent from a state."""
        readable = (n for n, s in self.sources.items() if not isinstance(s, WriteOnlyWrapper))
        return [f"{name}: missing" for name in readable if name not in state]

    def holds(self, value: object) -> bool:
        """Return whether an object with a state of its own is registered."""
        registered = self.values(object).values()
        return hasattr(value, "load_state_dict") and any(value is known for known in registered)

    def is_complete(self) -> bool:
        """Return whether a save holds all there is: no weights are lent, no gradients pending."""
        optimizers = self.values(Optimizer).values()
        return not lending.get() and not any(Accumulation.of(o).is_pending(o) for o in optimizers)

    def values(self, kind: type[T]) -> dict[str, T]:
        """Return the registered attributes of a type, by name."""
        known = {n: s.value for n, s in self.sources.items() if isinstance(s, AttributeWrapper)}
        return {name: value for name, value in known.items() if isinstance(value, kind)}
