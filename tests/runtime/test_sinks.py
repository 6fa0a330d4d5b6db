"""Results are written atomically and replace no photo, and a full disk stops the run."""

from __future__ import annotations

import dataclasses
import errno
import io
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from petseg_runtime import images
from petseg_runtime.errors import InputError, OutputError, UsageError
from petseg_runtime.result import Segmentation
from petseg_runtime.sinks import (
    KINDS,
    CocoSink,
    ImageSink,
    Picture,
    StreamSink,
    background_of,
    check_looks,
    picture,
)
from petseg_runtime.sources import STDIN, Item

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
    """Makes saving a picture write some bytes and then fail as the operating system would."""

    def save(self: Image.Image, path: Path, **_: Any) -> None:
        Path(path).write_bytes(b"half of a picture")
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Image.Image, "save", save)


def hollow() -> Segmentation:
    """A ring: a pet with a hole."""
    y, x = np.mgrid[:40, :50]
    radius = np.hypot(y - 20, x - 25)
    return Segmentation(None, np.where((radius < 15) & (radius > 6), 255, 0).astype(np.uint8), 0.5, 0.3)


def blob(seed: int, height: int = 160, width: int = 240) -> Segmentation:
    """An ellipse somewhere."""
    rng = np.random.default_rng(seed)
    (cy, cx), (ry, rx) = rng.uniform(0.3, 0.7, 2) * (height, width), rng.uniform(0.1, 0.3, 2) * (height, width)
    y, x = np.mgrid[:height, :width]
    inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
    return Segmentation(None, (255 * np.clip(1.5 - inside, 0, 1)).astype(np.uint8), 0.5, 0.3)


PICTURES = [(kind, form) for kind, entry in KINDS.items() for form in entry.formats]
MODES = {"mask": "L", "probability": "L", "cutout": "RGBA", "overlay": "RGB", "background": "RGB"}
#: These are data, and written without loss in every format.
EXACT = {"mask", "probability"}


def looks(kind: str, form: str | None = None) -> Picture:
    return picture(kind, form, (16, 32, 48) if kind == "background" else None)


