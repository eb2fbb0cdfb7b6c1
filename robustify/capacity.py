"""Capacity: which architectures lie between or above others, by parameter count.

TAKD (Mirzadeh et al., AAAI 2020) descends in capacity and names networks by hand. The rule here is
our choice: the log parameter count of an assistant is the mean of its neighbours'.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import timm
import torch
from torch import nn

from robustify.classifier import Classifier
from robustify.errors import UsageError
from robustify.networks import small_variant

LADDER = (
    "wide_resnet50_2",
    "resnet50",
    "resnet34",
    "resnet26",
    "resnet18",
    "mobilenetv2_140",
    "mobilenetv2_100",
    "resnet110_cifar",
    "resnet56_cifar",
    "resnet32_cifar",
    "resnet20_cifar",
)
"""Architectures to choose from; all take images of 8 pixels and more."""


def parameters(network: nn.Module) -> int:
    """The parameter count of a network."""
    return sum(parameter.numel() for parameter in network.parameters())


@functools.cache
def rungs(num_classes: int) -> dict[str, int]:
    """Architecture -> parameter count, of the small-image variant if there is one; ascending."""
    sizes = {}
    for name in LADDER:
        with torch.device("meta"):
            network = timm.create_model(small_variant(name) or name, num_classes=num_classes)
        sizes[name] = parameters(network)
    return dict(sorted(sizes.items(), key=lambda rung: rung[1]))


def above(size: int, num_classes: int) -> str:
    """The smallest rung with at least twice `size` parameters; the largest where none has."""
    sizes = rungs(num_classes)
    return next((name for name in sizes if sizes[name] >= 2 * size), [*sizes][-1])


def between(larger: int, smaller: int, count: int, num_classes: int) -> list[str]:
    """`count` rungs in descending order that divide the log of the gap between two parameter counts
    most evenly. Raises `UsageError` where there are not so many in between."""
    sizes = {name: n for name, n in rungs(num_classes).items() if smaller < n < larger}
    if not 0 <= count <= len(sizes):
        raise UsageError(
            f"expected a number of assistants that fit between {larger:,} and {smaller:,} "
            f"parameters ({', '.join(sizes) or 'none known'}), got {count}; name them instead"
        )
    left, chosen = dict(sizes), []
    for step in range(1, count + 1):
        wanted = larger * (smaller / larger) ** (step / (count + 1))
        nearest = min(left, key=lambda name: abs(math.log(left[name] / wanted)))
        del left[nearest]
        chosen.append(nearest)
    return sorted(chosen, key=sizes.__getitem__, reverse=True)


def descending(
    larger: Classifier, smaller: Classifier, wanted: int | Sequence[str]
) -> Sequence[str]:
    """The architectures that are `wanted` between two classifiers: as named, or as many of the
    rungs. Raises what `between` raises."""
    if not isinstance(wanted, int):
        return wanted
    ends = (parameters(larger.module), parameters(smaller.module))
    return between(*ends, wanted, smaller.num_classes)
