"""PeerAiD against its specification: weights, gradients, modes, the order of a step."""

import pytest
import torch
import toys
from torch.nn.functional import cross_entropy, log_softmax

from robustify import config
from robustify.losses import kl
from robustify.threat import ThreatModel

DOUBLE = torch.float64
LARGE = ThreatModel("Linf", 0.25)  # leaves ordinary training nothing
FAITHFUL = {"reuse_student_adv_forward": False}
OFF = {
    "ce_weight": 0.0,
    "kd_weight": 0.0,
    "consistency_weight": 0.0,
    "peer_ce_weight": 0.0,
    "peer_kd_weight": 0.0,
}
# The published lambda1 to 3, gamma1 and gamma2, T and T_p, by the number of classes.
PUBLISHED = {
    10: (0, 1, 1, 1, 0.1, 5, 1),
    100: (0, 1, 1, 1, 1, 5, 1),
    200: (0.035, 35, 20, 1, 100, 1, 1),
}
PRESETS = {10: "paper-cifar10", 100: "paper-cifar100", 200: "paper-tinyimagenet"}


def build(classes=10, **settings):
    return toys.build("peeraid", toys.toy(classes=classes, dtype=DOUBLE), **settings).double()


def batch(classes=10, **kwargs):
    return toys.batch(classes=classes, dtype=DOUBLE, **kwargs)


def method(classes):
    """The weights that the YAML file gives for so many classes."""
    recipe = config.find("peeraid")
    return recipe.sections["method"] | recipe.presets[PRESETS[classes]].get("method", {})


@pytest.mark.parametrize(
    ("temperature", "weight", "value"), [(5, 2.5, 0.0272822), (1, 1, 0.510826)]
)
def test_distillation_closed_form(temperature, weight, value):
    """P(x*) = (ln 9, 0, …), S(x*) = 0: KL is 0.0109129 at T = 5, and the term 2.5 times that."""
    settings = OFF | {"kd_weight": float(weight), "temperature": float(temperature)}
    objective = toys.build("peeraid", toys.scripted(*[[0.0] * 10] * 2), **settings)
    objective.peer = toys.scripted([toys.LN9, *[0.0] * 9])
    images, labels, noise = batch()
    terms = objective.train()(images, labels, noise)
    assert terms["student loss"].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("faithful", [False, True])
@pytest.mark.parametrize("classes", [10, 100, 200])
def test_both_losses_are_the_published_ones(classes, faithful):
    """Lambdas, gammas and a mean over classes, as published, against our effective weights."""
    weights = {k: float(v) for k, v in method(classes).items()}
    objective = build(classes, **weights, **(FAITHFUL if faithful else {}))
    images, labels, noise = batch(classes)
    recorder, terms, images_adv = toys.step(objective, (images, labels, noise))
    adv, clean = recorder.of(images_adv), recorder.of(images)
    peer = recorder.of(images_adv, "peer")
    l1, l2, l3, g1, g2, t, t_p = PUBLISHED[classes]

    def kd(p, q, temperature):
        return toys.reference_kl(p, q, temperature, class_mean=True) * temperature**2

    student = l1 * cross_entropy(adv, labels) + l2 * kd(peer, adv, t) + l3 * kd(clean, adv, t)
    taught = g1 * cross_entropy(peer, labels) + g2 * kd(adv, peer, t_p)
    assert torch.isclose(terms["student loss"], student, rtol=1e-9)
    assert torch.isclose(terms["peer loss"], taught, rtol=1e-9)
    assert torch.isclose(terms["loss"], student + taught, rtol=1e-9)


@pytest.mark.parametrize(
    ("term", "detached", "to_student", "to_peer"),
    [
        ("peer_ce_weight", False, False, True),
        ("peer_kd_weight", False, True, True),
        ("peer_kd_weight", True, False, True),
        ("ce_weight", False, True, False),
        ("kd_weight", False, True, False),
        ("consistency_weight", False, True, False),
    ],
)
def test_who_gets_gradient_from_what(term, detached, to_student, to_peer):
    settings = OFF | {term: 1.0, "detach_student_in_peer_loss": detached}
    objective = build(**settings)
    toys.step(objective, batch())

    def moved(network):
        return any(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())

    assert moved(objective.student) == to_student
    assert moved(objective.peer) == to_peer


