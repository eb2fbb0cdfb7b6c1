"""Loading, adapting and saving: the same logits to the bit, one clear line for what cannot be."""

import json
import os
import pickle
import stat

import pytest
import safetensors.torch
import timm
import torch

from robustify import models
from robustify.errors import ModelError, RobustifyError, UsageError
from robustify.objective import check_teachers, is_from_scratch

FAMILIES = [
    "resnet18_small", "mobilenetv2_100_small", "densenet121_small", "vgg11_bn_small",
    "vit_tiny_patch4_32", "convnext_atto", "cnn_a",
]  # fmt: skip
DATA = {"num_classes": 4, "in_chans": 3, "image_size": 32, "class_names": ("a", "b", "c", "d")}


def small(architecture="resnet20_cifar", **changes):
    torch.manual_seed(0)
    return models.create(architecture, **{**DATA, **changes})


@pytest.fixture
def folder(tmp_path):
    models.save(small(data="letters"), tmp_path / "run", {"recipe": "standard"})
    return tmp_path / "run"


@pytest.fixture
def bare(tmp_path):
    """A published checkpoint: tensors and nothing else."""
    safetensors.torch.save_file(small().module.state_dict(), tmp_path / "bare.safetensors")
    return tmp_path / "bare.safetensors"


@torch.no_grad()
def logits(model, images):
    return model.eval()(images)


@pytest.mark.parametrize("architecture", FAMILIES)
def test_saved_and_loaded_by_us_and_by_timm_gives_the_same_bits(architecture, tmp_path):
    classifier = small(architecture, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), data="letters")
    images = torch.rand(3, 3, 32, 32)
    expected = logits(classifier, images)
    models.save(classifier, tmp_path, {"recipe": "standard"})
    for name in (tmp_path / "model.safetensors", tmp_path, f"local-dir:{tmp_path}"):
        loaded = models.load(name)
        assert torch.equal(logits(loaded, images), expected)
        assert loaded.class_names == ("a", "b", "c", "d")
        assert loaded.about == {"data": "letters", "recipe": "standard"}
        assert models.describe(loaded) == models.describe(classifier)
    bare = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert torch.equal(logits(bare, classifier.normalize(images)), expected)
    assert models.weights_hash(bare) == models.weights_hash(classifier.module)


