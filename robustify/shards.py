"""WebDataset shards on this machine: plain tar files, indexed once and then read by position.

A sample is a run of members with one name up to its first dot: an image (`0001.jpg`) and its label
(`0001.cls` or `0001.cls.txt`: a number or a class name; or `0001.json`: a field `label`). The index
holds 28 bytes an image, in the user's cache folder, under names, sizes and times of the tar files.
"""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from robustify.errors import DataError, RobustifyError
from robustify.files import atomic_write
from robustify.images import Encoded, Part, Source
from robustify.tables import TEST, TRAIN, first_line

log = logging.getLogger(__name__)

IMAGES = {"jpg", "jpeg", "png", "webp", "bmp", "gif", "tif", "tiff", "ppm", "pgm"}
LABELS = ("cls", "cls.txt", "json")
FIELDS = ("label", "cls", "class", "target")  # of a sample's json, in order
INFO = ("_info.json", "info.json")  # as timm names them
NAMES = ("class_map.txt", "classes.txt", "classnames.txt", "labels.txt")
_LARGEST_LABEL = 1 << 20  # bytes of a member that is read for a label
_VERSION = 1  # of the index file
_COLUMNS = ("shard", "offset", "size", "label")


class Members(Sequence[Encoded]):
    """Images inside tar files, read when asked for. `shard`, `offset`, `size`: (N,), which file
    each is in, where it begins there, and its bytes."""

    def __init__(self, files: Sequence[Path], shard: Tensor, offset: Tensor, size: Tensor) -> None:
        self.files, self.shard, self.offset, self.size = files, shard, offset, size

    def __len__(self) -> int:
        return len(self.shard)

    def __getitem__(self, position: Any) -> Any:
        """The image at `position`, or the list of them for a slice."""
        if isinstance(position, slice):
            return [self[place] for place in range(*position.indices(len(self)))]
        file, offset = self.files[int(self.shard[position])], int(self.offset[position])
        name = f"{file} at byte {offset}"
        try:
            with open(file, "rb") as archive:
                archive.seek(offset)
                return Encoded(name, archive.read(int(self.size[position])))
        except OSError as error:
            raise DataError(f"expected an image in {name} ({error.strerror}); restore it") from None


def read_shards(where: str) -> Source:
    """The shards in a folder, or those that a pattern of globs and braces names; which split one
    belongs to is said by its name or its folder's (`train-0000.tar`, `val/0000.tar`).

    Raises `DataError` for missing splits, and for shards that are cut short, compressed, or hold a
    sample without image or label.
    """
    root, *splits = find_shards(where)
    known = class_names_in([(root / name) for name in (*INFO, *NAMES)])
    found = [indexed([file.resolve() for file in split]) for split in splits]
    class_names = known or named_by_labels(found[0][2])
    number = {name: label for label, name in enumerate(class_names)}
    parts: list[Part] = []
    for images, codes, texts in found:
        translated = [to_number(text, number, where) for text in texts]
        parts.append((images, torch.tensor(translated, dtype=torch.int64)[codes]))
    identity = identify([file for split in splits for file in split])
    return Source(root.resolve().name, class_names, parts[0], parts[1], identity)


def find_shards(where: str) -> tuple[Path, list[Path], list[Path]]:
    """The folder of the shards that `where` names, a folder or a pattern of globs and braces, and
    which of them are of the training and of the test split.

    Raises `DataError` for one that a pattern names and that is not there, and for missing splits.
    """
    root = Path(where).expanduser()
    if root.is_dir():
        files = sorted(root.rglob("*.tar"))
    else:
        patterns = expand(str(root))
        matches = [sorted(glob.glob(pattern, recursive=True)) for pattern in patterns]
        files = [Path(file) for file in dict.fromkeys(chain.from_iterable(matches))]
        if files and [] in matches:
            missing = patterns[matches.index([])]
            raise DataError(
                f"expected {len(patterns)} shards, and {missing} is not there; restore it, or "
                "leave it out of the pattern"
            )
        root = Path(os.path.commonpath([file.parent for file in files])) if files else root.parent
    if not files:
        raise DataError(
            f"expected WebDataset shards (.tar files) in {where}, and there are none; check the "
            "folder or the pattern"
        )
    train, test = by_split([str(file.relative_to(root)) for file in files], where)
    return root, [root / name for name in train], [root / name for name in test]


def identify(files: Sequence[Path]) -> tuple[str, ...]:
    """Name and bytes of each. Raises `DataError` for one that is not there."""
    try:
        return tuple(f"{file.name} {file.stat().st_size}" for file in files)
    except OSError as error:
        raise DataError(f"expected {error.filename} ({error.strerror}); restore it") from None


