"""Diagnosis: runs the checks of a level beside a suite and gives the verdict.

    always   F1 F2 F10 to F15         about 25 model passes per image; run with suite pgd too
    quick    and F3 F5 F7             the scale of the logits, black-box attacks, larger eps
    full     and F4 F6 F8 F9          one step, transfer, more steps and restarts, random search

What the suite knows costs nothing and is used at every level: a transfer attack that ran gives F6.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from robustify import checks
from robustify.attacks.passes import Passes
from robustify.attacks.suite import AttackOutcome
from robustify.errors import ModelError, UsageError
from robustify.losses import cross_entropy
from robustify.plausible import Reference, implausible
from robustify.probe import STAY, STEPS, Loss, Model, Probe, scaled
from robustify.threat import ThreatModel
from robustify.verdict import TITLES, Flag, Headline, Verdict, judge, weigh

LEVELS = {
    "always": ("F1", "F2", "F10", "F11", "F12", "F13", "F14", "F15"),
    "quick": ("F1", "F2", "F3", "F5", "F7", "F10", "F11", "F12", "F13", "F14", "F15"),
    "full": tuple(TITLES),
}
CHECK_IMAGES = 1000  # our choice: statistics against cost
_SCALE_FREE = {"ce_scaled", "margin", "dlr"}
_NEED_RIGHT_IMAGES = ("F1", "F2", "F3", "F4", "F7", "F8", "F9", "F13")
_NEED_A_BALL = ("F2", "F3", "F4", "F5", "F6", "F7", "F8", "F9")
_ALONE = ("fgsm", "pgd-ce", "pgd-ce-tempered", "pgd-ce-scaled")  # saw every right image


@dataclass(frozen=True)
class Findings:
    """What `diagnose` found.

    `survivors` (n,) bool on the CPU: right after the suite and the checks' own attacks; the
    headline's robust accuracy is their share. `alone`: accuracy under each naive or rescaled attack
    of the checks, on the images checked, for the side-by-side table. `accuracy_by_eps`: (eps, PGD
    accuracy) on the same images.
    """

    verdict: Verdict
    flags: tuple[Flag, ...]
    headline: Headline
    survivors: Tensor = field(repr=False)
    checked: int
    alone: dict[str, float]
    accuracy_by_eps: tuple[tuple[float, float], ...]
    passes: Passes


def diagnose(
    model: Model,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    *,
    suite: str,
    outcomes: Sequence[AttackOutcome],
    level: str = "quick",
    network: nn.Module | None = None,
    reference: Reference | None = None,
    temperature: float | None = None,
    tiers: Sequence[str] = ("W",),
    preprocessed: bool = False,
    check_images: int = CHECK_IMAGES,
    seed: int = 0,
    batch_size: int = 250,
) -> Findings:
    """Flags and verdict on the `outcomes` of `suite` for `images` (n, C, H, W) with `labels` (n,).

    `model` and `network` are those of `Probe`. The checks' own attacks run on the first
    `check_images` and enter the worst case. `reference` serves F14, `tiers` and `preprocessed` (a
    purifier in front, say) F15, `temperature` F3. Leaves no trace in random
    states or the model. Raises `UsageError` for an unknown level and a network in training mode,
    `ModelError` for fewer than two classes.
    """
    if level not in LEVELS:
        raise UsageError(f"expected checks of {', '.join(LEVELS)}, got {level!r}")
    known = _Known.of(outcomes, labels.cpu())
    m = min(len(labels), check_images)
    probe = Probe(
        model, images[:m], labels[:m].to(images.device), threat, network=network, seed=seed,
        temperature=temperature, alive=known.alive[:m].to(images.device), samples=known.samples,
        steps=STAY if level == "always" else STEPS, batch_size=batch_size,
    )  # fmt: skip
    _require_eval(probe.network)
    measure = _Measurements(probe, known, LEVELS[level])
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices), torch.autocast(images.device.type, enabled=False):
        torch.manual_seed(seed)  # of a randomised model; the checks have their own
        flags = measure.model_flags()
    survivors = known.alive.clone()
    survivors[:m] &= probe.worst.cpu()
    robust, clean = (float(mask.double().mean()) for mask in (survivors, known.clean))
    beaten = measure.suite_against_pgd()
    flags["F14"] = implausible(robust, clean, threat, reference or Reference(), pgd=beaten, n=m)
    flags["F15"] = checks.grey_box(tiers, preprocessed=preprocessed)
    headline = Headline(
        suite, robust, len(labels), threat.eps, known.kinds | measure.kinds, known.samples > 1
    )
    weighed = weigh([flags[name] for name in TITLES], headline)
    return Findings(
        verdict=judge(weighed, headline),
        flags=weighed,
        headline=headline,
        survivors=survivors,
        checked=m,
        alone={n: probe.accuracy(s) for n, s in probe.survivors.items() if n in _ALONE},
        accuracy_by_eps=measure.curve,
        passes=probe.passes,
    )


class _Measurements:
    """The checks of one level on one probe."""

    def __init__(
        self,
        probe: Probe,
        known: _Known,
        wanted: Sequence[str],
    ) -> None:
        self.probe, self.known, self.wanted = probe, known, wanted
        self.curve: tuple[tuple[float, float], ...] = ()
        adapted = not known.kinds or known.kinds & _SCALE_FREE
        self.loss: Loss = scaled if adapted else cross_entropy  # F7, F8: that of the headline set

    @property
    def kinds(self) -> frozenset[str]:
        """What the checks' own attacks add to the headline set."""
        names = {"pgd-ce": "ce", "pgd-ce-scaled": "ce_scaled", "random": "random"}
        return frozenset(kind for name, kind in names.items() if name in self.probe.survivors)

    def model_flags(self) -> dict[str, Flag]:
        """F1 to F13; F9 after all others, on what is then alive."""
        probe = self.probe
        if probe.logits.shape[1] < 2:
            raise ModelError(f"expected at least 2 classes, got {probe.logits.shape[1]}")
        checked: dict[str, Callable[[], Flag]] = {
            "F1": lambda: checks.zero_gradient(probe),
            "F2": lambda: checks.movement(probe),
            "F3": lambda: checks.scale(probe),
            "F4": lambda: checks.one_step(probe),
            "F5": self._black_box,
            "F6": self._transfer,
            "F7": self._ladder,
            "F8": lambda: checks.converged(probe, self.loss),
            "F9": lambda: checks.random_search(probe),
            "F10": lambda: checks.probabilities(probe),
            "F11": lambda: checks.deterministic(probe),
            "F12": lambda: checks.precision(probe),
            "F13": lambda: checks.saturation(probe),
        }
        return {name: self._measured(name, check) for name, check in checked.items()}

    def suite_against_pgd(self) -> tuple[float, float] | None:
        """Accuracy of PGD, plain or rescaled, and of the suite, on the same images."""
        runs = [self.probe.survivors.get(name) for name in ("pgd-ce", "pgd-ce-scaled")]
        found = [self.probe.accuracy(survives) for survives in runs if survives is not None]
        if not found or not self.known.kinds:
            return None
        return min(found), self.probe.accuracy(self.probe.alive)

    def _measured(self, name: str, check: Callable[[], Flag]) -> Flag:
        if name not in self.wanted and not (name == "F6" and self.known.by_transfer is not None):
            return Flag.not_measured(name, "not part of this level")
        if name in _NEED_RIGHT_IMAGES and not bool(self.probe.right.any()):
            return Flag.not_measured(name, "no image is classified right")
        if name in _NEED_A_BALL and self.probe.threat.eps == 0:
            return Flag.not_measured(name, "eps is 0")
        forward, backward = self.probe.passes.forward, self.probe.passes.backward
        flag, after = check(), self.probe.passes
        return replace(flag, forward=after.forward - forward, backward=after.backward - backward)

    def _black_box(self) -> Flag:
        if self.known.by_black_box is None:
            return Flag.not_measured("F5", "no black-box attack ran after a white-box attack")
        return checks.black_box_gain(self.known.by_black_box)

    def _transfer(self) -> Flag:
        if self.known.by_transfer is None:
            return Flag.not_measured("F6", "no other model to transfer from")
        return checks.transfer_gain(self.known.by_transfer)

    def _ladder(self) -> Flag:
        flag, self.curve = checks.ladder(self.probe, self.loss)
        return flag