def test_the_configuration_is_timm_s_without_what_transformers_cannot_read(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"] == "resnet20_cifar"
    assert config["num_classes"] == 4
    assert config["label_names"] == ["a", "b", "c", "d"]
    assert "num_classes" not in config["model_args"]
    assert config["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert config["pretrained_cfg"]["mean"] == [0.5, 0.5, 0.5]


def test_files_have_the_mode_of_the_umask_and_the_same_bytes_every_time(folder, tmp_path):
    plain = tmp_path / "plain"
    plain.touch()
    for name in ("model.safetensors", "config.json"):
        assert stat.S_IMODE(os.stat(folder / name).st_mode) == stat.S_IMODE(os.stat(plain).st_mode)
    models.save(models.load(folder), tmp_path / "again")
    for name in ("model.safetensors", "config.json"):
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_grey_images_and_another_size(tmp_path):
    classifier = small("resnet18", in_chans=1, image_size=8)
    assert classifier.architecture == "resnet18_small"
    models.save(classifier, tmp_path)
    loaded = models.load(tmp_path)
    images = torch.rand(2, 1, 8, 8)
    assert torch.equal(logits(loaded, images), logits(classifier, images))
    assert (loaded.in_chans, loaded.image_size) == (1, 8)


@pytest.mark.parametrize(
    ("architecture", "size", "wanted"),
    [
        ("resnet18", 8, 8), ("resnet18", 224, 224), ("resnet18", None, None), ("vgg11_bn", 8, 32),
        ("convnext_atto", 8, 32), ("vit_tiny_patch16_224", 8, 224), ("cnn_a", None, 32),
        ("swin_tiny_patch4_window7_224", 300, 224), ("resnet18.a1_in1k", 32, 32),
    ],
)  # fmt: skip
def test_wanted_image_size(architecture, size, wanted):
    assert models.wanted_image_size(architecture, size) == wanted


def test_a_fixed_size_network_takes_the_size_it_is_asked_for():
    classifier = small("vit_tiny_patch16_224", image_size=64)
    assert classifier.module.patch_embed.grid_size == (4, 4)
    with pytest.raises(ModelError, match="another image size"):
        small("convnext_atto", image_size=8)


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [("resnet18_small", (512, 4, 4)), ("vit_tiny_patch4_32", (192, 8, 8)), ("cnn_a", (32, 8, 8))],
)
def test_features_are_maps_of_the_same_forward(architecture, shape):
    classifier = small(architecture)
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        out, maps = classifier.features(images)
        assert torch.equal(out, classifier(images))
    assert maps.shape == (2, *shape)


def test_tokens_and_channels_last_maps_are_laid_out_as_the_image_is():
    classifier = small("swin_tiny_patch4_window7_224", image_size=56)
    tokens = classifier.module.forward_features(
        classifier.normalize(images := torch.rand(1, 3, 56, 56))
    )
    assert torch.allclose(classifier.features(images)[1][0, :, 1, 0], tokens[0, 1, 0])
    vit = small("vit_tiny_patch4_32")
    tokens = vit.module.forward_features(vit.normalize(images := torch.rand(1, 3, 32, 32)))
    assert torch.allclose(vit.features(images)[1][0, :, 2, 3], tokens[0, 1 + 2 * 8 + 3])


def test_adapt_keeps_what_fits_and_replaces_the_head(folder, caplog):
    before = models.load(folder)
    same = models.adapt(folder, **DATA)
    assert models.weights_hash(same.module) == models.weights_hash(before.module)
    assert caplog.text == ""
    other = models.adapt(folder, **{**DATA, "num_classes": 7, "class_names": tuple("tuvwxyz")})
    assert "its head is replaced" in caplog.text
    assert other(torch.rand(1, 3, 32, 32)).shape == (1, 7)
    assert torch.equal(other.module.conv1.weight, before.module.conv1.weight)
    grey = models.adapt(folder, **{**DATA, "in_chans": 1}, mean=(0.3,), std=(0.2,))
    assert torch.allclose(grey.module.conv1.weight, before.module.conv1.weight.sum(1, keepdim=True))
    assert models.describe(grey)["mean"] == [0.3]


def test_adapt_takes_large_networks_to_small_images(tmp_path, caplog):
    large = small("resnet18", image_size=96)
    models.save(large, tmp_path)
    fitted = models.adapt(tmp_path, **DATA)
    assert fitted.architecture == "resnet18_small"
    assert "centre" in caplog.text
    assert torch.equal(fitted.module.conv1.weight, large.module.conv1.weight[..., 2:5, 2:5])
    assert torch.equal(fitted.module.fc.weight, large.module.fc.weight)


def test_adapt_resizes_position_embeddings(tmp_path):
    models.save(small("vit_tiny_patch4_32"), tmp_path)
    fitted = models.adapt(tmp_path, **{**DATA, "image_size": 16})
    assert fitted(torch.rand(1, 3, 16, 16)).shape == (1, 4)
    models.save(fitted, tmp_path / "small")
    images = torch.rand(1, 3, 16, 16)
    assert torch.equal(logits(models.load(tmp_path / "small"), images), logits(fitted, images))


def test_like_is_the_same_network_with_other_weights(folder):
    student = models.load(folder)
    peer = models.like(student)
    assert models.describe(peer) == models.describe(student)
    assert models.weights_hash(peer.module) != models.weights_hash(student.module)
    assert models.like(student, "resnet18").architecture == "resnet18_small"


def test_labels_are_matched_by_name():
    images = torch.rand(2, 3, 32, 32)
    classifier = small()
    before = logits(classifier, images)
    matched = logits(models.match_labels(classifier, "ca"), images)
    torch.testing.assert_close(matched, before[:, [2, 0]])
    with pytest.raises(ModelError, match=r"\[a, x\].*\[c, a\]"):
        models.match_labels(classifier, "ax")
    unnamed = models.match_labels(small(class_names=None), "wxyz")
    assert unnamed.class_names == tuple("wxyz")


def test_classifier_normalizes_and_keeps_its_statistics_out_of_the_weights():
    classifier = small(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images = torch.rand(1, 3, 32, 32)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    assert torch.equal(logits(classifier, images), logits(classifier.module, (images - mean) / std))
    assert all(key.startswith("module.") for key in classifier.state_dict())


def test_a_bare_checkpoint_counts_as_trained_and_an_architecture_does_not(bare, tmp_path):
    loaded = models.load(bare)
    assert loaded.about == {"base": "bare.safetensors"}
    assert not is_from_scratch(loaded)
    models.save(small(data="letters"), tmp_path / "saved")
    assert not is_from_scratch(models.load(tmp_path / "saved"))
    assert is_from_scratch(small(data="letters"))


def test_replaced_parts_count_as_untrained_until_a_recipe_has_trained_them(folder, tmp_path):
    replaced = models.adapt(folder, **{**DATA, "num_classes": 7, "class_names": tuple("tuvwxyz")})
    assert is_from_scratch(replaced)
    models.save(replaced, tmp_path / "trained", {"recipe": "trades"})
    assert not is_from_scratch(models.load(tmp_path / "trained"))


def test_images_and_teachers_of_other_channels_are_refused():
    grey = small(in_chans=1)
    with pytest.raises(ModelError, match=r"expected images with 3 channels .* got 1"):
        small()(torch.rand(2, 1, 32, 32))
    with pytest.raises(UsageError, match="teacher for images with 3 channels"):
        check_teachers(small(), [grey], roles=1)


@pytest.mark.parametrize(
    ("place", "key", "value", "says"),
    [
        (None, "about", [1], "`about` in"), ("about", "threat_model", "x", "threat_model in"),
        ("about", "threat_model", {"norm": "L7", "eps": 1}, "a norm and an eps"),
        ("model", "class_names", 7, "class_names in"), ("model", "std", [0.0] * 3, "positive std"),
    ],
)  # fmt: skip
def test_a_header_of_another_form_is_refused(folder, place, key, value, says):
    path = folder / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        recorded = json.loads(file.metadata()["robustify"])
    (recorded[place] if place else recorded)[key] = value
    header = {"robustify": json.dumps(recorded)}
    safetensors.torch.save_file(safetensors.torch.load_file(path), path, header)
    with pytest.raises(ModelError, match=says):
        models.load(path)


def test_a_bare_checkpoint_is_recognized_by_its_tensors(bare, caplog):
    classifier = models.load(bare)
    assert classifier.architecture == "resnet20_cifar"
    assert "records no normalization" in caplog.text
    assert models.describe(classifier)["mean"] == [0.485, 0.456, 0.406]
    caplog.clear()
    named = models.load(f"resnet20_cifar:{bare}", mean=(0, 0, 0), std=(1, 1, 1))
    assert models.describe(named)["mean"] == [0, 0, 0]
    assert caplog.text == ""


def test_a_bare_checkpoint_of_an_unknown_network_is_loaded_when_named(tmp_path):
    path = tmp_path / "x.safetensors"
    module = small("resnet18").module
    safetensors.torch.save_file(module.state_dict(), path)
    with pytest.raises(ModelError, match="resnet18:"):
        models.load(path)
    assert models.weights_hash(models.load(f"resnet18_small:{path}").module) == (
        models.weights_hash(module)
    )
    with pytest.raises(ModelError, match=r"conv1.weight \(64, 3, 3, 3\), not \(64, 3, 7, 7\)"):
        models.load(f"resnet18:{path}")


def test_sharded_weights_are_read_and_may_not_leave_the_folder(folder):
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    parts = {"one.safetensors": names[:20], "two.safetensors": names[20:]}
    for part, held in parts.items():
        safetensors.torch.save_file({name: weights[name] for name in held}, folder / part)
    index = {"weight_map": {name: part for part, held in parts.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert models.weights_hash(models.load(folder).module) == models.weights_hash(small().module)
    index["weight_map"][names[0]] = "../one.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="inside the folder"):
        models.load(folder)


def rewritten(folder, change):
    """The folder with another configuration."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(architecture="resnet20_cifra"), "did you mean 'resnet20_cifar'"),
        (lambda c: c.update(architecture=["resnet18"]), "name an architecture"),
        (lambda c: c.update(architecture="resnet32_cifar"), "to agree"),
        (lambda c: c["pretrained_cfg"].update(file="../../secret.pth"), "inside the folder"),
        (lambda c: c["pretrained_cfg"].update(mean="x"), "expected numbers"),
        (lambda c: c["model_args"].update(checkpoint_path="/tmp/evil.pth"), "checkpoint_path"),
        (lambda c: c.update(model_args=3), "model_args"),
        (lambda c: (c.pop("architecture"), c.update(model_type="vit")), "to agree"),
        (lambda c: c.update(num_classes=9), r"linear.bias \(4,\), not \(9,\)|linear.weight"),
    ],
)
def test_a_wrong_configuration_is_refused(folder, change, says):
    with pytest.raises(ModelError, match=says) as refusal:
        models.load(rewritten(folder, change))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("conv1.weight"), "missing 'conv1.weight'"),
        (lambda w: w.update(stranger=torch.ones(1)), "extra 'stranger'"),
        (lambda w: w["bn1.bias"].fill_(torch.nan), "'bn1.bias'.* holds NaN"),
    ],
)
def test_wrong_tensors_are_refused(folder, change, says):
    path = folder / "model.safetensors"
    weights = safetensors.torch.load_file(path)
    change(weights)
    with safetensors.safe_open(path, "pt") as file:
        header = file.metadata()
    safetensors.torch.save_file(weights, path, header)
    for name in (folder, path):
        with pytest.raises(ModelError, match=says):
            models.load(name)


class Payload:
    def __reduce__(self):
        return os.mkdir, (os.environ["ROBUSTIFY_TEST_TRACE"],)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("write", [lambda o, f: pickle.dump(o, f), torch.save])
def test_a_pickle_is_refused_unread(tmp_path, monkeypatch, name, write):
    monkeypatch.setenv("ROBUSTIFY_TEST_TRACE", str(tmp_path / "executed"))
    (tmp_path / "config.json").write_text('{"architecture": "resnet20_cifar"}')
    with open(tmp_path / name, "wb") as file:
        write(Payload(), file)
    for target in (tmp_path / name, tmp_path):
        if target == tmp_path and name == "model.pth":
            continue
        with pytest.raises(ModelError, match=r"pickle.*weights_only=True"):
            models.load(target)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-100],
        lambda data: data[:5],
        lambda data: b"",
        lambda data: (2**40).to_bytes(8, "little") + data[8:],
        lambda data: (17).to_bytes(8, "little") + data[8:],
    ],
)
def test_a_damaged_file_is_refused(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    for target in (path, folder):
        with pytest.raises(ModelError, match="damaged or cut short"):
            models.load(target)


@pytest.mark.parametrize(
    ("name", "says", "kind"),
    [
        ("resnet81", "did you mean 'resnet18'", UsageError),
        ("nothing.safetensors", "does not exist", ModelError),
        ("runs/none", "hf-hub:runs/none", ModelError),
        ("local-dir:none", "expected a folder", ModelError),
        ("resnet20_cifar", "nobody published", ModelError),
        ("resnet18.no_tag", "resnet18.a1_in1k", UsageError),
    ],
)
def test_an_unknown_name_is_refused(name, says, kind):
    with pytest.raises(kind, match=says):
        models.load(name)


def test_the_hub_without_a_network_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("hf-hub:somebody/something", "hf-hub:somebody/something@v1", "hf-hub:a/b/c"):
        with pytest.raises(RobustifyError, match="could not get hf-hub:") as refusal:
            models.load(name)
        assert "\n" not in str(refusal.value)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    classifier = small()
    with torch.no_grad():
        classifier.module.conv1.weight[0] = torch.inf
    with pytest.raises(ModelError, match="finite"):
        models.save(classifier, tmp_path)
    assert list(tmp_path.iterdir()) == []


PUBLISHED = [("resnet20", "resnet20_cifar", 91.73), ("resnet56", "resnet56_cifar", 93.39)]


def cifar10_test(shared, count):
    import io

    import pyarrow.parquet
    from PIL import Image

    table = pyarrow.parquet.read_table(shared / "data/cifar10/test-00000-of-00001.parquet")
    rows = table.slice(0, count).to_pylist()
    images = [torch.frombuffer(bytearray(Image.open(io.BytesIO(r["img"]["bytes"])).tobytes()),
                               dtype=torch.uint8) for r in rows]  # fmt: skip
    labels = torch.tensor([r["label"] for r in rows])
    return torch.stack(images).view(-1, 32, 32, 3).permute(0, 3, 1, 2) / 255, labels


def accuracy(classifier, images, labels):
    found = torch.cat([logits(classifier, batch).argmax(1) for batch in images.split(250)])
    return 100 * (found == labels).double().mean().item()


def test_published_checkpoints_are_as_good_as_published_on_the_first_thousand(shared):
    images, labels = cifar10_test(shared, 1000)
    for name, architecture, published in PUBLISHED[:1]:
        classifier = models.load(shared / f"models/cifar10_{name}_standard.safetensors")
        assert classifier.architecture == architecture
        assert accuracy(classifier, images, labels) == pytest.approx(published, abs=1.5)
    robust = models.load(shared / "models/cifar10_cnn_a_adv.safetensors")
    assert accuracy(robust, images, labels) == pytest.approx(68.73, abs=3)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "architecture", "published"), PUBLISHED)
def test_published_checkpoints_are_as_good_as_published(shared, name, architecture, published):
    images, labels = cifar10_test(shared, 10000)
    classifier = models.load(shared / f"models/cifar10_{name}_standard.safetensors")
    assert accuracy(classifier, images, labels) == pytest.approx(published, abs=0.005)
