"""Attacker tiers: who is fooled by what, and that no number stands alone."""

import itertools
from dataclasses import replace

import pytest
import torch
from torch import nn

from robustify import data
from robustify.attacks.passes import Passes
from robustify.classifier import Classifier
from robustify.evaluation import Row, evaluate
from robustify.harden import distill
from robustify.losses import cross_entropy
from robustify.purifier import Purified, Purifier
from robustify.report import read
from robustify.threat import ThreatModel
from robustify.tiers import bpda, cost, crafted, extend, of_report, psnr, ssim

THREAT = ThreatModel("Linf", 0.05)


class Templates(nn.Module):
    """Logits from random directions: easy to fool, with useful gradients."""

    num_classes, in_chans = 10, 1

    def __init__(self, scale=1.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(10, 64, generator=generator))
        self.scale = scale

    def forward(self, images):
        return self.scale * (images - 0.5).flatten(1) @ self.weight.T


class Rounding(nn.Module):
    """Has no gradient at all."""

    def forward(self, images):
        return (images * 16).round() / 16


def classifier(scale=1.0):
    f = Classifier(Templates(scale), architecture="templates", image_size=8, mean=[0.0], std=[1.0])
    return f.eval()


def pair(purifier, scale=1.0):
    return Purified(purifier, classifier(scale)).eval()


def images_and_labels(f, count=120):
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(count, 1, 8, 8, generator=generator)
    labels = f(images).argmax(1)
    labels[:10] = (labels[:10] + 1) % 10  # some are wrong to begin with
    return images, labels


def by_tier(*args, **kwargs):
    return {tier.tier: tier for tier in crafted(*args, **kwargs)}


def test_behind_the_identity_all_tiers_are_the_same_attack():
    both = pair(nn.Identity())
    images, labels = images_and_labels(both)
    tiers = by_tier(both, images, labels, THREAT, surrogate=both)
    assert torch.equal(tiers["G1"].survivors, tiers["G2"].survivors)
    assert torch.equal(tiers["G1"].survivors, tiers["G0"].survivors)  # exact gradients end to end
    assert not tiers["G1"].survivors[:10].any()  # wrong from the start counts as not robust
    assert 0 < tiers["G1"].survivors.sum() < 60
    assert set(by_tier(both, images, labels, THREAT)) == {"G1", "G2"}


def test_bpda_sees_through_a_purifier_without_gradient():
    both = pair(Rounding())
    images, labels = images_and_labels(both)
    variable = images.clone().requires_grad_()
    (blind,) = torch.autograd.grad(both(variable).sum(), variable, allow_unused=True)
    assert blind is None or not blind.any()
    substitute = bpda(both.purifier, both.classifier)
    assert torch.equal(substitute(images), both(images))
    (seen,) = torch.autograd.grad(cross_entropy(substitute(variable), labels).sum(), variable)
    assert (seen != 0).float().mean() > 0.9
    white = (
        evaluate(both, images, labels, suite="pgd", eps=THREAT.eps).samples["pgd"].float().mean()
    )
    tiers = by_tier(both, images, labels, THREAT)
    assert tiers["G2"].survivors.float().mean() < white - 0.2


def test_a_saturated_classifier_does_not_hide_from_the_grey_box_attack():
    """At this scale cross-entropy has a gradient of exactly zero in float32; the margin has not."""
    soft, saturated = pair(nn.Identity()), pair(nn.Identity(), scale=1e4)
    images, labels = images_and_labels(soft)
    variable = images[10:].clone().requires_grad_()
    loss = cross_entropy(saturated(variable), labels[10:]).sum()
    assert (torch.autograd.grad(loss, variable)[0].flatten(1) == 0).all(1).float().mean() > 0.9
    survivors = [
        by_tier(p, images, labels, THREAT)["G1"].survivors.sum() for p in (soft, saturated)
    ]
    assert survivors[1] <= survivors[0] + 5


def test_grey_box_images_are_crafted_without_the_purifier_and_judged_with_it():
    shift = pair(lambda_module(lambda x: x.flip(3)))
    images, labels = images_and_labels(shift)
    grey = by_tier(shift, images, labels, THREAT)["G1"]
    white = by_tier(shift, images, labels, THREAT, surrogate=shift)["G0"]
    # The attack is aimed at the unflipped image, so it misses; whoever knows the purifier does not.
    assert white.survivors.float().mean() < grey.survivors.float().mean() - 0.2


def lambda_module(function):
    class Function(nn.Module):
        def forward(self, images):
            return function(images)

    return Function()


def test_the_batch_size_changes_no_verdict():
    both = pair(nn.Identity())
    images, labels = images_and_labels(both, 50)
    whole, parts = (by_tier(both, images, labels, THREAT, batch_size=b, steps=10) for b in (50, 8))
    assert all(torch.equal(whole[t].survivors, parts[t].survivors) for t in whole)


def report(samples, suite="fast", n=5):
    """A report of these verdicts, one attack after the other."""
    tensors = {name: torch.tensor(right) for name, right in samples.items()}
    rows = [
        Row(name, right.float().mean().item(), int((before & ~right).sum()), {}, Passes(), 0.0)
        for (_, before), (name, right) in itertools.pairwise(tensors.items())
    ]
    final = list(tensors.values())[-1]
    blank = torch.zeros(n, dtype=torch.int64)
    measured = evaluate(classifier(), torch.rand(n, 1, 8, 8), blank, suite="fgsm", eps=THREAT.eps)
    return replace(
        measured, suite=suite, samples=tensors, rows=rows,
        clean_accuracy=tensors["clean"].float().mean().item(),
        robust_accuracy=final.float().mean().item(),
    )  # fmt: skip


