"""Weights and what is recorded about them: safetensors files, timm's Hub folders, the Hub.

Nothing here runs code that came with a file: pickles are refused unread, `config.json` can only
name an architecture that is known already, with plain values as its arguments.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from timm.models import PretrainedCfg, resolve_pretrained_cfg, split_model_name_tag
from torch import Tensor

from robustify import remote, transformers_config
from robustify.architectures import published_names
from robustify.errors import ModelError, UsageError, suggest
from robustify.files import atomic_write
from robustify.networks import CIFAR_NETWORKS
from robustify.threat import ThreatModel

HEADER_KEY = "robustify"
WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
PROCESSOR_FILE = "preprocessor_config.json"  # of transformers: mean, std and size
PURIFIER_FILE, CLASSIFIER_FOLDER = "purifier.safetensors", "classifier"
_PICKLES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".tar", ".th", ".model"}
FILE_SUFFIXES = {".safetensors", *_PICKLES}
# Where timm would fetch or unpickle weights by itself; ours come from the folder's own file.
_ELSEWHERE = {"url", "file", "state_dict", "hf_hub_id", "hf_hub_filename", "source", "custom_load"}
_ALIGNED = 64  # bytes: a line of the processor's cache
_NOT_RECORDED = _ELSEWHERE | {"label_offset", "tag"}
_ARGS_OF_LOADING = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path",
                    "cache_dir", "features_only", "pruned", "scriptable", "exportable", "no_jit",
                    "pretrained_model_args", "device", "dtype"}  # fmt: skip


@dataclass(frozen=True)
class Saved:
    """A network at rest: what builds it (`architecture`, `model_args`, timm's `cfg` with classes,
    input size, mean and std), its `weights`, and `about`: recipe, threat model, data, …

    `assumed` says, for the log, what nobody recorded and had to be assumed.
    """

    origin: str
    architecture: str
    weights: dict[str, Tensor]
    cfg: dict[str, Any]
    model_args: dict[str, Any] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    assumed: str = ""


def registry_cfg(architecture: str) -> dict[str, Any]:
    """timm's configuration of an architecture, without where its pretrained weights lie; empty for
    one of transformers, whose own configuration says everything."""
    if architecture.startswith(transformers_config.PREFIX):
        return {}
    cfg = resolve_pretrained_cfg(architecture).to_dict(remove_source=True)
    return {key: value for key, value in cfg.items() if key not in _NOT_RECORDED}


def require_architecture(architecture: object, origin: str) -> str:
    """`architecture` if timm can build it; raises `ModelError` with a suggestion otherwise."""
    if isinstance(architecture, str):
        foreign = architecture.startswith(transformers_config.PREFIX)
        if foreign or timm.is_model(architecture):
            return architecture
    near = suggest(str(architecture), timm.list_models())
    raise ModelError(
        f"expected {origin} to name an architecture that timm {timm.__version__} or robustify can "
        f"build, got {architecture!r}{near}"
    )


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a file, floating ones as float32, and its header's metadata.

    Raises `ModelError` for a missing, damaged or foreign file and for weights that are not finite.
    """
    if not path.is_file():
        raise ModelError(f"expected a file of weights, but {path} does not exist")
    _refuse_pickle(path)
    try:
        with safe_open(path, framework="pt") as file:
            header = dict(file.metadata() or {})
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ModelError(
            f"expected a whole safetensors file, but {path} is damaged or cut short ({error}); "
            "copy or download it again"
        ) from error
    for name, tensor in weights.items():
        if tensor.is_floating_point():
            weights[name] = tensor.float()
            if not torch.isfinite(tensor).all():
                raise ModelError(
                    f"expected finite weights, but {name!r} in {path} holds NaN or infinity; "
                    "use an earlier checkpoint"
                )
    return weights, header


