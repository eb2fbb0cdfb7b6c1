"""Every check on a model that deserves its flag, with the number known beforehand, and on trained
networks that deserve none."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from robustify import checks, data
from robustify.attacks.pgd import pgd
from robustify.attacks.suite import make_suite, run_suite
from robustify.attacks.transfer import Transfer
from robustify.diagnosis import LEVELS, diagnose
from robustify.errors import ModelError, UsageError
from robustify.fold import constant
from robustify.losses import cross_entropy, dlr, margin
from robustify.noise import Noise
from robustify.probe import Probe, scaled
from robustify.threat import ThreatModel
from robustify.verdict import ADAPTIVE, NAIVE

EPS = 8 / 255
LINF = ThreatModel("Linf", EPS)
CENTRE = 127.5 / 255


class Line(nn.Module):
    """z = (s v, -s v), v = (how far pixel 0 is above the centre): |v| is the distance in any norm.

    Images whose last pixel is white are odd: `odd` (images, v) gives their v.
    """

    def __init__(self, factor=10.0, odd=lambda images, v: v):
        super().__init__()
        self.factor, self.odd = factor, odd

    def forward(self, images):
        v = images[:, 0, 0, 0] - CENTRE
        v = torch.where(images[:, 0, -1, -1] > 0.5, self.odd(images, v), v)
        return self.factor * torch.stack([v, -v], 1)


def line_images(n, odd=0, levels=2.5, odd_levels=None):
    """n images (n, 1, 4, 4) of both classes, `levels`/255 from the boundary; the first are odd."""
    v = torch.full((n,), levels / 255)
    v[:odd] = (levels if odd_levels is None else odd_levels) / 255
    labels = torch.arange(n) % 2
    images = torch.full((n, 1, 4, 4), 0.4)
    images[:, 0, 0, 0] = CENTRE + v * (1 - 2 * labels)
    images[:, 0, -1, -1] = (torch.arange(n) < odd).float()
    return images, labels


class Backward(torch.autograd.Function):
    """The identity, with a gradient only where `mask` says so."""

    @staticmethod
    def forward(ctx, images, mask):
        ctx.save_for_backward(mask)
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        (mask,) = ctx.saved_tensors
        return gradient * mask, None


def blind(images, v):
    return Backward.apply(v, torch.zeros_like(v))


def eight_bit_only(images, v):
    """A gradient only where pixel 0 is a whole number of levels."""
    level = images[:, 0, 0, 0].detach() * 255
    return Backward.apply(v, ((level - level.round()).abs() < 1e-3).float())


class Times(nn.Module):
    def __init__(self, network, factor):
        super().__init__()
        self.network, self.factor = network, factor

    def forward(self, images):
        return self.factor * self.network(images)


class Rounded(nn.Module):
    """The input rounded to 1/64 before the network: no gradient anywhere."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        return self.network((images * 64).round() / 64)


class Linear(nn.Module):
    """z = (s v, -s v), v = w · (x - 0.5), ||w||_1 = 1."""

    def __init__(self, weight, factor):
        super().__init__()
        self.register_buffer("weight", weight)
        self.factor = factor

    def forward(self, images):
        v = ((images - 0.5).flatten(1) * self.weight).sum(1)
        return self.factor * torch.stack([v, -v], 1)


def linear(factor, n=400):
    """Images within 0.01 of the boundary in Linf, 0.0023 in the median."""
    draw = torch.Generator().manual_seed(0)
    weight = torch.randn(3 * 8 * 8, generator=draw)
    weight /= weight.abs().sum()
    v = 0.01 * torch.rand(n, generator=draw) ** 2.12 * (torch.rand(n, generator=draw) - 0.5).sign()
    images = 0.3 * torch.rand(n, 192, generator=draw) - 0.15
    images += (v - images @ weight)[:, None] * weight.sign() + 0.5
    return Linear(weight, factor), images.view(n, 3, 8, 8), (v < 0).long()


def probe_of(model, images, labels, threat=LINF, **settings):
    return Probe(model, images, labels, threat, **settings)


