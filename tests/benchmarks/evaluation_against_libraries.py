"""`standard` beside an implementation that can be installed: torchattacks, or the authors' own.

    OMP_NUM_THREADS=1 python tests/benchmarks/evaluation_against_libraries.py MODEL \\
        --data cifar10 --norm L2 --eps 0.5 --against torchattacks

Both attack the same images of the same network one after the other in this process. Printed: the
robust accuracy of each, agreement per image, model passes per image, CPU seconds and their ratios.
torchattacks pins old versions of its dependencies: `pip install --no-deps torchattacks` puts it
beside ours. The authors' AutoAttack is imported from a clone named by PYTHONPATH, and is the only
one of the two with an L1 version.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from tabulate import tabulate
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", default="digits")
    parser.add_argument("--norm", default="Linf")
    parser.add_argument("--eps", type=parse_eps, default=8 / 255)
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--against", choices=AGAINST, default="torchattacks")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    threat = ThreatModel(arguments.norm, arguments.eps)
    test = data.load(arguments.data).test.take(arguments.limit)
    images, labels = data.to_float(test.images), test.labels
    model = load(arguments.model).eval()
    classes = model(images[:1]).shape[1]

    started = time.process_time()
    outcomes = run_suite(
        model,
        images,
        labels,
        suite=make_suite("standard", threat, classes),
        threat=threat,
        batch_size=BATCH,
        seed=arguments.seed,
    )
    our_seconds = time.process_time() - started
    ours = outcomes[-1].survivors
    our_passes = sum((outcome.passes for outcome in outcomes), Passes())

    counted = Counted(model)
    attack = AGAINST[arguments.against](counted, threat, classes, arguments.seed)
    started = time.process_time()
    parts = [
        attack(images[i : i + BATCH].clone(), labels[i : i + BATCH].clone())
        for i in range(0, len(images), BATCH)
    ]
    their_seconds = time.process_time() - started
    with torch.no_grad():
        adversarial = torch.cat(parts)
        theirs = model(adversarial).argmax(1) == labels
    excess = (threat.distance(adversarial, images) - threat.eps).max().item()

    n = len(images)
    rows = [
        ["robustify", 100 * ours.float().mean().item(), our_passes.total / n, our_seconds],
        [
            arguments.against,
            100 * theirs.float().mean().item(),
            counted.passes.total / n,
            their_seconds,
        ],
    ]
    print(
        f"{arguments.model}, {arguments.norm} eps {arguments.eps:.4f}, n = {n}, "
        f"seed {arguments.seed}"
    )
    print("after", {o.name: round(100 * o.survivors.float().mean().item(), 1) for o in outcomes})
    headers = ["", "robust accuracy %", "passes per image", "CPU seconds"]
    print(tabulate(rows, headers=headers, floatfmt=".1f"))
    print(
        f"agreement {(ours == theirs).float().mean().item():.3f}; "
        f"passes {our_passes.total / counted.passes.total:.3f}, "
        f"CPU seconds {our_seconds / their_seconds:.3f} of theirs; "
        f"their largest step outside the ball {excess:.1e}",
        flush=True,
    )


if __name__ == "__main__":
    main()
