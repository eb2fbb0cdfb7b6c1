"""PGD-AT: adversarial training (Madry et al., ICLR 2018, arXiv 1706.06083).

    x* = argmax over the ball of CE(s(x'), y)          inner maximisation, student in eval mode
    L  = CE(s(x*), y)

There is no PyTorch original; the defaults are those its successors use for this baseline.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustify.attacks.pgd import pgd
from robustify.fold import constant
from robustify.losses import cross_entropy
from robustify.models import Classifier, like
from robustify.noise import Noise
from robustify.objective import Objective, accuracy, check_teachers, is_from_scratch
from robustify.threat import ThreatModel


def stages(
    student: Classifier,
    teachers: Sequence[Classifier],
    *,
    threat: ThreatModel,
    attack: Mapping[str, Any],
) -> Iterator[Objective]:
    """One stage; no teacher."""
    check_teachers(student, teachers, roles=0)
    yield PgdAt(student=student, threat=threat, attack=attack)


def robust_teacher(
    student: Classifier,
    given: Sequence[Classifier],
    *,
    architecture: str | None,
    threat: ThreatModel,
    attack: Mapping[str, Any],
) -> Generator[Objective, None, Classifier]:
    """The given teacher; where none is given, or an architecture alone, one trained by PGD-AT in a
    stage of its own. For `yield from`."""
    teacher = given[0] if given else like(student, architecture)
    if not given or is_from_scratch(teacher):
        uniform = {**attack, "start": "uniform"}
        yield PgdAt(student=teacher, threat=threat, attack=uniform, name="robust teacher")
    return teacher


@dataclass(eq=False, repr=False, kw_only=True)
class PgdAt(Objective):
    """Cross-entropy on adversarial images."""

    threat: ThreatModel
    attack: Mapping[str, Any]

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        with constant(self.student, images) as student:
            images_adv = pgd(
                lambda x: cross_entropy(student(x), labels),
                images, self.threat, noise=noise, **self.attack,
            )  # fmt: skip
        logits_adv = self.student(images_adv)
        return {
            "loss": cross_entropy(logits_adv, labels).mean(),
            "robust accuracy": accuracy(logits_adv, labels),
        }
