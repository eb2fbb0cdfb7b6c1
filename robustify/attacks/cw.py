"""C&W L2: the smallest L2 perturbation by Adam, with a binary search over the trade-off (Carlini
and Wagner, IEEE S&P 2017, arXiv 1608.04644, section VI-A).

    minimise over w   ||x' - x||_2^2 + c · max( z_y - max_{j != y} z_j, 0 ),   x' = (tanh w + 1) / 2

The margin is divided by the logit scale, recomputed in every step, unless `scaled` is off: a
network with large logits would otherwise need another range of c.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustify.attacks.engine import Batch, Rows
from robustify.attacks.victim import Victim
from robustify.losses import logit_scale, margin
from robustify.threat import ThreatModel, per_image

_ADAM = (0.9, 0.999, 1e-8)
_EDGE = 1 - 1e-6  # keeps atanh finite at black and white
_MAX_C = 1e10


@dataclass
class CWState(Rows):
    """Adam in tanh space, and the bracket of the trade-off c."""

    w: Tensor
    first_moment: Tensor
    second_moment: Tensor
    c: Tensor
    low: Tensor
    high: Tensor
    found: Tensor  # whether this c has fooled the model at any distance


@dataclass(frozen=True)
class CW:
    """`searches` values of c, `iterations` of Adam at `learning_rate` for each."""

    name: str = "cw"
    iterations: int = 200
    searches: int = 5
    learning_rate: float = 0.01
    initial_c: float = 1.0
    scaled: bool = True
    runs: int = 1
    samples: int = 1

    @property
    def steps(self) -> int:
        """Iterations of all searches."""
        return self.iterations * self.searches

    def settings(self, threat: ThreatModel) -> dict[str, Any]:
        """For the report."""
        return {
            "loss": "distance + c · margin" + (" / logit scale" if self.scaled else ""),
            "steps": self.iterations,
            "searches": self.searches,
            "step_size": self.learning_rate,
            "random_start": False,
            "adapted": False,
        }

    def choose_targets(self, victim: Victim, batch: Batch) -> Tensor:
        """Untargeted."""
        return batch.labels[:, None]

    def start(self, victim: Victim, batch: Batch) -> CWState:
        """The image itself."""
        zeros = torch.zeros_like(batch.images)
        nothing = torch.zeros(len(batch), device=zeros.device)
        return CWState(
            w=((2 * batch.images - 1) * _EDGE).atanh(),
            first_moment=zeros,
            second_moment=zeros.clone(),
            c=nothing + self.initial_c,
            low=nothing,
            high=nothing + torch.inf,
            found=torch.zeros_like(batch.labels, dtype=torch.bool),
        )

    def step(self, victim: Victim, batch: Batch, state: CWState) -> tuple[Tensor, Tensor]:
        """Evaluate, take an Adam step, and after `iterations` of them choose the next c."""
        labels, tanh = batch.labels, state.w.tanh()
        candidates = (tanh + 1) / 2

        def hinge(logits: Tensor, rows: Tensor) -> Tensor:
            gap = -margin(logits, labels[rows])
            return (gap / logit_scale(logits).squeeze(1) if self.scaled else gap).clamp_min(0)

        logits, _, gradient = victim.gradient(candidates, hinge)
        delta = candidates - batch.images
        by_image = 2 * delta + per_image(state.c, delta) * gradient
        self._adam(batch, state, by_image * (1 - tanh.square()) / 2)

        fooled = logits.argmax(1) != labels
        state.found |= fooled
        finished = (batch.step + 1) % self.iterations == 0
        if bool(finished.any()):
            self._next_c(batch, state, finished)
        return candidates, fooled & (
            batch.threat.distance(candidates, batch.images) <= batch.threat.eps
        )

    def _adam(self, batch: Batch, state: CWState, gradient: Tensor) -> None:
        decay, decay_2, tiny = _ADAM
        count = per_image(batch.step % self.iterations + 1, gradient)
        state.first_moment = decay * state.first_moment + (1 - decay) * gradient
        state.second_moment = decay_2 * state.second_moment + (1 - decay_2) * gradient.square()
        mean = state.first_moment / (1 - decay**count)
        spread = (state.second_moment / (1 - decay_2**count)).sqrt() + tiny
        state.w = state.w - self.learning_rate * mean / spread

    def _next_c(self, batch: Batch, state: CWState, finished: Tensor) -> None:
        state.high = torch.where(finished & state.found, state.c, state.high)
        state.low = torch.where(finished & ~state.found, state.c, state.low)
        between = torch.where(state.high.isfinite(), (state.low + state.high) / 2, state.c * 10)
        state.c = torch.where(finished, between.clamp_max(_MAX_C), state.c)
        rows = finished.nonzero().squeeze(1)
        state.found[rows] = False
        state.w[rows] = ((2 * batch.images[rows] - 1) * _EDGE).atanh()
        state.first_moment[rows] = 0
        state.second_moment[rows] = 0
