"""Counted work against what the formulas say, and schedules stretched to equal work."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from robustify.effort import FlopCount, _entry, at_equal_passes, count, dry_run
from robustify.errors import UsageError
from robustify.harden import plan
from robustify.settings import Training

ATTACK = 20  # ten steps, forward and backward each


def job(recipe, *, settings=(), **options):
    settings = {"training.batch_size": 16, **dict(settings)}
    return plan(recipe, "cnn_a", train_limit=160, settings=settings, **options)


TRAIN = len(job("standard").dataset.split_validation()[0])


@pytest.mark.parametrize(
    ("recipe", "stages"),
    [
        ("standard", [2]),
        ("pgd_at", [ATTACK + 2]),
        ("trades", [1 + ATTACK + 4]),  # the clean logits, the attack, clean and adversarial
        ("peeraid", [ATTACK + 4 + 1 + 2]),  # and the peer: once for its labels, once trained
        ("rslad", [ATTACK + 2, ATTACK + 4 + 1]),
        ("adaad", [ATTACK + 2, 2 * ATTACK + 4]),  # the teacher is in the attack; x and x*
    ],
)
def test_model_passes_are_those_of_the_formula(recipe, stages):
    found = count(job(recipe))
    assert [round(stage.per_epoch / TRAIN) for stage in found] == pytest.approx(stages, abs=1)
    assert all(stage.per_epoch % TRAIN == 0 for stage in found)


def test_the_pass_that_finds_the_worst_weights_is_counted():
    settings = {"training.awp_gamma": 0.01, "training.awp_start": 0}
    (stage,) = count(job("pgd_at", settings=settings))
    assert stage.per_epoch == (ATTACK + 4) * TRAIN


def test_a_purifier_and_its_classifier_are_two_networks():
    stages = {s.name: s for s in count(job("purifier", settings={"mode": "paper_like"}))}
    # The normal teacher maps images to images: one forward and one backward, no classifier.
    assert stages["normal teacher"].per_epoch == 2 * TRAIN


def test_what_is_read_before_the_first_step_is_counted_once():
    first, teacher, *links = count(job("teacher_assistant"))
    assert (first.fixed, first.epochs) == (True, 1)
    assert (teacher.before, teacher.per_epoch) == (0, 2 * TRAIN)
    assert all((link.before, link.per_epoch) == (TRAIN, 2 * TRAIN) for link in links)


def test_a_method_that_changes_on_the_way_is_counted_over_all_of_it():
    before, after = (
        sum(s.per_epoch for s in count(job("iad", settings={"begin_epoch": epoch})))
        for epoch in (99, 0)
    )
    between = sum(s.per_epoch for s in count(job("iad", settings={"begin_epoch": 0.5})))
    assert between == (before + after) / 2
    assert before < after


@pytest.mark.parametrize("recipe", ["standard", "rslad", "teacher_assistant"])
def test_equal_passes_are_equal_to_within_an_epoch_of_each_stage(recipe):
    goal = 300_000
    at = at_equal_passes(job(recipe), goal)
    per_epoch = sum(stage.per_epoch for stage in count(at) if not stage.fixed)
    assert sum(stage.total for stage in count(at)) == pytest.approx(goal, abs=per_epoch / 2 + 1)


def test_the_schedule_is_stretched_and_not_cut():
    settings = {"training.epochs": 10, "training.decay_at": [5, 0.9], "training.warmup_epochs": 2,
                "training.evaluate_every": 2}  # fmt: skip
    at = at_equal_passes(job("pgd_at", settings=settings), 22 * TRAIN * 40)
    assert at.training.epochs == 40
    assert [at.training.epoch(number) for number in at.training.decay_at] == [20, 36]
    assert (at.training.warmup_epochs, at.training.evaluate_every) == (8, 8)
    assert isinstance(at.training, Training)


def test_less_than_one_epoch_is_refused():
    with pytest.raises(UsageError, match="one epoch of each stage"):
        at_equal_passes(job("adaad"), 1000)


def test_steps_that_are_not_made_are_not_counted():
    (stage,) = count(job("standard", max_steps=1))
    assert stage.total == 2 * 16
    (row,) = dry_run(job("standard", max_steps=1))["stages"]
    assert row["model_passes"] == 2 * 16


def test_counting_leaves_the_job_as_it_was():
    one = job("pgd_at")
    assert count(one) == count(replace(one))


def test_the_layer_that_reads_the_images_is_found_where_it_is_not_the_first_parameter():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.token = nn.Parameter(torch.zeros(1))
            self.head = nn.Linear(4, 2)
            self.stem = nn.Sequential(nn.Flatten(), nn.Linear(4, 4))

        def forward(self, images):
            return self.head(self.stem(images) + self.token)

    network = Tokens()
    assert _entry(network, torch.rand(1, 1, 2, 2)) is network.stem[1]
    assert network.training


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
def test_a_backward_costs_twice_its_forward_by_groups_too(groups, transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(8, 4, 3, stride=2, groups=groups, bias=False)
    images = torch.rand(2, 8, 9, 9, requires_grad=True)
    with FlopCount() as forward:
        found = layer(images)
    with FlopCount() as backward:
        found.sum().backward()
    at = 9 * 9 if transposed else 4 * 4
    assert forward.total == 2 * 2 * (8 * 4 // groups) * 9 * at
    assert backward.total == 2 * forward.total
