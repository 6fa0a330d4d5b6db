"""Results are noted once they are in place; those truncated, changed or made with other settings are not reused."""

from __future__ import annotations

import fcntl
import json
import os
import re
import resource
import threading
import tracemalloc
from collections.abc import Callable
from pathlib import Path, PurePath
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petseg_runtime.errors import OutputError
from petseg_runtime.journal import JOURNAL, Journal, OwnFiles, Values
from petseg_runtime.sources import STDIN, Item

SETTINGS = {"as": "mask", "threshold": 0.5, "background": None}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The output folder."""
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


@pytest.fixture
def photo(tmp_path: Path, folder: Path) -> Callable[..., Item]:
    """A function that creates a photo, and its result in place."""

    def make(name: str = "cat") -> Item:
        source = tmp_path / f"{name}.jpg"
        if not source.exists():
            source.write_bytes(b"photo")
            result(folder, name).write_bytes(b"result")
        return Item(source, PurePath(name))

    return make


def result(folder: Path, name: str = "cat") -> Path:
    return folder / f"{name}.png"


def note(folder: Path, *items: Item, **changes: Any) -> None:
    """A first run that segmented these photos."""
    with Journal(folder, SETTINGS | changes, resume=False) as journal:
        for item in items:
            assert not journal.finished(item, result(folder, str(item.name)))
            journal.add(item, result(folder, str(item.name)))


def is_finished(folder: Path, item: Item, **changes: Any) -> bool:
    """Whether a resumed run skips an item."""
    with Journal(folder, SETTINGS | changes, resume=True) as journal:
        return journal.finished(item, result(folder, str(item.name)))


Photo = Callable[..., Item]


# --------------------------------------------------------------------------------------------- resuming


def test_only_noted_photos_are_finished(folder: Path, photo: Photo) -> None:
    cat, dog = photo("cat"), photo("dog")
    note(folder, cat)
    assert is_finished(folder, cat)
    assert not is_finished(folder, dog)


def test_resuming_without_a_journal_starts_a_run(folder: Path, photo: Photo) -> None:
    assert not is_finished(folder, photo())
    with Journal(folder, SETTINGS, resume=True) as journal:
        journal.add(photo(), result(folder))
    assert is_finished(folder, photo())


def test_a_resumed_run_appends_to_the_journal(folder: Path, photo: Photo) -> None:
    cat, dog = photo("cat"), photo("dog")
    note(folder, cat)
    with Journal(folder, SETTINGS, resume=True) as journal:
        journal.add(dog, result(folder, "dog"))
    assert is_finished(folder, cat)
    assert is_finished(folder, dog)


def test_a_run_without_resume_discards_the_journal(folder: Path, photo: Photo) -> None:
    cat = photo()
    note(folder, cat)
    note(folder)
    assert not is_finished(folder, cat)


def test_a_line_is_on_disk_once_added(folder: Path, photo: Photo) -> None:
    with Journal(folder, SETTINGS, resume=False) as journal:
        journal.add(photo(), result(folder))
        lines = (folder / JOURNAL).read_text().splitlines()
    assert [json.loads(line).get("name") for line in lines] == [None, "cat"]


def test_a_changed_photo_is_redone(folder: Path, photo: Photo) -> None:
    cat = photo()
    note(folder, cat)
    os.utime(cat.source, ns=(1, 1))
    assert not is_finished(folder, cat)
    note(folder, cat)
    cat.source.write_bytes(b"another photo")
    assert not is_finished(folder, cat)
    cat.source.unlink()
    assert not is_finished(folder, cat)


def test_a_photo_changed_while_read_is_redone(folder: Path, photo: Photo) -> None:
    """It is unknown which of the two versions was segmented."""
    cat = photo()
    with Journal(folder, SETTINGS, resume=False) as journal:
        assert not journal.finished(cat, result(folder))
        cat.source.write_bytes(b"another photo")
        journal.add(cat, result(folder))
    assert not is_finished(folder, cat)


def test_another_photo_under_the_same_name_is_redone(folder: Path, photo: Photo) -> None:
    note(folder, photo("cat"))
    other = photo("other")
    assert not is_finished(folder, Item(other.source, PurePath("cat")))


def test_a_missing_or_truncated_result_is_redone(folder: Path, photo: Photo) -> None:
    cat = photo()
    note(folder, cat)
    result(folder).write_bytes(b"res")
    assert not is_finished(folder, cat)
    result(folder).unlink()
    assert not is_finished(folder, cat)
    result(folder).write_bytes(b"result")
    assert is_finished(folder, cat)


def test_stdin_is_identified_by_content_not_length(folder: Path, photo: Photo) -> None:
    photo("stdin")
    one, two = (Item(STDIN, PurePath("stdin"), data=data) for data in (b"one", b"two"))
    note(folder, one)
    assert is_finished(folder, one)
    assert not is_finished(folder, two)


@pytest.mark.parametrize("first", ["photos/cat.jpg", "./photos/../photos/cat.jpg", "link/cat.jpg", None])
@pytest.mark.parametrize("then", ["cat.jpg", "../link/cat.jpg", None])
def test_a_photo_is_recognised_however_its_path_is_spelled(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: str | None, then: str | None
) -> None:
    source = tmp_path / "photos" / "cat.jpg"
    source.parent.mkdir()
    source.write_bytes(b"photo")
    (tmp_path / "link").symlink_to("photos")
    result(folder).write_bytes(b"result")
    monkeypatch.chdir(tmp_path)
    note(folder, Item(Path(first or source), PurePath("cat")))
    monkeypatch.chdir(tmp_path / "photos")
    assert is_finished(folder, Item(Path(then or source), PurePath("cat")))


def test_a_run_knows_which_photos_are_noted(folder: Path, photo: Photo) -> None:
    cat, dog = photo("cat"), photo("dog")
    note(folder, cat)
    result(folder, "cat").unlink()
    with Journal(folder, SETTINGS, resume=True) as journal:
        assert (journal.noted, journal.knows(cat), journal.knows(dog)) == (1, True, False)
    with Journal(folder, SETTINGS, resume=False) as journal:
        assert (journal.noted, journal.knows(cat)) == (0, False)


# ----------------------------------------------------------------------------------------- results in one file


def test_values_are_restored_except_for_changed_photos(folder: Path, photo: Photo) -> None:
    cat, dog = photo("cat"), photo("dog")
    with Journal(folder, SETTINGS, resume=False) as journal:
        journal.add(cat, None, {"height": 3, "name": "caf\udce9"})
        journal.add(dog, None, {"height": 4})
        assert journal.value(cat) == {"height": 3, "name": "caf\udce9"}
    dog.source.write_bytes(b"no longer a photo")
    with Journal(folder, SETTINGS, resume=True) as journal:
        assert journal.finished(cat, None)
        assert not journal.finished(dog, None)
        assert journal.value(cat) == {"height": 3, "name": "caf\udce9"}
        assert journal.value(dog) is None
        assert journal.value(photo("bird")) is None


def test_values_stay_in_the_file_not_in_memory(folder: Path, photo: Photo) -> None:
    cat = photo()
    names = [f"cat-{number}" for number in range(40)]
    with Journal(folder, SETTINGS, resume=False) as journal:
        tracemalloc.start()
        for name in names:
            journal.add(Item(cat.source, PurePath(name)), None, {"name": name, "outline": list(range(5000))})
        kept, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        items = [Item(cat.source, PurePath(name)) for name in names]
        for _ in range(2):
            assert [value["name"] for _, value in Values(journal, items)] == names
    assert kept < 200 * 5000, "one of the forty values may not be freed yet"
    with Journal(folder, SETTINGS, resume=True) as journal:
        assert [value["name"] for _, value in Values(journal, [*items, photo("dog")])] == names


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda noted: b"", id="empty"),
        pytest.param(lambda noted: b"{}\n" * 100, id="other lines"),
        pytest.param(lambda noted: b'{"schema_version": 2, "settings": {}}\n' * 9, id="another header"),
        pytest.param(lambda noted: noted.replace(b'"cat"', b'"dog"'), id="another photo"),
        pytest.param(lambda noted: noted.replace(b'"name"', b'"mane"'), id="no photo"),
        pytest.param(lambda noted: re.sub(rb"[^\n]", b"1", noted), id="a number"),
    ],
)
def test_a_value_corrupted_by_another_program_is_an_output_error(
    folder: Path, photo: Photo, spoil: Callable[[bytes], bytes]
) -> None:
    cat, path = photo(), folder / JOURNAL
    with Journal(folder, SETTINGS, resume=False) as journal:
        journal.add(cat, None, {"height": 3})
        path.write_bytes(spoil(path.read_bytes()))
        with pytest.raises(OutputError, match=r"petseg-run\.ndjson: changed by another program .* --resume"):
            journal.value(cat)


# -------------------------------------------------------------------------------------------- other settings


def test_other_settings_are_rejected_with_both_values(folder: Path, photo: Photo) -> None:
    cat = photo()
    note(folder, cat)
    before = (folder / JOURNAL).read_bytes()
    with pytest.raises(OutputError) as caught:
        is_finished(folder, cat, threshold=0.7, background="white")
    message = str(caught.value)
    assert message.startswith(f"{folder}: the run there had other settings")
    assert "threshold was 0.5, now 0.7" in message
    assert "background was None, now 'white'" in message
    assert "as was" not in message
    assert "--resume" in message
    assert (folder / JOURNAL).read_bytes() == before
    assert is_finished(folder, cat)


def test_a_setting_missing_on_one_side_is_a_different_setting(folder: Path, photo: Photo) -> None:
    note(folder, photo())
    with pytest.raises(OutputError, match="min_area was None, now 0"):
        is_finished(folder, photo(), min_area=0.1)


def test_a_video_only_setting_does_not_invalidate_photos(folder: Path, photo: Photo) -> None:
    cat, dog = photo("cat"), photo("dog")
    note(folder, cat, format="png")
    with Journal(folder, SETTINGS | {"format": "png", "video_format": "mp4"}, resume=True) as journal:
        assert journal.finished(cat, result(folder, "cat"))
        journal.add(dog, result(folder, "dog"))
    for more in ({}, {"video_format": "mp4"}):
        for item in (cat, dog):
            assert is_finished(folder, item, format="png", **more)
    with pytest.raises(OutputError, match="video_format was 'mp4', now 'webm'"):
        is_finished(folder, cat, format="jpg", video_format="webm")


@pytest.mark.parametrize(
    "header",
    ['{"schema_version": 1, "settings": {}}', '{"schema_version": 2}', '{"schema_version": 2, "settings": 7}'],
)
def test_a_journal_of_another_version_is_rejected(folder: Path, photo: Photo, header: str) -> None:
    (folder / JOURNAL).write_text(header + "\n")
    with pytest.raises(OutputError, match="not a journal of this version of petseg; start again without --resume"):
        is_finished(folder, photo())
    note(folder, photo())  # as the message advises
    assert is_finished(folder, photo())


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("text", ["{}\n", "export PATH=/bin\n", '{"schema_version"', "\n", "\0" * 30])
def test_a_file_that_is_not_a_journal_is_not_modified(folder: Path, text: str, resume: bool) -> None:
    begun = '{"schema_version": '.startswith(text)
    (folder / JOURNAL).write_text(text)
    if begun:  # cut off by a crash
        Journal(folder, SETTINGS, resume=resume).close()
        assert json.loads((folder / JOURNAL).read_text())["settings"] == SETTINGS
        return
    with pytest.raises(
        OutputError, match=r"ndjson: not a journal of petseg, so it was not changed; move it away, or choose"
    ):
        Journal(folder, SETTINGS, resume=resume)
    assert (folder / JOURNAL).read_text() == text


@pytest.mark.parametrize("resume", [True, False])
@pytest.mark.parametrize("there", [True, False])
def test_a_link_in_place_of_the_journal_is_not_followed(
    folder: Path, tmp_path: Path, photo: Photo, there: bool, resume: bool
) -> None:
    """In an unpacked folder it may lead to any file of the user."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    mine = elsewhere / JOURNAL
    if there:
        note(elsewhere, photo())  # even if that is a journal
    before = mine.read_bytes() if there else None
    (folder / JOURNAL).symlink_to(mine)
    with pytest.raises(OutputError, match=r"ndjson: a symlink, which is not followed; remove it"):
        Journal(folder, SETTINGS, resume=resume)
    assert (mine.read_bytes() if mine.exists() else None) == before


