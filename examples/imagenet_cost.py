"""What adversarial training on ImageNet costs, on paper: model passes, and hours from their rate.

    python examples/imagenet_cost.py [--students resnet50,…] [--recipes pgd_at,…] [--tflops 75]

Model passes (images forward plus images backward, of every network) of the preset `imagenet` are
counted in real steps at 224 pixels. The pass rate is measured in the same steps on this device, of
one CPU thread or one GPU. Hours on eight GPUs follow from the floating-point operations that each
is assumed to sustain, and from nothing measured there: 75 TFLOP/s is ordinary training of a
ResNet-50 at 3,000 images a second (3 passes of 8.2 GFLOP each), which is usual on an H100 in mixed
precision; ViTs run at several times that.
"""

import argparse
import time
from dataclasses import replace

import torch
from tabulate import tabulate

from robustify import data, effort, harden

IMAGES = 1_281_167  # of ImageNet-1k's training split
VALIDATED = 5_000  # of them are held out
CLASSES = 1_000

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--students", default="resnet50,vit_small_patch16_224,convnext_tiny")
parser.add_argument("--recipes", default="pgd_at,trades,peeraid")
parser.add_argument("--tflops", type=float, default=75, help="sustained by each GPU")
parser.add_argument("--gpus", type=int, default=8)
parser.add_argument("--batch", type=int, default=8)
parser.add_argument("--image-size", type=int, default=224)
arguments = parser.parse_args()
torch.set_num_threads(1)

shown = data.load("digits", image_size=arguments.image_size)
shown = replace(
    shown, train=shown.train.take(20 * arguments.batch),
    class_names=tuple(f"class {number}" for number in range(CLASSES)),
)  # fmt: skip


def clock():
    """Seconds of this thread's work; of a GPU, until it is done."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.monotonic()


def cost(recipe, student):
    """One row of the table."""
    job = harden.plan(
        recipe, student, preset="imagenet", train_limit=arguments.batch,
        image_size=arguments.image_size, settings={"training.batch_size": arguments.batch},
    )  # fmt: skip
    job = replace(job, dataset=shown)
    (stage,) = effort.stages(job)
    fetched = effort.first_batch(stage)
    stage.progress.epoch = stage.settings.epochs - 1
    images, _, _ = stage.batch(fetched, 0)
    with effort.counting(stage.objective, images) as passes, effort.FlopCount() as flops:
        stage.step(fetched)
    started = clock()
    stage.step(fetched)
    rate = passes.total / (clock() - started)
    trained = IMAGES - VALIDATED
    whole = passes.total / len(images) * trained * job.training.epochs
    operations = flops.total / passes.total  # of one pass
    hours = whole * operations / (arguments.gpus * arguments.tflops * 1e12) / 3600
    return (
        recipe, student, f"{passes.total / len(images):.0f}", f"{whole / 1e9:.2f}",
        f"{operations / 1e9:.1f}", f"{rate:.1f}", f"{whole / rate / 3600 / 24:,.0f}",
        f"{hours:.1f}",
    )  # fmt: skip


rows = [
    cost(recipe, student)
    for student in arguments.students.split(",")
    for recipe in arguments.recipes.split(",")
]
print(
    tabulate(
        rows,
        headers=[
            "recipe", "student", "passes per image", "10^9 passes in all", "GFLOP per pass",
            "passes/s here", "days here",
            f"hours on {arguments.gpus} GPUs at {arguments.tflops:g} TFLOP/s (assumed)",
        ],
    )
)  # fmt: skip
