"""The base of all trackers, and checks of metrics and media."""

from __future__ import annotations

import io
import warnings
import wave
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ..metrics import Metrics
from ..run import XP, get_xp


class Tracker:
    """Base of all trackers; results of methods not overridden go nowhere.

    Trackers exist on rank zero only, and see checked values: metrics are plain numbers, audio is a
    float tensor `[C, T]` in -1..1, an image is a float tensor `[C, H, W]` in 0..1 with 1, 3 or 4
    channels; both are on the CPU. `stage` is where a value comes from, `step` its epoch.
    """

    with_media_logging = True  # of a subclass with an `__init__` of its own

    def __init__(self, xp: XP, with_media_logging: bool = True) -> None:
        self.xp = xp
        self.with_media_logging = with_media_logging

    @classmethod
    def from_xp(cls, *args: Any, **kwargs: Any) -> Self:
        """Make a tracker for the running experiment."""
        return cls(get_xp(), *args, **kwargs)

    def log_hyperparams(self, params: Metrics, metrics: Mapping[str, float]) -> None:
        """Log the config, a nested dict of plain values, and metrics to compare runs by."""

    def log_metrics(self, stage: str, metrics: Metrics, step: int) -> None:
        """Log the metrics of a stage in an epoch."""

    def log_step(self, stage: str, metrics: Metrics, step: int, epoch: int) -> None:
        """Log a point of the stage's curves by step."""

    def resume(self, epoch: int, done: Collection[str], steps: Mapping[str, int] | None) -> None:
        """Forget the results after the point from which the run resumes.

        Args:
            epoch: of the resume.
            done: finished stages of this epoch.
            steps: taken by each stage until then; None if unknown.
        """

    def log_audio(self, stage: str, key: str, audio: Tensor, sample_rate: int, step: int) -> None:
        """Log a sound."""

    def log_image(self, stage: str, key: str, image: Tensor, step: int) -> None:
        """Log a picture."""

    def log_text(self, stage: str, key: str, text: str, step: int) -> None:
        """Log a text."""

    def finish(self) -> None:
        """Note that the run is complete."""


def check_names(*names: Any) -> Iterator[str]:
    """Yield the stage and key of media; ValueError for a path, as files are named after both."""
    for name in map(str, names):
        if name in ("", ".", "..") or {"/", "\\", "\0"} & set(name):
            raise ValueError(f"media: {name!r} is a path: a key or stage has no / or \\")
        yield name


def check_audio(audio: Any) -> Tensor:
    """Return audio, `[C, T]` or `[T]`, as a float tensor `[C, T]` on the CPU; else ValueError."""
    tensor = _tensor(audio, needs := "log_audio: needs a float tensor [C, T]")
    tensor = tensor[None] if tensor.ndim == 1 else tensor
    if tensor.ndim != 2 or not tensor.is_floating_point():
        raise ValueError(f"{needs}, not {_shape(tensor)}")
    return tensor.float()


def check_image(image: Any) -> Tensor:
    """Return an image as a float tensor `[C, H, W]` in 0..1 on the CPU; ValueError otherwise.

    Also takes `[H, W, C]`, `[H, W]`, images of Pillow and figures of matplotlib. Bytes (0..255) are
    scaled.
    """
    needs, channels = "log_image: needs [C, H, W], [H, W, C] or [H, W], C of 1, 3, 4", (1, 3, 4)
    if hasattr(image, "savefig"):
        image.savefig(file := io.BytesIO(), format="png")
        from PIL import Image

        image = Image.open(file)
    if is_pillow := hasattr(image, "convert") and image.mode[0] not in "IF":
        image = np.array(image.convert("RGBA" if "A" in image.mode.upper() else "RGB"))
    tensor = _tensor(image, needs)
    tensor = tensor[None] if (is_gray := tensor.ndim == 2) else tensor
    first, last = (tensor.ndim == 3 and tensor.shape[i] in channels for i in (0, 2))
    last = last and not is_gray
    if not first and not last:
        raise ValueError(f"{needs}, not {_shape(tensor)}; make_grid tiles a batch")
    if first and last and not is_pillow:
        raise ValueError(f"{needs}, and {_shape(tensor)} could be both: permute it, or pad it")
    if last:
        tensor = tensor.permute(2, 0, 1)
    if tensor.dtype == torch.uint8:
        return tensor / 255
    if tensor.is_floating_point() or tensor.dtype == torch.bool:
        if ((tensor < 0) | (tensor > 1)).sum() > tensor.numel() / 2:
            warnings.warn("log_image: most values are outside 0..1, and are cut", stacklevel=4)
        return tensor.float()
    raise ValueError(f"{needs}, of floats in 0..1 or uint8 in 0..255, not {_shape(tensor)}")


def to_bytes(image: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Convert a checked image to an array for Pillow, `[H, W, C]` or `[H, W]`; NaN is black."""
    pixels = image.nan_to_num(0.0, 1.0, 0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    return (pixels[0] if len(pixels) == 1 else pixels.permute(1, 2, 0)).numpy()


def write_wav(path: str, audio: Tensor, sample_rate: int) -> None:
    """Write checked audio `[C, T]` as 16 bit WAV."""
    samples = audio.nan_to_num().clamp(-1, 1).mul(32767).round().to(torch.int16)
    with wave.open(path, "wb") as wav:
        wav.setparams((len(audio), 2, sample_rate, 0, "NONE", "not compressed"))
        wav.writeframes(samples.T.contiguous().numpy().astype("<i2").tobytes())


def _tensor(value: Any, needs: str) -> Tensor:
    try:
        # A copy, since PyTorch refuses the negative strides of a flipped array.
        value = value.copy() if isinstance(value, np.ndarray) else value
        return torch.as_tensor(value).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{needs}, not a {type(value).__name__}: {error}") from error


def _shape(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} of {tensor.dtype}"
