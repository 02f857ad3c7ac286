"""A fake accelerator: two devices for tests on machines without a GPU.

A tensor of a fake device has the memory of a tensor of the CPU: DLPack makes one from the other,
with another device written into the capsule. Operators run on the CPU, so their results are real.

Like a GPU, a fake device

- refuses tensors of other devices, generators of the CPU, and use after a fork;
- notes when the host waits: see `syncs`;
- lets copies to pinned memory arrive only when something waits for them;
- has generators, a current device for each thread, streams and events;
- reduces and broadcasts over ranks, and never reports a missing rank;
- reports a failed assertion when something waits next.

Operators run at once and in their order. `device="fake"` without an index is the first device where
PyTorch asks nobody, as in `tensor.to`. Gradients are computed on the first device only.
"""

from __future__ import annotations

import ctypes
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_map

NAME = "fake"
COUNT = 2  # devices
KEY = "PrivateUse1"
TORCH = str(Path(torch.__file__).parent)
CPU_KERNELS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
aten = torch.ops.aten

# These views are primitive. Kernels of the CPU compute their strides, and touch no memory.
VIEWS = {"alias", "as_strided", "detach", "unfold", "view", "view_as_complex", "view_as_real"}
VIEWS |= {"_conj", "_neg_view", "_reshape_alias"}
# The host waits for a value, or for the size of a result.
WAITING = {"_local_scalar_dense", "bincount", "equal", "is_nonzero", "masked_select", "nonzero"}
WAITING |= {"repeat_interleave", "unique_consecutive", "unique_dim", "_unique", "_unique2"}
INDEXING = {"index", "index_put_", "_index_put_impl_", "_unsafe_index", "_unsafe_index_put"}


class DeviceError(RuntimeError):
    """A GPU would refuse this."""


# ---------------------------------------------------------------------------------------- memory

_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_pointer.restype, _pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
_CPU, _FAKE = 1, 12  # DLPack's numbers of the kinds of devices


class _Header(ctypes.Structure):
    """The first fields of DLPack's tensor."""

    _fields_ = (("data", ctypes.c_void_p), ("kind", ctypes.c_int32), ("index", ctypes.c_int32))


def _moved(tensor: torch.Tensor, kind: int, index: int = 0) -> torch.Tensor:
    """Return a tensor of another device with the same memory."""
    capsule = torch._C._to_dlpack(tensor)
    header = _Header.from_address(_pointer(capsule, b"dltensor"))
    header.kind, header.index = kind, index
    moved: torch.Tensor = torch._C._from_dlpack(capsule)
    moved = moved.conj() if tensor.is_conj() else moved
    return torch._neg_view(moved) if tensor.is_neg() else moved


def peek(tensor: torch.Tensor) -> torch.Tensor:
    """Return the memory of a fake tensor as a tensor of the CPU. Nothing waits."""
    return _moved(tensor, _CPU)


