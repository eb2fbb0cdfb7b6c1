"""Distillation-based purification: losses against their formulas, who attacks what, who gets
gradient, and the ablations."""

import copy
import itertools

import pytest
import torch
import toys
from torch import nn
from torch.nn.functional import log_softmax

from robustify import data, harden, models, report
from robustify.attacks.pgd import pgd
from robustify.checkpoint import Checkpoints
from robustify.crafting import against_classifier
from robustify.errors import TrainingError, UsageError
from robustify.fit import fit
from robustify.frozen import weights_hash
from robustify.losses import cross_entropy
from robustify.purifier import Ensemble, Purified, Purifier
from robustify.recipes.purifier import EndToEnd, Static, stages
from robustify.run_folder import RunFolder
from robustify.settings import Training
from robustify.train import Stage

ATTACK = {"steps": 10, "step_size": toys.THREAT.eps / 4, "start": "uniform"}
GOLDEN_STATIC = [0.2026533, 0.2007833, 0.1775522]
GOLDEN_ADAPTIVE = [0.2639651, 0.2047479, 0.2075621]
TINY = {"size": (8, 1), "teacher_size": (8, 1)}


def all_stages(**settings):
    return list(toys.all_stages("purifier", **{**TINY, **settings}))


def last(**settings):
    return all_stages(**settings)[-1].train()


class Constant(nn.Module):
    """Gives one grey value; `value` is a parameter."""

    def __init__(self, value):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))

    def forward(self, images):
        return 0 * images + self.value


class Shift(nn.Module):
    """The image plus a constant that can be learned: a purifier with a gradient through it."""

    def __init__(self, value=0.0):
        super().__init__()
        self.value = nn.Parameter(torch.tensor(float(value)))

    def forward(self, images):
        return images + self.value


class Counting(nn.Module):
    """The identity, and how often it was asked while images were searched."""

    searched = 0

    def forward(self, images):
        Counting.searched += images.requires_grad
        return images


def unchanged(f, images, labels, noise):
    """Crafting that perturbs nothing."""
    return images.clone()


def static(student, ensemble=None, **settings):
    return Static(student=student, ensemble=ensemble, **settings).train()


def end_to_end(student, ensemble=None, **settings):
    plain = {"threat": toys.THREAT, "attack": ATTACK, "pixel_weight": 10.0, "stability": False,
             "eps_ramp": 0.0}  # fmt: skip
    return EndToEnd(student=student, ensemble=ensemble, **{**plain, **settings}).train()


# The losses.


@pytest.mark.parametrize("side", [8, 12, 16])
def test_restoring_is_a_mean_over_pixels_whatever_the_size(side):
    images = torch.full((4, 1, side, side), 0.75)
    _, labels, noise = toys.batch(4)
    student = Purified(Constant(0.25), toys.toy())
    for adv, clean, value in ((0, 1, 0.25), (1, 0, 0.25), (1, 1, 0.5)):
        objective = static(student=student, crafting=unchanged, adv_weight=adv, clean_weight=clean)
        assert objective(images, labels, noise)["loss"].item() == pytest.approx(value)


