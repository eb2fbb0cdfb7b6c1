"""Image files to uint8 tensors: any size and mode in, one square size and channel count out."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from robustify.errors import DataError

_CHUNK = 128  # images per thread and turn: enough to make a turn cheap, few enough to stop quickly
SURVEYED = 1 << 16  # headers that are read before decoding; all of CIFAR's
_GREY_MODES = {"1", "L", "LA", "La", "I", "F", "I;16", "I;16B", "I;16L"}
_FORMATS = {b"\x89PNG": ("PNG",), b"RIFF": ("WEBP",)}  # by their first four bytes
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Encoded:
    """One image as it was stored: a file, or the bytes of one. `name` says where it came from."""

    name: str
    content: Path | bytes

    def open(self) -> Any:
        """The PIL image, its pixels not yet decoded. Raises `DataError` for what is no image."""
        from PIL import Image

        source = io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content
        # Pillow tries one format after the other, which for small images is half of the work.
        start = self.content[:4] if isinstance(self.content, bytes) else b""
        try:
            return Image.open(source, formats=_FORMATS.get(start))
        except Exception as error:  # Pillow lets through whatever its format plugins raise
            raise _unreadable(self, error) from error

    def size_in_bytes(self) -> int:
        if isinstance(self.content, bytes):
            return len(self.content)
        return self.content.stat().st_size


Part = tuple[Tensor | Sequence[Encoded], Tensor]


class Reordered(Sequence[Encoded]):
    """`images` in another order, or some of them: fetched where they are when they are asked for.

    `order`: (N,) int64, the place of each in `images`.
    """

    def __init__(self, images: Sequence[Encoded], order: Tensor) -> None:
        self.images, self.order = images, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: Any) -> Any:
        """The image at `position`, or, for a slice, a view of those."""
        if isinstance(position, slice):
            return Reordered(self.images, self.order[position])
        return self.images[int(self.order[position])]


@dataclass(frozen=True)
class EncodedImages:
    """Images fetched and decoded each time they are asked for: for sets larger than memory.

    Indexed like a uint8 tensor of `shape` (N, C, H, W), by a tensor of positions.
    """

    encoded: Sequence[Encoded]
    channels: int
    image_size: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((len(self.encoded), self.channels, self.image_size, self.image_size))

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, positions: Tensor) -> Tensor:
        return decode(Reordered(self.encoded, positions), self.channels, self.image_size)


@dataclass(frozen=True)
class Source:
    """A data set as read: per split its images, as a uint8 tensor (N, C, H, W) or still encoded,
    and its labels, (N,) int64. `identity` tells it from other sets where its pixels are not read:
    names and sizes of its files; without it, those of every single image."""

    name: str
    class_names: tuple[str, ...]
    train: Part
    test: Part
    identity: tuple[str, ...] = ()


@dataclass(frozen=True)
class ResizedImages:
    """A uint8 tensor (N, C, H, W) seen at another size, resized each time it is indexed."""

    images: Tensor
    image_size: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.images.shape[:2], self.image_size, self.image_size))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, positions: Tensor) -> Tensor:
        return resize(self.images[positions], self.image_size)


@dataclass(frozen=True)
class KeyedImages:
    """A uint8 tensor (N, C, H, W) whose images are asked for by numbers of their own, `keys` (N,)
    int64: some images of a larger set, by their indices in it."""

    images: Tensor
    keys: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.images.shape

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, keys: Tensor) -> Tensor:
        order = self.keys.argsort()
        return self.images[order[torch.searchsorted(self.keys[order], keys)]]


def resize(images: Tensor, image_size: int) -> Tensor:
    """uint8 (N, C, H, W) to (N, C, image_size, image_size), bicubic with antialiasing."""
    size = (image_size, image_size)
    # Through float32, because the uint8 kernel of the CPU and that of a GPU round differently.
    resized = interpolate(images.float(), size, mode="bicubic", antialias=True)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def survey(parts: Sequence[Sequence[Encoded]]) -> tuple[bool, int]:
    """Whether all images are grey, and the side of the square to bring them to: their common
    shorter side where they agree, else the median rounded to a multiple of 8; at most 224.

    Of a part of more than `SURVEYED` images that many speak for all, evenly spaced, so that every
    class and every folder has its share: one header each of a million files takes minutes, and a
    median does not need them.
    """
    headers: list[tuple[int, bool]] = []
    for part in parts:
        if len(part) > SURVEYED:
            places = torch.linspace(0, len(part) - 1, SURVEYED, dtype=torch.float64).long()
            part = Reordered(part, places)
        headers += _in_threads(_header, part, "reading image headers")
    sides = sorted(side for side, _ in headers)
    side = sides[len(sides) // 2]
    if sides[0] != sides[-1]:
        side = max(8, round(side / 8) * 8)
    return all(is_grey for _, is_grey in headers), min(side, 224)


def decode(encoded: Sequence[Encoded], channels: int, image_size: int) -> Tensor:
    """Decode to uint8 (N, C, image_size, image_size): the shorter side is resized (bicubic,
    antialiased), the middle square cut out; 1 channel is luminance, 3 are RGB without alpha.

    Orientation tags are ignored, as torchvision and timm do. Raises `DataError` for a corrupt
    image.
    """
    pixels = np.empty((len(encoded), image_size, image_size, channels), np.uint8)

    def decode_into(position: int) -> None:
        pixels[position] = _decode_one(encoded[position], channels, image_size)

    _in_threads(decode_into, range(len(encoded)), "decoding images")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()


def _decode_one(encoded: Encoded, channels: int, image_size: int) -> np.ndarray[Any, Any]:
    """(image_size, image_size, channels) uint8."""
    from PIL import Image

    with encoded.open() as image:
        try:
            image.load()
            image = _to_mode(image, "L" if channels == 1 else "RGB")
        except Exception as error:  # Pillow lets through whatever its format plugins raise
            raise _unreadable(encoded, error) from error
    if image.size != (image_size, image_size):
        scale = image_size / min(image.size)
        width, height = (max(image_size, round(side * scale)) for side in image.size)
        left, top = (width - image_size) // 2, (height - image_size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + image_size, top + image_size))
    return np.asarray(image).reshape(image_size, image_size, channels)


def _to_mode(image: Any, mode: str) -> Any:
    """`image` in 8-bit `mode`; 16-bit grey is scaled, where Pillow alone would clip it."""
    from PIL import Image

    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float32)
        scale = 257 if values.max(initial=0) > 255 else 1
        image = Image.fromarray((values / scale).round().clip(0, 255).astype(np.uint8))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


def _header(encoded: Encoded) -> tuple[int, bool]:
    """The shorter side in pixels, and whether the image is grey by its mode (not by its pixels)."""
    with encoded.open() as image:
        is_grey = image.mode in _GREY_MODES
        if image.mode == "P":
            palette = np.asarray(image.getpalette("RGB")).reshape(-1, 3)
            is_grey = bool((palette == palette[:, :1]).all())
        return min(image.size), is_grey


def _in_threads(work: Callable[[Any], _Result], items: Sequence[Any], doing: str) -> list[_Result]:
    """`work` on each item, in order; Pillow decodes outside Python's lock."""

    threads = min(16, os.cpu_count() or 1)
    size = min(_CHUNK, max(8, -(-len(items) // threads)))  # a training batch is shared out as well

    def work_chunk(start: int) -> list[_Result]:
        return [work(item) for item in items[start : start + size]]

    starts = range(0, len(items), size)
    if len(starts) < 2 or threads < 2:
        return [work(item) for item in items]
    results: list[_Result] = []
    with ThreadPoolExecutor(threads) as pool:
        # Shown to people only, and only where they would otherwise wait in silence.
        bar = tqdm(total=len(items), desc=doing, unit="image", delay=2, leave=False, disable=None)
        with bar:
            for chunk in pool.map(work_chunk, starts):
                results += chunk
                bar.update(len(chunk))
    return results


def _unreadable(encoded: Encoded, error: Exception) -> DataError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return DataError(
        f"expected an image in {encoded.name}, and it cannot be decoded ({reason}); "
        "replace or remove it; nothing was changed"
    )
