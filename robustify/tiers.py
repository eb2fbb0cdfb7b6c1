"""Attacker tiers: a purified model attacked by those who know more and more of it.

    G0   nothing of it, or another network: transfer from a surrogate
    G1   the classifier behind the purifier: grey-box
    G2   everything, with the purifier's gradient replaced by the identity: BPDA
    W    everything: exact gradients end to end; the headline
    Q    the scores only: Square

G0 to G2 are crafted here with PGD on cross-entropy and on the margin (a saturated classifier has no
gradient of cross-entropy) and judged on the full system. W and Q are what a suite left, passed in
as a `Report`. An image counts as right only if it survives every tier: the report's robust accuracy
becomes the per-image worst case, and a grey-box number never stands without the white-box one.
Where G0 to G2 break what no white-box attack did, flag F6 says so and the verdict is made anew.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d

from robustify import checks
from robustify.attacks.passes import Passes
from robustify.attacks.pgd import pgd
from robustify.data import DataSet, to_float
from robustify.evaluation import Report, Row, fitting_batch, wilson
from robustify.fold import constant
from robustify.losses import cross_entropy, margin
from robustify.noise import Noise
from robustify.purifier import Purified
from robustify.threat import ThreatModel
from robustify.verdict import judge, weigh

Network = Callable[[Tensor], Tensor]  # images -> logits, or images -> images

STEPS = 40  # of each PGD; step_size eps/4
_LOSSES = (cross_entropy, margin)


@dataclass(frozen=True)
class Tier:
    """One attacker: `survivors` (n,) are still right on the full system."""

    tier: str
    name: str
    description: str
    survivors: Tensor
    passes: Passes = field(default_factory=Passes)
    seconds: float = 0.0

    def row(self) -> dict[str, Any]:
        """For the report."""
        right, n = int(self.survivors.sum()), len(self.survivors)
        return {
            "tier": self.tier,
            "name": self.name,
            "description": self.description,
            "robust_accuracy": right / n,
            "interval": wilson(right, n),
            "headline": self.tier == "W",
        }


class _Straight(torch.autograd.Function):
    """The second argument, with the gradient of the first."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, purified: Tensor) -> Tensor:
        return purified.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


def bpda(purifier: Network, classifier: Network) -> Network:
    """Logits of the full system whose gradient passes the purifier as if it were the identity
    (Athalye et al., ICML 2018, arXiv 1802.00420)."""

    def logits(images: Tensor) -> Tensor:
        with torch.no_grad():
            purified = purifier(images)
        return classifier(_Straight.apply(images, purified))

    return logits


def survives(
    system: Network,
    known: Network,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    noise: Noise,
    steps: int = STEPS,
) -> tuple[Tensor, Passes]:
    """(N,) bool: `system` is right, also on what PGD on `known` crafts from the image; and how many
    images went through either."""
    passes = Passes(len(images))
    with torch.no_grad():
        right = system(images).argmax(1) == labels
    for number, loss in enumerate(_LOSSES):
        left = right.nonzero().squeeze(1)
        if len(left) == 0:
            break
        images_adv = pgd(
            lambda x, loss=loss, label=labels[left]: loss(known(x), label),  # type: ignore[misc]
            images[left], threat, steps=steps, step_size=threat.eps / 4,
            noise=noise[left].fork(number),
        )  # fmt: skip
        with torch.no_grad():
            right[left] = system(images_adv).argmax(1) == labels[left]
        passes += Passes(len(left) * (steps + 1), len(left) * steps)
    return right, passes


