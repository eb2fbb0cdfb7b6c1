"""A stage of training: one Objective with its optimizer and data, step by step and epoch by epoch.

Only this module steps an optimizer. It runs on Accelerate, so the same step serves a CPU, a GPU
and several processes. What a step draws at random is keyed by (seed, stage, epoch, image), so a run
that is interrupted and resumed goes through the same numbers as one that never was.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import create_optimizer_v2, get_optimizer_class, list_optimizers
from torch import Tensor, nn
from torch.profiler import record_function

from robustify import memory
from robustify.attacks.pgd import keeping, repeating
from robustify.averaging import new_average, reestimate_batchnorm
from robustify.classifier import Classifier
from robustify.data import augment, to_float
from robustify.errors import TrainingError, UsageError, suggest
from robustify.fold import prefers_channels_last
from robustify.loader import batches, new_loader
from robustify.noise import Noise
from robustify.objective import Objective, batchnorm_updates
from robustify.schedule import new_schedule
from robustify.selection import Selection, copy_of, share_buffers, validate
from robustify.settings import Training
from robustify.splits import Fetched, Split
from robustify.streams import Stream
from robustify.threat import ThreatModel
from robustify.weight_perturbation import Buffers, perturbable, perturbed

AUGMENTATION, ATTACK = 0, 1  # streams of noise
CHECK_EVERY = 50  # updates between two looks at the loss on a GPU; a look waits for its work
RESIDENT = 0.1  # of a GPU's free memory may be taken by training images


@dataclass
class Progress:
    """Where a stage stands: what its checkpoint holds beside tensors."""

    epoch: int = 0
    step: int = 0  # batches done in this epoch
    updates: int = 0  # optimizer steps done in this stage
    snapshots: int = 0  # in the weight average
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
        train: Split | Stream,
        validation: Split,
        *,
        number: int,
        settings: Training,
        threat: ThreatModel,
        accelerator: Accelerator,
        seed: int,
        policy: str,
        max_steps: int | None = None,
        alone: bool = False,
    ) -> None:
        """`alone`: without the other processes, for trying things that may fail in one of them."""
        self.objective, self.number, self.settings = objective, number, settings
        self.validation = _near(validation, accelerator.device)
        self.train = train if isinstance(train, Stream) else _near(train, accelerator.device)
        self.threat, self.seed = threat, seed
        self.policy = settings.augmentation or policy
        self.accelerator = accelerator
        self.progress = Progress()
        self.selection = Selection(settings.select)
        objective.to(accelerator.device)
        if settings.grad_checkpointing:
            for network in trained(objective):
                network.set_grad_checkpointing()
        self.layout = torch.contiguous_format
        if prefers_channels_last(objective.student, objective.student.image_size):
            self.layout = torch.channels_last
            objective.to(memory_format=self.layout)
        optimizer = _optimizer(objective, settings)
        loader = new_loader(
            self.train, settings.batch_size, seed=seed, processes=accelerator.num_processes
        )
        self.together = accelerator.num_processes > 1 and not alone
        self.model: nn.Module = objective
        if alone:
            self.optimizer, self.loader = accelerator.prepare(optimizer, loader)
        else:
            prepared = accelerator.prepare(objective, optimizer, loader)
            self.model, self.optimizer, self.loader = prepared
        self.schedule = new_schedule(optimizer, settings)
        self.averaged = new_average(objective.student, settings)
        steps_per_epoch = math.ceil(len(self.loader) / settings.accumulate)
        self.budget = settings.epochs * steps_per_epoch  # optimizer steps of the whole stage
        if max_steps is not None:
            self.budget = min(self.budget, max_steps)

    @property
    def spent(self) -> bool:
        """Whether every allowed optimizer step is done."""
        return self.progress.updates >= self.budget

    @property
    def finished(self) -> bool:
        """Whether every epoch is done, its end included, or every allowed step with the end of its
        epoch."""
        progress = self.progress
        return progress.epoch >= self.settings.epochs or (self.spent and progress.step == 0)

    def batch(
        self, fetched: tuple[Tensor, Tensor, Tensor], epoch: int
    ) -> tuple[Tensor, Tensor, Noise]:
        """Augmented images in [0, 1], labels, and the noise that belongs to them."""
        images, labels, indices = fetched
        noise = Noise(self.seed, indices, (self.number, epoch))
        with record_function("augmentation"):
            images = to_float(augment(images, noise.fork(AUGMENTATION), self.policy))
            images = images.contiguous(memory_format=self.layout)
        return images, labels, noise.fork(ATTACK)

    def prepare(self) -> None:
        """Show the objective every training image once."""
        self.objective.prepare(self._stored_batches())

    def _stored_batches(self) -> Iterator[tuple[Tensor, Tensor, Noise]]:
        for fetched in self.train.batches(self.settings.batch_size):
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
        seed = hash((*place, self.accelerator.process_index)) % 2**63
        batch = self.batch(fetched, progress.epoch)
        with self.accelerator.accumulate(self.model):
            with self._perturbed(batch, seed) as already:
                torch.manual_seed(seed)
                with record_function("objective"):
                    terms: dict[str, Tensor] = self.model(*batch) | already
                self._stop_if_not_finite(terms["loss"])
                with record_function("backward"), self._checkpointed():
                    self.accelerator.backward(terms["loss"])
            if self.accelerator.sync_gradients:
                if self.settings.clip_grad is not None:
                    self.accelerator.clip_grad_norm_(
                        self.objective.parameters(), self.settings.clip_grad
                    )
                progress.updates += 1
            with record_function("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.settings.averaging == "ema" and self.accelerator.sync_gradients:
            self._average()
        return {name: term.detach() for name, term in terms.items()}

    def _checkpointed(self) -> AbstractContextManager[None]:
        """For a backward: what gradient checkpointing forwards again must not be counted again."""
        if not self.settings.grad_checkpointing:
            return nullcontext()
        return batchnorm_updates(self.objective, 0)

    @contextmanager
    def _perturbed(
        self, batch: tuple[Tensor, Tensor, Noise], seed: int
    ) -> Iterator[dict[str, Tensor]]:
        """AWP where it is due: the student's weights at their worst for this batch, and the
        adversarial images found before. Gives what else there is to log."""
        settings, objective = self.settings, self.objective
        if not settings.awp_gamma or self.progress.epoch < settings.epoch(settings.awp_start):
            yield {}
            return
        if self.together:  # as DDP would before a forward of its own
            share_buffers(objective)
        weights = perturbable(objective.student)
        torch.manual_seed(seed)
        buffers = Buffers(objective)
        with keeping(buffers.take) as found:  # what a search in train mode moves stays moved
            loss = objective(*batch)["loss"]
            gradients: Sequence[Tensor] = torch.autograd.grad(
                loss, weights, allow_unused=True, materialize_grads=True
            )
        buffers.put_back()
        if (
            self.together
        ):  # the same step everywhere, or the processes would train different networks
            gradients = [self.accelerator.reduce(each, "mean") for each in gradients]
        with perturbed(weights, gradients, gamma=settings.awp_gamma), repeating(found):
            yield {"unperturbed loss": loss}

    def _stop_if_not_finite(self, loss: Tensor) -> None:
        on_gpu = loss.device.type != "cpu"
        if on_gpu and self.progress.updates % CHECK_EVERY:
            return
        self.require_finite(loss.detach())

    def require_finite(self, loss: Tensor) -> None:
        """Raise `TrainingError` unless `loss`, of one step or summed over several, is finite."""
        if not torch.isfinite(loss):
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
        last = progress.epoch == settings.epochs - 1 or self.spent
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
        with closing(batches(self.loader, processes=self.accelerator.num_processes)) as every:
            for fetched in every:
                yield self.batch(fetched, self.progress.epoch)[0]

    def _evaluate(self, name: str, network: nn.Module) -> dict[str, float]:
        with record_function("validation"):
            score = validate(
                network, self.validation, self.threat, accelerator=self.accelerator,
                batch_size=self.settings.batch_size, steps=self.settings.validation_steps,
                noise_seed=self.seed,
            )  # fmt: skip
        self.selection.consider(name, network, score, epoch=self.progress.epoch)
        return {f"{name} {kind}": accuracy for kind, accuracy in score.items()}

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
        for name, weights in self.selection.weights.items():
            tensors |= {f"best.{name}.{k}": v for k, v in weights.items()}
        values = {"progress": asdict(self.progress), "best": self.selection.rows,
                  "processes": self.accelerator.num_processes}  # fmt: skip
        return tensors, {**values, "optimizer": plain}

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
        self.selection.rows = dict(values["best"])
        self.selection.weights = {
            name: copy_of(_under(f"best.{name}.", tensors), self.accelerator.device)
            for name in self.selection.rows
        }

    def fitted(self) -> Fitted:
        """The best network over all evaluations becomes the student's weights."""
        last = copy_of(self.objective.student.state_dict())
        name, rows = self.selection.winner(), self.selection.rows
        best = self.selection.weights[name]
        self.objective.student.load_state_dict(best)
        selection = {"network": name, **rows[name], "candidates": rows,
                     "on": f"{len(self.validation)} held-out training images"}  # fmt: skip
        return Fitted(best, last, selection, self.progress.history, self.progress.seconds)


