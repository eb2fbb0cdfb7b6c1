"""Small models for the attack tests."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn


class Linear(nn.Module):
    """Logits (s v, -s v, …) with v = w · (x - 0.5): the exact distance to the boundary is known."""

    def __init__(self, shape: tuple[int, ...], classes: int = 2, scale: float = 10.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(classes, *shape, generator=generator)
        self.weight /= self.weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1) / scale

    def forward(self, images: Tensor) -> Tensor:
        return (images - 0.5).flatten(1) @ self.weight.flatten(1).T

    def distances(self, images: Tensor, labels: Tensor, order: float) -> Tensor:
        """(N,) distance to the nearest other class, in the norm dual to `order`, in no box."""
        logits = self(images)
        gaps = logits.gather(1, labels[:, None]) - logits
        slopes = self.weight[labels][:, None] - self.weight[None]
        steepness = torch.linalg.vector_norm(slopes.flatten(2), order, dim=2)
        return (gaps / steepness.clamp_min(1e-12)).scatter(1, labels[:, None], torch.inf).amin(1)


def convolutional(channels: int = 1, size: int = 8, classes: int = 4) -> nn.Module:
    """A random network with BatchNorm and dropout, in eval mode."""
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(channels, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(8 * (size // 2) ** 2, classes),
        ).eval()


def some_images(count: int, channels: int = 1, size: int = 8, low: float = 0.0) -> Tensor:
    """Uniform in [low, 1 - low]."""
    generator = torch.Generator().manual_seed(1)
    return low + (1 - 2 * low) * torch.rand(count, channels, size, size, generator=generator)


def cnn_a(weights: Path) -> nn.Module:
    """A published CIFAR-10 network without BatchNorm; its normalisation is left out."""
    network = nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    network.load_state_dict(load_file(weights))
    return network.eval()
