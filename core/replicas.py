"""Replicas: ranks with the same weights, and their buffers, which may differ (optional)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from . import distrib
from .modules import module_state, original_name
from .plain import TENSORS
from .utils import UserError


def own_buffers(modules: Mapping[str, nn.Module]) -> dict[str, dict[str, torch.Tensor]]:
    """Return this rank's buffers, by module, that are not the same on all ranks.

    Such as the statistics of a BatchNorm without synchronization. All ranks must take part.

    Raises:
        UserError: on all ranks, if a parameter is not the same on all ranks.
    """
    if not distrib.is_distributed():
        return {}
    tensors = dict(_replicated(modules))
    ranks = distrib.gather_objects(_checksums([*tensors.values()]), "checksums of the weights")
    found: dict[str, dict[str, torch.Tensor]] = {}
    wrong = []
    for (name, key), *sums in zip(tensors, *ranks, strict=True):
        others = [rank for rank, checksum in enumerate(sums) if checksum != sums[0]]
        if others and key in _parameters(modules[name]):
            wrong.append(f"{name}.{key} of rank {', '.join(map(str, others))}")
        elif others:
            found.setdefault(name, {})[key] = tensors[name, key].cpu()
    if wrong:
        raise UserError(
            f"ranks have other weights than rank 0: {'; '.join(wrong)}. Average the gradients of "
            "all, and begin with `distrib.broadcast_model`; or a chip has flipped a bit"
        )
    return found


def put_back(state: Mapping[str, Any], ranks: list[dict[str, Any]]) -> None:
    """Put this rank's buffers into a state, if it was saved on as many ranks.

    Args:
        state: of all ranks.
        ranks: the entries of all ranks, with their `own_buffers` as `buffers`.
    """
    mine = ranks[distrib.rank()] if len(ranks) == distrib.world_size() else {}
    for name, buffers in mine.get("buffers", {}).items():
        state[name].update(buffers)


def _replicated(modules: Mapping[str, nn.Module]) -> Iterator[tuple[tuple[str, str], torch.Tensor]]:
    """Yield the tensors in the state of modules, but for sharded and other special ones."""
    for name, module in modules.items():
        for key, value in module_state(module).items():
            if type(value) in TENSORS and value.layout == torch.strided:
                yield (name, key), value


def _parameters(module: nn.Module) -> set[str]:
    return {original_name(module, name) for name, _ in module.named_parameters()}


def _checksums(tensors: list[torch.Tensor]) -> list[int]:
    """Return the sum of the bits of each tensor, read as integers; waits once for the device."""
    sums = []
    for tensor in tensors:
        part = tensor.contiguous().reshape(-1).view(torch.uint8)
        part = part.clone() if part.storage_offset() % 8 else part
        words = part[: len(part) // 8 * 8].view(torch.int64)  # sums of long words are the fastest
        sums.append(words.sum() + part[8 * len(words) :].sum(dtype=torch.int64))
    return torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []
