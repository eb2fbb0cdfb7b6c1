"""Processes: which of several this one is, as torchrun or accelerate launch started it.

What they do together they decide together: one that left on its own would leave the others waiting
for it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from robustify.errors import CONTINUES, ElsewhereError, RobustifyError, leaving

# How long a process waits for the others. Launchers notice one that died at once; this is for one
# that hangs. Shards of an evaluation take different times, so it is longer than any should differ.
PATIENCE = timedelta(hours=6)
_BROKEN = (
    "connection closed by peer",  # gloo
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",  # gloo, for a message
    "application timeout caused pair closure",  # gloo, after that
    "remote process exited",  # NCCL
    "watchdog caught collective operation timeout",  # NCCL
    "connection was likely closed",  # the store in which processes meet
    "failed to recv, got 0 bytes",  # the store
    "socket has timed out",  # the store
    "wait timeout after",  # the store
)


def on_cpu() -> bool:
    """Whether there is nothing but the CPU. Accelerate has to be told: on such a machine it would
    otherwise take every launched process for the only one."""
    return not torch.accelerator.is_available()


def this_process() -> PartialState:
    """Accelerate's view of this process: device, index, count, whether it is the first."""
    return PartialState(cpu=on_cpu(), timeout=PATIENCE)


@contextmanager
def first_holds(held: AbstractContextManager[Any]) -> Iterator[None]:
    """Enter `held`, a folder in which the same command goes on, in the first process alone; where
    that raises a `RobustifyError`, the others leave with an `ElsewhereError`."""
    state = this_process()
    with ExitStack() as stack:
        refused: RobustifyError | None = None
        if state.is_main_process:
            try:
                stack.enter_context(held)
            except RobustifyError as error:
                refused = error
        if said(refused and str(refused)) is not None:
            raise refused or ElsewhereError("the first process was refused, and says why")
        with leaving(CONTINUES):
            yield


def said(word: Any) -> Any:
    """What the first process says, in all of them; a plain value."""
    words = [word]
    if this_process().num_processes > 1:
        broadcast_object_list(words)
    return words[0]


def agreed(asked: Callable[[], bool], *, every: int = 1) -> Callable[[], bool]:
    """`asked`, answered alike in all processes: True once it is for one of them.

    Alone, `asked` itself. With several, all of them have to ask equally often, and only every
    `every`-th time do they exchange answers, which on a GPU waits for all work before it.
    """
    state = this_process()
    if state.num_processes == 1:
        return asked
    times = itertools.count(1)

    def ask() -> bool:
        if next(times) % every:
            return False
        answers = torch.tensor(float(asked()), device=state.device)
        torch.distributed.all_reduce(answers)
        return bool(answers > 0)

    return ask


def lost_another(error: BaseException) -> bool:
    """Whether `error` says that another process of this run is gone, or hangs."""
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    said = str(error).lower()
    return several and isinstance(error, RuntimeError) and any(word in said for word in _BROKEN)
