"""Compiled networks answer as plain ones do, or are given up with a notice."""

import logging

import pytest
import torch
from loops import Tiny
from torch import nn

from robustify.compilation import compiling
from robustify.fold import constant

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
                assert lent.run.run is not None, "it was given up"
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
