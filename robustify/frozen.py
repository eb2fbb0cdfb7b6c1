"""Frozen: a network that is used and never trained, and the hash that proves it stayed so."""

from __future__ import annotations

import hashlib
from typing import Any, Self

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """A network that is used and never trained: eval mode whatever `train` is called, no parameter
    gradients, not in the optimizer, not in checkpoints. Gradients still flow to its images."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network.eval().requires_grad_(False)
        network.zero_grad()  # what it may have left from its own training

    def train(self, mode: bool = True) -> Self:
        """Stays in eval mode: a parent's `train()` must not wake BatchNorm or dropout."""
        self.training = False
        return self

    def forward(self, images: Tensor) -> Any:
        """What the network gives for (N, C, H, W) images in [0, 1]."""
        return self.network(images)


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the state dict, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
