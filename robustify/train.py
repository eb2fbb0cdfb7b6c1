"""The only training loop: one Objective in, trained weights out.

Only this module steps an optimizer. It runs on Accelerate, so the same loop serves a CPU, a GPU
and several processes. What a step draws at random is keyed by (seed, stage, epoch, image), so a run
that is interrupted and resumed goes through the same numbers as one that never was.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from accelerate import Accelerator, skip_first_batches
from timm.optim import create_optimizer_v2
from timm.scheduler.cosine_lr import CosineLRScheduler
from timm.scheduler.multistep_lr import MultiStepLRScheduler
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from robustify.attacks.pgd import survives_pgd
from robustify.checkpoint import Checkpoints
from robustify.data import Split, augment, to_float
from robustify.errors import TrainingError, UsageError
from robustify.fold import constant, prefers_channels_last
from robustify.frozen import Frozen
from robustify.noise import Noise
from robustify.objective import Objective
from robustify.threat import ThreatModel

log = logging.getLogger(__name__)

Fetched = tuple[Tensor, Tensor, Tensor]  # uint8 images, labels, indices
AUGMENTATION, ATTACK, VALIDATION = 0, 1, 2  # streams of noise
CHECK_EVERY = (
    50  # optimizer steps between two looks at the loss on a GPU, each of which waits for it
)


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of the loop; the field names are what a recipe's `training:` section may say.

    Epochs in `decay_at` and `averaging_start` count from 0; below 1 they are a share of `epochs`.
    """

    epochs: int = 30
    batch_size: int = 128  # per process
    optimizer: str = "momentum"  # a name of timm's; "momentum" is SGD without Nesterov
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4  # on every parameter, as the field's recipes have it
    schedule: Literal["step", "cosine"] = "step"
    decay_at: tuple[float, ...] = (0.75, 0.9)
    decay_rate: float = 0.1
    warmup_epochs: int = 0
    clip_grad: float | None = None
    accumulate: int = 1
    augmentation: str | None = None  # none, crop or crop-flip; by default the data set's
    averaging: Literal["none", "swa", "ema"] = "none"
    averaging_start: float = 0.75
    ema_decay: float = 0.999
    select: Literal["robust", "clean"] = "robust"
    evaluate_every: int = 1
    evaluate_from: float = 0.0
    validation_steps: int = 10  # of the PGD that selects checkpoints
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "evaluate_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"expected training.{name} >= 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise UsageError(f"expected training.lr > 0, got {self.lr}")
        decays = self.decay_at if self.schedule == "step" else ()
        starts = (self.averaging_start,) if self.averaging == "swa" else ()
        for number in (*decays, *starts):
            if self.epoch(number) >= self.epochs and self.epochs > 1:
                raise UsageError(
                    f"expected decay_at and averaging_start within {self.epochs} epochs, got "
                    f"{number:g}; set training.decay_at and training.averaging_start too"
                )

    def epoch(self, number: float) -> int:
        """The epoch that `number` means: itself, or a share of `epochs` if below 1."""
        return int(number * self.epochs) if number < 1 else int(number)


@dataclass
class Progress:
    """Where a stage stands: what its checkpoint holds beside tensors."""

    epoch: int = 0
    step: int = 0  # batches done in this epoch
    updates: int = 0  # optimizer steps done in this stage
    snapshots: int = 0  # in the weight average
    best: dict[str, dict[str, float]] = field(default_factory=dict)  # network -> its best row
    sums: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    seconds: float = 0.0


@dataclass(frozen=True)
class Fitted:
    """What a stage left: the student's selected and last weights, and how they were selected."""

    best: dict[str, Tensor]
    last: dict[str, Tensor]
    selection: dict[str, Any]
    history: list[dict[str, Any]]
    seconds: float


