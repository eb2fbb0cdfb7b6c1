"""Several processes: the same losses and the same verdicts as one."""

import json
import os
import subprocess
import sys

import pytest

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def launch(processes, *arguments):
    """stdout of a command under torchrun, or alone where `processes` is 1."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "robustify", *arguments]
    result = subprocess.run(
        list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """PeerAiD on a network without BatchNorm: one process, and two with half the batch each."""
    folders = {}
    for processes, batch in ((1, 64), (2, 32)):
        folders[processes] = tmp_path_factory.mktemp("runs") / str(processes)
        launch(
            processes, "distill", "--recipe", "peeraid", "--student", "cnn_a", "--image-size", 32,
            "--set", "training.optimizer=momentum", "--lr", 0.01, "--batch-size", batch,
            "--max-steps", 6, "--suite", "pgd", "--limit", 40, "--out", folders[processes],
        )  # fmt: skip
    return folders


def test_two_processes_have_the_losses_of_one_with_twice_the_batch(runs):
    one, two = (
        json.loads((runs[n] / "metrics.jsonl").read_text().splitlines()[-1]) for n in (1, 2)
    )
    assert one["loss"] > 0
    for term in ("loss", "student loss", "peer loss"):
        assert two[term] == pytest.approx(one[term], rel=1e-4), term


def test_an_evaluation_over_two_processes_gives_the_verdicts_of_one(runs, tmp_path):
    samples = {}
    for processes, batch in ((1, 7), (2, 250)):
        out = tmp_path / str(processes)
        launch(
            processes, "evaluate", runs[1], "--limit", 40, "--suite", "apgd-ce,square",
            "--batch-size", batch, "--out", out,
        )  # fmt: skip
        samples[processes] = (out / "samples.jsonl").read_text()
    assert samples[1] == samples[2]