# The linear scale test: the robust accuracy is 0, whatever the factor.


def test_no_flag_at_a_scale_that_float32_can_hold():
    probe = probe_of(*linear(1e3))
    flags = [checks.zero_gradient(probe), checks.movement(probe), checks.scale(probe),
             checks.one_step(probe), checks.saturation(probe)]  # fmt: skip
    assert [flag.name for flag in flags if flag.raised] == []
    assert probe.accuracy(probe.naive.survives) == 0


def test_saturated_logits_blind_naive_attacks_and_not_the_rescaled_one():
    probe = probe_of(*linear(1e5))
    first, moved = checks.zero_gradient(probe), checks.movement(probe)
    assert first.raised
    assert 0.7 < first.measures[0].value < 0.8
    assert first.measures[1].value == 0  # at z / s every image has a gradient
    assert "in float64 38.2%" in first.sentence  # underflows at a margin of 745, too
    assert moved.raised
    assert moved.value == 0
    drop = checks.scale(probe)
    assert drop.raised
    assert drop.value > 0.7
    assert checks.saturation(probe).raised
    assert probe.accuracy(probe.scaled.survives) == 0
    assert probe.accuracy(probe.one_step.survives) > 0.7
    rescaled = probe.climb(scaled, probe.right, start=probe.start(), stay=40)
    assert rescaled.moved.median() / EPS == pytest.approx(1.98, abs=0.03)


def test_a_known_temperature_lifts_the_blindfold_too():
    assert len(checks.scale(probe_of(*linear(1e5))).measures) == 1
    tempered = checks.scale(probe_of(*linear(1e5), temperature=1e4)).measures[1]
    assert tempered.value > 0.7
    assert "z / T" in tempered.text


@pytest.mark.parametrize("power", [10, 20])
def test_rescaled_pgd_is_bit_identical_under_any_scale(power, plain):
    network, images, labels = plain[0]
    runs = []
    for factor in (1.0, 2.0**power):
        probe = probe_of(Times(network, factor), images[:50], labels[:50])
        runs.append(probe.climb(scaled, probe.right, start=probe.start(), stay=40).images_adv)
    assert torch.equal(*runs)


@pytest.mark.parametrize("loss", [margin, dlr])
def test_margin_and_dlr_do_not_depend_on_the_scale(loss, plain):
    network, images, labels = plain[0]
    runs = []
    for factor in (1.0, 100.0):
        probe = probe_of(Times(network, factor), images[:50], labels[:50])
        runs.append(probe.climb(loss, probe.right, start=probe.start()).survives)
    assert torch.equal(*runs)


# Thresholds, by the count of odd images.


@pytest.mark.parametrize(("odd", "raised"), [(1, False), (2, True)])
def test_f1_is_raised_by_more_than_one_percent(odd, raised):
    flag = checks.zero_gradient(probe_of(Line(odd=lambda _, v: 1e6 * v), *line_images(100, odd)))
    assert flag.raised is raised
    assert flag.measures[0].value == odd / 100
    assert flag.measures[1].value == 0
    flat = checks.zero_gradient(probe_of(Line(odd=blind), *line_images(100, odd)))
    assert flat.raised is raised
    assert flat.measures[1].value == odd / 100


def test_f1_is_raised_by_a_single_gradient_that_is_not_finite():
    def root(images, v):
        odd = images[:, 0, -1, -1] > 0.5
        return v + torch.where(odd, images[:, 0, 1, 1] - 0.4, 1.0).sqrt()

    flag = checks.zero_gradient(probe_of(Line(odd=root), *line_images(200, odd=1)))
    assert flag.raised
    assert flag.measures[2].value == pytest.approx(1 / 200)


