"""Plain values: the tensors and Python containers in a checkpoint, and the way back.

`CONVERSIONS` lists other kinds of values, given back as they were at any depth. To add a kind, add
a line.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from operator import attrgetter
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import torch
from torch import nn

from .utils import UserError

OnTensor = Callable[[torch.Tensor, str], torch.Tensor]  # with the tensor's name

# Types that `torch.load(weights_only=True)` reads.
VALUES = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
MAPPINGS = {dict, OrderedDict, Counter}
SEQUENCES = {list, tuple}
TENSORS = {torch.Tensor, nn.Parameter, nn.Buffer}
NAMES = {k.__name__: k for k in (int, float, str, list, set, frozenset, *MAPPINGS)}


def to_plain(
    value: Any, name: str = "state", copy: OnTensor = lambda tensor, _: tensor, exact: bool = False
) -> Any:
    """Convert a value to tensors and plain containers; TypeError names a value of another type.

    Args:
        value: such as a state, metrics, or a config.
        name: of the value in errors.
        copy: applied to each tensor and its name.
        exact: mark the kinds in `CONVERSIONS` for `from_plain`, and refuse other types; else
            convert similar types as well, for people to read.
    """

    def plain(part: Any, key: Any) -> Any:
        return part if type(part) in VALUES else to_plain(part, f"{name}.{key}", copy, exact)

    kind = type(value)
    if isinstance(value, torch.Tensor):
        sharded = hasattr(value, "placements")
        if sharded or type(value) in TENSORS or not exact:
            return copy(value if sharded else value.resolve_conj().resolve_neg(), name)
    if kind in VALUES:
        return value
    if kind in SEQUENCES:
        return kind(plain(part, index) for index, part in enumerate(value))
    if kind in MAPPINGS and (not exact or all(type(key) in VALUES for key in value)):
        flat = VALUES.issuperset(map(type, (*value, *value.values())))  # such as metrics
        new = kind(value if flat else {plain(k, "key"): plain(v, k) for k, v in value.items()})
        if kind is OrderedDict:  # may have the versions of modules, or a mark
            vars(new).update(vars(value))
        return new
    for label, conversion in CONVERSIONS.items():
        if isinstance(value, conversion.kind):
            try:
                parts = conversion.get(value)
            except (TypeError, ValueError):  # such as an array of texts
                break
            converted = to_plain(parts, name, copy, exact)
            return _marked(label, value, converted, name) if exact else converted
    raise TypeError(f"{name} is a {kind.__qualname__}: no checkpoint holds one without state_dict")


def on_device(tensor: torch.Tensor) -> Any:
    """Mark a tensor, for `from_plain` to bring it back to an accelerator."""
    return _with_mark("tensor", tensor, "accelerator")


def from_plain(
    value: Any,
    device: torch.device | None = None,
    copy: Callable[[torch.Tensor], torch.Tensor] = lambda tensor: tensor,
) -> Any:
    """Return a value as it was before `to_plain(exact=True)`; UserError if its type is gone.

    Args:
        value: such as a state.
        device: of the tensors that `on_device` has marked; where they are by default.
        copy: applied to each tensor.
    """
    kind = type(value)
    if kind in SEQUENCES:
        return kind(from_plain(part, device, copy) for part in value)
    if kind not in MAPPINGS:
        return copy(value) if isinstance(value, torch.Tensor) else value
    new = kind({from_plain(key): from_plain(part, device, copy) for key, part in value.items()})
    if kind is OrderedDict:
        vars(new).update(vars(value))
        if (about := vars(value).get("mark")) is not None:
            [(label, plain)] = new.items()
            if label == "tensor":
                return plain.to(device or plain.device)
            try:
                return CONVERSIONS[label].set(about, plain)
            except Exception as error:
                raise UserError(f"the checkpoint needs {about} for a {label}") from error
    return new


def _marked(label: str, value: Any, converted: Any, name: str) -> Any:
    """Mark a converted value; TypeError if the way back does not lead to its type."""
    marked = _with_mark(label, converted, CONVERSIONS[label].about(value))
    with suppress(UserError):
        found = from_plain(marked)
        same_unit = getattr(found, "dtype", None) == getattr(value, "dtype", None)
        if type(found) is type(value) and same_unit:
            return marked
    raise TypeError(f"{name} is a {type(value).__qualname__}: a checkpoint can't give it back")


def _with_mark(label: str, plain: Any, about: str) -> Any:
    marked: Any = OrderedDict({label: plain})
    marked.mark = about
    return marked


@dataclass(frozen=True)
class Conversion:
    """A kind of value, and its plain form.

    Args:
        kind: of the value.
        get: return the plain form, whose parts may be of any kind.
        set: return the value, from `about` and the plain form.
        about: return what else `set` needs.
    """

    kind: type | tuple[type, ...]
    get: Callable[[Any], Any]
    set: Callable[[str, Any], Any]
    about: Callable[[Any], str] = lambda value: ""


def _name(value: Any) -> str:
    return type(value).__name__


def _address(value: Any) -> str:
    return f"{type(value).__module__}:{type(value).__qualname__}"


def _imported(address: str) -> Any:
    """Return an Enum or a named tuple; nothing is imported, for a file may name anything."""
    module, _, name = address.partition(":")
    found = attrgetter(name)(sys.modules.get(module))
    return found if issubclass(found, (Enum, tuple)) else None


def _deque(most: str, items: list[Any]) -> deque[Any]:
    return deque(items, int(most) if most else None)


def _item(value: Any) -> Any:
    if isinstance(item := value.item(), np.generic):  # such as a long double
        raise TypeError("Python has no such number")
    return item


def _number(dtype: str, number: Any) -> Any:
    return np.dtype(dtype).type(number)


def _factory(value: defaultdict[Any, Any]) -> str:
    return getattr(value.default_factory, "__name__", "")


def _defaultdict(factory: str, items: dict[Any, Any]) -> defaultdict[Any, Any]:
    return defaultdict(NAMES[factory], items)


CONVERSIONS = {
    "array": Conversion(np.ndarray, lambda v: torch.from_numpy(v.copy()), lambda _, t: t.numpy()),
    "number": Conversion(np.generic, _item, _number, lambda v: v.dtype.str),
    "enum": Conversion(Enum, lambda v: v.name, lambda kind, v: _imported(kind)[v], _address),
    "tuple": Conversion(tuple, tuple, lambda kind, v: _imported(kind)._make(v), _address),
    "path": Conversion(PurePath, str, lambda _, v: Path(v)),
    "namespace": Conversion(Namespace, vars, lambda _, v: Namespace(**v)),
    "set": Conversion((set, frozenset), list, lambda kind, v: NAMES[kind](v), _name),
    "deque": Conversion(deque, list, _deque, lambda v: "" if v.maxlen is None else str(v.maxlen)),
    "defaultdict": Conversion(defaultdict, dict, _defaultdict, _factory),
    "dict": Conversion(dict, lambda v: [*v.items()], lambda kind, v: NAMES[kind](dict(v)), _name),
    # Of subclasses, as in a config: only to be read.
    "text": Conversion(str, str, lambda _, v: v),
    "mapping": Conversion(Mapping, lambda v: dict(v.items()), lambda _, v: v),
    "sequence": Conversion(Sequence, list, lambda _, v: v),
}
