"""Evaluation of any module: the right numbers, hostile input, no trace, and resumption."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import robustify
from robustify.attacks.suite import make_suite
from robustify.errors import DataError, ModelError, RunFolderError, UsageError
from robustify.evaluation import evaluate, wilson
from robustify.journal import Journal
from robustify.threat import ThreatModel

EPS = 0.1


class Linear(nn.Module):
    """z = (v, -v), v = w·(x - 0.5) with |w|_1 = 1: an image falls at Linf eps if |v| < eps."""

    def __init__(self, scale=50.0, answer=lambda z: z):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        w = torch.randn(1, 4, 4, generator=generator)
        self.w = nn.Parameter(scale * w / w.abs().sum())
        self.answer = answer
        self.dropout = nn.Dropout(0.5)

    def forward(self, images):
        v = ((self.dropout(images) - 0.5) * self.w).flatten(1).sum(1)
        return self.answer(torch.stack([v, -v], 1))


def toy(count=120, scale=50.0, **kwargs):
    """A model, images that it gets right, and how far each is from the boundary."""
    model = Linear(scale, **kwargs).train()
    images = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    v = ((images - 0.5) * model.w.detach() / scale).flatten(1).sum(1)
    return model, images, (v < 0).long(), v.abs()


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(50, 100, 0.404, 0.596), (0, 20, 0, 0.161)]
)
def test_wilson_interval(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-3)
    mirrored = wilson(n - right, n)
    assert wilson(right, n) == pytest.approx((1 - mirrored[1], 1 - mirrored[0]))


@pytest.mark.parametrize("suite", ["pgd", "fast", "apgd-ce,square"])
def test_robust_accuracy_of_a_linear_model_is_the_share_beyond_eps(suite):
    model, images, labels, distance = toy()
    eps = float(distance.sort().values[60:62].mean())
    report = evaluate(model, images, labels, suite=suite, eps=eps)
    assert report.clean_accuracy == 1
    # The box [0, 1] keeps a few images out of reach; no attack may take more than the ball allows.
    must_stand = distance > eps
    survivors = list(report.samples.values())[-1]
    assert survivors[must_stand].all()
    assert report.robust_accuracy == pytest.approx(must_stand.float().mean().item(), abs=0.05)


def test_every_result_is_the_same_for_any_batch_size():
    model, images, labels, _ = toy(40)
    samples = [
        evaluate(model, images, labels, suite="fast", eps=EPS / 4, batch_size=b).samples
        for b in (7, 500)
    ]
    for name, expected in samples[0].items():
        assert torch.equal(samples[1][name], expected), name


def test_the_model_and_the_caller_are_left_as_they_were():
    model, images, labels, _ = toy(20)
    before, weights = torch.get_rng_state(), model.w.detach().clone()
    evaluate(model, images, labels, suite="fast", eps=EPS)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert model.dropout.training
    assert model.w.grad is None
    assert model.w.requires_grad
    assert torch.equal(model.w, weights)


def test_saturated_logits_defeat_pgd_and_the_report_shows_both():
    model, images, labels, distance = toy(scale=1e5)
    eps = float(distance.max()) * 1.5
    report = evaluate(model, images, labels, suite="pgd", eps=eps)
    side = {row["name"]: row["robust_accuracy"] for row in report.to_dict()["side_by_side"]}
    assert report.attacks["pgd"] > 0.5
    assert report.verdict.status != "reliable"
    raised = {flag.name for flag in report.findings.flags if flag.raised}
    assert "F1" in raised
    full = evaluate(model, images, labels, suite="fast", eps=eps).to_dict()
    side = {row["name"]: row["robust_accuracy"] for row in full["side_by_side"]}
    assert side["pgd-ce"] > side["pgd-ce-scaled"] + 0.3
    assert full["robust_accuracy"] < 0.3


def test_a_suite_on_cross_entropy_alone_is_not_called_adaptive():
    model, images, labels, _ = toy()
    tiers = {}
    for suite in ("pgd", "apgd-ce,apgd-dlr"):
        report = evaluate(model, images, labels, suite=suite, eps=EPS / 4, checks="always")
        row = json.loads(report.to_json())["side_by_side"][-1]
        assert row["name"] == f"suite {suite}"
        tiers[suite] = row["tier"]
    assert tiers == {"pgd": "naive", "apgd-ce,apgd-dlr": "adaptive"}


@pytest.mark.parametrize(
    "answer", [lambda z: (z, "more"), lambda z: SimpleNamespace(logits=z)], ids=["tuple", ".logits"]
)
def test_logits_are_found_where_models_put_them(answer):
    model, images, labels, _ = toy(20, answer=answer)
    plain, *_ = toy(20)
    got = evaluate(model, images, labels, suite="pgd", eps=EPS / 4)
    assert got.attacks == evaluate(plain, images, labels, suite="pgd", eps=EPS / 4).attacks


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"images": torch.full((20, 1, 4, 4), 1.5)}, DataError, r"images in \[0, 1\]"),
        ({"images": torch.full((20, 1, 4, 4), float("nan"))}, DataError, r"images in \[0, 1\]"),
        ({"images": torch.zeros(0, 1, 4, 4), "labels": torch.zeros(0).long()}, DataError, "N >= 1"),
        ({"labels": torch.full((20,), 7)}, DataError, "labels from 0 to 1"),
        ({"labels": torch.zeros(19).long()}, DataError, "one per image"),
        ({"labels": torch.zeros(20)}, DataError, "integer labels"),
        ({"eps": -0.1}, UsageError, "expected eps >= 0"),
        ({"norm": "linf"}, UsageError, "did you mean 'Linf'"),
        ({"suite": "standart"}, UsageError, "did you mean 'standard'"),
        ({"model": toy(answer=lambda z: z * float("nan"))[0]}, ModelError, "finite logits"),
        ({"model": toy(answer=lambda z: z[:, 0])[0]}, ModelError, r"logits \(N, K\)"),
    ],
)
def test_hostile_input_is_refused_in_one_line(change, error, message):
    model, images, labels, _ = toy(20)
    call = {
        "model": model,
        "images": images,
        "labels": labels,
        "suite": "pgd",
        "eps": EPS,
        **change,
    }
    with pytest.raises(error, match=message) as caught:
        evaluate(**(call | change))
    assert "\n" not in str(caught.value)


def test_a_model_that_hides_its_gradient_falls_to_images_of_another():
    model, images, labels, distance = toy(120)
    blunt, _, _, _ = toy(120)
    blunt.answer = lambda z: z.round()  # no gradient; the classes stay
    assert (blunt.eval()(images).argmax(1) == labels).float().mean() > 0.9
    eps = float(distance.max())
    attacks = {"suite": "apgd-ce", "eps": eps}
    alone = evaluate(blunt, images, labels, **attacks)
    report = evaluate(blunt, images, labels, **attacks, transfer_from={"open": model})
    assert alone.attacks["apgd-ce"] > 0.8
    assert report.attacks["transfer"] < 0.1
    flags = {flag.name: flag for flag in report.findings.flags}
    assert flags["F6"].raised
    assert model.training  # as it came
    with pytest.raises(ModelError, match="2 classes to transfer from, got wide with 4"):
        evaluate(
            model, images, labels, **attacks,
            transfer_from={"wide": toy(answer=lambda z: z.repeat(1, 2))[0]},
        )  # fmt: skip


def test_where_square_breaks_all_that_gradients_left_fast_ends_there():
    blunt, images, labels, _ = toy(120)
    blunt.answer = lambda z: z.round()
    right = blunt.eval()(images).argmax(1) == labels
    report = evaluate(blunt, images[right], labels[right], suite="fast", eps=0.9)
    assert report.robust_accuracy == 0
    assert not any(name.startswith("standard: ") for name in report.attacks)


def test_another_norm_needs_its_own_eps():
    model, images, labels, _ = toy(20)
    with pytest.raises(UsageError, match="expected --eps with --norm L2"):
        evaluate(model, images, labels, suite="pgd", norm="L2")


def test_at_eps_zero_nothing_is_attacked_and_nothing_is_claimed():
    model, images, labels, _ = toy()
    report = evaluate(model, images, labels, suite="pgd", eps=0.0)
    assert report.robust_accuracy == report.clean_accuracy == 1
    assert report.verdict.status == "not applicable"


def test_verdicts_already_known_are_taken_over():
    model, images, labels, _ = toy(40)
    seen = []
    whole = evaluate(
        model, images, labels, suite="apgd-ce,square", eps=EPS / 4,
        decided=lambda *verdict: seen.append(verdict),
    )  # fmt: skip
    half = {}
    for attack, image, right in seen[: len(seen) // 2]:
        half.setdefault(attack, {})[image] = right
    again = []
    resumed = evaluate(
        model, images, labels, suite="apgd-ce,square", eps=EPS / 4, done=half,
        decided=lambda *verdict: again.append(verdict),
    )  # fmt: skip
    assert sorted(again + seen[: len(seen) // 2]) == sorted(seen)
    for name, expected in whole.samples.items():
        assert torch.equal(resumed.samples[name], expected)


def test_a_journal_survives_a_kill_at_any_byte(tmp_path):
    journal = Journal(tmp_path / "whole", {"seed": 0})
    for image in range(5):
        journal.record("apgd-ce", image, image % 2 == 0)
    journal.close()
    content = (tmp_path / "whole" / "journal-0.jsonl").read_bytes()
    for cut in range(len(content)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        (folder / "journal-0.jsonl").write_bytes(content[:cut])
        resumed = Journal(folder, {"seed": 0})
        known = resumed.verdicts.get("apgd-ce", {})
        assert all(right == (image % 2 == 0) for image, right in known.items())
        resumed.record("square", 9, True)
        resumed.close()
        read = Journal(folder, {"seed": 0})
        read.close()
        assert read.verdicts["square"] == {9: True}
        with pytest.raises(RunFolderError, match="another evaluation"):
            Journal(folder, {"seed": 1})


def test_a_journal_of_another_evaluation_is_refused(tmp_path):
    Journal(tmp_path, {"seed": 0}).close()
    with pytest.raises(RunFolderError, match="seed: 0 there, 1 here"):
        Journal(tmp_path, {"seed": 1})


def test_a_report_is_plain_values():
    model, images, labels, _ = toy()
    report = evaluate(model, images, labels, suite="fast", eps=EPS / 4, class_names=["a", "b"])
    content = json.loads(report.to_json())
    assert content["robust_accuracy"] == report.robust_accuracy
    assert [row["name"] for row in content["classes"]] == ["a", "b"]
    assert {flag["name"] for flag in content["flags"]} == {f"F{i}" for i in range(1, 16)}


@pytest.mark.parametrize("name", ["pgd", "apgd-ce", "fgsm"])
def test_one_attack_as_a_function_stays_in_the_threat_model(name):
    model, images, labels, distance = toy(30)
    images_adv = robustify.attack(model, images, labels, name=name, eps=EPS)
    assert (ThreatModel("Linf", EPS).distance(images_adv, images) <= EPS + 1e-6).all()
    assert images_adv.min() >= 0
    assert images_adv.max() <= 1
    model.eval()
    fell = model(images_adv).argmax(1) != labels
    assert fell[distance < EPS / 2].all()
    assert not fell[distance > EPS].any()


def test_public_names_are_what_they_say():
    assert {name: callable(getattr(robustify, name)) for name in robustify.__all__}
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        robustify.nothing  # noqa: B018
    assert make_suite("fast", ThreatModel(), 10).name == "fast"
