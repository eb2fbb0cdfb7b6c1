"""The loop: schedules, averaging, selection, and that nothing is lost."""

import copy
import logging
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from robustify import data, harden, models
from robustify.averaging import reestimate_batchnorm
from robustify.checkpoint import Checkpoints
from robustify.classifier import Classifier
from robustify.errors import RunFolderError, TrainingError, UsageError
from robustify.losses import cross_entropy
from robustify.objective import Objective
from robustify.settings import Training
from robustify.train import Stage, fit


class Tiny(nn.Sequential):
    """Convolution, BatchNorm, ReLU, pool, dropout, linear: fast, and with all that has state."""

    num_classes, in_chans = 10, 1

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2),
            nn.Flatten(), nn.Dropout(0.1), nn.Linear(32, 10),
        )  # fmt: skip


def tiny(seed=0):
    torch.manual_seed(seed)
    return Classifier(Tiny(), architecture="tiny", image_size=8, mean=[0.5], std=[0.5])


@dataclass(eq=False, repr=False, kw_only=True)
class CrossEntropy(Objective):
    poison_at: int = -1

    def forward(self, images, labels, noise):
        loss = cross_entropy(self.student(images), labels).mean()
        self.poison_at -= 1
        return {"loss": loss * (float("nan") if self.poison_at == -1 else 1)}


@pytest.fixture(scope="module")
def digits():
    loaded = data.load("digits")
    train, validation = loaded.split_validation()
    return train.take(200), validation.take(60), loaded


def stage(digits, *, seed=0, poison_at=-1, max_steps=None, **settings):
    train, validation, loaded = digits
    training = Training(**{"epochs": 3, "batch_size": 64, "lr": 0.05, **settings})
    return Stage(
        CrossEntropy(student=tiny(), poison_at=poison_at), train, validation, number=0,
        settings=training, threat=loaded.threat, seed=seed, policy=loaded.policy,
        accelerator=harden.new_accelerator("fp32", training.accumulate, 0), max_steps=max_steps,
    )  # fmt: skip


def weights(a_stage):
    return torch.cat(
        [p.detach().flatten() for p in a_stage.objective.student.state_dict().values()]
    )


@pytest.mark.parametrize("averaging", ["none", "swa", "ema"])
@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_an_interrupted_run_ends_with_the_same_bits(digits, tmp_path, averaging, stop_at):
    settings = {"averaging": averaging, "averaging_start": 1, "decay_at": (2,)}
    whole = stage(digits, **settings)
    expected = fit(whole, checkpoints=Checkpoints(tmp_path / "whole"))
    steps = iter(range(1, 100))
    checkpoints = Checkpoints(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        fit(
            stage(digits, **settings),
            checkpoints=checkpoints,
            interrupted=lambda: next(steps) == stop_at,
        )
    resumed = stage(digits, **settings)
    got = fit(resumed, checkpoints=checkpoints)
    assert torch.equal(weights(resumed), weights(whole))
    for name, tensor in expected.best.items():
        assert torch.equal(got.best[name], tensor), name
    assert got.selection == expected.selection
    assert got.history == expected.history


def test_gradient_accumulation_is_one_larger_batch(digits, tmp_path):
    def trained(name, **settings):
        one = stage(
            digits, epochs=1, max_steps=1, lr=5.0, momentum=0.0, weight_decay=0.0, **settings
        )
        student = one.objective.student.module
        student[1], student[5] = nn.Identity(), nn.Identity()  # whatever depends on the batch
        fit(one, checkpoints=Checkpoints(tmp_path / name))
        return student[0].weight.detach()

    large, small = trained("large", batch_size=64), trained("small", batch_size=32, accumulate=2)
    torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(large, tiny().module[0].weight, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_checkpoint(digits, tmp_path):
    poisoned = stage(digits, poison_at=6)
    with pytest.raises(
        TrainingError, match=r"epoch 1 step 2 .* the last good checkpoint is .*stage0"
    ):
        fit(poisoned, checkpoints=Checkpoints(tmp_path))
    assert torch.isfinite(weights(poisoned)).all()


def test_swa_is_the_mean_of_the_snapshots_and_keeps_batchnorm_of_its_own(digits, tmp_path):
    snapshots = []
    run = stage(digits, averaging="swa", averaging_start=1)
    fit(
        run,
        checkpoints=Checkpoints(tmp_path),
        on_epoch=lambda history: snapshots.append(run.objective.student.module[0].weight.clone()),
    )
    mean = torch.stack(snapshots[1:]).mean(0)
    torch.testing.assert_close(run.averaged.module.module[0].weight, mean)


def test_reestimated_batchnorm_is_the_mean_over_images_and_leaves_no_trace():
    network = tiny()
    before = copy.deepcopy(network)
    batches = [
        torch.rand(b, 1, 8, 8, generator=torch.Generator().manual_seed(b)) for b in (5, 3, 8)
    ]
    reestimate_batchnorm(network, iter(batches))
    with torch.no_grad():
        means = [network.module[0](network.normalize(b)).mean((0, 2, 3)) for b in batches]
    expected = sum(m * len(b) for m, b in zip(means, batches, strict=True)) / 16
    torch.testing.assert_close(network.module[1].running_mean, expected)
    for p, q in zip(network.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)
    assert network.module[1].momentum == before.module[1].momentum
    assert [m.training for m in network.modules()] == [m.training for m in before.modules()]


@pytest.mark.parametrize(
    ("epoch", "lr"), [(213, 0.1), (214, 0.01), (258, 0.01), (259, 1e-3), (283, 1e-3), (284, 1e-4)]
)
def test_the_published_schedule(digits, epoch, lr):
    one = stage(digits, epochs=300, lr=0.1, decay_at=(214, 259, 284))
    one.schedule.step(epoch)
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_weight_decay_reaches_every_parameter(digits):
    groups = stage(digits, weight_decay=2e-4).optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {2e-4}


@pytest.mark.parametrize(
    "wrong", [{"epochs": 0}, {"lr": -1.0}, {"epochs": 10, "decay_at": (214.0,)}]
)
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(UsageError, match="expected"):
        Training(**wrong)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):
        checkpoints.save("a", {"x": torch.tensor([number])}, {"number": number})
    newest = checkpoints.newest("a")
    newest.write_bytes(newest.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING):
        tensors, values = checkpoints.load("a")
    assert values == {"number": 1}
    assert tensors["x"].item() == 1
    assert "damaged" in caplog.text
    for path in tmp_path.glob("*.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(RunFolderError, match="--no-resume"):
        checkpoints.load("a")


def test_only_the_newest_two_checkpoints_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for number in range(5):
        checkpoints.save("a", {"x": torch.zeros(1)}, {"number": number})
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    assert checkpoints.load("a")[1] == {"number": 4}


def test_the_callers_random_state_is_untouched(digits, tmp_path):
    one = stage(digits, epochs=1)
    before = torch.get_rng_state()
    fit(one, checkpoints=Checkpoints(tmp_path))
    assert torch.equal(before, torch.get_rng_state())


def test_the_student_learns_and_the_best_epoch_is_kept(digits, tmp_path):
    run = stage(digits, epochs=20, batch_size=32, lr=0.2, select="clean")
    fitted = fit(run, checkpoints=Checkpoints(tmp_path))
    assert fitted.selection["clean"] > 0.4
    assert fitted.selection["clean"] == max(row["student clean"] for row in fitted.history)
    assert models.weights_hash(run.objective.student.module)
