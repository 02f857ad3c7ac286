"""Metrics to text: which of them are shown, and with how many digits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from numbers import Integral, Real
from typing import Any


class Formatter:
    """Turn a dict of metrics into a dict of strings.

    All names are shell patterns (`acc*`). Given `exclude_keys`, everything else is shown; given
    `include_keys`, nothing else is shown; given both, `include_keys` are exceptions from
    `exclude_keys`.

    Args:
        formats: pattern to format specification (as in `format(value, ".2f")`); first match wins.
        default_format: for numbers that match none of `formats`. Whole numbers stay whole.
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
        """Format the metrics that are to be shown, in their order."""
        return {
            name: self._format(name, value) for name, value in metrics.items() if self._shows(name)
        }

    def _shows(self, name: str) -> bool:
        kept = self.include_keys + (list(self.formats) if self.include_formatted else [])
        if self.exclude_keys:
            return not _matches(name, self.exclude_keys) or _matches(name, kept)
        return not self.include_keys or _matches(name, kept)

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


def format_items(metrics: Mapping[str, Any], formatter: Formatter, delimiter: str) -> list[str]:
    """The metrics as `name value`, formatted."""
    return [f"{name}{delimiter}{value}" for name, value in formatter(metrics).items()]