@pytest.mark.parametrize(("step_size", "raised"), [(0.4 / 40, True), (0.6 / 40, False)])
@pytest.mark.parametrize("norm", ["Linf", "L2"])
def test_f2_asks_for_half_of_eps(norm, step_size, raised):
    threat = ThreatModel(norm, EPS)
    images, labels = line_images(50, levels=50)
    flag = checks.movement(probe_of(Line(), images, labels, threat, step_size=step_size * EPS))
    assert flag.raised is raised
    # L2 starts are inside the ball, Linf starts may be stopped by its wall
    assert flag.measures[0].value == pytest.approx(step_size * 40, abs=0.05)
    assert flag.measures[1].value == pytest.approx(1)


def test_f2_does_not_count_what_fell_at_once_as_not_moved():
    flag = checks.movement(probe_of(Line(), *line_images(50, levels=1)))
    assert not flag.raised
    assert flag.measures[0].value > 0.9


@pytest.mark.parametrize(("odd", "raised"), [(4, False), (5, True)])
def test_f3_is_raised_by_more_than_two_points(odd, raised):
    model = Line(odd=lambda _, v: 1e6 * v)
    probe = probe_of(model, *line_images(200, odd, levels=2.5, odd_levels=7.99))
    flag = checks.scale(probe)
    assert flag.raised is raised
    assert flag.value == odd / 200


@pytest.mark.parametrize(("n", "odd", "raised"), [(100, 2, False), (100, 3, True),
                                                  (1000, 10, False), (1000, 11, True)])  # fmt: skip
def test_f4_is_raised_by_more_than_one_point_and_two_images(n, odd, raised):
    images, labels = line_images(n, odd, 2.5, 7.5)
    for seed in range(20):  # a random start is beyond the boundary once in 32 times
        probe = probe_of(Line(odd=eight_bit_only), images, labels, seed=seed)
        if probe.naive.survives[:odd].all():
            break
    flag = checks.one_step(probe)
    assert flag.raised is raised
    assert flag.value == odd / n


@pytest.mark.parametrize(("check", "n", "broken", "raised"), [
    (checks.black_box_gain, 1000, 2, False), (checks.black_box_gain, 1000, 3, True),
    (checks.black_box_gain, 2000, 4, False), (checks.black_box_gain, 2000, 5, True),
    (checks.black_box_gain, 100, 2, False), (checks.black_box_gain, 100, 3, True),
    (checks.transfer_gain, 1000, 5, False), (checks.transfer_gain, 1000, 6, True),
    (checks.transfer_gain, 100, 2, False), (checks.transfer_gain, 100, 3, True),
])  # fmt: skip
def test_f5_and_f6_count_images(check, n, broken, raised):
    mask = torch.arange(n) < broken
    assert check(mask).raised is raised


@pytest.mark.parametrize(("odd", "raised"), [(1, False), (2, True)])
def test_f7_is_raised_by_a_rise_of_more_than_half_a_point(odd, raised):
    """A narrow dip 0.055 away is hit at every eps of the ladder but 0.5, whose steps jump it."""
    dip = Line(odd=lambda images, v: v.sign() * (((v.abs() - 0.45) + 0.055).abs() - 0.006))
    images, labels = line_images(200, odd, levels=1)
    images[:odd, 0, 0, 0] = CENTRE + 0.45 * (1 - 2 * labels[:odd])
    flag, curve = checks.ladder(probe_of(dip, images, labels, ThreatModel("Linf", 0.06)))
    assert [eps for eps, _ in curve] == [0.03, 0.06, 0.12, 0.24, 0.5]
    assert flag.measures[0].value == pytest.approx(odd / 200)
    assert flag.raised is raised


def test_f7_no_model_beats_the_largest_class_at_half():
    """From the images: a random start in so large a ball would hide the dead gradient."""
    images, labels = line_images(100)
    images[::10], labels[::10] = images[1], 1
    share = labels.bincount().max().item() / 100
    flag, curve = checks.ladder(probe_of(Line(odd=blind), *_all_odd(images, labels)))
    assert flag.raised
    assert flag.value == pytest.approx(1 - share)
    assert dict(curve)[0.5] == 1
    other, curve = checks.ladder(probe_of(Line(), images, labels))
    assert not other.raised
    assert dict(curve)[0.5] == 0
    assert checks.zero_gradient(probe_of(Line(odd=blind), *_all_odd(images, labels))).raised


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_f7_keeps_its_bound_in_other_norms(norm):
    threat = ThreatModel(norm, 0.1)
    flag, curve = checks.ladder(probe_of(Line(odd=blind), *_all_odd(*line_images(50)), threat))
    assert flag.raised
    assert flag.value == pytest.approx(0.5)
    assert [eps for eps, _ in curve] == [0.05, 0.1, 0.2, 0.4]


