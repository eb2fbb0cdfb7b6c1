"""Noise: random numbers that belong to an image, not to its batch.

A draw depends on (seed, stream, key of the image, element) alone, so an attack gives the same
result for any batch size, process count, order or interruption, and leaves every random state of
the caller untouched. The generator is counter-based: SplitMix64's finaliser (Steele, Lea and Flood,
OOPSLA 2014) over a counter, in int64 arithmetic that wraps, on the device of the keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 0x9E3779B97F4A7C15 as a signed integer: SplitMix64's increment
_MIX_1 = -4658895280553007687  # 0xBF58476D1CE4E5B9
_MIX_2 = -7723592293110705685  # 0x94D049BB133111EB


def _mix(state: Tensor) -> Tensor:
    """SplitMix64's finaliser: 64 well-mixed bits from each int64."""
    state = (state ^ _shift(state, 30)) * _MIX_1
    state = (state ^ _shift(state, 27)) * _MIX_2
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch shifts int64 arithmetically."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


@dataclass(frozen=True)
class Noise:
    """Independent random numbers for each of N images.

    `keys`: (N,) int64, one per image (its index in the data set). `seed` and `stream` choose among
    independent sequences; `fork` gives a new one, for a restart or a second draw.
    """

    seed: int
    keys: Tensor
    stream: tuple[int, ...] = ()

    @classmethod
    def for_batch(cls, seed: int, images: Tensor) -> Noise:
        """Keys 0 … N-1 for images that have no index of their own."""
        return cls(seed, torch.arange(len(images), device=images.device))

    def fork(self, *stream: int) -> Noise:
        """An independent sequence of the same images."""
        return replace(self, stream=self.stream + stream)

    def __getitem__(self, chosen: Tensor) -> Noise:
        """The noise of the chosen images (a mask or indices)."""
        return replace(self, keys=self.keys[chosen])

    def bits(self, count: int) -> Tensor:
        """(N, count) int64 of 64 random bits each."""
        state = self.keys.new_full((), self.seed)
        for number in (*self.stream, len(self.stream)):
            state = _mix(state + _GOLDEN * torch.full_like(state, number + 1))
        rows = _mix(_mix(self.keys + state) + _GOLDEN)
        counter = torch.arange(1, count + 1, device=self.keys.device)
        return _mix(rows[:, None] + counter * _GOLDEN)

    def uniform(self, like: Tensor) -> Tensor:
        """Uniform in [0, 1), shaped like `like` (first dimension N), in float32."""
        count = math.prod(like.shape[1:])
        drawn = _shift(self.bits(count), 40).float() * 2.0**-24
        return drawn.view(len(self.keys), *like.shape[1:])

    def normal(self, like: Tensor) -> Tensor:
        """Standard normal, shaped like `like`, in float32, by inversion."""
        uniform = self.uniform(like)
        return torch.erfinv(2 * uniform - 1 + 2.0**-24) * math.sqrt(2)

    def integers(self, high: int, like: Tensor) -> Tensor:
        """Uniform integers in [0, high), shaped like `like`; high is at most 2**24."""
        return (self.uniform(like) * high).long().clamp_max(high - 1)
