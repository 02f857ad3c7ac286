"""Replicas: ranks with the same weights, and the parts of their states that differ (optional)."""

from __future__ import annotations

import functools
import logging
import pickle
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import distrib
from .metrics import fetch
from .modules import original_name
from .plain import to_plain

logger = logging.getLogger(__name__)

Keys = tuple[Any, ...]  # of nested dicts and lists
Sums = dict[Keys, int]

NOT_COMPARED = {"xp.cfg", "xp.sig"}  # the run's, and so the same everywhere


def shared_metrics(metrics: dict[str, Any]) -> dict[str, Any]:
    """Return rank zero's metrics of an epoch, by stage; a warning names those that differ.

    All ranks must take part. Decisions by the history are then the same everywhere.
    """
    if not distrib.is_distributed():
        return metrics
    ranks = distrib.gather_objects(metrics, "comparing metrics")
    values: dict[Keys, set[str]] = {}
    for keys, value in (part for theirs in ranks for part in _parts(theirs, ())):
        values.setdefault(keys, set()).add(repr(value))
    own = [keys for keys, found in values.items() if len(found) > 1 and keys[-1] != "duration"]
    if own and distrib.is_rank_zero():
        _warn_of_metrics(", ".join(".".join(map(str, keys)) for keys in own))
    first: dict[str, Any] = ranks[0]
    return first


@functools.cache  # said once
def _warn_of_metrics(names: str) -> None:
    note = "Metrics differ between ranks; rank 0's are kept: %s. Average them with "
    logger.warning(note + "distrib.average_metrics", names)


def add_own(
    entries: list[dict[str, Any]], state: Mapping[str, Any], modules: Mapping[str, nn.Module]
) -> None:
    """Add to the entries of all ranks, on rank zero, the parts of state that differ there: `own`.

    Examples are the statistics of a BatchNorm without synchronization and the position of a loader.
    Trained weights should be the same: a warning names those that differ, and rank zero's are kept.
    All ranks must take part.

    Args:
        entries: of all ranks, in a checkpoint.
        state: of this rank, in plain containers.
        modules: by the names of their states.
    """
    if not distrib.is_distributed():
        return
    parts = {keys: part for keys, part in _parts(state, ()) if keys[0] not in NOT_COMPARED}
    sums = _checksums(parts)
    digest = zlib.crc32(repr(sums).encode())
    if len({*distrib.gather_objects(digest, "comparing the state")}) == 1:
        return
    ranks = distrib.gather_objects(sums, "comparing the state")
    weights = {*_weights(modules)}
    _warn([keys for keys in ranks[0] if keys in weights], ranks)
    sharded = {keys[0] for keys, part in parts.items() if hasattr(part, "placements")}
    names = dict.fromkeys(k[0] for k in parts if k[0] not in modules and k[0] not in sharded)
    whole = [name for name in names if _keys(sums, name) != _keys(ranks[0], name)]
    own: list[tuple[Keys, Any]] = [((name,), state[name]) for name in whole]
    for keys, part in parts.items():
        if keys in ranks[0] and keys not in weights and keys[0] not in whole:
            own += [(keys, part)] if sums[keys] != ranks[0][keys] else []
    found: list[Any] = [None] * len(entries)
    sent = to_plain(own, copy=lambda tensor, _: tensor.cpu())
    dist.gather_object(sent, found if distrib.is_rank_zero() else None)
    for entry, parts_of_rank in zip(entries, found, strict=True):
        entry["own"] = parts_of_rank


def restore_own(state: Mapping[str, Any], ranks: list[dict[str, Any]]) -> None:
    """Put the own parts of this rank into a state, if the number of ranks is the same.

    Args:
        state: of rank zero.
        ranks: entries of all ranks, with their parts as `own`.
    """
    mine = ranks[distrib.rank()] if len(ranks) == distrib.world_size() else {}
    for (*above, last), part in mine.get("own", ()):
        place: Any = state
        for key in above:
            place = place[key]
        place[last] = part


def _parts(value: Any, keys: Keys) -> Iterator[tuple[Keys, Any]]:
    """Yield the parts of nested dicts and lists, with the keys that lead there."""
    if not isinstance(value, (dict, list)) or not value:
        yield keys, value
        return
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        yield from _parts(part, (*keys, key))


def _weights(modules: Mapping[str, nn.Module]) -> Iterator[Keys]:
    """Yield the keys of trained parameters."""
    for name, module in modules.items():
        for key, parameter in module.named_parameters():
            if parameter.requires_grad:
                yield name, original_name(module, key)


def _keys(sums: Sums, name: str) -> set[Keys]:
    return {keys for keys in sums if keys[0] == name}


def _warn(weights: list[Keys], ranks: list[Sums]) -> None:
    """Name the weights that are not those of rank zero on some rank."""
    pairs = ((keys, rank) for keys in weights for rank in range(1, len(ranks)))
    wrong = [f"{'.'.join(k)} of rank {r}" for k, r in pairs if ranks[r].get(k) != ranks[0][k]]
    if wrong:
        note = (
            "Weights differ from those of rank 0, which are saved: %s (%d in all). Were gradients "
        )
        note += "averaged, and was distrib.broadcast_model called? Else suspect a memory error"
        logger.warning(note, ", ".join(wrong[:3]), len(wrong))


def _checksums(parts: Mapping[Keys, Any]) -> Sums:
    """Return a checksum of each part, of tensors by their bits; waits once for each device."""
    sums: dict[Keys, Any] = {}
    for keys, part in parts.items():
        if hasattr(part, "placements"):  # sharded: no two ranks have the same
            sums[keys] = 0
            continue
        if not isinstance(part, torch.Tensor) or part.layout != torch.strided or part.is_quantized:
            sums[keys] = zlib.crc32(pickle.dumps(part))
            continue
        data = part.detach().contiguous().reshape(-1).view(torch.uint8)
        data = data.clone() if data.storage_offset() % 8 else data
        size = len(data) // 512 * 512
        blocks = data[:size].view(torch.int64).view(-1, 64).sum(1)
        values = torch.cat([blocks, data[size:].long()])
        # Odd factors keep each changed bit, and tell another order.
        sums[keys] = (values * (2 * torch.arange(len(values), device=values.device) + 1)).sum()
    tensors: dict[Any, Any] = {
        keys: value for keys, value in sums.items() if isinstance(value, torch.Tensor)
    }
    fetch([tensors])
    return sums | tensors
