"""Several recipes under one harness: the same student, data, threat model and seeds, as one table.

    python examples/compare_recipes.py --recipes standard,pgd_at,trades,peeraid --seeds 0,1,2
    python examples/compare_recipes.py --recipes all --student resnet20_cifar --equal-passes

With `--equal-passes` every recipe trains for the number of epochs whose model passes come nearest
to the same total: images forward plus images backward, of all networks of all stages, none weighed;
`robustify.effort` says it in full. Teachers that a recipe needs are stages and count. A number of
one's own, or the name of a recipe whose own schedule sets it, may follow. Without it, every recipe
has its own schedule.

Runs that are finished are read, runs that were interrupted continue. Accuracies are means over the
seeds with their range; the interval is the 95 % Wilson interval of all seeds' images together.
"Naive PGD" is the best plain attack of the checks, PGD-40 on cross-entropy; minutes are of training
one seed.
"""

import argparse
from dataclasses import replace
from pathlib import Path

from tabulate import tabulate

from robustify import config
from robustify.effort import at_equal_passes, count
from robustify.evaluation import wilson
from robustify.harden import plan, run
from robustify.report import percent, read

PASSES = 500_000  # 13 recipes, 3 seeds, resnet20_cifar on digits: about 45 minutes on one thread
# A network that is only there to be compared with is no part of a method; stages of a fixed length
# would be no part of the schedule.
SETTINGS = {"teacher_assistant": {"controls": False}, "purifier": {"static_epochs": None}}

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--recipes", default="standard,pgd_at,trades,peeraid", help="or: all")
parser.add_argument("--student", default="resnet18")
parser.add_argument("--data", default="digits")
parser.add_argument("--seeds", default="0,1,2")
parser.add_argument("--suite", default="fast")
parser.add_argument("--limit", type=int, help="evaluate on the first N test images")
parser.add_argument("--set", action="append", default=[], help="key=value, for every recipe")
parser.add_argument("--equal-passes", nargs="?", const=str(PASSES), metavar="N|RECIPE")
parser.add_argument("--max-steps", type=int, help="stop each stage after so many steps, to try it")
parser.add_argument("--out", type=Path, default=Path("runs/compare"))
arguments = parser.parse_args()


def planned(recipe):
    """The job of the first seed at the recipe's own schedule."""
    settings = config.overrides(arguments.set) | SETTINGS.get(recipe, {})
    return plan(recipe, arguments.student, dataset=arguments.data, suite=arguments.suite,
                settings=settings, limit=arguments.limit)  # fmt: skip


def passes_of(job):
    """Its model passes over all stages."""
    return sum(stage.total for stage in count(job))


def spread(values):
    """Mean and range over the seeds; nothing where it was not measured."""
    if not values:
        return "–"
    low, high = percent(min(values)), percent(max(values))
    return f"{percent(sum(values) / len(values))} ({low} to {high})"


def row_of(recipe, job, reports):
    """The table's row for one recipe."""
    n = sum(report["n"] for report in reports)
    right = sum(round(report["robust_accuracy"] * report["n"]) for report in reports)
    naive = [row["robust_accuracy"] for report in reports for row in report["side_by_side"]
             if row["name"] == "pgd-ce"]  # fmt: skip
    verdicts = [report["verdict"]["status"] for report in reports]
    return {
        "recipe": recipe,
        "clean": spread([report["clean_accuracy"] for report in reports]),
        "naive PGD": spread(naive),
        arguments.suite: spread([report["robust_accuracy"] for report in reports]),
        "95 % interval": " to ".join(percent(bound) for bound in wilson(right, n)),
        "verdict": ", ".join(f"{s} {verdicts.count(s)}" for s in sorted(set(verdicts))),
        "epochs": job.training.epochs,
        "model passes": f"{passes_of(job):,.0f}",
        "minutes": sum(r["cost"]["training seconds"] for r in reports) / 60 / len(reports),
    }


names = config.names() if arguments.recipes == "all" else arguments.recipes.split(",")
goal = arguments.equal_passes
if goal is not None:
    goal = passes_of(planned(goal)) if goal in config.names() else float(goal)
rows = []
for recipe in names:
    job = planned(recipe) if goal is None else at_equal_passes(planned(recipe), goal)
    job = replace(job, max_steps=arguments.max_steps)
    reports = []
    for seed in map(int, arguments.seeds.split(",")):
        folder = run(replace(job, seed=seed), arguments.out / f"{recipe}-{seed}")
        reports.append(read(folder))
    rows.append(row_of(recipe, job, reports))

threat = reports[0]["threat_model"]
print(
    f"{arguments.data}, {arguments.student}, {threat['norm']} eps {threat['eps_text']}, "
    f"suite {arguments.suite}, n = {reports[0]['n']}, seeds {arguments.seeds}\n"
)
print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".1f", disable_numparse=[-2]))
