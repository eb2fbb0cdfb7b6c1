"""ARD: a robust teacher's soft labels of clean images (Goldblum et al., "Adversarially robust
distillation", AAAI 2020, arXiv 1905.09747).

    x* = argmax over the ball of CE(s(x'), y)                                   inner maximisation
    L  = kd_weight · KL(p_T(z(x)), p_T(s(x*))) + ce_weight · CE(s(x), y)

s and z are the logits of the student and of the frozen teacher, p_T(v) = softmax(v / T). The
weights are effective ones: the paper's alpha = 1 at T = 30, with the official program's mean over
classes, is kd_weight = alpha · T² / K = 90 for 10 classes and 9 for 100; ce_weight = 1 - alpha.
Certain: formula, weights, the teacher reads clean images, the order of the forwards (x*, x).
Officially the student attacks itself in train mode, so that BatchNorm's statistics move at every
attack step: `attack_bn: train`. Our choice is eval mode. With ce_weight = 0, x is forwarded without
gradient, only for its place in BatchNorm's statistics.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from robustify.attacks.pgd import pgd
from robustify.fold import constant
from robustify.losses import cross_entropy, kl
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
    kd_weight: float = 90.0,
    ce_weight: float = 0.0,
    temperature: float = 30.0,
    attack_bn: Literal["eval", "train"] = "eval",
    teacher_architecture: str | None = None,
) -> Iterator[Objective]:
    """One stage, after one that trains the teacher by PGD-AT where none is given; its architecture
    is by default the student's."""
    check_teachers(student, teachers, roles=1)
    teacher = yield from robust_teacher(
        student, teachers, architecture=teacher_architecture, threat=threat, attack=attack
    )
    yield Ard(
        student=student, teacher=Frozen(teacher), threat=threat, attack=attack,
        kd_weight=kd_weight, ce_weight=ce_weight, temperature=temperature, attack_bn=attack_bn,
    )  # fmt: skip


@dataclass(eq=False, repr=False, kw_only=True)
class Ard(Objective):
    """The student on adversarial images matches the teacher on clean ones."""

    teacher: Frozen
    threat: ThreatModel
    attack: Mapping[str, Any]
    kd_weight: float
    ce_weight: float
    temperature: float
    attack_bn: Literal["eval", "train"]

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        still = constant(self.student, images)
        with still if self.attack_bn == "eval" else nullcontext(self.student) as student:
            images_adv = pgd(
                lambda x: cross_entropy(student(x), labels),
                images, self.threat, noise=noise, **self.attack,
            )  # fmt: skip
        logits_adv = self.student(images_adv)
        with torch.set_grad_enabled(self.ce_weight > 0):
            logits = self.student(images)

        kd = kl(self.teacher(images), logits_adv, temperature=self.temperature).mean()
        ce = cross_entropy(logits, labels).mean()
        return {
            "loss": self.kd_weight * kd + self.ce_weight * ce,
            "distillation": kd,
            "clean accuracy": accuracy(logits, labels),
            "robust accuracy": accuracy(logits_adv, labels),
        }
