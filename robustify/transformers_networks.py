"""Classifiers of the transformers library inside a `Classifier`: images in, logits out.

`transformers` is an extra, imported where it is needed. Only what that library itself defines is
built, from plain values, and its weights are read by `robustify.weights`, never by the library.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from timm.models import adapt_input_conv
from torch import Tensor, nn

from robustify.classifier import Classifier, decimals
from robustify.errors import ModelError, suggest
from robustify.transformers_config import PREFIX, written
from robustify.weights import CONFIG_FILE, PROCESSOR_FILE, WEIGHTS_FILE, Saved, read_safetensors

_OF_LABELS = {"id2label", "label2id", "num_labels"}  # said by the class names already


class TransformersNetwork(nn.Module):
    """What a `Classifier` expects of a bare network, around a classifier of transformers.

    `model` answers normalized images (N, C, H, W) with logits (N, K), unwrapped here.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.in_chans: int = model.config.num_channels
        self.num_classes: int = model.config.num_labels

    def forward(self, images: Tensor) -> Tensor:
        return self.model(pixel_values=images).logits  # type: ignore[no-any-return]

    def get_classifier(self) -> nn.Module:
        """The linear layer that gives the logits. Raises `ModelError` where there is no such."""
        return self.model.get_submodule(self._head())  # type: ignore[no-any-return]

    def reset_classifier(self, num_classes: int) -> None:
        """Replace that layer by a new one for so many classes, without names."""
        above, _, name = self._head().rpartition(".")
        old: Any = self.get_classifier()
        new = nn.Linear(old.in_features, num_classes, old.bias is not None)
        nn.init.trunc_normal_(new.weight, std=0.02)  # as ViT, Swin and ConvNeXt start
        nn.init.zeros_(new.bias)
        self.model.get_submodule(above).register_module(name, new.to(old.weight.device))
        self.model.config.num_labels = self.model.num_labels = self.num_classes = num_classes

    def _head(self) -> str:
        names = [str(name) for name, module in self.model.named_modules()
                 if isinstance(module, nn.Linear)]  # fmt: skip
        found = [name for name in names if name.split(".")[0] == "classifier"]
        if len(found) != 1:
            raise ModelError(
                f"expected one linear layer that gives the logits of {type(self.model).__name__}, "
                f"found {len(found)}; choose a network with a plain head"
            )
        return found[0]

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """As timm's networks have it."""
        if enable:
            self.model.gradient_checkpointing_enable()
        else:
            self.model.gradient_checkpointing_disable()

    @torch.no_grad()
    def takes(self, image_size: int) -> bool:
        """Whether it answers images of that side."""
        device = next(self.parameters()).device
        try:
            self(torch.zeros(1, self.in_chans, image_size, image_size, device=device))
        except (ValueError, RuntimeError):
            return False
        return True


