"""The only training loop: a stage from wherever its checkpoint left it to its end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from robustify.checkpoint import Checkpoints
from robustify.errors import TrainingError
from robustify.loader import remaining
from robustify.memory import ran_out
from robustify.processes import agreed, said
from robustify.train import Fitted, Stage

log = logging.getLogger(__name__)

AGREE_EVERY = 5  # steps between two agreements on stopping on GPUs; torchrun waits 30 s for it


def fit(
    stage: Stage,
    *,
    checkpoints: Checkpoints,
    interrupted: Callable[[], bool] = lambda: False,
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda history: None,
    on_step: Callable[[], None] = lambda: None,
) -> Fitted:
    """Train `stage` to its end from wherever its checkpoint left it.

    `interrupted` is asked after every step; True, in any process, saves a checkpoint and raises
    KeyboardInterrupt in all. `on_step` is called after every step, `on_epoch` with all rows so far.
    Raises `TrainingError` where the loss is not finite or memory runs out, naming the last good
    checkpoint.
    """
    name = f"stage{stage.number}"
    saved = checkpoints.load(name)
    _require_same(saved and saved[1]["progress"], checkpoints)
    if saved is not None:
        stage.restore(*saved)
        log.info("resuming %s at epoch %d, step %d", stage.objective.name,
                 stage.progress.epoch, stage.progress.step)  # fmt: skip
        before, now = saved[1].get("processes"), stage.accelerator.num_processes
        if before not in (None, now):
            log.warning("this run had %d processes, each with its own batch, and now has %d: it "
                        "ends like neither of them alone would", before, now)  # fmt: skip
    devices = [stage.accelerator.device.index] if stage.accelerator.device.type == "cuda" else []
    bar = tqdm(
        total=stage.budget, initial=stage.progress.updates, desc=stage.objective.name, unit="step",
        disable=not stage.accelerator.is_main_process, dynamic_ncols=True,
        mininterval=1 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    stop = agreed(interrupted, every=_agree_every(stage))
    try:
        with torch.random.fork_rng(devices), bar:
            if not stage.finished:
                stage.prepare()
            while not stage.finished:
                _epoch(stage, checkpoints, name, bar, stop, on_step)
                on_epoch(stage.progress.history)
    except TrainingError as error:
        raise TrainingError(f"{error}; {checkpoints.kept(name)}") from None
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise TrainingError(_too_large(stage, checkpoints.kept(name))) from error
    _save(stage, checkpoints, name)
    if agreed(interrupted)():  # after the last step, in validation
        raise KeyboardInterrupt
    return stage.fitted()


def _require_same(progress: Any, checkpoints: Checkpoints) -> None:
    """Raise `TrainingError` where this process goes on from elsewhere than the first one."""
    first = said(progress)
    if progress != first:
        raise TrainingError(
            f"expected every process to see the same checkpoints in {checkpoints.folder}, but they "
            "differ; put --out on a file system that all machines share"
        )


def _too_large(stage: Stage, kept: str) -> str:
    progress, settings = stage.progress, stage.settings
    half, accumulate = settings.batch_size // 2, settings.accumulate * 2
    return (
        f"out of memory at epoch {progress.epoch} step {progress.step} of stage "
        f"{stage.objective.name!r} with --batch-size {settings.batch_size}; {kept}; with more "
        "memory free the same command goes on; to need less, start again with --no-resume and "
        f"--batch-size {half} --set training.accumulate={accumulate} (the same effective batch), "
        "--precision bf16 or --set training.grad_checkpointing=true"
    )


def _epoch(
    stage: Stage,
    checkpoints: Checkpoints,
    name: str,
    bar: tqdm[Any],
    interrupted: Callable[[], bool],
    on_step: Callable[[], None],
) -> None:
    """The rest of the epoch that `stage` is in."""
    progress = stage.progress
    started = saved = time.monotonic()
    before = progress.seconds
    stage.schedule.step(progress.epoch)
    stage.loader.set_epoch(progress.epoch)
    stage.model.train()
    device = stage.accelerator.device
    exact: dict[str, Any] = {"dtype": torch.float64, "device": device}
    sums = {name: torch.tensor(total, **exact) for name, total in progress.sums.items()}
    loader = remaining(stage.loader, progress.step, processes=stage.accelerator.num_processes)
    seconds = stage.settings.checkpoint_seconds
    due = agreed(lambda: time.monotonic() - saved > seconds, every=_agree_every(stage))
    for fetched in loader:
        updates = progress.updates
        terms = stage.step(fetched)
        on_step()
        progress.step += 1
        for key, term in terms.items():
            sums[key] = sums.get(key, torch.zeros((), **exact)) + term
        bar.update(progress.updates - updates)
        progress.seconds = before + time.monotonic() - started
        stop, save = interrupted(), due()
        if stop or save:
            stage.require_finite(sums["loss"])  # nothing damaged is saved, on a GPU either
            progress.sums = {key: float(total) for key, total in _shared(stage, sums).items()}
            _save(stage, checkpoints, name)
            saved = time.monotonic()
        if stop:
            stage.accelerator.wait_for_everyone()  # or a launcher ends the one that is writing
            raise KeyboardInterrupt
        if stage.finished:
            break
    sums = _shared(stage, sums)
    if sums:
        stage.require_finite(sums["loss"])
    row = stage.finish_epoch(sums)
    progress.seconds = before + time.monotonic() - started
    bar.set_postfix({k: f"{row[k]:.3f}" for k in _SHOWN if k in row})
    if time.monotonic() - saved > stage.settings.checkpoint_seconds or progress.epoch == 1:
        _save(stage, checkpoints, name)


def _agree_every(stage: Stage) -> int:
    return 1 if stage.accelerator.device.type == "cpu" else AGREE_EVERY


def _shared(stage: Stage, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean over processes: each has seen batches of its own."""
    return {key: stage.accelerator.reduce(total.clone(), "mean") for key, total in sums.items()}


_SHOWN = ("loss", "student clean", "student robust", "averaged robust")


def _save(stage: Stage, checkpoints: Checkpoints, name: str) -> None:
    if stage.accelerator.is_main_process:
        checkpoints.save(name, *stage.state())
