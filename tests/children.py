"""Commands in processes of their own that start at once, and faults to plant in them.

What takes seconds to import is imported by one server, which forks for every command and has one
thread only, so that nothing can be locked in a fork.
"""

import contextlib
import multiprocessing
import os
import re
import resource
import socket
import sys
import threading
from functools import partial

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["robustify.cli", "robustify.harden", "robustify.sweep", "robustify.attachment",
     "robustify.effort", "robustify.hub", "robustify.robustbench", "tqdm"]
)  # fmt: skip
BAR = re.compile(r"[^\r\]]*(\d+/\d+|verdict) \[[^\]]*\]")


def _child(command, pipes, paths, fault):
    import torch

    from robustify.__main__ import main

    torch.set_num_threads(1)
    for number, (pipe, path) in enumerate(zip(pipes, paths, strict=True), 1):
        opened = os.open(path, os.O_WRONLY) if path else pipe.fileno()
        os.dup2(opened, number)
        pipe.close()
    sys.argv = ["robustify", *map(str, command)]
    with contextlib.ExitStack() as stack:
        if fault is not None:
            stack.enter_context(fault() or contextlib.nullcontext())
        main()


class Child:
    """A running `robustify COMMAND`. `fault` is called in it first, and may return a context;
    `stdout` and `stderr` are files to write to instead of what `end` returns."""

    def __init__(self, *command, fault=None, stdout=None, stderr=None):
        pipes = [SERVER.Pipe(duplex=False) for _ in range(2)]
        writers = [writer for _, writer in pipes]
        self.process = SERVER.Process(
            target=_child, args=(command, writers, (stdout, stderr), fault)
        )
        self.process.start()
        for writer in writers:
            writer.close()
        self.texts = [b"", b""]
        self.readers = [
            threading.Thread(target=self._read, args=(number, reader))
            for number, (reader, _) in enumerate(pipes)
        ]
        for reader in self.readers:
            reader.start()

    def _read(self, number, pipe):
        with pipe:
            while part := os.read(pipe.fileno(), 65536):
                self.texts[number] += part

    def send(self, number):
        os.kill(self.process.pid, number)

    def end(self, timeout=120):
        """Exit code (negative: the signal), stdout, the lines on stderr but those of progress."""
        self.process.join(timeout)
        code = self.process.exitcode
        if code is None:
            self.process.kill()
        for reader in self.readers:
            reader.join()
        out, err = (text.decode() for text in self.texts)
        assert code is not None, f"it hangs: {err}"
        said = re.split(r"[\r\n]+", BAR.sub("", err))
        return code, out, [line for line in said if line and not line.startswith("no --data")]


def robustify(*command, **options):
    """Run it to its end; what `Child.end` returns."""
    return Child(*command, **options).end()


class Ranks:
    """The processes of one `robustify COMMAND`, without a launcher that would end the others when
    one ends. `faults`: what `Child` calls in some of them, by rank."""

    def __init__(self, count, *command, faults=None):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.children = [
            Child(*command, fault=partial(_as_rank, rank, count, port, (faults or {}).get(rank)))
            for rank in range(count)
        ]

    def end(self, timeout=120):
        """What `Child.end` returns, of each."""
        return [child.end(timeout) for child in self.children]


def launch(count, *command):
    """Run COMMAND in so many processes, which must all succeed; what the first one printed."""
    found = Ranks(count, *command).end(500) if count > 1 else [Child(*command).end(500)]
    assert [code for code, _, _ in found] == [0] * count, [said for _, _, said in found]
    assert not any(out for _, out, _ in found[1:])
    return found[0][1]


def _as_rank(rank, count, port, fault):
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    if fault is not None:
        fault()


def at_opening(part, act, *, time=1):
    """Call `act` just before a file whose path holds `part` is opened for the `time`-th time."""
    left = [time]

    def look(event, details):
        if event == "open" and isinstance(details[0], str) and part in details[0]:
            left[0] -= 1
            if left[0] == 0:
                act()

    sys.addaudithook(look)


def no_more_than(size):
    """From now on the system refuses to let any file grow beyond `size` bytes, as on a full
    disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
