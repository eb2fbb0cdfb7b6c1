"""SA-MDRAD (our reconstruction): rectification, weights, fusion, features, and who reads what."""

import copy
import json
import math

import pytest
import safetensors
import timm
import torch
import toys
from torch.nn import functional as F

from robustify import config, harden, models
from robustify.balance import Balance
from robustify.features import FeatureMatch, Projector, Standardizer
from robustify.fusion import Fusion, Panel, fuse, fusion_weights, gated, rectify, trust
from robustify.fusion import weight_entropy as entropy
from robustify.losses import cross_entropy, kl_from_probabilities
from robustify.noise import Noise
from robustify.recipes.sa_mdrad import INERT, SaMdrad, stages
from robustify.recipes.standard import Standard

ATTACK = {"steps": 2, "step_size": 0.05, "start": "gaussian"}


class MapNet(toys.ToyNet):
    """A toy with a last feature map, of as many channels as asked for."""

    def __init__(self, num_classes=10, width=12):
        super().__init__(num_classes)
        if width != 12:
            self.conv2 = torch.nn.Conv2d(8, width, 3, stride=4, padding=1, bias=False)
            self.norm2, self.head = torch.nn.BatchNorm2d(width), torch.nn.Linear(width, num_classes)
            self.reset_parameters()

    def forward_features(self, images):
        maps = self.norm1(self.conv1(self.norm(images))).relu()
        return self.norm2(self.conv2(maps)).relu()

    def forward_head(self, maps):
        return self.head(maps.mean((2, 3)))

    def forward(self, images):
        return self.forward_head(self.forward_features(images))


def network(seed=0, width=12, classes=10, dtype=torch.float64, **kwargs):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = toys.wrap(MapNet(classes, width), **kwargs).to(dtype)
        with torch.no_grad():
            classifier.train()(torch.rand(32, 1, 8, 8, dtype=dtype))
    return classifier


def build(student=None, teachers=None, *, threat=toys.THREAT, attack=ATTACK, **settings):
    """The recipe's last stage with given teachers, in train mode."""
    student = student or network()
    teachers = teachers or [network(11), network(12, width=7)]
    with torch.random.fork_rng():
        torch.manual_seed(3)
        *_, objective = stages(student, teachers, threat=threat, attack=attack, **settings)
    return objective.to(next(student.parameters()).dtype).train()


def batch(count=6, classes=10):
    return toys.batch(count, classes, dtype=torch.float64)


class Spy:
    """What every network of an objective reads, in order: (who, what it was asked for, images)."""

    def __init__(self, objective):
        self.reads, self.given = [], {}
        self._watch("student", objective.student)
        for number, member in enumerate(objective.teachers.members, 1):
            self._watch(f"teacher {number}", member.network)

    def _watch(self, name, network):
        features, forward = network.features, network.forward

        def both(images):
            self.reads.append((name, "features", network.training, images.detach().clone()))
            self.given[name, len(self.reads)] = out = features(images)
            if out[0].requires_grad:
                out[0].retain_grad()
            return out

        def logits(images):
            self.reads.append((name, "logits", network.training, images.detach().clone()))
            return forward(images)

        network.features, network.forward = both, logits

    def of(self, name):
        return [
            (kind, training, images) for who, kind, training, images in self.reads if who == name
        ]

    def student(self):
        """(images, (logits, maps)) of the student's forwards in the loss."""
        return [
            (images, self.given[name, i])
            for i, (name, kind, _, images) in enumerate(self.reads, 1)
            if name == "student" and kind == "features"
        ]


# 1: rectification


def test_rectification_swaps_the_largest_logit_with_that_of_the_label():
    z = torch.tensor([[1.0, 5, 2], [1.0, 5, 2], [3.0, 1, 0]])
    kept = z.clone()
    found = rectify(z, torch.tensor([2, 1, 2]))
    assert found.tolist() == [[1, 2, 5], [1, 5, 2], [0, 1, 3]]
    assert torch.equal(z, kept)


