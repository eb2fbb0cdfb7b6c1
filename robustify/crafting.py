"""Crafting: adversarial images against a classifier alone, and attacks that grow with training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from robustify.attacks.pgd import pgd
from robustify.classifier import Classifier
from robustify.fold import constant
from robustify.losses import cross_entropy
from robustify.noise import Noise
from robustify.threat import ThreatModel


def scaled(
    threat: ThreatModel, attack: Mapping[str, Any], factor: float
) -> tuple[ThreatModel, dict[str, Any]]:
    """`threat` and the attack's step size at `factor` times eps."""
    smaller = ThreatModel(threat.norm, threat.eps * factor)
    return smaller, {**attack, "step_size": attack["step_size"] * factor}


def grown(
    threat: ThreatModel, attack: Mapping[str, Any], *, ramp: float, epoch: int, epochs: int
) -> tuple[ThreatModel, dict[str, Any]]:
    """`threat` and `attack` on the way to full eps, reached after `ramp` epochs; a ramp below 1 is
    a share of all `epochs`."""
    length = ramp * epochs if ramp < 1 else ramp
    return scaled(threat, attack, min(1.0, (epoch + 1) / length) if length else 1.0)


def against_classifier(
    classifier: Classifier,
    images: Tensor,
    labels: Tensor,
    noise: Noise,
    *,
    threat: ThreatModel,
    attack: Mapping[str, Any],
    own_answers: bool = False,
    once: bool = False,
) -> Tensor:
    """Images that raise the cross-entropy of `classifier`: half of them by FGSM, half by PGD, each
    at eps/2 or eps, as the noise of the image decides.

    `own_answers` attacks what the classifier says instead of `labels`. `once` leaves the epoch out
    of the noise, so that an image gets the same numbers in every epoch.
    """
    if once:
        noise = Noise(noise.seed, noise.keys)
    few_steps, half_eps = (
        noise.fork(number).uniform(images[:, :1, :1, :1]).flatten() < 0.5 for number in (1, 2)
    )
    fgsm = {"steps": 1, "step_size": threat.eps, "start": "images"}
    images_adv = images.clone()
    with constant(classifier, images) as f:
        if own_answers:
            with torch.no_grad():
                labels = f(images).argmax(1)
        for chosen, factor in ((half_eps, 0.5), (~half_eps, 1.0)):
            for rows, method in ((chosen & few_steps, fgsm), (chosen & ~few_steps, attack)):
                if rows.any():
                    ball, settings = scaled(threat, method, factor)
                    images_adv[rows] = pgd(
                        lambda x, label=labels[rows]: cross_entropy(f(x), label),  # type: ignore[misc]
                        images[rows], ball, noise=noise[rows], **settings,
                    )  # fmt: skip
    return images_adv