def test_gradients_are_the_closed_form():
    """d[w KL(p_T(a), p_T(b))]/db = w/T (q - p);  /da = w/T p (log p - log q - KL)."""
    images, labels, noise = batch()

    def gradients(**weights):
        recorder, _, images_adv = toys.step(build(**OFF | weights), (images, labels, noise))
        logits = (recorder.of(images_adv), recorder.of(images), recorder.of(images_adv, "peer"))
        return [z.detach() for z in logits], [z.grad for z in logits]

    def closed(a, b, weight, t):
        log_p, log_q = log_softmax(a / t, 1), log_softmax(b / t, 1)
        p, gap = log_p.exp(), log_p - log_q
        to_a = weight / t * p * (gap - (p * gap).sum(1, keepdim=True)) / len(a)
        return to_a, weight / t * (log_q.exp() - p) / len(a)

    (adv, clean, peer), (to_adv, to_clean, to_peer) = gradients(kd_weight=2.5, temperature=5.0)
    assert torch.allclose(to_adv, closed(peer, adv, 2.5, 5)[1])
    assert to_peer is None or not to_peer.any()

    (adv, clean, peer), (to_adv, to_clean, to_peer) = gradients(
        consistency_weight=2.5, temperature=5.0
    )
    assert torch.allclose(to_clean, closed(clean, adv, 2.5, 5)[0])
    assert torch.allclose(to_adv, closed(clean, adv, 2.5, 5)[1])

    (adv, clean, peer), (to_adv, to_clean, to_peer) = gradients(
        peer_kd_weight=0.5, peer_temperature=2.0
    )
    assert torch.allclose(to_adv, closed(adv, peer, 0.5, 2)[0])
    assert torch.allclose(to_peer, closed(adv, peer, 0.5, 2)[1])
    assert to_adv.abs().sum() > 1e-3


def test_attack_reads_the_peer_on_clean_images_and_no_label():
    images, labels, noise = batch()
    seen = []
    for y in (labels, labels.flip(0)):
        recorder, _, images_adv = toys.step(build(steps=4), (images, y, noise))
        seen.append(images_adv)
        (target,) = recorder.outer("peer", training=False)
        assert torch.equal(target.images, images)
        assert not target.logits.requires_grad
        assert len(recorder.attacks()) == 4
        assert not recorder.attacks("peer")
    assert torch.equal(*seen)


def test_attack_against_the_label_is_the_ablation():
    images, labels, noise = batch()
    _, _, to_peer = toys.step(build(steps=3), (images, labels, noise))
    _, _, to_label = toys.step(build(steps=3, attack_target="label"), (images, labels, noise))
    _, _, pgd_at = toys.step(
        toys.build("pgd_at", toys.toy(dtype=DOUBLE), steps=3, start="gaussian"),
        (images, labels, noise),
    )
    assert torch.equal(to_label, pgd_at)
    assert not torch.equal(to_peer, to_label)


def test_attack_raises_its_objective():
    images, labels, noise = batch()
    objective = build(steps=5)
    student, peer = toys.toy(dtype=DOUBLE).eval(), objective.peer
    with torch.no_grad():
        target = peer.eval()(images)
        start = images + 0.001 * noise.normal(images)
    _, _, images_adv = toys.step(objective.train(), (images, labels, noise))
    with torch.no_grad():
        before, after = kl(target, student(start)), kl(target, student(images_adv))
    assert after.mean() > before.mean() + 1e-3


