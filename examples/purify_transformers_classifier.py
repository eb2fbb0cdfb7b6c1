"""Put a purifier before a classifier of transformers, and measure the pair end to end.

    python examples/purify_transformers_classifier.py hf-hub:user/vit --data photos

The classifier itself is not touched. The first step distils a purifier before it; the second puts
the same purifier before another classifier of the same classes, if one is named with --before.
"""

import argparse
from pathlib import Path

import robustify
from robustify.report import read

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("classifier")
parser.add_argument("--data", default="digits")
parser.add_argument("--before", help="another classifier for the same purifier")
parser.add_argument("--out", type=Path, default=Path("runs/purified"))
parser.add_argument("--suite", default="fast")
parser.add_argument("--limit", type=int)
parser.add_argument("--max-steps", type=int, help="stop each stage after so many steps, to try it")
arguments = parser.parse_args()
measured = {"suite": arguments.suite, "limit": arguments.limit}

folders = [
    robustify.distill(
        "purifier",
        arguments.classifier,
        dataset=arguments.data,
        out=arguments.out,
        max_steps=arguments.max_steps,
        **measured,
    )
]
if arguments.before:
    out = arguments.out.with_name(f"{arguments.out.name}-attached")
    folders.append(
        robustify.attach(folders[0], arguments.before, out, dataset=arguments.data, **measured)
    )
for folder in folders:
    report = read(folder)
    print(f"{folder}: clean accuracy {report['clean_accuracy']:.1%}")
    for row in report["tiers"]:
        print(f"  {row['tier']:2} {row['robust_accuracy']:6.1%}  {row['description']}")
