"""Networks by name, in and out: load, create, adapt to a data set, save.

    load(name)                  a trained network as it was saved, for use
    adapt(name, num_classes=…)  a network to be trained on a data set: from scratch where the name
                                is a plain architecture, otherwise its weights, made to fit
    save(classifier, folder)    model.safetensors and config.json, as timm and the Hub read them

A name is a timm architecture (`resnet18`), one with a pretrained tag (`resnet18.a1_in1k`),
`hf-hub:user/repo[@revision]`, `local-dir:folder`, a folder, a `.safetensors` file, or, for a file
that does not say what network it holds, `architecture:file`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import get_model_input_config
from torch import Tensor, nn

from robustify import remote, transformers_networks
from robustify.classifier import Classifier, describe, hub_config, match_labels
from robustify.errors import HubError, ModelError, UsageError, suggest
from robustify.files import atomic_write, make_folder
from robustify.frozen import weights_hash
from robustify.networks import SMALL_IMAGE, small_variant
from robustify.purifier import Purified, purifier_file, read_purifier, write_purifier
from robustify.transformers_networks import (
    TransformersClassifier,
    TransformersNetwork,
    is_transformers,
)
from robustify.weights import (
    CLASSIFIER_FOLDER,
    CONFIG_FILE,
    FILE_SUFFIXES,
    HEADER_KEY,
    PURIFIER_FILE,
    WEIGHTS_FILE,
    Saved,
    architecture_of,
    differences,
    fetch,
    read_file,
    read_folder,
    registry_cfg,
    write_safetensors,
)

__all__ = [
    "Classifier",
    "adapt",
    "create",
    "describe",
    "hub_config",
    "like",
    "load",
    "match_labels",
    "save",
    "wanted_image_size",
    "weights_hash",
]

log = logging.getLogger(__name__)


def load(
    name: str | Path,
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    force: bool = False,
) -> Classifier:
    """A trained network as it was saved, in eval mode on the CPU; a purified one as a `Purified`.

    `mean` and `std` replace what the file says, or what is assumed where it says nothing. `force`
    takes a purified model whose classifier is not the one it was saved with. Raises `ModelError`
    for what cannot be read, `UsageError` for an unknown name, `HubError`.
    """
    name = str(name)
    folder = fetch(name) if _on_hub(name) else None
    if (purifier := purifier_file(folder or name)) is not None:
        classifier = load(purifier.parent / CLASSIFIER_FOLDER, mean=mean, std=std)
        return read_purifier(purifier).join(classifier, force=force)
    found = read_folder(folder, name) if folder else _find(name)
    saved = _weights(found, assumes=not (mean and std))
    about = saved.about
    if about.keys() <= {"data"}:  # an untrained network has no more; this one is trained
        about = {"base": _base(saved), **about}
    module = _build(saved.architecture, saved.cfg, saved.model_args, saved)
    return _classifier(module, saved.architecture, saved.cfg, saved.model_args, mean, std,
                       about=about)  # fmt: skip


def create(
    architecture: str,
    *,
    num_classes: int,
    in_chans: int = 3,
    image_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    data: str | None = None,
) -> Classifier:
    """A network from scratch, initialized from torch's global generator, in eval mode.

    Images of 64 pixels or fewer get the architecture's small-image variant where there is one.
    Without `mean` and `std`, 0.5 and 0.5. Raises `UsageError` for an unknown architecture and
    `ModelError` for images that it cannot take.
    """
    if not timm.is_model(architecture):
        raise _unknown(architecture)
    size = registry_cfg(architecture)["input_size"][1]
    architecture = _variant(architecture, size, image_size)
    cfg = _described(architecture, num_classes, in_chans, image_size, mean, std, class_names)
    module = _build(architecture, cfg, {})
    return _classifier(module, architecture, cfg, {}, about={"data": data} if data else {})


def adapt(
    name: str | Path,
    *,
    num_classes: int,
    in_chans: int,
    image_size: int,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    class_names: Sequence[str] | None = None,
    data: str | None = None,
) -> Classifier:
    """A network to be trained on images of `image_size` pixels: `create` for a plain architecture,
    otherwise the named weights, with whatever does not fit replaced and said in the log.

    Weights keep their own normalization, unless the number of channels changes. Raises as `load`.
    """
    saved = _find(str(name))
    if saved == architecture_of(str(name)):
        return create(
            saved, num_classes=num_classes, in_chans=in_chans, image_size=image_size,
            mean=mean, std=std, class_names=class_names, data=data,
        )  # fmt: skip
    saved = _weights(saved)
    channels, size = saved.cfg["input_size"][:2]
    architecture = _variant(saved.architecture, size, image_size)
    if architecture != saved.architecture:
        log.warning(
            "%s is for %d-pixel images: taking %s; a wider first kernel keeps its centre, a head "
            "that differs starts anew", saved.origin, size, architecture,
        )  # fmt: skip
    cfg = {**saved.cfg, "input_size": (in_chans, image_size, image_size)}
    if in_chans != channels:
        log.warning("%s took %d channels, now %d", saved.origin, channels, in_chans)
        cfg |= {"mean": tuple(mean or (0.5,) * in_chans), "std": tuple(std or (0.5,) * in_chans)}
    about: dict[str, Any] = {"base": _base(saved)} | ({"data": data} if data else {})
    if architecture != saved.architecture or in_chans != channels:
        about["replaced"] = ["stem"]
    module = _refitted(saved, architecture, in_chans, image_size)
    classifier = _classifier(module, architecture, cfg, saved.model_args, about=about)
    if num_classes != classifier.num_classes or class_names is not None:
        _fit_head(classifier, num_classes, class_names, saved.origin)
    return classifier


def _base(saved: Saved) -> str:
    """What weights are called, without the folders of this machine."""
    published = timm.is_model(architecture_of(saved.origin)) or saved.origin.startswith("hf")
    return saved.origin if published else Path(saved.origin).name


def like(classifier: Classifier, name: str | None = None) -> Classifier:
    """Another network for the same data: `name`, or the same architecture from scratch."""
    about = {"data": classifier.data} if classifier.data else {}
    same = describe(classifier)
    fitted_to = {k: v for k, v in same.items() if k not in ("architecture", "model_args")}
    if name is not None:
        return adapt(name, data=classifier.data, **fitted_to)
    cfg = _described(classifier.architecture, **fitted_to)
    module = _build(classifier.architecture, cfg, same["model_args"])
    return _classifier(module, classifier.architecture, cfg, same["model_args"], about=about)


def wanted_image_size(name: str | Path, image_size: int | None = None) -> int | None:
    """The side, in pixels, that images of `image_size` pixels should get for the named network.

    Its own where the network is built for one size (ViT, Swin); otherwise that of the images, but
    at least what the network's poolings leave one pixel of. None where the images decide and their
    size is not given. Raises as `load`; pretrained weights of timm's are not fetched for it.
    """
    found = _find(str(name))
    if isinstance(found, str):
        found = Saved(found, architecture_of(found), {}, registry_cfg(found))
    own_size: int = found.cfg["input_size"][1]
    architecture = _variant(found.architecture, own_size, image_size or own_size)
    with torch.device("meta"):
        module = _build(architecture, found.cfg, found.model_args)
        fixed, least = _size_limits(module, own_size)
    if fixed:
        return own_size
    return None if image_size is None else max(image_size, least)


def _size_limits(module: nn.Module, own_size: int) -> tuple[bool, int]:
    """Whether a network takes images of one size only, and the smallest side, in pixels."""
    if isinstance(module, TransformersNetwork):
        return not module.takes(2 * own_size), 32  # five halvings, as its convolutional ones have
    halvings = getattr(module, "feature_info", None) or [{"reduction": 1}]
    return get_model_input_config(module)["fixed_input_size"], int(halvings[-1]["reduction"])


def save(
    classifier: Classifier, folder: str | Path, about: Mapping[str, Any] | None = None
) -> None:
    """Write `model.safetensors` and `config.json` into `folder`, each whole or not at all.

    The weights file alone suffices for `load`; the folder loads with
    `timm.create_model("local-dir:folder", pretrained=True)`, after `import robustify.networks`
    where the architecture is one of those. `about` (plain values) is added to what is recorded.
    A purified model leaves `purifier.safetensors`, and these files in `classifier/`: nothing that
    could be taken for the whole without its purifier. Raises `RunFolderError` for a folder that
    cannot be written.
    """
    folder = Path(folder)
    make_folder(folder)
    if isinstance(classifier, Purified):
        write_purifier(classifier, folder / PURIFIER_FILE, about or {})
        save(classifier.classifier, folder / CLASSIFIER_FOLDER)
        return
    weights, texts = _at_rest(classifier)
    recorded = {"model": describe(classifier), "about": {**classifier.about, **(about or {})}}
    header = {"format": "pt", HEADER_KEY: json.dumps(recorded, sort_keys=True, ensure_ascii=False)}
    write_safetensors(folder / WEIGHTS_FILE, weights, header)
    for name, text in texts.items():
        atomic_write(folder / name, text)


def _at_rest(classifier: Classifier) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    """The tensors and the JSON files from which timm, or transformers, builds the network."""
    if isinstance(classifier, TransformersClassifier):
        return transformers_networks.written_files(classifier)
    config = json.dumps(hub_config(classifier), indent=2, ensure_ascii=False)
    return classifier.module.state_dict(), {CONFIG_FILE: config + "\n"}


def _on_hub(name: str) -> bool:
    return name.startswith(("hf-hub:", "hf_hub:"))


def _find(name: str) -> Saved | str:
    """What a name stands for: a network at rest, or the name of a timm architecture."""
    folder = fetch(name) if _on_hub(name) else None
    if (purifier := purifier_file(folder or name)) is not None:
        raise ModelError(
            f"expected a bare classifier, got the purified model {name}; name the classifier "
            f"inside it, {purifier.parent / CLASSIFIER_FOLDER}"
        )
    if folder is not None:
        return read_folder(folder, name)
    prefix, _, rest = name.partition(":")
    if prefix == "local-dir":
        return read_folder(Path(rest))
    if rest and timm.is_model(prefix):
        return read_file(Path(rest), prefix)
    path = Path(name)
    if timm.is_model(name):
        return name
    if path.is_dir():
        return read_folder(path)
    if path.exists() or path.suffix in FILE_SUFFIXES:
        return read_file(path)
    if len(path.parts) > 1:
        hint = f"; for the Hub write hf-hub:{name}" if len(path.parts) == 2 else ""
        raise ModelError(f"expected a file or folder, but {name} does not exist{hint}")
    if not timm.is_model(architecture_of(name)):
        raise _unknown(name)
    return name


def _unknown(name: str) -> UsageError:
    near = suggest(architecture_of(name), timm.list_models())
    return UsageError(
        f"expected a timm architecture, a folder, a .safetensors file or hf-hub:user/repo, got "
        f"{name!r}{near}"
    )


def _weights(found: Saved | str, *, assumes: bool = True) -> Saved:
    """The network at rest; says so where its normalization had to be assumed."""
    saved = _pretrained(found) if isinstance(found, str) else found
    if saved.assumed and assumes:
        log.warning("%s", saved.assumed)
    return saved


def _pretrained(name: str) -> Saved:
    """timm's own weights of that name, fetched by timm."""
    architecture = architecture_of(name)
    tags = timm.list_pretrained(f"{architecture}.*")
    if not tags:
        raise ModelError(
            f"expected weights, but nobody published any for {architecture}; name a folder or a "
            f".safetensors file, or {architecture}:FILE"
        )
    if name == architecture:
        name = f"{architecture}.{timm.get_pretrained_cfg(architecture).tag}"
        log.warning("%s: taking timm's default weights %s", architecture, name)
    if name not in tags:
        raise UsageError(f"expected one of {', '.join(tags)}, got {name!r}{suggest(name, tags)}")
    hub_id = timm.get_pretrained_cfg(name).hf_hub_id
    if hub_id:
        remote.require_reachable(hub_id, WEIGHTS_FILE)
    try:
        module = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the client, the cache or the network raises
        raise HubError(
            f"could not get the weights of {name}: {str(error).splitlines()[0]}; check the "
            "network, or HF_HUB_OFFLINE and HF_HOME"
        ) from error
    return Saved(name, architecture, module.state_dict(), registry_cfg(name))