class Stage:
    """One Objective on its way through the loop: networks, optimizer, data, where it stands."""

    def __init__(
        self,
        objective: Objective,
        train: Split,
        validation: Split,
        *,
        number: int,
        settings: Training,
        threat: ThreatModel,
        accelerator: Accelerator,
        seed: int,
        policy: str,
        max_steps: int | None = None,
    ) -> None:
        self.objective, self.number, self.settings = objective, number, settings
        self.train, self.validation, self.threat, self.seed = train, validation, threat, seed
        self.policy = settings.augmentation or policy
        self.accelerator = accelerator
        self.progress = Progress()
        self.best: dict[str, dict[str, Tensor]] = {}
        objective.to(accelerator.device)
        self.layout = torch.contiguous_format
        if prefers_channels_last(objective.student, objective.student.image_size):
            self.layout = torch.channels_last
            objective.to(memory_format=self.layout)
        optimizer = create_optimizer_v2(
            objective,
            opt=settings.optimizer,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            filter_bias_and_bn=False,
        )
        loader = DataLoader(train, settings.batch_size, shuffle=True, collate_fn=_as_fetched)
        self.model, self.optimizer, self.loader = accelerator.prepare(objective, optimizer, loader)
        self.schedule = _schedule(optimizer, settings)
        self.averaged = _averaged(objective.student, settings)
        steps_per_epoch = math.ceil(len(self.loader) / settings.accumulate)
        self.budget = settings.epochs * steps_per_epoch  # optimizer steps of the whole stage
        if max_steps is not None:
            self.budget = min(self.budget, max_steps)

    @property
    def finished(self) -> bool:
        """Whether every epoch, or every allowed step, is done."""
        progress = self.progress
        return progress.epoch >= self.settings.epochs or progress.updates >= self.budget

    def batch(
        self, fetched: tuple[Tensor, Tensor, Tensor], epoch: int
    ) -> tuple[Tensor, Tensor, Noise]:
        """Augmented images in [0, 1], labels, and the noise that belongs to them."""
        images, labels, indices = fetched
        noise = Noise(self.seed, indices, (self.number, epoch))
        images = to_float(augment(images, noise.fork(AUGMENTATION), self.policy))
        return images.contiguous(memory_format=self.layout), labels, noise.fork(ATTACK)

    def prepare(self) -> None:
        """Show the objective every training image once."""
        self.objective.prepare(self._stored_batches())

    def _stored_batches(self) -> Iterator[tuple[Tensor, Tensor, Noise]]:
        size = self.settings.batch_size
        for start in range(0, len(self.train), size):
            fetched = self.train.__getitems__(range(start, min(start + size, len(self.train))))
            images, labels, indices = (t.to(self.accelerator.device) for t in fetched)
            images = to_float(images).contiguous(memory_format=self.layout)
            yield images, labels, Noise(self.seed, indices, (self.number,))

    def step(self, fetched: Fetched) -> dict[str, Tensor]:
        """One batch: forward, backward, and an update where accumulation is due."""
        progress, objective = self.progress, self.objective
        objective.epoch, objective.epochs = progress.epoch, self.settings.epochs
        objective.lr_scale = self.schedule.optimizer.param_groups[0]["lr"] / self.settings.lr
        # Dropout and drop-path draw from torch's own generator: seeding it makes resuming exact.
        # The hash of a tuple of integers is the same in every process.
        place = (self.seed, self.number, progress.epoch, progress.step)
        torch.manual_seed(hash((*place, self.accelerator.process_index)) % 2**63)
        images, labels, noise = self.batch(fetched, progress.epoch)
        with self.accelerator.accumulate(self.model):
            terms: dict[str, Tensor] = self.model(images, labels, noise)
            self._stop_if_not_finite(terms["loss"])
            self.accelerator.backward(terms["loss"])
            if self.accelerator.sync_gradients:
                if self.settings.clip_grad is not None:
                    self.accelerator.clip_grad_norm_(
                        self.objective.parameters(), self.settings.clip_grad
                    )
                progress.updates += 1
            self.optimizer.step()
            self.optimizer.zero_grad()
        if self.settings.averaging == "ema" and self.accelerator.sync_gradients:
            self._average()
        return {name: term.detach() for name, term in terms.items()}

    def _stop_if_not_finite(self, loss: Tensor) -> None:
        on_gpu = loss.device.type != "cpu"
        if on_gpu and self.progress.updates % CHECK_EVERY:
            return
        if not torch.isfinite(loss.detach()):
            raise TrainingError(
                f"expected a finite loss, got {loss.item()} at epoch {self.progress.epoch} step "
                f"{self.progress.step} of stage {self.objective.name!r}; try a smaller training.lr "
                "or training.clip_grad=1"
            )

    def _average(self) -> None:
        if self.averaged is not None:
            self.averaged.update_parameters(self.objective.student)
            self.progress.snapshots += 1

    def finish_epoch(self, sums: Mapping[str, Tensor]) -> dict[str, Any]:
        """Average, evaluate, keep the best, move to the next epoch; the epoch's row of metrics."""
        progress, settings = self.progress, self.settings
        row: dict[str, Any] = {"stage": self.objective.name, "epoch": progress.epoch,
                               "lr": self.schedule.optimizer.param_groups[0]["lr"]}  # fmt: skip
        row |= {name: float(total) / max(progress.step, 1) for name, total in sums.items()}
        averaging = settings.averaging != "none" and progress.epoch >= settings.epoch(
            settings.averaging_start
        )
        if averaging and settings.averaging == "swa":
            self._average()
        last = progress.epoch == settings.epochs - 1 or progress.updates >= self.budget
        due = (progress.epoch + 1) % settings.evaluate_every == 0
        if last or (due and progress.epoch >= settings.epoch(settings.evaluate_from)):
            row |= self._evaluate("student", self.objective.student)
            if self.averaged is not None and progress.snapshots:
                reestimate_batchnorm(self.averaged.module, self._clean_batches())
                row |= self._evaluate("averaged", self.averaged.module)
        progress.epoch, progress.step, progress.sums = progress.epoch + 1, 0, {}
        progress.history.append(row)
        return row

    def _clean_batches(self) -> Iterator[Tensor]:
        self.loader.set_epoch(self.progress.epoch)
        for fetched in self.loader:
            yield self.batch(fetched, self.progress.epoch)[0]

    def _evaluate(self, name: str, network: nn.Module) -> dict[str, float]:
        clean, robust = validate(
            network, self.validation, self.threat, accelerator=self.accelerator,
            batch_size=self.settings.batch_size, steps=self.settings.validation_steps,
            noise_seed=self.seed,
        )  # fmt: skip
        score = {"robust": robust, "clean": clean}
        best = self.progress.best.get(name)
        if best is None or self._rank(score) > self._rank(best):
            self.progress.best[name] = {**score, "epoch": self.progress.epoch}
            self.best[name] = _copy(network.state_dict())
        return {f"{name} clean": clean, f"{name} robust": robust}

    def _rank(self, score: Mapping[str, float]) -> tuple[float, float]:
        """What "best" means: the selected accuracy, then the other one."""
        first, second = (
            ("robust", "clean") if self.settings.select == "robust" else ("clean", "robust")
        )
        return score[first], score[second]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs, as tensors and plain values."""
        tensors = {f"objective.{k}": v for k, v in self.objective.learned_state().items()}
        optimizer_state = self.optimizer.state_dict()["state"]
        plain: dict[str, Any] = {}
        for index, entry in optimizer_state.items():
            for key, value in entry.items():
                if isinstance(value, Tensor):
                    tensors[f"optimizer.{index}.{key}"] = value
                elif value is not None:
                    plain[f"{index}.{key}"] = value
        if self.averaged is not None:
            tensors |= {f"averaged.{k}": v for k, v in self.averaged.state_dict().items()}
        for name, weights in self.best.items():
            tensors |= {f"best.{name}.{k}": v for k, v in weights.items()}
        return tensors, {"progress": asdict(self.progress), "optimizer": plain}

    def restore(self, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> None:
        """Undo `state`."""
        self.progress = Progress(**values["progress"])
        self.objective.load_learned_state(_under("objective.", tensors))
        state: dict[int, dict[str, Any]] = {}
        for key, value in [*_under("optimizer.", tensors).items(), *values["optimizer"].items()]:
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        if self.averaged is not None:
            self.averaged.load_state_dict(_under("averaged.", tensors))
        self.best = {
            name: _copy(_under(f"best.{name}.", tensors), self.accelerator.device)
            for name in self.progress.best
        }

    def fitted(self) -> Fitted:
        """The best network over all evaluations becomes the student's weights."""
        last = _copy(self.objective.student.state_dict())
        best = self.progress.best
        name = max(best, key=lambda network: self._rank(best[network]))
        self.objective.student.load_state_dict(self.best[name])
        selection = {"network": name, **best[name], "candidates": best,
                     "on": f"{len(self.validation)} held-out training images"}  # fmt: skip
        return Fitted(
            self.best[name], last, selection, self.progress.history, self.progress.seconds
        )


