"""Properties that every attack and suite has."""

from __future__ import annotations

import copy

import pytest
import torch

from robustify.attacks.apgd import APGD, _schedule
from robustify.attacks.cw import CW
from robustify.attacks.fab import FAB
from robustify.attacks.fixed_step import PGD
from robustify.attacks.square import Square
from robustify.attacks.suite import Suite, make_suite, run_suite
from robustify.errors import UsageError
from robustify.threat import ThreatModel

from .networks import cnn_a, convolutional, some_images

EPS = {"Linf": 0.03, "L2": 0.25, "L1": 2.0}
SHORT = Suite(
    "short",
    (
        APGD("apgd-ce", "ce", iterations=10),
        APGD("apgd-t", "dlr_targeted", iterations=10, target_classes=2, order="malt"),
        FAB("fab-t", target_classes=2, iterations=10),
        FAB("fab", iterations=5, restarts=2),
        Square(queries=60),
        PGD(iterations=5),
    ),
)


def setting(channels=1, classes=4, count=50):
    model = convolutional(channels, classes=classes)
    images = some_images(count, channels)
    labels = model(images).argmax(1).detach()
    labels[:3] = (labels[:3] + 1) % classes  # some the model gets wrong
    return model, images, labels


def run(model, images, labels, threat, **settings):
    told = {}
    outcomes = run_suite(
        model, images, labels, threat=threat,
        decided=lambda attack, index, right, adv: told.setdefault((attack, index), (right, adv)),
        **{"suite": SHORT, **settings},
    )  # fmt: skip
    return outcomes, told


@pytest.mark.parametrize("norm", EPS)
def test_adversarial_images_are_in_the_ball_and_the_range_and_fool_the_model(norm):
    model, images, labels = setting()
    threat = ThreatModel(norm, EPS[norm])
    outcomes, told = run(model, images, labels, threat)
    fell = [(index, adv) for (_, index), (right, adv) in told.items() if adv is not None]
    assert len(fell) > 3
    order = [index for index, _ in fell]
    images_adv = torch.stack([adv for _, adv in fell])
    assert images_adv.min() >= 0
    assert images_adv.max() <= 1
    assert (threat.distance(images_adv, images[order]) <= threat.eps * (1 + 1e-5)).all()
    assert (model(images_adv).argmax(1) != labels[order]).all()
    right = outcomes[0].survivors.clone()
    right[order] = False
    assert torch.equal(right, outcomes[-1].survivors)
    assert not outcomes[0].survivors[:3].any()


@pytest.mark.parametrize("norm", EPS)
def test_each_attack_alone_breaks_something(norm):
    model, images, labels = setting()
    threat = ThreatModel(norm, 2 * EPS[norm])
    for attack in SHORT.attacks:
        outcomes, _ = run(model, images, labels, threat, suite=Suite("one", (attack,)))
        assert outcomes[-1].survivors.sum() < outcomes[0].survivors.sum(), attack.name


@pytest.mark.parametrize("norm", EPS)
def test_eps_0_changes_nothing_and_a_larger_eps_never_helps(norm):
    model, images, labels = setting()
    accuracy = []
    for factor in (0.0, 0.3, 1.0, 3.0, 30.0):
        outcomes, _ = run(model, images, labels, ThreatModel(norm, factor * EPS[norm]))
        accuracy.append(outcomes[-1].survivors.sum().item())
    assert accuracy[0] == 47
    assert accuracy == sorted(accuracy, reverse=True)
    assert accuracy[-1] <= 1


