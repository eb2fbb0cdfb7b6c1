"""APGD: projected gradient ascent that sets its own step size (Croce and Hein, ICML 2020,
arXiv 2003.01690), and its L1 form with adaptive sparsity (Croce and Hein, ICML 2021, 2103.01208).

    z = P( x_k + eta · direction(grad f(x_k)) )
    x_{k+1} = P( x_k + 0.75 (z - x_k) + 0.25 (x_k - x_{k-1}) )

eta starts at 2 eps. At checkpoints after 22 %, then 19 %, 16 %, … (never less than 6 %) of the
steps it is halved, and the search resumes from the best point, where fewer than 75 % of the steps
raised f, or where neither eta nor the best f changed since the last checkpoint.

The numbers are those of the authors' code, github.com/fra31/auto-attack, from which the L1 step
is derived: Copyright (c) 2020 Francesco Croce, MIT License, reproduced in licenses.md here.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from robustify import losses
from robustify.attacks.engine import Batch, Rows
from robustify.attacks.projections import project_l1_in_box
from robustify.attacks.targets import Order, nearest_classes, other_classes
from robustify.attacks.victim import Victim
from robustify.errors import UsageError, suggest
from robustify.threat import Norm, ThreatModel, per_image

_RHO = 0.75  # share of rising steps below which the step size is halved
_MOMENTUM = 0.75

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # logits, labels, targets -> (N,)
UNTARGETED: dict[str, Loss] = {
    "ce": lambda logits, labels, _: losses.cross_entropy(logits, labels),
    "ce_scaled": lambda logits, labels, _: losses.cross_entropy(
        logits / losses.logit_scale(logits), labels
    ),
    "margin": lambda logits, labels, _: losses.margin(logits, labels),
    "dlr": lambda logits, labels, _: losses.dlr(logits, labels),
}
TARGETED: dict[str, Loss] = {
    "margin_targeted": losses.margin_targeted,
    "dlr_targeted": losses.dlr_targeted,
}


@dataclass
class APGDState(Rows):
    """Where each image stands in its run; `best` is the point of the largest loss so far."""

    images_adv: Tensor
    previous: Tensor
    gradient: Tensor
    best: Tensor
    best_gradient: Tensor
    loss: Tensor
    best_loss: Tensor
    best_loss_at_check: Tensor
    step_size: Tensor
    rises: Tensor  # steps that raised the loss since the last checkpoint
    reduced: Tensor  # whether the last checkpoint halved the step size
    density: Tensor  # L1: share of the entries a step may change
    nonzero: Tensor  # L1: entries changed at the last checkpoint


@dataclass(frozen=True)
class APGD:
    """APGD on one of the losses above, `iterations` per run.

    A targeted loss goes through `target_classes` classes in the given `order`; an untargeted one
    through `restarts`. `shrinking` runs 30, 30 and 40 % of the iterations at 3, 2 and 1 eps (the
    authors' setting for L1). `samples` averages the gradient of a randomised model. `adapted`
    marks a setting the authors do not define, for fewer classes than they need.
    """

    name: str
    loss: str
    iterations: int = 100
    restarts: int = 1
    target_classes: int = 1
    order: Order = "logits"
    shrinking: bool = False
    samples: int = 1
    adapted: bool = False

    def __post_init__(self) -> None:
        known = [*UNTARGETED, *TARGETED]
        if self.loss not in known:
            raise UsageError(
                f"expected a loss of {', '.join(known)}, got {self.loss!r}"
                + suggest(self.loss, known)
            )

    @property
    def targeted(self) -> bool:
        """Whether the loss has a target class."""
        return self.loss in TARGETED

    @property
    def runs(self) -> int:
        """Restarts, for every target class."""
        return self.restarts * (self.target_classes if self.targeted else 1)

    @property
    def steps(self) -> int:
        """Points evaluated in a run: the start of every phase and each iteration."""
        return sum(1 + iterations for _, iterations in self._phases())

    def settings(self, threat: ThreatModel) -> dict[str, Any]:
        """For the report."""
        settings: dict[str, Any] = {
            "loss": self.loss,
            "steps": self.iterations,
            "step_size": "adaptive, from eps" if threat.norm == "L1" else "adaptive, from 2 eps",
            "restarts": self.restarts,
            "random_start": True,
        }
        if self.targeted:
            settings |= {"targets": self.target_classes, "order": self.order}
        if self.shrinking:
            settings["eps_schedule"] = "3, 2, 1 eps"
        return settings | {"samples": self.samples, "adapted": self.adapted}

    def choose_targets(self, victim: Victim, batch: Batch) -> Tensor:
        """The classes of the runs."""
        if not self.targeted:
            return batch.labels[:, None]
        if self.order == "malt":
            return nearest_classes(victim, batch, self.target_classes)
        return other_classes(batch, self.target_classes)

    def start(self, victim: Victim, batch: Batch) -> APGDState:
        """A random point on the sphere of the first eps."""
        images_adv = self._random_start(batch)
        zeros = torch.zeros_like(images_adv)
        nothing = torch.zeros(len(batch), device=images_adv.device)
        size = images_adv[0].numel()
        return APGDState(
            images_adv=images_adv,
            previous=images_adv.clone(),
            gradient=zeros,
            best=images_adv.clone(),
            best_gradient=zeros.clone(),
            loss=nothing - torch.inf,
            best_loss=nothing - torch.inf,
            best_loss_at_check=nothing.clone(),
            step_size=nothing.clone(),
            rises=nothing.clone(),
            reduced=torch.ones_like(batch.labels, dtype=torch.bool),
            density=nothing + 0.2,
            nonzero=nothing + size,
        )

    def step(self, victim: Victim, batch: Batch, state: APGDState) -> tuple[Tensor, Tensor]:
        """Move, evaluate, remember the best, and at a checkpoint look back."""
        iteration, window, radius = self._now(batch)
        eps = radius * batch.threat.eps
        begins = iteration == 0
        self._begin_phase(batch, state, begins, eps)
        candidates = torch.where(
            per_image(begins, batch.images),
            state.images_adv,
            _move(batch, state, eps, first=iteration == 1),
        )
        last = batch.step + 1 == self.steps
        logits, loss, gradient = victim.gradient(candidates, self._loss(batch), wanted=~last)

        state.rises += (loss > state.loss) & ~begins
        state.previous, state.images_adv = state.images_adv, candidates
        state.loss, state.gradient = loss, gradient
        better = (loss > state.best_loss) | begins
        _assign(state, better, best=candidates, best_gradient=gradient, best_loss=loss)
        _assign(state, begins, best_loss_at_check=loss)
        check = window > 0
        if bool(check.any()):
            if batch.threat.norm == "L1":
                _check_sparsity(batch, state, check, eps)
            else:
                _check_rises(state, check, window)
        inside = radius == 1
        return candidates, inside & (logits.argmax(1) != batch.labels)

    def _loss(self, batch: Batch) -> Callable[[Tensor, Tensor], Tensor]:
        loss = (UNTARGETED | TARGETED)[self.loss]
        labels, targets = batch.labels, batch.target()
        return lambda logits, rows: loss(logits, labels[rows], targets[rows])

    def _random_start(self, batch: Batch) -> Tensor:
        """On the sphere: uniform entries scaled to Linf length eps; Gaussian to L2 length eps;
        for L1 a standard Gaussian projected on the ball."""
        images, noise, eps = batch.images, batch.noise, batch.threat.eps
        if batch.threat.norm == "L1":
            radius = 3 * eps if self.shrinking else eps
            return images + project_l1_in_box(
                noise.normal(images), images, images.new_full((len(images),), radius)
            )
        if batch.threat.norm == "Linf":
            delta, order = 2 * noise.uniform(images) - 1, torch.inf
        else:
            delta, order = noise.normal(images), 2
        length = torch.linalg.vector_norm(delta.flatten(1), order, dim=1).clamp_min(1e-12)
        return batch.threat.project(images + eps * delta / per_image(length, images), images)

    def _begin_phase(self, batch: Batch, state: APGDState, begins: Tensor, eps: Tensor) -> None:
        """A phase of a smaller eps starts from the best point of the one before, projected."""
        if not bool(begins.any()):
            return
        norm = batch.threat.norm
        _assign(
            state,
            begins,
            step_size=eps * (1 if norm == "L1" else 2),
            reduced=torch.ones_like(begins),
            rises=torch.zeros_like(eps),
        )
        later = begins & (batch.step > 0)
        if bool(later.any()):
            images = batch.images[later]
            delta = project_l1_in_box(state.best[later] - images, images, eps[later])
            state.images_adv[later] = images + delta
        if self.shrinking:
            size = batch.images[0].numel()
            delta = state.images_adv - batch.images
            changed = delta.flatten(1).ne(0).sum(1).float()
            _assign(state, begins, nonzero=changed, density=changed / size / 1.5)

    def _now(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """(N,) each: iteration in the phase, window of a checkpoint or 0, radius in eps."""
        device = batch.step.device
        table = torch.tensor(_schedule(self, batch.threat.norm), device=device)[batch.step]
        iteration, window, radius = table.unbind(1)
        return iteration, window, radius

    def _phases(self) -> list[tuple[int, int]]:
        """(radius in eps, iterations) of each phase."""
        if not self.shrinking:
            return [(1, self.iterations)]
        third = math.ceil(0.3 * self.iterations)
        return [(3, third), (2, third), (1, self.iterations - 2 * third)]


@cache
def _schedule(attack: APGD, norm: Norm) -> list[tuple[int, int, int]]:
    """Iteration in its phase, window if a checkpoint follows, radius in eps, of each step. Windows
    shrink, but for L1, where all are 4 % of the phase."""
    schedule = []
    for radius, iterations in attack._phases():
        schedule += [(0, 0, radius)]
        window, since = max(int((0.04 if norm == "L1" else 0.22) * iterations), 1), 0
        for iteration in range(1, iterations + 1):
            since += 1
            check = since == window
            schedule += [(iteration, window if check else 0, radius)]
            if check:
                shorter = window - max(int(0.03 * iterations), 1)
                shortest = window if norm == "L1" else max(int(0.06 * iterations), 1)
                window, since = max(shorter, shortest), 0
    return schedule


def _move(batch: Batch, state: APGDState, eps: Tensor, *, first: Tensor) -> Tensor:
    """The next point, inside the ball of radius `eps` (N,); no momentum in the first move."""
    images, images_adv = batch.images, state.images_adv
    if batch.threat.norm == "L1":
        delta = project_l1_in_box(_sparse_step(state) - images, images, eps)
        return (images + delta).clamp_(0, 1)
    threat, step_size = batch.threat, per_image(state.step_size, images)
    if threat.norm == "Linf":
        ascended = images_adv + step_size * state.gradient.sign()
    else:
        length = torch.linalg.vector_norm(state.gradient.flatten(1), dim=1) + 1e-12
        ascended = images_adv + step_size * state.gradient / per_image(length, images)
    ascended = threat.project(ascended, images)
    share = per_image(torch.where(first, 1.0, _MOMENTUM), images)
    drift = images_adv - state.previous
    return threat.project(
        images_adv + (ascended - images_adv) * share + drift * (1 - share), images
    )


def _sparse_step(state: APGDState) -> Tensor:
    """L1: equal steps along the largest `density` share of the gradient's entries."""
    gradient = state.gradient.flatten(1)
    size = gradient.shape[1]
    magnitude = gradient.abs()
    rank = ((1 - state.density) * size).long().clamp(0, size - 1)
    smallest = magnitude.sort(1).values.gather(1, rank[:, None])
    direction = torch.where(magnitude >= smallest, gradient, 0).sign()
    length = direction.abs().sum(1, keepdim=True) + 1e-10
    step = state.step_size[:, None] * direction / length
    return state.images_adv + step.view_as(state.images_adv)


def _check_rises(state: APGDState, check: Tensor, window: Tensor) -> None:
    """Linf, L2: halve the step size where it does not pay, and go back to the best point."""
    oscillates = state.rises <= _RHO * window
    stuck = ~state.reduced & (state.best_loss_at_check >= state.best_loss)
    halve = check & (oscillates | stuck)
    _assign(
        state,
        halve,
        step_size=state.step_size / 2,
        images_adv=state.best,
        gradient=state.best_gradient,
    )
    _assign(
        state,
        check,
        reduced=halve,
        best_loss_at_check=state.best_loss,
        rises=torch.zeros_like(state.rises),
    )


def _check_sparsity(batch: Batch, state: APGDState, check: Tensor, eps: Tensor) -> None:
    """L1: where the best point became sparser restart from it at full step size, elsewhere shorten
    the step; the next steps change two thirds as many entries as the best point does."""
    size = batch.images[0].numel()
    nonzero = (state.best - batch.images).flatten(1).ne(0).sum(1).float()
    sparser = check & (nonzero / state.nonzero.clamp_min(1) < 0.95)
    step_size = torch.where(sparser, eps, state.step_size / 1.5)
    _assign(
        state,
        check,
        step_size=step_size.clamp(eps / 10, eps),
        density=nonzero / size / 1.5,
        nonzero=nonzero,
    )
    _assign(state, sparser, images_adv=state.best, gradient=state.best_gradient)


def _assign(state: APGDState, rows: Tensor, **values: Tensor) -> None:
    """Overwrite fields of `state` where `rows` (N,) is True."""
    for name, value in values.items():
        old = getattr(state, name)
        mask = per_image(rows, old) if old.dim() > 1 else rows
        setattr(state, name, torch.where(mask, value, old))
