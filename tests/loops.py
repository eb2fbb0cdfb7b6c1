"""Short stages of the training loop for its tests."""

import functools
from dataclasses import dataclass

import torch
from torch import nn

from robustify import data, harden
from robustify.classifier import Classifier
from robustify.losses import cross_entropy
from robustify.objective import Objective
from robustify.settings import Training
from robustify.train import Stage


class Tiny(nn.Sequential):
    """Convolution, BatchNorm, ReLU, pool, dropout, linear: fast, and with all that has state."""

    num_classes, in_chans = 10, 1

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 10),
        )  # fmt: skip


def tiny(seed=0):
    """The network above as a classifier."""
    torch.manual_seed(seed)
    return Classifier(Tiny(), architecture="tiny", image_size=8, mean=[0.5], std=[0.5])


@dataclass(eq=False, repr=False, kw_only=True)
class CrossEntropy(Objective):
    """Ordinary training whose loss is NaN after `poison_at` forwards, if that is not negative."""

    poison_at: int = -1

    def forward(self, images, labels, noise):
        loss = cross_entropy(self.student(images), labels).mean()
        self.poison_at -= 1
        return {"loss": loss * (float("nan") if self.poison_at == -1 else 1)}


@functools.cache
def digits():
    """A few of the bundled digits: training, validation, and the data set."""
    loaded = data.load("digits")
    train, validation = loaded.split_validation()
    return train.take(200), validation.take(60), loaded


def stage(*, objective=CrossEntropy, student=None, seed=0, max_steps=None, alone=False, **settings):
    """One stage of the loop, ready to be trained; of the network above unless told otherwise."""
    train, validation, loaded = digits()
    training = Training(**{"epochs": 3, "batch_size": 64, "lr": 0.05, **settings})
    return Stage(
        objective(student=student or tiny()), train, validation, number=0,
        settings=training, threat=loaded.threat, seed=seed, policy=loaded.policy,
        accelerator=harden.new_accelerator("fp32", training.accumulate, 0), max_steps=max_steps,
        alone=alone,
    )  # fmt: skip


def weights(a_stage):
    """All weights and buffers of the student as one vector."""
    return torch.cat(
        [p.detach().flatten() for p in a_stage.objective.student.state_dict().values()]
    )
