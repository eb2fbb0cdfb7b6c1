"""Links: what one stage of a chain of networks minimises, at a temperature or under attack.

z are the logits of the network being trained, t those of its frozen teacher, p = p_1,
p_T(z) = softmax(z / T). KL to a fixed target has the gradients of cross-entropy to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from robustify.attacks.pgd import pgd, survives_pgd
from robustify.errors import ModelError, UsageError
from robustify.fold import constant
from robustify.frozen import Frozen
from robustify.losses import cross_entropy, kl_from_probabilities
from robustify.models import Classifier
from robustify.noise import Noise
from robustify.objective import Objective, accuracy, is_from_scratch
from robustify.threat import ThreatModel

log = logging.getLogger(__name__)

SATURATED = 10.0  # above it, served logits hide the gradient of cross-entropy
TRANSFER_SAMPLE = 16  # adversarial images per batch that are shown to the teacher too
TEACHER_SAMPLE = 512  # training images on which a teacher's robustness is tried


@dataclass(eq=False, repr=False, kw_only=True)
class Tempered(Objective):
    """L = CE(y, p_T(z)): hard labels at a temperature, without T²."""

    temperature: float

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        logits = self.student(images)
        return {
            "loss": cross_entropy(logits / self.temperature, labels).mean(),
            "clean accuracy": accuracy(logits, labels),
        }


@dataclass(eq=False, repr=False, kw_only=True)
class SoftLabels(Objective):
    """L = hard_weight · CE(y, p(z)) + soft_weight · KL(p_label_temperature(t), p_temperature(z)).

    `offline` labels are read once, before the first step: exact only for training images that are
    not augmented, for which they equal online ones.
    """

    teacher: Frozen
    label_temperature: float
    temperature: float
    hard_weight: float
    soft_weight: float
    offline: bool
    table: Tensor | None = field(default=None, init=False)  # offline labels by index of the image

    def prepare(self, batches: Iterator[tuple[Tensor, Tensor, Noise]]) -> None:
        """Read the offline labels."""
        if not self.offline:
            return
        keys, labels = [], []
        for images, _, noise in batches:
            keys.append(noise.keys)
            labels.append(self._read(images))
        key, label = torch.cat(keys), torch.cat(labels)
        self.table = label.new_full((int(key.max()) + 1, label.shape[1]), torch.nan)
        self.table[key] = label

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        soft = self._read(images) if self.table is None else self.table[noise.keys]
        logits = self.student(images)
        hard = cross_entropy(logits, labels).mean()
        distilled = kl_from_probabilities(soft, logits, temperature=self.temperature).mean()
        return {
            "loss": self.hard_weight * hard + self.soft_weight * distilled,
            "soft labels": distilled,
            "clean accuracy": accuracy(logits, labels),
        }

    @torch.no_grad()
    def _read(self, images: Tensor) -> Tensor:
        logits: Tensor = self.teacher(images)
        return (logits / self.label_temperature).softmax(1)


@dataclass(eq=False, repr=False, kw_only=True)
class RobustLink(Objective):
    """L = adv_weight · KL(q, p_T(z(x*))) + clean_weight · KL(q, p_T(z(x))),  q = p_tau(t(x)).

    x* maximises KL(q, p(z(x'))), as in RSLAD, or, for `attack_target` label, CE(z(x'), y), as in
    ARD; the teacher reads clean images. T is `temperature`, tau `teacher_temperature`.
    """

    teacher: Frozen
    threat: ThreatModel
    attack: Mapping[str, Any]
    attack_target: Literal["teacher", "label"]
    teacher_temperature: float
    temperature: float
    adv_weight: float
    clean_weight: float

    def prepare(self, batches: Iterator[tuple[Tensor, Tensor, Noise]]) -> None:
        """Raise `UsageError` for a given teacher that is not robust: under PGD not above chance, as
        an undefended network is. One that this run trained is as good as its budget."""
        if is_from_scratch(self.teacher.network):  # type: ignore[arg-type]
            return
        right, tried = 0, 0
        for images, labels, noise in batches:
            survives = survives_pgd(
                self.teacher, images, labels, self.threat, steps=10, noise=noise
            )
            right, tried = right + int(survives.sum()), tried + len(images)
            if tried >= TEACHER_SAMPLE:
                break
        if right * self.student.num_classes <= tried:
            raise UsageError(
                f"expected a robust teacher, but PGD-10 at {self.threat} leaves it right on "
                f"{right} of {tried} training images; train one by pgd_at or trades, or leave "
                "--teacher out"
            )

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        with torch.no_grad():
            soft = (self.teacher(images) / self.teacher_temperature).softmax(1)
        with constant(self.student, images) as student:
            by_target = {
                "teacher": lambda x: kl_from_probabilities(soft, student(x)),
                "label": lambda x: cross_entropy(student(x), labels),
            }
            images_adv = pgd(
                by_target[self.attack_target], images, self.threat, noise=noise, **self.attack
            )
        logits_adv = self.student(images_adv)
        logits = self.student(images)
        adversarial = kl_from_probabilities(soft, logits_adv, temperature=self.temperature).mean()
        clean = kl_from_probabilities(soft, logits, temperature=self.temperature).mean()
        with torch.no_grad():
            teacher_adv = self.teacher(images_adv[:TRANSFER_SAMPLE])
        return {
            "loss": self.adv_weight * adversarial + self.clean_weight * clean,
            "adversarial": adversarial,
            "clean": clean,
            "robust accuracy": accuracy(logits_adv, labels),
            "transferability": 1 - accuracy(teacher_adv, labels[:TRANSFER_SAMPLE]),
        }


@torch.no_grad()
def scale_logits(classifier: Classifier, factor: float) -> None:
    """Multiply the last layer, and so the logits, by `factor`. Raises `ModelError` where the last
    layer is not linear."""
    if factor == 1:
        return
    head = classifier.module.get_classifier()  # type: ignore[operator]
    if not isinstance(head, torch.nn.Linear | torch.nn.Conv2d):
        raise ModelError(
            f"expected a linear last layer to scale, got {type(head).__name__} in "
            f"{classifier.architecture}; set temperature_training=plain"
        )
    for parameter in head.parameters():
        parameter.mul_(factor)


def check_temperature(temperature: float) -> None:
    """Raise `UsageError` for a temperature that is none, and warn of one that saturates logits."""
    if not temperature > 0:
        raise UsageError(f"expected a temperature above 0, got {temperature:g}")
    if temperature > SATURATED:
        log.warning(
            "temperature %g: served logits saturate, so attacks on cross-entropy see no gradient, "
            "and robust accuracies under them mean nothing", temperature,
        )  # fmt: skip


def check_same(architecture: str, names: Sequence[str]) -> None:
    """Raise `UsageError` unless all of `names` can start from the weights of `architecture`."""
    others = set(names) - {architecture, architecture.removesuffix("_small")}
    if others:
        raise UsageError(
            f"expected assistants of the student's architecture {architecture}, got {min(others)}; "
            "to start each network from its own weights, set shared_init=false"
        )
