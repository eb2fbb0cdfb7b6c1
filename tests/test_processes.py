"""Several processes: the same losses and the same verdicts as one, and an end together.

Most of them are forked here, without a launcher: what it would do for them, ending all when one
has ended, they have to do themselves.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import torch
from children import Ranks, at_opening, launch
from safetensors import safe_open

from robustify.processes import lost_another
from robustify.run_folder import RECORD, locked

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
TRAIN = [
    "distill", "--recipe", "peeraid", "--student", "cnn_a", "--image-size", "32", "--train-limit",
    "500", "--set", "training.optimizer=momentum", "--lr", "0.01", "--suite", "pgd", "--limit",
    "40", "--max-steps",
]  # fmt: skip
SHORT = [*TRAIN, "12", "--batch-size", "32", "--set", "training.checkpoint_seconds=0", "--set",
         "attack.steps=2", "--suite", "apgd-ce", "--limit", "16", "--out"]  # fmt: skip
LOST = (
    "robustify: another process of this run ended or cannot be reached; what was saved is "
    "intact, and the same command continues; --debug before the command shows what came"
)


def losses(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])


def left(folder):
    """What must be the same whatever happened on the way."""
    names = ("model.safetensors", "samples.jsonl", "metrics.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """PeerAiD on a network without BatchNorm, the batch divided by one, two and four."""
    folders = {}
    for count in (1, 2, 4):
        folders[count] = tmp_path_factory.mktemp("runs") / str(count)
        launch(count, *TRAIN, "6", "--batch-size", 64 // count, "--out", folders[count])
    return folders


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a short run of two processes that nothing happens to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    launch(2, *SHORT, folder)
    return folder


def test_several_processes_have_the_losses_of_one_with_a_larger_batch(runs):
    one = losses(runs[1])
    assert one["loss"] > 0
    for count in (2, 4):
        several = losses(runs[count])
        for term in ("loss", "student loss", "peer loss"):
            assert several[term] == pytest.approx(one[term], rel=1e-4), (count, term)


def test_an_evaluation_over_several_processes_gives_the_verdicts_of_one(runs, tmp_path):
    samples = set()
    for count, batch in ((1, 7), (2, 250), (4, 5)):
        out = tmp_path / str(count)
        launch(
            count, "evaluate", runs[1], "--limit", 30, "--suite", "apgd-ce,square",
            "--batch-size", batch, "--out", out,
        )  # fmt: skip
        samples.add((out / "samples.jsonl").read_text())
    assert len(samples) == 1


def test_two_processes_in_bf16(runs, tmp_path):
    launch(2, *TRAIN, "6", "--batch-size", "32", "--precision", "bf16", "--out", tmp_path / "run")
    low, full = losses(tmp_path / "run"), losses(runs[2])
    assert low["loss"] == pytest.approx(full["loss"], rel=0.05)
    assert low["loss"] != full["loss"]
    with safe_open(tmp_path / "run" / "model.safetensors", "pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F32"}  # noqa: SIM118


def test_an_interrupt_that_one_process_sees_stops_all_after_the_same_step(whole, tmp_path):
    # The others are told nothing, and the one is told between two of their steps.
    term = partial(at_opening, "stage0-00000002", partial(_signal_rank, tmp_path / "second"))
    ranks = Ranks(2, *SHORT, tmp_path / "run", faults={
        0: term, 1: partial(_write_pid, tmp_path / "second"),
    })  # fmt: skip
    (code, _, said), (other, _, silent) = ranks.end()
    assert (code, other, silent) == (130, 130, [])
    assert said == ["interrupted; the same command continues"]
    assert json.loads((tmp_path / "run" / RECORD).read_text())["status"] == "interrupted"
    launch(2, *SHORT, tmp_path / "run")
    assert left(tmp_path / "run") == left(whole)


def _write_pid(file):
    file.write_text(str(os.getpid()))


def _signal_rank(file):
    os.kill(int(file.read_text()), signal.SIGTERM)


@pytest.mark.parametrize("part", ["stage0-00000002", "journal-0"])
def test_a_process_that_dies_does_not_leave_the_other_waiting(whole, tmp_path, part):
    suite = ["--suite", "apgd-ce,square", "--limit", "40"] if part == "journal-0" else []
    kill = partial(at_opening, part, partial(_kill_rank, tmp_path / "second"))
    ranks = Ranks(2, *SHORT, tmp_path / "run", *suite, faults={
        0: kill, 1: partial(_write_pid, tmp_path / "second"),
    })  # fmt: skip
    started = time.monotonic()
    (code, _, said), (killed, _, _) = ranks.end()
    assert time.monotonic() - started < 60
    assert (code, killed) == (1, -signal.SIGKILL)
    assert said == [LOST]
    launch(2, *SHORT, tmp_path / "run")
    assert left(tmp_path / "run") == left(whole)


def _kill_rank(file):
    os.kill(int(file.read_text()), signal.SIGKILL)


def test_all_processes_leave_a_folder_that_is_in_use(whole, tmp_path):
    out = tmp_path / "out"
    with locked(out):
        for command in ([*SHORT, out], ["evaluate", whole, "--limit", "4", "--out", out]):
            (code, _, said), (other, _, silent) = Ranks(2, *command).end()
            assert (code, other, silent) == (1, 1, [])
            assert said == [f"robustify: {out} is in use by another robustify process; wait for it "
                            "or choose another --out"]  # fmt: skip


def test_machines_that_do_not_share_the_folder_are_told_so(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    record = json.loads((whole / RECORD).read_text())
    (tmp_path / "run" / RECORD).write_text(json.dumps({**record, "status": "interrupted"}))
    for number in (0, 1):
        (tmp_path / f"machine-{number}").mkdir()
    (tmp_path / "run").rename(tmp_path / "machine-0" / "run")
    (code, _, said), (other, _, words) = Ranks(2, *SHORT, "run", faults={
        number: partial(os.chdir, tmp_path / f"machine-{number}") for number in (0, 1)
    }).end()  # fmt: skip
    assert (code, other) == (1, 1)
    assert said[-1] == LOST
    assert words == [
        "robustify: expected every process to see the same checkpoints in run/checkpoints, but "
        "they differ; put --out on a file system that all machines share"
    ]


@pytest.mark.parametrize(("message", "lost"), [
    ("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:1234", True),
    ("[../gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv", True),
    ("NCCL error: remote process exited or there was a network error, NCCL version 2.27.3", True),
    ("recvValue failed on SocketImpl(fd=3): failed to recv, got 0 bytes", True),
    ("NCCL Error 1: unhandled cuda error", False),
    ("ProcessGroupGloo::allreduce: unsupported layout", False),
    ("[../gloo/allreduce.cc:24] gloo: invalid tensor type", False),
    ("Detected mismatch between collectives on ranks", False),
])  # fmt: skip
def test_only_words_of_a_lost_connection_are_taken_for_one(monkeypatch, message, lost):
    error = RuntimeError(message)
    assert not lost_another(error)  # there is no other process
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert lost_another(error) == lost
    assert not lost_another(ValueError(message))


def launched(*command, processes=2):
    """COMMAND under torchrun."""
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes, "-m",
             "robustify", *command]  # fmt: skip
    return subprocess.Popen(
        list(map(str, words)), env=ENVIRONMENT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def test_torchrun_that_is_told_to_end_leaves_a_run_that_goes_on(whole, tmp_path):
    torchrun = launched(*SHORT, tmp_path / "run")
    while not list(tmp_path.glob("run/checkpoints/stage0-*")):
        assert torchrun.poll() is None, torchrun.communicate()[1]
        time.sleep(0.01)
    torchrun.send_signal(signal.SIGTERM)
    _, said = torchrun.communicate(timeout=100)
    assert said.count("interrupted; the same command continues") == 1
    assert json.loads((tmp_path / "run" / RECORD).read_text())["status"] == "interrupted"
    again = launched(*SHORT, tmp_path / "run")
    printed, said = again.communicate(timeout=300)
    assert again.returncode == 0, said
    assert said.count("resuming student at epoch") == 1
    assert printed.startswith("# Robustness of cnn_a on digits")
    assert left(tmp_path / "run") == left(whole)
