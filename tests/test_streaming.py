"""Streams: the images of the same folders, shuffled by seed and epoch, resumed to the same bits."""

import gc
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time

import pytest
import shards
import torch
from loops import CrossEntropy, weights
from shards import CLASSES, png, sample, write_classes, write_shards, write_tables, write_tar

from robustify import data, harden, readers, streams
from robustify.checkpoint import Checkpoints
from robustify.classifier import Classifier
from robustify.data import load
from robustify.errors import DataError, UsageError
from robustify.fit import fit
from robustify.images import Encoded
from robustify.settings import Training
from robustify.streams import Epochs, Origin, Stream
from robustify.train import Stage

pytest.importorskip("webdataset")
pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    """No network, and caches of its own, for every test."""
    import datasets

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def write(tmp_path):
    """Writes a data set of either kind; gives the name of its stream."""

    def write(kind, folder="pets", **options):
        if kind == "wds":
            return f"wds:{write_shards(tmp_path / folder, **options)}"
        return f"hfids:{write_tables(tmp_path / folder, **options)}"

    return write


KINDS = pytest.mark.parametrize("kind", ["wds", "hfids"])


def rows(images, labels):
    """Images and labels as sortable rows."""
    return sorted(torch.cat([images.flatten(1), labels[:, None]], 1).tolist())


# What a stream holds


@KINDS
def test_a_stream_holds_what_the_same_class_folders_hold(kind, write, tmp_path):
    expected, found = load(write_classes(tmp_path / "folders")), load(write(kind))
    assert found.class_names == expected.class_names == CLASSES
    assert (len(found.train), len(found.test)) == (24, 8)
    assert (found.name, found.in_chans, found.image_size) == ("pets", 3, 8)
    assert (found.mean, found.std) == (expected.mean, expected.std)
    assert (found.threat, found.policy) == (expected.threat, expected.policy)
    for ours, theirs in ((found.train, expected.train), (found.test, expected.test)):
        everything = rows(theirs.images, theirs.labels)
        images, labels, _ = (torch.cat(part) for part in zip(*ours.batches(5), strict=True))
        assert rows(images, labels) == everything
        shuffled = ours.collate(list(ours.shuffled(0, 0)))
        assert rows(shuffled[0], shuffled[1]) == everything
        held = ours.take(1000)
        assert rows(held.images, held.labels) == everything
    assert load(found.source).fingerprint == found.fingerprint
    assert load(found.source, image_size=16).fingerprint != found.fingerprint


@KINDS
def test_an_image_keeps_its_index(kind, write):
    """Image p of shard s, of S, is image 7 s + p of what was written, and has index p S + s."""
    train = load(write(kind)).train
    for samples in (train.shuffled(0, 0), train.shuffled(0, 1), train.shuffled(3, 0)):
        for image, label, index in samples:
            number = 7 * (index % 4) + index // 4
            assert image.content == png(number)
            assert label == number % 2


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm's pipeline leaves them
def test_timm_reads_the_same_from_the_same_shards(write):
    import timm.data

    name = write("wds")
    root = name.removeprefix("wds:")
    pattern = "::".join(f"pets-train-{n:04d}.tar" for n in range(4)) + "|24"
    theirs = timm.data.create_dataset("wds/", root=root, split=pattern)
    ours, labels, _ = (torch.cat(part) for part in zip(*load(name).train.batches(9), strict=True))
    for place, (image, label) in enumerate(theirs):
        assert image.tobytes() == ours[place].permute(1, 2, 0).numpy().tobytes()
        assert label == labels[place]
    assert place == 23
    del theirs
    gc.collect()


