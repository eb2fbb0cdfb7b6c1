"""Probe: the attack runs that the checks share, with what each left behind.

A check asks what an attack usually hides: how far it moved, whether its loss grew, which images
fell. All runs are plain ascent with a fixed step size,

    x_{k+1} = P( x_k + step_size · direction(grad f(x_k)) ),

and an image counts as fallen if the model is wrong at any point of the run. Images leave once they
have fallen, but no sooner than after `stay` steps where their movement is to be known: an image
that falls at once has hardly moved. For L1 the direction is the sign of the 5 % largest entries
that have room (SLIDE: Tramèr and Boneh, NeurIPS 2019, arXiv 1904.13000); the steepest single entry
of `ThreatModel.ascend` can move one pixel by one at most.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from robustify.attacks.passes import Passes
from robustify.attacks.victim import Victim
from robustify.losses import cross_entropy, logit_scale
from robustify.noise import Noise
from robustify.threat import ThreatModel

STEPS = 40
STEP_SIZE = 0.25  # of eps
STAY = 10  # steps that a working PGD needs to cross the ball
_L1_SHARE = 0.05  # of the entries, moved by one step
_STREAM = 0x5EED  # keeps these random numbers apart from those of the suites

Model = Callable[[Tensor], Tensor]  # (N, C, H, W) in [0, 1] -> logits (N, K)
Loss = Callable[[Tensor, Tensor], Tensor]  # logits (N, K), labels (N,) -> (N,)


def scaled(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of z / s, s = mean_k |z_k - mean z| at every step anew: free of any scale."""
    return cross_entropy(logits / logit_scale(logits), labels)


def tempered(temperature: float) -> Loss:
    """Cross-entropy of z / T."""
    return lambda logits, labels: cross_entropy(logits / temperature, labels)


@dataclass(frozen=True)
class Run:
    """What one run left, a row per image; rows that were not attacked are False or zero."""

    survives: Tensor  # (m,) bool: right at every point of the run
    images_adv: Tensor  # (m, C, H, W)
    moved: Tensor  # (m,) distance from the run's own starting point
    loss_first: Tensor  # (m,)
    loss_last: Tensor  # (m,)


