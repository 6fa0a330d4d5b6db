"""Every photo is found once, and the names of results are unique."""

from __future__ import annotations

import io
import os
import socket
import sys
import tempfile
from pathlib import Path, PurePath
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from petseg_runtime import sources
from petseg_runtime.errors import UsageError
from petseg_runtime.sources import (
    IMAGE_SUFFIXES,
    STDIN,
    VIDEO_SUFFIXES,
    Item,
    distinct,
    find_photos,
    is_video,
    redacted,
    stream_origin,
)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def names(items: list[Item]) -> list[str]:
    return [str(item.name) for item in items]


def deny(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Make a folder that cannot be listed, not even by root."""
    listed = os.scandir

    def scandir(path: Any = ".") -> Any:
        if Path(path) == folder:
            raise PermissionError(13, "Permission denied", str(folder))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)


def test_folders_are_searched_recursively_and_keep_their_structure(tmp_path: Path) -> None:
    touch(tmp_path, "top.jpg", "a/one.png", "a/b/two.webp")
    items = find_photos([tmp_path])
    assert {item.source: str(item.name) for item in items} == {
        tmp_path / "top.jpg": "top",
        tmp_path / "a" / "one.png": "a/one",
        tmp_path / "a" / "b" / "two.webp": "a/b/two",
    }
    assert all(item.problem is None for item in items)


def test_the_order_is_sorted_independently_of_the_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "c.jpg", "a.jpg", "b.jpg", "y/1.jpg", "x/2.jpg", "x/1.jpg")
    first = find_photos([tmp_path])
    assert names(first) == ["a", "b", "c", "x/1", "x/2", "y/1"]
    walk = os.walk

    def backwards(*args: Any, **kwargs: Any) -> Any:
        for where, folders, files in walk(*args, **kwargs):
            folders.reverse()
            files.reverse()
            yield where, folders, files

    monkeypatch.setattr(os, "walk", backwards)
    assert find_photos([tmp_path]) == first


def test_arguments_keep_their_order(tmp_path: Path) -> None:
    touch(tmp_path, "z.jpg", "a.jpg", "m.jpg")
    paths = [tmp_path / "z.jpg", tmp_path / "a.jpg", tmp_path / "m.jpg"]
    assert [item.source for item in find_photos(paths)] == paths


def test_hidden_files_and_folders_are_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "seen.jpg", ".hidden.jpg", "._seen.jpg", ".thumbnails/seen.jpg", "a/.b/c.jpg")
    assert names(find_photos([tmp_path])) == ["seen"]


def test_an_explicitly_named_hidden_file_or_folder_is_used(tmp_path: Path) -> None:
    touch(tmp_path, ".hidden.jpg", ".folder/cat.jpg")
    items = find_photos([tmp_path / ".hidden.jpg", tmp_path / ".folder"])
    assert [item.source.name for item in items] == [".hidden.jpg", "cat.jpg"]


def test_a_folder_gives_only_images_but_a_named_file_is_always_tried(tmp_path: Path) -> None:
    touch(tmp_path, "notes.txt", "cat.jpg", "jpg", "photo", "video.mp4")
    assert names(find_photos([tmp_path])) == ["cat"]
    assert names(find_photos([tmp_path / "notes.txt", tmp_path / "photo"])) == ["notes", "photo"]


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_suffixes_are_case_insensitive(tmp_path: Path, suffix: str) -> None:
    touch(tmp_path, f"a{suffix}", f"b{suffix.upper()}")
    assert names(find_photos([tmp_path])) == ["a", "b"]


def test_only_the_last_suffix_is_removed(tmp_path: Path) -> None:
    touch(tmp_path, "cat.v1.jpg", "cat.v2.jpg")
    assert names(find_photos([tmp_path])) == ["cat.v1", "cat.v2"]


def test_the_same_name_in_two_subfolders_does_not_collide(tmp_path: Path) -> None:
    touch(tmp_path, "a/cat.jpg", "b/cat.jpg")
    assert names(find_photos([tmp_path])) == ["a/cat", "b/cat"]


def test_photos_with_the_same_stem_keep_their_suffixes(tmp_path: Path) -> None:
    touch(tmp_path, "cat.jpg", "cat.png", "dog.jpg")
    assert names(find_photos([tmp_path])) == ["cat.jpg", "cat.png", "dog"]


def test_names_are_unique_ignoring_case(tmp_path: Path) -> None:
    touch(tmp_path, "CAT.jpg", "cat.jpg")
    found = names(find_photos([tmp_path]))
    assert len({name.casefold() for name in found}) == len(found) == 2


def test_a_numbered_name_never_takes_another_photos_name(tmp_path: Path) -> None:
    touch(tmp_path, "a/cat.jpg", "b/cat.jpg", "c/cat.jpg-2.png")
    items = find_photos([tmp_path / "a" / "cat.jpg", tmp_path / "b" / "cat.jpg", tmp_path / "c" / "cat.jpg-2.png"])
    assert names(items) == ["cat.jpg", "cat.jpg-3", "cat.jpg-2"]


def test_results_of_several_folders_are_prefixed_with_the_folder_name(tmp_path: Path) -> None:
    touch(tmp_path, "cats/1.jpg", "dogs/1.jpg", "loose.jpg")
    items = find_photos([tmp_path / "cats", tmp_path / "dogs", tmp_path / "loose.jpg"])
    assert names(items) == ["cats/1", "dogs/1", "loose"]


def test_a_single_folder_among_files_adds_no_prefix(tmp_path: Path) -> None:
    touch(tmp_path, "cats/1.jpg", "loose.jpg")
    assert names(find_photos([tmp_path / "cats", tmp_path / "loose.jpg"])) == ["1", "loose"]


def test_two_folders_of_the_same_name_do_not_mix_their_photos(tmp_path: Path) -> None:
    touch(tmp_path, "2023/pets/1.jpg", "2024/pets/1.jpg", "2024/pets/2.jpg")
    items = find_photos([tmp_path / "2023" / "pets", tmp_path / "2024" / "pets"])
    assert [str(item.source.relative_to(tmp_path)) for item in items] == [
        "2023/pets/1.jpg",
        "2024/pets/1.jpg",
        "2024/pets/2.jpg",
    ]
    assert len(set(names(items))) == 3


def test_the_current_folder_is_named_by_its_real_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "cats/1.jpg", "dogs/1.jpg")
    monkeypatch.chdir(tmp_path / "cats")
    assert names(find_photos([Path(), Path("..") / "dogs"])) == ["cats/1", "dogs/1"]


def test_a_file_given_twice_gives_two_results_with_different_names(tmp_path: Path) -> None:
    touch(tmp_path, "cat.jpg")
    items = find_photos([tmp_path / "cat.jpg", tmp_path / "cat.jpg"])
    assert [item.source for item in items] == [tmp_path / "cat.jpg"] * 2
    assert len(set(names(items))) == 2


def test_an_output_inside_the_input_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "cat.jpg", "out/.petseg-run.ndjson", "out/cat.png", "out/deep/cat.png", "other/out/dog.jpg")
    assert names(find_photos([tmp_path], tmp_path / "out")) == ["cat", "other/out/dog"]
    monkeypatch.chdir(tmp_path)
    assert names(find_photos([tmp_path], Path("other") / ".." / "out")) == ["cat", "other/out/dog"]


def test_an_output_reached_through_a_link_is_skipped(tmp_path: Path) -> None:
    touch(tmp_path, "in/cat.jpg", "in/out/.petseg-run.ndjson", "in/out/cat.png")
    (tmp_path / "link").symlink_to(tmp_path / "in" / "out")
    assert names(find_photos([tmp_path / "in"], tmp_path / "link")) == ["cat"]


def test_an_output_that_is_itself_searched_is_rejected(tmp_path: Path) -> None:
    touch(tmp_path, "out/cat.png")
    for output in (tmp_path / "out", tmp_path / "in" / ".." / "out"):
        with pytest.raises(UsageError, match="later searches skip folders with results"):
            find_photos([tmp_path / "out"], output)
    (item,) = find_photos([tmp_path / "out" / "cat.png"], tmp_path / "out")  # named, not searched for
    assert str(item.name) == "cat"


@pytest.mark.parametrize("pattern", ["", "**/*.jpg", "*"])
def test_an_output_inside_a_searched_folder_must_not_contain_photos(tmp_path: Path, pattern: str) -> None:
    touch(tmp_path, "in/cat.jpg", "in/out/notes.txt", "in/out/deep/dog.jpg")
    with pytest.raises(
        UsageError, match=r"out: it is in a folder that is searched, and contains photos .*\(dog.jpg, for one\)"
    ):
        find_photos([tmp_path / "in" / pattern], tmp_path / "in" / "out")
    (tmp_path / "in" / "out" / "deep" / "dog.jpg").unlink()
    assert names(find_photos([tmp_path / "in" / pattern], tmp_path / "in" / "out")) == ["cat"]


def test_dotdot_after_a_wildcard_is_a_problem(tmp_path: Path) -> None:
    touch(tmp_path, "in/p/a.jpg", "dest/c.jpg")
    (item,) = find_photos([tmp_path / "in" / "*" / ".." / ".." / "dest" / "*.jpg"], tmp_path / "o")
    assert ".. after a wildcard leads out" in (item.problem or "")
    assert names(find_photos([tmp_path / "in" / ".." / "dest" / "*.jpg"], tmp_path / "o")) == ["c"]


def test_a_pattern_below_a_folder_with_brackets_in_its_name(tmp_path: Path) -> None:
    touch(tmp_path, "cats [2020]/a.jpg", "cats [2020]/b.png")
    assert names(find_photos([tmp_path / "cats [2020]" / "*.jpg"])) == ["a"]


def test_an_unreadable_folder_is_a_problem_and_its_neighbours_are_still_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    touch(tmp_path, "a/1.jpg", "secret/2.jpg", "z/3.jpg")
    deny(monkeypatch, tmp_path / "secret")
    *found, problem = find_photos([tmp_path])
    assert names(found) == ["a/1", "z/3"]
    assert problem.source == tmp_path / "secret"
    assert problem.problem is not None
    assert str(tmp_path / "secret") in problem.problem
    assert "Permission denied" in problem.problem


def test_an_unreadable_single_folder_is_a_named_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "secret/2.jpg")
    deny(monkeypatch, tmp_path / "secret")
    (problem,) = find_photos([tmp_path / "secret"])
    assert problem.source == tmp_path / "secret"
    assert str(problem.name) == "secret"
    assert "cannot be listed" in str(problem.problem)


@pytest.mark.parametrize("pattern", ["", "*.*", "**/*.jpg", "**"])
def test_pipes_and_sockets_are_problems_when_found_and_used_when_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    touch(tmp_path, "a.jpg")
    os.mkfifo(tmp_path / "b.jpg")
    (tmp_path / "c.jpg").symlink_to("b.jpg")
    (tmp_path / "d.jpg").symlink_to("nowhere")  # reading it will report that
    with socket.socket(socket.AF_UNIX) as ear:
        monkeypatch.chdir(tmp_path)  # a socket's path has about 100 characters at most
        ear.bind("e.jpg")
    found = find_photos([tmp_path / pattern] if pattern else [tmp_path])
    assert names(found) == ["a", "b", "c", "d", "e"]
    problems = [item.problem for item in found]
    for number in (1, 2, 4):
        assert str(problems[number]).startswith(f"{found[number].source}: not a regular file, so a search does not")
    assert problems[0] is problems[3] is None
    (named,) = find_photos([tmp_path / "b.jpg"])
    assert named.problem is None


def test_a_missing_file_is_kept_and_counted_as_a_failure(tmp_path: Path) -> None:
    (item,) = find_photos([tmp_path / "missing.jpg"])
    assert item == Item(tmp_path / "missing.jpg", PurePath("missing"))


def test_a_path_the_system_rejects_is_kept_and_counted(tmp_path: Path) -> None:
    paths = [tmp_path / ("long" * 100 + ".jpg"), tmp_path / "nul\0.jpg", tmp_path / "loop.jpg"]
    paths[2].symlink_to(paths[2])
    assert [item.source for item in find_photos(paths)] == paths


def test_an_output_that_is_a_link_loop_does_not_stop_the_search(tmp_path: Path) -> None:
    touch(tmp_path, "cat.jpg")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert names(find_photos([tmp_path], tmp_path / "loop")) == ["cat"]


def test_an_empty_folder_gives_nothing(tmp_path: Path) -> None:
    assert find_photos([tmp_path]) == []


# ------------------------------------------------------------------------------------------------ patterns


def test_a_pattern_keeps_the_structure_below_its_fixed_part(tmp_path: Path) -> None:
    touch(tmp_path, "photos/top.jpg", "photos/a/one.jpg", "photos/a/b/two.jpg", "photos/a/one.png", "elsewhere.jpg")
    items = find_photos([tmp_path / "photos" / "**" / "*.jpg"])
    assert {item.source: str(item.name) for item in items} == {
        tmp_path / "photos" / "top.jpg": "top",
        tmp_path / "photos" / "a" / "one.jpg": "a/one",
        tmp_path / "photos" / "a" / "b" / "two.jpg": "a/b/two",
    }
    assert all(item.problem is None for item in items)
    assert items == sorted(items, key=lambda item: item.source)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("*.jpg", ["1", "2"]),
        ("?.*", ["1.jpg", "1.png", "2"]),
        ("[13].jpg", ["1"]),
        ("a*/*.jpg", ["a/3", "ab/4"]),
        ("a/*", ["3"]),
        ("**/3.jpg", ["a/3"]),
    ],
)
def test_patterns_follow_shell_syntax(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, found: list[str]
) -> None:
    touch(tmp_path, "1.jpg", "2.jpg", "1.png", "a/3.jpg", "ab/4.jpg", ".hidden.jpg")
    monkeypatch.chdir(tmp_path)
    assert names(find_photos([Path(pattern)])) == found
    assert names(find_photos([tmp_path / pattern])) == found


def test_a_folder_matching_a_pattern_is_searched_and_each_photo_used_once(tmp_path: Path) -> None:
    touch(tmp_path, "2023/1.jpg", "2023/deep/2.jpg", "2023/notes.txt", "2024/1.jpg")
    assert names(find_photos([tmp_path / "20*"])) == ["2023/1", "2023/deep/2", "2024/1"]
    everything = find_photos([tmp_path / "2023" / "**"])  # the folders, and what is in them
    assert sorted(item.source.name for item in everything) == ["1.jpg", "2.jpg", "notes.txt"]


def test_a_pattern_without_matches_is_counted_as_a_problem(tmp_path: Path) -> None:
    touch(tmp_path, "cat.jpg")
    first, second, cat = find_photos([tmp_path / "*.png", tmp_path / "none" / "**" / "*.jpg", tmp_path / "cat.jpg"])
    assert first.problem == f"{tmp_path / '*.png'}: no file matches this pattern"
    assert second.problem == f"{tmp_path / 'none' / '**' / '*.jpg'}: no file matches this pattern"
    assert cat == Item(tmp_path / "cat.jpg", PurePath("cat"))


def test_a_file_or_folder_named_like_a_pattern_is_used_literally(tmp_path: Path) -> None:
    touch(tmp_path, "cat[1].jpg", "cat1.jpg", "what?.jpg", "album [2024]/dog.jpg")
    (tmp_path / "lost*.jpg").symlink_to("nowhere")
    assert names(find_photos([tmp_path / "cat[1].jpg", tmp_path / "what?.jpg"])) == ["cat[1]", "what?"]
    assert names(find_photos([tmp_path / "album [2024]"])) == ["dog"]
    assert names(find_photos([tmp_path / "cat[[]1].jpg"])) == ["cat[1]"]
    assert find_photos([tmp_path / "lost*.jpg"]) == [Item(tmp_path / "lost*.jpg", PurePath("lost*"))]


@pytest.mark.parametrize("pattern", ["**/*.jpg", "**", "*", "*/*.jpg", "o*/*.jpg"])
def test_a_pattern_skips_the_output(tmp_path: Path, pattern: str) -> None:
    """Otherwise a second run would segment the results of the first."""
    touch(tmp_path, "in/cat.jpg", "in/out/cat.jpg", "in/out/deep/cat.jpg", "in/other/dog.jpg")
    touch(tmp_path, "in/out/.petseg-run.ndjson")
    found = find_photos([tmp_path / "in" / pattern], tmp_path / "in" / "out")
    assert found
    assert not any("out" in item.source.parts for item in found)


def test_an_output_searched_by_a_pattern_is_rejected(tmp_path: Path) -> None:
    touch(tmp_path, "out/cat.jpg", "out/deep/cat.jpg")
    for pattern in ("*.jpg", "*", "**", "**/*.jpg", "c*"):
        with pytest.raises(UsageError, match="later searches skip folders with results"):
            find_photos([tmp_path / "out" / pattern], tmp_path / "out")
    assert names(find_photos([tmp_path / "out" / "deep" / "*"], tmp_path / "out")) == ["cat"]


def test_an_unreadable_folder_below_a_pattern_is_a_problem(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.jpg", "secret/2.jpg")
    deny(monkeypatch, tmp_path / "secret")
    found, problem = find_photos([tmp_path / "*"])
    assert found.source == tmp_path / "a" / "1.jpg"
    assert str(problem.problem) == f"{tmp_path / 'secret'}: the folder cannot be listed (Permission denied)"


# --------------------------------------------------------------------------------- what a search skips


def find_with_notes(paths: list[Path], output: Path | None = None) -> tuple[list[str], list[str]]:
    """The names of the photos found, and the notes on what was skipped."""
    notes: list[str] = []
    return names(find_photos(paths, output, tell=notes.append)), notes


@pytest.mark.parametrize("pattern", ["", "**/*.jpg", "**", "*"])
def test_results_of_earlier_runs_are_skipped(tmp_path: Path, pattern: str) -> None:
    """Also those of other kinds, which are in other folders than this run's."""
    touch(tmp_path, "cat.jpg", "petseg-output/overlay/cat.jpg", "a/petseg-output/mask/dog.jpg", "a/dog.jpg")
    touch(tmp_path, "masks/.petseg-run.ndjson", "masks/cat.jpg", "masks/deep/cat.jpg")
    found, notes = find_with_notes([tmp_path / pattern], tmp_path / "petseg-output" / "cutout")
    assert sorted(found) == ["a/dog", "cat"]
    assert notes == [
        f"{tmp_path / 'masks'}: skipped, because it has results of an earlier run; to segment them, name it"
    ]


def test_skipping_this_runs_output_is_not_reported(tmp_path: Path) -> None:
    touch(tmp_path, "cat.jpg", "out/.petseg-run.ndjson", "out/cat.jpg")
    assert find_with_notes([tmp_path], tmp_path / "out") == (["cat"], [])
    assert find_with_notes([tmp_path / "**"], tmp_path / "out") == (["cat"], [])


def test_explicitly_named_results_are_used(tmp_path: Path) -> None:
    touch(tmp_path, "petseg-output/overlay/cat.jpg", "petseg-output/overlay/.petseg-run.ndjson")
    for named in ("overlay", "overlay/*.jpg", "overlay/**/*.jpg", "overlay/**"):
        assert find_with_notes([tmp_path / "petseg-output" / named]) == (["cat"], []), named


def links(root: Path) -> list[str]:
    """A folder with two photos, and links to folders: in a loop, to each other, and to other places."""
    touch(root, "in/cat.jpg", "in/a/dog.jpg", "else/bird.jpg")
    (root / "in" / "a" / "up").symlink_to("..", target_is_directory=True)
    (root / "in" / "a" / "again").symlink_to("..", target_is_directory=True)
    (root / "in" / "b").symlink_to(root / "else", target_is_directory=True)
    why = "skipped, because it is a link to a folder; to segment its photos, name it"
    return [f"{root / 'in' / name}: {why}" for name in ("a/again", "a/up", "b")]


@pytest.mark.parametrize(
    ("pattern", "photos"),
    [
        *((pattern, ["a/dog", "cat"]) for pattern in ("", "*", "**", "**/*", "**/*.jpg", "**/**/*.jpg")),
        *((pattern, ["a/dog"]) for pattern in ("*/*.jpg", "[ab]/**", "*/**/*", "**/*/*.jpg")),
    ],
)
def test_links_to_folders_are_reported_and_not_followed(tmp_path: Path, pattern: str, photos: list[str]) -> None:
    possible = links(tmp_path)
    found, notes = find_with_notes([tmp_path / "in" / pattern])
    assert sorted(found) == photos
    assert notes
    assert set(notes) <= set(possible)


@pytest.mark.parametrize("pattern", ["", "*", "2*", "2*/**", "**/*"])
def test_unsupported_photos_are_counted_by_suffix(tmp_path: Path, pattern: str) -> None:
    """Each once, although a pattern may match a folder twice; companion files are not mentioned."""
    kinds = ["1.NEF", "2.nef", "deep/3.nef", "4.jp2", "no suffix", "v1.2 with my cat", "5.jxl"]
    beside = ["notes.txt", "1.xmp", "Thumbs.db", ".hidden.nef", "masks/.petseg-run.ndjson", "masks/6.nef", "program.ts"]
    touch(tmp_path, *(f"2024/{name}" for name in ["cat.jpg", "cat.mov", "cat.aae", *kinds, *beside]))
    notes: list[str] = []
    find_photos([tmp_path / pattern], suffixes=IMAGE_SUFFIXES | VIDEO_SUFFIXES, tell=notes.append)
    # A file that matches a pattern is found whatever its suffix.
    said = [] if "**" in pattern else ["skipped because of their suffix: 3 .nef, 2 without a suffix, 1 .jp2, 1 .jxl"]
    assert notes[1:] == said
    assert notes[0].startswith(f"{tmp_path / '2024' / 'masks'}: skipped, because it has results of an earlier run")


def test_an_explicitly_named_file_is_not_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "1.nef", "2.nef", "a/3.nef")
    monkeypatch.chdir(tmp_path)
    assert find_with_notes([Path(), Path("1.nef"), Path("a", "3.nef")])[1] == [
        "skipped because of their suffix: 1 .nef"
    ]


