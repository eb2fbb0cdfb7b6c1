"""Where streams come from: Hub data sets by `datasets`, WebDataset shards by timm's reader.

    hfids:USER/NAME[@REV]         a data set on the Hub, or a folder that `datasets` understands
    wds:FOLDER, wds:URL           shards with timm's `_info.json` beside them
    wds:PATTERN.tar               shards by a pattern: 'wds:https://host/{train-{00..99},val-0}.tar'

Behind any of them, `|TRAINING,TEST` or `|TRAINING,TEST,CLASSES` says how many images and classes
there are, for what does not say so itself.

The names are those of timm's readers, which also read `_info.json`. Their samples are read here
and not by them: timm decodes every image it passes, drops damaged ones with a warning, and divides
shards among processes unevenly; here an image keeps its place, and is decoded when it is needed.
"""

from __future__ import annotations

import glob
import json
import logging
import os
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from robustify import remote
from robustify.errors import DataError, RobustifyError, UsageError
from robustify.images import Encoded
from robustify.shards import (
    INFO,
    NAMES,
    by_split,
    class_names_in,
    endings_of,
    expand,
    indexed,
    label_of,
    named_by_labels,
    names_of_info,
    to_number,
)
from robustify.streams import Origin
from robustify.tables import (
    TEST,
    TRAIN,
    columns,
    features_of,
    first_line,
    splits_of,
    to_encoded,
    undecoded,
)

HUB, SHARDS = "hfids:", "wds:"
_SCHEMES = ("https", "http", "hf")  # webdataset would also run a command: `pipe:`
_EXTRA = "install it with: pip install 'robustify-classifiers[stream]'"
_SAY = "say it behind the name as |TRAINING,TEST, for instance |60000,10000"
_SAY_CLASSES = "or say how many there are behind the name as |TRAINING,TEST,CLASSES"


@dataclass(frozen=True)
class Streams:
    """A data set that is read as streams. `identity` tells it from others: names and counts."""

    name: str
    source: str
    class_names: tuple[str, ...]
    train: Origin
    test: Origin
    identity: tuple[str, ...]


def is_stream(name: str) -> bool:
    """Whether `name` asks for a stream."""
    return name.startswith((HUB, SHARDS))


@dataclass(frozen=True)
class _Said:
    """What stands behind the | of a name: the images of both splits, and the classes."""

    text: str
    images: tuple[int | None, int | None]
    classes: tuple[str, ...]


def read_stream(name: str) -> Streams:
    """The data set that `name` says, not one image of it read. Raises `UsageError` for a name that
    means nothing, and `DataError` for what is missing, damaged, or does not say what it holds."""
    where, _, numbers = name.partition("|")
    kind, _, where = where.partition(":")
    said = _said(numbers, name)
    with _quiet_timm():
        return (_hub if f"{kind}:" == HUB else _shards)(where, name, said)


def _said(numbers: str, name: str) -> _Said:
    if not numbers:
        return _Said("", (None, None), ())
    match = re.fullmatch(r"([1-9]\d*),([1-9]\d*)(?:,([1-9]\d*))?", numbers)
    if match is None:
        raise UsageError(
            f"expected the numbers of training and test images behind | in {name}, got "
            f"{numbers!r}; write them as |60000,10000, or with the number of classes as "
            "|60000,10000,10"
        )
    classes = tuple(map(str, range(int(match[3] or 0))))
    return _Said(f"|{numbers}", (int(match[1]), int(match[2])), classes)


# The Hub


def _hub(where: str, source: str, said: _Said) -> Streams:
    """A Hub data set in the streaming mode of `datasets`: one shard for each of its files."""
    try:
        import datasets
    except ImportError:
        raise UsageError(
            f"expected the extra `stream` (datasets) to read {source}; {_EXTRA}"
        ) from None
    repo, _, revision = where.partition("@")
    is_here = Path(where).expanduser().is_dir()
    if is_here:
        repo, revision = str(Path(where).expanduser().resolve()), ""
        source = f"{HUB}{repo}{said.text}"
    elif silence := remote.find(where, "dataset").silence:
        raise _unreadable(source, silence)
    try:
        builder = datasets.load_dataset_builder(repo, revision=revision or None)
        streams = builder.as_streaming_dataset()
    except Exception as error:  # of several libraries: network, repository, configuration, format
        raise _unreadable(source, error) from error
    origins: list[Origin] = []
    class_names: tuple[str, ...] = ()
    for split, number in zip(splits_of(streams, source), said.images, strict=True):
        stream = streams[split]
        features = features_of(stream.features or {})
        image, label = columns(features, source)
        class_names = class_names or tuple(features[label].get("names") or said.classes)
        files = list(map(str, (builder.config.data_files or {}).get(split, ())))
        info = (builder.info.splits or {}).get(split)
        count = number or (info and info.num_examples) or _rows(files, f"{source}, split {split}")
        folder = Path(repo) if is_here else None
        rows = partial(_rows_of, undecoded(stream, image), image, label, source, folder)
        numbered = [f"{source}, split {split}, shard {n}" for n in range(stream.num_shards)]
        origins.append(_origin(f"{source}, split {split}", count, numbered, rows, class_names))
    if not class_names:
        raise DataError(
            f"expected the names of the classes in the features of {source} (a ClassLabel), and "
            f"they are not there; name it without {HUB} to read its labels first, {_SAY_CLASSES}"
        )
    name = Path(repo).name if is_here else repo
    identity = (where, builder.hash, *(str(origin.count) for origin in origins))
    return Streams(name, source, class_names, origins[0], origins[1], identity)


