"""What a disk, a clock, a memory or a person can do to a command: it ends with one line that says
what survives, and the same command goes on to the very files of a run that nothing happened to."""

import errno
import fcntl
import importlib
import itertools
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from children import at_opening, no_more_than, robustify
from loops import CrossEntropy, stage, weights
from test_robustbench import evaluated
from torch import nn

from robustify.attacks.suite import make_suite, run_suite
from robustify.attacks.victim import Victim
from robustify.checkpoint import Checkpoints
from robustify.errors import RunFolderError, TrainingError
from robustify.fit import fit
from robustify.harden import interruptible
from robustify.journal import Journal
from robustify.losses import cross_entropy
from robustify.processes import PATIENCE
from robustify.run_folder import RECORD, RunFolder, locked
from robustify.threat import ThreatModel

TRAIN = [
    "distill", "--recipe", "pgd_at", "--student", "cnn_a", "--image-size", "32", "--batch-size",
    "128", "--train-limit", "300", "--epochs", "2", "--set", "attack.steps=2", "--set",
    "training.checkpoint_seconds=0", "--suite", "apgd-ce", "--limit", "12", "--out",
]  # fmt: skip
WITHOUT_A_WORD = "the last start of this run ended without a word"


def left(folder):
    """What must be the same whatever happened on the way."""
    names = ("model.safetensors", "config.json", "samples.jsonl", "metrics.jsonl")
    return {name: (folder / name).read_bytes() for name in names}


def numbers(folder, name="report.json"):
    """A report but for what it cost."""
    content = json.loads((folder / name).read_text())
    for one in (content, *content["attacks"]):
        one.pop("seconds")
        one.pop("passes")  # of this start
    for key in ("cost", "training"):
        content.pop(key, None)
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing happens to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    assert robustify(*TRAIN, folder)[0] == 0
    return folder


