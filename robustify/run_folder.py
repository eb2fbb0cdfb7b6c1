"""A run folder: who owns it, which run it holds, and how far that run has come."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from robustify.checkpoint import Checkpoints
from robustify.errors import RunFolderError
from robustify.files import atomic_write

RECORD = "robustify.json"


class RunFolder:
    """`path` and the record in it. The record's `run` part says which run this is: two commands
    that resolve to the same settings are the same run, and the second continues the first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = Checkpoints(path / "checkpoints")

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
                f"expected {file} to hold JSON, but it is damaged; remove the folder or choose "
                "another --out"
            ) from None
        return content if isinstance(content, dict) else {}

    def write(self, name: str, content: str) -> None:
        """Write a text file of the folder, whole or not at all."""
        atomic_write(self.path / name, content.encode())

    def update(self, **entries: Any) -> None:
        """Add to or replace entries of the record."""
        self.write(RECORD, json.dumps({**self.record, **entries}, indent=2) + "\n")

    @contextmanager
    def held(self, run: Mapping[str, Any], *, resume: bool = True) -> Iterator[None]:
        """Hold the folder for `run`: created if absent, locked against a second process.

        Raises `RunFolderError` if it is in use, unwritable, not a run folder, or holds another run;
        `resume=False` starts the run in it anew.
        """
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
            lock = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise RunFolderError(
                f"expected a folder that can be written, got {self.path}: {error.strerror}; choose "
                "another --out"
            ) from None
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunFolderError(
                    f"{self.path} is in use by another robustify process; wait for it or choose "
                    "another --out"
                ) from None
            self._claim(json.loads(json.dumps(run)), resume)
            yield
        finally:
            os.close(lock)

    def _claim(self, run: dict[str, Any], resume: bool) -> None:
        known = self.record.get("run")
        if known is None:
            strangers = {p.name for p in self.path.iterdir()} - {".lock", "checkpoints", RECORD}
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
                f"{self.path} holds another run ({_difference(known, run)}); choose another --out, "
                "or --no-resume to replace it"
            )
        if known is None or not resume:
            self.write(RECORD, json.dumps({"run": run, "status": "training"}, indent=2) + "\n")


def _difference(there: Any, here: Any, path: str = "") -> str:
    """The first setting in which two runs differ."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in [*there, *here]:
            if there.get(key) != here.get(key):
                return _difference(there.get(key), here.get(key), f"{path}.{key}" if path else key)
    return f"{path}: {there} there, {here} here"
