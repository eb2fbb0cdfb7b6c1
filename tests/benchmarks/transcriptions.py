"""Every recipe's training step as its paper or official program makes it: plain, eager, unfolded.

A transcription takes an Objective only as the bag of networks and settings that it is, and
computes everything itself: the published modes, detaches and order of forwards, duplicates
included. It gives the loss, and the adversarial images where there are any. Papers, and what is
certain about them, stand in the recipe of the same name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from robustify.objective import Objective

Start = Callable[[Tensor], Tensor]  # images -> where the search starts
Step = tuple[Tensor, Tensor | None]  # loss, images_adv


def kl(target: Tensor, logits: Tensor, temperature: float = 1.0) -> Tensor:
    """KL of two sets of logits, summed over classes, mean over images."""
    log_q = F.log_softmax(logits / temperature, dim=1)
    return F.kl_div(log_q, F.softmax(target / temperature, dim=1), reduction="batchmean")


def search(
    n: Objective, loss_of: Callable[[Tensor], Tensor], images: Tensor, start: Start
) -> Tensor:
    """Signs of the gradient by the images alone; the networks stay in the mode they are in."""
    eps, step_size = n.threat.eps, n.attack["step_size"]
    images_adv = start(images)
    for _ in range(n.attack["steps"]):
        images_adv.requires_grad_()
        gradient = torch.autograd.grad(loss_of(images_adv), images_adv)[0]
        images_adv = images_adv.detach() + step_size * gradient.sign()
        images_adv = torch.min(torch.max(images_adv, images - eps), images + eps).clamp(0, 1)
    return images_adv


def against_labels(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Tensor:
    """Adversarial images for cross-entropy, the student in eval mode; in train mode afterwards."""
    n.student.eval()
    images_adv = search(n, lambda x: F.cross_entropy(n.student(x), labels), images, start)
    n.student.train()
    return images_adv


def standard(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    return F.cross_entropy(n.student(images), labels), None


def pgd_at(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    images_adv = against_labels(n, images, labels, start)
    return F.cross_entropy(n.student(images_adv), labels), images_adv


def trades(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    """The clean images go through the student in every attack step, and twice in the loss."""
    n.student.eval()
    images_adv = search(n, lambda x: kl(n.student(images), n.student(x)), images, start)
    n.student.train()
    clean = F.cross_entropy(n.student(images), labels)
    logits_adv = n.student(images_adv)
    return clean + 6 * kl(n.student(images), logits_adv), images_adv


def mart(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    images_adv = against_labels(n, images, labels, start)
    logits, logits_adv = n.student(images), n.student(images_adv)
    p, p_adv = F.softmax(logits, dim=1), F.softmax(logits_adv, dim=1)
    is_label = F.one_hot(labels, p.shape[1]).bool()
    runner_up = p_adv.masked_fill(is_label, 0).max(1).values
    boosted = F.cross_entropy(logits_adv, labels) - torch.log(1.0001 - runner_up).mean()
    apart = (p * (torch.log(p + 1e-12) - torch.log(p_adv + 1e-12))).sum(1)
    return boosted + 5 * (apart * (1.0000001 - p[is_label])).mean(), images_adv


def ard(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    """The student attacks itself in train mode; clean cross-entropy is computed with weight 0."""
    images_adv = search(n, lambda x: F.cross_entropy(n.student(x), labels), images, start)
    with torch.no_grad():
        soft = n.teacher.network(images)
    distillation = kl(soft, n.student(images_adv), 30.0)
    return 90 * distillation + 0.0 * F.cross_entropy(n.student(images), labels), images_adv


def iad(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    """Variant I from `begin_epoch` on. Attack in train mode; Both x* and x are read twice."""
    images_adv = search(n, lambda x: F.cross_entropy(n.student(x), labels), images, start)
    with torch.no_grad():
        soft, soft_adv = n.teacher.network(images), n.teacher.network(images_adv)
        trust = F.softmax(soft_adv, dim=1).gather(1, labels[:, None]).squeeze(1) ** 0.1
    logits_adv = n.student(images_adv)
    n.student(images_adv)
    p = F.softmax(n.student(images), dim=1)
    own = F.kl_div(F.log_softmax(logits_adv, dim=1), p, reduction="none").sum(1)
    unused = 0.0 * F.cross_entropy(n.student(images), labels)
    return kl(soft, logits_adv) + ((1 - trust) * own).mean() + unused, images_adv


def rslad(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    with torch.no_grad():
        soft = n.teacher.network(images)
    n.student.eval()
    images_adv = search(n, lambda x: kl(soft, n.student(x)), images, start)
    n.student.train()
    logits_adv, logits = n.student(images_adv), n.student(images)
    return (5 * kl(soft, logits_adv) + kl(soft, logits)) / 60, images_adv


def adaad(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    """Clean images are distilled with weight 0: both networks read them all the same."""
    n.student.eval()
    images_adv = search(n, lambda x: kl(n.teacher.network(x), n.student(x)), images, start)
    n.student.train()
    logits, logits_adv = n.student(images), n.student(images_adv)
    with torch.no_grad():
        soft_adv, soft = n.teacher.network(images_adv), n.teacher.network(images)
    return 0.1 * kl(soft_adv, logits_adv) + 0.0 * kl(soft, logits), images_adv


def mtard(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    images_adv = against_labels(n, images, labels, start)
    with torch.no_grad():
        soft_adv = n.robust_teacher.network(images_adv)
        soft = n.standard_teacher.network(images)
    logits_adv, logits = n.student(images_adv), n.student(images)
    adversarial, natural = kl(soft_adv, logits_adv), kl(soft, logits)
    now, balance = torch.tensor([adversarial.item(), natural.item()]), n.balance
    if not balance.first.any():
        balance.first.copy_(now)
    left_adv, left_nat = (now / balance.first).tolist()
    share = balance.share.item()
    share -= 0.025 * (share - left_nat / (left_adv + left_nat))
    balance.share.fill_(share)
    return 0.1 * ((1 - share) * adversarial + share * natural), images_adv


def peeraid(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    """The student reads x* twice; the target's softmax is taken anew in every attack step."""
    n.peer.eval()
    with torch.no_grad():
        target = n.peer(images)
    n.peer.train()
    n.student.eval()
    images_adv = search(n, lambda x: kl(target, n.student(x)), images, start)
    n.student.train()
    peer_adv, student_adv = n.peer(images_adv), n.student(images_adv)
    peer_loss = F.cross_entropy(peer_adv, labels) + 0.01 * kl(student_adv, peer_adv)
    again, clean = n.student(images_adv), n.student(images)
    student_loss = 2.5 * kl(peer_adv.detach(), again, 5.0) + 2.5 * kl(clean, again, 5.0)
    return student_loss + peer_loss, images_adv


