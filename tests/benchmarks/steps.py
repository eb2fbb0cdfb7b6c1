"""Training steps to be measured: the same networks and images, ours and plainly transcribed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from transcriptions import CASES, Case, Start

from robustify import config, models
from robustify.attacks.pgd import GAUSSIAN_START
from robustify.effort import counting
from robustify.fold import prefers_channels_last
from robustify.models import Classifier
from robustify.noise import Noise
from robustify.objective import Objective
from robustify.threat import ThreatModel

EPS = 8 / 255
EPOCH, EPOCHS = 9, 10  # by then whatever starts late is at work


@dataclass(frozen=True)
class Work:
    """One stage of a recipe at random weights, with a batch of random images."""

    case: Case
    objective: Objective
    images: Tensor
    labels: Tensor
    noise: Noise

    def copy(self, layout: torch.memory_format = torch.contiguous_format) -> Work:
        """The same with networks of its own, in another memory layout."""
        return replace(
            self,
            objective=copy.deepcopy(self.objective).to(memory_format=layout),
            images=self.images.contiguous(memory_format=layout),
        )

    @property
    def layout(self) -> torch.memory_format:
        """What the training loop would choose."""
        channels_last = prefers_channels_last(self.objective.student, self.images.shape[-1])
        return torch.channels_last if channels_last else torch.contiguous_format


def new(
    name: str, *, student: str, size: int, batch: int, steps: int = 10, device: str = "cpu"
) -> Work:
    """The work of the case `name` of `transcriptions.CASES`, its attack of so many steps."""
    case, recipe = CASES[name], config.find(name.partition(",")[0])
    torch.manual_seed(0)
    network = models.create(student, num_classes=10, image_size=size).to(device)
    teachers = [models.like(network, architecture).to(device) for architecture in case.teachers]
    for classifier in (network, *teachers):
        classifier.about["base"] = "random"  # so that no recipe trains it first
    settings = dict(case.settings)
    if "attack" in config.schema(recipe.load().stages):
        start = recipe.sections["attack"]["start"]
        settings["attack"] = {"steps": steps, "step_size": EPS / 4, "start": start}
        settings["threat"] = ThreatModel("Linf", EPS)
    stages = recipe.load().stages(network, teachers, **settings)
    *_, objective = [stage for stage in stages if stage.name == case.stage]
    objective.to(device).train()
    objective.epoch, objective.epochs = EPOCH, EPOCHS
    images = torch.rand(batch, 3, size, size).to(device)
    labels = torch.randint(10, (batch,)).to(device)
    noise = Noise.for_batch(0, images)
    for module in objective.modules():
        if isinstance(module, Classifier):
            settle(module, images)
    objective.prepare(iter([(images, labels, noise)]))
    return Work(case, objective, images, labels, noise)


@torch.no_grad()
def settle(network: Classifier, images: Tensor) -> None:
    """Give BatchNorm the statistics of `images`: as initialized, logits mean nothing."""
    norms = [module for module in network.modules() if isinstance(module, _BatchNorm)]
    modes = [(module, module.training) for module in network.modules()]
    for norm in norms:
        norm.train().momentum = 1.0
    network(images)
    for norm in norms:
        norm.momentum = 0.1
    for module, training in modes:
        module.training = training


def plain(work: Work) -> Callable[[], None]:
    """A step of the transcription: contiguous, fp32, with torch's own random numbers."""
    return _stepping(work.objective, lambda: plain_loss(work, _torch_start(work))[0])


def ours(work: Work, precision: str = "fp32") -> Callable[[], None]:
    """A step of the recipe as the training loop makes it."""
    return _stepping(work.objective, lambda: our_loss(work, precision))


def plain_loss(work: Work, start: Start) -> tuple[Tensor, Tensor | None]:
    """The transcription's loss, and the adversarial images where there are any."""
    return work.case.plain(work.objective, work.images, work.labels, start)


def our_loss(work: Work, precision: str = "fp32") -> Tensor:
    """The recipe's loss."""
    with torch.autocast(work.images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return work.objective(work.images, work.labels, work.noise)["loss"]


def _stepping(objective: Objective, loss: Callable[[], Tensor]) -> Callable[[], None]:
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-4, momentum=0.9, weight_decay=2e-4)

    def step() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return step


def _torch_start(work: Work) -> Start:
    if not _is_uniform(work):
        return lambda images: images + GAUSSIAN_START * torch.randn_like(images)
    return lambda images: (images + EPS * (2 * torch.rand_like(images) - 1)).clamp(0, 1)


def our_start(work: Work) -> Start:
    """Where the recipe's own search starts, for a transcription that is to find the same images."""
    if not _is_uniform(work):
        return lambda images: images + GAUSSIAN_START * work.noise.normal(images)
    return lambda images: work.objective.threat.random_start(images, work.noise)


def _is_uniform(work: Work) -> bool:
    return getattr(work.objective, "attack", {}).get("start") == "uniform"


def passes(work: Work, loss: Callable[[], Tensor]) -> float:
    """Model passes per image of one step: forward plus backward, of every network."""
    with counting(work.objective, work.images) as counted:
        loss().backward()
    return counted.total / len(work.images)
