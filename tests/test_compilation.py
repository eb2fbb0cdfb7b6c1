"""Compiled networks answer as plain ones do, or are given up with a notice."""

import logging
from dataclasses import dataclass

import pytest
import torch
from loops import Tiny, stage, weights
from torch import nn

from robustify.attacks.pgd import pgd
from robustify.checkpoint import Checkpoints
from robustify.compilation import compiling
from robustify.fit import fit
from robustify.fold import constant
from robustify.losses import cross_entropy
from robustify.objective import Objective
from robustify.threat import ThreatModel

IMAGES = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def answers(network, images=IMAGES):
    images = images.clone().requires_grad_()
    logits = network(images)
    return logits.detach(), torch.autograd.grad(logits.logsumexp(1).sum(), images)[0]


class NothingToFold(nn.Sequential):
    """A network without BatchNorm."""

    def __init__(self):
        super().__init__(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))


@pytest.mark.parametrize("kind", [Tiny, NothingToFold])
def test_a_compiled_copy_answers_as_the_plain_one_and_follows_its_weights(kind):
    torch.manual_seed(0)
    network = kind().eval()
    with compiling():
        for _ in range(2):
            with constant(network, IMAGES) as lent:
                found = answers(lent)
                assert lent.run.checked
                assert not lent.run.given_up
            torch.testing.assert_close(found, answers(network), rtol=1e-4, atol=1e-5)
            with torch.no_grad():
                next(network.parameters()).mul_(1.5)
    with constant(network, IMAGES) as lent:
        assert not hasattr(lent, "run") or lent.run is lent.graph


def test_what_cannot_be_compiled_is_used_as_it_is(monkeypatch, caplog):
    def refuse(*_, **__):
        raise RuntimeError("no C++ compiler")

    monkeypatch.setattr(torch, "compile", refuse)
    network = Tiny().eval()
    with caplog.at_level(logging.WARNING), compiling(), constant(network, IMAGES) as lent:
        found = answers(lent)
    torch.testing.assert_close(found, answers(network))
    assert "Tiny cannot be compiled (RuntimeError: no C++ compiler); going on" in caplog.text


def test_what_is_compiled_wrongly_is_not_used(monkeypatch, caplog):
    monkeypatch.setattr(torch, "compile", lambda network, **_: lambda images: 1.1 * network(images))
    network = Tiny().eval()
    with caplog.at_level(logging.WARNING), compiling(), constant(network, IMAGES) as lent:
        found = answers(lent)
    torch.testing.assert_close(found, answers(network))
    assert "compiled and plain logits differ" in caplog.text


def test_memory_that_runs_out_while_compiling_is_not_taken_for_a_failed_compilation(monkeypatch):
    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch, "compile", refuse)
    with (
        compiling(),
        constant(Tiny().eval(), IMAGES) as lent,
        pytest.raises(torch.OutOfMemoryError),
    ):
        lent(IMAGES)


def test_a_shape_that_fails_later_is_given_up_with_a_notice_too(monkeypatch, caplog):
    """The last batch of an epoch is smaller, and validation asks without gradients."""

    def compiled(network, **_):
        def run(images):
            if len(images) == 5 or not torch.is_grad_enabled():
                raise RuntimeError("only this shape")
            return network(images)

        return run

    monkeypatch.setattr(torch, "compile", compiled)
    network = Tiny().eval()
    for first, then in ((IMAGES, IMAGES[:5]), (IMAGES, IMAGES)):
        caplog.clear()
        with caplog.at_level(logging.WARNING), compiling(), constant(network, IMAGES) as lent:
            lent.run.checked.clear()
            lent.run.given_up = False
            found = answers(lent, first)
            assert caplog.text == ""
            with torch.set_grad_enabled(len(then) == 5):
                logits = lent(then)
        torch.testing.assert_close(found, answers(network, first))
        torch.testing.assert_close(logits, network(then))
        assert "cannot be compiled (RuntimeError: only this shape)" in caplog.text


def test_a_compiled_run_trains_as_a_plain_one(tmp_path):
    """Through the loop: batches of two sizes, and validation."""
    found = {}
    for on in (False, True):
        run = stage(objective=Adversarial, epochs=1, lr=0.01)
        with compiling(on):
            fit(run, checkpoints=Checkpoints(tmp_path / str(on)))
        found[on] = weights(run)
    torch.testing.assert_close(found[True], found[False], rtol=1e-3, atol=1e-4)


@dataclass(eq=False, repr=False, kw_only=True)
class Adversarial(Objective):
    """One step of an attack, and cross-entropy on what it found."""

    def forward(self, images, labels, noise):
        with constant(self.student, images) as student:
            images_adv = pgd(
                lambda x: cross_entropy(student(x), labels), images, ThreatModel("L2", 0.5),
                steps=1, step_size=0.5, noise=noise,
            )  # fmt: skip
        return {"loss": cross_entropy(self.student(images_adv), labels).mean()}