@pytest.mark.parametrize(("kind", "form"), PICTURES)
def test_each_kind_is_decoded_correctly_from_each_format(
    tmp_path: Path, result: Segmentation, kind: str, form: str
) -> None:
    out, wanted = tmp_path / "out", looks(kind, form)
    sink = ImageSink(out, wanted, [ITEM])
    path = sink.write(ITEM, result).path
    assert path == sink.path_of(ITEM) == out / f"cat.{form}"
    assert tree(out) == [f"cat.{form}"]
    rendered = wanted.render(result)
    assert rendered.mode == MODES[kind]
    with Image.open(path) as saved:
        assert (saved.format, saved.size) == ({"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[form], (30, 20))
        assert saved.mode == (MODES[kind] if form != "webp" or kind == "cutout" else "RGB")  # WebP has no greyscale
        written = np.array(saved.convert(MODES[kind])).astype(int)
    expected = np.array(rendered).astype(int)
    if form == "png" or kind in EXACT:
        np.testing.assert_array_equal(written, expected)
    elif kind == "cutout":
        np.testing.assert_array_equal(written[..., 3], expected[..., 3])
        assert np.abs(written - expected)[expected[..., 3] > 0].mean() < 10
    else:
        assert np.abs(written - expected).mean() < 10


@given(data=st.data())
@settings(max_examples=20)
def test_masks_and_probabilities_are_lossless_in_every_format(data: st.DataObject) -> None:
    height, width, seed = (data.draw(st.integers(1, 40)) for _ in range(3))
    probability = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    noise = Segmentation(None, probability, 0.5, 0.3)
    for kind in EXACT:
        expected = noise.mask * np.uint8(255) if kind == "mask" else probability
        for form in KINDS[kind].formats:
            stream = io.BytesIO()
            picture(kind, form).save(noise, stream)
            with Image.open(stream) as saved:
                np.testing.assert_array_equal(np.array(saved.convert("L")), expected)


@pytest.mark.parametrize("kind", [kind for kind, entry in KINDS.items() if entry.formats])
def test_the_default_format_is_jpeg_only_for_opaque_photos(kind: str) -> None:
    assert looks(kind).format == ("jpg" if kind in {"overlay", "background"} else "png")


@pytest.mark.parametrize(("kind", "form"), PICTURES)
def test_pictures_that_show_the_photo_have_its_profile(
    tmp_path: Path, result: Segmentation, kind: str, form: str
) -> None:
    profile = bytes(16) + b"RGB " + bytes(200)
    for icc_profile, expected in ((None, None), (profile, profile if KINDS[kind].needs_photo else None)):
        made = dataclasses.replace(result, icc_profile=icc_profile)
        looks(kind, form).save(made, tmp_path / f"result.{form}")
        with Image.open(tmp_path / f"result.{form}") as picture:
            assert picture.info.get("icc_profile") == expected


def test_only_kinds_that_show_the_photo_need_it(result: Segmentation) -> None:
    bare = dataclasses.replace(result, pixels=None)
    for kind, entry in KINDS.items():
        if entry.formats and not entry.needs_photo:
            looks(kind).render(bare)
        elif entry.formats:
            with pytest.raises(ValueError, match="mask only"):
                looks(kind).render(bare)


# ------------------------------------------------------------------------------------------ conflicting options


@pytest.mark.parametrize(
    ("kind", "form"),
    [(kind, form) for kind, entry in KINDS.items() for form in ("png", "jpg", "webp") if form not in entry.formats],
)
def test_an_unsuitable_format_is_rejected_with_the_suitable_ones(kind: str, form: str) -> None:
    able = ", ".join(KINDS[kind].formats) or "JSON only"
    with pytest.raises(UsageError, match=f"^a {kind} cannot be written as {form}; available: {able}$"):
        check_looks(kind, form, "white" if kind == "background" else None)


def test_a_transparent_cutout_is_never_a_jpeg() -> None:
    with pytest.raises(UsageError, match="a cutout cannot be written as jpg; available: png, webp"):
        picture("cutout", "jpg")


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_a_background_requires_its_kind_and_vice_versa(kind: str) -> None:
    with pytest.raises(UsageError, match=r"--background .* and --as background belong together"):
        check_looks(kind, background=None if kind == "background" else "white")


# --------------------------------------------------------------------------------------------- backgrounds


@pytest.mark.parametrize(
    ("text", "colour"),
    [
        ("white", (255, 255, 255)),
        ("#00ff00", (0, 255, 0)),
        ("#0f0f", (0, 255, 0)),
        ("hsl(240, 100%, 50%)", (0, 0, 255)),
    ],
)
def test_a_background_may_be_a_colour(result: Segmentation, text: str, colour: tuple[int, int, int]) -> None:
    pixels = np.array(picture("background", "png", background_of(text)).render(result))
    assert pixels.shape == (20, 30, 3)
    assert (pixels[0, 0] == colour).all()
    assert (pixels[10, 12] == 90).all()  # the pet


def test_a_background_may_be_a_picture_which_is_fitted(tmp_path: Path, result: Segmentation) -> None:
    beach = tmp_path / "beach.png"
    halves = np.zeros((50, 40, 3), np.uint8)
    halves[:, :20, 0] = halves[:, 20:, 2] = 200
    Image.fromarray(halves).save(beach)
    pixels = np.array(picture("background", "png", background_of(str(beach))).render(result))
    assert pixels.shape == (20, 30, 3)
    assert (pixels[0, 0] == (200, 0, 0)).all()
    assert (pixels[0, -1] == (0, 0, 200)).all()
    assert (pixels[10, 12] == 90).all()


def test_a_backgrounds_broken_profile_does_not_become_the_results(result: Segmentation) -> None:
    """It cannot be converted, so its colours are taken as they are."""
    beach = images.with_profile(Image.new("RGB", (60, 50), "green"), bytes(16) + b"RGB " + bytes(180))
    assert "icc_profile" not in picture("background", background=beach).render(result).info
    assert "icc_profile" not in result.on_background(beach).info


def test_a_background_is_fitted_once_per_size_and_profile(
    result: Segmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, int]] = []

    def fit(picture: Image.Image, size: tuple[int, int], **options: Any) -> Image.Image:
        made.append(size)
        return picture.resize(size)

    monkeypatch.setattr("petseg_runtime.result.ImageOps.fit", fit)
    beach = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    before = beach.tobytes()
    render = picture("background", "png", beach).render
    for _ in range(3):
        assert np.array(render(result)).tobytes() == result.on_background(beach).tobytes()
    assert made == [(30, 20)] * 4, "on_background has no cache, and fits it each time"
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for _ in range(2):
        assert render(dataclasses.replace(result, icc_profile=profile)).info["icc_profile"] == profile
        assert "icc_profile" not in render(result).info
    assert len(made) == 5
    with monkeypatch.context() as patch:
        patch.setattr("petseg_runtime.sinks._CACHED_PIXELS", 599)  # below 30 x 20: that of a large photo is not cached
        assert render(result).tobytes() == render(result).tobytes()
    assert len(made) == 7
    for side in range(2, 8):  # many sizes: results stay right, and only a few are cached
        small = Segmentation(np.zeros((side, side, 3), np.uint8), np.zeros((side, side), np.uint8), 0.5, 0.3)
        np.testing.assert_array_equal(np.array(render(small)), np.array(beach.resize((side, side))))
    made.clear()
    render(result)
    assert made == [(30, 20)], "it was evicted from the cache"
    assert beach.tobytes() == before


def test_a_partly_transparent_background_is_rejected() -> None:
    with pytest.raises(InputError, match="'#0f08': a colour must be opaque"):
        background_of("#0f08")


@pytest.mark.parametrize("text", ["rgb(300,0,0)", "rgb(101%,0%,0%)", "hsl(0,300%,50%)"])
def test_a_background_colour_out_of_range_is_rejected(text: str) -> None:
    with pytest.raises(InputError, match="neither a colour"):
        background_of(text)


def test_a_background_that_is_neither_colour_nor_picture_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"background 'chartruse': neither a colour \(white, #00ff00\) nor a file"):
        background_of("chartruse")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(InputError, match=r"notes\.txt: not an image"):
        background_of(str(tmp_path / "notes.txt"))


