"""Small tools with no home of their own: running averages, safe writes, frozen models, grids."""

from __future__ import annotations

import math
import os
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
import torch.nn.functional as F

WEIGHT = "its weight"  # key of a step's weight among its metrics, a name that none of them has


class UserError(RuntimeError):
    """What a user mends without reading code: a wrong value, a missing file, a full disk.

    The message is one line that names culprit and cure. That is all that a terminal shows of it;
    the traceback goes to the log file. A mistake in code is another error, and keeps its traceback.
    """


def averager(beta: float = 1.0) -> Averages:
    """Return what averages metrics over the steps of a stage, when it is called.

    It takes the metrics of one step and their weight (usually the number of examples), and returns
    itself, the averages so far. A metric may be absent from some steps; called twice for a step, it
    takes metrics of different weights, which `distrib.average_metrics` minds as well.

    Args:
        beta: forgetting factor of the exponential moving average; 1 weighs all steps alike.
    """
    return Averages(beta)


class Averages(Mapping[str, float]):
    """Averages of metrics so far, as numbers that are computed when they are read.

    Until then what is on a GPU stays there, and no step waits for it. A value that is infinite or
    no number is left out and counted: `loss.nonfinite` is how many steps had such a `loss`.
    """

    WAITING = 10_000  # steps with values on a GPU that are kept unsummed, which bounds memory

    def __init__(self, beta: float = 1.0) -> None:
        self._beta = beta
        # Of each metric: the weighted sum, the sum of weights, the count of nonfinite values.
        self._sums: dict[str, list[float]] = {}
        self._steps: list[dict[str, Any]] = []  # that wait to be summed, each with its weight
        self._rows: list[torch.Tensor] = []  # what those have on a device, `[values]` each
        self._current: dict[str, float] | None = {}

    def __call__(self, metrics: Mapping[str, Any], weight: Any = 1.0) -> Averages:
        """Take in the metrics of one step: numbers, or tensors of one element."""
        self._current = None
        if metrics is None:
            raise TypeError("averager: a step gave None, not a dict of metrics: does it return?")
        step, on_device = {**metrics, WEIGHT: weight}, []
        try:
            for name, value in step.items():
                if isinstance(value, torch.Tensor):
                    if value.is_cpu:
                        step[name] = value.item()
                    else:
                        on_device.append(name)
                elif value.__class__ is not float:
                    step[name] = float(value)
        except (TypeError, ValueError, RuntimeError):
            _refuse(name, value)
        if on_device:
            self._rows.append(_row({name: step[name] for name in on_device}))
            step |= dict.fromkeys(on_device)
        self._steps.append(step)
        if len(self._steps) >= (self.WAITING if self._rows else 100):
            self._sum()
        return self

    def sums(self) -> dict[str, tuple[float, float]]:
        """Of each metric the weighted sum, and the sum of the weights it came with."""
        self._sum()
        found: dict[str, tuple[float, float]] = {}
        for name, (total, weight, nonfinite) in self._sums.items():
            if weight:
                found[name] = total, weight
            if nonfinite:
                found[f"{name}.nonfinite"] = nonfinite, 1
        return found

    def state_dict(self) -> dict[str, Any]:
        """All that was taken in."""
        self._sum()
        return {"sums": {n: list(sums) for n, sums in self._sums.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._sums = {name: list(sums) for name, sums in state["sums"].items()}
        self._steps, self._rows, self._current = [], [], None

    def _sum(self) -> None:
        """Sum the steps that wait, in their order; that waits for the device once."""
        values = iter(torch.cat(self._rows).tolist() if self._rows else ())
        for step in self._steps:
            if self._rows:
                step = {n: next(values) if v is None else v for n, v in step.items()}
            weight = step.pop(WEIGHT)
            for name, value in step.items():
                sums = self._sums.get(name) or self._sums.setdefault(name, [0.0, 0.0, 0])
                if self._beta != 1:
                    sums[0] *= self._beta
                    sums[1] *= self._beta
                if not weight:
                    continue  # a mean over nothing, which is NaN
                if math.isfinite(value):
                    sums[0] += value * weight
                    sums[1] += weight
                else:
                    sums[2] += 1
        self._steps, self._rows = [], []

    def _read(self) -> dict[str, float]:
        if self._current is None:
            sums = self.sums().items()
            self._current = {name: total / weight for name, (total, weight) in sums}
        return self._current

    def __getitem__(self, name: str) -> float:
        known = self._read()
        if name not in known and f"{name}.nonfinite" in known:
            raise KeyError(f"{name}: all of its values were NaN or infinite")
        return known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __or__(self, other: Mapping[str, Any]) -> dict[str, Any]:
        return {**self, **other}

    def __setitem__(self, name: str, value: object) -> NoReturn:
        raise TypeError(f"averages are read-only: to set {name}, make a dict(...) of them")

    def __repr__(self) -> str:
        return repr(self._read())


def _row(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A copy of tensors of one element, `[values]`, on their device."""
    values = [value.detach() for value in tensors.values()]
    alike = len({(v.dtype, v.shape, v.device) for v in values}) == 1
    if alike and not values[0].ndim and values[0].is_floating_point():
        return torch.stack(values)
    for name, value in tensors.items():
        if value.numel() != 1:
            _refuse(name, value)
    device = values[0].device
    accurate = torch.float32 if device.type == "mps" else torch.float64
    return torch.stack([value.reshape(()).to(device, accurate) for value in values])


def _refuse(name: str, value: object) -> NoReturn:
    what = f"a tensor {[*value.shape]}" if isinstance(value, torch.Tensor) else reprlib.repr(value)
    raise ValueError(
        f"average of {name}: a metric is a number or a tensor of one element, not {what}"
    ) from None


def length(iterable: Any) -> int | None:
    """The number of items, if it is known."""
    try:
        return len(iterable)
    except TypeError:
        return None


def flatten(nested: Mapping[Any, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested mappings, and empty mappings, by their dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        inner = value if isinstance(value, Mapping) and value else None
        flat |= {f"{prefix}{key}": value} if inner is None else flatten(inner, f"{prefix}{key}.")
    return flat


@contextmanager
def write_and_rename(
    path: str | Path, mode: str = "wb", suffix: str = ".tmp", pid: bool = False
) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success make it durable and rename it to `path`.

    A reader sees the whole old file or the whole new one, also after a power cut. If the body
    raises, the temporary file is removed and `path` stays as it was.

    Args:
        mode: mode of opening; must be a writing one.
        suffix: what to append to the name while writing.
        pid: append the process id too, for several processes that write the same path.
    """
    path = Path(path)
    temporary = path.with_name(path.name + suffix + (f".{os.getpid()}" if pid else ""))
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames and deletions in a folder durable (a no-op where a folder can't be opened)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def readonly(model: torch.nn.Module) -> Iterator[None]:
    """Let gradients flow through a model without reaching its parameters.

    Parameters that did not ask for a gradient before still don't afterwards.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def make_grid(images: torch.Tensor, columns: int = 8, padding: int = 1) -> torch.Tensor:
    """Tile images `[N, C, H, W]` row by row into one `[C, H', W']`.

    Args:
        columns: images a row, at most.
        padding: pixels of zeros around each image.
    """
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    tiles = F.pad(images, (padding,) * 4)
    tiles = torch.cat([tiles, tiles.new_zeros(rows * columns - len(tiles), *tiles.shape[1:])])
    _, channels, height, width = tiles.shape
    grid = tiles.view(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return grid.reshape(channels, rows * height, columns * width)
