"""Tests of verifying the pre- and postprocessing: it matches the record here, and defects in it are found."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from benchmarks.embedded.road import answer
from petseg.cli import run
from petseg_runtime import Segmenter, images, road, sample_photos
from petseg_runtime.errors import ModelError, UnreadableImage
from petseg_runtime.images import OpenPhoto, Photo
from petseg_runtime.road import LIMITS, RECORD, SIZE, RoadReceipt, RoadRow, load_road, record_road, verify_road

NAMES = [path.name for path in sample_photos()]
ON_ITS_SIDE, HALVED, TRANSPARENT = (
    "chelsea.jpg on its side by EXIF",
    "coffee.jpg decoded at half its size",
    "a PNG with transparency",
)


def test_the_record_matches_the_code_here() -> None:
    """Bit-identical with the libraries that the record was made with, within the limits with others."""
    kept, made = load_road(), record_road(answer())
    assert kept.photos == made.photos
    assert list(kept.passages) == list(made.passages) == [*NAMES, ON_ITS_SIDE, HALVED, TRANSPARENT]
    np.testing.assert_array_equal(kept.probability, made.probability)
    assert verify_road(made).failures == verify_road(kept).failures == ()
    if kept.recorded_with == made.recorded_with:
        for name, passage in kept.passages.items():
            for part in ("image", "answer", "mask"):
                np.testing.assert_array_equal(getattr(passage, part), getattr(made.passages[name], part), err_msg=name)


def test_a_record_is_deterministic_and_small(tmp_path: Path) -> None:
    data = record_road(answer()).to_bytes()
    assert data == record_road(answer()).to_bytes()
    (tmp_path / "road.npz").write_bytes(data)
    assert load_road(tmp_path / "road.npz").to_bytes() == data
    assert RECORD.stat().st_size < 150_000


def test_with_the_recorded_libraries_nothing_differs() -> None:
    receipt = verify_road()
    assert receipt.passed
    assert len(receipt.rows) == 9
    if receipt.here == receipt.recorded_with:
        assert {(row.max_difference, row.mean_difference, row.answer_difference) for row in receipt.rows} == {(0, 0, 0)}
        assert {row.mask_iou for row in receipt.rows} == {1}
    assert receipt.here.startswith(f"Pillow {Image.__version__}, libjpeg")
    assert receipt.summary.startswith(f"passed, 9 photos with {receipt.here}: read and resized, difference max ")
    told = json.loads(json.dumps(receipt.as_dict()))
    assert (told["passed"], told["failures"], len(told["rows"])) == (True, [], 9)
    assert told["limits"] == dataclasses.asdict(LIMITS)


def test_the_summary_has_the_largest_differences_the_mean_and_the_smallest_iou() -> None:
    rows = [
        RoadRow(
            photo=name, max_difference=most, mean_difference=mean, answer_difference=answer, mask_iou=iou, failures=()
        )
        for name, most, mean, answer, iou in (("a.jpg", 3, 0.5, 1, 0.997), ("b.jpg", 2, 0.25, 2, 0.999))
    ]
    said = RoadReceipt(rows=tuple(rows), limits=LIMITS, here="Pillow 12", recorded_with="Pillow 11").summary
    assert said == (
        "passed, 2 photos with Pillow 12: read and resized, difference max 3/255, mean 0.3750/255; output resized "
        "back, difference max 2/255, mask IoU min 0.99700"
    )


def test_a_segmenter_uses_the_tested_code() -> None:
    """The code under test is the code that processes photos, not a copy."""
    proof = load_road()
    with Segmenter(threads=1, threshold=0.5) as segmenter:
        segmenter.size = (SIZE, SIZE)
        for path in sample_photos():
            prepared = segmenter.prepare(path)
            passage = proof.passages[path.name]
            assert np.abs(prepared.image.astype(int) - passage.image).max() <= LIMITS.max_difference
            assert segmenter.finish(prepared, proof.probability).mask.shape == passage.mask.shape


def decoding(change: Callable[[Photo], Photo]) -> Callable[[Any], Any]:
    """A replacement for :func:`petseg_runtime.images.open_photo` that changes the decoded photo."""

    def changed(whole: Any) -> Any:
        @contextlib.contextmanager
        def open_photo(*args: Any, **options: Any) -> Iterator[OpenPhoto]:
            with whole(*args, **options) as photo:
                yield dataclasses.replace(photo, decode=lambda size, **options: change(photo.decode()))

        return open_photo

    return changed


def test_the_extra_photos_have_the_described_properties(monkeypatch: pytest.MonkeyPatch) -> None:
    notes, sizes = [], []

    def spy(photo: Photo) -> Photo:
        notes.append(photo.notes)
        sizes.append((photo.pixels.shape[:2], (photo.height, photo.width)))
        return photo

    monkeypatch.setattr(images, "open_photo", decoding(spy)(images.open_photo))
    verify_road()
    whole = dict(zip(NAMES, sizes, strict=False))["chelsea.jpg"][0]
    assert sizes[-3:] == [(whole[::-1], whole[::-1]), ((200, 300), (400, 600)), ((80, 120), (80, 120))]
    assert notes[-1] == ("transparency laid over white",)


# Possible defects of a device or of our code. Each takes the function that it replaces.


def swapped(photo: Photo) -> Photo:
    """Red and blue swapped, as in OpenCV."""
    return dataclasses.replace(photo, pixels=np.ascontiguousarray(photo.pixels[..., ::-1]))


def without_last_row(photo: Photo) -> Photo:
    """A decoder with an off-by-one error that loses the last row and column."""
    return dataclasses.replace(photo, pixels=np.ascontiguousarray(photo.pixels[:-1, :-1]))


def limited(photo: Photo) -> Photo:
    """Limited range, as in videos, mistaken for full range."""
    return dataclasses.replace(photo, pixels=(16 + photo.pixels.astype(int) * 219 // 255).astype(np.uint8))


def resampled(method: Image.Resampling) -> Callable[[Any], Any]:
    """A different resampling filter."""

    def broken(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
        return np.array(Image.fromarray(np.asarray(pixels)).resize((width, height), method))

    return lambda function: broken


def moved(function: Any) -> Any:
    """Shifts the output by one pixel."""
    return lambda *args: np.roll(function(*args), 1, axis=1)


def mirrored(function: Any) -> Any:
    return lambda *args: np.ascontiguousarray(function(*args)[:, ::-1])


def unturned(function: Any) -> Any:
    return lambda image: None


def opaque(function: Any) -> Any:
    return lambda image, name, notes: np.array(image.convert("RGB"))


RESIZED, BROUGHT_BACK = "read and resized: ", "output resized back: "


@pytest.mark.parametrize(
    ("where", "defect", "photos", "said"),
    [
        ("open_photo", decoding(swapped), [*NAMES, ON_ITS_SIDE, HALVED, TRANSPARENT], RESIZED + "mean difference"),
        ("open_photo", decoding(without_last_row), [*NAMES, ON_ITS_SIDE], RESIZED + "largest difference"),
        ("open_photo", decoding(limited), [*NAMES, TRANSPARENT], RESIZED + "mean difference"),
        ("_transposition", unturned, [ON_ITS_SIDE], "is 300 x 451 here, 451 x 300 in the record"),
        ("_transposition", unturned, [ON_ITS_SIDE], RESIZED + "largest difference"),
        ("_to_rgb", opaque, [TRANSPARENT], RESIZED + "largest difference"),
        *(
            ("to_model", resampled(method), NAMES, RESIZED + "largest difference")
            for method in Image.Resampling
            if method != Image.Resampling.BILINEAR
        ),
        ("to_model", moved, NAMES, RESIZED + "largest difference"),
        *(
            ("from_model", resampled(method), NAMES, BROUGHT_BACK + "largest difference")
            for method in Image.Resampling
            if method != Image.Resampling.BILINEAR
        ),
        ("from_model", moved, [*NAMES, ON_ITS_SIDE, HALVED, TRANSPARENT], BROUGHT_BACK + "mask IoU"),
        ("from_model", mirrored, NAMES, BROUGHT_BACK + "mask IoU"),
    ],
)
def test_a_defect_is_found_in_each_affected_photo(
    where: str, defect: Callable[[Any], Any], photos: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images, where, defect(getattr(images, where)))
    receipt = verify_road()
    assert not receipt.passed
    assert receipt.summary.startswith("FAILED")
    found = {row.photo for row in receipt.rows for failure in row.failures if failure.startswith(said)}
    assert found >= set(photos)
    *failures, remedy = receipt.failures
    assert all(" allowed " in failure or " is " in failure for failure in failures)
    assert remedy.startswith("check Pillow and its JPEG library (`python -m PIL` lists them): here Pillow ")


@pytest.mark.parametrize("level", [1, -1])
def test_a_rounding_difference_of_one_level_is_not_a_defect(monkeypatch: pytest.MonkeyPatch, level: int) -> None:
    def off(function: Any) -> Any:
        return lambda *args: np.clip(function(*args).astype(int) + level, 0, 255).astype(np.uint8)

    for name in ("to_model", "from_model"):
        monkeypatch.setattr(images, name, off(getattr(images, name)))
    receipt = verify_road()
    assert receipt.failures == ()
    assert {row.answer_difference for row in receipt.rows} == {1}
    assert 0.995 < min(row.mask_iou for row in receipt.rows) < 1


def test_an_unreadable_photo_is_a_failure_naming_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a Pillow built without a JPEG library."""

    def open_photo(source: bytes, **options: Any) -> Any:
        if source[:2] == b"\xff\xd8":
            raise UnreadableImage("decoder jpeg not available")
        return whole(source, **options)

    whole = images.open_photo
    monkeypatch.setattr(images, "open_photo", open_photo)
    receipt = verify_road()
    assert receipt.failures[0] == f"{NAMES[0]}: cannot be read here (decoder jpeg not available)"
    assert [row.photo for row in receipt.rows if not row.failures] == [TRANSPARENT]


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the record in a temporary folder, with the sample photos."""
    shutil.copytree(RECORD.with_name("samples"), tmp_path / "samples")
    shutil.copy(RECORD, tmp_path / "road.npz")
    monkeypatch.setattr(road, "RECORD", tmp_path / "road.npz")
    return tmp_path / "road.npz"


def test_a_replaced_sample_photo_is_named(copied: Path) -> None:
    path = copied.with_name("samples") / NAMES[1]
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ModelError, match=f"{NAMES[1]}: not the photo that road.npz was made with: install petseg again"
    ):
        verify_road()
    path.unlink()
    with pytest.raises(ModelError, match=f"{NAMES[1]}: cannot be read .* install petseg again"):
        verify_road()


def test_a_damaged_record_is_named(copied: Path) -> None:
    data = copied.read_bytes()
    for spoilt in (data[:-99], b"", b"PK", data.replace(b"PK\x03\x04", b"PK\x03\x05", 1)):
        copied.write_bytes(spoilt)
        with pytest.raises(ModelError, match=r"road\.npz: missing or damaged \(.*\): install petseg again"):
            load_road(copied)
    copied.unlink()
    with pytest.raises(ModelError, match=r"road\.npz: missing or damaged"):
        load_road(copied)


def test_a_record_of_another_version_is_rejected(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    proof = load_road()
    passages = dict(list(proof.passages.items())[1:])
    with pytest.raises(ModelError, match="of another version of petseg"):
        verify_road(dataclasses.replace(proof, passages=passages))
    monkeypatch.setattr(road, "SCHEMA_VERSION", 7)
    with pytest.raises(ModelError, match="schema_version 1 instead of 7"):
        load_road(copied)


def test_checking_the_road_imports_neither_ffmpeg_nor_an_engine() -> None:
    program = (
        "import sys; from petseg_runtime.road import verify_road; assert verify_road().passed; print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    modules = {name.partition(".")[0] for name in done.stdout.split()}
    assert modules & {"torch", "onnx", "av", "onnxruntime", "openvino", "click"} == set()


# ------------------------------------------------------------------------------------------------------ petseg verify


def test_verify_fails_if_only_the_road_is_wrong(
    proven: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(images, "open_photo", decoding(swapped)(images.open_photo))
    assert run(["verify", str(proven.path), "--backend", "onnxruntime"]) == 10
    out, err = capsys.readouterr()
    assert "computes in f32: passed" in out
    assert "processing  FAILED, 9 photos with Pillow " in out
    lines = err.splitlines()
    assert all(line.startswith("petseg: pre- and postprocessing: ") for line in lines)
    assert any(
        "chelsea.jpg: read and resized: largest difference" in line and "allowed 8/255" in line for line in lines
    )
    assert "check Pillow and its JPEG library" in lines[-1]
    result = json.loads(proven.path.with_name("toy.onnx.verified.json").read_text(encoding="utf-8"))
    assert (result["passed"], result["road"]["passed"], result["rows"][0]["passed"]) == (False, False, True)
    assert "; pre- and postprocessing: FAILED" in result["summary"]
    assert run(["info", str(proven.path)]) == 0
    assert "verified here  pre- and postprocessing: FAILED, 9 photos" in capsys.readouterr().out
    assert run(["verify", str(proven.path), "-q"]) == 10
    assert capsys.readouterr().out == ""
