"""Runs killed at random moments, again and again, end like runs that nobody touched.

    pytest -m slow tests/test_soak.py --kills 1000

Each child is a fork of this process (what is imported stays imported, so most kills hit work and
not start-up) and gets SIGKILL, which no program can prepare for. What was decided or trained before
a kill must be there after it, nothing may be decided twice with another outcome, and the last
start must end with the very files of the run never interrupted.
"""

import hashlib
import multiprocessing
import os
import random
import signal
import sys
import time

import pytest

import robustify.examine
import robustify.harden  # noqa: F401  (imported here, so that no fork spends its life importing)
from robustify.__main__ import main

TRAIN = [
    "distill", "--recipe", "peeraid", "--student", "cnn_a", "--image-size", "32", "--batch-size",
    "64", "--max-steps", "60", "--suite", "pgd", "--limit", "20",
    "--set", "training.checkpoint_seconds=0.2", "--out",
]  # fmt: skip
EVALUATE = ["evaluate", "MODEL", "--suite", "standard", "--limit", "40", "--out"]


def start(command):
    """The process id of a fork that runs `robustify COMMAND`, silent and in its own session."""

    def child():
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.argv = ["robustify", *command]
        main()

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def finish(command):
    """Run to the end; seconds it took."""
    started = time.monotonic()
    process = start(command)
    process.join()
    assert process.exitcode == 0, command
    return time.monotonic() - started


def kept(folder, names):
    """sha256 of what a run leaves for others."""
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def soak(command, names, folder, kills):
    """Kill `command` `kills` times at moments drawn anew; every finished run is compared."""
    whole = folder / "whole"
    seconds = finish([*command, str(whole)])
    expected = kept(whole, names)
    moments = random.Random(0)  # over the whole run, its start and its reports included
    killed = runs = 0
    while killed < kills:
        out = folder / f"run-{runs}"
        while killed < kills:
            process = start([*command, str(out)])
            process.join(moments.uniform(0, seconds))
            if process.exitcode is not None:
                assert process.exitcode == 0, f"after {killed} kills: exit {process.exitcode}"
                break
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
        finish([*command, str(out)])
        assert kept(out, names) == expected, f"{out} after {killed} kills"
        runs += 1
    print(f"{command[0]}: {killed} kills over {runs} runs of {seconds:.0f} s, none lost")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A model file to evaluate."""
    out = tmp_path_factory.mktemp("model")
    finish([*TRAIN, str(out)])
    return out / "model.safetensors"


@pytest.mark.slow
def test_a_training_run_loses_nothing(tmp_path, kills):
    soak(TRAIN, ["model.safetensors", "samples.jsonl"], tmp_path, kills)


@pytest.mark.slow
def test_an_evaluation_loses_nothing(model, tmp_path, kills):
    soak([str(model) if a == "MODEL" else a for a in EVALUATE], ["samples.jsonl"], tmp_path, kills)
