"""FAB: the smallest perturbation by stepping along the decision boundary (Croce and Hein, ICML
2020, arXiv 1907.02044).

Linearise the network at x_k between the label and the target class (untargeted: the class nearest
in the linear model). With p(x) the projection of x on that hyperplane inside the box,

    x_{k+1} = clip( (1 - a) (x_k + 1.05 (p(x_k) - x_k)) + a (x + 1.05 (p(x) - x)) )
    a       = min( ||p(x_k) - x_k|| / (||p(x_k) - x_k|| + ||p(x) - x||), 0.1 )

and a point of another class is pulled back: x + 0.9 (x_{k+1} - x). Every point is forwarded once:
one that was not pulled back already has its logits, and its gradient comes from the same forward.

The numbers are those of the authors' code, github.com/fra31/auto-attack: Copyright (c) 2020
Francesco Croce, MIT License, reproduced in licenses.md beside this file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustify.attacks.engine import Batch, Rows
from robustify.attacks.projections import project_on_hyperplane
from robustify.attacks.targets import DUAL, class_gap, other_classes
from robustify.attacks.victim import Victim
from robustify.threat import ThreatModel, per_image

_OVERSHOOT = 1.05  # eta
_PULL = 0.1  # alpha_max
_BACK = 0.9  # beta
_ORDER = {"Linf": torch.inf, "L2": 2, "L1": 1}


@dataclass
class FABState(Rows):
    """The point of each image, and the boundary seen from it where that is `known`."""

    point: Tensor
    gap: Tensor  # z_t - z_y
    slope: Tensor  # its gradient
    known: Tensor
    inside: Tensor  # the last step did not reach another class; the next one may not either


@dataclass(frozen=True)
class FAB:
    """FAB with `iterations` per run, over `target_classes` (0: untargeted) times `restarts`; every
    restart but the first begins at a random point at half of eps."""

    name: str
    target_classes: int = 0
    iterations: int = 100
    restarts: int = 1
    adapted: bool = False
    samples: int = 1

    @property
    def runs(self) -> int:
        """Restarts, for every target class."""
        return self.restarts * max(self.target_classes, 1)

    @property
    def steps(self) -> int:
        """Iterations."""
        return self.iterations

    def settings(self, threat: ThreatModel) -> dict[str, Any]:
        """For the report."""
        return {
            "loss": "distance to the boundary",
            "steps": self.iterations,
            "step_size": "projection on the linearised boundary",
            "restarts": self.restarts,
            "random_start": self.restarts > 1,
            "targets": self.target_classes,
            "adapted": self.adapted,
        }

    def choose_targets(self, victim: Victim, batch: Batch) -> Tensor:
        """The classes of the runs, largest logit first; untargeted: all classes."""
        return other_classes(batch, self.target_classes or batch.logits.shape[1])

    def start(self, victim: Victim, batch: Batch) -> FABState:
        """The image itself; a random point in later restarts."""
        restarted = batch.run >= max(self.target_classes, 1)
        point = batch.images.clone()
        if bool(restarted.any()):
            point[restarted] = self._random_start(batch.take(restarted))
        return FABState(
            point=point,
            gap=torch.zeros_like(batch.logits[:, 0]),
            slope=torch.zeros_like(point),
            known=torch.zeros_like(restarted),
            inside=torch.zeros_like(restarted),
        )

    def step(self, victim: Victim, batch: Batch, state: FABState) -> tuple[Tensor, Tensor]:
        """Project on the boundary seen from here, step past it, pull back if it was crossed."""
        unknown = (~state.known).nonzero().squeeze(1)
        if len(unknown):
            gap, slope, _ = self._boundary(victim, batch.take(unknown), state.point[unknown])
            state.gap[unknown], state.slope[unknown] = gap, slope
        candidates = _step_past(batch, state)

        last = batch.step + 1 == self.steps
        crossed = self._crossed(victim, batch, state, candidates, look=state.inside & ~last)
        delta = candidates - batch.images
        distance = torch.linalg.vector_norm(delta.flatten(1), _ORDER[batch.threat.norm], dim=1)
        back = batch.images + _BACK * delta
        state.point = torch.where(per_image(crossed, delta), back, candidates)
        state.inside = ~crossed
        return candidates, crossed & (distance <= batch.threat.eps)

    def _crossed(
        self, victim: Victim, batch: Batch, state: FABState, candidates: Tensor, look: Tensor
    ) -> Tensor:
        """(N,) bool: whether the candidates are of another class. Where `look`, the boundary is
        computed from the same forward and kept for those that are not."""
        crossed = torch.zeros_like(look)
        plain, looked = (~look).nonzero().squeeze(1), look.nonzero().squeeze(1)
        if len(plain):
            predicted = victim.logits(candidates[plain]).argmax(1)
            crossed[plain] = predicted != batch.labels[plain]
        if len(looked):
            gap, slope, predicted = self._boundary(victim, batch.take(looked), candidates[looked])
            state.gap[looked], state.slope[looked] = gap, slope
            crossed[looked] = predicted != batch.labels[looked]
        state.known = look & ~crossed
        return crossed

    def _boundary(
        self, victim: Victim, batch: Batch, points: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """z_t - z_y (N,), its gradient, and the predicted class (N,)."""
        if self.target_classes:
            gap_to_target = class_gap(batch.labels, batch.target())
            logits, gap, slope = victim.gradient(points, gap_to_target)
            return gap, slope, logits.argmax(1)
        others = batch.targets.unbind(1)
        logits, slopes = victim.gradients(
            points, [class_gap(batch.labels, other) for other in others]
        )
        gaps = logits.gather(1, batch.targets) - logits.gather(1, batch.labels[:, None])
        order = DUAL[batch.threat.norm]
        steepness = [torch.linalg.vector_norm(slope.flatten(1), order, dim=1) for slope in slopes]
        nearest = (gaps.abs() / (torch.stack(steepness, 1) + 1e-12)).argmin(1)
        rows = torch.arange(len(points), device=points.device)
        return gaps[rows, nearest], torch.stack(slopes, 1)[rows, nearest], logits.argmax(1)

    def _random_start(self, batch: Batch) -> Tensor:
        """At distance eps / 2, then clipped to [0, 1]."""
        images, noise, norm = batch.images, batch.noise, batch.threat.norm
        delta = 2 * noise.uniform(images) - 1 if norm == "Linf" else noise.normal(images)
        length = torch.linalg.vector_norm(delta.flatten(1), _ORDER[norm], dim=1).clamp_min(1e-12)
        return (images + batch.threat.eps / 2 * delta / per_image(length, images)).clamp_(0, 1)


def _step_past(batch: Batch, state: FABState) -> Tensor:
    """x_{k+1} of the docstring above."""
    norm, images, point = batch.threat.norm, batch.images, state.point
    slope = state.slope.flatten(1)
    offset = (slope * point.flatten(1)).sum(1) - state.gap
    from_point, from_image = project_on_hyperplane(
        torch.cat([point.flatten(1), images.flatten(1)]),
        torch.cat([slope, slope]),
        torch.cat([offset, offset]),
        norm,
    ).chunk(2)
    near, far = (
        torch.linalg.vector_norm(d, _ORDER[norm], dim=1).clamp_min(1e-8)
        for d in (from_point, from_image)
    )
    pull = per_image((near / (near + far)).clamp_max(_PULL), images)
    along = point + _OVERSHOOT * from_point.view_as(point)
    towards = images + _OVERSHOOT * from_image.view_as(images)
    return (along * (1 - pull) + towards * pull).clamp_(0, 1)