def fit(
    stage: Stage,
    *,
    checkpoints: Checkpoints,
    interrupted: Callable[[], bool] = lambda: False,
    on_epoch: Callable[[list[dict[str, Any]]], None] = lambda history: None,
) -> Fitted:
    """Train `stage` to its end from wherever its checkpoint left it.

    `interrupted` is asked after every step; True saves a checkpoint and raises KeyboardInterrupt.
    `on_epoch` receives all rows so far. Raises `TrainingError` where the loss is not finite, naming
    the last good checkpoint.
    """
    name = f"stage{stage.number}"
    saved = checkpoints.load(name)
    if saved is not None:
        stage.restore(*saved)
        log.info("resuming %s at epoch %d, step %d", stage.objective.name,
                 stage.progress.epoch, stage.progress.step)  # fmt: skip
    devices = [stage.accelerator.device.index] if stage.accelerator.device.type == "cuda" else []
    bar = tqdm(
        total=stage.budget, initial=stage.progress.updates, desc=stage.objective.name, unit="step",
        disable=not stage.accelerator.is_main_process, dynamic_ncols=True,
        mininterval=1 if sys.stderr.isatty() else 10,
    )  # fmt: skip
    try:
        with torch.random.fork_rng(devices), bar:
            if not stage.finished:
                stage.prepare()
            while not stage.finished:
                _epoch(stage, checkpoints, name, bar, interrupted)
                on_epoch(stage.progress.history)
    except TrainingError as error:
        kept = checkpoints.newest(name)
        where = (
            f"; the last good checkpoint is {kept}" if kept else "; no checkpoint was written yet"
        )
        raise TrainingError(f"{error}; {where}") from None
    _save(stage, checkpoints, name)
    return stage.fitted()


