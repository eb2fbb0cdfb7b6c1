"""ARD against its formula."""

import math

import pytest
import torch
import toys
from torch.nn.functional import cross_entropy

DOUBLE = torch.float64


def build(classes=10, **settings):
    student, teacher = (toys.toy(seed=s, classes=classes, dtype=DOUBLE) for s in (0, 10))
    return toys.build("ard", student, [teacher], **settings)


def test_distillation_closed_form():
    """At T = 30, 90 times the divergence is a mean over 10 classes times 900."""
    student, teacher = toys.scripted(*[[0.0] * 10] * 2), toys.scripted([toys.LN9, *[0.0] * 9])
    images, labels, noise = toys.batch(dtype=DOUBLE)
    terms = toys.build("ard", student, [teacher])(images, labels, noise)
    a = 9 ** (1 / 30)  # KL of (a, 1, …, 1) / (a + 9) from the uniform
    divergence = a / (a + 9) * math.log(a) - math.log((a + 9) / 10)
    assert terms["loss"].item() == pytest.approx(900 * divergence / 10, rel=1e-9)


@pytest.mark.parametrize(("count", "weight"), [(10, 90.0), (100, 9.0)])
def test_loss_is_the_published_one(count, weight):
    """alpha T² times a mean over classes, and 1 - alpha."""
    images, labels, noise = toys.batch(classes=count, dtype=DOUBLE)
    alpha = 0.7
    objective = build(count, kd_weight=alpha * weight, ce_weight=1 - alpha)
    recorder, terms, images_adv = toys.step(objective, (images, labels, noise))
    teacher = recorder.of(images, "teacher", training=False)
    kd = toys.reference_kl(teacher, recorder.of(images_adv), 30.0, class_mean=True)
    expected = alpha * 900 * kd + (1 - alpha) * cross_entropy(recorder.of(images), labels)
    assert torch.isclose(terms["loss"], expected, rtol=1e-9)


def test_the_teacher_reads_clean_images_once():
    batch = toys.batch(dtype=DOUBLE)
    recorder, _, _ = toys.step(build(), batch)
    (read,) = [p for p in recorder.passes if p.network == "teacher"]
    assert torch.equal(read.images, batch[0])
    assert not read.logits.requires_grad


def test_labels_only_steer_the_attack():
    """With alpha = 1 the clean forward takes no gradient; with alpha < 1 it does."""
    batch = toys.batch(dtype=DOUBLE)
    recorder, _, _ = toys.step(build(), batch)
    assert not recorder.of(batch[0]).requires_grad
    recorder, _, _ = toys.step(build(ce_weight=0.5), batch)
    assert recorder.of(batch[0]).grad.abs().sum() > 0


def test_batchnorm_order_with_the_attack_in_eval_mode():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = build()
    old = toys.running_mean(objective)
    _, _, images_adv = toys.step(objective, (images, labels, noise))
    expected = 0.81 * old + 0.09 * images_adv.mean().item() + 0.10 * images.mean().item()
    assert toys.running_mean(objective) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("recipe", ["ard", "iad"])
def test_faithful_attack_moves_batchnorm_at_every_step(recipe):
    images, labels, noise = toys.batch(dtype=DOUBLE)
    student, teacher = toys.toy(dtype=DOUBLE), toys.toy(seed=10, dtype=DOUBLE)
    settings = {"attack_bn": "train", "steps": 10}
    if recipe == "iad":
        settings["begin_epoch"] = 1  # the run is in epoch 0
    objective = toys.build(recipe, student, [teacher], **settings)
    expected = toys.running_mean(objective)
    count = student.module.norm.num_batches_tracked.item()
    recorder = toys.Recorder(objective)
    terms = objective(images, labels, noise)
    assert [p.training for p in recorder.attacks()] == [True] * 10
    assert all(p.grad is None for p in objective.parameters())
    images_adv = recorder.images_adv(images)
    for read in [*(p.images for p in recorder.attacks()), images_adv, images]:
        expected = 0.9 * expected + 0.1 * read.mean().item()
    assert toys.running_mean(objective) == pytest.approx(expected, rel=1e-9)
    assert student.module.norm.num_batches_tracked.item() == count + 12
    assert terms["loss"].isfinite()


def test_published_schedule_drops_once():
    """The official second drop, at epoch 150, sets the rate that it already has."""
    for preset, batch_size in (("paper", 128), ("paper-cifar100", 256)):
        training, _ = toys.settings("ard", preset)
        assert (training.epochs, training.decay_at, training.decay_rate) == (200, (100,), 0.1)
        assert (training.lr, training.weight_decay) == (0.1, 2e-4)
        assert training.batch_size == batch_size
