"""ThreatModel: what the adversary may do, and the geometry that follows from it.

Images are (N, C, H, W) in [0, 1] and eps is in those units: `8/255`, not `8`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from robustify.errors import UsageError, suggest
from robustify.noise import Noise

Norm = Literal["Linf", "L2", "L1"]


def per_image(values: Tensor, images: Tensor) -> Tensor:
    """Reshape (N,) so that it broadcasts over (N, C, H, W)."""
    return values.view(-1, *[1] * (images.dim() - 1))


@dataclass(frozen=True)
class ThreatModel:
    """All images within `eps` of the original in `norm`, and inside [0, 1].

    Raises `UsageError` for an unknown norm and for an eps that is negative or not finite.
    """

    norm: Norm = "Linf"
    eps: float = 8 / 255

    def __post_init__(self) -> None:
        if self.norm not in get_args(Norm):
            raise UsageError(
                f"expected a norm of {', '.join(get_args(Norm))}, got {self.norm!r}"
                + suggest(self.norm, get_args(Norm))
            )
        if not (math.isfinite(self.eps) and self.eps >= 0):
            raise UsageError(
                f"expected eps >= 0 in [0, 1] pixel units, got {self.eps}; write 8/255 or 0.03"
            )

    def __str__(self) -> str:
        return f"{self.norm} {format_eps(self.eps)}"

    def random_start(self, images: Tensor, noise: Noise) -> Tensor:
        """A point of the threat model around each image: uniform in the Linf box; a uniform
        direction at a uniform radius for L2 and L1."""
        if self.norm == "Linf":
            delta = (2 * noise.uniform(images) - 1) * self.eps
        else:
            direction = noise.normal(images)
            radius = noise.fork(1).uniform(images[:, :1, :1, :1]) * self.eps
            delta = direction * radius / self._length(direction).clamp_min(1e-12)
        return self.project(images + delta, images)

    def ascend(self, images_adv: Tensor, gradient: Tensor, step_size: float) -> Tensor:
        """One step of steepest ascent: sign for Linf, unit L2 direction for L2, for L1 the unit
        vector of the largest entry. Not projected."""
        if self.norm == "Linf":
            return images_adv + step_size * gradient.sign()
        if self.norm == "L2":
            length = self._length(gradient).clamp_min(1e-12)
            return images_adv + step_size * gradient / length
        flat = gradient.flatten(1)
        largest = flat.abs().argmax(1, keepdim=True)
        step = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign())
        return images_adv + step_size * step.view_as(gradient)

    def project(self, images_adv: Tensor, images: Tensor) -> Tensor:
        """The nearest point of the ball, then clipped to [0, 1]. Clipping never leaves the ball,
        because `images` are in [0, 1] themselves."""
        if self.norm == "Linf":
            low, high = images - self.eps, images + self.eps
            return images_adv.clamp(low, high).clamp_(0, 1)
        delta = images_adv - images
        if self.norm == "L2":
            delta = delta * (self.eps / self._length(delta).clamp_min(1e-12)).clamp_max(1)
        else:
            delta = _project_l1(delta, self.eps)
        return (images + delta).clamp_(0, 1)

    def distance(self, images_adv: Tensor, images: Tensor) -> Tensor:
        """(N,) distances in this norm."""
        return self._length(images_adv - images).flatten()

    def _length(self, delta: Tensor) -> Tensor:
        """(N, 1, 1, 1) lengths in this norm."""
        order = {"Linf": math.inf, "L2": 2, "L1": 1}[self.norm]
        return per_image(torch.linalg.vector_norm(delta.flatten(1), order, dim=1), delta)


def _project_l1(delta: Tensor, eps: float) -> Tensor:
    """Euclidean projection on the L1 ball (Duchi et al., ICML 2008, figure 1)."""
    flat = delta.flatten(1)
    magnitude = flat.abs()
    ordered = magnitude.sort(dim=1, descending=True).values
    excess = ordered.cumsum(1) - eps
    ranks = torch.arange(1, flat.shape[1] + 1, device=flat.device, dtype=flat.dtype)
    last = (ordered * ranks > excess).sum(1, keepdim=True).clamp_min(1)
    threshold = excess.gather(1, last - 1) / last
    shrunk = flat.sign() * (magnitude - threshold.clamp_min(0)).clamp_min(0)
    return torch.where(magnitude.sum(1, keepdim=True) <= eps, flat, shrunk).view_as(delta)


def chosen(norm: Norm | None, eps: float | None, default: ThreatModel) -> ThreatModel:
    """`default` with what was asked for in its place.

    Raises `UsageError` for another norm without its own eps: a radius means nothing in it.
    """
    if eps is None and norm not in (None, default.norm):
        raise UsageError(
            f"expected --eps with --norm {norm}, because the usual eps, {format_eps(default.eps)}, "
            f"is one of {default.norm}"
        )
    return ThreatModel(norm or default.norm, default.eps if eps is None else eps)


def parse_eps(text: str | float) -> float:
    """`"8/255"`, `"0.03"`, `"1e-2"` or a number, as a float. Raises `UsageError` otherwise."""
    try:
        numerator, _, denominator = str(text).partition("/")
        return float(numerator) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise UsageError(f"expected a number such as 8/255 or 0.03, got {text!r}") from None


def format_eps(eps: float) -> str:
    """`8/255` where eps is a whole number of 255ths, the shortest decimal otherwise."""
    levels = eps * 255
    if eps > 0 and abs(levels - round(levels)) < 1e-6:
        return f"{round(levels)}/255"
    return f"{eps:g}"
