"""Networks for small images that timm lacks, under names that timm's registry knows.

    <name>_small                timm's ResNet, ResNeXt, SE-ResNet, MobileNetV2, DenseNet or VGG of
                                that name, with a stem (VGG: a head) for small images
    resnet20_cifar … 110_cifar  He et al., CVPR 2016, section 4.2 (parameter-free shortcuts)
    preact_resnet18             He et al., ECCV 2016, in the layout of Rice et al., ICML 2020
    wide_resnet28_10, 34_10     Zagoruyko and Komodakis, BMVC 2016, in the layout of TRADES
    cnn_a                       the two-convolution network of the verification literature
    vit_tiny_patch4_32          timm's ViT-Tiny with patches of 4 pixels, for 32-pixel images

After `import robustify.networks`, `timm.create_model` builds all of these, so nothing else has to
record which stem a network has: the architecture's name says it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    model_entrypoint,
    register_model,
)
from torch import Tensor, nn

from robustify.architectures import CifarResNet, CnnA, PreActResNet, WideResNet, published_names
from robustify.stems import SMALL_NETWORKS, build_small, fit_to_small

SMALL_IMAGE = 64
"""Images of this many pixels or fewer a side want the small-image variant of a network."""


def small_variant(architecture: str) -> str | None:
    """The name of the small-image variant of a timm architecture, or None where there is none."""
    name = f"{architecture}_small"
    return name if timm.is_model(name) else None


def _cfg(**changes: Any) -> PretrainedCfg:
    small = {"input_size": (3, 32, 32), "crop_pct": 1.0, "interpolation": "bilinear"}
    return PretrainedCfg(**{**small, "num_classes": 10, "first_conv": "conv1", **changes})


# The mean and std are those of the published checkpoints: akamaster/pytorch_resnet_cifar10, TRADES
# and Rice et al. (images in [0, 1], not normalized), α,β-CROWN.
_PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
_CIFAR_NETWORKS: dict[str, tuple[Callable[..., nn.Module], PretrainedCfg]] = {
    **{
        f"resnet{depth}_cifar": (partial(CifarResNet, depth), _cfg(classifier="linear"))
        for depth in (20, 32, 44, 56, 110)
    },
    "preact_resnet18": (PreActResNet, _cfg(classifier="linear", **_PLAIN)),
    "wide_resnet28_10": (partial(WideResNet, 28, 10), _cfg(classifier="fc", **_PLAIN)),
    "wide_resnet34_10": (partial(WideResNet, 34, 10), _cfg(classifier="fc", **_PLAIN)),
    "cnn_a": (
        CnnA,
        _cfg(
            classifier="7",
            first_conv="0",
            fixed_input_size=True,
            mean=tuple(m / 255 for m in (125.3, 123.0, 113.9)),
            std=tuple(s / 255 for s in (63.0, 62.1, 66.7)),
        ),
    ),
}
CIFAR_NETWORKS = tuple(_CIFAR_NETWORKS)
"""Those of the networks above that timm has no counterpart of."""


_VIT_CFG = _cfg(first_conv="patch_embed.proj", classifier="head", fixed_input_size=True)


def _small_cfg(base: str) -> PretrainedCfg:
    large = timm.get_pretrained_cfg(base)
    kept = ("mean", "std", "num_classes", "first_conv", "classifier")
    return _cfg(**{key: getattr(large, key) for key in kept})


# timm looks a module's configurations up under this name when a network is registered
default_cfgs = generate_default_cfgs(
    {name: cfg for name, (_, cfg) in _CIFAR_NETWORKS.items()}
    | {f"{base}_small": _small_cfg(base) for base in SMALL_NETWORKS}
    | {"vit_tiny_patch4_32": _VIT_CFG}
)


def vit_tiny_patch4_32(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs: Any) -> Any:
    """ViT-Tiny with an 8×8 grid of patches for 32-pixel images."""
    own = {**_VIT_CFG.to_dict(), "architecture": "vit_tiny_patch4_32"}
    build = model_entrypoint("vit_tiny_patch16_224")
    return build(pretrained, pretrained_cfg=pretrained_cfg or own, patch_size=4, **kwargs)


def _register(
    name: str,
    build: Callable[..., nn.Module],
    weights: Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]],
) -> None:
    def entry(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        model: nn.Module = build_model_with_cfg(
            build,
            name,
            pretrained,
            pretrained_filter_fn=weights,
            feature_cfg={"feature_cls": "hook"},
            **kwargs,
        )
        return model

    entry.__name__ = entry.__qualname__ = name
    register_model(entry)


register_model(vit_tiny_patch4_32)
for _base in SMALL_NETWORKS:
    _register(f"{_base}_small", partial(build_small, _base), fit_to_small)
for _name, (_build, _) in _CIFAR_NETWORKS.items():
    _register(_name, _build, published_names)