@pytest.mark.parametrize("norm", EPS)
def test_the_verdict_does_not_depend_on_batch_order_shard_or_layout(norm):
    model, images, labels = setting(channels=3, count=24)
    threat = ThreatModel(norm, EPS[norm] / 2)
    whole, told = run(model, images, labels, threat, batch_size=24)
    for batch_size in (1, 7):
        outcomes, again = run(model, images, labels, threat, batch_size=batch_size)
        for ours, theirs in zip(outcomes, whole, strict=True):
            assert torch.equal(ours.survivors, theirs.survivors)
            assert ours.passes == theirs.passes
        assert all(
            (again[key][1] is None) == (adv is None) and (adv is None or again[key][1].equal(adv))
            for key, (_, adv) in told.items()
        )
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    shuffled = images[order].to(memory_format=torch.channels_last)
    outcomes, _ = run(model, shuffled, labels[order], threat, batch_size=13, indices=order)
    assert torch.equal(outcomes[-1].survivors, whole[-1].survivors[order])
    parts = []
    for rows in (slice(0, 9), slice(9, 24)):
        indices = torch.arange(24)[rows]
        parts.append(run(model, images[rows], labels[rows], threat, indices=indices)[0][-1])
    assert torch.equal(torch.cat([part.survivors for part in parts]), whole[-1].survivors)


def test_an_interrupted_run_goes_on_where_it_stopped():
    model, images, labels = setting()
    threat = ThreatModel("Linf", 0.02)
    whole, told = run(model, images, labels, threat)
    for stop in (0, 10, 55, 90, len(told)):
        done = {}
        for (attack, index), (right, _) in list(told.items())[:stop]:
            done.setdefault(attack, {})[index] = right
        outcomes, new = run(model, images, labels, threat, done=done)
        assert len(new) == len(told) - stop
        for ours, theirs in zip(outcomes, whole, strict=True):
            assert torch.equal(ours.survivors, theirs.survivors)


def test_an_attack_leaves_no_trace():
    model, images, labels = setting()
    model.train()
    model[1].eval()
    model[6].eval()
    next(model.parameters()).requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    modes = [module.training for module in model.modules()]
    weights, state = copy.deepcopy(model.state_dict()), torch.random.get_rng_state()
    before = images.clone()
    run(model, images, labels, ThreatModel("Linf", 0.03))
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [module.training for module in model.modules()] == modes
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(model.state_dict()[key], weights[key]) for key in weights)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(images, before)


@pytest.mark.parametrize("classes", [2, 3, 4, 8])
@pytest.mark.parametrize("norm", EPS)
def test_suites_run_from_two_classes_up_and_say_what_was_adapted(norm, classes):
    model, images, labels = setting(classes=classes, count=8)
    threat = ThreatModel(norm, 30 * EPS[norm])  # nearly all fall at once
    fast = run_suite(
        model, images, labels, threat=threat, suite=make_suite("fast", threat, classes)
    )
    assert fast[2].settings["adapted"] == (classes < 6)
    assert fast[2].settings["targets"] == min(5, classes - 1)
    for name in ("standard", "plus", "rand"):
        outcomes = run_suite(
            model, images[:4], labels[:4], threat=threat, suite=make_suite(name, threat, classes)
        )
        adapted = {outcome.name for outcome in outcomes[1:] if outcome.settings["adapted"]}
        expected = {"standard": {"apgd-t", "fab-t"}, "plus": {"apgd-t", "fab-t"}, "rand": set()}
        if classes == 2 and name != "standard":
            expected[name] |= {"apgd-dlr"}
        if norm == "L1" and classes == 8:
            expected["standard"] = {"fab-t"}
        assert adapted == expected[name]
        assert outcomes[-1].survivors.sum() <= outcomes[0].survivors.sum()


def test_standard_has_the_numbers_of_its_authors():
    ce, targeted, fab, square = make_suite("standard", ThreatModel("Linf"), 10).attacks
    assert (ce.runs, targeted.runs, fab.runs, square.queries) == (1, 9, 9, 5000)
    assert [ce.iterations, targeted.iterations, fab.iterations] == [100, 100, 100]
    windows = [window for _, window, _ in _schedule(ce, "Linf") if window]
    assert windows == [22, 19, 16, 13, 10, 7, 6, 6]
    ce, targeted, fab, _ = make_suite("standard", ThreatModel("L1", 12), 10).attacks
    assert (ce.runs, targeted.runs, fab.runs) == (5, 5, 9)
    assert ce._phases() == [(3, 30), (2, 30), (1, 40)]
    assert {window for _, window, _ in _schedule(ce, "L1")} == {0, 1}
    assert ce.steps == len(_schedule(ce, "L1")) == 103