def expand(pattern: str) -> list[str]:
    """What a pattern with braces stands for: `{0..2}`, `{08..10}` and `{a,b}`."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    first, last, words = match.groups()
    if words is None:
        words = ",".join(f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1))
    before, after = pattern[: match.start()], pattern[match.end() :]
    # Inner braces are expanded first, so what stands beside them comes more than once.
    every = (whole for word in words.split(",") for whole in expand(before + word + after))
    return list(dict.fromkeys(every))


def by_split(files: Sequence[str], where: str) -> tuple[list[str], list[str]]:
    """Which of `files` are training shards and which test shards, by the last word of their path
    that names a split. Raises `DataError` where one of both has none."""
    found: dict[str, list[str]] = {}
    for file in files:
        words = re.split(r"[^a-z0-9]+", file.lower())
        split = next((word for word in reversed(words) if word in TRAIN + TEST), None)
        if split is not None:
            found.setdefault(split, []).append(file)
    chosen = [next((found[name] for name in names if name in found), []) for names in (TRAIN, TEST)]
    for part, names in zip(chosen, (TRAIN, TEST), strict=True):
        if not part:
            raise DataError(
                f"expected WebDataset shards of a split {' or '.join(names)} in {where}, got "
                f"{len(files)} tar files without that word in their names; rename them, or put "
                "them into folders of these names"
            )
    return chosen[0], chosen[1]


def class_names_in(files: Sequence[Path]) -> tuple[str, ...]:
    """The class names that the first of `files` holds: lines of text, or `class_names`, `classes`
    or `num_classes` of an info file in JSON. Empty where none does."""
    for file in files:
        if file.is_file() and (found := names_listed(file.read_text(encoding="utf-8"), str(file))):
            return found
    return ()


def names_listed(text: str, file: str) -> tuple[str, ...]:
    """The class names in `text`, which is that of an info file where `file` ends in .json."""
    names = names_of_info(text, file) if file.endswith(".json") else text.split("\n")
    return tuple(name.strip() for name in names if name.strip())


def names_of_info(text: str, where: str) -> list[str]:
    """The class names that an info file gives, or as many numbers as it says there are classes."""
    try:
        info = json.loads(text)
    except ValueError as error:
        raise DataError(f"expected JSON in {where} ({error}); correct or remove it") from None
    for key in ("class_names", "classes"):
        if isinstance(info, dict) and isinstance(info.get(key), list):
            return [str(name) for name in info[key]]
    count = info.get("num_classes") if isinstance(info, dict) else None
    return [str(number) for number in range(count)] if isinstance(count, int) else []


def endings_of(members: Iterable[str], where: str, field: str = "") -> tuple[str, str]:
    """Which members of a sample are its image and its label, by their endings; with `field` the
    label is that field of its json. Raises `DataError` where one is missing."""
    members = list(members)
    image = next((ending for ending in members if ending.split(".")[-1] in IMAGES), None)
    label = next((end for end in (("json",) if field else LABELS) if end in members), None)
    if image is None or label is None:
        raise DataError(
            f"expected an image and a label ({', '.join(LABELS)}) for each sample, and {where} "
            f"lacks {'an image' if image is None else 'a label'} (it has {', '.join(members)}); "
            "add or remove the sample"
        )
    return image, label


def label_of(content: bytes, ending: str, where: str, field: str = "") -> str:
    """The label's text in a member `cls`, `cls.txt` or `json`, there in `field` or one of `FIELDS`.
    Raises `DataError` where there is none."""
    text = content.decode("utf-8", "replace").strip()
    if ending != "json":
        return text
    try:
        fields = json.loads(text)
        return str(next(fields[name] for name in (field, *FIELDS) if name in fields))
    except (ValueError, TypeError, StopIteration):
        raise DataError(
            f"expected a field {', '.join(FIELDS)} in the json of {where}, got {text[:60]!r}; "
            "name the label so, or add a member .cls"
        ) from None


def to_number(text: str, number: Mapping[str, int], where: str) -> int:
    """The label that `text` says: a class name of `number`, or the number itself."""
    if text in number and not text.isdecimal():
        return number[text]
    try:
        return int(text)
    except ValueError:
        raise DataError(
            f"expected a class number or the name of a class as label in {where}, got {text!r}; "
            "list the names, one a line, in class_map.txt beside the shards"
        ) from None


def named_by_labels(texts: Sequence[str]) -> tuple[str, ...]:
    """Classes nobody named: numbers where the labels are, else the labels in order."""
    if all(re.fullmatch(r"-?\d+", text) for text in texts):
        return tuple(map(str, range(max(map(int, texts), default=-1) + 1)))
    return tuple(sorted(texts))


@dataclass
class _Found:
    """What one shard holds: place and bytes of each image, and its label's text."""

    offsets: list[int]
    sizes: list[int]
    labels: list[str]


