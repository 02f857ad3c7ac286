"""Small tools with no home of their own: running averages, safe writes, frozen models, grids."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
import torch.nn.functional as F


def averager(beta: float = 1.0) -> Averages:
    """Return what averages metrics over the steps of a stage, when it is called.

    It takes the metrics of one step and their weight (usually the number of examples), and returns
    itself, the averages so far. A metric may be absent from some steps; called twice for a step, it
    takes metrics of different weights.

    Args:
        beta: forgetting factor of the exponential moving average; 1 weighs all steps alike.
    """
    return Averages(beta)


class Averages(Mapping[str, float]):
    """Averages of metrics so far, as numbers that are worked out when somebody looks.

    Until then tensors stay on their device, and no step waits for it. A value that is infinite or
    no number is left out and counted: `loss.nonfinite` is how many steps had such a `loss`.
    """

    # Steps wait in a list, and are summed a fixed number at a time: so the order of the sums does
    # not depend on when somebody looks, and a resumed run agrees to the last bit.
    CHUNK = 256

    def __init__(self, beta: float = 1.0) -> None:
        self._beta = beta
        self._columns: dict[str, int] = {}
        self._steps: list[_Step] = []
        self._sums = torch.zeros(0, 3, dtype=torch.float64)
        self._weight: Any = 0.0
        self._seen: dict[str, float] | None = {}

    def __call__(self, metrics: Mapping[str, Any], weight: Any = 1.0) -> Averages:
        """Take in the metrics of one step: numbers, or tensors of one element."""
        self._seen = None
        tensors: dict[str, torch.Tensor] = {}
        numbers: dict[str, Any] = {}
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                tensors[name] = value
            else:
                numbers[name] = _number(name, value)
            if name not in self._columns:
                self._columns[name] = len(self._columns)
        row = _row(tensors) if tensors else None
        weight = _row({"weight": weight}) if isinstance(weight, torch.Tensor) else weight
        self._weight = self._weight + weight
        self._steps.append(_Step((*tensors, *numbers), row, [*numbers.values()], weight))
        if len(self._steps) == self.CHUNK:
            self._sums = self._sum()
            self._steps = []
        return self

    @property
    def weight(self) -> float:
        """The sum of all weights, such as the number of examples."""
        return float(self._weight)

    def state_dict(self) -> dict[str, Any]:
        """All that was taken in."""
        return {
            "columns": list(self._columns),
            "steps": [tuple(step) for step in self._steps],
            "sums": self._sums,
            "weight": self._weight,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what was taken in."""
        self._columns = {name: index for index, name in enumerate(state["columns"])}
        self._steps = [_Step(*step) for step in state["steps"]]
        self._sums, self._weight = state["sums"], state["weight"]
        self._seen = None

    def _look(self) -> dict[str, float]:
        if self._seen is None:
            self._seen = {}
            for name, sums in zip(self._columns, self._sum().tolist(), strict=True):
                total, weight, nonfinite = sums
                if weight:
                    self._seen[name] = total / weight
                if nonfinite:
                    self._seen[f"{name}.nonfinite"] = nonfinite
        return self._seen

    def _sum(self) -> torch.Tensor:
        """Of each metric, the weighted sum, the sum of weights, and the count of nonfinite values.

        Shape `[metrics, 3]`.
        """
        rows = [step.row for step in self._steps if step.row is not None]
        device = rows[-1].device if rows else self._sums.device
        shape = len(self._steps), len(self._columns)
        values = torch.zeros(shape, dtype=_accurate(device), device=device)
        present = torch.zeros_like(values, dtype=torch.bool)
        alike: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for index, step in enumerate(self._steps):
            alike.setdefault((step.names, len(step.numbers)), []).append(index)
        for (names, _), steps in alike.items():
            columns = _send([self._columns[name] for name in names], device, torch.long)
            where = _send(steps, device, torch.long)[:, None], columns
            values[where] = _block([self._steps[index] for index in steps], device)
            present[where] = True

        finite = values.isfinite()
        weights = _weights(self._steps, device)[:, None] * present
        if self._beta != 1:
            ages = present.to(values).flip(0).cumsum(0).flip(0) - 1
            weights = weights * self._beta**ages
        weights = weights * finite
        total = (values.where(finite, 0.0) * weights).sum(0)
        sums = torch.stack([total, weights.sum(0), (present & ~finite).sum(0)], 1)
        past = F.pad(self._sums.to(sums), (0, 0, 0, len(sums) - len(self._sums)))
        past[:, :2] *= self._beta ** present.to(values).sum(0)[:, None]
        return past + sums

    def __getitem__(self, name: str) -> float:
        return self._look()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._look())

    def __len__(self) -> int:
        return len(self._look())

    def __repr__(self) -> str:
        return repr(self._look())


class _Step(NamedTuple):
    """Metrics of one step: first those that are tensors, in one row, then numbers."""

    names: tuple[str, ...]
    row: torch.Tensor | None
    numbers: list[Any]
    weight: Any


def _number(name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"average of {name}: {value!r} is not a number") from None


def _row(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """A copy of tensors of one element, `[metrics]`."""
    values = [*tensors.values()]
    if len({value.dtype for value in values}) == 1:
        try:
            row = torch.stack(values).detach()
        except RuntimeError:  # of several shapes, or devices
            pass
        else:
            if row.ndim == 1:
                return row
    for name, value in tensors.items():
        if value.numel() != 1:
            raise ValueError(f"average of {name}: a metric has one element, not {value}")
    device = next((v.device for v in values if v.device.type != "cpu"), values[0].device)
    return torch.stack([v.detach().reshape(()).to(device, _accurate(device)) for v in values])


def _block(steps: list[_Step], device: torch.device) -> torch.Tensor:
    """Values of steps that have the same metrics, `[steps, metrics]`."""
    numbers = _send([step.numbers for step in steps], device)
    rows = [step.row.to(device) for step in steps if step.row is not None]
    return torch.cat([torch.stack(rows).to(numbers), numbers], 1) if rows else numbers


def _weights(steps: list[_Step], device: torch.device) -> torch.Tensor:
    """Weights of steps, `[steps]`."""
    weights = [step.weight for step in steps]
    if not any(isinstance(weight, torch.Tensor) for weight in weights):
        return _send(weights, device)
    rows = [w if isinstance(w, torch.Tensor) else torch.tensor([w]) for w in weights]
    return torch.cat([row.to(device, _accurate(device), non_blocking=True) for row in rows])


def _send(
    numbers: list[Any], device: torch.device, dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Numbers as a tensor on a device, without waiting for it."""
    return torch.tensor(numbers, dtype=dtype or _accurate(device)).to(device, non_blocking=True)


def _accurate(device: torch.device) -> torch.dtype:
    """The dtype to sum in: lower precision loses a step after some thousands."""
    return torch.float32 if device.type == "mps" else torch.float64


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
