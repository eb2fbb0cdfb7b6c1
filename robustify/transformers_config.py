"""What a folder of the transformers library says in JSON: classes, image size, normalization.

Read as plain values, without that library; nothing that names code or other files is followed.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

from robustify.errors import ModelError

PREFIX = "transformers:"  # before its kind of network: our name for such an architecture
FACTOR = 1 / 255  # by which image processors bring pixels to [0, 1]
_FREE = {"_name_or_path", "_commit_hash"}  # say where it came from, and are not followed


def require_plain(config: Mapping[str, Any], origin: str) -> None:
    """Raise `ModelError` for a configuration that names code, or a file outside its folder."""
    if config.get("auto_map"):
        raise ModelError(
            f"expected a network that transformers itself defines, but {origin} names code of its "
            "own (auto_map), which is never run; ask its author for one without"
        )
    for key, value in config.items():
        if isinstance(value, str) and key not in _FREE:
            path = PurePath(value)
            if path.is_absolute() or ".." in path.parts:
                raise ModelError(
                    f"expected files inside the folder, but {key} in {origin} is {value!r}"
                )


def described(
    config: Mapping[str, Any], processor: Mapping[str, Any], origin: str
) -> tuple[dict[str, Any], str]:
    """Classes, input size, mean and std, by timm's names; and what had to be assumed, in words.

    Raises `ModelError` for what cannot be so described.
    """
    try:
        names = config.get("id2label") or {}
        classes = len(names) or int(config.get("num_labels", 2))  # transformers' own default
        channels = int(config.get("num_channels", 3))
        size = _side(processor) or _square(config.get("image_size")) or 224
        mean, std = normalization(processor)
        labels = tuple(
            str({str(k): v for k, v in names.items()}[str(i)]) for i in range(len(names))
        )
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            f"expected numbers for the classes, size, mean and std in {origin}, but "
            f"{' '.join(str(error).split())} is wrong"
        ) from None
    if labels == tuple(f"LABEL_{i}" for i in range(classes)):  # its way of having no names
        labels = ()
    assumed = ""
    if not mean or not std:
        mean = std = (0.5,) * channels
        assumed = f"{origin} records no normalization: taking mean 0.5 and std 0.5"
    return {
        "num_classes": classes,
        "input_size": (channels, size, size),
        "mean": mean,
        "std": std,
        "label_names": labels or None,
    }, assumed


def normalization(processor: Mapping[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel, for images in [0, 1], of what an image processor computes:

    (factor · 255 · image − offset − image_mean) / image_std. Empty where it says neither.
    """
    scale = 255 * float(processor.get("rescale_factor", FACTOR))
    if not processor.get("do_rescale", True):
        scale = 255.0
    if abs(scale - 1) < 1e-6:
        scale = 1.0
    offset = 1.0 if processor.get("rescale_offset") else 0.0
    mean, std = processor.get("image_mean") or (), processor.get("image_std") or ()
    if not processor.get("do_normalize", True):
        mean, std = [0.0] * (len(mean) or 3), [1.0] * (len(mean) or 3)
    return (
        tuple((float(value) + offset) / scale for value in mean),
        tuple(float(value) / scale for value in std),
    )


def written(
    processor: Mapping[str, Any], *, image_size: int, mean: list[float], std: list[float]
) -> dict[str, Any]:
    """An image processor that does to an image of that size what a `Classifier` does: `processor`
    with its own kind and resampling, nothing cropped."""
    kind = str(processor.get("image_processor_type") or "ViTImageProcessor")
    kept = {key: processor[key] for key in ("resample",) if key in processor}
    by_edge = kind.startswith("ConvNext")  # that processor knows no height and width
    size = {"shortest_edge": image_size} if by_edge else {"height": image_size, "width": image_size}
    return {
        "image_processor_type": kind,
        "resample": 2,  # bilinear, as transformers' own default
        **kept,
        **({"crop_pct": 1.0} if by_edge else {}),
        "do_resize": True,
        "size": size,
        "do_rescale": True,
        "rescale_factor": FACTOR,
        "do_normalize": True,
        "image_mean": mean,
        "image_std": std,
        "do_center_crop": False,
    }


def _side(processor: Mapping[str, Any]) -> int | None:
    cropped = processor.get("do_center_crop") and processor.get("crop_size")
    return _square(cropped or processor.get("size"))


def _square(size: Any) -> int | None:
    """The side in pixels of a size as processors write it: 224, [224, 224], or named."""
    if isinstance(size, Mapping):
        named = [size[key] for key in ("height", "shortest_edge", "width") if size.get(key)]
        return int(named[0]) if named else None
    if isinstance(size, list | tuple):
        return int(size[0])
    return int(size) if size else None