def test_a_pipe_in_place_of_the_journal_is_rejected_without_blocking(folder: Path) -> None:
    os.mkfifo(folder / JOURNAL)
    with pytest.raises(OutputError, match=r"ndjson: not a regular file; remove it"):
        Journal(folder, SETTINGS, resume=False)


def test_lines_of_a_run_with_other_settings_are_ignored(folder: Path, photo: Photo) -> None:
    """Two runs shared the folder; the header is that of the later one."""
    cat, dog = photo("cat"), photo("dog")
    with (
        Journal(folder, SETTINGS | {"threshold": 0.9}, resume=False) as first,
        Journal(folder, SETTINGS, resume=False) as second,
    ):
        second.add(dog, result(folder, "dog"))
        first.add(cat, result(folder, "cat"))
    assert is_finished(folder, dog)
    assert not is_finished(folder, cat)


# ----------------------------------------------------------------------------------------- after a crash


def test_a_journal_truncated_anywhere_can_be_resumed_repeatedly(folder: Path, photo: Photo) -> None:
    cat, dog, bird = photo("cat"), photo("dog"), photo("bird")
    note(folder, cat, dog)
    path = folder / JOURNAL
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for length in sorted({*range(0, len(whole), 11), *(end - cut for end in ends for cut in (0, 1, 2))}):
        path.write_bytes(whole[:length])
        with Journal(folder, SETTINGS, resume=True) as journal:
            assert journal.finished(cat, result(folder, "cat")) is (length >= ends[1] - 1)
            assert journal.finished(dog, result(folder, "dog")) is (length >= ends[2] - 1)
            journal.add(bird, result(folder, "bird"))
        assert is_finished(folder, bird), f"cut after {length} bytes"
        assert is_finished(folder, cat) is (length >= ends[1] - 1)


