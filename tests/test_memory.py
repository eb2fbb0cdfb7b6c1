"""How much memory there is, how much images need, and the batch sizes that follow."""

import logging

import pytest
import torch
from loops import stage, tiny
from torch import nn

from robustify import batch_size, evaluation, memory
from robustify.batch_size import find_batch_size
from robustify.errors import TrainingError

CPU = torch.device("cpu")
MIB = 2**20


def test_what_a_forward_keeps_is_what_the_formula_says():
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.Sigmoid(), nn.Flatten())
    network.requires_grad_(False)
    # Of the convolution its weights (36 floats) and nothing of the images, of the sigmoid its
    # output (4 x 64 floats an image).
    for count in (1, 8):
        kept = memory.activations(network, torch.rand(count, 1, 8, 8))
        assert kept - 4 * 36 in (4 * 4 * 64 * count, 4 * (4 + 1) * 64 * count)


def test_memory_is_measured_in_bytes_of_this_process():
    before = memory.in_use(CPU)
    block = torch.ones(64 * MIB // 4)
    assert 50 * MIB < memory.in_use(CPU) - before < 80 * MIB
    assert memory.peak(CPU) >= memory.in_use(CPU) - MIB
    assert memory.free(CPU) > block.nbytes


def test_a_limit_of_the_group_or_the_process_counts(monkeypatch, tmp_path):
    whole = memory.free(CPU)
    (tmp_path / "memory.max").write_text(f"{300 * MIB}\n")
    (tmp_path / "memory.current").write_text(f"{100 * MIB}\n")
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert memory.free(CPU) == 200 * MIB < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free(CPU) > 200 * MIB


@pytest.mark.parametrize(
    ("free", "processes", "batch"),
    [(2**40, 1, 250), (4 * 100 * 1000, 1, 100), (4 * 100 * 1000, 2, 50), (1, 1, 8)],
)
def test_an_evaluation_takes_as_many_images_as_memory_allows(monkeypatch, free, processes, batch):
    monkeypatch.setattr(memory, "activations", lambda network, images: 1000 * len(images))
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


def test_a_real_trial_ends_and_measures():
    rate, needed = batch_size._measure(stage(batch_size=64))
    assert rate > 0
    assert needed >= 0
    assert find_batch_size(lambda size: stage(batch_size=size)) in (8, 16, 32, 64, 128)
