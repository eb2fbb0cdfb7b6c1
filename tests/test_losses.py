"""Losses against closed forms and independent double-precision formulas."""

import math

import pytest
import torch

from robustify import losses

TARGET = torch.tensor([[math.log(9), *[0.0] * 9]], dtype=torch.float64)
ZERO = torch.zeros(1, 10, dtype=torch.float64)


def random_logits(classes=10, seed=0, count=6):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(count, classes, generator=generator, dtype=torch.float64)


def labels(count=6, classes=10):
    return torch.arange(count) % classes


@pytest.mark.parametrize(("temperature", "value"), [(1.0, 0.510826), (5.0, 0.0109129)])
def test_kl_closed_form(temperature, value):
    got = losses.kl(TARGET, ZERO, temperature=temperature)
    assert got.item() == pytest.approx(value, rel=1e-5)
    probabilities = (TARGET / temperature).softmax(1)
    same = losses.kl_from_probabilities(probabilities, ZERO, temperature=temperature)
    assert same.item() == pytest.approx(got.item(), rel=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kl_properties(temperature):
    p, q = random_logits(), random_logits(seed=1)
    value = losses.kl(p, q, temperature=temperature)
    assert (value >= 0).all()
    assert torch.allclose(losses.kl(p + 7, q - 3, temperature=temperature), value)
    assert torch.allclose(losses.kl(p, p, temperature=temperature), torch.zeros(6).double())
    wide = [torch.cat([z, torch.full((6, 2), -1e9).double()], 1) for z in (p, q)]
    assert torch.allclose(losses.kl(*wide, temperature=temperature), value)


def test_kl_gradients_are_the_closed_form():
    a, b, temperature = random_logits(), random_logits(seed=1), 5.0
    a.requires_grad_(), b.requires_grad_()
    value = losses.kl(a, b, temperature=temperature)
    value.sum().backward()
    p, q = (a / temperature).softmax(1), (b / temperature).softmax(1)
    assert torch.allclose(b.grad, (q - p) / temperature)
    assert torch.allclose(a.grad, p * (p.log() - q.log() - value[:, None]) / temperature)


def test_kl_from_one_hot_is_cross_entropy_with_a_finite_gradient():
    z = random_logits().requires_grad_()
    one_hot = torch.nn.functional.one_hot(labels(), 10).double()
    value = losses.kl_from_probabilities(one_hot, z)
    assert torch.allclose(value, losses.cross_entropy(z, labels()))
    value.sum().backward()
    assert z.grad.isfinite().all()


def test_soft_cross_entropy_closed_form():
    z, soft = torch.tensor([[3.0, 1.0, 0.0]]), torch.tensor([[0.7, 0.2, 0.1]])
    assert losses.soft_cross_entropy(soft, z).item() == pytest.approx(0.8698460, rel=1e-6)
    tempered = losses.soft_cross_entropy(soft, z, temperature=20.0).item()
    assert tempered == pytest.approx(1.0522379, rel=1e-6)


def test_margin_and_dlr_by_hand():
    z, y = torch.tensor([[1.0, 4.0, 2.0, 0.5]]), torch.tensor([1])
    assert losses.margin(z, y).item() == -2
    assert losses.dlr(z, y).item() == pytest.approx(-2 / (4 - 1))
    targeted = losses.dlr_targeted(z, y, torch.tensor([0])).item()
    assert targeted == pytest.approx((1 - 4) / (4 - (1 + 0.5) / 2))
    assert losses.margin_targeted(z, y, torch.tensor([0])).item() == -3


def test_dlr_is_scale_free_and_logit_scale_makes_any_loss_so():
    z = random_logits()
    for scale in (2.0**-6, 2.0**10):
        assert torch.allclose(losses.dlr(scale * z, labels()), losses.dlr(z, labels()))
        assert torch.equal(scale * z / losses.logit_scale(scale * z), z / losses.logit_scale(z))


def test_positive_margin_is_misclassification():
    z = random_logits(count=50)
    y = labels(50)
    assert torch.equal(losses.margin(z, y) > 0, z.argmax(1) != y)
