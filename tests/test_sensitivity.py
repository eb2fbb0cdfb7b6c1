"""The three sensitivities against autograd and closed forms, and under rescaled logits."""

import json

import pytest
import torch
from torch import nn

from robustify.sensitivity import (
    boundary_distance,
    logit_sum_gradient,
    sensitivity,
    softmax_jacobian,
)


class Scaled(nn.Module):
    """A small smooth network whose logits are multiplied by a factor."""

    def __init__(self, factor=1.0, classes=4):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.body = nn.Sequential(
                nn.Flatten(), nn.Linear(9, 16), nn.Tanh(), nn.Linear(16, classes)
            )
        self.factor = factor

    def forward(self, images):
        return self.factor * self.body(images)


def images(count=6):
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 3, 3, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("temperature", [1.0, 7.0])
def test_s1_is_the_jacobian_of_the_softmax(temperature):
    model, x = Scaled(3.0).double(), images(3)
    found = softmax_jacobian(model, x, temperature=temperature)
    for n in range(3):
        jacobian = torch.autograd.functional.jacobian(
            lambda one: (model(one) / temperature).softmax(1)[0], x[n : n + 1]
        )
        assert torch.allclose(found[n], jacobian.flatten(1), rtol=1e-9, atol=1e-14)


def test_s1_of_a_saturated_softmax_is_tiny_and_not_rounding():
    """With p_0 = 1 - 1e-26 the naive p_0 (J_0 - sum p J) is rounding, about 1e-8 in float32."""
    weight = torch.randn(2, 9, generator=torch.Generator().manual_seed(2))

    def model(x):
        z = x.flatten(1) @ weight.T
        return torch.stack([z[:, 0] - z[:, 0].detach() + 60, z[:, 1] - z[:, 1].detach()], 1)

    found = softmax_jacobian(model, images(2).float()).abs().max().item()
    expected = (weight[0] - weight[1]).abs().max().item() * 8.75651e-27  # e^-60
    assert found == pytest.approx(expected, rel=1e-3)


def test_s2_and_s3_of_a_linear_model_are_exact():
    weight = torch.tensor([[3.0, -1, 0, 0, 0, 0, 0, 0, 0], [1.0, 1, 0, 0, 0, 0, 0, 0, 0]]).double()
    x, labels = images(5), torch.zeros(5, dtype=torch.long)

    def model(x):
        return x.flatten(1) @ weight.T

    assert logit_sum_gradient(model, x).tolist() == pytest.approx([4 / 9] * 5)  # |(4, 0, …)| / 9
    linf, l2 = boundary_distance(model, x, labels)
    value = x.flatten(1) @ torch.tensor([2.0, -2, 0, 0, 0, 0, 0, 0, 0]).double()
    assert torch.allclose(linf, value / 4)
    assert torch.allclose(l2, value / 8**0.5)
    direction = torch.tensor([1.0, -1, 0, 0, 0, 0, 0, 0, 0]).double().view(1, 1, 3, 3)
    on_boundary = model(x - linf.view(-1, 1, 1, 1) * direction)
    assert torch.allclose(on_boundary[:, 0], on_boundary[:, 1])


def test_multiplying_logits_by_128_moves_s1_and_s2_apart_and_leaves_s3():
    x = images(40)
    labels = Scaled().double()(x).argmax(1)
    one, many = (sensitivity(Scaled(f), x.float(), labels, temperature=128.0) for f in (1.0, 128.0))
    assert many["s2"] == pytest.approx(128 * one["s2"])
    assert many["s2_over_temperature"] == pytest.approx(one["s2"])
    assert many["s3"] == pytest.approx(one["s3"])
    assert many["s1"]["128"]["mean"] == pytest.approx(one["s1"]["1"]["mean"])
    assert many["s1"]["1"]["median"] < one["s1"]["1"]["median"] / 10
    assert one["n_right"] == 40


def test_sensitivity_is_plain_counts_every_image_and_leaves_the_model():
    model, x = Scaled(), images(10).float()
    labels = (model(x).argmax(1) + 1) % 4  # all wrong: nothing to take a median of
    found = sensitivity(model.train(), x, labels, temperature=5.0, batch_size=3)
    assert json.loads(json.dumps(found)) == found
    assert found["s3"] is None
    for temperature in ("1", "5"):
        distribution = found["s1"][temperature]
        assert sum(distribution["log10_histogram"].values()) + distribution["zeros"] == 10
    assert model.training
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())
    right = sensitivity(model, x, model(x).argmax(1), temperature=5.0, batch_size=10)
    assert right["s2"] == pytest.approx(found["s2"])
