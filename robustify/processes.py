"""Processes: which of several this one is, as torchrun or accelerate launch started it."""

from __future__ import annotations

import torch
from accelerate import PartialState


def on_cpu() -> bool:
    """Whether there is nothing but the CPU. Accelerate has to be told: on such a machine it would
    otherwise take every launched process for the only one."""
    return not torch.accelerator.is_available()


def this_process() -> PartialState:
    """Accelerate's view of this process: device, index, count, whether it is the first."""
    return PartialState(cpu=on_cpu())
