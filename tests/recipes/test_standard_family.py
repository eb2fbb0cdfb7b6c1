"""Ordinary training, PGD-AT and TRADES against their formulas."""

import pytest
import torch
import toys
from torch.nn.functional import cross_entropy, one_hot

from robustify.attacks.pgd import pgd
from robustify.fold import constant
from robustify.losses import kl

DOUBLE = torch.float64


def build(recipe, classes=10, **settings):
    return toys.build(recipe, toys.toy(classes=classes, dtype=DOUBLE), **settings)


def test_standard_is_the_mean_cross_entropy(classes):
    images, labels, noise = toys.batch(classes=classes, dtype=DOUBLE)
    recorder, terms, _ = toys.step(build("standard", classes), (images, labels, noise))
    (clean,) = recorder.outer()
    assert torch.equal(clean.images, images)
    assert torch.isclose(terms["loss"], cross_entropy(clean.logits, labels), rtol=1e-12)


def test_pgd_at_is_the_mean_cross_entropy_on_adversarial_images(classes):
    images, labels, noise = toys.batch(classes=classes, dtype=DOUBLE)
    recorder, terms, images_adv = toys.step(build("pgd_at", classes), (images, labels, noise))
    (adversarial,) = recorder.outer()
    assert torch.equal(adversarial.images, images_adv)
    assert not torch.equal(images_adv, images)
    expected = cross_entropy(adversarial.logits, labels)
    assert torch.isclose(terms["loss"], expected, rtol=1e-12)


def test_pgd_at_attack_on_a_linear_model_is_closed_form():
    student = toys.toy(make=toys.Linear, dtype=DOUBLE)
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = toys.build("pgd_at", student, steps=1, start="images")
    _, _, images_adv = toys.step(objective, (images, labels, noise))
    with torch.no_grad():
        gradient = (student(images).softmax(1) - one_hot(labels, 10)) @ student.module.weight
    step = objective.attack["step_size"] * gradient.view_as(images).sign()
    assert torch.allclose(images_adv, (images + step).clamp(0, 1))


def test_pgd_at_attack_raises_the_cross_entropy_of_the_student_in_eval_mode():
    images, labels, noise = toys.batch()
    objective = toys.build("pgd_at", steps=5)
    before = objective.student.eval()(images)
    _, _, images_adv = toys.step(objective.train(), (images, labels, noise))
    objective = toys.build("pgd_at")  # statistics as before the step
    after = objective.student.eval()(images_adv)
    assert cross_entropy(after, labels) > cross_entropy(before, labels) + 0.05


def test_batchnorm_of_standard_and_pgd_at_reads_one_kind_of_image():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    for recipe, kind in (("standard", "clean"), ("pgd_at", "adversarial")):
        objective = build(recipe)
        old = toys.running_mean(objective)
        _, _, images_adv = toys.step(objective, (images, labels, noise))
        mean = (images if kind == "clean" else images_adv).mean().item()
        assert toys.running_mean(objective) == pytest.approx(0.9 * old + 0.1 * mean, rel=1e-9)


def test_trades_closed_form():
    """p(s(x)) = (1/2, 1/18, …), s(x*) = 0: CE is ln 2, and KL is 0.510826."""
    student = toys.scripted([toys.LN9, *[0.0] * 9], [0.0] * 10)
    images, _, noise = toys.batch(dtype=DOUBLE)
    labels = torch.zeros(6, dtype=torch.int64)
    terms = toys.build("trades", student)(images, labels, noise)
    assert terms["loss"].item() - terms["clean"].item() == pytest.approx(3.064954, rel=1e-6)
    assert terms["clean"].item() == pytest.approx(0.693147, rel=1e-6)


@pytest.mark.parametrize("reuse", [True, False])
def test_trades_is_the_published_loss(classes, reuse):
    images, labels, noise = toys.batch(classes=classes, dtype=DOUBLE)
    objective = build("trades", classes, reuse_clean_forward=reuse)
    recorder, terms, images_adv = toys.step(objective, (images, labels, noise))
    clean, adversarial = recorder.of(images), recorder.of(images_adv)
    expected = cross_entropy(clean, labels) + 6.0 * toys.reference_kl(clean, adversarial)
    assert torch.isclose(terms["loss"], expected, rtol=1e-12)


