"""How robust is somebody's checkpoint, and may the number be believed?

python examples/evaluate_checkpoint.py hf-hub:user/repo --data cifar10 --eps 8/255
python examples/evaluate_checkpoint.py resnet18:weights.safetensors --data photos --eps 4/255
"""

import argparse

import robustify
from robustify import data, models
from robustify.threat import parse_eps

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model")
parser.add_argument("--data", default="digits")
parser.add_argument("--norm", default="Linf")
parser.add_argument("--eps", type=parse_eps, default=8 / 255)
parser.add_argument("--suite", default="fast")
parser.add_argument("--limit", type=int, default=1000)
arguments = parser.parse_args()

classifier = robustify.load(arguments.model)
test = data.load(arguments.data, image_size=classifier.image_size)
classifier = models.match_labels(classifier, test.class_names)  # the data's order of classes
images, labels, _ = test.test.take(arguments.limit).__getitems__(range(arguments.limit))

report = robustify.evaluate(
    classifier,
    data.to_float(images),
    labels,
    suite=arguments.suite,
    norm=arguments.norm,
    eps=arguments.eps,
    class_names=test.class_names,
)
low, high = report.interval
print(f"clean accuracy {report.clean_accuracy:.1%}")
print(f"robust accuracy {report.robust_accuracy:.1%} (95 % interval {low:.1%} to {high:.1%})")
print(f"verdict: {report.verdict.status}")
for reason in report.verdict.reasons:
    print(f"- {reason}")
