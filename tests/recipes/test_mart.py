"""MART against its formula."""

import pytest
import torch
import toys
from torch.nn.functional import one_hot

DOUBLE = torch.float64


def build(classes=10, **settings):
    return toys.build("mart", toys.toy(classes=classes, dtype=DOUBLE), **settings)


def published(clean, adversarial, labels, beta):
    p, p_adv = clean.softmax(1), adversarial.softmax(1)
    total = 0.0
    for row, (q, q_adv, label) in enumerate(zip(p, p_adv, labels, strict=True)):
        rival = max(q_adv[c] for c in range(len(q_adv)) if c != label)
        boosted = -q_adv[label].log() - (1.0001 - rival).log()
        divergence = (p[row] * (p[row].log() - p_adv[row].log())).sum()
        total = total + boosted + beta * divergence * (1 - q[label])
    return total / len(labels)


@pytest.mark.parametrize(("label", "value"), [(0, 1.049678), (1, 1.896920)])
def test_boosted_cross_entropy_closed_form(label, value):
    """p* = (0.5, 0.3, 0.2)."""
    student = toys.scripted([0.0] * 3, torch.tensor([0.5, 0.3, 0.2], dtype=DOUBLE).log())
    images, _, noise = toys.batch(classes=3, dtype=DOUBLE)
    labels = torch.full((6,), label)
    terms = toys.build("mart", student)(images, labels, noise)
    assert terms["boosted cross-entropy"].item() == pytest.approx(value, rel=2e-6)


def test_loss_is_the_formula(classes):
    images, labels, noise = toys.batch(classes=classes, dtype=DOUBLE)
    recorder, terms, images_adv = toys.step(build(classes), (images, labels, noise))
    expected = published(recorder.of(images), recorder.of(images_adv), labels, beta=5.0)
    assert torch.isclose(terms["loss"], expected, rtol=1e-9)


@pytest.mark.parametrize("detach_clean", [False, True])
def test_gradient_reaches_the_clean_image_through_divergence_and_weight(detach_clean):
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = build(detach_clean=detach_clean, beta=5.0)
    recorder, _, images_adv = toys.step(objective, (images, labels, noise))
    clean, adversarial = recorder.of(images), recorder.of(images_adv)
    if detach_clean:
        assert clean.grad is None
        return
    p, log_adv = clean.softmax(1), adversarial.log_softmax(1)
    gap = p.log() - log_adv
    divergence = (p * gap).sum(1, keepdim=True)
    p_true = p.gather(1, labels[:, None])
    through_divergence = (1 - p_true) * p * (gap - divergence)
    through_weight = -divergence * p_true * (one_hot(labels, 10) - p)
    assert through_weight.abs().max() > 1e-8
    assert torch.allclose(clean.grad, 5 * (through_divergence + through_weight) / 6, rtol=1e-6)


def test_batchnorm_reads_clean_images_first():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = build()
    old = toys.running_mean(objective)
    recorder, _, images_adv = toys.step(objective, (images, labels, noise))
    expected = 0.81 * old + 0.09 * images.mean().item() + 0.10 * images_adv.mean().item()
    assert toys.running_mean(objective) == pytest.approx(expected, rel=1e-9)
    assert len(recorder.outer()) == 2


def test_attack_is_cross_entropy_on_the_label():
    batch = toys.batch(dtype=DOUBLE)
    _, _, images_adv = toys.step(build(steps=3), batch)
    pgd_at = toys.build("pgd_at", toys.toy(dtype=DOUBLE), steps=3, start="gaussian")
    assert torch.equal(images_adv, toys.step(pgd_at, batch)[2])


def test_published_settings():
    training, attack = toys.settings("mart", "paper")
    assert (training.lr, training.weight_decay, training.epochs) == (0.01, 3.5e-3, 120)
    assert attack == {"steps": 10, "step_size": 0.007, "start": "gaussian"}
    training, _ = toys.settings("mart", "paper-wrn")
    assert (training.lr, training.weight_decay, training.epochs) == (0.1, 7e-4, 90)
