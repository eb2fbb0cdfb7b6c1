"""Clean and robust accuracy of any model, with the interval and the reasons to believe it."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from robustify.attacks.pgd import survives_pgd
from robustify.errors import DataError, UsageError
from robustify.fold import constant
from robustify.noise import Noise
from robustify.threat import Norm, ThreatModel, format_eps

SCHEMA = 1
SUITES: dict[str, dict[str, Any]] = {"pgd": {"steps": 100, "restarts": 5}}


def wilson(right: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """The 95 % Wilson score interval of `right` out of `n` (Wilson, 1927); (0, 1) for n = 0."""
    if n == 0:
        return 0.0, 1.0
    share, scale = right / n, 1 + z * z / n
    centre = share + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@dataclass(frozen=True)
class Verdict:
    """Whether a robust accuracy may be believed: `reliable`, `suspect` or `not applicable`."""

    status: str
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True)
class Report:
    """What an evaluation found. Accuracies are fractions of all n images; `samples` has one bool
    tensor (n,) per attack, True where the image is still right after it and all before it."""

    norm: str
    eps: float
    suite: str
    seed: int
    n: int
    clean_accuracy: float
    robust_accuracy: float
    verdict: Verdict
    attacks: dict[str, float]
    settings: dict[str, dict[str, Any]]
    samples: dict[str, Tensor] = field(repr=False)
    predictions: Tensor = field(repr=False)
    labels: Tensor = field(repr=False)
    seconds: float = 0.0

    @property
    def interval(self) -> tuple[float, float]:
        """95 % Wilson interval of the robust accuracy."""
        return wilson(round(self.robust_accuracy * self.n), self.n)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the per-image samples, as plain values."""
        clean = round(self.clean_accuracy * self.n)
        return {
            "schema": SCHEMA,
            "threat_model": {"norm": self.norm, "eps": self.eps, "eps_text": format_eps(self.eps)},
            "suite": self.suite,
            "seed": self.seed,
            "n": self.n,
            "clean_accuracy": self.clean_accuracy,
            "clean_interval": wilson(clean, self.n),
            "robust_accuracy": self.robust_accuracy,
            "interval": self.interval,
            "verdict": asdict(self.verdict),
            "attacks": [
                {
                    "name": name,
                    "robust_accuracy": accuracy,
                    "interval": wilson(round(accuracy * self.n), self.n),
                    "settings": self.settings[name],
                }
                for name, accuracy in self.attacks.items()
            ],
            "seconds": round(self.seconds, 2),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)


def evaluate(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    suite: str = "pgd",
    norm: Norm = "Linf",
    eps: float = 8 / 255,
    batch_size: int = 256,
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Report:
    """Clean and robust accuracy of `model` on (N, C, H, W) images in [0, 1] with int64 labels (N,).

    Every attack runs in eval mode and float32, its noise keyed by the image's position, so the
    result does not depend on `batch_size`. `progress` is told how many images are done. Raises
    `UsageError` for an unknown suite, `DataError` for images or labels that do not fit.
    """
    threat = ThreatModel(norm, eps)
    if suite not in SUITES:
        raise UsageError(f"expected a suite of {', '.join(SUITES)}, got {suite!r}")
    _check(images, labels)
    started = time.monotonic()
    settings = SUITES[suite]
    predictions, survivors = [], []
    with torch.random.fork_rng([]):
        for first in range(0, len(images), batch_size):
            batch = images[first : first + batch_size]
            indices = torch.arange(first, first + len(batch), device=batch.device)
            label = labels[first : first + batch_size]
            with constant(model, batch) as victim:
                with torch.no_grad():
                    predictions.append(victim(batch).argmax(1))
                survivors.append(
                    survives_pgd(victim, batch, label, threat, noise=Noise(seed, indices), **settings)
                )
            progress(first + len(batch))
    predicted, survives = torch.cat(predictions), torch.cat(survivors)
    robust = survives.float().mean().item()
    return Report(
        norm=norm,
        eps=eps,
        suite=suite,
        seed=seed,
        n=len(images),
        clean_accuracy=(predicted == labels).float().mean().item(),
        robust_accuracy=robust,
        verdict=Verdict("suspect", ("only PGD on cross-entropy was run: an upper bound",)),
        attacks={"pgd": robust},
        settings={"pgd": {**settings, "step_size": eps / 4, "loss": "ce", "start": "uniform"}},
        samples={"clean": predicted == labels, "pgd": survives},
        predictions=predicted,
        labels=labels,
        seconds=time.monotonic() - started,
    )


def _check(images: Tensor, labels: Tensor) -> None:
    if len(images) == 0:
        raise DataError("expected at least one image, got none")
    if len(images) != len(labels):
        raise DataError(f"expected one label per image, got {len(labels)} for {len(images)}")
    low, high = images.min().item(), images.max().item()
    if low < 0 or high > 1:
        raise DataError(
            f"expected images in [0, 1], got [{low:.3g}, {high:.3g}]; the model normalises itself"
        )
