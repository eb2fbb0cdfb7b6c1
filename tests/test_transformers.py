"""Classifiers of transformers in and out, and timm's networks through transformers and back."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import robustify
from robustify import models
from robustify.errors import ModelError
from robustify.transformers_config import normalization, require_plain

transformers = pytest.importorskip("transformers")
transformers.utils.logging.disable_progress_bar()
Auto = transformers.AutoModelForImageClassification

NAMES = [f"kind {i}" for i in range(10)]
SMALL = {
    "vit": ("ViT", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                    "intermediate_size": 64, "image_size": 32, "patch_size": 8}),
    "swin": ("Swin", {"image_size": 32, "patch_size": 2, "embed_dim": 16, "depths": [1, 1],
                      "num_heads": [2, 2], "window_size": 4}),
    "resnet": ("ResNet", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
                          "layer_type": "basic"}),
    "convnext": ("ConvNext", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
}  # fmt: skip
MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]


def network(kind):
    prefix, settings = SMALL[kind]
    torch.manual_seed(1)
    labels = {"id2label": dict(enumerate(NAMES)), "label2id": {n: i for i, n in enumerate(NAMES)}}
    config = getattr(transformers, f"{prefix}Config")(**settings, **labels)
    return getattr(transformers, f"{prefix}ForImageClassification")(config).eval()


@pytest.fixture(params=SMALL)
def saved(request, tmp_path):
    """A folder as transformers writes it, and the network in it."""
    made = network(request.param)
    made.save_pretrained(tmp_path / "theirs")
    kind = "ConvNextImageProcessor" if request.param == "convnext" else "ViTImageProcessor"
    size = {"shortest_edge": 32} if request.param == "convnext" else {"height": 32, "width": 32}
    processor = getattr(transformers, kind)(size=size, image_mean=MEAN, image_std=STD)
    processor.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs", made


@torch.no_grad()
def logits(model, images):
    out = model.eval()(images)
    return out if isinstance(out, torch.Tensor) else out.logits


def test_it_loads_with_its_processor_s_normalization_its_size_and_its_names(saved):
    folder, theirs = saved
    ours = robustify.load(folder)
    images = torch.rand(2, 3, 32, 32)
    scaled = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert torch.equal(logits(ours, images), logits(theirs, scaled))
    assert (ours.image_size, ours.num_classes) == (32, 10)
    assert list(ours.class_names) == NAMES


def test_features_and_logits_come_from_one_forward(saved):
    ours = robustify.load(saved[0])
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        found, maps = ours.features(images)
    assert torch.equal(found, logits(ours, images))
    assert maps.dim() == 4
    assert maps.shape[2] == maps.shape[3]


def test_it_goes_back_as_transformers_wrote_it(saved, tmp_path):
    folder, theirs = saved
    ours = robustify.load(folder)
    models.save(ours, tmp_path / "back")
    images = torch.rand(2, 3, 32, 32)
    before, after = (load_file(f / "model.safetensors") for f in (folder, tmp_path / "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again = Auto.from_pretrained(tmp_path / "back")
    assert type(again) is type(theirs)
    assert torch.equal(logits(again, images), logits(theirs, images))
    assert again.config.id2label == dict(enumerate(NAMES))
    for name in (tmp_path / "back", tmp_path / "back" / "model.safetensors"):
        assert torch.equal(logits(robustify.load(name), images), logits(ours, images))


def test_the_processor_that_goes_back_does_what_ours_does(saved, tmp_path):
    ours = robustify.load(saved[0], mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    models.save(ours, tmp_path / "back")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "back")
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    theirs = processor(Image.fromarray(pixels), return_tensors="pt")["pixel_values"]
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    assert torch.allclose(theirs, ours.normalize(images), atol=1e-6)


def test_other_classes_and_channels(saved, tmp_path, caplog):
    folder, _ = saved
    kept = models.adapt(folder, num_classes=2, in_chans=3, image_size=32,
                        class_names=("kind 7", "kind 2"))  # fmt: skip
    images = torch.rand(2, 3, 32, 32)
    assert torch.allclose(
        logits(kept, images), logits(robustify.load(folder), images)[:, [7, 2]], atol=1e-6
    )
    grey = models.adapt(folder, num_classes=3, in_chans=1, image_size=32, class_names=tuple("abc"))
    assert "its head is replaced" in caplog.text
    models.save(grey, tmp_path / "grey", {"recipe": "standard"})
    again = Auto.from_pretrained(tmp_path / "grey")
    images = torch.rand(2, 1, 32, 32)
    assert torch.equal(logits(again, grey.normalize(images)), logits(grey, images))
    assert again.config.id2label == {0: "a", 1: "b", 2: "c"}
    loaded = robustify.load(tmp_path / "grey")
    assert models.describe(loaded) == models.describe(grey)
    assert loaded.about["recipe"] == "standard"
    other = models.like(grey)
    assert models.describe(other) == models.describe(grey)
    assert models.weights_hash(other) != models.weights_hash(grey)


def test_a_network_of_one_size_gets_images_of_that_size(tmp_path):
    for kind, wanted in (("vit", 32), ("resnet", 48), ("convnext", 48)):
        network(kind).save_pretrained(tmp_path / kind)
        assert models.wanted_image_size(tmp_path / kind, 48) == wanted
    with pytest.raises(ModelError, match="another image size"):
        models.adapt(tmp_path / "vit", num_classes=10, in_chans=3, image_size=64)


def test_one_epoch_on_digits_and_back_to_transformers(tmp_path):
    network("resnet").save_pretrained(tmp_path / "theirs")
    folder = robustify.distill(
        "pgd_at", f"local-dir:{tmp_path / 'theirs'}", out=tmp_path / "run", suite="fgsm", limit=100,
        settings={"training.epochs": 1, "attack.steps": 2}, image_size=32,
    )  # fmt: skip
    student, again = robustify.load(folder), Auto.from_pretrained(folder)
    images = torch.rand(4, 1, 32, 32)
    assert torch.equal(logits(again, student.normalize(images)), logits(student, images))
    assert list(again.config.id2label.values()) == list("0123456789")
    assert transformers.AutoImageProcessor.from_pretrained(folder).image_mean == pytest.approx(
        student.mean.flatten().tolist()
    )
    start = models.adapt(tmp_path / "theirs", num_classes=10, in_chans=1, image_size=32)
    trained = [not torch.equal(a, b) for a, b in zip(start.parameters(), student.parameters(),
                                                     strict=True)]  # fmt: skip
    assert all(trained)


@pytest.mark.parametrize(
    "architecture",
    ["resnet18", "vit_tiny_patch16_224", "convnext_atto", "mobilenetv3_small_050"],
)
def test_distilled_in_timm_through_transformers_and_back_to_timm(architecture, tmp_path):
    folder = robustify.distill("standard", architecture, out=tmp_path / "run", max_steps=1,
                               train_limit=100, suite="fgsm", limit=8, image_size=80)  # fmt: skip
    images = torch.rand(3, 1, 80, 80)
    expected = logits(robustify.load(folder).module, images)
    in_timm = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert torch.equal(logits(in_timm, images), expected)
    there = Auto.from_pretrained(folder)
    assert torch.equal(logits(there, images), expected)
    assert there.config.id2label == dict(enumerate("0123456789"))
    there.save_pretrained(tmp_path / "again")
    back = timm.create_model(f"local-dir:{tmp_path / 'again'}", pretrained=True)
    assert torch.equal(logits(back, images), expected)
    ours = robustify.load(tmp_path / "again")
    assert torch.equal(logits(ours.module, images), expected)
    assert ours.class_names == tuple("0123456789")


def test_a_timm_student_loads_where_robustify_is_not_installed(tmp_path):
    student = models.create("mobilenetv3_small_050", num_classes=3, image_size=72)
    models.save(student, tmp_path)
    images = torch.rand(2, 3, 72, 72, generator=torch.Generator().manual_seed(0))
    code = (
        "import sys; sys.modules['robustify'] = None\n"
        "import timm, torch\n"
        "from transformers import AutoModelForImageClassification as Auto\n"
        "images = torch.rand(2, 3, 72, 72, generator=torch.Generator().manual_seed(0))\n"
        "with torch.no_grad():\n"
        f"    a = timm.create_model('local-dir:{tmp_path}', pretrained=True).eval()(images)\n"
        f"    b = Auto.from_pretrained('{tmp_path}').eval()(images).logits\n"
        "print(a.equal(b), a.flatten().tolist())"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr
    equal, _, numbers = done.stdout.partition(" ")
    assert equal == "True"
    found = torch.tensor(json.loads(numbers)).view(2, 3)
    assert torch.equal(found, logits(student.module, images))


@pytest.mark.parametrize(
    ("processor", "mean", "std"),
    [
        ({"image_mean": [0.5], "image_std": [0.25]}, [0.5], [0.25]),
        ({"image_mean": [0.5], "image_std": [0.5], "do_normalize": False}, [0], [1]),
        ({"image_mean": [127.5], "image_std": [51], "do_rescale": False}, [0.5], [0.2]),
        ({"image_mean": [0], "image_std": [1], "rescale_factor": 1 / 127.5, "rescale_offset": True},
         [0.5], [0.5]),
        ({}, [], []),
    ],
)  # fmt: skip
def test_normalization_is_what_the_processor_computes(processor, mean, std):
    found = normalization(processor)
    assert list(found[0]) == pytest.approx(mean)
    assert list(found[1]) == pytest.approx(std)


# What is refused


@pytest.fixture
def folder(tmp_path):
    network("vit").save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(model_type="vitt"), "did you mean 'vit'"),
        (lambda c: c.update(model_type="bert"), "an image classifier that transformers knows"),
        (lambda c: c.update(auto_map={"AutoModel": "evil.Net"}), "never run"),
        (lambda c: c.update(backbone="../../secret"), "inside the folder"),
        (lambda c: c.update(backbone="/etc/passwd"), "inside the folder"),
        (lambda c: c.update(hidden_size="wide"), "check its config.json"),
        (lambda c: c.update(num_hidden_layers=3), "missing"),
        (lambda c: c.update(num_hidden_layers=1), "extra"),
        (lambda c: c.update(hidden_size=64), "not"),
        (lambda c: c.update(id2label={"0": "a", "5": "b"}), "expected numbers for the classes"),
    ],
)
def test_a_wrong_configuration_is_refused_in_one_line(folder, change, says):
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=says) as refused:
        robustify.load(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("vit.embeddings.cls_token"), "missing 'vit.embeddings.cls_token'"),
        (lambda w: w.update(stranger=torch.ones(1)), "extra 'stranger'"),
        (lambda w: w.update({"classifier.bias": torch.ones(3)}), r"classifier.bias \(3,\), not"),
    ],
)
def test_wrong_tensors_are_refused_in_one_line(folder, change, says, capsys):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=says) as refused:
        robustify.load(folder)
    assert "\n" not in str(refused.value)
    assert "LOAD REPORT" not in "".join(capsys.readouterr())


def test_without_the_extra_the_error_names_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match=r"pip install 'robustify-classifiers\[transformers\]'"):
        robustify.load(folder)


def test_where_it_came_from_may_be_anywhere():
    require_plain({"_name_or_path": "/home/ann/vit", "hidden_act": "gelu"}, "config.json")
