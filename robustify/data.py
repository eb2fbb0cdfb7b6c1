"""Data sets: a name or a folder in, uint8 images, labels and the default threat model out.

    digits                  1,797 grey 8×8 images, part of this package: no download
    cifar10, cifar100       by torchvision
    FOLDER                  train/ and test/ (or val/, validation/) with one folder per class,
                            or a clone of a Hub data set (parquet files), or WebDataset shards
                            (train-*.tar, test-*.tar)
    PATTERN.tar             WebDataset shards by a pattern: 'shards/{train,val}-*.tar'
    USER/NAME[@REVISION]    a data set on the Hub
    hfids:USER/NAME[@REV]   the same read as a stream, without downloading it first
    wds:FOLDER, wds:URL, wds:PATTERN.tar
                            WebDataset shards read as a stream: from here, https:// or hf://

A folder with the name of a data set is written `./digits`. What is on this machine is read image by
image where it lies, in any order, however large it is; a stream is read from its beginning to its
end (see streams.py), and is for what is not here. `|60000,10000` behind the name of a stream says
how many training and test images it has, `|60000,10000,10` also how many classes, where it does not
say so itself.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import pad

from robustify.errors import DataError, UsageError, suggest
from robustify.images import EncodedImages, Reordered, ResizedImages, Source, decode, resize, survey
from robustify.noise import Noise
from robustify.readers import StreamSource, is_stream, read_stream
from robustify.shards import read_shards
from robustify.sources import CIFAR, read_cifar, read_folder, read_hub
from robustify.splits import Images, Split
from robustify.streams import Stream
from robustify.threat import ThreatModel

log = logging.getLogger(__name__)

Policy = Literal["none", "crop", "crop-flip"]

# An ordinarily trained ResNet-18 (98.6 % clean, seed 0) keeps 33.9 % of the 360 test digits under
# PGD-40 at eps 0.1, 3.1 % at 0.15 and none at 0.2: 0.15 is where it becomes nearly defenceless.
DIGITS_EPS = 0.15
DIGITS_TEST = 360  # the last images; the order goes by writer, so their hands are mostly unseen
IN_MEMORY = 4 << 30  # bytes of decoded images; what is larger is decoded batch by batch
VALIDATION = 5000  # validation images at most, a tenth of CIFAR-10; all are attacked every epoch
_SAMPLE = 2048  # images from which the mean and std of a set on disk are taken


@dataclass(frozen=True)
class DataSet:
    """Training and test images of one set of classes.

    `source` is what `load` takes to load it again. `mean` and `std` are those of the training
    images in [0, 1], per channel. `threat` is what this set is usually defended against, `policy`
    how its training images are augmented. `fingerprint` is the SHA-256 of class names, labels and
    decoded pixels; of file names and sizes instead of pixels where images are decoded per batch.
    """

    name: str
    source: str
    class_names: tuple[str, ...]
    train: Split | Stream
    test: Split | Stream
    in_chans: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    threat: ThreatModel
    policy: Policy
    fingerprint: str

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def split_validation(
        self, fraction: float = 0.1, seed: int = 0
    ) -> tuple[Split | Stream, Split]:
        """The training images without the validation images, and the validation images: `fraction`
        of each class and at least one, chosen by `seed` and the index of each image alone; at most
        `VALIDATION` in all, in the same shares. Of a stream they are its first images in turn from
        every shard.

        Raises `DataError` for a class of one image.
        """
        if not 0 < fraction < 1:
            raise UsageError(f"expected a validation fraction between 0 and 1, got {fraction}")
        if isinstance(self.train, Stream):
            streamed, held = self.train.split_validation(fraction, VALIDATION)
            classes = int((held.labels.bincount() > 0).sum())
            if 2 * classes < min(self.num_classes, len(held)):
                log.warning(
                    "the %d validation images are of %d of %d classes only: the shards of %s are "
                    "sorted by class, and neither selection nor shuffling is fair; read it without "
                    "streaming", len(held), classes, self.num_classes, self.name,
                )  # fmt: skip
            return streamed, held
        labels, indices = self.train.labels.cpu(), self.train.indices.cpu()
        drawn = Noise(seed, indices).bits(1)[:, 0]
        order = drawn.argsort(stable=True)
        order = order[labels[order].argsort(stable=True)]  # class by class, as drawn
        ordered = labels[order]
        size = labels.bincount(minlength=self.num_classes)
        rank = torch.arange(len(labels)) - torch.searchsorted(ordered, ordered)
        if few := (size == 1).nonzero()[:, 0].tolist():
            raise DataError(
                f"expected at least 2 training images of {self.class_names[few[0]]!r}, one of "
                f"them for validation, got 1; add images or remove the class"
            )
        # In doubles and to even, as Python's round.
        count = (fraction * size.double()).round().long().clamp(min=1)
        count = torch.minimum(count, (size - 1).clamp_min(0))
        first = (rank < count[ordered]).nonzero()[:, 0]
        if len(first) > VALIDATION:  # the first of every class come first, then by their share
            share = rank[first].double() / size[ordered[first]]
            first = first[share.argsort(stable=True)[:VALIDATION]]
        chosen = torch.zeros(len(labels), dtype=torch.bool)
        chosen[order[first]] = True
        device = self.train.labels.device
        rest, validation = (mask.nonzero()[:, 0].to(device) for mask in (~chosen, chosen))
        return self.train.subset(rest), self.train.subset(validation)


def load(name_or_path: str | Path = "digits", *, image_size: int | None = None) -> DataSet:
    """Load a data set; see the top of this module for what can be named.

    `image_size`: side of the square images, in pixels; by default what the set has (of mixed sizes
    the median of the shorter sides, at most 224). Raises `DataError` for what cannot be read and
    `UsageError` for a name that means nothing.
    """
    if image_size is not None and image_size < 1:
        raise UsageError(f"expected an image size of at least 1 pixel, got {image_size}")
    name = str(name_or_path)
    if name == "digits":
        return _digits(image_size)
    path = Path(name).expanduser()
    if is_stream(name):
        return _streamed(name, image_size)
    if name in CIFAR:
        return _build(read_cifar(name), name, image_size)
    if path.is_dir():
        return _build(read_folder(path), str(path.resolve()), image_size)
    if name.endswith(".tar") and "://" not in name:
        return _build(read_shards(name), str(Path.cwd() / path), image_size)
    if path.exists():
        raise DataError(
            f"expected a folder with train/ and test/, got the file {path}; name its folder"
        )
    identifier = name.removeprefix("hf-hub:")
    if identifier != name or (identifier.count("/") == 1 and name[0] not in "./~"):
        return _build(read_hub(identifier), name, image_size)
    known = ("digits", *CIFAR)
    if "/" in name:
        raise DataError(f"expected a folder, and {path} does not exist; check the path")
    raise UsageError(
        f"expected {', '.join(known)}, a folder or a Hub data set USER/NAME, got {name!r}"
        + suggest(name, known)
    )


def to_float(images: Tensor) -> Tensor:
    """uint8 images to float32 in [0, 1]; float images as they are."""
    return images if images.is_floating_point() else images.float().div_(255)


def augment(images: Tensor, noise: Noise, policy: str) -> Tensor:
    """Randomly moved and mirrored images, of the same shape, type and device.

    `none`: as they are. `crop`: moved by up to an eighth of their side (4 pixels of 32, 1 of 8)
    each way, zeros moving in. `crop-flip`: also mirrored left to right, half of them. An image is
    treated by its key in `noise` alone; fork the noise by epoch.
    """
    if policy not in get_args(Policy):
        raise UsageError(
            f"expected an augmentation of {', '.join(get_args(Policy))}, got {policy!r}"
            + suggest(policy, get_args(Policy))
        )
    if policy == "none":
        return images
    count, channels, height, width = images.shape
    margin = max(1, min(height, width) // 8)
    drawn = noise.uniform(images.new_empty((count, 3)))
    moved = (drawn[:, :2] * (2 * margin + 1)).long().clamp_max_(2 * margin)
    rows = moved[:, 0, None] + torch.arange(height, device=images.device)
    columns = torch.arange(width, device=images.device).expand(count, width)
    if policy == "crop-flip":
        columns = torch.where(drawn[:, 2:] < 0.5, columns.flip(1), columns)
    columns = moved[:, 1, None] + columns
    image = torch.arange(count, device=images.device)[:, None, None, None]
    channel = torch.arange(channels, device=images.device)[None, :, None, None]
    padded = pad(images, (margin, margin, margin, margin))
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def default_threat(in_chans: int, image_size: int) -> ThreatModel:
    """What a set of such images is usually defended against: Linf 4/255 from 160 pixels (ImageNet),
    8/255 below in colour (CIFAR), and 0.1 below in grey (as for Fashion-MNIST)."""
    if image_size >= 160:
        return ThreatModel("Linf", 4 / 255)
    return ThreatModel("Linf", 8 / 255 if in_chans == 3 else 0.1)


def _digits(image_size: int | None) -> DataSet:
    from safetensors.torch import load_file

    stored = load_file(Path(__file__).with_name("digits.safetensors"))
    images, labels = stored["images"], stored["labels"].long()
    source = Source(
        "digits",
        tuple("0123456789"),
        (images[:-DIGITS_TEST], labels[:-DIGITS_TEST]),
        (images[-DIGITS_TEST:], labels[-DIGITS_TEST:]),
    )
    return _build(source, "digits", image_size, threat=ThreatModel("Linf", DIGITS_EPS))


def _build(
    read: Source, source: str, image_size: int | None, *, threat: ThreatModel | None = None
) -> DataSet:
    """Decode what was read, check it, and describe it."""
    for labels, which in ((read.train[1], "training"), (read.test[1], "test")):
        _check_labels(labels, read.class_names, f"{which} images of {source}")
    train, test = _decoded(read, image_size)
    in_chans, side = train.store.shape[1], train.store.shape[2]
    return _described(
        read, source, train, test, shape=(in_chans, side), sample=_sample(train), threat=threat,
        fingerprint=_fingerprint(read.class_names, train, test, identity=read.identity),
    )  # fmt: skip


def _streamed(name: str, image_size: int | None) -> DataSet:
    """Describe a stream by its first training images."""
    read = read_stream(name)
    _require_classes(read.class_names, f"images of {read.source}")
    heads = read.train.first(min(_SAMPLE, read.train.count), list)
    sample = [image for head in heads for image, _, _ in head]
    is_grey, side = survey([sample])
    channels, side = 1 if is_grey else 3, image_size or side
    train, test = (Stream(origin, channels, side) for origin in (read.train, read.test))
    digest = hashlib.sha256(json.dumps([read.class_names, read.identity, channels, side]).encode())
    return _described(
        read, read.source, train, test, shape=(channels, side), fingerprint=digest.hexdigest(),
        sample=decode(sample, channels, side),
    )  # fmt: skip


def _described(
    read: Source | StreamSource,
    source: str,
    train: Split | Stream,
    test: Split | Stream,
    *,
    shape: tuple[int, int],
    sample: Tensor,
    fingerprint: str,
    threat: ThreatModel | None = None,
) -> DataSet:
    """What follows from channels and side, and from a `sample` (N, C, H, W) of training images."""
    mean, std = _statistics(sample)
    return DataSet(
        name=read.name,
        source=source,
        class_names=read.class_names,
        train=train,
        test=test,
        in_chans=shape[0],
        image_size=shape[1],
        mean=mean,
        std=std,
        threat=threat or default_threat(*shape),
        policy=_default_policy(*shape),
        fingerprint=fingerprint,
    )


def _default_policy(in_chans: int, image_size: int) -> Policy:
    """Grey images are often signs, which mirroring changes. Below 16 pixels the smallest move, of
    one pixel, is as wide as a pen stroke, and slows robust training down."""
    if image_size < 16:
        return "none"
    return "crop-flip" if in_chans == 3 else "crop"


def _require_classes(class_names: Sequence[str], what: str) -> None:
    if len(class_names) < 2:
        raise DataError(
            f"expected at least 2 classes in the {what}, got {len(class_names)}; add another class"
        )


def _check_labels(labels: Tensor, class_names: Sequence[str], what: str) -> None:
    _require_classes(class_names, what)
    if not len(labels):
        raise DataError(f"expected {what}, got none; check the data set")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or high >= len(class_names):
        raise DataError(
            f"expected labels from 0 to {len(class_names) - 1} for the {what}, got {low} to "
            f"{high}; -1 usually means that the labels are withheld: use a split that has them"
        )


def _decoded(read: Source, image_size: int | None) -> tuple[Split, Split]:
    """Both splits at one size and channel count, in memory where they fit."""
    (train, train_labels), (test, test_labels) = read.train, read.test
    if isinstance(train, Tensor) and isinstance(test, Tensor):
        side = image_size or train.shape[2]
        return Split(_at_size(train, side), train_labels), Split(_at_size(test, side), test_labels)
    encoded = [
        (Reordered(part, order), labels[order])
        for part, labels in (read.train, read.test)
        for order in [_fair_order(labels)]
        if not isinstance(part, Tensor)
    ]
    is_grey, side = survey([images for images, _ in encoded])
    channels, side = 1 if is_grey else 3, image_size or side
    fits = (len(train) + len(test)) * channels * side * side <= IN_MEMORY
    splits = []
    for images, labels in encoded:
        lazy = EncodedImages(images, channels, side)
        splits.append(Split(decode(images, channels, side) if fits else lazy, labels))
    return splits[0], splits[1]


def _fair_order(labels: Tensor) -> Tensor:
    """(N,) places. Images that come class by class are taken in turn from each class, so that the
    first n are a fair sample; any other order is kept, because it may be a published one."""
    if not bool((labels.diff() >= 0).all()):
        return torch.arange(len(labels))
    starts = torch.searchsorted(labels, labels)
    turn = torch.arange(len(labels)) - starts
    return turn.argsort(stable=True)


def _at_size(images: Tensor, side: int) -> Images:
    if images.shape[2] == side:
        return images
    if images.shape[:2].numel() * side * side > IN_MEMORY:
        return ResizedImages(images, side)
    return torch.cat([resize(part, side) for part in torch.split(images, 1024)])


def _sample(train: Split) -> Tensor:
    """The training images that speak for all: those in memory, or some of those on disk."""
    if isinstance(train.store, Tensor):
        return train.store
    return train.store[torch.linspace(0, len(train) - 1, min(_SAMPLE, len(train))).long()]


def _statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and std per channel in [0, 1]; exact, from counts of the 256 levels."""
    levels = torch.linspace(0, 1, 256, dtype=torch.float64)
    means, stds = [], []
    for channel in images.unbind(1):
        count = torch.zeros(256, dtype=torch.int64)
        for part in torch.split(
            channel, 4096
        ):  # bincount widens to int64: a bounded copy at a time
            count += torch.bincount(part.flatten(), minlength=256)
        share = count / count.sum()
        mean = float(share.double() @ levels)
        means.append(mean)
        # A constant channel has no spread to divide by; one level of 255 stands in for it.
        stds.append(max(float(share.double() @ (levels - mean) ** 2) ** 0.5, 1 / 255))
    return tuple(means), tuple(stds)


def _fingerprint(class_names: Sequence[str], *splits: Split, identity: Sequence[str] = ()) -> str:
    digest = hashlib.sha256(json.dumps(class_names).encode())
    for split in splits:
        store = split.store
        digest.update(repr(tuple(store.shape)).encode())
        digest.update(split.labels.numpy().tobytes())
        if isinstance(store, ResizedImages):
            store = store.images
        if isinstance(store, Tensor):
            digest.update(store.contiguous().numpy().data)
        elif identity:
            digest.update("\0".join(identity).encode())
        elif isinstance(store, EncodedImages):
            for image in store.encoded:
                digest.update(f"{image.name}\0{image.size_in_bytes()}\0".encode())
    return digest.hexdigest()
