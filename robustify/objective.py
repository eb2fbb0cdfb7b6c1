"""Objective: what one stage of training minimises, with every network it needs.

A recipe yields Objectives; the loop trains them. An Objective is a dataclass and a module at once:
its fields are the networks and the settings of the method, `forward` is the method.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from robustify.errors import UsageError
from robustify.frozen import Frozen as Frozen
from robustify.models import Classifier
from robustify.noise import Noise


@dataclass(eq=False, repr=False, kw_only=True)
class Objective(nn.Module):
    """One stage of training. Subclasses are dataclasses with the same arguments as this one.

    `student` is the network that the stage leaves; `name` tells stages apart; `training` holds
    settings of the loop that this stage changes (`{"epochs": 5}`); `record` holds plain facts about
    the student for its metadata and report, `notices` (a list of sentences) among them.
    """

    student: Classifier
    name: str = "student"
    training_changes: Mapping[str, Any] = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)

    # Kept by the loop, for methods that change on the way: nothing here needs a checkpoint.
    epoch: int = field(default=0, init=False)  # of this stage, from 0
    epochs: int = field(default=1, init=False)
    lr_scale: float = field(default=1.0, init=False)  # the learning rate over its first value

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Fields that are modules can only be set on an initialised nn.Module.
        self = super().__new__(cls)
        nn.Module.__init__(self)
        return self

    def forward(self, images: Tensor, labels: Tensor, noise: Noise) -> dict[str, Tensor]:
        """`{"loss": scalar, term: scalar, …}` for (N, C, H, W) images in [0, 1] and (N,) labels;
        `noise` belongs to these images. Every term but the loss is only logged."""
        raise NotImplementedError

    def reached(self, epoch: float) -> bool:
        """Whether training is in `epoch` or past it; below 1, a share of all epochs."""
        return self.epoch >= (int(epoch * self.epochs) if epoch < 1 else epoch)

    def prepare(self, batches: Iterator[tuple[Tensor, Tensor, Noise]]) -> None:
        """Look at the training images before the first step: each once, unaugmented, in order.

        Called again when a run is resumed, so what is found here needs no checkpoint.
        """

    def learned_state(self) -> dict[str, Tensor]:
        """The state dict without the frozen networks: what a checkpoint must hold."""
        frozen = tuple(f"{n}." for n, m in self.named_modules() if isinstance(m, Frozen))
        return {k: v for k, v in self.state_dict().items() if not k.startswith(frozen)}

    def load_learned_state(self, state: Mapping[str, Tensor]) -> None:
        """Undo `learned_state`; raises RuntimeError where names or shapes differ."""
        missing = self.learned_state().keys() ^ state.keys()
        if missing:
            raise RuntimeError(f"checkpoint and objective differ in {sorted(missing)[:3]}")
        self.load_state_dict(dict(state), strict=False)


def check_teachers(student: Classifier, teachers: Sequence[Classifier], *, roles: int) -> None:
    """Raise `UsageError` for more teachers than roles, and for one with other classes than the
    student, the same in another order, or images of other channels."""
    if len(teachers) > roles:
        raise UsageError(
            f"expected at most {roles} teacher{'s' * (roles != 1)} for this recipe, got "
            f"{len(teachers)}; leave some out"
        )
    for teacher in teachers:
        if teacher.num_classes != student.num_classes:
            raise UsageError(
                f"expected a teacher for the student's {student.num_classes} classes, got "
                f"{teacher.architecture} for {teacher.num_classes}; choose another teacher"
            )
        if teacher.in_chans != student.in_chans:
            raise UsageError(
                f"expected a teacher for images with {student.in_chans} channels, got "
                f"{teacher.architecture} for {teacher.in_chans}; choose another teacher"
            )
        own, wanted = teacher.class_names, student.class_names
        if own is not None and wanted is not None and own != wanted:
            first = next(i for i, (a, b) in enumerate(zip(own, wanted, strict=True)) if a != b)
            raise UsageError(
                f"expected a teacher with the classes of the data in their order, but class "
                f"{first} is {wanted[first]!r}, and {own[first]!r} for {teacher.architecture}; "
                "choose another teacher"
            )


def is_from_scratch(classifier: Classifier) -> bool:
    """Whether `classifier` cannot be used before this run has trained it: it was named by its
    architecture alone, or parts of it were replaced to fit the data and are untrained."""
    about = classifier.about
    untrained_parts = "replaced" in about and "recipe" not in about  # a recipe has trained them
    return not about.keys() - {"data"} or untrained_parts


@contextmanager
def evaluating(*networks: nn.Module) -> Iterator[None]:
    """Eval mode inside, and every submodule's own mode again afterwards."""
    modes = [(module, module.training) for network in networks for module in network.modules()]
    for network in networks:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def batchnorm_updates(network: nn.Module, times: int) -> Iterator[None]:
    """Forwards inside move BatchNorm's running statistics as `times` equal forwards would; with 0
    they leave them as they are.

    `times` updates with momentum m towards the same value are one with 1 - (1 - m)^times.
    """
    if times == 1:
        yield
        return
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m.momentum is not None]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1 - (1 - (norm.momentum or 0)) ** times
    try:
        yield
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum


def accuracy(logits: Tensor, labels: Tensor) -> Tensor:
    """The share of images classified as `labels`: a term to log."""
    with torch.no_grad():
        return (logits.argmax(1) == labels).float().mean()
