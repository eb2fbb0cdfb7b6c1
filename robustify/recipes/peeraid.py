"""PeerAiD: a peer trained with the student, on attacks against the student (Jung et al., CVPR 2024,
arXiv 2403.06668).

    t  = P(x)                                               peer in eval mode, no gradient
    x* = argmax over the ball of KL(p_1(t), p_1(S(x')))     student in eval mode
    L  = ce_weight · CE(S(x*), y) + kd_weight · KL(p_T(sg P(x*)), p_T(S(x*)))
         + consistency_weight · KL(p_T(S(x)), p_T(S(x*)))                            the student's
         + peer_ce_weight · CE(P(x*), y) + peer_kd_weight · KL(p_Tp(S(x*)), p_Tp(P(x*)))  the peer's

S and P are logits, p_T(z) = softmax(z / T), sg stops the gradient. One backward and one step for
both networks, at the same parameters. Two things are easily "repaired" by accident and must not be:
S(x) is not detached (as in TRADES), and S(x*) in the peer's KL is not either.

The weights are effective ones: the paper's lambda1, lambda2 and lambda3 are ce_weight, kd_weight
and consistency_weight, its gamma1 and gamma2 peer_ce_weight and peer_kd_weight, each with T² and
the official code's division by the class count worked in (lambda2 · T² / K = 1 · 25 / 10 for
CIFAR-10).
Certain, from the official program's behaviour: order of the step, modes, stop-gradients, weights.
Our choice: one forward of S(x*) where the official program makes two, with BatchNorm moved as if
there were two; the same gradients for a ninth less work.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from robustify.attacks.pgd import pgd
from robustify.errors import UsageError
from robustify.fold import constant
from robustify.losses import cross_entropy, kl
from robustify.models import Classifier, like
from robustify.noise import Noise
from robustify.objective import Objective, accuracy, batchnorm_updates, check_teachers, evaluating
from robustify.threat import ThreatModel


def stages(
    student: Classifier,
    teachers: Sequence[Classifier],
    *,
    threat: ThreatModel,
    attack: Mapping[str, Any],
    peer: str | None = None,
    ce_weight: float = 0.0,
    kd_weight: float = 2.5,
    consistency_weight: float = 2.5,
    peer_ce_weight: float = 1.0,
    peer_kd_weight: float = 0.01,
    temperature: float = 5.0,
    peer_temperature: float = 1.0,
    attack_target: Literal["peer", "label"] = "peer",
    detach_student_in_peer_loss: bool = False,
    reuse_student_adv_forward: bool = True,
    bn_double_adv_update: bool = True,
) -> Iterator[Objective]:
    """One stage. `peer` names the peer's architecture or weights, by default the student's
    architecture from scratch; the last four settings are the ablations and the faithful variant
    (`reuse_student_adv_forward=False`)."""
    check_teachers(student, teachers, roles=0)
    if attack_target not in ("peer", "label"):
        raise UsageError(f"expected attack_target peer or label, got {attack_target!r}")
    yield PeerAid(
        student=student, peer=like(student, peer), threat=threat, attack=attack,
        ce_weight=ce_weight, kd_weight=kd_weight, consistency_weight=consistency_weight,
        peer_ce_weight=peer_ce_weight, peer_kd_weight=peer_kd_weight, temperature=temperature,
        peer_temperature=peer_temperature, attack_target=attack_target,
        detach_student_in_peer_loss=detach_student_in_peer_loss,
        reuse_student_adv_forward=reuse_student_adv_forward,
        bn_double_adv_update=bn_double_adv_update,
    )  # fmt: skip


@dataclass(eq=False, repr=False, kw_only=True)
class PeerAid(Objective):
    """Student and peer, trained together. The peer is accurate on the student's adversarial images
    and has no robustness of its own: it is never evaluated, shipped or called robust."""

    peer: Classifier
    threat: ThreatModel
    attack: Mapping[str, Any]
    ce_weight: float
    kd_weight: float
    consistency_weight: float
    peer_ce_weight: float
    peer_kd_weight: float
    temperature: float
    peer_temperature: float
    attack_target: Literal["peer", "label"]
    detach_student_in_peer_loss: bool
    reuse_student_adv_forward: bool
    bn_double_adv_update: bool

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        images_adv = self._attack(images, labels, noise)

        peer_adv = self.peer(images_adv)
        student_adv, student_adv_again = self._student_on(images_adv)
        student_clean = self.student(images)

        taught_by = student_adv.detach() if self.detach_student_in_peer_loss else student_adv
        peer_ce = cross_entropy(peer_adv, labels).mean()
        peer_kd = kl(taught_by, peer_adv, temperature=self.peer_temperature).mean()
        peer_loss = self.peer_ce_weight * peer_ce + self.peer_kd_weight * peer_kd

        ce = cross_entropy(student_adv_again, labels).mean()
        kd = kl(peer_adv.detach(), student_adv_again, temperature=self.temperature).mean()
        consistency = kl(student_clean, student_adv_again, temperature=self.temperature).mean()
        student_loss = (
            self.ce_weight * ce + self.kd_weight * kd + self.consistency_weight * consistency
        )
        return {
            "loss": student_loss + peer_loss,
            "student loss": student_loss,
            "peer loss": peer_loss,
            "robust accuracy": accuracy(student_adv, labels),
            "peer accuracy on student's attack": accuracy(peer_adv, labels),
        }

    def _attack(self, images: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        """images_adv against the student; the target is the peer on the clean image."""
        with evaluating(self.peer), torch.no_grad():
            target = self.peer(images)
        with constant(self.student, images) as student:
            by_target = {
                "peer": lambda x: kl(target, student(x)),
                "label": lambda x: cross_entropy(student(x), labels),
            }
            return pgd(
                by_target[self.attack_target], images, self.threat, noise=noise, **self.attack
            )

    def _student_on(self, images_adv: Tensor) -> tuple[Tensor, Tensor]:
        """S(x*) for the peer's loss and for the student's own. BatchNorm ends as after two
        forwards: old · 0.729 + adversarial · 0.171 + clean · 0.1 with the clean one to come."""
        if not self.reuse_student_adv_forward:
            return self.student(images_adv), self.student(images_adv)
        with batchnorm_updates(self.student, 2 if self.bn_double_adv_update else 1):
            logits = self.student(images_adv)
        return logits, logits
