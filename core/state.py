"""What the state of a run is: named sources, gathered to be saved and given back when restored."""

from __future__ import annotations

import logging
import math
import random
import weakref
import zlib
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from enum import Enum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from . import distrib
from .utils import UserError

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
    restored in place; anything else is set. Of a module that is compiled or wrapped for
    distributed training the bare names are kept. The owner is not kept alive.
    """

    def __init__(self, owner: Any, name: str) -> None:
        self.name = name
        self._owner = weakref.ref(owner)
        self.value  # noqa: B018

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
        elif isinstance(value, torch.optim.Optimizer):
            load_optimizer_state(value, state)
        elif isinstance(value, StateDictSource):
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

    def reconcile(self, state: Any) -> tuple[Any, list[str]]:
        """What of a state can be loaded, and by name what can't; only weights are compared."""
        value = self.value
        if isinstance(value, nn.Module):
            return _reconcile(module_state(value), state, self.name)
        if isinstance(value, EMA):
            found = {
                n: _reconcile(dict(own), state.get(n, {}), f"{self.name}.{n}")
                for n, own in value.states.items()
            }
            return {n: usable for n, (usable, _) in found.items()}, [
                problem for _, problems in found.values() for problem in problems
            ]
        return state, []

    @property
    def follows_weights(self) -> bool:
        """Is the state of no use without the very weights that it was saved with?"""
        return isinstance(self.value, (torch.optim.Optimizer, Best))


def _reconcile(usable: Any, state: Mapping[str, Any], name: str) -> tuple[Any, list[str]]:
    """Replace in our own tensors those that a state has too; list what differs."""
    problems = [f"{name}.{key}: unexpected" for key in state.keys() - usable.keys()]
    for key, own in usable.items():
        if key not in state:
            problems.append(f"{name}.{key}: missing")
        elif _shape(own) not in (None, _shape(state[key])):
            shapes = f"{_shape(state[key])} in the checkpoint, {_shape(own)} here"
            problems.append(f"{name}.{key}: {shapes}")
        else:
            usable[key] = state[key]
    return usable, sorted(problems)


def _shape(value: Any) -> tuple[int, ...] | None:
    known = isinstance(value, torch.Tensor) and not is_lazy(value)
    return tuple(value.shape) if known else None


def module_state(module: nn.Module) -> dict[str, Any]:
    """The state of a module, with the names it has when neither compiled nor distributed."""
    return _renamed(_bare(module).state_dict(), _bare_name)


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a module, compiled or distributed or not, what `module_state` gave."""
    module = _bare(module)
    own = module.state_dict()
    names = {_bare_name(n): n for n in (*getattr(own, "_metadata", {}), *own)}
    state = _renamed(state, lambda name: names.get(name, name))
    for name in own.keys() & state.keys():
        state[name] = _spread_like(own[name], state[name])
    module.load_state_dict(state)


def load_optimizer_state(optim: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give an optimizer its state, spread over ranks where its parameters are."""
    params = [p for group in optim.param_groups for p in group["params"]]
    spread = {
        i: {k: _spread_like(params[i], v) for k, v in about.items()} if i < len(params) else about
        for i, about in state["state"].items()
    }
    optim.load_state_dict({**state, "state": spread})


def _spread_like(own: Any, whole: Any) -> Any:
    """A tensor, spread over the ranks as `own` is; a model under `fully_shard` has such."""
    if not hasattr(own, "placements") or _shape(own) != _shape(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Each rank has read all of it, and keeps its part: nothing needs to be sent.
    tensor = whole.to(own.device)
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)


def _bare(module: nn.Module) -> nn.Module:
    if isinstance(module, nn.parallel.DistributedDataParallel):
        wrapped: nn.Module = module.module
        return wrapped
    return module


