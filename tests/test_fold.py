"""The lent copy answers as the network does, follows its weights and leaves no trace in it."""

import copy
import gc
import logging
import pickle
import weakref

import pytest
import timm
import torch
from torch import nn

from robustify import fold, models
from robustify.fold import constant, prefers_channels_last

# (name, image size, BatchNorms folded of all)
FOLDED = [
    ("resnet18", 32, 20, 20), ("resnet18", 8, 20, 20), ("mobilenetv2_100", 32, 52, 52),
    ("densenet121", 32, 59, 121), ("vgg11_bn", 32, 8, 8), ("resnet20_cifar", 32, 19, 19),
    ("preact_resnet18", 16, 8, 17), ("efficientnet_b0", 64, 49, 49),
    ("regnety_002", 64, 44, 44),
]  # fmt: skip
PLAIN = [("vit_tiny_patch4_32", 32), ("convnext_atto", 32), ("cnn_a", 32)]


def trained(name, size, in_chans=3):
    """A network whose BatchNorm statistics and weights are not the initial ones."""
    torch.manual_seed(0)
    network = models.create(name, num_classes=10, in_chans=in_chans, image_size=size)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    network.train()
    with torch.no_grad():
        for _ in range(3):
            network(torch.rand(8, in_chans, size, size))
    return network


def state_of(network):
    """Everything about a network that must be the same afterwards."""
    return (
        [module.training for module in network.modules()],
        [parameter.requires_grad for parameter in network.parameters()],
        [None if p.grad is None else p.grad.clone() for p in network.parameters()],
        {name: tensor.clone() for name, tensor in network.state_dict().items()},
    )


def assert_unchanged(before, network):
    torch.testing.assert_close(state_of(network), before, rtol=0, atol=0)


def gradient(network, images):
    images = images.clone().requires_grad_()
    return torch.autograd.grad(network(images).logsumexp(1).sum(), images)[0]


@pytest.mark.parametrize(("name", "size", "folded", "norms"), FOLDED)
def test_folded_logits_and_gradients_are_the_network_s_own(name, size, folded, norms):
    network = trained(name, size)
    images = torch.rand(4, 3, size, size)
    with constant(network, images) as lent:
        assert len(lent.pairs) == folded
        logits, slope = lent(images).detach(), gradient(lent, images)
    network.eval()
    assert sum(isinstance(m, nn.BatchNorm2d) for m in network.modules()) == norms
    plain = network(images).detach()
    assert (logits - plain).abs().max() <= 1e-4 * plain.abs().max()
    plain = gradient(network, images)
    assert (slope - plain).norm() <= 1e-3 * plain.norm()


@pytest.mark.parametrize(("name", "size"), PLAIN)
def test_what_has_nothing_to_fold_is_lent_itself(name, size):
    network = trained(name, size)
    images = torch.rand(2, 3, size, size)
    with constant(network, images) as lent:
        assert lent is network
        assert not any(module.training for module in network.modules())
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert torch.isfinite(gradient(lent, images)).all()


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch4_32"])
def test_no_trace_is_left_even_after_an_error(name):
    network = trained(name, 32)
    images = torch.rand(4, 3, 32, 32)
    network(images).sum().backward()
    next(network.parameters()).requires_grad_(False)
    list(network.modules())[5].eval()
    before, keys = state_of(network), list(network.state_dict())
    with constant(network, images) as lent:
        gradient(lent, images)
    assert_unchanged(before, network)
    with pytest.raises(ZeroDivisionError), constant(network, images):
        raise ZeroDivisionError
    assert_unchanged(before, network)
    assert list(network.state_dict()) == keys
    again = pickle.loads(pickle.dumps(copy.deepcopy(network)))
    assert torch.equal(again.eval()(images), network.eval()(images))


def test_the_copy_follows_weights_and_statistics_without_being_traced_again(monkeypatch):
    network = trained("resnet20_cifar", 16)
    images = torch.rand(4, 3, 16, 16)
    with constant(network, images) as lent:
        first = lent(images)
    monkeypatch.setattr(fold, "_trace", None)
    network(torch.rand(8, 3, 16, 16)).square().mean().backward()
    torch.optim.SGD(network.parameters(), lr=0.5).step()
    with constant(network, images) as lent:
        second = lent(images)
        assert torch.equal(lent(images), second)
    plain = network.eval()(images)
    assert (second - plain).abs().max() <= 1e-4 * plain.abs().max()
    assert (second - first).abs().max() > 0.01
    fresh = copy.deepcopy(network)
    monkeypatch.undo()
    with constant(fresh, images) as lent:
        assert torch.equal(lent(images), second)


