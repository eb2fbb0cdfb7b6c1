"""The direct solutions against slow, obvious ones."""

from __future__ import annotations

import pytest
import torch

from robustify.attacks.projections import project_l1_in_box, project_on_hyperplane

ORDER = {"Linf": torch.inf, "L2": 2, "L1": 1}


def bisected(points, weight, offset, norm):
    """Shortest step by 200 halvings of the multiplier, in float64."""
    points, weight, offset = points.double(), weight.double(), offset.double()
    if (weight * points).sum() > offset:
        weight, offset = -weight, -offset
    need = offset - (weight * points).sum()
    room = torch.where(weight > 0, 1 - points, points) * (weight != 0)
    if norm == "L1":
        length = torch.zeros_like(room)
        for entry in weight.abs().argsort(descending=True):
            length[entry] = min(room[entry], need / weight[entry].abs())
            need = need - length[entry] * weight[entry].abs()
        return length * weight.sign()
    low, high = 0.0, 1e9
    rate = torch.ones_like(weight) if norm == "Linf" else weight.abs()
    for _ in range(200):
        middle = (low + high) / 2
        step = torch.minimum(rate * middle, room)
        low, high = (low, middle) if (weight.abs() * step).sum() > need else (middle, high)
    return torch.minimum(rate * high, room) * weight.sign()


@pytest.mark.parametrize("norm", ORDER)
@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 1.5])
def test_hyperplane_projection_is_the_shortest_step(norm, share):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(20, 30, generator=generator)
    points[:, :4] = points[:, :4].round()
    weight = torch.randn(20, 30, generator=generator)
    weight[:, 7] = 0
    corner = torch.where(weight > 0, 1.0, 0.0)
    reach = (weight * (corner - points)).sum(1)  # the most the box allows
    offset = (weight * points).sum(1) + share * reach
    found = project_on_hyperplane(points, weight, offset, norm)
    for row in range(20):
        exact = bisected(points[row], weight[row], offset[row], norm).float()
        length, shortest = (torch.linalg.vector_norm(d, ORDER[norm]) for d in (found[row], exact))
        torch.testing.assert_close(length, shortest, rtol=1e-4, atol=1e-5)
        if norm != "Linf" or share > 1:
            torch.testing.assert_close(found[row], exact, rtol=1e-3, atol=1e-4)
    moved = points + found
    assert moved.min() >= -1e-6
    assert moved.max() <= 1 + 1e-6
    if share < 1:
        torch.testing.assert_close((weight * moved).sum(1), offset, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norm", ORDER)
def test_hyperplane_projection_crosses_from_either_side(norm):
    points, weight = torch.full((1, 6), 0.5), torch.ones(1, 6)
    for offset in (2.0, 4.0):
        step = project_on_hyperplane(points, weight, torch.tensor([offset]), norm)
        assert ((points + step).sum() - offset).abs() < 1e-5


@pytest.mark.parametrize("norm", ORDER)
def test_hyperplane_projection_of_one_row_does_not_depend_on_the_others(norm):
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(17, 100, generator=generator)
    weight, offset = torch.randn(17, 100, generator=generator), torch.randn(17, generator=generator)
    together = project_on_hyperplane(points, weight, offset, norm)
    alone = [project_on_hyperplane(points[i:i+8], weight[i:i+8], offset[i:i+8], norm)[0]
             for i in range(9)]  # fmt: skip
    assert torch.equal(together[:9], torch.stack(alone))


@pytest.mark.parametrize("eps", [0.1, 1.0, 3.0, 50.0])
def test_l1_projection_in_the_box(eps):
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(10, 1, 6, 6, generator=generator)
    delta = torch.randn(10, 1, 6, 6, generator=generator)
    found = project_l1_in_box(delta, images, torch.full((10,), eps))
    moved = images + found
    assert moved.min() >= -1e-6
    assert moved.max() <= 1 + 1e-6
    assert (found.abs().flatten(1).sum(1) <= eps * (1 + 1e-5)).all()
    magnitude = delta.double().abs().flatten(1)
    cap = torch.where(delta > 0, 1 - images, images).double().flatten(1)
    low, high = torch.zeros(10, 1).double(), torch.full((10, 1), 10.0).double()
    for _ in range(100):
        middle = (low + high) / 2
        over = torch.minimum((magnitude - middle).clamp_min(0), cap).sum(1, keepdim=True) > eps
        low, high = torch.where(over, middle, low), torch.where(over, high, middle)
    exact = torch.minimum((magnitude - high).clamp_min(0), cap)
    torch.testing.assert_close(found.abs().flatten(1), exact.float(), rtol=1e-4, atol=1e-5)


def test_l1_projection_leaves_a_point_of_the_ball_alone():
    images = torch.full((2, 1, 2, 2), 0.5)
    delta = torch.tensor([0.1, -0.1, 0.0, 0.2]).view(1, 1, 2, 2).repeat(2, 1, 1, 1)
    assert torch.equal(project_l1_in_box(delta, images, torch.ones(2)), delta)
