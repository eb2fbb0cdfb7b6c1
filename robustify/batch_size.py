"""Batch size, found by trial: doubled until memory is short or nothing gets faster.

Larger batches take fewer optimizer steps in an epoch, so one that is no faster is not better: the
smallest that reaches the speed is taken. The learning rate stays as it is.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from accelerate.utils import gather_object

from robustify import memory
from robustify.errors import TrainingError
from robustify.processes import this_process
from robustify.train import Stage

log = logging.getLogger(__name__)

LEAST, MOST = 8, 4096
WORTH = 1.05  # a batch twice as large has to be this many times as fast
SHARE = 0.8  # of the free memory may be used
_TIMED = 2  # steps


def find_batch_size(new_stage: Callable[[int], Stage]) -> int:
    """The batch size (per process) for the stages that `new_stage` makes for a size, each with
    networks of its own and `alone`. Several processes try the same sizes and stop together, also
    where memory ends for one of them.

    Raises `TrainingError` where not even 8 images fit.
    """
    chosen, best, size = 0, 0.0, LEAST
    tried = []
    while size <= MOST:
        trial = _try(new_stage, size)
        if trial is None:
            tried.append(f"{size}: out of memory")
            break
        tried.append(f"{size}: {trial.rate:.0f} images/s, {trial.grew / 2**20:.0f} MiB")
        if trial.rate < best * WORTH:
            break
        chosen, best = size, trial.rate
        if not trial.room_for_twice:
            break
        size *= 2
    if not chosen:
        raise TrainingError(
            f"expected memory for a batch of {LEAST} images, and there is too little; try a "
            "smaller network, --precision bf16 or training.grad_checkpointing=true"
        )
    if this_process().is_main_process:
        log.info("batch size %d (tried %s)", chosen, "; ".join(tried))
    return chosen


class _Trial(NamedTuple):
    """A step at one size: images per second, bytes at its peak, whether twice as much may be."""

    rate: float
    grew: int
    room_for_twice: bool


def _try(new_stage: Callable[[int], Stage], size: int) -> _Trial | None:
    """The slowest and largest of all processes; None where memory ran out in one."""
    found: _Trial | None = None
    try:
        stage = new_stage(size)
        rate, grew = _measure(stage)
        room = memory.free(stage.accelerator.device) / _sharing(stage)
        found = _Trial(rate, grew, 2 * size <= len(stage.train) and 2 * grew <= SHARE * room)
    except Exception as error:
        if not memory.ran_out(error):
            raise
    everybody: list[_Trial | None] = gather_object([found])
    trials = [trial for trial in everybody if trial is not None]
    if len(trials) < len(everybody):
        return None
    return _Trial(
        min(t.rate for t in trials),
        max(t.grew for t in trials),
        all(t.room_for_twice for t in trials),
    )


def _measure(stage: Stage) -> tuple[float, int]:
    """Images per second of a step, and the bytes that it needs at its peak."""
    device = stage.accelerator.device
    before = memory.in_use(device)
    memory.watch(device)
    stage.model.train()
    stage.schedule.step(0)
    # Not from the loader: of a stream it would fill its buffer first.
    images, labels, indices = next(iter(stage.train.batches(stage.settings.batch_size)))
    fetched = images.to(device), labels.to(device), indices.to(device)
    with stage.accelerator.autocast():
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
