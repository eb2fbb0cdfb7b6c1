"""Profiling: where the time of a training step goes, by phase and by operator, from three steps."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile, schedule

from robustify.files import atomic_write, replacing

log = logging.getLogger(__name__)

SKIPPED, WARMUP, STEPS = 1, 2, 3  # steps before, steps that warm the profiler up, steps measured
PHASES = ("augmentation", "inner maximisation", "objective", "backward", "optimizer")
_OPERATORS = 15


@contextmanager
def profiling(folder: Path, name: str, *, wanted: bool) -> Iterator[Callable[[], None]]:
    """Something to call after every step. Where `wanted`, leaves in `folder` the table
    `profile-NAME.txt` and the trace `profile-NAME.json`, which Perfetto and Chrome open."""
    if not wanted:
        yield lambda: None
        return
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports on stderr what is not our error
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    taken = 0

    def write(profiler: Any) -> None:
        if taken < SKIPPED + WARMUP + STEPS:
            return  # the stage ended before
        with replacing(folder / f"profile-{name}.json") as path:
            profiler.export_chrome_trace(str(path))
        atomic_write(folder / f"profile-{name}.txt", table(profiler) + "\n")
        log.info("profile of %s: %s", name, folder / f"profile-{name}.txt")

    steps = schedule(wait=SKIPPED, warmup=WARMUP, active=STEPS, repeat=1)
    with profile(activities=activities, schedule=steps, on_trace_ready=write) as profiler:

        def on_step() -> None:
            nonlocal taken
            taken += 1
            profiler.step()

        yield on_step
    if taken < SKIPPED + WARMUP + STEPS:
        log.warning("no profile of %s: expected at least %d steps, got %d",
                    name, SKIPPED + WARMUP + STEPS, taken)  # fmt: skip


def table(profiler: Any) -> str:
    """The phases of a step, in milliseconds and shares, then the operators that take longest."""
    on_gpu = torch.cuda.is_available()
    attribute = "device_time_total" if on_gpu else "cpu_time_total"
    phases = dict.fromkeys(PHASES, 0.0)
    step = 0.0
    for event in profiler.events():
        if event.name.startswith("ProfilerStep"):
            step += event.cpu_time_total
        elif event.name in phases and not _is_within(event, "validation"):
            phases[event.name] += getattr(event, attribute)
    phases["objective"] -= phases["inner maximisation"]  # which it runs
    step = max(step, sum(phases.values()))
    phases["the rest (reading images, validation, waiting)"] = step - sum(phases.values())
    rows = [(key, time / 1000 / STEPS, 100 * time / step) for key, time in phases.items()]
    rows.append(("a step", step / 1000 / STEPS, 100.0))
    operators = profiler.key_averages().table(
        sort_by=f"self_{attribute}", row_limit=_OPERATORS, max_name_column_width=60
    )
    phased = tabulate(rows, headers=["phase", "ms", "%"], floatfmt=".1f")
    return f"{phased}\n\nmean of {STEPS} steps\n\n{operators}"


def _is_within(event: Any, name: str) -> bool:
    parent = event.cpu_parent
    return parent is not None and (parent.name == name or _is_within(parent, name))