def teacher_assistant(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    """A link of mode paper: cross-entropy to soft labels that were read before the first step,
    less their entropy, as ours logs it."""
    soft = n.table[: len(images)]
    log_q = F.log_softmax(n.student(images) / 20, dim=1)
    return F.kl_div(log_q, soft, reduction="batchmean"), None


def purifier(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    """The robust teacher of mode adaptive, end to end before the classifier."""
    f, g = n.student.classifier, n.student.purifier
    images_adv = search(n, lambda x: F.cross_entropy(f(g(x)), labels), images, start)
    purified_adv, purified = g(images_adv), g(images)
    robust = F.cross_entropy(f(purified_adv), labels)
    clean = 0.5 * F.cross_entropy(f(purified), labels)
    pixels = F.mse_loss(purified_adv, images) + F.mse_loss(purified, images)
    return robust + clean + 10 * pixels, images_adv


def sa_mdrad(n: Objective, images: Tensor, labels: Tensor, start: Start) -> Step:
    """Our reconstruction: there is no official program, so no forward is made twice."""
    teachers = [member.network for member in n.teachers.members]
    with torch.no_grad():
        logits_of, maps_of = zip(*(teacher.features(images) for teacher in teachers), strict=True)
        weights = _sa_weights(logits_of, labels)
        right = torch.stack([z.argmax(1) == labels for z in logits_of])
        gated = weights * right / (weights * right).sum(0).clamp_min(1e-12)
        target = _sa_target(logits_of, weights, labels, 1.0)
        soft = _sa_target(logits_of, weights, labels, 4.0)
    n.student.eval()
    images_adv = search(n, lambda x: _kl_to(target, n.student(x), 1.0), images, start)
    n.student.train()
    with torch.no_grad():
        adv_of = [teacher(images_adv) for teacher in teachers]
        soft_adv = _sa_target(adv_of, _sa_weights(adv_of, labels), labels, 4.0)
    logits_adv, map_adv = n.student.features(images_adv)
    logits, map_clean = n.student.features(images)
    loss = 16 * (5 / 6 * _kl_to(soft_adv, logits_adv, 4.0) + 1 / 6 * _kl_to(soft, logits, 4.0))
    for own in (map_adv, map_clean):
        for k, maps in enumerate(maps_of):
            standardized = n.features.standardizers[k](maps)
            apart = n.features.projectors[k](own, maps.shape[-2:]) - standardized
            loss = loss + 0.5 * (gated[k] * apart.pow(2).mean((1, 2, 3))).mean()
    return loss, images_adv


def _sa_weights(logits_of: Sequence[Tensor], labels: Tensor) -> Tensor:
    losses = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits_of])
    return (1 - losses.softmax(0)) / (len(logits_of) - 1)


