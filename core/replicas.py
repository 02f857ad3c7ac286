"""Replicas: ranks with the same weights, and the parts of their states that differ (optional)."""

from __future__ import annotations

import pickle
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from . import distrib
from .modules import original_name
from .plain import to_plain
from .utils import UserError

Path = tuple[Any, ...]  # keys of nested dicts

OF_RANK_ZERO = {"history", "xp.cfg", "xp.sig"}  # with durations, or given to all


def own_parts(state: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> list[tuple[Path, Any]]:
    """Return the parts of this rank's state that are not the same on all ranks, with their paths.

    Such as the statistics of a BatchNorm without synchronization, or the position of a loader. All
    ranks must take part.

    Args:
        state: of this rank, in plain containers.
        modules: by the names of their states.

    Raises:
        UserError: on all ranks, if a parameter is not the same on all ranks.
    """
    if not distrib.is_distributed():
        return []
    parts = {path: part for path, part in _parts(state, ()) if path[0] not in OF_RANK_ZERO}
    ranks = distrib.gather_objects(_checksums(parts), "checksums of the state")
    own, wrong = [], []
    for name in dict.fromkeys(path[0] for path in parts):
        paths = [{path for path in sums if path[0] == name} for sums in ranks]
        if any(found != paths[0] for found in paths):  # has other keys, so is kept as a whole
            own.append(((name,), state[name]))
            continue
        for path in paths[0]:
            others = [rank for rank, sums in enumerate(ranks) if sums[path] != ranks[0][path]]
            if others and name in modules and path[1] in _parameters(modules[name]):
                wrong.append(f"{'.'.join(path)} of rank {', '.join(map(str, others))}")
            elif others:
                own.append((path, parts[path]))
    if wrong:
        raise UserError(
            f"ranks have other weights than rank 0: {'; '.join(sorted(wrong))}. Average the "
            "gradients, and begin with `distrib.broadcast_model`; or a chip has flipped a bit"
        )
    return [(path, to_plain(part, copy=torch.Tensor.cpu)) for path, part in own]


def put_back(state: Mapping[str, Any], ranks: list[dict[str, Any]]) -> None:
    """Put the parts of this rank into a state, if it was saved on as many ranks.

    Args:
        state: of rank zero.
        ranks: entries of all ranks, with their `own_parts` as `own`.
    """
    mine = ranks[distrib.rank()] if len(ranks) == distrib.world_size() else {}
    for (*above, last), part in mine.get("own", ()):
        place: Any = state
        for key in above:
            place = place[key]
        place[last] = part


def _parts(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield the parts of nested dicts, with the keys that lead there."""
    if not isinstance(value, dict) or not value:
        yield path, value
        return
    for key, part in value.items():
        yield from _parts(part, (*path, key))


def _parameters(module: nn.Module) -> set[str]:
    return {original_name(module, name) for name, _ in module.named_parameters()}


def _checksums(parts: Mapping[Path, Any]) -> dict[Path, int]:
    """Return a checksum of each part: of a tensor the sum of its bits; waits once for a device."""
    sums: dict[Path, Any] = {}
    for path, part in parts.items():
        if not isinstance(part, torch.Tensor) or part.layout != torch.strided or part.is_quantized:
            sums[path] = zlib.crc32(pickle.dumps(part))
            continue
        data = part.detach().contiguous().reshape(-1).view(torch.uint8)
        data = data.clone() if data.storage_offset() % 8 else data
        words = data[: len(data) // 8 * 8].view(torch.int64)  # long words are summed fastest
        sums[path] = words.sum() + data[8 * len(words) :].sum(dtype=torch.int64)
    waiting = {path: value for path, value in sums.items() if isinstance(value, torch.Tensor)}
    device = next((value.device for value in waiting.values()), None)
    values = torch.stack([value.to(device) for value in waiting.values()]) if waiting else None
    return sums | dict(zip(waiting, values.tolist() if values is not None else (), strict=True))
