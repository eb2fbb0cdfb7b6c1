"""One attack as a function: what it does not take."""

import pytest
import torch
from loops import tiny

import robustify
from robustify.errors import DataError, UsageError

IMAGES, LABELS = torch.full((2, 1, 8, 8), 0.5), torch.tensor([0, 1])


@pytest.mark.parametrize("name", ["pgd", "fgsm"])
@pytest.mark.parametrize(
    ("images", "labels", "says"),
    [
        (IMAGES * 255, LABELS, "divide by 255"),
        ((IMAGES * 1).to(torch.uint8), LABELS, "of floats"),
        (IMAGES, LABELS + 9, "expected labels from 0 to 9"),
        (IMAGES, LABELS[:1], "integer labels, one per image"),
    ],
)
def test_images_and_labels_that_do_not_fit_are_refused(name, images, labels, says):
    with pytest.raises(DataError, match=says):
        robustify.attack(tiny(), images, labels, name=name)


@pytest.mark.parametrize("given", [{"steps": 3}, {"step_size": 0.1}])
def test_settings_of_pgd_are_refused_for_other_attacks(given):
    with pytest.raises(UsageError, match="no steps or step_size for fgsm"):
        robustify.attack(tiny(), IMAGES, LABELS, name="fgsm", **given)
