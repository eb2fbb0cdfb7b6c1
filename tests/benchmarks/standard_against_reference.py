"""`standard` and `fast` beside the authors' AutoAttack, on two small robust networks.

    OMP_NUM_THREADS=1 python tests/benchmarks/standard_against_reference.py [adv|mix] [SUITE]
        [--limit N] [--record]

Robust accuracy after each attack, agreement per image, model passes per image and CPU seconds, for
the first CIFAR-10 test images at Linf 2/255. The reference's passes and CPU seconds are of 1,000
images, and its CPU seconds of another machine: with a smaller --limit these compare the means of
different images. Needs the reference figures, the networks and the images under $ROBUSTIFY_SHARED
(`../shared` beside the checkout unless set); without them it says so and does nothing.
"""

from __future__ import annotations

import io
import json
import sys
from typing import Any

import numpy as np
import results
import torch
from results import SHARED
from safetensors.torch import load_file
from torch import Tensor, nn

from robustify.attacks.suite import AttackOutcome, make_suite, run_suite
from robustify.threat import ThreatModel

IMAGES = 1000  # of the reference


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


def rows(training: str, suite: str, outcomes: list[AttackOutcome]) -> list[results.Row]:
    """A row for each attack, and one for all of them together."""
    stem = SHARED / f"models/reference/cifar10_cnn_a_{training}_Linf_2-255_{IMAGES}"
    reference = json.loads(stem.with_suffix(".json").read_text())
    per_image = np.load(stem.with_suffix(".npz"))
    found = [_row(outcome, per_image, reference, suite) for outcome in outcomes]
    found.append(_total(outcomes, per_image, reference, suite))
    return [{"network": f"cnn_a_{training}", "suite": suite, **row} for row in found]


def _row(
    outcome: AttackOutcome, per_image: Any, reference: dict[str, Any], suite: str
) -> dict[str, Any]:
    """One attack; beside it the reference's, where `suite` is the one that it ran."""
    n = len(outcome.survivors)
    row = {
        "attack": outcome.name,
        "robust": f"{outcome.survivors.float().mean().item():.1%}",
        "reference": None,
        "agreement": None,
        "passes": outcome.passes.total / n,
        "of its passes": None,
        "CPU seconds": outcome.seconds,
    }
    if suite == "standard":
        theirs = torch.from_numpy(per_image[outcome.name][:n])
        row["reference"] = f"{theirs.float().mean().item():.1%}"
        row["agreement"] = f"{(outcome.survivors == theirs).float().mean().item():.1%}"
        if outcome.name in reference["attacks"]:
            theirs = reference["attacks"][outcome.name]
            row["of its passes"] = row["passes"] / _passes(theirs)
    return row


def _total(
    outcomes: list[AttackOutcome], per_image: Any, reference: dict[str, Any], suite: str
) -> dict[str, Any]:
    """All attacks together, against the reference's last word."""
    last, n = outcomes[-1].survivors, len(outcomes[-1].survivors)
    theirs = torch.from_numpy(per_image["square"][:n])
    passes = sum(outcome.passes.total for outcome in outcomes) / n
    return {
        "attack": "all",
        "robust": f"{last.float().mean().item():.1%}",
        "reference": f"{theirs.float().mean().item():.1%}",
        "agreement": f"{(last == theirs).float().mean().item():.1%}",
        "passes": passes,
        "of its passes": passes / _passes(reference["total"]),
        "CPU seconds": sum(outcome.seconds for outcome in outcomes),
    }


def _passes(row: dict[str, Any]) -> float:
    return row["forward_per_image"] + row["backward_per_image"]


def main() -> None:
    """Run what the command line names; both networks and both suites unless told."""
    parser = results.parser(__doc__)
    parser.add_argument("only", nargs="*", help="adv, mix, fast, standard, or an attack list")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--limit", type=int, default=IMAGES)
    arguments = parser.parse_args()
    if not (SHARED / "models/reference").is_dir():
        sys.exit(f"nothing to compare with: {SHARED} is absent; set ROBUSTIFY_SHARED")
    torch.set_num_threads(1)
    only = arguments.only
    if arguments.quick:
        only, arguments.limit = ["adv", "fast"], 8
    images, labels = cifar10_test(arguments.limit)
    threat = ThreatModel("Linf", 2 / 255)
    found = []
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
            found += rows(training, name, outcomes)
    title = (
        f"Beside the authors' AutoAttack: CIFAR-10, Linf 2/255, n = {len(images)}, seed 0; passes "
        f"are model passes per image, the reference's over {IMAGES} images"
    )
    results.show("standard_against_reference", {title: found}, record=arguments.record)


if __name__ == "__main__":
    main()