def _is_fake(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == NAME


# ----------------------------------------------------------------------------------------- waits


@dataclass
class Sync:
    """A wait of the host.

    Args:
        kind: of the wait, with the operator.
        stack: of the caller, without PyTorch's own frames.
        thread: that waits.
    """

    kind: str
    stack: list[str] = field(default_factory=lambda: _stack())
    thread: str = field(default_factory=lambda: threading.current_thread().name)

    def __str__(self) -> str:
        return "\n    ".join([f"{self.kind} in {self.thread}", *self.stack])


def _stack() -> list[str]:
    frames = traceback.extract_stack()
    outside = [f for f in frames if not f.filename.startswith((TORCH, __file__, "<"))]
    return [f"{f.filename}:{f.lineno} {f.name}: {f.line}" for f in outside[-6:]]


@contextmanager
def syncs(thread: str = "") -> Iterator[list[Sync]]:
    """Give the list of the waits in the body, of all threads or of one."""
    seen: list[Sync] = []
    listener = seen, thread
    device.listeners.append(listener)
    try:
        yield seen
    finally:
        device.listeners = [other for other in device.listeners if other is not listener]


@dataclass(eq=False)
class _Copy:
    """A copy on its way to pinned memory."""

    target: torch.Tensor
    value: torch.Tensor
    index: int  # of the source's device


class _Device:
    """The state of all fake devices: the one object that changes."""

    def __init__(self) -> None:
        self.installed = self.started = self.forked = False
        self.libraries: list[torch.library.Library] = []  # alive as long as their operators
        self.listeners: list[tuple[list[Sync], str]] = []
        self.flying: list[_Copy] = []
        self.pinned: dict[int, StorageWeakRef] = {}  # by address
        self.works: list[Any] = []  # collectives
        self.failed = ""  # the message of a failed assertion
        self.here = threading.local()
        self.generators = [torch.Generator().manual_seed(0) for _ in range(COUNT)]
        self.lock = threading.RLock()

    @property
    def current(self) -> int:
        """The index of this thread's current device."""
        return int(getattr(self.here, "index", 0))

    def wait(self, kind: str, copies: Sequence[_Copy] | None = None) -> None:
        """Note a wait, and let copies arrive: all of them by default."""
        sync = Sync(kind)
        for seen, thread in self.listeners:
            if thread in ("", sync.thread):
                seen.append(sync)
        if self.failed:
            raise DeviceError(f"device-side assert triggered: {self.failed}")
        with self.lock:
            for copy in [c for c in self.flying if copies is None or c in copies]:
                copy.target.copy_(copy.value)
                self.flying.remove(copy)

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        self.pinned[storage.data_ptr()] = StorageWeakRef(storage)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        known = self.pinned.get(tensor.untyped_storage().data_ptr())
        return known is not None and not known.expired()

    def copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> None:
        """Copy between two devices, one of them fake."""
        if _is_fake(target) and _is_fake(source):
            peek(target).copy_(peek(source))
        elif _is_fake(target):
            if not (non_blocking and self.is_pinned(source)):
                self.wait("copy to the device")
            peek(target).copy_(source)
        elif non_blocking and self.is_pinned(target):
            with self.lock:
                copy = _Copy(target, peek(source).clone(), source.device.index)
                self.flying.append(copy)
                target.fill_(float("nan") if target.is_floating_point() else 86)  # not there yet
        else:
            self.wait("copy to the host")
            target.copy_(peek(source))


device = _Device()


# ------------------------------------------------------------------------------------- operators


@contextmanager
def _drawing(index: int) -> Iterator[None]:
    """Let kernels of the CPU draw on the generator of a fake device."""
    own = torch.default_generator.get_state()
    torch.default_generator.set_state(device.generators[index].get_state())
    try:
        yield
    finally:
        device.generators[index].set_state(torch.default_generator.get_state())
        torch.default_generator.set_state(own)


class _Arguments:
    """The arguments of an operator, for the kernel of the CPU.

    Args:
        op: the operator.
        given: its arguments by name.
    """

    def __init__(self, op: Any, given: dict[str, Any]) -> None:
        self.name = op._schema.name.removeprefix("aten::")
        self.index: int | None = None  # of the device
        self.strangers: list[torch.Tensor] = []
        self.written: list[tuple[torch.Tensor, torch.Tensor]] = []  # ours, and the kernel's
        wanted = given.get("device")
        self.wanted = None if wanted is None else torch.device(wanted)
        if self.wanted is not None and self.wanted.type == NAME:
            self.index = device.current if self.wanted.index is None else self.wanted.index
        known = [argument for argument in op._schema.arguments if argument.name in given]
        self.values = {a.name: self._enter(a, given[a.name]) for a in known}
        if self.wanted is not None:
            self.values["device"] = torch.device("cpu")
        if (generator := given.get("generator")) is not None:
            raise DeviceError(f"{self.name}: a generator of {generator.device}")
        if self.strangers and any(map(_is_fake, tensors(given))):
            if self.name not in INDEXING:
                shapes = [[*t.shape] for t in self.strangers]
                raise DeviceError(f"{self.name}: tensors {shapes} of the cpu, others of {NAME}")
            device.wait(f"{self.name} with an index on the host")

    def _enter(self, argument: Any, value: Any) -> Any:
        new = tree_map(self._tensor, value)
        alias = argument.alias_info
        if alias is not None and alias.is_write:
            if argument.is_out and _is_fake(value) and not value.numel():
                new = torch.empty(0, dtype=value.dtype)  # to be resized
            self.written += zip(tensors(value), tensors(new), strict=True)
        if isinstance(new, (bool, int, float, complex)) and str(argument.type) == "Tensor":
            return torch.tensor(new)  # C++ passed a number as a tensor
        return new

    def _tensor(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if not _is_fake(value):
            self.strangers += [value] if value.dim() else []
            return value
        if self.index not in (None, value.device.index) and value.dim():
            raise DeviceError(f"{self.name}: tensors of {NAME}:{self.index} and {value.device}")
        self.index = value.device.index
        return peek(value)


def tensors(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested containers."""
    return [leaf for leaf in torch.utils._pytree.tree_leaves(value) if torch.is_tensor(leaf)]


def _call(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Run an operator of a fake device on the CPU."""
    schema, name = op._schema, op._schema.name.removeprefix("aten::")
    if device.forked:
        raise DeviceError(f"{name}: the device can't be used in a forked process")
    device.started = True
    if name in VIEWS or name.startswith("set_"):
        return op.redispatch(CPU_KERNELS, *args, **kwargs)
    if name in ("_copy_from", "_copy_from_and_resize"):
        device.copy(args[1], args[0], *args[2:])
        return args[1]
    if name == "resize_":
        _hold(args[0], torch.empty(args[1], dtype=args[0].dtype))
        return args[0]
    positional = [argument.name for argument in schema.arguments]
    ours = _Arguments(op, dict(zip(positional, args, strict=False)) | kwargs)
    index = ours.index or 0
    masks = name in INDEXING and any(t.dtype == torch.bool for t in tensors(list(args[1])))
    if masks or (name in WAITING and ours.index is not None):
        device.wait(name)
    if name == "_assert_async":
        if not peek(args[0]).all() and not device.failed:
            device.failed = str(args[1]) if len(args) > 1 else "an assertion"
            print(f"Assertion failed: {device.failed}", file=sys.stderr)
        return None
    call = ours.values
    first = [call.pop(a.name) for a in schema.arguments if not a.kwarg_only and a.name in call]
    if torch.Tag.nondeterministic_seeded in op.tags:
        with _drawing(index):
            result = op(*first, **call)
    else:
        result = op(*first, **call)
    return _leave(schema, ours, result, index)


def _leave(schema: Any, ours: _Arguments, result: Any, index: int) -> Any:
    """Return the result of a kernel as tensors of the device."""
    for value, new in ours.written:
        if _is_fake(value) and new.shape != value.shape:
            _hold(value, new)
    written = [r.alias_info is not None and r.alias_info.is_write for r in schema.returns]
    if ours.written and all(written):
        outs = [value for value, _ in ours.written]
        return outs[0] if len(written) == 1 else tuple(outs) if written else None
    if ours.wanted is not None and ours.wanted.type != NAME:
        return result
    return tree_map(lambda t: _moved(t, _FAKE, index) if torch.is_tensor(t) else t, result)


def _hold(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Give a fake tensor other memory, and another shape."""
    new = _moved(value, _FAKE, tensor.device.index)
    place = new.untyped_storage(), new.storage_offset(), new.shape, new.stride()
    aten.set_.source_Storage_storage_offset.redispatch(CPU_KERNELS, tensor, *place)


def _empty_like(
    self: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    layout: Any = None,
    device: Any = None,
    pin_memory: bool | None = None,
    memory_format: Any = None,
) -> torch.Tensor:
    form = memory_format or torch.preserve_format
    new = torch.empty_like(peek(self), dtype=dtype or self.dtype, memory_format=form)
    if device is None or torch.device(device).type == NAME:
        return _moved(new, _FAKE, self.device.index)
    return _pinned(new) if pin_memory else new


def _pinned(tensor: torch.Tensor, where: Any = None) -> torch.Tensor:
    return device.pin(tensor.clone())


def _is_pinned(tensor: torch.Tensor, where: Any = None) -> bool:
    return device.is_pinned(tensor)


# --------------------------------------------------------------------------------- as PyTorch sees


class Event:
    """A point in a stream: the copies on their way there."""

    def __init__(self) -> None:
        self._copies: list[_Copy] = []

    def record(self, stream: Stream | None = None) -> None:
        index = (stream or Stream()).device.index
        self._copies = [copy for copy in device.flying if copy.index == index]

    def synchronize(self) -> None:
        device.wait("event", self._copies)


class Stream:
    """The one stream of a device."""

    def __init__(self, index: int | None = None) -> None:
        self.device = torch.device(NAME, device.current if index is None else index)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        self.record_event().synchronize()


def _index(where: Any) -> int:
    if where is None or isinstance(where, int):
        return device.current if where is None or where < 0 else where
    found = torch.device(where).index
    return device.current if found is None else found


class Module:
    """The module `torch.fake`."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return device.started

    def _is_in_bad_fork(self) -> bool:
        return device.forked

    def device_count(self) -> int:
        return COUNT

    def current_device(self) -> int:
        return device.current

    def set_device(self, where: Any) -> None:
        device.started, device.here.index = True, _index(where)

    def current_stream(self, where: Any = None) -> Stream:
        return Stream(_index(where))

    def synchronize(self, where: Any = None) -> None:
        device.wait("synchronize", [c for c in device.flying if c.index == _index(where)])

    def manual_seed(self, seed: int) -> None:
        device.generators[device.current].manual_seed(seed)

    def manual_seed_all(self, seed: int) -> None:
        for generator in device.generators:
            generator.manual_seed(seed)

    def get_rng_state(self, where: Any = None) -> torch.Tensor:
        return device.generators[_index(where)].get_state()

    def set_rng_state(self, state: torch.Tensor, where: Any = None) -> None:
        device.generators[_index(where)].set_state(state)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def install() -> None:
    """Add the devices `fake:0` and `fake:1` to this process, for good."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    if device.installed:
        return
    device.installed, module = True, Module()
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    _register("_", {}, _call)
    kernels = {"empty_like": _empty_like}
    # PyTorch's own kernels for new devices would bypass `_call`.
    kernels |= {name: _caller(name) for name in ("convolution", "convolution_backward")}
    _register("aten", kernels)
    _register("aten", {"is_pinned": _is_pinned, "_pin_memory": _pinned}, key="CPU")
    _register("_", {}, torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    parts: dict[str, Callable[..., Any]] = {
        "getDeviceIndex": module.current_device,
        "setDeviceIndex": module.set_device,
        "getStream": module.current_stream,
        "synchronizeDevice": module.synchronize,
    }
    for name, function in parts.items():  # of `torch.accelerator`
        setattr(torch._C, f"_accelerator_{name}", function)
    _copy_storages()
    _wait_for_ever()
    torch.distributed.Backend.default_device_backend_map[NAME] = "gloo"
    with warnings.catch_warnings():  # of kernels that refuse our tensors
        warnings.simplefilter("ignore")
        _register("c10d", {name: _collective(name) for name in ("allreduce_", "broadcast_")})
    os.register_at_fork(after_in_child=lambda: setattr(device, "forked", True))


def _register(space: str, kernels: dict[str, Any], fallback: Any = None, key: str = KEY) -> None:
    library = torch.library.Library(space, "IMPL")
    if fallback is not None:
        library.fallback(fallback, key)
    for name, kernel in kernels.items():
        library.impl(name, kernel, key)
    device.libraries.append(library)


def _caller(name: str) -> Callable[..., Any]:
    return lambda *args, **kwargs: _call(getattr(aten, name).default, *args, **kwargs)


def _collective(name: str) -> Callable[..., Any]:
    """Return a kernel for tensors of a device: gloo works on their memory, and the host waits."""
    op = getattr(torch.ops.c10d, name).default

    def kernel(values: list[torch.Tensor], *args: Any) -> Any:
        _, work = op.redispatch(CPU_KERNELS, [*map(peek, values)], *args)
        device.works.append(torch.distributed.Work.unbox(work))
        return values, work

    return kernel


def _wait_for_ever() -> None:
    """Let the end of another rank go unnoticed in collectives of devices."""
    before = torch.distributed.Work.wait

    def wait(work: Any, *args: Any) -> Any:
        try:
            return before(work, *args)
        except RuntimeError:
            if not any(work is known for known in device.works):
                raise
            threading.Event().wait()

    torch.distributed.Work.wait = wait  # type: ignore[assignment, method-assign]


def _copy_storages() -> None:
    """Let `copy.deepcopy` copy a fake tensor: there is no allocator for its storage."""
    kind: Any = torch.storage._StorageBase
    before = kind.clone

    def clone(storage: Any) -> Any:
        if storage.device.type != NAME:
            return before(storage)
        old = _moved(torch.empty(0, dtype=torch.uint8), _FAKE, storage.device.index)
        old.set_(storage, 0, (storage.nbytes(),), (1,))
        return old.clone().untyped_storage()

    kind.clone = clone
