"""Small tools: an error for users, safe writes, frozen models, images, pending gradients."""

from __future__ import annotations

import errno
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import torch
import torch.nn.functional as F
from torch.optim import Optimizer

from .metrics import averager as averager  # Flashy has it here


class UserError(RuntimeError):
    """An error to be mended without reading code: a wrong value, a missing file, a full disk.

    The message is a line with culprit and cure. A terminal shows only this line; the
    traceback goes to the log file. A mistake in code is another error, and keeps its traceback.
    """


def length(iterable: Any) -> int | None:
    """Return the number of items, if known."""
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


def read_tensors(path: Path, mmap: bool = True) -> Any:
    """Return the content of a file of tensors and plain containers, on the CPU; nothing is run.

    Args:
        mmap: map the tensors to the file, which must not be overwritten in place then.
    """
    mmap = mmap and str(path).isprintable()  # PyTorch maps no file whose name is not UTF-8
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


@contextmanager
def write_and_rename(
    path: str | Path, mode: str = "wb", suffix: str = ".tmp", pid: bool = False
) -> Iterator[IO[Any]]:
    """Open a temporary file beside `path`; on success make the file durable, named `path`.

    A reader sees a whole file, old or new, also after a power cut. If the body
    raises, the temporary file is removed and `path` stays as it was.

    Args:
        mode: of opening, for writing.
        suffix: to append to the name while writing.
        pid: append the process id too, if several processes write the same path.
    """
    path = Path(path)
    temporary = path.with_name(path.name + suffix + (f".{os.getpid()}" if pid else ""))
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        for place in (temporary, path):
            if isinstance(error, OSError) and place.is_dir():
                raise UserError(f"{place} is a folder in the way of a file: move it") from error
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable: new ones, renamed ones and deleted ones."""
    if os.name != "nt":  # where a folder can be opened
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:  # some file systems can't
            if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


@contextmanager
def readonly(model: torch.nn.Module) -> Iterator[None]:
    """Freeze a model in the body: gradients flow through it, but not to its parameters.

    Frozen parameters stay frozen afterwards.
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
    missing = -len(images) % columns  # in the last row
    tiles = F.pad(images, (padding, padding, padding, padding, 0, 0, 0, missing))
    rows = [torch.cat([*row], dim=-1) for row in tiles.split(columns)]
    return torch.cat(rows, dim=-2)


class Accumulation:
    """Gradients of an optimizer: whether a backward pass has left some to its next step.

    The generator's loss of a GAN leaves gradients in the discriminator, to be dropped before its
    next backward pass: once seen to be dropped, what is left after a step does not count.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._left: weakref.ref[torch.Tensor] | None = None  # a gradient that was found pending
        self._drops = False
        optimizer.register_step_post_hook(self._note)

    @classmethod
    def of(cls, optimizer: Any) -> Accumulation:
        """Return the accumulation of an optimizer, whose steps are noted from the first call on."""
        if not hasattr(optimizer, "accumulation"):
            optimizer.accumulation = cls(optimizer)
        found: Accumulation = optimizer.accumulation
        return found

    def _note(self, optimizer: Optimizer, *_: Any) -> None:
        grad: Any = next(_gradients(optimizer), None)
        if self._left is not None:
            self._drops, self._left = self._left() is not grad, None
        if grad is not None:
            grad.used = grad._version

    def is_pending(self, optimizer: Optimizer) -> bool:
        """Return whether the next step needs the present gradients."""
        grad = next(_gradients(optimizer), None)
        if grad is None or self._drops or getattr(grad, "used", None) == grad._version:
            return False
        if not any(grad.count_nonzero() for grad in _gradients(optimizer)):
            return False
        self._left = weakref.ref(grad)
        return True


def _gradients(optimizer: Optimizer) -> Iterator[torch.Tensor]:
    params = (param for group in optimizer.param_groups for param in group["params"])
    return (param.grad for param in params if param.grad is not None)
