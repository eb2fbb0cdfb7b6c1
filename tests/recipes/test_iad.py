"""IAD-I and IAD-II against their formulas."""

import pytest
import torch
import toys
from torch.nn.functional import cross_entropy

from robustify.fusion import trust
from robustify.losses import kl

DOUBLE = torch.float64


def networks(classes=10):
    return [toys.toy(seed=s, classes=classes, dtype=DOUBLE) for s in (0, 10, 11)]


def build(variant="I", classes=10, *, begun=True, **settings):
    student, *teachers = networks(classes)
    if variant == "I":
        teachers = teachers[:1]
    objective = toys.build("iad", student, teachers, variant=variant, **settings)
    objective.epoch, objective.epochs = (200, 200) if begun else (0, 200)
    return objective


def by_image(teacher_adv, labels, beta=0.1):
    return torch.stack([z.softmax(0)[y] ** beta for z, y in zip(teacher_adv, labels, strict=True)])


def test_reliability_is_the_loop_over_images():
    teacher_adv = 3 * torch.randn(50, 10, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    labels = torch.arange(50) % 10
    assert torch.allclose(trust(teacher_adv, labels), by_image(teacher_adv, labels))


@pytest.mark.parametrize(("p", "a"), [(0.9, 0.990), (0.5, 0.933), (0.1, 0.794), (0.01, 0.631)])
def test_reliability_closed_form(p, a):
    logits = torch.tensor([[p, 1 - p]], dtype=DOUBLE).log()
    believed = trust(logits, torch.zeros(1, dtype=torch.int64)).item()
    assert believed == pytest.approx(a, abs=1e-3)
    if p == 0.5:
        assert 1 - believed == pytest.approx(0.066967, rel=1e-5)


def test_first_variant_before_it_begins_is_ard_at_temperature_one():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    iad = build(begun=False)
    student, teacher, _ = networks()
    ard = toys.build("ard", student, [teacher], kd_weight=1.0, temperature=1.0)
    losses = [toys.step(objective, (images, labels, noise))[1]["loss"] for objective in (iad, ard)]
    assert torch.isclose(*losses, rtol=1e-12)
    for one, two in zip(toys.parameters(iad), toys.parameters(ard), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-9, atol=1e-12)
    assert toys.same(dict(iad.student.named_buffers()), dict(ard.student.named_buffers()))


@pytest.mark.parametrize("weigh_teacher", [False, True])
def test_first_variant_is_the_published_loss(classes, weigh_teacher):
    images, labels, noise = toys.batch(classes=classes, dtype=DOUBLE)
    objective = build(classes=classes, weigh_teacher=weigh_teacher)
    recorder, terms, images_adv = toys.step(objective, (images, labels, noise))
    adversarial, clean = recorder.of(images_adv), recorder.of(images)
    teacher = recorder.of(images, "teacher", training=False)
    trust = by_image(recorder.of(images_adv, "teacher", training=False), labels)
    assert trust.min() < 0.95
    distillation = kl(teacher, adversarial) * (trust if weigh_teacher else 1)
    expected = (distillation + (1 - trust) * kl(clean, adversarial)).sum() / 6
    assert torch.isclose(terms["loss"], expected, rtol=1e-9)
    assert len(recorder.outer("teacher", training=False)) == 2


def test_second_variant_is_the_published_loss(classes):
    images, labels, noise = toys.batch(classes=classes, dtype=DOUBLE)
    recorder, terms, images_adv = toys.step(build("II", classes), (images, labels, noise))
    adversarial, clean = recorder.of(images_adv), recorder.of(images)
    robust = recorder.of(images_adv, "teacher", training=False)
    standard = recorder.of(images_adv, "standard_teacher", training=False)
    trust = by_image(robust, labels)
    expected = (
        0.25 * cross_entropy(adversarial, labels)
        + 0.5 * (trust * kl(robust, adversarial)).sum() / 6
        + 0.5 * ((1 - trust) * kl(clean, adversarial)).sum() / 6
        + 0.25 * toys.reference_kl(standard, adversarial)
    )
    assert torch.isclose(terms["loss"], expected, rtol=1e-9)
    for teacher in ("teacher", "standard_teacher"):
        (read,) = [p for p in recorder.passes if p.network == teacher]
        assert torch.equal(read.images, images_adv)


def test_second_variant_before_it_begins_is_akd2():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    recorder, terms, images_adv = toys.step(build("II", begun=False), (images, labels, noise))
    adversarial = recorder.of(images_adv)
    robust = recorder.of(images_adv, "teacher", training=False)
    standard = recorder.of(images_adv, "standard_teacher", training=False)
    expected = (
        0.25 * cross_entropy(adversarial, labels)
        + 0.5 * toys.reference_kl(robust, adversarial)
        + 0.25 * toys.reference_kl(standard, adversarial)
    )
    assert torch.isclose(terms["loss"], expected, rtol=1e-9)
    assert len(recorder.outer()) == 1  # the clean images are not read


def test_akd2_without_teachers_is_pgd_at():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    settings = {"kd_weight": 0.0, "standard_weight": 0.0, "ce_weight": 1.0}
    akd2 = build("II", begun=False, **settings)
    pgd_at = toys.build("pgd_at", networks()[0])
    losses = [toys.step(o, (images, labels, noise))[1]["loss"] for o in (akd2, pgd_at)]
    assert torch.isclose(*losses, rtol=1e-12)
    for one, two in zip(toys.parameters(akd2), toys.parameters(pgd_at), strict=True):
        assert torch.allclose(one.grad, two.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("variant", ["I", "II"])
@pytest.mark.parametrize("detach_clean", [False, True])
def test_gradient_reaches_the_clean_image_through_the_self_term_alone(variant, detach_clean):
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = build(variant, detach_clean=detach_clean)
    recorder, _, images_adv = toys.step(objective, (images, labels, noise))
    clean, adversarial = recorder.of(images), recorder.of(images_adv)
    if detach_clean:
        assert clean.grad is None
        return
    trust = by_image(recorder.of(images_adv, "teacher", training=False), labels)[:, None]
    p, log_adv = clean.softmax(1), adversarial.log_softmax(1)
    gap = p.log() - log_adv
    weight = (1 if variant == "I" else 0.5) * (1 - trust) / 6
    expected = weight * p * (gap - (p * gap).sum(1, keepdim=True))
    assert torch.allclose(clean.grad, expected)
    assert expected.abs().max() > 1e-5


@pytest.mark.parametrize(
    ("settings", "old", "adv", "clean"),
    [
        ({}, 0.9**4, 0.81 * 0.19, 0.19),  # officially x*, x*, x, x
        ({"bn_double_updates": False}, 0.81, 0.09, 0.10),
        ({"begun": False}, 0.81, 0.09, 0.10),
        ({"variant": "II"}, 0.81, 0.09, 0.10),
        ({"variant": "II", "begun": False}, 0.9, 0.1, 0.0),
    ],
)
def test_batchnorm_order(settings, old, adv, clean):
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = build(**settings)
    before = toys.running_mean(objective)
    _, _, images_adv = toys.step(objective, (images, labels, noise))
    expected = old * before + adv * images_adv.mean().item() + clean * images.mean().item()
    assert toys.running_mean(objective) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("variant", "begin", "epochs", "first"),
    [("I", None, 200, 60), ("II", None, 200, 40), ("I", None, 80, 24), ("I", 70, 200, 70)],
)
def test_when_it_begins(variant, begin, epochs, first):
    objective = build(variant, begin_epoch=begin)
    objective.epochs = epochs
    begun = []
    for objective.epoch in range(epochs):
        begun.append(objective.reached(objective.begin_epoch))
    assert begun.index(True) == first
    assert all(begun[first:])


def test_published_settings():
    for preset in ("paper", "paper-ii", "paper-akd2"):
        training, attack = toys.settings("iad", preset)
        assert (training.epochs, training.decay_at) == (200, (100,))
        assert (training.lr, training.weight_decay) == (0.1, 2e-4)
        assert attack == {"steps": 10, "step_size": 2 / 255, "start": "uniform"}
