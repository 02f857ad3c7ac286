"""Weights: the state of modules and optimizers, and copies of it (the best, averages)."""

from __future__ import annotations

import itertools
import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from copy import copy, deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from . import distrib
from .plain import to_plain
from .utils import UserError


def module_state(module: nn.Module) -> dict[str, Any]:
    """The state of a module, with the names it has when neither compiled nor distributed."""
    return _renamed(module.state_dict(), _original_names(module))


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a module, compiled or distributed or not, what `module_state` gave."""
    own, original = module.state_dict(), _original_names(module)
    names = {original(n): n for n in (*getattr(own, "_metadata", {}), *own)}
    state = _renamed(state, lambda name: names.get(name, name))
    for name in own.keys() & state.keys():
        state[name] = shard_like(own[name], state[name])
    module.load_state_dict(state)


def load_optimizer_state(optim: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give an optimizer its state, sharded across ranks where its parameters are."""
    params = [p for group in optim.param_groups for p in group["params"]]
    sharded = {
        i: {k: shard_like(params[i], v) for k, v in about.items()} if i < len(params) else about
        for i, about in state["state"].items()
    }
    optim.load_state_dict({**state, "state": sharded})


def is_parameter(value: Any) -> bool:
    """Is it a tensor that an optimizer may know?"""
    return isinstance(value, nn.Parameter) or getattr(value, "requires_grad", None) is True


def shard_like(own: Any, whole: Any) -> Any:
    """A whole tensor, sharded across ranks as `own` is; a model under `fully_shard` has such."""
    if not hasattr(own, "placements") or _shape(own) != _shape(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Each rank has read the whole tensor and keeps its part, so nothing is sent.
    tensor = whole.to(own.device)
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)


def _original_names(module: nn.Module) -> Callable[[str], str]:
    """What gives a name in the state of a module without what compiling or distributing it adds."""
    ddp = nn.parallel.DistributedDataParallel
    added = {
        f"{name}.module"
        for name, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, ddp)
    }
    added = {path.removeprefix(".") for path in added}  # the outermost has no name

    def original(name: str) -> str:
        parts = name.split(".")
        paths = itertools.accumulate(parts, "{}.{}".format)
        there = zip(parts, paths, strict=True)
        return ".".join(p for p, path in there if p != "_orig_mod" and path not in added)

    return original


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
    known = [p for p in value.parameters() if _shape(p) is not None]
    count = sum(p.numel() for p in known)
    trained = sum(p.numel() for p in known if p.requires_grad)
    some = "" if trained == count else f", {trained:,} of them trained"
    checksum, size = 0, 0
    for tensor in to_plain(module_state(value)).values():
        if _shape(tensor) is not None and tensor.layout == torch.strided:
            data = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
            size += data.nbytes
            checksum = zlib.crc32(data.numpy().tobytes(), checksum)
    kind = value.module if isinstance(value, nn.parallel.DistributedDataParallel) else value
    return (
        f"{type(kind).__name__}, {count:,} parameters{some}, {size / 2**20:.1f} MiB, "
        f"weights {checksum:08x}"
    )


def reconcile(value: Any, state: Any, name: str) -> tuple[Any, list[str]]:
    """The part of a state that can be loaded, and by name what can't: weights and parameter groups.

    Args:
        value: what the state is for.
        state: as it was saved.
        name: how to call it in the messages.
    """
    if isinstance(value, nn.Module):
        return _fit(module_state(value), state, name)
    if is_parameter(value):
        shapes = _other_shape(value, state)
        return (value, [f"{name}: {shapes}"]) if shapes else (state, [])
    if isinstance(value, torch.optim.Optimizer):
        then, now = (
            [len(group["params"]) for group in groups]
            for groups in (state["param_groups"], value.param_groups)
        )
        groups = f"{name}: groups of {then} parameters in the checkpoint, of {now} here"
        return state, [groups] if then != now else []
    if isinstance(value, EMA):
        usable, problems = {}, []
        for module, own in value.states.items():
            usable[module], found = _fit({**own}, state.get(module, {}), f"{name}.{module}")
            problems += found
        return usable, problems
    return state, []


def _fit(usable: Any, state: Mapping[str, Any], name: str) -> tuple[Any, list[str]]:
    """Replace in our own tensors those that a state has too; list what differs."""
    problems = [f"{name}.{key}: unexpected" for key in state.keys() - usable.keys()]
    for key, own in usable.items():
        if key not in state:
            problems.append(f"{name}.{key}: missing")
        elif shapes := _other_shape(own, state[key]):
            problems.append(f"{name}.{key}: {shapes}")
        else:
            usable[key] = state[key]
    return usable, sorted(problems)