def indexed(files: Sequence[Path]) -> tuple[Members, Tensor, tuple[str, ...]]:
    """The images of `files`, and their labels as places in the list of label texts. Raises
    `DataError` for a shard or sample that is not whole."""
    key = [_VERSION, *((str(f), (s := f.stat()).st_size, s.st_mtime_ns) for f in files)]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cached = user / "robustify" / "shards" / f"{digest}.safetensors"
    found = _from_cache(cached)
    if found is None:
        found = _index(files)
        _to_cache(cached, *found)
    tensors, names = found
    members = Members(files, tensors["shard"], tensors["offset"], tensors["size"])
    return members, tensors["label"], names


def _index(files: Sequence[Path]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Read the headers of every shard, with progress in bytes on stderr."""
    numbers: dict[str, int] = {}  # label text -> code
    columns: dict[str, list[Tensor]] = {name: [] for name in _COLUMNS}
    total = sum(file.stat().st_size for file in files)
    bar = tqdm(total=total, desc="indexing shards", unit="B", unit_scale=True, delay=2,
               leave=False, disable=None)  # fmt: skip
    with bar:
        for shard, file in enumerate(files):
            found = _scan(file)
            codes = [numbers.setdefault(text, len(numbers)) for text in found.labels]
            columns["shard"].append(torch.full((len(codes),), shard, dtype=torch.int32))
            columns["offset"].append(torch.tensor(found.offsets, dtype=torch.int64))
            columns["size"].append(torch.tensor(found.sizes, dtype=torch.int64))
            columns["label"].append(torch.tensor(codes, dtype=torch.int64))
            bar.update(file.stat().st_size)
    return {name: torch.cat(column) for name, column in columns.items()}, tuple(numbers)


def _scan(file: Path) -> _Found:
    """One shard's samples, by its headers; of the content only labels are read."""
    found = _Found([], [], [])
    try:
        with tarfile.open(file, "r:") as archive:
            for key, members in _samples(archive):
                where = f"{file}, sample {key}"
                image, ending = endings_of(members, where)
                content = archive.extractfile(members[ending])
                label = content.read(_LARGEST_LABEL) if content else b""
                found.offsets.append(members[image].offset_data)
                found.sizes.append(members[image].size)
                found.labels.append(label_of(label, ending, where))
            _require_end(file, archive.offset)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"expected a whole, uncompressed tar file in {file} ({first_line(error)}); fetch it "
            "again, or unpack a compressed one"
        ) from error
    return found


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Runs of members with the same name up to its first dot."""
    current, members = "", dict[str, tarfile.TarInfo]()
    while (member := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep every header
        folder, _, base = member.name.rpartition("/")
        stem, _, ending = base.partition(".")
        if not member.isfile() or not stem or not ending or stem.startswith("__"):
            continue  # folders, hidden files, and WebDataset's own notes
        key = f"{folder}/{stem}" if folder else stem
        if key != current and members:
            yield current, members
            members = {}
        current, members[ending.lower()] = key, member
    if members:
        yield current, members


def _require_end(file: Path, offset: int) -> None:
    """A tar file ends in a block of zeros; `tarfile` takes a damaged header, or the end of a file
    that was cut between two members, for the end as well."""
    with open(file, "rb") as archive:
        archive.seek(offset)
        if archive.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise EOFError(f"no end mark at byte {offset}: damaged or cut short there")


def _from_cache(cached: Path) -> tuple[dict[str, Tensor], tuple[str, ...]] | None:
    """An index written before, or None. One that is damaged is made again."""
    from safetensors import safe_open

    # Whatever is wrong with a cache, it can be made again.
    with suppress(Exception), safe_open(cached, "pt") as file:
        names = tuple(json.loads(file.metadata()["labels"]))
        return {name: file.get_tensor(name) for name in _COLUMNS}, names
    return None


def _to_cache(cached: Path, tensors: dict[str, Tensor], names: tuple[str, ...]) -> None:
    """Keep an index where that is possible; without it, the next start reads the headers again."""
    from safetensors.torch import save

    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(cached, save(tensors, {"labels": json.dumps(names)}))
    except (OSError, RobustifyError) as error:
        log.warning("the index of the shards could not be kept (%s)", error)
