"""Networks trained on fewer classes than the attacks were published for: every suite runs."""

import pytest
from PIL import Image

from robustify import data, distill
from robustify.examine import examine

SUITES = {"fast": 100, "standard": 16, "plus": 6, "rand": 10, "pgd": 100}  # -> images


@pytest.fixture(params=[2, 3, 4, 8])
def trained(request, tmp_path):
    """A run folder trained on an image folder of the first digits, and how many classes it has."""
    digits = data.load("digits")
    for name, split in (("train", digits.train), ("test", digits.test)):
        for place, (image, label) in enumerate(zip(split.images, split.labels, strict=True)):
            if label < request.param:
                folder = tmp_path / "digits" / name / f"digit {label}"
                folder.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image[0].numpy()).save(folder / f"{place}.png")
    folder = distill(
        "pgd_at", "resnet20_cifar", dataset=str(tmp_path / "digits"), suite="pgd", limit=20,
        eps=0.1, settings={"training.epochs": 4}, out=tmp_path / "run",
    )  # fmt: skip
    return folder, request.param


@pytest.mark.slow
def test_a_network_of_few_classes_goes_through_every_suite(trained):
    folder, classes = trained
    for suite, limit in SUITES.items():
        content = examine(str(folder), suite=suite, limit=limit, eps=[0.1])
        attacks = {row["name"]: row for row in content["attacks"] if row["name"] != "checks"}
        adapted = sorted(name for name, row in attacks.items() if row["settings"]["adapted"])
        print(
            f"{classes} classes, {suite}, n = {content['n']}: clean {content['clean_accuracy']:.3f}"
            f", robust {content['robust_accuracy']:.3f}, {content['verdict']['status']}; adapted:",
            ", ".join(adapted) or "nothing",
        )
        assert content["clean_accuracy"] > 1 / classes + 0.1
        assert 0 <= content["robust_accuracy"] <= content["clean_accuracy"]
        expected = {"fast": classes < 6, "standard": True, "plus": True}
        if suite in expected:
            assert ("apgd-t" in adapted) == expected[suite]
        else:
            assert ("apgd-dlr" in adapted) == (suite == "rand" and classes < 3)
