"""PGD beside torchattacks and Foolbox: the same attack on the same images, CPU seconds and answers.

    OMP_NUM_THREADS=1 python tests/benchmarks/pgd_against_libraries.py [--record]

PGD-10 and PGD-40 on cross-entropy, Linf, started at the images themselves so that nothing is left
to chance; whichever of the two libraries is installed is measured. `still right` is the share of
the images that keep their label, `agreement` the share on which this verdict is ours. ResNet-20 is
the published CIFAR-10 classifier on its test images, at an eps that leaves some of them right;
without $ROBUSTIFY_SHARED, and for ResNet-18, weights and images are random, and labels are what the
network answers. torchattacks pins old versions of its dependencies: `pip install --no-deps
torchattacks` puts it beside ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import results
import torch
from steps import settle
from timing import least
from torch import Tensor, nn

from robustify import data, load, models
from robustify.attacks.pgd import pgd
from robustify.fold import constant
from robustify.losses import cross_entropy
from robustify.noise import Noise
from robustify.threat import ThreatModel

EPS = {"resnet20_cifar": 0.5, "resnet18": 2.0}  # of 255: about half of the images fall
Attack = Callable[[Tensor, Tensor], Tensor]  # images, labels -> images_adv


def robustify(model: nn.Module, eps: float, steps: int) -> Attack:
    """Ours: what every recipe's inner maximisation is."""

    def attack(images: Tensor, labels: Tensor) -> Tensor:
        with constant(model, images) as still:
            return pgd(
                lambda x: cross_entropy(still(x), labels), images, ThreatModel("Linf", eps),
                steps=steps, step_size=eps / 4, start="images", noise=Noise.for_batch(0, images),
            )  # fmt: skip

    return attack


def torchattacks(model: nn.Module, eps: float, steps: int) -> Attack:
    """torchattacks' PGD."""
    import torchattacks as library

    return library.PGD(model, eps=eps, alpha=eps / 4, steps=steps, random_start=False)


def foolbox(model: nn.Module, eps: float, steps: int) -> Attack:
    """Foolbox' LinfPGD."""
    import foolbox as library

    bounded = library.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = library.attacks.LinfPGD(abs_stepsize=eps / 4, steps=steps, random_start=False)
    return lambda images, labels: attack.run(
        bounded, images, library.criteria.Misclassification(labels), epsilon=eps
    )


LIBRARIES = {"torchattacks": torchattacks, "foolbox": foolbox}


def installed() -> list[str]:
    """Those of the libraries that can be imported."""
    found = []
    for name in LIBRARIES:
        try:
            __import__(name)
        except ImportError:
            continue
        found.append(name)
    return found


def victim(architecture: str, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A classifier in eval mode, images and labels."""
    weights = results.SHARED / "models/cifar10_resnet20_standard.safetensors"
    if architecture == "resnet20_cifar" and weights.is_file():
        test = data.load(str(results.SHARED / "data/cifar10")).test.take(count)
        return load(str(weights)).eval(), data.to_float(test.images), test.labels
    torch.manual_seed(0)
    model = models.create(architecture, num_classes=10, image_size=32).eval()
    images = torch.rand(count, 3, 32, 32)
    settle(model, images)
    with torch.no_grad():
        return model, images, model(images).argmax(1)


def main() -> None:
    """Measure every network and number of steps, and print one table."""
    parser = results.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--images", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    libraries = installed()
    if not libraries:
        sys.exit(f"nothing to compare with: neither of {', '.join(LIBRARIES)} is installed")
    cases = [("resnet20_cifar", 10), ("resnet20_cifar", 40), ("resnet18", 10), ("resnet18", 40)]
    if arguments.quick:
        cases, arguments.images, arguments.repeats = [("resnet20_cifar", 10)], 8, 1
    rows = []
    for architecture, steps in cases:
        count = arguments.images if architecture == "resnet20_cifar" else arguments.images // 4
        repeats = arguments.repeats if architecture == "resnet20_cifar" else arguments.repeats // 2
        rows += measure(architecture, steps, libraries, count, max(repeats, 1))
    title = "PGD, Linf, 32 px, one CPU thread; CPU seconds of one attack on all images"
    results.show("pgd_against_libraries", {title: rows}, record=arguments.record)


def measure(
    architecture: str, steps: int, libraries: list[str], count: int, repeats: int
) -> list[results.Row]:
    """A row for ours and for each library."""
    model, images, labels = victim(architecture, count)
    eps = EPS[architecture] / 255
    attacks = {"robustify": robustify(model, eps, steps)}
    attacks |= {name: LIBRARIES[name](model, eps, steps) for name in libraries}
    right = {}
    for name, attack in attacks.items():
        images_adv = attack(images, labels)
        with torch.no_grad():
            right[name] = model(images_adv).argmax(1) == labels
    sides = {name: lambda attack=attack: attack(images, labels) for name, attack in attacks.items()}
    seconds = least(sides, repeats=repeats)
    return [
        {
            "network": architecture,
            "eps": f"{EPS[architecture]:g}/255",
            "steps": steps,
            "images": count,
            "library": name,
            "CPU seconds": seconds[name],
            "ours is faster by": seconds[name] / seconds["robustify"],
            "still right": f"{right[name].float().mean().item():.1%}",
            "agreement": f"{(right[name] == right['robustify']).float().mean().item():.1%}",
        }
        for name in attacks
    ]


if __name__ == "__main__":
    main()