def test_rectification_of_random_logits():
    z = torch.randn(3, 50, 10, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.arange(50) % 10
    found = rectify(z, labels)
    assert (found.argmax(-1) == labels).all()
    assert torch.equal(rectify(found, labels), found)
    assert torch.equal(found.sort(-1).values, z.sort(-1).values)
    right = z.argmax(-1) == labels
    assert torch.equal(found[right], z[right])
    assert (found != z).any(-1).sum() == (~right).sum() > 0
    for temperature in (1, 4, 20):
        swapped = rectify((z / temperature).softmax(-1), labels)
        assert torch.allclose((found / temperature).softmax(-1), swapped)


# 2, 3: weights


def logits_of(losses):
    """Two-class logits with these cross-entropies for class 0: (K, 1, 2)."""
    p = torch.tensor(losses, dtype=torch.float64).neg().exp()
    return torch.stack([p.log(), (1 - p).log()], -1)[:, None]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([0.1, 0.1, 5.0], [0.4963, 0.4963, 0.0073]),
        ([0.1, 5.0], [0.9926, 0.0074]),
        ([0.3, 0.3, 0.3, 0.3], [0.25] * 4),
        ([0.7], [1.0]),
    ],
)
def test_weights_of_ca_mkd(losses, expected):
    logits = logits_of(losses).requires_grad_()
    found = fusion_weights(logits, torch.tensor([0]))
    assert found[:, 0].tolist() == pytest.approx(expected, abs=5e-5)
    assert not found.requires_grad
    assert found.sum().item() == pytest.approx(1)
    if len(losses) == 2:
        sharp = fusion_weights(logits, torch.tensor([0]), temperature=1.0)
        assert torch.allclose(found, sharp)


def test_weights_stay_finite_and_below_their_limit():
    z = torch.randn(4, 40, 10, generator=torch.Generator().manual_seed(0)) * 300
    labels = torch.arange(40) % 10
    for temperature in (None, 0.5, 4.0):
        found = fusion_weights(z, labels, temperature=temperature)
        assert found.isfinite().all()
        assert torch.allclose(found.sum(0), torch.ones(40))
    limited = fusion_weights(z, labels)
    assert limited.max() <= 1 / 3 + 1e-6
    far = torch.tensor([[[0.0, 1000]], [[0.0, 1]], [[0.0, 1]]])
    assert fusion_weights(far, torch.tensor([0]))[:, 0].tolist() == pytest.approx([0, 0.5, 0.5])
    sharp = fusion_weights(logits_of([0.1, 0.3]), torch.tensor([0]), temperature=0.05)
    assert sharp[0, 0].item() == pytest.approx(1 / (1 + math.exp(-0.2 / 0.05)))


def test_a_teacher_that_is_wrong_and_sure_counts_only_if_weights_are_taken_after_rectifying():
    z, labels = torch.tensor([[[2.0, 1, 0]], [[0.0, 9, 1]]]), torch.tensor([0])
    expected = {"raw": [0.9998, 0.0002], "rectified": [0.40, 0.60], "uniform": [0.5, 0.5]}
    for source, weights in expected.items():
        fusion = Fusion(rectification="swap", weights_from=source, weight_temperature=None)
        found = fusion.read(z, labels).weights[:, 0].tolist()
        assert found == pytest.approx(weights, abs=5e-3 if source == "rectified" else 5e-5)


def test_entropy_of_weights():
    weights = torch.tensor([[0.5, 1.0], [0.5, 0.0]])
    assert entropy(weights).tolist() == pytest.approx([math.log(2), 0])


# 4, 5: fusion and the logit loss


def test_one_kl_to_the_fused_target_has_the_gradients_of_the_weighted_sum():
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(3, 20, 10, generator=generator).double() * 4
    labels = torch.arange(20) % 10
    student = torch.randn(20, 10, generator=generator).double().requires_grad_()
    read = Fusion(rectification="swap", weights_from="raw", weight_temperature=None).read(z, labels)
    q = (rectify(z, labels) / 4).softmax(-1)
    fused = fuse(q, read.weights)
    assert (fused.argmax(1) == labels).all()
    assert torch.allclose(fused.sum(1), torch.ones(20).double())

    def divergence(target):
        return kl_from_probabilities(target, student, temperature=4.0)

    (one,) = torch.autograd.grad(divergence(fused).sum(), student)
    each = sum(w * divergence(p) for w, p in zip(read.weights, q, strict=True))
    (many,) = torch.autograd.grad(each.sum(), student)
    assert (one - many).abs().max() < 1e-12


def test_partial_trust_mixes_teacher_and_student():
    z, labels = torch.tensor([[[0.0, 2, 1]]]).double(), torch.tensor([0])
    own = torch.tensor([[1.0, 0, 0]]).double()
    fusion = Fusion(rectification="partial_trust", weights_from="raw", weight_temperature=None)
    read = fusion.read(z, labels)
    a = z[0].softmax(1)[0, 0] ** 0.1
    assert torch.allclose(trust(z, labels), a)
    found = fusion.target(read, labels, 4.0, own=own)
    assert torch.allclose(found, a * (z[0] / 4).softmax(1) + (1 - a) * (own / 4).softmax(1))
    assert torch.allclose(fusion.target(read, labels, 4.0), (z[0] / 4).softmax(1))


