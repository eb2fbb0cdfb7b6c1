"""What can go wrong, as one tree; the command line prints these as one line each.

    RobustifyError            1   something failed; the message says what survives
    ├── UsageError            2   a name, setting or flag is wrong
    ├── ModelError            1   a classifier cannot be read, built or used
    ├── DataError             1   a data set cannot be read or does not fit
    ├── RunFolderError        1   a run folder is in use, foreign, unwritable or damaged
    ├── TrainingError         1   training cannot go on
    ├── HubError              1   the Hub refused, or cannot be reached
    └── ElsewhereError        1   another process of this run failed, and says why itself

The number is the exit code. A message says what was expected, what came, and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

CONTINUES = "the same command continues"
NOTHING_KEPT = "nothing was kept (evaluate --out FOLDER keeps every verdict)"


class RobustifyError(Exception):
    """Base of every error that robustify raises on purpose."""

    exit_code = 1


class UsageError(RobustifyError):
    """A name, setting or flag is wrong."""

    exit_code = 2


class ModelError(RobustifyError):
    """A classifier cannot be read, built or used."""


class DataError(RobustifyError):
    """A data set cannot be read or does not fit."""


class RunFolderError(RobustifyError):
    """A run folder is in use, foreign, unwritable or damaged."""


class TrainingError(RobustifyError):
    """Training cannot go on."""


class HubError(RobustifyError):
    """The Hub refused, or cannot be reached."""


class ElsewhereError(RobustifyError):
    """Another process of this run failed, and says why itself."""


@contextmanager
def leaving(survives: str) -> Iterator[None]:
    """What ends the block carries `survives`, CONTINUES or NOTHING_KEPT, for `what_survives`."""
    try:
        yield
    except BaseException as error:
        error.add_note(survives)
        raise


def what_survives(error: BaseException | None) -> str | None:
    """What `error`, or one behind it, was given by `leaving`, the innermost first; None where it
    comes from no such block."""
    while error is not None:
        for note in getattr(error, "__notes__", ()):
            if note in (CONTINUES, NOTHING_KEPT):
                return str(note)
        error = error.__cause__ or error.__context__
    return None


def suggest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'peeraid'?"` for the nearest of `known`, or an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""
