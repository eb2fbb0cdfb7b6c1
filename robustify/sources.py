"""Where data sets come from: class folders, parquet clones, tar shards, the Hub, torchvision.

Each reader lists images and labels, and neither decodes nor loads what it does not have to.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from robustify import remote
from robustify.errors import DataError
from robustify.images import Encoded, Part, Source
from robustify.shards import read_shards
from robustify.tables import LAYOUT, TEST, TRAIN, first_line, read_datasets, read_parquet

CIFAR = ("cifar10", "cifar100")
_EXTENSIONS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}


class Files(Sequence[Encoded]):
    """Image files by their paths below `folder`: a million path objects would take a gigabyte."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder, self.names = folder, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, position: Any) -> Any:
        """The image at `position`, or the files of a slice."""
        if isinstance(position, slice):
            return Files(self.folder, self.names[position])
        path = self.folder / self.names[position]
        return Encoded(str(path), path)


def read_folder(path: Path) -> Source:
    """Class folders, a clone of a Hub data set, or WebDataset shards."""
    train, test = (_subfolder(path, names) for names in (TRAIN, TEST))
    if train and test and any(child.is_dir() for child in train.iterdir()):
        return _read_class_folders(path.resolve().name, train, test)
    if any(path.rglob("*.parquet")):
        return read_parquet(path, path.resolve().name)
    if any(path.rglob("*.tar")):
        return read_shards(str(path))
    present = sorted(child.name for child in path.iterdir() if not child.name.startswith("."))
    shown = ", ".join(present[:6]) + (", …" if len(present) > 6 else "")
    raise DataError(f"expected in {path} {LAYOUT}; it holds {shown or 'nothing'}")


def read_hub(identifier: str) -> Source:
    """A data set `user/name[@revision]` on the Hub, by `datasets`, or, where that is not installed,
    by its parquet files."""
    repo, _, revision = identifier.partition("@")
    found_on_hub = None if Path(repo).exists() else remote.find(identifier, "dataset")
    try:
        import datasets
    except ImportError:
        return read_parquet(_download(repo, revision or None, found_on_hub), repo)
    silence = found_on_hub and found_on_hub.silence
    cached = Path(datasets.config.HF_DATASETS_CACHE) / repo.replace("/", "___")
    if silence and not cached.exists():  # `datasets` itself would try for half a minute
        raise _unreachable(repo, silence)
    try:
        found = datasets.load_dataset(repo, revision=revision or None)
    except Exception as error:  # of several libraries: network, repository, configuration, format
        raise _unreachable(repo, error) from error
    return read_datasets(found, repo)


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
            f"({first_line(error)}); put torchvision's {name} files there, set ROBUSTIFY_DATA "
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
    parts: list[Part] = []
    for folder in (train, test):
        names: list[str] = []
        labels: list[int] = []
        bar = tqdm(class_names, f"listing {folder.name}", unit="class", delay=2, leave=False,
                   disable=None)  # fmt: skip
        for label, class_name in enumerate(bar):
            files = sorted(_image_files(folder / class_name), key=lambda name: name.split(os.sep))
            if not files:
                raise DataError(
                    f"expected images in {folder / class_name}, found none "
                    f"({', '.join(sorted(_EXTENSIONS))}); add some or remove the folder"
                )
            names += [os.path.join(class_name, file) for file in files]
            labels += [label] * len(files)
        parts.append((Files(folder, names), torch.tensor(labels)))
    return Source(name, tuple(class_names), parts[0], parts[1])


def _class_folders(folder: Path) -> list[str]:
    return sorted(
        child.name for child in folder.iterdir() if child.is_dir() and child.name[0] != "."
    )


def _image_files(folder: Path, below: str = "") -> Iterator[str]:
    """The images in `folder` and its folders, by their paths in it. A listing says what is a file;
    asking for each path again takes a minute for a million."""
    with os.scandir(folder) as entries:
        for entry in entries:
            name = os.path.join(below, entry.name)
            if entry.is_dir(follow_symlinks=False):
                yield from _image_files(Path(entry.path), name)
                continue
            is_image = os.path.splitext(name)[1].lower() in _EXTENSIONS
            if is_image and entry.name[0] != "." and entry.is_file():
                yield name


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
