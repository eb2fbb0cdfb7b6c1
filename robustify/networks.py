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

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from timm.models import (
    PretrainedCfg,
    build_model_with_cfg,
    generate_default_cfgs,
    model_entrypoint,
    register_model,
)
from torch import Tensor, nn

SMALL_IMAGE = 64
"""Images of this many pixels or fewer a side want the small-image variant of a network."""

# Only the plain stems: the deep stems of resnet50d, 50t and the like are another design.
_FAMILIES = {
    "resnet": re.compile(r"(wide_)?(se)?resnex?t\d+(_\w+)?"),
    "efficientnet": re.compile(r"mobilenetv2_\d+d?"),
    "densenet": re.compile(r"densenet(121|161|169|201)"),
    "vgg": re.compile(r"vgg\d+(_bn)?"),
}
_DOWNSAMPLING_KEPT = 4  # a small-image stem leaves out two of the five halvings


def small_variant(architecture: str) -> str | None:
    """The name of the small-image variant of a timm architecture, or None where there is none."""
    name = f"{architecture}_small"
    return name if timm.is_model(name) else None


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


def _build_small(base: str, family: str, **kwargs: Any) -> Any:
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


class _CifarNetwork(nn.Module):
    """What timm expects of a network: features, pooling, a linear head that can be replaced.

    A subclass defines its layers, `num_features` and `forward_features`, and calls `_finish`.
    """

    head_name: str
    num_features: int
    forward_features: Callable[[Tensor], Tensor]

    def _finish(self, num_classes: int, in_chans: int, global_pool: str) -> None:
        self.in_chans = in_chans
        self.head_hidden_size = self.num_features
        self.reset_classifier(num_classes, global_pool)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def get_classifier(self) -> nn.Module:
        return self.get_submodule(self.head_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        if global_pool is not None:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
        head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.add_module(self.head_name, head)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))


class _BasicBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.stride, self.pad = stride, (width - width_in) // 2

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.stride > 1 or self.pad:
            # option A: subsample, and zero-pad the channels equally on both sides
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(out + x)


class CifarResNet(_CifarNetwork):
    """ResNet-(6n+2) for small images: three stages of n blocks with 16, 32 and 64 channels."""

    head_name = "linear"
    num_features = 64

    def __init__(
        self, depth: int, num_classes: int = 10, in_chans: int = 3, global_pool: str = "avg"
    ) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(_BasicBlock, 16, 16, blocks, 1)
        self.layer2 = _stage(_BasicBlock, 16, 32, blocks, 2)
        self.layer3 = _stage(_BasicBlock, 32, 64, blocks, 2)
        self.feature_info = _feature_info("layer", (16, 32, 64))
        self._finish(num_classes, in_chans, global_pool)

    def forward_features(self, images: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(images)))
        return self.layer3(self.layer2(self.layer1(x)))  # type: ignore[no-any-return]


class _PreActBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.project = stride > 1 or width_in != width
        if self.project:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.shortcut(out) if self.project else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return out + shortcut  # type: ignore[no-any-return]


class PreActResNet(_CifarNetwork):
    """Pre-activation ResNet-18 with a last BatchNorm before pooling."""

    head_name = "linear"
    num_features = 512

    def __init__(self, num_classes: int = 10, in_chans: int = 3, global_pool: str = "avg") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 64, 3, padding=1, bias=False)
        self.layer1 = _stage(_PreActBlock, 64, 64, 2, 1)
        self.layer2 = _stage(_PreActBlock, 64, 128, 2, 2)
        self.layer3 = _stage(_PreActBlock, 128, 256, 2, 2)
        self.layer4 = _stage(_PreActBlock, 256, 512, 2, 2)
        self.bn = nn.BatchNorm2d(512)
        self.feature_info = _feature_info("layer", (64, 128, 256, 512))
        self._finish(num_classes, in_chans, global_pool)

    def forward_features(self, images: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.conv1(images)))
        return F.relu(self.bn(self.layer4(self.layer3(x))))


