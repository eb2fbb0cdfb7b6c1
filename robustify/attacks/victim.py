"""The model under attack: logits and input gradients, counted, the same for any batch size.

CPU kernels choose their summation order by batch size: measured with torch 2.15 on convolutional,
fully connected and BatchNorm networks, an image's logits and gradients change in the last bits when
it shares its batch with fewer than three others, and are bit-identical in every larger batch at
every position. So a batch is padded to a multiple of eight by repeating its last image. Padding is
not work that was asked for and is not counted in `passes`.

For the same reason a batch that memory does not hold may be asked in parts: nothing changes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from robustify.attacks.passes import Passes
from robustify.errors import DataError
from robustify.memory import ROWS, ran_out

log = logging.getLogger(__name__)

LossOfLogits = Callable[[Tensor, Tensor], Tensor]  # logits (n, K), their rows (n,) -> losses (n,)


class Victim:
    """Counts what is asked of `model`, a map from (N, C, H, W) in [0, 1] to logits (N, K).

    A randomised model is sampled `samples` times per question (expectation over transformation,
    Athalye et al., ICML 2018) and answers with the mean.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], *, samples: int = 1) -> None:
        self.model = model
        self.samples = samples
        self.passes = Passes()
        self._most: int | None = None  # images at once, where more ran out of memory

    def logits(self, images: Tensor) -> Tensor:
        """(N, K) logits, without a graph; the mean of the samples."""
        with torch.no_grad():
            return self._mean([self._forward(images) for _ in range(self.samples)])

    def predict(self, images: Tensor) -> Tensor:
        """(N,) predicted classes; of a randomised model, the class most samples vote for."""
        with torch.no_grad():
            votes = [self._forward(images).argmax(1) for _ in range(self.samples)]
        return votes[0] if self.samples == 1 else torch.stack(votes).mode(0).values

    def gradient(
        self, images: Tensor, loss: LossOfLogits, wanted: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits (N, K), losses (N,), and the gradient of the summed losses by `images`.

        Where the mask `wanted` (N,) is False the gradient is zero and not computed.
        """
        rows = torch.arange(len(images), device=images.device)
        if wanted is None or bool(wanted.all()):
            return self._sampled_gradient(images, loss, rows)
        with_gradient, without = rows[wanted], rows[~wanted]
        plain = self.logits(images[without])
        parts = [(without, plain, loss(plain, without), torch.zeros_like(images[without]))]
        if len(with_gradient):
            found = self._sampled_gradient(images[with_gradient], loss, with_gradient)
            parts.append((with_gradient, *found))
        order = torch.cat([part[0] for part in parts]).argsort()
        logits, losses, gradient = (torch.cat([p[i] for p in parts])[order] for i in (1, 2, 3))
        return logits, losses, gradient

    def gradients(
        self, images: Tensor, losses: Sequence[LossOfLogits]
    ) -> tuple[Tensor, list[Tensor]]:
        """Logits, and one gradient per loss from a single forward."""
        rows = torch.arange(len(images), device=images.device)

        def ask(part: slice) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                variable = images[part].detach().clone().requires_grad_()
                logits = self._answer(variable)
                gradients = []
                for loss in losses:
                    summed = loss(logits, rows[part]).sum()
                    gradients.append(torch.autograd.grad(summed, variable, retain_graph=True)[0])
            return logits.detach(), *gradients

        logits, *gradients = self._in_parts(ask, len(images))
        self.passes.forward += len(images)
        self.passes.backward += len(images) * len(losses)
        return logits, gradients

    def _sampled_gradient(
        self, images: Tensor, loss: LossOfLogits, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        found = [self._one_gradient(images, loss, rows) for _ in range(self.samples)]
        logits, losses, gradient = (self._mean([part[i] for part in found]) for i in (0, 1, 2))
        return logits, losses, gradient

    def _one_gradient(
        self, images: Tensor, loss: LossOfLogits, rows: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        def ask(part: slice) -> tuple[Tensor, ...]:
            with torch.enable_grad():
                variable = images[part].detach().clone().requires_grad_()
                logits = self._answer(variable)
                losses = loss(logits, rows[part])
                (gradient,) = torch.autograd.grad(losses.sum(), variable)
            return logits.detach(), losses.detach(), gradient

        logits, losses, gradient = self._in_parts(ask, len(images))
        self.passes.forward += len(images)
        self.passes.backward += len(images)
        return logits, losses, gradient

    def _forward(self, images: Tensor) -> Tensor:
        (logits,) = self._in_parts(lambda part: (self._answer(images[part]),), len(images))
        self.passes.forward += len(images)
        return logits

    def _in_parts(self, ask: Callable[[slice], tuple[Tensor, ...]], count: int) -> list[Tensor]:
        """What `ask` answers for the rows 0 … count - 1: all at once, or in the parts that memory
        holds. Raises what `ask` raises where it does not hold eight."""
        answers: list[tuple[Tensor, ...]] = []
        start = 0
        while start < count or not answers:
            size = min(self._most or count, count - start)
            try:
                answers.append(ask(slice(start, start + size)))
                start += size
                continue
            except (RuntimeError, MemoryError) as error:
                if not ran_out(error) or size <= ROWS:
                    raise
            # Here and not in the handler: until it is left, the error keeps what it ran out with.
            self._most = max(ROWS, size // 2 // ROWS * ROWS)
            log.warning("out of memory with %d images at once; going on with %d", size, self._most)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        if len(answers) == 1:
            return list(answers[0])
        return [torch.cat(each) for each in zip(*answers, strict=True)]

    def _answer(self, images: Tensor) -> Tensor:
        count = len(images)
        missing = -count % ROWS
        if missing:
            images = torch.cat([images, images[-1:].expand(missing, *images.shape[1:])])
        logits: Tensor = self.model(images)
        return logits[:count].float()

    @staticmethod
    def _mean(samples: list[Tensor]) -> Tensor:
        return samples[0] if len(samples) == 1 else torch.stack(samples).mean(0)


def require_images(images: Tensor, labels: Tensor) -> None:
    """Raise `DataError` unless these are (N, C, H, W) images in [0, 1] and (N,) integer labels."""
    if images.dim() != 4 or len(images) == 0:
        raise DataError(f"expected images (N, C, H, W) with N >= 1, got {tuple(images.shape)}")
    if labels.shape != images.shape[:1] or labels.is_floating_point():
        raise DataError(
            f"expected {len(images)} integer labels, one per image, got {labels.dtype} "
            f"{tuple(labels.shape)}"
        )
    if not images.is_floating_point():
        raise DataError(f"expected images of floats in [0, 1], got {images.dtype}; divide by 255")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise DataError(
            f"expected images in [0, 1], got [{low:.3g}, {high:.3g}]; divide by 255 and leave the "
            "normalization to the model"
        )


def require_labels(labels: Tensor, classes: int) -> None:
    """Raise `DataError` unless `labels` are those of a model with so many classes."""
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise DataError(
            f"expected labels from 0 to {classes - 1} for a model with {classes} classes, got "
            f"{int(labels.min())} to {int(labels.max())}"
        )
