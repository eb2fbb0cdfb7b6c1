"""The only training loop: a stage from wherever its checkpoint left it to its end."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from robustify.checkpoint import Checkpoints
from robustify.errors import TrainingError
from robustify.loader import batches
from robustify.memory import ran_out
from robustify.processes import agreed, said
from robustify.splits import Fetched
from robustify.train import Fitted, Stage

log = logging.getLogger(__name__)

AGREE_EVERY = 5  # steps between two agreements on stopping on GPUs; torchrun waits 30 s for it
_SHOWN = ("loss", "student clean", "student robust", "averaged robust")


def fit(
    stage: Stage,
    *,
    checkpoints: Checkpoints,
    interrupted: Callable[[], bool] = lambda: False,
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda history: None,
    on_step: Callable[[], None] = lambda: None,
) -> Fitted:
    """Train `stage` to its end from wherever its checkpoint left it.

    `interrupted` is asked after every step and every epoch; True, in any process, saves a
    checkpoint as soon as an update is complete and raises KeyboardInterrupt in all. `on_step` is
    called after every step, `on_epoch` with all rows so far.
    Raises `TrainingError` where the loss is not finite or memory runs out, naming the last good
    checkpoint.
    """
    name = f"stage{stage.number}"
    _restore(stage, checkpoints, name)
    devices = [stage.accelerator.device.index] if stage.accelerator.device.type == "cuda" else []
    bar = tqdm(
        total=stage.budget, initial=stage.progress.updates, desc=stage.objective.name, unit="step",
        disable=not stage.accelerator.is_main_process, dynamic_ncols=True,
        mininterval=1 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    saving = _Saving(stage, checkpoints, name, interrupted)
    try:
        with torch.random.fork_rng(devices), bar:
            if not stage.finished:
                stage.prepare()
            while not stage.finished:
                _epoch(stage, saving, bar, on_step)
                on_epoch(stage.progress.history)
                saving.look(now=True)  # a validation may have taken long
                if stage.finished or stage.progress.epoch == 1 or saving.wanted:
                    saving.save()
    except TrainingError as error:
        raise TrainingError(f"{error}; {checkpoints.kept(name)}") from None
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        raise TrainingError(_too_large(stage, checkpoints.kept(name))) from error
    return stage.fitted()


class _Saving:
    """When a stage is saved, and whether it stops then: what all processes agree on.

    What is wished stays wished until `save`, which the loop calls between two updates only: of
    half of one, the gradient would be lost.
    """

    def __init__(
        self, stage: Stage, checkpoints: Checkpoints, name: str, interrupted: Callable[[], bool]
    ) -> None:
        self.stage, self.checkpoints, self.name = stage, checkpoints, name
        self.saved = time.monotonic()
        self.stop = self.due = False
        self.questions = {
            now: (agreed(interrupted, every=every), agreed(self._due, every=every))
            for now, every in ((True, 1), (False, _agree_every(stage)))
        }

    def _due(self) -> bool:
        return time.monotonic() - self.saved > self.stage.settings.checkpoint_seconds

    @property
    def wanted(self) -> bool:
        """Whether anybody waits for a checkpoint."""
        return self.stop or self.due

    def look(self, *, now: bool) -> None:
        """Ask whether to stop and whether to save; on GPUs only now and then, unless `now`."""
        stop, due = self.questions[now]
        self.stop = self.stop or stop()
        self.due = self.due or due()

    def save(self) -> None:
        """Write a checkpoint; raises KeyboardInterrupt where somebody wishes to stop."""
        if self.stage.accelerator.is_main_process:
            self.checkpoints.save(self.name, *self.stage.state())
        self.saved, self.due = time.monotonic(), False
        if self.stop:
            self.stage.accelerator.wait_for_everyone()  # or a launcher ends the one that writes
            raise KeyboardInterrupt


def _restore(stage: Stage, checkpoints: Checkpoints, name: str) -> None:
    """Put `stage` where its checkpoint left it, if there is one."""
    saved = checkpoints.load(name)
    _require_same(saved and saved[1]["progress"], checkpoints)
    if saved is None:
        return
    stage.restore(*saved)
    log.info("resuming %s at epoch %d, step %d", stage.objective.name,
             stage.progress.epoch, stage.progress.step)  # fmt: skip
    before, now = saved[1].get("processes"), stage.accelerator.num_processes
    if before not in (None, now):
        log.warning("this run had %d processes, each with its own batch, and now has %d: it "
                    "ends like neither of them alone would", before, now)  # fmt: skip


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


def _epoch(stage: Stage, saving: _Saving, bar: tqdm[Any], on_step: Callable[[], None]) -> None:
    """The rest of the epoch that `stage` is in; only its end, where all its steps are done."""
    progress, accelerator = stage.progress, stage.accelerator
    started, before = time.monotonic(), progress.seconds
    stage.schedule.step(progress.epoch)
    stage.loader.set_epoch(progress.epoch)
    stage.model.train()
    exact: dict[str, Any] = {"dtype": torch.float64, "device": accelerator.device}
    sums = {name: torch.tensor(total, **exact) for name, total in progress.sums.items()}
    accelerator.step = progress.step  # by which it counts the batches of an update
    with closing(_left(stage)) as left:
        for fetched in left:
            updates = progress.updates
            terms = stage.step(fetched)
            on_step()
            progress.step += 1
            for key, term in terms.items():
                sums[key] = sums.get(key, torch.zeros((), **exact)) + term
            bar.update(progress.updates - updates)
            progress.seconds = before + time.monotonic() - started
            last = stage.spent or accelerator.gradient_state.end_of_dataloader
            saving.look(now=last)  # what is wished now must not wait for the validation
            if saving.wanted and accelerator.sync_gradients:
                stage.require_finite(sums["loss"])  # nothing damaged is saved, on a GPU either
                progress.sums = {key: float(total) for key, total in _shared(stage, sums).items()}
                saving.save()
            if stage.spent:
                break
    sums = _shared(stage, sums)
    if sums:
        stage.require_finite(sums["loss"])
    row = stage.finish_epoch(sums)
    progress.seconds = before + time.monotonic() - started
    bar.set_postfix({k: f"{row[k]:.3f}" for k in _SHOWN if k in row})


def _agree_every(stage: Stage) -> int:
    return 1 if stage.accelerator.device.type == "cpu" else AGREE_EVERY


def _left(stage: Stage) -> Generator[Fetched]:
    """The batches of this epoch that are not done."""
    if not stage.spent:
        processes = stage.accelerator.num_processes
        yield from batches(stage.loader, stage.progress.step, processes=processes)


def _shared(stage: Stage, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The mean over processes: each has seen batches of its own."""
    return {key: stage.accelerator.reduce(total.clone(), "mean") for key, total in sums.items()}