def hand_computed(spy, objective, images, labels, view="adv"):
    """KL_adv and KL_nat per image at temperature 4, from what the networks gave."""
    with torch.no_grad():
        (images_adv, (s_adv, _)), (_, (s, _)) = spy.student()
        targets = []
        for seen in (images_adv if view == "adv" else images, images):
            z = [member.network.module.eval()(seen) for member in objective.teachers.members]
            weights = torch.stack([F.cross_entropy(each, labels, reduction="none") for each in z])
            weights = (-weights).softmax(0)  # two teachers
            swapped = []
            for each in z:
                rows = each.clone()
                for n, y in enumerate(labels.tolist()):
                    m = int(each[n].argmax())
                    rows[n, y], rows[n, m] = each[n, m], each[n, y]
                swapped.append((rows / 4).softmax(1))
            targets.append(sum(w[:, None] * q for w, q in zip(weights, swapped, strict=True)))
    logs = [(each / 4).log_softmax(1) for each in (s_adv, s)]
    return [(q * (q.log() - p)).sum(1) for q, p in zip(targets, logs, strict=True)], targets


@pytest.mark.parametrize("view", ["adv", "clean"])
def test_the_logit_loss_is_13_and_a_third_times_one_kl_and_2_and_two_thirds_times_the_other(view):
    images, labels, noise = batch()
    objective = build(adv_view=view, feature_weight=0)
    spy = Spy(objective)
    terms = objective(images, labels, noise)
    terms["loss"].backward()
    (adversarial, natural), (q_adv, _) = hand_computed(spy, objective, images, labels, view)
    expected = (40 / 3 * adversarial + 8 / 3 * natural).mean()
    assert torch.isclose(terms["loss"], expected, rtol=1e-9)
    assert (q_adv.argmax(1) == labels).all()
    (_, (s_adv, _)), _ = spy.student()
    p = (s_adv.detach() / 4).softmax(1)
    assert torch.allclose(s_adv.grad, 5 / 6 * 4 * (p - q_adv) / len(images), atol=1e-12)


def test_hard_labels_have_the_weight_they_are_given():
    images, labels, noise = batch()
    plain, hard = (build(ce_weight=w)(images, labels, noise) for w in (0.0, 0.5))
    assert torch.isclose(hard["loss"], plain["loss"] + 0.5 * hard["cross-entropy"], rtol=1e-12)
    assert hard["cross-entropy"] > 0


def test_impossible_classes_change_nothing():
    images, labels, noise = batch()

    def padded(classifier):
        head, body = classifier.module.head, classifier.module
        wider = torch.nn.Linear(head.in_features, 13).double()
        with torch.no_grad():
            wider.weight[:10], wider.bias[:10] = head.weight, head.bias
            wider.weight[10:], wider.bias[10:] = 0, -1e9
        body.head = wider
        return classifier

    teachers = [network(11), network(12)]
    loss = build(network(), teachers, feature_weight=0)(images, labels, noise)["loss"]
    teachers = [padded(network(11)), padded(network(12))]
    wider = build(padded(network()), teachers, feature_weight=0)(images, labels, noise)["loss"]
    assert torch.isclose(loss, wider, rtol=1e-9)


def test_mtard_balance():
    balance = Balance()
    one = torch.tensor(2.0, requires_grad=True)
    total = balance(one, torch.tensor(3.0))
    assert total.item() == pytest.approx(0.5 * 2 + 0.5 * 3)
    assert torch.autograd.grad(total, one)[0].item() == pytest.approx(0.5)
    balance(torch.tensor(1.0), torch.tensor(3.0))  # ratios 0.5 and 1
    assert balance.share.item() == pytest.approx(0.5041667, abs=1e-7)
    assert {"share", "first"} == set(balance.state_dict())
    dropped = Balance()
    dropped(torch.tensor(2.0), torch.tensor(3.0))
    dropped(torch.tensor(1.0), torch.tensor(3.0), lr_scale=0.1)
    assert dropped.share.item() == pytest.approx(0.5 + 0.0025 / 6)
    objective = build(balance="mtard", feature_weight=0)
    images, labels, noise = batch()
    terms = objective(images, labels, noise)
    assert torch.isclose(terms["loss"], (terms["adversarial"] + terms["clean"]) / 2)
    assert "balance.share" in objective.learned_state()


# 6: who gets gradient