class _WideBlock(nn.Module):
    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(width_in)
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.project = width_in != width
        if self.project:
            # the published checkpoints' name for it
            self.convShortcut = nn.Conv2d(width_in, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(x))
        shortcut = self.convShortcut(out) if self.project else x
        out = self.conv2(F.relu(self.bn2(self.conv1(out))))
        return shortcut + out  # type: ignore[no-any-return]


class _WideStage(nn.Module):
    def __init__(self, width_in: int, width: int, blocks: int, stride: int) -> None:
        super().__init__()
        self.layer = _stage(_WideBlock, width_in, width, blocks, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


class WideResNet(_CifarNetwork):
    """WRN-depth-widen: three stages of (depth - 4) / 6 pre-activation blocks."""

    head_name = "fc"

    def __init__(
        self,
        depth: int,
        widen: int,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = "avg",
    ) -> None:
        super().__init__()
        blocks, widths = (depth - 4) // 6, (16 * widen, 32 * widen, 64 * widen)
        self.num_features = widths[-1]
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.block1 = _WideStage(16, widths[0], blocks, 1)
        self.block2 = _WideStage(widths[0], widths[1], blocks, 2)
        self.block3 = _WideStage(widths[1], widths[2], blocks, 2)
        self.bn1 = nn.BatchNorm2d(widths[2])
        self.feature_info = _feature_info("block", widths)
        self._finish(num_classes, in_chans, global_pool)

    def forward_features(self, images: Tensor) -> Tensor:
        x = self.block1(self.conv1(images))
        return F.relu(self.bn1(self.block3(self.block2(x))))


class CnnA(nn.Sequential):
    """Two strided convolutions, then two linear layers; keys 0, 2, 5, 7 are the published ones."""

    def __init__(
        self,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | tuple[int, int] = 32,
        global_pool: str = "",
    ) -> None:
        height, width = (img_size, img_size) if isinstance(img_size, int) else img_size
        super().__init__(
            nn.Conv2d(in_chans, 16, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 4, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * (height // 4) * (width // 4), 100),
            nn.ReLU(),
            nn.Identity(),
        )
        self.in_chans, self.num_features, self.head_hidden_size = in_chans, 32, 100
        self.feature_info = [
            {"num_chs": 16, "reduction": 2, "module": "1"},
            {"num_chs": 32, "reduction": 4, "module": "3"},
        ]
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        return self[7]

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self[7] = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        return self[3](self[2](self[1](self[0](images))))  # type: ignore[no-any-return]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self[6](self[5](self[4](x)))
        return x if pre_logits else self[7](x)


def _stage(
    block: Callable[[int, int, int], nn.Module], width_in: int, width: int, blocks: int, stride: int
) -> nn.Sequential:
    first = block(width_in, width, stride)
    return nn.Sequential(first, *(block(width, width, 1) for _ in range(blocks - 1)))


def _feature_info(prefix: str, widths: tuple[int, ...]) -> list[dict[str, Any]]:
    return [
        {"num_chs": width, "reduction": 2**i, "module": f"{prefix}{i + 1}"}
        for i, width in enumerate(widths)
    ]


def published_names(
    weights: dict[str, Tensor], model: nn.Module | None = None
) -> dict[str, Tensor]:
    """Without DataParallel's prefix and without TRADES's `sub_block1`, which no forward uses."""
    plain = {k.removeprefix("module."): v for k, v in weights.items()}
    return {k: v for k, v in plain.items() if not k.startswith("sub_block1.")}


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


_SMALL_NETWORKS = {
    base: family
    for family, names in _FAMILIES.items()
    for base in timm.list_models(module=family)
    if names.fullmatch(base)
}

# timm looks a module's configurations up under this name when a network is registered
default_cfgs = generate_default_cfgs(
    {name: cfg for name, (_, cfg) in _CIFAR_NETWORKS.items()}
    | {f"{base}_small": _small_cfg(base) for base in _SMALL_NETWORKS}
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
for _base, _family in _SMALL_NETWORKS.items():
    _register(f"{_base}_small", partial(_build_small, _base, _family), fit_to_small)
for _name, (_build, _) in _CIFAR_NETWORKS.items():
    _register(_name, _build, published_names)