def _described(
    architecture: str,
    num_classes: int,
    in_chans: int,
    image_size: int,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
    class_names: Sequence[str] | None,
) -> dict[str, Any]:
    """timm's configuration of a new network for this data."""
    return registry_cfg(architecture) | {
        "num_classes": num_classes,
        "input_size": (in_chans, image_size, image_size),
        "mean": tuple(mean or (0.5,) * in_chans),
        "std": tuple(std or (0.5,) * in_chans),
        "label_names": class_names and tuple(class_names),
    }


def _variant(architecture: str, size: int, image_size: int) -> str:
    """What to build for images of `image_size` pixels of a network made for `size`."""
    small = small_variant(architecture) if image_size <= SMALL_IMAGE < size else None
    return small or architecture


def _refitted(saved: Saved, architecture: str, in_chans: int, image_size: int) -> nn.Module:
    """The saved network, its weights fitted by timm to another variant, channels or size."""
    if is_transformers(architecture):
        return transformers_networks.refit(saved, in_chans)
    module = _build(saved.architecture, saved.cfg, saved.model_args, saved)
    fixed = get_model_input_config(module)["fixed_input_size"]
    before = (saved.architecture, *saved.cfg["input_size"][: 2 if fixed else 1])
    if before == (architecture, in_chans, image_size)[: len(before)]:
        return module
    args: dict[str, Any] = {**saved.model_args, "in_chans": in_chans}
    if fixed:
        args["img_size"] = image_size
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    cfg = {**registry_cfg(architecture), "num_classes": saved.cfg["num_classes"]}
    cfg["input_size"] = saved.cfg["input_size"]  # of the weights: timm fits them to `args`
    source = Saved(saved.origin, architecture, weights, cfg, args)
    return _build(architecture, cfg, args, source)


