"""AdaAD and AdaIAD against their formulas."""

import pytest
import torch
import toys

from robustify.fusion import trust
from robustify.losses import kl

DOUBLE = torch.float64
ADAIAD = {"adv_weight": 900.0, "self_weight": 1.0, "temperature": 30.0}


def build(classes=10, teacher_seed=10, **settings):
    student = toys.toy(classes=classes, dtype=DOUBLE)
    teacher = toys.toy(seed=teacher_seed, classes=classes, dtype=DOUBLE)
    return toys.build("adaad", student, [teacher], **settings)


def test_closed_form():
    student, teacher = toys.scripted(*[[0.0] * 10] * 2), toys.scripted([toys.LN9, *[0.0] * 9])
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = toys.build("adaad", student, [teacher])
    assert objective(images, labels, noise)["loss"].item() == pytest.approx(0.0510826, rel=1e-5)


@pytest.mark.parametrize(("count", "class_mean", "weight"), [(10, True, 0.1), (100, False, 1.0)])
@pytest.mark.parametrize("alpha", [1.0, 0.6])
def test_loss_is_the_published_one(count, class_mean, weight, alpha):
    images, labels, noise = toys.batch(classes=count, dtype=DOUBLE)
    objective = build(count, adv_weight=alpha * weight, clean_weight=(1 - alpha) * weight)
    recorder, terms, images_adv = toys.step(objective, (images, labels, noise))
    teacher_adv = recorder.of(images_adv, "teacher", training=False)
    expected = alpha * toys.reference_kl(
        teacher_adv, recorder.of(images_adv), class_mean=class_mean
    )
    if alpha < 1:
        teacher = recorder.of(images, "teacher", training=False)
        clean = toys.reference_kl(teacher, recorder.of(images), class_mean=class_mean)
        expected = expected + (1 - alpha) * clean
    assert torch.isclose(terms["loss"], expected, rtol=1e-9)


def test_first_attack_step_on_linear_networks_sums_both_paths():
    """d KL(p, q) / dx with z = V x and s = W x:  V'(p (log p - log q - KL)) + W'(q - p)."""
    student, teacher = (toys.toy(seed=s, make=toys.Linear, dtype=DOUBLE) for s in (0, 1))
    images, labels, noise = toys.batch(dtype=DOUBLE)
    threat = toys.SpyThreat("Linf", 0.1)
    objective = toys.build("adaad", student, [teacher], threat=threat, steps=1, start="images")
    _, _, images_adv = toys.step(objective, (images, labels, noise))
    with torch.no_grad():
        p, q = teacher(images).softmax(1), student(images).softmax(1)
        gap = p.log() - q.log()
        by_teacher = (p * (gap - (p * gap).sum(1, keepdim=True))) @ teacher.module.weight
        by_student = (q - p) @ student.module.weight
    gradient = (by_teacher + by_student).view_as(images)
    assert torch.allclose(threat.gradients[0], gradient, rtol=1e-6, atol=1e-9)
    assert torch.allclose(images_adv, (images + 0.05 * gradient.sign()).clamp(0, 1))
    assert not torch.equal(gradient.sign(), by_student.view_as(images).sign())


def test_attack_depends_on_the_teacher_and_not_on_the_label():
    images, labels, noise = toys.batch(dtype=DOUBLE)

    def attack(y, **settings):
        return toys.step(build(steps=4, **settings), (images, y, noise))[2]

    assert torch.equal(attack(labels), attack(labels.flip(0)))
    assert not torch.equal(attack(labels), attack(labels, teacher_seed=11))


def test_attack_raises_the_disagreement():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = build(steps=5)
    teacher, student = objective.teacher, toys.toy(dtype=DOUBLE).eval()
    _, _, images_adv = toys.step(objective, (images, labels, noise))
    with torch.no_grad():
        start = images + 0.001 * noise.normal(images)
        before, after = (kl(teacher(x), student(x)).mean() for x in (start, images_adv))
    assert after > before + 1e-3


def test_forwards_of_the_teacher():
    """One in each attack step, and one after it at alpha = 1."""
    batch = toys.batch(dtype=DOUBLE)
    for clean_weight, count in ((0.0, 1), (0.5, 2)):
        recorder, _, _ = toys.step(build(steps=10, clean_weight=clean_weight), batch)
        assert len(recorder.attacks("teacher")) == 10
        assert len(recorder.outer("teacher", training=False)) == count
        assert recorder.of(batch[0]).requires_grad == (clean_weight > 0)


def test_batchnorm_reads_clean_images_first():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    for clean_weight in (0.0, 0.5):
        objective = build(clean_weight=clean_weight)
        old = toys.running_mean(objective)
        _, _, images_adv = toys.step(objective, (images, labels, noise))
        expected = 0.81 * old + 0.09 * images.mean().item() + 0.10 * images_adv.mean().item()
        assert toys.running_mean(objective) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("epoch", "begun"), [(59, False), (60, True)])
def test_adaiad_is_the_attack_of_adaad_with_the_loss_of_iad(epoch, begun):
    """The teacher term reads x*, as published; A and the self term as in IAD-I."""
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = build(begin_epoch=60, **ADAIAD)
    objective.epoch, objective.epochs = epoch, 200
    recorder, terms, images_adv = toys.step(objective, (images, labels, noise))
    assert torch.equal(images_adv, toys.step(build(), (images, labels, noise))[2])
    teacher_adv = recorder.of(images_adv, "teacher", training=False)
    adversarial, clean = recorder.of(images_adv), recorder.of(images)
    expected = 900 * toys.reference_kl(teacher_adv, adversarial, 30.0)
    if begun:
        own = (1 - trust(teacher_adv, labels)) * kl(clean, adversarial)
        assert own.mean() > 1e-6
        expected = expected + own.mean()
        assert clean.grad.abs().sum() > 0
    assert torch.isclose(terms["loss"], expected, rtol=1e-9)


def test_published_settings():
    for preset in ("paper", "paper-cifar100", "paper-adaiad"):
        training, attack = toys.settings("adaad", preset)
        assert (training.epochs, training.decay_at) == (200, (100, 150))
        assert (training.lr, training.weight_decay) == (0.1, 5e-4)
        assert attack == {"steps": 10, "step_size": 2 / 255, "start": "gaussian"}
