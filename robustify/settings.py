"""Settings of the training loop: what the `training:` section of a recipe may say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from robustify.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Training:
    """Settings of the loop; the field names are what a recipe's `training:` section may say.

    Epochs in `decay_at`, `averaging_start` and `awp_start` count from 0; below 1 they are a share
    of `epochs`.
    """

    epochs: int = 30
    batch_size: int = 128  # per process
    optimizer: str = "momentum"  # a name of timm's; "momentum" is SGD without Nesterov
    lr: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 5e-4  # on every parameter, as the field's recipes have it
    schedule: Literal["step", "cosine"] = "step"
    decay_at: tuple[float, ...] = (0.75, 0.9)
    decay_rate: float = 0.1
    warmup_epochs: int = 0
    clip_grad: float | None = None
    accumulate: int = 1
    augmentation: str | None = None  # none, crop or crop-flip; by default the data set's
    averaging: Literal["none", "swa", "ema"] = "none"
    averaging_start: float = 0.75
    ema_decay: float = 0.999
    awp_gamma: float = 0.0  # of `robustify.weight_perturbation`; 0 is none, 0.005 to 0.01 usual
    awp_start: float = 0.05
    select: Literal["robust", "clean"] = "robust"
    evaluate_every: int = 1
    evaluate_from: float = 0.0
    validation_steps: int = 10  # of the PGD that selects checkpoints
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "accumulate", "evaluate_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"expected training.{name} >= 1, got {getattr(self, name)}")
        if not self.lr > 0:
            raise UsageError(f"expected training.lr > 0, got {self.lr}")
        if not self.awp_gamma >= 0:
            raise UsageError(f"expected training.awp_gamma >= 0, got {self.awp_gamma}")
        decays = self.decay_at if self.schedule == "step" else ()
        starts = (self.averaging_start,) if self.averaging == "swa" else ()
        awp = (self.awp_start,) if self.awp_gamma else ()
        for number in (*decays, *starts, *awp):
            if self.epoch(number) >= self.epochs and self.epochs > 1:
                raise UsageError(
                    f"expected decay_at, averaging_start and awp_start within {self.epochs} "
                    f"epochs, got {number:g}; set these of `training` too"
                )

    def epoch(self, number: float) -> int:
        """The epoch that `number` means: itself, or a share of `epochs` if below 1."""
        return int(number * self.epochs) if number < 1 else int(number)
