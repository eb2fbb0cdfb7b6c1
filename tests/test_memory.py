"""How much memory there is, how much images need, and the batch sizes that follow."""

import json
import logging

import pytest
import torch
from children import Ranks, robustify
from loops import stage, tiny
from torch import nn

from robustify import batch_size, evaluation, memory
from robustify.batch_size import find_batch_size
from robustify.errors import TrainingError
from robustify.run_folder import RECORD

CPU = torch.device("cpu")
MIB = 2**20


def test_what_a_forward_keeps_is_what_the_formula_says():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.Sigmoid(), nn.Flatten())
    network.requires_grad_(False)
    # Of the sigmoid its output, 4 x 64 floats an image; of the convolution the image, 64 floats,
    # and its weights, which do not count.
    for count in (2, 8, 20):
        assert memory.activations(network, torch.rand(count, 1, 8, 8)) == 4 * (4 * 64 + 64)


def test_the_peak_is_of_what_was_watched():
    before = memory.in_use(CPU)
    del_me = torch.ones(200 * MIB // 4)
    del del_me
    memory.watch(CPU)
    assert memory.peak(CPU) < before + 100 * MIB
    block = torch.ones(200 * MIB // 4)
    assert memory.peak(CPU) > before + 150 * MIB
    assert memory.free(CPU) > block.nbytes


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """A place for control groups and for what the system says of this process."""
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(memory, "_PROCESS", tmp_path)
    return tmp_path


def limited(folder, names, limit, used, stat="inactive_file 0"):
    """A control group with a limit."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in zip((*names, "memory.stat"), (limit, used, stat), strict=True):
        (folder / name).write_text(f"{content}\n")


def test_the_tightest_group_around_a_process_counts(groups):
    assert memory.free(CPU) > 1000 * MIB
    job = groups / "groups" / "system.slice" / "slurmstepd.scope" / "job_7" / "step_0"
    names = ("memory.max", "memory.current")
    limited(job, names, "max", 0)
    limited(job.parent, names, 300 * MIB, 100 * MIB, f"anon 5\ninactive_file {50 * MIB}")
    limited(job.parents[1], names, 900 * MIB, 100 * MIB)
    (groups / "cgroup").write_text("0::/system.slice/slurmstepd.scope/job_7/step_0\n")
    assert memory.free(CPU) == 250 * MIB


def test_a_group_of_the_first_version_counts(groups):
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    limited(groups / "groups" / "memory" / "job", names, 400 * MIB, 100 * MIB)
    (groups / "cgroup").write_text("9:cpu,cpuacct:/\n4:memory:/job/step\n")
    assert memory.free(CPU) == 300 * MIB


@pytest.mark.parametrize(
    ("free", "processes", "batch"),
    [(2**40, 1, 250), (4 * 100 * 1000, 1, 100), (4 * 100 * 1000, 2, 50), (1, 1, 8)],
)
def test_an_evaluation_takes_as_many_images_as_memory_allows(monkeypatch, free, processes, batch):
    monkeypatch.setattr(memory, "activations", lambda network, images: 1000)
    monkeypatch.setattr(memory, "free", lambda device: free)
    images = torch.rand(300, 1, 8, 8)
    assert memory.evaluation_batch(tiny(), images, processes=processes) == batch


def test_verdicts_do_not_depend_on_what_memory_there_was(monkeypatch):
    images = torch.rand(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = tiny().eval()(images).argmax(1)
    found = []
    for allowed in (8, 250):
        monkeypatch.setattr(memory, "evaluation_batch", lambda *_, allowed=allowed, **__: allowed)
        report = evaluation.evaluate(tiny(), images, labels, suite="fast", eps=0.02)
        found.append(report.samples)
    assert 0 < found[0]["checks"].sum() < 40
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def trial(monkeypatch, *, rates, needs=lambda size: size * MIB, free=2**40):
    """The batch size found on a machine with these images per second and bytes."""

    def measure(run):
        size = run.settings.batch_size
        if size not in rates:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return rates[size], needs(size)

    monkeypatch.setattr(batch_size, "_measure", measure)
    monkeypatch.setattr(memory, "free", lambda device: free)
    return find_batch_size(lambda size: stage(batch_size=size))


def test_the_smallest_batch_of_full_speed_is_found(monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        found = trial(monkeypatch, rates={8: 100, 16: 190, 32: 300, 64: 310})
    assert found == 32
    assert "batch size 32 (tried 8: 100 images/s, 8 MiB; 16: 190" in caplog.text


def test_the_trial_stops_where_memory_ends(monkeypatch):
    rising = {8: 1.0, 16: 2.0, 32: 4.0, 64: 8.0, 128: 16.0, 256: 32.0}
    assert trial(monkeypatch, rates={8: 1.0, 16: 2.0}) == 16  # out of memory at 32
    assert trial(monkeypatch, rates=rising, free=39 * MIB) == 16  # 32 needs 32 of 31.2
    assert trial(monkeypatch, rates=rising) == 128  # of 200 training images
    with pytest.raises(TrainingError, match="memory for a batch of 8 images"):
        trial(monkeypatch, rates={})


def test_another_error_is_not_taken_for_a_lack_of_memory():
    def broken(size):
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        find_batch_size(broken)


def test_a_trial_measures_a_step_and_not_what_was_before_it():
    del_me = torch.ones(300 * MIB // 4)
    del del_me
    rate, needed = batch_size._measure(stage(batch_size=64, alone=True))
    assert rate > 0
    assert needed < 100 * MIB


AUTO = ["distill", "--recipe", "ard", "--student", "cnn_a", "--train-limit", "160", "--batch-size",
        "auto", "--suite", "fgsm", "--limit", "8", "--max-steps"]  # fmt: skip


def test_a_run_keeps_the_size_that_was_found_for_it(tmp_path):
    """For two stages, and when it goes on, in which nothing is tried again."""
    out = tmp_path / "run"
    code, _, said = robustify(*AUTO, 2, "--out", out)
    assert code == 0, said
    tried = [int(line.split()[2]) for line in said if line.startswith("batch size ")]
    assert len(tried) == 2
    found = json.loads((out / RECORD).read_text())["run"]["training"]["batch_size"]
    assert found == min(tried)
    code, _, said = robustify(*AUTO, 2, "--out", out)
    assert code == 0, said
    assert said[-1] == f"{out} is already finished; --no-resume trains it anew"
    assert not any("batch size" in line for line in said)


def _out_of_memory_at_16():
    """In one of two processes, in a step, where the other would wait for its gradients."""
    step = batch_size.Stage.step

    def refused(self, fetched):
        if len(fetched[0]) >= 16:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return step(self, fetched)

    batch_size.Stage.step = refused


def test_processes_stop_trying_together_where_memory_ends_for_one(tmp_path):
    command = [*AUTO, 1, "--recipe", "pgd_at", "--out", tmp_path / "run"]
    ranks = Ranks(2, *command, faults={1: _out_of_memory_at_16})
    for code, _, said in ranks.end():
        # The second cannot train either: what it tried with 8 images is no size it refuses.
        assert code == 0, said
    size = json.loads((tmp_path / "run" / RECORD).read_text())["run"]["training"]["batch_size"]
    assert size == 8


def test_a_sweep_needs_one_size_for_all(tmp_path):
    code, _, said = robustify(*AUTO, 1, "--recipe", "pgd_at", "--sweep", "training.lr=0.1,0.01")
    assert code == 2
    assert "expected a number for --batch-size with --sweep, got auto" in said[-1]


def test_a_batch_size_is_a_number_or_auto():
    for wrong in ("0", "-3", "some", "1.5"):
        code, _, said = robustify(*AUTO, 1, "--batch-size", wrong)
        assert code == 2
        assert f"batch size of at least 1, or auto, got '{wrong}'" in said[-1]
