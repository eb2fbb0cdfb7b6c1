"""The loader: the batches of an epoch in its order, and what an interruption left of it."""

from __future__ import annotations

from typing import Any

from accelerate import skip_first_batches
from torch.utils.data import DataLoader

from robustify.splits import Split
from robustify.streams import Epochs, Stream


def new_loader(
    train: Split | Stream, batch_size: int, *, seed: int, processes: int
) -> DataLoader[Any]:
    """Shuffled batches of uint8 images, labels and indices, for Accelerate to prepare.

    It shuffles a split by a seed of its own, one for each epoch, and gives every process its
    batches. A stream is shuffled here; the first process reads it and sends the others theirs.
    """
    if isinstance(train, Stream):
        return DataLoader(Epochs(train, seed, processes), batch_size, collate_fn=train.collate)
    return DataLoader(train, batch_size, shuffle=True, collate_fn=_as_fetched)


def remaining(loader: Any, done: int, *, processes: int) -> Any:
    """`loader` without the first `done` batches of its next epoch."""
    if isinstance(loader.dataset, Epochs):
        if done >= len(loader):
            return ()  # Accelerate's dispatcher cannot do without a batch
        loader.dataset.skip(done * loader.batch_size * processes)
        return loader
    return skip_first_batches(loader, done) if done else loader


def _as_fetched(batch: Any) -> Any:
    """`Split.__getitems__` returns whole batches: nothing is left to collate."""
    return batch
