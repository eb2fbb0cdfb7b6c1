"""MTARD against its formula, and its balance of two losses."""

import pytest
import torch
import toys

DOUBLE = torch.float64


def build(classes=10, **settings):
    student, *teachers = (toys.toy(seed=s, classes=classes, dtype=DOUBLE) for s in (0, 10, 11))
    return toys.build("mtard", student, teachers, **settings).double()


def share(objective, adversarial, natural):
    """w after the balance has seen two losses of these values."""
    values = (torch.tensor(loss, dtype=DOUBLE) for loss in (adversarial, natural))
    objective.balance(*values, lr_scale=objective.lr_scale)
    return objective.balance.share


def test_closed_form():
    """Both divergences are 0.510826 at the first step, where the share is one half."""
    student = toys.scripted(*[[0.0] * 10] * 2)
    teachers = [toys.scripted([toys.LN9, *[0.0] * 9]) for _ in range(2)]
    images, labels, noise = toys.batch(dtype=DOUBLE)
    terms = toys.build("mtard", student, teachers)(images, labels, noise)
    assert terms["loss"].item() == pytest.approx(0.0510826, rel=1e-5)
    assert 0.1 * 0.5 * terms["adversarial"].item() == pytest.approx(0.025541, rel=1e-4)


@pytest.mark.parametrize(("count", "factor"), [(10, 1), (100, 10)])
def test_loss_is_the_published_one(count, factor):
    """Means over classes, ten times as much for 100 classes; the second step has other weights."""
    images, labels, noise = toys.batch(classes=count, dtype=DOUBLE)
    objective = build(count)
    recorder = toys.Recorder(objective)
    share, first = 0.5, None
    for _ in range(2):
        recorder.passes.clear()
        terms = objective(images, labels, noise)
        images_adv = recorder.images_adv(images)
        robust = recorder.of(images_adv, "robust_teacher", training=False)
        standard = recorder.of(images, "standard_teacher", training=False)
        adversarial = toys.reference_kl(robust, recorder.of(images_adv), class_mean=True)
        natural = toys.reference_kl(standard, recorder.of(images), class_mean=True)
        first = first or (adversarial.item(), natural.item())
        left = adversarial.item() / first[0], natural.item() / first[1]
        share -= 0.025 * (share - left[1] / sum(left))
        expected = factor * ((1 - share) * adversarial + share * natural)
        assert torch.isclose(terms["loss"], expected, rtol=1e-9)
        terms["loss"].backward()
        with torch.no_grad():
            for parameter in toys.parameters(objective):
                parameter -= 0.5 * parameter.grad
    assert share != 0.5


def test_balance_moves_towards_the_loss_that_is_left():
    objective = build()
    assert share(objective, 3.0, 2.0).item() == 0.5  # the first step sets what 1 means
    assert share(objective, 3.0, 2.0).item() == 0.5
    moved = share(objective, 1.5, 2.0)
    assert moved.item() == pytest.approx(0.5041667, rel=1e-6)
    assert not moved.requires_grad
    before = moved.item()
    assert share(objective, 3.0, 0.2).item() < before


def test_balance_slows_down_with_the_learning_rate():
    objective = build()
    share(objective, 1.0, 1.0)
    objective.lr_scale = 0.1
    moved = share(objective, 0.5, 1.0).item()
    assert moved == pytest.approx(0.5 + 0.0025 * (2 / 3 - 0.5), rel=1e-9)


def test_the_rate_is_a_setting():
    quick = build(balance_rate=1.0)
    share(quick, 1.0, 1.0)
    assert share(quick, 0.5, 1.0).item() == pytest.approx(2 / 3)


def test_the_share_carries_no_gradient():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = build()
    share(objective, 1.0, 1.0)
    recorder, terms, images_adv = toys.step(objective, (images, labels, noise))
    natural = terms["share of natural"].item()
    assert natural != 0.5
    for network, read, weight in [
        ("robust_teacher", images_adv, 1 - natural),
        ("standard_teacher", images, natural),
    ]:
        target = recorder.of(read, network, training=False).softmax(1)
        logits = recorder.of(read)
        assert torch.allclose(logits.grad, 0.1 * weight * (logits.softmax(1) - target) / 6)


def test_balance_is_part_of_a_checkpoint():
    batches = [toys.batch(seed=s, dtype=DOUBLE) for s in range(4)]
    whole, resumed, forgetful = build(), build(), build()
    toys.train(whole, batches[:2], lr=0.01)
    state = {k: v.clone() for k, v in whole.learned_state().items()}
    assert {"balance.share", "balance.first"} <= state.keys()
    assert state["balance.first"].min() > 0
    resumed.load_learned_state(state)
    forgetful.load_learned_state(state)
    forgetful.balance.first.zero_()
    rest = [toys.train(o, batches[2:], lr=0.01) for o in (whole, resumed, forgetful)]
    assert rest[0] == rest[1]
    assert rest[0] != rest[2]


def test_each_teacher_reads_its_own_images_once():
    batch = toys.batch(dtype=DOUBLE)
    recorder, _, images_adv = toys.step(build(), batch)
    (robust,) = [p for p in recorder.passes if p.network == "robust_teacher"]
    (standard,) = [p for p in recorder.passes if p.network == "standard_teacher"]
    assert torch.equal(robust.images, images_adv)
    assert torch.equal(standard.images, batch[0])


def test_batchnorm_reads_adversarial_images_first():
    images, labels, noise = toys.batch(dtype=DOUBLE)
    objective = build()
    old = toys.running_mean(objective)
    _, _, images_adv = toys.step(objective, (images, labels, noise))
    expected = 0.81 * old + 0.09 * images_adv.mean().item() + 0.10 * images.mean().item()
    assert toys.running_mean(objective) == pytest.approx(expected, rel=1e-9)


def test_attack_is_cross_entropy_on_the_label():
    batch = toys.batch(dtype=DOUBLE)
    _, _, images_adv = toys.step(build(steps=3), batch)
    pgd_at = toys.build("pgd_at", toys.toy(dtype=DOUBLE), steps=3, start="gaussian")
    assert torch.equal(images_adv, toys.step(pgd_at, batch)[2])


def test_published_schedule():
    training, attack = toys.settings("mtard", "paper")
    assert (training.epochs, training.decay_at) == (300, (215, 260, 285))
    assert attack == {"steps": 10, "step_size": 2 / 255, "start": "gaussian"}
