"""Results are written whole, beside no photo's place, and a disk that is full stops the run."""

from __future__ import annotations

import errno
import os
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
from PIL import Image

from petseg_runtime.errors import InputError, OutputError
from petseg_runtime.result import Segmentation
from petseg_runtime.sinks import KINDS, ImageSink
from petseg_runtime.sources import Item

ITEM = Item(Path("photos/cat.jpg"), PurePath("cat"))


@pytest.fixture
def result() -> Segmentation:
    probability = np.zeros((20, 30), np.uint8)
    probability[5:15, 8:20] = 255
    probability[5, 8] = 100
    return Segmentation(np.full((20, 30, 3), 90, np.uint8), probability, 0.5, 0.3)


def tree(folder: Path) -> list[str]:
    """All files and folders below, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def fail_halfway(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Saving a picture writes some bytes and then fails as the system would."""

    def save(self: Image.Image, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half of a picture")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Image.Image, "save", save)


@pytest.mark.parametrize(
    ("kind", "file", "mode"),
    [
        ("mask", "cat.png", "L"),
        ("probability", "cat.png", "L"),
        ("cutout", "cat.png", "RGBA"),
        ("overlay", "cat.jpg", "RGB"),
    ],
)
def test_each_kind_is_written_as_what_it_is(
    tmp_path: Path, result: Segmentation, kind: str, file: str, mode: str
) -> None:
    out = tmp_path / "out"
    path = ImageSink(out, kind, [ITEM]).write(ITEM, result)
    assert path == out / file
    assert tree(out) == [file]
    expected = np.array(KINDS[kind].render(result)).astype(int)
    with Image.open(path) as picture:
        assert (picture.mode, picture.size) == (mode, (30, 20))
        written = np.array(picture).astype(int)
    if kind == "overlay":
        assert np.abs(written - expected).mean() < 10  # JPEG
    else:
        np.testing.assert_array_equal(written, expected)


def test_every_kind_is_covered_above() -> None:
    assert set(KINDS) == {"mask", "probability", "cutout", "overlay"}


def test_results_lie_in_folders_like_the_photos_own(tmp_path: Path, result: Segmentation) -> None:
    item = Item(Path("cat.jpg"), PurePath("a/b/cat"))
    assert ImageSink(tmp_path, "mask", [item]).write(item, result) == tmp_path / "a" / "b" / "cat.png"
    assert (tmp_path / "a" / "b" / "cat.png").is_file()


def test_dots_in_a_name_are_kept(tmp_path: Path) -> None:
    sink = ImageSink(tmp_path, "mask", [])
    for name in ("cat.v2", "cat.jpg", "cat.", "1.5"):
        assert sink.path_of(Item(Path("x.jpg"), PurePath(name))) == tmp_path / f"{name}.png"


def test_making_a_sink_leaves_an_empty_folder_and_no_probe(tmp_path: Path) -> None:
    ImageSink(tmp_path / "new" / "out", "mask", [ITEM])
    assert tree(tmp_path) == ["new", "new/out"]


def test_an_earlier_result_is_replaced(tmp_path: Path, result: Segmentation) -> None:
    (tmp_path / "cat.png").write_bytes(b"old")
    ImageSink(tmp_path, "mask", [ITEM]).write(ITEM, result)
    with Image.open(tmp_path / "cat.png") as picture:
        assert picture.size == (30, 20)
    assert tree(tmp_path) == ["cat.png"]


def photos(folder: Path, *names: str) -> list[Item]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"a photo")
    return [Item(folder / name, PurePath(name).with_suffix("")) for name in names]


def test_a_result_that_would_replace_its_photo_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    items = photos(tmp_path / "in", "a.jpg", "b.png")
    with pytest.raises(OutputError, match=r"b\.png.* would replace a photo"):
        ImageSink(tmp_path / "in", "cutout", items)
    assert tree(tmp_path) == ["in", "in/a.jpg", "in/b.png"]
    assert (tmp_path / "in" / "b.png").read_bytes() == b"a photo"


def test_a_result_that_would_replace_another_ones_photo_is_refused(tmp_path: Path) -> None:
    one = photos(tmp_path / "one", "cat.jpg")
    two = photos(tmp_path / "two", "cat.png")
    with pytest.raises(OutputError, match="would replace a photo"):
        ImageSink(tmp_path / "two", "mask", [*one, Item(two[0].source, PurePath("dog"))])


