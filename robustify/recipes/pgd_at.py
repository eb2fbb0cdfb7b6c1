"""PGD-AT: adversarial training (Madry et al., ICLR 2018, arXiv 1706.06083).

    x* = argmax over the ball of CE(s(x'), y)          inner maximisation, student in eval mode
    L  = CE(s(x*), y)

There is no PyTorch original; the defaults are those its successors use for this baseline.
`friendly` stops the search of an image early (`robustify.attacks.friendly`): fewer passes, and a
different method, friendly adversarial training.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from robustify.attacks.friendly import friendly_pgd
from robustify.attacks.pgd import pgd
from robustify.errors import UsageError
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
    friendly: int | None = None,
) -> Iterator[Objective]:
    """One stage; no teacher. `friendly` is how many steps an image is still attacked after it first
    fools the student, 0 to 3 in the paper; without it every image is attacked to the end."""
    check_teachers(student, teachers, roles=0)
    if friendly is not None and friendly < 0:
        raise UsageError(f"expected friendly >= 0, got {friendly}; leave it out for ordinary PGD")
    yield PgdAt(student=student, threat=threat, attack=attack, friendly=friendly)


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
    friendly: int | None = None

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        images_adv = self._attack(images, labels, noise)
        logits_adv = self.student(images_adv)
        return {
            "loss": cross_entropy(logits_adv, labels).mean(),
            "robust accuracy": accuracy(logits_adv, labels),
        }

    def _attack(self, images: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        with constant(self.student, images) as student:
            if self.friendly is not None:
                return friendly_pgd(student, images, labels, self.threat, noise=noise,
                                    patience=self.friendly, **self.attack)  # fmt: skip
            return pgd(
                lambda x: cross_entropy(student(x), labels),
                images, self.threat, noise=noise, **self.attack,
            )  # fmt: skip
