"""Transfer: adversarial images crafted on other models, judged on this one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustify.attacks.engine import Batch, Rows
from robustify.attacks.victim import Victim
from robustify.errors import UsageError
from robustify.threat import ThreatModel


@dataclass
class TransferState(Rows):
    """The candidate of each image."""

    images_adv: Tensor


@dataclass(frozen=True)
class Transfer:
    """Tries `crafted[surrogate]` (M, C, H, W) one surrogate after the other; row i belongs to the
    image whose index in the data set is i. Candidates are projected on the threat model."""

    crafted: dict[str, Tensor]
    name: str = "transfer"
    steps: int = 1
    samples: int = 1

    def __post_init__(self) -> None:
        if not self.crafted:
            raise UsageError("expected images crafted on at least one surrogate, got none")

    @property
    def runs(self) -> int:
        """One for each surrogate."""
        return len(self.crafted)

    def settings(self, threat: ThreatModel) -> dict[str, Any]:
        """For the report."""
        return {"surrogates": list(self.crafted), "random_start": False, "adapted": False}

    def choose_targets(self, victim: Victim, batch: Batch) -> Tensor:
        """Untargeted."""
        return batch.labels[:, None]

    def start(self, victim: Victim, batch: Batch) -> TransferState:
        """The images crafted on the surrogate of this run."""
        images_adv = torch.empty_like(batch.images)
        for run, crafted in enumerate(self.crafted.values()):
            rows = (batch.run == run).nonzero().squeeze(1)
            images_adv[rows] = crafted.to(images_adv)[batch.index[rows]]
        return TransferState(images_adv=batch.threat.project(images_adv, batch.images))

    def step(self, victim: Victim, batch: Batch, state: TransferState) -> tuple[Tensor, Tensor]:
        """The engine settles every candidate."""
        return state.images_adv, torch.ones_like(batch.labels, dtype=torch.bool)
