"""What something costs on a machine that is shared: CPU seconds, the least of several."""

from __future__ import annotations

import os
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


def least(
    sides: Mapping[str, Callable[[], object]], *, repeats: int, device: str = "cpu"
) -> dict[str, float]:
    """Seconds of each side: the least of `repeats`, the sides taking turns, after one of each to
    warm up. CPU seconds of this process; on a GPU, which nobody shares, seconds until it is idle.
    """
    for side in sides.values():
        side()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repeats):
        for name, side in sides.items():
            started = _now(device)
            side()
            times[name].append(_now(device) - started)
    return {name: min(each) for name, each in times.items()}


def _now(device: str) -> float:
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class Spent:
    """What a child process took, its own children included in `cpu`."""

    wall: float
    cpu: float
    output: str


def child(words: Sequence[object], *, environment: Mapping[str, str] = ONE_THREAD) -> Spent:
    """Run a command to its end, one thread a process. Raises RuntimeError where it fails."""
    before, started = _of_children(), time.perf_counter()
    done = subprocess.run([*map(str, words)], env=environment, capture_output=True, text=True)
    wall, cpu = time.perf_counter() - started, _of_children() - before
    if done.returncode:
        raise RuntimeError(f"{words} failed:\n{done.stderr[-3000:]}")
    return Spent(wall, cpu, done.stdout)


def _of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
