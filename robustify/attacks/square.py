"""Square Attack: random search with squares, scores only (Andriushchenko, Croce, Flammarion and
Hein, ECCV 2020, arXiv 1912.00049; the L1 form from Croce and Hein, ICML 2021).

Each query changes one square window and keeps the change if the margin max_{j != y} z_j - z_y grew.
The side of the window is sqrt(p H W), and p is halved after queries 10, 50, 200, 500, 1000, 2000
and 4000. Unlike the authors' code every image draws its own windows, so its result does not depend
on its batch, and a proposal that changes nothing is not sent to the model.

The numbers are those of the authors' code, github.com/fra31/auto-attack: Copyright (c) 2020
Francesco Croce, MIT License, reproduced in licenses.md beside this file.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from robustify.attacks.engine import Batch, Rows
from robustify.attacks.projections import project_l1_in_box
from robustify.attacks.victim import Victim
from robustify.losses import margin
from robustify.threat import ThreatModel, per_image

_HALVINGS = (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000)


@dataclass
class SquareState(Rows):
    """The best image of each, its margin, and for Linf the ends of the box around the image."""

    best: Tensor
    margin: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Square:
    """Square Attack with `queries` per restart."""

    name: str = "square"
    queries: int = 5000
    restarts: int = 1
    p_init: float = 0.8
    samples: int = 1

    @property
    def runs(self) -> int:
        """Restarts."""
        return self.restarts

    @property
    def steps(self) -> int:
        """Queries, the starting image among them."""
        return self.queries + 1

    def settings(self, threat: ThreatModel) -> dict[str, Any]:
        """For the report."""
        return {
            "loss": "margin",
            "queries": self.queries,
            "p_init": self.p_init,
            "restarts": self.restarts,
            "random_start": True,
            "adapted": False,
        }

    def choose_targets(self, victim: Victim, batch: Batch) -> Tensor:
        """Untargeted."""
        return batch.labels[:, None]

    def start(self, victim: Victim, batch: Batch) -> SquareState:
        """Vertical stripes for Linf, a grid of bumps for L2 and L1; not evaluated yet."""
        if batch.threat.norm == "Linf":
            low = batch.threat.project(batch.images - 1, batch.images)
            high = batch.threat.project(batch.images + 1, batch.images)
            stripe = batch.noise.uniform(batch.images[:, :, :1]) < 0.5
            best = torch.where(stripe, low, high)
        else:
            low = high = batch.images[:, :0]
            best = _grid(batch)
        worst = torch.full_like(batch.logits[:, 0], -torch.inf)
        return SquareState(best=best, margin=worst, low=low, high=high)

    def step(self, victim: Victim, batch: Batch, state: SquareState) -> tuple[Tensor, Tensor]:
        """Propose, ask the model where the proposal is new, keep what is better."""
        candidates, asked = self._propose(batch, state)
        found = torch.full_like(state.margin, -torch.inf)
        rows = asked.nonzero().squeeze(1)
        if len(rows) == len(batch):
            found = margin(victim.logits(candidates), batch.labels)
        elif len(rows):
            found[rows] = margin(victim.logits(candidates[rows]), batch.labels[rows])
        better = (found > state.margin).nonzero().squeeze(1)
        state.margin[better] = found[better]
        state.best[better] = candidates[better]
        return candidates, found > 0

    def _propose(self, batch: Batch, state: SquareState) -> tuple[Tensor, Tensor]:
        """The next candidates, and the mask (N,) of those that differ from the best; in step 0 the
        starting images."""
        height, width = batch.images.shape[2:]
        sides = _sides(self.queries, self.p_init, height, width, batch.threat.norm)
        side_now = torch.tensor(sides, device=batch.step.device)[batch.step]
        change = _square if batch.threat.norm == "Linf" else _move_mass
        candidates = state.best.clone()
        asked = batch.step == 0
        for side in sorted(set(side_now.tolist()) - {0}):
            rows = (side_now == side).nonzero().squeeze(1)
            if len(rows) == len(batch):
                return change(batch, state, side)
            candidates[rows], asked[rows] = change(batch.take(rows), state.take(rows), side)
        return candidates, asked


@cache
def _sides(queries: int, p_init: float, height: int, width: int, norm: str) -> list[int]:
    """The side of the window at each step; odd and at least 3 for L2 and L1."""
    sides = [0]
    for query in range(queries):
        share = p_init / 2 ** sum(query > end for end in _HALVINGS)
        side = max(round(math.sqrt(share * height * width)), 1 if norm == "Linf" else 3)
        if norm != "Linf" and side % 2 == 0:
            side += 1
        sides.append(min(side, height, width))
    return sides


def _square(batch: Batch, state: SquareState, side: int) -> tuple[Tensor, Tensor]:
    """Linf: one square, all of it at the upper or lower end of the box, by channel."""
    channels, height, width = batch.images.shape[1:]
    draws = batch.step_noise.uniform(batch.images.new_empty(len(batch), 2 + channels))
    top = (draws[:, 0] * (height - side)).long()
    left = (draws[:, 1] * (width - side)).long()
    window = _window(top, left, side, width)[:, None].expand(-1, channels, -1)
    best, low, high = (ends.flatten(2) for ends in (state.best, state.low, state.high))
    ends = torch.where(draws[:, 2:, None] < 0.5, low.gather(2, window), high.gather(2, window))
    new = (ends != best.gather(2, window)).flatten(1).any(1)
    return best.scatter(2, window, ends).view_as(batch.images), new


def _grid(batch: Batch) -> Tensor:
    """L2, L1: bumps of random sign and direction on a grid of five by five, filling the ball."""
    images = batch.images
    channels, height, width = images.shape[1:]
    side = max(min(height, width) // 5, 1)
    down, across = height // side, width // side
    draws = batch.noise.uniform(images.new_empty(len(batch), down, across, channels + 1))
    bump = _bump(side, batch.threat.norm).to(images)
    turned = draws[..., -1] < 0.5
    tiles = torch.where(turned[..., None, None], bump.T, bump)[:, :, :, None]
    signs = torch.where(draws[..., :-1] < 0.5, -1.0, 1.0)[..., None, None]
    tiled = (tiles * signs).permute(0, 3, 1, 4, 2, 5)
    delta = torch.zeros_like(images)
    top, left = (height - down * side) // 2, (width - across * side) // 2
    delta[:, :, top : top + down * side, left : left + across * side] = tiled.reshape(
        len(images), channels, down * side, across * side
    )
    return _fill_ball(batch, delta)


def _move_mass(batch: Batch, state: SquareState, side: int) -> tuple[Tensor, Tensor]:
    """L2, L1 (algorithm 3 of the paper): empty one window and give its length, with what is left of
    eps, to another, in which a random bump is added."""
    images, norm, eps = batch.images, batch.threat.norm, batch.threat.eps
    channels, height, width = images.shape[1:]
    draws = batch.step_noise.uniform(images.new_empty(len(batch), 5 + channels))
    free = draws.new_tensor([height - side, width - side, height - side, width - side])
    top, left, top_2, left_2 = (draws[:, :4] * free).long().unbind(1)
    window, emptied = _window(top, left, side, width), _window(top_2, left_2, side, width)
    delta = (state.best - images).flatten(2)
    power = 2 if norm == "L2" else 1

    def length(values: Tensor) -> Tensor:
        found: Tensor = torch.linalg.vector_norm(values, power, dim=2, keepdim=True)
        return found

    old = delta.gather(2, window[:, None].expand(-1, channels, -1))
    in_either = torch.zeros_like(delta[:, 0]).scatter(1, window, 1).scatter(1, emptied, 1)
    available = length(delta * in_either[:, None]) ** power
    used = torch.linalg.vector_norm(delta.flatten(1), power, dim=1)[:, None, None] ** power
    unused = (eps**power - used).clamp_min(0)

    bump = _bump(side, norm).to(images)
    bumps = torch.where(draws[:, 4, None, None] < 0.5, bump.T, bump).flatten(1)[:, None]
    new = bumps * torch.where(draws[:, 5:] < 0.5, -1.0, 1.0)[..., None]
    new = new + old / (length(old) + 1e-12)
    share = unused / channels + available if norm == "L2" else unused + available * channels
    new = new / (length(new) + 1e-12) * share ** (1 / power)
    delta = delta.scatter(2, emptied[:, None].expand(-1, channels, -1), 0.0)
    delta = delta.scatter(2, window[:, None].expand(-1, channels, -1), new)
    return _fill_ball(batch, delta.view_as(images)), torch.ones_like(batch.step, dtype=torch.bool)


def _window(top: Tensor, left: Tensor, side: int, width: int) -> Tensor:
    """(N, side²) flat positions of a window."""
    offset = torch.arange(side, device=top.device)
    rows, columns = top[:, None] + offset, left[:, None] + offset
    return (rows[:, :, None] * width + columns[:, None]).flatten(1)


def _fill_ball(batch: Batch, delta: Tensor) -> Tensor:
    """The image with `delta` scaled to length eps (L2) or projected on the ball (L1), in [0, 1]."""
    images, eps = batch.images, batch.threat.eps
    if batch.threat.norm == "L2":
        length = torch.linalg.vector_norm(delta.flatten(1), dim=1).clamp_min(1e-12)
        delta = delta / per_image(length, delta) * eps
    else:
        radius = images.new_full((len(images),), eps * (1 - 1e-6))
        delta = project_l1_in_box(delta, images, radius)
    return (images + delta).clamp_(0, 1)


@cache
def _bump(side: int, norm: str) -> Tensor:
    """(side, side) two opposite pyramids, together of unit length (paper, section 4.2)."""
    upper, lower = _pyramid(side // 2, side, norm), _pyramid(side - side // 2, side, norm)
    bump = torch.cat([upper, -lower])
    bump /= torch.linalg.vector_norm(bump, 2 if norm == "L2" else 1)
    return bump


def _pyramid(height: int, width: int, norm: str) -> Tensor:
    """(height, width) sums of concentric rectangles, 1 / rank² (L2) or 1 / rank⁴ (L1) high."""
    pyramid = torch.zeros(height, width)
    top, left = height // 2, width // 2
    for rank in range(max(height, width) // 2 + 1):
        reach = 2 * rank + 1
        rows = slice(max(top - rank, 0), min(max(top - rank + reach, 0), height))
        columns = slice(max(left - rank, 0), min(max(left - rank + reach, 0), width))
        pyramid[rows, columns] += 1 / (rank + 1) ** (2 if norm == "L2" else 4)
    if height > 0:
        pyramid /= torch.linalg.vector_norm(pyramid, 2 if norm == "L2" else 1)
    return pyramid
