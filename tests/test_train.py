"""The loop: schedules, averaging, selection, and that nothing is lost."""

import copy
import itertools
import logging
from functools import partial

import pytest
import torch
from loops import CrossEntropy, stage, tiny, weights
from torch import nn

from robustify import fit as loop
from robustify import memory, models
from robustify.averaging import reestimate_batchnorm
from robustify.checkpoint import Checkpoints
from robustify.errors import RunFolderError, TrainingError, UsageError
from robustify.fit import fit
from robustify.settings import Training
from robustify.train import Stage


@pytest.mark.parametrize("averaging", ["none", "swa", "ema"])
@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, averaging, stop_at):
    settings = {"averaging": averaging, "averaging_start": 1, "decay_at": (2,)}
    whole = stage(**settings)
    expected = fit(whole, checkpoints=Checkpoints(tmp_path / "whole"))
    steps = iter(range(1, 100))
    checkpoints = Checkpoints(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        fit(
            stage(**settings),
            checkpoints=checkpoints,
            interrupted=lambda: next(steps) == stop_at,
        )
    resumed = stage(**settings)
    got = fit(resumed, checkpoints=checkpoints)
    assert torch.equal(weights(resumed), weights(whole))
    for name, tensor in expected.best.items():
        assert torch.equal(got.best[name], tensor), name
    assert got.selection == expected.selection
    assert got.history == expected.history


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 7])
def test_no_interrupt_loses_half_of_an_update(tmp_path, stop_at):
    settings = {"epochs": 2, "batch_size": 32, "accumulate": 2}  # 7 batches, 4 updates an epoch
    whole = stage(**settings)
    fit(whole, checkpoints=Checkpoints(tmp_path / "whole"))
    steps = iter(range(1, 100))
    checkpoints = Checkpoints(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        fit(
            stage(**settings),
            checkpoints=checkpoints,
            interrupted=lambda: next(steps) == stop_at,
        )
    progress = checkpoints.load("stage0")[1]["progress"]
    assert (progress["step"], progress["updates"]) == (
        min(-(-stop_at // 2) * 2, 7),
        -(-stop_at // 2),
    )
    resumed = stage(**settings)
    fit(resumed, checkpoints=checkpoints)
    assert resumed.progress.updates == whole.progress.updates == 8
    assert resumed.progress.history == whole.progress.history
    assert torch.equal(weights(resumed), weights(whole))


def _sampled(asked, *, every=1):
    """`agreed` as several processes ask: only every so often."""
    times = itertools.count(1)
    return lambda: next(times) % every == 0 and asked()


@pytest.mark.parametrize("max_steps", [None, 4, 7])
def test_an_interrupt_does_not_wait_for_the_validation(tmp_path, monkeypatch, max_steps):
    settings = {"epochs": 2, "averaging": "swa", "max_steps": max_steps}  # 4 steps an epoch
    whole = stage(**settings)
    expected = fit(whole, checkpoints=Checkpoints(tmp_path / "whole"))
    done = []
    checkpoints = Checkpoints(tmp_path / "parts")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "agreed", _sampled)
        patch.setattr(loop, "_agree_every", lambda stage: 5)  # as on GPUs
        last = max_steps or 4
        parts = stage(**settings)
        patch.setattr(parts, "finish_epoch", lambda sums: pytest.fail("it waited")
                      if len(done) == last else Stage.finish_epoch(parts, sums))  # fmt: skip
        with pytest.raises(KeyboardInterrupt):
            fit(parts, checkpoints=checkpoints, interrupted=lambda: len(done) == last,
                on_step=lambda: done.append(True))  # fmt: skip
    progress = checkpoints.load("stage0")[1]["progress"]
    assert (progress["epoch"], progress["step"], progress["updates"]) == (
        (last - 1) // 4, (last - 1) % 4 + 1, last
    )  # fmt: skip
    resumed = stage(**settings)
    got = fit(resumed, checkpoints=checkpoints)
    assert torch.equal(weights(resumed), weights(whole))
    assert got.history == expected.history
    assert got.selection == expected.selection


def test_checkpoints_are_timed_across_epochs(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock[0])
    saved = []
    run = stage(epochs=4, checkpoint_seconds=6.5)  # 4 steps an epoch, of a second each
    monkeypatch.setattr(Checkpoints, "save", lambda self, name, tensors, values: saved.append(
        (values["progress"]["epoch"], values["progress"]["step"])))  # fmt: skip

    def on_step():
        clock[0] += 1

    fit(run, checkpoints=Checkpoints(tmp_path), on_step=on_step)
    assert saved == [(1, 0), (2, 3), (4, 0)]


def test_gradient_accumulation_is_one_larger_batch(tmp_path):
    def trained(name, **settings):
        one = stage(epochs=1, max_steps=1, lr=5.0, momentum=0.0, weight_decay=0.0, **settings)
        student = one.objective.student.module
        student[1], student[5] = nn.Identity(), nn.Identity()  # whatever depends on the batch
        fit(one, checkpoints=Checkpoints(tmp_path / name))
        return student[0].weight.detach()

    large, small = trained("large", batch_size=64), trained("small", batch_size=32, accumulate=2)
    torch.testing.assert_close(large, small, rtol=1e-4, atol=1e-6)
    assert not torch.allclose(large, tiny().module[0].weight, atol=1e-4)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_last_checkpoint(tmp_path):
    poisoned = stage(objective=partial(CrossEntropy, poison_at=6))
    with pytest.raises(
        TrainingError, match=r"epoch 1 step 2 .* the last good checkpoint is .*stage0"
    ):
        fit(poisoned, checkpoints=Checkpoints(tmp_path))
    assert torch.isfinite(weights(poisoned)).all()


def test_swa_is_the_mean_of_the_snapshots_and_keeps_batchnorm_of_its_own(tmp_path):
    snapshots = []
    run = stage(averaging="swa", averaging_start=1)
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
def test_the_published_schedule(epoch, lr):
    one = stage(epochs=300, lr=0.1, decay_at=(214, 259, 284))
    one.schedule.step(epoch)
    assert one.optimizer.param_groups[0]["lr"] == pytest.approx(lr)


def test_weight_decay_reaches_every_parameter():
    groups = stage(weight_decay=2e-4).optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {2e-4}


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0}, {"lr": -1.0}, {"epochs": 10, "decay_at": (214.0,)}, {"momentum": 5.0},
        {"ema_decay": 2.0}, {"clip_grad": -1.0}, {"weight_decay": -1.0}, {"validation_steps": -1},
        {"lr": float("inf")}, {"checkpoint_seconds": float("nan")}, {"decay_at": (-3.0,)},
    ],
)  # fmt: skip
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(UsageError, match="expected"):
        Training(**wrong)


