"""Compiled engines are cached; damaged, stale and foreign ones are compiled again, and the reason is reported."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from petseg.cli import run
from petseg_runtime import cache
from petseg_runtime.cache import Compiled, Key, Slot, _locked, cache_folder, clear, compiled, entries
from petseg_runtime.cli.cache import _age
from petseg_runtime.errors import OutputError

KEY = Key(
    model="a" * 64,
    name="toy",
    engine="tensorrt",
    version="10.9.0",
    device="NVIDIA Toy, compute capability 8.9",
    driver="CUDA 13.0",
    settings={"profile": {"minimum": [1, 16, 32, 3]}},
)
SLOT = Slot(KEY, "engine")


class Compiler:
    """A fake compiler that counts its calls and never returns the same bytes twice, like TensorRT."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self) -> tuple[bytes, dict[str, Any]]:
        self.count += 1
        return f"compiled {self.count}".encode(), {"count": self.count}


@pytest.fixture
def make() -> Compiler:
    return Compiler()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache's folder, which does not exist yet."""
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache" / "engines"


def sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


# ------------------------------------------------------------------------------------------------------ location


def test_the_cache_folder_is_the_users_or_the_configured_one(
    isolated_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(isolated_cache))
    assert cache_folder() == isolated_cache / "petseg" / "engines"
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path))
    assert cache_folder() == tmp_path / "engines"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(cache.VARIABLE, "here")
    assert cache_folder() == tmp_path / "here" / "engines"
    monkeypatch.setenv(cache.VARIABLE, "")
    assert cache_folder() is None