def _sa_target(
    logits_of: Sequence[Tensor], weights: Tensor, labels: Tensor, temperature: float
) -> Tensor:
    """Largest entry and label exchanged, softmax, and the weighted sum over teachers."""
    fused, rows = torch.zeros_like(logits_of[0]), torch.arange(len(labels))
    for z, w in zip(logits_of, weights, strict=True):
        swapped, largest = z.clone(), z.argmax(1)
        swapped[rows, largest], swapped[rows, labels] = z[rows, labels], z[rows, largest]
        fused += w[:, None] * F.softmax(swapped / temperature, dim=1)
    return fused


def _kl_to(soft: Tensor, logits: Tensor, temperature: float) -> Tensor:
    return F.kl_div(F.log_softmax(logits / temperature, dim=1), soft, reduction="batchmean")


@dataclass(frozen=True)
class Case:
    """A transcription and the stage of ours that it is measured against."""

    plain: Callable[[Objective, Tensor, Tensor, Start], Step]
    stage: str = "student"
    teachers: Sequence[str | None] = ()  # architectures; None is the student's
    settings: Mapping[str, Any] = field(default_factory=dict)


# Of recipes with several stages, the one with most work in a run.
CASES = {
    "standard": Case(standard),
    "pgd_at": Case(pgd_at),
    "trades": Case(trades),
    "mart": Case(mart),
    "ard": Case(ard, teachers=[None]),
    "ard, attack_bn=train": Case(ard, teachers=[None], settings={"attack_bn": "train"}),
    "iad": Case(iad, teachers=[None]),
    "iad, attack_bn=train": Case(iad, teachers=[None], settings={"attack_bn": "train"}),
    "rslad": Case(rslad, teachers=[None]),
    "adaad": Case(adaad, teachers=[None]),
    "mtard": Case(mtard, teachers=[None, None]),
    "peeraid": Case(peeraid),
    "sa_mdrad": Case(sa_mdrad, teachers=["vgg16_bn", "densenet121", "resnet34"]),
    "teacher_assistant, a link": Case(
        teacher_assistant, teachers=[None], settings={"temperature_training": "plain"}
    ),
    "purifier, robust teacher": Case(purifier, stage="end-to-end teacher"),
}
