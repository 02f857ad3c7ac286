"""Plain values: tensors and containers, which are all that a checkpoint may hold."""

from __future__ import annotations

from argparse import Namespace
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch

_PLAIN = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}


class Records(list[Any]):
    """A list that may grow long, of records that do not change, such as the history.

    A snapshot of it is a list of the same records: they are converted as they are written, in the
    background, so the training does not wait for a long history.
    """

    def copy(self) -> Records:
        return Records(self)


def to_plain(
    value: Any,
    name: str = "state",
    copy: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Any:
    """Convert a state to tensors and plain containers, which are all that a checkpoint may hold.

    Configs, enums, paths and NumPy values are converted; TypeError names anything else.

    Args:
        value: the state.
        name: how to call it in errors.
        copy: applied to each tensor.
    """
    if isinstance(value, torch.Tensor):
        # A tensor that is sharded across ranks (`fully_shard`) is gathered, on all of them.
        return copy(value.full_tensor() if hasattr(value, "full_tensor") else value)
    if type(value) in _PLAIN or isinstance(value, Records):
        return value
    if isinstance(value, OrderedDict) and hasattr(value, "_metadata"):  # of a module, has versions
        state = OrderedDict((key, to_plain(v, f"{name}.{key}", copy)) for key, v in value.items())
        state._metadata = value._metadata  # type: ignore[attr-defined]
        return state
    if isinstance(value, Mapping):
        return {to_plain(key, name): to_plain(v, f"{name}.{key}", copy) for key, v in value.items()}
    if isinstance(value, tuple):
        return tuple(to_plain(v, f"{name}.{i}", copy) for i, v in enumerate(value))
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_plain(v, f"{name}.{i}", copy) for i, v in enumerate(value)]
    return _convert(value, name, copy)


def _convert(value: Any, name: str, copy: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return copy(torch.from_numpy(value.copy()))
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Namespace):
        return to_plain(vars(value), name, copy)
    raise TypeError(
        f"{name} is a {type(value).__qualname__}, which a checkpoint can't hold: "
        "keep tensors, numbers, strings, lists and dicts in the state"
    )