def test_white_box_and_square_are_told_apart():
    T, F = True, False
    made = of_report(report({"clean": [T, T, T, T, F], "apgd-ce": [T, T, T, F, F],
                             "square": [T, T, F, F, F]}))  # fmt: skip
    rows = {tier.tier: tier.row() for tier in made}
    assert rows["W"]["robust_accuracy"] == 0.6
    assert rows["Q"]["robust_accuracy"] == 0.4
    assert rows["W"]["headline"] is True
    assert rows["Q"]["headline"] is False
    low, high = rows["W"]["interval"]
    assert low < 0.6 < high
    only = of_report(report({"clean": [T] * 5, "apgd-ce": [T, T, F, F, F]}))
    assert [tier.tier for tier in only] == ["W"]


def test_the_worst_case_is_taken_image_by_image():
    digits = data.load("digits")
    torch.manual_seed(0)
    both = pair(Purifier(1, (8, 1)))
    n = 200
    images, labels, _ = digits.test.take(n).__getitems__(range(n))
    images = data.to_float(images)
    right = both(images).argmax(1) == labels
    made = crafted(both, images, labels, THREAT)
    survivors = right.clone()
    # The suite broke one image that every other attacker leaves standing.
    robust_to_others = torch.stack([tier.survivors for tier in made]).all(0)
    survivors[robust_to_others.nonzero()[:1]] = False
    assert (survivors != right).any()
    before = report({"clean": right.tolist(), "apgd-ce": survivors.tolist()}, n=n)
    after, more = extend(before, both, digits)
    expected = survivors.clone()
    for tier in made:
        expected &= tier.survivors
    assert torch.equal(list(after.samples.values())[-1], expected)
    assert after.robust_accuracy == pytest.approx(expected.float().mean().item())
    assert [row.name for row in after.rows] == ["apgd-ce", "grey-box", "BPDA"]
    assert all(row["robust_accuracy"] >= after.robust_accuracy for row in more["tiers"])
    assert [row["tier"] for row in more["tiers"]] == ["G1", "G2", "W"]
    alone = (both.classifier(images).argmax(1) == labels).float().mean().item()
    assert more["before"] == {"name": "templates", "clean_accuracy": pytest.approx(alone)}
    assert any("G0, Q" in notice for notice in more["notices"])


@pytest.mark.parametrize(("purifier", "raised"), [(Rounding, True), (nn.Identity, False)])
def test_who_knows_less_and_breaks_more_raises_f6(purifier, raised):
    digits = data.load("digits")
    both = pair(purifier())
    images, labels, _ = digits.test.take(100).__getitems__(range(100))
    both.classifier.module.weight.data = torch.stack(  # class means: right on most digits
        [
            data.to_float(digits.train.images)[digits.train.labels == k].mean(0).flatten()
            for k in range(10)
        ]
    )
    both.classifier.module.weight.data -= both.classifier.module.weight.mean(0)
    white = evaluate(both, data.to_float(images), labels, suite="pgd", eps=0.1)
    after, _ = extend(white, both, digits)
    flag = next(flag for flag in after.findings.flags if flag.name == "F6")
    assert flag.raised is raised
    assert not any(flag.raised for flag in white.findings.flags if flag.name == "F6")
    assert after.findings.headline.robust_accuracy == after.robust_accuracy
    assert (after.robust_accuracy < white.robust_accuracy) is raised
    assert after.verdict.status == ("not applicable" if raised else "suspect")  # PGD alone


def test_fidelity():
    images = torch.rand(3, 1, 8, 8)
    assert torch.isinf(psnr(images, images)).all()
    assert torch.allclose(psnr(images * 0 + 0.5, images * 0 + 0.6), torch.tensor(20.0), atol=1e-4)
    assert torch.allclose(ssim(images, images), torch.ones(3), atol=1e-5)
    assert (ssim(images, 1 - images) < 0).all()
    # A constant pair has no structure: luminance alone, (2 a b + c) / (a² + b² + c).
    flat = ssim(torch.full((1, 1, 8, 8), 0.5), torch.full((1, 1, 8, 8), 0.6)).item()
    assert flat == pytest.approx((0.6 + 1e-4) / (0.61 + 1e-4), rel=1e-3)


def test_what_a_purifier_costs():
    both = pair(Purifier(1, (8, 1)))
    found = cost(both, torch.rand(4, 1, 8, 8))
    assert found["purifier_parameters"] == sum(p.numel() for p in both.purifier.parameters())
    assert found["parameters_over_classifier"] == pytest.approx(
        found["purifier_parameters"] / 640, rel=1e-3
    )
    assert cost(pair(nn.Identity()), torch.rand(4, 1, 8, 8))["psnr_db"] == "infinite"


@pytest.mark.parametrize(("mode", "taught_by", "known"), [
    ("adaptive", "both", True), ("paper_like", "normal", True), ("paper_like", "none", False),
])  # fmt: skip
def test_distill_transfers_from_the_teacher_of_the_purifier(tmp_path, mode, taught_by, known):
    settings = {"mode": mode, "taught_by": taught_by, "teacher_size": "tiny", "size": "tiny"}
    folder = distill("purifier", "cnn_a", out=tmp_path / "p", settings=settings, max_steps=1,
                     limit=12, suite="pgd", train_limit=160)  # fmt: skip
    content = read(folder)
    tiers = [row["tier"] for row in content["tiers"]]
    assert tiers == [*(["G0"] if known else []), "G1", "G2", "W"]
    assert content["defenses"] == ["purifier"]
    (missing,) = [notice for notice in content["notices"] if "not run" in notice]
    assert ("G0" in missing) is not known
    headline = [row["tier"] for row in content["tiers"] if row["headline"]]
    assert headline == ["W"]
