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
    find_shards,
    identify,
    indexed,
    label_of,
    named_by_labels,
    names_listed,
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
_HARMLESS = re.compile(rf"(?:(?:{'|'.join(_SCHEMES)})://[^/:]+(?::\d+)?(?:/[^:]*)?|[^:]*)")
_EXTRA = "install it with: pip install 'robustify-classifiers[stream]'"
_SAY = "say it behind the name as |TRAINING,TEST, for instance |60000,10000"
_SAY_CLASSES = "or say how many there are behind the name as |TRAINING,TEST,CLASSES"


@dataclass(frozen=True)
class StreamSource:
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


@dataclass(frozen=True)
class _Listed:
    """The shards of one split; `field` of their json is the label, where one is named."""

    urls: list[str]
    count: int | None
    name: str = ""
    field: str = ""


def read_stream(name: str) -> StreamSource:
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


def _hub(where: str, source: str, said: _Said) -> StreamSource:
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
    return StreamSource(name, source, class_names, origins[0], origins[1], identity)


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


def _shards(where: str, source: str, said: _Said) -> StreamSource:
    """Tar shards: those that timm's `_info.json` lists, or those that a pattern names."""
    try:
        import webdataset  # noqa: F401
    except ImportError:
        raise UsageError(
            f"expected the extra `stream` (webdataset) to read {source}; {_EXTRA}"
        ) from None
    by_info = not where.endswith(".tar")
    _require_harmless([where] if by_info else expand(where))
    is_remote = "://" in where
    if not is_remote:
        where = str(Path(where).expanduser().absolute())
        source = f"{SHARDS}{where}{said.text}"
    if by_info and (is_remote or any((Path(where) / name).is_file() for name in INFO)):
        root, splits = where, _by_info(where, source)
    elif is_remote:
        root, splits = _by_address(where, source)
    else:
        root, splits = _by_pattern(where, said)
    _require_harmless([root, *(url for split in splits for url in split.urls)])
    here = [] if is_remote else [Path(url) for split in splits for url in split.urls]
    identity = identify(here) or [os.path.basename(url) for s in splits for url in s.urls]
    class_names = said.classes or _class_names(root, splits[0].urls)
    origins = []
    for split, number in zip(splits, said.images, strict=True):
        what = f"{source}, split {split.name}" if split.name else source
        count = number or split.count
        if not count:
            raise DataError(f"expected {what} to say how many images it has; {_SAY}")
        read = partial(_samples_of, split.urls, split.field, class_names)
        origins.append(_origin(what, count, split.urls, read, class_names))
    identity = (*identity, *(str(origin.count) for origin in origins))
    return StreamSource(_name_of(root), source, class_names, origins[0], origins[1], identity)


def _require_harmless(names: Sequence[str]) -> None:
    """Raise `UsageError` for what webdataset would not read but run, or ask other programs for. The
    name of a data set may come from a stranger's checkpoint: so `names` are those that are opened,
    with no brace left to expand."""
    for name in names:
        if not _HARMLESS.fullmatch(name):
            raise UsageError(
                f"expected shards in a folder, or under {'://, '.join(_SCHEMES)}://, got {name!r}; "
                "other schemes are not opened, nor anything else with a colon in its name"
            )
    remote_names = [name for name in names if "://" in name]
    if remote_names and len(remote_names) < len(names):
        raise UsageError(
            f"expected all shards on this machine or none, got {remote_names[0]} beside others; "
            "fetch it first"
        )
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    if remote_names and offline:
        raise DataError(
            f"expected the network to read {remote_names[0]}, and HF_HUB_OFFLINE is set; unset it"
        )


def _by_info(root: str, source: str) -> list[_Listed]:
    """The training and the test split, as `_info.json` in `root` describes them to timm."""
    from timm.data import create_reader

    splits = []
    for names in (TRAIN, TEST):
        for name in names:
            try:
                info = create_reader("wds/", root=root, split=name).split_info
            except RuntimeError:  # no such split, or no info
                continue
            except Exception as error:  # whatever else an info file can lack
                raise DataError(
                    f"expected timm's _info.json in {root} to describe split {name} "
                    f"({first_line(error)}); correct it, or name the shards by a pattern"
                ) from error
            urls = [os.path.join(root, file) for file in info.filenames]
            splits.append(_Listed(urls, info.num_samples, info.name, info.alt_label))
            break
        else:
            raise DataError(
                f"expected an _info.json in {root} with a split {' or '.join(names)}; add one, or "
                f"name the shards of {source} by a pattern that ends in .tar"
            )
    return splits


def _by_pattern(pattern: str, said: _Said) -> tuple[str, list[_Listed]]:
    """The shards of a folder or pattern on this machine, and the folder; their images are counted
    where nobody said how many."""
    root, *parts = find_shards(pattern)
    counts = [n or len(indexed(files)[0]) for n, files in zip(said.images, parts, strict=True)]
    return str(root), [
        _Listed(list(map(str, files)), count) for files, count in zip(parts, counts, strict=True)
    ]


def _by_address(pattern: str, source: str) -> tuple[str, list[_Listed]]:
    """The shards that a pattern of addresses names, and the folder that holds them all."""
    urls = expand(pattern)
    levels = zip(*(url.split("/")[:-1] for url in urls), strict=False)
    common = takewhile(lambda names: len(set(names)) == 1, levels)
    root = "/".join(names[0] for names in common)
    parts = by_split([url[len(root) :].lstrip("/") for url in urls], source)
    return root, [_Listed([f"{root}/{name}" for name in part], None) for part in parts]


def _class_names(root: str, train: Sequence[str]) -> tuple[str, ...]:
    """What `_info.json` or a list beside the shards names; else, on this machine, the labels."""
    if "://" not in root:
        found = class_names_in([Path(root, name) for name in (*INFO, *NAMES)])
        return found or named_by_labels(indexed(list(map(Path, train)))[2])
    for name in (*INFO, *NAMES):
        try:
            with _opened(f"{root}/{name}") as file:
                text = file.read().decode("utf-8")
        except Exception:  # a server says in its own way that it has no such file
            continue
        if found := names_listed(text, f"{root}/{name}"):
            return found
    raise DataError(
        f"expected the names of the classes in {root}: class_names or num_classes in _info.json, "
        f"or one a line in {NAMES[0]}; add one of them, {_SAY_CLASSES}"
    )


def _opened(url: str) -> Any:
    """The one door to shards: a file, or, once more looked at, an address for webdataset. (Its own
    lock, `enforce_security`, shuts out files as well, and for the whole program.)"""
    import webdataset

    _require_harmless([url])
    return webdataset.gopen(url) if "://" in url else open(url, "rb")


def _samples_of(
    urls: Sequence[str], field: str, class_names: Sequence[str], shard: int
) -> Iterator[tuple[Encoded, int]]:
    """Images and labels of one tar file, plain or compressed, as webdataset groups its members."""
    from webdataset.tariterators import group_by_keys, tar_file_expander

    url, number = urls[shard], {name: label for label, name in enumerate(class_names)}
    with _opened(url) as stream:
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
