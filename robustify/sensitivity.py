"""Sensitivity of a classifier to its images: three measures that disagree on saturated logits.

    S1  |d p_i / d x_j|,  p = softmax(z / U)              Papernot et al., 2016, arXiv 1511.04508
        = |1/U · p_i · sum_l p_l (d z_i / d x_j - d z_l / d x_j)|
    S2  mean_j |d (sum_k z_k) / d x_j|                    the teacher-assistant paper's program
    S3  m / ‖grad m‖,  m = z_y - max_{j != y} z_j         ours: pixels to the boundary, if linear

Multiplying logits by T makes S1 at U = 1 smaller for almost every image, S2 T times larger, and
leaves S3 as it was: only S3 compares networks. The mean of S1 is carried by the few images near the
boundary, so its median and histogram stand beside it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from robustify.losses import margin

Model = Callable[[Tensor], Tensor]


def softmax_jacobian(model: Model, images: Tensor, *, temperature: float = 1.0) -> Tensor:
    """(N, K, D) d p_i / d x_j for the D pixels of each image, p = softmax(logits / temperature).

    Differences of logit gradients are formed before they are weighted, so a saturated softmax gives
    its tiny true value and not rounding.
    """
    logits, gradients = _logit_jacobian(model, images)
    p = (logits / temperature).softmax(1)
    rows = [
        p[:, i, None] * torch.einsum("nl,nld->nd", p, gradients[:, i, None] - gradients)
        for i in range(p.shape[1])
    ]
    return torch.stack(rows, 1) / temperature


def logit_sum_gradient(model: Model, images: Tensor) -> Tensor:
    """S2: (N,) mean over pixels of |d (sum of logits) / d x|."""
    return _gradient(model, images, lambda logits: logits.sum(1)).abs().mean(1)


def boundary_distance(model: Model, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """S3: (N,) Linf and (N,) L2 distance to the decision boundary of the linearized model.

    Exact for a linear model of two classes. Negative where the image is misclassified; infinite or
    not a number where the margin has no gradient.
    """
    with torch.no_grad():
        right_by = -margin(model(images), labels)
    gradient = _gradient(model, images, lambda logits: -margin(logits, labels))
    return right_by / gradient.abs().sum(1), right_by / gradient.square().sum(1).sqrt()


def sensitivity(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    temperature: float = 1.0,
    batch_size: int = 64,
) -> dict[str, Any]:
    """All three measures of `model` on (N, C, H, W) images in [0, 1], as plain values for a report.

    S1 at temperature 1 and at `temperature`, S2 and S2 / temperature, S3 as the median over the
    images classified right. Computed in float64 on a copy: saturated probabilities are below what
    float32 holds.
    """
    exact = copy.deepcopy(model).double().eval().requires_grad_(False)
    temperatures = sorted({1.0, temperature})
    s1: dict[float, list[Tensor]] = {t: [] for t in temperatures}
    s2: list[Tensor] = []
    linf: list[Tensor] = []
    l2: list[Tensor] = []
    for start in range(0, len(images), batch_size):
        batch = images[start : start + batch_size].double()
        label = labels[start : start + batch_size]
        for t in temperatures:
            jacobian = softmax_jacobian(exact, batch, temperature=t)
            s1[t].append(jacobian.abs().mean((1, 2)))
        s2.append(logit_sum_gradient(exact, batch))
        for found, values in zip((linf, l2), boundary_distance(exact, batch, label), strict=True):
            found.append(values)
    distances = {"Linf": torch.cat(linf), "L2": torch.cat(l2)}
    right = distances["L2"] > 0
    mean_s2 = torch.cat(s2).mean().item()
    return {
        "n": len(images),
        "temperature": temperature,
        "s1": {f"{t:g}": _distribution(torch.cat(values)) for t, values in s1.items()},
        "s2": mean_s2,
        "s2_over_temperature": mean_s2 / temperature,
        "s3": {norm: values[right].median().item() for norm, values in distances.items()}
        if right.any()
        else None,
        "n_right": int(right.sum()),
    }


def _distribution(values: Tensor) -> dict[str, Any]:
    """Mean, median, and how many values lie in each power of ten: `{"-3": 12}` for 12 values from
    0.001 up to 0.01. Exact zeros are counted as such."""
    exponents = values[values > 0].log10().floor().long().tolist()
    histogram = {str(e): exponents.count(e) for e in sorted(set(exponents))}
    return {
        "mean": values.mean().item(),
        "median": values.median().item(),
        "zeros": int((values == 0).sum()),
        "log10_histogram": histogram,
    }


def _logit_jacobian(model: Model, images: Tensor) -> tuple[Tensor, Tensor]:
    """(N, K) logits and (N, K, D) their gradients."""
    pixels = images.detach().requires_grad_()
    with torch.enable_grad():
        logits = model(pixels)
        gradients = [
            torch.autograd.grad(logits[:, k].sum(), pixels, retain_graph=True)[0].flatten(1)
            for k in range(logits.shape[1])
        ]
    return logits.detach(), torch.stack(gradients, 1)


def _gradient(model: Model, images: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """(N, D) gradient of one number per image."""
    pixels = images.detach().requires_grad_()
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(of(model(pixels)).sum(), pixels)
    return gradient.flatten(1)
