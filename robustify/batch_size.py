"""Batch size, found by trial: doubled until memory is short or nothing gets faster.

Larger batches take fewer optimizer steps in an epoch, so one that is no faster is not better: the
smallest that reaches the speed is taken. The learning rate stays as it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch
from accelerate.utils import gather_object
from accelerate.utils.memory import should_reduce_batch_size

from robustify import memory
from robustify.errors import TrainingError
from robustify.train import Stage

log = logging.getLogger(__name__)

LEAST, MOST = 8, 4096
WORTH = 1.05  # a batch twice as large has to be this many times as fast
SHARE = 0.8  # of the free memory may be used
_TIMED = 2  # steps


def find_batch_size(new_stage: Callable[[int], Stage]) -> int:
    """The batch size (per process) for the stages that `new_stage` makes for a size, each with
    networks of its own. Several processes agree on the smallest that any of them found.

    Raises `TrainingError` where not even 8 images fit.
    """
    chosen, best, size = 0, 0.0, LEAST
    tried = []
    while size <= MOST:
        try:
            stage = new_stage(size)
            rate, grew = _measure(stage)
        except Exception as error:
            if not should_reduce_batch_size(error):
                raise
            tried.append(f"{size}: out of memory")
            break
        tried.append(f"{size}: {rate:.0f} images/s, {grew / 2**20:.0f} MiB")
        if rate < best * WORTH:
            break
        chosen, best = size, rate
        room = memory.free(stage.accelerator.device)
        if 2 * size > len(stage.train) or 2 * grew > SHARE * room / _sharing(stage):
            break
        size *= 2
    if not chosen:
        raise TrainingError(
            f"expected memory for a batch of {LEAST} images, and there is too little; try a "
            "smaller network, --precision bf16 or training.grad_checkpointing=true"
        )
    chosen = int(min(gather_object([chosen])))
    log.info("batch size %d (tried %s)", chosen, "; ".join(tried))
    return chosen


def _measure(stage: Stage) -> tuple[float, int]:
    """Images per second of a step, and the bytes that it needs at its peak."""
    device = stage.accelerator.device
    before = memory.in_use(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    stage.model.train()
    stage.schedule.step(0)
    fetched = next(iter(stage.loader))
    stage.step(fetched)  # allocates, compiles, chooses kernels
    _wait(device)
    started = time.monotonic()
    for _ in range(_TIMED):
        stage.step(fetched)
    _wait(device)
    seconds = time.monotonic() - started
    return _TIMED * len(fetched[1]) / seconds, memory.peak(device) - before


def _sharing(stage: Stage) -> int:
    """Processes that share the memory of one device."""
    on_cpu = stage.accelerator.device.type == "cpu"
    return int(stage.accelerator.num_processes) if on_cpu else 1


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
