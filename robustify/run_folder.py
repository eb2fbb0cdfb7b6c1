"""A run folder: who owns it, which run it holds, and how far that run has come."""

from __future__ import annotations

import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from robustify.checkpoint import Checkpoints
from robustify.errors import RunFolderError
from robustify.files import atomic_write, remove_orphans
from robustify.identity import difference

log = logging.getLogger(__name__)

RECORD = "robustify.json"
LOCK = ".lock"


class RunFolder:
    """`path` and the record in it. The record's `run` part says which run this is: two commands
    that resolve to the same settings are the same run, and the second continues the first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")
        self._lock: int | None = None

    @property
    def record(self) -> dict[str, Any]:
        """What robustify.json holds; empty for a new folder."""
        file = self.path / RECORD
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError:
            raise RunFolderError(
                f"expected {file} to hold JSON, but it is damaged, so nobody can tell which run "
                "this is; start it again with --no-resume or choose another --out"
            ) from None
        return content if isinstance(content, dict) else {}

    def write(self, name: str, content: str) -> None:
        """Write a text file of the folder, whole or not at all."""
        self.require_own()
        atomic_write(self.path / name, content.encode())

    def update(self, **entries: Any) -> None:
        """Add to or replace entries of the record."""
        self.write(RECORD, json.dumps({**self.record, **entries}, indent=2) + "\n")

    def require_own(self) -> None:
        """Raise `RunFolderError` where the folder is no longer the one that is held: moved, removed
        or replaced."""
        if self._lock is None:
            return
        try:
            same = os.path.samestat(os.fstat(self._lock), os.stat(self.path / LOCK))
        except OSError:
            same = False
        if not same:
            raise RunFolderError(
                f"{self.path}, or the .lock in it, was moved or removed while this run went on; "
                "put it back, and the same command goes on from its last checkpoint"
            )

    @contextmanager
    def held(self, run: Mapping[str, Any], *, resume: bool = True) -> Iterator[None]:
        """Hold the folder for `run`: created if absent, locked against a second process.

        Raises `RunFolderError` if it is in use, unwritable, not a run folder, or holds another run;
        `resume=False` starts the run in it anew.
        """
        with locked(self.path) as self._lock:
            self._claim(json.loads(json.dumps(run)), resume)
            for folder in (self.path, self.checkpoints.folder):
                remove_orphans(folder)
            try:
                yield
            except BaseException:
                self._say_interrupted()
                raise
            finally:
                self._lock = None

    def _say_interrupted(self) -> None:
        """Record that this start ends with a word, so that the next one can tell a kill from it."""
        with suppress(RunFolderError):  # what ends it may be a full disk
            if self.record.get("status") == "training":
                self.update(status="interrupted")

    def _claim(self, run: dict[str, Any], resume: bool) -> None:
        known = self._known(resume)
        if known is None:
            names = {p.name for p in self.path.iterdir() if p.suffix != ".partial"}
            strangers = names - {LOCK, "checkpoints", RECORD}
            if strangers:
                raise RunFolderError(
                    f"expected a new folder or a run's, but {self.path} holds {min(strangers)!r}; "
                    "choose another --out"
                )
        elif not resume:
            self.checkpoints.clear()
            for name in ("model.safetensors", "report.json", "report.md", "report.html"):
                (self.path / name).unlink(missing_ok=True)  # they speak of the run before
        elif known != run:
            raise RunFolderError(
                f"{self.path} holds another run ({difference(known, run)}); choose another --out, "
                "or --no-resume to replace it"
            )
        if known is None or not resume:
            self.write(RECORD, json.dumps({"run": run, "status": "training"}, indent=2) + "\n")
        elif self.record.get("status") == "interrupted":
            self.update(status="training")
        elif self.record.get("status") == "training":
            log.warning(
                "the last start of this run ended without a word (killed, a power cut, a full "
                "disk, or out of memory: dmesg names what the kernel killed); going on from what "
                "it saved"
            )

    def _known(self, resume: bool) -> Any:
        """The run that is recorded here, None for a new folder; a damaged record is passed over
        where the run starts anew."""
        try:
            return self.record.get("run")
        except RunFolderError:
            if resume:
                raise
            return {}


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Hold `folder`, created if absent, against every other process; gives the lock's descriptor.

    Raises `RunFolderError` if it is in use or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise RunFolderError(
            f"expected a folder that can be written, got {folder}: {error.strerror}; choose "
            "another --out"
        ) from None
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise RunFolderError(
                f"{folder} is in use by another robustify process; wait for it or choose "
                "another --out"
            ) from None
        except OSError as error:  # some network file systems have no locks
            log.warning(
                "%s cannot be locked (%s): see to it that nothing else writes there",
                folder, error.strerror,
            )  # fmt: skip
        yield lock
    finally:
        os.close(lock)