def test_teachers_get_none_projectors_theirs_from_features_alone_and_the_student_from_all():
    images, _, noise = batch()
    objective = build()
    objective.epoch = 5
    predicted = objective.teachers(images).argmax(-1)
    labels = torch.where(torch.arange(6) < 3, *predicted)  # each teacher is right somewhere
    before = toys.snapshot(objective.teachers)
    terms = objective(images, labels, noise)
    terms["loss"].backward()
    assert toys.same(before, toys.snapshot(objective.teachers))
    assert not any(p.requires_grad or p.grad is not None for p in objective.teachers.parameters())
    assert not any(m.training for m in objective.teachers.members)
    projectors = list(objective.features.projectors.parameters())
    assert all(p.grad.abs().sum() > 0 for p in projectors)
    assert all(p.grad.abs().sum() > 0 for p in objective.student.parameters())
    for name, uses_projectors in (("adversarial", False), ("clean", False), ("features", True)):
        objective.zero_grad()
        objective(images, labels, noise)[name].backward()
        assert all((p.grad is not None) == uses_projectors for p in projectors)
        assert objective.student.module.conv1.weight.grad.abs().sum() > 0


def test_without_feature_weight_there_are_no_projectors():
    objective = build(feature_weight=0)
    assert not [n for n, _ in objective.named_parameters() if "projector" in n]
    assert objective(*batch())["features"] == 0


def test_the_feature_loss_ramps_over_epochs():
    images, labels, noise = batch()
    losses = []
    for epoch in (0, 2, 5, 50):
        objective = build(feature_weight=3.0)
        objective.epoch = epoch
        terms = objective(images, labels, noise)
        logit = 5 / 6 * terms["adversarial"] + 1 / 6 * terms["clean"]
        losses.append(((terms["loss"] - logit) / terms["features"]).item())
    assert losses == pytest.approx([0, 1.2, 3, 3])
    at_once = build(feature_ramp_epochs=0)(images, labels, noise)
    assert at_once["loss"] > 5 / 6 * at_once["adversarial"] + 1 / 6 * at_once["clean"]


# 7, 8, 11: what is read, and the attack


@pytest.mark.parametrize("attack_objective", ["kl", "ce", "trades", "teacher_in_loop"])
@pytest.mark.parametrize("view", ["adv", "clean"])
def test_how_often_teachers_read_and_what(view, attack_objective):
    images, labels, noise = batch()
    objective = build(adv_view=view, attack_objective=attack_objective)
    spy = Spy(objective)
    objective(images, labels, noise)
    (images_adv, _), (clean, _) = spy.student()
    assert torch.equal(clean, images)
    for teacher in ("teacher 1", "teacher 2"):
        reads = spy.of(teacher)
        kinds = [kind for kind, _, _ in reads]
        loop = 2 if attack_objective == "teacher_in_loop" else 0
        assert kinds == ["features"] + ["logits"] * (loop + (view == "adv"))
        assert torch.equal(reads[0][2], images)  # features are read at clean images only
        if view == "adv":
            assert torch.equal(reads[-1][2], images_adv)
        assert not any(training for _, training, _ in reads)


@pytest.mark.parametrize("attack_objective", ["kl", "ce", "trades", "teacher_in_loop"])
def test_the_attack_stays_inside_and_leaves_no_trace(attack_objective):
    images, labels, noise = batch()
    objective = build(attack_objective=attack_objective, attack={**ATTACK, "steps": 5})
    before, modes = toys.snapshot(objective), [m.training for m in objective.modules()]
    with torch.no_grad():
        read = objective.fusion.read(objective.teachers(images), labels)
    images_adv = objective._attack(images, labels, read, noise)
    assert (images_adv - images).abs().max() <= toys.THREAT.eps + 1e-6
    assert 0 <= images_adv.min() <= images_adv.max() <= 1
    assert (images_adv - images).abs().max() > 0.09
    assert toys.same(before, toys.snapshot(objective))
    assert modes == [m.training for m in objective.modules()]
    assert all(p.grad is None for p in objective.parameters())
    with torch.no_grad():
        own, attacked = (objective.student.eval()(x) for x in (images, images_adv))
    if attack_objective == "trades":
        random = images + 0.1 * torch.randn_like(images).sign()
        assert toys.reference_kl(own, attacked) > 5 * toys.reference_kl(
            own, objective.student(random)
        )
    else:
        assert cross_entropy(attacked, labels).mean() > cross_entropy(own, labels).mean()


def attack_gradient(objective, images, labels, logits, weights=None):
    """The gradient of the first attack step, for teachers' logits that are given."""
    spy = toys.SpyThreat("Linf", 0.1)
    objective.threat = spy
    objective.attack = {"steps": 1, "step_size": 0.05, "start": "images"}
    read = objective.fusion.read(logits, labels)
    objective._attack(images, labels, read, Noise.for_batch(0, images))
    return spy.gradients[0]