def test_a_changed_network_is_traced_again():
    network = trained("resnet20_cifar", 16)
    images = torch.rand(4, 3, 16, 16)
    with constant(network, images) as lent:
        assert lent(images).shape == (4, 10)
    network.module.reset_classifier(3)
    with constant(network, images) as lent:
        assert lent(images).shape == (4, 3)
    network.double()
    with constant(network, images.double()) as lent:
        assert lent(images.double()).dtype == torch.float64


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, images):
        x = self.norm(self.conv(images))
        return (x if x.sum() > 0 else -x).mean((2, 3))


class Shared(nn.Module):
    """One convolution before two BatchNorms, and one read by two: neither may be folded."""

    def __init__(self):
        super().__init__()
        self.conv, self.first, self.second = nn.Conv2d(3, 3, 1), *(nn.BatchNorm2d(3) for _ in "ab")
        self.last, self.third = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False)

    def forward(self, images):
        x = self.second(self.conv(self.first(self.conv(images))))
        x = self.last(x)
        return (self.third(x) * x).mean((2, 3))


def test_control_flow_and_shared_layers_fall_back():
    images = torch.rand(4, 3, 8, 8)
    for network in (Branching(), Shared()):
        with constant(network, images) as lent:
            assert lent is network


def test_biases_dilation_groups_and_norms_without_weights_fold_exactly():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 6, 3, groups=3, padding=2, dilation=2), nn.BatchNorm2d(6, affine=False),
        nn.Dropout(0.5), nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    )  # fmt: skip
    network(torch.rand(8, 3, 9, 9))
    images = torch.rand(2, 3, 9, 9)
    with constant(network, images) as lent:
        assert len(lent.pairs) == 2
        logits = lent(images)
    torch.testing.assert_close(logits, network.eval()(images))


def test_a_copy_that_does_not_agree_is_not_used(monkeypatch, caplog):
    real = fold._Folded.refresh

    def wrong(self, network):
        real(self, network)
        self.graph.module.conv1.bias.add_(1)

    monkeypatch.setattr(fold._Folded, "refresh", torch.no_grad()(wrong))
    network, images = trained("resnet20_cifar", 16), torch.rand(4, 3, 16, 16)
    with constant(network, images) as lent:
        assert lent is network
    assert "not folded" in caplog.text


def test_hooks_see_the_network_itself(caplog):
    caplog.set_level(logging.INFO)
    network, images = trained("resnet20_cifar", 16), torch.rand(4, 3, 16, 16)
    seen = []
    with constant(network, images):
        pass
    handle = network.module.layer1.register_forward_hook(lambda *args: seen.append(args[2]))
    with constant(network, images) as lent:
        lent(images)
    assert len(seen) == 1
    handle.remove()
    with constant(network, images) as lent:
        assert lent is not network


def test_networks_are_not_kept_alive():
    network = trained("resnet20_cifar", 16)
    with constant(network, torch.rand(2, 3, 16, 16)):
        pass
    watched = weakref.ref(network)
    del network
    gc.collect()
    assert watched() is None


def test_channels_last_is_decided_by_size_alone():
    network = timm.create_model("resnet18")
    assert [prefers_channels_last(network, size) for size in (8, 15, 16, 224)] == [
        False, False, True, True,
    ]  # fmt: skip
    assert not prefers_channels_last(nn.Linear(2, 2), 224)
    network, images = trained("resnet18", 16), torch.rand(2, 3, 16, 16)
    with constant(network, images) as lent:
        weight = lent.graph.get_parameter("module.layer1.0.conv1.weight")
        assert weight.is_contiguous(memory_format=torch.channels_last)


def test_autocast_reaches_the_copy():
    network, images = trained("resnet20_cifar", 16), torch.rand(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), constant(network, images) as lent:
        assert lent is not network
        assert lent(images).dtype == torch.bfloat16
