"""RSLAD: robust soft labels instead of every hard one (Zi et al., "Revisiting adversarial
robustness distillation", ICCV 2021, arXiv 2108.07969).

    x* = argmax over the ball of KL(p(z(x)), p(s(x')))      inner maximisation, student in eval mode
    L  = adv_weight · KL(p(z(x)), p(s(x*))) + clean_weight · KL(p(z(x)), p(s(x)))

s and z are the logits of the student and of the frozen teacher, which reads clean images only;
labels are not used. The weights are effective ones: the paper's 5/6 and 1/6, with the official
program's mean over 10 classes (and its factor 10 for 100 classes), are 5/60 and 1/60 on both.
Certain: formula, attack, weights, the order of the forwards (x*, x).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustify.attacks.pgd import pgd
from robustify.fold import constant
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
    adv_weight: float = 5 / 60,
    clean_weight: float = 1 / 60,
    teacher_architecture: str | None = None,
) -> Iterator[Objective]:
    """One stage, after one that trains the teacher by PGD-AT where none is given; its architecture
    is by default the student's."""
    check_teachers(student, teachers, roles=1)
    teacher = yield from robust_teacher(
        student, teachers, architecture=teacher_architecture, threat=threat, attack=attack
    )
    yield Rslad(
        student=student, teacher=Frozen(teacher), threat=threat, attack=attack,
        adv_weight=adv_weight, clean_weight=clean_weight,
    )  # fmt: skip


@dataclass(eq=False, repr=False, kw_only=True)
class Rslad(Objective):
    """The student matches the teacher's clean soft labels, on clean and on adversarial images."""

    teacher: Frozen
    threat: ThreatModel
    attack: Mapping[str, Any]
    adv_weight: float
    clean_weight: float

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        soft = self.teacher(images)
        with constant(self.student, images) as student:
            images_adv = pgd(
                lambda x: kl(soft, student(x)),
                images, self.threat, noise=noise, **self.attack,
            )  # fmt: skip
        logits_adv = self.student(images_adv)
        logits = self.student(images)
        adversarial, clean = kl(soft, logits_adv).mean(), kl(soft, logits).mean()
        return {
            "loss": self.adv_weight * adversarial + self.clean_weight * clean,
            "adversarial": adversarial,
            "clean": clean,
            "robust accuracy": accuracy(logits_adv, labels),
        }