def crafted(
    purified: Purified,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    seed: int = 0,
    batch_size: int = 250,
    steps: int = STEPS,
    surrogate: nn.Module | None = None,
) -> list[Tier]:
    """Tiers G0 (with a `surrogate` in eval mode, images -> logits), G1 and G2; all in eval mode,
    noise keyed by the place of the image."""
    found: dict[str, list[Tensor]] = {}
    passes: dict[str, Passes] = {}
    seconds: dict[str, float] = {}
    purifier, classifier = purified.purifier, purified.classifier
    for first in range(0, len(images), batch_size):
        batch, label = images[first : first + batch_size], labels[first : first + batch_size]
        noise = Noise(seed, torch.arange(first, first + len(batch), device=batch.device))
        with ExitStack() as lent:
            system = lent.enter_context(constant(purified, batch))
            f = lent.enter_context(constant(classifier, batch))
            g = lent.enter_context(constant(purifier, batch))
            known = {"G1": f, "G2": bpda(g, f)}
            if surrogate is not None:
                known["G0"] = lent.enter_context(constant(surrogate, batch))
            for tier, network in known.items():
                started = time.monotonic()
                right, work = survives(
                    system, network, batch, label, threat, noise=noise, steps=steps
                )
                found.setdefault(tier, []).append(right)
                passes[tier] = passes.get(tier, Passes()) + work
                seconds[tier] = seconds.get(tier, 0.0) + time.monotonic() - started
    how = f"PGD-{steps} on cross-entropy and on the margin"
    words = {
        "G0": ("transfer", f"crafted on another network by {how}, judged on the full system"),
        "G1": ("grey-box", f"crafted on the classifier alone by {how}, judged on the full system"),
        "G2": ("BPDA", f"{how}; the purifier's gradient replaced by the identity"),
    }
    return [
        Tier(tier, *words[tier], torch.cat(found[tier]).cpu(), passes[tier], seconds[tier])
        for tier in sorted(found)
    ]


def of_report(report: Report) -> list[Tier]:
    """Tiers W and, where the suite holds Square, Q, from the verdicts of a suite on the full
    system. Square met what the gradient attacks had left, so Q is the worst case of both."""
    names = list(report.samples)
    final = report.samples[names[-1]]
    by_square = torch.zeros_like(final)
    for before, name in pairwise(names):
        if name.endswith("square"):
            by_square |= report.samples[before] & ~report.samples[name]
    white = Tier("W", f"white-box, suite {report.suite}",
                 "exact gradients through purifier and classifier", final | by_square)  # fmt: skip
    if not any(name.endswith("square") for name in names):
        return [white]
    scores = "Square reads the scores only, on what the white-box attacks left"
    return [white, Tier("Q", "Square", scores, final)]


def extend(
    report: Report,
    purified: Purified,
    dataset: DataSet,
    *,
    more: Mapping[str, Any] | None = None,
    batch_size: int | None = None,
    surrogate: nn.Module | None = None,
) -> tuple[Report, dict[str, Any]]:
    """`report` on the full system with the other tiers in its worst case, and `more`, the report's
    optional keys, with: tiers, classifier alone, what the purifier costs, what a reader has to
    know."""
    device = next(purified.parameters()).device
    images, labels, _ = dataset.test.take(report.n).__getitems__(range(report.n))
    images, labels = to_float(images).to(device), labels.to(device)
    batch_size = batch_size or fitting_batch(purified, images)
    made = crafted(purified, images, labels, report.threat, seed=report.seed,
                   batch_size=batch_size, surrogate=surrogate)  # fmt: skip
    tiers = [*made, *of_report(report)]
    white = next(tier.survivors for tier in tiers if tier.tier == "W")
    for tier in made:
        report = _with(report, tier)
    report = _judged(report, white & ~torch.stack([tier.survivors for tier in made]).all(0))
    alone = _clean_accuracy(purified.classifier, images, labels, batch_size)
    missing = {"G0", "G1", "G2", "W", "Q"} - {tier.tier for tier in tiers}
    more = more or {}
    return report, {
        **more,
        "defenses": ["purifier"],
        "tiers": [tier.row() for tier in tiers],
        "before": {"name": purified.classifier.architecture, "clean_accuracy": alone},
        "cost": {**more.get("cost", {}), **cost(purified, images[:batch_size])},
        "notices": [*more.get("notices", ()), *notices(purified, missing)],
    }


def _with(report: Report, tier: Tier) -> Report:
    """The report with one more attack at its end."""
    last = list(report.samples.values())[-1]
    worst = last & tier.survivors
    n = len(worst)
    settings = {"steps": STEPS, "step_size": report.threat.eps / 4, "restarts": 1,
                "losses": [loss.__name__ for loss in _LOSSES], "tier": tier.tier}  # fmt: skip
    broken = int((last & ~worst).sum())
    row = Row(tier.name, int(worst.sum()) / n, broken, settings, tier.passes, tier.seconds)
    return replace(
        report,
        robust_accuracy=row.robust_accuracy,
        rows=[*report.rows, row],
        samples={**report.samples, tier.name: worst},
    )