@dataclass(frozen=True)
class _Known:
    """What the suite's outcomes say. Masks (n,) bool; `by_black_box` and `by_transfer`: broken by
    that attack and by no white-box attack before it, None where there was none."""

    clean: Tensor
    alive: Tensor
    by_black_box: Tensor | None
    by_transfer: Tensor | None
    kinds: frozenset[str]
    samples: int

    @classmethod
    def of(cls, outcomes: Sequence[AttackOutcome], labels: Tensor) -> _Known:
        """Go through the outcomes in the order they ran; the first is that of the clean images."""
        clean = outcomes[0].survivors.cpu()
        alive, kinds = clean.clone(), set[str]()
        broken: dict[str, Tensor] = {}
        for outcome in outcomes[1:]:
            kind = _kind(outcome)
            newly = alive & ~outcome.survivors.cpu()
            if kind in ("square", "transfer") and kinds - {"square", "transfer"}:
                broken[kind] = broken.get(kind, torch.zeros_like(labels, dtype=torch.bool)) | newly
            alive &= ~newly
            kinds.add(kind)
        samples = max([int(outcome.settings.get("samples", 1)) for outcome in outcomes])
        return cls(
            clean, alive, broken.get("square"), broken.get("transfer"), frozenset(kinds), samples
        )


def _kind(outcome: AttackOutcome) -> str:
    """What an attack is to the rules of the verdict: see `Headline.attacks`."""
    name = outcome.name.rpartition(": ")[2]
    if name in ("square", "transfer"):
        return name
    loss = str(outcome.settings.get("loss", ""))
    if loss.startswith("dlr"):
        return "dlr"
    # FAB and C&W minimise a distance subject to, or beside, the margin.
    return loss if loss in ("ce", "ce_scaled") else "margin"


def _require_eval(network: object) -> None:
    if isinstance(network, nn.Module) and any(m.training for m in network.modules()):
        raise UsageError(
            "expected the model in eval mode, got one in training mode; call model.eval()"
        )
