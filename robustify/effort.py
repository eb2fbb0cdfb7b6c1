"""What a run costs, counted before it starts: model passes, work in student forwards, time.

    model passes       images × forward plus images × backward, of every network that a step uses:
                       student, teachers, peer, purifier and the classifier behind it; a backward
                       is one, whether for weights, for images or for both; no network weighs more
                       than another
    student forwards   the same step's floating-point operations over those of one forward of the
                       student: here a large teacher weighs what it weighs

Of a run all stages count, and what they read before their first step; the evaluation does not, nor
do the attacks that select checkpoints.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from robustify.attacks.passes import Passes
from robustify.classifier import Classifier
from robustify.errors import UsageError
from robustify.harden import Job, new_accelerator, new_stage, objectives, sized
from robustify.objective import Objective, evaluating
from robustify.purifier import Purified, Purifier
from robustify.settings import Training
from robustify.splits import Fetched
from robustify.train import Stage

COUNTED = (1 / 8, 3 / 8, 5 / 8, 7 / 8)  # of all epochs: where a step is counted; methods change


@dataclass(frozen=True)
class StagePasses:
    """Model passes of one stage: `before` its first step, then `per_epoch`, of which there are
    `epochs`, more or fewer with `training.epochs` unless they are `fixed` by the recipe."""

    name: str
    before: float
    per_epoch: float
    epochs: float
    fixed: bool

    @property
    def total(self) -> float:
        """Of the whole stage."""
        return self.before + self.epochs * self.per_epoch


def count(job: Job) -> list[StagePasses]:
    """The model passes of every stage of `job`, from four counted steps of each."""
    return [_passes(job, stage) for stage in stages(job)]


def at_equal_passes(job: Job, passes: float) -> Job:
    """`job` with the number of epochs whose model passes over all stages come nearest to `passes`.

    Everything that the loop counts in epochs is stretched with them, so the schedule stays whole.
    Raises `UsageError` where one epoch is more already.
    """
    counted = count(replace(job, max_steps=None))
    once = sum(s.total if s.fixed else s.before for s in counted)
    per_epoch = sum(s.per_epoch for s in counted if not s.fixed)
    if passes < once + per_epoch:
        raise UsageError(
            f"expected at least {once + per_epoch:,.0f} model passes for recipe {job.recipe.name}, "
            f"which is one epoch of each stage, got {passes:,.0f}"
        )
    return replace(job, training=_stretched(job.training, round((passes - once) / per_epoch)))


def _stretched(training: Training, epochs: int) -> Training:
    """The same schedule over another number of epochs."""
    ratio = epochs / training.epochs

    def moved(number: float) -> float:
        return number if number < 1 else max(1, round(number * ratio))

    return replace(
        training,
        epochs=epochs,
        decay_at=tuple(map(moved, training.decay_at)),
        averaging_start=moved(training.averaging_start),
        awp_start=moved(training.awp_start),
        evaluate_from=moved(training.evaluate_from),
        warmup_epochs=round(training.warmup_epochs * ratio),
        evaluate_every=max(1, math.floor(training.evaluate_every * ratio)),
    )


def dry_run(job: Job) -> dict[str, Any]:
    """What `distill` would do: settings, sizes, counted work, and time from two real steps."""
    job = sized(job) if job.find_batch_size else job
    rows = []
    for stage in stages(job):
        passes = _passes(job, stage)
        fetched = first_batch(stage)
        stage.progress.epoch = stage.settings.epochs - 1  # by then whatever starts late is at work
        with FlopCount() as step_count:
            stage.step(fetched)
        images, _, _ = stage.batch(fetched, 0)
        with FlopCount() as forward_count, torch.no_grad():
            stage.objective.student(images)
        started = time.monotonic()
        for _ in range(2):
            stage.step(fetched)
        seconds = (time.monotonic() - started) / 2
        rows.append({
            "stage": stage.objective.name,
            "parameters": {n: sum(p.numel() for p in m.parameters())
                           for n, m in stage.objective.named_children()},
            "steps": stage.budget,
            "student_forwards_per_step": round(step_count.total / max(forward_count.total, 1), 1),
            "model_passes": round(passes.total),
            "estimated_seconds": round(seconds * stage.budget, 1),
        })  # fmt: skip
    return {**job.describe(), "model_passes": sum(row["model_passes"] for row in rows),
            "stages": rows}  # fmt: skip


def stages(job: Job) -> Iterator[Stage]:
    """Every stage of `job` with networks of its own, in train mode."""
    accelerator = new_accelerator(job.precision, job.training.accumulate, job.seed)
    for number, objective in enumerate(objectives(job)):
        stage = new_stage(job, copy.deepcopy(objective), number, accelerator)
        stage.model.train()
        yield stage


def first_batch(stage: Stage) -> Fetched:
    """The first training images: those that `_passes` shows the objective before."""
    images, labels, indices = next(iter(stage.train.batches(stage.settings.batch_size)))
    device = stage.accelerator.device
    return images.to(device), labels.to(device), indices.to(device)


def _passes(job: Job, stage: Stage) -> StagePasses:
    settings, train = stage.settings, len(stage.train)
    fetched = first_batch(stage)
    images, labels, noise = stage.batch(fetched, 0)
    shown = len(images)
    with counting(stage.objective, images) as before:
        stage.objective.prepare(iter([(images, labels, noise)]))
    with counting(stage.objective, images) as steps:
        for share in COUNTED:
            stage.progress.epoch = int(share * settings.epochs)
            stage.step(fetched)
    epochs: float = settings.epochs
    if job.max_steps is not None:
        per_step = settings.batch_size * settings.accumulate * stage.accelerator.num_processes
        epochs = min(epochs, stage.budget * per_step / train)
    return StagePasses(
        name=stage.objective.name,
        before=before.total * train / shown,
        per_epoch=steps.total / len(COUNTED) * train / shown,
        epochs=epochs,
        fixed="epochs" in stage.objective.training_changes,
    )


@contextmanager
def counting(objective: Objective, images: Tensor) -> Iterator[Passes]:
    """Count what goes through the networks of `objective` inside, by hooks on the layer of each
    that reads `images` (N, C, H, W). Hooked networks are attacked unfolded: slower, as many passes.
    """
    passes = Passes()

    def back(gradient: Tensor) -> None:
        passes.backward += len(gradient)

    def note(layer: nn.Module, read: Any, found: Tensor) -> None:
        passes.forward += len(found)
        if found.requires_grad:
            found.register_hook(back)  # type: ignore[no-untyped-call]

    hooks = [_entry(n, images[:1]).register_forward_hook(note) for n in _networks(objective)]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def _networks(objective: Objective) -> Iterator[nn.Module]:
    """Every network of `objective` from images, a purifier and its classifier each by itself."""
    for module in objective.modules():
        single = isinstance(module, Classifier) and not isinstance(module, Purified)
        if single or isinstance(module, Purifier):
            yield module


def _entry(network: nn.Module, images: Tensor) -> nn.Module:
    """The first layer with parameters that a forward of `network` reaches."""
    reached: list[nn.Module] = []

    def note(module: nn.Module, read: Any) -> None:
        if next(module.children(), None) is None and next(module.parameters(), None) is not None:
            reached.append(module)

    hook = register_module_forward_pre_hook(note)
    try:
        with evaluating(network), torch.no_grad():
            network(images)
    finally:
        hook.remove()
    return reached[0]


class FlopCount(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Floating-point operations of what runs inside. torch's own FlopCounterMode also tracks
    modules, by hooks with which the gradient by images alone fails."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run `func`, and count it where torch knows how."""
        out = func(*args, **(kwargs or {}))
        if func._overloadpacket is torch.ops.aten.convolution_backward:
            self.total += _convolution_backward(*args)
        elif (count := flop_registry.get(func._overloadpacket)) is not None:
            self.total += count(*args, **(kwargs or {}), out_val=out)
        return out


def _convolution_backward(gradient: Tensor, images: Tensor, weight: Tensor, *rest: Any) -> int:
    """As many operations as the forward for the images, and for the weights. torch's own count
    takes a convolution by groups for a full one, up to a hundred times as much for ConvNeXt's."""
    *_, transposed, _, _, (by_images, by_weight, _) = rest
    place = images if transposed else gradient
    forward = 2 * len(gradient) * weight.numel() * math.prod(place.shape[2:])
    return forward * (int(by_images) + int(by_weight))
