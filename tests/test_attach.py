"""A distilled purifier put before another classifier: what fits, is marked and is measured."""

import json

import pytest
import torch
from click.testing import CliRunner

import robustify
from robustify import data, models
from robustify.cli import robustify as command
from robustify.errors import ModelError, RunFolderError, UsageError
from robustify.frozen import weights_hash
from robustify.purifier import Purified, Purifier
from robustify.report import read


def classifier(seed=0, **changes):
    torch.manual_seed(seed)
    fitted = {"num_classes": 10, "in_chans": 1, "image_size": 8, "data": "digits",
              "class_names": tuple("0123456789"), **changes}  # fmt: skip
    return models.create("resnet20_cifar", **fitted)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A purified model as `distill` leaves it, and another classifier."""
    path = tmp_path_factory.mktemp("attach")
    torch.manual_seed(5)
    about = {"recipe": "purifier", "threat_model": {"norm": "Linf", "eps": 0.07}, "data": "digits",
             "selection": {"robust": 0.98765}, "record": {"notices": ["Our reading."]}}  # fmt: skip
    models.save(Purified(Purifier(1, (8, 1)), classifier(0)), path / "purified", about)
    models.save(classifier(1), path / "other")
    return path


@pytest.fixture(scope="module")
def joined(folder):
    out = folder / "joined"
    robustify.attach(folder / "purified", folder / "other", out, suite="fgsm", limit=24)
    return out


def test_the_pair_is_the_old_purifier_before_the_new_classifier(folder, joined):
    pair, images = models.load(joined), torch.rand(3, 1, 8, 8)
    other, old = models.load(folder / "other"), models.load(folder / "purified")
    assert torch.equal(pair(images), other(old.purifier(images)))
    assert weights_hash(pair.classifier) == weights_hash(other)
    assert not (joined / "model.safetensors").exists()
    assert not (joined / "checkpoints").exists()


def test_it_is_marked_and_carries_no_old_number_over(folder, joined):
    content = read(joined)
    record = json.loads((joined / "robustify.json").read_text())
    old = models.load(folder / "purified").sha256
    for marked in (content["model"], record, models.load(joined).about):
        assert marked["transferred"]["trained_before"]["sha256"] == old
    assert record["status"] == "finished"
    assert record["classifier"]["untouched"] is True
    assert "Transferred purifier" in (joined / "report.md").read_text()
    assert any("Our reading" in notice for notice in content["notices"])
    assert "0.98765" not in json.dumps([content, record])  # the accuracy it once was selected by
    assert "selection" not in models.load(joined).about


def test_it_is_measured_end_to_end_and_the_classifier_alone_beside_it(folder, joined):
    content = read(joined)
    assert content["threat_model"]["eps"] == 0.07  # what the purifier was trained against
    assert [row["tier"] for row in content["tiers"]] == ["G0", "G1", "G2", "W"]
    assert [row["tier"] for row in content["tiers"] if row["headline"]] == ["W"]
    assert content["robust_accuracy"] <= min(row["robust_accuracy"] for row in content["tiers"])
    test = data.load("digits").test.take(24)
    images, labels, _ = test.__getitems__(range(24))
    images = data.to_float(images)
    for network, found in (
        (models.load(folder / "other"), content["before"]["clean_accuracy"]),
        (models.load(joined), content["clean_accuracy"]),
    ):
        with torch.no_grad():
            assert found == pytest.approx(
                (network(images).argmax(1) == labels).float().mean().item()
            )
    assert content["cost"]["purifier_parameters"] > 0
    markdown = (joined / "report.md").read_text()
    assert "grey-box" in markdown
    assert "(headline)" in markdown


def test_the_purifiers_file_alone_suffices(folder, tmp_path):
    alone = tmp_path / "purifier.safetensors"
    alone.write_bytes((folder / "purified" / "purifier.safetensors").read_bytes())
    robustify.attach(alone, folder / "other", tmp_path / "out", suite="fgsm", limit=8, eps=0.01)
    content = read(tmp_path / "out")
    assert [row["tier"] for row in content["tiers"]] == ["G1", "G2", "W"]  # no surrogate known
    assert content["threat_model"]["eps"] == 0.01
    assert "G0" in " ".join(content["notices"])


def test_again_is_the_same_and_another_pair_is_refused(folder, joined, caplog):
    before = (joined / "report.json").stat().st_mtime_ns
    robustify.attach(folder / "purified", folder / "other", joined, suite="fgsm", limit=24)
    assert (joined / "report.json").stat().st_mtime_ns == before
    assert "already finished" in caplog.text
    with pytest.raises(RunFolderError, match="another run"):
        robustify.attach(folder / "purified", folder / "other", joined, suite="fgsm", limit=25)


@pytest.mark.parametrize(
    ("unfit", "words"),
    [
        ({"in_chans": 3}, "1 channel"),
        ({"num_classes": 7, "class_names": None}, "10 classes"),
        ({"class_names": tuple("1023456789")}, "in their order"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(folder, tmp_path, unfit, words):
    models.save(classifier(2, **unfit), tmp_path / "unfit")
    with pytest.raises((ModelError, UsageError), match=words) as refused:
        robustify.attach(folder / "purified", tmp_path / "unfit", tmp_path / "out")
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_purifier_is_needed_and_a_bare_classifier(folder, tmp_path):
    with pytest.raises(ModelError, match=r"purifier\.safetensors"):
        robustify.attach(folder / "other", folder / "other", tmp_path / "out")
    with pytest.raises(UsageError, match="bare classifier"):
        robustify.attach(folder / "purified", folder / "purified", tmp_path / "out")


def test_another_size_is_allowed_and_said(folder, tmp_path, caplog):
    models.save(classifier(3, image_size=12), tmp_path / "larger")
    robustify.attach(
        folder / "purified", tmp_path / "larger", tmp_path / "out", suite="fgsm", limit=4
    )
    assert "never measured at this one" in caplog.text
    assert models.load(tmp_path / "out").image_size == 12


def test_the_command(folder, tmp_path):
    named = [
        "attach",
        str(folder / "purified"),
        str(folder / "other"),
        "--out",
        str(tmp_path / "out"),
    ]
    arguments = [*named, "--suite", "fgsm", "--limit", "6", "--eps", "8/255", "--json"]
    done = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    content = json.loads(done.stdout)
    assert content["threat_model"]["eps_text"] == "8/255"
    assert content["defenses"] == ["purifier"]
