"""The state of modules: by their plain names, in part, whole or sharded, and lent for a while."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy, deepcopy
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from . import distrib


def module_state(module: nn.Module) -> dict[str, Any]:
    """Return the state of a module, by the names it has without compiling and DDP."""
    return _renamed(module.state_dict(), partial(original_name, module))


def load_module_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """Restore a module, compiled or distributed or not, from a `module_state`."""
    own = module.state_dict()
    names = {original_name(module, n): n for n in (*getattr(own, "_metadata", {}), *own)}
    state = _renamed(state, lambda name: names.get(name, name))
    keeps = any(map(_loads_by_itself, module.modules()))
    for name in own.keys() & state.keys():
        state[name] = shard_like(own[name], state[name])
        if hasattr(own[name], "placements"):  # one by one: all shards would be a second model
            state[name] = own[name].detach().copy_(state[name])
        elif keeps or not isinstance(own[name], torch.Tensor):  # may keep what it is given
            state[name] = deepcopy(state[name])
    module.load_state_dict(state)


def _loads_by_itself(module: nn.Module) -> bool:
    """Return whether a module loads its tensors its own way, such as a quantization observer."""
    return not type(module)._load_from_state_dict.__module__.startswith("torch.nn.modules.")


def original_name(module: nn.Module, name: str) -> str:
    """Return the name of a part of a module, without the additions of compiling and DDP."""
    kept: list[str] = []
    part: Any = module
    for step in name.split("."):
        wrapped = step == "module" and isinstance(part, nn.parallel.DistributedDataParallel)
        if not wrapped and step != "_orig_mod":
            kept.append(step)
        part = getattr(part, "_modules", {}).get(step)
    return ".".join(kept)


def _renamed(state: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    renamed = OrderedDict((rename(name), value) for name, value in state.items())
    if hasattr(state, "_metadata"):  # versions of the modules, by their names
        about = {rename(name): value for name, value in state._metadata.items()}
        renamed._metadata = OrderedDict(about)  # type: ignore[attr-defined]
    return renamed


def gathered(tensor: Any, everywhere: bool = True) -> torch.Tensor:
    """Gather a sharded tensor in host memory; return any other as it is.

    All ranks must take part. Without `everywhere`, those above zero get an empty tensor of its
    shape, on the device "meta".
    """
    if not hasattr(tensor, "placements"):
        return tensor  # type: ignore[no-any-return]
    whole: torch.Tensor = tensor.full_tensor()
    return whole.to("cpu" if everywhere or distrib.is_rank_zero() else "meta")


def shard_like(own: Any, saved: Any) -> Any:
    """Return a saved tensor, or this rank's shard if `own` is sharded.

    Args:
        own: this rank's tensor, such as a parameter under `fully_shard`.
        saved: a whole tensor, or one that `sharded.py` reads.
    """
    if hasattr(saved, "read"):
        return saved.read(own)
    if not hasattr(own, "placements") or own.shape != saved.shape:
        return saved
    from torch.distributed.tensor import distribute_tensor

    # Each rank takes its part of the file, so nothing is sent.
    shard = distribute_tensor(saved, own.device_mesh, own.placements, src_data_rank=None)
    return shard.clone()  # to let go of the whole


def fit_tensors(own: Mapping[str, Any], state: Any, name: str) -> tuple[Any, list[str]]:
    """Return a state with our own tensors in place of misfits, and the misfits."""
    usable, problems = copy(state), []  # a copy keeps the versions of modules
    for key in state.keys() - own.keys():
        problems.append(f"{name}.{key}: unexpected")
        del usable[key]
    for key, value in own.items():
        if found := other_shape(value, state[key]) if key in state else "missing":
            problems.append(f"{name}.{key}: {found}")
            usable[key] = value
    return usable, sorted(problems)


def fit_module(module: nn.Module, state: Any, name: str) -> tuple[Any, list[str]]:
    """Return the fitting part of a state, and the misfits; some modules resize their tensors."""
    own = module_state(module)
    for path, part in module.named_modules(remove_duplicate=False):
        resizes = _loads_by_itself(part)
        for key in [*part._buffers, "_extra_state"] if resizes else ["_extra_state"]:
            known = original_name(module, f"{path}.{key}".removeprefix("."))
            if known in own and known in state:
                own[known] = state[known]
    return fit_tensors(own, state, name)


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
