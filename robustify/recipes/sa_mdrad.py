"""SA-MDRAD (our reconstruction): several standard teachers, rectified and fused for every image (Li
et al., "SA-MDRAD: sample-adaptive multi-teacher dynamic rectification adversarial distillation",
Multimedia Systems 30, 225, 2024, doi 10.1007/s00530-024-01416-7).

    r_k(u) = R(z_k(u), y),  w_k(u) from -log p(z_k(u))_y        rectified, weighed: robustify.fusion
    q_T(u) = sum_k w_k(u) p_T(r_k(u))                                    fused target, no gradient
    x* = argmax over the ball of KL(q_1(x), p(s(x')))    inner maximisation, student in eval mode
    L_logit = T² · (adv_weight · KL(q_T(x*), p_T(s(x*))) + clean_weight · KL(q_T(x), p_T(s(x))))
    L_feat  = 1/2 · sum_{u = x*, x} sum_k v_k · mean( (P_k(F_s(u)) - standardized F_k(x))² )
    L = L_logit + feature_weight · ramp · L_feat + ce_weight · CE(s(x*), y)

s, z_k are logits and F_s, F_k last feature maps of the student and of K frozen teachers, p = p_1,
p_T(v) = softmax(v / T), P_k a projector that is trained with the student and left behind, v_k the
weights at x of the teachers that are right there. Features are never read at x*: copying them is
copying a network without robustness. At T = 4 the effective weights per image are 13.33 and 2.67.

The paper's text is not public, only its abstract, which has (certain) standard teachers of several
families, logits and features, rectification and fusion for every image. Likely: that these are the
swap of DRKD and the weights of CA-MKD, as no other cited work matches, and that logits are read at
x*; `adv_view: clean` reads them at x, where rectification hardly ever acts. Ours, each a setting:
raw logits for the weights, standardized features, the ramp, no hard labels, every weight, T, and
the number and families of the teachers; and the gate in v. Under `balance: mtard` the two weights
add up to 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from robustify.attacks.pgd import pgd
from robustify.balance import Balance
from robustify.features import FeatureMatch
from robustify.fold import constant
from robustify.fusion import Fusion, Panel, Reading, gated
from robustify.losses import cross_entropy, kl, kl_from_probabilities
from robustify.models import Classifier, like
from robustify.noise import Noise
from robustify.objective import Objective, accuracy, check_teachers
from robustify.recipes.standard import standard_teacher
from robustify.threat import ThreatModel

GO_NO_GO = "not run: whether adv_view adv or clean serves better was not measured on this data"
INERT = "The teachers were read at clean images only: their rectification is nearly inert."


def stages(
    student: Classifier,
    teachers: Sequence[Classifier],
    *,
    threat: ThreatModel,
    attack: Mapping[str, Any],
    families: Sequence[str] = ("vgg16_bn", "densenet121", "resnet34"),
    adv_view: Literal["adv", "clean"] = "adv",
    rectification: Literal["swap", "partial_trust", "none"] = "swap",
    trust_from: float = 0.3,
    weights_from: Literal["raw", "rectified", "uniform"] = "raw",
    weight_temperature: float | None = None,
    attack_objective: Literal["kl", "ce", "trades", "teacher_in_loop"] = "kl",
    temperature: float = 4.0,
    adv_weight: float = 5 / 6,
    clean_weight: float = 1 / 6,
    balance: Literal["fixed", "mtard"] = "fixed",
    feature_weight: float = 1.0,
    feature_ramp_epochs: int = 5,
    standardize: bool = True,
    ce_weight: float = 0.0,
) -> Iterator[Objective]:
    """The teachers that are not there yet, then the student. `families` are the architectures that
    are trained where no teacher is given; one given by its architecture alone is trained too.
    `partial_trust` replaces rectification by IAD's trust, from the epoch `trust_from` on."""
    check_teachers(student, teachers, roles=len(teachers))
    taught = []
    for teacher in teachers or [like(student, family) for family in families]:
        taught.append((yield from standard_teacher(student, [teacher], architecture=None)))
    record = {"method": "SA-MDRAD (our reconstruction)", "adv_view": adv_view,
              "teachers": [teacher.architecture for teacher in taught], "go_no_go": GO_NO_GO,
              "notices": [INERT] if adv_view == "clean" else []}  # fmt: skip
    panel = Panel(taught)
    fusion = Fusion(rectification=rectification, weights_from=weights_from,
                    weight_temperature=weight_temperature)  # fmt: skip
    yield SaMdrad(
        student=student, teachers=panel, threat=threat, attack=attack, record=record,
        fusion=fusion, adv_view=adv_view, trust_from=trust_from, temperature=temperature,
        attack_objective=attack_objective, adv_weight=adv_weight, clean_weight=clean_weight,
        balance=Balance() if balance == "mtard" else None, ce_weight=ce_weight,
        feature_weight=feature_weight, feature_ramp_epochs=feature_ramp_epochs,
        features=FeatureMatch(student, panel, standardize=standardize) if feature_weight else None,
    )  # fmt: skip


