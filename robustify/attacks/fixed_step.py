"""PGD and FGSM as evaluation attacks: ascent with a fixed step size.

    x_{k+1} = P( x_k + step_size · direction(grad f(x_k)) )

Madry et al., ICLR 2018 (arXiv 1706.06083); one step of eps from the image itself is FGSM
(Goodfellow, Shlens and Szegedy, ICLR 2015, arXiv 1412.6572). For comparison, never a headline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustify.attacks.apgd import UNTARGETED
from robustify.attacks.engine import Batch, Rows
from robustify.attacks.victim import Victim
from robustify.errors import UsageError, suggest
from robustify.threat import ThreatModel


@dataclass
class PGDState(Rows):
    """The last point evaluated and the gradient there."""

    images_adv: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class PGD:
    """PGD with `iterations` of `step_size` (eps / 4 unless given, in [0, 1] pixel units)."""

    name: str = "pgd"
    loss: str = "ce"
    iterations: int = 40
    restarts: int = 1
    step_size: float | None = None
    random_start: bool = True
    samples: int = 1

    def __post_init__(self) -> None:
        if self.loss not in UNTARGETED:
            raise UsageError(
                f"expected a loss of {', '.join(UNTARGETED)}, got {self.loss!r}"
                + suggest(self.loss, UNTARGETED)
            )

    @property
    def runs(self) -> int:
        """Restarts."""
        return self.restarts

    @property
    def steps(self) -> int:
        """Points evaluated: the start and each iteration."""
        return self.iterations + 1

    def settings(self, threat: ThreatModel) -> dict[str, Any]:
        """For the report."""
        return {
            "loss": self.loss,
            "steps": self.iterations,
            "step_size": self._step_size(threat),
            "restarts": self.restarts,
            "random_start": self.random_start,
            "samples": self.samples,
            "adapted": False,
        }

    def choose_targets(self, victim: Victim, batch: Batch) -> Tensor:
        """Untargeted."""
        return batch.labels[:, None]

    def start(self, victim: Victim, batch: Batch) -> PGDState:
        """A random point of the ball, or the image."""
        images_adv = batch.images.clone()
        if self.random_start:
            images_adv = batch.threat.random_start(batch.images, batch.noise)
        return PGDState(images_adv=images_adv, gradient=torch.zeros_like(images_adv))

    def step(self, victim: Victim, batch: Batch, state: PGDState) -> tuple[Tensor, Tensor]:
        """Ascend (not in step 0, whose gradient is zero) and evaluate."""
        threat, labels, loss = batch.threat, batch.labels, UNTARGETED[self.loss]
        ascended = threat.ascend(state.images_adv, state.gradient, self._step_size(threat))
        candidates = threat.project(ascended, batch.images)
        last = batch.step + 1 == self.steps
        logits, _, state.gradient = victim.gradient(
            candidates, lambda logits, rows: loss(logits, labels[rows], labels[rows]), wanted=~last
        )
        state.images_adv = candidates
        return candidates.clone(), logits.argmax(1) != labels

    def _step_size(self, threat: ThreatModel) -> float:
        return threat.eps / 4 if self.step_size is None else self.step_size