def _bare_name(name: str) -> str:
    """Name of a parameter without what `torch.compile` adds."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def _renamed(state: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    renamed = OrderedDict((rename(name), value) for name, value in state.items())
    if hasattr(state, "_metadata"):  # versions of the modules, by their names
        about = {rename(name): value for name, value in state._metadata.items()}
        renamed._metadata = OrderedDict(about)  # type: ignore[attr-defined]
    return renamed


def summary(value: Any) -> str:
    """Of a module: its class, number of parameters, size, and a checksum of its weights.

    Two runs whose checksums agree start from the same weights. Empty for anything but a module. All
    ranks must call it.
    """
    if not isinstance(value, nn.Module):
        return ""
    count = sum(p.numel() for p in value.parameters())
    trained = sum(p.numel() for p in value.parameters() if p.requires_grad)
    some = "" if trained == count else f", {trained:,} of them trained"
    checksum, size = 0, 0
    for tensor in plain(module_state(value), copy=lambda t: t.detach().cpu()).values():
        if isinstance(tensor, torch.Tensor):
            size += tensor.nbytes
            data = tensor.contiguous().view(-1).view(torch.uint8)
            checksum = zlib.crc32(data.numpy().tobytes(), checksum)
    return (
        f"{type(_bare(value)).__name__}, {count:,} parameters{some}, {size / 2**20:.1f} MiB, "
        f"weights {checksum:08x}"
    )


class Records(list[Any]):
    """A list that may grow long, of records that do not change, such as the history.

    A snapshot of it is a list of the same records, however many: they are made plain as they are
    written, in the background.
    """

    def copy(self) -> Records:
        return Records(self)


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
        return {name: plain(source.state_dict(), name) for name, source in self.sources.items()}

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
            usable[name], found = attributes[name].reconcile(usable[name])
            differ += found
        for name in [n for n, s in attributes.items() if differ and s.follows_weights]:
            if usable.pop(name, None) is not None:
                differ.append(f"{name}: of other weights")
        if problems := problems + sorted(differ):
            if strict:
                raise UserError(
                    f"the checkpoint does not fit this code: {'; '.join(problems)}. Go back to the "
                    "code that it was made with; or start anew (`dora run --clear`, or another "
                    "value in the config); or load what fits, by restore(strict=False)"
                )
            logger.warning("Skipped, for it differs in the checkpoint: %s", "; ".join(problems))
        for name, value in usable.items():
            readable[name].load_state_dict(value)


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
        return {"ranks": distrib.gather_objects(get_generators())}

    def load_state_dict(self, state: StateDict) -> None:
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
            set_generators(ranks[distrib.rank()])


def get_generators() -> StateDict:
    """The state of this process's random number generators."""
    numpy = np.random.get_state(legacy=False)
    numpy["state"]["key"] = torch.from_numpy(numpy["state"]["key"].astype(np.int64))
    return {
        "python": random.getstate(),
        "numpy": numpy,
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
    }


def set_generators(state: StateDict) -> None:
    """Set this process's random number generators."""
    random.setstate(state["python"])
    numpy = state["numpy"]
    key = numpy["state"]["key"].numpy().astype(np.uint32)
    np.random.set_state(numpy | {"state": numpy["state"] | {"key": key}})
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


