"""Which classes a targeted attack tries, and in which order."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from robustify.attacks.engine import Batch
from robustify.attacks.victim import LossOfLogits, Victim
from robustify.losses import margin_targeted

Order = Literal["logits", "malt"]
DUAL = {"Linf": 1, "L2": 2, "L1": torch.inf}  # the norm in which a gradient bounds the change


def other_classes(batch: Batch, count: int) -> Tensor:
    """(N, min(count, K - 1)) classes other than the label, largest logit first."""
    others = batch.logits.scatter(1, batch.labels[:, None], -torch.inf)
    count = min(count, batch.logits.shape[1] - 1)
    return others.topk(count, dim=1).indices


def nearest_classes(victim: Victim, batch: Batch, count: int, *, candidates: int = 9) -> Tensor:
    """(N, count) classes nearest in a linear model of the network, out of the `candidates` with
    the largest logits: smallest (z_y - z_t) / ||grad(z_y - z_t)||, in the dual norm.

    MALT (Melamed, Yehudai and Shamir, ICML 2024), equation 4.
    """
    classes = other_classes(batch, candidates)
    columns = [classes[:, i] for i in range(classes.shape[1])]

    logits, gradients = victim.gradients(
        batch.images, [class_gap(batch.labels, column) for column in columns]
    )
    order = DUAL[batch.threat.norm]
    distance = torch.stack(
        [
            -margin_targeted(logits, batch.labels, column)
            / torch.linalg.vector_norm(gradient.flatten(1), order, dim=1).clamp_min(1e-12)
            for column, gradient in zip(columns, gradients, strict=True)
        ],
        dim=1,
    )
    nearest = distance.argsort(dim=1, stable=True)[:, :count]
    return classes.gather(1, nearest)


def class_gap(labels: Tensor, classes: Tensor) -> LossOfLogits:
    """The loss z_t - z_y of an image's row, for the classes t and labels y of a batch."""
    return lambda logits, rows: margin_targeted(logits, labels[rows], classes[rows])