# ------------------------------------------------------------------------------------------------- folders


def test_results_mirror_the_photos_folders(tmp_path: Path, result: Segmentation) -> None:
    item = Item(Path("cat.jpg"), PurePath("a/b/cat"))
    assert ImageSink(tmp_path, picture("mask"), [item]).write(item, result).path == tmp_path / "a" / "b" / "cat.png"
    assert (tmp_path / "a" / "b" / "cat.png").is_file()


def test_dots_in_a_name_are_kept(tmp_path: Path) -> None:
    sink = ImageSink(tmp_path, picture("mask"), [])
    for name in ("cat.v2", "cat.jpg", "cat.", "1.5"):
        assert sink.path_of(Item(Path("x.jpg"), PurePath(name))) == tmp_path / f"{name}.png"


def test_creating_a_sink_leaves_an_empty_folder(tmp_path: Path) -> None:
    ImageSink(tmp_path / "new" / "out", picture("mask"), [ITEM])
    assert tree(tmp_path) == ["new", "new/out"]


def test_an_earlier_result_is_replaced(tmp_path: Path, result: Segmentation) -> None:
    (tmp_path / "cat.png").write_bytes(b"old")
    ImageSink(tmp_path, picture("mask"), [ITEM]).write(ITEM, result)
    with Image.open(tmp_path / "cat.png") as saved:
        assert saved.size == (30, 20)
    assert tree(tmp_path) == ["cat.png"]


def photos(folder: Path, *names: str) -> list[Item]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"a photo")
    return [Item(folder / name, PurePath(name).with_suffix("")) for name in names]


def test_a_result_that_would_replace_its_photo_is_rejected_early(tmp_path: Path) -> None:
    items = photos(tmp_path / "in", "a.jpg", "b.png")
    with pytest.raises(OutputError, match=r"b\.png.* would replace a photo"):
        ImageSink(tmp_path / "in", picture("cutout"), items)
    assert tree(tmp_path) == ["in", "in/a.jpg", "in/b.png"]
    assert (tmp_path / "in" / "b.png").read_bytes() == b"a photo"