def test_with_one_hot_targets_the_kl_attack_is_the_cross_entropy_attack():
    images, labels, _ = batch()
    sure = 1e4 * F.one_hot(labels, 10).double().expand(2, -1, -1)
    by_kl, by_ce = (
        attack_gradient(build(attack_objective=name), images, labels, sure) for name in ("kl", "ce")
    )
    assert by_kl.isfinite().all()
    assert torch.allclose(by_kl, by_ce, rtol=1e-9, atol=1e-14)


def test_a_teacher_in_the_loop_sends_gradient_through_itself():
    images, labels, _ = batch()
    taught = build().teachers(images).detach()
    fixed, live = (
        attack_gradient(build(attack_objective=name), images, labels, taught)
        for name in ("kl", "teacher_in_loop")
    )
    objective = build(attack_objective="teacher_in_loop")
    x = images.clone().requires_grad_()
    read = objective.fusion.read(taught, labels)
    q = objective.fusion.target(read._replace(logits=objective.teachers(x)), labels, 1.0)
    s = objective.student.eval()(x).log_softmax(1)
    (expected,) = torch.autograd.grad((q * (q.log() - s)).sum(), x)
    assert torch.allclose(live, expected, rtol=1e-5, atol=1e-7)
    assert not torch.allclose(live, fixed, rtol=0.1)


def test_an_unrectified_teacher_attacked_at_saturation_gives_no_nan():
    images, labels, noise = batch()
    teachers = [network(11), network(12)]
    for teacher in teachers:
        with torch.no_grad():
            teacher.module.head.weight.mul_(1e4)
    for name in ("kl", "teacher_in_loop"):
        terms = build(teachers=teachers, attack_objective=name)(images, labels, noise)
        terms["loss"].backward()
        assert terms["loss"].isfinite()


def test_batchnorm_moves_for_adversarial_images_and_then_for_clean_ones():
    """0.81 old + 0.09 adversarial + 0.10 clean, for the student's BatchNorm on the images."""
    images, labels, noise = batch()
    objective = build()
    old = toys.running_mean(objective)
    spy = Spy(objective)
    objective(images, labels, noise)
    (images_adv, _), (clean, _) = spy.student()
    expected = 0.81 * old + 0.09 * images_adv.mean() + 0.10 * clean.mean()
    assert toys.running_mean(objective) == pytest.approx(expected.item(), abs=1e-9)
    assert abs(images_adv.mean() - clean.mean()) > 1e-6


# 9, 10: features


def test_a_teacher_that_is_wrong_is_gated_out():
    labels = torch.tensor([0, 0, 0])
    z = torch.tensor([[[9.0, 0], [0, 9.0], [0, 9.0]], [[1.0, 0], [1.0, 0], [0, 1.0]]]).double()
    weights = torch.tensor([[0.8, 0.3, 0.6], [0.2, 0.7, 0.4]]).double()
    assert torch.allclose(
        gated(weights, z, labels), torch.tensor([[0.8, 0.0, 0.0], [0.2, 1.0, 0.0]]).double()
    )


def test_an_image_on_which_no_teacher_is_right_drops_out_of_the_feature_loss():
    images, _, noise = batch()
    objective = build()
    predicted = objective.teachers(images).argmax(-1)
    nobody = torch.stack([
        next(torch.tensor(c) for c in range(10) if c not in predicted[:, n].tolist())
        for n in range(len(images))
    ])  # fmt: skip
    terms = objective(images, nobody, noise)
    assert terms["features"] == 0
    terms["features"].backward()
    assert all(p.grad.isfinite().all() for p in objective.features.projectors.parameters())
    assert build()(images, predicted[0], noise)["features"] > 0


def test_features_by_hand():
    """Mean over images and views of sum_k v_k · mean over channels and places."""
    images, labels, noise = batch()
    objective = build(student=network(0), teachers=[network(11), network(12, width=7)])
    labels = objective.teachers(images)[0].argmax(1)  # teacher 1 is right everywhere
    objective.prepare(iter([(images, labels, noise)]))
    match = objective.features
    spy = Spy(objective)
    found = objective(images, labels, noise)["features"]
    with torch.no_grad():
        read, maps = objective.teachers.features(images)
        weights = (
            -torch.stack([F.cross_entropy(z, labels, reduction="none") for z in read])
        ).softmax(0)
        v = weights * (read.argmax(-1) == labels)
        v = v / v.sum(0)
        expected = 0
        for _, (_, own) in spy.student():
            for k, each in enumerate(maps):
                mean = each.mean((0, 2, 3), keepdim=True)
                sd = each.var((0, 2, 3), unbiased=False, keepdim=True).sqrt().clamp_min(1e-5)
                pooled = F.adaptive_avg_pool2d(own, each.shape[-2:])
                projected = match.projectors[k].convolution(pooled)
                m = projected.mean((0, 2, 3), keepdim=True)
                var = projected.var((0, 2, 3), unbiased=False, keepdim=True)
                projected = (projected - m) / (var + 1e-5).sqrt()
                apart = (projected - (each - mean) / sd).square().mean((1, 2, 3))
                expected += 0.5 * (v[k] * apart).mean()
    assert torch.isclose(found, expected, rtol=1e-9)


