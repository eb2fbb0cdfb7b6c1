"""Adversarial weight perturbation (AWP): train weights by the gradient at the worst point near them
(Wu, Xia and Wang, "Adversarial weight perturbation helps robust generalization", NeurIPS 2020,
arXiv 2004.05884).

    x* at w as ever;  g = gradient of L(w, x*);  v_l = gamma · ||w_l|| · g_l / ||g_l||
    w <- w - rate · gradient of L(w + v, x*)

l runs over the weights of convolutions and linear layers, each with its own norm; biases and
normalization parameters stay where they are. Published: gamma = 0.01 from the first epoch on for
PGD-AT, 0.005 from the 10th of 200 for TRADES. Certain: formula, one step, which weights, x* found
once and at w. Our choice: what a recipe trains beside its student (a peer, projectors) is not
perturbed, because only the student is attacked and kept, and neither is a stage that makes an
ordinary network; L is the whole loss of the recipe; w is restored before the optimizer's step, so
that weight decay acts on w, where the official program steps first and subtracts v then.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from robustify.frozen import Frozen


def perturbable(network: nn.Module) -> list[nn.Parameter]:
    """The trained weights of convolutions and linear layers: parameters of two dimensions or
    more."""
    return [p for p in network.parameters() if p.requires_grad and p.ndim > 1]


def ascent(weight: Tensor, gradient: Tensor, gamma: float) -> Tensor:
    """v_l: along `gradient`, `gamma` times as long as `weight`; zero where the gradient is."""
    length: Tensor = gamma * weight.norm() / gradient.norm().clamp_min(1e-20)
    return gradient * length


@contextmanager
def perturbed(
    weights: Sequence[nn.Parameter], gradients: Sequence[Tensor], *, gamma: float
) -> Iterator[None]:
    """w + v inside, and w to the bit afterwards, whatever happens inside."""
    before = [weight.detach().clone() for weight in weights]
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.add_(ascent(weight, gradient, gamma))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, kept in zip(weights, before, strict=True):
                weight.copy_(kept)


class Buffers:
    """What forwards leave in the buffers of a network: BatchNorm's statistics, running balances.
    `put_back` undoes all that happened to them since `take`; those of frozen parts never move."""

    def __init__(self, network: nn.Module) -> None:
        parts = [module for module in network.modules() if isinstance(module, Frozen)]
        frozen = {buffer for part in parts for buffer in part.buffers()}
        self.live = [buffer for buffer in network.buffers() if buffer not in frozen]
        self.take()

    def take(self) -> None:
        """Keep them as they are now."""
        self.kept = [buffer.clone() for buffer in self.live]

    def put_back(self) -> None:
        """Make them what they were."""
        for buffer, kept in zip(self.live, self.kept, strict=True):
            buffer.copy_(kept)
