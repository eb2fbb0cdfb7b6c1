"""TRADES: clean cross-entropy and a consistency term (Zhang et al., ICML 2019, arXiv 1901.08573).

    x* = argmax over the ball of KL(p(s(x)), p(s(x')))     inner maximisation, student in eval mode
    L  = CE(s(x), y) + beta · KL(p(s(x)), p(s(x*)))

s(x) is not detached in the KL: gradient enters both arguments. The attack needs its Gaussian start,
because its gradient vanishes at x' = x. The official program forwards x again in every attack step
and twice in the loss, before and after x*. Here once each, with the same gradients;
`reuse_clean_forward=False` repeats the one in the loss, which moves BatchNorm's statistics as
officially: 0.729 old + 0.181 clean + 0.09 adversarial instead of 0.81, 0.09 and 0.1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustify.attacks.pgd import pgd
from robustify.fold import constant
from robustify.losses import cross_entropy, kl
from robustify.models import Classifier
from robustify.noise import Noise
from robustify.objective import Objective, accuracy, check_teachers
from robustify.threat import ThreatModel


def stages(
    student: Classifier,
    teachers: Sequence[Classifier],
    *,
    threat: ThreatModel,
    attack: Mapping[str, Any],
    beta: float = 6.0,
    detach_clean: bool = False,
    reuse_clean_forward: bool = True,
) -> Iterator[Objective]:
    """One stage; no teacher. `detach_clean` stops the gradient at s(x) in the KL: an ablation."""
    check_teachers(student, teachers, roles=0)
    yield Trades(
        student=student,
        threat=threat,
        attack=attack,
        beta=beta,
        detach_clean=detach_clean,
        reuse_clean_forward=reuse_clean_forward,
    )


@dataclass(eq=False, repr=False, kw_only=True)
class Trades(Objective):
    """Clean cross-entropy plus `beta` times the divergence of adversarial from clean."""

    threat: ThreatModel
    attack: Mapping[str, Any]
    beta: float
    detach_clean: bool
    reuse_clean_forward: bool

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        with constant(self.student, images) as student:
            with torch.no_grad():
                reference = student(images)
            images_adv = pgd(
                lambda x: kl(reference, student(x)),
                images, self.threat, noise=noise, **self.attack,
            )  # fmt: skip
        logits = self.student(images)
        logits_adv = self.student(images_adv)
        again = logits if self.reuse_clean_forward else self.student(images)
        clean = cross_entropy(logits, labels).mean()
        consistency = kl(again.detach() if self.detach_clean else again, logits_adv).mean()
        return {
            "loss": clean + self.beta * consistency,
            "clean": clean,
            "consistency": consistency,
            "robust accuracy": accuracy(logits_adv, labels),
        }
