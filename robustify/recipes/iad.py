"""IAD: trust the teacher where it is right, and the student itself elsewhere (Zhu et al., "Reliable
adversarial distillation with unreliable teachers", ICLR 2022, arXiv 2106.04928).

    x* = argmax over the ball of CE(s(x'), y)                                   inner maximisation
    A  = p(z(x*))_y ^ beta  per image, a constant
variant I
    L  = kd_weight · KL(p_T(z(x)), p_T(s(x*))) + (1 - A) · KL(p(s(x)), p(s(x*)))
variant II, with a standard teacher u as well
    L  = ce_weight · CE(s(x*), y) + kd_weight · A · KL(p_T(z(x*)), p_T(s(x*)))
         + kd_weight · (1 - A) · KL(p(s(x)), p(s(x*)))
         + standard_weight · KL(p_T(u(x*)), p_T(s(x*)))

s, z and u are the logits of student and frozen teachers, p_T(v) = softmax(v / T), p = p_1. Before
`begin_epoch` A = 1: then I is ARD and II is AKD2 (Chen et al., ICLR 2021). s(x) is not detached.
Weights are effective: at T = 1 the published ones. I's clean CE of weight 0 is left out.
Certain: formulas, weights; that I's teacher term is not weighted by A (`weigh_teacher` does that);
that the student attacks itself in train mode (`attack_bn: train`); that I forwards x* twice and x
twice, which `bn_double_updates` makes up for. Our choice: eval mode; in II one of each, x* first.
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
from robustify.fusion import trust
from robustify.losses import cross_entropy, kl
from robustify.models import Classifier
from robustify.noise import Noise
from robustify.objective import Frozen, Objective, accuracy, batchnorm_updates, check_teachers
from robustify.recipes.pgd_at import robust_teacher
from robustify.recipes.standard import standard_teacher
from robustify.threat import ThreatModel


def stages(
    student: Classifier,
    teachers: Sequence[Classifier],
    *,
    threat: ThreatModel,
    attack: Mapping[str, Any],
    variant: Literal["I", "II"] = "I",
    kd_weight: float | None = None,
    ce_weight: float = 0.25,
    standard_weight: float = 0.25,
    temperature: float = 1.0,
    beta: float = 0.1,
    begin_epoch: float | None = None,
    weigh_teacher: bool = False,
    detach_clean: bool = False,
    attack_bn: Literal["eval", "train"] = "eval",
    bn_double_updates: bool = True,
    teacher_architecture: str | None = None,
) -> Iterator[Objective]:
    """One stage; given teachers are a robust one and, for variant II, a standard one; each that is
    missing is trained in a stage before. By default `kd_weight` is 1 for I and 0.5 for II, and
    `begin_epoch`, from 0 or as a share, 0.3 and 0.2: published are 60 and 40 of 200 epochs."""
    first = variant == "I"
    check_teachers(student, teachers, roles=1 if first else 2)
    robust = yield from robust_teacher(
        student, teachers[:1], architecture=teacher_architecture, threat=threat, attack=attack
    )
    second = None
    if not first:
        standard = yield from standard_teacher(
            student, teachers[1:], architecture=teacher_architecture
        )
        second = Frozen(standard)
    yield Iad(
        student=student, teacher=Frozen(robust), standard_teacher=second, threat=threat,
        attack=attack, kd_weight=(1.0 if first else 0.5) if kd_weight is None else kd_weight,
        ce_weight=ce_weight, standard_weight=standard_weight, temperature=temperature, beta=beta,
        begin_epoch=(0.3 if first else 0.2) if begin_epoch is None else begin_epoch,
        weigh_teacher=weigh_teacher, detach_clean=detach_clean, attack_bn=attack_bn,
        bn_double_updates=bn_double_updates,
    )  # fmt: skip


@dataclass(eq=False, repr=False, kw_only=True)
class Iad(Objective):
    """Partial trust in the teacher; variant II where there is a standard teacher beside it."""

    teacher: Frozen
    standard_teacher: Frozen | None
    threat: ThreatModel
    attack: Mapping[str, Any]
    kd_weight: float
    ce_weight: float
    standard_weight: float
    temperature: float
    beta: float
    begin_epoch: float
    weigh_teacher: bool
    detach_clean: bool
    attack_bn: Literal["eval", "train"]
    bn_double_updates: bool

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        still = constant(self.student, images)
        with still if self.attack_bn == "eval" else nullcontext(self.student) as student:
            images_adv = pgd(
                lambda x: cross_entropy(student(x), labels),
                images, self.threat, noise=noise, **self.attack,
            )  # fmt: skip
        if self.standard_teacher is None:
            return self._first(images, images_adv, labels)
        return self._second(self.standard_teacher, images, images_adv, labels)

    def _first(self, images: Tensor, images_adv: Tensor, labels: Tensor) -> dict[str, Tensor]:
        trusts_itself = self.reached(self.begin_epoch)
        with batchnorm_updates(self.student, 2 if trusts_itself and self.bn_double_updates else 1):
            logits_adv = self.student(images_adv)
            with torch.set_grad_enabled(trusts_itself and not self.detach_clean):
                logits = self.student(images)

        kd = kl(self.teacher(images), logits_adv, temperature=self.temperature)
        own = torch.zeros_like(kd)
        if trusts_itself:
            believed = trust(self.teacher(images_adv), labels, exponent=self.beta)
            kd = believed * kd if self.weigh_teacher else kd
            own = (1 - believed) * kl(logits, logits_adv)
        return {
            "loss": (self.kd_weight * kd + own).mean(),
            "teacher": kd.mean(),
            "own": own.mean(),
            "robust accuracy": accuracy(logits_adv, labels),
        }

    def _second(
        self, standard_teacher: Frozen, images: Tensor, images_adv: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        logits_adv = self.student(images_adv)
        robust_adv = self.teacher(images_adv)

        ce = cross_entropy(logits_adv, labels)
        kd = kl(robust_adv, logits_adv, temperature=self.temperature)
        own = torch.zeros_like(kd)
        if self.reached(self.begin_epoch):
            believed = trust(robust_adv, labels, exponent=self.beta)
            with torch.set_grad_enabled(not self.detach_clean):
                logits = self.student(images)
            kd, own = believed * kd, (1 - believed) * kl(logits, logits_adv)
        standard = kl(standard_teacher(images_adv), logits_adv, temperature=self.temperature)
        loss = self.ce_weight * ce + self.kd_weight * (kd + own) + self.standard_weight * standard
        return {
            "loss": loss.mean(),
            "teacher": kd.mean(),
            "own": own.mean(),
            "standard teacher": standard.mean(),
            "robust accuracy": accuracy(logits_adv, labels),
        }
