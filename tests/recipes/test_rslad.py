"""RSLAD against its formula."""

import pytest
import torch
import toys
from torch.nn.functional import cross_entropy

from robustify.losses import kl

DOUBLE = torch.float64


def build(classes=10, **settings):
    student, teacher = (toys.toy(seed=s, classes=classes, dtype=DOUBLE) for s in (0, 10))
    return toys.build("rslad", student, [teacher], **settings)


def test_adversarial_term_closed_form():
    student, teacher = toys.scripted(*[[0.0] * 10] * 2), toys.scripted([toys.LN9, *[0.0] * 9])
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = toys.build("rslad", student, [teacher], clean_weight=0.0)
    assert objective(images, labels, noise)["loss"].item() == pytest.approx(0.042569, rel=1e-4)


@pytest.mark.parametrize(("count", "factor"), [(10, 1), (100, 10)])
def test_loss_is_the_published_one(count, factor):
    """5/6 and 1/6 of a mean over classes; ten times that for 100 classes."""
    images, labels, noise = toys.batch(classes=count, dtype=DOUBLE)
    recorder, terms, images_adv = toys.step(build(count), (images, labels, noise))
    soft = recorder.of(images, "teacher", training=False)
    adversarial = toys.reference_kl(soft, recorder.of(images_adv), class_mean=True)
    clean = toys.reference_kl(soft, recorder.of(images), class_mean=True)
    expected = factor * (5 / 6 * adversarial + 1 / 6 * clean)
    assert torch.isclose(terms["loss"], expected, rtol=1e-9)


def test_gradients_are_the_closed_form():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    recorder, _, images_adv = toys.step(build(), (images, labels, noise))
    soft = recorder.of(images, "teacher", training=False).softmax(1)
    for read, weight in ((images_adv, 5 / 60), (images, 1 / 60)):
        logits = recorder.of(read)
        assert torch.allclose(logits.grad, weight * (logits.softmax(1) - soft) / 6)


def test_a_certain_teacher_is_its_labels():
    """5/6 CE(s(x*)) + 1/6 CE(s(x)), times the effective factor."""
    images, _, noise = toys.batch(dtype=DOUBLE)
    teacher = toys.scripted([50.0, *[0.0] * 9])
    labels = torch.zeros(6, dtype=torch.int64)
    objective = toys.build("rslad", toys.toy(dtype=DOUBLE), [teacher])
    recorder, terms, images_adv = toys.step(objective, (images, labels, noise))
    adversarial = cross_entropy(recorder.of(images_adv), labels)
    clean = cross_entropy(recorder.of(images), labels)
    assert torch.isclose(terms["loss"], (5 / 6 * adversarial + 1 / 6 * clean) / 10, rtol=1e-9)


def test_no_label_is_read():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    losses, seen = [], []
    for y in (labels, labels.flip(0)):
        _, terms, images_adv = toys.step(build(steps=4), (images, y, noise))
        losses.append(terms["loss"])
        seen.append(images_adv)
    assert torch.equal(*seen)
    assert torch.equal(*losses)


def test_attack_moves_away_from_the_teacher_on_clean_images():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    recorder, _, images_adv = toys.step(build(steps=5), (images, labels, noise))
    student = toys.toy(dtype=DOUBLE).eval()
    (read,) = [p for p in recorder.passes if p.network == "teacher"]  # one forward a step
    assert torch.equal(read.images, images)
    with torch.no_grad():
        start = images + 0.001 * noise.normal(images)
        before, after = (kl(read.logits, student(x)).mean() for x in (start, images_adv))
    assert after > before + 1e-3


def test_batchnorm_reads_adversarial_images_first():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = build()
    old = toys.running_mean(objective)
    _, _, images_adv = toys.step(objective, (images, labels, noise))
    expected = 0.81 * old + 0.09 * images_adv.mean().item() + 0.10 * images.mean().item()
    assert toys.running_mean(objective) == pytest.approx(expected, rel=1e-9)


def test_published_schedule():
    training, attack = toys.settings("rslad", "paper")
    assert (training.epochs, training.decay_at) == (300, (215, 260, 285))
    assert (training.lr, training.weight_decay) == (0.1, 2e-4)
    assert attack == {"steps": 10, "step_size": 2 / 255, "start": "gaussian"}
