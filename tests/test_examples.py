"""Every script of examples/ runs, at toy size."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from robustify import models

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(script, *words, cwd):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, words)], cwd=cwd, env=environment,
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture
def photos(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "photos" / split / name).mkdir(parents=True)
            for number in range(count):
                noise = torch.randint(0, 60, (32, 40, 3), generator=generator, dtype=torch.uint8)
                pixels = noise + 120 * label
                Image.fromarray(pixels.numpy()).save(
                    tmp_path / "photos" / split / name / f"{number}.png"
                )
    return tmp_path / "photos"


def test_robustify_a_timm_model_on_an_image_folder(photos, tmp_path):
    import timm

    torch.manual_seed(0)
    start = models.create("resnet18", num_classes=5, image_size=96)
    models.save(start, tmp_path / "published")  # stands for weights that timm would download
    out = run("robustify_image_folder.py", "photos", "--student", "local-dir:published",
              "--max-steps", 2, "--suite", "fgsm", cwd=tmp_path)  # fmt: skip
    assert "robust accuracy" in out
    assert "Linf, eps 8/255, suite fgsm, n = 8" in out
    found = timm.create_model(f"local-dir:{tmp_path / 'runs/photos'}", pretrained=True)
    assert found.num_classes == 2


def test_evaluate_somebody_s_checkpoint(tmp_path):
    torch.manual_seed(0)
    made = models.create("resnet20_cifar", num_classes=10, in_chans=1, image_size=8)
    models.save(made, tmp_path / "theirs")
    out = run("evaluate_checkpoint.py", "theirs/model.safetensors", "--limit", 20, "--suite",
              "fgsm", "--eps", "2/255", cwd=tmp_path)  # fmt: skip
    assert "robust accuracy" in out
    assert "verdict: " in out


def test_a_purifier_before_a_transformers_classifier(tmp_path):
    transformers = pytest.importorskip("transformers")
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic",
            num_channels=1, num_labels=10,
        )  # fmt: skip
        transformers.ResNetForImageClassification(config).save_pretrained(tmp_path / name)
        processor = transformers.ViTImageProcessor(
            size={"height": 32, "width": 32}, image_mean=[0.5], image_std=[0.5]
        )
        processor.save_pretrained(tmp_path / name)
    out = run("purify_transformers_classifier.py", "local-dir:one", "--before", "local-dir:two",
              "--max-steps", 1, "--suite", "fgsm", "--limit", 4, cwd=tmp_path)  # fmt: skip
    assert out.count("  W ") == 2
    assert "runs/purified-attached" in out
