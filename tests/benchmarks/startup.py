"""Start-up: what the command line and the import cost before any work.

    python tests/benchmarks/startup.py [--record]

Least of several, in turns, each in a fresh process with one thread. `over python` is the CPU time
as a multiple of `python -c pass`, `over torch` of `python -c "import torch"`. The last row is the
main job, from its start until the optimizer has made its first step.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

import results
from timing import child

# Exits as soon as an optimizer has made a step.
UNTIL_FIRST_STEP = """
import os, sys
from torch.optim.optimizer import register_optimizer_step_post_hook
register_optimizer_step_post_hook(lambda *_: os._exit(0))
from robustify.__main__ import main
main()
sys.exit("expected a step of the optimizer")
"""


def main() -> None:
    """Measure every command and print one table."""
    parser = results.parser(__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    robustify = [sys.executable, "-m", "robustify"]
    code = [sys.executable, "-c"]
    commands = {
        "python -c pass": [*code, "pass"],
        "import torch": [*code, "import torch"],
        "import robustify": [*code, "import robustify"],
        "robustify --version": [*robustify, "--version"],
        "robustify --help": [*robustify, "--help"],
        "robustify recipes list": [*robustify, "recipes", "list"],
    }
    repeats = 1 if arguments.quick else arguments.repeats
    with tempfile.TemporaryDirectory() as folder:
        student = "cnn_a" if arguments.quick else "resnet18"
        words = ["distill", "--recipe", "peeraid", "--student", student, "--max-steps", "1"]
        line = " ".join(("robustify", *words)) + ", first step"
        commands[line] = [*code, UNTIL_FIRST_STEP, *words, "--out", f"{folder}/run", "--no-resume"]
        rows = measure(commands, repeats)
    title = "Seconds of a fresh process"
    results.show("startup", {title: rows}, record=arguments.record)


def measure(commands: dict[str, Sequence[str]], repeats: int) -> list[results.Row]:
    """A row for each command: least wall and CPU seconds, and the ratios of the latter."""
    wall, cpu = ({name: float("inf") for name in commands} for _ in range(2))
    for _ in range(repeats):
        for name, words in commands.items():
            spent = child(words)
            wall[name], cpu[name] = min(wall[name], spent.wall), min(cpu[name], spent.cpu)
    return [
        {
            "command": f"`{name}`",
            "seconds": wall[name],
            "CPU seconds": cpu[name],
            "over python": cpu[name] / cpu["python -c pass"],
            "over torch": cpu[name] / cpu["import torch"],
        }
        for name in commands
    ]


if __name__ == "__main__":
    main()
