"""One synthetic set of flags per rule, and the plausibility gate."""

from dataclasses import replace

import pytest

from robustify.checks import (
    BLACK_BOX_GAIN,
    NO_FULL_ACCESS,
    SCALE_DROP,
    ZERO_GRADIENT,
    ZERO_WHEN_SCALED,
    grey_box,
)
from robustify.plausible import Reference, gate, implausible
from robustify.threat import ThreatModel
from robustify.verdict import (
    ADAPTIVE,
    MASKS,
    NAIVE,
    TITLES,
    UNRELIABLE,
    Flag,
    Headline,
    Threshold,
    judge,
    weigh,
)

EIGHT = ThreatModel("Linf", 8 / 255)
ADAPTED = frozenset({"ce", "ce_scaled", "dlr", "square"})
SUSPICIOUS = [name for name in TITLES if name not in ("F11", "F13")]
ANY = Threshold("anything", 0.5, ">", "", "our choice")


def flags(*raised, missing=()):
    made = []
    for name in TITLES:
        if name in missing:
            made.append(Flag.not_measured(name, "left out"))
        else:
            made.append(Flag.of(name, [ANY.measure(name in raised, "a against b")]))
    return made


def headline(**changes):
    plain = Headline("standard", 0.45, 1000, 8 / 255, frozenset({"ce", "dlr", "square"}))
    return replace(plain, **changes)


def with_zero_gradient(share, when_scaled):
    rest = [flag for flag in flags() if flag.name != "F1"]
    first = Flag.of(
        "F1", [ZERO_GRADIENT.measure(share, "z"), ZERO_WHEN_SCALED.measure(when_scaled, "z / s")]
    )
    return [first, *rest]


def test_silent_flags_make_a_reliable_result():
    verdict = judge(flags(), headline())
    assert (verdict.status, verdict.title) == ("reliable", "")
    assert all(name in verdict.reasons[0] for name in TITLES)


@pytest.mark.parametrize("name", SUSPICIOUS)
def test_rule_2_every_flag_but_f11_and_f13_makes_a_result_suspect(name):
    verdict = judge(flags(name), headline())
    assert (verdict.status, verdict.title) == ("suspect", UNRELIABLE)
    assert len(verdict.reasons) == 1
    assert verdict.reasons[0].startswith(f"{name} {TITLES[name]}: a against b: 1")


def test_rule_3_saturation_alone_is_a_warning():
    verdict = judge(flags("F13"), headline())
    assert verdict.status == "reliable"
    assert any(note.startswith("F13") for note in verdict.notes)


@pytest.mark.parametrize(
    ("raised", "changes", "word"),
    [
        (("F11",), {}, "F11"),
        ((), {"n": 99}, "99"),
        ((), {"eps": 0.0}, "eps is 0"),
    ],
)
def test_rule_1_what_is_missing_is_said(raised, changes, word):
    verdict = judge(flags(*raised), headline(**changes))
    assert verdict.status == "not applicable"
    assert any(word in reason for reason in verdict.reasons)
    cleared = judge(flags(*raised), headline(averaged=True))
    assert cleared.status == "reliable"


def test_rule_1_precedes_the_exception_of_rule_4():
    assert judge(flags(), headline(n=50, robust_accuracy=0.0)).status == "not applicable"
    assert judge(flags(), headline(n=100)).status == "reliable"


def test_rule_1_no_gradient_and_no_black_box_attack():
    blind = with_zero_gradient(1.0, 1.0)
    assert judge(blind, headline(attacks=frozenset({"ce", "dlr"}))).status == "not applicable"
    assert judge(blind, headline()).status == "suspect"
    partly = with_zero_gradient(1.0, 0.9)
    assert judge(partly, headline(attacks=frozenset({"ce", "dlr"}))).status == "suspect"


@pytest.mark.parametrize(("robust", "status"), [(0.005, "reliable"), (0.01, "reliable"),
                                                (0.011, "suspect")])  # fmt: skip
def test_rule_4_nothing_is_left_to_overestimate(robust, status):
    verdict = judge(flags("F1", "F10"), headline(robust_accuracy=robust))
    assert verdict.status == status
    listed = verdict.reasons if status == "suspect" else verdict.notes
    assert {line.split()[0] for line in listed} == {"F1", "F10"}
    assert verdict.title == (MASKS if status == "reliable" else UNRELIABLE)


def test_rule_4_does_not_speak_of_masking_where_no_gradient_is_masked():
    assert judge(flags("F12"), headline(robust_accuracy=0.0)).title == ""


@pytest.mark.parametrize("name", NAIVE)
def test_rule_5_naive_attacks_do_not_count_against_an_adaptive_headline(name):
    verdict = judge(flags(name), headline(attacks=ADAPTED))
    assert verdict.status == "reliable"
    assert any(name in note for note in verdict.notes)
    for kind in ("ce_scaled", "dlr", "square"):
        assert judge(flags(name), headline(attacks=ADAPTED - {kind})).status == "suspect"
    margin = headline(attacks=ADAPTED - {"dlr"} | {"margin"})
    assert judge(flags(name), margin).status == "reliable"


@pytest.mark.parametrize("other", ADAPTIVE)
def test_rule_5_needs_f5_to_f9_silent(other):
    verdict = judge(flags("F3", other), headline(attacks=ADAPTED))
    assert verdict.status == "suspect"
    assert len(verdict.reasons) == 2