@given(st.binary(max_size=60), st.booleans())
@settings(max_examples=40)
def test_garbage_at_the_end_does_not_affect_earlier_lines(
    tmp_path_factory: pytest.TempPathFactory, junk: bytes, deep: bool
) -> None:
    folder = tmp_path_factory.mktemp("junk")
    source = folder / "cat.jpg"
    source.write_bytes(b"photo")
    result(folder).write_bytes(b"result")
    item = Item(source, PurePath("cat"))
    note(folder, item)
    with (folder / JOURNAL).open("ab") as file:
        file.write(junk + b"[" * 100_000 * deep)
    assert is_finished(folder, item)
    assert is_finished(folder, item)


def test_only_a_killed_runs_partial_files_are_removed(folder: Path) -> None:
    long = "x" * 60
    left = {
        "cat": [".cat.0123abcd.part.png", ".cat-2.0123abcd.part.mp4", "cat/.0001.0123abcd.part.png"],
        "deep/er/cat.v2": ["deep/er/.cat.v2.0123abcd.part.webp"],
        "two\nlines": [".two\nlines.0123abcd.part.png"],
        "caf\udce9": [".caf\udce9.0123abcd.part.jpg"],
        long: [f".{long[:35]}.0123abcd.part.png"],
    }
    whole = [".annotations.0123abcd.part.json"]  # of all items
    own = ["cat.part.png", ".cat.part.png", "cat.0123abcd.part.png", ".cat.0123abc.part.png", ".hidden", "deep/part"]
    # Another run, over a single video or photo, has no journal and may be active.
    own += [".movie.0123abcd.part.mp4", ".catalogue.0123abcd.part.png", "deep/.cat.0123abcd.part.png"]
    parts = [name for names in left.values() for name in names]
    for name in (*parts, *whole, *own):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    Journal(folder, SETTINGS, resume=False).close()
    assert all((folder / name).exists() for name in (*parts, *whole, *own)), "another run may be writing them"
    with Journal(folder, SETTINGS, resume=True) as journal:
        assert not any((folder / name).exists() for name in whole)
        assert all((folder / name).exists() for name in parts), "finished() was not called for these items"
        for name in left:
            journal.finished(Item(folder / "photo.jpg", PurePath(name)), None)
            assert not any((folder / part).exists() for part in left[name])
    assert all((folder / name).exists() for name in own)