def _other_shape(own: Any, saved: Any) -> str:
    """What the shapes of two tensors are, if they differ."""
    if _shape(own) in (None, _shape(saved)):
        return ""
    return f"{_shape(saved)} in the checkpoint, {_shape(own)} here"


def _shape(value: Any) -> tuple[int, ...] | None:
    known = isinstance(value, torch.Tensor) and not is_lazy(value)
    return tuple(value.shape) if known else None


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
            name: to_plain(module_state(m), copy=lambda t: t.detach().to("cpu", copy=True))
            for name, m in self.modules.items()
        }
        return True

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the modules have their best state in the body, and their own again after it.

        RuntimeError if there is none yet.
        """
        if not self.states:
            raise RuntimeError("Best: nothing is kept yet, for no update() was given a number")
        with _swapped(self.modules, self.states):
            yield

    def state_dict(self) -> dict[str, Any]:
        """The best value and the states that gave it."""
        return {"value": self.value, "states": dict(self.states)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self.value, self.states = state["value"], dict(state["states"])


_Entry = tuple[Mapping[str, Any], str]  # a table of a module's tensors, and a name in it


def _entry(module: nn.Module, key: str, value: torch.Tensor) -> _Entry:
    """Where a module keeps a tensor; a buffer may be replaced there, by a step or as it moves."""
    path, _, name = key.rpartition(".")
    with suppress(AttributeError):  # a hook may have named it
        owner = module.get_submodule(path)
        for table in (owner._parameters, owner._buffers):
            if table.get(name) is value:
                return table, name
    return {name: value}, name


class EMA:
    """Exponential moving averages of the weights of modules.

    Often better than the weights themselves: Polyak & Juditsky (1992), "Acceleration of stochastic
    approximation by averaging". Averages are in float32 at least; integers (counters) and sparse
    tensors are copied.

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
        self._averages: list[tuple[torch.Tensor, _Entry]] = []
        self._copies: list[tuple[torch.Tensor, _Entry]] = []
        for name, module in self.modules.items():
            original = _original_names(module)
            self.states[name] = {}
            for key, value in module.state_dict(keep_vars=True).items():
                if not isinstance(value, torch.Tensor):
                    continue
                # Half precision would lose the small steps of an average.
                half = value.dtype in (torch.float16, torch.bfloat16)
                average = value.detach().to(torch.float32 if half else value.dtype, copy=True)
                number = average.is_floating_point() or average.is_complex()
                dense = average.layout == torch.strided
                kind = self._averages if number and dense else self._copies
                kind.append((average, _entry(module, key, value)))
                self.states[name][original(key)] = average

    @torch.no_grad()
    def reset(self) -> None:
        """Restart from the weights as they are, such as after `continue_from`."""
        for average, (table, key) in self._averages + self._copies:
            average.copy_(table[key])

    @torch.no_grad()
    def update(self) -> None:
        """Follow the modules; call it after each step of the optimizer."""
        same = [table[key].to(average.dtype) for average, (table, key) in self._averages]
        if same:
            torch._foreach_lerp_([average for average, _ in self._averages], same, 1 - self.decay)
        for copied, (table, key) in self._copies:
            copied.copy_(table[key])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Let the modules have their averages in the body, and their own weights after it."""
        with _swapped(self.modules, self.states):
            yield

    def state_dict(self) -> dict[str, Any]:
        """The averages, by the names of the modules."""
        return dict(self.states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for name, averages in self.states.items():
            for key, average in averages.items():
                average.copy_(shard_like(average, state[name][key]))


def versions(state: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """States of modules in a checkpoint: the `latest`, and those in a `best` and an `ema`."""

    def section(of: Mapping[str, Any], name: str) -> dict[str, Any]:
        found = of.get(name)
        return {**found} if isinstance(found, Mapping) else {}

    averaged = section(state, "ema")
    for name, averages in averaged.items():
        whole = copy(state.get(name))
        if isinstance(whole, dict) and isinstance(averages, Mapping):
            whole.update(averages)  # which are of tensors alone
            averaged[name] = whole
    return {"latest": {**state}, "best": section(section(state, "best"), "states"), "ema": averaged}


@contextmanager
def _swapped(modules: Mapping[str, nn.Module], states: Mapping[str, Any]) -> Iterator[None]:
    own = {name: deepcopy(module_state(modules[name])) for name in states}
    try:
        for name, state in states.items():
            new = module_state(modules[name])
            new.update(state)  # keeps the versions of the modules, which `|` does not
            load_module_state(modules[name], new)
        yield
    finally:
        for name, state in own.items():
            load_module_state(modules[name], state)