def test_the_static_student_is_its_formula():
    images, labels, noise = toys.batch(dtype=torch.float64)
    f = toys.toy(dtype=torch.float64)
    s, a, n = Shift(0.1).double(), Shift(0.3).double(), Shift(-0.2).double()
    objective = static(
        student=Purified(s, f), ensemble=Ensemble(a, n, "routed"), adv_weight=0.7, clean_weight=0.7,
        ensemble_weight=1.3, guidance_weight=0.2, crafting=lambda f, x, y, noise: x * 0.9,
    )  # fmt: skip
    adv = images * 0.9
    kl = toys.reference_kl(f(adv + 0.3), f(adv + 0.1)) + toys.reference_kl(
        f(images - 0.2), f(images + 0.1)
    )
    ensemble = 0.2**2 + 0.3**2
    restored = ((adv + 0.1 - images) ** 2).mean() + 0.1**2
    expected = 1.3 * ensemble + 0.7 * restored + 0.2 * kl
    assert objective(images, labels, noise)["loss"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_pixel_terms_pull_to_the_mean_of_teacher_and_clean_image():
    """With equal weights the gradient of both terms on x^f is that of 2 MSE(S, (A + x) / 2)."""
    images, labels, noise = toys.batch(dtype=torch.float64)
    purifier = Shift(0.4).double()
    objective = static(
        student=Purified(purifier, toys.toy(dtype=torch.float64)), crafting=unchanged,
        ensemble=Ensemble(Shift(0.1).double(), nn.Identity(), "routed"), adv_weight=1.0,
        clean_weight=0.0, ensemble_weight=1.0,
    )  # fmt: skip
    objective(images, labels, noise)["loss"].backward()
    got = purifier.value.grad.clone()
    value = purifier.value.detach().clone().requires_grad_()
    both = 2 * (images + value - (images + 0.1 + images) / 2).square().mean()
    to_normal = (images + value - images).square().mean()  # the ensemble's term on x
    (expected,) = torch.autograd.grad(both + to_normal, value)
    assert torch.isclose(got, expected, rtol=1e-9)


@pytest.mark.parametrize("stability", [False, True])
def test_the_robust_teacher_is_its_formula(stability):
    images, labels, noise = toys.batch(dtype=torch.float64)
    f = toys.toy(dtype=torch.float64)
    objective = end_to_end(Purified(Shift(0.05).double(), f), attack={**ATTACK, "steps": 0},
                           pixel_weight=7.0, stability=stability)  # fmt: skip
    with torch.no_grad():
        t = f(images).softmax(1) if stability else torch.eye(10).double()[labels]
        ce = -(t * log_softmax(f(images + 0.05), 1)).sum(1).mean()
    expected = 1.5 * ce + 7 * 2 * 0.05**2  # without an attack x* is x
    assert objective(images, labels, noise)["loss"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )


@pytest.mark.parametrize("routing", ["clean_target", "routed"])
def test_the_adaptive_student_is_its_formula(routing):
    images, labels, noise = toys.batch(dtype=torch.float64)
    f = toys.toy(dtype=torch.float64)
    ensemble = Ensemble(Shift(0.2).double(), Shift(-0.1).double(), routing)
    objective = end_to_end(Purified(Shift(0.05).double(), f), ensemble, pixel_weight=3.0)
    adv = objective._attack(images, labels, noise)
    assert not torch.equal(adv, images)
    with torch.no_grad():
        asked = images if routing == "clean_target" else adv
        robust = toys.reference_kl(f(asked + 0.2), f(adv + 0.05))
        clean = toys.reference_kl(f(images - 0.1), f(images + 0.05))
        pixels = (adv + 0.05 - asked - 0.2).square().mean() + 0.15**2
        expected = 5 / 6 * robust + clean / 6 + 3 * pixels
    assert objective(images, labels, noise)["loss"].item() == pytest.approx(
        expected.item(), rel=1e-5
    )


def test_a_student_equal_to_its_teachers_has_nothing_to_learn_from_clean_images():
    images, labels, noise = toys.batch()
    purifier = Purifier(1, (8, 1))
    student = Purified(purifier, toys.toy())
    objective = end_to_end(student, Ensemble(purifier, purifier, "clean_target"))
    terms = objective(images, labels, noise)
    adv = objective._attack(images, labels, noise)
    frozen = copy.deepcopy(objective)
    frozen._attack = lambda images, labels, noise: images
    assert frozen(images, labels, noise)["loss"].item() == pytest.approx(0, abs=1e-6)
    expected = (purifier(adv) - purifier(images)).square().mean()
    assert terms["pixels"].item() == pytest.approx(expected.item(), rel=1e-4)


# Who attacks what.


def test_static_images_adv_do_not_know_the_purifier_and_adaptive_ones_do():
    images, labels, noise = toys.batch()
    f = toys.toy()
    seen = []

    def crafting(f, images, labels, noise):
        seen.append(against_classifier(f, images, labels, noise, threat=toys.THREAT, attack=ATTACK))
        return seen[-1]

    for value in (0.0, 0.5):
        static(student=Purified(Shift(value), f), crafting=crafting)(images, labels, noise)
    assert torch.equal(*seen)
    through = [
        end_to_end(Purified(g, f))._attack(images, labels, noise)
        for g in (nn.Identity(), Shift(0.5), Purifier(1, (8, 1)))
    ]
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(through, 2))
    alone = pgd(lambda x: cross_entropy(f(x), labels), images, toys.THREAT, noise=noise, **ATTACK)
    assert torch.equal(through[0], alone)  # behind the identity both attackers are one


def test_the_purifier_is_asked_ten_times_per_adaptive_step_and_never_in_the_static_one(monkeypatch):
    images, labels, noise = toys.batch()
    f = toys.toy()
    f.module.norm.register_forward_hook(
        lambda *args: None
    )  # watched: it is lent itself, not a copy
    monkeypatch.setattr(Counting, "searched", 0)
    crafting = lambda *args: against_classifier(*args, threat=toys.THREAT, attack=ATTACK)  # noqa: E731
    student = Purified(nn.Sequential(Counting(), Shift(0.1)), f)
    static(student=student, crafting=crafting)(images, labels, noise)
    assert Counting.searched == 0
    end_to_end(student)(images, labels, noise)
    assert Counting.searched == 10


