"""Adversarial weight perturbation, by itself and in the loop."""

import copy
import json
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from children import launch
from loops import CrossEntropy, stage, tiny, weights
from torch import nn

from robustify.attacks import pgd as attack
from robustify.checkpoint import Checkpoints
from robustify.errors import TrainingError, UsageError
from robustify.fit import fit
from robustify.frozen import Frozen
from robustify.losses import cross_entropy
from robustify.noise import Noise
from robustify.objective import Objective
from robustify.settings import Training
from robustify.threat import ThreatModel
from robustify.weight_perturbation import Buffers, ascent, perturbable, perturbed

DUE = {"awp_start": 0}
LOSS_OF_DUE = "unperturbed loss"


def test_closed_form_on_a_linear_model():
    """L = w · x: the gradient is x, v = gamma · |w| · x / |x|, L grows by gamma · |w| · |x|."""
    layer = nn.Linear(4, 1, bias=False)
    w, x = torch.tensor([[3.0, 0.0, 4.0, 0.0]]), torch.tensor([0.0, 2.0, 0.0, 0.0])
    with torch.no_grad():
        layer.weight.copy_(w)
    (gradient,) = torch.autograd.grad(layer(x).sum(), layer.weight)
    with perturbed([layer.weight], [gradient], gamma=0.1):
        assert torch.equal(layer.weight, torch.tensor([[3.0, 0.5, 4.0, 0.0]]))
        assert layer(x).item() == pytest.approx(0.1 * 5 * 2)
    assert torch.equal(layer.weight, w)


def test_every_layer_is_perturbed_by_its_own_norm_and_a_zero_gradient_by_nothing():
    generator = torch.Generator().manual_seed(0)
    for shape in [(8, 3, 3, 3), (10, 32)]:
        weight, gradient = (torch.randn(shape, generator=generator) for _ in range(2))
        v = ascent(weight, 1e-6 * gradient, 0.01)
        assert v.norm().item() == pytest.approx(0.01 * weight.norm().item(), rel=1e-5)
        assert torch.cosine_similarity(v.flatten(), gradient.flatten(), 0).item() > 0.9999
        assert torch.equal(ascent(weight, torch.zeros(shape), 0.01), torch.zeros(shape))


def test_weights_come_back_to_the_bit_even_after_an_error():
    network = tiny()
    before = copy.deepcopy(network.state_dict())
    chosen = perturbable(network)
    with pytest.raises(ZeroDivisionError), perturbed(chosen, chosen, gamma=0.3):
        chosen[0].sum().item() / torch.equal(chosen[0], before["module.0.weight"])
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


def test_only_trained_weights_of_two_dimensions_or_more_are_perturbed():
    network = nn.Sequential(tiny().module, Frozen(nn.Linear(10, 10)))
    chosen = {id(parameter) for parameter in perturbable(network)}
    names = {name for name, p in network.named_parameters() if id(p) in chosen}
    assert names == {"0.0.weight", "0.6.weight"}


def test_buffers_do_not_move_and_frozen_ones_are_left_alone():
    network = nn.ModuleList([tiny().train(), Frozen(tiny(1))])
    norm, images = network[0].module[1], torch.rand(5, 1, 8, 8)
    before = copy.deepcopy(network.state_dict())
    buffers = Buffers(network)
    network[0](images)
    assert not torch.equal(norm.running_mean, before["0.module.1.running_mean"])
    buffers.put_back()
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


@dataclass(eq=False, repr=False, kw_only=True)
class OnAttacks(Objective):
    """PGD-AT that counts the forwards of its searches."""

    searched: int = 0

    def forward(self, images, labels, noise):
        def loss(x):
            self.searched += 1
            return cross_entropy(self.student(x), labels)

        images_adv = attack.pgd(
            loss, images, ThreatModel("Linf", 0.1), steps=3, step_size=0.05, noise=noise
        )
        return {"loss": cross_entropy(self.student(images_adv), labels).mean()}


def step(*, objective=OnAttacks, **settings):
    """A stage after its first step, the terms of that step, and the state before it."""
    one = stage(objective=objective, **{**DUE, **settings})
    before = copy.deepcopy(one.objective.state_dict())
    one.model.train()
    terms = one.step(next(iter(one.loader)))
    return one, terms, before


