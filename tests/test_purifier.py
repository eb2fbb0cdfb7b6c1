"""The purifier, the pair with its untouched classifier, and how both are saved."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from robustify import models
from robustify.averaging import reestimate_batchnorm
from robustify.errors import ModelError, UsageError
from robustify.fold import constant
from robustify.frozen import weights_hash
from robustify.losses import cross_entropy
from robustify.purifier import Ensemble, Purified, Purifier, dimensions, facts, mse


def classifier(in_chans=1, size=8, seed=0):
    """A small network whose BatchNorm statistics are no defaults."""
    torch.manual_seed(seed)
    made = models.create(
        "resnet20_cifar", num_classes=10, in_chans=in_chans, image_size=size,
        mean=[0.4] * in_chans, std=[0.3] * in_chans, data="digits",
    )  # fmt: skip
    with torch.no_grad():
        made.train()(torch.rand(32, in_chans, size, size))
    return made.eval()


def pair(in_chans=1, size=8, seed=0):
    f = classifier(in_chans, size, seed)
    return Purified(Purifier(in_chans, "tiny"), f)


@pytest.mark.parametrize(
    ("size", "colour", "grey"),
    [
        ("teacher", 5_478_691, 5_464_073),
        ("student", 785_059, 777_737),
        ("tiny", 125_155, 121_481),
    ],
)
def test_convolutions_have_the_specified_number_of_parameters(size, colour, grey):
    for in_chans, expected in ((3, colour), (1, grey)):
        network = Purifier(in_chans, size)
        convolutions = [m for m in network.modules() if isinstance(m, nn.Conv2d)]
        assert sum(p.numel() for m in convolutions for p in m.parameters()) == expected
        assert not any(isinstance(m, nn.BatchNorm2d | nn.Dropout) for m in network.modules())


def test_the_code_is_narrower_than_the_image():
    assert [dimensions("student", c)[2] for c in (1, 3)] == [8, 32]
    network = Purifier(1, "tiny")
    assert network.encoder(torch.rand(1, 1, 32, 32)).shape == (1, 8, 8, 8)  # 512 of 1,024
    assert Purifier(3, (16, 1)).encoder(torch.rand(1, 3, 32, 32)).numel() == 32 * 64  # 2/3


@pytest.mark.parametrize("side", [28, 32, 33, 50])
@pytest.mark.parametrize("in_chans", [1, 3])
def test_any_size_comes_back_in_the_range(side, in_chans):
    images = torch.rand(2, in_chans, side, side + 1)
    network = Purifier(in_chans, "tiny")
    with torch.no_grad():
        restored = network(images)
        assert restored.shape == images.shape
        assert restored.min() > 0
        assert restored.max() < 1
        assert torch.equal(network.train()(images), network.eval()(images))
        below, right = -side % 4, -(side + 1) % 4
        padded = nn.functional.pad(images, (0, right, 0, below), mode="reflect")
        assert torch.equal(network(padded)[..., :side, : side + 1], restored)


def test_sizes_by_numbers_and_what_cannot_be_one():
    network = Purifier(1, (24, 3, 5))
    assert (network.width, network.blocks, network.code) == (24, 3, 5)
    for wrong in ((20, 1), (16,), (16, 0), (16, 1, 2, 3)):
        with pytest.raises(UsageError, match="expected a purifier's size"):
            Purifier(1, wrong)


def test_with_the_identity_the_pair_is_the_classifier_to_the_bit():
    f = classifier(3, 32)
    images = torch.rand(5, 3, 32, 32)
    both = Purified(nn.Identity(), f).eval()
    assert torch.equal(both(images), f(images))
    assert (both.num_classes, both.in_chans, both.image_size) == (10, 3, 32)
    assert both.data == "digits"
    assert all(
        torch.equal(a, b) for a, b in zip(both.features(images), f.features(images), strict=True)
    )


def test_the_classifier_is_untouched_by_training_the_pair():
    both = pair()
    f, before = both.classifier, weights_hash(both.classifier)
    images, labels = torch.rand(16, 1, 8, 8), torch.arange(16) % 10
    optimizer = torch.optim.Adam(both.parameters(), lr=1e-2)
    purifier_before = weights_hash(both.purifier)
    for _ in range(10):
        both.train()
        images.requires_grad_()
        optimizer.zero_grad()
        cross_entropy(both(images), labels).mean().backward()
        optimizer.step()
    assert not any(module.training for module in f.modules())
    assert both.purifier.training
    assert all(p.grad is None and not p.requires_grad for p in f.parameters())
    assert all(p.grad.abs().sum() > 0 for p in both.purifier.parameters() if p.dim() == 4)
    assert images.grad.abs().sum() > 0
    assert weights_hash(f) == before == both.sha256
    assert weights_hash(both.purifier) != purifier_before
    both.require_untouched()
    next(buffer for name, buffer in f.named_buffers() if "running_mean" in name).add_(1)
    with pytest.raises(ModelError, match="untouched"):
        both.require_untouched()


def test_weight_averaging_leaves_the_statistics_of_the_frozen_classifier():
    both = pair()
    reestimate_batchnorm(both, iter([torch.rand(8, 1, 8, 8)]))
    both.require_untouched()
    own = nn.Sequential(nn.BatchNorm2d(1), both)  # one of its own beside it is still estimated
    reestimate_batchnorm(own, iter([torch.full((8, 1, 8, 8), 0.25)]))
    assert own[0].running_mean.item() == pytest.approx(0.25)
    both.require_untouched()


def test_attacks_may_fold_the_pair():
    both, images = pair(), torch.rand(4, 1, 8, 8)
    with constant(both, images) as victim:
        assert victim is not both  # folded: the purifier can be traced
        assert (victim(images) - both(images)).abs().max() < 1e-5
        variable = images.clone().requires_grad_()
        assert torch.autograd.grad(victim(variable).sum(), variable)[0].abs().sum() > 0


def test_mse_is_a_mean_per_image_of_any_size():
    for side in (4, 8, 33):
        values = mse(torch.full((3, 1, side, side), 0.25), torch.full((3, 1, side, side), 0.75))
        assert torch.equal(values, torch.full((3,), 0.25))


def test_averaged_target_hands_half_of_the_perturbation_back():
    images, delta = torch.rand(2, 1, 8, 8), 0.1 * torch.rand(2, 1, 8, 8)

    class Oracle(nn.Module):
        def forward(self, seen):
            return images

    target_adv, target = Ensemble(Oracle(), nn.Identity(), "average").targets(
        images + delta, images
    )
    assert torch.allclose(target_adv - images, delta / 2, atol=1e-6)
    assert torch.allclose(target, images)
    routed, clean = Ensemble(Oracle(), nn.Identity(), "routed").targets(images + delta, images)
    assert torch.equal(routed, images)
    assert torch.equal(clean, images)


def test_routing_decides_what_the_adversarial_teacher_is_asked():
    class Offset(nn.Module):
        def forward(self, seen):
            return seen + 1

    adv, clean = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 5.0)
    for routing, expected in (("routed", 1.0), ("clean_target", 6.0), ("average", 0.5)):
        target, _ = Ensemble(Offset(), nn.Identity(), routing).targets(adv, clean)
        assert target.unique().item() == expected


def test_a_saved_pair_gives_identical_logits(tmp_path):
    both, images = pair().eval(), torch.rand(4, 1, 8, 8)
    models.save(both, tmp_path, {"threat_model": {"norm": "Linf", "eps": 0.1}, "seed": 3})
    assert not (tmp_path / "model.safetensors").exists()  # nobody loads it without its purifier
    for name in (tmp_path, f"local-dir:{tmp_path}", tmp_path / "purifier.safetensors"):
        again = models.load(name)
        assert isinstance(again, Purified)
        assert torch.equal(again(images), both(images))
    assert again.about == {
        "data": "digits",
        "seed": 3,
        "threat_model": {"norm": "Linf", "eps": 0.1},
    }
    alone = models.load(tmp_path / "classifier")
    assert torch.equal(alone(images), both.classifier(images))
    recorded = facts(again)
    assert recorded["classifier"]["sha256"] == weights_hash(both.classifier)
    assert recorded["classifier"]["untouched"] is True
    assert recorded["classifier"]["mean"] == [0.4]
    assert recorded["purifier"] == {"in_chans": 1, "width": 16, "blocks": 1, "code": 8}
    json.dumps(recorded)


def other_weights(folder):
    models.save(classifier(seed=1), folder)


def other_normalization(folder):
    f = models.load(folder)
    f.mean.fill_(0.5)
    models.save(f, folder)


@pytest.mark.parametrize("change", [other_weights, other_normalization])
def test_another_classifier_is_refused_unless_forced(tmp_path, change):
    models.save(pair(), tmp_path)
    change(tmp_path / "classifier")
    with pytest.raises(ModelError, match="robustify attach") as refused:
        models.load(tmp_path)
    assert "\n" not in str(refused.value)
    forced = models.load(tmp_path, force=True)
    assert forced.about["transferred"]["trained_before"]["sha256"] == pair().sha256


def test_a_touched_classifier_is_not_saved(tmp_path):
    both = pair()
    next(both.classifier.parameters()).data.add_(1)
    with pytest.raises(ModelError, match="untouched"):
        models.save(both, tmp_path)


def test_a_purifier_with_nan_is_not_saved(tmp_path):
    both = pair()
    next(both.purifier.parameters()).data.fill_(float("nan"))
    with pytest.raises(ModelError, match="finite"):
        models.save(both, tmp_path)


def test_damaged_files_are_refused_in_one_line(tmp_path):
    models.save(pair(), tmp_path)
    file = tmp_path / "purifier.safetensors"
    whole, weights = file.read_bytes(), load_file(file)
    broken = {
        "no header": lambda: save_file(weights, file),
        "missing tensor": lambda: save_file(dict(list(weights.items())[1:]), file, _header(whole)),
        "cut short": lambda: file.write_bytes(whole[:2000]),
    }
    for spoil in broken.values():
        spoil()
        with pytest.raises(ModelError, match="expected") as refused:
            models.load(tmp_path)
        assert "\n" not in str(refused.value)


def _header(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length])["__metadata__"]


def test_a_purified_model_is_no_bare_classifier(tmp_path):
    both = pair()
    models.save(both, tmp_path)
    with pytest.raises(ModelError, match="classifier"):
        models.adapt(tmp_path, num_classes=10, in_chans=1, image_size=8)
    with pytest.raises(UsageError, match="bare classifier"):
        Purified(Purifier(1, "tiny"), both)
