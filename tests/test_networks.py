"""The networks that timm lacks, as timm would treat them."""

import pytest
import timm
import torch

from robustify import architectures, networks, stems

OURS = [
    "resnet18_small", "seresnet18_small", "mobilenetv2_100_small", "densenet121_small",
    "vgg11_small", "vgg11_bn_small", "resnet20_cifar", "preact_resnet18", "wide_resnet28_10",
    "cnn_a", "vit_tiny_patch4_32",
]  # fmt: skip
# (name, last map for 32-pixel images, parameters in millions with ten classes)
SHAPES = [
    ("resnet18_small", (512, 4, 4), 11.17),
    ("mobilenetv2_100_small", (1280, 4, 4), 2.24),
    ("densenet121_small", (1024, 4, 4), 6.96),
    ("vgg16_bn_small", (512, 1, 1), 14.73),
    ("wide_resnet50_2_small", (2048, 4, 4), 66.85),
    ("resnet20_cifar", (64, 8, 8), 0.27),
    ("preact_resnet18", (512, 4, 4), 11.17),
    ("wide_resnet28_10", (640, 8, 8), 36.48),
    ("wide_resnet34_10", (640, 8, 8), 46.16),
    ("cnn_a", (32, 8, 8), 0.21),
]


@pytest.mark.parametrize("name", OURS)
def test_timm_builds_them_and_can_replace_their_head(name):
    model = timm.create_model(name, num_classes=7, in_chans=1).eval()
    images = torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        maps = model.forward_features(images)
        assert torch.equal(model.forward_head(maps), model(images))
        pooled = model.forward_head(maps, pre_logits=True)
        assert torch.equal(model.get_classifier()(pooled), model(images))
        assert model(images).shape == (2, 7)
        model.reset_classifier(3)
        assert model(images).shape == (2, 3)
    assert model.num_classes == 3
    assert model.pretrained_cfg["architecture"] == name
    weight = model.pretrained_cfg["classifier"] + ".weight"
    assert weight in model.state_dict()


@pytest.mark.parametrize(("name", "shape", "millions"), SHAPES)
def test_last_maps_and_sizes_are_the_published_ones(name, shape, millions):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=10).eval()
        assert model.forward_features(torch.rand(1, 3, 32, 32)).shape[1:] == shape
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    assert 32 // model.feature_info[-1]["reduction"] == shape[-1]


def test_every_plain_member_of_the_families_has_a_small_variant():
    for name in ("resnet50", "resnext50_32x4d", "mobilenetv2_050", "densenet169", "vgg19"):
        assert networks.small_variant(name) == f"{name}_small"
    for name in ("resnet50d", "resnet18_small", "vit_tiny_patch16_224", "no_such_network"):
        assert networks.small_variant(name) is None


def test_a_large_network_s_weights_fit_its_small_variant_by_the_centre_of_the_kernel():
    large = timm.create_model("resnet18", num_classes=10)
    small = timm.create_model("resnet18_small", num_classes=10)
    fitted = stems.fit_to_small(large.state_dict(), small)
    small.load_state_dict(fitted, strict=True)
    assert torch.equal(small.conv1.weight, large.conv1.weight[..., 2:5, 2:5])
    assert torch.equal(small.layer4[1].conv2.weight, large.layer4[1].conv2.weight)


def test_the_residual_networks_are_what_their_formulas_say():
    torch.manual_seed(0)
    x = torch.randn(2, 16, 8, 8)
    block = timm.create_model("resnet20_cifar").eval().layer2[0]
    with torch.no_grad():
        shortcut = torch.zeros(2, 32, 4, 4)
        shortcut[:, 8:24] = x[:, :, ::2, ::2]
        inner = block.bn2(block.conv2(block.bn1(block.conv1(x)).relu()))
        assert torch.equal(block(x), (inner + shortcut).relu())
        wide = timm.create_model("wide_resnet28_10").eval().block2.layer[1]
        x = torch.randn(1, 320, 8, 8)
        inner = wide.conv2(wide.bn2(wide.conv1(wide.bn1(x).relu())).relu())
        assert torch.equal(wide(x), x + inner)


def test_published_wide_resnet_names_load():
    with torch.device("meta"):
        keys = timm.create_model("wide_resnet34_10", num_classes=10).state_dict().keys()
    for key in (
        "conv1.weight", "block1.layer.0.bn1.weight", "block1.layer.0.convShortcut.weight",
        "block3.layer.4.conv2.weight", "bn1.running_mean", "fc.bias",
    ):  # fmt: skip
        assert key in keys
    old = {
        "module.conv1.weight": torch.ones(1),
        "module.sub_block1.layer.0.bn1.bias": torch.ones(1),
    }
    assert architectures.published_names(old).keys() == {"conv1.weight"}