# ---------------------------------------------------------------------------------------- concurrent runs


def test_runs_without_resume_can_share_a_folder(folder: Path, photo: Photo) -> None:
    with Journal(folder, SETTINGS, resume=False):  # has another lock, even in the same process
        note(folder, photo())
    assert is_finished(folder, photo())


@pytest.mark.parametrize("threshold", [0.5, 0.9])
def test_a_run_started_beside_an_active_one_keeps_its_notes(folder: Path, photo: Photo, threshold: float) -> None:
    cat, dog, bird = photo("cat"), photo("dog"), photo("bird")
    with Journal(folder, SETTINGS, resume=False) as live:
        live.add(cat, result(folder, "cat"))
        with Journal(folder, SETTINGS | {"threshold": threshold}, resume=False) as second:
            assert second.noted == 0
            second.add(bird, result(folder, "bird"))
            live.add(dog, result(folder, "dog"))
    assert is_finished(folder, cat)
    assert is_finished(folder, dog)
    assert is_finished(folder, bird) is (threshold == 0.5)
    assert is_finished(folder, bird, threshold=threshold)
    note(folder)
    assert not is_finished(folder, cat), "no run is active any more"


def test_a_run_started_beside_an_active_one_is_found_after_a_line_that_a_third_has_cut_off(
    folder: Path, photo: Photo
) -> None:
    with Journal(folder, SETTINGS | {"threshold": 0.9}, resume=False):
        with (folder / JOURNAL).open("ab") as file:
            file.write(b'{"run": ')
        note(folder)
    assert not is_finished(folder, photo())  # it is not an error


