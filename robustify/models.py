"""Classifier: images in [0, 1] -> logits, whatever network and normalization are inside.

    load(name)                  a trained network as it was saved, for use
    adapt(name, num_classes=…)  a network to be trained on a data set: from scratch where the name is
                                a plain architecture, otherwise its weights, made to fit
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
from timm.models import get_model_args, get_model_input_config
from torch import Tensor, nn

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
    require_architecture,
)

log = logging.getLogger(__name__)


class Classifier(nn.Module):
    """A network with its normalization: (N, C, H, W) images in [0, 1] -> (N, K) logits.

    `module` is the bare timm network, and alone in what is saved; `mean` and `std` are per channel.
    `image_size` is the side of the images it is for, in pixels; `about` is what was recorded with
    its weights (recipe, threat model, data).
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        module: nn.Module,
        *,
        architecture: str,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        class_names: Sequence[str] | None = None,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self.architecture = architecture
        self.image_size = image_size
        self.num_classes: int = module.num_classes  # type: ignore[assignment]
        self.in_chans: int = module.in_chans  # type: ignore[assignment]
        self.class_names = None if class_names is None else tuple(class_names)
        self.about = dict(about or {})
        for name, values in (("mean", mean), ("std", std)):
            if len(values) != self.in_chans:
                raise ModelError(
                    f"expected {self.in_chans} values of {name} for {architecture}, got {values}"
                )
            self.register_buffer(name, torch.tensor(values).view(-1, 1, 1), persistent=False)

    @property
    def data(self) -> str | None:
        """The data set it was trained on, if that was recorded."""
        return self.about.get("data")

    def normalize(self, images: Tensor) -> Tensor:
        """Images in [0, 1] as the bare network wants them."""
        return (images - self.mean) / self.std

    def forward(self, images: Tensor) -> Tensor:
        """(N, K) logits of (N, C, H, W) images in [0, 1]."""
        return self.module(self.normalize(images))  # type: ignore[no-any-return]

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K) logits and the last feature map (N, D, h, w), both from one forward.

        Tokens come as the grid of patches they stand for, without class tokens.
        """
        maps = self.module.forward_features(self.normalize(images))  # type: ignore[operator]
        logits = self.module.forward_head(maps)  # type: ignore[operator]
        return logits, self._as_map(maps, images)

    def _as_map(self, maps: Tensor, images: Tensor) -> Tensor:
        if maps.dim() == 4:
            channels_last = getattr(self.module, "output_fmt", "NCHW") == "NHWC"
            return maps.permute(0, 3, 1, 2) if channels_last else maps
        tokens = maps[:, getattr(self.module, "num_prefix_tokens", 0) :]
        height, width = images.shape[-2:]
        cells = tokens.shape[1]
        rows = max(1, round((cells * height / width) ** 0.5))
        if rows * (cells // rows) != cells:
            rows = cells
        return tokens.transpose(1, 2).unflatten(2, (rows, cells // rows))


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
    return _classifier(
        _build(saved), saved.architecture, saved.cfg, mean=mean, std=std, about=saved.about
    )


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
    small = small_variant(architecture) if image_size <= SMALL_IMAGE else None
    architecture = small or architecture
    cfg = registry_cfg(architecture)
    cfg |= {
        "num_classes": num_classes,
        "input_size": (in_chans, image_size, image_size),
        "mean": tuple(mean or (0.5,) * in_chans),
        "std": tuple(std or (0.5,) * in_chans),
        "label_names": class_names and tuple(class_names),
    }
    module = _timm(architecture, cfg, {}, None)
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
    if saved == architecture_of(str(name)) == str(name):
        return create(
            str(name), num_classes=num_classes, in_chans=in_chans, image_size=image_size,
            mean=mean, std=std, class_names=class_names, data=data,
        )  # fmt: skip
    if isinstance(saved, str):
        saved = _pretrained(saved)
    module, architecture, cfg = _build(saved), saved.architecture, dict(saved.cfg)
    size_before = cfg["input_size"][1]
    small = small_variant(architecture) if image_size <= SMALL_IMAGE < size_before else None
    if small:
        log.warning(
            "%s is for %d-pixel images: taking %s, whose stem keeps the centre of the kernel",
            saved.origin, size_before, small,
        )  # fmt: skip
    channels_before = cfg["input_size"][0]
    if (
        small
        or in_chans != channels_before
        or _is_fixed(module, saved)
        and image_size != size_before
    ):
        module = _rebuilt(module, saved, small or architecture, in_chans, image_size)
    if in_chans != channels_before:
        log.warning("%s took %d channels, now %d", saved.origin, channels_before, in_chans)
        cfg |= {"mean": tuple(mean or (0.5,) * in_chans), "std": tuple(std or (0.5,) * in_chans)}
    if num_classes != module.num_classes:
        log.warning(
            "%s has %d classes, the data %d: its head is replaced by a new one",
            saved.origin, module.num_classes, num_classes,
        )  # fmt: skip
        module.reset_classifier(num_classes)  # type: ignore[operator]
    cfg |= {"input_size": (in_chans, image_size, image_size), "num_classes": num_classes}
    cfg["label_names"] = class_names and tuple(class_names)
    about = {"base": saved.origin} | ({"data": data} if data else {})
    return _classifier(module, small or architecture, cfg, about=about)


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


def wanted_image_size(name: str | Path, image_size: int | None = None) -> int | None:
    """The side, in pixels, that images of `image_size` pixels should get for the named network.

    Its own where the network is built for one size (ViT, Swin); otherwise that of the images, but
    at least what the network's poolings leave one pixel of. None where the images decide and their
    size is not given. Raises as `load`, except that pretrained weights are not fetched.
    """
    found = _find(str(name))
    if isinstance(found, Saved):
        architecture, args, cfg = found.architecture, found.model_args, found.cfg
    else:
        architecture, args, cfg = architecture_of(found), {}, registry_cfg(found)
    own_size: int = cfg["input_size"][1]
    if image_size and image_size <= SMALL_IMAGE and not isinstance(found, Saved):
        architecture = small_variant(architecture) or architecture
        cfg = cfg | {"input_size": (cfg["input_size"][0], image_size, image_size)}
    with torch.device("meta"):
        module = timm.create_model(architecture, **args)
    if get_model_input_config(module)["fixed_input_size"]:
        return own_size
    if image_size is None:
        return None
    return max(image_size, int(module.feature_info[-1]["reduction"]))


def describe(classifier: Classifier) -> dict[str, Any]:
    """What rebuilds the classifier around its weights: plain values, as saved in the header."""
    args = get_model_args(classifier.module)
    known = {"num_classes", "in_chans"}
    return {
        "architecture": classifier.architecture,
        "model_args": {key: value for key, value in args.items() if key not in known},
        "num_classes": classifier.num_classes,
        "in_chans": classifier.in_chans,
        "image_size": classifier.image_size,
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
        "class_names": classifier.class_names and list(classifier.class_names),
    }


def save(
    classifier: Classifier, folder: str | Path, about: Mapping[str, Any] | None = None
) -> None:
    """Write `model.safetensors` and `config.json` into `folder`, each whole or not at all.

    The weights file alone suffices for `load`; the folder loads with
    `timm.create_model("local-dir:folder", pretrained=True)`, after `import robustify.networks` where
    the architecture is one of those. `about` (plain values) is added to what is recorded.
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