def test_adversarial_images_stay_in_ball_and_range_and_raise_the_loss():
    images, labels, noise = toys.batch(64)
    f = toys.toy()
    objective = end_to_end(Purified(Purifier(1, (8, 1)), f))
    static = against_classifier(f, images, labels, noise, threat=toys.THREAT, attack=ATTACK)
    for network, adv in (
        (f, static),
        (objective.student, objective._attack(images, labels, noise)),
    ):
        assert (adv - images).abs().max() <= toys.THREAT.eps + 1e-6
        assert adv.min() >= 0
        assert adv.max() <= 1
        assert not adv.requires_grad
        random = toys.THREAT.random_start(images, noise)
        with torch.no_grad():
            before = cross_entropy(network(images), labels)
            gain, luck = (cross_entropy(network(x), labels) - before for x in (adv, random))
        assert gain.mean() > 3 * luck.mean().abs()
        assert (gain > 0).float().mean() > 0.9


def test_half_are_one_step_and_half_are_at_half_of_eps():
    images, labels, noise = toys.batch(400)
    images = 0.3 + 0.4 * images  # away from 0 and 1, so that nothing is clipped
    adv = against_classifier(toys.toy(), images, labels, noise, threat=toys.THREAT, attack=ATTACK)
    delta = (adv - images).abs()
    largest = delta.amax((1, 2, 3)) / toys.THREAT.eps
    assert ((largest - 1).abs().lt(1e-3) | (largest - 0.5).abs().lt(1e-3)).all()
    assert 150 < (largest > 0.75).sum() < 250
    one_step = (delta.amin((1, 2, 3)) / delta.amax((1, 2, 3))) > 0.999  # every pixel at the bound
    assert 150 < one_step.sum() < 260


def test_crafting_once_repeats_itself_in_every_epoch_and_crafting_per_epoch_does_not():
    images, labels, noise = toys.batch()
    f = toys.toy()
    make = {"threat": toys.THREAT, "attack": ATTACK}
    for once in (True, False):
        first, second = (
            against_classifier(f, images, labels, noise.fork(0, epoch, 1), once=once, **make)
            if not once
            else against_classifier(
                f,
                images,
                labels,
                type(noise)(noise.seed, noise.keys, (0, epoch, 1)),
                once=True,
                **make,
            )
            for epoch in (0, 1)
        )
        assert torch.equal(first, second) == once


def test_an_image_is_crafted_alike_in_any_batch():
    images, labels, noise = toys.batch(12)
    f = toys.toy(dtype=torch.float64)
    make = {"threat": toys.THREAT, "attack": ATTACK}
    whole = against_classifier(f, images.double(), labels, noise, **make)
    chosen = torch.tensor([7, 2, 9])
    part = against_classifier(f, images[chosen].double(), labels[chosen], noise[chosen], **make)
    assert torch.allclose(whole[chosen], part, atol=1e-9)


def test_eps_grows_over_the_ramp():
    images, labels, noise = toys.batch()
    objective = end_to_end(Purified(Shift(0.1), toys.toy()), eps_ramp=0.5)
    objective.epochs = 8
    reached = []
    for objective.epoch in range(8):
        adv = objective._attack(0.3 + 0.4 * images, labels, noise)
        reached.append(((adv - 0.3 - 0.4 * images).abs().max() / toys.THREAT.eps).item())
    assert reached == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 1, 1], abs=1e-3)
    objective.eps_ramp, objective.epoch = 2.0, 0  # from 1 on: epochs
    adv = objective._attack(0.3 + 0.4 * images, labels, noise)
    assert (adv - 0.3 - 0.4 * images).abs().max() <= toys.THREAT.eps / 2 + 1e-6


@pytest.mark.parametrize("mode", ["paper_like", "adaptive"])
def test_stability_reads_no_label(mode):
    images, labels, noise = toys.batch()
    shuffled = labels.roll(1)
    for target, equal in (("stability", True), ("label", False)):
        for objective in all_stages(mode=mode, target=target, taught_by="adversarial"):
            first = objective.train()(images, labels, noise)["loss"]
            assert torch.equal(first, objective(images, shuffled, noise)["loss"]) == equal


# Who gets gradient.