def test_first_attack_step_on_linear_networks_is_closed_form():
    student, peer = (toys.toy(seed=s, make=toys.Linear, dtype=DOUBLE) for s in (0, 1))
    images, labels, noise = batch()
    threat = toys.SpyThreat("Linf", 0.1)
    objective = toys.build(
        "peeraid", student, peer="toy_net", threat=threat, steps=1, start="images"
    )
    objective.peer = peer.train()
    _, _, images_adv = toys.step(objective, (images, labels, noise))
    with torch.no_grad():
        p, q = student(images).softmax(1), peer(images).softmax(1)
        gradient = ((p - q) @ student.module.weight).view_as(images)
    assert torch.allclose(threat.gradients[0], gradient, rtol=1e-6, atol=1e-9)
    assert torch.allclose(images_adv, (images + 0.05 * gradient.sign()).clamp(0, 1))


def test_attack_on_a_student_that_equals_its_peer_has_no_gradient():
    images, labels, noise = batch()
    threat = toys.SpyThreat("Linf", 0.1)
    objective = build(threat=threat, steps=1, start="images")
    objective.peer.load_state_dict(objective.student.state_dict())
    objective(images, labels, noise)
    assert threat.gradients[0].norm() < 1e-10


def test_attack_moves_no_buffer_of_either_network():
    """The state that the first forward of the loss finds is the one before the step."""
    images, labels, noise = batch()
    objective = build()
    before = toys.snapshot(objective)
    found = []
    note = lambda module, args: found.append(toys.snapshot(objective)) if module.training else None  # noqa: E731
    objective.peer.register_forward_pre_hook(note)
    objective(images, labels, noise)
    (at_first_loss_forward,) = found
    assert toys.same(before, at_first_loss_forward)


@pytest.mark.parametrize(
    ("settings", "old", "adv", "clean", "updates"),
    [
        (FAITHFUL, 0.729, 0.171, 0.1, 3),
        ({}, 0.729, 0.171, 0.1, 2),
        ({"bn_double_adv_update": False}, 0.81, 0.09, 0.1, 2),
    ],
)
def test_batchnorm_order(settings, old, adv, clean, updates):
    images, labels, noise = batch()
    objective = build(**settings)
    student, peer = objective.student.module.norm, objective.peer.module.norm
    before, peer_before = student.running_mean.item(), peer.running_mean.item()
    counts = student.num_batches_tracked.item(), peer.num_batches_tracked.item()
    _, _, images_adv = toys.step(objective, (images, labels, noise))
    mean_adv, mean = images_adv.mean().item(), images.mean().item()
    assert student.running_mean.item() == pytest.approx(
        old * before + adv * mean_adv + clean * mean
    )
    assert peer.running_mean.item() == pytest.approx(0.9 * peer_before + 0.1 * mean_adv)
    assert student.num_batches_tracked.item() == counts[0] + updates
    assert peer.num_batches_tracked.item() == counts[1] + 1
    assert student.momentum == 0.1


def test_forwards_and_their_modes():
    images, labels, noise = batch()
    for settings, count in (({}, 2), (FAITHFUL, 3)):
        recorder, _, images_adv = toys.step(build(**settings), (images, labels, noise))
        read = [torch.equal(p.images, images) for p in recorder.outer()]
        assert read == [False] * (count - 1) + [True]
        assert all(torch.equal(p.images, images_adv) for p in recorder.outer()[:-1])
        (peer,) = recorder.outer("peer")
        assert torch.equal(peer.images, images_adv)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients])


def test_both_networks_step_from_the_same_parameters():
    """As two autograd passes at the old parameters; peer first, then student, is another thing."""
    images, labels, noise = batch()
    rate = 0.1
    joint, apart, turns = build(), build(), build()

    toys.train(joint, [(images, labels, noise)], lr=rate)

    terms = apart(images, labels, noise)
    networks = toys.parameters(apart)
    passes = [
        torch.autograd.grad(terms[loss], networks, retain_graph=True, materialize_grads=True)
        for loss in ("student loss", "peer loss")
    ]
    with torch.no_grad():
        for parameter, *gradients in zip(networks, *passes, strict=True):
            parameter -= rate * sum(gradients)
    for one, two in zip(joint.parameters(), apart.parameters(), strict=True):
        assert torch.allclose(one, two, rtol=1e-10, atol=1e-12)

    for network in (turns.peer, turns.student):
        chosen = toys.parameters(network)
        gradients = torch.autograd.grad(turns(images, labels, noise)["loss"], chosen)
        for parameter, gradient in zip(chosen, gradients, strict=True):
            parameter.data -= rate * gradient
    difference = flat(turns.student.parameters()) - flat(joint.student.parameters())
    assert difference.abs().max() > 1e-4


