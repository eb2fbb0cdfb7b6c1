"""The geometry of a threat model: properties, and the L1 projection against a slow one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from robustify.errors import UsageError
from robustify.noise import Noise
from robustify.threat import ThreatModel, chosen, format_eps, parse_eps

NORMS = ("Linf", "L2", "L1")


def images(seed=0):
    return torch.rand(5, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("norm", NORMS)
@settings(deadline=None, max_examples=30)
@given(eps=st.floats(0, 3), seed=st.integers(0, 100), scale=st.floats(0, 10))
def test_projection_ends_inside_and_is_idempotent(norm, eps, seed, scale):
    threat, x = ThreatModel(norm, eps), images(seed)
    moved = threat.project(x + scale * (images(seed + 1) - 0.5), x)
    assert (threat.distance(moved, x) <= eps + 1e-5).all()
    assert moved.min() >= 0
    assert moved.max() <= 1
    assert torch.allclose(threat.project(moved, x), moved, atol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_random_start_is_inside_and_fills_the_ball(norm):
    threat, x = ThreatModel(norm, 0.1), torch.full((200, 1, 4, 4), 0.5)
    start = threat.random_start(x, Noise.for_batch(0, x))
    distance = threat.distance(start, x)
    assert (distance <= 0.1 + 1e-6).all()
    assert distance.max() > 0.09
    assert (start - x).mean().abs() < 0.01


@pytest.mark.parametrize("norm", NORMS)
def test_a_step_ascends_a_linear_loss_by_step_size_times_dual_norm(norm):
    weights = images(3) - 0.5
    moved = ThreatModel(norm, 1.0).ascend(images(), weights, 0.01)
    dual = {"Linf": 1, "L2": 2, "L1": float("inf")}[norm]
    gain = ((moved - images()) * weights).flatten(1).sum(1)
    expected = 0.01 * torch.linalg.vector_norm(weights.flatten(1), dual, dim=1)
    assert torch.allclose(gain, expected, atol=1e-6)


def test_l1_projection_is_the_nearest_point():
    x = torch.full((20, 1, 3, 3), 0.5)
    delta = 0.4 * torch.randn(20, 1, 3, 3, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    projected = ThreatModel("L1", 0.7).project(x + delta, x) - x
    low, high = torch.zeros(20, 1), torch.full((20, 1), 2.0)
    for _ in range(60):  # bisection on the soft threshold
        middle = (low + high) / 2
        length = (delta.flatten(1).abs() - middle).clamp_min(0).sum(1, keepdim=True)
        low, high = torch.where(length > 0.7, middle, low), torch.where(length > 0.7, high, middle)
    slow = delta.flatten(1).sign() * (delta.flatten(1).abs() - high).clamp_min(0)
    assert torch.allclose(projected.flatten(1), slow, atol=1e-5)


def test_eps_is_read_and_written_as_people_do():
    assert parse_eps("8/255") == 8 / 255
    assert parse_eps("1e-2") == 0.01
    assert format_eps(8 / 255) == "8/255"
    assert format_eps(0.15) == "0.15"
    assert format_eps(0) == "0"


@pytest.mark.parametrize("wrong", ["eight", "1/0", "", "1/2/3"])
def test_eps_that_is_no_number_is_refused(wrong):
    with pytest.raises(UsageError, match="expected a number such as 8/255"):
        parse_eps(wrong)


@pytest.mark.parametrize("eps", [-0.1, float("nan"), float("inf")])
def test_impossible_eps_is_refused(eps):
    with pytest.raises(UsageError, match="expected eps >= 0"):
        ThreatModel("Linf", eps)


def test_unknown_norm_is_refused_with_a_suggestion():
    with pytest.raises(UsageError, match="did you mean 'Linf'"):
        ThreatModel("linf", 0.1)


def test_another_norm_needs_its_own_eps():
    usual = ThreatModel("Linf", 0.15)
    assert chosen(None, None, usual) == usual == chosen("Linf", None, usual)
    assert chosen("L2", 0.5, usual) == ThreatModel("L2", 0.5)
    with pytest.raises(UsageError, match=r"expected --eps with --norm L2.*0.15, is one of Linf"):
        chosen("L2", None, usual)