@pytest.mark.parametrize("missing", ["F5", "F7"])
def test_rule_5_silence_has_to_be_measured(missing):
    verdict = judge(flags("F3", missing=[missing]), headline(attacks=ADAPTED))
    assert verdict.status == "suspect"
    assert f"not measured: {missing}" in verdict.notes


def test_rule_5_f1_counts_where_the_gradient_is_zero_when_scaled_too():
    adapted = headline(attacks=ADAPTED)
    assert judge(with_zero_gradient(0.9, 0.005), adapted).status == "reliable"
    assert judge(with_zero_gradient(0.9, 0.5), adapted).status == "suspect"


def test_rule_5_does_not_excuse_the_rest():
    assert judge(flags("F1", "F14"), headline(attacks=ADAPTED)).status == "suspect"


@pytest.mark.parametrize("suite", ["pgd", "apgd-ce,square", "fgsm"])
@pytest.mark.parametrize("robust", [0.0, 0.45])
def test_an_incomplete_suite_is_never_reliable(suite, robust):
    verdict = judge(flags(), headline(suite=suite, robust_accuracy=robust, attacks=ADAPTED))
    assert (verdict.status, verdict.title) == ("suspect", UNRELIABLE)
    assert suite in verdict.reasons[0]


def test_weigh_says_which_flags_count():
    weighed = weigh(flags("F1", "F2"), headline(attacks=ADAPTED))
    assert [flag.name for flag in weighed if not flag.counts] == [*NAIVE, "F11", "F13"]
    assert [f.name for f in weigh(flags(), headline()) if not f.counts] == ["F11", "F13"]


def test_a_sentence_carries_number_threshold_source_and_both_attacks():
    text = "PGD on z leaves 98.4% right, PGD on z / s 10.6%"
    flag = Flag.of("F3", [SCALE_DROP.measure(0.878, text)])
    assert flag.sentence == f"{text}: 87.8 points; more than 2 points is a flag (our choice)"
    assert (flag.raised, flag.value, flag.threshold) == (True, 0.878, 0.02)
    assert "(published)" in Flag.of("F5", [BLACK_BOX_GAIN.measure(0.1, "Square")]).sentence


def test_equality_with_a_threshold_is_not_decided_by_rounding():
    assert not SCALE_DROP.measure(0.98 - 0.96, "").raised  # 0.0200…018 in floating point
    assert SCALE_DROP.measure(0.0201, "").raised


def test_f15_a_purified_system_needs_white_box_attacks_on_the_whole():
    assert grey_box(("G1", "Q"), preprocessed=True).raised
    assert not grey_box(("G1", "W", "Q"), preprocessed=True).raised
    assert not grey_box((), preprocessed=False).raised
    assert grey_box(("G1",), preprocessed=True).threshold == NO_FULL_ACCESS.value


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        (Reference("cifar10", parameters=11_200_000), 0.60),
        (Reference("CIFAR-10", parameters=270_000), 0.60),
        (Reference("cifar10", architecture="preact_resnet18"), 0.60),
        (Reference("cifar10", architecture="ResNet-18", extra_data=True), 0.60),
        (Reference("cifar10", parameters=46_200_000), 0.5994),
        (Reference("cifar10", architecture="WideResNet-34-10"), 0.5994),
        (Reference("cifar10", parameters=46_200_000, extra_data=True), None),
        (Reference("cifar10", parameters=36_500_000), None),
        (Reference("digits", parameters=11_200_000), None),
        (Reference("digits", gate=0.3), 0.3),
        (Reference(), None),
    ],
)
def test_f14_the_gate_goes_by_size_and_data(reference, expected):
    known = gate(reference, EIGHT)
    assert (None if known is None else pytest.approx(known[0])) == expected
    other = ThreatModel("L2", 0.5)
    assert gate(reference, other) is None or reference.gate is not None


def test_f14_above_the_gate_is_implausible():
    reference = Reference("cifar10", architecture="resnet18")
    assert implausible(0.61, 0.9, EIGHT, reference).raised
    passed = implausible(0.59, 0.9, EIGHT, reference)
    assert passed.raised is False
    assert "no reference row" not in passed.sentence


def test_f14_without_a_row_says_so_and_is_silent():
    flag = implausible(0.99, 0.99, EIGHT, Reference("digits"))
    assert flag.raised is False
    assert flag.sentence.startswith("no reference row")


def test_f14_finds_jumps_and_bookkeeping_errors():
    assert implausible(0.48, 0.8, EIGHT, Reference(previous=0.44)).raised
    assert not implausible(0.47, 0.8, EIGHT, Reference(previous=0.44)).raised
    assert implausible(0.81, 0.8, EIGHT, Reference()).raised
    assert implausible(0.5, 0.8, EIGHT, Reference(), pgd=(0.494, 0.5), n=1000).raised
    assert not implausible(0.5, 0.8, EIGHT, Reference(), pgd=(0.495, 0.5), n=1000).raised
    assert not implausible(0.5, 0.8, EIGHT, Reference(), pgd=(0.48, 0.5), n=100).raised
    assert implausible(0.5, 0.8, EIGHT, Reference(), pgd=(0.47, 0.5), n=100).raised
