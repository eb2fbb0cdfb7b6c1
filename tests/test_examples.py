"""Every script of examples/ runs, at toy size."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from robustify import models

EXAMPLES = Path(__file__).parents[1] / "examples"


def tried(script, *words, cwd):
    """Run an example: exit code, stdout, stderr."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, words)], cwd=cwd, env=environment,
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def run(script, *words, cwd):
    code, out, err = tried(script, *words, cwd=cwd)
    assert code == 0, err[-2000:]
    return out


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


def test_a_new_recipe_is_written_in_under_40_lines_and_used(tmp_path):
    assert len((EXAMPLES / "new_recipe.py").read_text().splitlines()) < 40
    code, out, err = tried("new_recipe.py", "--student", "cnn_a", "--max-steps", "2",
                         "--limit", "8", "--suite", "fgsm", "--set", "pair_weight=2",
                         cwd=tmp_path)  # fmt: skip
    assert code == 0, err
    assert "Robustness of cnn_a on digits" in out
    assert (tmp_path / "runs" / "pairing-cnn_a-digits" / "model.safetensors").is_file()
    code, _, err = tried(
        "new_recipe.py", "--student", "cnn_a", "--set", "pair_wait=2", cwd=tmp_path
    )
    assert code == 2
    assert "did you mean 'pair_weight'" in err


def test_the_gpu_script_is_trained_in_pieces(tmp_path):
    small = ["--data", "digits", "--student", "cnn_a", "--train-limit", "160", "--limit", "8",
             "--suite", "fast"]  # fmt: skip
    small += ["--max-steps", "2", "--out", "short"]
    code, out, err = tried("cifar10_resnet18.py", *small, "--minutes", "0", cwd=tmp_path)
    assert code == 130, err
    assert re.search(r"1 calls, \d\.\d minutes so far", out)
    code, out, err = tried("cifar10_resnet18.py", *small, cwd=tmp_path)
    assert code == 0, err
    assert re.search(r"train: student +0\.\d\d\n", out)
    assert re.search(r"everything, 2 calls +\d\.\d\d\n", out)
    assert "Linf 8/255, suite fast, n = 8, seed 0: clean" in out
    assert (tmp_path / "short" / "metrics.jsonl").is_file()


def test_recipes_are_compared_at_the_passes_of_one_of_them(tmp_path):
    command = ["compare_recipes.py", "--recipes", "standard,pgd_at", "--student", "cnn_a",
               "--equal-passes", "pgd_at", "--set", "training.batch_size=256", "--seeds", "0",
               "--max-steps", "1", "--limit", "8", "--suite", "fast"]  # fmt: skip
    code, out, err = tried(*command, cwd=tmp_path)
    assert code == 0, err
    header, _, standard, pgd_at = (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in out.splitlines()[2:6]
    )  # fmt: skip
    assert header == ["recipe", "clean", "naive PGD", "fast", "95 % interval", "verdict", "epochs",
                      "model passes", "minutes"]  # fmt: skip
    assert (standard[6], pgd_at[6]) == ("132", "12")  # 2 and 22 passes an image
    assert (standard[7], pgd_at[7]) == ("512", "5,632")
    assert standard[5] == "not applicable 1"  # 8 images
    code, again, err = tried(*command, cwd=tmp_path)
    assert code == 0
    assert err.count("is already finished") == 2
    assert again == out


def test_the_cost_of_imagenet_is_counted(tmp_path):
    out = run("imagenet_cost.py", "--students", "resnet18", "--recipes", "standard,pgd_at",
              "--batch", 2, "--image-size", 32, cwd=tmp_path)  # fmt: skip
    standard, pgd_at = (line.split() for line in out.splitlines()[-2:])
    # A forward and a backward for the weights; three of both for the attack besides.
    assert (standard[2], pgd_at[2]) == ("2", "8")
    assert (standard[3], pgd_at[3]) == ("0.13", "0.51")  # of 1,276,167 images in 50 epochs


SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do echo "$1" >> srun-options; shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; else echo "$@" >> requeued; fi
"""


def test_a_slurm_job_goes_on_after_its_time_was_over(tmp_path):
    stubs = tmp_path / "bin"
    stubs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (stubs / name).write_text(text)
        (stubs / name).chmod(0o755)
    options = (
        "--image-size 32 --batch-size 32 --train-limit 400 --epochs 3 --suite fgsm --limit 8 "
        "--set attack.steps=4 --set training.checkpoint_seconds=0"
    )
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
        "PATH": f"{stubs}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{EXAMPLES.parent}:{os.environ.get('PYTHONPATH', '')}",
        "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NUM_NODES": "1", "SLURM_JOB_NODELIST": "n[1]",
        "SLURM_CPUS_PER_TASK": "6",
        "RECIPE": "pgd_at", "STUDENT": "cnn_a", "DATA": "digits", "OUT": "run", "PROCESSES": "2",
        "OPTIONS": options,
    }  # fmt: skip

    def submitted():
        return subprocess.Popen(
            ["bash", EXAMPLES / "slurm_imagenet.sbatch"], cwd=tmp_path, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    job = submitted()
    while not list(tmp_path.glob("run/checkpoints/stage0-*")):
        assert job.poll() is None, job.communicate()[1]
        time.sleep(0.01)
    job.send_signal(signal.SIGTERM)
    out, err = job.communicate(timeout=100)
    assert job.returncode != 0
    assert "interrupted; the same command continues" in err
    assert "back into the queue, to go on from the last checkpoint" in out
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    job = submitted()
    out, err = job.communicate(timeout=300)
    assert job.returncode == 0, err
    assert "resuming student at epoch" in err
    assert "--cpus-per-task=6" in (tmp_path / "srun-options").read_text().splitlines()
    assert "Robustness of cnn_a on digits" in out
    assert (tmp_path / "requeued").read_text().count("requeue") == 1