def write_safetensors(path: Path, state: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a state dict, floating tensors as float32, whole or not at all; the same state gives
    the same bytes. Raises `ModelError` for weights that are not finite, and `RunFolderError`."""
    plain = {name: _plain(name, tensor) for name, tensor in state.items()}
    atomic_write(path, _same_bytes(serialize(plain, dict(header))))


def _same_bytes(content: bytes) -> bytes:
    """A safetensors file in one order, with its tensors on multiples of 64 bytes where they can be.

    safetensors writes metadata in a random order, and tensors wherever the one before ends.
    transformers computes with the file mapped into memory, where a matrix product of weights that
    are not so aligned rounds otherwise than after copying: logits would not be equal to the bit.
    A header is 8 bytes of length, then JSON that may be filled up with spaces.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    described = json.loads(content[8:end])
    header = {"__metadata__": dict(sorted(described.pop("__metadata__").items()))}
    parts, at = [], 0
    for name, entry in sorted(described.items(), key=_whole_lines_first):
        start, stop = entry["data_offsets"]
        header[name] = {**entry, "data_offsets": [at, at + stop - start]}
        parts.append(content[end + start : end + stop])
        at += stop - start
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % _ALIGNED)
    return len(text).to_bytes(8, "little") + text + b"".join(parts)


def _whole_lines_first(item: tuple[str, dict[str, Any]]) -> tuple[bool, str]:
    name, entry = item
    start, stop = entry["data_offsets"]
    return (stop - start) % _ALIGNED != 0, name


def _plain(name: str, tensor: Tensor) -> Tensor:
    """On the CPU, contiguous, float32, sharing memory with nothing."""
    if not tensor.is_floating_point():
        return tensor.detach().cpu().contiguous().clone()
    if not torch.isfinite(tensor).all():
        raise ModelError(f"expected finite weights to save, but {name!r} holds NaN or infinity")
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def _refuse_pickle(path: Path) -> None:
    with open(path, "rb") as file:
        start = file.read(4)
    zipped, pickled = start.startswith(b"PK\x03\x04"), start[:1] == b"\x80" and start[1:2] < b"\x06"
    if zipped or pickled or path.suffix in _PICKLES:
        target = path.with_suffix(".safetensors").name
        raise ModelError(
            f"expected safetensors, got a pickle: {path}; reading one can run code, so it was not "
            'opened; if it is a state dict, convert it with python -c "import torch, '
            f"safetensors.torch as s; s.save_file(torch.load('{path.name}', weights_only=True), "
            f"'{target}')\""
        )


def read_file(path: Path, architecture: str | None = None) -> Saved:
    """One safetensors file: what its header says, or `architecture`, or what its tensors' names and
    shapes allow only one network to be. Raises `ModelError`."""
    weights, header = read_safetensors(path)
    if HEADER_KEY in header and architecture is None:
        recorded = _parse(header[HEADER_KEY], path)
        model = recorded.get("model")
        if not isinstance(model, dict):
            raise ModelError(f"expected {path} to describe its model in its header, got {recorded}")
        about = _about(recorded, str(path))
        return _sound(_described(str(path), model, weights, about))
    weights = published_names(weights)
    if architecture is None:
        architecture = recognize(weights)
    if architecture is None:
        raise ModelError(
            f"expected {path} to say which network its {len(weights)} tensors are for, but its "
            "header has no robustify metadata and the names fit no network known for them; name "
            f"the architecture before it, as in resnet18:{path}"
        )
    cfg = registry_cfg(require_architecture(architecture, str(path)))
    cfg |= _shape_of(weights, cfg, str(path))
    mean, std = (" ".join(f"{value:.4g}" for value in cfg[key]) for key in ("mean", "std"))
    assumed = (
        f"{path} records no normalization: taking that of {architecture}, mean {mean}, std {std}"
    )
    return Saved(str(path), architecture, weights, cfg, assumed=assumed)


def recognize(weights: Mapping[str, Tensor]) -> str | None:
    """The one of this field's own networks whose tensors have these names and shapes."""
    shapes = {name: tensor.shape for name, tensor in weights.items()}
    for architecture in CIFAR_NETWORKS:
        try:
            size = _shape_of(weights, registry_cfg(architecture), "")
        except ModelError:
            continue
        with torch.device("meta"):
            model = timm.create_model(
                architecture, num_classes=size["num_classes"], in_chans=size["input_size"][0]
            )
        if {name: tensor.shape for name, tensor in model.state_dict().items()} == shapes:
            return architecture
    return None


