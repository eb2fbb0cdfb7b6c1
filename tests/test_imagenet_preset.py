"""The preset for ImageNet, end to end at toy size: real networks of timm, 224 pixels, one epoch."""

import json

import pytest
from children import launch
from PIL import Image

from robustify import data


@pytest.fixture
def photos(tmp_path):
    """A folder of JPEG files of mixed sizes: two classes of the digits, enlarged."""
    train = data.load("digits").train
    for label in (0, 1):
        images = train.store[train.indices[train.labels == label][:14]]
        for number, image in enumerate(images):
            folder = tmp_path / "photos" / ("train" if number < 10 else "val") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            size = (256, 300) if number % 2 else (320, 240)
            picture = Image.fromarray(image[0].numpy()).resize(size, Image.Resampling.BICUBIC)
            picture.convert("RGB").save(folder / f"{number}.jpg")
    return tmp_path / "photos"


@pytest.mark.slow
@pytest.mark.parametrize("student", ["vit_tiny_patch16_224", "convnext_atto"])
def test_a_vit_and_a_convnext_train_for_an_epoch_at_224_pixels(photos, tmp_path, student):
    out = tmp_path / "run"
    launch(
        1, "distill", "--recipe", "pgd_at", "--student", student, "--data", photos, "--preset",
        "imagenet", "--epochs", 1, "--batch-size", 6, "--suite", "fgsm", "--out", out,
    )  # fmt: skip
    run = json.loads((out / "robustify.json").read_text())["run"]
    assert run["threat_model"] == {"norm": "Linf", "eps": pytest.approx(4 / 255)}
    assert run["attack"]["steps"] == 3
    config = json.loads((out / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 224, 224]
    (epoch,) = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    assert 0 < epoch["loss"] < 10
    assert epoch["lr"] > 0
    assert {"student robust", "averaged robust"} <= epoch.keys()
    report = json.loads((out / "report.json").read_text())
    assert report["n"] == 8
