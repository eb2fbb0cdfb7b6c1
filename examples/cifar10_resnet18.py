"""CIFAR-10, ResNet-18, Linf 8/255: PeerAiD's short schedule, then AutoAttack on every test image.

    python examples/cifar10_resnet18.py --minutes 9

Each call goes on where the last one stopped, in training and in evaluation, and stops by itself
after `--minutes` (exit code 130): repeat it until it prints the table. Without the option, one call
does everything. Needs a GPU for the whole; `--train-limit 500 --max-steps 20 --limit 50 --suite
fast` tries it on a CPU.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
from tabulate import tabulate

from robustify.harden import distill  # imported whole: no interrupt is lost in an import
from robustify.report import interval, percent, read

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--recipe", default="peeraid")
parser.add_argument("--student", default="resnet18")
parser.add_argument("--data", default="cifar10", help="or a folder with a clone of it")
parser.add_argument("--preset", help="of the recipe; by default its short schedule")
parser.add_argument("--epochs", type=int)
parser.add_argument("--seed", type=int, default=0)
parser.add_argument("--suite", default="standard")
parser.add_argument("--train-limit", type=int)
parser.add_argument("--max-steps", type=int)
parser.add_argument("--limit", type=int, help="evaluate on the first N test images")
parser.add_argument("--minutes", type=float, help="stop after so long, to go on another time")
parser.add_argument("--out", type=Path, default=Path("runs/cifar10-resnet18"))
arguments = parser.parse_args()

pieces = arguments.out.with_name(arguments.out.name + ".pieces.jsonl")


def note(seconds):
    """Add what this call took to those before it; their number and their sum in minutes."""
    pieces.parent.mkdir(parents=True, exist_ok=True)
    with pieces.open("a") as file:
        file.write(json.dumps({"seconds": round(seconds, 1)}) + "\n")
    taken = [json.loads(line)["seconds"] for line in pieces.read_text().splitlines()]
    return len(taken), sum(taken) / 60


stopping = threading.Event()


def stop_after(minutes):
    """Ask this program to stop, again and again: an interrupt that lands in a destructor is lost,
    and training, which is finishing its step by then, takes no second SIGTERM for another one."""
    stopping.wait(60 * minutes)
    while not stopping.is_set():
        os.kill(os.getpid(), signal.SIGTERM)
        stopping.wait(0.5)


def interrupt(number, frame):
    """What training does by itself, for all that comes before and after it."""
    if not stopping.is_set():
        raise KeyboardInterrupt


signal.signal(signal.SIGTERM, interrupt)
started = time.monotonic()
try:
    if arguments.minutes is not None:
        threading.Thread(target=stop_after, args=(arguments.minutes,), daemon=True).start()
    folder = distill(
        arguments.recipe, arguments.student, dataset=arguments.data, preset=arguments.preset,
        settings={} if arguments.epochs is None else {"training.epochs": arguments.epochs},
        norm="Linf", eps=8 / 255, seed=arguments.seed, suite=arguments.suite,
        limit=arguments.limit, train_limit=arguments.train_limit, max_steps=arguments.max_steps,
        precision="bf16" if torch.cuda.is_available() else "fp32", out=arguments.out,
    )  # fmt: skip
except KeyboardInterrupt:
    stopping.set()
    calls, minutes = note(time.monotonic() - started)
    print(f"{calls} calls, {minutes:.1f} minutes so far; the same command goes on from here")
    sys.exit(130)

stopping.set()
calls, minutes = note(time.monotonic() - started)
report = read(folder)
stages = json.loads((folder / "robustify.json").read_text())["stages"]
times = [(f"train: {stage['stage']}", stage["seconds"] / 60) for stage in stages]
rest = minutes - sum(taken for _, taken in times)
times.append(("evaluate, checks and start-up, of all calls", rest))
print(tabulate([*times, (f"everything, {calls} calls", minutes)], headers=["stage", "minutes"],
               floatfmt=".2f"))  # fmt: skip
threat = report["threat_model"]
print(f"\n{threat['norm']} {threat['eps_text']}, suite {report['suite']}, n = {report['n']:,}, "
      f"seed {report['seed']}: clean {percent(report['clean_accuracy'])}, robust "
      f"{percent(report['robust_accuracy'])} ({interval(report['interval'])}), "
      f"{report['verdict']['status']}; loss curves in {folder / 'metrics.jsonl'}")  # fmt: skip