def test_of_two_runs_with_the_same_result_path_the_later_note_counts(folder: Path, photo: Photo) -> None:
    cat = photo()
    other = {"threshold": 0.9}
    with Journal(folder, SETTINGS, resume=False) as ours, Journal(folder, SETTINGS | other, resume=False) as theirs:
        ours.add(cat, result(folder))
        theirs.add(cat, result(folder))
    assert not is_finished(folder, cat)
    assert is_finished(folder, cat, **other)
    with Journal(folder, SETTINGS, resume=True) as journal:
        journal.add(cat, result(folder))
    assert is_finished(folder, cat)
    assert not is_finished(folder, cat, **other)


def test_runs_with_different_result_paths_do_not_interfere(folder: Path, photo: Photo) -> None:
    cat = photo()
    picture = folder / "cat.jpg"
    picture.write_bytes(b"overlay")
    with (
        Journal(folder, SETTINGS, resume=False) as masks,
        Journal(folder, {"as": "overlay"}, resume=False) as overlays,
        Journal(folder, {"as": "coco-rle"}, resume=False) as outlines,
    ):
        masks.add(cat, result(folder))
        outlines.add(cat, None, {"height": 3})
        overlays.add(cat, picture)
    assert is_finished(folder, cat)
    with Journal(folder, {"as": "coco-rle"}, resume=True) as journal:
        assert journal.value(cat) == {"height": 3}
    with Journal(folder, {"as": "overlay"}, resume=True) as journal:
        assert journal.finished(cat, picture)


@pytest.mark.parametrize(("written", "theirs_written"), [(True, False), (False, False), (False, True)])
def test_a_note_without_a_result_neither_replaces_another_nor_is_replaced(
    folder: Path, photo: Photo, written: bool, theirs_written: bool
) -> None:
    """A run with `--only-found` notes a photo without a pet."""
    cat = photo()
    with (
        Journal(folder, SETTINGS, resume=False) as ours,
        Journal(folder, SETTINGS | {"only_found": True}, resume=False) as theirs,
    ):
        ours.add(cat, result(folder) if written else None)
        theirs.add(cat, result(folder) if theirs_written else None)
    assert is_finished(folder, cat)


def test_an_existing_result_does_not_invalidate_a_note_without_one(folder: Path, photo: Photo) -> None:
    cat = photo()
    with Journal(folder, SETTINGS, resume=False) as journal:
        journal.add(cat, None)
    assert result(folder).exists()
    assert is_finished(folder, cat)


def test_the_latest_run_with_other_settings_is_reported(folder: Path, photo: Photo) -> None:
    with (
        Journal(folder, SETTINGS | {"threshold": 0.1}, resume=False),
        Journal(folder, SETTINGS | {"threshold": 0.2}, resume=False),
        pytest.raises(OutputError, match="another run is writing there"),
    ):
        is_finished(folder, photo())
    with pytest.raises(OutputError, match=r"threshold was 0\.2, now 0\.5"):
        is_finished(folder, photo())


@pytest.mark.parametrize("resume", [True, False])
def test_a_briefly_held_lock_is_waited_for(
    folder: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch, resume: bool
) -> None:
    """A new run truncates the file only if no other run is active."""
    note(folder, photo())
    other = (folder / JOURNAL).open("rb")
    fcntl.flock(other, fcntl.LOCK_EX)
    monkeypatch.setattr("petseg_runtime.journal.time.sleep", lambda seconds: other.close())
    Journal(folder, SETTINGS, resume=resume).close()
    assert other.closed
    assert is_finished(folder, photo())


