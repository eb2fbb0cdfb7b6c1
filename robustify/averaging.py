"""Weight averages of a network in training: SWA (Izmailov et al., UAI 2018, arXiv 1803.05407) or an
exponential moving average, with BatchNorm statistics of their own."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from robustify.frozen import Frozen
from robustify.settings import Training


def new_average(student: nn.Module, settings: Training) -> AveragedModel | None:
    """The average that the settings ask for, if any."""
    if settings.averaging == "none":
        return None
    if settings.averaging == "swa":
        return AveragedModel(student)
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))  # type: ignore[no-untyped-call]


def reestimate_batchnorm(network: nn.Module, batches: Iterator[Tensor]) -> None:
    """Running statistics of `network` anew, as the mean over all images of `batches`.

    Each batch of b images enters with momentum b / (n + b), n images after the first ones, as
    weight averaging needs (Izmailov et al., UAI 2018, arXiv 1803.05407). Parameters, modes and
    momenta stay as they are. Without BatchNorm nothing is done; frozen parts keep theirs.
    """
    parts = [m for m in network.modules() if isinstance(m, Frozen)]
    frozen = {module for part in parts for module in part.modules()}
    norms = [m for m in network.modules() if isinstance(m, _BatchNorm) and m not in frozen]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    modes = [(module, module.training) for module in network.modules()]
    for norm in norms:
        norm.reset_running_stats()
    network.eval()
    for norm in norms:
        norm.train()
    seen = 0
    with torch.no_grad():
        for images in batches:
            for norm in norms:
                norm.momentum = len(images) / (seen + len(images))
            network(images)
            seen += len(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    for module, training in modes:
        module.training = training
