"""Checks F1 to F15: whether the attacks behind a robust accuracy could have been stronger.

Each takes a `Probe` (a model and images) or what the suite already knows, and returns a `Flag`.
The signs of gradient masking are those of Athalye, Carlini and Wagner (ICML 2018, arXiv 1802.00420)
and of Carlini et al. (arXiv 1902.06705); most thresholds are ours and say so. F14 is in
`robustify.plausible`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from robustify.losses import cross_entropy, logit_scale, margin
from robustify.probe import STEP_SIZE, Loss, Probe, Run, scaled
from robustify.threat import ThreatModel, format_eps, per_image
from robustify.verdict import FEWEST_BROKEN, SCALED_ZERO, Flag, Threshold

ZERO_GRADIENT = Threshold("zero gradient", 0.01, ">", "%", "our choice")
ZERO_WHEN_SCALED = Threshold(SCALED_ZERO, 0.01, ">", "%", "our choice")
NOT_FINITE = Threshold("non-finite gradient", 0, ">", "%", "our choice")
MOVEMENT = Threshold("movement", 0.5, "<", "eps", "our choice")
SCALE_DROP = Threshold("scale drop", 0.02, ">", "points", "our choice")
ONE_STEP_GAIN = Threshold("one-step gain", 0.01, ">", "points", "our choice")
BLACK_BOX_GAIN = Threshold("black-box gain", 0.002, ">", "points", "published")  # AutoAttack's own
TRANSFER_GAIN = Threshold("transfer gain", 0.005, ">", "points", "our choice")
EPS_RISE = Threshold("rise with eps", 0.005, ">", "points", "our choice")
MID_GREY = Threshold("accuracy beyond mid-grey", 0, ">", "points", "our choice")
STEPS_GAIN = Threshold("gain of twice the steps", 0.005, ">", "points", "our choice")
RESTARTS_GAIN = Threshold("gain of more restarts", 0.005, ">", "points", "our choice")
LOSS_GROWTH = Threshold("loss growth", 0, "<=", "", "our choice")
RANDOM_HITS = Threshold("images found at random", 0, ">", "", "published")  # Athalye et al., sign 4
PROBABILITIES = Threshold("rows that are probabilities", 1, ">=", "%", "our choice")
RANDOMNESS = Threshold("difference of two runs", 1e-4, ">", "", "our choice")
AUTOGRAD_CALLS = Threshold("autograd calls in forward", 0, ">", "", "our choice")
LOW_PRECISION = Threshold("16-bit results", 0, ">", "", "our choice")
ATTACKED_LOW = Threshold("attacked in 16 bits", 0, ">", "", "our choice")
MEDIAN_MARGIN = Threshold("median margin", 17, ">", "", "our choice")  # float32 underflow, measured
NO_FULL_ACCESS = Threshold("tiers missing", 0, ">", "", "our choice")

LADDER = (0.5, 1.0, 2.0, 4.0)  # of eps
MID_GREY_EPS = 0.5  # in Linf, a ball of this radius around any image holds the mid-grey one
RESTARTS = 5
SEARCHED = 100  # survivors that random search tries
SAMPLES = 10_000  # of each, a third each of uniform, corner and Gaussian
_ROUND = 100  # samples drawn of an image at once
_SUM_TOLERANCE = 1e-4
_REPEATED = 64  # images that are run twice
_LOW = (torch.float16, torch.bfloat16)
_AUTOGRAD = (torch.autograd.grad, torch.autograd.backward, Tensor.backward)


def zero_gradient(probe: Probe, *, recheck: bool = True) -> Flag:
    """F1: the input gradient of the summed cross-entropy is exactly zero, or not finite.

    Also of z / s: if that is zero too, the model itself gives no gradient. `recheck`: ask again in
    float64 of a copy, which tells an underflow from a flat function.
    """
    rows = probe.right.nonzero().squeeze(1)
    zero, finite = _zero_gradients(probe, rows, cross_entropy)
    flat, _ = _zero_gradients(probe, rows[zero], scaled)
    share, flat_share = int(zero.sum()) / len(rows), int(flat.sum()) / len(rows)
    text = f"images whose gradient of cross-entropy is exactly zero (at z / s {flat_share:.1%}"
    if recheck and int(zero.sum()):
        text += _in_float64(probe, rows[zero], len(rows))
    return Flag.of(
        "F1",
        [
            ZERO_GRADIENT.measure(share, text + ")"),
            ZERO_WHEN_SCALED.measure(flat_share, "images whose gradient is zero at z / s too"),
            NOT_FINITE.measure(
                1 - float(finite.double().mean()), "images whose gradient is not finite"
            ),
        ],
    )


def movement(probe: Probe) -> Flag:
    """F2: a sign attack stays near its own starting point (L2, L1: the distance in that norm)."""
    runs = {"PGD from its random start": probe.naive, "FGSM from the image": probe.one_step}
    eps = max(probe.threat.eps, 1e-12)
    measures = [
        MOVEMENT.measure(
            float(run.moved[probe.right].median()) / eps, f"median distance moved by {name}"
        )
        for name, run in runs.items()
    ]
    return Flag.of("F2", measures)


def scale(probe: Probe) -> Flag:
    """F3: dividing the logits by a temperature or by their scale makes the same attack stronger."""
    naive = probe.accuracy(probe.naive.survives)
    others = {"z / s": probe.scaled, "z / T": probe.tempered}
    measures = []
    for name, run in others.items():
        if run is not None:
            other = probe.accuracy(run.survives)
            text = f"PGD on z leaves {naive:.1%} right, PGD on {name} {other:.1%}"
            measures.append(SCALE_DROP.measure(naive - other, text))
    return Flag.of("F3", measures)


def one_step(probe: Probe) -> Flag:
    """F4: FGSM breaks more images than PGD on the same loss in the same ball."""
    fgsm, pgd = probe.accuracy(probe.one_step.survives), probe.accuracy(probe.naive.survives)
    text = f"FGSM leaves {fgsm:.1%} right, PGD-{probe.steps} {pgd:.1%}"
    threshold = ONE_STEP_GAIN.at_least(FEWEST_BROKEN, len(probe.labels))
    return Flag.of("F4", [threshold.measure(pgd - fgsm, text)])


def black_box_gain(broken: Tensor) -> Flag:
    """F5: Square breaks images that every white-box attack had left. `broken` (n,) bool."""
    gain = float(broken.double().mean())
    text = f"Square breaks {int(broken.sum())} images that all white-box attacks left"
    return Flag.of("F5", [BLACK_BOX_GAIN.at_least(FEWEST_BROKEN, len(broken)).measure(gain, text)])


def transfer_gain(broken: Tensor, sources: str = "other models") -> Flag:
    """F6: images from other models break what no white-box attack did. `broken` (n,) bool."""
    gain = float(broken.double().mean())
    text = f"transfer from {sources} breaks {int(broken.sum())} images that white-box attacks left"
    return Flag.of("F6", [TRANSFER_GAIN.at_least(FEWEST_BROKEN, len(broken)).measure(gain, text)])


def ladder(probe: Probe, loss: Loss = scaled) -> tuple[Flag, tuple[tuple[float, float], ...]]:
    """F7: accuracy that rises with eps, or exceeds the largest class share at Linf 0.5; and the
    accuracy at each eps of the threat model's own norm.

    Every run starts at the images: at a large eps a random start alone reaches chance and would
    hide a dead gradient. The bound is that of Linf whatever the norm: the ball holds one image,
    the mid-grey, that lies in the ball of every other too.
    """
    eps, norm = probe.threat.eps, probe.threat.norm
    radii = {share * eps for share in LADDER}
    if norm == "Linf":
        radii = {min(1.0, radius) for radius in radii} | {MID_GREY_EPS}
    curve = [(r, _accuracy_within(probe, ThreatModel(norm, r), loss)) for r in sorted(radii)]
    at_half = dict(curve).get(MID_GREY_EPS) if norm == "Linf" else None
    if at_half is None:
        at_half = _accuracy_within(probe, ThreatModel("Linf", MID_GREY_EPS), loss)
    share = float(probe.labels.bincount().max()) / len(probe.labels)
    rises = [(later[1] - before[1], before, later) for before, later in pairwise(curve)]
    rise, before, later = max(rises, key=lambda candidate: candidate[0])
    text = " to ".join(f"{accuracy:.1%} at {format_eps(at)}" for at, accuracy in (before, later))
    bound = f"{at_half:.1%} right at Linf 0.5, where {share:.1%}, the largest class, is possible"
    flag = Flag.of(
        "F7", [EPS_RISE.measure(rise, "PGD, " + text), MID_GREY.measure(at_half - share, bound)]
    )
    return flag, tuple(curve)


def converged(probe: Probe, loss: Loss = scaled) -> Flag:
    """F8: twice the steps, or 5 restarts instead of 1, break more of what is alive; or the loss
    does not grow with the steps."""
    run = _first_run(probe, loss)
    left = probe.alive & run.survives
    longer = probe.climb(loss, left, start=run.images_adv).survives
    again = left.clone()
    for restart in range(1, RESTARTS):
        again = probe.climb(loss, again, start=probe.start(restart)).survives
    probe.survivors["pgd-more"] = (longer & again) | ~left
    growth = float((run.loss_last - run.loss_first)[probe.right].mean())
    once, twice, often = (probe.accuracy(survives) for survives in (left, longer, again))
    steps = f"{once:.1%} right after {probe.steps} steps, {twice:.1%} after {2 * probe.steps}"
    restarts = f"{once:.1%} right after 1 run of PGD, {often:.1%} after {RESTARTS}"
    return Flag.of(
        "F8",
        [
            STEPS_GAIN.measure(once - twice, steps),
            RESTARTS_GAIN.measure(once - often, restarts),
            LOSS_GROWTH.measure(growth, "mean loss of PGD at its last step over that at its start"),
        ],
    )


def random_search(probe: Probe, *, samples: int = SAMPLES) -> Flag:
    """F9: an image that every attack left falls to random samples of the ball."""
    rows = probe.worst.nonzero().squeeze(1)[:SEARCHED]
    found = torch.zeros(len(probe.labels), dtype=torch.bool, device=probe.labels.device)
    for number in range(math.ceil(samples / _ROUND)):
        rows = rows[~found[rows]]
        for part in torch.split(rows, max(1, probe.batch_size // _ROUND)):
            found[part] = _falls_at_random(probe, part, number)
    probe.survivors["random"] = ~found
    text = f"images of the first {SEARCHED} survivors that {samples} random samples broke"
    return Flag.of("F9", [RANDOM_HITS.measure(int(found.sum()), text)])


def probabilities(probe: Probe) -> Flag:
    """F10: the outputs are probabilities. Log-probabilities are as good as logits."""
    z = probe.logits
    inside = ((z >= 0) & (z <= 1)).all(1)
    share = float((inside & ((z.sum(1) - 1).abs() < _SUM_TOLERANCE)).double().mean())
    return Flag.of("F10", [PROBABILITIES.measure(share, "outputs in [0, 1] that sum to 1")])


def deterministic(probe: Probe) -> Flag:
    """F11: two identical runs differ, or autograd is called inside forward."""
    images = probe.images[:_REPEATED]
    with torch.random.fork_rng(_devices()), torch.no_grad(), _Watch() as watch:
        first, second = probe.network(images), probe.network(images)
    probe.passes.forward += 2 * len(images)
    difference = float(((first - second).abs() / logit_scale(first)).max())
    return Flag.of(
        "F11",
        [
            RANDOMNESS.measure(difference, "largest difference of two runs, in logit scales"),
            AUTOGRAD_CALLS.measure(watch.autograd_calls / 2, "autograd calls inside forward"),
        ],
    )


def precision(probe: Probe, *, attacked_in: torch.dtype = torch.float32) -> Flag:
    """F12: 16-bit arithmetic in the model, by autocast or weights, or in the attack that the
    survivors survived (`attacked_in`)."""
    with torch.random.fork_rng(_devices()), torch.no_grad(), _Watch() as watch:
        probe.network(probe.images[:1])
    probe.passes.forward += 1
    inside = "functions of the forward pass that return float16 or bfloat16"
    attacked = f"survivors were attacked in {str(attacked_in).removeprefix('torch.')}"
    return Flag.of(
        "F12",
        [
            LOW_PRECISION.measure(watch.low_precision, inside),
            ATTACKED_LOW.measure(attacked_in in _LOW, attacked),
        ],
    )


def saturation(probe: Probe) -> Flag:
    """F13: margins at which a float32 softmax underflows."""
    value = float(-margin(probe.logits, probe.labels)[probe.right].median())
    return Flag.of("F13", [MEDIAN_MARGIN.measure(value, "median margin of the logits")])


def grey_box(tiers: Sequence[str], *, preprocessed: bool) -> Flag:
    """F15: a system with a purifier or other processing in front was never attacked as a whole."""
    missing = preprocessed and "W" not in tiers
    text = f"attacker tiers run: {', '.join(tiers) or 'none'}; exact gradients end to end are W"
    return Flag.of("F15", [NO_FULL_ACCESS.measure(int(missing), text)])


class _Watch(TorchFunctionMode):
    """Sees the functions of torch that are called inside: which differentiate, and which answer in
    16 bits, whatever module, wrapper or autocast they are in."""

    def __init__(self) -> None:
        super().__init__()
        self.autograd_calls = self.low_precision = 0

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        answer = func(*args, **(kwargs or {}))
        self.autograd_calls += func in _AUTOGRAD
        self.low_precision += isinstance(answer, Tensor) and answer.dtype in _LOW
        return answer


def _zero_gradients(probe: Probe, rows: Tensor, loss: Loss) -> tuple[Tensor, Tensor]:
    """(len(rows),) masks: the gradient is exactly zero; it is finite."""
    zero, finite = [], []
    for part in torch.split(rows, probe.batch_size) if len(rows) else ():
        _, _, gradient = probe.gradient(probe.images[part], probe.labels[part], loss)
        zero.append((gradient == 0).flatten(1).all(1))
        finite.append(gradient.isfinite().flatten(1).all(1))
    if not zero:
        return torch.zeros_like(rows, dtype=torch.bool), torch.ones_like(rows, dtype=torch.bool)
    return torch.cat(zero), torch.cat(finite)


def _in_float64(probe: Probe, rows: Tensor, out_of: int) -> str:
    """How many gradients are zero in float64 too, in words; nothing where there is no copy."""
    if not isinstance(probe.network, nn.Module) or not probe.reaches_images:
        return ""
    network = copy.deepcopy(probe.network).double()
    zero = 0
    for part in torch.split(rows, probe.batch_size):
        images = probe.images[part].double().requires_grad_()
        try:
            with torch.enable_grad():
                losses = cross_entropy(network(images), probe.labels[part])
                (gradient,) = torch.autograd.grad(losses.sum(), images)
        except RuntimeError:  # a layer that knows float32 only
            return ", float64 not possible"
        probe.passes.forward += len(part)
        probe.passes.backward += len(part)
        zero += int((gradient == 0).flatten(1).all(1).sum())
    return f", in float64 {zero / out_of:.1%}"


def _accuracy_within(probe: Probe, threat: ThreatModel, loss: Loss) -> float:
    """Accuracy under PGD from the images themselves."""
    run = probe.climb(
        loss, probe.right, threat=threat, start=probe.images, step_size=STEP_SIZE * threat.eps
    )
    if threat.norm == probe.threat.norm and threat.eps <= probe.threat.eps:
        probe.survivors[f"pgd at {format_eps(threat.eps)}"] = run.survives
    return probe.accuracy(run.survives)


def _first_run(probe: Probe, loss: Loss) -> Run:
    if loss is scaled:
        return probe.scaled
    if loss is cross_entropy:
        return probe.naive
    return probe.climb(loss, probe.right, start=probe.start())


def _falls_at_random(probe: Probe, rows: Tensor, number: int) -> Tensor:
    """(len(rows),) bool: one of the samples of round `number` is misclassified. Rounds take turns:
    uniform in the ball, at its corners (L2, L1: on its sphere), Gaussian."""
    images = probe.images[rows].repeat_interleave(_ROUND, 0)
    sample = number * _ROUND + torch.arange(_ROUND, device=rows.device)
    keys = (probe.noise.keys[rows, None] + (sample << 32)).flatten()
    noise, threat = replace(probe.noise, keys=keys).fork(RESTARTS), probe.threat
    if number % 3 == 0:
        points = threat.random_start(images, noise)
    elif number % 3 == 1 and threat.norm == "Linf":
        points = images + threat.eps * (noise.uniform(images) - 0.5).sign()
    else:
        delta = noise.normal(images)
        size = threat.distance(delta, torch.zeros_like(delta))
        spread = threat.eps / 2 if threat.norm == "Linf" else threat.eps / per_image(size, delta)
        points = images + spread * delta
    points = threat.project(points, images)
    wrong = [
        probe.victim.predict(batch) != label
        for batch, label in zip(
            torch.split(points, probe.batch_size),
            torch.split(probe.labels[rows].repeat_interleave(_ROUND), probe.batch_size),
            strict=True,
        )
    ]
    return torch.cat(wrong).view(len(rows), _ROUND).any(1)


def _devices() -> list[int]:
    return list(range(torch.cuda.device_count()))
