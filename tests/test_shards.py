"""Tar shards on this machine: the images of the same class folders, whatever they are called."""

import json
import os
import subprocess
import sys

import pytest
import torch
from shards import CLASSES, png, sample, write_classes, write_shards, write_tar

from robustify import data, images, shards
from robustify.data import load
from robustify.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache folder of its own for every test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "robustify" / "shards"


def check_same(found, expected):
    """The same images with the same labels, in any order."""
    for ours, theirs in ((found.train, expected.train), (found.test, expected.test)):
        assert len(ours) == len(theirs)
        rows = [torch.cat([part.images.flatten(1), part.labels[:, None]], 1).tolist()
                for part in (ours, theirs)]  # fmt: skip
        assert sorted(rows[0]) == sorted(rows[1])


@pytest.mark.parametrize("ending", ["cls", "cls.txt", "json"])
def test_shards_hold_what_the_same_class_folders_hold(tmp_path, ending):
    found = load(write_shards(tmp_path / "pets", ending=ending))
    expected = load(write_classes(tmp_path / "folders"))
    assert found.class_names == expected.class_names == CLASSES
    assert (found.name, found.image_size, found.in_chans) == ("pets", 8, 3)
    assert (found.mean, found.std) == (expected.mean, expected.std)
    check_same(found, expected)
    assert torch.equal(found.train.images[5], images.decode(
        [images.Encoded("", png(5))], 3, 8)[0])  # fmt: skip


@pytest.mark.parametrize(
    "pattern", ["pets-*.tar", "pets-{train,test}-*.tar", "pets-{train-{0000..0003},test-0000}.tar"]
)
def test_a_pattern_names_shards(tmp_path, pattern):
    whole = load(write_shards(tmp_path / "pets", test=7))
    found = load(tmp_path / "pets" / pattern)
    assert found.fingerprint == whole.fingerprint
    assert load(found.source).fingerprint == whole.fingerprint


def test_splits_by_folder_and_class_names_by_labels(tmp_path):
    for split, first in (("train", 0), ("val", 50)):
        members = {}
        for n in range(first, first + 6):
            members |= sample(n, ("elk", "ant")[n % 2])
        write_tar(tmp_path / "test" / "own" / split / "0000.tar", members)
    found = load(tmp_path / "test" / "own")
    assert found.class_names == ("ant", "elk")
    assert found.train.labels.tolist() == [1, 0, 1, 0, 1, 0]


def test_numbers_name_the_classes_where_nothing_else_does(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "class_map.txt").unlink()
    assert load(tmp_path).class_names == ("0", "1")
    (tmp_path / "_info.json").write_text(json.dumps({"num_classes": 3}))
    assert load(tmp_path).class_names == ("0", "1", "2")


def test_what_does_not_fit_is_read_where_it_lies(tmp_path, monkeypatch):
    whole = load(write_shards(tmp_path))
    monkeypatch.setattr(data, "IN_MEMORY", 1000)
    lazy = load(tmp_path)
    assert isinstance(lazy.train.store, images.EncodedImages)
    check_same(lazy, whole)
    before = lazy.fingerprint
    write_shards(tmp_path, train=25)
    assert load(tmp_path).fingerprint != before


def test_the_index_is_kept_and_follows_the_files(tmp_path, cache, monkeypatch):
    first = load(write_shards(tmp_path / "pets"))
    assert len(list(cache.iterdir())) == 2
    scan = shards._scan
    monkeypatch.setattr(shards, "_scan", lambda file: pytest.fail("read again"))
    check_same(load(tmp_path / "pets"), first)
    monkeypatch.setattr(shards, "_scan", scan)
    for file in cache.iterdir():
        file.write_bytes(file.read_bytes()[:40])  # damaged: made again
    check_same(load(tmp_path / "pets"), first)
    write_shards(tmp_path / "pets", train=10)
    assert len(load(tmp_path / "pets").train) == 7 + 3 + 7 + 3  # the second one has 3 now


def test_a_cache_that_cannot_be_written_stops_nothing(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(load(write_shards(tmp_path / "pets")).train) == 24


@pytest.mark.parametrize("cut", ["in an image", "between members", "in a header", "damaged"])
def test_a_shard_that_is_not_whole(tmp_path, cut):
    write_shards(tmp_path)
    path = tmp_path / "pets-train-0001.tar"
    content = path.read_bytes()
    kept = {"in an image": 700, "between members": 2048, "in a header": 2148}.get(cut)
    if cut == "damaged":
        content = content[:2048] + b"x" * 512 + content[2560:]
    path.write_bytes(content[:kept])
    with pytest.raises(DataError, match=r"expected a whole.*train-0001\.tar.*fetch it") as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_compressed_shard(tmp_path):
    write_shards(tmp_path)
    write_tar(tmp_path / "pets-train-0001.tar", sample(3, 1), mode="w:gz")
    with pytest.raises(DataError, match="uncompressed"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"7.png": png(7)}, r"sample 7 lacks a label \(it has png\)"),
        ({"7.cls": b"1"}, r"sample 7 lacks an image \(it has cls\)"),
        ({"7.png": png(7), "7.cls": b"elk"}, r"class number or the name.*got 'elk'; list"),
        ({"7.png": png(7), "7.json": b"{}"}, r"expected a field label.*sample 7, got '{}'"),
        ({"7.png": png(7), "7.cls": b"5"}, "expected labels from 0 to 1"),
    ],
)
def test_a_sample_that_is_not_whole(tmp_path, members, said):
    write_shards(tmp_path)
    write_tar(tmp_path / "pets-train-0001.tar", members)
    with pytest.raises(DataError, match=said) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_shards_without_a_split_in_their_names(tmp_path):
    write_tar(tmp_path / "0000.tar", sample(0, 0))
    with pytest.raises(DataError, match=r"split train or training.*got 1 tar files .*rename them"):
        load(tmp_path)
    with pytest.raises(DataError, match="and there are none"):
        load(tmp_path / "*-no.tar")
    write_shards(tmp_path)
    with pytest.raises(DataError, match=r"expected 30 shards.*0004\.tar is not there"):
        load(tmp_path / "pets-{train,test,val}-{0000..0009}.tar")


def test_memory_does_not_grow_with_the_set(tmp_path):
    """64 MB of images; a tenth of it may stay in memory beside what the imports take."""
    noise = os.urandom(1 << 20)
    for split, count in (("train", 60), ("test", 4)):
        members = {}
        for n in range(count):  # bytes after a PNG's end are ignored
            members |= {f"{split}{n}.png": png(n) + noise, f"{split}{n}.cls": str(n % 2).encode()}
        write_tar(tmp_path / f"{split}-0.tar", members)
    code = (
        "import torch, re; from robustify import data; data.IN_MEMORY = 0; data.load();"
        "kept = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]);"
        "from PIL import PngImagePlugin;"
        f"a = data.load({str(write_shards(tmp_path / 'small'))!r});"
        "list(a.train.__getitems__(range(8))); before = kept();"
        f"b = data.load({str(tmp_path / '*-0.tar')!r});"
        "[b.train.__getitems__(range(n, n + 4)) for n in range(0, 60, 4)]; print(kept() - before)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 16_000  # kB; the whole set would be 64,000


@pytest.mark.parametrize("where", ["nowhere", "nowhere/{train,val}-*.tar"])
def test_where_there_are_no_shards_that_is_said(tmp_path, where):
    with pytest.raises(DataError, match=r"expected WebDataset shards .* and there are none; check"):
        shards.find_shards(str(tmp_path / where))