def _rows_of(
    stream: Any, image: str, label: str, source: str, folder: Path | None, shard: int
) -> Iterator[tuple[Encoded, int]]:
    """Images and labels of one file."""
    rows = stream.shard(num_shards=stream.num_shards, index=shard)
    for row, values in enumerate(rows):
        number = -1 if values[label] is None else int(values[label])
        yield _content(values[image], f"{source}, shard {shard}", row, folder), number


def _content(value: Any, where: str, row: int, folder: Path | None) -> Encoded:
    """An image in a row: its bytes, or those of the file on the Hub that it names."""
    path = (value or {}).get("path") or ""
    if (value or {}).get("bytes") is None and re.match(r"(hf|https|zip)://", path):
        import fsspec

        with fsspec.open(path, "rb") as file:
            return Encoded(f"{where}, row {row} ({path})", file.read())
    return to_encoded(value, where, row, folder or Path())


def _rows(files: Sequence[str], what: str) -> int:
    """How many images parquet files say they hold, by their footers alone."""
    if not files or not all(file.endswith(".parquet") for file in files):
        raise DataError(f"expected {what} to say how many images it has; {_SAY}")
    import fsspec
    from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]

    count = 0
    for path in files:
        try:
            with fsspec.open(path, "rb") as file:
                count += int(parquet.read_metadata(file).num_rows)
        except Exception as error:  # of the file system, of the network, of pyarrow
            raise _unreadable(what, error) from error
    return count


# WebDataset


def _shards(where: str, source: str, said: _Said) -> Streams:
    """Tar shards: those that timm's `_info.json` lists, or those that a pattern names."""
    try:
        import webdataset  # noqa: F401
    except ImportError:
        raise UsageError(
            f"expected the extra `stream` (webdataset) to read {source}; {_EXTRA}"
        ) from None
    _require_harmless(where)
    is_remote = "://" in where
    if not is_remote:
        where = str(Path(where).expanduser().absolute())
        source = f"{SHARDS}{where}{said.text}"
    by_info = not where.endswith(".tar")
    if by_info and not is_remote and not any((Path(where) / name).is_file() for name in INFO):
        where, by_info = f"{where}/**/*.tar", False
    readers = _by_info(where, source) if by_info else _by_pattern(where, source, said)
    root = readers[0].root
    class_names = said.classes or _class_names(root, readers)
    origins = []
    for reader, number in zip(readers, said.images, strict=True):
        info = reader.split_info
        urls = [os.path.join(root, file) for file in info.filenames]
        for url in urls:
            _require_harmless(url)
        what = f"{source}, split {info.name}" if info.name else source
        count = number or reader.num_samples
        if not count:
            raise DataError(f"expected {what} to say how many images it has; {_SAY}")
        read = partial(_samples_of, urls, info.alt_label, class_names)
        origins.append(_origin(what, count, urls, read, class_names))
    identity = (*(url for o in origins for url in map(os.path.basename, o.shards)),
                *(str(origin.count) for origin in origins))  # fmt: skip
    return Streams(_name_of(root), source, class_names, origins[0], origins[1], identity)


