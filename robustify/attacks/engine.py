"""Runs an evaluation attack image by image over a batch of slots.

An attack is a state machine: `start` makes the state of a run (a restart, or a target class),
`step` advances every image in the slots by one iteration and may claim that some are fooled. The
engine settles each claim by the model's own prediction, frees the slot the moment its image is
decided, and puts the next image there. An image goes through its runs one after the other, so one
that falls to the first target never meets the second.

Whatever an image meets depends on its own index alone (`Noise`, and `Victim` for the kernels), so
its verdict is the same for any batch size, order, process count or interruption.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, TypeVar

import torch
from torch import Tensor

from robustify.attacks.victim import Victim
from robustify.noise import Noise
from robustify.threat import ThreatModel

# Told of every image as it is decided: attack, index, still right, image_adv (C, H, W) if it fell.
Decided = Callable[[str, int, bool, Tensor | None], None]


@dataclass
class Rows:
    """Tensors that share their leading dimension: one row per image."""

    def __len__(self) -> int:
        return len(next(value for _, value in self._tensors()))

    def take(self, rows: Tensor) -> Self:
        """The chosen rows (a mask or indices), copied."""
        return replace(self, **{name: value[rows] for name, value in self._tensors()})

    def put(self, rows: Tensor, other: Self) -> None:
        """Overwrite the chosen rows with those of `other`."""
        for name, value in self._tensors():
            value[rows] = getattr(other, name)

    def _tensors(self) -> list[tuple[str, Tensor]]:
        named = [(field.name, getattr(self, field.name)) for field in fields(self)]
        return [(name, value) for name, value in named if isinstance(value, Tensor)]


@dataclass
class Batch(Rows):
    """The images in the slots.

    `images` (N, C, H, W); `labels` (N,); `logits` (N, K) of the unperturbed images; `targets`
    (N, T) the classes to try, in order; `index` (N,) in the data set; `run` and `step` (N,) count
    from 0.
    """

    images: Tensor
    labels: Tensor
    logits: Tensor
    targets: Tensor
    index: Tensor
    run: Tensor
    step: Tensor
    threat: ThreatModel
    seed: int
    stream: int

    @property
    def noise(self) -> Noise:
        """Random numbers of each image and run. Index < 2^32, step < 2^20, run < 2^11."""
        return Noise(self.seed, self.index + (self.run << 52), (self.stream,))

    @property
    def step_noise(self) -> Noise:
        """Random numbers of each image, run and step."""
        return replace(self.noise, keys=self.noise.keys + ((self.step + 1) << 32))

    def target(self) -> Tensor:
        """(N,) the class each image is driven to in its current run."""
        which = self.run % self.targets.shape[1]
        return self.targets.gather(1, which[:, None]).squeeze(1)


StateT = TypeVar("StateT", bound=Rows)


class Attack(Protocol[StateT]):
    """What the engine needs of an attack. All hyper-parameters are its own fields."""

    @property
    def name(self) -> str: ...

    @property
    def runs(self) -> int:
        """Restarts times target classes."""

    @property
    def steps(self) -> int:
        """Calls of `step` in one run."""

    @property
    def samples(self) -> int:
        """Answers of a randomised model per question; 1 for a deterministic one."""

    def settings(self, threat: ThreatModel) -> dict[str, Any]:
        """Everything a report needs to repeat the attack."""

    def choose_targets(self, victim: Victim, batch: Batch) -> Tensor:
        """(N, T) target classes of images that enter; T = 0 columns for an untargeted attack."""

    def start(self, victim: Victim, batch: Batch) -> StateT:
        """The state of a run that begins."""

    def step(self, victim: Victim, batch: Batch, state: StateT) -> tuple[Tensor, Tensor]:
        """Advance `state` by one iteration: candidates like `images`, and the mask (N,) of those
        that seem to fool the model inside the threat model. A run that has no hope ends early by
        setting its `batch.step` to the last one."""


@dataclass(frozen=True)
class Job:
    """Images to attack: `images` (n, C, H, W), `labels` (n,), `logits` (n, K), `index` (n,)."""

    images: Tensor
    labels: Tensor
    logits: Tensor
    index: Tensor
    threat: ThreatModel
    seed: int


def attack_images(
    attack: Attack[Any], victim: Victim, job: Job, *, batch_size: int, decided: Decided
) -> Tensor:
    """(n,) bool: still right after `attack`, on the device of `job.images`.

    Every image in `job` is one the model gets right. `decided` is told of each as it is decided.
    """
    right = torch.ones(len(job.labels), dtype=torch.bool, device=job.labels.device)
    position = torch.arange(len(job.labels), device=job.labels.device)
    waiting = min(batch_size, len(position))
    batch = _enter(attack, victim, job, position[:waiting])
    slot = position[:waiting].clone()  # where in the job the image of each slot stands
    state = attack.start(victim, batch)
    while len(slot):
        candidates, claimed = attack.step(victim, batch, state)
        batch.step += 1
        fooled = _settle(victim, batch, candidates, claimed)
        spent = batch.step == attack.steps
        over = fooled | (spent & (batch.run + 1 == attack.runs))
        if not bool((over | spent).any()):
            continue
        right[slot[fooled]] = False
        _report(attack.name, batch, over, fooled, candidates, decided)

        again = (spent & ~over).nonzero().squeeze(1)
        batch.run[again] += 1
        batch.step[again] = 0
        free = over.nonzero().squeeze(1)
        arriving = position[waiting : waiting + len(free)]
        waiting += len(arriving)
        filled, empty = free[: len(arriving)], free[len(arriving) :]
        if len(filled):
            batch.put(filled, _enter(attack, victim, job, arriving))
            slot[filled] = arriving
        fresh = torch.cat([again, filled])
        if len(fresh):
            state.put(fresh, attack.start(victim, batch.take(fresh)))
        if len(empty):
            keep = torch.ones_like(over).index_fill(0, empty, False)
            batch, state, slot = batch.take(keep), state.take(keep), slot[keep]
    return right


def _enter(attack: Attack[Any], victim: Victim, job: Job, position: Tensor) -> Batch:
    """A batch of the images at `position`, at the beginning of their first run."""
    batch = Batch(
        images=job.images[position],
        labels=job.labels[position],
        logits=job.logits[position],
        targets=job.labels.new_empty((len(position), 0)),
        index=job.index[position],
        run=torch.zeros_like(position),
        step=torch.zeros_like(position),
        threat=job.threat,
        seed=job.seed,
        stream=zlib.crc32(attack.name.encode()),
    )
    return replace(batch, targets=attack.choose_targets(victim, batch))


def _settle(victim: Victim, batch: Batch, candidates: Tensor, claimed: Tensor) -> Tensor:
    """(N,) bool: the claims that hold. A candidate is brought into the ball and the range, in
    place, and the model's prediction on exactly that image decides."""
    fooled = torch.zeros_like(claimed)
    rows = claimed.nonzero().squeeze(1)
    if len(rows):
        images = batch.images[rows]
        final = batch.threat.project(candidates[rows], images)
        candidates[rows] = final
        sound = final.flatten(1).isfinite().all(1)
        fooled[rows] = sound & (victim.predict(final) != batch.labels[rows])
    return fooled


def _report(
    name: str, batch: Batch, over: Tensor, fooled: Tensor, candidates: Tensor, decided: Decided
) -> None:
    for row in over.nonzero().squeeze(1).tolist():
        fell = bool(fooled[row])
        image_adv = candidates[row].clone() if fell else None
        decided(name, int(batch.index[row]), not fell, image_adv)
