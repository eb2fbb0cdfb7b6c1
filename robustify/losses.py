"""Losses of logits: one value per image, no reduction, no state.

Every function takes logits (N, K) and returns (N,). KL is summed over classes. Whoever wants a
batch mean or a weight writes it beside the call, where the formula can be read.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log softmax(logits)[label]."""
    return F.cross_entropy(logits, labels, reduction="none")


def soft_cross_entropy(target: Tensor, logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """-sum_c target_c log p_T(logits)_c, for probabilities `target` (N, K); no factor T²."""
    return -(target * F.log_softmax(logits / temperature, dim=1)).sum(1)


def kl(target: Tensor, logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(p_T(target) ‖ p_T(logits)) of two sets of LOGITS, p_T(z) = softmax(z / T).

    Gradient reaches both arguments; detach what should not have it. No factor T²: weights in
    recipes are effective weights, which contain it.
    """
    log_p = F.log_softmax(target / temperature, dim=1)
    log_q = F.log_softmax(logits / temperature, dim=1)
    return (log_p.exp() * (log_p - log_q)).sum(1)


def kl_from_probabilities(target: Tensor, logits: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(target ‖ p_T(logits)) for PROBABILITIES `target` (N, K), which may hold zeros."""
    log_q = F.log_softmax(logits / temperature, dim=1)
    return (torch.xlogy(target, target) - target * log_q).sum(1)


def margin(logits: Tensor, labels: Tensor) -> Tensor:
    """max_{j != y} z_j - z_y: positive where the image is misclassified."""
    others = logits.scatter(1, labels[:, None], -torch.inf)
    return others.amax(1) - _of(logits, labels)


def dlr(logits: Tensor, labels: Tensor) -> Tensor:
    """Difference of logits ratio (Croce and Hein, ICML 2020, equation 6); needs K >= 3.

    (max_{j != y} z_j - z_y) / (z_(1) - z_(3)), z_(i) the i-th largest logit.
    """
    top = logits.topk(3, dim=1).values
    return margin(logits, labels) / (top[:, 0] - top[:, 2] + 1e-12)


def dlr_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """Targeted DLR (Croce and Hein, ICML 2020, equation 7); needs K >= 4.

    (z_t - z_y) / (z_(1) - (z_(3) + z_(4)) / 2), for the target class t of each image.
    """
    top = logits.topk(4, dim=1).values
    gap = _of(logits, targets) - _of(logits, labels)
    return gap / (top[:, 0] - (top[:, 2] + top[:, 3]) / 2 + 1e-12)


def margin_targeted(logits: Tensor, labels: Tensor, targets: Tensor) -> Tensor:
    """z_t - z_y: what stands in for targeted DLR below 4 classes."""
    return _of(logits, targets) - _of(logits, labels)


def logit_scale(logits: Tensor) -> Tensor:
    """(N, 1) mean_k |z_k - mean z|, detached: dividing logits by it makes any loss scale-free."""
    centred = logits.detach() - logits.detach().mean(1, keepdim=True)
    return centred.abs().mean(1, keepdim=True).clamp_min(1e-30)


def _of(logits: Tensor, classes: Tensor) -> Tensor:
    """(N,) the logit of one class per image."""
    return logits.gather(1, classes[:, None]).squeeze(1)
