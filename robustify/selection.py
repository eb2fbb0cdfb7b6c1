"""Selection: which of the weights that a stage went through are the best on held-out images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from robustify.attacks.pgd import survives_pgd
from robustify.data import to_float
from robustify.fold import constant
from robustify.noise import Noise
from robustify.splits import Split
from robustify.threat import ThreatModel

VALIDATION = 2  # stream of noise; those of the loop come before it


def validate(
    network: nn.Module,
    split: Split,
    threat: ThreatModel,
    *,
    accelerator: Accelerator,
    batch_size: int,
    steps: int,
    noise_seed: int,
) -> dict[str, float]:
    """Clean accuracy, and robust accuracy under PGD on cross-entropy, over all processes; each
    image counts once. For selecting checkpoints, never a headline."""
    if accelerator.num_processes > 1:
        share_buffers(network)
    mine = range(accelerator.process_index, len(split), accelerator.num_processes)
    right = torch.zeros(2, device=accelerator.device)
    for start in range(0, len(mine), batch_size):
        fetched = split.__getitems__(list(mine[start : start + batch_size]))
        images, labels, indices = (tensor.to(accelerator.device) for tensor in fetched)
        images = to_float(images)
        noise = Noise(noise_seed, indices, (VALIDATION,))
        with constant(network, images) as victim:
            with torch.no_grad():
                right[0] += (victim(images).argmax(1) == labels).sum()
            right[1] += survives_pgd(victim, images, labels, threat, steps=steps, noise=noise).sum()
    total = accelerator.reduce(right, "sum") / len(split)
    return {"clean": float(total[0]), "robust": float(total[1])}


def share_buffers(network: nn.Module) -> None:
    """Give every process the first one's buffers: BatchNorm statistics differ between them."""
    for buffer in network.buffers():
        torch.distributed.broadcast(buffer, src=0)


class Selection:
    """The best weights of each network so far, by held-out accuracy: `by` robust or clean, then by
    the other one."""

    def __init__(self, by: Literal["robust", "clean"]) -> None:
        self.by = by
        self.rows: dict[str, dict[str, float]] = {}  # network -> its best accuracies and epoch
        self.weights: dict[str, dict[str, Tensor]] = {}

    def consider(
        self, name: str, network: nn.Module, score: Mapping[str, float], *, epoch: int
    ) -> None:
        """Keep the weights of `network` where it has not been better before."""
        best = self.rows.get(name)
        if best is None or self._rank(score) > self._rank(best):
            self.rows[name] = {**score, "epoch": epoch}
            self.weights[name] = copy_of(network.state_dict())

    def winner(self) -> str:
        """The network with the best row of all."""
        return max(self.rows, key=lambda name: self._rank(self.rows[name]))

    def _rank(self, score: Mapping[str, float]) -> tuple[float, float]:
        other = "clean" if self.by == "robust" else "robust"
        return score[self.by], score[other]


def copy_of(state: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    """A state dict of its own, detached."""
    return {key: tensor.detach().to(device, copy=True) for key, tensor in state.items()}
