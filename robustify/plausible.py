"""Plausibility (F14): a robust accuracy better than anything published is a mistake until shown.

Rows are from RobustBench (commit 78fcc9e): CIFAR-10, Linf 8/255, AutoAttack. The gate finds the
absurd, not the wrong: passing it is no evidence.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from robustify.threat import ThreatModel
from robustify.verdict import FEWEST_BROKEN, Flag, Measure, Threshold


@dataclass(frozen=True)
class Row:
    """A published model: accuracies in percent, `size` a key of SIZES."""

    name: str
    size: str
    clean: float
    robust: float
    extra_data: bool = False


ROWS = (
    Row("Wong2020Fast PreActResNet-18", "resnet18", 83.34, 43.21),
    Row("Andriushchenko2020 PreActResNet-18", "resnet18", 79.84, 43.93),
    Row("Addepalli2021 ResNet-18", "resnet18", 80.24, 51.06),
    Row("Addepalli2022 ResNet-18", "resnet18", 85.71, 52.48),
    Row("Rade2021 PreActResNet-18", "resnet18", 86.86, 57.09, extra_data=True),
    Row("Gowal2021 PreActResNet-18", "resnet18", 87.35, 58.50, extra_data=True),
    Row("Zhang2019 (TRADES) WideResNet-34-10", "wrn34_10", 84.92, 53.08),
    Row("Chen2021 (LTD) WideResNet-34-10", "wrn34_10", 85.21, 56.94),
)
SIZES = {  # architecture names, and parameters in millions; a smaller network is held to the gate
    "resnet18": (re.compile(r"resnet_?18|rn18"), (0, 15)),  # of the next larger (our choice)
    "wrn34_10": (re.compile(r"(wrn|wide_?resnet)_?34_10"), (40, 55)),
}
THREAT = ThreatModel("Linf", 8 / 255)
_SAME_EPS = 5e-4  # 0.031 is 8/255 to those who publish

RESNET18_GATE = 0.60  # our choice
ALLOWANCE = 0.03  # our choice: above the best row of the same size and data
GATE = Threshold("above the gate", 0, ">", "points", "our choice")
JUMP = Threshold("jump", 0.03, ">", "points", "our choice")
ABOVE_CLEAN = Threshold("above clean accuracy", 0, ">", "points", "published")  # bookkeeping
SUITE_BEATEN = Threshold("PGD below the suite", 0.005, ">", "points", "our choice")


@dataclass(frozen=True)
class Reference:
    """What the gate needs to know of a model: data set, parameters or architecture name, whether it
    was trained on more images; a `gate` of one's own; the `previous` run of the same recipe."""

    data: str = ""
    parameters: int | None = None
    architecture: str = ""
    extra_data: bool = False
    gate: float | None = None
    previous: float | None = None


def gate(reference: Reference, threat: ThreatModel) -> tuple[float, str] | None:
    """The accuracy above which a result is implausible and what it rests on; None where no row is
    known."""
    if reference.gate is not None:
        return reference.gate, "the gate that was given"
    same_threat = threat.norm == THREAT.norm and abs(threat.eps - THREAT.eps) < _SAME_EPS
    if re.sub(r"[^a-z0-9]", "", reference.data.lower()) != "cifar10" or not same_threat:
        return None
    size = _size(reference)
    rows = [r for r in ROWS if r.size == size and r.extra_data <= reference.extra_data]
    if not rows:
        return None
    best = max(rows, key=lambda row: row.robust)
    basis = f"{best.name} has {best.robust} %"
    if size == "resnet18":
        return RESNET18_GATE, basis
    # A row is no bound for models with more data than it had.
    if reference.extra_data and not best.extra_data:
        return None
    return best.robust / 100 + ALLOWANCE, basis


def implausible(
    robust: float,
    clean: float,
    threat: ThreatModel,
    reference: Reference,
    *,
    pgd: tuple[float, float] | None = None,
    n: int = 0,
) -> Flag:
    """F14: `robust` accuracy above the gate, far above the previous run, or above `clean`; or plain
    PGD beats the suite: `pgd` has the accuracies of both on the same `n` images."""
    measures: list[Measure] = []
    known = gate(reference, threat)
    if known is not None:
        text = f"robust accuracy {robust:.1%} over the gate {known[0]:.1%} ({known[1]})"
        measures.append(GATE.measure(robust - known[0], text))
    if reference.previous is not None:
        text = f"robust accuracy {robust:.1%} over {reference.previous:.1%} of the previous run"
        measures.append(JUMP.measure(robust - reference.previous, text))
    text = f"robust accuracy {robust:.1%} over clean accuracy {clean:.1%}"
    measures.append(ABOVE_CLEAN.measure(robust - clean, text))
    if pgd is not None:
        by_pgd, by_suite = pgd
        text = f"PGD alone leaves {by_pgd:.1%} right, the suite {by_suite:.1%} of the same images"
        measures.append(SUITE_BEATEN.at_least(FEWEST_BROKEN, n).measure(by_suite - by_pgd, text))
    flag = Flag.of("F14", measures)
    return flag if known is not None or flag.raised else _without_row(flag)


def _size(reference: Reference) -> str | None:
    name = re.sub(r"[-\s.]", "_", reference.architecture.lower())
    for size, (pattern, (low, high)) in SIZES.items():
        if reference.parameters is not None:
            if low <= reference.parameters / 1e6 <= high:
                return size
        elif pattern.search(name):
            return size
    return None


def _without_row(flag: Flag) -> Flag:
    return Flag(
        flag.name, flag.title, False, flag.value, flag.threshold,
        f"no reference row; {flag.sentence}", measures=flag.measures,
    )  # fmt: skip
