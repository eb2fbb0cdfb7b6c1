"""Journal: one line per image and attack as it is decided, so that an evaluation can go on.

The first line says which evaluation it is. Lines are appended and flushed one by one: a killed
process loses at most the line it was writing, which is passed over when the journal is read. Each
process of a sharded evaluation appends to a file of its own and reads all of them, so the number of
processes may change in between.
"""

from __future__ import annotations

import errno
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from robustify.errors import RunFolderError
from robustify.files import cause
from robustify.identity import difference

Verdicts = dict[str, dict[int, bool]]  # attack -> image -> still right


class Journal:
    """The verdicts of one evaluation in `folder`; `identity` (plain values) tells it from others.

    Raises `RunFolderError` for a journal of another evaluation, or a folder that cannot be written.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], *, process: int = 0) -> None:
        self.identity = json.loads(json.dumps(identity))
        self.verdicts: Verdicts = {}
        self.path = folder / f"journal-{process}.jsonl"
        for path in sorted(folder.glob("journal-*.jsonl")):
            self._read(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what the disk refused must not come again when the file is closed.
            self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise RunFolderError(
                f"expected a folder that can be written, got {folder}: {error.strerror}; choose "
                "another --out"
            ) from None
        self._begin()

    def done(self, prefix: str) -> Verdicts:
        """The verdicts of attacks called `prefix` + name, by name."""
        found = self.verdicts.items()
        return {k[len(prefix) :]: dict(v) for k, v in found if k.startswith(prefix)}

    def record(self, attack: str, image: int, right: bool) -> None:
        """Append one verdict."""
        self.verdicts.setdefault(attack, {})[image] = right
        self._write({"attack": attack, "image": image, "right": right})

    def close(self) -> None:
        """Close the file; the verdicts stay readable."""
        self.file.close()

    def _begin(self) -> None:
        """Say which evaluation this is, and end a line that a kill tore."""
        written = self.path.read_bytes()
        if b"\n" not in written:  # killed while it said which evaluation it is: nothing is lost
            self.file.truncate(0)
            self._write(self.identity)
        elif not written.endswith(b"\n"):
            self._append(b"\n")

    def _write(self, line: Mapping[str, Any]) -> None:
        self._append(json.dumps(line).encode() + b"\n")

    def _append(self, data: bytes) -> None:
        try:
            while data:
                data = data[self.file.write(data) :]
        except OSError as error:
            raise RunFolderError(
                f"could not write {self.path}: {cause(self.path, error.errno or errno.EIO)}; the "
                "verdicts before it are kept, and the same command goes on from them"
            ) from None

    def _read(self, path: Path) -> None:
        for number, text in enumerate(path.read_bytes().splitlines()):
            try:
                line = json.loads(text)
            except ValueError:
                continue  # torn by a kill; decided again
            if number == 0 and isinstance(line, dict) and line != self.identity:
                raise RunFolderError(
                    f"{path} belongs to another evaluation ({difference(line, self.identity)}); "
                    "choose another --out"
                )
            match line:
                case {"attack": str(attack), "image": int(image), "right": bool(right)}:
                    self.verdicts.setdefault(attack, {})[image] = right
