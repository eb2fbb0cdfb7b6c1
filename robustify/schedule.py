"""The schedule of the learning rate."""

from __future__ import annotations

import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler

from robustify.settings import Training


def new_schedule(optimizer: torch.optim.Optimizer, settings: Training) -> Scheduler:
    """timm's schedulers compute the rate from the epoch alone, so resuming needs no state.

    The first of n warmup epochs has 1 / (n + 1) of the rate: timm's own default, 0, would train
    nothing for an epoch.
    """
    warmup = {
        "warmup_t": settings.warmup_epochs,
        "warmup_lr_init": settings.lr / (settings.warmup_epochs + 1),
    }
    if settings.schedule == "cosine":
        return CosineLRScheduler(optimizer, t_initial=settings.epochs, **warmup)
    return MultiStepLRScheduler(
        optimizer,
        # timm compares with the epoch to come: without the 1 the rate would drop an epoch early.
        decay_t=[settings.epoch(number) + 1 for number in settings.decay_at],
        decay_rate=settings.decay_rate,
        **warmup,
    )
