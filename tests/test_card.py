"""The model card: its metadata reads back to the report's numbers, its text says what it must."""

import re

import pytest
from huggingface_hub import ModelCard, ModelCardData
from reports import EVIL, full, minimal

from robustify import models
from robustify.card import base_model, card, data_set
from robustify.purifier import Purified, Purifier

DIGITS = {"num_classes": 10, "in_chans": 1, "image_size": 8, "class_names": tuple("0123456789")}


def classifier(architecture="resnet20_cifar", image_size=8, **about):
    made = models.create(architecture, **{**DIGITS, "image_size": image_size})
    made.about |= {"recipe": "peeraid", "data": "digits", **about}
    return made


def metrics(text):
    """Metric name -> (value, arguments), as huggingface_hub reads them."""
    found = ModelCard(text).data.eval_results
    return {result.metric_name: (result.metric_value, result.metric_args) for result in found}


def test_the_metadata_reads_back_to_the_same_numbers():
    content = full()
    found = metrics(card(classifier(), content, "ann/robust"))
    assert len(found) == 2 + len(content["attacks"])
    clean, args = found["Clean accuracy (n = 1000)"]
    assert (clean, args["interval"]) == (content["clean_accuracy"], content["clean_interval"])
    robust, args = found["Robust accuracy (suite standard, Linf, eps 8/255, n = 1000)"]
    assert robust == content["robust_accuracy"]
    assert args["attack"] == [attack["name"] for attack in content["attacks"]]
    assert {key: args[key] for key in ("norm", "eps", "n", "seed", "interval", "verdict")} == {
        "norm": "Linf", "eps": 8 / 255, "n": 1000, "seed": 3, "interval": content["interval"],
        "verdict": "reliable",
    }  # fmt: skip
    for attack in content["attacks"]:
        value, args = found[f"Accuracy after {attack['name']} (Linf, eps 8/255, n = 1000)"]
        assert (value, args["attack"]) == (attack["robust_accuracy"], attack["name"])


def test_the_metadata_is_what_the_library_s_own_classes_write():
    text = card(classifier(), full(), "ann/robust")
    read = ModelCard(text)
    assert isinstance(read.data, ModelCardData)
    assert str(ModelCard(str(read))) == str(read)
    assert read.data.to_dict()["model-index"][0]["name"] == "robust"


@pytest.mark.parametrize(
    ("about", "base", "data"),
    [
        ({}, None, None),
        ({"base": "hf-hub:user/repo@v1"}, "user/repo", None),
        ({"base": "resnet18.a1_in1k"}, "timm/resnet18.a1_in1k", None),
        ({"base": "model.safetensors"}, None, None),
        ({"data": "cifar10"}, None, "uoft-cs/cifar10"),
        ({"data": "hf-hub:user/pictures@main"}, None, "user/pictures"),
        ({"data": "user/pictures"}, None, "user/pictures"),
        ({"data": "/home/ann/photos"}, None, None),
        ({"data": "./ann/photos"}, None, None),
    ],
)
def test_base_model_and_data_are_named_if_the_hub_has_them(about, base, data):
    made = classifier(**about)
    assert (base_model(made), data_set(made)) == (base, data)
    read = ModelCard(card(made, minimal(), "ann/robust")).data
    assert read.base_model == base
    assert read.to_dict().get("base_model_relation") == (base and "finetune")
    assert read.datasets == (data and [data])


def test_no_local_path_is_published():
    content = full()
    content["training"]["student"] = "/home/ann/secret/net.safetensors"
    content["training"]["teachers"] = ["local-dir:/home/ann/secret/teacher", "resnet18.a1_in1k"]
    text = card(classifier(data="/home/ann/secret/photos"), content, "ann/robust")
    assert "secret" not in text
    assert "net.safetensors" in text
    assert "teacher, resnet18.a1" in text


def test_how_it_loads_depends_on_what_can_build_it():
    own = card(classifier(), minimal(), "ann/robust")
    assert ModelCard(own).data.library_name == "timm"
    assert own.index("import robustify") < own.index('timm.create_model("hf-hub:ann/robust"')
    assert "AutoModelForImageClassification" not in own
    plain = card(classifier("vit_tiny_patch16_224", image_size=32), minimal(), "ann/robust")
    assert 'AutoModelForImageClassification.from_pretrained("ann/robust")' in plain
    assert plain.index("timm.create_model") < plain.index("import robustify")


def test_a_purified_model_does_not_claim_to_be_timm_s():
    inner = classifier(base="hf-hub:user/plain")
    content = full()
    pair = Purified(Purifier(1, (8, 1)), inner, about={"recipe": "purifier", "data": "digits"})
    text = card(pair, content, "ann/purified")
    read = ModelCard(text).data
    assert read.library_name == "robustify"
    assert (read.base_model, read.to_dict()["base_model_relation"]) == ("user/plain", "adapter")
    assert "timm.create_model" not in text
    assert 'robustify.load("hf-hub:ann/purified")' in text
    assert "*without* its purifier" in text
    assert "(headline)" in text  # the attacker tiers


def test_the_text_says_what_it_must():
    text = card(
        classifier(threat_model={"norm": "Linf", "eps": 0.15}), full("suspect"), "ann/robust"
    )
    for said in (
        "An empirical upper bound, not a certificate",
        "Verdict: **suspect**",
        "F5: Square lowers the worst case",
        "Linf, eps 8/255, suite standard, n = 1,000, seed 3",
        "| apgd-ce      | Linf   | 8/255 | 1,000 | 52.3 %",
        "Jung et al., CVPR 2024, arXiv 2403.06668",
        "| Linf, eps 0.15 ",
        "Secrecy of the purifier is not assumed.",
    ):
        assert said in text, said


def test_hostile_text_stays_text():
    content = full()
    content["data"]["name"] = f"{EVIL}\n---\nlibrary_name: evil"
    content["attacks"][0]["name"] = f"apgd | {EVIL}"
    text = card(classifier(), content, "ann/robust")
    _, metadata, body = re.split(r"^---$", text, maxsplit=2, flags=re.MULTILINE)
    assert "<script>" not in body
    assert ModelCard(text).data.library_name == "timm"
    assert ModelCard(text).data.eval_results[0].dataset_name == content["data"]["name"]
    assert "evil" in metadata


def test_of_another_recipe_the_card_knows_no_paper():
    text = card(classifier(recipe="mine"), minimal(), "ann/robust")
    assert "The method:" not in text
    assert "recipe mine" in text