def test_standardized_targets_have_mean_0_and_deviation_1_over_the_pass():
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([0.01, 1.0, 50.0]).view(1, 3, 1, 1)
    maps = [torch.randn(n, 3, 4, 4, generator=generator) * scale + 7 * scale for n in (8, 8, 3)]
    standardizer = Standardizer(3)
    assert torch.equal(standardizer(maps[0]), maps[0])
    for each in maps:
        standardizer.show(each)
    shown = torch.cat([standardizer(each) for each in maps])
    assert shown.mean((0, 2, 3)).abs().max() < 1e-4
    assert (shown.std((0, 2, 3), unbiased=False) - 1).abs().max() < 1e-4
    assert not standardizer.state_dict()
    constant = Standardizer(1)
    constant.show(torch.full((2, 1, 2, 2), 3.0))
    assert (constant(torch.full((2, 1, 2, 2), 3.0)) == 0).all()


def test_preparing_twice_is_preparing_once_and_can_be_left_out():
    images, labels, noise = batch()
    objective, raw = build(), build(standardize=False)
    losses = []
    for _ in range(2):
        objective.prepare(iter([(images, labels, noise)]))
        losses.append(objective.eval()(images, labels, noise)["features"].item())
    assert losses[0] == losses[1]
    raw.prepare(iter([(images, labels, noise)]))
    assert raw.features.standardizers[0].count == 0


FAMILIES = ("resnet18", "mobilenetv2_100", "densenet121", "vgg16_bn", "wide_resnet50_2")
SHAPES = {
    "resnet18": (512, 4, 4),
    "mobilenetv2_100": (1280, 4, 4),
    "densenet121": (1024, 4, 4),
    "vgg16_bn": (512, 1, 1),
    "wide_resnet50_2": (2048, 4, 4),
    "vit_tiny_patch4_32": (192, 8, 8),
}


@pytest.fixture(scope="module")
def maps():
    """The last map of two 32-pixel images by every family, and both ways to the logits."""
    x, found = torch.rand(2, 3, 32, 32), {}
    for name in SHAPES:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = models.create(name, num_classes=10, image_size=32)
        with torch.no_grad():
            found[name] = (*network.features(x), network(x))
    return found


@pytest.mark.parametrize("name", SHAPES)
def test_one_forward_gives_a_family_s_logits_and_its_last_map(maps, name):
    logits, last, plain = maps[name]
    assert torch.allclose(logits, plain, atol=1e-5)
    assert last.shape == (2, *SHAPES[name])


@pytest.mark.parametrize("student", [*FAMILIES, "vit_tiny_patch4_32"])
@pytest.mark.parametrize("teacher", SHAPES)
def test_a_projector_for_every_pair(maps, student, teacher):
    own, target = maps[student][1], maps[teacher][1]
    projected = Projector(own.shape[1], target.shape[1]).eval()(own, target.shape[-2:])
    assert projected.shape == target.shape


def test_projectors_are_as_wide_as_the_maps_and_leave_the_student_alone():
    student = network(0)
    before = toys.snapshot(student)
    match = FeatureMatch(student, Panel([network(1), network(2, width=7)]), standardize=True)
    shapes = [tuple(p.convolution.weight.shape) for p in match.projectors]
    assert shapes == [(12, 12, 1, 1), (7, 12, 1, 1)]
    assert toys.same(before, toys.snapshot(student))
    assert student.training


# 12, 15: variants


def test_where_teachers_are_right_the_clean_anchor_does_not_rectify():
    images, _, noise = batch()
    teacher = network(11)
    labels = teacher.eval()(images).argmax(1)
    losses = {
        (view, rule): build(
            teachers=[network(11), network(11)], adv_view=view, rectification=rule
        )(images, labels, noise)["loss"]
        for view in ("adv", "clean") for rule in ("swap", "none")
    }  # fmt: skip
    assert torch.equal(losses["clean", "swap"], losses["clean", "none"])
    assert not torch.isclose(losses["adv", "swap"], losses["adv", "none"])