def _fit_head(
    classifier: Classifier, num_classes: int, class_names: Sequence[str] | None, origin: str
) -> None:
    own = classifier.class_names
    if own and class_names and set(class_names) <= set(own):
        match_labels(classifier, class_names)
        return
    if num_classes != classifier.num_classes:
        log.warning(
            "%s has %d classes, the data %d: its head is replaced by a new one",
            origin, classifier.num_classes, num_classes,
        )  # fmt: skip
        classifier.module.reset_classifier(num_classes)  # type: ignore[operator]
        classifier.num_classes = num_classes
        classifier.about["replaced"] = [*classifier.about.get("replaced", []), "head"]
    elif own and class_names:
        log.warning(
            "%s has other class names than the data: its head is kept to start from", origin
        )
    classifier.class_names = None if class_names is None else tuple(class_names)


def _build(
    architecture: str,
    cfg: Mapping[str, Any],
    args: Mapping[str, Any],
    saved: Saved | None = None,
) -> nn.Module:
    """`timm.create_model`; with `saved`, its weights loaded as timm loads pretrained ones. Or the
    same by transformers, for one of its architectures. Raises `ModelError`.
    """
    if is_transformers(architecture):
        return transformers_networks.build(architecture, cfg, args, saved)
    weights = {"state_dict": dict(saved.weights)} if saved else {}
    try:
        module: Any = timm.create_model(
            architecture, pretrained=bool(saved), pretrained_cfg={**cfg, **weights}, **args
        )
    except Exception as error:  # timm raises RuntimeError, TypeError, KeyError, AssertionError, …
        reason = " ".join(str(error).split()) or type(error).__name__
        if saved is None:
            raise ModelError(
                f"expected timm to build {architecture} for {cfg['input_size'][1]}-pixel images, "
                f"but: {reason}; ask for another image size or architecture"
            ) from error
        expected = _build(architecture, cfg, args).state_dict()
        raise ModelError(
            f"expected the weights of {architecture} in {saved.origin}, but they differ: "
            f"{differences(expected, saved.weights) or reason}"
        ) from error
    module.pretrained_cfg.pop("state_dict", None)
    return module  # type: ignore[no-any-return]