def _shape_of(weights: Mapping[str, Tensor], cfg: dict[str, Any], origin: str) -> dict[str, Any]:
    """Classes and input size that the head and the first convolution show."""
    head, stem = f"{_first(cfg['classifier'])}.weight", f"{_first(cfg['first_conv'])}.weight"
    for name in (head, stem):
        if name not in weights or weights[name].dim() < 2:
            raise ModelError(f"expected a tensor {name!r} in {origin}, got {_some(weights)}")
    in_chans = weights[stem].shape[1]
    return {
        "num_classes": weights[head].shape[0],
        "input_size": (in_chans, *cfg["input_size"][1:]),
        "mean": tuple(cfg["mean"]) if in_chans == len(cfg["mean"]) else (0.5,) * in_chans,
        "std": tuple(cfg["std"]) if in_chans == len(cfg["std"]) else (0.5,) * in_chans,
    }


def _described(
    origin: str, model: dict[str, Any], weights: dict[str, Tensor], about: dict[str, Any]
) -> Saved:
    """From the description that `robustify.models.save` puts into a header."""
    architecture = require_architecture(model.get("architecture"), origin)
    cfg = registry_cfg(architecture)
    try:
        size = int(model["image_size"])
        cfg |= {
            "num_classes": int(model["num_classes"]),
            "input_size": (int(model["in_chans"]), size, size),
            "mean": tuple(map(float, model["mean"])),
            "std": tuple(map(float, model["std"])),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"expected {origin} to describe its model, but {error} is wrong") from None
    if names := model.get("class_names"):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ModelError(f"expected class_names in {origin} to be a list of names")
        cfg["label_names"] = tuple(names)
    return Saved(origin, architecture, weights, cfg, _plain_args(model, origin), about)


def read_folder(folder: Path, origin: str | None = None) -> Saved:
    """A folder as timm or transformers leaves it: `config.json` and `model.safetensors` (or shards
    with an index), and what their image processor says. Raises `ModelError`."""
    origin = origin or str(folder)
    if not folder.is_dir():
        raise ModelError(f"expected a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, got {origin}")
    config_file = folder / CONFIG_FILE
    if not config_file.is_file():
        raise ModelError(f"expected {CONFIG_FILE} beside the weights, but {origin} has none")
    config = _parse(config_file.read_text(errors="replace"), config_file)
    weights, header = _read_weights(folder)
    recorded = _parse(header.get(HEADER_KEY, "{}"), folder / WEIGHTS_FILE)
    about, model = _about(recorded, origin), recorded.get("model") or {}
    if not isinstance(model, dict):
        raise ModelError(f"expected {origin} to describe its model in its header, got {model!r}")
    foreign = "architecture" not in config and "model_type" in config
    named = f"{transformers_config.PREFIX}{config['model_type']}" if foreign else None
    architecture = require_architecture(named or config.get("architecture"), str(config_file))
    if model and model.get("architecture") != architecture:
        raise ModelError(
            f"expected {config_file} and the weights beside it to agree, got architecture "
            f"{architecture!r} and {model.get('architecture')!r}"
        )
    if foreign:
        bare = Saved(origin, architecture, weights, {}, about=about)
        return _sound(_of_transformers(bare, config, folder))
    args = _plain_args(config, str(config_file))
    cfg = registry_cfg(architecture) | _recorded_cfg(config, args, str(config_file))
    return _sound(Saved(origin, architecture, weights, cfg, args, about))


