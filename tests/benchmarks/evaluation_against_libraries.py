"""`standard` beside an implementation that can be installed: torchattacks, or the authors' own.

    OMP_NUM_THREADS=1 python tests/benchmarks/evaluation_against_libraries.py MODEL \\
        --data cifar10 --norm L2 --eps 0.5 --against torchattacks [--record]

Ours are `standard`, the same attacks, and `fast`, which is to find the same with less. All attack
the same images of the same network one after the other in this process. Printed: the robust
accuracy of each, agreement per image, model passes per image, CPU seconds and their ratios.
torchattacks pins old versions of its dependencies: `pip install --no-deps torchattacks` puts it
beside ours. The authors' AutoAttack is imported from a clone named by PYTHONPATH, and is the only
one of the two with an L1 version.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable

import results
import torch
from torch import Tensor, nn

from robustify import data, load
from robustify.attacks.passes import Passes
from robustify.attacks.suite import make_suite, run_suite
from robustify.threat import ThreatModel, parse_eps

BATCH = 250


class Counted(nn.Module):
    """A network that counts the images sent through it and the gradients taken of them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network, self.passes = network, Passes()

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, K); the backward pass counts when it happens."""
        logits: Tensor = self.network(images)
        self.passes.forward += len(images)
        if logits.requires_grad:
            logits.register_hook(self._count)
        return logits

    def _count(self, gradient: Tensor) -> None:
        # FAB takes the gradient of a few classes with the others zero: one pass each, as here.
        self.passes.backward += len(gradient)


def torchattacks(model: nn.Module, threat: ThreatModel, classes: int, seed: int) -> Callable:
    """torchattacks' attacks with AutoAttack's numbers: (images, labels) -> images_adv.

    Its own class `AutoAttack` runs APGD and FAB for 10 steps, not 100, and finds less.
    """
    import torchattacks as library

    shared = {"norm": threat.norm, "eps": threat.eps, "seed": seed}
    return library.MultiAttack(
        [
            library.APGD(model, **shared, steps=100, loss="ce"),
            library.APGDT(model, **shared, steps=100, n_classes=classes),
            library.FAB(model, **shared, steps=100, multi_targeted=True, n_classes=classes),
            library.Square(model, **shared, n_queries=5000),
        ]
    )


def autoattack(model: nn.Module, threat: ThreatModel, classes: int, seed: int) -> Callable:
    """The authors' AutoAttack: (images, labels) -> images_adv."""
    from autoattack import AutoAttack

    attack = AutoAttack(
        model, norm=threat.norm, eps=threat.eps, seed=seed, device="cpu", verbose=False
    )
    return lambda images, labels: attack.run_standard_evaluation(images, labels, bs=BATCH)


AGAINST = {"torchattacks": torchattacks, "autoattack": autoattack}


def main() -> None:
    """Measure both and print one table."""
    parser = results.parser(__doc__)
    parser.add_argument("model")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--norm", default="Linf")
    parser.add_argument("--eps", type=parse_eps, default=8 / 255)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--suite", default="standard,fast", help="ours, one or several")
    parser.add_argument("--against", choices=AGAINST, default="torchattacks")
    arguments = parser.parse_args()
    if importlib.util.find_spec(arguments.against) is None:
        sys.exit(f"nothing to compare with: {arguments.against} is not installed")
    torch.set_num_threads(1)
    threat = ThreatModel(arguments.norm, arguments.eps)
    limit = arguments.limit
    if arguments.quick:
        limit, threat = 2, ThreatModel(arguments.norm, 100 * arguments.eps)  # all fall at once
    test = data.load(arguments.data).test.take(limit)
    images, labels = data.to_float(test.images), test.labels
    model = load(arguments.model).eval()

    name = arguments.against
    theirs, passes, seconds, excess = measure_theirs(
        model, images, labels, threat, AGAINST[name], arguments.seed
    )
    found = [{
        "suite": name, "robust": f"{theirs.float().mean().item():.1%}", "agreement": None,
        "passes": passes, "of theirs": 1.0, "CPU seconds": seconds, "of their seconds": 1.0,
    }]  # fmt: skip
    for suite in ["fast"] if arguments.quick else arguments.suite.split(","):
        ours, own_passes, own_seconds = measure_ours(
            model, images, labels, threat, suite, arguments.seed
        )
        found.append({
            "suite": suite,
            "robust": f"{ours.float().mean().item():.1%}",
            "agreement": f"{(ours == theirs).float().mean().item():.1%}",
            "passes": own_passes,
            "of theirs": own_passes / passes,
            "CPU seconds": own_seconds,
            "of their seconds": own_seconds / seconds,
        })  # fmt: skip
    title = (
        f"Beside {name} with AutoAttack's numbers of steps: {model.architecture}, "
        f"{test_name(arguments.data)}, {threat}, n = {len(images)}, seed {arguments.seed}, one CPU "
        f"thread; passes are model passes per image; its largest step outside the ball {excess:.0e}"
    )
    results.show("evaluation_against_libraries", {title: found}, record=arguments.record)


def test_name(data_name: str) -> str:
    """The data set without the folder that it lies in."""
    return data_name.rstrip("/").rpartition("/")[2]


def measure_ours(
    model: nn.Module, images: Tensor, labels: Tensor, threat: ThreatModel, suite: str, seed: int
) -> tuple[Tensor, float, float]:
    """Who is still right, model passes per image, and CPU seconds."""
    classes = model(images[:1]).shape[1]
    started = time.process_time()
    outcomes = run_suite(
        model,
        images,
        labels,
        suite=make_suite(suite, threat, classes),
        threat=threat,
        batch_size=BATCH,
        seed=seed,
    )
    seconds = time.process_time() - started
    passes = sum((outcome.passes for outcome in outcomes), Passes())
    return outcomes[-1].survivors, passes.total / len(images), seconds


def measure_theirs(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    threat: ThreatModel,
    library: Callable[..., Callable],
    seed: int,
) -> tuple[Tensor, float, float, float]:
    """The same of theirs, and how far outside the ball its images are at most."""
    counted = Counted(model)
    attack = library(counted, threat, model(images[:1]).shape[1], seed)
    started = time.process_time()
    parts = [
        attack(images[i : i + BATCH].clone(), labels[i : i + BATCH].clone())
        for i in range(0, len(images), BATCH)
    ]
    seconds = time.process_time() - started
    with torch.no_grad():
        adversarial = torch.cat(parts)
        right = model(adversarial).argmax(1) == labels
    excess = (threat.distance(adversarial, images) - threat.eps).max().item()
    return right, counted.passes.total / len(images), seconds, excess


if __name__ == "__main__":
    main()
