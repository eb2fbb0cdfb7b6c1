"""Settings of the training loop: what the `training:` section of a recipe may say."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

from robustify.errors import UsageError, suggest

# What numbers may be: name -> (least, most); the second table leaves its bounds out.
_BOUNDS = {
    "epochs": (1, math.inf), "batch_size": (1, math.inf), "accumulate": (1, math.inf),
    "evaluate_every": (1, math.inf), "evaluate_from": (0, math.inf),
    "warmup_epochs": (0, math.inf), "validation_steps": (0, math.inf),
    "momentum": (0, 1), "weight_decay": (0, math.inf), "decay_at": (0, math.inf),
    "decay_rate": (0, math.inf), "averaging_start": (0, math.inf), "ema_decay": (0, 1),
    "awp_gamma": (0, math.inf), "awp_start": (0, math.inf), "checkpoint_seconds": (0, math.inf),
}  # fmt: skip
_ABOVE = {"lr": 0, "clip_grad": 0}


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
    grad_checkpointing: bool = False  # of training forwards, not of the attack's: less memory
    augmentation: Literal["none", "crop", "crop-flip"] | None = None  # by default the data set's
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
        for name, annotation in get_type_hints(Training).items():
            _require_choice(name, getattr(self, name), annotation)
        for name, (least, most) in _BOUNDS.items():
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if not (math.isfinite(number) and least <= number <= most):
                    bound = f" and <= {most}" if math.isfinite(most) else ""
                    raise UsageError(f"expected training.{name} >= {least}{bound}, got {number}")
        for name, least in _ABOVE.items():
            number = getattr(self, name)
            if number is not None and not (math.isfinite(number) and number > least):
                raise UsageError(f"expected training.{name} > {least}, got {number}")
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


def _require_choice(name: str, value: Any, annotation: Any) -> None:
    """Raise `UsageError` for a value that is none of a Literal's."""
    options = get_args(annotation) if get_origin(annotation) is not Literal else (annotation,)
    choices = [choice for o in options if get_origin(o) is Literal for choice in get_args(o)]
    if choices and value not in choices and not (value is None and type(None) in options):
        raise UsageError(
            f"expected training.{name} to be one of {', '.join(choices)}, got {value!r}"
            + suggest(str(value), choices)
        )
