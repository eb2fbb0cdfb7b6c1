"""Small WebDataset shards, parquet files and class folders of the same images, for the tests."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

CLASSES = ("cat", "dog")


def png(seed, side=8, grey=False):
    """A PNG of random pixels."""
    shape = (side, side) if grey else (side, side, 3)
    pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def sample(number, label, *, ending="cls", side=8):
    """The members of one sample: name -> content."""
    text = json.dumps({"label": label}) if ending == "json" else str(label)
    return {f"{number:05d}.png": png(number, side), f"{number:05d}.{ending}": text.encode()}


def write_tar(path, members, *, mode="w"):
    """A tar file with `members`, name -> content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return path


def write_shards(root, *, train=24, test=8, each=7, ending="cls", side=8, names=CLASSES):
    """Shards of `each` images; image n has label n modulo the number of classes."""
    for split, first, count in (("train", 0, train), ("test", 10_000, test)):
        for shard, start in enumerate(range(0, count, each)):
            members = {}
            for n in range(start, min(start + each, count)):
                members |= sample(first + n, n % len(names), ending=ending, side=side)
            write_tar(root / f"pets-{split}-{shard:04d}.tar", members)
    (root / "class_map.txt").write_text("\n".join(names) + "\n")
    return root


def write_classes(root, *, train=24, test=8, side=8):
    """The same images in class folders."""
    for split, first, count in (("train", 0, train), ("test", 10_000, test)):
        for n in range(count):
            path = root / split / CLASSES[n % len(CLASSES)] / f"{first + n:05d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(first + n, side))
    return root


def write_tables(root, *, train=24, test=8, each=7, side=8):
    """The same images in parquet files."""
    import pyarrow
    from pyarrow import parquet

    root.mkdir(parents=True, exist_ok=True)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": CLASSES}}
    stored = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    for split, first, count in (("train", 0, train), ("test", 10_000, test)):
        starts = range(0, count, each)
        for shard, start in enumerate(starts):
            numbers = range(start, min(start + each, count))
            rows = {
                "image": [{"bytes": png(first + n, side), "path": f"{n}.png"} for n in numbers],
                "label": [n % len(CLASSES) for n in numbers],
            }
            table = pyarrow.table(rows).replace_schema_metadata(stored)
            name = f"{split}-{shard:05d}-of-{len(starts):05d}.parquet"
            parquet.write_table(table, root / name)
    return root