def test_partial_trust_begins_when_it_is_told_to():
    images, labels, noise = batch()

    def loss(rule, epoch):
        objective = build(rectification=rule)
        objective.epoch, objective.epochs = epoch, 10
        return objective(images, labels, noise)["adversarial"]

    assert torch.equal(loss("partial_trust", 2), loss("none", 2))
    assert not torch.isclose(loss("partial_trust", 3), loss("none", 3))


def test_logged_terms():
    images, labels, noise = batch()
    objective = build()
    spy = Spy(objective)
    terms = objective(images, labels, noise)
    (images_adv, _), _ = spy.student()
    with torch.no_grad():
        for view, seen in (("clean", images), ("adversarial", images_adv)):
            read = torch.stack([m.network.module(seen) for m in objective.teachers.members])
            weights = fusion_weights(read, labels)
            for k in (1, 2):
                wrong = (read[k - 1].argmax(1) != labels).double().mean()
                assert terms[f"teacher {k} wrong, {view}"].item() == pytest.approx(wrong.item())
                mean = weights[k - 1].mean().item()
                assert terms[f"weight {k}, {view}"].item() == pytest.approx(mean)
            assert terms[f"weight entropy, {view}"].item() == pytest.approx(
                entropy(weights).mean().item()
            )
    assert {"loss", "adversarial", "clean", "features", "cross-entropy", "robust accuracy"} < set(
        terms
    )
    assert all(term.dim() == 0 for term in terms.values())
    views = ("clean", "adversarial")
    for view in views:
        wrong = sum(terms[f"teacher {k} wrong, {view}"].item() for k in (1, 2)) / 2
        assert terms[f"rectified, {view}"].item() == pytest.approx(wrong)
    assert terms["rectified, adversarial"] > 0
    apart = [terms[f"features {k}, student {view}"].item() for k in (1, 2) for view in views]
    assert terms["features"].item() == pytest.approx(sum(apart) / 2)
    assert max(apart) > 0
    clean = build(adv_view="clean")(images, labels, noise)
    assert not [name for name in clean if name.endswith(", adversarial")]
    without = build(rectification="none", feature_weight=0.0)(images, labels, noise)
    assert without["rectified, adversarial"] == 0 < without["teacher 1 wrong, adversarial"]
    assert not [name for name in without if name.startswith("features ")]


def test_the_record_says_reconstruction_and_whether_the_comparison_was_run():
    record = build().record
    assert record["method"] == "SA-MDRAD (our reconstruction)"
    assert json.loads(json.dumps(record)) == record
    assert "clean" in record["go_no_go"] or record["go_no_go"].startswith("not run")
    assert record["notices"] == []
    assert build(adv_view="clean").record["notices"] == [INERT]
    for text in (config.find("sa_mdrad").path.read_text(), stages.__doc__ or ""):
        assert "faithful" not in text


def test_teachers_that_are_missing_are_trained_first():
    student = network(dtype=torch.float32)
    common = {"threat": toys.THREAT, "attack": ATTACK}
    found = list(stages(student, [], families=["cnn_a", "resnet20_cifar"], **common))
    assert [type(o) for o in found] == [Standard, Standard, SaMdrad]
    assert [o.training_changes for o in found[:2]] == [{"select": "clean", "awp_gamma": 0.0}] * 2
    trained = [o.student for o in found[:2]]
    assert [t.architecture for t in trained] == ["cnn_a", "resnet20_cifar"]
    assert [m.network for m in found[2].teachers.members] == trained
    given, unknown = (
        network(1, dtype=torch.float32),
        network(2, about={"data": "digits"}, dtype=torch.float32),
    )
    first, last = stages(student, [given, unknown], **common)
    assert first.student is unknown
    assert [m.network for m in last.teachers.members] == [given, unknown]


# 13: what is left


def test_the_saved_model_is_the_plain_student(tmp_path):
    job = harden.plan(
        "sa_mdrad", "resnet20_cifar", suite="pgd", limit=8, max_steps=2,
        settings={"families": ["cnn_a"], "attack.steps": 1},
    )  # fmt: skip
    folder = harden.run(job, tmp_path / "run")
    with safetensors.safe_open(folder / "model.safetensors", "pt") as file:
        keys = set(file.keys())
    plain = timm.create_model("resnet20_cifar", num_classes=10, in_chans=1)
    assert keys == set(plain.state_dict())
    assert models.load(folder / "model.safetensors").about["record"]["teachers"] == ["cnn_a"]
    row = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    followed = {
        "rectified, adversarial", "teacher 1 wrong, adversarial", "weight 1, adversarial",
        "weight entropy, clean", "features", "features 1, student adversarial",
    }  # fmt: skip
    assert followed < set(row)
    content = json.loads((folder / "report.json").read_text())
    assert [each["stage"] for each in content["course"]] == ["standard teacher", "student"]
    assert content["course"][-1] == row
    for page in ("report.md", "report.html"):
        shown = (folder / page).read_text()
        assert all(term in shown for term in followed)
        assert f"{row['rectified, adversarial']:.6g}" in shown