def test_the_step_descends_at_the_perturbed_weights_from_the_unperturbed_ones():
    settings = {"momentum": 0.0, "weight_decay": 0.1, "lr": 0.05, "awp_gamma": 0.2}
    one, terms, before = step(objective=CrossEntropy, **settings)
    replica = stage(**DUE, **settings)
    network, fetched = replica.objective.student.train(), next(iter(replica.loader))
    images, labels, _ = replica.batch(fetched, 0)
    parameters = dict(network.named_parameters())

    def gradients():
        torch.manual_seed(hash((0, 0, 0, 0, 0)) % 2**63)
        loss = cross_entropy(network(images), labels).mean()
        return loss, dict(
            zip(parameters, torch.autograd.grad(loss, [*parameters.values()]), strict=True)
        )

    loss, first = gradients()
    assert terms[LOSS_OF_DUE].item() == pytest.approx(loss.item(), rel=1e-6)
    with torch.no_grad():
        for name, parameter in parameters.items():
            if parameter.ndim > 1:
                gradient = first[name]
                parameter += 0.2 * parameter.norm() * gradient / gradient.norm()
    loss, second = gradients()
    assert terms["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    assert loss > 1.05 * terms[LOSS_OF_DUE]
    for name, parameter in one.objective.student.named_parameters():
        start = before[f"student.{name}"]
        expected = start - 0.05 * (second[name] + 0.1 * start)
        torch.testing.assert_close(parameter.detach(), expected, rtol=1e-4, atol=1e-6)


def test_weights_are_restored_to_the_bit_before_the_optimizer_steps():
    tiny_lr = {"lr": 1e-30, "momentum": 0.0, "weight_decay": 0.0, "awp_gamma": 0.5}
    one, terms, before = step(**tiny_lr)
    assert terms["loss"] > terms[LOSS_OF_DUE]
    for name in ("student.module.0.weight", "student.module.6.weight"):
        assert torch.equal(one.objective.state_dict()[name], before[name]), name


def test_a_larger_gamma_raises_the_perturbed_loss():
    raised = []
    for gamma in (0.01, 0.03, 0.1, 0.3):
        _, terms, _ = step(awp_gamma=gamma)
        raised.append(terms["loss"].item() - terms[LOSS_OF_DUE].item())
    assert 0 < raised[0] < raised[1] < raised[2] < raised[3]


def test_batchnorm_sees_the_perturbed_pass_alone_and_the_attack_is_searched_once():
    plain, _, _ = step(awp_gamma=0.0)
    one, _, before = step(awp_gamma=0.5)
    assert one.objective.searched == plain.objective.searched == 3
    name = "student.module.1.num_batches_tracked"
    moved = [each.objective.state_dict()[name] - before[name] for each in (plain, one)]
    assert moved[0] == moved[1] > 0
    # Three forwards of the search and the one of the loss, in train mode, in both.
    means = [each.objective.student.module[1].running_mean for each in (plain, one)]
    assert not torch.equal(*means)  # the loss's forward was at other weights


def test_adversarial_images_are_those_of_the_unperturbed_weights():
    searched = []
    images, threat = torch.rand(4, 1, 8, 8), ThreatModel("Linf", 0.1)

    def loss(x):
        searched.append(x.detach())
        return x.flatten(1).sum(1)

    def search(chosen):
        return attack.pgd(
            loss, chosen, threat, steps=2, step_size=0.1, noise=Noise.for_batch(0, chosen)
        )

    with attack.keeping(lambda: None) as found:
        first, second = search(images), search(images[:2])
    count = len(searched)
    with attack.repeating(found):
        assert search(images) is first
        with pytest.raises(RuntimeError, match="same searches"):
            search(images)  # the second search was of two images
    with attack.repeating(found[1:]):
        assert search(images[:2]) is second
        with pytest.raises(RuntimeError, match="same searches"):
            search(images)
    assert len(searched) == count
    assert search(images) is not first
    assert len(found) == 2


def test_it_begins_when_it_should_and_is_logged_from_then_on(tmp_path):
    fitted = fit(stage(awp_gamma=0.05, awp_start=1), checkpoints=Checkpoints(tmp_path))
    logged = [LOSS_OF_DUE in row for row in fitted.history]
    assert logged == [False, True, True]
    assert fitted.history[1]["loss"] > fitted.history[1][LOSS_OF_DUE]
    without = fit(stage(), checkpoints=Checkpoints(tmp_path / "without"))
    assert without.history[0] == fitted.history[0]
    assert without.history[1] != fitted.history[1]


def test_an_interrupted_run_ends_with_the_same_bits(tmp_path):
    settings = {"awp_gamma": 0.05, "awp_start": 1, "averaging": "ema"}
    whole = stage(**settings)
    expected = fit(whole, checkpoints=Checkpoints(tmp_path / "whole"))
    steps, checkpoints = iter(range(1, 100)), Checkpoints(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        fit(stage(**settings), checkpoints=checkpoints, interrupted=lambda: next(steps) == 6)
    resumed = stage(**settings)
    got = fit(resumed, checkpoints=checkpoints)
    assert torch.equal(weights(resumed), weights(whole))
    assert got.history == expected.history
    assert got.selection == expected.selection


def test_a_loss_that_is_not_finite_leaves_the_weights_unperturbed():
    poisoned = partial(CrossEntropy, poison_at=1)  # the second pass of the first step
    one = stage(objective=poisoned, awp_gamma=0.5, **DUE)
    before = weights(one)
    one.model.train()
    with pytest.raises(TrainingError, match="finite"):
        one.step(next(iter(one.loader)))
    after = weights(one)
    convolution = slice(0, one.objective.student.module[0].weight.numel())
    assert torch.isfinite(after).all()
    assert torch.equal(after[convolution], before[convolution])


@pytest.mark.parametrize("wrong", [{"awp_gamma": -0.1}, {"awp_gamma": 0.01, "awp_start": 30}])
def test_settings_that_cannot_work_are_refused(wrong):
    with pytest.raises(UsageError, match="awp"):
        Training(**wrong)
    assert Training(awp_start=30).awp_gamma == 0  # unread where nothing is perturbed


def test_two_processes_perturb_alike(tmp_path):
    """A network without BatchNorm: one process, and two with half the batch each. Were v not the
    same everywhere, the losses at a perturbation this large would be others."""
    rows = {}
    for processes, batch in ((1, 64), (2, 32)):
        out = tmp_path / str(processes)
        launch(
            processes, "distill", "--recipe", "pgd_at", "--student", "cnn_a", "--image-size", 32,
            "--set", "training.optimizer=momentum", "--set", "training.awp_gamma=0.5",
            "--set", "training.awp_start=0", "--set", "attack.steps=2", "--lr", 0.01,
            "--batch-size", batch, "--max-steps", 4, "--suite", "pgd", "--limit", 8, "--out", out,
        )  # fmt: skip
        rows[processes] = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert rows[1]["loss"] > 1.1 * rows[1][LOSS_OF_DUE]
    for term in ("loss", LOSS_OF_DUE):
        assert rows[2][term] == pytest.approx(rows[1][term], rel=1e-4), term