def _all_odd(images, labels):
    images = images.clone()
    images[:, 0, -1, -1] = 1
    return images, labels


def test_f8_twice_the_steps_against_the_closed_form():
    """Steps of eps/200: after j of them, an image has fallen if its start was within j/200 eps."""
    images, labels = line_images(300, levels=6)
    probe = probe_of(Line(), images, labels, step_size=EPS / 200)
    above = (probe.start()[:, 0, 0, 0] - CENTRE) * (1 - 2 * labels)
    stands = [(above > steps * EPS / 200).double().mean().item() for steps in (40, 80)]
    flag = checks.converged(probe)
    assert flag.raised
    assert flag.measures[0].value == pytest.approx(stands[0] - stands[1], abs=0.0034)
    assert flag.measures[0].value > 0.05
    settled = checks.converged(probe_of(Line(), images, labels))
    assert not settled.raised
    assert settled.measures[2].value > 0


def test_f8_restarts_against_the_closed_form():
    """Without a gradient an image falls only where a start is beyond the boundary."""
    images, labels = _all_odd(*line_images(300, levels=7))
    probe = probe_of(Line(odd=blind), images, labels)
    side = 1 - 2 * labels
    stands = [(probe.start(run)[:, 0, 0, 0] - CENTRE) * side > 0 for run in range(5)]
    gain = stands[0].double().mean() - torch.stack(stands).all(0).double().mean()
    flag = checks.converged(probe)
    assert flag.measures[1].value == pytest.approx(gain.item())
    assert flag.measures[1].raised
    assert (flag.measures[2].value, flag.measures[2].raised) == (0, True)
    assert torch.equal(probe.worst, torch.stack(stands).all(0))  # all restarts count


def test_f8_looks_at_what_the_suite_left():
    images, labels = line_images(300, levels=6)
    probe = probe_of(Line(), images, labels, step_size=EPS / 200, alive=torch.zeros(300).bool())
    assert checks.converged(probe).measures[0].value == 0


def _at_corner(delta):
    """Eight pixels at their lower bound: one corner in 256."""
    return (delta[:, 1:9] < -0.99).all(1)


def _far_out(delta):
    """Six pixels far from the image and from the wall: one uniform sample in 540."""
    return ((delta[:, 1:7].abs() > 0.6) & (delta[:, 1:7].abs() < 0.95)).all(1)


def _near(delta):
    """Six pixels near the image: one Gaussian sample in 640."""
    return (delta[:, 1:7].abs() < 0.25).all(1) & (delta[:, 7] > 0)


@pytest.mark.parametrize("region", [_at_corner, _far_out, _near])
def test_f9_finds_what_no_gradient_points_to(region):
    """Each is found by one of the three kinds of samples and hardly by the others."""
    images, labels = _all_odd(*line_images(4, levels=20))

    def odd(images, v):
        return blind(images, torch.where(region((images.flatten(1) - 0.4) / EPS), -v, v))

    flag = checks.random_search(probe_of(Line(odd=odd), images, labels))
    assert flag.raised
    assert flag.value == 4