class Probe:
    """`model` under examination on `images` (m, C, H, W) in [0, 1] with `labels` (m,).

    `model` is in eval mode, or lent by `fold.constant`; `network` is then the module itself.
    `indices` (m,) are places in the data set and key the noise. `alive` (m,): still right after
    the suite's attacks; unless given, what the model gets right. `temperature`: that the model was
    distilled at. `samples`: answers averaged per question, for a randomised model.
    """

    def __init__(
        self,
        model: Model,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        *,
        network: nn.Module | None = None,
        seed: int = 0,
        indices: Tensor | None = None,
        alive: Tensor | None = None,
        temperature: float | None = None,
        steps: int = STEPS,
        step_size: float | None = None,
        samples: int = 1,
        batch_size: int = 250,
    ) -> None:
        self.victim = Victim(model, samples=samples)
        self.network = network if network is not None else model
        self.images, self.labels, self.threat = images.detach().float(), labels, threat
        keys = torch.arange(len(images)) if indices is None else indices
        self.noise = Noise(seed, keys.to(images.device), (_STREAM,))
        self.temperature, self.steps, self.batch_size = temperature, steps, batch_size
        self.step_size = STEP_SIZE * threat.eps if step_size is None else step_size
        self.survivors: dict[str, Tensor] = {}  # of the runs inside the threat model, by name
        self._alive = alive

    @property
    def passes(self) -> Passes:
        """Images forward and backward so far."""
        return self.victim.passes

    @cached_property
    def logits(self) -> Tensor:
        """(m, K) of the unperturbed images."""
        parts = [self.victim.logits(batch) for batch in torch.split(self.images, self.batch_size)]
        return torch.cat(parts)

    @cached_property
    def right(self) -> Tensor:
        """(m,) bool: classified as labelled."""
        return self.logits.argmax(1) == self.labels

    @property
    def alive(self) -> Tensor:
        """(m,) bool: still right after the suite's attacks."""
        return self.right if self._alive is None else self.right & self._alive

    @property
    def worst(self) -> Tensor:
        """(m,) bool: still right after the suite's attacks and all runs inside the threat model."""
        worst = self.alive.clone()
        for survives in self.survivors.values():
            worst &= survives
        return worst

    @cached_property
    def naive(self) -> Run:
        """PGD on cross-entropy from a random start."""
        return self._named("pgd-ce", cross_entropy, stay=STAY)

    @cached_property
    def scaled(self) -> Run:
        """The same with the logits divided by their scale, from the same start."""
        return self._named("pgd-ce-scaled", scaled)

    @cached_property
    def tempered(self) -> Run | None:
        """The same with the logits divided by the temperature, where one is known."""
        if self.temperature is None:
            return None
        return self._named("pgd-ce-tempered", tempered(self.temperature))

    @cached_property
    def one_step(self) -> Run:
        """FGSM: one step of eps on cross-entropy from the image."""
        eps = self.threat.eps
        run = self.climb(cross_entropy, self.right, start=self.images, steps=1, step_size=eps)
        self.survivors["fgsm"] = run.survives
        return run

    def accuracy(self, survives: Tensor) -> float:
        """Share of all images; those classified wrongly to begin with are in the denominator."""
        return float((survives & self.right).double().mean())

    def start(self, run: int = 0) -> Tensor:
        """The random starting points of one restart."""
        return self.threat.random_start(self.images, self.noise.fork(run))

    def climb(
        self,
        loss: Loss,
        on: Tensor,
        *,
        start: Tensor,
        threat: ThreatModel | None = None,
        steps: int | None = None,
        step_size: float | None = None,
        stay: int = 0,
    ) -> Run:
        """Ascend `loss` on the images in the mask `on` (m,)."""
        threat = self.threat if threat is None else threat
        steps = self.steps if steps is None else steps
        step_size = self.step_size if step_size is None else step_size
        images_adv, survives = start.clone(), on.clone()
        first, last = (torch.zeros(len(on), device=on.device) for _ in range(2))
        active = on.nonzero().squeeze(1)
        for step in range(steps + 1):
            if not len(active):
                break
            for rows in torch.split(active, self.batch_size):
                points, labels = images_adv[rows], self.labels[rows]
                logits, losses, gradient = self.gradient(points, labels, loss, wanted=step < steps)
                survives[rows] &= logits.argmax(1) == labels
                last[rows] = losses
                if step == 0:
                    first[rows] = losses
                if step < steps:
                    points = _ascend(threat, points, gradient, step_size)
                    images_adv[rows] = threat.project(points, self.images[rows])
            if step >= stay:
                active = active[survives[active]]
        return Run(survives, images_adv, threat.distance(images_adv, start) * on, first, last)

    def gradient(
        self, images: Tensor, labels: Tensor, loss: Loss, *, wanted: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, losses and the input gradient; zero where the graph does not reach the images."""
        mask = torch.full_like(labels, wanted, dtype=torch.bool)
        if wanted and not self.reaches_images:
            mask = ~mask
        return self.victim.gradient(
            images, lambda logits, rows: loss(logits, labels[rows]), wanted=mask
        )

    @cached_property
    def reaches_images(self) -> bool:
        """Whether the logits have a graph that leads back to the images."""
        with torch.enable_grad():
            images = self.images[:1].clone().requires_grad_()
            logits = self.victim.model(images)
            if not logits.requires_grad:
                return False
            (gradient,) = torch.autograd.grad(logits.sum(), images, allow_unused=True)
        return gradient is not None

    def _named(self, name: str, loss: Loss, *, stay: int = 0) -> Run:
        run = self.climb(loss, self.right, start=self.start(), stay=stay)
        self.survivors[name] = run.survives
        return run


def _ascend(threat: ThreatModel, points: Tensor, gradient: Tensor, step_size: float) -> Tensor:
    if threat.norm != "L1":
        return threat.ascend(points, gradient, step_size)
    flat = gradient.flatten(1)
    room = torch.where(flat > 0, points.flatten(1) < 1, points.flatten(1) > 0)
    largest = (flat.abs() * room).topk(math.ceil(_L1_SHARE * flat.shape[1]), dim=1).indices
    signs = torch.zeros_like(flat).scatter(1, largest, flat.gather(1, largest).sign())
    return points + step_size / largest.shape[1] * signs.view_as(gradient)