def test_gradient_reaches_the_student_through_the_classifier_and_nobody_else():
    images, labels, noise = toys.batch()
    for objective in (last(mode="paper_like"), last(mode="adaptive")):
        frozen = [(module, weights_hash(module)) for module in toys.frozen(objective)]
        assert len(frozen) == 3  # f, A, N
        toys.train(objective, [(images, labels, noise)] * 2)
        for module, before in frozen:
            assert weights_hash(module) == before
            assert all(p.grad is None for p in module.parameters())
    student = Purified(Shift(0.1), toys.toy())
    settings = {"crafting": unchanged, "ensemble": Ensemble(Shift(0.3), Shift(0.3), "routed")}
    only = static(student=student, adv_weight=0, clean_weight=0, guidance_weight=1.0, **settings)
    only(images, labels, noise)["loss"].backward()
    assert student.purifier.value.grad.abs() > 1e-4  # the guidance alone, through f


def test_without_guidance_the_static_loss_does_not_depend_on_the_classifier():
    images, labels, noise = toys.batch()
    purifier = Purifier(1, (8, 1))
    ensemble = Ensemble(Shift(0.1), Shift(0.2), "routed")
    for weight, equal in ((0.0, True), (0.1, False)):
        losses = [
            static(student=Purified(purifier, toys.toy(seed=seed)), crafting=unchanged,
                   ensemble=ensemble, ensemble_weight=1.0, guidance_weight=weight)(
                images, labels, noise)["loss"]
            for seed in (0, 1)
        ]  # fmt: skip
        assert torch.equal(*losses) == equal


def test_teachers_are_copies_of_what_they_were():
    *_, teacher, student = all_stages(mode="adaptive")
    assert teacher.name == "end-to-end teacher"
    frozen = student.ensemble.adversarial.network
    assert frozen is not teacher.student.purifier
    assert weights_hash(frozen) == weights_hash(teacher.student.purifier)
    assert all(p.requires_grad for p in teacher.student.purifier.parameters())


# The stages and the ablations.


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"mode": "paper_like"}, ["normal teacher", "adversarial teacher", "student"]),
        ({"mode": "paper_like", "taught_by": "adversarial"}, ["adversarial teacher", "student"]),
        ({"mode": "paper_like", "taught_by": "normal"}, ["normal teacher", "student"]),
        ({"mode": "paper_like", "taught_by": "mix"}, ["adversarial teacher", "student"]),
        ({"mode": "paper_like", "taught_by": "none"}, ["student"]),
        (
            {},
            [
                "normal teacher",
                "adversarial teacher",
                "static student",
                "end-to-end teacher",
                "student",
            ],
        ),
        ({"taught_by": "none"}, ["static student", "student"]),
        ({"taught_by": "normal"}, ["normal teacher", "static student", "student"]),
    ],
)
def test_every_ablation_has_its_stages(settings, names):
    images, labels, noise = toys.batch()
    made = all_stages(**settings)
    assert [objective.name for objective in made] == names
    assert all(isinstance(objective.student, Purified) for objective in made)
    assert (made[-1].ensemble is None) == (settings.get("taught_by") == "none")
    assert made[-1].record["mode"] == settings.get("mode", "adaptive")
    if settings.get("taught_by") == "mix":
        assert (made[0].adv_weight, made[0].clean_weight) == (1, 1)
    elif names[0] == "adversarial teacher":
        assert (made[0].adv_weight, made[0].clean_weight) == (1, 0)
    for objective in made:
        assert objective.train()(images, labels, noise)["loss"].isfinite()


def test_the_static_stages_may_be_shorter_and_the_normal_teacher_is_chosen_by_clean_accuracy():
    made = all_stages(static_epochs=3)
    assert [o.training_changes.get("epochs") for o in made] == [3, 3, 3, None, None]
    assert made[0].training_changes["select"] == "clean"
    assert "epochs" not in all_stages(mode="paper_like", static_epochs=3)[-1].training_changes


def test_adaptive_goes_on_from_the_static_weights():
    made = all_stages(mode="adaptive")
    assert made[-1].student is made[2].student
    assert made[3].student is made[1].student


def test_a_classifier_without_weights_is_trained_first_and_a_given_one_is_not():
    fresh = models.create("resnet20_cifar", num_classes=10, in_chans=1, image_size=8)
    replaced = toys.toy(about={"base": "toy", "replaced": ["head"]})
    for classifier in (fresh, replaced):
        first = next(stages(classifier, [], threat=toys.THREAT, attack=ATTACK))
        assert first.name == "classifier"
        assert first.student is classifier
    first = next(stages(toys.toy(), [], threat=toys.THREAT, attack=ATTACK))
    assert first.name == "normal teacher"


