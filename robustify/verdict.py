"""Verdict: from what the checks measured to whether a robust accuracy may be believed.

    Threshold.measure(value, text) -> Measure      one number against its threshold
    Flag.of("F3", measures)        -> Flag         raised if any of its measures is
    judge(flags, headline)         -> Verdict      reliable, suspect or not applicable

A robust accuracy is an upper bound: a broken image is a fact, a robust one is only not broken yet.
So every flag says that some attack was too weak, and the verdict whether that matters to the
headline, the accuracy on the worst case over all attacks. Flags keep numbers and thresholds: a
recorded report is judged again, under other thresholds, without running an attack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Source = Literal["published", "our choice"]
Relation = Literal[">", ">=", "<", "<="]
Unit = Literal["%", "points", "eps", ""]

TITLES = {
    "F1": "zero gradient",
    "F2": "attack did not move",
    "F3": "scale",
    "F4": "one step beats many",
    "F5": "black-box beats white-box",
    "F6": "transfer beats white-box",
    "F7": "eps",
    "F8": "not converged",
    "F9": "random search",
    "F10": "probabilities",
    "F11": "random or dynamic",
    "F12": "precision",
    "F13": "saturation",
    "F14": "implausible",
    "F15": "grey-box only",
}
NAIVE = ("F1", "F2", "F3", "F4")  # describe attacks that a masked model is known to defeat
ADAPTIVE = ("F5", "F6", "F7", "F8", "F9")  # describe the attacks behind the headline
NEVER_SUSPECT = ("F11", "F13")  # F11 makes a verdict impossible; F13 alone is a warning
COMPLETE_SUITES = ("fast", "standard", "plus", "rand")  # a headline needs one of them

FEWEST_BROKEN = 3  # our choice: F4 to F6 and F14 are not raised by one or two images
FEWEST_IMAGES = 100  # our choice: below, one image is more than a point
NOTHING_LEFT = 0.01  # our choice: a robust accuracy that cannot be much of an overestimate

UNRELIABLE = "robustness estimate unreliable: upper bound only"
MASKS = "this model masks gradients"
_WORDS = {">": "more than", ">=": "at least", "<": "less than", "<=": "at most"}
SCALED_ZERO = "zero gradient at z / s"  # the measure of F1 that rule 5 asks for


@dataclass(frozen=True)
class Measure:
    """One number, the threshold it was held against, and what was compared, in words."""

    name: str
    value: float
    text: str
    threshold: float
    relation: Relation
    unit: Unit
    source: Source

    @property
    def raised(self) -> bool:
        """Whether the number stands in `relation` to the threshold."""
        return {
            ">": self.value > self.threshold,
            ">=": self.value >= self.threshold,
            "<": self.value < self.threshold,
            "<=": self.value <= self.threshold,
        }[self.relation]

    @property
    def sentence(self) -> str:
        """What was compared, the number and the threshold."""
        value, threshold = (_text(number, self.unit) for number in (self.value, self.threshold))
        return (
            f"{self.text}: {value}; {_WORDS[self.relation]} {threshold} is a flag ({self.source})"
        )


@dataclass(frozen=True)
class Threshold:
    """When a measure raises its flag, and where the number comes from."""

    name: str
    value: float
    relation: Relation
    unit: Unit
    source: Source

    def measure(self, value: float, text: str) -> Measure:
        """`value` held against this threshold, without the rounding of differences of shares."""
        number = round(float(value), 9)
        return Measure(self.name, number, text, self.value, self.relation, self.unit, self.source)

    def at_least(self, images: int, n: int) -> Threshold:
        """Out of reach for a share of fewer than `images` of `n` images."""
        return replace(self, value=max(self.value, (images - 0.5) / max(1, n)))


@dataclass(frozen=True)
class Flag:
    """One check; `raised` is None where it was not run. `value`, `threshold` and `sentence` are
    those of the measures that raised it, or of its first; `counts`: whether the verdict hangs on it
    (`weigh`); passes are the images it sent forward and backward."""

    name: str
    title: str
    raised: bool | None
    value: float | None
    threshold: float | None
    sentence: str
    counts: bool = True
    measures: tuple[Measure, ...] = ()
    forward: int = 0
    backward: int = 0

    @classmethod
    def of(cls, name: str, measures: Sequence[Measure]) -> Flag:
        """The flag called `name`, raised if any of `measures` is."""
        first = [measure for measure in measures if measure.raised] or list(measures[:1])
        return cls(
            name,
            TITLES[name],
            raised=first[0].raised,
            value=first[0].value,
            threshold=first[0].threshold,
            sentence="; ".join(measure.sentence for measure in first),
            measures=tuple(measures),
        )

    @classmethod
    def not_measured(cls, name: str, why: str) -> Flag:
        """The flag called `name`, which was not run."""
        return cls(name, TITLES[name], None, None, None, f"not measured: {why}")


@dataclass(frozen=True)
class Headline:
    """What a robust accuracy rests on.

    `attacks`: the kinds that entered the worst case, of `ce`, `ce_scaled` (cross-entropy of
    z / s), `margin`, `dlr`, `square`, `transfer`, `random`. `averaged`: gradients of a randomised
    model were averaged over samples.
    """

    suite: str
    robust_accuracy: float
    n: int
    eps: float
    attacks: frozenset[str]
    averaged: bool = False


@dataclass(frozen=True)
class Verdict:
    """Whether a robust accuracy may be believed: `reliable`, `suspect` or `not applicable`.

    `reasons` decided it; `notes` are what a reader should know besides; `title` is the line for
    the head of a report, empty where there is nothing to warn of.
    """

    status: str
    reasons: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    title: str = ""


def judge(flags: Sequence[Flag], headline: Headline) -> Verdict:
    """The verdict on `headline`, by the first rule that applies:

    1. not applicable, where something needed to judge at all is missing;
    2. an incomplete suite, plain PGD among them, is never reliable;
    3. at most 1 % robust is reliable whatever is raised: every broken image is a fact;
    4. any flag that counts (`weigh`) makes it suspect;
    5. reliable otherwise.
    """
    weighed = weigh(flags, headline)
    notes = _notes(weighed)
    missing = _missing(weighed, headline)
    if missing:
        return Verdict("not applicable", missing, notes)
    reasons = tuple(_named(flag) for flag in weighed if flag.raised and flag.counts)
    if headline.suite not in COMPLETE_SUITES:
        needed = f"only {headline.suite} was run, and a headline needs one of the suites "
        return Verdict(
            "suspect", (needed + ", ".join(COMPLETE_SUITES), *reasons), notes, UNRELIABLE
        )
    if headline.robust_accuracy <= NOTHING_LEFT:
        masks = any(flag.raised for flag in weighed if flag.name in NAIVE + ADAPTIVE)
        reason = (
            f"robust accuracy {headline.robust_accuracy:.1%} is at most {NOTHING_LEFT:.0%} "
            "(our choice): every broken image is verified and nothing is left to overestimate"
        )
        return Verdict("reliable", (reason,), (*reasons, *notes), MASKS if masks else "")
    if reasons:
        return Verdict("suspect", reasons, notes, UNRELIABLE)
    silent = ", ".join(flag.name for flag in weighed if flag.raised is False)
    return Verdict("reliable", (f"no flag counts against it; silent are {silent}",), notes)


def weigh(flags: Sequence[Flag], headline: Headline) -> tuple[Flag, ...]:
    """The flags with `counts` set.

    F1 to F4 describe naive attacks. They do not count where the headline set holds cross-entropy
    of z / s, a margin or DLR attack, and Square, and F5 to F9 are silent against that set. F1
    counts always if the gradient is zero at z / s too. F11 and F13 never make a result suspect.
    """
    by_name = {flag.name: flag for flag in flags}
    silent = not any(flag.raised for flag in flags if flag.name in ADAPTIVE)
    judged = all(name in by_name and by_name[name].raised is not None for name in ("F5", "F7"))
    adapted = {"ce_scaled", "square"} <= headline.attacks and headline.attacks & {"margin", "dlr"}
    excused = bool(silent and judged and adapted)

    def counts(flag: Flag) -> bool:
        if flag.name == "F1" and _zero_when_scaled(flag):
            return True
        return flag.name not in NEVER_SUSPECT and not (excused and flag.name in NAIVE)

    return tuple(replace(flag, counts=counts(flag)) for flag in flags)


def _missing(flags: Sequence[Flag], headline: Headline) -> tuple[str, ...]:
    """What keeps the headline from being judged."""
    missing = []
    for flag in flags:
        if flag.name == "F11" and flag.raised and not headline.averaged:
            missing.append(f"{_named(flag)}; attack the average over samples, with suite rand")
        if flag.name == "F1" and _blind(flag) and "square" not in headline.attacks:
            missing.append(
                "the model gives no input gradient and no black-box attack was run; add square"
            )
    if headline.n < FEWEST_IMAGES:
        missing.append(
            f"expected at least {FEWEST_IMAGES} images (our choice), got {headline.n}; one image "
            f"is {100 / max(1, headline.n):.1f} points"
        )
    if headline.eps == 0:
        missing.append("eps is 0: nothing was attacked")
    return tuple(missing)


def _notes(flags: Sequence[Flag]) -> tuple[str, ...]:
    """Flags that are raised and do not count, warnings, and what was not measured."""
    naive = [flag for flag in flags if flag.raised and not flag.counts and flag.name in NAIVE]
    notes = [f"naive attacks fail on this model, adaptive ones do not: {_named(f)}" for f in naive]
    notes += [_named(flag) for flag in flags if flag.raised and flag.name == "F13"]
    unmeasured = [flag.name for flag in flags if flag.raised is None]
    if unmeasured:
        notes.append("not measured: " + ", ".join(unmeasured))
    return tuple(notes)


def _named(flag: Flag) -> str:
    return f"{flag.name} {flag.title}: {flag.sentence}"


def _scaled_zero(flag: Flag) -> Measure | None:
    return next((measure for measure in flag.measures if measure.name == SCALED_ZERO), None)


def _zero_when_scaled(flag: Flag) -> bool:
    measure = _scaled_zero(flag)
    return measure is not None and measure.raised


def _blind(flag: Flag) -> bool:
    """Whether no image has a gradient, whatever the scale."""
    measure = _scaled_zero(flag)
    return measure is not None and measure.value >= 1


def _text(number: float, unit: Unit) -> str:
    if unit in ("%", "points"):
        return f"{100 * number:.4g} {unit}"
    return f"{number:.3g} {unit}".rstrip()
