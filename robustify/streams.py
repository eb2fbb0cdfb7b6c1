"""Streams: images that are read in order and never all at once.

For what is not on this machine. An image's index is its place before any shuffling, where shards
take turns: image p of shard s, of S, has index p · S + s. It keys the image's random numbers, as
everywhere. An epoch takes the shards in an order of its own, several at a time, and mixes their
images in a buffer, by seed and epoch alone: so a run that was interrupted reads past what it has
done and goes on with the same batches.

Held out, or taken as a sample, are the images of the lowest indices: the first of every shard.
Where images come class by class in few shards, such a sample, and the shuffling, are only as fair
as their order.
"""

from __future__ import annotations

import logging
import random
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TypeVar

import torch
from torch.utils.data import IterableDataset
from tqdm import tqdm

from robustify.errors import DataError
from robustify.images import Encoded, KeyedImages, decode
from robustify.splits import Fetched, Split

log = logging.getLogger(__name__)

BUFFER_IMAGES = 4096  # as in timm's reader of Hub streams
BUFFER_BYTES = 512 << 20  # of encoded images: 4,096 of ImageNet's; of large photographs fewer
OPEN = 8  # shards that are read at the same time; of a parquet file that is one row group of it

Sample = tuple[Encoded, int, int]  # an image, its label and its index
_Kept = TypeVar("_Kept")


@dataclass(frozen=True)
class Origin:
    """Where the images of one split come from: `count` of them in shards, each read from its
    beginning by `read`, which gives images and labels, and raises `DataError`."""

    name: str
    count: int
    shards: Sequence[str]
    read: Callable[[int], Generator[tuple[Encoded, int]]]

    def first(
        self,
        count: int,
        keep: Callable[[list[Sample]], _Kept],
        without: frozenset[int] = frozenset(),
    ) -> list[_Kept]:
        """At least the `count` images of the lowest indices that are not in `without`: of each
        shard its first ones, as `keep` leaves them. Raises `DataError` where there are fewer."""
        bound = count  # of the indices: whatever lies below it is read
        for index in sorted(without):
            bound += index < bound
        if bound >= self.count:  # everything, to the end of the longest shard
            bound = self.count * len(self.shards)
        while True:
            held = Counter(index % len(self.shards) for index in without if index < bound)
            found, kept, exhausted = 0, [], bound >= len(self.shards)
            bar = tqdm(range(min(bound, len(self.shards))), f"reading {self.name}", unit="shard",
                       delay=2, leave=False, disable=None)  # fmt: skip
            for shard in bar:
                places = len(range(shard, bound, len(self.shards)))
                with closing(self.samples(shard, without, places)) as samples:
                    head = list(samples)
                found += len(head)
                exhausted &= len(head) < places - held[shard]
                if head:
                    kept.append(keep(head))
            if found >= count:
                return kept
            if exhausted:
                raise self.fewer(found + len(without))
            bound = max(2 * bound, len(self.shards))  # short shards: more is read of the others

    def samples(
        self, shard: int, without: frozenset[int] = frozenset(), most: int | None = None
    ) -> Generator[Sample]:
        """The images of one shard, but for those whose indices are in `without`; of the first
        `most` alone, where that is said."""
        with closing(self.read(shard)) as read:
            for place, (image, label) in enumerate(islice(read, most)):
                index = place * len(self.shards) + shard
                if index not in without:
                    yield image, label, index

    def fewer(self, found: int) -> DataError:
        """The error that the stream has ended too early."""
        return DataError(
            f"expected {self.count} images in {self.name}, got {found}; a shard is missing or cut "
            "short: restore it, or say the right numbers behind the name as "
            "|TRAINING,TEST"
        )