@pytest.mark.parametrize(("theirs", "ours"), [(False, True), (True, False), (True, True)])
def test_a_resumed_run_requires_exclusive_use_of_the_folder(
    folder: Path, photo: Photo, theirs: bool, ours: bool
) -> None:
    cat = photo()
    note(folder, cat)
    part = folder / ".cat.0123abcd.part.png"
    with Journal(folder, SETTINGS, resume=theirs):
        before = (folder / JOURNAL).read_bytes()
        part.touch()
        with pytest.raises(OutputError, match="another run is writing there; wait for it, or stop it") as caught:
            Journal(folder, SETTINGS, resume=ours)
        assert str(folder) in str(caught.value)
        assert part.exists()
        assert (folder / JOURNAL).read_bytes() == before
    with Journal(folder, SETTINGS, resume=True) as journal:
        assert journal.finished(cat, result(folder)) is theirs  # otherwise they have started again
    assert not part.exists()


# --------------------------------------------------------------------------------- unwritable folders


def test_an_unwritable_folder_is_rejected_naming_the_journal(tmp_path: Path) -> None:
    (tmp_path / JOURNAL).mkdir()
    for resume in (False, True):
        with pytest.raises(OutputError, match=r"petseg-run\.ndjson: cannot be written \(Is a directory\)"):
            Journal(tmp_path, SETTINGS, resume=resume)


def test_a_full_disk_is_an_output_error_and_earlier_lines_count(folder: Path, photo: Photo) -> None:
    cat, dog = photo("cat"), photo("dog")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    journal = Journal(folder, SETTINGS, resume=False)
    journal.add(cat, result(folder, "cat"))
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, ((folder / JOURNAL).stat().st_size + 5, hard))
        with pytest.raises(OutputError, match=r"petseg-run\.ndjson: cannot be written"):
            journal.add(dog, result(folder, "dog"))
        journal.close()  # unwritten data is dropped without another error
        with pytest.raises(OutputError, match=r"petseg-run\.ndjson: cannot be written"):
            Journal(folder, SETTINGS, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert is_finished(folder, cat)
    assert not is_finished(folder, dog)


def test_a_file_system_without_locks_is_supported(folder: Path, photo: Photo, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    note(folder, photo())
    assert is_finished(folder, photo())


# ----------------------------------------------------------------------------------------------- own files


def test_own_files_are_those_noted_or_begun_by_any_run(folder: Path, photo: Photo) -> None:
    with Journal(folder, SETTINGS, resume=False) as journal:
        journal.begin(folder / "sub" / "dog.png")
        journal.add(photo("cat"), folder / "cat.png")
        with Journal(folder, SETTINGS | {"threshold": 0.9}, resume=False) as other:
            other.begin(folder / "clip")
    with (folder / JOURNAL).open("a") as file:
        file.write('[]\n{"begun": 3}\n{"name": "cut')
    own = OwnFiles(folder)
    for name, is_own in {
        "cat.png": True,
        "sub/dog.png": True,
        "clip": True,
        "cat.jpg": False,
        "dog.png": False,
    }.items():
        assert (folder / name in own) == is_own, name
    assert is_finished(folder, photo("cat")), "the other lines are ignored"


@pytest.mark.parametrize("what", ["nothing", "a folder", "a link", "a pipe", "something else"])
def test_without_a_journal_no_file_is_petsegs_own(folder: Path, what: str) -> None:
    path = folder / JOURNAL
    (folder / "other").write_text('{"begun": "cat.png"}\n')
    if what == "a folder":
        path.mkdir()
    elif what == "a link":
        path.symlink_to("other")
    elif what == "a pipe":
        os.mkfifo(path)
    elif what == "something else":
        path.write_bytes(b"\xff\n\n" + b"[" * 100_000)
    assert folder / "cat.png" not in OwnFiles(folder)
    assert path.exists() == (what != "nothing")


def test_lines_of_several_threads_are_all_read_back(folder: Path, tmp_path: Path) -> None:
    items = [Item(tmp_path / f"{number}.jpg", PurePath(f"{number}")) for number in range(300)]
    with Journal(folder, SETTINGS, resume=False) as journal:
        begin = threading.Thread(target=lambda: [journal.begin(folder / "0.png") for _ in range(3000)])
        begin.start()
        for item in items:
            journal.add(item, None, {"number": str(item.name)})
        begin.join()
        assert [value["number"] for _, value in Values(journal, items)] == [str(item.name) for item in items]
