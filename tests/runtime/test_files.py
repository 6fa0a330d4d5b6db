"""Files are replaced atomically."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from petseg_runtime.files import read_text, real_paths, replacing, staging, synced, synced_folder, write_atomic


def test_text_is_read_up_to_a_byte_limit(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("Ärger", encoding="utf-8")
    assert read_text(path, 6) == "Ärger"
    with pytest.raises(OSError, match="larger than 5 bytes"):
        read_text(path, 5)
    path.write_bytes(b"\xff")
    with pytest.raises(UnicodeDecodeError):
        read_text(path, 5)
    with pytest.raises(FileNotFoundError):
        read_text(tmp_path / "b.json", 5)


@pytest.mark.parametrize("name", ["link.png", "./a.png", "b/../a.png", "loop/a.png", "nowhere/a.png", ""])
def test_real_paths_match_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.png").write_bytes(b"a photo")
    (folder / "b").symlink_to(tmp_path)
    (folder / "link.png").symlink_to("a.png")
    (folder / "loop").symlink_to("loop")
    monkeypatch.chdir(folder)
    for path in (name, str(folder / name)):
        assert real_paths()(path) == os.path.realpath(path)


@pytest.fixture(params=["absent", "present"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A destination, with and without an existing file."""
    path = tmp_path / "result.png"
    if request.param == "present":
        path.write_bytes(b"old")
    return path


@pytest.fixture
def umask() -> Iterator[int]:
    before = os.umask(0o027)
    yield 0o027
    os.umask(before)


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def listed(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir()]


def test_the_file_has_the_new_bytes_and_no_temporary_file_remains(path: Path) -> None:
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"
    assert listed(path.parent) == [path.name]


def test_empty_content_creates_an_empty_file(path: Path) -> None:
    write_atomic(path, b"")
    assert path.read_bytes() == b""


