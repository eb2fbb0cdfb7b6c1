"""Transfer: adversarial images crafted on other models, judged on this one.

Papernot, McDaniel and Goodfellow, 2016 (arXiv 1605.07277). What a surrogate with honest gradients
finds and white-box attacks miss is a sign that the model masks its own (Athalye et al., ICML 2018).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustify.attacks.engine import Batch, Rows
from robustify.attacks.fixed_step import PGD
from robustify.attacks.victim import Victim
from robustify.errors import UsageError
from robustify.threat import ThreatModel


@dataclass
class TransferState(Rows):
    """The candidate of each image."""

    images_adv: Tensor


@dataclass(frozen=True)
class Transfer:
    """Tries what PGD finds on each of `surrogates` (name -> images to logits (N, K)), one after the
    other. It climbs cross-entropy of z / s, which no scale of a surrogate's logits can blind.

    `passes` of its outcome count those of the model under attack, not of the surrogates.
    """

    surrogates: Mapping[str, Callable[[Tensor], Tensor]]
    name: str = "transfer"
    iterations: int = 40  # our choice, as the checks' PGD
    steps: int = 1
    samples: int = 1

    def __post_init__(self) -> None:
        if not self.surrogates:
            raise UsageError("expected at least one model to transfer from, got none")

    @property
    def runs(self) -> int:
        """One for each surrogate."""
        return len(self.surrogates)

    def settings(self, threat: ThreatModel) -> dict[str, Any]:
        """For the report."""
        crafting = PGD(loss="ce_scaled", iterations=self.iterations).settings(threat)
        return {**crafting, "restarts": 1, "transfer_from": list(self.surrogates)}

    def choose_targets(self, victim: Victim, batch: Batch) -> Tensor:
        """Untargeted."""
        return batch.labels[:, None]

    def start(self, victim: Victim, batch: Batch) -> TransferState:
        """Craft on the surrogate of this run."""
        images_adv = torch.empty_like(batch.images)
        for run, surrogate in enumerate(self.surrogates.values()):
            rows = (batch.run == run).nonzero().squeeze(1)
            if len(rows):
                images_adv[rows] = self._crafted(Victim(surrogate), batch.take(rows))
        return TransferState(images_adv=images_adv)

    def step(self, victim: Victim, batch: Batch, state: TransferState) -> tuple[Tensor, Tensor]:
        """The engine settles every candidate."""
        return state.images_adv, torch.ones_like(batch.labels, dtype=torch.bool)

    def _crafted(self, surrogate: Victim, batch: Batch) -> Tensor:
        attack = PGD(loss="ce_scaled", iterations=self.iterations)
        state = attack.start(surrogate, batch)
        for _ in range(attack.steps):
            images_adv, _ = attack.step(surrogate, batch, state)
            batch.step += 1
        return images_adv
