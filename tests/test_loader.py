"""Reading one batch ahead: the same batches, in the same order, whoever leaves when."""

import subprocess
import sys
import threading
import time

import pytest
import torch
from accelerate.data_loader import prepare_data_loader
from loops import CrossEntropy
from shards import write_classes

from robustify import data, harden, loader
from robustify.checkpoint import Checkpoints
from robustify.classifier import Classifier
from robustify.errors import DataError
from robustify.fit import fit
from robustify.images import EncodedImages
from robustify.loader import batches, new_loader, one_ahead
from robustify.settings import Training
from robustify.train import Stage


def readers():
    """The threads that read ahead."""
    return [thread for thread in threading.enumerate() if thread.name == "read-ahead"]


def counted(begun, stop=100):
    """Numbers; `begun` notes which have been asked for."""
    for number in range(stop):
        begun.append(number)
        yield number


def until(what):
    """Wait for what another thread does."""
    for _ in range(1000):
        if what():
            return True
        time.sleep(0.005)
    return False


def test_one_read_is_ahead_and_no_more():
    begun = []
    for number in one_ahead(counted(begun, 5)):
        assert until(lambda number=number: begun[-1] == min(number + 1, 4))
        time.sleep(0.01)
        assert begun == list(range(min(number + 2, 5)))
    assert number == 4
    assert not readers()


def test_an_error_is_raised_where_its_batch_would_be():
    def reads():
        yield 1
        yield 2
        raise DataError("a damaged shard")

    ahead = one_ahead(reads())
    assert [next(ahead), next(ahead)] == [1, 2]
    with pytest.raises(DataError, match="damaged"):
        next(ahead)
    assert not readers()


def test_leaving_early_ends_the_thread_and_closes_what_was_read():
    closed = []

    def reads():
        try:
            yield from range(100)
        finally:
            closed.append(True)

    ahead = one_ahead(reads())
    assert next(ahead) == 0
    assert readers()
    ahead.close()
    del ahead
    assert closed
    assert not readers()


def test_a_read_that_never_ends_does_not_keep_a_program():
    code = (
        "import time; from robustify import loader; loader._PATIENCE = 0.1\n"
        "def reads():\n    yield 1\n    time.sleep(1000)\n"
        "for _ in loader.one_ahead(reads()): break\n"
        "held = loader.one_ahead(reads()); next(held)\n"
        "print('left')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                            timeout=100)  # fmt: skip
    assert (result.returncode, result.stdout.strip()) == (0, "left"), result.stderr


@pytest.fixture
def found(tmp_path, monkeypatch):
    """A data set that is decoded batch by batch."""
    monkeypatch.setattr(data, "IN_MEMORY", 0)
    return data.load(write_classes(tmp_path / "folders", train=60))


def stage(found, **settings):
    """A short stage on it."""
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    network.num_classes, network.in_chans = 2, 3
    student = Classifier(network, architecture="tiny", image_size=8, mean=[0.5] * 3, std=[1] * 3)
    train, validation = found.split_validation()
    return Stage(
        CrossEntropy(student=student), train, validation, number=0, seed=0, policy="none",
        settings=Training(epochs=2, batch_size=8, lr=0.05, averaging="swa", **settings),
        threat=found.threat,
        accelerator=harden.new_accelerator("fp32", settings.get("accumulate", 1), 0),
    )  # fmt: skip


@pytest.mark.parametrize("done", [0, 1, 6, 7])
def test_batches_are_those_that_accelerate_gives(found, done):
    made = stage(found)
    made.loader.set_epoch(1)
    expected = [indices.tolist() for _, _, indices in made.loader]
    for _ in range(2):
        made.loader.set_epoch(1)
        ends, seen = [], []
        for _, _, indices in batches(made.loader, done, processes=1):
            seen.append(indices.tolist())
            ends.append(made.accelerator.gradient_state.end_of_dataloader)
        assert seen == expected[done:]
        assert ends == [False] * (len(seen) - 1) + [True] * bool(seen)  # not one batch too early


def test_only_what_has_to_be_decoded_is_read_ahead(found, monkeypatch):
    threads = set()
    decoded = EncodedImages.__getitem__

    def noted(images, positions):
        threads.add(threading.current_thread().name)
        return decoded(images, positions)

    made = stage(found)
    monkeypatch.setattr(EncodedImages, "__getitem__", noted)
    assert len(list(batches(made.loader, processes=1))) == 7
    assert threads == {"read-ahead"}
    held = new_loader(data.load().test, 100, seed=0, processes=1)
    monkeypatch.setattr(loader, "one_ahead", lambda reads: pytest.fail("read ahead"))
    shared = harden.new_accelerator("fp32", 1, 0).prepare(held)
    assert len(list(batches(shared, processes=1))) == 4
    # Batches that one process hands out to all are exchanged in the thread that trains.
    lazy = new_loader(made.train, 8, seed=0, processes=1)
    handed_out = prepare_data_loader(lazy, put_on_device=True, dispatch_batches=True)
    assert len(list(batches(handed_out, processes=2))) == 7


def test_an_epoch_that_ends_early_leaves_no_thread(found, tmp_path, monkeypatch):
    fit(stage(found), checkpoints=Checkpoints(tmp_path / "whole"))
    assert not readers()
    with pytest.raises(KeyboardInterrupt) as stopped:
        fit(stage(found), checkpoints=Checkpoints(tmp_path / "cut"), interrupted=lambda: True)
    assert not readers()
    decoded = EncodedImages.__getitem__
    calls = []

    def damaged(images, positions):
        calls.append(positions)
        if len(calls) == 4:
            raise DataError("expected an image in x.png")
        return decoded(images, positions)

    made = stage(found)
    monkeypatch.setattr(EncodedImages, "__getitem__", damaged)
    with pytest.raises(DataError, match=r"x\.png") as broken:
        fit(made, checkpoints=Checkpoints(tmp_path / "damaged"))
    assert not readers()
    assert made.progress.step == 2  # Accelerate looks at the next batch before it gives one
    del stopped, broken
