"""The loader: the batches of an epoch in its order, read one ahead, and what an interruption left.

Images that come from files or streams are fetched and decoded in a thread, a batch while the one
before it is trained on. Accelerate's own iteration stays where it is: it notes the last batch of an
epoch, for accumulated gradients, and exchanges batches between processes.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import closing
from queue import SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from accelerate import skip_first_batches
from accelerate.data_loader import DataLoaderShard
from torch import Tensor
from torch.utils.data import DataLoader

from robustify.splits import Fetched, Split
from robustify.streams import Epochs, Stream

_PATIENCE = 10.0  # seconds for a read to end that nobody waits for any more
_Read = TypeVar("_Read")


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


def batches(loader: Any, done: int = 0, *, processes: int) -> Generator[Fetched]:
    """The next epoch of a prepared `loader` without its first `done` batches. Close it where it is
    left early: a thread may be reading."""
    if isinstance(loader.dataset, Epochs):
        if done >= len(loader):
            return  # Accelerate's dispatcher cannot do without a batch
        loader.dataset.skip(done * loader.batch_size * processes)
    elif done:
        loader = skip_first_batches(loader, done)
    # Where one process reads for others, they exchange batches while they iterate: not ahead.
    alone = processes == 1 or isinstance(loader, DataLoaderShard)
    if alone and _has_to_read(loader.dataset):
        loader.base_dataloader = _Ahead(loader.base_dataloader)
    with closing(iter(loader)) as found:
        yield from found


def one_ahead(reads: Iterator[_Read]) -> Generator[_Read]:
    """`reads`, each begun in a thread as soon as the one before has been handed out. What a read
    raises is raised here; leaving early waits for a read that has begun, though not for ever."""
    asked: SimpleQueue[bool] = SimpleQueue()
    answers: SimpleQueue[tuple[list[_Read], BaseException | None]] = SimpleQueue()

    def read() -> None:
        while asked.get():
            try:
                answers.put(([next(reads)], None))
            except StopIteration:
                answers.put(([], None))
            except BaseException as error:
                answers.put(([], error))

    # A daemon: a program ends although a server does not answer.
    thread = Thread(target=read, name="read-ahead", daemon=True)
    thread.start()
    try:
        asked.put(True)
        while True:
            found, error = answers.get()
            if error is not None:
                raise error
            if not found:
                return
            asked.put(True)
            yield found[0]
    finally:
        asked.put(False)
        thread.join(_PATIENCE)


class _Ahead:
    """What Accelerate iterates over, read one batch ahead; in all else what it was."""

    def __init__(self, loader: Any) -> None:
        self.loader: Any = loader.loader if isinstance(loader, _Ahead) else loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Generator[Fetched]:
        return one_ahead(iter(self.loader))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)


def _has_to_read(images: Split | Epochs) -> bool:
    """Whether a batch takes more than indexing a tensor in memory."""
    return isinstance(images, Epochs) or not isinstance(images.store, Tensor)


def _as_fetched(batch: Any) -> Any:
    """`Split.__getitems__` returns whole batches: nothing is left to collate."""
    return batch
