"""Feature maps of unlike networks made comparable: standardize the target, project the student.

FitNets (Romero et al., ICLR 2015) and CA-MKD put a ReLU behind the projection; targets here are
signed, so there is none. Standardized targets are our choice: raw scales of network families differ
by more than ten times.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from robustify.classifier import Classifier
from robustify.fusion import Panel, numbered


class Projector(nn.Module):
    """A student's map (N, in_channels, …) as a map like a teacher's (N, out_channels, h, w): on its
    grid first, then a 1×1 convolution without bias and BatchNorm."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(out_channels)

    def forward(self, maps: Tensor, grid: tuple[int, int]) -> Tensor:
        """(N, out_channels, *grid)."""
        if maps.shape[-2] >= grid[0] and maps.shape[-1] >= grid[1]:
            on_grid = F.adaptive_avg_pool2d(maps, grid)
        else:
            on_grid = F.interpolate(maps, grid, mode="bilinear", align_corners=False)
        return self.norm(self.convolution(on_grid))  # type: ignore[no-any-return]


class Standardizer(nn.Module):
    """(maps - mean) / std per channel, of all maps that it was shown; before that, as they are.

    Its numbers are not in the state dict: they come from the training images and can be taken
    again.
    """

    mean: Tensor
    squares: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.count = 0
        for name in ("mean", "squares"):
            zeros = torch.zeros(channels, dtype=torch.float64)
            self.register_buffer(name, zeros, persistent=False)

    def reset(self) -> None:
        """Forget what was shown."""
        self.count = 0
        self.mean.zero_()
        self.squares.zero_()

    def show(self, maps: Tensor) -> None:
        """Take (N, C, h, w) into mean and sum of squares (Chan, Golub and LeVeque, 1983)."""
        values = maps.detach().double().transpose(0, 1).flatten(1)
        mean, count = values.mean(1), values.shape[1]
        total = self.count + count
        apart = mean - self.mean
        self.squares += (values - mean[:, None]).square().sum(1)
        self.squares += apart.square() * self.count * count / total
        self.mean += apart * count / total
        self.count += count

    def forward(self, maps: Tensor) -> Tensor:
        """Mean 0 and variance 1 over the shown maps; a constant channel becomes 0."""
        if self.count == 0:
            return maps
        std = (self.squares / self.count).sqrt().clamp_min(1e-5)
        mean, std = (values.to(maps.dtype)[:, None, None] for values in (self.mean, std))
        return (maps - mean) / std


class FeatureMatch(nn.Module):
    """v_k · mean( (P_k(F_s) - F_k standardized)² ), one value per teacher and image: how far a
    student's map is from those of K teachers, through a projector for each."""

    def __init__(self, student: Classifier, teachers: Panel, *, standardize: bool) -> None:
        super().__init__()
        self.standardize = standardize
        still = copy.deepcopy(student).eval()  # its BatchNorm must not see the image below
        side = still.image_size
        grey = torch.full((1, still.in_chans, side, side), 0.5).to(still.mean)
        channels = still.features(grey)[1].shape[1]
        taught = [maps.shape[1] for maps in teachers.features(grey)[1]]
        self.projectors = nn.ModuleList(Projector(channels, each) for each in taught)
        self.standardizers = nn.ModuleList(Standardizer(each) for each in taught)

    def look(self, batches: Iterable[Sequence[Tensor]]) -> None:
        """Take mean and deviation from K maps of every batch, in place of any taken before."""
        if not self.standardize:
            return
        for standardizer in self.standardizers:
            standardizer.reset()  # type: ignore[operator]
        for maps in batches:
            for standardizer, each in zip(self.standardizers, maps, strict=True):
                standardizer.show(each)  # type: ignore[operator]

    def forward(self, maps: Tensor, taught: Sequence[Tensor], weights: Tensor) -> Tensor:
        """(K, N) for a student's map, K teachers' maps and the weights v (K, N)."""
        apart = []
        for project, norm, each in zip(self.projectors, self.standardizers, taught, strict=True):
            difference = project(maps, each.shape[-2:]) - norm(each)
            apart.append(difference.square().flatten(1).mean(1))
        return weights * torch.stack(apart)

    def of_both(
        self, maps_adv: Tensor, maps: Tensor, taught: Sequence[Tensor], weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The mean of the sums over teachers for two of the student's maps, of adversarial and of
        clean images; and each summand, to log."""
        apart_adv, apart = self(maps_adv, taught, weights), self(maps, taught, weights)
        return torch.stack([apart_adv.sum(0), apart.sum(0)]).mean(), {
            **numbered("features {}, student adversarial", apart_adv),
            **numbered("features {}, student clean", apart),
            "no teacher right": (weights.sum(0) == 0).float().mean(),
        }
