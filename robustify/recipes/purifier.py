"""Distillation-based purification (our reading) and its end-to-end variant (our adaptive variant).

I. Koo, D.-K. Chae and S.-C. Lee, "Improving adversarial robustness via distillation-based
purification", Applied Sciences 2023, 13(20), 11313. Our variant rests on JATP (arXiv 2106.05453),
AToP (glin2022/atop) and RSLAD (arXiv 2108.07969); the guidance on HGD, `stability` on Denoised
Smoothing. f: logits of the untouched classifier; N, A, S: normal teacher, adversarial teacher,
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

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from robustify.attacks.pgd import pgd
from robustify.errors import UsageError
from robustify.fold import constant
from robustify.losses import cross_entropy, kl, soft_cross_entropy
from robustify.models import Classifier
from robustify.noise import Noise
from robustify.objective import Frozen, Objective, accuracy, is_from_scratch
from robustify.purifier import Purified, Purifier, Size
from robustify.recipes.standard import Standard
from robustify.threat import ThreatModel

Routing = Literal["routed", "clean_target", "average"]
ROBUST, CLEAN = 5 / 6, 1 / 6  # RSLAD's split
_ORDINARY = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 5e-4, "averaging": "none",
             "clip_grad": None, "select": "clean"}  # fmt: skip

_NOTICES = {
    "adaptive": "Distillation-based purification (our adaptive variant): purifier and classifier "
    "were trained end to end as one system; the robustness belongs to this pair.",
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
    if teachers:
        raise UsageError("expected no --teacher: the recipe trains its own purifiers as teachers")
    if is_from_scratch(student) or "replaced" in student.about:
        yield Standard(student=student, name="classifier", training_changes=_ORDINARY)
    crafting = Crafting(threat, attack, target == "stability", adv_recraft == "once", eps_ramp)
    early = {"epochs": static_epochs} if static_epochs and mode == "adaptive" else {}
    record = {"mode": mode, "taught_by": taught_by, "notices": [_NOTICES[mode]]}
    normal = adversarial = None
    if taught_by in ("both", "normal"):
        normal = Purified(Purifier(student.in_chans, teacher_size), student)
        yield Restoring(
            student=normal, name="normal teacher", crafting=crafting, adv_weight=0.0,
            clean_weight=1.0, training_changes={**early, "select": "clean"},
        )  # fmt: skip
    if taught_by in ("both", "adversarial", "mix"):
        adversarial = Purified(Purifier(student.in_chans, teacher_size), student)
        yield Restoring(
            student=adversarial, name="adversarial teacher", crafting=crafting, adv_weight=1.0,
            clean_weight=float(taught_by == "mix"), training_changes=early,
        )  # fmt: skip
    purified = Purified(Purifier(student.in_chans, size), student)
    yield StaticStudent(
        student=purified, record=record,
        name="student" if mode == "paper_like" else "static student",
        ensemble=Ensemble.of(adversarial, normal, routing or "routed"), crafting=crafting,
        ensemble_weight=ensemble_weight, data_weight=data_weight, guidance_weight=guidance_weight,
        training_changes=early,
    )  # fmt: skip
    if mode == "paper_like":
        return
    end_to_end: dict[str, Any] = {
        "crafting": crafting,
        "pixel_weight": pixel_weight,
        "record": record,
    }
    if adversarial is not None:
        yield EndToEnd(student=adversarial, name="robust teacher", **end_to_end)
    ensemble = Ensemble.of(adversarial, normal, routing or "clean_target")
    if ensemble is None:
        yield EndToEnd(student=purified, **end_to_end)
    else:
        yield EndToEndStudent(student=purified, ensemble=ensemble, **end_to_end)


@dataclass(frozen=True)
class Crafting:
    """How adversarial images are made, on the classifier alone and through the purifier."""

    threat: ThreatModel
    attack: Mapping[str, Any]
    stability: bool = False
    once: bool = False
    eps_ramp: float = 0.0

    def alone(self, f: Classifier, images: Tensor, labels: Tensor, noise: Noise) -> Tensor:
        """x^f: FGSM for half of the images, PGD for the others, each at eps/2 or eps."""
        if self.once:
            noise = Noise(noise.seed, noise.keys)
        drawn = noise.fork(1).uniform(images[:, :2, :1, :1].expand(-1, 2, -1, -1)).flatten(1)
        one_step: dict[str, Any] = {"steps": 1, "step_size": self.threat.eps, "start": "images"}
        images_adv = images.clone()
        with constant(f, images) as classifier:
            labels = self._labels(classifier(images), labels)
            for half, eps_scale in ((drawn[:, 1] < 0.5, 0.5), (drawn[:, 1] >= 0.5, 1.0)):
                for few, attack in (
                    (drawn[:, 0] < 0.5, one_step),
                    (drawn[:, 0] >= 0.5, self.attack),
                ):
                    rows = (half & few).nonzero().squeeze(1)
                    images_adv[rows] = self._pgd(
                        classifier, images[rows], labels[rows], noise[rows], eps_scale, attack
                    )
        return images_adv

    def end_to_end(
        self, objective: Objective, images: Tensor, labels: Tensor, noise: Noise
    ) -> Tensor:
        """x*: through purifier and classifier, in eval mode, eps grown as far as training is."""
        ramp = self.eps_ramp * objective.epochs if self.eps_ramp < 1 else self.eps_ramp
        eps_scale = min(1.0, (objective.epoch + 1) / ramp) if ramp else 1.0
        assert isinstance(objective.student, Purified)
        with torch.no_grad():
            labels = self._labels(objective.student.classifier(images), labels)
        with constant(objective.student, images) as student:
            return self._pgd(student, images, labels, noise, eps_scale, self.attack)

    def _labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        return logits.argmax(1) if self.stability else labels

    def _pgd(self, network: Any, images: Tensor, labels: Tensor, noise: Noise, eps_scale: float,
             attack: Mapping[str, Any]) -> Tensor:  # fmt: skip
        threat = ThreatModel(self.threat.norm, self.threat.eps * eps_scale)
        scaled = {**attack, "step_size": attack["step_size"] * eps_scale}
        return pgd(
            lambda x: cross_entropy(network(x), labels), images, threat, noise=noise, **scaled
        )


class Ensemble(nn.Module):
    """Two frozen purifiers and who answers for what."""

    def __init__(self, adversarial: nn.Module, normal: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.adversarial, self.normal = Frozen(adversarial), Frozen(normal)
        self.routing = routing

    @classmethod
    def of(
        cls, adversarial: Purified | None, normal: Purified | None, routing: Routing
    ) -> Ensemble | None:
        """Copies of the teachers as they are now; one alone takes both parts, none is None."""
        first, second = adversarial or normal, normal or adversarial
        if first is None or second is None:
            return None
        return cls(copy.deepcopy(first.purifier), copy.deepcopy(second.purifier), routing)

    @torch.no_grad()
    def forward(self, images_adv: Tensor, images: Tensor) -> tuple[Tensor, Tensor]:
        """Target images for S(images_adv) and for S(images)."""
        if self.routing == "average":
            both = [(self.adversarial(x) + self.normal(x)) / 2 for x in (images_adv, images)]
            return both[0], both[1]
        asked = images_adv if self.routing == "routed" else images
        return self.adversarial(asked), self.normal(images)


@dataclass(eq=False, repr=False, kw_only=True)
class Restoring(Objective):
    """A teacher of mode paper_like, adversarial, normal or mixed: gives the original image back."""

    student: Purified
    crafting: Crafting
    adv_weight: float
    clean_weight: float

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        purifier, loss = self.student.purifier, images.new_zeros(())
        if self.adv_weight:
            images_adv = self.crafting.alone(self.student.classifier, images, labels, noise)
            loss = loss + self.adv_weight * mse(purifier(images_adv), images).mean()
        if self.clean_weight:
            loss = loss + self.clean_weight * mse(purifier(images), images).mean()
        return {"loss": loss}


@dataclass(eq=False, repr=False, kw_only=True)
class StaticStudent(Objective):
    """The student of mode paper_like; without an ensemble only its data term is left."""

    student: Purified
    ensemble: Ensemble | None
    crafting: Crafting
    ensemble_weight: float
    data_weight: float
    guidance_weight: float

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        f, purifier = self.student.classifier, self.student.purifier
        images_adv = self.crafting.alone(f, images, labels, noise)
        purified_adv, purified = purifier(images_adv), purifier(images)
        data = (mse(purified_adv, images) + mse(purified, images)).mean()
        terms = {"loss": self.data_weight * data, "data": data}
        if self.ensemble is not None:
            target_adv, target = self.ensemble(images_adv, images)
            terms["ensemble"] = (mse(purified_adv, target_adv) + mse(purified, target)).mean()
            terms["loss"] = terms["loss"] + self.ensemble_weight * terms["ensemble"]
            if self.guidance_weight:
                with torch.no_grad():
                    logits_adv, logits = f(target_adv), f(target)
                guidance = kl(logits_adv, f(purified_adv)) + kl(logits, f(purified))
                terms["guidance"] = guidance.mean()
                terms["loss"] = terms["loss"] + self.guidance_weight * terms["guidance"]
        return terms


@dataclass(eq=False, repr=False, kw_only=True)
class EndToEnd(Objective):
    """The robust teacher of mode adaptive; the student, where there is no teacher."""

    student: Purified
    crafting: Crafting
    pixel_weight: float

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        f, purifier = self.student.classifier, self.student.purifier
        images_adv = self.crafting.end_to_end(self, images, labels, noise)
        purified_adv, purified = purifier(images_adv), purifier(images)
        logits_adv, logits = f(purified_adv), f(purified)
        if self.crafting.stability:
            with torch.no_grad():
                soft = f(images).softmax(1)
            robust, clean = soft_cross_entropy(soft, logits_adv), soft_cross_entropy(soft, logits)
        else:
            robust, clean = cross_entropy(logits_adv, labels), cross_entropy(logits, labels)
        pixels = (mse(purified_adv, images) + mse(purified, images)).mean()
        return {
            "loss": robust.mean() + 0.5 * clean.mean() + self.pixel_weight * pixels,
            "pixels": pixels,
            "robust accuracy": accuracy(logits_adv, labels),
        }


@dataclass(eq=False, repr=False, kw_only=True)
class EndToEndStudent(Objective):
    """The student of mode adaptive, taught by the robust and the normal teacher."""

    student: Purified
    ensemble: Ensemble
    crafting: Crafting
    pixel_weight: float

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        f, purifier = self.student.classifier, self.student.purifier
        images_adv = self.crafting.end_to_end(self, images, labels, noise)
        target_adv, target = self.ensemble(images_adv, images)
        with torch.no_grad():
            soft_adv, soft = f(target_adv), f(target)
        purified_adv, purified = purifier(images_adv), purifier(images)
        logits_adv, logits = f(purified_adv), f(purified)
        robust, clean = kl(soft_adv, logits_adv).mean(), kl(soft, logits).mean()
        pixels = (mse(purified_adv, target_adv) + mse(purified, target)).mean()
        return {
            "loss": ROBUST * robust + CLEAN * clean + self.pixel_weight * pixels,
            "robust": robust,
            "clean": clean,
            "pixels": pixels,
            "robust accuracy": accuracy(logits_adv, labels),
        }


def mse(a: Tensor, b: Tensor) -> Tensor:
    """(N,) mean over channels and pixels: the same weight for every image size."""
    return (a - b).square().flatten(1).mean(1)
