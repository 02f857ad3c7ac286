"""Exponential moving averages (EMA) of weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from .modules import fit_tensors, lent, original_name, shard_like
from .utils import UserError

_Entry = tuple[Mapping[str, Any], str]  # a table of a module's tensors, and a name in it


def _entry(module: nn.Module, key: str, value: torch.Tensor) -> _Entry:
    """Return the place where a module keeps a tensor: a step, or a move, may replace a buffer."""
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
                self.states[name][original_name(module, key)] = average

    @torch.no_grad()
    def reset(self) -> None:
        """Restart from the present weights, such as after `continue_from`."""
        for average, (table, key) in self._averages + self._copies:
            average.copy_(table[key])

    @torch.no_grad()
    def update(self) -> None:
        """Follow the modules: to be called after each step of the optimizer."""
        same = [table[key].to(average.dtype) for average, (table, key) in self._averages]
        if same:
            torch._foreach_lerp_([average for average, _ in self._averages], same, 1 - self.decay)
        for copied, (table, key) in self._copies:
            copied.copy_(table[key])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Lend the modules their averages in the body; afterwards they have their own weights."""
        with lent(self.modules, self.states):
            yield

    def fit_state(self, state: Any, name: str) -> tuple[Any, list[str]]:
        """Return the fitting part of a state, and the problems with the rest."""
        usable, problems = {}, []
        for module, own in self.states.items():
            usable[module], found = fit_tensors(own, state.get(module, {}), f"{name}.{module}")
            problems += found
        return usable, problems

    def state_dict(self) -> dict[str, Any]:
        """Return the averages, by the names of the modules."""
        return dict(self.states)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the averages."""
        for name, averages in self.states.items():
            for key, average in averages.items():
                average.copy_(shard_like(average, state[name][key]))
