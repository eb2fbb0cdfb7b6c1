"""Make a timm model robust on a folder of images.

    python examples/robustify_image_folder.py photos --student resnet18.a1_in1k --out runs/photos

The folder has train/ and test/, and in each one folder per class. What is left loads with
`timm.create_model("local-dir:runs/photos", pretrained=True)`.
"""

import argparse
from pathlib import Path

import robustify
from robustify.report import read

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("images", type=Path)
parser.add_argument("--student", default="resnet18.a1_in1k")
parser.add_argument("--recipe", default="trades")
parser.add_argument("--out", type=Path, default=Path("runs/photos"))
parser.add_argument("--suite", default="fast")
parser.add_argument("--max-steps", type=int, help="stop after so many steps, to try it")
arguments = parser.parse_args()

folder = robustify.distill(
    arguments.recipe,
    arguments.student,
    dataset=str(arguments.images),
    out=arguments.out,
    suite=arguments.suite,
    max_steps=arguments.max_steps,
)
report = read(folder)
threat = report["threat_model"]
print(
    f"{folder}: clean accuracy {report['clean_accuracy']:.1%}, robust accuracy "
    f"{report['robust_accuracy']:.1%} ({threat['norm']}, eps {threat['eps_text']}, suite "
    f"{report['suite']}, n = {report['n']}), verdict {report['verdict']['status']}"
)
