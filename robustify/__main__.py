"""`robustify`, and `python -m robustify`: exit codes and one-line errors."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import click

from robustify.errors import CONTINUES, ElsewhereError, RobustifyError, what_survives

_OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}


def main() -> None:
    """Run the command line and exit with its code: 0 done, 1 failed, 2 wrong usage,
    3 `--fail-under` not met, 130 interrupted."""
    with _unfailing_stderr(), _terminated_as_interrupted():
        _main()


def _main() -> None:
    debug = "--debug" in sys.argv[1:]
    logging.basicConfig(format="%(message)s", level=logging.WARNING, stream=sys.stderr)
    logging.getLogger("robustify").setLevel(logging.INFO if _speaks() else logging.ERROR)
    # timm warns that a cosine of one epoch does not fall: it is not meant to.
    logging.getLogger("timm.scheduler").setLevel(logging.ERROR)
    logging.getLogger("huggingface_hub").propagate = False  # it prints its warnings itself
    try:
        from robustify.cli import robustify

        code = robustify.main(standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort) as error:  # click makes the one of the other
        if _speaks():
            survives = what_survives(error)
            click.echo(f"interrupted; {survives}" if survives else "interrupted", err=True)
        sys.exit(130)
    except RobustifyError as error:
        if debug:
            raise
        if not isinstance(error, ElsewhereError):
            click.echo(f"robustify: {error}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        _give_up_stdout()
        sys.exit(1)
    except Exception as error:
        line = _in_words(error)
        if debug or line is None:
            raise
        click.echo(f"robustify: {line}", err=True)
        _give_up_stdout()
        sys.exit(1)


def _speaks() -> bool:
    """Whether this is the one of several processes that speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def _in_words(error: Exception) -> str | None:
    """One line for what the machine refused, wherever that happened; None for anything else."""
    from robustify.memory import ran_out
    from robustify.processes import lost_another

    kept = "what was there before is as it was"
    if what_survives(error) == CONTINUES:
        kept = f"what was saved is intact, and {CONTINUES}"
    if ran_out(error):
        return f"out of memory; {kept}; with more memory free, or a smaller --batch-size"
    if lost_another(error):
        return (
            f"another process of this run ended or cannot be reached; {kept}; --debug before the "
            "command shows what came"
        )
    if not isinstance(error, OSError) or error.errno not in _OF_THE_DISK:
        return None
    if error.filename is None:
        return f"could not print the answer: {error.strerror}; files that were written are whole"
    return f"could not use {error.filename}: {error.strerror}; {kept}"


def _give_up_stdout() -> None:
    """Nobody can have what is left of the answer; else Python would try again, and complain."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Unfailing(io.RawIOBase):
    """A descriptor to write to; what it does not take is lost, and nothing else is."""

    def __init__(self, number: int) -> None:
        self._number = number

    def write(self, data: Any, /) -> int:
        """All of `data` counts as written."""
        left = memoryview(data)
        try:
            while left:
                left = left[os.write(self._number, left) :]
        except OSError:
            pass
        return len(data)

    def writable(self) -> bool:
        """It is."""
        return True

    def fileno(self) -> int:
        """The descriptor."""
        return self._number

    def isatty(self) -> bool:
        """Whether somebody watches."""
        return os.isatty(self._number)


@contextmanager
def _unfailing_stderr() -> Iterator[None]:
    """No progress bar and no log line may end a run because the disk that takes them is full."""
    before = sys.stderr
    try:
        raw = _Unfailing(before.fileno())
    except (AttributeError, OSError, ValueError):  # not a file of the system: nothing can be full
        yield
        return
    sys.stderr = io.TextIOWrapper(
        raw,
        encoding=before.encoding, errors="backslashreplace", line_buffering=True,
    )  # fmt: skip
    try:
        yield
    finally:
        sys.stderr.flush()
        sys.stderr = before


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM, by which launchers and schedulers end a process, is told like Ctrl-C."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: whoever owns the signals keeps them
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