@pytest.mark.parametrize("norm", ["Linf", "L2", "L1"])
def test_f9_takes_a_hundred_survivors_and_stays_in_the_ball(norm):
    threat = ThreatModel(norm, EPS)
    images, labels = line_images(130, levels=8.01)
    watched = []

    class Watching(Line):
        def forward(self, images):
            watched.append(images)
            return super().forward(images)

    probe = probe_of(Watching(), images, labels, threat, batch_size=250)
    assert probe.alive.all()
    before = probe.passes.forward
    flag = checks.random_search(probe, samples=600)
    assert (flag.value, flag.raised) == (0, False)
    assert probe.passes.forward - before == 100 * 600
    for batch in watched[-3:]:  # one of each kind of sample, for the last two images
        away = [threat.distance(batch, images[i].expand_as(batch)) for i in (98, 99)]
        assert torch.minimum(*away).max() <= EPS * (1 + 1e-4)
        assert torch.minimum(*away).median() > EPS / 4
    assert checks.SAMPLES == 10_000


# The model itself.


def test_f10_probabilities_and_not_log_probabilities(plain):
    network, images, labels = plain[0]
    lasts = {nn.Softmax(1): True, nn.LogSoftmax(1): False, nn.Sigmoid(): False, nn.ReLU(): False}
    for last, raised in lasts.items():
        flag = checks.probabilities(probe_of(nn.Sequential(network, last), images, labels))
        assert flag.raised is raised


class Noisy(nn.Module):
    def __init__(self, network, size):
        super().__init__()
        self.network, self.size = network, size

    def forward(self, images):
        return self.network(images + self.size * torch.randn_like(images))


class Searching(nn.Module):
    """Purifies by gradient descent inside forward, by each of the ways that torch offers."""

    def __init__(self, network, way):
        super().__init__()
        self.network, self.way = network, way

    def forward(self, images):
        with torch.enable_grad():
            variable = images.detach().clone().requires_grad_()
            energy = self.network(variable).logsumexp(1).sum()
            if self.way == "grad":
                (gradient,) = torch.autograd.grad(energy, variable)
            else:
                energy.backward() if self.way == "method" else torch.autograd.backward(energy)
                gradient = variable.grad
        return self.network((images - 1e-4 * gradient.sign()).clamp(0, 1))


def test_f11_random_models_and_deterministic_ones(plain):
    network, images, labels = plain[0]
    before = torch.get_rng_state()
    assert checks.deterministic(probe_of(Noisy(network, 1e-2), images, labels)).raised
    assert torch.equal(before, torch.get_rng_state())
    silent = checks.deterministic(probe_of(network, images, labels))
    assert (silent.raised, silent.value) == (False, 0)


@pytest.mark.parametrize("way", ["grad", "method", "function"])
def test_f11_autograd_inside_forward(way, plain):
    network, images, labels = plain[0]
    flag = checks.deterministic(probe_of(Searching(network, way), images, labels))
    assert flag.raised
    assert "autograd" in flag.sentence


class Autocast(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, images):
        with torch.autocast("cpu", torch.bfloat16):
            return self.network(images).float()


def test_f12_autocast_around_inside_and_16_bit_weights(plain):
    network, images, labels = plain[0]
    probe = probe_of(network, images, labels)
    assert not checks.precision(probe).raised
    with torch.autocast("cpu", torch.bfloat16):
        assert checks.precision(probe).raised
    assert checks.precision(probe_of(Autocast(network), images, labels)).raised
    halves = nn.Sequential(_To(torch.bfloat16), _network(0).bfloat16(), _To(torch.float32))
    assert checks.precision(probe_of(halves, images, labels)).raised
    candidates = checks.precision(probe, attacked_in=torch.bfloat16)
    assert candidates.raised
    assert "bfloat16" in candidates.sentence
    assert not checks.precision(probe, attacked_in=torch.float32).raised


class _To(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, images):
        return images.to(self.dtype)


@pytest.mark.parametrize(("margin_of_two", "raised"), [(16.9, False), (17.1, True)])
def test_f13_median_margin(margin_of_two, raised):
    factor = margin_of_two / (2 * 2.5 / 255)
    flag = checks.saturation(probe_of(Line(factor), *line_images(10)))
    assert flag.raised is raised
    assert flag.value == pytest.approx(margin_of_two, rel=1e-4)


# Trained networks, and the whole.


