"""One attack as a function: images in, adversarial images out."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from robustify.attacks.pgd import pgd
from robustify.attacks.suite import make_suite, run_suite
from robustify.attacks.victim import require_images, require_labels
from robustify.errors import UsageError
from robustify.fold import constant
from robustify.losses import cross_entropy
from robustify.noise import Noise
from robustify.threat import Norm, ThreatModel


def attack(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    name: str = "pgd",
    norm: Norm = "Linf",
    eps: float = 8 / 255,
    steps: int | None = None,
    step_size: float | None = None,
    seed: int = 0,
    batch_size: int = 250,
) -> Tensor:
    """Adversarial images for (N, C, H, W) images in [0, 1] and labels (N,), in the threat model.

    `pgd` climbs cross-entropy for `steps` (40) of `step_size` (eps/4) on every image. Any
    other name that `suite` knows (`apgd-t`, `square`, `standard`, …) runs with its own settings and
    stops at the first image that is misclassified; an image that withstands it is returned as it
    was. `model` gives logits (N, K); its mode and gradients are left as they were.
    Raises `DataError` for images or labels that do not fit, `UsageError` for an unknown attack.
    """
    if name != "pgd" and not (steps is None and step_size is None):
        raise UsageError(f"expected no steps or step_size for {name}, which has its own")
    require_images(images, labels)
    threat = ThreatModel(norm, eps)
    with constant(model, images[:8]) as victim:
        with torch.no_grad():
            classes = victim(images[:1]).shape[1]
        require_labels(labels, classes)
        if name == "pgd":
            noise = Noise.for_batch(seed, images)
            parts = []
            for rows in torch.arange(len(images)).split(batch_size):  # type: ignore[no-untyped-call]
                label = labels[rows]
                parts.append(
                    pgd(
                        lambda x, label=label: cross_entropy(victim(x), label),  # type: ignore[misc]
                        images[rows],
                        threat,
                        steps=40 if steps is None else steps,
                        step_size=eps / 4 if step_size is None else step_size,
                        noise=noise[rows],
                    )
                )
            return torch.cat(parts)
        images_adv = images.clone()

        def keep(attack_name: str, index: int, right: bool, image_adv: Tensor | None) -> None:
            if image_adv is not None:
                images_adv[index] = image_adv

        run_suite(
            victim, images, labels, suite=make_suite(name, threat, classes), threat=threat,
            batch_size=batch_size, seed=seed, decided=keep,
        )  # fmt: skip
    return images_adv
