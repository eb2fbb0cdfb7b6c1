"""Checkpoints: tensors and plain values in one safetensors file whose name holds its own hash.

Written whole or not at all; verified when read; a damaged one gives way to the one before it.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from robustify.errors import RunFolderError
from robustify.files import atomic_write, refusal

log = logging.getLogger(__name__)

State = tuple[dict[str, Tensor], dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run, in `folder`; each `name` keeps its newest `keep` files."""

    def __init__(self, folder: Path, *, keep: int = 2) -> None:
        self.folder = folder
        self.keep = keep

    def save(self, name: str, tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> Path:
        """Write `<name>-<count>-<hash>.safetensors`, then remove what is older than `keep`.

        Raises `RunFolderError` where the folder cannot take it; earlier checkpoints stay.
        """
        last = self.newest(name)
        number = int(last.stem.split("-")[-2]) + 1 if last else 0
        data = _serialized(tensors, values)
        path = self.folder / f"{name}-{number:08d}-{_digest(data)}.safetensors"
        try:
            # Not its parents: where the run's folder is gone, a new one would hide that.
            self.folder.mkdir(exist_ok=True)
            atomic_write(path, data)
        except OSError as error:
            raise RunFolderError(refusal(self.folder, error.errno or errno.EIO)) from error
        except RunFolderError as error:
            raise RunFolderError(f"{error}; {self.kept(name)}") from error
        for old in self._newest_first(name)[self.keep :]:
            old.unlink(missing_ok=True)
        return path

    def load(self, name: str) -> State | None:
        """Tensors and values of the newest sound checkpoint called `name`; None if there is none.

        A file that does not hash to its name is reported and passed over; if every file is damaged
        that is a `RunFolderError`, because starting again would lose the run unasked.
        """
        paths = self._newest_first(name)
        for place, path in enumerate(paths):
            try:
                data = path.read_bytes()
            except OSError:  # the disk cannot read what it stored: the same as damage
                continue
            if _digest(data) != path.stem.rpartition("-")[2]:
                continue
            for damaged in paths[:place]:
                log.warning("checkpoint %s is damaged; falling back to the one before it", damaged)
            length = int.from_bytes(data[:8], "little")
            header = json.loads(data[8 : 8 + length])
            return safetensors.torch.load(data), json.loads(header["__metadata__"]["robustify"])
        if paths:
            raise RunFolderError(
                f"expected a sound checkpoint, but every {name!r} file in {self.folder} is damaged;"
                " start again with --no-resume"
            )
        return None

    def newest(self, name: str) -> Path | None:
        """The newest file called `name`, to be named in messages."""
        return next(iter(self._newest_first(name)), None)

    def kept(self, name: str) -> str:
        """What survives of `name`, as the end of a message."""
        newest = self.newest(name)
        if newest is None:
            return "no checkpoint was written yet"
        return f"the last good checkpoint is {newest}"

    def clear(self) -> None:
        """Remove every checkpoint."""
        for path in self.folder.glob("*.safetensors"):
            path.unlink(missing_ok=True)

    def _newest_first(self, name: str) -> list[Path]:
        return sorted(self.folder.glob(f"{name}-????????-*.safetensors"), reverse=True)


def _serialized(tensors: Mapping[str, Tensor], values: Mapping[str, Any]) -> bytes:
    plain = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    try:
        data: bytes = safetensors.torch.save(plain, metadata={"robustify": json.dumps(values)})
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # its Rust part, where memory ran out
            raise MemoryError("no memory for a copy of the checkpoint") from error
        raise
    return data


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
