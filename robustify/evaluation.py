"""Clean and robust accuracy of any model, with the interval and the reasons to believe it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn

from robustify import memory
from robustify.attacks.passes import Passes
from robustify.attacks.suite import AttackOutcome, Suite, make_suite, run_suite
from robustify.attacks.transfer import Transfer
from robustify.attacks.victim import Victim, require_images, require_labels
from robustify.diagnosis import Findings, diagnose
from robustify.errors import ModelError
from robustify.fold import constant
from robustify.objective import evaluating
from robustify.plausible import Reference
from robustify.processes import this_process
from robustify.threat import Norm, ThreatModel, chosen, format_eps
from robustify.verdict import Verdict

SCHEMA = 1
EXAMPLES = 100  # fallen images kept to be shown
LEVEL_OF_SUITE = {"standard": "full", "plus": "full", "fast": "quick"}
COMPARED = {  # attacks of the checks -> the side they stand on, in words
    "fgsm": ("naive", "one step on cross-entropy"),
    "pgd-ce": ("naive", "PGD on cross-entropy"),
    "pgd-ce-tempered": ("adaptive", "the same PGD on z / T"),
    "pgd-ce-scaled": ("adaptive", "the same PGD on z / s, which no scale of the logits can blind"),
}


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of `right` out of `n` (Wilson, 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, scale = right / n, 1 + z * z / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # Rounding must not push a bound past the share itself where that is 0 or 1.
    return max(0.0, min(share, (centre - spread) / scale)), min(
        1.0, max(share, (centre + spread) / scale)
    )


@dataclass(frozen=True)
class Row:
    """One attack in a report; accuracies are fractions of all n images."""

    name: str
    robust_accuracy: float  # of the worst case over this attack and those before it
    newly_broken: int
    settings: Mapping[str, Any]
    passes: Passes
    seconds: float


@dataclass(frozen=True)
class Report:
    """What an evaluation found. Accuracies are fractions of all n images; `samples` has one bool
    tensor (n,) per attack, True where the image is still right after it and all before it."""

    threat: ThreatModel
    suite: str
    seed: int
    clean_accuracy: float
    robust_accuracy: float
    verdict: Verdict
    rows: Sequence[Row]
    samples: Mapping[str, Tensor] = field(repr=False)
    labels: Tensor = field(repr=False)
    predictions: Tensor = field(repr=False)  # (n,) of the unperturbed images
    findings: Findings = field(repr=False)
    fallen: Mapping[int, tuple[str, Tensor]] = field(repr=False)  # image -> attack, image_adv
    fallen_predictions: Tensor = field(repr=False)  # (n,), of fallen images; -1 of all others
    class_names: Sequence[str] | None = None
    seconds: float = 0.0

    @property
    def n(self) -> int:
        """Images evaluated; all of them are in the denominator of every accuracy."""
        return len(self.labels)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the robust accuracy."""
        return wilson(round(self.robust_accuracy * self.n), self.n)

    @property
    def attacks(self) -> dict[str, float]:
        """Attack -> robust accuracy after it and all before it."""
        return {row.name: row.robust_accuracy for row in self.rows}

    @property
    def passes(self) -> Passes:
        """Images sent forward, and images a gradient was computed for, over all attacks."""
        return sum((row.passes for row in self.rows), Passes())

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-image samples, as plain values."""
        n = self.n
        return {
            "schema": SCHEMA,
            "threat_model": {
                "norm": self.threat.norm,
                "eps": self.threat.eps,
                "eps_text": format_eps(self.threat.eps),
            },
            "suite": self.suite,
            "seed": self.seed,
            "n": n,
            "clean_accuracy": self.clean_accuracy,
            "clean_interval": wilson(round(self.clean_accuracy * n), n),
            "robust_accuracy": self.robust_accuracy,
            "interval": self.interval,
            "verdict": asdict(self.verdict),
            "flags": [asdict(flag) for flag in self.findings.flags],
            "side_by_side": self._side_by_side(),
            "curve": self._curve(),
            "attacks": [self._row(row) for row in self.rows],
            "classes": self._classes(),
            "passes": _per_image(self.passes, n),
            "seconds": round(self.seconds, 2),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    def _row(self, row: Row) -> dict[str, Any]:
        return {
            "name": row.name,
            "robust_accuracy": row.robust_accuracy,
            "interval": wilson(round(row.robust_accuracy * self.n), self.n),
            "newly_broken": row.newly_broken,
            "settings": dict(row.settings),
            "passes": _per_image(row.passes, self.n),
            "seconds": round(row.seconds, 2),
        }

    def _curve(self) -> list[dict[str, Any]]:
        n = self.findings.checked
        return [
            {
                "eps": eps,
                "eps_text": format_eps(eps),
                "robust_accuracy": accuracy,
                "interval": wilson(round(accuracy * n), n),
                "attack": f"PGD on z / s, first {n} images",
            }
            for eps, accuracy in self.findings.accuracy_by_eps
        ]

    def _side_by_side(self) -> list[dict[str, Any]]:
        """Naive attacks of the checks, then adaptive ones and the suite."""
        n = self.findings.checked
        rows = [
            {
                "tier": tier,
                "name": name,
                "description": description,
                "robust_accuracy": self.findings.alone[name],
                "interval": wilson(round(self.findings.alone[name] * n), n),
                "headline": False,
                "n": n,
            }
            for name, (tier, description) in COMPARED.items()
            if name in self.findings.alone
        ]
        if not rows:
            return []
        adaptive = self.findings.headline.attacks - {"ce"}  # what no scale of the logits can blind
        suite = {
            "tier": "adaptive" if adaptive else "naive",
            "name": f"suite {self.suite}",
            "description": "the worst case over all attacks",
            "robust_accuracy": self.robust_accuracy,
            "interval": self.interval,
            "headline": True,
            "n": self.n,
        }
        return [*rows, suite]

    def _classes(self) -> list[dict[str, Any]]:
        clean, robust = self.samples["clean"], list(self.samples.values())[-1]
        rows = []
        for label in sorted(set(self.labels.tolist())):
            mine = self.labels == label
            rows.append({
                "name": self.class_names[label] if self.class_names else str(label),
                "n": int(mine.sum()),
                "clean_accuracy": clean[mine].double().mean().item(),
                "robust_accuracy": robust[mine].double().mean().item(),
            })  # fmt: skip
        return rows


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    suite: str = "standard",
    norm: Norm = "Linf",
    eps: float | None = None,
    batch_size: int | None = None,
    seed: int = 0,
    class_names: Sequence[str] | None = None,
    sharded: bool = False,
    checks: str | None = None,
    reference: Reference | None = None,
    temperature: float | None = None,
    preprocessed: bool = False,
    transfer_from: Mapping[str, nn.Module] | None = None,
    decided: Callable[[str, int, bool], None] = lambda attack, image, right: None,
    done: Mapping[str, Mapping[int, bool]] | None = None,
) -> Report:
    """Clean and robust accuracy of `model` on (N, C, H, W) images in [0, 1] with int64 labels (N,).

    `eps` is 8/255 for Linf unless given; the other norms have no usual one and need theirs.

    `model` returns logits (N, K), alone, first in a tuple, or as `.logits`; its mode and gradients
    are left as they were. Every attack runs in float32 with noise keyed by the image's position, so
    the result does not depend on `batch_size`, by default what the memory allows. `decided` is told
    of every verdict as it falls, and verdicts in `done` (attack -> image -> still right) are taken
    over. `sharded` divides the images over Accelerate's processes; every process gets the whole
    report.

    The verdict rests on `checks`: full, quick or always (by default full with the suites standard
    and plus, quick with fast, always otherwise). `reference` says what the model is, for the
    plausibility gate, `temperature` at which it was distilled, `preprocessed` that something like
    a purifier stands in front. What withstands the suite is tried with images crafted on each model
    of `transfer_from`. The checks' own attacks enter the worst case. Raises `UsageError` for an
    unknown suite, `DataError` for images or labels that do not fit, `ModelError` for a model that
    does not return finite logits, or one to transfer from that has other classes.
    """
    threat = chosen(norm, eps, ThreatModel("Linf", 8 / 255))
    started = time.monotonic()
    network, classes = _check(model, images, labels)
    if batch_size is None:
        batch_size = fitting_batch(network, images, sharded=sharded)
    run = _Run(network, images, labels, threat, batch_size, seed, sharded, decided, done or {})
    attacks = make_suite(suite, threat, classes)
    others = {
        name: _surrogate(name, other, images, labels, classes)
        for name, other in (transfer_from or {}).items()
    }
    if others:
        attacks = replace(attacks, attacks=(*attacks.attacks, Transfer(others)))
    with evaluating(*others.values()):
        outcomes = run.suite(attacks, torch.arange(len(images)))
    if suite == "fast" and black_box_beats_white_box(outcomes):
        survivors = outcomes[-1].survivors.nonzero().squeeze(1)
        standard = make_suite("standard", threat, classes)
        if len(survivors):
            outcomes += run.suite(standard, survivors, prefix="standard: ")[1:]
    with evaluating(model), constant(network, images[:8]) as victim:
        findings = diagnose(
            victim, images, labels, threat, suite=suite, outcomes=outcomes,
            level=checks or LEVEL_OF_SUITE.get(suite, "always"), network=network,
            reference=reference, temperature=temperature, preprocessed=preprocessed, seed=seed,
            batch_size=batch_size,
        )  # fmt: skip
    outcomes.append(AttackOutcome("checks", {"attacks": "those of the checks below"},
                                  findings.survivors, findings.passes, 0.0))  # fmt: skip
    rows = _rows(outcomes)
    return Report(
        threat=threat,
        suite=suite,
        seed=seed,
        clean_accuracy=outcomes[0].survivors.double().mean().item(),
        robust_accuracy=rows[-1].robust_accuracy,
        verdict=findings.verdict,
        rows=rows,
        samples={outcome.name: outcome.survivors for outcome in outcomes},
        findings=findings,
        fallen=run.fallen,
        fallen_predictions=run.fallen_predictions(),
        labels=labels.cpu(),
        predictions=run.predictions(),
        class_names=class_names,
        seconds=time.monotonic() - started,
    )


def fitting_batch(network: nn.Module, images: Tensor, *, sharded: bool = False) -> int:
    """How many of `images` memory allows to attack at once; `sharded` over all processes."""
    few = images[: memory.ROWS]
    processes = this_process().num_processes if sharded else 1
    with evaluating(network), constant(network, few) as victim:
        return memory.evaluation_batch(victim, few, processes=processes)


class _Run:
    """What all suites of one evaluation share: model, images, processes, known verdicts."""

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        threat: ThreatModel,
        batch_size: int,
        seed: int,
        sharded: bool,
        decided: Callable[[str, int, bool], None],
        done: Mapping[str, Mapping[int, bool]],
    ) -> None:
        self.network, self.images, self.labels, self.threat = network, images, labels, threat
        self.batch_size, self.seed, self.decided, self.done = batch_size, seed, decided, done
        self.processes = this_process() if sharded else None
        self.fallen: dict[int, tuple[str, Tensor]] = {}
        # What fell before an interruption is known, but not what it fell to: a few fall again.
        fell = [
            (a, i) for a, images in self.done.items() for i, right in images.items() if not right
        ]
        self.again = set([(attack, i) for attack, i in fell if attack != "clean"][:EXAMPLES])

    def suite(self, suite: Suite, indices: Tensor, *, prefix: str = "") -> list[AttackOutcome]:
        """The outcomes of `suite` on the images at `indices`, over all processes; survivors are
        (n,) over all images, those that were not attacked False."""
        mine = indices
        if self.processes is not None:
            mine = indices[self.processes.process_index :: self.processes.num_processes]
        known = {
            attack.removeprefix(prefix): {
                i: right for i, right in verdicts.items() if (attack, i) not in self.again
            }
            for attack, verdicts in self.done.items()
            if attack.startswith(prefix)
        }
        with constant(self.network, self.images[:8]) as victim:
            outcomes = run_suite(
                victim, self.images[mine], self.labels[mine], suite=suite, threat=self.threat,
                batch_size=self.batch_size, seed=self.seed, indices=mine, done=known,
                decided=partial(self._note, prefix),
            )  # fmt: skip
        shards = [(mine, outcomes)]
        if self.processes is not None and self.processes.num_processes > 1:
            shards = gather_object(shards)
        return [self._merged(prefix, [(i, o[k]) for i, o in shards]) for k in range(len(outcomes))]

    def _note(
        self, prefix: str, attack: str, image: int, right: bool, image_adv: Tensor | None
    ) -> None:
        if image_adv is not None and len(self.fallen) < EXAMPLES:
            self.fallen[image] = prefix + attack, image_adv.cpu()
        if image not in self.done.get(prefix + attack, ()):
            self.decided(prefix + attack, image, right)

    def predictions(self) -> Tensor:
        """(n,) classes of the unperturbed images, on the CPU."""
        with constant(self.network, self.images[:8]) as network:
            victim = Victim(network)
            starts = range(0, len(self.images), self.batch_size)
            batches = [self.images[start : start + self.batch_size] for start in starts]
            return torch.cat([victim.predict(batch) for batch in batches]).cpu()

    def fallen_predictions(self) -> Tensor:
        """(n,) classes of the adversarial images that were kept, -1 elsewhere."""
        predicted = torch.full((len(self.labels),), -1)
        if self.fallen:
            images_adv = torch.stack([image_adv for _, image_adv in self.fallen.values()])
            with constant(self.network, self.images[:8]) as network:
                answers = Victim(network).predict(images_adv.to(self.images.device))
            predicted[list(self.fallen)] = answers.cpu()
        return predicted

    def _merged(self, prefix: str, parts: list[tuple[Tensor, AttackOutcome]]) -> AttackOutcome:
        survivors = torch.zeros(len(self.labels), dtype=torch.bool)
        for indices, outcome in parts:
            survivors[indices.cpu()] = outcome.survivors
        first = parts[0][1]
        passes = sum((outcome.passes for _, outcome in parts), Passes())
        seconds = sum(outcome.seconds for _, outcome in parts)
        return AttackOutcome(prefix + first.name, first.settings, survivors, passes, seconds)


def black_box_beats_white_box(outcomes: Sequence[AttackOutcome]) -> bool:
    """Whether Square broke more than 0.2 points of all images (AutoAttack's own bound), and at
    least 3 (our choice), that all gradient attacks before it had left."""
    square = [outcome.name for outcome in outcomes].index("square")
    before, after = outcomes[square - 1].survivors, outcomes[square].survivors
    broken = int((before & ~after).sum())
    return broken >= 3 and broken > 0.002 * len(after)


def _rows(outcomes: Sequence[AttackOutcome]) -> list[Row]:
    right, rows = outcomes[0].survivors, []
    for outcome in outcomes[1:]:
        worst = right & outcome.survivors
        rows.append(
            Row(
                outcome.name,
                worst.double().mean().item(),
                int((right & ~worst).sum()),
                outcome.settings,
                outcome.passes,
                outcome.seconds,
            )
        )
        right = worst
    return rows


class _Logits(nn.Module):
    """The logits of a model that returns them alone, first in a tuple, or as `.logits`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        answer = self.model(images)
        answer = getattr(answer, "logits", answer)
        return answer[0] if isinstance(answer, tuple) else answer  # type: ignore[no-any-return]


def _check(model: nn.Module, images: Tensor, labels: Tensor) -> tuple[nn.Module, int]:
    """The model as a map to logits and its number of classes, or the error that says what does not
    fit."""
    require_images(images, labels)
    with evaluating(model), torch.no_grad():
        answer = model(images[:8])
        network = model if isinstance(answer, Tensor) else _Logits(model)
        logits = answer if network is model else network(images[:8])
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images[:8]):
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(f"expected logits (N, K) from the model, got {shape}")
    if not torch.isfinite(logits).all():
        raise ModelError("expected finite logits, got NaN or infinity; the weights are damaged")
    classes = logits.shape[1]
    require_labels(labels, classes)
    return network, classes


def _surrogate(
    name: str, other: nn.Module, images: Tensor, labels: Tensor, classes: int
) -> nn.Module:
    """A model to transfer from, as a map to logits, or the error that says why it cannot be."""
    network, its_classes = _check(other, images, labels)
    if its_classes != classes:
        raise ModelError(
            f"expected a model with {classes} classes to transfer from, got {name} with "
            f"{its_classes}"
        )
    return network


def _per_image(passes: Passes, n: int) -> dict[str, float]:
    return {"forward": round(passes.forward / n, 2), "backward": round(passes.backward / n, 2)}
