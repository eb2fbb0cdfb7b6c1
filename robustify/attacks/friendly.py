"""Friendly attacks: PGD on cross-entropy that leaves an image alone once it fools the model
(Zhang et al., "Attacks which do not kill training make adversarial learning stronger", ICML 2020,
arXiv 2002.11242, algorithm 1).

    an image is attacked until it was misclassified `patience` + 1 times; patience is their tau

Images that are done are taken out of the batch, so the attack costs less the weaker the model is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from robustify import compilation
from robustify.attacks.pgd import Start, begin, once
from robustify.losses import cross_entropy
from robustify.noise import Noise
from robustify.threat import ThreatModel


def friendly_pgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    patience: int,
    steps: int,
    step_size: float,
    noise: Noise,
    start: Start = "uniform",
) -> Tensor:
    """Images in the threat model around `images` (N, C, H, W), detached. `model` is constant and in
    eval mode; the other arguments are those of `pgd`, and so is what `repeating` does to it."""

    def search() -> Tensor:
        images_adv = begin(images, threat, noise, start)
        everybody = torch.arange(len(images), device=images.device)
        patient = torch.full_like(everybody, patience)
        # What is compiled is compiled for every number of images: there all of them are asked.
        going = everybody
        for _ in range(steps):
            asked = everybody if compilation.is_wanted() else going
            variable = images_adv[asked].requires_grad_()
            with torch.enable_grad():
                logits = model(variable)
                losses = cross_entropy(logits, labels[asked])
                (gradient,) = torch.autograd.grad(losses.sum(), variable)
            patient[asked] -= (logits.argmax(1) != labels[asked]).long()
            moving = patient[asked] >= 0
            going = asked[moving]
            if not len(going):
                break
            moved = threat.ascend(images_adv[going], gradient[moving], step_size)
            images_adv[going] = threat.project(moved, images[going])
        return images_adv

    return once(images, search)
