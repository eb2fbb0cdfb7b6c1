"""Atomic writing: after any interruption a file is either the old one or the new one, whole.

Written beside its target, flushed to the disk, renamed over it, and the folder flushed as well, so
that neither `kill -9` nor a power cut leaves half a file.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from robustify.errors import RunFolderError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_READ_ONLY = {errno.EROFS, errno.EACCES, errno.EPERM}


def atomic_write(path: str | Path, content: bytes | str) -> None:
    """Write `content` (text as UTF-8) to `path`, which keeps its old content until the end.

    Raises `RunFolderError` when the disk is full or the folder cannot be written.
    """
    data = content.encode() if isinstance(content, str) else content
    with replacing(path) as partial, open(partial, "wb") as file:
        file.write(data)


def make_folder(folder: Path) -> None:
    """Create `folder`, and its parents, unless it is there. Raises `RunFolderError`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(refusal(folder, error.errno or errno.EIO)) from error


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; on leaving the block it takes the place of `path`.

    On any error it is removed and the old file stays. The new file has the mode that the umask
    gives, whatever the writer inside the block chose. Raises `RunFolderError` as `atomic_write`.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        remove_orphans(path.parent, path.name)
        # Opened here and not only by the caller, because the kernel then applies the umask.
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        mode = os.fstat(descriptor).st_mode & 0o777
        os.close(descriptor)
        yield partial
        os.chmod(partial, mode)
        _flush(partial)
        os.replace(partial, path)
    except BaseException as error:
        with suppress(OSError):
            partial.unlink()
        if number := _error_number(error):
            raise RunFolderError(refusal(path, number)) from error
        raise
    _flush_folder(path)


def remove_orphans(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of files called `name` in `folder`; a living process keeps
    its own."""
    for orphan in folder.glob(f".{name}.*.partial"):
        owner = orphan.name.split(".")[-2]
        if owner.isdecimal() and not _is_alive(int(owner)):
            with suppress(OSError):
                orphan.unlink()


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_folder(path: Path) -> None:
    """Make the renaming last. By now the new file is in place, so a failure says something else."""
    try:
        _flush(path.parent)
    except OSError as error:
        # Some network file systems cannot flush a folder and say so; they flush on renaming.
        if error.errno not in {errno.EINVAL, errno.ENOTSUP, errno.EACCES}:
            raise RunFolderError(
                f"{path} is written, but the disk did not confirm it ({error.strerror}); "
                "check the disk before relying on it"
            ) from error


def _error_number(error: BaseException) -> int:
    """The operating system's error number behind `error`, or 0. safetensors and torch report a full
    disk as errors of their own, with the system's words in the message."""
    if isinstance(error, OSError):
        return error.errno or errno.EIO
    if isinstance(error, Exception):
        for number in (*_FULL, *_READ_ONLY):
            if os.strerror(number) in str(error):
                return number
    return 0


def refusal(path: Path, number: int) -> str:
    """One line on the system's error `number`: what could not be written, what survives, what to
    do."""
    survives = "the file as it was is intact" if path.exists() else "nothing was left half-written"
    advice = "check the folder and run the same command again"
    if number in _FULL:
        advice = "free some space and run the same command again"
    elif number in _READ_ONLY:
        advice = "change its permissions or choose another folder"
    elif number == errno.ENOENT:
        advice = "if it was moved or removed, put it back, and run the same command again"
    return f"could not write {path}: {cause(path, number)}; {survives}; {advice}"


def cause(path: Path, number: int) -> str:
    """The system's error `number` on writing `path`, in words."""
    if number in _FULL:
        return "the disk is full"
    if number in _READ_ONLY:
        return f"the folder {path.parent} cannot be written"
    if number == errno.ENOENT:
        return f"{os.strerror(number)}: {path.parent}"
    return os.strerror(number)
