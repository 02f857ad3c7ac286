"""Sharded checkpoints: each rank writes and reads its shards of a model (optional).

The tensors of `fully_shard` go to a folder beside the checkpoint, through
`torch.distributed.checkpoint`. The checkpoint holds their shapes (tensors on "meta"), and the
folder's name and checksums. It is renamed into place last, so both exist or neither does.
"""

from __future__ import annotations

import functools
import pickle
import shutil
import uuid
import zlib
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import metadata as parts
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import save

from . import distrib
from .plain import to_plain
from .state import StateDict
from .utils import UserError, read_tensors, sync_folder

OWN = {"flatten_state_dict": False, "flatten_sharded_tensors": False}  # names are flat already
# The classes in the metadata that `torch.distributed.checkpoint` pickles.
MODULES = {parts.__name__, FileSystemReader.__module__, "pathlib", "pathlib._local"}
MODULES |= {"torch", "torch.serialization"}
CLASSES = {*parts.__all__, "_MEM_FORMAT_ENCODING", "_StorageInfo", "PosixPath"}
CLASSES |= {"Size", "_get_layout"}
CLASSES -= {"BytesStorageMetadata"}  # of entries that would be unpickled


class Shards:
    """The shards of this rank in one checkpoint. All ranks must create theirs together."""

    def __init__(self, run: Path) -> None:
        self.folder = run / distrib.broadcast_object(f"shards.{uuid.uuid4().hex[:12]}")
        self.tensors: dict[str, Any] = {}  # sharded
        self.copies: dict[str, torch.Tensor] = {}  # of this rank's shards, in host memory
        self.group = _group(dist.group.WORLD)

    def add(self, name: str, tensor: Any, copy: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """Add a sharded tensor, and copy this rank's shard; return a placeholder for a state."""
        self.tensors[name], self.copies[name] = tensor, copy(tensor.to_local())
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def save(self, state: StateDict, write: Callable[[StateDict], None]) -> None:
        """Save the shards of all ranks, then `write` the rest of the state on rank zero.

        All ranks must take part, in any thread.
        """
        state["shards"] = self._save()
        if distrib.is_rank_zero():
            write(state)

    def _save(self) -> StateDict:
        """Save the shards, durably; return the entry of the checkpoint."""
        writer, planner = FileSystemWriter(self.folder), _Copies(self.copies)
        try:
            save(self.tensors, storage_writer=writer, planner=planner, process_group=self.group)
        except CheckpointException as error:  # not an Exception
            rank, (why, _) = next(iter(error.failures.items()))
            raise UserError(
                f"the shards of rank {rank} could not be saved to {self.folder}: {why}; "
                "earlier checkpoints are intact: fix the cause, then resume with the same command"
            ) from None
        found: list[Any] = [None] * distrib.world_size()
        dist.all_gather_object(found, self._checksums(), self.group)
        files = {name: value for theirs in found for name, value in theirs.items()}
        lost = [name for name in files if not (self.folder / name).exists()]
        if distrib.is_rank_zero() and (lost or None in files.values()):
            raise UserError(
                f"{self.folder} lacks {', '.join(lost) or 'readable files'}: checkpoint.sharded "
                "needs a folder that all nodes share"
            )
        for folder in (self.folder, self.folder.parent):
            sync_folder(folder)
        return {"folder": self.folder.name, "files": files}

    def _checksums(self) -> dict[str, int | None]:
        """Return the checksums of this rank's files; None for one that can't be read."""
        found: dict[str, int | None] = {}
        rank = distrib.rank()
        begins = f"__{rank}_" if rank else ("__0_", ".metadata")
        for path in (path for path in self.folder.iterdir() if path.name.startswith(begins)):
            found[path.name] = None
            with suppress(OSError):
                found[path.name] = _checksum(path)
        return found


@functools.lru_cache(1)
def _group(main: Any) -> Any:
    """Return a group for collectives in the background."""
    return dist.new_group(backend="gloo")


def prune(run: Path) -> None:
    """Delete the shard folders of a run to which no checkpoint refers."""
    kept = set()
    for path in run.glob("*.th"):
        try:
            kept.add(read_tensors(path)["shards"]["folder"])
        except (OSError, MemoryError):  # it may be readable the next time
            return
        except Exception:
            continue  # damaged, or without shards
    for folder in run.glob("shards.*"):
        if folder.name not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def attach(state: StateDict, run: Path, verify: bool) -> None:
    """Make the sharded tensors of a state readable by `shard_like`.

    Args:
        state: as in the file.
        run: the folder of the file.
        verify: raise ValueError if a checksum does not match.
    """
    about = state.pop("shards")
    folder = run / about["folder"]
    for name, checksum in about["files"].items() if verify else ():
        if not (folder / name).exists() or _checksum(folder / name) != checksum:
            raise ValueError(f"{folder.name}/{name} is missing, or its checksum does not match")
    reader = _Reader(folder)

    def give(tensor: Any, name: str) -> Any:
        if tensor.is_meta:
            tensor.read = partial(reader.read, name, tensor)
        return tensor

    to_plain(state, copy=give)


class _Copies(DefaultSavePlanner):
    """Plans from the sharded tensors, and writes the copies of their shards."""

    def __init__(self, copies: Mapping[str, torch.Tensor]) -> None:
        super().__init__(**OWN)
        self.copies = copies

    def lookup_object(self, index: parts.MetadataIndex) -> torch.Tensor:
        return self.copies[index.fqn]


class _Reader(FileSystemReader):
    """Reads single tensors, whole or this rank's shard."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        with open(folder / ".metadata", "rb") as file:
            self.about = _Unpickler(file).load()
        self.set_up_storage_reader(self.about, is_coordinator=True)

    def read(self, name: str, saved: torch.Tensor, own: Any = None) -> torch.Tensor:
        """Read a tensor: the shard of this rank if `own` is sharded, else the whole."""
        fits = hasattr(own, "placements") and own.shape == saved.shape
        new = partial(torch.empty_like, own) if fits else partial(torch.empty, saved.shape)
        tensor: torch.Tensor = new(dtype=saved.dtype)
        planner = DefaultLoadPlanner(**OWN)
        planner.set_up_planner({name: tensor}, self.about, is_coordinator=True)
        self.read_data(planner.create_local_plan(), planner).wait()
        return tensor


class _Unpickler(pickle.Unpickler):
    """Reads the metadata, and nothing that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module in MODULES else None
        if name in CLASSES or isinstance(found, (torch.dtype, torch.layout)):
            return found
        raise pickle.UnpicklingError(f"the metadata of shards has a {module}.{name}")


def _checksum(path: Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while data := file.read(2**20):
            checksum = zlib.crc32(data, checksum)
    return checksum