def _network(seed):
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 10),
        )  # fmt: skip


DIGITS = ThreatModel("Linf", 0.1)


def _trained(seed, adversarially):
    digits = data.load("digits")
    images, labels = data.to_float(digits.train.images), digits.train.labels
    network, order = _network(seed), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    for epoch in range(6):
        for rows in torch.randperm(len(images), generator=order).split(64):
            batch, label = images[rows], labels[rows]
            if adversarially:
                batch = pgd(
                    lambda x, label=label: cross_entropy(network(x), label), batch, DIGITS,
                    steps=3, step_size=DIGITS.eps / 2, noise=Noise(epoch, rows),
                )  # fmt: skip
            optimizer.zero_grad()
            cross_entropy(network(batch), label).mean().backward()
            optimizer.step()
    test = digits.test
    return network.eval().requires_grad_(False), data.to_float(test.images), test.labels


@pytest.fixture(scope="module")
def plain():
    return [_trained(seed, False) for seed in range(3)]


@pytest.fixture(scope="module")
def robust():
    return [_trained(seed, True) for seed in range(3)]


def diagnosed(model, images, labels, threat=DIGITS, suite="fast", transfer_from=None, **settings):
    classes = model.eval()(images[:1]).shape[1]
    attacks = make_suite(suite, threat, classes)
    if transfer_from:
        attacks = replace(attacks, attacks=(*attacks.attacks, Transfer(transfer_from)))
    outcomes = run_suite(model, images, labels, suite=attacks, threat=threat)
    return diagnose(model, images, labels, threat, suite=suite, outcomes=outcomes, **settings)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["plain", "robust"])
def test_trained_networks_raise_nothing(kind, seed, request):
    model, images, labels = request.getfixturevalue(kind)[seed]
    findings = diagnosed(model, images, labels)
    assert [flag.name for flag in findings.flags if flag.raised] == []
    assert findings.verdict.status == "reliable"
    alive = findings.survivors
    assert 0.3 < alive.float().mean() < 0.85
    probe = probe_of(model, images, labels, DIGITS, alive=alive)
    others = [checks.one_step(probe), checks.converged(probe)]
    others.append(checks.random_search(probe, samples=600))
    assert [flag.name for flag in others if flag.raised] == []


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", ["plain", "robust"])
def test_trained_networks_raise_nothing_at_full_length(kind, seed, request):
    nets = request.getfixturevalue(kind)
    model, images, labels = nets[seed]
    others = {"another seed": nets[(seed + 1) % 3][0]}
    findings = diagnosed(
        model, images, labels, suite="standard", level="full", transfer_from=others
    )
    assert [flag.name for flag in findings.flags if flag.raised is not False] == []
    assert findings.verdict.status == "reliable"


@pytest.mark.parametrize("kind", ["plain", "robust"])
def test_logits_times_100_look_robust_and_the_verdict_is_not_misled(kind, request):
    network, images, labels = request.getfixturevalue(kind)[0]
    truth = diagnosed(network, images, labels)
    found = diagnosed(Times(network, 100.0), images, labels)
    raised = {flag.name for flag in found.flags if flag.raised}
    assert raised == {"F1", "F2", "F3", "F13"}
    assert found.alone["pgd-ce"] - found.alone["pgd-ce-scaled"] > 0.05
    assert found.headline.robust_accuracy == pytest.approx(truth.headline.robust_accuracy, abs=0.01)
    assert found.alone["pgd-ce-scaled"] == pytest.approx(truth.alone["pgd-ce-scaled"], abs=0.01)
    assert found.verdict.status == "reliable"  # rule 5: adaptive attacks stand behind the headline
    assert sum("naive attacks fail" in note for note in found.verdict.notes) == 3


def test_logits_times_100_attacked_by_plain_cross_entropy_alone_raise_f5(plain):
    network, images, labels = plain[0]
    masked, few = Times(network, 100.0), slice(100)
    quick = diagnosed(masked, images[few], labels[few], suite="pgd,square")
    flags = {flag.name: flag for flag in quick.flags}
    assert flags["F5"].raised
    assert "Square" in flags["F5"].sentence
    assert {"F1", "F2", "F3", "F5", "F7", "F13"} <= {f.name for f in quick.flags if f.raised}
    assert quick.verdict.status == "suspect"


