"""AdaAD: the teacher inside the inner maximisation (Huang et al., "Boosting accuracy and robustness
of student models via adaptive adversarial distillation", CVPR 2023, pp. 24668-24677).

    x* = argmax over the ball of KL(p(z(x')), p(s(x')))   gradient through student AND teacher
    L  = adv_weight · KL(p_T(z(x*)), p_T(s(x*))) + clean_weight · KL(p_T(z(x)), p_T(s(x)))
         + self_weight · (1 - A) · KL(p(s(x)), p(s(x*)))          AdaIAD, from `begin_epoch` on
    A  = p(z(x*))_y ^ beta                                  how far the teacher is to be trusted

s and z are the logits of the student and of the frozen teacher, both in eval mode in the attack,
p_T(v) = softmax(v / T), p = p_1. A is a constant; s(x) is not detached. The weights are effective
ones: the paper's alpha = 1 is adv_weight = 0.1 for CIFAR-10 (the official program's mean over 10
classes) and 1 for CIFAR-100, where it takes no such mean; clean_weight stands for 1 - alpha = 0.
AdaIAD is adv_weight = T² = 900 at T = 30 and self_weight = 1: the preset paper-adaiad.
Certain: formulas, weights, the order of the forwards (x, x*). Our choice: AdaIAD in AdaAD's order,
and x without gradient where nothing reads it, only for its place in BatchNorm's statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from robustify.attacks.pgd import pgd
from robustify.fold import constant
from robustify.fusion import trust
from robustify.losses import kl
from robustify.models import Classifier
from robustify.noise import Noise
from robustify.objective import Frozen, Objective, accuracy, check_teachers
from robustify.recipes.pgd_at import robust_teacher
from robustify.threat import ThreatModel


def stages(
    student: Classifier,
    teachers: Sequence[Classifier],
    *,
    threat: ThreatModel,
    attack: Mapping[str, Any],
    adv_weight: float = 0.1,
    clean_weight: float = 0.0,
    self_weight: float = 0.0,
    temperature: float = 1.0,
    beta: float = 0.1,
    begin_epoch: float = 0.3,
    teacher_architecture: str | None = None,
) -> Iterator[Objective]:
    """One stage, after one that trains the teacher by PGD-AT where none is given; its architecture
    is by default the student's. `begin_epoch` counts from 0; below 1, a share of all epochs."""
    check_teachers(student, teachers, roles=1)
    teacher = yield from robust_teacher(
        student, teachers, architecture=teacher_architecture, threat=threat, attack=attack
    )
    yield AdaAd(
        student=student, teacher=Frozen(teacher), threat=threat, attack=attack,
        adv_weight=adv_weight, clean_weight=clean_weight, self_weight=self_weight,
        temperature=temperature, beta=beta, begin_epoch=begin_epoch,
    )  # fmt: skip


@dataclass(eq=False, repr=False, kw_only=True)
class AdaAd(Objective):
    """Student and teacher agree where they disagree most."""

    teacher: Frozen
    threat: ThreatModel
    attack: Mapping[str, Any]
    adv_weight: float
    clean_weight: float
    self_weight: float
    temperature: float
    beta: float
    begin_epoch: float

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        with constant(self.student, images) as student, constant(self.teacher, images) as teacher:
            images_adv = pgd(
                lambda x: kl(teacher(x), student(x)),
                images, self.threat, noise=noise, **self.attack,
            )  # fmt: skip
        trusts_itself = self.self_weight > 0 and self.reached(self.begin_epoch)
        with torch.set_grad_enabled(trusts_itself or self.clean_weight > 0):
            logits = self.student(images)
        logits_adv = self.student(images_adv)
        teacher_adv = self.teacher(images_adv)

        adversarial = kl(teacher_adv, logits_adv, temperature=self.temperature).mean()
        loss = self.adv_weight * adversarial
        if self.clean_weight > 0:
            clean = kl(self.teacher(images), logits, temperature=self.temperature).mean()
            loss = loss + self.clean_weight * clean
        if trusts_itself:
            believed = trust(teacher_adv, labels, exponent=self.beta)
            loss = loss + self.self_weight * ((1 - believed) * kl(logits, logits_adv)).mean()
        return {
            "loss": loss,
            "adversarial": adversarial,
            "clean accuracy": accuracy(logits, labels),
            "robust accuracy": accuracy(logits_adv, labels),
        }