@dataclass(eq=False, repr=False, kw_only=True)
class SaMdrad(Objective):
    """Fused targets for the student's logits, projected features towards each teacher's."""

    teachers: Panel
    threat: ThreatModel
    attack: Mapping[str, Any]
    adv_view: Literal["adv", "clean"]
    fusion: Fusion
    trust_from: float
    attack_objective: Literal["kl", "ce", "trades", "teacher_in_loop"]
    temperature: float
    adv_weight: float
    clean_weight: float
    balance: Balance | None
    feature_weight: float
    feature_ramp_epochs: int
    features: FeatureMatch | None
    ce_weight: float

    def prepare(self, batches: Iterator[tuple[Tensor, Tensor, Noise]]) -> None:
        """Mean and deviation of the teachers' features."""
        if self.features is not None:
            self.features.look(self.teachers.features(images)[1] for images, _, _ in batches)

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        taught, maps = self.teachers.features(images)
        read = read_adv = self.fusion.read(taught, labels)
        images_adv = self._attack(images, labels, read, noise)
        if self.adv_view == "adv":
            with torch.no_grad():
                read_adv = self.fusion.read(self.teachers(images_adv), labels)

        logits_adv, map_adv = self.student.features(images_adv)
        logits, map_clean = self.student.features(images)

        T = self.temperature
        own = logits.detach() if self._trusts_in_part() else None
        q_adv = self.fusion.target(read_adv, labels, T, own=own)
        q_clean = self.fusion.target(read, labels, T, own=own)
        adversarial = T**2 * kl_from_probabilities(q_adv, logits_adv, temperature=T).mean()
        clean = T**2 * kl_from_probabilities(q_clean, logits, temperature=T).mean()
        logit = self.adv_weight * adversarial + self.clean_weight * clean
        if self.balance is not None:
            logit = self.balance(adversarial, clean, lr_scale=self.lr_scale)

        features, apart = logits.new_zeros(()), dict[str, Tensor]()
        if self.features is not None:
            v = gated(read.weights, read.logits, labels)
            features, apart = self.features.of_both(map_adv, map_clean, maps, v)
        ramp = min(1.0, self.epoch / self.feature_ramp_epochs) if self.feature_ramp_epochs else 1.0
        ce = cross_entropy(logits_adv, labels).mean()
        return {
            "loss": logit + self.feature_weight * ramp * features + self.ce_weight * ce,
            "adversarial": adversarial, "clean": clean, "features": features, "cross-entropy": ce,
            "robust accuracy": accuracy(logits_adv, labels),
            **apart, **self._read_terms(read, read_adv, labels),
        }  # fmt: skip

    def _read_terms(self, read: Reading, read_adv: Reading, labels: Tensor) -> dict[str, Tensor]:
        terms = self.fusion.terms(read, labels, "clean")
        if self.adv_view == "adv":
            terms |= self.fusion.terms(read_adv, labels, "adversarial")
        return terms

    def _attack(self, images: Tensor, labels: Tensor, read: Reading, noise: Noise) -> Tensor:
        """images_adv against the student; teachers in the loop keep their weights at x."""
        with constant(self.student, images) as student:
            needed = self.attack_objective == "trades" or self._trusts_in_part()
            with torch.no_grad():
                clean = student(images) if needed else images.new_empty(0)
            own = clean if self._trusts_in_part() else None
            target = self.fusion.target(read, labels, 1.0, own=own)

            def against_teachers(x: Tensor) -> Tensor:
                live = Reading(self.teachers(x), read.weights)
                q = self.fusion.target(live, labels, 1.0, own=own)
                return kl(q.clamp_min(1e-12).log(), student(x))

            by_objective = {
                "kl": lambda x: kl_from_probabilities(target, student(x)),
                "ce": lambda x: cross_entropy(student(x), labels),
                "trades": lambda x: kl(clean, student(x)),
                "teacher_in_loop": against_teachers,
            }
            return pgd(
                by_objective[self.attack_objective], images, self.threat, noise=noise, **self.attack
            )

    def _trusts_in_part(self) -> bool:
        return self.fusion.rectification == "partial_trust" and self.reached(self.trust_from)
