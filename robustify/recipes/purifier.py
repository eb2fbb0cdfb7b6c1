"""Distillation-based purification (our reading), and end to end (our adaptive variant).

Koo, Chae and Lee, "Improving adversarial robustness via distillation-based purification", Applied
Sciences 2023, 13(20), 11313. Our variant rests on JATP (arXiv 2106.05453), AToP (glin2022/atop) and
RSLAD (arXiv 2108.07969); the guidance on HGD, `stability` on Denoised
Smoothing. f: logits of the untouched classifier; N, A, S: normal teacher, adversarial teacher and
student, each image -> image; MSE and KL one value per image; sg stops the gradient.

paper_like   x^f = images_adv against f ALONE: half by PGD, half by FGSM, each at eps/2 or eps
    L_N = MSE(N(x), x)          L_A = MSE(A(x^f), x)
    L_S = ensemble_weight · [MSE(S(x^f), sg A(x^f)) + MSE(S(x), sg N(x))]                  routed
        + data_weight · [MSE(S(x^f), x) + MSE(S(x), x)]
        + guidance_weight · [KL(sg p(f(A(x^f))), p(f(S(x^f)))) + KL(sg p(f(N(x))), p(f(S(x))))]
adaptive     continues from these; x* = argmax over the ball of CE(f(g(x')), y), through g
    L_A = CE(t, f(A(x*))) + 0.5 CE(t, f(A(x))) + w [MSE(A(x*), x) + MSE(A(x), x)]
    L_S = 5/6 KL(sg p(f(A(x))), p(f(S(x*)))) + 1/6 KL(sg p(f(N(x))), p(f(S(x))))
        + w [MSE(S(x*), sg A(x)) + MSE(S(x), sg N(x))]                             clean_target

w is pixel_weight; t is y, or sg p(f(x)) with target=stability, whose attacks aim away from f's own
answer: no label is read. Routing says what A is asked for the target of S(x^f) and S(x*): `routed`
that image, `clean_target` x, because A may err on images_adv against S; `average` takes (A + N)/2,
a documented failure: N(x^f) is about x^f, so half of the perturbation is handed back.

Certain (abstract): two autoencoder teachers, one of them adversarial; ensemble distillation into a
student before an unchanged classifier. Inferred: crafting on f alone; routing. Our choice: the
network, every weight, mode adaptive. An epoch visits an image once and f never changes, so crafting
x^f in the step, on the augmented image, IS crafting it once per epoch; adv_recraft=once repeats the
same random numbers in every epoch, which is crafting once where nothing is augmented.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from robustify.attacks.pgd import pgd
from robustify.crafting import against_classifier, grown
from robustify.fold import constant
from robustify.losses import cross_entropy, kl, soft_cross_entropy
from robustify.models import Classifier
from robustify.noise import Noise
from robustify.objective import Objective, accuracy, check_teachers, is_from_scratch
from robustify.purifier import Ensemble, Purified, Purifier, Routing, Size, mse
from robustify.recipes.standard import Standard
from robustify.threat import ThreatModel

Crafting = Callable[[Classifier, Tensor, Tensor, Noise], Tensor]
_ORDINARY = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4, "averaging": "none",
             "awp_gamma": 0.0, "clip_grad": None, "select": "clean"}  # fmt: skip
_NOTICES = {
    "adaptive": "Distillation-based purification (our adaptive variant), trained end to end with "
    "one classifier: the robustness belongs to that pair.",
    "paper_like": "Distillation-based purification (our reading): trained on attacks against the "
    "classifier alone; grey-box accuracy says nothing about who knows the purifier.",
}


def stages(
    student: Classifier,
    teachers: Sequence[Classifier],
    *,
    threat: ThreatModel,
    attack: Mapping[str, Any],
    mode: Literal["adaptive", "paper_like"] = "adaptive",
    taught_by: Literal["both", "adversarial", "normal", "mix", "none"] = "both",
    routing: Routing | None = None,
    target: Literal["label", "stability"] = "label",
    size: Size = "student",
    teacher_size: Size = "teacher",
    ensemble_weight: float = 1.0,
    data_weight: float = 1.0,
    guidance_weight: float = 0.1,
    pixel_weight: float = 10.0,
    adv_recraft: Literal["epoch", "once"] = "epoch",
    eps_ramp: float = 0.1,
    static_epochs: int | None = None,
) -> Iterator[Objective]:
    """`student` is the classifier to protect: it stays as it is, after an ordinary training stage
    where it is a plain architecture or has new parts. Then the teachers of `taught_by` (`mix`: one,
    on both kinds of images), the student, and in mode adaptive A and S again, end to end, while eps
    grows over `eps_ramp` epochs (below 1: of all). `static_epochs`: of the stages before these."""
    check_teachers(student, teachers, roles=0)
    if is_from_scratch(student):
        yield Standard(student=student, name="classifier", training_changes=_ORDINARY)
    stability = target == "stability"
    crafting = partial(against_classifier, threat=threat, attack=attack, own_answers=stability,
                       once=adv_recraft == "once")  # fmt: skip
    early = {"epochs": static_epochs} if static_epochs and mode == "adaptive" else {}
    taught = yield from _teachers(student, taught_by, teacher_size, crafting, early)
    purified = Purified(Purifier(student.in_chans, size), student)
    record = {"mode": mode, "taught_by": taught_by, "notices": [_NOTICES[mode]]}
    yield Static(
        student=purified, name="student" if mode == "paper_like" else "static student",
        crafting=crafting, ensemble=Ensemble.of(taught, routing or "routed"),
        adv_weight=data_weight, clean_weight=data_weight, ensemble_weight=ensemble_weight,
        guidance_weight=guidance_weight, training_changes=early, record=record,
    )  # fmt: skip
    if mode == "paper_like":
        return
    end_to_end = partial(EndToEnd, threat=threat, attack=attack, pixel_weight=pixel_weight,
                         stability=stability, eps_ramp=eps_ramp)  # fmt: skip
    if "adversarial" in taught:
        robust = taught["adversarial"]
        yield end_to_end(student=robust, name="end-to-end teacher", ensemble=None)
    ensemble = Ensemble.of(taught, routing or "clean_target")
    yield end_to_end(student=purified, ensemble=ensemble, record=record)


def _teachers(
    student: Classifier,
    taught_by: str,
    size: Size,
    crafting: Crafting,
    early: Mapping[str, Any],
) -> Generator[Objective, None, dict[str, Purified]]:
    """N by L_N, then A by L_A, as far as they are asked for."""
    static, taught = partial(Static, crafting=crafting, ensemble=None), dict[str, Purified]()
    if taught_by in ("both", "normal"):
        taught["normal"] = Purified(Purifier(student.in_chans, size), student)
        yield static(student=taught["normal"], name="normal teacher", adv_weight=0.0,
                     training_changes={**early, "select": "clean"})  # fmt: skip
    if taught_by in ("both", "adversarial", "mix"):
        taught["adversarial"] = Purified(Purifier(student.in_chans, size), student)
        yield static(student=taught["adversarial"], name="adversarial teacher",
                     clean_weight=float(taught_by == "mix"), training_changes=early)  # fmt: skip
    return taught


@dataclass(eq=False, repr=False, kw_only=True)
class Static(Objective):
    """Teachers and student of mode paper_like: images_adv do not know the purifier."""

    student: Purified
    crafting: Crafting
    ensemble: Ensemble | None  # no default: an attribute of the class would hide the module
    adv_weight: float = 1.0
    clean_weight: float = 1.0
    ensemble_weight: float = 0.0
    guidance_weight: float = 0.0

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        f, g, loss = self.student.classifier, self.student.purifier, images.new_zeros(len(images))
        images_adv = purified_adv = purified = images
        if self.adv_weight or self.ensemble is not None:
            images_adv = self.crafting(f, images, labels, noise)
            purified_adv = g(images_adv)
            loss = loss + self.adv_weight * mse(purified_adv, images)
        if self.clean_weight or self.ensemble is not None:
            purified = g(images)
            loss = loss + self.clean_weight * mse(purified, images)
        terms = {"data": loss.mean()}
        if self.ensemble is not None:
            target_adv, target = self.ensemble.targets(images_adv, images)
            taught = mse(purified_adv, target_adv) + mse(purified, target)
            loss, terms["ensemble"] = loss + self.ensemble_weight * taught, taught.mean()
            if self.guidance_weight:
                with torch.no_grad():
                    soft_adv, soft = f(target_adv), f(target)
                guided = kl(soft_adv, f(purified_adv)) + kl(soft, f(purified))
                loss, terms["guidance"] = loss + self.guidance_weight * guided, guided.mean()
        return {"loss": loss.mean(), **terms}


@dataclass(eq=False, repr=False, kw_only=True)
class EndToEnd(Objective):
    """Mode adaptive: the robust teacher (and the student, where nobody teaches it) without
    `ensemble`, the student with it. Attacks go through the purifier."""

    student: Purified
    ensemble: Ensemble | None
    threat: ThreatModel
    attack: Mapping[str, Any]
    pixel_weight: float
    stability: bool
    eps_ramp: float

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        f, g = self.student.classifier, self.student.purifier
        with torch.no_grad():
            hard = one_hot(labels, self.student.num_classes).to(images)
            soft = f(images).softmax(1) if self.stability else hard
        images_adv = self._attack(images, soft.argmax(1), noise)
        purified_adv, purified = g(images_adv), g(images)
        logits_adv, logits = f(purified_adv), f(purified)
        if self.ensemble is None:
            target_adv = target = images
            robust = soft_cross_entropy(soft, logits_adv)
            clean = 0.5 * soft_cross_entropy(soft, logits)
        else:
            target_adv, target = self.ensemble.targets(images_adv, images)
            with torch.no_grad():
                soft_adv, soft = f(target_adv), f(target)
            robust, clean = 5 / 6 * kl(soft_adv, logits_adv), 1 / 6 * kl(soft, logits)
        pixels = mse(purified_adv, target_adv) + mse(purified, target)
        return {
            "loss": (robust + clean + self.pixel_weight * pixels).mean(),
            "pixels": pixels.mean(),
            "robust accuracy": accuracy(logits_adv, labels),
        }

    def _attack(self, images: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        """x*, at the eps that is due in this epoch."""
        threat, attack = grown(self.threat, self.attack, ramp=self.eps_ramp, epoch=self.epoch,
                               epochs=self.epochs)  # fmt: skip
        with constant(self.student, images) as student:
            return pgd(
                lambda x: cross_entropy(student(x), labels), images, threat, noise=noise, **attack
            )
