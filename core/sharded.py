"""Sharded checkpoints: each rank writes and reads its shards of a model (optional).

The tensors of `fully_shard` go to a folder beside the checkpoint, through
`torch.distributed.checkpoint`. The checkpoint has their shapes on the device "meta", and name and
checksums of the folder. As the checkpoint is renamed last, there are both, or neither.
"""

from __future__ import annotations

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
from .utils import UserError, sync_folder

OWN = {"flatten_state_dict": False, "flatten_sharded_tensors": False}  # names are flat already
# The classes in the metadata that `torch.distributed.checkpoint` pickles.
MODULES = {parts.__name__, FileSystemReader.__module__, "pathlib", "pathlib._local"}
MODULES |= {"torch", "torch.serialization"}
CLASSES = {*parts.__all__, "_MEM_FORMAT_ENCODING", "_StorageInfo", "PosixPath"}
CLASSES |= {"Size", "_get_layout"}

_groups: dict[Any, Any] = {}  # for writing in the background, by the process group

StateDict = dict[str, Any]


class Shards:
    """The shards of this rank in one checkpoint; all ranks must make one at the same time."""

    def __init__(self, run: Path) -> None:
        self.folder = run / distrib.broadcast_object(f"shards.{uuid.uuid4().hex[:12]}")
        self.tensors: dict[str, Any] = {}  # sharded
        self.copies: dict[str, torch.Tensor] = {}  # of this rank's shards, in host memory
        main = dist.group.WORLD
        if main not in _groups:
            _groups.clear()
            _groups[main] = dist.new_group(backend="gloo")
        self.group = _groups[main]

    def add(self, name: str, tensor: Any, copy: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """Add a sharded tensor, and copy this rank's shard; return its place in a state."""
        self.tensors[name], self.copies[name] = tensor, copy(tensor.to_local())
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")

    def save(self, state: StateDict, write: Callable[[StateDict], None]) -> None:
        """Save the shards of all ranks, then `write` the rest of the state on rank zero.

        All ranks must take part, in any thread.
        """
        state["shards"] = self._save()
        if distrib.is_rank_zero():
            write(state)
            self._prune()

    def _save(self) -> StateDict:
        """Save the shards, durably; return the entry of the checkpoint."""
        writer, planner = FileSystemWriter(self.folder), _Copies(self.copies)
        try:
            save(self.tensors, storage_writer=writer, planner=planner, process_group=self.group)
        except CheckpointException as error:  # not an Exception
            rank, (why, _) = next(iter(error.failures.items()))
            raise UserError(
                f"the shards of rank {rank} could not be saved to {self.folder}: {why}; "
                "earlier checkpoints are intact: mend the cause, then resume with the same command"
            ) from None
        rank = distrib.rank()
        mine = [*self.folder.glob(f"__{rank}_*"), *([] if rank else [self.folder / ".metadata"])]
        found: list[Any] = [None] * distrib.world_size()
        dist.all_gather_object(found, {path.name: _checksum(path) for path in mine}, self.group)
        for folder in (self.folder, self.folder.parent):
            sync_folder(folder)
        files = {name: value for theirs in found for name, value in theirs.items()}
        return {"folder": self.folder.name, "files": files}

    def _prune(self) -> None:
        """Delete other shards of the run, but for those of which a checkpoint tells."""
        kept = set()
        for path in self.folder.parent.glob("*.th"):
            with suppress(Exception):
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                kept.add(state["shards"]["folder"])
        for folder in self.folder.parent.glob("shards.*"):
            if folder.name not in kept:
                shutil.rmtree(folder)


def attach(state: StateDict, run: Path, verify: bool) -> None:
    """Let tensors in shards be read from a state, by `shard_like`.

    Args:
        state: as in the file.
        run: the folder of the file.
        verify: raise ValueError if a checksum is not that of the file.
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
    """Plans by sharded tensors, and writes copies of their shards."""

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