def test_a_result_that_would_replace_another_photo_is_rejected(tmp_path: Path) -> None:
    one = photos(tmp_path / "one", "cat.jpg")
    two = photos(tmp_path / "two", "cat.png")
    with pytest.raises(OutputError, match="would replace a photo"):
        ImageSink(tmp_path / "two", picture("mask"), [*one, Item(two[0].source, PurePath("dog"))])


def test_a_photo_reached_through_a_link_is_not_replaced(tmp_path: Path) -> None:
    items = photos(tmp_path / "in", "a.png")
    (tmp_path / "link").symlink_to(tmp_path / "in")
    with pytest.raises(OutputError, match="would replace a photo"):
        ImageSink(tmp_path / "link", picture("mask"), items)
    linked = [Item(tmp_path / "link" / "a.png", PurePath("a"))]
    with pytest.raises(OutputError, match="would replace a photo"):
        ImageSink(tmp_path / "in", picture("mask"), linked)


def test_the_photos_folder_is_allowed_if_nothing_is_replaced(tmp_path: Path, result: Segmentation) -> None:
    items = photos(tmp_path, "a.jpg")
    assert ImageSink(tmp_path, picture("mask"), items).write(items[0], result).path == tmp_path / "a.png"
    assert (tmp_path / "a.jpg").read_bytes() == b"a photo"


def test_folders_are_resolved_once_not_per_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = photos(tmp_path / "in", *(f"{number}.jpg" for number in range(50)))
    asked: list[Any] = []
    real: Any = os.path.realpath
    monkeypatch.setattr(os.path, "realpath", lambda path: asked.append(path) or real(path))
    ImageSink(tmp_path / "out", picture("mask"), items)
    assert len(asked) <= 3


def test_a_link_loop_among_the_photos_does_not_prevent_a_sink(tmp_path: Path) -> None:
    loop = tmp_path / "loop.jpg"
    loop.symlink_to(loop)
    ImageSink(tmp_path / "out", picture("mask"), [Item(loop, PurePath("loop"))])


def test_an_output_that_is_a_file_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"precious")
    with pytest.raises(OutputError, match="choose another --output") as caught:
        ImageSink(tmp_path / "file", picture("mask"), [ITEM])
    assert str(tmp_path / "file") in str(caught.value)
    assert (tmp_path / "file").read_bytes() == b"precious"


