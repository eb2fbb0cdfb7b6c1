"""Projected gradient descent (Madry et al., ICLR 2018, arXiv 1706.06083): the inner maximisation.

    x'_0 = start(x)
    x'_{k+1} = project( x'_k + step_size · ascent direction of sum_n loss_n(x'_k) )

The losses of a batch are summed, never averaged: a mean divides every gradient by the batch size,
which underflows in low precision and makes an image's attack depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal

import torch
from torch import Tensor
from torch.profiler import record_function

from robustify.errors import UsageError
from robustify.losses import cross_entropy
from robustify.noise import Noise
from robustify.threat import ThreatModel

Start = Literal["uniform", "gaussian", "images"]
_keep: ContextVar[Callable[[Tensor], None] | None] = ContextVar("keep", default=None)
_given: ContextVar[Iterator[Tensor] | None] = ContextVar("given", default=None)
GAUSSIAN_START = 0.001  # standard deviation; TRADES (Zhang et al., 2019) and all that followed it


def pgd(
    loss_fn: Callable[[Tensor], Tensor],
    images: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    step_size: float,
    noise: Noise,
    start: Start = "uniform",
) -> Tensor:
    """Images in the threat model around `images` (N, C, H, W) that make `loss_fn` large.

    `loss_fn` maps images to (N,) losses; whatever it closes over should be constant for the call
    (`robustify.fold.constant`). The result is detached, in [0, 1] and in the ball; `steps = 0`
    gives the images themselves. The start is uniform in the ball, the published Gaussian of 0.001
    (not clipped, as published), or the images. Inside `repeating` nothing is searched.
    """

    def search() -> Tensor:
        images_adv = begin(images, threat, noise, start)
        for _ in range(steps):
            images_adv.requires_grad_()
            with torch.enable_grad():
                (gradient,) = torch.autograd.grad(loss_fn(images_adv).sum(), images_adv)
            ascended = threat.ascend(images_adv.detach(), gradient, step_size)
            images_adv = threat.project(ascended, images)
        return images_adv

    return once(images, search if steps else lambda: images.detach().clone())


def once(images: Tensor, search: Callable[[], Tensor]) -> Tensor:
    """What `search` finds for `images`; inside `repeating` what it found before, and inside
    `keeping` kept for that."""
    if (given := _given.get()) is not None:
        found = next(given, None)
        if found is None or found.shape != images.shape:
            raise RuntimeError("expected the same searches as in the pass that is repeated")
        return found
    with record_function("inner maximisation"):
        images_adv = search()
    if (keep := _keep.get()) is not None:
        keep(images_adv)
    return images_adv


@contextmanager
def keeping(after_each: Callable[[], None]) -> Iterator[list[Tensor]]:
    """The list gets what `pgd` finds inside, in order, to be used again by `repeating`;
    `after_each` is called when a search is done."""
    found: list[Tensor] = []

    def keep(images_adv: Tensor) -> None:
        found.append(images_adv)
        after_each()

    token = _keep.set(keep)
    try:
        yield found
    finally:
        _keep.reset(token)


@contextmanager
def repeating(found: Sequence[Tensor]) -> Iterator[None]:
    """Inside, `pgd` gives what it found before instead of searching: for a second pass over the
    same images, which must ask for the same searches."""
    token = _given.set(iter(found))
    try:
        yield
    finally:
        _given.reset(token)


def begin(images: Tensor, threat: ThreatModel, noise: Noise, start: Start) -> Tensor:
    """Where a search starts: a new tensor. Raises `UsageError` for an unknown `start`."""
    if start == "uniform":
        return threat.random_start(images, noise)
    if start == "gaussian":
        return images + GAUSSIAN_START * noise.normal(images)
    if start == "images":
        return images.detach().clone()
    raise UsageError(f"expected start uniform, gaussian or images, got {start!r}")


def survives_pgd(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    steps: int,
    noise: Noise,
    restarts: int = 1,
    step_size: float | None = None,
) -> Tensor:
    """(N,) bool: still classified as `labels` after the worst of `restarts` PGD runs on
    cross-entropy from uniform starts, `step_size` eps/4 unless given.

    `model` is in eval mode; images already misclassified, and images that fall, are not attacked
    again. For training curves; a headline needs a suite.
    """
    with torch.no_grad():
        survives: Tensor = model(images).argmax(1) == labels
    for restart in range(restarts):
        left = survives.nonzero().squeeze(1)
        if len(left) == 0:
            break
        label = labels[left]
        images_adv = pgd(
            lambda x, label=label: cross_entropy(model(x), label),  # type: ignore[misc]
            images[left],
            threat,
            steps=steps,
            step_size=threat.eps / 4 if step_size is None else step_size,
            noise=noise[left].fork(restart),
        )
        with torch.no_grad():
            survives[left] = model(images_adv).argmax(1) == label
    return survives
