"""One process at a time trains in a folder; a process that ended in any way does not lock it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from petseg.lock import LOCK, lock_folder
from petseg_runtime.errors import TrainingError

#: Locks a folder until its standard input ends. First it forks a worker, which must not unlock the folder.
HOLDS = """
import os, sys
from pathlib import Path
from petseg.lock import lock_folder

unlock = lock_folder(Path(sys.argv[1]))
worker = os.fork()
if worker == 0:
    unlock()
    os._exit(0)
os.waitpid(worker, 0)
print("held", flush=True)
sys.stdin.read()
unlock()
"""


@contextlib.contextmanager
def held(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process has locked a folder."""
    command, pipe = [sys.executable, "-c", HOLDS, str(folder)], subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        try:
            assert process.stdout
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def test_a_folder_that_another_process_has_locked_is_rejected_until_that_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held(folder) as process:
        with pytest.raises(TrainingError, match=r"run: another process is training there; .* another --output"):
            lock_folder(folder)
        process.communicate(timeout=30)
        assert not folder.exists(), "it made it, and left nothing in it"
        lock_folder(folder)()


def test_a_stale_lock_does_not_lock_the_folder(tmp_path: Path) -> None:
    with held(tmp_path) as process:
        process.send_signal(signal.SIGKILL)
        process.wait(30)
    assert (tmp_path / LOCK).exists()
    lock_folder(tmp_path)()
    assert list(tmp_path.iterdir()) == []


def test_one_process_may_lock_it_twice_and_removes_only_its_own_file(tmp_path: Path) -> None:
    first = lock_folder(tmp_path)
    second = lock_folder(tmp_path)
    first()
    assert list(tmp_path.iterdir()) == []
    with held(tmp_path):
        second()
        with pytest.raises(TrainingError, match="another process"):
            lock_folder(tmp_path)


def test_a_lock_file_that_has_just_been_removed_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was removed by a run that ended after the file was opened and before it was locked."""
    lock, removed = fcntl.lockf, []

    def late(descriptor: int, how: int) -> None:
        if not removed:
            removed.append((tmp_path / LOCK).unlink())
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "lockf", late)
    unlock = lock_folder(tmp_path)
    assert removed
    assert (tmp_path / LOCK).exists()
    unlock()


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_does_not_lock_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    def none(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(fcntl, "lockf", none)
    lock_folder(tmp_path / "run")()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_created_is_reported_by_the_first_write(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    lock_folder(tmp_path / "file" / "run")()
    assert (tmp_path / "file").is_file()
