"""Friendly attacks: ordinary PGD for who withstands it, and less of it for who does not."""

import pytest
import torch
from torch import nn

from robustify.attacks.friendly import friendly_pgd
from robustify.attacks.pgd import keeping, pgd, repeating
from robustify.compilation import compiling
from robustify.losses import cross_entropy
from robustify.noise import Noise
from robustify.threat import ThreatModel

THREAT = ThreatModel("Linf", 0.2)
ATTACK = {"steps": 10, "step_size": 0.05, "start": "images"}


class Counted(nn.Linear):
    """A linear model on 1 × 1 × 2 images that counts what it is asked."""

    def __init__(self):
        super().__init__(2, 2, bias=False)
        self.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        self.seen = 0

    def forward(self, images):
        self.seen += len(images)
        return super().forward(images.flatten(1))


def attacked(images, labels, **settings):
    model = Counted()
    noise = Noise.for_batch(0, images)
    return friendly_pgd(model, images, labels, THREAT, noise=noise, **ATTACK | settings), model


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_an_image_moves_until_it_fools_the_model_and_patience_is_over(patience):
    # The margin is 0.15 and a step takes 0.1 off it: misclassified after the second.
    images = torch.tensor([0.575, 0.425]).view(1, 1, 1, 2)
    found, model = attacked(images, torch.tensor([0]), patience=patience)
    moved = 0.05 * min(2 + patience, 4)
    torch.testing.assert_close((found - images).flatten(), torch.tensor([-moved, moved]))
    assert model.seen == 3 + patience


def test_an_image_that_withstands_is_attacked_as_pgd_does():
    images = torch.rand(16, 1, 1, 2, generator=torch.Generator().manual_seed(0))
    images[:, 0, 0, 0] = (images[:, 0, 0, 1] + 0.41).clamp(max=1)
    images[:, 0, 0, 1] = images[:, 0, 0, 0] - 0.41
    labels = torch.zeros(16, dtype=torch.int64)
    found, model = attacked(images, labels, patience=0, start="uniform")
    plain = pgd(lambda x: cross_entropy(model(x), labels), images, THREAT,
                noise=Noise.for_batch(0, images), **ATTACK | {"start": "uniform"})  # fmt: skip
    assert torch.equal(found, plain)


def test_what_was_found_is_repeated_and_the_images_stay():
    images = torch.rand(8, 1, 1, 2, generator=torch.Generator().manual_seed(1))
    before, labels = images.clone(), torch.zeros(8, dtype=torch.int64)
    with keeping(lambda: None) as kept:
        found, _ = attacked(images, labels, patience=1, start="uniform")
    with repeating(kept):
        again, model = attacked(images, labels, patience=1, start="uniform")
    assert torch.equal(found, again)
    assert model.seen == 0
    assert torch.equal(images, before)
    assert (found - images).abs().max() <= THREAT.eps + 1e-6
    assert 0 <= found.min() <= found.max() <= 1


def test_whoever_is_compiled_is_asked_all_images_and_finds_the_same():
    images = torch.rand(8, 1, 1, 2, generator=torch.Generator().manual_seed(1))
    labels = torch.zeros(8, dtype=torch.int64)
    found, few = attacked(images, labels, patience=0)
    with compiling():
        again, all_of_them = attacked(images, labels, patience=0)
    assert torch.equal(found, again)
    assert few.seen < all_of_them.seen
    assert all_of_them.seen % 8 == 0
