"""Data sets: what comes in, in which order, split how, and what is said when it cannot be read."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from robustify import data, images, sources, tables
from robustify.data import Split, augment, default_threat, load, to_float
from robustify.errors import DataError, UsageError
from robustify.noise import Noise
from robustify.threat import ThreatModel

# Digits


def test_digits_are_what_they_have_always_been():
    digits = load()
    train, test = digits.train, digits.test
    assert train.images.shape == (1437, 1, 8, 8)
    assert test.images.shape == (360, 1, 8, 8)
    assert train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64
    assert digits.class_names == tuple("0123456789")
    assert (digits.in_chans, digits.image_size, digits.num_classes) == (1, 8, 10)
    assert (digits.name, digits.source, digits.policy) == ("digits", "digits", "none")
    assert digits.threat == ThreatModel("Linf", data.DIGITS_EPS)
    golden = hashlib.sha256()
    for split in (train, test):
        golden.update(split.images.numpy().tobytes() + bytes(split.labels.tolist()))
    assert golden.hexdigest() == "b12acc9c1d4e946bd588fb1af8b8659165728b7f0775165a161617628f638d77"
    assert digits.fingerprint == "f61e53d6d0e56fd31705ec959baec772f746b8d29e6303ce26ed7c00ca44ab8d"


def test_digits_levels_are_sixteenths():
    levels = to_float(load().train.images).unique()
    assert len(levels) == 17
    torch.testing.assert_close(levels, torch.arange(17) / 16, atol=0.501 / 255, rtol=0)


def test_mean_and_std_are_those_of_the_training_images():
    digits = load()
    pixels = to_float(digits.train.images).double()
    assert digits.mean == pytest.approx([pixels.mean().item()], abs=1e-7)
    assert digits.std == pytest.approx([pixels.std(correction=0).item()], abs=1e-7)


def test_digits_at_another_size():
    digits = load(image_size=16)
    assert digits.train.images.shape == (1437, 1, 16, 16)
    assert digits.image_size == 16
    assert digits.fingerprint != load().fingerprint


def test_loading_imports_neither_datasets_nor_torchvision():
    code = (
        "import sys; from robustify.data import load; load();"
        "print([m for m in ('datasets', 'torchvision', 'pyarrow', 'PIL') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "[]\n", result.stderr


# Splits


def test_a_loader_fetches_whole_batches():
    test = load().test
    loader = DataLoader(test, batch_size=100, collate_fn=lambda batch: batch)
    batches = list(loader)
    assert [len(labels) for _, labels, _ in batches] == [100, 100, 100, 60]
    pixels, labels, indices = (torch.cat(part) for part in zip(*batches, strict=True))
    assert torch.equal(pixels, test.images)
    assert torch.equal(labels, test.labels)
    assert torch.equal(indices, torch.arange(360))
    image, label, index = test[7]
    assert torch.equal(image, pixels[7])
    assert (label, index) == (labels[7], 7)


def test_a_subset_keeps_indices_and_shares_pixels():
    train = load().train
    chosen = torch.tensor([5, 3, 900])
    twice = train.subset(torch.tensor([900, 5, 3])).subset(torch.tensor([1, 2, 0]))
    assert torch.equal(twice.indices, chosen)
    assert torch.equal(twice.images, train.images[chosen])
    assert torch.equal(twice.labels, train.labels[chosen])
    assert twice.store is train.store
    assert torch.equal(train.take(2).indices, torch.tensor([0, 1]))
    assert len(train.take(5000)) == len(train)


def test_validation_is_stratified_disjoint_and_fixed():
    digits = load()
    rest, validation = digits.split_validation(0.2)
    together = torch.cat([rest.indices, validation.indices])
    assert torch.equal(together.sort().values, torch.arange(1437))
    expected = (digits.train.labels.bincount() * 0.2).round().long()
    assert torch.equal(validation.labels.bincount(), expected)
    torch.manual_seed(1)
    _, again = digits.split_validation(0.2)
    assert torch.equal(again.indices, validation.indices)
    _, other = digits.split_validation(0.2, seed=1)
    assert not torch.equal(other.indices, validation.indices)
    assert validation.indices[:6].tolist() == [6, 12, 21, 29, 30, 39]


def test_validation_does_not_move_when_other_images_leave():
    """An image is drawn by its own index, so a larger fraction contains the smaller one."""
    digits = load()
    small, large = (digits.split_validation(part)[1].indices.tolist() for part in (0.1, 0.3))
    assert set(small) < set(large)


def test_validation_needs_two_images_of_a_class(tmp_path):
    write_folder(tmp_path, counts={"cat": 3, "dog": 1})
    with pytest.raises(DataError, match=r"at least 2 training images of 'dog'.*got 1; add"):
        load(tmp_path).split_validation()
    with pytest.raises(UsageError, match="between 0 and 1"):
        load().split_validation(1.0)


def test_validation_is_capped_and_stays_balanced(monkeypatch):
    digits = load()
    uncapped = digits.split_validation(0.2)[1]
    monkeypatch.setattr(data, "VALIDATION", len(uncapped))
    assert torch.equal(digits.split_validation(0.2)[1].indices, uncapped.indices)
    monkeypatch.setattr(data, "VALIDATION", 55)
    rest, validation = digits.split_validation(0.2)
    assert (len(rest), len(validation)) == (1437 - 55, 55)
    counts = validation.labels.bincount(minlength=10)
    assert counts.min() == 5
    assert counts.max() == 6
    assert set(validation.indices.tolist()) < set(uncapped.indices.tolist())
    monkeypatch.setattr(data, "VALIDATION", 10)
    assert (digits.split_validation()[1].labels.bincount() == 1).all()


def test_a_tenth_of_cifar_is_exactly_the_cap():
    assert data.VALIDATION == 50_000 // 10


def test_to_float_is_in_the_unit_range_and_leaves_floats():
    pixels = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    torch.testing.assert_close(to_float(pixels), torch.tensor([[0, 0.2, 1]]))
    already = torch.rand(2, 3)
    assert to_float(already) is already


def test_default_threat_models():
    assert default_threat(3, 32) == ThreatModel("Linf", 8 / 255)
    assert default_threat(3, 224) == default_threat(1, 160) == ThreatModel("Linf", 4 / 255)
    assert default_threat(1, 28) == ThreatModel("Linf", 0.1)


# Augmentation


def augmented_one_by_one(pixels, noise, policy):
    """The plain loop that `augment` replaces."""
    count, channels, height, width = pixels.shape
    margin = max(1, min(height, width) // 8)
    drawn = noise.uniform(torch.empty(count, 3))
    result = torch.zeros_like(pixels)
    for n in range(count):
        down, right = (int(value * (2 * margin + 1)) for value in drawn[n, :2].tolist())
        framed = pixels.new_zeros(channels, height + 2 * margin, width + 2 * margin)
        framed[:, margin:-margin, margin:-margin] = pixels[n]
        cut = framed[:, down : down + height, right : right + width]
        mirrored = policy == "crop-flip" and drawn[n, 2] < 0.5
        result[n] = cut.flip(-1) if mirrored else cut
    return result


@pytest.mark.parametrize("policy", ["crop", "crop-flip"])
@pytest.mark.parametrize("shape", [(40, 3, 32, 32), (40, 1, 8, 8), (9, 3, 24, 20)])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_augmentation_equals_a_plain_loop(policy, shape, dtype):
    pixels = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    noise = Noise(3, torch.arange(shape[0]))
    result = augment(pixels, noise, policy)
    assert result.dtype == dtype
    assert torch.equal(result, augmented_one_by_one(pixels, noise, policy))


def test_every_move_and_both_directions_occur_equally_often():
    """A single lit pixel shows where each image went: 3 × 3 moves × 2 directions."""
    pixels = torch.zeros(9000, 1, 8, 8, dtype=torch.uint8)
    pixels[:, :, 3, 2] = 1
    moved = augment(pixels, Noise(0, torch.arange(9000)), "crop-flip")
    places = moved.flatten(1).argmax(1).bincount(minlength=64).view(8, 8)
    assert places.sum() == 9000
    assert (places[2:5, [1, 2, 3, 4, 5, 6]] > 400).all()
    assert places[2:5, [1, 2, 3, 4, 5, 6]].sum() == 9000
    assert (places[2:5, 1:4].sum() / 9000 - 0.5).abs() < 0.02


@settings(max_examples=25, deadline=None)
@given(
    order=st.permutations(range(12)),
    size=st.integers(1, 12),
    policy=st.sampled_from(["none", "crop", "crop-flip"]),
    seed=st.integers(0, 2**31),
)
def test_an_image_is_treated_the_same_in_any_batch(order, size, policy, seed):
    pixels = load().train.store[:12]
    noise = Noise(seed, torch.arange(12) * 1000)
    whole = augment(pixels, noise, policy)
    chosen = torch.tensor(order[:size])
    assert torch.equal(augment(pixels[chosen], noise[chosen], policy), whole[chosen])


def test_augmentation_changes_with_the_epoch_and_leaves_the_input():
    pixels = load().train.images[:64]
    before = pixels.clone()
    noise = Noise(0, torch.arange(64))
    first, second = (augment(pixels, noise.fork(epoch), "crop") for epoch in (0, 1))
    assert not torch.equal(first, second)
    assert torch.equal(pixels, before)
    assert augment(pixels, noise, "none") is pixels


def test_augmentation_takes_uint8_and_float_alike():
    pixels, noise = load().train.images[:20], Noise(0, torch.arange(20))
    assert torch.equal(
        to_float(augment(pixels, noise, "crop")), augment(to_float(pixels), noise, "crop")
    )


def test_unknown_augmentation():
    with pytest.raises(UsageError, match="got 'crop-flp'; did you mean 'crop-flip'"):
        augment(torch.zeros(1, 1, 8, 8), Noise(0, torch.zeros(1).long()), "crop-flp")


# Folders of images


def write_image(path, mode="RGB", size=(20, 20), value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value // 2, value // 4)).convert(mode).save(path)


def write_folder(root, counts=None, test_name="test", suffix="png", **image):
    for split in ("train", test_name):
        for name, count in (counts or {"cat": 3, "dog": 2}).items():
            for number in range(count):
                value = 10 * number + (100 if name == "dog" else 0)
                path = root / split / name / f"{number}.{suffix}"
                write_image(path, value=value, **image)
    return root


@pytest.mark.parametrize("test_name", ["test", "val", "validation"])
def test_a_folder_of_class_folders(tmp_path, test_name):
    found = load(write_folder(tmp_path / "pets", test_name=test_name))
    assert (found.name, found.source) == ("pets", str(tmp_path / "pets"))
    assert found.class_names == ("cat", "dog")
    assert found.train.images.shape == (5, 3, 20, 20)
    assert (found.policy, found.threat) == ("crop-flip", ThreatModel("Linf", 8 / 255))
    # In turn from each class: cat 0, dog 0, cat 1, dog 1, cat 2.
    assert found.train.labels.tolist() == [0, 1, 0, 1, 0]
    assert found.train.images[:, 0, 0, 0].tolist() == [0, 100, 10, 110, 20]
    assert found.train.images[3, :, 5, 5].tolist() == [110, 55, 27]


def test_test_is_preferred_to_validation(tmp_path):
    write_folder(tmp_path)
    write_folder(tmp_path, counts={"cat": 9, "dog": 9}, test_name="val")
    assert len(load(tmp_path).test) == 5


def test_mixed_sizes_and_modes(tmp_path):
    write_folder(tmp_path, size=(30, 50))
    extra = tmp_path / "train" / "cat" / "nested"
    for mode, suffix in [
        ("L", "png"),
        ("RGBA", "png"),
        ("P", "gif"),
        ("CMYK", "jpg"),
        ("1", "png"),
    ]:
        write_image(extra / f"{mode}.{suffix}", mode=mode, size=(64, 40))
    (tmp_path / "train" / "cat" / "notes.txt").write_text("not an image")
    (tmp_path / "train" / ".ignored").mkdir()
    found = load(tmp_path)
    assert found.train.images.shape == (10, 3, 32, 32)  # the median shorter side, 30, to eights
    assert load(tmp_path, image_size=24).train.images.shape == (10, 3, 24, 24)


def test_grey_only_if_all_are_grey(tmp_path):
    write_folder(tmp_path, mode="L")
    found = load(tmp_path)
    assert (found.in_chans, found.policy) == (1, "crop")
    assert found.train.images.shape == (5, 1, 20, 20)
    write_image(tmp_path / "test" / "cat" / "colour.png")
    assert load(tmp_path).train.images.shape == (5, 3, 20, 20)


def test_deep_grey_images_are_scaled_and_not_clipped(tmp_path):
    write_folder(tmp_path, mode="L")
    values = np.linspace(0, 65535, 400).astype(np.uint16).reshape(20, 20)
    Image.fromarray(values).save(tmp_path / "train" / "dog" / "9.png")
    found = load(tmp_path)
    deep = found.train.images[found.train.labels == 1][-1, 0].flatten()
    assert found.in_chans == 1
    assert (deep - torch.linspace(0, 255, 400)).abs().max() <= 1


def test_the_middle_is_cut_out(tmp_path):
    write_folder(tmp_path)
    wide = Image.new("RGB", (60, 20), (0, 0, 255))
    wide.paste((255, 0, 0), (20, 0, 40, 20))
    wide.save(tmp_path / "train" / "cat" / "0.png")
    assert load(tmp_path).train.images[0, :, 10, 10].tolist() == [255, 0, 0]
    assert (load(tmp_path).train.images[0, 2] == 0).all()


def test_size_of_large_images_and_their_threat_model(tmp_path):
    write_folder(tmp_path, size=(300, 260), suffix="jpg")
    found = load(tmp_path)
    assert found.image_size == 224
    assert found.threat == ThreatModel("Linf", 4 / 255)


def test_what_does_not_fit_into_memory_is_decoded_by_the_batch(tmp_path, monkeypatch):
    write_folder(tmp_path, counts={"cat": 6, "dog": 5}, size=(24, 30))
    whole = load(tmp_path)
    monkeypatch.setattr(data, "IN_MEMORY", 1000)
    by_batch = load(tmp_path)
    assert isinstance(by_batch.train.store, images.EncodedImages)
    assert isinstance(by_batch.train.to("cpu"), Split)
    assert torch.equal(by_batch.train.images, whole.train.images)
    assert torch.equal(by_batch.train.labels, whole.train.labels)
    assert (by_batch.mean, by_batch.std) == (whole.mean, whole.std)
    rest, _ = by_batch.split_validation(0.3)
    again, _ = whole.split_validation(0.3)
    for ours, theirs in zip(rest.__getitems__([2, 0]), again.__getitems__([2, 0]), strict=True):
        assert torch.equal(ours, theirs)
    loader = DataLoader(
        by_batch.train, 4, num_workers=1, collate_fn=_first, multiprocessing_context="spawn"
    )
    assert torch.equal(torch.cat(list(loader)), whole.train.images)


def _first(batch):
    return batch[0]


def test_digits_larger_than_memory_are_resized_by_the_batch(monkeypatch):
    whole = load(image_size=12)
    monkeypatch.setattr(data, "IN_MEMORY", 1000)
    by_batch = load(image_size=12)
    assert isinstance(by_batch.train.store, images.ResizedImages)
    assert torch.equal(by_batch.test.images, whole.test.images)


def test_fingerprint_follows_pixels_labels_and_class_names(tmp_path):
    first = load(write_folder(tmp_path / "a")).fingerprint
    assert load(write_folder(tmp_path / "b")).fingerprint == first
    write_image(tmp_path / "b" / "train" / "cat" / "0.png", value=1)
    assert load(tmp_path / "b").fingerprint != first
    write_folder(tmp_path / "c")
    for split in ("train", "test"):
        (tmp_path / "c" / split / "dog").rename(tmp_path / "c" / split / "elk")
    assert load(tmp_path / "c").fingerprint != first


def test_decoding_in_threads_keeps_the_order(tmp_path):
    encoded = [images.Encoded(str(n), png(n % 256)) for n in range(700)]
    assert torch.equal(images.decode(encoded, 1, 4)[:, 0, 0, 0].int(), torch.arange(700) % 256)
    assert images.survey([encoded]) == (True, 4)


def test_of_very_many_images_evenly_spaced_headers_speak_for_all(monkeypatch):
    opened = []

    class Counted(images.Encoded):
        def open(self):
            opened.append(self.name)
            return super().open()

    many = [Counted(str(n), png(0, size=(8, 8 if n % 2 else 6))) for n in range(101)]
    few = [Counted("few", png(0, size=(40, 40), mode="RGB"))]
    monkeypatch.setattr(images, "SURVEYED", 11)
    assert images.survey([many, few]) == (False, 8)
    assert sorted(map(int, opened[:-1])) == list(range(0, 101, 10))
    assert opened[-1] == "few"


def png(value, size=(4, 4), mode="L"):
    file = io.BytesIO()
    Image.new("L", size, value).convert(mode).save(file, "PNG")
    return file.getvalue()


# What is said when a folder cannot be read


def test_folder_missing(tmp_path):
    with pytest.raises(DataError, match="does not exist; check the path"):
        load(tmp_path / "missing")


def test_file_instead_of_a_folder(tmp_path):
    write_image(tmp_path / "x.png")
    with pytest.raises(DataError, match=r"expected a folder.*got the file"):
        load(tmp_path / "x.png")


@pytest.mark.parametrize("children", [[], ["cats", "dogs"], ["train"]])
def test_no_train_and_test(tmp_path, children):
    for child in children:
        (tmp_path / child).mkdir()
    with pytest.raises(DataError, match=r"train/ and test/.*it holds " + (", ".join(children))):
        load(tmp_path)


def test_one_class_only(tmp_path):
    with pytest.raises(DataError, match=r"at least 2 classes.*got 1"):
        load(write_folder(tmp_path, counts={"cat": 3}))


def test_class_folders_differ(tmp_path):
    write_folder(tmp_path)
    write_image(tmp_path / "test" / "elk" / "0.png")
    with pytest.raises(DataError, match=r"same class folders.*only one of them has elk; add"):
        load(tmp_path)


def test_empty_class(tmp_path):
    write_folder(tmp_path)
    (tmp_path / "train" / "elk").mkdir()
    write_image(tmp_path / "test" / "elk" / "0.png")
    with pytest.raises(DataError, match=r"expected images in .*train/elk, found none"):
        load(tmp_path)


@pytest.mark.parametrize("kind", ["truncated", "text"])
def test_corrupt_image(tmp_path, kind):
    write_folder(tmp_path, size=(64, 64), suffix="jpg")
    path = tmp_path / "train" / "dog" / "1.jpg"
    path.write_bytes(path.read_bytes()[:-200] if kind == "truncated" else b"hello")
    with pytest.raises(
        DataError, match=r"train/dog/1\.jpg.*replace or remove it; nothing"
    ) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "hint"), [("digit", "digits"), ("cifar-10", "cifar10")])
def test_unknown_name(name, hint):
    with pytest.raises(UsageError, match=f"got '{name}'; did you mean '{hint}'"):
        load(name)


def test_image_size_below_one():
    with pytest.raises(UsageError, match="at least 1 pixel, got 0"):
        load(image_size=0)


# Parquet clones and the Hub


FEATURES = {"image": {"_type": "Image"}, "kind": {"_type": "ClassLabel", "names": ["cat", "dog"]}}


def write_parquet(path, rows, features=FEATURES, columns=("image", "kind")):
    """`rows`: (bytes of an image, label)."""
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    contents = [{"bytes": content, "path": f"{n}.png"} for n, (content, _) in enumerate(rows)]
    table = arrow.table({columns[0]: contents, columns[1]: [label for _, label in rows]})
    if features:
        stored = {b"huggingface": json.dumps({"info": {"features": features}})}
        table = table.replace_schema_metadata(stored)
    parquet.write_table(table, path)


def write_clone(root, folder="data", features=FEATURES, columns=("image", "kind")):
    rows = [(png(10 * n, size=(6, 6)), n % 2) for n in range(6)]
    write_parquet(root / folder / "train-00000-of-00002.parquet", rows[:4], features, columns)
    write_parquet(root / folder / "train-00001-of-00002.parquet", rows[4:], features, columns)
    write_parquet(root / folder / "test-00000-of-00001.parquet", rows[2:5], features, columns)
    return root


@pytest.mark.parametrize("path", ["../secret.png", "/etc/hostname", ""])
def test_a_parquet_clone_that_names_files_outside_is_refused(tmp_path, path):
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "secret.png").write_bytes(png(0))
    root = write_clone(tmp_path / "clone", ".")
    (file,) = root.glob("test-*.parquet")
    images = [{"bytes": png(0, size=(6, 6)), "path": "0.png"}, {"bytes": None, "path": path}]
    rows = {"image": images, "kind": [0, 1]}
    stored = {b"huggingface": json.dumps({"info": {"features": FEATURES}})}
    parquet.write_table(arrow.table(rows).replace_schema_metadata(stored), file)
    with pytest.raises(DataError, match="expected images inside"):
        load(root)


def check_clone(found):
    assert found.train.images[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert found.train.labels.tolist() == [0, 1, 0, 1, 0, 1]
    assert found.test.labels.tolist() == [0, 1, 0]
    assert (found.in_chans, found.image_size) == (1, 6)


@pytest.mark.parametrize("folder", [".", "data"])
def test_a_parquet_clone(tmp_path, folder):
    found = load(write_clone(tmp_path, folder))
    check_clone(found)
    assert found.class_names == ("cat", "dog")


def test_a_parquet_clone_without_the_schema_of_the_hub(tmp_path):
    found = load(write_clone(tmp_path, features=None, columns=("picture", "label")))
    check_clone(found)
    assert found.class_names == ("0", "1")


def test_images_beside_the_parquet_file(tmp_path):
    write_clone(tmp_path, ".")
    (tmp_path / "0.png").write_bytes(png(77, size=(6, 6)))
    write_parquet(tmp_path / "test-00000-of-00001.parquet", [(None, 1)])
    assert load(tmp_path).test.images.flatten()[0] == 77


@pytest.fixture
def mapped(tmp_path, monkeypatch):
    """Parquet clones are larger than memory's share; Arrow files go to a folder of their own."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "arrow")
    monkeypatch.setattr(tables, "LOADED", 1000)
    datasets.disable_progress_bars()
    return tmp_path / "clone"