class Best:
    """A copy, in host memory, of some modules at the best value of a metric so far.

    Args:
        modules: to copy, by name.
        mode: whether the best value is the `min` or the `max`.
    """

    def __init__(self, modules: Mapping[str, nn.Module], mode: str = "min") -> None:
        if mode not in ("min", "max"):
            raise ValueError(f"Best: mode must be min or max, not {mode!r}")
        self.modules = dict(modules)
        self.mode = mode
        self.value = math.inf if mode == "min" else -math.inf
        self.states: dict[str, Any] = {}

    def update(self, value: float) -> bool:
        """Copy the modules if `value` is better than all before; return whether it was.

        NaN never is. All ranks must call it, and go by the value of rank zero.
        """
        value = distrib.broadcast_object(float(value))
        if not (value < self.value if self.mode == "min" else value > self.value):
            return False
        self.value = value
        self.states = {
            name: plain(module_state(m), copy=lambda t: t.detach().to("cpu", copy=True))
            for name, m in self.modules.items()
        }
        return True

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the modules have their best state in the body, and their own again after it."""
        with _swapped(self.modules, self.states):
            yield

    def state_dict(self) -> StateDict:
        """The best value and the states that gave it."""
        return {"value": self.value, "states": dict(self.states)}

    def load_state_dict(self, state: StateDict) -> None:
        """Take back what `state_dict` gave."""
        self.value, self.states = state["value"], dict(state["states"])


class EMA:
    """Exponential moving averages of the weights of modules.

    Often better than the weights themselves: Polyak & Juditsky (1992), "Acceleration of stochastic
    approximation by averaging". Averages are in float32 at least; integers (counters) are copied.

    Args:
        modules: to average, by name.
        decay: weight of the past at each update; with 0 the averages are the weights.
    """

    def __init__(self, modules: Mapping[str, nn.Module], decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"EMA: decay must be at least 0 and below 1, not {decay}")
        self.modules = dict(modules)
        self.decay = decay
        self.states: dict[str, dict[str, torch.Tensor]] = {}
        self._averages: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        self._copies: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for name, module in self.modules.items():
            # With their variables, for those remain the same when a module moves.
            tensors = _renamed(_bare(module).state_dict(keep_vars=True), _bare_name)
            self.states[name] = {}
            for key, value in tensors.items():
                if not isinstance(value, torch.Tensor):
                    continue
                # Half precision would lose the small steps of an average.
                half = value.dtype in (torch.float16, torch.bfloat16)
                average = value.detach().to(torch.float32 if half else value.dtype, copy=True)
                floating = average.is_floating_point() or average.is_complex()
                averages, values = self._averages if floating else self._copies
                averages.append(average)
                values.append(value)
                self.states[name][key] = average

    @torch.no_grad()
    def reset(self) -> None:
        """Start anew from the weights as they are, such as after `continue_from`."""
        for averages, values in (self._averages, self._copies):
            for average, value in zip(averages, values, strict=True):
                average.copy_(value)

    @torch.no_grad()
    def update(self) -> None:
        """Follow the modules; call it after each step of the optimizer."""
        averages, values = self._averages
        same = [v.to(a.dtype) for a, v in zip(averages, values, strict=True)]
        if same:
            torch._foreach_lerp_(averages, same, 1 - self.decay)
        for copy, value in zip(*self._copies, strict=True):
            copy.copy_(value)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the modules have their averages in the body, and their own weights after it."""
        with _swapped(self.modules, self.states):
            yield

    def state_dict(self) -> StateDict:
        """The averages, by the names of the modules."""
        return dict(self.states)

    def load_state_dict(self, state: StateDict) -> None:
        """Take back what `state_dict` gave."""
        for name, averages in self.states.items():
            for key, average in averages.items():
                average.copy_(_spread_like(average, state[name][key]))


@contextmanager
def _swapped(modules: Mapping[str, nn.Module], states: Mapping[str, Any]) -> Iterator[None]:
    own = {name: deepcopy(module_state(modules[name])) for name in states}
    try:
        for name, state in states.items():
            load_module_state(modules[name], module_state(modules[name]) | state)
        yield
    finally:
        for name, state in own.items():
            load_module_state(modules[name], state)


def plain(
    value: Any,
    name: str = "state",
    copy: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Any:
    """Convert a state to tensors and plain containers, which are all that a checkpoint may hold.

    Configs, enums, paths and NumPy values are converted; TypeError names anything else.

    Args:
        value: the state.
        name: how to call it in errors.
        copy: applied to each tensor.
    """
    if isinstance(value, torch.Tensor):
        # What is spread over the ranks (`fully_shard`) is put together, on all of them.
        return copy(value.full_tensor() if hasattr(value, "full_tensor") else value)
    if type(value) in _PLAIN or isinstance(value, Records):
        return value
    if isinstance(value, OrderedDict) and hasattr(value, "_metadata"):  # of a module, has versions
        state = OrderedDict((key, plain(v, f"{name}.{key}", copy)) for key, v in value.items())
        state._metadata = value._metadata  # type: ignore[attr-defined]
        return state
    if isinstance(value, Mapping):
        return {plain(key, name): plain(v, f"{name}.{key}", copy) for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(v, f"{name}.{i}", copy) for i, v in enumerate(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(v, f"{name}.{i}", copy) for i, v in enumerate(value)]
    return _converted(value, name, copy)


def _converted(value: Any, name: str, copy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return copy(torch.from_numpy(value.copy()))
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Namespace):
        return plain(vars(value), name, copy)
    raise TypeError(
        f"{name} is a {type(value).__qualname__}, which a checkpoint can't hold: "
        "keep tensors, numbers, strings, lists and dicts in the state"
    )
