"""Attacked images to look at: before, after, and the difference amplified, as embedded PNG."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

SIDE = 64  # larger images are shrunk to this: twelve of them stay within some hundred kilobytes


def gallery(
    images: Tensor,
    images_adv: Tensor,
    labels: Tensor,
    predictions: Tensor,
    predictions_adv: Tensor,
    class_names: Sequence[str],
    *,
    attacks: str | Sequence[str],
    indices: Tensor | None = None,
    count: int = 12,
) -> list[dict[str, Any]]:
    """Up to `count` entries for the key `gallery` of a report.

    (N, C, H, W) images and images_adv in [0, 1] with C of 1 or 3; labels and predictions (N,).
    Broken images come first, one class after the other, then survivors; initially wrong ones are
    left out. `attacks` names the attack of each image or of all, `indices` (N,) their positions
    in the test split. The factor that amplifies delta is the same for all: as large as fits.
    """
    shown = _choose(labels, predictions, predictions_adv, min(count, 12))
    before, after = (batch[shown].detach().float().cpu() for batch in (images, images_adv))
    delta = after - before
    largest = delta.abs().max().item() if len(shown) else 0.0
    factor = max(1, math.floor(0.5 / largest + 1e-3)) if largest > 0 else 1
    entries = []
    for row, position in enumerate(shown):
        entries.append({
            "index": position if indices is None else int(indices[position]),
            "label": class_names[int(labels[position])],
            "prediction": class_names[int(predictions[position])],
            "prediction_adv": class_names[int(predictions_adv[position])],
            "attack": attacks if isinstance(attacks, str) else attacks[position],
            "factor": factor,
            "image": data_uri(before[row]),
            "image_adv": data_uri(after[row]),
            "delta": data_uri((0.5 + factor * delta[row]).clamp(0, 1), smooth=False),
        })  # fmt: skip
    return entries


def _choose(labels: Tensor, predictions: Tensor, predictions_adv: Tensor, count: int) -> list[int]:
    right = (predictions == labels).tolist()
    broken = (predictions_adv != labels).tolist()
    seen: dict[tuple[bool, int], int] = {}
    order = []
    for position, label in enumerate(labels.tolist()):
        if right[position]:
            turn = seen[broken[position], label] = seen.get((broken[position], label), -1) + 1
            order.append((not broken[position], turn, position))
    return [position for _, _, position in sorted(order)[:count]]


def data_uri(image: Tensor, *, smooth: bool = True) -> str:
    """A (C, H, W) image in [0, 1] as a PNG data URI; shrunk to `SIDE`, by averages if `smooth`."""
    levels = (image * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
    picture = Image.fromarray(levels[:, :, 0] if levels.shape[2] == 1 else levels)
    if max(picture.size) > SIDE:
        scale = SIDE / max(picture.size)
        size = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
        how = Image.Resampling.BOX if smooth else Image.Resampling.NEAREST
        picture = picture.resize(size, how)
    written = io.BytesIO()
    picture.save(written, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(written.getvalue()).decode("ascii")