def _about(recorded: dict[str, Any], origin: str) -> dict[str, Any]:
    """What a header says of how its weights came about. Raises `ModelError` for what does not have
    the form that `robustify.models.save` writes."""
    about = recorded.get("about") or {}
    if not isinstance(about, dict):
        raise ModelError(f"expected `about` in {origin} to be a mapping, got {about!r}")
    forms = {"threat_model": dict, "record": dict, "data": str, "recipe": str, "base": str,
             "replaced": list, "transferred": dict}  # fmt: skip
    for key, form in forms.items():
        if about.get(key) is not None and not isinstance(about[key], form):
            raise ModelError(
                f"expected {key} in {origin} to be a {form.__name__}, got {about[key]!r}"
            )
    if threat := about.get("threat_model"):
        try:
            ThreatModel(**threat)
        except (TypeError, UsageError):
            raise ModelError(
                f"expected threat_model in {origin} to be a norm and an eps, got {threat!r}"
            ) from None
    return about


def _sound(saved: Saved) -> Saved:
    """`saved` if its normalization can be computed; raises `ModelError` otherwise."""
    mean, std = (saved.cfg.get(key) or () for key in ("mean", "std"))
    if not all(map(math.isfinite, (*mean, *std))) or not all(value > 0 for value in std):
        raise ModelError(
            f"expected finite mean and positive std in {saved.origin}, got {mean} and {std}"
        )
    return saved


def _of_transformers(saved: Saved, config: dict[str, Any], folder: Path) -> Saved:
    """The same with what `config.json` and the image processor beside it say."""
    transformers_config.require_plain(config, str(folder / CONFIG_FILE))
    file = folder / PROCESSOR_FILE
    processor = _parse(file.read_text(errors="replace"), file) if file.is_file() else {}
    cfg, assumed = transformers_config.described(config, processor, saved.origin)
    args = {"config": config, "processor": processor}
    return replace(saved, cfg=cfg, model_args=args, assumed=assumed)


def _recorded_cfg(config: dict[str, Any], args: dict[str, Any], origin: str) -> dict[str, Any]:
    """timm's `pretrained_cfg`, in its present and in its older one-level form."""
    recorded = config.get("pretrained_cfg", config)
    if not isinstance(recorded, dict):
        raise ModelError(f"expected pretrained_cfg in {origin} to be a mapping, got {recorded!r}")
    for key in ("file", "hf_hub_filename"):
        if recorded.get(key) and Path(str(recorded[key])).name != recorded[key]:
            raise ModelError(
                f"expected weights inside the folder, but {key} in {origin} is {recorded[key]!r}"
            )
    known = {f.name for f in fields(PretrainedCfg)} - _NOT_RECORDED - {"architecture"}
    cfg = {key: value for key, value in recorded.items() if key in known and value is not None}
    if "num_classes" in config:
        cfg["num_classes"] = config["num_classes"]
    cfg["label_names"] = _label_names(
        config.get("label_names") or recorded.get("label_names") or recorded.get("labels")
    )
    try:
        channels, *size = map(int, cfg.get("input_size", (3, 224, 224)))
        channels = int(args.get("in_chans", channels))
        cfg |= {key: tuple(map(float, cfg[key])) for key in ("mean", "std") if key in cfg}
        cfg["input_size"] = (channels, *size)
        cfg["num_classes"] = int(cfg.get("num_classes", 1000))
    except (TypeError, ValueError):
        raise ModelError(f"expected numbers for input_size, mean and std in {origin}") from None
    return cfg


def _label_names(recorded: object) -> tuple[str, ...] | None:
    """Class names in the order of the logits; None where the numbering has gaps."""
    if isinstance(recorded, dict):
        numbered = {str(key): value for key, value in recorded.items()}
        recorded = [numbered.get(str(i)) for i in range(len(numbered))]
    if not isinstance(recorded, list | tuple) or not all(isinstance(n, str) for n in recorded):
        return None
    return tuple(recorded)


