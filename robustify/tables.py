"""Images and labels in tables: parquet files, and the Arrow files of `datasets`.

Encoded images of up to `LOADED` bytes are taken into memory. What is larger stays in Arrow files
that are mapped into memory and read row by row; `datasets` makes them from parquet files, once, in
its cache. Parquet itself cannot do that: to read one image it decodes the row group around it,
which for 110 kB images took 4 ms with 100 rows to a group and 67 ms with 1,000; an Arrow row 0.02.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from robustify.errors import DataError
from robustify.images import Encoded, Part, Source

log = logging.getLogger(__name__)

TRAIN = ("train", "training")
TEST = ("test", "testing", "val", "valid", "validation")
LAYOUT = (
    "train/ and test/ (or val/) with one folder per class, parquet files train-* and test-*, or "
    "WebDataset shards train-*.tar and test-*.tar"
)
LOADED = 1 << 30  # bytes of encoded images that are held in memory; CIFAR has a tenth of it


class Rows(Sequence[Encoded]):
    """The images of a mapped table, read when asked for.

    `table`: a `datasets.Dataset` that leaves them encoded. `folder`: where images lie of which the
    table holds only the path.
    """

    def __init__(self, table: Any, column: str, folder: Path, name: str) -> None:
        self.table, self.column, self.folder, self.name = table, column, folder, name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, position: Any) -> Any:
        """The image in row `position`, or the list of them for a slice."""
        if isinstance(position, slice):
            return [self[row] for row in range(*position.indices(len(self)))]
        return to_encoded(self.table[position][self.column], self.name, position, self.folder)


def read_parquet(path: Path, name: str) -> Source:
    """The parquet files of a Hub data set: `train-*`, `test-*` in one folder. Small ones are read
    without the `datasets` package, which would first write a second copy of them into its cache.

    Raises `DataError` for what is missing, damaged or leads out of its folder.
    """
    try:
        from pyarrow import parquet  # type: ignore[import-untyped, unused-ignore]
    except ImportError:
        raise DataError(
            f"expected the extra `hub` (pyarrow or datasets) to read the parquet files in {path}; "
            "install it with: pip install 'robustify-classifiers[hub]'"
        ) from None
    files = [parquet_files(path, names) for names in (TRAIN, TEST)]
    if sum(file.stat().st_size for part in files for file in part) > LOADED:
        return _mapped(path, name, files)
    parts: list[Part] = []
    class_names: tuple[str, ...] = ()
    for part in files:
        features = _features(_opened(parquet.read_schema, part[0]))
        image_column, label_column = columns(features, path)
        images: list[Encoded] = []
        labels: list[int] = []
        for file in part:
            table = _opened(parquet.read_table, file, columns=[image_column, label_column])
            values = table[image_column].to_pylist()
            images += [to_encoded(v, str(file), row, file.parent) for row, v in enumerate(values)]
            labels += _without_none(table[label_column].to_pylist())
        parts.append((images, torch.tensor(labels, dtype=torch.int64)))
        class_names = class_names or class_names_of(features[label_column], labels)
    return Source(name, class_names, parts[0], parts[1])


def _mapped(path: Path, name: str, files: Sequence[Sequence[Path]]) -> Source:
    """The same of files larger than memory's share, by Arrow files in the cache of `datasets`."""
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"expected the extra `hub` (datasets) to read the parquet files in {path}, which are "
            f"larger than {LOADED >> 20} MiB; install it with: "
            "pip install 'robustify-classifiers[hub]'"
        ) from None
    log.warning(
        "the parquet files in %s are larger than %d MiB: `datasets` keeps them as Arrow files in "
        "%s, made once", path, LOADED >> 20, datasets.config.HF_DATASETS_CACHE,
    )  # fmt: skip
    named = {
        split: [str(file) for file in part]
        for split, part in zip(("train", "test"), files, strict=True)
    }
    try:
        found = datasets.load_dataset("parquet", data_files=named)
    except Exception as error:  # of several libraries: format, disk, cache
        raise DataError(
            f"expected to make Arrow files of the parquet files in {path} in "
            f"{datasets.config.HF_DATASETS_CACHE} ({first_line(error)}); make room there, set "
            "HF_DATASETS_CACHE, or fetch the damaged file again"
        ) from error
    identity = tuple(f"{file.name} {file.stat().st_size}" for part in files for file in part)
    return read_datasets(found, name, folder=files[0][0].parent, identity=identity)


