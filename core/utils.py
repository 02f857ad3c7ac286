"""Small tools with no home of their own: running averages, safe writes, frozen models, grids."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F


def averager(beta: float = 1.0) -> Callable[..., dict[str, Any]]:
    """Return a function that averages metrics over the steps of a stage.

    The function takes the metrics of one step and their weight (usually the number of examples,
    a plain number) and returns the averages so far, a new dict each time. A metric may be absent
    from some steps. Numbers give floats; tensors give 0-d tensors on their own device, so that a
    GPU is never waited for.

    Args:
        beta: forgetting factor of the exponential moving average; 1 weighs all steps alike.
    """
    totals: dict[str, Any] = {}
    weights: dict[str, float] = {}

    def update(metrics: Mapping[str, Any], weight: float = 1.0) -> dict[str, Any]:
        for name, value in metrics.items():
            value = _accurate(value)
            totals[name] = totals.get(name, 0.0) * beta + value * weight
            weights[name] = weights.get(name, 0.0) * beta + weight
        return {name: totals[name] / weights[name] for name in totals if weights[name]}

    return update


def _accurate(value: Any) -> Any:
    """The value in the dtype to sum it in: half precision loses a step after some thousands."""
    if not isinstance(value, torch.Tensor):
        return float(value)
    return value.detach().to(torch.float32 if value.device.type == "mps" else torch.float64)


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
