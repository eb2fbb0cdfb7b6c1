"""Compilation: torch.compile for the networks of the inner maximisation, checked before it is used.

Asked for by `compiling`, which the training loop enters for `--compile`. A compiled network is
compared with the plain one, logits and gradient by the images, on the first batch of every shape;
where it cannot be compiled or differs, there is a notice and the plain one is used.

On a GPU the graphs of the fixed shapes become CUDA graphs. On a CPU it seldom pays: one thread,
folded networks, torch 2.15, compiled over plain: ResNet-18 at 32 px 1.01, ResNet-20 0.97, ViT-Ti
at 32 px 1.03, and 6 to 23 s of compiling for each.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn

from robustify import memory

log = logging.getLogger(__name__)

_wanted: ContextVar[bool] = ContextVar("wanted", default=False)
# Inductor orders sums anew, which in bf16 or TF32 moves the second digit of a gradient. A wrong
# graph is far off.
_TOLERANCE = 1e-3
_TOLERANCE_ROUNDED = 0.2


@contextmanager
def compiling(wanted: bool = True) -> Iterator[None]:
    """Networks lent for attacks inside are compiled."""
    token = _wanted.set(wanted)
    try:
        yield
    finally:
        _wanted.reset(token)


def is_wanted() -> bool:
    """Whether `compiling` is in force."""
    return _wanted.get()


class Compiled:
    """`network`, compiled; called like it. `name` is what notices call it.

    The shapes of a training run are few (the batch, the last batch, validation), and each is
    compiled and compared for itself: graphs of fixed shapes are what CUDA graphs need.
    """

    def __init__(self, network: nn.Module, name: str) -> None:
        self.network, self.name = network, name
        self.run: Any = None
        self.given_up = False
        self.checked: set[tuple[Any, ...]] = set()

    def __call__(self, images: Tensor) -> Tensor:
        by_images = torch.is_grad_enabled() and images.requires_grad
        case = (images.shape, images.dtype, by_images)
        if not self.given_up and case not in self.checked:
            self.checked.add(case)
            self.given_up = not self._works(images.detach(), by_images)
        if self.given_up:
            return self.network(images)  # type: ignore[no-any-return]
        # Replaying a CUDA graph overwrites what it gave before; callers may keep logits.
        return self.run(images).clone()  # type: ignore[no-any-return]

    def _works(self, images: Tensor, by_images: bool) -> bool:
        """Whether such images can be asked of the compiled network; if not, there is a notice."""
        try:
            if self.run is None:
                mode = "reduce-overhead" if images.is_cuda else "default"
                self.run = torch.compile(self.network, dynamic=False, mode=mode)
            found = _answers(self.run, images, by_images)
        except Exception as error:  # whatever dynamo, inductor, triton or the C++ compiler raise
            if memory.ran_out(error):
                raise
            reason = next((line for line in str(error).splitlines() if line.strip()), "")
            log.warning("%s cannot be compiled (%s: %s); going on without",
                        self.name, type(error).__name__, reason.strip())  # fmt: skip
            return False
        wanted = _answers(self.network, images, by_images)
        exact = wanted[0].dtype == torch.float32 and not images.is_cuda
        for what, got, plain in zip(("logits", "gradients"), found, wanted, strict=False):
            gap = float((got - plain).norm() / plain.norm().clamp_min(1e-12))
            if not gap <= (_TOLERANCE if exact else _TOLERANCE_ROUNDED):
                log.warning("%s: compiled and plain %s differ by %.1e of their size; going on "
                            "without compiling", self.name, what, gap)  # fmt: skip
                return False
        return True


def _answers(network: Any, images: Tensor, by_images: bool) -> tuple[Tensor, ...]:
    """Logits (N, K) and, `by_images`, the gradient of their summed log-sum-exp by (N, C, H, W)
    images."""
    variable = images.clone().requires_grad_(by_images)
    logits = network(variable)
    answers = (logits.detach().clone(),)
    if not by_images:
        return answers
    (gradient,) = torch.autograd.grad(logits.logsumexp(1).sum(), variable)
    return (*answers, gradient.clone())