def _classifier(
    module: nn.Module,
    architecture: str,
    cfg: Mapping[str, Any],
    args: Mapping[str, Any],
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    about: Mapping[str, Any],
) -> Classifier:
    names = cfg.get("label_names")
    described: dict[str, Any] = {
        "architecture": architecture,
        "image_size": cfg["input_size"][1],
        "mean": mean or cfg["mean"],
        "std": std or cfg["std"],
        "class_names": names if names and len(names) == cfg["num_classes"] else None,
        "about": about,
    }
    if isinstance(module, TransformersNetwork):
        classifier: Classifier = TransformersClassifier(
            module, processor=args["processor"], **described
        )
    else:
        classifier = Classifier(module, **described)
    _try(classifier.eval())
    return classifier


def _try(classifier: Classifier) -> None:
    """One grey image through the network, so that what cannot work says so here."""
    size = classifier.image_size
    try:
        with torch.no_grad():
            logits = classifier(torch.full((1, classifier.in_chans, size, size), 0.5))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ModelError(
            f"expected {classifier.architecture} to take {size}-pixel images, but it does not "
            f"({str(error).splitlines()[0]}); ask for another image size"
        ) from error
    if logits.shape != (1, classifier.num_classes):
        raise ModelError(
            f"expected (1, {classifier.num_classes}) logits for one image from "
            f"{classifier.architecture}, got {tuple(logits.shape)}"
        )
