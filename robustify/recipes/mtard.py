"""MTARD: a robust teacher for adversarial images, a standard one for clean images (Zhao et al.,
"Enhanced accuracy and robustness via multi-teacher adversarial distillation", ECCV 2022, doi
10.1007/978-3-031-19772-7_34).

    x* = argmax over the ball of CE(s(x'), y)               inner maximisation, student in eval mode
    L  = kl_weight · ( (1 - w) · L_adv + w · L_nat )                   w: robustify.balance
    L_adv = KL(p(z_robust(x*)), p(s(x*)))          L_nat = KL(p(z_standard(x)), p(s(x)))

s and z are logits of the student and of the frozen teachers. The share w starts at 1/2 and follows
how much is left of each loss, r = L / (L at the very first step), before every step:
    w <- w - rate · (w - r_nat / (r_adv + r_nat)),     no gradient
with rate = 0.025 times the learning rate over its first value, so it drops where that drops. The
weight is an effective one: 1 with the official program's mean over 10 classes (and its factor 10
for 100 classes) is kl_weight = 0.1 on both.
Certain: formula, attack, weights, the order of the forwards (x*, x). Our choice: w moves before it
is used (at the first step it does not move at all). B-MTARD's moving temperatures are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustify.attacks.pgd import pgd
from robustify.balance import Balance
from robustify.fold import constant
from robustify.losses import cross_entropy, kl
from robustify.models import Classifier
from robustify.noise import Noise
from robustify.objective import Frozen, Objective, accuracy, check_teachers
from robustify.recipes.pgd_at import robust_teacher
from robustify.recipes.standard import standard_teacher
from robustify.threat import ThreatModel


def stages(
    student: Classifier,
    teachers: Sequence[Classifier],
    *,
    threat: ThreatModel,
    attack: Mapping[str, Any],
    kl_weight: float = 0.1,
    balance_rate: float = 0.025,
    teacher_architecture: str | None = None,
) -> Iterator[Objective]:
    """One stage; given teachers are a robust one and then a standard one, and each that is missing
    is trained in a stage before, by default with the student's architecture."""
    check_teachers(student, teachers, roles=2)
    robust = yield from robust_teacher(
        student, teachers[:1], architecture=teacher_architecture, threat=threat, attack=attack
    )
    standard = yield from standard_teacher(student, teachers[1:], architecture=teacher_architecture)
    yield Mtard(
        student=student, robust_teacher=Frozen(robust), standard_teacher=Frozen(standard),
        threat=threat, attack=attack, kl_weight=kl_weight, balance=Balance(balance_rate),
    )  # fmt: skip


@dataclass(eq=False, repr=False, kw_only=True)
class Mtard(Objective):
    """One teacher for each kind of image, and a balance between them."""

    robust_teacher: Frozen
    standard_teacher: Frozen
    threat: ThreatModel
    attack: Mapping[str, Any]
    kl_weight: float
    balance: Balance

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        with constant(self.student, images) as student:
            images_adv = pgd(
                lambda x: cross_entropy(student(x), labels),
                images, self.threat, noise=noise, **self.attack,
            )  # fmt: skip
        logits_adv = self.student(images_adv)
        logits = self.student(images)
        adversarial = kl(self.robust_teacher(images_adv), logits_adv).mean()
        natural = kl(self.standard_teacher(images), logits).mean()
        balanced = self.balance(adversarial, natural, lr_scale=self.lr_scale)
        return {
            "loss": self.kl_weight * balanced,
            "adversarial": adversarial,
            "natural": natural,
            "share of natural": self.balance.share.clone(),
            "robust accuracy": accuracy(logits_adv, labels),
        }
