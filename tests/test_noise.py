"""Noise belongs to an image: properties of the generator."""

import torch

from robustify.noise import Noise

LIKE = torch.empty(4, 3, 8, 8)


def noise(seed=0, count=4, stream=()):
    return Noise(seed, torch.arange(count), stream)


def test_draw_depends_on_the_key_alone():
    whole = noise().normal(LIKE)
    chosen = torch.tensor([3, 1])
    assert torch.equal(noise()[chosen].normal(LIKE[:2]), whole[chosen])


def test_seeds_streams_and_keys_are_independent():
    draws = [noise(), noise(seed=1), noise().fork(0), noise().fork(1), noise().fork(0, 0)]
    flat = torch.stack([draw.uniform(LIKE).flatten() for draw in draws])
    assert torch.corrcoef(flat).fill_diagonal_(0).abs().max() < 0.15
    rows = noise(count=64).uniform(torch.empty(64, 1, 16, 16)).flatten(1)
    assert torch.corrcoef(rows).fill_diagonal_(0).abs().max() < 0.3


def test_uniform_is_uniform_and_normal_is_normal():
    many = Noise(7, torch.arange(2000))
    uniform = many.uniform(torch.empty(2000, 100)).flatten()
    assert uniform.min() >= 0
    assert uniform.max() < 1
    histogram = torch.histc(uniform, bins=100, min=0, max=1)
    expected = uniform.numel() / 100
    assert ((histogram - expected) ** 2 / expected).sum() < 160  # chi-squared, 99 degrees
    normal = many.normal(torch.empty(2000, 100))
    assert normal.isfinite().all()
    assert abs(normal.mean()) < 0.01
    assert abs(normal.std() - 1) < 0.01
    assert abs((normal**4).mean() - 3) < 0.1


def test_bits_are_balanced():
    bits = noise(count=1000).bits(64)
    ones = torch.stack([(bits >> place) & 1 for place in range(64)]).float().mean((1, 2))
    assert (ones - 0.5).abs().max() < 0.01


def test_integers_cover_their_range():
    drawn = noise(count=100).integers(7, torch.empty(100, 50))
    assert set(drawn.flatten().tolist()) == set(range(7))


def test_the_callers_random_state_is_untouched():
    before = torch.get_rng_state()
    noise().normal(LIKE)
    assert torch.equal(before, torch.get_rng_state())


def test_for_batch_counts_images():
    assert torch.equal(Noise.for_batch(0, LIKE).uniform(LIKE), noise().uniform(LIKE))
