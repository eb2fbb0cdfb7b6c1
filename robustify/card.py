"""The model card: what a folder's report says, as the Hub's README.md with its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCardData
from timm.models import model_entrypoint

from robustify import __version__, config
from robustify.classifier import Classifier, decimals
from robustify.purifier import Purified, facts
from robustify.rendering import count, interval, percent, plain, render
from robustify.report import WORDS, setting
from robustify.transformers_networks import is_transformers
from robustify.weights import architecture_of

ON_THE_HUB = {"cifar10": "uoft-cs/cifar10", "cifar100": "uoft-cs/cifar100"}
FINETUNE, ADAPTER = "finetune", "adapter"  # the Hub's words for how a model came from its base


def card(classifier: Classifier, content: Mapping[str, Any], repo_id: str) -> str:
    """The card of a classifier with the report `content`, to be read at `repo_id`: YAML metadata
    that `huggingface_hub.ModelCard` reads back to the same numbers, then Markdown."""
    metadata = metadata_of(classifier, content, repo_id)
    body = render(
        "card.md.jinja",
        name=repo_id.split("/")[-1],
        what=_what(classifier, content),
        repo_id=repo_id,
        content={"notices": (), "training": None, **content},
        setting=setting(content),
        words=WORDS[content["verdict"]["status"]],
        accuracies=_accuracies(content),
        tiers=content.get("tiers") or (),
        training=_training(classifier, content),
        pair=isinstance(classifier, Purified),
        **_loading(classifier),
        mean=plain(decimals(classifier.mean)),
        std=plain(decimals(classifier.std)),
        image_size=classifier.image_size,
        is_grey=classifier.in_chans == 1,
        citation=_recipe(classifier).get("paper"),
    )
    return f"---\n{metadata.to_yaml()}\n---\n\n{body}"


def metadata_of(classifier: Classifier, content: Mapping[str, Any], repo_id: str) -> ModelCardData:
    """The metadata: library, base model, data, tags, and every accuracy as a model index."""
    base, data = base_model(classifier), data_set(classifier)
    recipe = classifier.about.get("recipe")
    tags = ["image-classification", "adversarial-robustness", "robustify", recipe,
            content["threat_model"]["norm"].lower()]  # fmt: skip
    return ModelCardData(
        library_name=library(classifier),
        pipeline_tag="image-classification",
        base_model=base,
        base_model_relation=base and (ADAPTER if isinstance(classifier, Purified) else FINETUNE),
        datasets=data and [data],
        tags=[tag for tag in tags if tag],
        metrics=["accuracy"],
        model_name=repo_id.split("/")[-1],
        eval_results=_results(content, data or content["data"]["name"]),
    )


def library(classifier: Classifier) -> str:
    """Whose `from_pretrained` or `create_model` loads it: timm, transformers, or neither."""
    if isinstance(classifier, Purified):
        return "robustify"
    return "transformers" if is_transformers(classifier.architecture) else "timm"


def timm_alone(architecture: str) -> bool:
    """Whether timm has the network itself, and not from `robustify.networks`."""
    return not model_entrypoint(architecture).__module__.startswith("robustify")


def base_model(classifier: Classifier) -> str | None:
    """The Hub's name of the published model that this one was made from, if it is one."""
    about = classifier.about
    if isinstance(classifier, Purified):
        about = classifier.classifier.about
    base = str(about.get("base") or "")
    if base.startswith(("hf-hub:", "hf_hub:")):
        return base.partition(":")[2].partition("@")[0]
    tagged = base != architecture_of(base) and timm.is_model(architecture_of(base))
    return f"timm/{base}" if tagged else None


def data_set(classifier: Classifier) -> str | None:
    """The Hub's name of the data that it was trained on, if it has one: never a local path."""
    source = str(classifier.data or "").removeprefix("hf-hub:").partition("@")[0]
    named = source.count("/") == 1 and not Path(source).is_absolute() and source[0] not in "./~"
    return ON_THE_HUB.get(source) or (source if named else None)