def _optimizer(objective: Objective, settings: Training) -> torch.optim.Optimizer:
    """timm's optimizer of that name. Raises `UsageError` for one that it does not know."""
    on_gpu = all(p.is_cuda for p in objective.parameters())
    more: dict[str, Any] = {}
    try:
        # One kernel for all parameters, where the optimizer is one of torch's.
        known = inspect.signature(get_optimizer_class(settings.optimizer, bind_defaults=False))
        if on_gpu and "fused" in known.parameters:
            more["fused"] = True
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            objective,
            opt=settings.optimizer,
            lr=settings.lr,
            weight_decay=settings.weight_decay,
            momentum=settings.momentum,
            filter_bias_and_bn=False,
            **more,
        )
    except ValueError as error:
        near = suggest(settings.optimizer, list_optimizers())
        raise UsageError(
            f"expected training.optimizer to name one of timm's, got {settings.optimizer!r} "
            f"({error}){near}"
        ) from None
    return optimizer


def trained(objective: Objective) -> Iterator[Classifier]:
    """The classifiers of `objective` that have something to train."""
    for module in objective.children():
        if isinstance(module, Classifier) and any(p.requires_grad for p in module.parameters()):
            yield module


def _near(split: Split, device: torch.device) -> Split:
    """`split` on the GPU where it takes little of its memory: no step then waits for images."""
    store = split.store
    small = isinstance(store, Tensor) and store.nbytes < RESIDENT * memory.free(device)
    return split.to(device) if small and device.type == "cuda" else split


def _under(prefix: str, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The entries below `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
