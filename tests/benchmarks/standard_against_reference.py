"""`standard` and `fast` beside the authors' AutoAttack, on two small robust networks.

    OMP_NUM_THREADS=1 python tests/benchmarks/standard_against_reference.py [adv|mix] [SUITE]

Robust accuracy after each attack, agreement per image, model passes per image and CPU seconds, for
the first 1,000 CIFAR-10 test images at Linf 2/255. Needs the reference figures, the networks and
the images under $ROBUSTIFY_SHARED (`../shared` beside the checkout unless set); without them it
says so and does nothing.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from robustify.attacks.suite import AttackOutcome, make_suite, run_suite
from robustify.threat import ThreatModel

SHARED = Path(os.environ.get("ROBUSTIFY_SHARED", Path(__file__).parents[2].parent / "shared"))
IMAGES = 1000


class Normalized(nn.Module):
    """A network behind its own normalisation."""

    def __init__(self, network: nn.Module, mean: list[float], std: list[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        return self.network((images - self.mean) / self.std)


def cnn_a(training: str) -> nn.Module:
    """The network `cifar10_cnn_a_<training>`, in eval mode."""
    network = nn.Sequential(
        nn.Conv2d(3, 16, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 4, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2048, 100),
        nn.ReLU(),
        nn.Linear(100, 10),
    )
    network.load_state_dict(load_file(SHARED / f"models/cifar10_cnn_a_{training}.safetensors"))
    mean, std = [125.3, 123.0, 113.9], [63.0, 62.1, 66.7]
    return Normalized(network, [m / 255 for m in mean], [s / 255 for s in std]).eval()


def cifar10_test(count: int) -> tuple[Tensor, Tensor]:
    """The first `count` test images, (count, 3, 32, 32) in [0, 1], and their labels."""
    import pyarrow.parquet as pq
    from PIL import Image

    (file,) = (SHARED / "data/cifar10").glob("test-*.parquet")
    table = pq.read_table(file, columns=["img", "label"]).slice(0, count)
    pixels = [
        np.array(Image.open(io.BytesIO(entry["bytes"]))) for entry in table["img"].to_pylist()
    ]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
    return images.contiguous(), torch.tensor(table["label"].to_pylist())


def show(training: str, suite: str, outcomes: list[AttackOutcome]) -> None:
    """Our figures, the reference's, and the ratio of the totals."""
    stem = SHARED / f"models/reference/cifar10_cnn_a_{training}_Linf_2-255_{IMAGES}"
    reference = json.loads(stem.with_suffix(".json").read_text())
    per_image = np.load(stem.with_suffix(".npz"))
    print(f"cnn_a_{training} {suite}: robust accuracy, (reference), agreement; per image: passes")
    forward = backward = seconds = 0.0
    for outcome in outcomes:
        robust = outcome.survivors.float().mean().item()
        line = f"  {outcome.name:8s} {robust:.3f}"
        if suite == "standard":
            theirs = torch.from_numpy(per_image[outcome.name])
            agreement = (outcome.survivors == theirs).float().mean().item()
            line += f" ({theirs.float().mean().item():.3f}) agree {agreement:.3f}"
        passes = outcome.passes
        line += f"  forward {passes.forward / IMAGES:8.2f} backward {passes.backward / IMAGES:7.2f}"
        if suite == "standard" and outcome.name != "clean":
            row = reference["attacks"][outcome.name]
            line += f" ({row['forward_per_image']:.1f}, {row['backward_per_image']:.1f})"
            line += f"  {outcome.seconds:.1f} CPU s ({row['cpu_seconds']:.1f})"
        else:
            line += f"  {outcome.seconds:.1f} CPU s"
        print(line)
        forward, backward = forward + passes.forward, backward + passes.backward
        seconds += outcome.seconds
    total = reference["total"]
    theirs_total = total["forward_per_image"] + total["backward_per_image"]
    ours = (forward + backward) / IMAGES
    last = torch.from_numpy(per_image["square"]).float().mean().item()
    gap = outcomes[-1].survivors.float().mean().item() - last
    print(
        f"  total    {ours:.1f} passes ({theirs_total:.1f}), share {ours / theirs_total:.3f}; "
        f"{seconds:.1f} CPU s ({total['cpu_seconds_one_thread']}), "
        f"share {seconds / total['cpu_seconds_one_thread']:.3f}; {100 * gap:+.1f} points",
        flush=True,
    )


def main() -> None:
    """Run what the command line names; both networks and both suites unless told."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", help="adv, mix, fast, standard, or an attack list")
    parser.add_argument("--batch-size", type=int, default=250)
    arguments = parser.parse_args()
    if not (SHARED / "models/reference").is_dir():
        sys.exit(f"nothing to compare with: {SHARED} is absent; set ROBUSTIFY_SHARED")
    torch.set_num_threads(1)
    only = arguments.only
    images, labels = cifar10_test(IMAGES)
    threat = ThreatModel("Linf", 2 / 255)
    for training in [name for name in ("adv", "mix") if name in only] or ["adv", "mix"]:
        for name in [word for word in only if word not in ("adv", "mix")] or ["fast", "standard"]:
            outcomes = run_suite(
                cnn_a(training),
                images,
                labels,
                suite=make_suite(name, threat, classes=10),
                threat=threat,
                batch_size=arguments.batch_size,
            )
            show(training, name, outcomes)


if __name__ == "__main__":
    main()
