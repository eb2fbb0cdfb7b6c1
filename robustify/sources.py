"""Where data sets come from: class folders, parquet clones, the Hub, torchvision.

Each reader lists images and labels and decodes nothing that it does not have to.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from robustify import remote
from robustify.errors import DataError
from robustify.images import Encoded

CIFAR = ("cifar10", "cifar100")
_EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
_TRAIN = ("train", "training")
_TEST = ("test", "testing", "val", "valid", "validation")
_LAYOUT = (
    "train/ and test/ (or val/) with one folder per class, or parquet files train-* and test-*"
)

Part = tuple[Tensor | list[Encoded], Tensor]


@dataclass(frozen=True)
class Source:
    """A data set as read: per split its images, as a uint8 tensor (N, C, H, W) or still encoded,
    and its labels, (N,) int64."""

    name: str
    class_names: tuple[str, ...]
    train: Part
    test: Part


def read_folder(path: Path) -> Source:
    """Class folders, a clone of a Hub data set, or anything that `datasets` can read."""
    train, test = (_subfolder(path, names) for names in (_TRAIN, _TEST))
    if train and test and any(child.is_dir() for child in train.iterdir()):
        return _read_class_folders(path.resolve().name, train, test)
    if any(path.rglob("*.parquet")):
        return _read_parquet(path, path.resolve().name)
    present = sorted(child.name for child in path.iterdir() if not child.name.startswith("."))
    shown = ", ".join(present[:6]) + (", …" if len(present) > 6 else "")
    raise DataError(f"expected in {path} {_LAYOUT}; it holds {shown or 'nothing'}")


def read_hub(identifier: str) -> Source:
    """A data set `user/name[@revision]` on the Hub, by `datasets`, or, where that is not installed,
    by its parquet files."""
    repo, _, revision = identifier.partition("@")
    found_on_hub = None if Path(repo).exists() else remote.find(identifier, "dataset")
    try:
        import datasets
    except ImportError:
        return _read_parquet(_download(repo, revision or None, found_on_hub), repo)
    silence = found_on_hub and found_on_hub.silence
    cached = Path(datasets.config.HF_DATASETS_CACHE) / repo.replace("/", "___")
    if silence and not cached.exists():  # `datasets` itself would try for half a minute
        raise _unreachable(repo, silence)
    try:
        found = datasets.load_dataset(repo, revision=revision or None)
    except Exception as error:  # of several libraries: network, repository, configuration, format
        raise _unreachable(repo, error) from error
    return _read_datasets(found, repo)


def read_cifar(name: str) -> Source:
    """CIFAR-10 or CIFAR-100 by torchvision, from `$ROBUSTIFY_DATA` or the user's cache folder;
    downloaded where that is possible and `HF_HUB_OFFLINE` does not forbid it."""
    from torchvision import datasets

    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("ROBUSTIFY_DATA") or cache / "robustify")
    read = datasets.CIFAR10 if name == "cifar10" else datasets.CIFAR100
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    try:
        with warnings.catch_warnings():
            # The official files are pickles of an old NumPy, about which a new one warns.
            warnings.simplefilter("ignore")
            train, test = (read(root, train=part, download=not offline) for part in (True, False))
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"expected {name} in {root}, and it could not be downloaded "
            f"({_first_line(error)}); put torchvision's {name} files there, set ROBUSTIFY_DATA "
            "to the folder that has them, or name a clone of the Hub data set with --data"
        ) from error
    parts = [
        (torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(part.targets))
        for part in (train, test)
    ]
    return Source(name, tuple(train.classes), parts[0], parts[1])


def _subfolder(path: Path, names: Sequence[str]) -> Path | None:
    return next((path / name for name in names if (path / name).is_dir()), None)


def _read_class_folders(name: str, train: Path, test: Path) -> Source:
    """As torchvision's ImageFolder numbers them: classes by sorted folder name."""
    class_names, in_test = _class_folders(train), _class_folders(test)
    if class_names != in_test:
        missing = sorted(set(class_names) ^ set(in_test))
        raise DataError(
            f"expected the same class folders in {train} and {test}, and only one of them has "
            f"{', '.join(missing[:5])}{', …' if len(missing) > 5 else ''}; add or remove them"
        )
    parts = []
    for folder in (train, test):
        images: list[Encoded] = []
        labels: list[int] = []
        for label, class_name in enumerate(class_names):
            files = _image_files(folder / class_name)
            if not files:
                raise DataError(
                    f"expected images in {folder / class_name}, found none "
                    f"({', '.join(sorted(_EXTENSIONS))}); add some or remove the folder"
                )
            images += [Encoded(str(file), file) for file in files]
            labels += [label] * len(files)
        parts.append((images, torch.tensor(labels)))
    return Source(name, tuple(class_names), parts[0], parts[1])


def _class_folders(folder: Path) -> list[str]:
    return sorted(
        child.name for child in folder.iterdir() if child.is_dir() and child.name[0] != "."
    )


def _image_files(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in _EXTENSIONS and file.name[0] != "." and file.is_file()
    )


def _read_parquet(path: Path, name: str) -> Source:
    """The parquet files of a Hub data set: `train-*`, `test-*` in one folder. Read without the
    `datasets` package, which would first write a second copy of them into its cache."""
    try:
        from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise DataError(
            f"expected the extra `hub` (pyarrow or datasets) to read the parquet files in {path}; "
            "install it with: pip install 'robustify-classifiers[hub]'"
        ) from None
    parts: list[Part] = []
    class_names: tuple[str, ...] = ()
    for names in (_TRAIN, _TEST):
        files = _parquet_files(path, names)
        schema = parquet.read_schema(files[0])
        stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
        features = stored.get("info", {}).get("features") or _plain_features(schema)
        image_column, label_column = _columns(features, path)
        images: list[Encoded] = []
        labels: list[int] = []
        for file in files:
            table = _read_table(parquet, file, [image_column, label_column])
            images += _encoded(table[image_column].to_pylist(), file)
            labels += [-1 if x is None else x for x in table[label_column].to_pylist()]
        parts.append((images, torch.tensor(labels, dtype=torch.int64)))
        class_names = class_names or _class_names(features[label_column], labels)
    return Source(name, class_names, parts[0], parts[1])