@pytest.mark.parametrize(
    "settings",
    [
        {"rectification": "none"}, {"weights_from": "uniform"}, {"feature_weight": 0},
        {"families": ["cnn_a"]}, {"adv_view": "clean"},
    ],
)  # fmt: skip
def test_every_ablation_can_be_set_and_stands_in_the_header(settings):
    (key, value), *_ = settings.items()
    job = harden.plan("sa_mdrad", "resnet20_cifar", preset="digits", settings=settings)
    plain = harden.plan("sa_mdrad", "resnet20_cifar", preset="digits")
    assert {k for k in job.method if job.method[k] != plain.method[k]} == {key}
    text = config.find("sa_mdrad").path.read_text()
    said = str(value).replace("'", "")
    assert f"--set '{key}={said}'" in text or f"--set {key}={said}" in text


# 14: a toy, and the trap


def teacher_of(images, labels, seed, width):
    """A small network that knows these images."""
    teacher = network(seed, width=width, dtype=torch.float32)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=0.01)
    for _ in range(60):
        for part in torch.arange(256).split(64):
            optimizer.zero_grad()
            cross_entropy(teacher.train()(images[part]), labels[part]).mean().backward()
            optimizer.step()
    assert toys.accuracy(teacher, images, labels) == 1
    return teacher


def overfit(objective, epochs=60):
    """Train on 256 digits with Adam; clean and robust accuracy on them."""
    images, labels, noise = toys.digits(256)
    optimizer = torch.optim.Adam(toys.parameters(objective), lr=0.005)
    for epoch in range(epochs):
        objective.epoch = epoch
        order = torch.randperm(256, generator=torch.Generator().manual_seed(epoch))
        for part in order.split(64):
            optimizer.zero_grad()
            terms = objective.train()(images[part], labels[part], noise.fork(epoch)[part])
            terms["loss"].backward()
            optimizer.step()
    student = objective.student
    return toys.accuracy(student, images, labels), toys.robust_accuracy(student, images, labels)


STRONGER = {"steps": 5, "step_size": 0.025, "start": "gaussian"}


@pytest.mark.slow
def test_a_student_learns_256_digits_robustly():
    images, labels, noise = toys.digits(256)
    teachers = [teacher_of(images, labels, 11, 12), teacher_of(images, labels, 12, 24)]
    objective = build(network(0, width=48, dtype=torch.float32), teachers, attack=STRONGER)
    objective.prepare(iter([(images, labels, noise)]))
    clean, robust = overfit(objective)
    assert clean > 0.9
    assert robust > 0.6


class Same(torch.nn.Module):
    """In place of a projector, where student and teacher are alike."""

    def forward(self, maps, grid):
        return maps


@pytest.mark.slow
@pytest.mark.parametrize("trap", [False, True])
def test_features_of_adversarial_images_teach_to_copy_a_network_without_robustness(
    trap, monkeypatch
):
    """A student that starts as its teacher and learns from features alone. Read at clean images,
    they make it more robust (0.46 to 0.70); at adversarial ones there is nothing to learn."""
    images, labels, _ = toys.digits(256)
    teacher = teacher_of(images, labels, 11, 48)
    before = toys.robust_accuracy(teacher, images, labels)
    objective = build(
        copy.deepcopy(teacher), [teacher], attack_objective="ce", standardize=False,
        attack=STRONGER, adv_weight=0.0, clean_weight=0.0, feature_ramp_epochs=0,
    )  # fmt: skip
    objective.features.projectors = torch.nn.ModuleList([Same()])
    objective.student.module.head.requires_grad_(False)
    if trap:
        attack, match = SaMdrad._attack, FeatureMatch.forward
        attacked = []

        def remember(self, images, labels, read, noise):
            attacked[:] = [attack(self, images, labels, read, noise)]
            return attacked[0]

        def copy_attacked(self, maps, taught, weights):
            taught = objective.teachers.features(attacked.pop())[1] if attacked else taught
            return match(self, maps, taught, weights)

        monkeypatch.setattr(SaMdrad, "_attack", remember)
        monkeypatch.setattr(FeatureMatch, "forward", copy_attacked)
    clean, robust = overfit(objective)
    assert clean > 0.99
    assert robust < before + 0.03 if trap else robust > before + 0.15
