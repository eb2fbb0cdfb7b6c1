"""Classifier: images in [0, 1] -> logits, whatever network and normalization are inside."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models import get_model_args, get_model_input_config
from torch import Tensor, nn

from robustify.errors import ModelError, UsageError
from robustify.weights import registry_cfg


class Classifier(nn.Module):
    """A network with its normalization: (N, C, H, W) images in [0, 1] -> (N, K) logits.

    `module` is the bare timm network, and alone in what is saved; `mean` and `std` are per channel.
    `image_size` is the side of the images it is for, in pixels; `about` is what was recorded with
    its weights (recipe, threat model, data).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        *,
        architecture: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        class_names: Sequence[str] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.architecture = architecture
        self.image_size = image_size
        self.num_classes: int = module.num_classes  # type: ignore[assignment]
        self.in_chans: int = module.in_chans  # type: ignore[assignment]
        self.class_names = None if class_names is None else tuple(class_names)
        self.about = dict(about or {})
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.in_chans:
                raise ModelError(
                    f"expected {self.in_chans} values of {name} for {architecture}, got {values}"
                )
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @property
    def model_args(self) -> dict[str, Any]:
        """What builds the network beside its name, its classes and its channels: plain values."""
        known = {"num_classes", "in_chans"}
        return {k: v for k, v in get_model_args(self.module).items() if k not in known}

    @property
    def data(self) -> str | None:
        """The data set it was trained on, if that was recorded."""
        return self.about.get("data")

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the bare network wants them. Raises `ModelError` for a wrong number
        of channels, which would broadcast."""
        # torch.fx traces this with a proxy, whose shape cannot be asked for.
        if isinstance(images, Tensor) and images.shape[-3] != self.in_chans:
            raise ModelError(
                f"expected images with {self.in_chans} channels for {self.architecture}, got "
                f"{images.shape[-3]}"
            )
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """(N, K) logits of (N, C, H, W) images in [0, 1]."""
        return self.module(self.normalize(images))  # type: ignore[no-any-return]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K) logits and the last feature map (N, D, h, w), both from one forward.

        Tokens come as the grid of patches they stand for, without class tokens.
        """
        maps = self.module.forward_features(self.normalize(images))  # type: ignore[operator]
        logits = self.module.forward_head(maps)  # type: ignore[operator]
        return logits, self._as_map(maps, images)

    def set_grad_checkpointing(self) -> None:
        """Keep few activations in a forward, and compute the others again in the backward. Raises
        `UsageError` where the network does not offer that."""
        try:
            self.module.set_grad_checkpointing(True)  # type: ignore[operator]
        except (AttributeError, AssertionError, ValueError):  # timm asserts, transformers raises
            raise UsageError(
                f"expected a network with gradient checkpointing, got {self.architecture}; leave "
                "training.grad_checkpointing out, or choose another network"
            ) from None

    def keep_classes(self, rows: Sequence[int]) -> None:
        """Keep these logits, in this order. Raises `ModelError` for a head that is not linear."""
        head = self.module.get_classifier()  # type: ignore[operator]
        if not isinstance(head, nn.Linear | nn.Conv2d):
            raise ModelError(f"expected a linear head to reorder, got {type(head).__name__}")
        kept = {name: tensor.detach()[rows].clone() for name, tensor in head.named_parameters()}
        self.module.reset_classifier(len(rows))  # type: ignore[operator]
        self.module.get_classifier().load_state_dict(kept)  # type: ignore[operator]
        self.num_classes = len(rows)

    def _as_map(self, maps: Tensor, images: Tensor) -> Tensor:
        if maps.dim() == 4:
            channels_last = getattr(self.module, "output_fmt", "NCHW") == "NHWC"
            return maps.permute(0, 3, 1, 2) if channels_last else maps
        tokens = maps[:, getattr(self.module, "num_prefix_tokens", 0) :]
        height, width = images.shape[-2:]
        cells = tokens.shape[1]
        rows = max(1, round((cells * height / width) ** 0.5))
        if rows * (cells // rows) != cells:
            rows = cells
        return tokens.mT.reshape(len(tokens), -1, rows, cells // rows)


def describe(classifier: Classifier) -> dict[str, Any]:
    """What rebuilds the classifier around its weights: plain values, as saved in the header."""
    return {
        "architecture": classifier.architecture,
        "model_args": classifier.model_args,
        "num_classes": classifier.num_classes,
        "in_chans": classifier.in_chans,
        "image_size": classifier.image_size,
        "mean": decimals(classifier.mean),
        "std": decimals(classifier.std),
        "class_names": classifier.class_names and list(classifier.class_names),
    }


def decimals(values: Tensor) -> list[float]:
    """The shortest decimals that are these float32 numbers: 0.485 and not 0.48500001430511475."""
    shortest = []
    for value in values.flatten().tolist():
        tries = (float(f"{value:.{digits}g}") for digits in range(1, 10))
        shortest.append(next(t for t in tries if torch.tensor(t) == torch.tensor(value)))
    return shortest


def hub_config(classifier: Classifier) -> dict[str, Any]:
    """`config.json` in timm's Hub layout.

    Without `model_args.num_classes`, with which transformers cannot load a timm model.
    """
    module = classifier.module
    traits = get_model_input_config(module)
    size = (classifier.in_chans, classifier.image_size, classifier.image_size)
    cfg = registry_cfg(classifier.architecture) | {
        "input_size": size,
        "fixed_input_size": traits["fixed_input_size"],
        "first_conv": traits["first_conv"],
        "crop_pct": 1.0,
        "mean": decimals(classifier.mean),
        "std": decimals(classifier.std),
        "num_classes": classifier.num_classes,
        "pool_size": None,
    }
    for key in (
        "test_input_size",
        "test_crop_pct",
        "min_input_size",
        "label_names",
        "architecture",
    ):
        cfg.pop(key, None)
    config = {
        "architecture": classifier.architecture,
        "num_classes": classifier.num_classes,
        "num_features": module.num_features,
    }
    if classifier.class_names:
        config["label_names"] = list(classifier.class_names)
    args = {k: v for k, v in get_model_args(module).items() if k != "num_classes"}
    return config | {"model_args": args, "pretrained_cfg": cfg}


def match_labels(classifier: Classifier, class_names: Sequence[str]) -> Classifier:
    """`classifier` with its logits in the order of `class_names`, matched by name.

    Names it has besides are left out; a network without names is taken as it is if it has as many
    classes. Raises `ModelError`, showing both lists, where neither fits.
    """
    wanted, own = tuple(class_names), classifier.class_names
    if own == wanted or (own is None and classifier.num_classes == len(wanted)):
        classifier.class_names = wanted
        return classifier
    if own is None or not set(wanted) <= set(own) or len(set(own)) < len(own):
        raise ModelError(
            f"expected a network for the classes of the data, {_listed(wanted)}, got one for "
            f"{_listed(own) if own else f'{classifier.num_classes} classes without names'}; choose "
            "another network or other data"
        )
    classifier.keep_classes([own.index(name) for name in wanted])
    classifier.class_names = wanted
    return classifier


def _listed(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > 10 else ""
    return "[" + ", ".join(names[:10]) + more + "]"