def _plain_args(config: dict[str, Any], origin: str) -> dict[str, Any]:
    """`model_args` without the head's size, which the recorded classes give."""
    args = config.get("model_args") or {}
    if not isinstance(args, dict) or (forbidden := _ARGS_OF_LOADING & args.keys()):
        what = f"may not set {', '.join(sorted(forbidden))}" if isinstance(args, dict) else "is odd"
        raise ModelError(f"expected model_args that build a network; in {origin} it {what}")
    return {key: value for key, value in args.items() if key != "num_classes"}


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    index_file = folder / f"{WEIGHTS_FILE}.index.json"
    if (folder / WEIGHTS_FILE).exists() or not index_file.is_file():
        if not (folder / WEIGHTS_FILE).exists():
            for pickle in sorted(p for p in folder.iterdir() if p.suffix in _PICKLES):
                _refuse_pickle(pickle)
        return read_safetensors(folder / WEIGHTS_FILE)
    weight_map = _parse(index_file.read_text(errors="replace"), index_file).get("weight_map")
    weights: dict[str, Tensor] = {}
    for shard in sorted(shard_names(weight_map, index_file)):
        weights |= read_safetensors(folder / shard)[0]
    return weights, {}


def shard_names(weight_map: object, origin: Path) -> set[str]:
    """The file names in a model index; raises `ModelError` for one that leaves the folder."""
    if not isinstance(weight_map, dict):
        raise ModelError(f"expected a weight_map in {origin}, got {weight_map!r}")
    names = set(map(str, weight_map.values()))
    for name in names:
        if not re.fullmatch(r"[\w.-]+\.safetensors", name) or name.startswith("."):
            raise ModelError(f"expected weights inside the folder, but {origin} names {name!r}")
    return names


def fetch(name: str) -> Path:
    """The local snapshot of `hf-hub:user/repo[@revision]`: its configuration and safetensors only.

    Of a purified model the purifier and its classifier. Honors HF_TOKEN, HF_HOME and
    HF_HUB_OFFLINE. Raises `HubError`.
    """
    repository = remote.find(name)
    purifier = repository.file(PURIFIER_FILE)
    if purifier is not None:
        _fetch_network(repository, f"{CLASSIFIER_FOLDER}/")
        return purifier.parent
    return _fetch_network(repository, "").parent


def _fetch_network(repository: remote.Repository, folder: str) -> Path:
    """The configuration of a network in `folder` of the repository, with its weights beside it."""
    config = repository.file(folder + CONFIG_FILE)
    if config is None:
        raise repository.lacks(folder + CONFIG_FILE)
    repository.file(folder + PROCESSOR_FILE)
    if repository.file(folder + WEIGHTS_FILE) is None:
        index = repository.file(f"{folder}{WEIGHTS_FILE}.index.json")
        if index is None:
            raise repository.lacks(
                f"{folder}{WEIGHTS_FILE}, and a pickle is not opened: ask its author for "
                "safetensors, or convert it at https://huggingface.co/spaces/safetensors/convert"
            )
        weight_map = _parse(index.read_text(errors="replace"), index).get("weight_map")
        for shard in sorted(shard_names(weight_map, index)):
            if repository.file(folder + shard) is None:
                raise repository.lacks(folder + shard)
    return config


def differences(expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> str:
    """What keeps weights from fitting a network, in words; empty where they fit."""
    found = []
    if missing := expected.keys() - got.keys():
        found.append(f"missing {_some(missing)}")
    if extra := got.keys() - expected.keys():
        found.append(f"extra {_some(extra)}")
    for name in expected.keys() & got.keys():
        if expected[name].shape != got[name].shape:
            found.append(f"{name} {tuple(got[name].shape)}, not {tuple(expected[name].shape)}")
            break
    return "; ".join(found)


def architecture_of(name: str) -> str:
    """`resnet18` of `resnet18.a1_in1k`."""
    return str(split_model_name_tag(name)[0])


def _parse(text: str, origin: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except ValueError as error:
        raise ModelError(f"expected JSON in {origin}, but it is damaged ({error})") from error
    if not isinstance(parsed, dict):
        raise ModelError(f"expected a JSON mapping in {origin}, got {type(parsed).__name__}")
    return parsed


def _first(names: Any) -> Any:
    return names[0] if isinstance(names, tuple | list) else names


def _some(names: Any) -> str:
    ordered = sorted(names)
    more = f" and {len(ordered) - 3} more" if len(ordered) > 3 else ""
    return ", ".join(map(repr, ordered[:3])) + more
