"""Pictures of attacked images: which, how large, how amplified."""

import pytest
import torch
from reports import CLASSES, minimal, pictures

from robustify.gallery import gallery
from robustify.schema import validate


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 32), (3, 224)])
def test_the_gallery_shows_broken_images_of_many_classes_first(channels, side):
    images, images_adv = pictures(20, channels, side)
    labels = torch.tensor([0] * 10 + [1] * 5 + [2] * 5)
    predictions = labels.clone()
    predictions[0] = 1  # wrong before any attack
    fallen = torch.where(torch.arange(20) < 18, (labels + 1) % 3, labels)
    entries = gallery(images, images_adv, labels, predictions, fallen, CLASSES, attacks="pgd",
                      indices=torch.arange(20) + 100)  # fmt: skip
    assert len(entries) == 12
    assert [entry["label"] for entry in entries[:3]] == CLASSES[:3]
    assert 100 not in [entry["index"] for entry in entries]
    assert {entry["factor"] for entry in entries} == {15}
    assert (
        sum(len(entry[key]) for entry in entries for key in ("image", "image_adv", "delta")) < 6e5
    )
    validate(minimal() | {"gallery": entries})


def test_an_empty_or_unmoved_gallery_is_no_error():
    images, _ = pictures(2)
    labels = torch.tensor([0, 1])
    unmoved = gallery(images, images, labels, labels, labels, CLASSES, attacks=["a", "b"])
    assert [entry["factor"] for entry in unmoved] == [1, 1]
    assert gallery(images, images, labels, 1 - labels, labels, CLASSES, attacks="a") == []


def test_eps_fills_half_the_range_of_grey():
    images = torch.full((1, 1, 4, 4), 0.5)
    label = torch.tensor([0])
    (entry,) = gallery(images, images + 0.1, label, label, label + 1, CLASSES, attacks="a")
    assert entry["factor"] == 5