class TransformersClassifier(Classifier):
    """A transformers network with the normalization of its image processor.

    `processor` is what its `preprocessor_config.json` said.
    """

    def __init__(
        self, module: TransformersNetwork, *, processor: Mapping[str, Any], **described: Any
    ) -> None:
        super().__init__(module, **described)
        self.processor = dict(processor)

    @property
    def network(self) -> Any:
        """The model of transformers itself."""
        return self.module.model

    @property
    def model_args(self) -> dict[str, Any]:
        """What builds the network again: its configuration and image processor."""
        config = json.loads(self.network.config.to_json_string())
        config["architectures"] = [type(self.network).__name__]
        plain = {key: value for key, value in config.items() if key not in _OF_LABELS}
        processor = written(self.processor, image_size=self.image_size,
                            mean=decimals(self.mean), std=decimals(self.std))  # fmt: skip
        return {"config": plain, "processor": processor}

    def features(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """(N, K) logits and the last hidden state as a map (N, D, h, w), from one forward."""
        out = self.network(pixel_values=self.normalize(images), output_hidden_states=True)
        maps = out.hidden_states[-1]
        if maps.dim() == 3:  # tokens: a square grid of patches, after class tokens if any
            side = int(maps.shape[1] ** 0.5)
            maps = maps[:, maps.shape[1] - side * side :].mT.reshape(len(maps), -1, side, side)
        return out.logits, maps


def is_transformers(architecture: str) -> bool:
    """Whether an architecture is `transformers:KIND`."""
    return architecture.startswith(PREFIX)


def build(
    architecture: str,
    cfg: Mapping[str, Any],
    args: Mapping[str, Any],
    saved: Saved | None = None,
) -> TransformersNetwork:
    """The network that `args["config"]` describes, for the classes and channels of `cfg`; with
    `saved`, its weights, all of which must fit. Raises `ModelError`."""
    origin = saved.origin if saved else architecture
    described = {**args["config"], "num_channels": cfg["input_size"][0], **_labels(cfg)}
    network_class, config_class = _known(architecture.removeprefix(PREFIX), described)
    try:
        config = config_class.from_dict(described)
        if saved is None:
            model, wrong = network_class(config), ""
        else:
            model, wrong = _with_weights(network_class, config, saved.weights)
    except Exception as error:  # transformers raises whatever a wrong value leads to
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(
            f"expected transformers to build {origin}, but: {reason}; check its config.json"
        ) from error
    if wrong:
        raise ModelError(
            f"expected the weights of {network_class.__name__} in {origin}, but they differ: "
            f"{wrong}"
        )
    return TransformersNetwork(model.float()).eval()


def refit(saved: Saved, in_chans: int) -> TransformersNetwork:
    """The saved network for images with another number of channels: the first convolution is
    fitted by timm's rule, everything else stays."""
    module = build(saved.architecture, saved.cfg, saved.model_args, saved)
    if in_chans == module.in_chans:
        return module
    cfg = {**saved.cfg, "input_size": (in_chans, *saved.cfg["input_size"][1:])}
    fitted = build(saved.architecture, cfg, saved.model_args)
    own, weights = fitted.state_dict(), module.state_dict()
    for name, tensor in weights.items():
        if tensor.shape != own[name].shape:
            weights[name] = adapt_input_conv(in_chans, tensor)
    fitted.load_state_dict(weights)
    return fitted


def written_files(classifier: TransformersClassifier) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What `save_pretrained` leaves: tensors by name, and the JSON files by name.

    The configuration holds the class names, the image processor mean, std and size.
    """
    network = classifier.network
    for key, value in _labels({"num_classes": classifier.num_classes,
                               "label_names": classifier.class_names}).items():  # fmt: skip
        setattr(network.config, key, value)
    with tempfile.TemporaryDirectory() as folder:
        _quiet()
        network.save_pretrained(folder, max_shard_size="1TB")
        tensors, _ = read_safetensors(Path(folder) / WEIGHTS_FILE)
        config = (Path(folder) / CONFIG_FILE).read_text(encoding="utf-8")
    processor = json.dumps(classifier.model_args["processor"], indent=2)
    return tensors, {CONFIG_FILE: config, PROCESSOR_FILE: processor + "\n"}


def _known(kind: str, config: Mapping[str, Any]) -> tuple[Any, Any]:
    """The class of image classifiers of this kind, and that of their configuration."""
    try:
        from transformers import CONFIG_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING
        from transformers.models.auto.modeling_auto import (
            MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KINDS,
        )
    except ImportError:
        raise ModelError(
            f"expected the extra `transformers` for a {kind!r} network; install it with: pip "
            "install 'robustify-classifiers[transformers]'"
        ) from None
    if kind not in KINDS or kind not in CONFIG_MAPPING:
        raise ModelError(
            f"expected an image classifier that transformers knows, got {kind!r}"
            f"{suggest(kind, KINDS)}"
        )
    found = MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING[CONFIG_MAPPING[kind]]
    classes = found if isinstance(found, tuple | list) else (found,)
    named = config.get("architectures") or ()
    return next((c for c in classes if c.__name__ in named), classes[0]), CONFIG_MAPPING[kind]


def _labels(cfg: Mapping[str, Any]) -> dict[str, Any]:
    names = cfg.get("label_names") or [f"LABEL_{i}" for i in range(cfg["num_classes"])]
    return {"id2label": dict(enumerate(names)), "label2id": {n: i for i, n in enumerate(names)}}


def _with_weights(
    network_class: Any, config: Any, weights: Mapping[str, Tensor]
) -> tuple[Any, str]:
    """The network with these tensors, named as transformers does in files, and what does not fit,
    in words."""
    verbosity = _quiet()
    try:
        model, info = network_class.from_pretrained(
            None, config=config, state_dict=dict(weights), dtype=torch.float32,
            output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False,
        )  # fmt: skip
    finally:
        _quiet(verbosity)
    found = [f"{word} {', '.join(map(repr, sorted(info[key])[:3]))}"
             for word, key in (("missing", "missing_keys"), ("extra", "unexpected_keys"))
             if info[key]]  # fmt: skip
    found += [f"{name} {tuple(got)}, not {tuple(expected)}"
              for name, got, expected in sorted(info["mismatched_keys"])[:1]]  # fmt: skip
    return model.eval(), "; ".join(found)


def _quiet(verbosity: int | None = None) -> int:
    """Keep transformers from printing what is said here in one line; returns what it was set to."""
    from transformers.utils import logging as transformers_log

    before: int = transformers_log.get_verbosity()
    transformers_log.set_verbosity(transformers_log.ERROR if verbosity is None else verbosity)
    transformers_log.disable_progress_bar()
    return before