def _require_harmless(where: str) -> None:
    """Raise `UsageError` for what webdataset would not read but run, or ask other programs for. The
    name of a data set may come from a stranger's checkpoint."""
    scheme = re.match(r"\s*([A-Za-z][A-Za-z0-9+.-]*):", where)
    if scheme and scheme[1].lower() not in _SCHEMES:
        raise UsageError(
            f"expected shards in a folder, or under {'://, '.join(_SCHEMES)}://, got {where!r}; "
            "other schemes are not opened"
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if scheme and offline:
        raise DataError(
            f"expected the network to read {where}, and HF_HUB_OFFLINE is set; unset it"
        )


def _by_info(root: str, source: str) -> list[Any]:
    """timm's readers of the training and the test split, by `_info.json` in `root`."""
    from timm.data import create_reader

    readers = []
    for names in (TRAIN, TEST):
        for name in names:
            try:
                readers.append(create_reader("wds/", root=root, split=name))
                break
            except RuntimeError:  # no such split, or no info
                continue
            except Exception as error:  # whatever else an info file can lack
                raise DataError(
                    f"expected timm's _info.json in {root} to describe split {name} "
                    f"({first_line(error)}); correct it, or name the shards by a pattern"
                ) from error
        else:
            raise DataError(
                f"expected an _info.json in {root} with a split {' or '.join(names)}; add one, or "
                f"name the shards of {source} by a pattern that ends in .tar"
            )
    return readers


def _by_pattern(pattern: str, source: str, said: _Said) -> list[Any]:
    """timm's readers of the shards that `pattern` names; those on this machine are counted."""
    from timm.data import create_reader

    expanded = expand(pattern)
    if "://" in pattern:
        urls = expanded
    else:
        urls = [str(path) for each in expanded for path in _globbed(each)]
    root = _common_folder(urls) if urls else pattern
    readers = []
    names = by_split([url[len(root) :].lstrip("/") for url in urls], source)
    for part, count in zip(names, said.images, strict=True):
        if count is None and "://" not in root:
            count = len(indexed([Path(root, name) for name in part])[0])
        readers.append(create_reader("wds/", root=root, split="::".join(part) + f"|{count or 0}"))
    return readers


def _common_folder(urls: Sequence[str]) -> str:
    """The folder that holds all of `urls`, which may be paths."""
    levels = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    return "/".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, levels))


def _globbed(pattern: str) -> list[Path]:
    return [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]


def _class_names(root: str, readers: Sequence[Any]) -> tuple[str, ...]:
    """What `_info.json` or a list beside the shards names; else, on this machine, the labels."""
    info = getattr(readers[0], "info", None) or {}
    names = names_of_info(json.dumps(info), root)
    if names:
        return tuple(names)
    if "://" not in root:
        found = class_names_in([Path(root, name) for name in (*INFO, *NAMES)])
        if found:
            return found
        files = [Path(root, name) for name in readers[0].split_info.filenames]
        return named_by_labels(indexed(files)[2])
    import webdataset

    for name in NAMES:
        try:
            with webdataset.gopen(f"{root}/{name}") as file:
                lines = file.read().decode("utf-8").split("\n")
        except Exception:  # a server says in its own way that it has no such file
            continue
        if found := tuple(line.strip() for line in lines if line.strip()):
            return found
    raise DataError(
        f"expected the names of the classes in {root}: class_names or num_classes in _info.json, "
        f"or one a line in {NAMES[0]}; add one of them, {_SAY_CLASSES}"
    )


def _samples_of(
    urls: Sequence[str], field: str, class_names: Sequence[str], shard: int
) -> Iterator[tuple[Encoded, int]]:
    """Images and labels of one tar file, plain or compressed, as webdataset groups its members."""
    import webdataset
    from webdataset.tariterators import group_by_keys, tar_file_expander

    url, number = urls[shard], {name: label for label, name in enumerate(class_names)}
    with webdataset.gopen(url) as stream:
        for sample in group_by_keys(tar_file_expander(iter([{"url": url, "stream": stream}]))):
            where = f"{url}, sample {sample['__key__']}"
            members = {end: data for end, data in sample.items() if not end.startswith("__")}
            image, ending = endings_of(members, where, field)
            text = label_of(members[ending], ending, where, field)
            yield Encoded(where, members[image]), to_number(text, number, where)


def _name_of(root: str) -> str:
    return root.rstrip("/").rpartition("/")[2] or root


# Both


def _origin(
    name: str, count: int, shards: Sequence[str], read: Any, class_names: Sequence[str]
) -> Origin:
    """`read`, whose errors become one line each, and whose labels are those of classes."""

    def samples(shard: int) -> Generator[tuple[Encoded, int]]:
        try:
            with closing(read(shard)) as found:
                for image, label in found:
                    if not 0 <= label < len(class_names):
                        raise DataError(
                            f"expected labels from 0 to {len(class_names) - 1} in {image.name}, "
                            f"got {label}; -1 usually means that the labels are withheld: use a "
                            "split that has them"
                        )
                    yield image, label
        except RobustifyError:
            raise
        except Exception as error:  # of tarfile, curl, pyarrow, the network
            raise _unreadable(shards[shard], error) from error

    return Origin(name, count, shards, samples)


def _unreadable(what: str, error: Exception) -> DataError:
    return DataError(
        f"expected to read {what} ({remote.refusal('read it', error)}); check the name, the "
        "network and the token, or fetch a damaged file again; an interrupted run goes on from its "
        "checkpoint"
    )


@contextmanager
def _quiet_timm() -> Iterator[None]:
    """timm's reader warns of an `_info.json` that patterns do not need."""
    logger = logging.getLogger("timm.data.readers.reader_wds")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