@dataclass(frozen=True)
class Stream:
    """The images of one split, decoded as they come; `held` are the indices of those left out.

    What needs a split's length, first images or batches in order takes a stream as well.
    """

    origin: Origin
    channels: int
    image_size: int
    held: frozenset[int] = frozenset()
    _taken: list[Split] = field(default_factory=list, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return self.origin.count - len(self.held)

    def take(self, count: int) -> Split:
        """The `count` images of the lowest indices, or all where there are fewer, decoded and held
        in memory from then on."""
        count = min(count, len(self))
        if not self._taken or len(self._taken[0]) < count:
            self._taken[:] = [self._read(count)]
        return self._taken[0].take(count)

    def _read(self, count: int) -> Split:
        parts = self.origin.first(count, self.collate, self.held)
        images, labels, indices = (torch.cat(part) for part in zip(*parts, strict=True))
        order = indices.argsort()[:count]
        indices = indices[order]
        return Split(KeyedImages(images[order], indices), labels[order], indices)

    def split_validation(self, fraction: float, most: int) -> tuple[Stream, Split]:
        """The stream without its validation images, and these: the first of every shard,
        `fraction` of all images and at most `most`."""
        count = max(1, min(most, round(fraction * len(self))))
        validation = self.take(count)
        held = self.held | set(validation.indices.tolist())
        return replace(self, held=held), validation

    def batches(self, size: int) -> Generator[Fetched]:
        """All images in order, `size` at a time: uint8 images, labels and indices."""
        with closing(self._all(range(len(self.origin.shards)), at_once=1)) as samples:
            while batch := list(islice(samples, size)):
                yield self.collate(batch)

    def shuffled(self, seed: int, epoch: int) -> Generator[Sample]:
        """All images, still encoded, in an order that `seed` and `epoch` decide."""
        draw = random.Random(f"{seed} {epoch}")
        shards = list(range(len(self.origin.shards)))
        draw.shuffle(shards)
        buffer: list[Sample] = []
        size = 0
        with closing(self._all(shards, at_once=OPEN)) as samples:
            for sample in samples:
                buffer.append(sample)
                size += _bytes(sample)
                while buffer and (len(buffer) >= BUFFER_IMAGES or size >= BUFFER_BYTES):
                    size -= _bytes(drawn := _pop(buffer, draw))
                    yield drawn
        while buffer:
            yield _pop(buffer, draw)

    def collate(self, samples: Sequence[Sample]) -> Fetched:
        """uint8 images (B, C, H, W), labels (B,) int64, indices (B,) int64."""
        images, labels, indices = zip(*samples, strict=True)
        decoded = decode(images, self.channels, self.image_size)
        return decoded, torch.tensor(labels), torch.tensor(indices)

    def _all(self, shards: Sequence[int], *, at_once: int) -> Generator[Sample]:
        """Every image once, in turn from `at_once` of the shards. Raises `DataError` where they are
        fewer than was said; more than that are left out."""
        waiting = iter(shards)
        reading = deque(self._samples(shard) for shard in islice(waiting, at_once))
        seen = 0
        try:
            while reading:
                samples = reading.popleft()
                sample = next(samples, None)
                if sample is None:
                    reading.extend(self._samples(shard) for shard in islice(waiting, 1))
                    continue
                reading.append(samples)
                if seen == len(self):
                    log.warning(
                        "%s has more than the %d images it was said to have: the rest is left out",
                        self.origin.name, self.origin.count,
                    )  # fmt: skip
                    return
                seen += 1
                yield sample
        finally:
            for samples in reading:
                samples.close()
        if seen < len(self):
            raise self.origin.fewer(seen + len(self.held))

    def _samples(self, shard: int) -> Generator[Sample]:
        return self.origin.samples(shard, self.held)


class Epochs(IterableDataset[Sample]):
    """The shuffled images of a stream, epoch after epoch, for a loader that shares them out among
    `processes`: a few of an epoch's first images fill up its last batch."""

    def __init__(self, stream: Stream, seed: int, processes: int) -> None:
        self.stream, self.seed, self.processes = stream, seed, processes
        self.epoch, self._done = 0, 0

    def __len__(self) -> int:
        return len(self.stream) + self._missing()

    def set_epoch(self, epoch: int) -> None:
        """Accelerate says which epoch begins."""
        self.epoch = epoch

    def skip(self, images: int) -> None:
        """The next pass leaves out its first `images`: they are read, and not decoded."""
        self._done = images

    def __iter__(self) -> Generator[Sample]:
        done, self._done = self._done, 0
        first: list[Sample] = []
        with closing(self.stream.shuffled(self.seed, self.epoch)) as samples:
            for number, sample in enumerate(samples):
                if number < self.processes:
                    first.append(sample)
                if number >= done:
                    yield sample
        for place in range(self._missing()):
            yield first[place % len(first)]

    def _missing(self) -> int:
        return -len(self.stream) % self.processes


def _pop(buffer: list[Sample], draw: random.Random) -> Sample:
    place = draw.randrange(len(buffer))
    buffer[place], buffer[-1] = buffer[-1], buffer[place]
    return buffer.pop()


def _bytes(sample: Sample) -> int:
    content = sample[0].content
    return len(content) if isinstance(content, bytes) else 0