def _parquet_files(path: Path, names: Sequence[str]) -> list[Path]:
    """The shards of the first split of `names` that there is, in order."""
    for name in names:
        pattern = re.compile(rf"{name}(-.*)?\.parquet")
        files = sorted(file for file in path.rglob("*.parquet") if pattern.fullmatch(file.name))
        folders = sorted({str(file.parent) for file in files})
        if len(folders) > 1:
            raise DataError(
                f"expected one configuration of the data set in {path}, found {len(folders)} "
                f"({', '.join(folders[:3])}); name the folder of one"
            )
        if files:
            return files
    raise DataError(f"expected in {path} {_LAYOUT}; found no parquet file {' or '.join(names)}-*")


def _read_table(parquet: Any, file: Path, columns: list[str]) -> Any:
    try:
        return parquet.read_table(file, columns=columns)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors derive from these
        raise DataError(
            f"expected a readable parquet file in {file} ({_first_line(error)}); fetch it again"
        ) from error


def _encoded(values: list[Any], file: Path) -> list[Encoded]:
    """Images as the Hub stores them: bytes, or the path of a file beside the parquet file."""
    images = []
    for row, value in enumerate(values):
        content, original = (value or {}).get("bytes"), (value or {}).get("path") or ""
        name = f"{file}, row {row}" + (f" ({original})" if original else "")
        images.append(Encoded(name, _beside(file, original) if content is None else content))
    return images


def _beside(file: Path, original: str) -> Path:
    """A path that a parquet file names, which must not lead out of the file's folder."""
    path = (file.parent / original).resolve()
    if not original or not path.is_relative_to(file.parent.resolve()):
        raise DataError(
            f"expected images inside {file.parent}, but {file} names {original!r}; the data set is "
            "damaged or not to be trusted"
        )
    return path


def _read_datasets(found: Any, name: str) -> Source:
    """A `datasets.DatasetDict`, its images left encoded."""
    import datasets

    parts: list[Part] = []
    class_names: tuple[str, ...] = ()
    for names in (_TRAIN, _TEST):
        split = next((found[split] for split in names if split in found), None)
        if split is None:
            raise DataError(
                f"expected a split {' or '.join(names)} in {name}, got {', '.join(found)}; "
                "save the data set as folders or parquet files with both splits"
            )
        features = {
            column: {"_type": type(feature).__name__, "names": getattr(feature, "names", None)}
            for column, feature in split.features.items()
        }
        image_column, label_column = _columns(features, name)
        split = split.cast_column(image_column, datasets.Image(decode=False))
        labels = [-1 if label is None else label for label in split[label_column]]
        images = _encoded(list(split[image_column]), Path(name))
        parts.append((images, torch.tensor(labels, dtype=torch.int64)))
        class_names = class_names or _class_names(features[label_column], labels)
    return Source(name, class_names, parts[0], parts[1])


def _columns(features: dict[str, Any], where: Path | str) -> tuple[str, str]:
    """The image column and the label column, by their feature types."""
    return (
        _column(features, "Image", ("image", "img"), where),
        _column(features, "ClassLabel", ("label", "labels", "fine_label"), where),
    )


def _column(
    features: dict[str, Any], kind: str, preferred: Sequence[str], where: Path | str
) -> str:
    found = [column for column, feature in features.items() if feature.get("_type") == kind]
    chosen = next((column for column in preferred if column in found), None)
    if chosen is None and len(found) == 1:
        chosen = found[0]
    if chosen is None:
        got = ", ".join(found or features)
        raise DataError(
            f"expected one column of type {kind} in {where}, got {got}; "
            f"keep one, or call the right one {preferred[0]!r}"
        )
    return chosen


def _plain_features(schema: Any) -> dict[str, Any]:
    """Feature types by storage type, for parquet files that do not carry the Hub's schema."""
    kinds = {}
    for field in schema:
        stored = str(field.type)
        if stored.startswith("struct<bytes: binary"):
            kinds[field.name] = {"_type": "Image"}
        elif stored.startswith("int") and "label" in field.name:
            kinds[field.name] = {"_type": "ClassLabel"}
        else:
            kinds[field.name] = {"_type": stored}
    return kinds


def _class_names(feature: dict[str, Any], labels: Sequence[int]) -> tuple[str, ...]:
    return tuple(feature.get("names") or map(str, range(max(labels, default=-1) + 1)))


def _download(repo: str, revision: str | None, found: remote.Repository | None) -> Path:
    """The parquet files of a Hub data set, in the Hub's cache."""
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                repo_type="dataset",
                revision=revision,
                allow_patterns="*.parquet",
                local_files_only=bool(found and found.silence),
            )
        )
    except Exception as error:  # network, repository, access: each its own tree
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: Exception) -> DataError:
    return DataError(
        f"expected a folder {repo}, or that data set on the Hub or in its cache "
        f"({remote.refusal(f'get {repo}', error)}); check the name, the network and the token"
    )


def _first_line(error: Exception) -> str:
    return next(_lines(str(error)), type(error).__name__)


def _lines(text: str) -> Iterator[str]:
    return (line.strip().rstrip(".") for line in text.splitlines() if line.strip())