def test_a_teacher_given_by_name_is_refused():
    with pytest.raises(UsageError, match="teacher"):
        next(stages(toys.toy(), [toys.toy()], threat=toys.THREAT, attack=ATTACK))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("paper_like", GOLDEN_STATIC), ("adaptive", GOLDEN_ADAPTIVE)],
)
def test_three_steps(mode, expected):
    """What no formula says, such as the order of random draws, must not change unseen."""
    assert torch.get_num_threads() == 1
    batches = [toys.batch(seed=seed) for seed in range(3)]
    assert toys.train(last(mode=mode), batches) == pytest.approx(expected, rel=1e-4)


# In the loop.


@pytest.fixture(scope="module")
def digits():
    loaded = data.load("digits")
    train, validation = loaded.split_validation()
    return train.take(96), validation.take(20)


def in_loop(digits, objective, **changes):
    settings = {"epochs": 2, "batch_size": 32, "optimizer": "adam", "lr": 1e-3, "weight_decay": 0.0,
                "schedule": "cosine", "clip_grad": 1.0, "averaging": "ema", "ema_decay": 0.9,
                "validation_steps": 2, **changes}  # fmt: skip
    return Stage(
        objective, *digits, number=2, settings=Training(**settings), threat=toys.THREAT,
        accelerator=harden.new_accelerator("fp32", 1, 0), seed=0, policy="crop",
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["paper_like", "adaptive"])
def test_a_student_stage_interrupted_and_resumed_ends_with_the_same_bits(digits, tmp_path, mode):
    objective = last(mode=mode)
    whole = in_loop(digits, copy.deepcopy(objective))
    expected = fit(whole, checkpoints=Checkpoints(tmp_path / "whole"))
    asked = iter(range(1, 100))
    checkpoints = Checkpoints(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        fit(in_loop(digits, copy.deepcopy(objective)), checkpoints=checkpoints,
            interrupted=lambda: next(asked) == 4)  # fmt: skip
    resumed = in_loop(digits, copy.deepcopy(objective))
    got = fit(resumed, checkpoints=checkpoints)
    assert toys.same(expected.best, got.best)
    assert toys.same(expected.last, got.last)
    assert not toys.same(expected.last, objective.student.state_dict())
    resumed.objective.student.require_untouched()
    saved, _ = checkpoints.load("stage2")
    own = [key for key in saved if key.startswith("objective.")]
    assert own
    assert not any("classifier" in key or "ensemble" in key for key in own)


def test_a_loss_that_is_not_finite_stops_the_stage(digits, tmp_path):
    objective = last(mode="adaptive", pixel_weight=float("inf"))
    with pytest.raises(TrainingError, match="finite loss"):
        fit(in_loop(digits, objective), checkpoints=Checkpoints(tmp_path))


@pytest.mark.slow
def test_a_static_purifier_falls_to_who_knows_it_and_end_to_end_training_helps(tmp_path):
    """Minutes: both modes on digits at the default eps, through `distill`, on 120 test images."""
    common = {"training.epochs": 12, "training.batch_size": 32}
    ordinary = {**common, "training.epochs": 6, "training.validation_steps": 2}
    plan = harden.plan("standard", "resnet20_cifar", settings=ordinary, suite="fgsm", limit=8)
    classifier = harden.run(plan, tmp_path / "classifier") / "model.safetensors"
    found = {}
    for mode in ("paper_like", "adaptive"):
        settings = {**common, "mode": mode, "size": (8, 1), "teacher_size": (8, 1),
                    "attack.steps": 5,
                    "static_epochs": 4, "training.validation_steps": 5, "training.lr": 3e-3,
                    "training.ema_decay": 0.98}  # fmt: skip
        plan = harden.plan("purifier", str(classifier), settings=settings, limit=120,
                           suite="apgd-ce,apgd-margin")  # fmt: skip
        folder = harden.run(plan, tmp_path / mode)
        record = RunFolder(folder).record
        assert record["classifier"]["untouched"] is True
        assert record["classifier"]["sha256"] == weights_hash(models.load(classifier))
        assert weights_hash(models.load(folder).classifier) == record["classifier"]["sha256"]
        content = report.read(folder)
        assert [row["tier"] for row in content["tiers"] if row["headline"]] == ["W"]
        found[mode] = {row["tier"]: row["robust_accuracy"] for row in content["tiers"]}
    assert found["paper_like"]["G1"] - found["paper_like"]["W"] > 0.2
    assert found["adaptive"]["W"] - found["paper_like"]["W"] > 0.3