@pytest.fixture
def disk(tmp_path):
    """`disk(size)`: a file system of its own, of that size or with other options of mount."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(options):
        again = folder.is_mount()
        command = ["mount", "-t", "tmpfs", "-o", ("remount," if again else "") + options]
        try:
            done = subprocess.run([*command, "tmpfs", folder], capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no mount here")
        if done.returncode:
            pytest.skip(f"file systems may not be mounted here: {done.stderr.strip()}")
        return folder

    yield mounted
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


# Full disks


def test_a_disk_that_fills_up_at_every_kind_of_write(whole, tmp_path):
    out = tmp_path / "run"
    said = {}
    for part, size, time_ in (
        ("robustify.json", 100, 1), ("stage0-00000000", 100, 1), ("stage0-00000002", 100, 1),
        ("metrics.jsonl", 100, 1), ("model.safetensors", 100, 1), ("config.json", 100, 1),
        ("journal-0.jsonl", 100, 1), ("journal-0.jsonl", 900, 1), ("report.json", 100, 1),
        ("samples.jsonl", 100, 1), ("report.md", 100, 1), ("report.html", 100, 1),
    ):  # fmt: skip
        full = partial(at_opening, part, partial(no_more_than, size), time=time_)
        code, printed, lines = robustify(*TRAIN, out, fault=full)
        assert (code, printed) == (1, ""), part
        assert lines[-1].startswith("robustify: could not write "), (part, lines)
        assert all(line.startswith((WITHOUT_A_WORD, "resuming ")) for line in lines[:-1]), lines
        assert not list(out.rglob("*.partial"))
        said[part] = lines[-1]
    folder = out / "checkpoints"
    assert "no checkpoint was written yet" in said["stage0-00000000"]
    assert f"the last good checkpoint is {folder}/stage0-00000001-" in said["stage0-00000002"]
    assert "nothing was left half-written; free some space" in said["model.safetensors"]
    assert "the disk is full; the verdicts before it are kept, and" in said["journal-0.jsonl"]
    assert robustify(*TRAIN, out)[0] == 0
    assert left(out) == left(whole)
    assert numbers(out) == numbers(whole)


def test_a_disk_that_is_full_in_truth(whole, disk):
    out = disk("size=3m") / "run"  # one checkpoint and a half
    code, _, lines = robustify(*TRAIN, out)
    assert code == 1
    assert "the disk is full" in lines[-1]
    kept = next((out / "checkpoints").glob("stage0-00000000-*"))
    assert lines[-1].endswith(f"the last good checkpoint is {kept}")
    disk("size=50m")
    code, _, lines = robustify(*TRAIN, out)
    assert code == 0
    assert "resuming student at epoch 0, step 1" in lines
    assert left(out) == left(whole)


def test_neither_progress_nor_logs_nor_the_answer_can_end_a_run(whole, tmp_path):
    for words in ({"stderr": "/dev/full"}, {"stdout": "/dev/full"}):
        out = tmp_path / str(*words)
        code, _, lines = robustify(*TRAIN, out, **words)
        assert left(out) == left(whole)
        assert json.loads((out / RECORD).read_text())["status"] == "finished"
        if "stderr" in words:
            assert code == 0
        else:
            assert (code, lines) == (1, [
                "robustify: could not print the answer: No space left on device; files that were "
                "written are whole"
            ])  # fmt: skip


def test_a_full_disk_in_evaluations_sweeps_and_what_is_made_of_reports(whole, tmp_path):
    full = partial(partial, at_opening)
    evaluate = ["evaluate", whole, "--suite", "apgd-ce", "--limit", "12", "--out", tmp_path / "e"]
    for part, size in (("journal-0", 900), ("report.json", 100)):
        code, _, lines = robustify(*evaluate, fault=full(part, partial(no_more_than, size)))
        assert (code, len(lines)) == (1, 1)
    assert robustify(*evaluate)[0] == 0
    assert (tmp_path / "e" / "samples.jsonl").read_bytes() == left(whole)["samples.jsonl"]

    sweep = [*TRAIN, tmp_path / "s", "--max-steps", "1", "--sweep", "training.lr=1e-3,1e-2"]
    code, _, lines = robustify(*sweep, fault=full("comparison.md", partial(no_more_than, 100)))
    assert code == 1
    assert f"could not write {tmp_path / 's' / 'comparison.md'}: the disk is full" in lines[-1]
    assert robustify(*sweep)[0] == 0

    page = tmp_path / "page.html"
    compare = ["report", whole, tmp_path / "e", "--out", page]
    shutil.copytree(whole, tmp_path / "theirs")
    (tmp_path / "theirs" / "report.json").write_text(json.dumps(evaluated()))
    entry = tmp_path / "entry.json"
    export = ["report", tmp_path / "theirs", "--robustbench", entry]
    for command, path in ((compare, page), (export, entry)):
        code, out, lines = robustify(*command, fault=full(path.name, partial(no_more_than, 100)))
        assert (code, out) == (1, "")
        assert lines == [
            f"robustify: could not write {path}: the disk is full; nothing was left half-written; "
            "free some space and run the same command again"
        ]
        assert robustify(*command)[0] == 0


# Folders


def test_a_folder_that_is_read_only(whole, disk):
    out = disk("size=50m") / "run"
    shutil.copytree(whole, out)
    disk("ro")
    code, _, lines = robustify(*TRAIN, out, "--limit", "8")
    assert (code, len(lines)) == (1, 1)
    assert lines[0].startswith(
        f"robustify: expected a folder that can be written, got {out}: Read-only file system"
    )
    assert robustify("evaluate", out, "--suite", "fgsm", "--limit", "4")[0] == 0
    assert robustify("push", out, "user/repo", "--dry-run")[0] == 0
    code, _, lines = robustify("report", out)
    assert (code, len(lines)) == (1, 1)
    assert f"the folder {out} cannot be written; the file as it was is intact" in lines[0]
    assert robustify("report", out, "--json")[0] == 0


def test_a_disk_that_turns_read_only_under_a_run(whole, tmp_path):
    out = tmp_path / "run"
    code, _, lines = robustify(*TRAIN, out, fault=_read_only_at_the_second_checkpoint)
    assert code == 1
    assert "cannot be written; nothing was left half-written; change its permissions" in lines[-1]
    assert robustify(*TRAIN, out)[0] == 0
    assert left(out) == left(whole)


def _read_only_at_the_second_checkpoint():
    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    at_opening("stage0-00000001", partial(setattr, os, "fsync", refuse))


@pytest.mark.parametrize("part", ["stage0-00000001", "metrics.jsonl", "config.json"])
def test_a_folder_that_is_moved_under_a_run(whole, tmp_path, part):
    out, away = tmp_path / "run", tmp_path / "away"
    code, _, lines = robustify(
        *TRAIN, out, fault=partial(at_opening, part, partial(os.rename, out, away))
    )
    assert code == 1
    assert len(lines) == 1
    assert "put it back" in lines[0]
    assert not out.exists()
    away.rename(out)
    assert robustify(*TRAIN, out)[0] == 0
    assert left(out) == left(whole)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks(tmp_path, monkeypatch, caplog, number):
    def refuse(descriptor, how):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locked(tmp_path / "run"):
        assert "cannot be locked" in caplog.text
        assert "see to it that nothing else writes there" in caplog.text


def test_a_second_process_is_refused_wherever_it_could_write(whole, tmp_path):
    out = tmp_path / "out"
    commands = [
        [*TRAIN, out], ["evaluate", whole, "--limit", "4", "--suite", "fgsm", "--out", out],
        [*TRAIN, out, "--sweep", "training.lr=1e-3,1e-2"],
    ]  # fmt: skip
    with locked(out):
        for command in commands:
            code, printed, lines = robustify(*command)
            assert (code, printed) == (1, "")
            assert lines == [
                f"robustify: {out} is in use by another robustify process; wait for it or choose "
                "another --out"
            ]
    assert os.listdir(out) == [".lock"]


# Kills


def test_a_checkpoint_cut_short_anywhere_gives_way_to_the_one_before_it(tmp_path, caplog):
    checkpoints = Checkpoints(tmp_path)
    for number in (1, 2):
        checkpoints.save("a", {"x": torch.full((3,), number)}, {"number": number})
    newest = checkpoints.newest("a")
    content = newest.read_bytes()
    for length in range(len(content)):
        newest.write_bytes(content[:length])
        caplog.clear()
        tensors, values = checkpoints.load("a")
        assert (tensors["x"].tolist(), values) == ([1, 1, 1], {"number": 1})
        assert "is damaged; falling back to the one before it" in caplog.text
    for place, bit in itertools.product(range(len(content)), (0, 3, 7)):
        flipped = bytearray(content)
        flipped[place] ^= 1 << bit
        newest.write_bytes(flipped)
        assert checkpoints.load("a")[1] == {"number": 1}, place
    caplog.clear()
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(RunFolderError, match=r"every 'a' file in .* is damaged; start again with"):
        checkpoints.load("a")
    assert caplog.text == ""  # one line says it all


def test_a_journal_cut_short_anywhere_keeps_the_lines_before_the_cut(tmp_path):
    identity = {"model": "tiny", "n": 12}
    journal = Journal(tmp_path, identity)
    decided = [
        (attack, image, image % 3 > 0) for attack in ("clean", "pgd") for image in (7, 12, 3)
    ]
    for verdict in decided:
        journal.record(*verdict)
    journal.close()
    content = journal.path.read_bytes()
    for length in range(len(content) + 1):
        journal.path.write_bytes(content[:length])
        again = Journal(tmp_path, identity)
        whole_lines = max(content[: length + 1].count(b"\n") - 1, 0)  # a line may lack its end
        known = [
            (a, i, right) for a, verdicts in again.verdicts.items() for i, right in verdicts.items()
        ]
        assert known == decided[:whole_lines], length
        for verdict in decided[len(known) :]:
            again.record(*verdict)
        again.close()
        last = Journal(tmp_path, identity)
        last.close()
        assert sum(map(len, last.verdicts.values())) == len(decided), length


def test_noise_in_a_journal_is_passed_over(tmp_path):
    journal = Journal(tmp_path, {"model": "tiny"})
    journal.record("pgd", 3, True)
    journal.close()
    with journal.path.open("ab") as file:
        file.write(b'\xff\x00\n[1]\n5\n{"attack": "pgd"}\n{"attack": "pgd", "image": "4"}\n')
    again = Journal(tmp_path, {"model": "tiny"})
    again.close()
    assert again.verdicts == {"pgd": {3: True}}


def test_a_record_cut_short_anywhere_is_never_taken_for_another_run(tmp_path):
    run = {"recipe": "trades", "seed": 0}
    folder = RunFolder(tmp_path / "run")
    with folder.held(run):
        folder.update(status="finished")
    file = folder.path / RECORD
    content = file.read_bytes()
    for length in range(len(content) - 1):
        file.write_bytes(content[:length])
        with pytest.raises(RunFolderError, match=r"is damaged.*--no-resume"), folder.held(run):
            pass
    with folder.held(run, resume=False):
        assert folder.record == {"run": run, "status": "training"}


def test_what_a_kill_left_of_a_file_neither_stays_nor_stands_in_the_way(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.folder.mkdir(parents=True)
    (folder.path / f".{RECORD}.{dead.pid}.partial").write_bytes(b"{")
    (folder.checkpoints.folder / f".stage0-00000003-ab.{dead.pid}.partial").write_bytes(b"{")
    with folder.held({"seed": 0}):
        assert not list(folder.path.rglob("*.partial"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_start_after_a_kill_says_so_and_one_after_an_interrupt_does_not(whole, tmp_path, number):
    out = tmp_path / "run"
    code, _, lines = robustify(*TRAIN, out, fault=partial(_signalled, number))
    if number == signal.SIGKILL:
        assert (code, lines) == (-number, [])
    else:
        assert code == 130
        assert lines == ["finishing this step and saving; Ctrl-C again to stop at once",
                         "interrupted; the same command continues"]  # fmt: skip
    code, _, lines = robustify(*TRAIN, out)
    assert code == 0
    assert any(line.startswith(WITHOUT_A_WORD) for line in lines) == (number == signal.SIGKILL)
    assert lines[-1].startswith("resuming student at epoch 0, step ")
    assert left(out) == left(whole)


def _signalled(number):
    at_opening("stage0-00000001", lambda: os.kill(os.getpid(), number))


CONTINUES = "interrupted; the same command continues"
NOTHING_KEPT = "interrupted; nothing was kept (evaluate --out FOLDER keeps every verdict)"


@pytest.mark.parametrize(("words", "at", "said"), [
    (["evaluate", "WHOLE", "--limit", "12", "--out=OUT"], "evaluation.evaluate", CONTINUES),
    (["evaluate", "WHOLE", "--limit", "12", "--json"], "evaluation.evaluate", NOTHING_KEPT),
    (["--debug", *TRAIN, "OUT"], "fit.fit", CONTINUES),
    ([*TRAIN, "OUT", "--sweep", "training.lr=1e-3,1e-2"], "fit.fit", CONTINUES),
    ([*TRAIN, "OUT", "--dry-run"], "effort.dry_run", "interrupted"),
    ([*TRAIN, "OUT"], "harden.plan", "interrupted"),
    (["report", "WHOLE", "--out", "OUT"], "report.read", "interrupted"),
])  # fmt: skip
def test_an_interrupt_says_what_the_command_keeps_there(whole, tmp_path, words, at, said):
    places = {"WHOLE": str(whole), "OUT": str(tmp_path / "out")}
    command = [re.sub("WHOLE|OUT", lambda found: places[found[0]], word) for word in words]
    code, _, lines = robustify(*command, fault=partial(_interrupted_in, at))
    assert (code, lines[-1]) == (130, said)


def _interrupted_in(name):
    """SIGINT where the function called `name` is called."""
    module, function = name.split(".")
    code = getattr(importlib.import_module(f"robustify.{module}"), function).__code__

    def look(frame, event, argument):
        if event == "call" and frame.f_code is code:
            sys.setprofile(None)
            raise KeyboardInterrupt

    sys.setprofile(look)


def test_an_interrupt_in_the_last_validation_is_not_forgotten(tmp_path):
    asked = []

    def interrupted():
        asked.append(True)
        return len(asked) > 4  # not in a step: after the validation

    checkpoints = Checkpoints(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        fit(stage(epochs=1), checkpoints=checkpoints, interrupted=interrupted)
    assert checkpoints.load("stage0")[1]["progress"]["epoch"] == 1


def test_an_interrupt_between_the_last_question_and_the_end_is_not_forgotten():
    before = signal.getsignal(signal.SIGTERM)

    def work():
        with interruptible() as interrupted:
            assert not interrupted()
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert signal.getsignal(signal.SIGTERM) is before


# Clocks


def test_a_clock_that_jumps_changes_nothing(whole, tmp_path):
    out = tmp_path / "run"
    assert robustify(*TRAIN, out, fault=_jumping)[0] == 0
    assert left(out) == left(whole)
    report = json.loads((out / "report.json").read_text())
    stages = json.loads((out / RECORD).read_text())["stages"]
    assert all(0 <= row["seconds"] < 60 for row in (report, *report["attacks"], *stages))


def _jumping():
    """The clock on the wall goes back, or forward, by up to a month whenever somebody looks."""
    import tqdm.std

    jumps = random.Random(0)
    clock = time.time
    time.time = tqdm.std.time = lambda: clock() + jumps.uniform(-30, 30) * 86400


# Memory


def _memory_for(megabytes, *, at):
    """Let the process have so much more memory once it opens a file whose path holds `at`."""

    def limit():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        size = pages * resource.getpagesize() + megabytes * 2**20
        resource.setrlimit(resource.RLIMIT_AS, (size, size))

    at_opening(at, limit)


def _out_of_memory_in_the_third_step():
    """As torch says it on a CPU."""
    from robustify.train import Stage

    step, done = Stage.step, itertools.count(1)

    def refused(self, fetched):
        if next(done) == 3:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 2 GiB")
        return step(self, fetched)

    Stage.step = refused


@pytest.mark.parametrize(
    "fault",
    [
        _out_of_memory_in_the_third_step,
        # A real limit. Rehearsed, and slow because where nothing at all is left a process may hang.
        pytest.param(partial(_memory_for, 0, at="stage0-00000001"), marks=pytest.mark.slow),
    ],
)
def test_memory_that_runs_out_in_training(tmp_path, fault):
    larger = ["256" if word == "128" else word for word in TRAIN]
    assert robustify(*larger, tmp_path / "whole")[0] == 0
    out = tmp_path / "run"
    code, _, lines = robustify(*larger, out, fault=fault)
    assert code == 1
    kept = Checkpoints(out / "checkpoints").newest("stage0")
    assert re.sub(r"epoch . step .", "epoch E step S", lines[0]) == (
        "robustify: out of memory at epoch E step S of stage 'student' with --batch-size 256; the "
        f"last good checkpoint is {kept}; with more memory free the same command goes on; to need "
        "less, start again with --no-resume and --batch-size 128 --set training.accumulate=2 (the "
        "same effective batch), --precision bf16 or --set training.grad_checkpointing=true"
    )
    assert robustify(*larger, out)[0] == 0
    assert left(out) == left(tmp_path / "whole")


def test_memory_that_runs_out_on_a_gpu(tmp_path, monkeypatch):
    poisoned = stage()
    forward = CrossEntropy.forward

    def run_out(self, *batch):
        if poisoned.progress.epoch == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return forward(self, *batch)

    monkeypatch.setattr(CrossEntropy, "forward", run_out)
    with pytest.raises(
        TrainingError, match=r"epoch 1 step 0 .* --batch-size 64; the last good che"
    ):
        fit(poisoned, checkpoints=Checkpoints(tmp_path))
    monkeypatch.undo()
    resumed, untouched = stage(), stage()
    fit(resumed, checkpoints=Checkpoints(tmp_path))
    fit(untouched, checkpoints=Checkpoints(tmp_path / "untouched"))
    assert torch.equal(weights(resumed), weights(untouched))


class Hungry(nn.Module):
    """A network that takes no more than `most` images at once."""

    def __init__(self, most, error):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))
        self.most, self.error = most, error

    def forward(self, images):
        if len(images) > self.most:
            raise self.error
        return self.layers(images)


def test_an_evaluation_that_memory_does_not_hold_goes_on_in_parts(caplog):
    images = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    threat = ThreatModel("Linf", 0.03)
    found = {}
    for most in (64, 16):
        network = Hungry(most, torch.OutOfMemoryError("CUDA out of memory.")).eval()
        labels = network.layers(images).argmax(1)
        suite = make_suite("fast", threat, 10)
        found[most] = run_suite(network, images, labels, suite=suite, threat=threat)
    assert "out of memory with 50 images at once; going on with 24" in caplog.text
    for plain, parted in zip(found[64], found[16], strict=True):
        assert torch.equal(plain.survivors, parted.survivors)
        assert plain.passes == parted.passes
    assert 0 < int(found[64][-1].survivors.sum()) < 50


@pytest.mark.parametrize("ask", [
    lambda victim, images: [victim.logits(images)],
    lambda victim, images: [victim.predict(images)],
    lambda victim, images: victim.gradient(images, _loss, torch.arange(50) % 3 > 0),
    lambda victim, images: [victim.gradients(images, [_loss, _loss])[0],
                            *victim.gradients(images, [_loss, _loss])[1]],
])  # fmt: skip
def test_every_question_has_the_same_answer_in_parts(ask):
    images = torch.rand(50, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    victims = [Victim(Hungry(most, torch.OutOfMemoryError()), samples=2) for most in (64, 16)]
    for plain, parted in zip(*(ask(victim, images) for victim in victims), strict=True):
        assert torch.equal(plain, parted)
    assert victims[0].passes == victims[1].passes


def _loss(logits, rows):
    return cross_entropy(logits, rows % 10)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("could not create a primitive"), MemoryError(),
        RuntimeError("shapes do not fit"),
    ],
)  # fmt: skip
def test_eight_images_are_the_fewest_and_other_errors_stay_what_they_are(error, caplog):
    victim = Victim(Hungry(7, error))
    with pytest.raises(type(error)) as raised:
        victim.gradient(torch.rand(50, 1, 8, 8), _loss)
    assert raised.value is error
    assert victim.passes.total == 0
    assert ("going on with 8" in caplog.text) == ("shapes" not in str(error))


def test_memory_that_runs_out_in_an_evaluation(whole, tmp_path):
    command = ["evaluate", whole, "--suite", "apgd-ce,square", "--limit", "200", "--json",
               "--batch-size", "250"]  # fmt: skip
    _, plain, _ = robustify(*command)
    out = tmp_path / "out"
    code, parted, lines = robustify(*command, "--out", out, fault=_no_more_than_100_at_once)
    assert code == 0
    assert "out of memory with 200 images at once; going on with 96" in lines
    accuracies = [
        [row["robust_accuracy"] for row in json.loads(text)["attacks"]] for text in (plain, parted)
    ]
    assert accuracies[0] == accuracies[1]


def _not_even_for_8():
    """What a limit on the address space does, too: but where nothing at all can be allocated, even
    to say so, the system may not come back (seen with RLIMIT_AS, on a loaded machine)."""
    from robustify.attacks import victim

    def refused(self, images):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 2 GiB")

    victim.Victim._answer = refused


@pytest.mark.parametrize(
    "fault",
    [
        _not_even_for_8,
        # A real limit; slow for the same reason as in training.
        pytest.param(partial(_memory_for, 0, at="journal-0"), marks=pytest.mark.slow),
    ],
)
def test_memory_that_does_not_hold_eight_images(whole, tmp_path, fault):
    command = ["evaluate", whole, "--suite", "apgd-ce,square", "--limit", "200", "--json",
               "--batch-size", "250", "--out", tmp_path / "out"]  # fmt: skip
    code, printed, lines = robustify(*command, fault=fault)
    assert (code, printed) == (1, "")
    assert lines[-1].startswith("robustify: out of memory in the evaluation; every verdict so far ")
    assert lines[-1].endswith("evaluate with a smaller --batch-size or --limit")
    assert robustify(*command)[0] == 0


def _no_more_than_100_at_once():
    from robustify.attacks import victim

    answer = victim.Victim._answer

    def limited(self, images):
        if len(images) > 100:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return answer(self, images)

    victim.Victim._answer = limited


def test_processes_wait_for_each_other_longer_than_shards_differ_and_not_for_ever():
    assert 3600 <= PATIENCE.total_seconds() < 24 * 3600
