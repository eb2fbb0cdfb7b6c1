"""Several recipes under one harness: the same student, data, threat model and seeds, as one table.

    python examples/compare_recipes.py --recipes standard,pgd_at,trades,peeraid --seeds 0,1,2

Runs that are finished are read, runs that were interrupted continue. Accuracies are means over the
seeds with their range; the interval is the 95 % Wilson interval of all seeds' images together.
"""

import argparse
from pathlib import Path

from tabulate import tabulate

from robustify import distill
from robustify.evaluation import wilson
from robustify.report import percent, read

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--recipes", default="standard,pgd_at,trades,peeraid")
parser.add_argument("--student", default="resnet18")
parser.add_argument("--data", default="digits")
parser.add_argument("--seeds", default="0,1,2")
parser.add_argument("--suite", default="pgd")
parser.add_argument("--max-steps", type=int, help="stop each stage after so many steps, to try it")
parser.add_argument("--out", type=Path, default=Path("runs/compare"))
arguments = parser.parse_args()


def spread(values):
    """Mean and range over the seeds."""
    low, high = percent(min(values)), percent(max(values))
    return f"{percent(sum(values) / len(values))} ({low} to {high})"


rows = []
for recipe in arguments.recipes.split(","):
    reports = []
    for seed in map(int, arguments.seeds.split(",")):
        folder = distill(
            recipe,
            arguments.student,
            dataset=arguments.data,
            suite=arguments.suite,
            seed=seed,
            max_steps=arguments.max_steps,
            out=arguments.out / f"{recipe}-{seed}",
        )
        reports.append(read(folder))
    n = sum(report["n"] for report in reports)
    right = sum(round(report["robust_accuracy"] * report["n"]) for report in reports)
    low, high = wilson(right, n)
    rows.append(
        {
            "recipe": recipe,
            "clean": spread([report["clean_accuracy"] for report in reports]),
            "robust": spread([report["robust_accuracy"] for report in reports]),
            "95 % interval": f"{percent(low)} to {percent(high)}",
            "minutes": sum(report["cost"]["training seconds"] for report in reports) / 60,
        }
    )

threat = reports[0]["threat_model"]
print(
    f"{arguments.data}, {arguments.student}, {threat['norm']} eps {threat['eps_text']}, "
    f"suite {arguments.suite}, n = {reports[0]['n']}, seeds {arguments.seeds}\n"
)
print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f"))