def test_of_many_unsupported_suffixes_the_most_frequent_are_named(tmp_path: Path) -> None:
    touch(tmp_path, *(f"{number}.{kind}" for kind in "abcdefg" for number in range(2 if kind == "g" else 1)))
    assert find_with_notes([tmp_path]) == (
        [],
        ["skipped because of their suffix: 2 .g, 1 .a, 1 .b, 1 .c, 1 .d, 2 of other kinds"],
    )


def test_unsupported_photos_in_this_runs_output_are_not_reported(tmp_path: Path) -> None:
    touch(tmp_path, "cat.jpg", "out/list.nef")
    assert find_with_notes([tmp_path], tmp_path / "out") == (["cat"], [])


def test_found_and_explicitly_named_photos_are_distinguished(tmp_path: Path) -> None:
    touch(tmp_path, "in/1.jpg", "2.jpg", "3.jpg")
    items = find_photos([tmp_path / "in", tmp_path / "2.jpg", tmp_path / "3*", tmp_path / "none"])
    assert [item.found for item in items] == [True, False, True, False]


def test_an_explicitly_named_link_to_a_folder_is_followed(tmp_path: Path) -> None:
    links(tmp_path)
    assert find_with_notes([tmp_path / "in" / "b"]) == (["bird"], [])
    assert find_with_notes([tmp_path / "in" / "b" / "**" / "*.jpg"]) == (["bird"], [])


