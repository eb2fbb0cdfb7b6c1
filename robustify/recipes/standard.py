"""Ordinary training or fine-tuning on unperturbed images: the reference, and how teachers are made.

    L = CE(s(x), y)

s are the logits of the student.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from robustify.losses import cross_entropy
from robustify.models import Classifier, like
from robustify.noise import Noise
from robustify.objective import Objective, accuracy, check_teachers, is_from_scratch


def stages(student: Classifier, teachers: Sequence[Classifier]) -> Iterator[Objective]:
    """One stage; no teacher, no attack."""
    check_teachers(student, teachers, roles=0)
    yield Standard(student=student)


def standard_teacher(
    student: Classifier, given: Sequence[Classifier], *, architecture: str | None
) -> Generator[Objective, None, Classifier]:
    """The given teacher; where none is given, or an architecture alone, one trained ordinarily in a
    stage of its own. For `yield from`."""
    teacher = given[0] if given else like(student, architecture)
    if not given or is_from_scratch(teacher):
        ordinary = {"select": "clean", "awp_gamma": 0.0}
        yield Standard(student=teacher, name="standard teacher", training_changes=ordinary)
    return teacher


@dataclass(eq=False, repr=False, kw_only=True)
class Standard(Objective):
    """Cross-entropy on clean images."""

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        logits = self.student(images)
        return {
            "loss": cross_entropy(logits, labels).mean(),
            "clean accuracy": accuracy(logits, labels),
        }
