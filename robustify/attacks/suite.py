"""Suites: which attacks, in which order, on whom.

    fast       APGD-CE, targeted APGD on the nearest classes, a short Square
    standard   AutoAttack as its authors fix it: APGD-CE, APGD-T, FAB-T, Square
    plus       the authors' larger set
    rand       for randomised models: APGD with averaged gradients, every attack on every image
    pgd        PGD on cross-entropy, for training curves
    a, b, …    attacks by name

An image that fell to one attack is not attacked by the next (`rand`: it is, because a randomised
model may answer otherwise).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from robustify.attacks.apgd import APGD
from robustify.attacks.cw import CW
from robustify.attacks.engine import Attack, Decided, Job, attack_images
from robustify.attacks.fab import FAB
from robustify.attacks.fixed_step import PGD
from robustify.attacks.passes import Passes
from robustify.attacks.square import Square
from robustify.attacks.victim import Victim
from robustify.errors import UsageError, suggest
from robustify.threat import ThreatModel

_TARGETS = 9  # of AutoAttack: nine classes beside the label, or all there are


@dataclass(frozen=True)
class Suite:
    """Attacks in order; `worst_case`: each meets only the survivors of those before it."""

    name: str
    attacks: tuple[Attack[Any], ...]
    worst_case: bool = True


@dataclass(frozen=True)
class AttackOutcome:
    """What one attack left: `survivors` (n,) bool on the CPU, still right after it and, in a
    worst-case suite, after all before it."""

    name: str
    settings: dict[str, Any]
    survivors: Tensor = field(repr=False)
    passes: Passes
    seconds: float


def make_suite(name: str, threat: ThreatModel, classes: int) -> Suite:
    """The suite called `name` for models with `classes` outputs, or a comma list of attacks.

    Raises `UsageError` for an unknown name, for fewer than 2 classes, and for C&W outside L2.
    """
    if classes < 2:
        raise UsageError(f"expected a model with at least 2 classes, got {classes}")
    suites: dict[str, Callable[[], Suite]] = {
        "fast": lambda: Suite("fast", _fast(classes)),
        "standard": lambda: Suite("standard", _standard(threat, classes)),
        "plus": lambda: Suite("plus", _plus(classes)),
        "rand": lambda: Suite("rand", _rand(classes), worst_case=False),
        "pgd": lambda: Suite("pgd", (PGD(iterations=100, restarts=5),)),
    }
    if name in suites:
        return suites[name]()
    known = _by_name(threat, classes)
    chosen = [part.strip() for part in name.split(",")]
    for part in chosen:
        if part not in known:
            raise UsageError(
                f"expected a suite of {', '.join(suites)} or attacks of {', '.join(known)}, "
                f"got {part!r}" + suggest(part, [*suites, *known])
            )
    if "cw" in chosen and threat.norm != "L2":
        raise UsageError(f"expected norm L2 for the attack cw, got {threat.norm}")
    return Suite(name, tuple(known[part]() for part in dict.fromkeys(chosen)))


def _standard(threat: ThreatModel, classes: int) -> tuple[Attack[Any], ...]:
    l1 = threat.norm == "L1"
    return (
        APGD("apgd-ce", "ce", restarts=5 if l1 else 1, shrinking=l1),
        _apgd_targeted(classes, 5 if l1 else _TARGETS, shrinking=l1),
        _fab_targeted(classes),
        Square(),
    )


def _plus(classes: int) -> tuple[Attack[Any], ...]:
    return (
        APGD("apgd-ce", "ce", restarts=5),
        _apgd_dlr(classes, restarts=5),
        FAB("fab", restarts=5),
        Square(),
        _apgd_targeted(classes, _TARGETS),
        _fab_targeted(classes),
    )


def _rand(classes: int) -> tuple[Attack[Any], ...]:
    return APGD("apgd-ce", "ce", samples=20), _apgd_dlr(classes, samples=20)


def _fast(classes: int) -> tuple[Attack[Any], ...]:
    return (
        APGD("apgd-ce", "ce", iterations=20),
        _apgd_targeted(classes, 5, iterations=30, order="malt"),
        Square(queries=100),
    )


def _apgd_dlr(classes: int, **settings: Any) -> APGD:
    adapted = classes < 3
    return APGD("apgd-dlr", "margin" if adapted else "dlr", adapted=adapted, **settings)


def _apgd_targeted(classes: int, targets: int, **settings: Any) -> APGD:
    few = classes < 4
    return APGD(
        "apgd-t",
        "margin_targeted" if few else "dlr_targeted",
        target_classes=min(targets, classes - 1),
        adapted=few or targets > classes - 1,
        **settings,
    )


def _fab_targeted(classes: int) -> FAB:
    count = min(_TARGETS, classes - 1)
    return FAB("fab-t", target_classes=count, adapted=count < _TARGETS)


def _by_name(threat: ThreatModel, classes: int) -> dict[str, Callable[[], Attack[Any]]]:
    return {
        "apgd-ce": lambda: APGD("apgd-ce", "ce"),
        "apgd-ce-scaled": lambda: APGD("apgd-ce-scaled", "ce_scaled"),
        "apgd-dlr": lambda: _apgd_dlr(classes),
        "apgd-margin": lambda: APGD("apgd-margin", "margin"),
        "apgd-t": lambda: _apgd_targeted(classes, _TARGETS),
        "fab": lambda: FAB("fab"),
        "fab-t": lambda: _fab_targeted(classes),
        "square": lambda: Square(),
        "pgd": lambda: PGD(),
        "fgsm": lambda: PGD("fgsm", iterations=1, step_size=threat.eps, random_start=False),
        "cw": lambda: CW(),
    }


def run_suite(
    model: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor,
    *,
    suite: Suite,
    threat: ThreatModel,
    batch_size: int = 250,
    seed: int = 0,
    indices: Tensor | None = None,
    decided: Decided = lambda attack, index, right, image_adv: None,
    done: Mapping[str, Mapping[int, bool]] | None = None,
) -> list[AttackOutcome]:
    """The outcome of the unperturbed images, named `clean`, and of each attack of `suite`.

    `model` maps (N, C, H, W) in [0, 1] to logits (N, K), in eval mode and float32; it runs where
    `images` (n, C, H, W) are. `indices` (n,) are their places in the data set (0 … n-1 unless
    given), which key the noise: a shard gets the verdicts that the whole would. `decided` is told
    of each image and attack; verdicts in `done[attack][index]` are taken over without running
    them, which is how an interrupted run goes on. Leaves no trace in random states or the model.
    """
    if indices is None:
        indices = torch.arange(len(images))
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices), torch.autocast(images.device.type, enabled=False):
        torch.manual_seed(seed)  # of a randomised model; the attacks have their own
        run = _Run(model, images, labels, indices, threat, batch_size, seed, decided, done or {})
        outcomes = [run.clean()]
        right = outcomes[0].survivors
        for attack in suite.attacks:
            outcomes.append(run.attack(attack, right))
            if suite.worst_case:
                right = outcomes[-1].survivors
    return outcomes


class _Run:
    """One call of `run_suite`: what all its attacks share."""

    def __init__(
        self,
        model: Callable[[Tensor], Tensor],
        images: Tensor,
        labels: Tensor,
        indices: Tensor,
        threat: ThreatModel,
        batch_size: int,
        seed: int,
        decided: Decided,
        done: Mapping[str, Mapping[int, bool]],
    ) -> None:
        self.model, self.threat, self.batch_size, self.seed = model, threat, batch_size, seed
        self.images = images.detach().float().contiguous()
        self.labels, self.indices = labels.to(images.device), indices.to(images.device)
        self.decided, self.done = decided, done
        self.logits = torch.empty(0)

    def clean(self) -> AttackOutcome:
        """Predict the unperturbed images; their logits serve the attacks."""
        started, victim = time.process_time(), Victim(self.model)
        firsts = range(0, len(self.images), self.batch_size)
        parts = [victim.logits(self.images[i : i + self.batch_size]) for i in firsts]
        # A process whose shard is empty still takes part in what all of them gather.
        self.logits = torch.cat(parts) if parts else self.images.new_empty((0, 2))
        right = self.logits.argmax(1) == self.labels
        known = self.done.get("clean", {})
        for index, verdict in zip(self.indices.tolist(), right.tolist(), strict=True):
            if index not in known:
                self.decided("clean", index, verdict, None)
        seconds = time.process_time() - started
        return AttackOutcome("clean", {}, right.cpu(), victim.passes, seconds)

    def attack(self, attack: Attack[Any], right: Tensor) -> AttackOutcome:
        """Run `attack` on the images that are `right` and have no verdict yet."""
        started, victim = time.process_time(), Victim(self.model, samples=attack.samples)
        known = self.done.get(attack.name, {})
        indices = self.indices.tolist()
        survivors = right.clone()
        rows = []
        for row in right.nonzero().squeeze(1).tolist():
            if indices[row] in known:
                survivors[row] = known[indices[row]]
            else:
                rows.append(row)
        if rows and self.threat.eps > 0:
            job = self._job(torch.tensor(rows, device=self.images.device))
            left = attack_images(
                attack, victim, job, batch_size=self.batch_size, decided=self.decided
            )
            survivors[rows] = left.cpu()
        elif rows:
            for row in rows:
                self.decided(attack.name, indices[row], True, None)
        seconds = time.process_time() - started
        settings = attack.settings(self.threat)
        return AttackOutcome(attack.name, settings, survivors, victim.passes, seconds)

    def _job(self, rows: Tensor) -> Job:
        return Job(
            images=self.images[rows],
            labels=self.labels[rows],
            logits=self.logits[rows],
            index=self.indices[rows],
            threat=self.threat,
            seed=self.seed,
        )