@pytest.mark.parametrize("below", ["file/out", "file/a/b", "loop", "loop/out"])
def test_an_output_that_cannot_be_created_is_rejected(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(OutputError, match="cannot be written to"):
        ImageSink(tmp_path / below, picture("mask"), [ITEM])
    assert tree(tmp_path) == ["file", "loop"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_read_only_output_is_rejected(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(OutputError, match="Permission denied"):
            ImageSink(tmp_path, picture("mask"), [ITEM])
    finally:
        tmp_path.chmod(0o700)


@pytest.mark.parametrize("kind", [kind for kind, entry in KINDS.items() if entry.formats])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS], ids=errno.errorcode.get)
def test_a_full_disk_is_an_output_error_and_leaves_no_partial_file(
    tmp_path: Path, result: Segmentation, monkeypatch: pytest.MonkeyPatch, kind: str, code: int
) -> None:
    sink = ImageSink(tmp_path, looks(kind), [ITEM])
    fail_halfway(monkeypatch, code)
    with pytest.raises(OutputError) as caught:
        sink.write(ITEM, result)
    assert str(sink.path_of(ITEM)) in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert tree(tmp_path) == []


def test_a_full_disk_keeps_an_earlier_result(
    tmp_path: Path, result: Segmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = ImageSink(tmp_path, picture("mask"), [ITEM])
    (tmp_path / "cat.png").write_bytes(b"earlier")
    fail_halfway(monkeypatch, errno.ENOSPC)
    with pytest.raises(OutputError):
        sink.write(ITEM, result)
    assert tree(tmp_path) == ["cat.png"]
    assert (tmp_path / "cat.png").read_bytes() == b"earlier"


def test_any_other_write_failure_fails_only_that_photo(
    tmp_path: Path, result: Segmentation, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink = ImageSink(tmp_path, picture("mask"), [ITEM])
    fail_halfway(monkeypatch, errno.EIO)
    with pytest.raises(InputError) as caught:
        sink.write(ITEM, result)
    assert str(ITEM.source) in str(caught.value)
    assert tree(tmp_path) == []


def test_a_name_too_long_for_the_file_system_fails_only_that_photo(tmp_path: Path, result: Segmentation) -> None:
    fits, long = (Item(Path("x.jpg"), PurePath("n" * length)) for length in (251, 252))
    sink = ImageSink(tmp_path, picture("mask"), [fits, long])
    with pytest.raises(InputError, match="too long"):
        sink.write(long, result)
    path = sink.write(fits, result).path
    assert path is not None
    assert path.is_file()
    assert tree(tmp_path) == ["n" * 251 + ".png"]


def test_a_result_path_occupied_by_a_folder_fails_only_that_photo(tmp_path: Path, result: Segmentation) -> None:
    (tmp_path / "cat.png").mkdir()
    with pytest.raises(InputError, match=r"cat\.png"):
        ImageSink(tmp_path, picture("mask"), [ITEM]).write(ITEM, result)
    assert tree(tmp_path) == ["cat.png"]


def test_a_file_beside_the_photos_is_not_replaced(tmp_path: Path) -> None:
    for name in ("cat.png", "cat.jpg"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    before = (tmp_path / "cat.jpg").read_bytes()
    with pytest.raises(OutputError, match="beside the photos"):
        ImageSink(tmp_path, picture("overlay"), [Item(tmp_path / "cat.png", PurePath("cat"))])
    assert (tmp_path / "cat.jpg").read_bytes() == before


def test_a_file_beside_the_runs_videos_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "cat.png").write_text("somebody's")
    videos = [Item(tmp_path / "videos" / "clip.mp4", PurePath("clip"))]
    with pytest.raises(OutputError, match="beside the photos"):
        ImageSink(tmp_path / "videos", picture("mask"), photos(tmp_path / "in", "cat.jpg"), beside=videos)


def test_a_too_long_result_name_does_not_prevent_a_sink_beside_the_photos(tmp_path: Path) -> None:
    source = tmp_path / f"{'a' * 251}.jpg"
    Image.new("RGB", (8, 8)).save(source)
    ImageSink(tmp_path, picture("mask", "webp"), [Item(source, PurePath("a" * 251))])


def test_a_text_too_long_for_a_file_name_is_rejected_as_background() -> None:
    with pytest.raises(InputError, match="neither a colour"):
        background_of("a" * 300)


def test_annotations_beside_the_photos_are_not_replaced(tmp_path: Path) -> None:
    items = photos(tmp_path / "in", "cat.jpg")
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "annotations.json").write_text("weeks of work")
    with pytest.raises(OutputError, match=r"annotations\.json: already exists, beside the photos"):
        CocoSink(tmp_path / "in", "coco-rle", items)
    CocoSink(tmp_path / "in", "coco-rle", items, own=[tmp_path / "in" / "annotations.json"]).finish([])
    CocoSink(tmp_path / "out", "coco-rle", items).finish([])
    assert all("categories" in path.read_text() for path in tmp_path.rglob("annotations.json"))


def test_an_earlier_runs_results_are_replaced_in_a_separate_folder(tmp_path: Path, result: Segmentation) -> None:
    items = photos(tmp_path / "in", "cat.png")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cat.jpg").write_bytes(b"old")
    ImageSink(tmp_path / "out", picture("overlay"), items).write(items[0], result)
    with Image.open(tmp_path / "out" / "cat.jpg") as written:
        assert written.size == (30, 20)


def test_a_resumed_run_replaces_results_beside_the_photos(tmp_path: Path, result: Segmentation) -> None:
    items = photos(tmp_path, "cat.png")
    (tmp_path / "cat.jpg").write_bytes(b"by the run that was stopped")
    with pytest.raises(OutputError, match="beside the photos"):
        ImageSink(tmp_path, picture("overlay"), items, own=[tmp_path / "dog.jpg"])
    sink = ImageSink(tmp_path, picture("overlay"), items, own=[tmp_path / "cat.jpg"])
    sink.write(items[0], result)
    with Image.open(tmp_path / "cat.jpg") as written:
        assert written.size == (30, 20)


@pytest.mark.parametrize(("form", "limit"), [("jpg", 65_500), ("webp", 16_383)])
def test_a_picture_too_large_for_its_format_fails_only_that_photo(tmp_path: Path, form: str, limit: int) -> None:
    wide = Segmentation(np.zeros((1, limit + 1, 3), np.uint8), np.zeros((1, limit + 1), np.uint8), 0.5, 0.3)
    with pytest.raises(InputError, match=r"photos/cat\.jpg: its result .* cannot be written"):
        ImageSink(tmp_path, picture("overlay", form), [ITEM]).write(ITEM, wide)
    with pytest.raises(InputError, match=r"photos/cat\.jpg: its result cannot be written"):
        StreamSink(io.BytesIO(), picture("overlay", form)).write(ITEM, wide)
    assert tree(tmp_path) == []


# ----------------------------------------------------------------------------------------------- streams


@pytest.mark.parametrize(("kind", "form"), PICTURES)
def test_a_stream_gets_the_same_bytes_as_a_file(tmp_path: Path, result: Segmentation, kind: str, form: str) -> None:
    stream = io.BytesIO()
    sink = StreamSink(stream, looks(kind, form))
    written = sink.write(Item(STDIN, PurePath("stdin"), data=b""), result)
    assert (written.path, written.value, sink.path_of(ITEM), sink.finish([])) == (None, None, None, None)
    path = ImageSink(tmp_path, looks(kind, form), [ITEM]).write(ITEM, result).path
    assert path is not None
    assert stream.getvalue() == path.read_bytes()


def test_an_unbuffered_stream_gets_the_whole_picture(result: Segmentation) -> None:
    """Ctrl-Z interrupts a write, which then writes only a part."""

    class Pipe(io.RawIOBase):
        got = b""

        def write(self, data: Any) -> int:
            self.got += data[:100]
            return len(data[:100])

    pipe: Any = Pipe()
    StreamSink(pipe, picture("overlay")).write(ITEM, result)
    whole = io.BytesIO()
    StreamSink(whole, picture("overlay")).write(ITEM, result)
    assert pipe.got == whole.getvalue()


def test_a_full_stream_is_an_output_error(result: Segmentation) -> None:
    said = r"standard output cannot be written to \(No space left on device\)"
    with Path("/dev/full").open("wb", buffering=0) as full, pytest.raises(OutputError, match=said):
        StreamSink(full, picture("mask")).write(ITEM, result)


def test_a_broken_pipe_is_not_an_output_error(result: Segmentation) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb", buffering=0) as stream, pytest.raises(BrokenPipeError):
        StreamSink(stream, picture("mask")).write(ITEM, result)


# ------------------------------------------------------------------------------------------------- COCO


def items_of(count: int) -> list[Item]:
    return [Item(Path(f"photos/{index}.jpg"), PurePath(str(index))) for index in range(count)]


def coco(folder: Path, kind: str, results: list[Segmentation]) -> dict[str, Any]:
    """The file that a sink writes for results."""
    sink = CocoSink(folder, kind, [])
    values = []
    for item, result in zip(items_of(len(results)), results, strict=True):
        written = sink.write(item, result)
        assert written.path is None
        assert written.value is not None
        values.append((item, json.loads(json.dumps(written.value))))  # as it comes back from a journal
    path = sink.finish(values)
    assert path == folder / "annotations.json"
    assert tree(folder) == ["annotations.json"]
    loaded: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def empty() -> Segmentation:
    return Segmentation(None, np.zeros((7, 9), np.uint8), 0.5, 0.3)


@pytest.mark.parametrize("kind", ["coco-polygons", "coco-rle"])
def test_a_coco_file_has_every_photo_and_an_annotation_for_each_with_a_pet(tmp_path: Path, kind: str) -> None:
    results = [blob(0), empty(), blob(1, 33, 44), hollow()]
    file = coco(tmp_path, kind, results)
    assert set(file) == {"images", "annotations", "categories"}
    assert file["images"] == [
        {"id": 1, "file_name": "photos/0.jpg", "height": 160, "width": 240},
        {"id": 2, "file_name": "photos/1.jpg", "height": 7, "width": 9},
        {"id": 3, "file_name": "photos/2.jpg", "height": 33, "width": 44},
        {"id": 4, "file_name": "photos/3.jpg", "height": 40, "width": 50},
    ]
    assert file["categories"] == [{"id": 1, "name": "pet", "supercategory": "animal"}]
    annotations = file["annotations"]
    assert [(a["id"], a["image_id"], a["category_id"]) for a in annotations] == [(1, 1, 1), (2, 3, 1), (3, 4, 1)]
    for annotation, result in zip(annotations, (results[0], results[2], results[3]), strict=True):
        assert annotation["area"] == np.count_nonzero(result.mask)
        assert annotation["bbox"] == list(result.box or ())
        assert annotation["iscrowd"] == 0


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # pycocotools with numpy 2
@pytest.mark.parametrize("kind", ["coco-polygons", "coco-rle"])
def test_pycocotools_reads_the_masks_back(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    tools = pytest.importorskip("pycocotools.coco")
    results = [*(blob(seed) for seed in range(8)), hollow()]
    coco(tmp_path, kind, results)
    read = tools.COCO(tmp_path / "annotations.json")
    for number, result in enumerate(results, start=1):
        (annotation,) = read.loadAnns(read.getAnnIds(imgIds=[number]))
        is_rle = isinstance(annotation["segmentation"], dict)
        assert is_rle is (kind == "coco-rle" or number == len(results))  # only RLE can express holes
        mask = read.annToMask(annotation).astype(bool)
        assert mask.shape == result.mask.shape
        if is_rle:
            np.testing.assert_array_equal(mask, result.mask)
        else:
            assert (mask & result.mask).sum() / (mask | result.mask).sum() > 0.95
    assert "index created" in capsys.readouterr().out  # it reports on stdout


def test_run_lengths_are_exact_by_an_independent_decoder(tmp_path: Path) -> None:
    results = [*(blob(seed) for seed in range(5)), hollow()]
    for annotation, result in zip(coco(tmp_path, "coco-rle", results)["annotations"], results, strict=True):
        height, width = annotation["segmentation"]["size"]
        runs: list[int] = []
        value = shift = 0
        for byte in annotation["segmentation"]["counts"].encode():
            value |= ((byte - 48) & 0x1F) << shift
            shift += 5
            if not (byte - 48) & 0x20:
                if (byte - 48) & 0x10:
                    value -= 1 << shift
                runs.append(value + (runs[-2] if len(runs) > 2 else 0))
                value = shift = 0
        flat = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        np.testing.assert_array_equal(flat.reshape(width, height).T, result.mask)


def test_coco_annotations_are_not_kept_in_memory(tmp_path: Path) -> None:
    """The values of a hundred thousand photos take gigabytes."""

    class Outline(list[float]):
        """A list that a weak set accepts."""

        __hash__ = object.__hash__  # type: ignore[assignment]

    alive: weakref.WeakSet[Outline] = weakref.WeakSet()
    most = [0]

    class Values:
        def __iter__(self) -> Iterator[tuple[Item, dict[str, Any]]]:
            for item in items_of(20):
                outline = Outline([0.5])
                alive.add(outline)
                most[0] = max(most[0], len(alive))
                yield item, {"height": 2, "width": 3, "annotation": {"segmentation": [outline]}}

    path = CocoSink(tmp_path, "coco-rle", []).finish(Values())
    file = json.loads(path.read_text(encoding="utf-8"))
    assert [len(file[part]) for part in ("images", "annotations")] == [20, 20]
    assert most[0] <= 3


def test_a_coco_file_is_replaced_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    coco(tmp_path, "coco-rle", [blob(0)])
    before = (tmp_path / "annotations.json").read_bytes()

    def replace(self: Path, target: Path) -> Path:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    sink = CocoSink(tmp_path, "coco-rle", [])
    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OutputError, match=r"annotations\.json: cannot be written \(No space left on device\)"):
        sink.finish([])
    assert tree(tmp_path) == ["annotations.json"]
    assert (tmp_path / "annotations.json").read_bytes() == before


def test_an_unwritable_coco_folder_is_rejected_immediately(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"cannot be written to .*; choose another --output"):
        CocoSink(tmp_path / "file", "coco-rle", [])