def test_fast_equals_faithful_after_three_steps():
    batches = [batch(seed=seed) for seed in range(3)]
    fast, faithful, undoubled = build(), build(**FAITHFUL), build(bn_double_adv_update=False)
    losses = [toys.train(objective, batches, lr=0.1) for objective in (fast, faithful, undoubled)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)
    state, reference = fast.learned_state(), faithful.learned_state()
    for key, value in state.items():
        if not key.endswith("num_batches_tracked"):
            assert torch.allclose(value, reference[key], rtol=1e-8, atol=1e-10), key
    assert losses[2][1:] != pytest.approx(losses[1][1:], rel=1e-9)  # eval mode tells them apart


def test_labels_reach_the_student_only_through_the_peer():
    images, labels, noise = batch()
    one = build()(images, labels, noise)
    two = build()(images, labels.flip(0), noise)
    assert torch.equal(one["student loss"], two["student loss"])
    assert not torch.equal(one["peer loss"], two["peer loss"])


@pytest.mark.parametrize(
    ("preset", "epochs", "decays"),
    [
        ("paper-cifar10", 300, (214, 259, 284)),
        ("paper-cifar100", 300, (214, 259, 284)),
        ("paper-tinyimagenet", 200, (99, 149)),
        ("paper-tinyimagenet-wrn", 100, (49, 79)),
    ],
)
def test_published_schedules(preset, epochs, decays):
    training, attack = toys.settings("peeraid", preset)
    assert (training.epochs, training.decay_at) == (epochs, decays)
    assert (training.averaging, training.averaging_start) == ("swa", decays[0])
    assert (training.lr, training.weight_decay, training.momentum) == (0.1, 2e-4, 0.9)
    assert (training.optimizer, training.batch_size) == ("momentum", 128)
    assert attack == {"steps": 10, "step_size": 2 / 255, "start": "gaussian"}


def test_a_network_without_batchnorm_trains_as_well():
    images, labels, noise = toys.batch()
    objective = toys.build("peeraid", toys.toy(make=toys.Linear))
    losses = toys.train(objective, [(images, labels, noise)] * 2)
    assert all(torch.tensor(losses).isfinite())


def test_one_image_and_no_attack_steps():
    images, labels, noise = batch(count=1)
    objective = build(steps=0)
    recorder = toys.Recorder(objective)
    objective(images, labels, noise)["loss"].backward()
    assert all(torch.equal(p.images, images) for p in recorder.passes)


@pytest.fixture(scope="module")
def overfitted():
    """Student and peer, trained on 256 digits."""
    student, peer = (toys.toy(seed=seed, make=toys.Wide) for seed in (0, 1))
    return toys.overfit("peeraid", student, peer=peer, epochs=40, lr=0.05, threat=LARGE)


@pytest.mark.slow
def test_toy_overfit(overfitted):
    objective, images, labels, noise = overfitted
    terms = toys.evaluated(objective, images, labels, noise)
    assert terms["peer accuracy on student's attack"] > 0.9
    assert toys.accuracy(objective.student, images, labels) > 0.8


@pytest.mark.slow
def test_the_peer_is_not_robust(overfitted):
    objective, images, labels, noise = overfitted
    own = toys.robust_accuracy(objective.peer, images, labels, LARGE)
    terms = toys.evaluated(objective, images, labels, noise)
    assert own < 0.1
    assert terms["peer accuracy on student's attack"] > 0.9