def read_datasets(
    found: Any, name: str, *, folder: Path | None = None, identity: tuple[str, ...] = ()
) -> Source:
    """A `datasets.DatasetDict`, its images left where they are: rows are read when asked for."""
    parts: list[Part] = []
    class_names: tuple[str, ...] = ()
    made: list[str] = []
    for split in splits_of(found, name):
        table = found[split]
        features = features_of(table.features)
        image_column, label_column = columns(features, name)
        labels = _without_none(table.select_columns([label_column])[:][label_column])
        rows = Rows(undecoded(table, image_column), image_column, folder or Path(name), name)
        parts.append((rows, torch.tensor(labels, dtype=torch.int64)))
        class_names = class_names or class_names_of(features[label_column], labels)
        # The folder of a cached file is named after what it was made from: a commit or a hash.
        files = [Path(file["filename"]) for file in table.cache_files]
        made += [f"{file.parent.name}/{file.name} {file.stat().st_size}" for file in files]
    return Source(name, class_names, parts[0], parts[1], identity or tuple(made))


def splits_of(found: Iterable[str], name: str) -> tuple[str, str]:
    """The names of the training split and of the test split. Raises `DataError` without them."""
    chosen = []
    for names in (TRAIN, TEST):
        split = next((split for split in names if split in found), None)
        if split is None:
            raise DataError(
                f"expected a split {' or '.join(names)} in {name}, got {', '.join(found)}; "
                "save the data set as folders or parquet files with both splits"
            )
        chosen.append(split)
    return chosen[0], chosen[1]


def features_of(features: Any) -> dict[str, Any]:
    """What `datasets` knows of each column, as the Hub's JSON says it; a bare struct of bytes and
    path is an image, and a column of integers called a label holds labels."""
    plain = {}
    for column, feature in features.items():
        kind = type(feature).__name__
        if isinstance(feature, dict) and "bytes" in feature:
            kind = "Image"
        elif kind == "Value" and feature.dtype.startswith("int") and _is_label(column):
            kind = "ClassLabel"
        plain[column] = {"_type": kind, "names": getattr(feature, "names", None)}
    return plain


def undecoded(table: Any, image_column: str) -> Any:
    """A table or stream of `datasets` that gives images as bytes and path."""
    import datasets

    if isinstance(table.features[image_column], datasets.Image):
        return table.cast_column(image_column, datasets.Image(decode=False))
    return table


def to_encoded(value: Any, where: str, row: int, folder: Path) -> Encoded:
    """An image as the Hub stores it: bytes, or the path of a file in `folder`. Raises `DataError`
    for a path that leads out of it."""
    content, original = (value or {}).get("bytes"), (value or {}).get("path") or ""
    name = f"{where}, row {row}" + (f" ({original})" if original else "")
    return Encoded(name, _inside(folder, original, where) if content is None else content)


def _inside(folder: Path, original: str, where: str) -> Path:
    path = (folder / original).resolve()
    if not original or not path.is_relative_to(folder.resolve()):
        raise DataError(
            f"expected images inside {folder}, but {where} names {original!r}; the data set is "
            "damaged or not to be trusted"
        )
    return path


def parquet_files(path: Path, names: Sequence[str]) -> list[Path]:
    """The shards of the first split of `names` that there is, in order. Raises `DataError` where
    there is none, or more than one configuration."""
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
    raise DataError(f"expected in {path} {LAYOUT}; found no parquet file {' or '.join(names)}-*")


def _opened(read: Any, file: Path, **options: Any) -> Any:
    try:
        return read(file, **options)
    except (OSError, ValueError, KeyError) as error:  # pyarrow's own errors derive from these
        raise DataError(
            f"expected a readable parquet file in {file} ({first_line(error)}); fetch it again"
        ) from error


def _features(schema: Any) -> dict[str, Any]:
    """Column types as the Hub's schema says, or by storage type for files that carry none."""
    stored = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    known: dict[str, Any] = stored.get("info", {}).get("features") or {}
    if known:
        return known
    for field in schema:
        kind = str(field.type)
        if kind.startswith("struct<bytes: binary"):
            kind = "Image"
        elif kind.startswith("int") and _is_label(field.name):
            kind = "ClassLabel"
        known[field.name] = {"_type": kind}
    return known


def _is_label(column: str) -> bool:
    return "label" in column or column == "cls"


def columns(features: dict[str, Any], where: Path | str) -> tuple[str, str]:
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


def class_names_of(feature: dict[str, Any], labels: Sequence[int]) -> tuple[str, ...]:
    """The names of the classes, or numbers up to the largest of `labels`."""
    return tuple(feature.get("names") or map(str, range(max(labels, default=-1) + 1)))


def first_line(error: Exception) -> str:
    """What an error of another library says first, without its full stop."""
    lines = (line.strip().rstrip(".") for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)


def _without_none(labels: Sequence[int | None]) -> list[int]:
    return [-1 if label is None else label for label in labels]
