"""Metrics: averages over steps, and their text."""

from __future__ import annotations

import math
import reprlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any

import torch

WEIGHT = "its weight"  # key of a step's weight among its metrics: no metric has this name
MOST_STEPS = 10_000  # kept unsummed, which bounds memory


def averager(beta: float = 1.0) -> Averages:
    """Return a function that averages metrics over steps.

    Call it with the metrics of a step and their weight (usually the number of examples), for
    the averages so far. A metric may be absent from some steps.

    Args:
        beta: forgetting factor of the exponential moving average; 1 weighs all steps alike.
    """
    return Averages(beta)


class Averages(Mapping[str, float]):
    """Averages of metrics so far, computed when they are read: no step waits for a device.

    A NaN or infinite value is left out and counted: `loss.nonfinite` is the number of steps
    with such a `loss`.
    """

    def __init__(self, beta: float = 1.0) -> None:
        self.beta = beta
        # Of each metric: the weighted sum, the sum of weights, the count of nonfinite values.
        self._sums: dict[str, list[float]] = {}
        self._steps: list[dict[str, Any]] = []  # not summed yet, each with its weight
        self._current: dict[str, float] | None = {}

    def __call__(self, metrics: Mapping[str, Any], weight: Any = 1.0) -> Averages:
        """Add the metrics of one step: numbers, or tensors of one element."""
        if not isinstance(metrics, Mapping):
            raise TypeError(f"averager: a step gave {metrics!r}, not a dict of metrics")
        step = {name: number(name, value) for name, value in {**metrics, WEIGHT: weight}.items()}
        self._steps.append(step)
        self._current = None
        if len(self._steps) >= MOST_STEPS:
            self._sum()
        return self

    def sums(self) -> dict[str, tuple[float, float]]:
        """Return, of each metric, the weighted sum and the sum of its weights."""
        self._sum()
        found: dict[str, tuple[float, float]] = {}
        for name, (total, weight, nonfinite) in self._sums.items():
            if weight:
                found[name] = total, weight
            if nonfinite:
                found[f"{name}.nonfinite"] = nonfinite, 1
        return found

    def state_dict(self) -> dict[str, list[float]]:
        """Return all sums."""
        self._sum()
        return {name: list(sums) for name, sums in self._sums.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Restore the sums."""
        self._sums = {name: list(sums) for name, sums in state.items()}
        self._steps, self._current = [], None

    def _sum(self) -> None:
        """Sum the waiting steps in their order, after one transfer from the device."""
        steps, self._steps = self._steps, []
        values = iter(to_floats([value for step in steps for value in step.values()]))
        for step in steps:
            numbers = {name: next(values) for name in step}
            weight = numbers.pop(WEIGHT)
            for name, value in numbers.items():
                sums = self._sums.setdefault(name, [0.0, 0.0, 0])
                if self.beta != 1:
                    sums[0] *= self.beta
                    sums[1] *= self.beta
                if not weight:
                    continue  # a mean over nothing, which is NaN
                if math.isfinite(value):
                    sums[0] += value * weight
                    sums[1] += weight
                else:
                    sums[2] += 1

    def _read(self) -> dict[str, float]:
        if self._current is None:
            sums = self.sums().items()
            self._current = {name: total / weight for name, (total, weight) in sums}
        return self._current

    def __getitem__(self, name: str) -> float:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other}

    def __repr__(self) -> str:
        return repr(self._read())


def number(name: str, value: Any) -> Any:
    """Return a float, or a copy of a tensor on its device."""
    try:
        if not isinstance(value, torch.Tensor):
            return float(value)
        if value.is_cpu:
            return float(value.item())
        # A copy: the step may change the tensor, or it may be a view that keeps a large one.
        return value.detach().reshape(()).clone()
    except (TypeError, ValueError, RuntimeError):
        tensor = isinstance(value, torch.Tensor)
        shown = f"a tensor {[*value.shape]}" if tensor else reprlib.repr(value)
        raise ValueError(
            f"average of {name}: a metric is a number or a tensor of one element, not {shown}"
        ) from None


def to_floats(values: list[Any]) -> list[float]:
    """Replace tensors by their values, with a transfer for each device and type."""
    alike: dict[Any, list[int]] = defaultdict(list)
    for index, value in enumerate(values):
        if value.__class__ is not float:
            alike[value.device, value.dtype].append(index)
    for indices in alike.values():
        numbers = torch.stack([values[index] for index in indices]).tolist()
        for index, number in zip(indices, numbers, strict=True):
            values[index] = number
    return values


def added(parts: Iterable[Mapping[str, Sequence[float]]]) -> dict[str, list[float]]:
    """Add up the sums of several averages, by name."""
    total: dict[str, list[float]] = {}
    for part in parts:
        for name, values in part.items():
            before = total.get(name, [0.0] * len(values))
            total[name] = [a + b for a, b in zip(before, values, strict=True)]
    return total


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

    def __init__(
        self,
        formats: Mapping[str, str] | None = None,
        default_format: str = ".3f",
        exclude_keys: Sequence[str] = (),
        include_keys: Sequence[str] = (),
        include_formatted: bool = True,
    ) -> None:
        self.formats = dict(formats or {})
        self.default_format = default_format
        self.exclude_keys = list(exclude_keys)
        self.include_keys = list(include_keys)
        self.include_formatted = include_formatted

    def __call__(self, metrics: Mapping[str, Any]) -> dict[str, str]:
        """Format the metrics to be shown, in their order."""
        shown = self.get_relevant_metrics(metrics)
        return {name: self._format(name, value) for name, value in shown.items()}

    def get_relevant_metrics(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """Return the metrics to be shown, in their order."""
        kept = self.include_keys + (list(self.formats) if self.include_formatted else [])
        all_but = self.exclude_keys or ([] if not self.include_keys else ["*"])
        return {
            name: value
            for name, value in metrics.items()
            if not _matches(name, all_but) or _matches(name, kept)
        }

    def _format(self, name: str, value: Any) -> str:
        if hasattr(value, "item"):  # NumPy scalars, tensors of one element
            try:
                value = value.item()
            except (RuntimeError, ValueError):  # more than one element
                return str(value)
        if isinstance(value, bool) or not isinstance(value, Real):
            return str(value)
        for pattern, spec in self.formats.items():
            if fnmatchcase(name, pattern):
                return format(value, spec)
        return str(value) if isinstance(value, Integral) else format(value, self.default_format)


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
