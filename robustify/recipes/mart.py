"""MART: misclassified images matter most (Wang et al., "Improving adversarial robustness requires
revisiting misclassified examples", ICLR 2020).

    x* = argmax over the ball of CE(s(x'), y)               inner maximisation, student in eval mode
    L  = -log p*_y - log(1.0001 - max_{c != y} p*_c) + beta · KL(p, p*) · (1 - p_y)

s are logits, p = softmax(s(x)) and p* = softmax(s(x*)). The first two terms are the boosted
cross-entropy. p is not detached, neither in the KL nor in its weight 1 - p_y.
Certain: formula, stop-gradients, the order of the forwards (x, x*), weights. The official program
adds 1e-12 inside logarithms and 1e-7 in the weight against zeros that log-softmax does not meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    beta: float = 5.0,
    detach_clean: bool = False,
) -> Iterator[Objective]:
    """One stage; no teacher. `detach_clean` stops the gradient at s(x): an ablation."""
    check_teachers(student, teachers, roles=0)
    yield Mart(student=student, threat=threat, attack=attack, beta=beta, detach_clean=detach_clean)


@dataclass(eq=False, repr=False, kw_only=True)
class Mart(Objective):
    """Boosted cross-entropy plus a divergence that counts where the clean image is in doubt."""

    threat: ThreatModel
    attack: Mapping[str, Any]
    beta: float
    detach_clean: bool

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        with constant(self.student, images) as student:
            images_adv = pgd(
                lambda x: cross_entropy(student(x), labels),
                images, self.threat, noise=noise, **self.attack,
            )  # fmt: skip
        logits = self.student(images)
        logits_adv = self.student(images_adv)
        clean = logits.detach() if self.detach_clean else logits

        runner_up = logits_adv.softmax(1).scatter(1, labels[:, None], 0).amax(1)
        boosted = (cross_entropy(logits_adv, labels) - (1.0001 - runner_up).log()).mean()
        doubt = 1 - clean.softmax(1).gather(1, labels[:, None]).squeeze(1)
        consistency = (kl(clean, logits_adv) * doubt).mean()
        return {
            "loss": boosted + self.beta * consistency,
            "boosted cross-entropy": boosted,
            "consistency": consistency,
            "robust accuracy": accuracy(logits_adv, labels),
        }
