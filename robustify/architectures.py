"""Architectures of the robustness literature that timm lacks, in the shape timm expects.

CifarResNet    He et al., CVPR 2016, section 4.2 (parameter-free shortcuts)
PreActResNet   He et al., ECCV 2016, in the layout of Rice et al., ICML 2020
WideResNet     Zagoruyko and Komodakis, BMVC 2016, in the layout of TRADES
CnnA           the two-convolution network of the verification literature
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn


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
