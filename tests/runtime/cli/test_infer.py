"""``petseg infer`` with photos: every photo is accounted for, one line per problem, and the right exit code."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from PIL import Image

from command_line import CHELSEA, IN_ONNXRUNTIME, failed, files, parts, petseg, uninstall
from petseg.cli import run
from petseg_runtime import Segmenter, default_model
from petseg_runtime.artifact import Artifact, open_artifact
from petseg_runtime.cli.infer import infer
from petseg_runtime.engines.base import EngineInfo
from petseg_runtime.errors import EngineError
from petseg_runtime.extras import install
from petseg_runtime.journal import JOURNAL
from petseg_runtime.sinks import KINDS, VIDEO_FORMATS

Toy: TypeAlias = Callable[..., Any]


@dataclass
class Folder:
    """A folder of unusual files: name -> expected size (width, height) of the result; and the bad files."""

    root: Path
    good: dict[str, tuple[int, int]] = field(default_factory=dict)
    bad: list[str] = field(default_factory=list)

    def write(self, name: str, image: Image.Image, size: tuple[int, int] | None = None, **options: Any) -> None:
        (self.root / name).parent.mkdir(parents=True, exist_ok=True)
        image.save(self.root / name, **options)
        self.good[name] = size or image.size

    def spoil(self, name: str, content: bytes) -> None:
        (self.root / name).write_bytes(content)
        self.bad.append(name)


@pytest.fixture(scope="module")
def unusual_files(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    folder = Folder(tmp_path_factory.mktemp("odd") / "photos")
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    folder.write("plain.jpg", rgb)
    folder.write("pixel.png", Image.new("RGB", (1, 1), "red"))
    folder.write("print.jpg", rgb.convert("CMYK"))
    folder.write("grey16.png", Image.fromarray(rng.integers(0, 2**16, (40, 60), dtype=np.uint16)))
    red, blue = (Image.new("RGB", (30, 20), colour) for colour in ("red", "blue"))
    folder.write("moving.gif", red, save_all=True, append_images=[blue])
    palette = rgb.convert("P")
    folder.write("palette.png", palette, transparency=palette.getpixel((0, 0)))
    folder.write("phone.jpg", rgb, size=(40, 60), exif=exif)
    folder.write("a/same.jpg", rgb)
    folder.write("b/same.jpg", rgb.resize((50, 50)))
    folder.write("b/c/same.jpg", rgb)
    folder.spoil("truncated.jpg", CHELSEA.read_bytes()[:9000])
    folder.spoil("text.jpg", b"Dear photographer,\nthis is a letter.\n")
    folder.spoil("zero.jpg", b"")
    folder.spoil("two\nlines.jpg", b"no photo either")
    return folder


@dataclass
class Batch:
    """A finished run over the folder of unusual files."""

    process: subprocess.CompletedProcess[str]
    records: list[dict[str, Any]]
    output: Path


@pytest.fixture(scope="module")
def batch(unusual_files: Folder, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    output = tmp_path_factory.mktemp("batch") / "out"
    done = petseg("infer", unusual_files.root, "--output", output, "--as", "mask", "--json")
    return Batch(done, [json.loads(line) for line in done.stdout.splitlines()], output)


# ------------------------------------------------------------------------------------- a batch with odd photos


def test_a_batch_with_bad_photos_exits_with_3_and_counts_them(unusual_files: Folder, batch: Batch) -> None:
    assert batch.process.returncode == 3
    summary = batch.records[-1]
    assert summary["event"] == "summary"
    assert summary["photos"] == len(unusual_files.good) + len(unusual_files.bad)
    assert summary["done"] == len(unusual_files.good)
    assert summary["failed"] == len(unusual_files.bad)


def test_each_photo_has_exactly_one_record(unusual_files: Folder, batch: Batch) -> None:
    assert all(record["schema_version"] == 1 for record in batch.records)
    by_event: dict[str, list[str]] = {"result": [], "failure": []}
    for record in batch.records[:-1]:
        by_event[record["event"]].append(str(Path(record["input"]).relative_to(unusual_files.root)))
    assert sorted(by_event["result"]) == sorted(unusual_files.good)
    assert sorted(by_event["failure"]) == sorted(unusual_files.bad)


def test_each_result_has_the_upright_size_of_its_photo(unusual_files: Folder, batch: Batch) -> None:
    for record in batch.records:
        if record["event"] != "result":
            continue
        size = unusual_files.good[str(Path(record["input"]).relative_to(unusual_files.root))]
        assert (record["width"], record["height"]) == size
        with Image.open(record["output"]) as mask:
            assert mask.size == size
            share = np.mean(np.array(mask) == 255)
        assert record["coverage"] == pytest.approx(share, abs=1e-6)


def test_results_mirror_the_photos_folders_and_nothing_else_is_written(unusual_files: Folder, batch: Batch) -> None:
    written = sorted(str(path.relative_to(batch.output)) for path in batch.output.rglob("*") if path.is_file())
    assert written == sorted([JOURNAL, *(str(Path(name).with_suffix(".png")) for name in unusual_files.good)])
    assert parts(batch.output) == []


def test_each_line_on_stderr_is_from_petseg_and_names_its_file(unusual_files: Folder, batch: Batch) -> None:
    lines = batch.process.stderr.splitlines()
    noted = [record for record in batch.records if record.get("notes")]
    assert len(lines) == len(unusual_files.bad) + sum(len(record["notes"]) for record in noted)
    for name in (*unusual_files.bad, *(Path(record["input"]).name for record in noted)):
        shown = name.replace("\n", "\\n")
        assert any(line.startswith(f"petseg: {unusual_files.root}") and f"/{shown}: " in line for line in lines), name


def test_decisions_about_a_photo_are_noted(batch: Batch) -> None:
    notes = {Path(record["input"]).name: record["notes"] for record in batch.records if record["event"] == "result"}
    assert any("the first frame" in note for note in notes["moving.gif"])
    assert any("16-bit" in note for note in notes["grey16.png"])
    assert any("transparency" in note for note in notes["palette.png"])
    assert notes["plain.jpg"] == notes["phone.jpg"] == []


def test_each_failure_gives_its_reason(batch: Batch) -> None:
    errors = {Path(r["input"]).name: r["error"] for r in batch.records if r["event"] == "failure"}
    assert "truncated" in errors["truncated.jpg"]
    assert "not an image" in errors["text.jpg"]
    assert "empty" in errors["zero.jpg"]


def test_text_output_has_a_line_per_result_and_a_count(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photo.parent / "bad.jpg").write_bytes(b"no")
    assert run(["infer", str(photo.parent), "--output", str(tmp_path / "out")]) == 3
    out, err = capsys.readouterr()
    result, count = out.splitlines()
    assert result.startswith(f"{photo} -> {tmp_path / 'out' / 'cat.png'}  ")
    assert re.search(r"  [1-9]\d % pet$", result)
    assert count == f"2 photos: 1 written to {tmp_path / 'out'}, 1 failed"
    assert err.startswith(f"petseg: {photo.parent / 'bad.jpg'}: ")
    assert len(err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------- exit codes


def test_full_success_exits_with_0(photo: Path, tmp_path: Path) -> None:
    done = petseg("infer", photo, "--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1  # no count for a single photo
    with Image.open(tmp_path / "out" / "cat.png") as cutout:
        assert cutout.mode == "RGBA"  # cutouts are the default


def test_full_failure_exits_with_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(b"no photo")
    assert run(["infer", str(folder), str(tmp_path / "missing.jpg"), "--output", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 3
    assert "missing.jpg: no such file" in err
    assert "3 photos: 0 written" in out
    assert run(["infer", str(tmp_path / "missing.jpg"), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().out == f"1 photo: 0 written to {tmp_path / 'out'}, 1 failed\n"


def test_a_folder_without_photos_exits_with_1_and_creates_no_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").touch()
    assert run(["infer", str(empty), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr() == ("", f"petseg: no photos or videos in {empty}\n")
    assert not (tmp_path / "out").exists()


def test_unsupported_photo_formats_are_reported(
    photo: Path, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("1.NEF", "2.NEF", "3.NEF", "4.jp2", "no suffix", "notes.txt"):
        (photo.parent / name).touch()
    said = "skipped because of their suffix: 3 .nef, 1 without a suffix, 1 .jp2\n"
    command = ["infer", str(photo.parent), "--model", str(toy(tmp_path / "toy.onnx").path)]
    assert run([*command, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == f"petseg: {said}"
    assert run([*command, "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    photo.unlink()
    assert run([*command, "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert capsys.readouterr().err == f"petseg: no photos or videos in {photo.parent}; {said}"


@pytest.mark.parametrize("value", ["1.5", "0", "1", "-0.1", "nan", "half"])
def test_a_threshold_out_of_range_is_rejected_before_anything_is_written(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    assert run(["infer", str(photo), "--output", str(tmp_path / "out"), f"--threshold={value}"]) != 0
    err = capsys.readouterr().err
    assert "threshold" in err
    assert value in err
    assert not list(tmp_path.rglob("*.png"))


def test_a_missing_or_damaged_model_exits_with_4(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(default_model().read_bytes()[:5000])
    for model in (tmp_path / "missing.onnx", damaged, photo):
        assert run(["infer", str(photo), "--model", str(model), "--output", str(tmp_path / "out")]) == 4
        out, err = capsys.readouterr()
        assert out == ""
        assert ("use a file made by `petseg export`" in err) == (model.name != "missing.onnx")
        assert err.startswith(f"petseg: {model}: ")
        assert len(err.splitlines()) == 1


def test_without_an_engine_it_exits_with_5_and_says_what_to_install(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for engine in ("onnxruntime", "openvino"):
        uninstall(engine, monkeypatch)
    assert run(["infer", str(photo), "--output", str(tmp_path / "out")]) == 5
    err = capsys.readouterr().err
    assert install("cpu") in err
    assert install("openvino") in err
    assert not (tmp_path / "out").exists()


def test_an_unwritable_output_exits_with_6(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run(["infer", str(photo), "--output", str(output)]) == 6
        err = capsys.readouterr().err
        assert err.startswith(f"petseg: {output}: cannot be written to")
        assert len(err.splitlines()) == 1


def test_a_result_that_would_replace_a_photo_exits_with_6(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "cat.png"
    Image.new("RGB", (9, 9)).save(photo)
    before = photo.read_bytes()
    code, message = failed(["infer", str(photo), "--output", str(tmp_path)], capsys)
    assert code == 6
    assert "would replace a photo" in message
    assert photo.read_bytes() == before
    assert list(tmp_path.iterdir()) == [photo]


# --------------------------------------------------------------------------------------------------- options


MODES = {"mask": "L", "probability": "L", "cutout": "RGBA", "overlay": "RGB", "background": "RGB"}


@pytest.mark.parametrize("kind", sorted(MODES))
def test_each_kind_of_result_is_written_as_named(photo: Path, tmp_path: Path, kind: str) -> None:
    behind = ["--background", "#0000ff"] if kind == "background" else []
    suffix, form = (".jpg", "JPEG") if kind in ("overlay", "background") else (".png", "PNG")
    assert run(["infer", str(photo), "--as", kind, *behind, "--output", str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == {f"cat{suffix}"}
    with Image.open(photo) as original:
        pixels = np.array(original)
    with Image.open(tmp_path / "out" / f"cat{suffix}") as picture:
        assert (picture.mode, picture.size, picture.format) == (MODES[kind], pixels.shape[1::-1], form)
        written = np.array(picture)
    if kind == "mask":
        assert set(np.unique(written)) == {0, 255}
    elif kind == "probability":
        assert len(np.unique(written)) > 50
    elif kind == "cutout":
        opaque = written[..., 3] == 255
        np.testing.assert_array_equal(written[opaque][:, :3], pixels[opaque])
        assert written[..., 3].min() < 128 < written[..., 3].max()
    elif kind == "background":
        blue = np.abs(written.astype(int) - (0, 0, 255)).sum(axis=2) < 60
        kept = np.abs(written.astype(int) - pixels).sum(axis=2) < 60
        assert blue.mean() > 0.02
        assert kept.mean() > 0.5
        assert (blue | kept).mean() > 0.9
    else:
        assert 1 < np.abs(written.astype(int) - pixels).mean() < 100


@pytest.mark.parametrize("kind", ["coco-polygons", "coco-rle"])
def test_coco_writes_one_file_for_all_photos(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (photo.parent / "bad.jpg").write_bytes(b"no")
    out = tmp_path / "out"
    # At this threshold the mask has no hole, which polygons could not represent.
    args = ["infer", str(photo.parent), "--as", kind, "--threshold", "0.25", "--json", "--output", str(out)]
    assert run(args) == 3
    failure, result, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert (failure["event"], result["event"], result["output"]) == ("failure", "result", None)
    assert summary["output"] == str(out / "annotations.json")
    assert files(out) == {"annotations.json", JOURNAL}
    file = json.loads((out / "annotations.json").read_text(encoding="utf-8"))
    assert file["images"] == [{"id": 1, "file_name": str(photo), "height": 300, "width": 451}]
    (annotation,) = file["annotations"]
    assert {name: annotation[name] for name in result["annotation"]} == result["annotation"]
    assert isinstance(annotation["segmentation"], list if kind == "coco-polygons" else dict)
    assert annotation["area"] == pytest.approx(result["coverage"] * 300 * 451, abs=1)
    assert annotation["bbox"] == result["box"]
    args.remove("--json")
    args[1] = str(photo)
    assert run(args) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [f"1 photo: 1 written to {out / 'annotations.json'}"]


def test_a_background_implies_the_kind_of_result(photo: Path, tmp_path: Path) -> None:
    # Chelsea fills her photo, and edges are soft; in this photo, a corner is certainly not pet, whatever the model.
    photo.write_bytes(CHELSEA.with_name("Abyssinian_204.jpg").read_bytes())
    with Image.new("RGB", (30, 90), "red") as beach:
        beach.save(tmp_path / "beach.png")
    for behind in ("white", str(tmp_path / "beach.png")):
        assert run(["infer", str(photo), "--background", behind, "--output", str(tmp_path / "out")]) == 0
        with Image.open(tmp_path / "out" / "cat.jpg") as picture:
            pixel = picture.getpixel((2, 2))
        expected = (255, 255, 255) if behind == "white" else (255, 0, 0)
        assert isinstance(pixel, tuple)
        assert np.abs(np.subtract(pixel, expected)).max() < 10


@pytest.mark.parametrize(("kind", "form"), [(k, f) for k, entry in KINDS.items() for f in entry.formats])
def test_the_format_can_be_chosen(photo: Path, tmp_path: Path, kind: str, form: str) -> None:
    behind = ["--background", "white"] if kind == "background" else []
    out = tmp_path / "out"
    assert run(["infer", str(photo), "--as", kind, "--format", form, *behind, "--output", str(out)]) == 0
    assert files(out) == {f"cat.{form}"}
    with Image.open(out / f"cat.{form}") as picture:
        assert picture.format == {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}[form]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "jpg"], "a cutout cannot be written as jpg; available: png, webp"),
        (["--as", "mask", "--format", "jpg"], "a mask cannot be written as jpg; available: png, webp"),
        (["--format", "mp4"], "a cutout cannot be written as mp4; available: png, webp"),
        (["--as", "lines"], "--as lines is for videos; for photos, --json prints the same"),
        (["--start", "1"], "--start is for videos and streams, and none was given"),
        (["--as", "coco-rle", "--format", "png"], "a coco-rle cannot be written as png; available: JSON only"),
        (["--as", "background"], "--background COLOUR or FILE and --as background belong together"),
        (["--as", "mask", "--background", "white"], "--background COLOUR or FILE and --as background belong together"),
        (["--as", "coco-rle", "--background", "white"], "--as background belong together"),
        (["--threshold", "0.6"], "--threshold is for masks; for --as cutout, use --cutout-threshold"),
        (["--background", "white", "--threshold", "0.6"], "for --as background, use --cutout-threshold"),
        (
            ["--as", "mask", "--cutout-threshold", "0.1"],
            "is for cutouts and backgrounds; for --as mask, use --threshold",
        ),
        (["--fast-decode"], "whose result does not contain the photo itself (--as mask, probability, "),
        (
            ["--as", "overlay", "--fast-decode"],
            "--fast-decode is for photos whose result does not contain the photo itself",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_conflicting_options_exit_with_2_and_create_no_folder(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert run(["infer", str(photo), *options, "--output", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_background_that_is_neither_colour_nor_file_exits_with_1(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["infer", str(photo), "--background", "beech.jpg", "--output", str(tmp_path / "out")]) == 1
    assert "background 'beech.jpg': neither a colour (white, #00ff00) nor a file" in capsys.readouterr().err


def test_regions_below_the_minimum_area_are_removed(toy: Toy, tmp_path: Path) -> None:
    """For the toy, red is pet; one red square has 6 per cent of the photo, another one 0.2 per cent."""
    model = str(toy(tmp_path / "toy.onnx", height=64, width=64).path)
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[8:24, 8:24, 0] = pixels[50:53, 50:53, 0] = 255
    photo = tmp_path / "photo.png"
    Image.fromarray(pixels).save(photo)
    for share, regions in (("0", 2), ("0.002", 2), ("0.003", 1), ("0.5", 0)):
        out = tmp_path / share
        options = ["--min-area", share, "--as", "mask", "--model", model]
        assert run(["infer", str(photo), *options, "--output", str(out)]) == 0
        with Image.open(out / "photo.png") as picture:
            mask = np.array(picture) == 255
        assert (mask[8:24, 8:24].all(), mask[50:53, 50:53].all()) == (regions > 0, regions > 1)
        assert mask.sum() == 256 * (regions > 0) + 9 * (regions > 1)


def test_low_confidence_regions_are_kept_on_request(toy: Toy, tmp_path: Path) -> None:
    model = str(toy(tmp_path / "toy.onnx", height=64, width=64).path)
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[8:24, 8:24, 0], pixels[40:50, 40:50, 0] = 255, 200
    photo, out = tmp_path / "photo.png", tmp_path / "out"
    Image.fromarray(pixels).save(photo)
    for options, seen in (([], False), (["--keep-doubtful"], True)):
        words = [*options, "--as", "probability", "--model", model, "--output", str(out)]
        assert run(["infer", str(photo), *words]) == 0
        with Image.open(out / "photo.png") as picture:
            probability = np.array(picture)
        assert (probability[8:24, 8:24] == 255).all()
        assert (probability[40:50, 40:50] == 200 * seen).all()


@pytest.mark.parametrize("value", ["1", "-0.1", "all"])
def test_an_area_out_of_range_exits_with_2(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    assert run(["infer", str(photo), f"--min-area={value}", "--output", str(tmp_path / "out")]) == 2
    assert "--min-area" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_offered_kinds_match_the_writable_ones() -> None:
    (option,) = (parameter for parameter in infer.params if parameter.name == "kind")
    assert set(getattr(option.type, "choices", ())) == set(KINDS) | set(VIDEO_FORMATS)


def test_results_go_to_a_folder_named_after_their_kind_by_default(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["infer", str(photo), "--as", "overlay"]) == 0
    assert (tmp_path / "petseg-output" / "overlay" / "cat.jpg").is_file()


def test_masks_and_cutouts_have_separate_thresholds(photo: Path, tmp_path: Path) -> None:
    pictures = {}
    for kind, option in (("mask", "--threshold"), ("cutout", "--cutout-threshold")):
        for threshold in ("0.02", "0.98"):
            out = tmp_path / kind / threshold
            assert run(["infer", str(photo), "--as", kind, "--output", str(out), option, threshold]) == 0
            with Image.open(out / "cat.png") as picture:
                pictures[kind, threshold] = np.array(picture)
    low, high = (pictures["mask", threshold] == 255 for threshold in ("0.02", "0.98"))
    assert (low | ~high).all()
    assert low.sum() > high.sum()
    assert pictures["cutout", "0.02"][..., 3].sum() > pictures["cutout", "0.98"][..., 3].sum()


def test_with_both_thresholds_cutout_and_coverage_use_their_own(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cutouts, coverage = [], []
    for threshold in ("0.02", "0.98"):
        out = tmp_path / threshold
        both = ["--threshold", threshold, "--cutout-threshold", "0.2"]
        assert run(["infer", str(photo), "--json", "--output", str(out), *both]) == 0
        coverage.append(json.loads(capsys.readouterr().out.splitlines()[0])["coverage"])
        cutouts.append((out / "cat.png").read_bytes())
    assert cutouts[0] == cutouts[1]
    assert coverage[0] > coverage[1]


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A JPEG that may be decoded at an eighth of its size for the toy's 16 x 32, full of detail that this loses."""
    pixels = np.random.default_rng(0).integers(0, 256, (480, 960, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "large.jpg", quality=95)
    return tmp_path / "in" / "large.jpg"


@pytest.mark.parametrize("kind", ["mask", "probability"])
def test_masks_match_the_api_unless_fast_decoding_is_requested(
    large: Path, toy: Toy, tmp_path: Path, kind: str
) -> None:
    model = toy(tmp_path / "toy.onnx").path
    command = ["infer", str(large), "--model", str(model), "--backend", "onnxruntime", "--as", kind, "--output"]
    with Segmenter(model, backend="onnxruntime") as segmenter:
        result = segmenter(large)
    assert run([*command, str(tmp_path / "exact")]) == 0
    assert run([*command, str(tmp_path / "fast"), "--fast-decode"]) == 0
    written = {}
    for name in ("exact", "fast"):
        with Image.open(tmp_path / name / "large.png") as picture:
            written[name] = np.array(picture)
    expected = result.probability if kind == "probability" else 255 * result.mask.astype(np.uint8)
    np.testing.assert_array_equal(written["exact"], expected)
    assert written["fast"].shape == expected.shape
    assert (written["fast"] != expected).any()


def test_fast_decoding_is_a_different_run_for_resume(
    large: Path, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["infer", str(large.parent), "--model", str(toy(tmp_path / "toy.onnx").path), "--as", "mask"]
    command += ["--output", str(tmp_path / "out")]
    assert run([*command, "--fast-decode"]) == 0
    assert run([*command, "--resume"]) == 6
    assert "fast_decode was True, now False" in capsys.readouterr().err
    assert run([*command, "--resume", "--fast-decode"]) == 0


def test_without_a_threshold_the_models_own_is_used(photo: Path, tmp_path: Path) -> None:
    own = str(open_artifact(default_model()).spec.threshold)
    for out, options in (("a", []), ("b", ["--threshold", own])):
        assert run(["infer", str(photo), "--as", "mask", "--output", str(tmp_path / out), *options]) == 0
    assert (tmp_path / "a" / "cat.png").read_bytes() == (tmp_path / "b" / "cat.png").read_bytes()


def test_quiet_prints_only_failures(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGBA", (30, 20)).save(photo.parent / "clear.png")  # would print a note
    assert run(["infer", str(photo.parent), "-q", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr() == ("", "")
    (photo.parent / "bad.jpg").write_bytes(b"no")
    assert run(["infer", str(photo.parent), "-q", "--output", str(tmp_path / "out")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "bad.jpg" in err
    assert len(err.splitlines()) == 1


def test_verbose_prints_engine_and_time_to_stderr(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["infer", str(photo), "-v", "--backend", "onnxruntime", "--threads", "1"]
    assert run([*command, "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    first, *steps = err.splitlines()
    assert open_artifact(default_model()).spec.name in first
    assert " in onnxruntime " in first
    assert first.endswith(" on cpu, f32, 1 threads")
    assert [line.split(":")[0].strip() for line in steps] == ["read", "infer", "write"]
    assert all(re.search(r": median [\d.]+ ms, p95 [\d.]+ ms, total [\d.]+ s$", line) for line in steps)
    assert "photos/s" in out


def test_the_engine_can_be_chosen(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'petseg[openvino]'")
    command = ["infer", str(photo), "-v", "--output", str(tmp_path / "out"), "--backend"]
    assert run([*command, "openvino"]) == 0
    assert " in openvino " in capsys.readouterr().err
    assert run([*command, "onnxruntime"]) == 0
    assert " in onnxruntime " in capsys.readouterr().err
    assert run([*command, "abacus"]) == 5
    assert "unknown engine 'abacus'; choose one of: auto, onnxruntime, openvino" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cuda"], "cuda:0 is not available: this machine shows no NVIDIA GPU: install its driver, or use"),
        (
            ["--device", "cuda:1"],
            "cuda:1 is not available: this machine shows no NVIDIA GPU: install its driver, or use",
        ),
        (["--device", "gpu"], "unknown device 'gpu'; choose one of: auto, cpu, cuda, cuda:N"),
        (["--device", "cuda", "--backend", "openvino"], "openvino cannot run it on cuda:0; supported: openvino on cpu"),
        (
            ["--device", "intel-gpu", "--backend", "onnxruntime"],
            "onnxruntime cannot run it on intel-gpu:0; supported: ",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_an_unavailable_device_exits_with_5_without_fallback(
    photo: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.setattr("petseg_runtime.host.gpus", lambda: ())
    assert run(["infer", str(photo), *options, "--output", str(tmp_path / "out")]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("petseg: ")
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_the_cpu_can_be_chosen(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["infer", str(photo), "-v", "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    assert " on cpu, " in capsys.readouterr().err


@pytest.mark.parametrize(("photos", "threads", "streams"), [(5, 2, 2), (5, 8, 5), (1, 8, 1)])
def test_no_more_photos_are_in_the_engine_than_there_are(
    reds: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    photos: int,
    threads: int,
    streams: int,
) -> None:
    def load(*_: object, **options: Any) -> None:
        raise EngineError(f"{options['threads']} threads, {options['streams']} streams")

    monkeypatch.setattr("petseg_runtime.segmenter.Segmenter", load)
    for photo in sorted((tmp_path / "photos").iterdir())[photos:]:
        photo.unlink()
    args = [*reds, str(tmp_path / "out"), "--threads", str(threads)]
    assert failed(args, capsys)[1] == f"petseg: {threads} threads, {streams} streams\n"


def test_a_skipped_engine_and_an_engines_notes_are_reported_on_stderr(
    toy: Toy, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr("petseg_runtime.host.gpus", lambda: ())

    def broken(spec: object, options: object) -> bool:
        raise EngineError("openvino is out of order")

    monkeypatch.setattr("petseg_runtime.engines.openvino.computes_in_less", broken)
    command = ["infer", str(photo), "--model", str(toy(tmp_path / "toy.onnx").path), "--output", str(tmp_path / "out")]
    assert run(command) == 0
    assert capsys.readouterr().err == "petseg: openvino is out of order\n"

    def describe(segmenter: Segmenter) -> EngineInfo:
        info = real(segmenter)
        return dataclasses.replace(info, notes=(*info.notes, "kernels compiled again"))

    real = Segmenter.describe
    monkeypatch.setattr(Segmenter, "describe", describe)
    assert run(command) == 0
    assert capsys.readouterr().err == "petseg: openvino is out of order\npetseg: kernels compiled again\n"
    assert run([*command, "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_stdout_is_only_json_even_for_one_photo(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["infer", str(photo), "--json", "--output", str(tmp_path / "out")]) == 0
    result, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert (result["event"], result["input"]) == ("result", str(photo))
    assert result["output"] == str(tmp_path / "out" / "cat.png")
    with Image.open(tmp_path / "out" / "cat.png") as cutout:
        assert (result["width"], result["height"]) == cutout.size
    assert result["found"] is True
    x, y, width, height = result["box"]
    assert 0 <= x < x + width <= result["width"]
    assert 0 <= y < y + height <= result["height"]
    assert 0 < result["coverage"] <= width * height / (result["width"] * result["height"])
    counts = {name: summary[name] for name in ("event", "photos", "done", "failed", "skipped")}
    assert counts == {"event": "summary", "photos": 1, "done": 1, "failed": 0, "skipped": 0}
    assert summary["seconds"] >= 0
    assert list(summary["steps"]) == ["read", "infer", "write"]
    assert all(set(seconds) == {"sum", "p50", "p95", "p99"} for seconds in summary["steps"].values())


def test_without_a_pet_there_is_no_box(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "sky.png")
    model = str(toy(tmp_path / "toy.onnx").path)
    command = ["infer", str(tmp_path / "sky.png"), "--model", model, "--output", str(tmp_path / "out")]
    assert run([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (record["found"], record["box"], record["coverage"]) == (False, None, 0)
    assert run(command) == 0
    assert capsys.readouterr().out.endswith("sky.png  no pet found\n")


# ------------------------------------------------------------------------------------------- photos without a pet


@pytest.fixture
def mixed_photos(reds: list[str], tmp_path: Path) -> list[str]:
    """The five red photos, and two blue ones without a pet, between and after them."""
    for name in ("1-blue.png", "9-blue.png"):
        Image.new("RGB", (30, 20), "blue").save(tmp_path / "photos" / name)
    return reds


def test_only_found_writes_nothing_for_photos_without_a_pet(
    mixed_photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run([*mixed_photos, str(out), "--only-found"]) == 0
    assert files(out) == {JOURNAL, *(f"{index}.png" for index in range(5))}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{tmp_path / 'photos' / '1-blue.png'}  no pet found, nothing written"
    assert lines[-1] == f"7 photos: 5 written to {out}, 2 without a pet"
    assert run([*mixed_photos, str(tmp_path / "json"), "--only-found", "--json"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    *records, summary = map(json.loads, printed.out.splitlines())
    left_out = [record for record in records if record["left_out"]]
    assert [(record["event"], record["found"], record["output"]) for record in left_out] == [
        ("result", False, None)
    ] * 2
    assert all(Path(record["output"]).exists() for record in records if not record["left_out"])
    assert {name: summary[name] for name in ("photos", "done", "failed", "skipped", "left_out")} == {
        "photos": 7,
        "done": 7,
        "failed": 0,
        "skipped": 0,
        "left_out": 2,
    }


def test_a_resumed_run_remembers_only_found(
    mixed_photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run([*mixed_photos, str(out), "--only-found"]) == 0
    (out / "3.png").unlink()
    capsys.readouterr()
    assert run([*mixed_photos, str(out), "--only-found", "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"7 photos: 1 written to {out}, 6 already there"
    assert run([*mixed_photos, str(out), "--resume"]) == 6
    assert "only_found was True, now None" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["coco-polygons", "coco-rle"])
def test_a_photo_without_a_pet_is_listed_in_coco(
    mixed_photos: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("petseg_runtime.result.Segmentation.found", property(lambda result: result.coverage > 0.2))
    assert run([*mixed_photos, str(tmp_path / "out"), "--only-found", "--as", kind]) == 0
    file = json.loads((tmp_path / "out" / "annotations.json").read_text(encoding="utf-8"))
    assert len(file["images"]) == 7
    large = [4 + index for index in range(5) if (6 + index) * 15 / 600 > 0.2]
    assert len(file["annotations"]) == len(large) < 5, "a mask without a pet by the rule has no annotation"


def test_only_found_keeps_existing_results(mixed_photos: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run([*mixed_photos, str(out)]) == 0
    before = (out / "9-blue.png").read_bytes()
    assert run([*mixed_photos, str(out), "--only-found"]) == 0
    assert (out / "9-blue.png").read_bytes() == before


def test_without_a_pet_stdout_is_empty_and_stderr_says_why(
    mixed_photos: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blue = tmp_path / "photos" / "9-blue.png"
    words = ["infer", str(blue), *mixed_photos[2:4], "--output", "-", "--only-found"]
    assert run(words) == 0
    assert capsys.readouterr() == ("", f"petseg: {blue}: no pet found, nothing written\n")
    assert run([*words, "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    assert run([*words, "-v"]) == 0
    assert capsys.readouterr().out == "", "nothing but pictures"


def test_a_second_run_skips_the_results_of_the_first(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photo.parent)
    for _ in range(2):
        assert run(["infer", ".", "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["photos"] == 1


# ----------------------------------------------------------------------------------- the search for photos


def test_results_are_not_written_among_the_searched_photos(
    reds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    before = files(photos)
    assert run([*reds, str(photos)]) == 2
    assert "later searches skip folders with results" in capsys.readouterr().err
    sub = photos / "sub"
    sub.mkdir()
    Image.new("RGB", (20, 30), "red").save(sub / "1.png")
    assert run([*reds, str(sub)]) == 2
    assert "contains photos that may not be results (1.png, for one)" in capsys.readouterr().err
    with Image.open(sub / "1.png") as kept:
        assert kept.getpixel((0, 0)) == (255, 0, 0)
    (sub / "1.png").unlink()
    for _ in range(2):  # it recognises its own results
        assert run([*reds, str(sub)]) == 0
    assert files(sub) == {*before, JOURNAL}


def test_the_only_photos_result_is_not_found_by_the_next_run(
    photo: Path, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["infer", str(photo.parent), "--model", str(toy(tmp_path / "toy.onnx").path), "--json"]
    command += ["--output", str(photo.parent / "out")]
    for _ in range(2):
        assert run(command) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["photos"] == 1


def test_a_file_named_like_a_pattern_is_used_as_a_file(photo: Path, toy: Toy, tmp_path: Path) -> None:
    unusual_files = photo.rename(photo.with_name("cat[1].png"))
    command = [
        "--as",
        "overlay",
        "--model",
        str(toy(tmp_path / "toy.onnx").path),
        "--output",
        str(unusual_files.parent),
    ]
    assert run(["infer", str(unusual_files), *command]) == 0
    assert files(unusual_files.parent) == {unusual_files.name, "cat[1].jpg"}


def test_a_pattern_is_expanded_and_one_without_matches_fails(
    reds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "deep").mkdir()
    shutil.copy(tmp_path / "photos" / "0.png", tmp_path / "photos" / "deep" / "0.png")
    reds[1:2] = [str(tmp_path / "photos" / "**" / "[0-2].png"), str(tmp_path / "*.gif")]
    assert run([*reds, str(tmp_path / "out")]) == 3
    assert capsys.readouterr().err == f"petseg: {tmp_path / '*.gif'}: no file matches this pattern\n"
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert written == {"0.png", "1.png", "2.png", "deep/0.png"}


def test_files_skipped_by_a_search_are_named_on_stderr(
    reds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    photos = tmp_path / "photos"
    (photos / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (photos / "more").symlink_to(tmp_path)
    assert run([*reds, str(tmp_path / "out")]) == 3
    link, heic = capsys.readouterr().err.splitlines()
    assert (
        link == f"petseg: {photos / 'more'}: skipped, because it is a link to a folder; to segment its photos, name it"
    )
    assert heic == (
        f"petseg: {photos / 'phone.heic'}: a HEIC photo needs pillow-heif; {install('heic')}, or convert the "
        "photo to JPEG"
    )
    assert run([*reds, str(tmp_path / "quiet"), "--quiet"]) == 3
    assert capsys.readouterr().err == heic + "\n"


def test_results_of_one_kind_are_not_inputs_of_another(reds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(reds[1])
    monkeypatch.chdir(folder)
    for kind in ("overlay", "cutout", "mask"):
        assert run(["infer", ".", *reds[2:4], "--as", kind]) == 0
        assert len(files(folder / "petseg-output" / kind) - {JOURNAL}) == 5


# ------------------------------------------------------------------------------------ unusual names and sizes


def test_link_loops_and_invalid_names_are_counted_as_failures(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loop = photo.parent / "loop.jpg"
    loop.symlink_to(loop)
    impossible = tmp_path / ("n" * 300 + ".jpg")
    assert run(["infer", str(photo.parent), str(impossible), "--json", "--output", str(tmp_path / "out")]) == 3
    out, err = capsys.readouterr()
    summary = json.loads(out.splitlines()[-1])
    assert (summary["done"], summary["failed"]) == (1, 2)
    assert len(err.splitlines()) == 2


def test_a_non_utf8_name_is_escaped_and_segmented(photo: Path, tmp_path: Path) -> None:
    unusual_files = os.fsencode(photo.parent) + b"/caf\xe9.jpg"
    try:
        Path(os.fsdecode(unusual_files)).write_bytes(photo.read_bytes())
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    # In a UTF-8 locale, writing undecodable names to a terminal fails; in the C locale, it would not.
    words = ("infer", photo.parent, "--output", tmp_path / "out", *IN_ONNXRUNTIME)
    done = petseg(*words, env={"PYTHONIOENCODING": "utf-8:strict"})
    assert done.returncode == 0
    assert "caf\\udce9.jpg -> " in done.stdout
    assert os.fsencode(tmp_path / "out") + b"/caf\xe9.png" in [os.fsencode(p) for p in (tmp_path / "out").iterdir()]


@pytest.mark.slow
def test_sixty_megapixels_are_segmented(tmp_path: Path) -> None:
    Image.new("RGB", (10_000, 6_000), (120, 90, 60)).save(tmp_path / "large.jpg")
    done = petseg("infer", tmp_path / "large.jpg", "--as", "mask", "--output", tmp_path / "out", "--json")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout.splitlines()[0])
    assert (record["width"], record["height"]) == (10_000, 6_000)
    with Image.open(tmp_path / "out" / "large.png") as mask:
        assert (mask.mode, mask.size) == ("L", (10_000, 6_000))


# ------------------------------------------------------------------------------------------ another input size


def segmented(photo: Path, out: Path, *options: str) -> np.ndarray:
    assert run(["infer", str(photo), "--as", "probability", "--output", str(out), *options]) == 0
    with Image.open(out / f"{photo.stem}.png") as picture:
        return np.array(picture)


def test_infer_uses_the_requested_size(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The toy returns the red channel, which a larger input preserves and a smaller one blurs."""
    model = str(toy(tmp_path / "toy.onnx", dynamic_size=True).path)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    photo = tmp_path / "photo.png"
    Image.fromarray(pixels).save(photo)
    exact = segmented(photo, tmp_path / "a", "--model", model, "--size", "48x80", "--keep-doubtful")
    np.testing.assert_array_equal(exact, pixels[..., 0])
    said = "petseg: --size 48 x 80: the model is for 16 x 32; at other sizes, its masks may be much worse\n"
    assert capsys.readouterr().err == said
    for quiet, printed in ([], said.replace("48 x 80", "16 x 80")), (["-q"], ""):
        segmented(photo, tmp_path / "wide", "--model", model, "--size", "16x80", *quiet)
        assert capsys.readouterr().err == printed
    own = segmented(photo, tmp_path / "b", "--model", model)
    np.testing.assert_array_equal(own, segmented(photo, tmp_path / "c", "--model", model, "--size", "16x32"))
    assert capsys.readouterr().err == ""
    assert np.std(own) < 0.8 * np.std(exact)


@pytest.mark.parametrize(("size", "said"), [("64", "only, not 64 x 64"), ("0", "only, not 0 x 0")])
def test_a_size_the_model_does_not_accept_exits_with_2(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, said: str
) -> None:
    assert run(["infer", str(photo), "--size", size, "--output", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_size_no_network_accepts_exits_with_2(
    toy: Toy, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(toy(tmp_path / "toy.onnx", dynamic_size=True).path)
    assert run(["infer", str(photo), "--model", model, "--size", "16x30", "--output", str(tmp_path / "out")]) == 2
    assert "multiple of 16" in capsys.readouterr().err


def test_an_invalid_size_exits_with_2(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["infer", str(photo), "--size", "large", "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "--size" in err
    assert "'large'" in err
    assert not (tmp_path / "out").exists()


def test_infer_runs_a_compiled_model(toy_ir: Artifact, photo: Path, tmp_path: Path) -> None:
    onnx = str(toy_ir.path.with_suffix(".onnx"))
    one = segmented(photo, tmp_path / "a", "--model", onnx)
    np.testing.assert_array_equal(one, segmented(photo, tmp_path / "b", "--model", str(toy_ir.path)))
