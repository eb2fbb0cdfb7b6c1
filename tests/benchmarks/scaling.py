"""Scaling over CPU processes: `distill` and `evaluate` under torchrun, one thread each.

    python tests/benchmarks/scaling.py [--record]

PeerAiD on `cnn_a`, a network without BatchNorm, with the same global batch for every number of
processes: so the losses after the short run are to be the same, and are compared. An evaluation is
to give the same verdicts: `samples.jsonl` is hashed. A rate is taken between a short and a long
run, which removes start-up (--quick makes one run of each, start-up included). `images/s` is by the
clock, so it shows the cores that were free; `images/CPU s`, over all processes, shows what working
together costs on any number of cores. Efficiency is against one process.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import results
from timing import ONE_THREAD, Spent, child

BATCH = 64  # over all processes


def main() -> None:
    """Measure both commands and print a table for each."""
    parser = results.parser(__doc__)
    parser.add_argument("--processes", default="1,2,4")
    parser.add_argument("--repeats", type=int, default=1)
    arguments = parser.parse_args()
    counts, repeats = [*map(int, arguments.processes.split(","))], arguments.repeats
    steps, limits, suite = (2, 152), (8, 72), "standard"
    if arguments.quick:
        counts, steps, limits, suite, repeats = [1], (0, 1), (0, 4), "fgsm", 1
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        training = training_rows(folder, counts, steps, repeats)
        evaluation = evaluation_rows(folder, counts, suite, limits, repeats)
    cores = len(os.sched_getaffinity(0))
    where = f"{cores} core{'s' * (cores > 1)}"
    tables = {
        f"`distill --recipe peeraid --student cnn_a`, digits at 32 px, global batch {BATCH}, "
        f"{where}": training,
        f"`evaluate --suite {suite}` of what one process trained, {where}": evaluation,
    }
    results.show("scaling", tables, record=arguments.record)


def launch(processes: int, *words: object) -> Spent:
    """A command under torchrun, or alone."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", processes]
    start = [sys.executable, *(launcher if processes > 1 else []), "-m", "robustify"]
    return child([*start, *words], environment={**ONE_THREAD, "HF_HUB_OFFLINE": "1"})


def between(
    run: Callable[[int], Spent], short: int, long: int, images: int, repeats: int
) -> tuple[float, float]:
    """Images per second and per CPU second of what the long run does more than the short one;
    nan where the difference drowned in noise."""
    nothing = [Spent(0, 0, "")]
    fewer, more = ([run(n) for _ in range(repeats)] if n else nothing for n in (short, long))
    wall, cpu = (
        min(getattr(spent, clock) for spent in more) - min(getattr(spent, clock) for spent in fewer)
        for clock in ("wall", "cpu")
    )
    return tuple(images / seconds if seconds > 0 else math.nan for seconds in (wall, cpu))


def training_rows(
    folder: Path, counts: list[int], steps: tuple[int, int], repeats: int
) -> list[results.Row]:
    """Rates of `distill` and how far its loss is from that of one process."""
    rows, losses = [], {}

    def run(processes: int, count: int) -> Spent:
        out = folder / f"distill-{processes}"
        spent = launch(
            processes, "distill", "--recipe", "peeraid", "--student", "cnn_a", "--image-size", 32,
            "--set", "training.optimizer=momentum", "--lr", 0.01, "--max-steps", count,
            "--batch-size", BATCH // processes, "--suite", "fgsm", "--limit", 4, "--no-resume",
            "--out", out,
        )  # fmt: skip
        last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
        losses.setdefault(processes, last["loss"])  # of the short run: then rounding adds up
        return spent

    for processes in counts:
        images = (steps[1] - steps[0]) * BATCH
        rates = between(lambda count, p=processes: run(p, count), *steps, images, repeats)
        apart = abs(losses[processes] / losses[counts[0]] - 1)
        rows.append(
            _row(processes, rates, rows)
            | {"loss apart": f"{apart:.0e}" if processes != counts[0] else None}
        )
    return rows


def evaluation_rows(
    folder: Path, counts: list[int], suite: str, limits: tuple[int, int], repeats: int
) -> list[results.Row]:
    """Rates of `evaluate` and the hash of its verdicts."""
    rows, numbers = [], itertools.count()
    outs: dict[int, Path] = {}  # of the last run, which is the longest, by processes

    def run(processes: int, limit: int) -> Spent:
        # A folder of its own: an evaluation that is finished would not be made again.
        out = outs[processes] = folder / f"evaluate-{next(numbers)}"
        return launch(
            processes, "evaluate", folder / f"distill-{counts[0]}", "--suite", suite,
            "--limit", limit, "--out", out,
        )  # fmt: skip

    for processes in counts:
        images = limits[1] - limits[0]
        rates = between(lambda limit, p=processes: run(p, limit), *limits, images, repeats)
        samples = (outs[processes] / "samples.jsonl").read_bytes()
        digest = hashlib.sha256(samples).hexdigest()[:12]
        rows.append(_row(processes, rates, rows) | {"samples.jsonl": digest})
    return rows


def _row(processes: int, rates: tuple[float, float], rows: list[results.Row]) -> results.Row:
    first = rows[0] if rows else {"images/s": rates[0], "images/CPU s": rates[1]}
    return {
        "processes": processes,
        "images/s": rates[0],
        "efficiency": rates[0] / first["images/s"] / processes,
        "images/CPU s": rates[1],
        "of one process": rates[1] / first["images/CPU s"],
    }


if __name__ == "__main__":
    main()