def _results(content: Mapping[str, Any], data: str) -> list[EvalResult]:
    """One metric each for clean accuracy, accuracy after every attack, and the worst case. What it
    was measured under is in name and arguments, because results of one data set are merged."""
    threat, n, seed = content["threat_model"], content["n"], content["seed"]
    under = f"{threat['norm']}, eps {threat['eps_text']}, n = {n}"
    everything = {
        "norm": threat["norm"], "eps": threat["eps"], "n": n, "seed": seed,
        "verdict": content["verdict"]["status"],
    }  # fmt: skip
    found = [(f"Clean accuracy (n = {n})", content["clean_accuracy"],
              {"n": n, "interval": list(content["clean_interval"])})]  # fmt: skip
    found += [
        (f"Accuracy after {attack['name']} ({under})", attack["robust_accuracy"],
         {**everything, "attack": attack["name"], "interval": list(attack["interval"])})
        for attack in content["attacks"]
    ]  # fmt: skip
    found.append(
        (f"Robust accuracy (suite {content['suite']}, {under})", content["robust_accuracy"],
         {**everything, "attack": [attack["name"] for attack in content["attacks"]],
          "suite": content["suite"], "interval": list(content["interval"])})
    )  # fmt: skip
    return [
        EvalResult(
            task_type="image-classification", dataset_type=data,
            dataset_name=content["data"]["name"], dataset_split=content["data"]["split"],
            metric_type="accuracy", metric_name=name, metric_value=value, metric_args=args,
        )
        for name, value, args in found
    ]  # fmt: skip


def _accuracies(content: Mapping[str, Any]) -> list[list[str]]:
    """Rows of the table: attack, norm, eps, n, accuracy so far, interval, verdict."""
    threat, n = content["threat_model"], count(content["n"])
    rows = [["none (clean)", "–", "0", n, percent(content["clean_accuracy"]),
             interval(content["clean_interval"]), "–"]]  # fmt: skip
    for attack in content["attacks"]:
        rows.append([attack["name"], threat["norm"], threat["eps_text"], n,
                     percent(attack["robust_accuracy"]), interval(attack["interval"]),
                     content["verdict"]["status"]])  # fmt: skip
    return rows


def _what(classifier: Classifier, content: Mapping[str, Any]) -> str:
    """The first sentence: what this is."""
    data, recipe = content["data"]["name"], classifier.about.get("recipe")
    by = f"by the recipe {recipe} of robustify {__version__}" if recipe else "by robustify"
    if isinstance(classifier, Purified):
        inside = facts(classifier)["classifier"]["id"]
        moved = classifier.about.get("transferred")
        before = " It was trained before another classifier." if moved else ""
        return (f"A purifier, trained {by}, before the frozen image classifier {inside} for "
                f"{data}: the pair is one classifier.{before}")  # fmt: skip
    made = "trained from scratch"
    if classifier.about.get("base"):
        made = f"made from {base_model(classifier) or 'local weights'}"
    return f"An image classifier for {data}, {classifier.architecture}, {made} {by}."


def _loading(classifier: Classifier) -> dict[str, bool]:
    """Which of the ways to load it the card shows."""
    kind = library(classifier)
    alone = kind == "timm" and timm_alone(classifier.architecture)
    return {
        "by_timm": kind == "timm",
        "by_transformers": kind == "transformers" or alone,
        "needs_robustify": kind == "timm" and not alone,
    }


def _recipe(classifier: Classifier) -> Mapping[str, Any]:
    name = classifier.about.get("recipe")
    return config.find(name).about if name in config.names() else {}


def _training(classifier: Classifier, content: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Rows of the table of how it was trained; local files by their names alone."""
    about, done = classifier.about, content.get("training") or {}
    recipe, schedule = _recipe(classifier), done.get("training") or {}
    threat = about.get("threat_model") or {}
    rows: list[tuple[str, Any]] = [
        ("recipe", about.get("recipe")), ("idea", recipe.get("idea")),
        ("paper", recipe.get("paper")),
        ("student", done and _public(done["student"])),
        ("teachers", ", ".join(map(_public, done.get("teachers") or ()))),
        ("data", data_set(classifier) or content["data"]["name"]),
        ("training images", (done.get("data") or {}).get("training_images")),
        ("threat model", threat and f"{threat['norm']}, eps {plain(threat['eps'])}"),
        *((key.replace("_", " "), schedule.get(key))
          for key in ("epochs", "batch_size", "optimizer", "lr", "weight_decay")),
        ("optimizer steps at most, of each stage", done.get("max_steps")),
        ("seed", done.get("seed")),
        ("selection", (content.get("selection") or {}).get("on")),
    ]  # fmt: skip
    return [(key, plain(value)) for key, value in rows if value not in (None, "", {})]


def _public(name: str) -> str:
    """A Hub or timm name as it is; of a local path its last part."""
    if name.startswith(("hf-hub:", "hf_hub:")) or timm.is_model(architecture_of(name)):
        return name
    return Path(name.removeprefix("local-dir:")).name
