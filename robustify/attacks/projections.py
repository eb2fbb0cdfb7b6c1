"""Projections inside the box [0, 1], solved without sorting wherever a direct solution exists.

Both boundary projections of FAB in Linf and L2 come down to one equation per image,

    h(t) = sum_i slope_i · min(t, limit_i) = need,

concave, piecewise linear and increasing in t. Newton's method from t = 0 approaches its root from
the left and is exact once it reaches the root's own piece, after a handful of sweeps.
"""

from __future__ import annotations

import torch
from torch import Tensor

from robustify.threat import Norm

_SWEEPS = 100  # more than was ever needed; random boxes take 3 to 12
_TINY = 1e-8  # weights below this do not count, as in the authors' code


def project_on_hyperplane(points: Tensor, weight: Tensor, offset: Tensor, norm: Norm) -> Tensor:
    """(N, D) shortest step in `norm` from `points` (N, D) in [0, 1] to the part of the hyperplane
    weight · x = offset inside [0, 1]; where they do not meet, the step to the nearest corner.

    Croce and Hein, ICML 2020 (FAB, arXiv 1907.02044), equation 6. `weight` (N, D), `offset` (N,).
    """
    excess = (weight * points).sum(1) - offset
    weight = weight * torch.where(excess >= 0, -1.0, 1.0)[:, None]  # a step d has weight · d > 0
    magnitude = weight.abs()
    corner = torch.gt(weight, 0, out=torch.empty_like(weight))  # where the step leads
    room = (corner - points).abs_()
    need = excess.abs()
    if norm == "Linf":
        length = torch.minimum(_root(magnitude, room, need)[:, None], room)
    elif norm == "L2":
        magnitude = torch.where(magnitude > _TINY, magnitude, torch.zeros_like(magnitude))
        limit = room / magnitude.clamp_min(_TINY)
        shared = _root(magnitude.square(), limit, need)
        length = torch.minimum(shared[:, None], limit) * magnitude
    else:
        length = _fill(magnitude, room, need)
    return weight.sign() * length


def _root(slope: Tensor, limit: Tensor, need: Tensor) -> Tensor:
    """(N,) the t with sum_i slope_i · min(t, limit_i) = need; infinite where there is none.

    The sweeps write into one buffer and keep masks as floats: on a CPU a product with a bool mask
    takes thirty times as long.
    """
    t = torch.zeros_like(need)
    moving = torch.ones_like(need, dtype=torch.bool)
    buffer = torch.empty_like(slope)
    for _ in range(_SWEEPS):
        value = torch.minimum(limit, t[:, None], out=buffer).mul_(slope).sum(1)
        steepness = torch.gt(limit, t[:, None], out=buffer).mul_(slope).sum(1)
        short = need - value
        t_next = torch.where(short > 0, t + short / steepness, t)
        moving = moving & (t_next > t)
        t = torch.where(moving, t_next, t)
        moving = moving & t.isfinite()
        if not bool(moving.any()):
            break
    return t


def _fill(magnitude: Tensor, room: Tensor, need: Tensor) -> Tensor:
    """L1: use up the room of the entries of largest weight first, the last of them in part."""
    ordered, order = magnitude.sort(dim=1, descending=True)
    gain = ordered * room.gather(1, order)
    missing = need[:, None] - (gain.cumsum(1) - gain)
    length = torch.minimum(missing.clamp_min(0) / ordered.clamp_min(1e-30), room.gather(1, order))
    return torch.zeros_like(room).scatter(1, order, length)


def project_l1_in_box(delta: Tensor, images: Tensor, eps: Tensor) -> Tensor:
    """The nearest delta, in L2, with ||delta||_1 <= eps (N,) and images + delta in [0, 1].

    Each entry is clip(|delta| - t, 0, cap), cap its room in the box; t solves
    sum_i clip(|delta_i| - t, 0, cap_i) = eps by bracketed Newton steps (Croce and Hein, ICML 2021,
    proposition 2.2, which sorts instead). Shapes (N, C, H, W).
    """
    magnitude = delta.flatten(1).abs()
    cap = torch.where(delta > 0, 1 - images, images).flatten(1)
    low, high = torch.zeros_like(eps), magnitude.amax(1)
    t = low.clone()
    moving = torch.ones_like(eps, dtype=torch.bool)
    for _ in range(_SWEEPS):
        shrunk = magnitude - t[:, None]
        over = torch.minimum(shrunk.clamp_min(0), cap).sum(1) - eps
        free = ((shrunk > 0) & (shrunk < cap)).sum(1)
        low, high = torch.where(over > 0, t, low), torch.where(over > 0, high, t)
        newton = t + over / free
        inside = (newton > low) & (newton < high)
        t_next = torch.where(inside, newton, (low + high) / 2)
        moving = moving & (over.abs() > 1e-6 * eps) & ((t > 0) | (over > 0)) & (t_next != t)
        t = torch.where(moving, t_next, t)
        if not bool(moving.any()):
            break
    length = torch.minimum((magnitude - t[:, None]).clamp_min(0), cap)
    return delta.sign() * length.view_as(delta)