def test_timms_info_file_says_shards_counts_and_classes(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "class_map.txt").unlink()

    def described(name, files, counts):
        return {
            "name": name,
            "filenames": files,
            "shard_lengths": counts,
            "num_samples": sum(counts),
        }

    info = {
        "splits": {
            "train": described("train", [f"pets-train-{n:04d}.tar" for n in (0, 2)], [7, 7]),
            "validation": described("validation", ["pets-test-0001.tar"], [1]),
        },
        "class_names": ["elk", "ant"],
    }
    (tmp_path / "_info.json").write_text(json.dumps(info))
    found = load(f"wds:{tmp_path}")
    assert (len(found.train), len(found.test)) == (14, 1)
    assert found.class_names == ("elk", "ant")
    assert [index for _, _, index in found.test._all([0], at_once=1)] == [0]
    del info["splits"]["train"]
    (tmp_path / "_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"_info\.json in .* with a split train or training"):
        load(f"wds:{tmp_path}")
    (tmp_path / "_info.json").write_text(json.dumps({"splits": {"train": {}}}))
    with pytest.raises(DataError, match=r"_info\.json in .* to describe split train"):
        load(f"wds:{tmp_path}")


# Order


def stream(lengths, read=None):
    """A stream of shards of these lengths; the image of index i is the PNG of i."""

    def images(shard):
        for place in range(lengths[shard]):
            if read is not None:
                read.append((shard, place))
            yield Encoded("", png(place * len(lengths) + shard, 2)), place % 2

    return Stream(
        Origin("made up", sum(lengths), [str(s) for s in range(len(lengths))], images), 3, 2
    )


def order(samples):
    return [index for _, _, index in samples]


def test_the_order_depends_on_seed_and_epoch_alone(monkeypatch):
    monkeypatch.setattr(streams, "BUFFER_IMAGES", 10)
    made = stream([9, 7, 12, 1, 11])
    first = order(made.shuffled(0, 0))
    random.seed(5)
    torch.manual_seed(5)
    assert order(stream([9, 7, 12, 1, 11]).shuffled(0, 0)) == first
    assert sorted(first) == sorted(order(made.shuffled(0, 1))) == sorted(order(made.shuffled(1, 0)))
    assert len({tuple(order(made.shuffled(s, e))) for s in range(3) for e in range(3)}) == 9
    # Golden: whoever changes it, changes what an interrupted run goes on with.
    assert first[:8] == [9, 5, 6, 4, 2, 14, 1, 12]


def test_the_buffer_mixes_and_is_bounded(monkeypatch):
    read = []
    monkeypatch.setattr(streams, "BUFFER_IMAGES", 50)
    held = [len(read) - n for n, _ in enumerate(stream([100] * 20, read).shuffled(0, 0))]
    assert max(held) <= 51
    places = torch.tensor(order(stream([100] * 20).shuffled(0, 0)))
    assert len(places.unique()) == 2000
    assert (places.diff().abs() < 20).float().mean() < 0.3  # neighbours are rarely of one row
    monkeypatch.setattr(streams, "BUFFER_BYTES", 10 * len(png(0, 2)))
    read.clear()
    held = [len(read) - n for n, _ in enumerate(stream([100] * 20, read).shuffled(0, 0))]
    assert max(held) <= 12


def test_at_most_a_few_shards_are_open_at_once():
    opened, closed = [], []

    def images(shard):
        opened.append(shard)
        for place in range(20):
            yield Encoded("", png(place, 2)), 0
        closed.append(shard)

    made = Stream(Origin("made up", 600, [""] * 30, images), 3, 2)
    for _ in made.shuffled(0, 0):
        assert len(opened) - len(closed) <= streams.OPEN


def test_taken_are_the_first_of_every_shard():
    lengths = [1, 9, 3, 0, 6]
    every = sorted(place * 5 + s for s, length in enumerate(lengths) for place in range(length))
    for count in (1, 2, 4, 5, 11, 18, 19, 30):
        taken = stream(lengths).take(count)
        assert taken.indices.tolist() == every[:count]
        expected = [(Encoded("", png(index, 2)), 0, 0) for index in every[:count]]
        assert torch.equal(taken.images, stream(lengths).collate(expected)[0])


def test_what_is_taken_does_not_depend_on_what_was_taken_before():
    def rest(lengths):
        """Without the images of indices 0 and 1."""
        return stream(lengths).split_validation(2 / sum(lengths), 2)[0]

    for lengths in ([9, 9, 9], [9, 1, 20], [1, 0, 30]):
        left = sorted(order(rest(lengths).shuffled(0, 0)))
        for earlier in ([], [9], [2, 5], [30]):
            made = rest(lengths)
            for count in earlier:
                made.take(count)
            for count in (1, 2, 3, 7, 12):
                assert made.take(count).indices.tolist() == left[:count]
    assert rest([9, 9, 9]).take(2).indices.tolist() == [2, 3]


def test_a_few_images_are_read_of_a_few_shards():
    read = []
    made = stream([1000] * 200, read)
    assert len(made.take(8)) == 8
    assert len(read) <= 2 * 8
    assert made.take(8).indices.tolist() == list(range(8))
    assert len(read) <= 2 * 8  # and kept


def test_validation_is_held_out_of_every_pass(write):
    found = load(write("wds", train=70))
    rest, validation = found.split_validation()
    assert (len(rest), len(validation)) == (63, 7)
    held = set(validation.indices.tolist())
    assert held == set(range(7))
    for indices in (
        order(rest.shuffled(0, 0)), torch.cat([i for _, _, i in rest.batches(8)]).tolist(),
    ):  # fmt: skip
        assert sorted([*indices, *held]) == sorted(order(found.train.shuffled(0, 0)))
    images = validation.__getitems__([3, 1])[0]
    assert torch.equal(images, found.train.take(7).images[[3, 1]])
    assert validation.subset(torch.tensor([2])).images.shape == (1, 3, 8, 8)


def test_validation_is_bounded():
    made = stream([700] * 10)
    rest, validation = made.split_validation(0.1, 5000)
    assert (len(rest), len(validation)) == (6300, 700)
    rest, validation = made.split_validation(0.1, 50)
    assert (len(rest), len(validation)) == (6950, 50)


def test_a_stream_that_comes_class_by_class_is_warned_of(tmp_path, caplog):
    members = {}
    for n in range(60):
        members |= sample(n, n // 20)
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "test-0.tar", members)
    load(f"wds:{tmp_path}").split_validation()
    assert "validation images are of 1 of 3 classes only" in caplog.text


# What is said when a stream cannot be read


@KINDS
@pytest.mark.parametrize("said", ["", "24", "24,x", "0,8", "24,8,2,1"])
def test_numbers_that_are_none(kind, write, said):
    name = f"{write(kind)}|{said}"
    if not said:
        assert len(load(name).train) == 24
        return
    with pytest.raises(UsageError, match=r"numbers of training and test images.*\|60000,10000"):
        load(name)


@KINDS
def test_numbers_that_are_wrong(kind, write, caplog, monkeypatch):
    fewer = load(f"{write(kind)}|20,8")
    assert len(list(fewer.train.shuffled(0, 0))) == len(fewer.train) == 20
    assert "has more than the 20 images" in caplog.text
    with pytest.raises(DataError, match=r"expected 30 images in .*got 24; a shard is missing"):
        load(f"{write(kind)}|30,8")
    monkeypatch.setattr(data, "_SAMPLE", 10)  # those of a large set: nothing is known yet
    more = load(f"{write(kind)}|30,8").train
    for passed in (lambda: list(more.shuffled(0, 0)), lambda: list(more.batches(7))):
        with pytest.raises(DataError, match=r"expected 30 images in .*got 24; a shard is missing"):
            passed()


def test_a_stream_that_does_not_say_its_number(tmp_path):
    for split in ("train", "test"):
        for n in range(4):
            path = tmp_path / "pets" / split / CLASSES[n % 2] / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(png(n))
    with pytest.raises(DataError, match=r"how many images it has; say it behind the name as \|"):
        load(f"hfids:{tmp_path / 'pets'}")
    found = load(f"hfids:{tmp_path / 'pets'}|4,4")
    assert rows(found.test.take(4).images, found.test.take(4).labels) == rows(
        load(tmp_path / "pets").test.images, load(tmp_path / "pets").test.labels
    )


@pytest.mark.parametrize("cut", ["in an image", "between members", "a label", "a number", "image"])
def test_a_damaged_shard_of_a_stream(write, tmp_path, cut):
    name = write("wds") + "/pets-*.tar|24,8"
    path = tmp_path / "pets" / "pets-train-0001.tar"
    said = r"pets-train-0001\.tar"
    if cut == "in an image":
        path.write_bytes(path.read_bytes()[:700])
    elif cut == "between members":
        path.write_bytes(path.read_bytes()[:2048])
        said = "expected 24 images in .*got 18"
    elif cut == "a label":
        write_tar(path, {"7.png": png(7)})
        said = r"sample 7 lacks a label \(it has png\)"
    elif cut == "a number":
        write_tar(path, {"7.png": png(7), "7.cls": b"9"})
        said = r"expected labels from 0 to 1 in .*sample 7, got 9"
    else:
        broken = {"7.png": b"hello", "7.cls": b"1"}
        write_tar(
            path, {key: value for n in range(8, 14) for key, value in sample(n, 1).items()} | broken
        )
        said = r"sample 7, and it cannot be decoded"
    with pytest.raises(DataError, match=said) as caught:
        list(load(name).train.batches(4))
    assert "\n" not in str(caught.value)


def test_a_damaged_parquet_file_of_a_stream(write, tmp_path):
    name = write("hfids")
    path = tmp_path / "pets" / "train-00001-of-00004.parquet"
    content = path.read_bytes()
    path.write_bytes(content[:100] + bytes(400) + content[500:])
    with pytest.raises(DataError) as caught:
        list(load(f"{name}|24,8").train.batches(4))
    assert "\n" not in str(caught.value)
    path.write_bytes(content[:-30])
    with pytest.raises(DataError) as caught:
        load(name)
    assert "\n" not in str(caught.value)


def test_nothing_that_would_be_run_is_opened(tmp_path):
    for name in (
        "pipe:touch x",
        " pipe:touch x.tar",
        "PIPE:touch x.tar|1,1",
        "file:/etc/train.tar",
    ):
        with pytest.raises(UsageError, match="expected shards in a folder, or under https"):
            load(f"wds:{name}")
    for listed in ("pipe:touch x", "https://host.invalid/train-0.tar"):
        info = {"splits": {name: {"name": name, "filenames": [listed], "shard_lengths": [1],
                                  "num_samples": 1} for name in ("train", "test")},
                "num_classes": 2}  # fmt: skip
        (tmp_path / "_info.json").write_text(json.dumps(info))
        with pytest.raises(UsageError, match=f"under https.*{listed}"):
            load(f"wds:{tmp_path}")


@pytest.mark.parametrize("numbers", ["", "|4,4", "|4,4,2"])
@pytest.mark.parametrize(
    "pattern",
    [
        "{pipe:touch RUN;echo ://h/train-0,pipe:touch RUN;echo ://h/test-0}.tar",
        "{p,}ipe:touch RUN;echo ://h/{train,test}-0.tar",
        "https://h/x::pipe:touch RUN;echo /{train,test}-0.tar",
        "https://h::pipe:touch RUN;echo /{train,test}-0.tar",
        "{https://h/train-0.tar,pipe:touch RUN;echo /test-0}.tar",
        "{https://h/train-0,train-1,test-0}.tar",
        "pipe:touch RUN;echo ://h/folder",
    ],
)
def test_nothing_is_run_behind_braces(pattern, numbers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_OFFLINE")
    with pytest.raises(UsageError, match=r"expected shards in a folder|all shards on this machine"):
        list(load(f"wds:{pattern}{numbers}").train.batches(1))
    assert not list(tmp_path.iterdir())


def test_what_is_opened_is_looked_at_once_more(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("pipe:touch x", "pipe:touch x;echo ://h/train-0.tar", "file:/etc/passwd"):
        with pytest.raises(UsageError, match="other schemes are not opened"):
            readers._opened(name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("host", ["host", "host:8080"])
def test_addresses_are_given_to_webdataset(host, monkeypatch):
    import webdataset

    asked = []

    def gopen(url, *more):
        asked.append(url)
        raise OSError("not there")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(webdataset, "gopen", gopen)
    with pytest.raises(DataError, match=r"could not read it: not there"):
        load(f"wds:{{http://{host}/a/train-{{0..1}},http://{host}/a/test-0}}.tar|4,4,2")
    assert asked == [f"http://{host}/a/train-0.tar"]


def test_a_shard_that_is_missing(write, tmp_path):
    name = write("wds")
    with pytest.raises(DataError, match=r"expected 6 shards, and .*train-0004\.tar is not there"):
        load(f"{name}/pets-{{train-{{0000..0004}},test-0000}}.tar")
    info = {"splits": {name: {"name": name, "filenames": [f"pets-{name}-0000.tar", "gone.tar"],
                              "shard_lengths": [7, 7], "num_samples": 14}
                       for name in ("train", "test")}, "num_classes": 2}  # fmt: skip
    (tmp_path / "pets" / "_info.json").write_text(json.dumps(info))
    with pytest.raises(DataError, match=r"expected /.*gone\.tar \(No such file.*restore it"):
        load(name)


@KINDS
def test_other_images_under_the_same_names_are_another_set(kind, write):
    before = load(write(kind)).fingerprint
    assert load(write(kind, side=32), image_size=8).fingerprint != before


def test_without_a_network():
    for name in (
        "wds:https://host.invalid/train-{0..3}.tar|1,1",
        "wds:{https://host.invalid/train-0,https://host.invalid/test-0}.tar|1,1,2",
        "wds:hf://datasets/a/b",
    ):
        with pytest.raises(DataError, match="HF_HUB_OFFLINE is set; unset it"):
            load(name)


def test_a_hub_stream_out_of_reach(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"expected to read hfids:nobody/nothing .*check") as caught:
        load("hfids:nobody/nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "package"), [("wds", "webdataset"), ("hfids", "datasets")])
def test_without_the_extra(kind, package, write, monkeypatch):
    name = write(kind)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=rf"extra `stream` \({package}\).*classifiers\[stream\]"):
        load(name)


@KINDS
def test_classes_that_are_only_counted(kind, write, tmp_path):
    name = write(kind)
    if kind == "wds":
        (tmp_path / "pets" / "class_map.txt").unlink()
        assert load(f"{name}|24,8,5").class_names == tuple("01234")
    else:
        from pyarrow import parquet

        for path in (tmp_path / "pets").glob("*.parquet"):
            parquet.write_table(parquet.read_table(path).replace_schema_metadata(None), path)
        with pytest.raises(DataError, match=r"names of the classes .*or say .*\|.*,CLASSES"):
            load(name)
        assert load(f"{name}|24,8,5").class_names == tuple("01234")
    with pytest.raises(DataError, match=r"at least 2 classes in the images of .*got 1"):
        load(f"{name}|24,8,1")


def test_streams_without_classes_or_splits(write, tmp_path):
    write("wds")
    (tmp_path / "pets" / "pets-test-0000.tar").rename(tmp_path / "pets" / "more.tar")
    (tmp_path / "pets" / "pets-test-0001.tar").unlink()
    with pytest.raises(DataError, match=r"shards of a split test or .*got 5 tar files"):
        load(f"wds:{tmp_path / 'pets'}")


# Training


def stage(source, *, max_steps=None, epochs=2):
    """A short stage that reads the stream `source`."""
    found = load(source)
    train, validation = found.split_validation()
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Dropout(0.1), torch.nn.Linear(144, 2),
    )  # fmt: skip
    network.num_classes, network.in_chans = 2, 3
    student = Classifier(network, architecture="tiny", image_size=8, mean=[0.5] * 3, std=[1] * 3)
    settings = Training(epochs=epochs, batch_size=8, lr=0.05, averaging="swa")
    return Stage(
        CrossEntropy(student=student), train, validation, number=0, settings=settings,
        threat=found.threat, seed=0, policy="crop-flip", max_steps=max_steps,
        accelerator=harden.new_accelerator("fp32", 1, 0),
    )  # fmt: skip


@KINDS
@pytest.mark.parametrize("after", [1, 3, 7, 8, 10])
def test_an_interrupted_stream_goes_on_to_the_same_bits(kind, after, write, tmp_path):
    name = write(kind, train=60)  # 54 to train on: 7 batches, the last of 6
    whole = stage(name)
    fit(whole, checkpoints=Checkpoints(tmp_path / "whole"))
    assert whole.progress.updates == 14
    steps = iter(range(1, 1000))
    checkpoints = Checkpoints(tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        fit(stage(name), checkpoints=checkpoints, interrupted=lambda: next(steps) >= after)
    resumed = stage(name)
    fit(resumed, checkpoints=checkpoints)
    assert torch.equal(weights(resumed), weights(whole))
    assert resumed.progress.history == whole.progress.history


def test_a_stream_is_read_and_decoded_ahead(write, tmp_path, monkeypatch):
    threads = []
    collate = Stream.collate

    def noted(self, samples):
        threads.append(threading.current_thread().name)
        return collate(self, samples)

    monkeypatch.setattr(Stream, "collate", noted)
    made = stage(write("wds", train=60))
    threads.clear()
    fit(made, checkpoints=Checkpoints(tmp_path / "run"))
    assert threads == ["read-ahead"] * 3 * 7  # two epochs, and one to estimate BatchNorm anew
    assert "read-ahead" not in [thread.name for thread in threading.enumerate()]


def test_what_is_skipped_is_not_decoded(write, monkeypatch):
    decoded = []
    found = load(write("wds", train=60))
    monkeypatch.setattr(Stream, "collate", lambda self, samples: decoded.append(len(samples)))
    loader = torch.utils.data.DataLoader(
        Epochs(found.train, 0, 1), 8, collate_fn=found.train.collate
    )
    loader.dataset.skip(40)
    assert len(list(loader)) == 3
    assert decoded == [8, 8, 4]
    assert len(list(loader)) == 8  # once


def test_batches_are_filled_up_to_the_number_of_processes():
    made = stream([9, 8])
    epochs = Epochs(made, 0, 4)
    assert len(epochs) == len(list(epochs)) == 20
    whole = order(epochs)
    assert whole[17:] == whole[:3]
    epochs.skip(16)
    assert order(epochs) == whole[16:]


def test_an_objective_is_prepared_with_every_image_in_order(write):
    made = stage(write("wds", train=60))
    shown = list(made._stored_batches())
    labels = torch.cat([labels for _, labels, _ in shown])
    keys = torch.cat([noise.keys for _, _, noise in shown])
    assert len(keys.unique()) == len(labels) == 54
    assert torch.equal(keys, torch.cat([keys for _, _, keys in made.train.batches(8)]))


def test_a_recipe_does_not_know(write, tmp_path):
    """`distill` from the command line: killed, resumed, and the same model to the bit."""
    name = write("wds", train=200, test=20, each=30, side=32)
    command = [
        sys.executable, "-m", "robustify", "distill", "--recipe", "teacher_assistant", "--student",
        "cnn_a", "--data", name, "--max-steps", "12", "--batch-size", "16", "--suite", "fgsm",
        "--limit", "9", "--seed", "1", "--set", "training.checkpoint_seconds=0", "--out",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    contents = {}
    for kills in (0, 1):
        out = tmp_path / str(kills)
        if kills:
            process = subprocess.Popen([*command, out], env=environment, stderr=subprocess.DEVNULL,
                                       stdout=subprocess.DEVNULL)  # fmt: skip
            while process.poll() is None and not list(out.glob("checkpoints/*.safetensors")):
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
        result = subprocess.run([*command, out], env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr[-3000:]
        contents[kills] = (out / "model.safetensors").read_bytes()
        assert json.loads((out / "report.json").read_text())["n"] == 9
    assert contents[0] == contents[1]


def test_two_processes_share_a_stream(write, tmp_path):
    """Each image goes to one of them: the losses are those of one with twice the batch."""
    name = write("hfids", train=200, test=20, each=30, side=32)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    losses, robust = {}, {}
    for processes, batch in ((1, 32), (2, 16)):
        out = tmp_path / str(processes)
        launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
        result = subprocess.run(
            [sys.executable, *(launcher if processes > 1 else []), "-m", "robustify", "distill",
             "--recipe", "pgd_at", "--student", "cnn_a", "--data", name, "--batch-size", str(batch),
             "--set", "training.optimizer=momentum", "--lr", "0.01", "--epochs", "2", "--suite",
             "fgsm", "--limit", "12", "--out", str(out)],
            env=environment, capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert result.returncode == 0, result.stderr[-3000:]
        lines = (out / "metrics.jsonl").read_text().splitlines()
        losses[processes] = [json.loads(line)["loss"] for line in lines]
        robust[processes] = json.loads((out / "report.json").read_text())["robust_accuracy"]
    assert len(losses[1]) == 2
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)
    assert robust[1] == robust[2]


@KINDS
def test_memory_does_not_grow_with_the_stream(kind, write, tmp_path, monkeypatch):
    """300 MB of encoded images pass twice through a buffer of 4 MB; 100 MB would be too much."""
    noise = os.urandom(3 << 20)  # bytes after a PNG's end are ignored
    monkeypatch.setattr(shards, "png", lambda seed, side=8: png(seed) + noise)
    name = write(kind, train=100, test=4, each=2)
    code = (
        "import re; from robustify import data, streams; streams.BUFFER_BYTES = 4 << 20;"
        "data._SAMPLE = 8; data.VALIDATION = 4; streams.OPEN = 1;"
        "kept = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]);"
        f"found = data.load({name!r}); rest, _ = found.split_validation();"
        "open('/proc/self/clear_refs', 'w').write('5'); before = kept();"
        "n = sum(1 for _ in rest.shuffled(0, 0)) + sum(len(b[1]) for b in rest.batches(4));"
        "print(n, kept() - before)"
    )
    # What is freed is given back at once, however long it takes the machine: no pools, one arena.
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1",
                   "OMP_NUM_THREADS": "1", "HF_HOME": str(tmp_path / "hub")}  # fmt: skip
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    passed, grown = map(int, result.stdout.split())
    assert passed == 2 * 96
    assert grown < 100_000  # kB