def test_parent_folders_are_created(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b" / "c.txt", b"new")
    assert (tmp_path / "a" / "b" / "c.txt").read_bytes() == b"new"


def test_the_destination_is_unchanged_until_the_end(path: Path) -> None:
    before = content(path)
    with replacing(path) as beside:
        beside.write_bytes(b"half")
        assert content(path) == before
        assert beside.parent == path.parent  # otherwise the rename would not be atomic
        assert beside.suffix == path.suffix  # writers choose the format by it
        assert beside.name.startswith(".")  # a glob for results does not find it
    assert content(path) == b"half"


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_leaves_everything_unchanged(path: Path, error: type[BaseException]) -> None:
    def stop_half_way() -> None:
        with replacing(path) as beside:
            beside.write_bytes(b"half")
            raise error

    before = content(path)
    with pytest.raises(error):
        stop_half_way()
    assert content(path) == before
    assert listed(path.parent) == ([path.name] if before else [])


def test_an_error_before_anything_was_written_leaves_nothing(path: Path) -> None:
    before = content(path)
    with pytest.raises(ValueError, match="early"), replacing(path):
        raise ValueError("early")
    assert content(path) == before


def test_not_writing_the_file_is_an_error_and_changes_nothing(path: Path) -> None:
    before = content(path)
    with pytest.raises(FileNotFoundError), replacing(path):
        pass
    assert content(path) == before


@pytest.mark.parametrize("step", ["fsync", "write"])
def test_a_full_disk_keeps_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = content(path)
    with monkeypatch.context() as patch:
        if step == "fsync":
            patch.setattr(os, "fsync", full)
        with room_for(1000 if step == "fsync" else 10), pytest.raises(OSError, match=r"No space|File too large"):
            write_atomic(path, b"more than that" * 10)
    assert content(path) == before
    assert listed(path.parent) == ([path.name] if before else [])


@contextlib.contextmanager
def room_for(most: int) -> Iterator[None]:
    """Limits the size of files: the rest of a write fails, as on a disk that fills up."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_the_file_is_synced_before_the_rename(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    fsync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        steps.append(("fsync", os.fstat(descriptor).st_size))
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        steps.append(("rename", self.stat().st_size))
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", renamed)
    write_atomic(path, b"12345")
    assert steps == [("fsync", 5), ("rename", 5)]


def test_permissions_follow_the_umask(path: Path, umask: int) -> None:
    write_atomic(path, b"new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_a_folder_at_the_destination_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "kept").touch()
    with pytest.raises(OSError, match="taken"):
        write_atomic(tmp_path / "taken", b"new")
    assert listed(tmp_path) == ["taken"]
    assert listed(tmp_path / "taken") == ["kept"]


def test_a_file_in_place_of_a_parent_folder_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(OSError, match="file"):
        write_atomic(tmp_path / "file" / "below.txt", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"


def write_staged(path: Path, data: bytes) -> None:
    with staging(path) as folder:
        (folder / path.name).write_bytes(data)


@pytest.mark.parametrize("write", [write_atomic, write_staged])
def test_a_pipe_or_a_link_to_a_device_is_an_error_and_stays(
    tmp_path: Path, write: Callable[[Path, bytes], None]
) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(os.devnull)
    for name in ("pipe", "link"):
        with pytest.raises(OSError, match=f"a device or pipe cannot be replaced by a file: .*{name}"):
            write(tmp_path / name, b"new")
    assert set(listed(tmp_path)) == {"link", "pipe"}
    assert (tmp_path / "pipe").is_fifo()
    assert (tmp_path / "link").is_symlink()


def test_nothing_in_dev_is_replaced() -> None:
    """A link as /dev/stdout may lead to a regular file; root could replace it."""
    with pytest.raises(OSError, match="a device or pipe cannot be replaced by a file"):
        write_atomic(Path("/dev/petseg-test"), b"new")


def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"old")
    (tmp_path / "link").symlink_to("kept")
    write_atomic(tmp_path / "link", b"new")
    assert (tmp_path / "kept").read_bytes() == b"old"
    assert (tmp_path / "link").read_bytes() == b"new"


@pytest.mark.parametrize(
    "name",
    ["n" * 255, "猫" * 85, "🐈" * 60 + ".png", "a." + "s" * 253, "." + "h" * 254, "猫." + "猫" * 20, "no_suffix", ".x"],
    ids=["long", "long utf-8", "long with suffix", "long suffix", "long hidden", "utf-8 suffix", "none", "hidden"],
)
def test_every_name_valid_on_the_file_system_is_accepted(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.touch()  # the name is valid
    write_atomic(path, b"new")
    assert listed(tmp_path) == [name]
    assert path.read_bytes() == b"new"


def test_concurrent_writers_leave_one_complete_file(tmp_path: Path) -> None:
    path = tmp_path / "shared.bin"
    contents = [bytes([number]) * 10_000 for number in range(8)]
    threads = [threading.Thread(target=write_atomic, args=(path, data)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents
    assert listed(tmp_path) == ["shared.bin"]


# --------------------------------------------------------------------------------------------------- groups of files

PARTS = ("model.xml", "model.bin", "model.xml.json")


@pytest.fixture(params=["absent", "present", "in part"])
def main(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The destination of a model of three files: empty, with another model, and with a part of one."""
    for name in {"absent": (), "present": PARTS, "in part": PARTS[:2]}[request.param]:
        (tmp_path / name).write_text(f"old {name}")
    (tmp_path / "other.bin").write_text("not ours")
    return tmp_path / "model.xml"


def everything(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def stage(main: Path, error: BaseException | None = None) -> None:
    with staging(main) as folder:
        for name in PARTS:
            (folder / name).write_text(f"new {name}")
        if error:
            raise error


NEW = {"other.bin": "not ours", **{name: f"new {name}" for name in PARTS}}


def test_all_staged_files_are_moved_and_nothing_else_changes(main: Path) -> None:
    stage(main)
    assert everything(main.parent) == NEW
    assert sorted(listed(main.parent)) == sorted(NEW)


def test_all_destinations_are_unchanged_until_the_end(main: Path) -> None:
    before = everything(main.parent)
    with staging(main) as folder:
        assert folder.parent == main.parent  # one file system
        assert folder.name.startswith(".")
        assert list(folder.iterdir()) == []
        for name in PARTS:
            (folder / name).write_text(f"new {name}")
        assert {name: text for name, text in everything(main.parent).items() if "/" not in name} == before


def test_the_main_file_is_moved_last(main: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If it exists, so do the others."""
    arrived = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        if target.parent == main.parent:
            arrived.append(target.name)
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    stage(main)
    assert sorted(arrived) == sorted(PARTS)
    assert arrived[-1] == main.name


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_error_while_staging_leaves_everything_unchanged(main: Path, error: type[BaseException]) -> None:
    before = everything(main.parent)
    with pytest.raises(error):
        stage(main, error())
    assert everything(main.parent) == before
    assert sorted(listed(main.parent)) == sorted(before)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failed_move_leaves_everything_unchanged(
    main: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    """Whichever of the moves fails; those that restore the previous files succeed."""
    before = everything(main.parent)
    set_aside = sum(name in before for name in PARTS if name != main.name)
    for failing in range(len(PARTS) + set_aside):
        moves, replace = iter(range(100)), Path.replace

        def breaking(self: Path, target: Path, failing=failing, moves=moves, replace=replace) -> Path:
            if next(moves) == failing:
                raise error
            return replace(self, target)

        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", breaking)
            with pytest.raises(type(error)):
                stage(main)
        assert everything(main.parent) == before
        assert sorted(listed(main.parent)) == sorted(before)
    stage(main)
    assert everything(main.parent) == NEW


@pytest.mark.parametrize("name", PARTS)
def test_a_folder_at_any_destination_is_an_error_and_nothing_changes(main: Path, name: str) -> None:
    (main.parent / name).unlink(missing_ok=True)
    (main.parent / name).mkdir()
    (main.parent / name / "kept").write_text("kept")
    before = everything(main.parent)
    with pytest.raises(IsADirectoryError, match=name):
        stage(main)
    assert everything(main.parent) == before
    assert not [entry for entry in listed(main.parent) if entry.endswith(".part")]


def test_staging_creates_parent_folders(tmp_path: Path) -> None:
    stage(tmp_path / "a" / "b" / "model.xml")
    assert sorted(listed(tmp_path / "a" / "b")) == sorted(PARTS)


def test_staging_with_a_file_in_place_of_a_parent_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="file"):
        stage(tmp_path / "file" / "model.xml")
    assert everything(tmp_path) == {"file": "old"}


def test_a_link_is_replaced_by_the_staged_file_and_its_target_stays(tmp_path: Path) -> None:
    (tmp_path / "kept").write_text("kept")
    for name in PARTS:
        (tmp_path / name).symlink_to("kept")
    stage(tmp_path / "model.xml")
    assert everything(tmp_path) == {"kept": "kept", **{name: f"new {name}" for name in PARTS}}


@pytest.mark.parametrize("name", ["n" * 251 + ".xml", "猫" * 83 + ".xml"], ids=["long", "long utf-8"])
def test_staging_accepts_every_name_valid_on_the_file_system(tmp_path: Path, name: str) -> None:
    with staging(tmp_path / name) as folder:
        (folder / name).write_text("new")
    assert everything(tmp_path) == {name: "new"}


def test_concurrent_staging_of_the_same_files_does_not_mix(tmp_path: Path) -> None:
    main = tmp_path / "model.xml"
    with staging(main) as one, staging(main) as two:
        assert one != two
        for folder in (one, two):
            (folder / "model.xml").write_text(folder.name)
    assert everything(tmp_path) == {"model.xml": one.name}


def test_a_failed_file_is_not_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    flushed: list[int] = []
    monkeypatch.setattr(os, "fsync", flushed.append)
    with pytest.raises(KeyError), synced_folder(tmp_path), synced(tmp_path / "never-written"):
        raise KeyError
    assert not flushed


def test_a_folder_is_synced_after_the_body_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recording in segments would run out of descriptors."""
    synced: list[int] = []

    def sync(descriptor: int) -> None:
        assert os.path.samestat(os.fstat(descriptor), tmp_path.stat())
        synced.append(descriptor)

    monkeypatch.setattr(os, "fsync", sync)
    with synced_folder(tmp_path):
        assert not synced
    (descriptor,) = synced
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


def test_a_folder_that_cannot_be_synced_is_not_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "fsync", refuse)
    with synced_folder(tmp_path):
        (tmp_path / "a").touch()
    with pytest.raises(OSError, match="Invalid argument"), synced(tmp_path / "a"):
        pass
