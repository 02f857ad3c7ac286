"""Small tools with no home of their own: running averages, safe writes, frozen models, grids."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F


def averager(beta: float = 1.0) -> Callable[..., Averages]:
    """Return a function that averages metrics over the steps of a stage.

    The function takes the metrics of one step and their weight (usually the number of examples)
    and returns the averages so far: see `Averages`. A metric may be absent from some steps.

    Args:
        beta: forgetting factor of the exponential moving average; 1 weighs all steps alike.
    """
    return Averages(beta).add


class Averages(Mapping[str, float]):
    """Averages of metrics so far, as numbers that are worked out when somebody looks.

    Until then tensors stay on their device, and no step waits for it. A value that is infinite or
    no number is left out and counted: `loss.nonfinite` is how many steps had such a `loss`.
    """

    def __init__(self, beta: float = 1.0) -> None:
        self._beta = beta
        self._metrics: dict[str, _Average] = {}
        self._seen: dict[str, float] | None = {}

    def add(self, metrics: Mapping[str, Any], weight: Any = 1.0) -> Averages:
        """Take in the metrics of one step: numbers, or tensors of one element."""
        self._seen = None
        for name, value in metrics.items():
            average = self._metrics.get(name)
            if average is None:
                average = self._metrics[name] = _Average(name, self._beta)
            average.add(value, weight)
        return self

    def _look(self) -> dict[str, float]:
        if self._seen is None:
            self._seen = {}
            for name, average in self._metrics.items():
                total, weight, nonfinite = average.sums().tolist()
                if weight:
                    self._seen[name] = total / weight
                if nonfinite:
                    self._seen[f"{name}.nonfinite"] = nonfinite
        return self._seen

    def __getitem__(self, name: str) -> float:
        return self._look()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._look())

    def __len__(self) -> int:
        return len(self._look())

    def __repr__(self) -> str:
        return repr(self._look())


class _Average:
    """Of one metric. Steps wait in a list, and are summed a fixed number at a time.

    So the order of the sums does not depend on when somebody looks, and a resumed run agrees with
    an undisturbed one to the last bit.
    """

    CHUNK = 256

    def __init__(self, name: str, beta: float) -> None:
        self._name = name
        self._beta = beta
        self._values: list[Any] = []
        self._weights: list[Any] = []
        self._sums: torch.Tensor | None = None

    def add(self, value: Any, weight: Any) -> None:
        """Take in one step."""
        if isinstance(value, torch.Tensor):
            if value.numel() != 1:
                raise ValueError(f"average of {self._name}: a metric has one element, not {value}")
            value = value.detach().clone()  # for whoever changes it afterwards
            if value.ndim:
                value = value.view(())
        self._values.append(value)
        self._weights.append(weight)
        if len(self._values) == self.CHUNK:
            self._sums = self.sums()
            self._values, self._weights = [], []

    def sums(self) -> torch.Tensor:
        """Weighted sum of the finite values; sum of their weights; number of others. `[3]`."""
        values, weights = _column(self._values), _column(self._weights)
        weights = weights.to(values.device)
        count = len(values)
        if self._beta != 1:
            ages = torch.arange(count - 1, -1, -1, device=values.device, dtype=values.dtype)
            weights = weights * self._beta**ages
        finite = values.isfinite()
        weights = weights * finite
        values = values.where(finite, 0.0)
        sums = torch.stack([(values * weights).sum(), weights.sum(), (~finite).sum()])
        if self._sums is not None:
            past = self._sums.to(sums.device)
            sums = sums + torch.cat([past[:2] * self._beta**count, past[2:]])
        return sums


def _column(values: list[Any]) -> torch.Tensor:
    """Numbers and tensors of one element as one tensor, in the dtype to sum them in."""
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    device = tensors[0].device if tensors else torch.device("cpu")
    # Half precision loses a step after some thousands.
    accurate = torch.float32 if device.type == "mps" else torch.float64
    if not tensors:
        return torch.tensor(values, dtype=accurate)
    if len(tensors) < len(values) or len({(t.dtype, t.device) for t in tensors}) > 1:
        tensors = [torch.as_tensor(v, dtype=accurate, device=device) for v in values]
    return torch.stack(tensors).to(accurate)


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