def test_a_broken_model_is_reliable_at_zero_and_said_to_mask_gradients():
    model, images, labels = linear(1e5)
    found = diagnosed(model, images, labels, LINF, suite="standard")
    assert found.headline.robust_accuracy == 0
    assert found.verdict.status == "reliable"
    assert found.verdict.title == "this model masks gradients"
    listed = " ".join(found.verdict.notes)
    assert all(f"{name} " in listed for name in ("F1", "F2", "F3", "F13"))


def test_a_rounding_wrapper_raises_what_it_should():
    inner, images, labels = linear(1e3)
    model = Rounded(inner)
    found = diagnosed(model, images, labels, LINF, suite="apgd-ce,apgd-margin,square", level="full")
    flags = {flag.name: flag for flag in found.flags}
    assert all(flags[name].raised for name in ("F1", "F2", "F5"))
    assert flags["F1"].measures[1].value == 1
    assert found.verdict.status == "suspect"

    probe = probe_of(model, images, labels)
    assert checks.movement(probe).value == 0
    assert probe.accuracy(probe.naive.survives) > 0.5
    transferred = diagnosed(
        model, images, labels, LINF, suite="apgd-ce,apgd-margin",
        transfer_from={"the unwrapped model": inner},
    )  # fmt: skip
    assert next(flag for flag in transferred.flags if flag.name == "F6").raised
    assert transferred.survivors.float().mean() < 0.2
    searched = probe_of(model, images, labels, alive=probe.alive & probe.naive.survives)
    assert checks.random_search(searched).value > 20


def test_a_model_without_a_graph_is_not_differentiable_and_no_error():
    class Detached(Line):
        def forward(self, images):
            return super().forward(images.detach())

    probe = probe_of(Detached(), *line_images(100))
    flag = checks.zero_gradient(probe)
    assert (flag.measures[1].value, flag.raised) == (1, True)
    assert checks.movement(probe).raised


def test_randomised_and_dynamic_models_are_not_applicable(plain):
    network, images, labels = plain[0]
    found = diagnosed(Noisy(network, 0.05), images[:120], labels[:120], level="always", suite="pgd")
    assert found.verdict.status == "not applicable"
    assert "F11" in found.verdict.reasons[0]


@pytest.mark.parametrize("n", [99, 100])
def test_fewer_than_a_hundred_images_are_not_applicable(n, plain):
    network, images, labels = plain[0]
    found = diagnosed(network, images[:n], labels[:n])
    assert (found.verdict.status == "not applicable") is (n < 100)


def test_eps_zero_and_no_right_image_are_said_and_no_error(plain):
    network, images, labels = plain[0]
    still = diagnosed(network, images, labels, ThreatModel("Linf", 0.0), level="full")
    assert still.verdict.status == "not applicable"
    wrong = (network(images).argmax(1) + 1) % 10
    hopeless = diagnosed(network, images, wrong, level="full")
    assert hopeless.headline.robust_accuracy == 0
    assert {f.name for f in hopeless.flags if f.raised is None} >= {"F1", "F2", "F7", "F8", "F9"}


def test_one_class_is_refused_and_two_are_enough():
    images, labels = line_images(120)
    assert diagnosed(Line(), images, labels, LINF).headline.robust_accuracy == 0

    class One(Line):
        def forward(self, images):
            return super().forward(images)[:, :1]

    clean = run_suite(Line(), images, labels, suite=make_suite("pgd", LINF, 2), threat=LINF)
    with pytest.raises(ModelError, match="at least 2 classes, got 1"):
        diagnose(One().eval(), images, labels * 0, LINF, suite="pgd", outcomes=clean)