def _judged(report: Report, broken: Tensor) -> Report:
    """The report with F6 and the verdict that follows, where G0 to G2 broke the images in `broken`
    (n,) that no white-box attack did."""
    findings = report.findings
    found = checks.transfer_gain(broken, "attackers who know less than everything")
    flags = [found if f.name == "F6" and not f.raised else f for f in findings.flags]
    headline = replace(
        findings.headline,
        robust_accuracy=report.robust_accuracy,
        attacks=findings.headline.attacks | {"transfer"},
    )
    weighed = weigh(flags, headline)
    verdict = judge(weighed, headline)
    survivors = list(report.samples.values())[-1]
    findings = replace(
        findings, flags=weighed, verdict=verdict, headline=headline, survivors=survivors
    )
    return replace(report, findings=findings, verdict=verdict)


def notices(purified: Purified, missing: set[str]) -> list[str]:
    """Sentences that whoever reads the numbers of a purified model has to know."""
    said = []
    transferred = purified.about.get("transferred")
    if transferred:
        trained: Mapping[str, Any] = transferred["trained_before"]
        said.append(
            f"Transferred purifier: trained before {trained['id']} (sha256 "
            f"{str(trained['sha256'])[:16]}), put before another classifier. Every number here was "
            "measured on this pair; none is carried over."
        )
    if missing:
        said.append(f"Attacker tiers not run: {', '.join(sorted(missing))}.")
    return said


def cost(purified: Purified, images: Tensor) -> dict[str, Any]:
    """Parameters, time and image fidelity of the purifier on (N, C, H, W) images."""
    purifier, classifier = purified.purifier, purified.classifier
    parameters = [sum(p.numel() for p in part.parameters()) for part in (purifier, classifier)]
    with torch.no_grad():
        seconds = [_seconds(part, images) for part in (purifier, classifier)]
        restored = purifier(images)
    return {
        "purifier_parameters": parameters[0],
        "parameters_over_classifier": round(parameters[0] / parameters[1], 4),
        "latency_over_classifier": round(seconds[0] / max(seconds[1], 1e-9), 3),
        "psnr_db": _finite(psnr(restored, images).mean().item()),
        "ssim": round(ssim(restored, images).mean().item(), 4),
    }


def _seconds(network: nn.Module, images: Tensor) -> float:
    network(images[:1])
    started = time.perf_counter()
    network(images).sum().item()  # waits for the device
    return time.perf_counter() - started


def _finite(decibel: float) -> float | str:
    return round(decibel, 2) if math.isfinite(decibel) else "infinite"


def psnr(a: Tensor, b: Tensor) -> Tensor:
    """(N,) peak signal-to-noise ratio in dB of images in [0, 1]; infinite where they are equal."""
    return -10 * (a - b).square().flatten(1).mean(1).log10()


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """(N,) structural similarity (Wang et al., IEEE TIP 2004), uniform 7x7 windows or the image's
    side where that is smaller, sample covariances, images in [0, 1]."""
    side = min(7, *a.shape[-2:])
    unbiased = side**2 / (side**2 - 1)

    def mean(x: Tensor) -> Tensor:
        pooled: Tensor = avg_pool2d(x, side, stride=1)
        return pooled

    mean_a, mean_b = mean(a), mean(b)
    var_a, var_b = mean(a * a) - mean_a**2, mean(b * b) - mean_b**2
    covariance = unbiased * (mean(a * b) - mean_a * mean_b)
    luminance = (2 * mean_a * mean_b + 1e-4) / (mean_a**2 + mean_b**2 + 1e-4)
    structure = (2 * covariance + 9e-4) / (unbiased * (var_a + var_b) + 9e-4)
    similarity: Tensor = (luminance * structure).flatten(1).mean(1)
    return similarity


def _clean_accuracy(network: nn.Module, images: Tensor, labels: Tensor, batch_size: int) -> float:
    with torch.no_grad():
        predicted = [network(batch).argmax(1) for batch in torch.split(images, batch_size)]
    return (torch.cat(predicted) == labels).float().mean().item()