def test_a_choice_that_is_none_lists_the_choices():
    with pytest.raises(UsageError, match="augmentation to be one of none, crop, crop-flip"):
        Training(augmentation="zzz")


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


def test_the_callers_random_state_is_untouched(tmp_path):
    one = stage(epochs=1)
    before = torch.get_rng_state()
    fit(one, checkpoints=Checkpoints(tmp_path))
    assert torch.equal(before, torch.get_rng_state())


def test_the_student_learns_and_the_best_epoch_is_kept(tmp_path):
    run = stage(epochs=20, batch_size=32, lr=0.2, select="clean")
    fitted = fit(run, checkpoints=Checkpoints(tmp_path))
    assert fitted.selection["clean"] > 0.4
    assert fitted.selection["clean"] == max(row["student clean"] for row in fitted.history)
    assert fitted.selection["epoch"] < 19  # or the last weights would pass for the best
    state = run.objective.student.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in fitted.best.items())
    assert any(not torch.equal(state[name], tensor) for name, tensor in fitted.last.items())


def test_no_checkpoint_holds_what_a_look_now_and_then_has_missed(tmp_path, monkeypatch):
    monkeypatch.setattr(Stage, "_stop_if_not_finite", lambda self, loss: None)  # as between looks
    for name, poison_at, settings in (
        ("timed", 2, {"checkpoint_seconds": 0.0}),
        ("epoch", 2, {"epochs": 1}),
    ):
        poisoned = stage(objective=partial(CrossEntropy, poison_at=poison_at), **settings)
        checkpoints = Checkpoints(tmp_path / name)
        with pytest.raises(TrainingError, match="expected a finite loss, got nan"):
            fit(poisoned, checkpoints=checkpoints)
        saved = checkpoints.load("stage0")
        assert saved is None or all(t.isfinite().all() for t in saved[0].values())


def test_an_unknown_optimizer_is_refused_with_the_nearest():
    with pytest.raises(UsageError, match=r"optimizer .* got 'adamww'.*did you mean 'adamw'"):
        stage(optimizer="adamww")


def test_gradient_checkpointing_keeps_less_and_changes_nothing(tmp_path):
    """Neither weights nor BatchNorm statistics, which the second forward must not move again."""
    found, kept = {}, {}
    for on in (False, True):
        torch.manual_seed(0)
        student = models.create("resnet18", num_classes=10, in_chans=1, image_size=8)
        run = stage(student=student, epochs=1, max_steps=3, lr=1e-3, grad_checkpointing=on)
        kept[on] = memory.activations(student.train(), torch.rand(8, 1, 8, 8))
        fit(run, checkpoints=Checkpoints(tmp_path / str(on)))
        state = run.objective.student.state_dict()
        found[on] = {k: v for k, v in state.items() if "num_batches_tracked" not in k}
    assert kept[True] < 0.5 * kept[False]
    torch.testing.assert_close(found[True], found[False], rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_of_a_network_without_it_is_refused():
    with pytest.raises(UsageError, match=r"network with gradient checkpointing, got tiny; leave"):
        stage(grad_checkpointing=True)


def test_no_epoch_of_a_warmup_has_a_rate_of_zero():
    run = stage(epochs=6, warmup_epochs=3, schedule="cosine", lr=0.4)
    rates = []
    for epoch in range(4):
        run.schedule.step(epoch)
        rates.append(run.schedule.optimizer.param_groups[0]["lr"])
    assert rates[:3] == pytest.approx([0.1, 0.2, 0.3])
