"""The export to RobustBench: its fields, and what is refused."""

import pytest
from reports import minimal

from robustify.errors import UsageError
from robustify.robustbench import export, model_info

ACCEPTED = [
    ("cifar10", "Linf", 8 / 255, 10_000, "cifar10", "8/255"),
    ("CIFAR-10", "L2", 0.5, 10_000, "cifar10", "0.5"),
    ("cifar100", "Linf", 8 / 255, 10_000, "cifar100", "8/255"),
    ("imagenet-1k", "Linf", 4 / 255, 5_000, "imagenet", "4/255"),
]


def evaluated(data="cifar10", norm="Linf", eps=8 / 255, n=10_000, suite="standard", **more):
    content = minimal(n, round(0.85 * n), round(0.5 * n) + 1)
    content["data"]["name"] = data
    content["threat_model"] = {"norm": norm, "eps": eps, "eps_text": "?"}
    return {**content, "suite": suite, **more}


@pytest.mark.parametrize(("data", "norm", "eps", "n", "name", "text"), ACCEPTED)
def test_an_evaluation_like_theirs_becomes_an_entry(data, norm, eps, n, name, text):
    entry = model_info(evaluated(data, norm, eps, n), additional_data=False)
    assert (entry["dataset"], entry["eps"]) == (name, text)
    assert entry["clean_acc"] == "85.00"


def test_the_entry_has_their_fields_and_formats():
    paper = {"link": "arxiv.org/abs/1", "name": "A Paper", "authors": "A, B", "venue": "ICML 2026"}
    entry = model_info(evaluated(), additional_data=True, footnote="More images.", **paper)
    assert entry == {
        "link": "arxiv.org/abs/1", "name": "A Paper", "authors": "A, B", "additional_data": True,
        "number_forward_passes": 1, "dataset": "cifar10", "venue": "ICML 2026",
        "architecture": "resnet18", "eps": "8/255", "clean_acc": "85.00", "reported": "50.01",
        "autoattack_acc": "50.01", "unreliable": False, "footnote": "More images.",
    }  # fmt: skip
    suspect = evaluated(verdict={"status": "suspect", "reasons": ["F5"]})
    assert model_info(suspect, additional_data=False)["unreliable"] is True


@pytest.mark.parametrize(("changes", "reason"), [
    ({"data": "digits"}, "got digits Linf"),
    ({"data": "cifar100", "norm": "L2", "eps": 0.5}, "got cifar100 L2"),
    ({"norm": "L1", "eps": 12}, "got cifar10 L1"),
    ({"eps": 2 / 255}, "expected eps 8/255"),
    ({"eps": 0.031}, "expected eps 8/255"),
    ({"n": 1_000}, "expected n = 10000"),
    ({"data": "imagenet", "eps": 4 / 255}, "expected n = 5000"),
    ({"suite": "fast"}, "expected suite standard, got fast"),
    ({"verdict": {"status": "not applicable", "reasons": []}}, "not applicable"),
])  # fmt: skip
def test_anything_else_is_refused_with_the_reason(changes, reason):
    with pytest.raises(UsageError) as error:
        model_info(evaluated(**changes), additional_data=False)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_training_images_are_refused():
    content = evaluated()
    content["data"]["split"] = "train"
    with pytest.raises(UsageError, match="test split"):
        model_info(content, additional_data=False)


def test_the_paper_is_given_as_texts():
    entry = export(evaluated(), ["name=A = B", "venue=ICML 2026"], additional_data=True)
    assert entry["name"] == "A = B"
    assert entry == model_info(evaluated(), additional_data=True, name="A = B", venue="ICML 2026")
    for wrong in ("name", "year=2026"):
        with pytest.raises(UsageError, match="expected KEY=VALUE with a key of name, authors"):
            export(evaluated(), [wrong], additional_data=False)