@pytest.mark.parametrize("detach_clean", [False, True])
def test_trades_gradient_enters_both_arguments(detach_clean):
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = build("trades", detach_clean=detach_clean, beta=3.0)
    recorder, _, images_adv = toys.step(objective, (images, labels, noise))
    clean, adversarial = recorder.of(images), recorder.of(images_adv)
    p, p_adv = clean.softmax(1), adversarial.softmax(1)
    gap = p.log() - p_adv.log()
    to_clean = p - one_hot(labels, 10)
    if not detach_clean:
        to_clean = to_clean + 3.0 * p * (gap - (p * gap).sum(1, keepdim=True))
    assert torch.allclose(clean.grad, to_clean / 6)
    assert torch.allclose(adversarial.grad, 3.0 * (p_adv - p) / 6)


def test_trades_attack_needs_its_noise():
    threat = toys.SpyThreat("Linf", 0.1)
    images, labels, noise = toys.batch(dtype=DOUBLE)
    build("trades", threat=threat, start="images", steps=1)(images, labels, noise)
    build("trades", threat=threat, start="gaussian", steps=1)(images, labels, noise)
    without, with_noise = (gradient.norm().item() for gradient in threat.gradients)
    assert without < 1e-12
    assert with_noise > 1e-4


def test_trades_attack_raises_the_divergence_from_the_clean_image_and_reads_no_label():
    images, labels, noise = toys.batch()
    seen = []
    for y in (labels, labels.flip(0)):
        _, _, images_adv = toys.step(toys.build("trades", steps=4), (images, y, noise))
        seen.append(images_adv)
    assert torch.equal(*seen)
    student = toys.toy().eval()
    with torch.no_grad():
        assert kl(student(images), student(seen[0])).min() > 1e-4


@pytest.mark.parametrize(
    ("reuse", "old", "clean", "adv"), [(True, 0.81, 0.09, 0.10), (False, 0.729, 0.181, 0.09)]
)
def test_trades_batchnorm_order(reuse, old, clean, adv):
    """x, x*; officially x, x*, x."""
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = build("trades", reuse_clean_forward=reuse)
    before = toys.running_mean(objective)
    _, _, images_adv = toys.step(objective, (images, labels, noise))
    expected = old * before + clean * images.mean().item() + adv * images_adv.mean().item()
    assert toys.running_mean(objective) == pytest.approx(expected, rel=1e-9)


def test_trades_gradients_are_the_same_with_and_without_the_second_forward():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    gradients = []
    for reuse in (True, False):
        objective = build("trades", reuse_clean_forward=reuse)
        toys.step(objective, (images, labels, noise))
        gradients.append([p.grad for p in toys.parameters(objective.student)])
    for one, two in zip(*gradients, strict=True):
        assert torch.allclose(one, two, rtol=1e-9, atol=1e-12)


def test_trades_without_consistency_is_standard_training():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    trades, standard = build("trades", beta=0.0), build("standard")
    for objective in (trades, standard):
        toys.step(objective, (images, labels, noise))
    for one, two in zip(trades.parameters(), standard.parameters(), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-9, atol=1e-12)


def test_pgd_at_attacks_as_pgd_does():
    images, labels, noise = toys.batch()
    objective = toys.build("pgd_at", steps=3)
    with constant(objective.student, images) as student:
        expected = pgd(
            lambda x: cross_entropy(student(x), labels, reduction="none"),
            images, toys.THREAT, steps=3, step_size=toys.THREAT.eps / 2, noise=noise,
        )  # fmt: skip
    _, _, images_adv = toys.step(objective, (images, labels, noise))
    assert torch.allclose(images_adv, expected, atol=1e-6)


def test_published_schedules():
    """TRADES counts epochs from 1: of its 76, only 75 and 76 run at the lower rate."""
    training, attack = toys.settings("trades", "paper")
    assert (training.epochs, training.decay_at, training.weight_decay) == (76, (74,), 2e-4)
    assert attack == {"steps": 10, "step_size": 0.007, "start": "gaussian"}
    training, attack = toys.settings("pgd_at", "paper")
    assert (training.epochs, training.decay_at, training.weight_decay) == (110, (100, 105), 5e-4)
    assert attack == {"steps": 10, "step_size": 2 / 255, "start": "uniform"}
