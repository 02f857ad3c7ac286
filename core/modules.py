"""The state of modules: by their plain names, in part, whole or sharded, and lent for a while."""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return the state of a module, by the names it has without compiling and DDP."""
    return _renamed(module.state_dict(), original_names(module))


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore a module, compiled or distributed or not, from a `module_state`."""
    own, original = module.state_dict(), original_names(module)
    names = {original(n): n for n in (*getattr(own, "_metadata", {}), *own)}
    state = _renamed(state, lambda name: names.get(name, name))
    for name in own.keys() & state.keys():
        state[name] = shard_like(own[name], state[name])
    module.load_state_dict(state)


def original_names(module: nn.Module) -> Callable[[str], str]:
    """Return a function that strips the additions of compiling and DDP from a name."""
    ddp = nn.parallel.DistributedDataParallel
    parts_of = module.named_modules(remove_duplicate=False)
    added = {f"{name}.module".removeprefix(".") for name, part in parts_of if isinstance(part, ddp)}

    def original(name: str) -> str:
        parts = name.split(".")
        paths = itertools.accumulate(parts, "{}.{}".format)
        kept = (p for p, path in zip(parts, paths, strict=True) if path not in added)
        return ".".join(part for part in kept if part != "_orig_mod")

    return original


def _renamed(state: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    renamed = OrderedDict((rename(name), value) for name, value in state.items())
    if hasattr(state, "_metadata"):  # versions of the modules, by their names
        about = {rename(name): value for name, value in state._metadata.items()}
        renamed._metadata = OrderedDict(about)  # type: ignore[attr-defined]
    return renamed


def shard_like(own: Any, whole: Any) -> Any:
    """Return this rank's shard of a whole tensor, if `own` is sharded as by `fully_shard`."""
    if not hasattr(own, "placements") or own.shape != whole.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    # Each rank has read the whole tensor and keeps its part, so nothing is sent.
    tensor = whole.to(own.device)
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)


def fit_tensors(own: Mapping[str, Any], state: Any, name: str) -> tuple[Any, list[str]]:
    """Return our own tensors, replaced by tensors of a state with the same shape."""
    usable = own.copy() if hasattr(own, "copy") else dict(own)  # keeps the versions of modules
    problems = [f"{name}.{key}: unexpected" for key in state.keys() - own.keys()]
    for key, value in own.items():
        if key not in state:
            problems.append(f"{name}.{key}: missing")
        elif difference := other_shape(value, state[key]):
            problems.append(f"{name}.{key}: {difference}")
        else:
            usable[key] = state[key]
    return usable, sorted(problems)


def other_shape(own: Any, saved: Any) -> str:
    if not isinstance(own, torch.Tensor) or is_lazy(own):
        return ""
    there = tuple(saved.shape) if isinstance(saved, torch.Tensor) else None
    here = tuple(own.shape)
    return "" if there == here else f"{there} in the checkpoint, {here} here"


lending: ContextVar[bool] = ContextVar("lending", default=False)  # within `lent`


@contextmanager
def lent(modules: Mapping[str, nn.Module], states: Mapping[str, Any]) -> Iterator[None]:
    """Lend modules other weights in the body; afterwards they have their own again.

    Nothing can be saved or restored in the body.
    """
    own = {name: deepcopy(module_state(modules[name])) for name in states}
    token = lending.set(True)
    try:
        for name, state in states.items():
            new = module_state(modules[name])
            new.update(state)  # keeps the versions of the modules, which `|` does not
            load_module_state(modules[name], new)
        yield
    finally:
        lending.reset(token)
        for name, state in own.items():
            load_module_state(modules[name], state)