def test_a_photo_is_safe_also_when_it_is_reached_through_a_link(tmp_path: Path) -> None:
    items = photos(tmp_path / "in", "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(OutputError, match="would replace a photo"):
        ImageSink(tmp_path / "link", "mask", items)
    linked = [Item(tmp_path / "link" / "a.png", PurePath("a"))]
    with pytest.raises(OutputError, match="would replace a photo"):
        ImageSink(tmp_path / "in", "mask", linked)


def test_the_photos_own_folder_will_do_where_nothing_is_replaced(tmp_path: Path, result: Segmentation) -> None:
    items = photos(tmp_path, "a.jpg")
    assert ImageSink(tmp_path, "mask", items).write(items[0], result) == tmp_path / "a.png"
    assert (tmp_path / "a.jpg").read_bytes() == b"a photo"


def test_a_loop_of_links_among_the_photos_does_not_stop_the_others(tmp_path: Path) -> None:
    loop = tmp_path / "loop.jpg"
    loop.symlink_to(loop)
    ImageSink(tmp_path / "out", "mask", [Item(loop, PurePath("loop"))])


def test_an_output_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(OutputError, match="choose another --output") as caught:
        ImageSink(tmp_path / "file", "mask", [ITEM])
    assert str(tmp_path / "file") in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"precious"


@pytest.mark.parametrize("below", ["file/out", "file/a/b", "loop", "loop/out"])
def test_an_output_that_cannot_be_made_is_refused(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="cannot be written to"):
        ImageSink(tmp_path / below, "mask", [ITEM])
    assert tree(tmp_path) == ["file", "loop"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            ImageSink(tmp_path, "mask", [ITEM])
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("kind", sorted(KINDS))
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
def test_a_full_disk_is_an_output_error_and_leaves_nothing_half_written(
    tmp_path: Path, result: Segmentation, monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    sink = ImageSink(tmp_path, kind, [ITEM])
    fail_halfway(monkeypatch, code)
    with pytest.raises(OutputError) as caught:
        sink.write(ITEM, result)
    assert str(sink.path_of(ITEM)) in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert tree(tmp_path) == []


def test_a_full_disk_leaves_an_earlier_result_as_it_was(
    tmp_path: Path, result: Segmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = ImageSink(tmp_path, "mask", [ITEM])
    (tmp_path / "cat.png").write_bytes(b"earlier")
    fail_halfway(monkeypatch, errno.ENOSPC)
    with pytest.raises(OutputError):
        sink.write(ITEM, result)
    assert tree(tmp_path) == ["cat.png"]
    assert (tmp_path / "cat.png").read_bytes() == b"earlier"


def test_another_failure_concerns_this_photo_alone(
    tmp_path: Path, result: Segmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = ImageSink(tmp_path, "mask", [ITEM])
    fail_halfway(monkeypatch, errno.EIO)
    with pytest.raises(InputError) as caught:
        sink.write(ITEM, result)
    assert str(ITEM.source) in str(caught.value)
    assert tree(tmp_path) == []


def test_a_name_too_long_for_the_file_system_concerns_this_photo_alone(tmp_path: Path, result: Segmentation) -> None:
    fits, long = (Item(Path("x.jpg"), PurePath("n" * length)) for length in (251, 252))
    sink = ImageSink(tmp_path, "mask", [fits, long])
    with pytest.raises(InputError, match="too long"):
        sink.write(long, result)
    assert sink.write(fits, result).is_file()
    assert tree(tmp_path) == ["n" * 251 + ".png"]


def test_a_result_whose_place_is_taken_by_a_folder_concerns_this_photo_alone(
    tmp_path: Path, result: Segmentation
) -> None:
    (tmp_path / "cat.png").mkdir()
    with pytest.raises(InputError, match=r"cat\.png"):
        ImageSink(tmp_path, "mask", [ITEM]).write(ITEM, result)
    assert tree(tmp_path) == ["cat.png"]


def test_a_file_beside_the_photos_is_not_replaced(tmp_path: Path) -> None:
    for name in ("cat.png", "cat.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    before = (tmp_path / "cat.jpg").read_bytes()
    with pytest.raises(OutputError, match="beside the photos"):
        ImageSink(tmp_path, "overlay", [Item(tmp_path / "cat.png", PurePath("cat"))])
    assert (tmp_path / "cat.jpg").read_bytes() == before


def test_an_earlier_runs_results_are_replaced_elsewhere(tmp_path: Path) -> None:
    items = [Item(tmp_path / "cat.png", PurePath("cat"))]
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cat.jpg").write_bytes(b"old")
    ImageSink(tmp_path / "out", "overlay", items)