def _epoch(
    stage: Stage,
    checkpoints: Checkpoints,
    name: str,
    bar: tqdm[Any],
    interrupted: Callable[[], bool],
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
    loader = skip_first_batches(stage.loader, progress.step) if progress.step else stage.loader
    for fetched in loader:
        updates = progress.updates
        terms = stage.step(fetched)
        progress.step += 1
        for key, term in terms.items():
            sums[key] = sums.get(key, torch.zeros((), **exact)) + term
        bar.update(progress.updates - updates)
        now = time.monotonic()
        progress.seconds = before + now - started
        stop = interrupted()
        if stop or now - saved > stage.settings.checkpoint_seconds:
            progress.sums = {key: float(total) for key, total in sums.items()}
            _save(stage, checkpoints, name)
            saved = now
        if stop:
            raise KeyboardInterrupt
        if stage.finished:
            break
    if stage.accelerator.num_processes > 1:
        sums = {key: stage.accelerator.reduce(total, "mean") for key, total in sums.items()}
    row = stage.finish_epoch(sums)
    progress.seconds = before + time.monotonic() - started
    bar.set_postfix({k: f"{row[k]:.3f}" for k in _SHOWN if k in row})
    if time.monotonic() - saved > stage.settings.checkpoint_seconds or progress.epoch == 1:
        _save(stage, checkpoints, name)


_SHOWN = ("loss", "student clean", "student robust", "averaged robust")


def _save(stage: Stage, checkpoints: Checkpoints, name: str) -> None:
    if stage.accelerator.is_main_process:
        checkpoints.save(name, *stage.state())


def validate(
    network: nn.Module,
    split: Split,
    threat: ThreatModel,
    *,
    accelerator: Accelerator,
    batch_size: int,
    steps: int,
    noise_seed: int,
) -> tuple[float, float]:
    """Clean accuracy and accuracy under PGD on cross-entropy, over all processes; each image counts
    once. For selecting checkpoints, never a headline."""
    if accelerator.num_processes > 1:
        for buffer in network.buffers():  # BatchNorm statistics differ between processes
            torch.distributed.broadcast(buffer, src=0)
    mine = range(accelerator.process_index, len(split), accelerator.num_processes)
    right = torch.zeros(2, device=accelerator.device)
    for start in range(0, len(mine), batch_size):
        fetched = split.__getitems__(list(mine[start : start + batch_size]))
        images, labels, indices = (tensor.to(accelerator.device) for tensor in fetched)
        images = to_float(images)
        noise = Noise(noise_seed, indices, (VALIDATION,))
        with constant(network, images) as victim:
            with torch.no_grad():
                right[0] += (victim(images).argmax(1) == labels).sum()
            right[1] += survives_pgd(victim, images, labels, threat, steps=steps, noise=noise).sum()
    total = accelerator.reduce(right, "sum") / len(split)
    return float(total[0]), float(total[1])


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


def _schedule(optimizer: torch.optim.Optimizer, settings: Training) -> Scheduler:
    """timm's schedulers compute the rate from the epoch alone, so resuming needs no state."""
    if settings.schedule == "cosine":
        return CosineLRScheduler(
            optimizer, t_initial=settings.epochs, warmup_t=settings.warmup_epochs
        )
    return MultiStepLRScheduler(
        optimizer,
        # timm compares with the epoch to come: without the 1 the rate would drop an epoch early.
        decay_t=[settings.epoch(number) + 1 for number in settings.decay_at],
        decay_rate=settings.decay_rate,
        warmup_t=settings.warmup_epochs,
    )


def _averaged(student: nn.Module, settings: Training) -> AveragedModel | None:
    if settings.averaging == "none":
        return None
    if settings.averaging == "swa":
        return AveragedModel(student)
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(settings.ema_decay))  # type: ignore[no-untyped-call]


def _as_fetched(batch: Any) -> Any:
    """`Split.__getitems__` returns whole batches: nothing is left to collate."""
    return batch


def _copy(state: Mapping[str, Tensor], device: torch.device | None = None) -> dict[str, Tensor]:
    return {key: tensor.detach().to(device, copy=True) for key, tensor in state.items()}


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The entries below `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
