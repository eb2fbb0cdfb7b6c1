"""Splits: images with their labels and indices, fetched by the batch in any order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from robustify.images import EncodedImages, KeyedImages, ResizedImages

Images = Tensor | EncodedImages | ResizedImages | KeyedImages
Fetched = tuple[Tensor, Tensor, Tensor]  # uint8 images, labels, indices


class Split(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Images with their labels and indices; a map-style data set that is fetched by the batch.

    `store`: uint8 images, a tensor or something indexed like one. `labels`: (N,) int64. `indices`:
    (N,) int64, which images of `store` these are; a subset keeps them, so they can key an image's
    random numbers.

    A `DataLoader` asks `__getitems__` for whole batches: give it `collate_fn=lambda batch: batch`.
    """

    def __init__(self, store: Images, labels: Tensor, indices: Tensor | None = None) -> None:
        self.store, self.labels = store, labels
        self.indices = torch.arange(len(labels)) if indices is None else indices

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def images(self) -> Tensor:
        """All images, (N, C, H, W) uint8: a copy, decoded now where they are not in memory."""
        return self.store[self.indices]

    def __getitem__(self, position: int) -> tuple[Tensor, Tensor, Tensor]:
        """image (C, H, W) uint8, label () int64, index () int64."""
        images, labels, indices = self.__getitems__([position])
        return images[0], labels[0], indices[0]

    def __getitems__(self, positions: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """images (B, C, H, W) uint8, labels (B,) int64, indices (B,) int64."""
        chosen = torch.as_tensor(positions, dtype=torch.int64, device=self.labels.device)
        indices = self.indices[chosen]
        return self.store[indices], self.labels[chosen], indices

    def batches(self, size: int) -> Iterator[Fetched]:
        """All images in order, `size` at a time, as `__getitems__` gives them."""
        for start in range(0, len(self), size):
            yield self.__getitems__(range(start, min(start + size, len(self))))

    def subset(self, positions: Tensor) -> Split:
        """The images at `positions`, with the indices they had; pixels are shared, not copied."""
        return Split(self.store, self.labels[positions], self.indices[positions])

    def take(self, count: int) -> Split:
        """The first `count` images, or all where there are fewer. The order on loading makes them
        a fair sample of the classes."""
        return self.subset(torch.arange(min(count, len(self)), device=self.labels.device))

    def to(self, device: torch.device | str) -> Split:
        """The same on `device`; images that are decoded batch by batch stay where they are."""
        if not isinstance(self.store, Tensor):
            return self
        return Split(self.store.to(device), self.labels.to(device), self.indices.to(device))