@pytest.mark.parametrize(
    ("features", "columns"), [(FEATURES, ("image", "kind")), (None, ("picture", "label"))]
)
def test_a_clone_larger_than_memory_is_mapped(mapped, monkeypatch, features, columns):
    write_clone(mapped, features=features, columns=columns)
    check_clone(load(mapped))
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    found = load(mapped)
    assert isinstance(found.train.store, images.EncodedImages)
    assert isinstance(found.train.store.encoded.images, tables.Rows)
    check_clone(found)
    assert found.class_names == (("cat", "dog") if features else ("0", "1"))
    test = mapped / "data" / "test-00000-of-00001.parquet"
    write_parquet(test, [(png(1), 0)], features, columns)
    assert load(mapped).fingerprint != found.fingerprint


def test_a_mapped_clone_without_datasets(mapped, monkeypatch):
    write_clone(mapped)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"extra `hub` \(datasets\).*larger than 0 MiB; install"):
        load(mapped)


def test_a_damaged_file_of_a_mapped_clone(mapped):
    write_clone(mapped)
    path = mapped / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"expected to make Arrow files of .*clone in .*fetch"):
        load(mapped)


def test_rows_of_a_large_clone_stay_on_disk(tmp_path):
    """64 MB of images in Arrow: what is kept in memory is a part of it."""
    pytest.importorskip("datasets")
    noise = np.random.default_rng(0).bytes(1 << 20)  # bytes after a PNG's end are ignored
    for split, count in (("train", 60), ("test", 4)):
        rows = [(png(n, size=(6, 6)) + noise, n % 2) for n in range(count)]
        write_parquet(tmp_path / "clone" / f"{split}-00000-of-00001.parquet", rows)
    code = (
        "import re; from robustify import data, tables; data.IN_MEMORY = tables.LOADED = 0;"
        "kept = lambda: int(re.search(r'RssAnon:\\s+(\\d+)', open('/proc/self/status').read())[1]);"
        f"data.load({str(tmp_path / 'clone')!r}); before = kept();"  # Arrow files are there now
        f"b = data.load({str(tmp_path / 'clone')!r});"
        "[b.train.__getitems__(range(n, n + 4)) for n in range(0, 60, 4)]; print(kept() - before)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert int(result.stdout.split()[-1]) < 32_000


def test_without_datasets(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    check_clone(load(write_clone(tmp_path)))


def test_without_datasets_and_pyarrow(tmp_path, monkeypatch):
    write_clone(tmp_path)
    for module in ("datasets", "pyarrow"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=r"extra `hub`.*pip install 'robustify-classifiers\[hub\]'"):
        load(tmp_path)


def test_with_datasets(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    read = sources.read_hub(str(write_clone(tmp_path / "clone")))
    assert read.class_names == ("cat", "dog")
    assert read.train[1].tolist() == [0, 1, 0, 1, 0, 1]
    assert images.decode(read.train[0], 1, 6)[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]


@pytest.mark.parametrize("installed", [True, False])
def test_hub_out_of_reach(monkeypatch, installed):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    if installed:
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    else:
        monkeypatch.setitem(sys.modules, "datasets", None)
    for name in ("nobody/nothing", "hf-hub:nobody/nothing@main"):
        with pytest.raises(
            DataError, match=r"folder nobody/nothing, or that data set on the Hub.*check"
        ) as caught:
            load(name)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("label", [-1, 2, None])
def test_label_out_of_range(tmp_path, label):
    write_clone(tmp_path)
    path = tmp_path / "data" / "test-00000-of-00001.parquet"
    write_parquet(path, [(png(1), 0), (png(1), label)])
    with pytest.raises(DataError, match="expected labels from 0 to 1 for the test images"):
        load(tmp_path)


def test_no_images(tmp_path):
    write_clone(tmp_path)
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "data" / "test-00000-of-00001.parquet"
    parquet.write_table(parquet.read_table(path).slice(0, 0), path)
    with pytest.raises(DataError, match=r"expected test images of .*, got none"):
        load(tmp_path)


def test_no_test_split(tmp_path):
    write_clone(tmp_path)
    (tmp_path / "data" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(DataError, match=r"found no parquet file test or .*validation-"):
        load(tmp_path)


def test_several_configurations(tmp_path):
    write_clone(write_clone(tmp_path, "plain"), "cropped")
    with pytest.raises(DataError, match=r"one configuration.*found 2 .*name the folder of one"):
        load(tmp_path)
    check_clone(load(tmp_path / "plain"))


def test_columns_that_cannot_be_told_apart(tmp_path):
    features = {"kind": {"_type": "ClassLabel"}, "image": {"_type": "Image"}}
    features["other"] = features["kind"]
    with pytest.raises(DataError, match=r"one column of type ClassLabel.*got kind, other; keep"):
        load(write_clone(tmp_path, features=features))


def test_no_image_column(tmp_path):
    features = {"image": {"_type": "Value"}, "kind": {"_type": "ClassLabel"}}
    with pytest.raises(DataError, match=r"one column of type Image.*got image, kind"):
        load(write_clone(tmp_path, features=features))


def test_fine_labels_are_preferred():
    features = {
        "img": {"_type": "Image"},
        "coarse_label": {"_type": "ClassLabel"},
        "fine_label": {"_type": "ClassLabel"},
    }
    assert tables.columns(features, "cifar100") == ("img", "fine_label")


def test_a_parquet_file_cut_short(tmp_path):
    write_clone(tmp_path)
    path = tmp_path / "data" / "train-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"train-00001-of-00002\.parquet.*fetch it again"):
        load(tmp_path)


def test_a_corrupt_image_in_a_parquet_file(tmp_path):
    write_clone(tmp_path)
    path = tmp_path / "data" / "test-00000-of-00001.parquet"
    write_parquet(path, [(png(1), 0), (b"hello", 1)])
    with pytest.raises(DataError, match=r"test-00000-of-00001\.parquet, row 1 \(1\.png\)"):
        load(tmp_path)


# CIFAR


def test_torchvision_cifar_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("ROBUSTIFY_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("cifar10", "cifar100"):
        with pytest.raises(DataError, match=f"expected {name} in {tmp_path}.*ROBUSTIFY_DATA"):
            load(name)


def test_torchvision_cifar(tmp_path, monkeypatch):
    import torchvision.datasets

    class Fake:
        classes = ("cat", "dog", "elk")

        def __init__(self, root, train, download):
            assert (Path(root), download) == (tmp_path / "robustify", True)
            self.data = np.full((6 if train else 3, 32, 32, 3), (200, 100, 50), np.uint8)
            self.targets = [2, 0, 1] * (2 if train else 1)

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    found = load("cifar10")
    assert (found.name, found.source) == ("cifar10", "cifar10")
    assert found.train.images.shape == (6, 3, 32, 32)
    assert found.train.images[0, :, 3, 4].tolist() == [200, 100, 50]
    assert found.train.labels.tolist() == [2, 0, 1, 2, 0, 1]
    assert found.std == pytest.approx([1 / 255] * 3)


def test_the_cifar10_clone(shared):
    found = load(shared / "data" / "cifar10")
    assert (len(found.train), len(found.test), found.image_size) == (50_000, 10_000, 32)
    assert found.class_names[:4] == ("airplane", "automobile", "bird", "cat")
    assert found.class_names[9] == "truck"
    assert found.train.labels[:10].tolist() == [6, 9, 9, 4, 1, 1, 2, 7, 8, 3]
    assert found.test.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert found.mean == pytest.approx([0.4914, 0.4822, 0.4465], abs=1e-4)
    assert found.std == pytest.approx([0.2470, 0.2435, 0.2616], abs=1e-4)
    assert (found.threat, found.policy) == (ThreatModel("Linf", 8 / 255), "crop-flip")
    assert found.train.images[0, :, 0, 0].tolist() == [59, 62, 63]
