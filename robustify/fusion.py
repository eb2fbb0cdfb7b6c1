"""Several teachers' logits as one target, image by image: rectify, weigh, fuse, gate.

    R(z, y)   z with the entries at argmax z and at y exchanged                    rectification
    w_k       (1 - softmax_k(l)) / (K - 1), or softmax_k(-l / T_w);  l_k = CE(z_k, y)    weights
    q         sum_k w_k p_T(z_k)                                                     fused target
    v_k       g_k w_k / sum_j g_j w_j,  g_k = 1 where teacher k is right, else 0    gated weights

R is the dynamic rectification of DRKD (Amik et al., arXiv 2201.11319), w the weighting of CA-MKD
(Zhang et al., ICASSP 2022, arXiv 2201.00007). Exchanging logits is exchanging probabilities, at any
temperature: the probability shift of Wen et al. (arXiv 1911.07471) is R too. K teachers' logits are
one tensor (K, N, C), their weights (K, N).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from robustify.frozen import Frozen
from robustify.losses import cross_entropy


def rectify(logits: Tensor, labels: Tensor) -> Tensor:
    """R: (…, N, C) logits whose largest entry is at the label; a new tensor.

    A teacher that is right is returned as it is. Entropy and confidence never change.
    """
    largest = logits.argmax(-1, keepdim=True)
    label = labels.expand(logits.shape[:-1]).unsqueeze(-1)
    lowered = logits.scatter(-1, largest, logits.gather(-1, label))
    return lowered.scatter(-1, label, logits.gather(-1, largest))


def fusion_weights(logits: Tensor, labels: Tensor, *, temperature: float | None = None) -> Tensor:
    """w: (K, N), adding up to 1 over teachers, without gradient.

    Without `temperature` CA-MKD's rule, in which no teacher gets more than 1 / (K - 1): it leaves
    out the bad ones and chooses no best one. With it, softmax(-l / temperature).
    """
    losses = torch.stack([cross_entropy(z, labels) for z in logits.detach()])
    if temperature is not None:
        return (-losses / temperature).softmax(0)
    if len(losses) == 1:
        return torch.ones_like(losses)
    return (1 - losses.softmax(0)) / (len(losses) - 1)


def fuse(probabilities: Tensor, weights: Tensor) -> Tensor:
    """q: (N, C) from probabilities (K, N, C) and weights (K, N).

    One KL to q has the gradients of the weighted sum of K, since they differ by a constant.
    """
    return (weights.unsqueeze(-1) * probabilities).sum(0)


def gated(weights: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """v: (K, N) `weights` of the teachers that are right, made to add up to 1 again; all zero for
    an image on which none is."""
    kept = weights * (logits.argmax(-1) == labels)
    return kept / kept.sum(0).clamp_min(1e-12)


def trust(logits: Tensor, labels: Tensor, *, exponent: float = 0.1) -> Tensor:
    """p(z)_y ** exponent: (…, N) for teachers' logits (…, N, C), how far IAD believes them (Zhu et
    al., ICLR 2022, arXiv 2106.04928); its exponent is 0.1. A constant: it has no gradient."""
    label = labels.expand(logits.shape[:-1]).unsqueeze(-1)
    return (exponent * logits.detach().log_softmax(-1).gather(-1, label).squeeze(-1)).exp()


def weight_entropy(weights: Tensor) -> Tensor:
    """(N,) entropy in nats: log K where all K teachers count the same, 0 where one alone does."""
    return -torch.xlogy(weights, weights).sum(0)


def numbered(name: str, values: Tensor) -> dict[str, Tensor]:
    """The means over N of (K, N) `values` by `name`, in which the teacher's number is put."""
    return {name.format(k): mean for k, mean in enumerate(values.mean(1), 1)}


class Reading(NamedTuple):
    """What K teachers say about N images and how much each counts: (K, N, C) and (K, N)."""

    logits: Tensor
    weights: Tensor

    def wrong(self, labels: Tensor) -> Tensor:
        """(K, N): which teachers are wrong, which is where rectification changes something."""
        return self.logits.argmax(-1) != labels


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """How teachers become one target. The weights are judged on the logits as they are (`raw`),
    because once rectified a teacher that is wrong and sure of it looks best."""

    rectification: Literal["swap", "partial_trust", "none"]
    weights_from: Literal["raw", "rectified", "uniform"]
    weight_temperature: float | None

    def read(self, logits: Tensor, labels: Tensor) -> Reading:
        """The weights that belong to (K, N, C) logits; both without gradient."""
        if self.weights_from == "uniform":
            weights = torch.full_like(logits[..., 0], 1 / len(logits))
        else:
            judged = rectify(logits, labels) if self.weights_from == "rectified" else logits
            weights = fusion_weights(judged, labels, temperature=self.weight_temperature)
        return Reading(logits.detach(), weights.detach())

    def terms(self, read: Reading, labels: Tensor, view: str) -> dict[str, Tensor]:
        """To log: the share of teachers' answers that are rectified, where each teacher is wrong,
        and the weights."""
        wrong = read.wrong(labels).float()
        rectified = wrong.mean() if self.rectification == "swap" else wrong.new_zeros(())
        rows = {f"rectified, {view}": rectified}
        rows |= numbered("teacher {} wrong, " + view, wrong)
        rows |= numbered("weight {}, " + view, read.weights)
        return rows | {f"weight entropy, {view}": weight_entropy(read.weights).mean()}

    def target(
        self, read: Reading, labels: Tensor, temperature: float, *, own: Tensor | None = None
    ) -> Tensor:
        """q: (N, C) probabilities. Where a teacher is trusted in part, the rest is `own`: the
        student's logits (N, C) of the unperturbed images; without them it is trusted fully."""
        swapped = self.rectification == "swap"
        logits = rectify(read.logits, labels) if swapped else read.logits
        probabilities = (logits / temperature).softmax(-1)
        if own is not None and self.rectification == "partial_trust":
            belief = trust(read.logits, labels).unsqueeze(-1)
            probabilities = belief * probabilities + (1 - belief) * (own / temperature).softmax(-1)
        return fuse(probabilities, read.weights)


class Panel(nn.Module):
    """K frozen teachers that read the same images."""

    def __init__(self, teachers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(Frozen(teacher) for teacher in teachers)

    def forward(self, images: Tensor) -> Tensor:
        """(K, N, C) logits; gradient reaches the images alone."""
        return torch.stack([member(images) for member in self.members])

    @torch.no_grad()
    def features(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        """(K, N, C) logits and K last feature maps, from one forward each and without gradient."""
        both = [member.network.features(images) for member in self.members]  # type: ignore[operator, union-attr]
        return torch.stack([logits for logits, _ in both]), [maps for _, maps in both]
