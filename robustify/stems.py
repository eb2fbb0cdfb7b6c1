"""Stems for small images: timm's ResNet, ResNeXt, SE-ResNet, MobileNetV2, DenseNet and VGG without
two of their five halvings (VGG: without the head that is made for 224 pixels)."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
from timm.models import model_entrypoint
from torch import Tensor, nn

# Only the plain stems: the deep stems of resnet50d, 50t and the like are another design.
_FAMILIES = {
    "resnet": re.compile(r"(wide_)?(se)?resnex?t\d+(_\w+)?"),
    "efficientnet": re.compile(r"mobilenetv2_\d+d?"),
    "densenet": re.compile(r"densenet(121|161|169|201)"),
    "vgg": re.compile(r"vgg\d+(_bn)?"),
}
_DOWNSAMPLING_KEPT = 4  # a small-image stem leaves out two of the five halvings

SMALL_NETWORKS = {
    base: family
    for family, names in _FAMILIES.items()
    for base in timm.list_models(module=family)
    if names.fullmatch(base)
}
"""timm's architectures that have a small-image variant, each with its family."""


def _narrow_stem(conv: nn.Conv2d, init: Callable[[Tensor], Tensor]) -> nn.Conv2d:
    """A 3×3 convolution of stride 1 with the channels of `conv`."""
    stem = nn.Conv2d(conv.in_channels, conv.out_channels, 3, stride=1, padding=1, bias=False)
    init(stem.weight)
    return stem


def _shrink_resnet(model: Any) -> None:
    init = partial(nn.init.kaiming_normal_, mode="fan_out", nonlinearity="relu")
    model.conv1 = _narrow_stem(model.conv1, init)
    model.maxpool = nn.Identity()


def _shrink_mobilenet(model: Any) -> None:
    model.conv_stem.stride = (1, 1)  # the strides of RSLAD's CIFAR MobileNetV2
    model.blocks[1][0].conv_dw.stride = (1, 1)


def _shrink_densenet(model: Any) -> None:
    model.features.conv0 = _narrow_stem(model.features.conv0, nn.init.kaiming_normal_)
    model.features.pool0 = nn.Identity()


def _shrink_vgg(model: Any) -> None:
    """Classify the pooled map: 14.7 M parameters instead of 134 M in VGG-16."""
    model.pre_logits = nn.Identity()
    model.head_hidden_size = model.num_features
    model.head.in_features = model.head.num_features = model.num_features
    head = nn.Linear(model.num_features, model.num_classes)
    nn.init.normal_(head.weight, 0, 0.01)
    nn.init.zeros_(head.bias)
    model.head.fc = head if model.num_classes > 0 else nn.Identity()


_SHRINK = {
    "resnet": _shrink_resnet,
    "efficientnet": _shrink_mobilenet,
    "densenet": _shrink_densenet,
    "vgg": _shrink_vgg,
}


def build_small(base: str, **kwargs: Any) -> Any:
    """The small-image variant of timm's architecture `base`."""
    family = SMALL_NETWORKS[base]
    if family == "vgg":
        kwargs["mlp_ratio"] = 1 / 4096  # the head that is left out need not be 120 M numbers first
    model = model_entrypoint(base)(**kwargs)
    _SHRINK[family](model)
    if family != "vgg":  # VGG has no stem to lose: its five poolings stay
        for info in model.feature_info:
            info["reduction"] = max(1, info["reduction"] // _DOWNSAMPLING_KEPT)
    return model


def fit_to_small(weights: dict[str, Tensor], model: Any) -> dict[str, Tensor]:
    """Weights of the large-image network, made to fit its small-image variant.

    A wider stem gives the centre of its kernel; VGG's 7×7 head is left out, and the head stays as
    initialized. Weights of the small-image variant itself pass unchanged.
    """
    own = model.state_dict()
    fitted = {k: v for k, v in weights.items() if not k.startswith("pre_logits.")}
    stem = model.pretrained_cfg["first_conv"] + ".weight"
    if stem in fitted and fitted[stem].shape[-1] > own[stem].shape[-1]:
        cut = (fitted[stem].shape[-1] - own[stem].shape[-1]) // 2
        fitted[stem] = fitted[stem][..., cut:-cut, cut:-cut].contiguous()
    if len(fitted) < len(weights):
        fitted |= {k: v for k, v in own.items() if k.startswith("head.")}
    return fitted