def test_a_fallen_image_costs_nothing_more():
    model, images, labels = setting()
    far = ThreatModel("Linf", 0.5)
    outcomes, _ = run(model, images, labels, far, suite=make_suite("standard", far, 4))
    assert outcomes[-1].survivors.sum() == 0
    assert outcomes[1].passes.forward < 47 * 10
    assert sum(outcome.passes.total for outcome in outcomes[2:]) < 47 * 20


def test_square_does_not_ask_twice_and_computes_no_gradient():
    model, images, labels = setting()
    threat = ThreatModel("Linf", 0.001)
    outcomes, _ = run(model, images, labels, threat, suite=Suite("s", (Square(queries=100),)))
    left = outcomes[-1].survivors.sum().item()
    assert outcomes[-1].passes.backward == 0
    assert left * 60 < outcomes[-1].passes.forward < 47 * 101


def test_wrong_names_are_refused():
    threat = ThreatModel("Linf")
    with pytest.raises(UsageError, match=r"did you mean 'standard'"):
        make_suite("standart", threat, 10)
    with pytest.raises(UsageError, match="at least 2 classes"):
        make_suite("standard", threat, 1)
    with pytest.raises(UsageError, match="norm L2"):
        make_suite("cw", threat, 10)
    with pytest.raises(UsageError, match="expected a loss"):
        APGD("apgd", "cee")
    names = [attack.name for attack in make_suite("apgd-ce, square", threat, 10).attacks]
    assert names == ["apgd-ce", "square"]


def test_cw_runs_in_the_engine_with_any_batch():
    model, images, labels = setting()
    threat = ThreatModel("L2", 0.3)
    suite = Suite("cw", (CW(iterations=30, searches=2),))
    outcomes = [
        run(model, images, labels, threat, suite=suite, batch_size=size)[0][-1] for size in (8, 50)
    ]
    assert torch.equal(outcomes[0].survivors, outcomes[1].survivors)
    assert outcomes[0].survivors.sum() < 47


def test_fab_gives_up_only_what_is_far_away():
    model, images, labels = setting()
    for eps in (0.004, 0.02):
        threat = ThreatModel("Linf", eps)
        soon, never = (
            run(
                model, images, labels, threat,
                suite=Suite("fab", (FAB("fab-t", target_classes=3, give_up=give_up),)),
            )[0][-1]
            for give_up in (3.0, None)
        )  # fmt: skip
        assert torch.equal(soon.survivors, never.survivors)
        assert soon.passes.total < never.passes.total


def test_a_published_network_gets_the_same_verdicts_in_any_batch(shared):
    model = cnn_a(shared / "models/cifar10_cnn_a_adv.safetensors")
    images = some_images(24, channels=3, size=32)
    labels, threat = model(images).argmax(1), ThreatModel("Linf", 0.04)
    suite = make_suite("fast", threat, 10)
    whole = run(model, images, labels, threat, suite=suite, batch_size=500)[0]
    pieces = run(model, images, labels, threat, suite=suite, batch_size=7)[0]
    half = run(model, images[12:], labels[12:], threat, suite=suite, indices=torch.arange(12, 24))[
        0
    ]
    assert 0 < whole[-1].survivors.sum() < 24
    for all_at_once, by_seven, second in zip(whole, pieces, half, strict=True):
        assert torch.equal(all_at_once.survivors, by_seven.survivors)
        assert torch.equal(all_at_once.survivors[12:], second.survivors)
