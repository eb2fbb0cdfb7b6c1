"""Atomic writing: whatever happens, the file is the old one or the new one."""

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
import threading
import time

import pytest

from robustify.errors import RunFolderError
from robustify.files import atomic_write, replacing


def leftovers(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.endswith(".partial"))


@pytest.mark.parametrize(("content", "stored"), [(b"\x00\xff", b"\x00\xff"), ("é", b"\xc3\xa9")])
def test_writes_and_replaces(tmp_path, content, stored):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    atomic_write(path, content)
    assert path.read_bytes() == stored
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_mode_follows_the_umask_whatever_the_writer_chose(tmp_path, umask):
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "file") as partial:
            partial.unlink()
            os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~umask


def test_an_error_in_the_block_keeps_the_old_file(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, "old")

    def write_half():
        with replacing(path) as partial:
            partial.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_half()
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_flushes_the_file_before_renaming_and_the_folder_after(tmp_path, monkeypatch):
    events = []
    fsync, rename = os.fsync, os.replace

    def note_fsync(descriptor):
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def note_rename(source, target):
        events.append("rename")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", note_rename)
    atomic_write(tmp_path / "file", "text")
    assert events == ["file", "rename", "folder"]


def raising(number):
    def refuse(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    return refuse


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk_says_what_survives(tmp_path, monkeypatch, call):
    path = tmp_path / "model.safetensors"
    atomic_write(path, "old")
    monkeypatch.setattr(os, call, raising(errno.ENOSPC))
    with pytest.raises(RunFolderError, match="disk is full; the file as it was is intact; free"):
        atomic_write(path, "new")
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


def test_full_disk_in_the_words_of_another_library(tmp_path):
    with (
        pytest.raises(RunFolderError, match="disk is full; nothing was left half-written"),
        replacing(tmp_path / "file"),
    ):
        raise RuntimeError("I/O error: No space left on device (os error 28)")


def test_a_write_that_is_cut_short_by_the_system(tmp_path):
    """A real partial write: the process may not write files of more than 1 MB."""
    path = tmp_path / "file"
    atomic_write(path, "old")
    code = (
        f"from robustify.files import atomic_write; atomic_write({str(path)!r}, bytes(5_000_000))"
    )

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))

    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, preexec_fn=limit
    )
    assert "RunFolderError" in result.stderr
    assert "intact" in result.stderr
    assert path.read_text() == "old"
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES])
def test_unwritable_folder(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "open", raising(number))
    with pytest.raises(RunFolderError, match=f"{tmp_path} cannot be written; nothing was left"):
        atomic_write(tmp_path / "file", "text")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunFolderError, match="cannot be written"):
            atomic_write(tmp_path / "file", "text")
    finally:
        tmp_path.chmod(0o700)


def test_missing_folder(tmp_path):
    with pytest.raises(RunFolderError, match="No such file or directory"):
        atomic_write(tmp_path / "missing" / "file", "text")


def test_a_folder_that_cannot_be_flushed(tmp_path, monkeypatch):
    fsync = os.fsync

    def flush_files_only(number):
        def flush(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                raise OSError(number, os.strerror(number))
            fsync(descriptor)

        return flush

    monkeypatch.setattr(os, "fsync", flush_files_only(errno.EINVAL))
    atomic_write(tmp_path / "file", "on a network file system")
    monkeypatch.setattr(os, "fsync", flush_files_only(errno.EIO))
    with pytest.raises(RunFolderError, match="is written, but the disk did not confirm it"):
        atomic_write(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


WRITE_FOR_EVER = """
import sys
from robustify.files import atomic_write
number = 0
print("ready", flush=True)
while True:
    atomic_write(sys.argv[1], f"{number}\\n" * 200_000)
    number += 1
"""


def test_killed_at_random_moments_leaves_a_whole_file(tmp_path):
    path = tmp_path / "file"
    delays = [0.0, 0.003, 0.011, 0.02]
    for delay in delays:
        command = [sys.executable, "-c", WRITE_FOR_EVER, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as writer:
            writer.stdout.readline()
            while not path.exists():
                time.sleep(0.001)
            time.sleep(delay)
            writer.send_signal(signal.SIGKILL)
        lines = path.read_text().splitlines()
        assert len(lines) == 200_000
        assert len(set(lines)) == 1


def test_what_a_killed_process_left_is_removed_and_a_living_one_keeps_its_own(tmp_path):
    with subprocess.Popen([sys.executable, "-c", ""]) as dead:
        dead.wait()
    orphan = tmp_path / f".file.{dead.pid}.partial"
    living = tmp_path / f".file.{os.getppid()}.partial"
    other = tmp_path / f".other.{dead.pid}.partial"
    for path in (orphan, living, other):
        path.write_text("half")
    atomic_write(tmp_path / "file", "text")
    assert leftovers(tmp_path) == sorted([living.name, other.name])


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "file"
    atomic_write(path, "a" * 100_000)
    seen, done = set(), threading.Event()

    def read():
        while not done.is_set():
            text = path.read_text()
            seen.add((len(text), len(set(text))))

    reader = threading.Thread(target=read)
    reader.start()
    for letter in "bcdefgh":
        atomic_write(path, letter * 100_000)
    done.set()
    reader.join()
    assert seen == {(100_000, 1)}