def test_usage_errors_say_what_was_expected(plain):
    network, images, labels = plain[0]
    clean = run_suite(network, images, labels, suite=make_suite("fgsm", DIGITS, 10), threat=DIGITS)
    settings = {"suite": "fgsm", "outcomes": clean}
    with pytest.raises(UsageError, match="always, quick, full"):
        diagnose(network, images, labels, DIGITS, level="quik", **settings)
    with pytest.raises(UsageError, match="eval mode"):
        diagnose(_network(0), images, labels, DIGITS, **settings)


def test_checks_may_only_lower_the_worst_case_and_find_a_weak_suite(plain):
    network, images, labels = plain[0]
    weak = diagnosed(network, images, labels, suite="fgsm")
    fgsm = weak.alone["fgsm"]
    assert weak.headline.robust_accuracy < fgsm - 0.005
    flags = {flag.name: flag for flag in weak.flags}
    assert flags["F14"].raised
    assert "PGD alone" in flags["F14"].sentence
    assert weak.verdict.status == "suspect"
    checked = diagnosed(network, images, labels, suite="fgsm", check_images=100)
    assert checked.checked == 100
    assert len(checked.survivors) == len(labels)
    assert (checked.survivors[:100] == weak.survivors[:100]).all()


@pytest.mark.parametrize("norm", ["L2", "L1"])
def test_trained_networks_raise_nothing_in_other_norms(norm, robust):
    network, images, labels = robust[0]
    eps = {"L2": 0.4, "L1": 1.5}[norm]
    found = diagnosed(network, images, labels, ThreatModel(norm, eps))
    assert [flag.name for flag in found.flags if flag.raised] == []


def test_findings_do_not_depend_on_the_batch_size_and_leave_no_trace(robust):
    network, images, labels = robust[0]
    network = nn.Sequential(network, nn.Dropout()).eval()
    network[0][0].requires_grad_(True)
    gradient = network[0][0].weight.grad.clone()
    state = torch.get_rng_state()
    found = []
    for batch_size in (7, 500):
        with constant(network, images[:8]) as victim:
            outcomes = run_suite(
                victim, images, labels, suite=make_suite("pgd", DIGITS, 10), threat=DIGITS
            )
            findings = diagnose(
                victim, images, labels, DIGITS, suite="pgd", level="quick", outcomes=outcomes,
                network=network, batch_size=batch_size, check_images=60,
            )  # fmt: skip
            probe = probe_of(victim, images[:60], labels[:60], DIGITS, batch_size=batch_size)
            others = (checks.converged(probe), checks.random_search(probe, samples=300))
        found.append((findings, others, probe.worst.tolist()))
    assert torch.equal(state, torch.get_rng_state())
    assert [m.training for m in network.modules()] == [False] * 9
    assert network[0][0].weight.requires_grad
    assert torch.equal(network[0][0].weight.grad, gradient)
    assert found[0][1:] == found[1][1:]
    small, large = found[0][0], found[1][0]
    assert small.flags == large.flags
    assert torch.equal(small.survivors, large.survivors)
    assert small.passes == large.passes


def test_passes_are_reported_and_levels_hold_what_they_say(robust):
    network, images, labels = robust[0]
    found = diagnosed(network, images, labels, level="always")
    right = int((network(images).argmax(1) == labels).sum())
    flags = {flag.name: flag for flag in found.flags}
    assert flags["F1"].backward == right
    assert flags["F1"].forward == right
    assert flags["F2"].backward == (10 + 1) * right
    assert (flags["F10"].forward, flags["F13"].forward, flags["F11"].forward) == (0, 0, 128)
    counted = sum(flag.forward + flag.backward for flag in found.flags)
    assert found.passes.total == counted + len(images)  # the clean logits belong to no flag
    assert {flag.name for flag in found.flags if flag.raised is not None} == set(LEVELS["always"])
    assert set(LEVELS["full"]) - set(LEVELS["quick"]) == {"F4", "F6", "F8", "F9"}
    assert {*NAIVE, *ADAPTIVE} == {f"F{number}" for number in range(1, 10)}
