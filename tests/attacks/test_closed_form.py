"""Attacks on models whose exact robust accuracy is known."""

from __future__ import annotations

import pytest
import torch

from robustify.attacks.apgd import APGD
from robustify.attacks.square import Square
from robustify.attacks.suite import Suite, make_suite, run_suite
from robustify.attacks.transfer import Transfer
from robustify.threat import ThreatModel

from .networks import Linear, some_images

DUAL = {"Linf": 1, "L2": 2, "L1": torch.inf}
EPS = {"Linf": 0.01, "L2": 0.06, "L1": 0.25}


def survivors(model, images, labels, name, threat, classes=2):
    suite = name if isinstance(name, Suite) else make_suite(name, threat, classes)
    return run_suite(model, images, labels, suite=suite, threat=threat)[-1].survivors


@pytest.mark.parametrize("norm", EPS)
@pytest.mark.parametrize(
    "attack", ["apgd-ce", "apgd-ce-scaled", "apgd-margin", "apgd-t", "fab", "fab-t", "pgd"]
)
@pytest.mark.parametrize("classes", [2, 5])
def test_linear_model_falls_exactly_within_its_distance(norm, attack, classes):
    if norm == "L1" and attack == "pgd":
        pytest.skip("steps of eps / 4 along single entries are no exact attack")
    model, threat = Linear((1, 8, 8), classes), ThreatModel(norm, EPS[norm])
    images = some_images(60, low=0.35)  # the ball is inside the box
    labels = model(images).argmax(1)
    distance = model.distances(images, labels, DUAL[norm])
    far, near = distance > threat.eps * 1.001, distance < threat.eps * 0.93
    assert near.any()
    assert far.any()
    right = survivors(model, images, labels, attack, threat, classes)
    assert right[far].all()
    if attack.startswith("fab") or (norm != "L1" and (classes == 2 or attack == "apgd-t")):
        assert not right[near].any()
    else:  # cross-entropy pulls to several classes at once; in L1 APGD converges slowly
        assert right[near].float().mean() <= 0.2


@pytest.mark.parametrize(("norm", "reach"), [("Linf", 0.4), ("L2", 0.4), ("L1", 0.3)])
def test_square_breaks_what_is_well_within_its_distance(norm, reach):
    model, threat = Linear((1, 8, 8)), ThreatModel(norm, EPS[norm])
    images = some_images(60, low=0.35)
    labels = model(images).argmax(1)
    distance = model.distances(images, labels, DUAL[norm])
    suite = Suite("square", (Square(queries=600),))
    right = survivors(model, images, labels, suite, threat)
    assert right[distance > threat.eps * 1.001].all()
    assert right[distance < threat.eps * reach].float().mean() <= 0.1


def test_cw_breaks_what_is_within_its_distance():
    model, threat = Linear((1, 8, 8)), ThreatModel("L2", 0.06)
    images = some_images(40, low=0.35)
    labels = model(images).argmax(1)
    distance = model.distances(images, labels, 2)
    right = survivors(model, images, labels, "cw", threat)
    assert right[distance > threat.eps * 1.001].all()
    assert not right[distance < threat.eps * 0.9].any()


def test_scale_free_losses_break_saturated_logits():
    model, threat = Linear((1, 8, 8), scale=1e6), ThreatModel("Linf", 0.02)
    images = some_images(60, low=0.35)
    labels = model(images).argmax(1)
    near = model.distances(images, labels, 1) < threat.eps * 0.93
    assert survivors(model, images, labels, "fgsm", threat)[near].float().mean() > 0.8
    for attack in ("apgd-ce-scaled", "apgd-margin", "fab-t"):
        assert not survivors(model, images, labels, attack, threat)[near].any()


def test_transfer_tries_what_each_surrogate_finds():
    model, threat = Linear((1, 8, 8)), ThreatModel("Linf", 0.02)
    images = some_images(40, low=0.35)
    labels = model(images).argmax(1)
    near = model.distances(images, labels, 1) < threat.eps * 0.99
    assert near.any()
    assert not near.all()

    def blind(images):
        return images.flatten(1)[:, :2] * torch.nan

    def survivors_of(surrogates, indices):
        suite = Suite("transfer", (Transfer(surrogates),))
        return run_suite(
            model, images[indices], labels[indices], suite=suite, threat=threat, indices=indices
        )[-1].survivors

    backwards = torch.arange(39, -1, -1)
    found = survivors_of({"useless": blind, "twin": model}, backwards)
    assert torch.equal(found, ~near[backwards])
    assert torch.equal(survivors_of({"twin": model}, backwards[:7]), found[:7])
    assert survivors_of({"useless": blind}, backwards).float().mean() > 0.8  # chance alone


def test_averaged_gradients_see_through_noise():
    plain, threat = Linear((1, 8, 8)), ThreatModel("Linf", 0.02)
    images = some_images(40, low=0.35)
    labels = plain(images).argmax(1)
    near = plain.distances(images, labels, 1) < threat.eps * 0.8

    class Noisy(torch.nn.Module):
        def forward(self, images):
            return plain(images + 0.02 * torch.randn_like(images))

    suite = Suite("rand", (APGD("apgd-ce", "ce", iterations=20, samples=20),), worst_case=False)
    right = survivors(Noisy(), images, labels, suite, threat)
    assert right[near].float().mean() <= 0.1
