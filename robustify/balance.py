"""Balance of two losses: MTARD's normalization by what is left of each (Zhao et al., ECCV 2022, doi
10.1007/978-3-031-19772-7_34).

    r_i = L_i / (L_i at the first step)
    w <- w - rate · (w - r_nat / (r_adv + r_nat)),   w = 1/2 first

The weights are w for the natural and 1 - w for the adversarial loss; they carry no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Balance(nn.Module):
    """The share of the natural loss; its state belongs in a checkpoint, hence the buffers."""

    share: Tensor
    first: Tensor

    def __init__(self, rate: float = 0.025) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("share", torch.tensor(0.5))
        self.register_buffer("first", torch.zeros(2))  # zeros: no step was made yet

    def forward(self, adversarial: Tensor, natural: Tensor, *, lr_scale: float = 1.0) -> Tensor:
        """The weighted sum of two scalar losses, after a step of the weights. `lr_scale` is the
        learning rate over its first value: the published rate drops with it."""
        losses = torch.stack([adversarial, natural]).detach()
        self.first.copy_(torch.where(self.first > 0, self.first, losses))
        left_adv, left_nat = losses / self.first.clamp_min(1e-12)
        goal = left_nat / (left_adv + left_nat).clamp_min(1e-12)
        self.share -= self.rate * lr_scale * (self.share - goal)
        share = self.share.clone()
        return (1 - share) * adversarial + share * natural