@pytest.mark.parametrize("older", [False, True], ids=["platformdirs refuses", "platformdirs names a folder ~"])
def test_without_a_home_nothing_is_cached_and_the_reason_is_given(
    older: bool, make: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in a container that runs under a user ID that is not in its /etc/passwd."""

    def user_cache_path(name: str) -> Path:
        if not older:
            raise RuntimeError("could not determine the home directory")
        return Path("~/.cache", name)

    monkeypatch.delenv(cache.VARIABLE, raising=False)
    monkeypatch.setattr(cache.platformdirs, "user_cache_path", user_cache_path)
    monkeypatch.chdir(tmp_path)
    assert compiled(SLOT, make).note.endswith("; not kept: there is no home folder; set PETSEG_CACHE to a folder")
    assert (SLOT.write(b"x"), SLOT.read(), entries(), clear()) == ("", (None, ""), [], (0, 0))
    assert run(["cache"]) == 0
    told = "0 entries, 0.0 MB: nothing is kept, because there is no home folder; set PETSEG_CACHE to a folder\n"
    assert capsys.readouterr().out == told
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_private_to_the_user(folder: Path, make: Compiler) -> None:
    before = os.umask(0)
    try:
        compiled(SLOT, make)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700


def test_without_a_cache_everything_is_compiled_silently(
    make: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(cache.VARIABLE, "")
    monkeypatch.chdir(tmp_path)
    notes = [compiled(SLOT, make).note for _ in range(2)]
    assert make.count == 2
    assert all(re.fullmatch(r"compiled in \d+\.\d s", note) for note in notes)
    assert (SLOT.write(b"x"), SLOT.read(), entries(), clear()) == ("", (None, ""), [], (0, 0))
    assert list(tmp_path.iterdir()) == []


# ----------------------------------------------------------------------------------------- hits and misses


def test_a_second_request_is_served_from_the_cache(folder: Path, make: Compiler) -> None:
    first, second = compiled(SLOT, make), compiled(SLOT, make)
    assert (first.data, first.environment) == (second.data, second.environment) == (b"compiled 1", {"count": 1})
    assert re.fullmatch(r"compiled in \d+\.\d s", first.note)
    assert (second.seconds, second.note) == (None, "from the cache")
    path = SLOT.path(folder)
    assert {file.name for file in folder.iterdir()} == {path.name, f"{path.name}.json", f"{path.name}.lock"}
    described = json.loads(sidecar(path).read_text())
    assert described["key"] == dataclasses.asdict(KEY)
    assert described["sha256"] == hashlib.sha256(b"compiled 1").hexdigest()


@pytest.mark.parametrize("part", [part.name for part in dataclasses.fields(Key)])
def test_each_part_of_the_key_gives_a_separate_entry(part: str, folder: Path, make: Compiler) -> None:
    changed: Any = {"profile": None} if part == "settings" else "other"
    other = Slot(dataclasses.replace(KEY, **{part: changed}), "engine")
    compiled(SLOT, make)
    assert compiled(other, make).data == b"compiled 2"
    assert [compiled(slot, make).note for slot in (SLOT, other)] == ["from the cache"] * 2
    assert Slot(KEY, "kernels").read() == (None, "")


def test_the_order_of_settings_does_not_matter(folder: Path, make: Compiler) -> None:
    for settings in ({"a": 1, "b": 2}, {"b": 2, "a": 1}):
        compiled(Slot(dataclasses.replace(KEY, settings=settings), "engine"), make)
    assert make.count == 1


def test_a_failing_compiler_leaves_no_files_and_no_lock(folder: Path, make: Compiler) -> None:
    def fail() -> tuple[bytes, dict[str, Any]]:
        raise KeyError("of the compiler's own")

    with pytest.raises(KeyError, match="of the compiler's own"):
        compiled(SLOT, fail)
    assert entries() == []
    assert compiled(SLOT, make).not_kept == ""


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": "10.8.0"}, "tensorrt 10.9.0 instead of 10.8.0"),
        ({"driver": "CUDA 12.9"}, "driver CUDA 13.0 instead of CUDA 12.9"),
        ({"version": "9", "driver": "5"}, "tensorrt 10.9.0 instead of 9, driver CUDA 13.0 instead of 5"),
        ({"version": "10.8.0", "device": "another"}, ""),
        ({"version": "10.8.0", "model": "b" * 64}, ""),
        ({"version": "10.8.0", "settings": {}}, ""),
    ],
)
def test_an_entry_of_another_version_is_reported_and_kept(
    changes: dict[str, Any], words: str, folder: Path, make: Compiler
) -> None:
    older = Slot(dataclasses.replace(KEY, **changes), "engine")
    compiled(older, make)
    assert compiled(SLOT, make).why == words
    assert older.read()[0]


def test_of_several_older_entries_the_newest_is_named(folder: Path, make: Compiler) -> None:
    for version in ("10.9.1", "10.7", "10.8"):
        compiled(Slot(dataclasses.replace(KEY, version=version), "engine"), make)
    assert compiled(SLOT, make).note.endswith(" s: tensorrt 10.9.0 instead of 10.8")


# ----------------------------------------------------------------------------------------------- invalid entries


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def changed(path: Path) -> None:
    path.write_bytes(path.read_bytes().replace(b"1", b"7"))


def copied(path: Path) -> None:
    """Another, complete entry under this entry's name."""
    other = Slot(dataclasses.replace(KEY, device="another GPU"), "engine")
    compiled(other, Compiler())
    for one, two in ((other.path(path.parent), path), (sidecar(other.path(path.parent)), sidecar(path))):
        shutil.copy(one, two)


def linked(path: Path) -> None:
    shutil.move(path, path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def linked_description(path: Path) -> None:
    linked(sidecar(path))


def described(**changes: Any) -> Callable[[Path], None]:
    def describe(path: Path) -> None:
        sidecar(path).write_text(json.dumps(json.loads(sidecar(path).read_text()) | changes))

    return describe


def says(text: str | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        sidecar(path).write_bytes(text.encode() if isinstance(text, str) else text)

    return write


DAMAGED = "its description is damaged"


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        pytest.param(truncated, "the cached file's SHA-256 differs", id="truncated"),
        pytest.param(changed, "the cached file's SHA-256 differs", id="changed"),
        pytest.param(lambda path: path.write_bytes(b""), "the cached file's SHA-256 differs", id="empty"),
        pytest.param(lambda path: path.unlink(), "No such file or directory", id="gone"),
        pytest.param(linked, "symbolic links", id="link"),
        pytest.param(linked_description, "symbolic links", id="description is a link"),
        pytest.param(lambda path: sidecar(path).unlink(), "No such file or directory", id="description gone"),
        pytest.param(copied, "compiled from or for something else", id="wrong key"),
        pytest.param(says("{"), DAMAGED, id="no JSON"),
        pytest.param(says("[]"), DAMAGED, id="no object"),
        pytest.param(says(b"\xff\xfe\xfd"), DAMAGED, id="no text"),
        pytest.param(says("[" * 100_000), DAMAGED, id="deep"),
        pytest.param(says(" " * (cache.MAX_SIDECAR + 1)), "has more than 1048576 bytes", id="large"),
        pytest.param(described(schema_version=2), "written by another version of petseg", id="schema"),
        pytest.param(described(key={"model": "a"}), DAMAGED, id="short key"),
        pytest.param(described(key={**dataclasses.asdict(KEY), "driver": 5}), DAMAGED, id="odd key"),
        pytest.param(described(key=None), DAMAGED, id="no key"),
        pytest.param(described(sha256=None), DAMAGED, id="no digest"),
        pytest.param(described(created="yesterday"), DAMAGED, id="no date"),
        pytest.param(described(created="2026-11-22T23:00:00"), DAMAGED, id="no time zone"),
        pytest.param(described(environment=[]), DAMAGED, id="no environment"),
        pytest.param(described(bytes="many"), DAMAGED, id="no size"),
    ],
)
def test_an_invalid_entry_is_recompiled_and_the_reason_reported(
    spoil: Callable[[Path], None], words: str, folder: Path, make: Compiler
) -> None:
    compiled(SLOT, make)
    spoil(SLOT.path(folder))
    again = compiled(SLOT, make)
    assert (again.data, again.not_kept) == (b"compiled 2", "")
    assert words in again.why
    assert re.fullmatch(r"compiled again in \d+\.\d s: .*", again.note)
    assert compiled(SLOT, make) == Compiled(data=b"compiled 2", environment={"count": 2})


def test_a_pipe_in_the_place_of_an_entry_is_neither_read_nor_replaced(folder: Path, make: Compiler) -> None:
    path = SLOT.path(folder)
    compiled(SLOT, make)
    path.unlink()
    os.mkfifo(path)
    again = compiled(SLOT, make)
    assert (again.data, again.not_kept) == (b"compiled 2", "a device or pipe cannot be replaced by a file")
    assert "is not a regular file" in again.why
    assert path.is_fifo()


def test_a_file_rejected_by_the_engine_is_recompiled(folder: Path, make: Compiler) -> None:
    compiled(SLOT, make)
    assert compiled(SLOT, make, again="the engine refuses it").why == "the engine refuses it"
    assert compiled(SLOT, make).data == b"compiled 2"


# --------------------------------------------------------------------------------------------------- ownership


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_writable_by_others_is_not_used(mode: int, folder: Path, make: Compiler) -> None:
    compiled(SLOT, make)
    folder.chmod(mode)
    again = compiled(SLOT, make)
    assert (again.data, again.not_kept) == (
        b"compiled 2",
        f"other users may write to {folder}: run chmod go-w on it, or remove it",
    )
    assert "other users may write to it" not in again.why
    assert SLOT.path(folder).read_bytes() == b"compiled 1"
    assert "other users may write to" in SLOT.write(b"x")
    with pytest.raises(OutputError, match="cannot be cleared"):
        clear()
    folder.chmod(0o700)
    assert compiled(SLOT, make).data == b"compiled 1"


def test_a_folder_owned_by_another_user_is_not_used(
    folder: Path, make: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(SLOT, make)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
        again = compiled(SLOT, make)
        assert (again.data, again.not_kept) == (b"compiled 2", f"{folder} belongs to another user")
        with pytest.raises(OutputError, match=r"cannot be cleared .*belongs to another user"):
            clear()
    assert compiled(SLOT, make).data == b"compiled 1"


@pytest.mark.parametrize("part", [lambda path: path, sidecar], ids=["file", "description"])
def test_a_file_owned_by_another_user_is_not_loaded(
    part: Callable[[Path], Path], folder: Path, make: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(SLOT, make)
    foreign = part(SLOT.path(folder)).stat().st_ino
    real = os.fstat

    def fstat(descriptor: int) -> Any:
        found = real(descriptor)
        values = list(found)
        values[4] += found.st_ino == foreign
        return os.stat_result(values)

    monkeypatch.setattr(os, "fstat", fstat)
    again = compiled(SLOT, make)
    assert again.data == b"compiled 2"
    assert again.why.endswith(f"{part(SLOT.path(folder)).name} belongs to another user)")


# ----------------------------------------------------------------------------------------------------- unusable caches


def test_a_cache_that_cannot_be_created_only_costs_time(folder: Path, make: Compiler) -> None:
    folder.parent.write_text("a file in its place")
    first = compiled(SLOT, make)
    assert (first.data, first.not_kept) == (b"compiled 1", "Not a directory")
    assert first.note.endswith(" s; not kept: Not a directory")
    assert compiled(SLOT, make).data == b"compiled 2"
    assert SLOT.write(b"x") == "Not a directory"


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


@pytest.mark.parametrize("after", [0, 1])
def test_a_full_disk_is_reported_and_leaves_no_valid_entry(
    after: int, folder: Path, make: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full before the compiled file, or between it and its JSON file."""
    written: list[Path] = []
    real = cache.write_atomic

    def write(path: Path, data: bytes) -> None:
        if len(written) >= after:
            failing(errno.ENOSPC)()
        written.append(path)
        real(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "write_atomic", write)
        assert compiled(SLOT, make).not_kept == "No space left on device"
    assert bool(compiled(SLOT, make).why) == bool(after)
    assert compiled(SLOT, make).data == b"compiled 2"


def test_a_file_system_without_locks_disables_the_cache(
    folder: Path, make: Compiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOLCK))
    assert compiled(SLOT, make).not_kept == "No locks available"
    assert entries() == []


def test_a_read_only_cache_is_used(folder: Path, make: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled(SLOT, make)
    monkeypatch.setattr(os, "mkdir", failing(errno.EROFS))
    monkeypatch.setattr(cache, "_locked", failing(errno.EROFS))
    monkeypatch.setattr(cache, "write_atomic", failing(errno.EROFS))
    assert compiled(SLOT, make).note == "from the cache"
    changed(SLOT.path(folder))
    assert compiled(SLOT, make).note.endswith("SHA-256 differs; not kept: Read-only file system")


# ----------------------------------------------------------------------------------------------------- concurrency

WORKER = """
import hashlib, os, sys, time
from pathlib import Path
from petseg_runtime.cache import Key, Slot, compiled

log = Path(sys.argv[1])
slot = Slot(Key(model="a", name="toy", engine="tensorrt", version="1", device="GPU"), "engine")

def make():
    with log.open("a") as file:
        file.write(f"{os.getpid()}\\n")
    if sys.argv[2] == "hang":
        print("compiling", flush=True)
        time.sleep(1000)
    time.sleep(0.3)  # so that the others come while it compiles
    return os.urandom(1_000_000), {"by": os.getpid()}

print("ready", flush=True)
sys.stdin.readline()
result = compiled(slot, make)
print(hashlib.sha256(result.data).hexdigest(), result.environment["by"], result.not_kept, flush=True)
"""


def worker(log: Path, how: str = "") -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-W", "error", "-c", WORKER, str(log), how], text=True, **pipes)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def test_concurrent_processes_compile_an_entry_only_once(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [worker(log) for _ in range(4)]
    for process in processes:
        assert process.stdin
        process.stdin.write("\n")
        process.stdin.flush()
    answers = [process.communicate(timeout=100) for process in processes]
    assert [error for _, error in answers] == [""] * 4
    (answer,) = {out for out, _ in answers}
    (compiler,) = log.read_text().split()
    digest, by = answer.split()
    assert by == compiler
    (entry,) = entries()
    assert (entry.sha256, entry.problem) == (digest, "")
    assert hashlib.sha256(entry.path.read_bytes()).hexdigest() == digest


def test_a_process_killed_while_compiling_leaves_no_lock(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    first, second = worker(log, "hang"), worker(log)
    assert first.stdin
    assert first.stdout
    first.stdin.write("\n")
    first.stdin.flush()
    assert first.stdout.readline() == "compiling\n"
    first.send_signal(signal.SIGKILL)
    first.communicate(timeout=100)
    out, error = second.communicate("\n", timeout=100)
    assert error == ""
    assert out.split()[1] == str(second.pid)
    assert log.read_text().split() == [str(first.pid), str(second.pid)]


def test_concurrent_threads_compile_an_entry_only_once(folder: Path) -> None:
    make, started = Compiler(), threading.Barrier(4)

    def compile_slowly() -> tuple[bytes, dict[str, Any]]:
        threading.Event().wait(0.1)
        return make()

    def want(_: int) -> bytes:
        started.wait(60)
        return compiled(SLOT, compile_slowly).data

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(want, range(4))) == {b"compiled 1"}


def test_waiting_for_another_compilation_is_announced(folder: Path, make: Compiler) -> None:
    told, begun, waits = [], threading.Event(), threading.Event()

    def compile_slowly() -> tuple[bytes, dict[str, Any]]:
        begun.set()
        assert waits.wait(60)
        return make()

    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(compiled, SLOT, compile_slowly, wait=lambda: told.append("first"))
        assert begun.wait(60)
        assert compiled(SLOT, make, wait=waits.set) == compiled(SLOT, make)
        assert first.result().note.startswith("compiled in")
    assert (told, make.count) == ([], 1)


# ------------------------------------------------------------------------------------------------- listing and clearing


@pytest.fixture
def filled(folder: Path, make: Compiler) -> Path:
    """A cache with an engine, kernels, a damaged engine, an unfinished file, and foreign files."""
    compiled(SLOT, make)
    Slot(KEY, "kernels").write(b"kernels")
    damaged = Slot(dataclasses.replace(KEY, version="10.8"), "engine")
    compiled(damaged, make)
    truncated(damaged.path(folder))
    (folder / f".{'0' * 35}.01234567.part.engine").write_bytes(b"unfinished")
    outside = folder.parent / "outside"
    outside.mkdir()
    (outside / "precious").write_text("precious")
    (folder / ("1" * 64 + ".engine")).symlink_to(outside / "precious")
    (folder / ("2" * 64 + ".blob")).symlink_to(outside)
    (folder / ("3" * 64 + ".engine")).mkdir()
    (folder / "README").write_text("not ours")
    return folder


def test_all_entries_are_listed_with_their_problems(filled: Path) -> None:
    found = entries()
    assert {(entry.path.name[:3], entry.path.suffix, entry.problem) for entry in found if entry.key is None} == {
        (".00", ".engine", "not finished"),
        ("111", ".engine", "No such file or directory"),
        ("222", ".blob", "No such file or directory"),
    }
    assert {(entry.path.suffix, entry.key.version, entry.problem) for entry in found if entry.key} == {
        (".engine", "10.9.0", ""),
        (".kernels", "10.9.0", ""),
        (".engine", "10.8", "its size differs"),
    }
    well = [entry for entry in found if entry.key and not entry.problem]
    assert all(entry.size == entry.path.stat().st_size + sidecar(entry.path).stat().st_size for entry in well)


def test_clearing_removes_only_petsegs_files_and_follows_no_links(filled: Path) -> None:
    names = [
        path for path in filled.iterdir() if path.name != "README" and not (path.is_dir() and not path.is_symlink())
    ]
    expected = len(names), sum(path.lstat().st_size for path in names)
    assert clear() == expected
    assert {path.name for path in filled.iterdir()} == {"README", "3" * 64 + ".engine"}
    assert (filled.parent / "outside" / "precious").read_text() == "precious"
    assert clear() == (0, 0)
    assert entries() == []


def test_clearing_keeps_the_lock_of_an_active_compilation(filled: Path) -> None:
    path = filled / f"{'4' * 64}.engine"
    with _locked(path):
        clear()
        assert [file.name for file in filled.iterdir() if file.name.endswith(".lock")] == [f"{path.name}.lock"]
    assert clear()[0] == 1


def test_a_waiter_on_a_cleared_lock_takes_the_new_one(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = filled / f"{'4' * 64}.engine"
    lock = path.with_name(f"{path.name}.lock")
    asks, order, real = threading.Event(), [], fcntl.flock

    def flock(descriptor: int, how: int) -> None:
        asks.set()
        real(descriptor, how)

    def wait() -> None:
        with _locked(path):
            order.append("second")

    with _locked(path):
        monkeypatch.setattr(fcntl, "flock", flock)
        waiting = threading.Thread(target=wait)
        waiting.start()
        assert asks.wait(10)
        lock.unlink()  # by another program
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]
    assert lock.exists(), "the waiter holds a lock file that others can see"


def test_lock_files_are_cleared_on_file_systems_without_locks(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(descriptor: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    (filled / f"{'4' * 64}.engine.lock").touch()
    monkeypatch.setattr(fcntl, "flock", none)
    clear()
    assert not [file for file in filled.iterdir() if file.name.endswith(".lock")]


def test_unremovable_files_are_reported_and_the_rest_is_removed(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.suffix == ".kernels":
            failing(errno.EACCES)()
        real(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    with pytest.raises(OutputError, match=r"not removed: .*\.kernels: Permission denied \(\d+ other files were\)"):
        clear()
    assert [entry.path.suffix for entry in entries()] == [".kernels"]


def test_an_unreadable_folder_is_an_error(folder: Path) -> None:
    folder.parent.mkdir()
    folder.write_text("a file in its place")
    for ask in (entries, clear):
        with pytest.raises(OutputError, match=rf"{re.escape(str(folder))}: the cache cannot be"):
            ask()


# ------------------------------------------------------------------------------------------------- petseg cache


@pytest.mark.parametrize(("words", "said"), [([], "read"), (["--clear"], "cleared")])
def test_a_cache_inside_a_file_is_an_error(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file"))
    assert run(["cache", *words]) == 6
    assert f"the cache cannot be {said} (Not a directory)" in capsys.readouterr().err


def test_the_command_lists_and_clears(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    total = sum(entry.size for entry in entries())
    assert run(["cache"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert err == ""
    assert lines[0].split() == ["model", "compiled", "for", "device", "size", "age"]
    assert re.search(
        r"^toy +tensorrt 10\.9\.0 +NVIDIA Toy, compute capability 8\.9 +0\.0 MB +\d+ s$", out, re.MULTILINE
    )
    assert re.search(r"^toy +tensorrt 10\.9\.0 \(kernels\) +NVIDIA", out, re.MULTILINE)
    assert re.search(r"^toy +tensorrt 10\.8 .*will be compiled again: its size differs$", out, re.MULTILINE)
    assert lines[-1] == f"{len(lines) - 2} entries, 0.0 MB in {filled}"
    assert run(["cache", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["schema_version"], record["folder"], record["bytes"]) == (1, str(filled), total)
    (kernels,) = (entry for entry in record["entries"] if entry["kind"] == "kernels")
    assert kernels["key"] == dataclasses.asdict(KEY)
    assert run(["cache", "--clear", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert set(record) == {"schema_version", "folder", "removed", "bytes"}
    assert record["bytes"] == total
    assert run(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == f"0 files removed, 0.0 MB in {filled}\n"
    assert run(["cache"]) == 0
    assert capsys.readouterr().out == f"0 entries, 0.0 MB in {filled}\n"


def test_the_command_says_that_the_cache_is_disabled(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(cache.VARIABLE, "")
    assert run(["cache"]) == 0
    assert capsys.readouterr().out == "0 entries, 0.0 MB: nothing is kept, because PETSEG_CACHE is empty\n"
    assert run(["cache", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"schema_version": 1, "folder": None, "bytes": 0, "entries": []}


def test_the_command_exits_with_6_if_it_cannot_clear(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled.chmod(0o777)
    assert run(["cache", "--clear"]) == 6
    assert "other users may write to" in capsys.readouterr().err
    assert len(entries()) > 3


@pytest.mark.parametrize(
    ("seconds", "words"), [(-5, "0 s"), (59, "59 s"), (61, "1 min"), (7199, "1 h"), (90_000, "1 d"), (9e7, "1041 d")]
)
def test_ages_are_shown_in_the_largest_unit(seconds: float, words: str) -> None:
    now = datetime.datetime(2026, 3, 29, 1, 30, tzinfo=datetime.UTC)
    assert _age((now - datetime.timedelta(seconds=seconds)).isoformat(), now) == words


def test_unprintable_names_are_escaped(folder: Path, make: Compiler, capsys: pytest.CaptureFixture[str]) -> None:
    compiled(Slot(dataclasses.replace(KEY, name="evil\x1b[2J\nname"), "engine"), make)
    run(["cache"])
    assert r"evil\x1b[2J\nname" in capsys.readouterr().out


def test_the_command_imports_neither_numpy_nor_an_engine(filled: Path) -> None:
    program = (
        "import sys; from petseg.cli import run; run(['cache']); run(['cache', '--clear']);"
        "print({*sys.modules} & {'numpy', 'PIL', 'openvino', 'onnxruntime', 'tensorrt', 'tensorrt_rtx', 'torch'})"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=100)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "set()"
