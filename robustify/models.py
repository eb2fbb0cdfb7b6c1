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

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import get_model_input_config
from torch import Tensor, nn

from robustify.classifier import Classifier, describe, hub_config
from robustify.errors import HubError, ModelError, UsageError, suggest
from robustify.files import atomic_write, replacing
from robustify.networks import SMALL_IMAGE, small_variant
from robustify.weights import (
    CONFIG_FILE,
    HEADER_KEY,
    WEIGHTS_FILE,
    Saved,
    architecture_of,
    differences,
    fetch,
    read_file,
    read_folder,
    registry_cfg,
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
    "save_weights",
    "wanted_image_size",
    "weights_hash",
]

log = logging.getLogger(__name__)


def load(
    name: str | Path, *, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> Classifier:
    """A trained network as it was saved, in eval mode on the CPU.

    `mean` and `std` replace what the file says, or what is assumed where it says nothing. Raises
    `ModelError` for what cannot be read, `UsageError` for an unknown name, `HubError`.
    """
    saved = _find(str(name))
    if isinstance(saved, str):
        saved = _pretrained(saved)
    module = _timm(saved.architecture, saved.cfg, saved.model_args, saved)
    return _classifier(module, saved.architecture, saved.cfg, mean, std, about=saved.about)


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
    cfg = registry_cfg(architecture)
    cfg |= {
        "num_classes": num_classes,
        "input_size": (in_chans, image_size, image_size),
        "mean": tuple(mean or (0.5,) * in_chans),
        "std": tuple(std or (0.5,) * in_chans),
        "label_names": class_names and tuple(class_names),
    }
    module = _timm(architecture, cfg, {})
    return _classifier(module, architecture, cfg, about={"data": data} if data else {})


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
    if isinstance(saved, str):
        saved = _pretrained(saved)
    channels, size = saved.cfg["input_size"][:2]
    architecture = _variant(saved.architecture, size, image_size)
    if architecture != saved.architecture:
        log.warning(
            "%s is for %d-pixel images: taking %s, whose first convolution keeps the centre of its "
            "kernel", saved.origin, size, architecture,
        )  # fmt: skip
    cfg = {**saved.cfg, "input_size": (in_chans, image_size, image_size)}
    if in_chans != channels:
        log.warning("%s took %d channels, now %d", saved.origin, channels, in_chans)
        cfg |= {"mean": tuple(mean or (0.5,) * in_chans), "std": tuple(std or (0.5,) * in_chans)}
    base = saved.origin if ":" in saved.origin or "." in str(name) else Path(saved.origin).name
    classifier = _classifier(
        _refitted(saved, architecture, in_chans, image_size),
        architecture,
        cfg,
        about={"base": base} | ({"data": data} if data else {}),
    )
    if num_classes != classifier.num_classes or class_names is not None:
        _fit_head(classifier, num_classes, class_names, saved.origin)
    return classifier


def like(classifier: Classifier, name: str | None = None) -> Classifier:
    """Another network for the same data: `name`, or the same architecture from scratch."""
    fitted_to: dict[str, Any] = {
        "num_classes": classifier.num_classes,
        "in_chans": classifier.in_chans,
        "image_size": classifier.image_size,
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
        "class_names": classifier.class_names,
        "data": classifier.data,
    }
    return adapt(name or classifier.architecture, **fitted_to)


def match_labels(classifier: Classifier, class_names: Sequence[str]) -> Classifier:
    """`classifier` with its logits in the order of `class_names`, matched by name.

    Names it has besides are left out; a network without names is taken as it is if it has as many
    classes. Raises `ModelError`, showing both lists, where neither fits.
    """
    wanted, own = tuple(class_names), classifier.class_names
    if own == wanted or (own is None and classifier.num_classes == len(wanted)):
        classifier.class_names = wanted
        return classifier
    if own is None or not set(wanted) <= set(own) or len(set(own)) < len(own):
        raise ModelError(
            f"expected a network for the classes of the data, {_listed(wanted)}, got one for "
            f"{_listed(own) if own else f'{classifier.num_classes} classes without names'}; choose "
            "another network or other data"
        )
    _take_rows(classifier, [own.index(name) for name in wanted])
    classifier.class_names = wanted
    return classifier


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
        module = _timm(architecture, found.cfg, found.model_args)
    if get_model_input_config(module)["fixed_input_size"]:
        return own_size
    if image_size is None:
        return None
    halvings = getattr(module, "feature_info", None) or [{"reduction": 1}]
    return max(image_size, int(halvings[-1]["reduction"]))


def save(
    classifier: Classifier, folder: str | Path, about: Mapping[str, Any] | None = None
) -> None:
    """Write `model.safetensors` and `config.json` into `folder`, each whole or not at all.

    The weights file alone suffices for `load`; the folder loads with
    `timm.create_model("local-dir:folder", pretrained=True)`, after `import robustify.networks`
    where the architecture is one of those. `about` (plain values) is added to what is recorded.
    Raises `RunFolderError` for a folder that cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_weights(classifier, folder / WEIGHTS_FILE, about)
    config = json.dumps(hub_config(classifier), indent=2, ensure_ascii=False)
    atomic_write(folder / CONFIG_FILE, config + "\n")


def save_weights(
    classifier: Classifier, path: str | Path, about: Mapping[str, Any] | None = None
) -> None:
    """Write the bare network's state dict, float32, with all that `load` needs in its header.

    Raises `ModelError` for weights that are not finite, `RunFolderError` as `save`.
    """
    state = {name: _plain(name, tensor) for name, tensor in classifier.module.state_dict().items()}
    recorded = {"model": describe(classifier), "about": {**classifier.about, **(about or {})}}
    header = {"format": "pt", HEADER_KEY: json.dumps(recorded, sort_keys=True, ensure_ascii=False)}
    with replacing(path) as partial:
        save_file(state, partial, header)


def _plain(name: str, tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, float32, sharing memory with nothing."""
    if not tensor.is_floating_point():
        return tensor.detach().cpu().contiguous().clone()
    if not torch.isfinite(tensor).all():
        raise ModelError(f"expected finite weights to save, but {name!r} holds NaN or infinity")
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def weights_hash(module: nn.Module) -> str:
    """SHA-256 over names, types, shapes and bytes of the state dict, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        plain = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}\n".encode())
        digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _find(name: str) -> Saved | str:
    """What a name stands for: a network at rest, or the name of a timm architecture."""
    prefix, _, rest = name.partition(":")
    if prefix in ("hf-hub", "hf_hub"):
        return read_folder(fetch(rest), name)
    if prefix == "local-dir":
        return read_folder(Path(rest))
    if rest and timm.is_model(prefix):
        return read_file(Path(rest), prefix)
    path = Path(name)
    if path.is_dir():
        return read_folder(path)
    if path.exists() or path.suffix == ".safetensors" or len(path.parts) > 1:
        return _existing(path)
    if not timm.is_model(architecture_of(name)):
        raise _unknown(name)
    return name


def _existing(path: Path) -> Saved:
    if path.exists() or path.suffix == ".safetensors":
        return read_file(path)
    hint = f"; for the Hub write hf-hub:{path}" if len(path.parts) == 2 else ""
    raise ModelError(f"expected a file or folder, but {path} does not exist{hint}")


def _unknown(name: str) -> UsageError:
    near = suggest(architecture_of(name), timm.list_models())
    return UsageError(
        f"expected a timm architecture, a folder, a .safetensors file or hf-hub:user/repo, got "
        f"{name!r}{near}"
    )


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
    try:
        module = timm.create_model(name, pretrained=True)
    except Exception as error:  # whatever the client, the cache or the network raises
        raise HubError(
            f"could not get the weights of {name}: {str(error).splitlines()[0]}; check the "
            "network, or HF_HUB_OFFLINE and HF_HOME"
        ) from error
    return Saved(name, architecture, module.state_dict(), registry_cfg(name))


def _variant(architecture: str, size: int, image_size: int) -> str:
    """What to build for images of `image_size` pixels of a network made for `size`."""
    small = small_variant(architecture) if image_size <= SMALL_IMAGE < size else None
    return small or architecture


def _refitted(saved: Saved, architecture: str, in_chans: int, image_size: int) -> nn.Module:
    """The saved network, its weights fitted by timm to another variant, channels or size."""
    module = _timm(saved.architecture, saved.cfg, saved.model_args, saved)
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
    return _timm(architecture, cfg, args, source)


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
    elif own and class_names:
        log.warning(
            "%s has other class names than the data: its head is kept to start from", origin
        )
    classifier.class_names = None if class_names is None else tuple(class_names)


def _take_rows(classifier: Classifier, rows: list[int]) -> None:
    """Keep these rows of the head, in this order."""
    head = classifier.module.get_classifier()  # type: ignore[operator]
    if not isinstance(head, nn.Linear | nn.Conv2d):
        raise ModelError(f"expected a linear head to reorder, got {type(head).__name__}")
    kept = {name: tensor.detach()[rows].clone() for name, tensor in head.named_parameters()}
    classifier.module.reset_classifier(len(rows))  # type: ignore[operator]
    classifier.module.get_classifier().load_state_dict(kept)  # type: ignore[operator]
    classifier.num_classes = len(rows)


def _listed(names: Sequence[str]) -> str:
    more = f", … ({len(names)} in all)" if len(names) > 10 else ""
    return "[" + ", ".join(names[:10]) + more + "]"


def _timm(
    architecture: str,
    cfg: Mapping[str, Any],
    args: Mapping[str, Any],
    saved: Saved | None = None,
) -> nn.Module:
    """`timm.create_model`; with `saved`, its weights loaded as timm loads pretrained ones.

    Raises `ModelError`.
    """
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
        expected = _timm(architecture, cfg, args).state_dict()
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
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    *,
    about: Mapping[str, Any],
) -> Classifier:
    names = cfg.get("label_names")
    if isinstance(names, Mapping):
        names = [names[key] for key in sorted(names, key=int)]
    classifier = Classifier(
        module,
        architecture=architecture,
        image_size=cfg["input_size"][1],
        mean=mean or cfg["mean"],
        std=std or cfg["std"],
        class_names=names if names and len(names) == cfg["num_classes"] else None,
        about=about,
    ).eval()
    _try(classifier)
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
