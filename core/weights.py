"""Weights: the state of modules and optimizers, and copies of it (the best, averages)."""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from . import distrib
from .plain import to_plain
from .utils import UserError


def module_state(module: nn.Module) -> dict[str, Any]:
    """The state of a module, with the names it has when neither compiled nor distributed."""
    return _renamed(_unwrap(module).state_dict(), _original_name)


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Give a module, compiled or distributed or not, what `module_state` gave."""
    module = _unwrap(module)
    own = module.state_dict()
    names = {_original_name(n): n for n in (*getattr(own, "_metadata", {}), *own)}
    state = _renamed(state, lambda name: names.get(name, name))
    for name in own.keys() & state.keys():
        state[name] = _shard_like(own[name], state[name])
    module.load_state_dict(state)


def load_optimizer_state(optim: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Give an optimizer its state, sharded across ranks where its parameters are."""
    params = [p for group in optim.param_groups for p in group["params"]]
    sharded = {
        i: {k: _shard_like(params[i], v) for k, v in about.items()} if i < len(params) else about
        for i, about in state["state"].items()
    }
    optim.load_state_dict({**state, "state": sharded})


def _shard_like(own: Any, whole: Any) -> Any:
    """A whole tensor, sharded across ranks as `own` is; a model under `fully_shard` has such."""
    if not hasattr(own, "placements") or _shape(own) != _shape(whole):
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Each rank has read the whole tensor and keeps its part, so nothing is sent.
    tensor = whole.to(own.device)
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)


def _unwrap(module: nn.Module) -> nn.Module:
    """The module inside of DistributedDataParallel; any other as it is."""
    if isinstance(module, nn.parallel.DistributedDataParallel):
        wrapped: nn.Module = module.module
        return wrapped
    return module


def _original_name(name: str) -> str:
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
    for tensor in to_plain(module_state(value), copy=lambda t: t.detach().cpu()).values():
        if isinstance(tensor, torch.Tensor):
            size += tensor.nbytes
            data = tensor.contiguous().view(-1).view(torch.uint8)
            checksum = zlib.crc32(data.numpy().tobytes(), checksum)
    return (
        f"{type(_unwrap(value)).__name__}, {count:,} parameters{some}, {size / 2**20:.1f} MiB, "
        f"weights {checksum:08x}"
    )


def reconcile(value: Any, state: Any, name: str) -> tuple[Any, list[str]]:
    """The part of a state that can be loaded, and by name what can't; only weights are compared.

    Args:
        value: what the state is for.
        state: as it was saved.
        name: how to call it in the messages.
    """
    if isinstance(value, nn.Module):
        return _fit(module_state(value), state, name)
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
        elif _shape(own) not in (None, _shape(state[key])):
            shapes = f"{_shape(state[key])} in the checkpoint, {_shape(own)} here"
            problems.append(f"{name}.{key}: {shapes}")
        else:
            usable[key] = state[key]
    return usable, sorted(problems)


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
            tensors = _renamed(_unwrap(module).state_dict(keep_vars=True), _original_name)
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
        """Restart from the weights as they are, such as after `continue_from`."""
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

    def state_dict(self) -> dict[str, Any]:
        """The averages, by the names of the modules."""
        return dict(self.states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        for name, averages in self.states.items():
            for key, average in averages.items():
                average.copy_(_shard_like(average, state[name][key]))


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
