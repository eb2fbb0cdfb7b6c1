"""A sweep: one run for every combination of the values given, then one comparison of them all.

Each run has a folder of its own, named by its values, and is resumed and compared like any other.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from robustify import comparison, harden, report
from robustify.errors import UsageError
from robustify.files import atomic_write
from robustify.processes import first_holds
from robustify.run_folder import RECORD, locked


def combinations(pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`["temperature=1,5", "lr=0.1,0.2"]` as the settings of four runs by their names, such as
    `temperature=1,lr=0.1`. Values are YAML, lists in brackets. Raises `UsageError`."""
    axes = [[(key, value) for value in values] for key, values in map(_axis, pairs)]
    chosen = list(itertools.product(*axes))
    found = {",".join(f"{key}={_text(value)}" for key, value in one): dict(one) for one in chosen}
    if len(found) < max(2, len(chosen)):
        raise UsageError(f"expected two or more different values to sweep, got {', '.join(pairs)}")
    return found


def _axis(pair: str) -> tuple[str, list[Any]]:
    key, equals, text = pair.partition("=")
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        values = []
    if not equals or not key.strip() or not values:
        raise UsageError(f"expected --sweep key=value,value,…, got {pair!r}")
    return key.strip(), values


def _text(value: Any) -> str:
    """`value` as a part of a folder's name."""
    return re.sub(r"[^\w.+-]+", "_", str(value)).strip("_")


def plan(
    pairs: Sequence[str], settings: Mapping[str, Any], planned: Callable[..., harden.Job]
) -> dict[str, harden.Job]:
    """The jobs of a sweep, by name: `planned(settings=…)` for every combination, over `settings`.

    All are checked before any is run. Raises what `harden.plan` raises.
    """
    jobs: dict[str, harden.Job] = {}
    for name, values in combinations(pairs).items():
        job = planned(settings={**settings, **values})
        if job.find_batch_size:
            raise UsageError(
                "expected a number for --batch-size with --sweep, got auto: runs that are compared "
                "need the same; --dry-run of one of them finds it"
            )
        first = next(iter(jobs.values()), job)
        jobs[name] = replace(job, dataset=first.dataset)  # one copy of the images for all
    return jobs


def run(
    jobs: Mapping[str, harden.Job], out: Path | None = None, *, resume: bool = True
) -> dict[str, Path]:
    """Every job in a folder of its own below `out`, and there comparison.md and comparison.html.

    What is finished is left as it is, what was interrupted goes on. Raises what `harden.run` raises
    and `UsageError` where `out` is itself a run.
    """
    folder = out if out is not None else default_folder(next(iter(jobs.values())))
    if (folder / RECORD).exists():
        raise UsageError(f"expected a folder for several runs, but {folder} is one; name another")
    with first_holds(locked(folder)):
        left = {name: harden.run(job, folder / name, resume=resume) for name, job in jobs.items()}
        if harden.is_first_process():
            contents = [report.read(path) for path in left.values()]
            for suffix, made in (
                ("md", comparison.compare_markdown),
                ("html", comparison.compare_html),
            ):
                atomic_write(folder / f"comparison.{suffix}", made(contents, names=list(left)))
    return left


def default_folder(job: harden.Job) -> Path:
    """Where a sweep goes unless told otherwise."""
    return Path("runs") / f"{harden.name_of(job)}-sweep"
