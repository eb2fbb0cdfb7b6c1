"""Commands in processes of their own that start at once, with faults that the system itself makes.

What takes seconds to import is imported by one server, which forks for every command; the server
has one thread, so nothing can be locked in a fork.
"""

import contextlib
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["robustify.cli", "robustify.harden", "robustify.sweep", "robustify.attachment",
     "robustify.effort", "robustify.hub", "robustify.robustbench", "tqdm"]
)  # fmt: skip

TRAIN = [
    "distill", "--recipe", "pgd_at", "--student", "cnn_a", "--image-size", "32", "--batch-size",
    "256", "--train-limit", "700", "--set", "training.checkpoint_seconds=0", "--epochs", "2",
    "--suite", "apgd-ce", "--limit", "12",
]  # fmt: skip
PROGRESS = re.compile(r"step/s|s/step|verdict/s|s/verdict|verdict \[|^no --data")
LEFT = ["model.safetensors", "config.json", "samples.jsonl", "metrics.jsonl"]


def _child(command, stdout, stderr, fault):
    import torch

    from robustify.__main__ import main

    torch.set_num_threads(1)
    for number, path in ((1, stdout), (2, stderr)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666), number)
    sys.argv = ["robustify", *map(str, command)]
    with contextlib.ExitStack() as stack:
        if fault is not None:
            stack.enter_context(fault() or contextlib.nullcontext())
        main()


class Child:
    """A running `robustify COMMAND`; `fault` is called in it first, and may return a context."""

    def __init__(self, *command, fault=None, stdout=None, stderr=None):
        self.folder = Path(tempfile.mkdtemp())
        self.stdout, self.stderr = stdout or self.folder / "out", stderr or self.folder / "err"
        self.process = SERVER.Process(
            target=_child, args=(command, self.stdout, self.stderr, fault)
        )
        self.process.start()

    def send(self, number):
        os.kill(self.process.pid, number)

    def end(self, timeout=120):
        """Exit code (negative for a signal), stdout, the lines of stderr that are no progress."""
        self.process.join(timeout)
        assert self.process.exitcode is not None, "it hangs"
        texts = []
        for path in (self.stdout, self.stderr):
            regular = path.is_file()
            texts.append(path.read_text() if regular else "")
        shutil.rmtree(self.folder)
        lines = [line.rpartition("\r")[2] for line in texts[1].split("\n")]
        said = [line for line in lines if line and not PROGRESS.search(line)]
        return self.process.exitcode, texts[0], said


def robustify(*command, **options):
    """Run it to its end: exit code, stdout, what it said on stderr."""
    return Child(*command, **options).end()
