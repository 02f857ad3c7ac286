"""Metrics: averages over steps, and their text."""

from __future__ import annotations

import math
import reprlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

import torch

WEIGHT = "its weight"  # key of a step's weight among its metrics: no metric has this name
MOST_STEPS = 10_000  # kept unsummed, which bounds memory

Metrics = Mapping[str, Any]  # numbers, or tensors of one element, by name
Sums = tuple[float, float]  # of a metric: its weighted sum, and the sum of its weights


class Averages(Mapping[str, float]):
    """Averages of metrics over steps, computed when they are read: no step waits for a device.

    Call with the metrics of a step and their weight (usually the number of examples), for the
    averages so far. A metric may be absent from some steps. A NaN or infinite value is left out and
    counted: `loss.nonfinite` is the number of steps with such a `loss`.

    Args:
        beta: forgetting factor of the exponential moving average; 1 weighs all steps alike.
    """

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta
        self._sums: dict[str, Sums] = {}
        self._steps: list[dict[str, Any]] = []  # not summed yet, each with its weight

    def __call__(self, metrics: Metrics, weight: Any = 1.0) -> Averages:
        """Add the metrics of a step: numbers, or tensors of one element."""
        step = {name: number(name, value) for name, value in {**metrics, WEIGHT: weight}.items()}
        self._steps.append(step)
        if len(self._steps) >= MOST_STEPS:
            self.sums()
        return self

    def sums(self) -> dict[str, Sums]:
        """Return, of each metric, the weighted sum and the sum of its weights."""
        steps, self._steps = self._steps, []
        fetch(steps)
        for step in steps:  # in their order, so that no bit depends on when somebody looks
            weight = step.pop(WEIGHT)
            for name, value in step.items():
                if weight and math.isfinite(value):
                    total, scale = self._sums.get(name, (0.0, 0.0))
                    total, scale = total * self.beta, scale * self.beta
                    self._sums[name] = total + value * weight, scale + weight
                elif weight:  # without, the value is a mean over nothing
                    self.count(f"{name}.nonfinite", 1)
        return dict(self._sums)

    def count(self, name: str, more: int) -> None:
        """Add to a metric that is a number of steps, rather than an average over steps."""
        count, weight = self._sums.get(name, (0.0, 1.0))
        self._sums[name] = count + more * weight, weight

    state_dict = sums

    def load_state_dict(self, state: Mapping[str, Sums]) -> None:
        """Restore the sums."""
        self._sums, self._steps = dict(state), []

    def __getitem__(self, name: str) -> float:
        total, weight = self.sums()[name]
        return total / weight

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums())

    def __len__(self) -> int:
        return len(self.sums())

    def copy(self) -> dict[str, float]:
        """Return the averages so far: further steps change nothing there."""
        return dict(self)

    __copy__ = copy

    def __or__(self, other: Metrics) -> dict[str, Any]:
        return {**self, **other}

    def __repr__(self) -> str:
        return repr(dict(self))


averager = Averages  # Flashy's name


def number(name: str, value: Any) -> Any:
    """Return a float, or a copy of a tensor on its device."""
    tensor = isinstance(value, torch.Tensor)
    try:
        if tensor and not value.is_cpu:
            # A copy: the step may change the tensor, or it may be a view that keeps a large one.
            return value.detach().reshape(()).clone()
        return float(value.item() if tensor else value)
    except (TypeError, ValueError, RuntimeError):
        shown = f"a tensor {[*value.shape]}" if tensor else reprlib.repr(value)
        needed = "a metric is a number or a tensor of one element"
        raise ValueError(f"average of {name}: {needed}, not {shown}") from None


def fetch(steps: Iterable[dict[str, Any]]) -> None:
    """Replace the tensors of steps by their values, with a transfer for each device and type."""
    alike: dict[Any, list[tuple[dict[str, Any], str]]] = defaultdict(list)
    for step in steps:
        for name, value in step.items():
            if value.__class__ is not float:
                alike[value.device, value.dtype].append((step, name))
    for places in alike.values():
        values = torch.stack([step[name] for step, name in places]).tolist()
        for (step, name), value in zip(places, values, strict=True):
            step[name] = value


def added(parts: Iterable[Mapping[str, Sums]]) -> dict[str, Sums]:
    """Add up the sums of several averages, by name."""
    found: dict[str, Sums] = defaultdict(lambda: (0.0, 0.0))
    for part in parts:
        for name, (total, weight) in part.items():
            found[name] = found[name][0] + total, found[name][1] + weight
    return found


@dataclass
class Formatter:
    """A formatter of metrics: turns a dict of numbers into a dict of strings.

    All names are shell patterns (`acc*`). Given `exclude_keys`, everything else is shown; given
    `include_keys`, nothing else is shown; given both, `include_keys` are exceptions from
    `exclude_keys`.

    Args:
        formats: pattern to format specification (as in `format(value, ".2f")`); first match wins.
        default_format: for other numbers. Whole numbers stay whole.
        exclude_keys: patterns of metrics to leave out.
        include_keys: patterns of metrics to keep.
        include_formatted: count the patterns of `formats` as `include_keys`, if those matter.
    """

    formats: Mapping[str, str] = field(default_factory=dict)
    default_format: str = ".4g"
    exclude_keys: Sequence[str] = ()
    include_keys: Sequence[str] = ()
    include_formatted: bool = True

    def __call__(self, metrics: Metrics) -> dict[str, str]:
        """Format the metrics to be shown, in their order."""
        return {n: self._format(n, v) for n, v in self.get_relevant_metrics(metrics).items()}

    def get_relevant_metrics(self, metrics: Metrics) -> dict[str, Any]:
        """Return the metrics to be shown, in their order."""
        kept = [*self.include_keys, *(self.formats if self.include_formatted else ())]
        all_but = self.exclude_keys or (["*"] if self.include_keys else [])
        return {n: v for n, v in metrics.items() if not _matches(n, all_but) or _matches(n, kept)}

    def _format(self, name: str, value: Any) -> str:
        with suppress(AttributeError, RuntimeError, ValueError):
            value = value.item()  # of NumPy scalars and tensors of one element
        if isinstance(value, bool) or not isinstance(value, Real):
            return str(value)
        usual = "" if isinstance(value, Integral) else self.default_format
        specs = (spec for pattern, spec in self.formats.items() if fnmatchcase(name, pattern))
        return format(value, next(specs, usual))


def _matches(name: str, patterns: Collection[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