def hub_config(classifier: Classifier) -> dict[str, Any]:
    """`config.json` in timm's Hub layout.

    Without `model_args.num_classes`, with which transformers cannot load a timm model.
    """
    module = classifier.module
    traits = get_model_input_config(module)
    size = (classifier.in_chans, classifier.image_size, classifier.image_size)
    cfg = registry_cfg(classifier.architecture) | {
        "input_size": size,
        "fixed_input_size": traits["fixed_input_size"],
        "first_conv": traits["first_conv"],
        "crop_pct": 1.0,
        "mean": classifier.mean.flatten().tolist(),
        "std": classifier.std.flatten().tolist(),
        "num_classes": classifier.num_classes,
        "pool_size": None,
    }
    for key in (
        "test_input_size",
        "test_crop_pct",
        "min_input_size",
        "label_names",
        "architecture",
    ):
        cfg.pop(key, None)
    config = {
        "architecture": classifier.architecture,
        "num_classes": classifier.num_classes,
        "num_features": module.num_features,
    }
    if classifier.class_names:
        config["label_names"] = list(classifier.class_names)
    args = {k: v for k, v in get_model_args(module).items() if k != "num_classes"}
    return config | {"model_args": args, "pretrained_cfg": cfg}


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
        name = timm.get_pretrained_cfg(architecture).tag
        name = f"{architecture}.{name}"
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
    cfg = registry_cfg(name)
    return Saved(name, architecture, module.state_dict(), cfg, {})


def _build(saved: Saved) -> nn.Module:
    """The network with its weights, all of them and no others."""
    return _timm(saved.architecture, saved.cfg, saved.model_args, saved)


def _rebuilt(
    module: nn.Module, saved: Saved, architecture: str, in_chans: int, image_size: int
) -> nn.Module:
    """The same weights in another variant, number of channels or image size, as timm fits them."""
    args: dict[str, Any] = {**saved.model_args, "in_chans": in_chans}
    if _is_fixed(module, saved):
        args["img_size"] = image_size
    cfg = {**registry_cfg(architecture), "num_classes": saved.cfg["num_classes"]}
    cfg["input_size"] = saved.cfg["input_size"]
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    return _timm(architecture, cfg, args, Saved(saved.origin, architecture, weights, cfg, args))


def _is_fixed(module: nn.Module, saved: Saved) -> bool:
    return bool(get_model_input_config(module)["fixed_input_size"])


def _timm(
    architecture: str, cfg: Mapping[str, Any], args: Mapping[str, Any], saved: Saved | None
) -> nn.Module:
    """`timm.create_model`; with `saved`, its weights as timm loads pretrained ones."""
    weights = {"state_dict": dict(saved.weights)} if saved else {}
    try:
        module: nn.Module = timm.create_model(
            architecture, pretrained=bool(saved), pretrained_cfg={**cfg, **weights}, **args
        )
    except Exception as error:  # timm raises RuntimeError, TypeError, KeyError, AssertionError, …
        origin = saved.origin if saved else architecture
        raise ModelError(
            f"{_misfit(architecture, cfg, args, saved) or error}".replace("\n", " ")
            if saved
            else f"could not build {origin}: {error}"
        ) from error
    module.pretrained_cfg.pop("state_dict", None)  # type: ignore[union-attr,operator]
    return module


def _misfit(
    architecture: str, cfg: Mapping[str, Any], args: Mapping[str, Any], saved: Saved
) -> str:
    expected = timm.create_model(architecture, pretrained_cfg=dict(cfg), **args).state_dict()
    found = differences(expected, saved.weights)
    return f"expected the weights of {architecture} in {saved.origin}, but they differ: {found}"


def _classifier(
    module: nn.Module,
    architecture: str,
    cfg: Mapping[str, Any],
    *,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
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