def test_links_to_files_are_used(tmp_path: Path) -> None:
    touch(tmp_path, "else/cat.jpg", "in/dog.jpg")
    (tmp_path / "in" / "cat.jpg").symlink_to(tmp_path / "else" / "cat.jpg")
    for pattern in ("", "**", "*.jpg"):
        assert find_with_notes([tmp_path / "in" / pattern]) == (["cat", "dog"], [])


def test_a_pattern_reports_unlistable_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "a/1.jpg", "secret/2.jpg")
    deny(monkeypatch, tmp_path / "secret")
    found, problem = find_photos([tmp_path / "**" / "*.jpg"])
    assert found.source == tmp_path / "a" / "1.jpg"
    assert str(problem.problem) == f"{tmp_path / 'secret'}: the folder cannot be listed (Permission denied)"


# ------------------------------------------------------------------------------------------ standard input


def set_stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    """Put bytes on standard input."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_dash_is_stdin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "cat.jpg")
    set_stdin(monkeypatch, b"\xff\xd8 encoded")
    assert find_photos([tmp_path / "cat.jpg", STDIN]) == [
        Item(tmp_path / "cat.jpg", PurePath("cat")),
        Item(STDIN, PurePath("stdin"), data=b"\xff\xd8 encoded"),
    ]


def test_stdin_is_read_only_on_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "cat.jpg")
    monkeypatch.setattr(sys, "stdin", None)
    assert names(find_photos([tmp_path])) == ["cat"]


@pytest.mark.parametrize("pattern", ["*", "?", "**", "./*"])
def test_a_file_named_dash_found_by_a_pattern_is_not_stdin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pattern: str
) -> None:
    touch(tmp_path, "-", "a")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    dash, a = find_photos([Path(pattern)])
    assert (dash.source, str(dash.name), dash.data, dash.found) == (tmp_path / "-", "-", None, True)
    assert a.source == Path("a")


def test_a_dash_is_stdin_even_if_a_folder_has_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "-/cat.jpg", "in/dog.jpg")
    monkeypatch.chdir(tmp_path)
    piped, dog = find_photos([STDIN, Path("in")], pipe=b"photo")
    assert (piped.source, str(piped.name), piped.data) == (STDIN, "stdin", b"photo")
    assert str(dog.name) == "dog"


def test_a_second_dash_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    set_stdin(monkeypatch, b"one")
    with pytest.raises(UsageError, match=r"standard input .* only once"):
        find_photos([STDIN, STDIN])


def test_stdin_is_read_only_up_to_the_size_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petseg_runtime.images.MAX_BYTES", 1000)
    set_stdin(monkeypatch, b"x" * 10_000)
    (item,) = find_photos([STDIN])
    assert item.data == b"x" * 1001


def test_a_file_named_like_stdin_keeps_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    touch(tmp_path, "stdin.jpg")
    set_stdin(monkeypatch, b"one")
    assert len(set(names(find_photos([tmp_path / "stdin.jpg", STDIN])))) == 2


# Few stems and suffixes, so that they collide; ß and ss are equal when case is ignored.
stems = st.sampled_from(["cat", "CAT", "cat.jpg", "cat-2", "cat.jpg-2", "straße", "STRASSE", "é"])
suffixes = st.sampled_from([".jpg", ".JPG", ".png", ".webp"])
folders = st.sampled_from(["", "one/pets/", "two/pets/", "two/Pets/", "one/pets/cat/", "one/pets/cat.jpg-2/"])
trees = st.sets(st.tuples(folders, stems, suffixes).map("".join), max_size=12)
arguments = st.lists(st.sampled_from([".", "one/pets", "two/pets", "one", "two/Pets", "one/pets/cat"]), min_size=1)


@given(trees, arguments, st.lists(stems, max_size=3))
def test_names_never_collide_and_no_photo_is_lost(tree: set[str], chosen: list[str], named: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = touch(Path(folder), *tree)
        paths = [root / name for name in (*chosen, *named)]
        items = find_photos(paths)
        expected: list[Path] = []
        for path in paths:
            expected += [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
        assert sorted(item.source for item in items) == sorted(expected)
        keys = [str(item.name).casefold() for item in items]
        assert len(set(keys)) == len(keys)
        assert all(item.name.name and not item.name.is_absolute() and ".." not in item.name.parts for item in items)
        assert find_photos(paths) == items


# ------------------------------------------------------------------------------------------ videos and streams


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://user:secret@cam:554/live?token=secret", "rtsp://***@cam:554/live?***"),
        ("rtsp://user:se/cret@cam/live", "rtsp://***@cam/live"),
        ("rtsp://user:se[cret@cam/live", "rtsp://***@cam/live"),
        ("rtsp://user:secret]@cam/live", "rtsp://***@cam/live"),
        ("rtsp://user:se?cret@cam/live?x=1", "rtsp://***"),
        ("rtsp://user:1234?5@cam/live", "rtsp://***"),
        ("rtsp://user:se#cret@cam/live", "rtsp://***"),
        ("rtsp://user:/se?cret@cam/live", "rtsp://***"),
        ("rtsp://user:se@cret@cam/live", "rtsp://***@cam/live"),
        ("http://proxy/http://user:secret@cam/live", "http://***@cam/live"),
        ("http://cam/live#secret", "http://cam/live?***"),
        ("http://cam:8080/live?mail=a@b", "http://cam:8080/live?***"),
        ("srt://cam:9000?passphrase=secret", "srt://cam:9000?***"),
        ("srt://cam:9000?passphrase=secret@secret", "srt://***"),
        ("http://cam/@cats/live.mp4", "http://cam/@cats/live.mp4"),
        ("rtsp://[fe80::1]:554/live", "rtsp://[fe80::1]:554/live"),
        (
            "rtsp://10.0.0.7:554/user=admin&password=secret&channel=1&stream=0.sdp?real_stream",
            "rtsp://10.0.0.7:554/user=***&password=***&channel=1&stream=0.sdp?***",
        ),
        ("rtsp://cam/user=admin_password=secret_channel=1_stream=0.sdp", "rtsp://cam/user=***"),
        ("rtsp://cam/ch=1&PassWd=se/cret&stream=0", "rtsp://cam/ch=1&PassWd=***&stream=0"),
        ("rtsp://cam/user%3Dadmin%26pwd%3Dsecret/live", "rtsp://cam/user%3D***/live"),
        ("http://cam/api_key=secret/live", "http://cam/api_key=***/live"),
        ("rtsp://cam:554/user=admin&password=a@secret&channel=1", "rtsp://***"),
        ("http://cam/key/user/live=1", "http://cam/key/user/live=1"),
        ("cat.mp4", "cat.mp4"),
    ],
)
def test_a_url_is_shown_without_credentials(url: str, shown: str) -> None:
    assert redacted(url) == shown
    assert "secret" not in shown
    assert redacted(shown) == shown


part = st.text("abcXYZ019._-~%+!$&'()*,;=:@", min_size=1, max_size=10)
#: Passwords are not always encoded as they ought to be.
password = st.text("abcXYZ._-~%+!$&'()*,;=:@/?#[]", max_size=10)
plain = st.text("abcxyz019.-", min_size=1, max_size=10)


@given(part, password, plain, plain, part)
def test_no_secret_of_a_url_is_shown(user: str, secret: str, host: str, path: str, token: str) -> None:
    url = f"rtsp://Q{user}Q:Q{secret}Q@{host}/{path}?key=Q{token}Q"
    origin = stream_origin(url)
    assert origin is not None
    for shown in (redacted(url), origin.shown, str(origin.name)):
        assert "Q" not in shown, url


@given(
    st.sampled_from(["user", "username", "password", "pass", "Passwd", "pwd", "token", "key", "auth", "AUTH_TOKEN"]),
    st.text("abcXYZ._-~%+!$'()*,;=:@/", max_size=10),
)
def test_no_secret_in_the_path_of_a_url_is_shown(name: str, secret: str) -> None:
    origin = stream_origin(f"rtsp://10.0.0.7:554/a/{name}=Q{secret}Q&channel=1&stream=0.sdp?real_stream")
    assert origin is not None
    for shown in (origin.shown, str(origin.name)):
        assert "Q" not in shown
        assert "channel" in shown or "@" in secret, "cameras differ in it"


@given(st.text(max_size=60).filter(lambda text: "Q" not in text))
def test_any_text_is_accepted_for_display(text: str) -> None:
    assert isinstance(redacted(text), str)
    assert "Q" not in redacted(f"rtsp://user:Q@{text}")


@pytest.mark.parametrize(
    ("name", "data", "video"),
    [
        ("cat.mp4", b"\xff\xd8\xff", True),  # treated as a video by its name, and then rejected as one
        ("cat.MKV", b"", True),
        ("cat.jpg", b"\x1a\x45\xdf\xa3", False),
        ("cat.gif", b"GIF89a", False),
        ("cat", b"\x1a\x45\xdf\xa3", True),
        ("cat", b"\0\0\0\x20ftypisom", True),
        ("cat", b"\0\0\0\x20ftypavif", False),
        ("cat", b"\0\0\0\x20ftypheic", False),
        ("cat", b"\0\0\0\x20ftypheim", False),
        ("cat", b"\0\0\0\x20ftypmsf1", False),
        ("cat.bin", b"YUV4MPEG2 W4 H4", True),
        ("cat.bin", b"RIFF\0\0\0\0WEBP", False),
        ("cat.bin", b"RIFF\0\0\0\0AVI ", True),
        ("cat.bin", (b"G" + bytes(187)) * 3, True),
        ("cat.bin", b"GIF89a" + bytes(182) + b"G" + bytes(300), False),  # in its palette, by chance
        ("cat.bin", b"", False),
    ],
)
def test_videos_are_recognised(tmp_path: Path, name: str, data: bytes, video: bool) -> None:
    (tmp_path / name).write_bytes(data)
    assert is_video(Item(tmp_path / name, PurePath("cat"))) is video


PACKET = b"G" + bytes(187)


def test_typescript_files_are_not_taken_for_transport_streams(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    files = {
        "app.ts": b"const GREETING: string = 'G'\n" * 100,
        "deep/module.MTS": b"export {}\n",
        "empty.ts": b"",
        "recorded.ts": PACKET * 8,
        "cut.ts": (PACKET * 8)[100:],
        "camera.mts": (bytes(4) + PACKET) * 8,
        "air.ts": (PACKET + bytes(16)) * 8,
        "broken.m2ts": b"no packet at all",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    os.mkfifo(tmp_path / "pipe.ts")  # opening it would wait for a writer
    suffixes = IMAGE_SUFFIXES | VIDEO_SUFFIXES
    taken = ["air", "broken", "camera", "cut", "pipe", "recorded"]
    assert names(find_photos([tmp_path], suffixes=suffixes)) == taken
    for named in (tmp_path / "app.ts", tmp_path / "ap*.ts"):
        (item,) = find_photos([named], suffixes=suffixes)
        assert item.source == tmp_path / "app.ts"
        assert is_video(item), "reading it says what is wrong"


def test_an_unreadable_file_with_a_video_suffix_is_a_video(tmp_path: Path) -> None:
    assert is_video(Item(tmp_path / "cat.mp4", PurePath("cat"), problem="a pipe"))
    assert not is_video(Item(tmp_path / "cat.jpg", PurePath("cat"), problem="a pipe"))


def test_a_file_that_cannot_be_inspected_is_not_a_video(tmp_path: Path) -> None:
    assert not is_video(Item(tmp_path / "missing", PurePath("cat")))
    assert not is_video(Item(tmp_path, PurePath("cat")))
    assert not is_video(Item(tmp_path / "cat", PurePath("cat"), problem="no"))
    assert not is_video(Item(STDIN, PurePath("stdin"), data=b"\x1a\x45\xdf\xa3"))


@pytest.mark.parametrize(
    ("wanted", "given_names"),
    [
        (["a", "a", "a-2"], ["a", "a-3", "a-2"]),
        (["a-2", "a", "a"], ["a-2", "a", "a-3"]),
        (["cam", "Cam", "x/cam"], ["cam", "Cam-2", "x/cam"]),
    ],
)
def test_numbering_never_creates_a_duplicate_name(wanted: list[str], given_names: list[str]) -> None:
    assert list(map(str, distinct(map(PurePath, wanted)))) == given_names


@given(st.lists(st.sampled_from(["a", "A", "a-2", "a-3", "b/a", "b/a-2", "a-2-2", "ß", "ss"]), max_size=30))
def test_each_name_gets_the_first_free_number(wanted: list[str]) -> None:
    given_names, by_right = (
        [str(name) for name in distinct(map(PurePath, wanted))],
        {name.casefold() for name in wanted},
    )
    taken: set[str] = set()
    for name, got in zip(wanted, given_names, strict=True):
        free = (f"{name}-{number}" for number in range(2, 99))
        first = next(one for one in free if one.casefold() not in taken | by_right)
        assert got == (name if name.casefold() not in taken else first)
        taken.add(got.casefold())


def test_many_files_of_one_name_are_not_compared_pairwise(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[PurePath] = []
    key = sources._key
    monkeypatch.setattr(sources, "_key", lambda name: calls.append(name) or key(name))
    items = find_photos([Path(f"{number}/snapshot.jpg") for number in range(1000)])
    assert names(items)[::333] == ["snapshot.jpg", "snapshot.jpg-334", "snapshot.jpg-667", "snapshot.jpg-1000"]
    assert len(calls) < 20 * len(items)


@pytest.mark.parametrize("path", ["cat.jpg", "cat.PNG?width=100", "a/b.jpeg#top", "x.heic"])
@pytest.mark.parametrize("scheme", ["http", "https", "HTTP"])
def test_a_photo_on_a_server_is_not_a_stream(scheme: str, path: str) -> None:
    url = f"{scheme}://me:secret@host/{path}"
    with pytest.raises(
        UsageError, match=r"\*\*\*@host/.*: a photo on a server.*curl -s URL \| petseg infer -.*seekable=0"
    ) as error:
        stream_origin(url)
    assert "secret" not in str(error.value)
    camera = stream_origin(url, {"seekable": "0"})  # as some cameras are called
    assert camera
    assert camera.endless


@pytest.mark.parametrize("url", ["RTSP://Host/Live", "Http://Host/Clip.MP4"])
def test_an_upper_case_scheme_is_passed_to_ffmpeg_in_lower_case(url: str) -> None:
    """FFmpeg knows its protocols by these names only."""
    scheme, _, rest = url.partition(":")
    origin = stream_origin(url)
    assert origin
    assert (origin.target, origin.shown) == (f"{scheme.lower()}:{rest}", url)


@pytest.mark.parametrize(
    "url",
    ["http://host/cam.mjpg", "http://host/live", "rtsp://host/cam.jpg", "http://a.jpg/live", "http://me:p[w@host/live"],
)
def test_other_urls_are_streams_by_default(url: str) -> None:
    camera = stream_origin(url)
    assert camera
    assert camera.endless
