"""What people type: every photo answered for, one line per trouble, an exit code that tells scripts what happened."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import click
import numpy as np
import onnx
import pytest
from PIL import Image

from petseg.cli import COMMANDS, run
from petseg_runtime import Segmenter, __version__, default_model, host, onnx_metadata, sample_photos
from petseg_runtime.artifact import RECEIPT_KEY, Artifact, open_artifact, sidecar_text
from petseg_runtime.artifact import sidecar_of as beside
from petseg_runtime.cli.infer import infer
from petseg_runtime.cli.text import parse_size
from petseg_runtime.engines import onnxruntime, registry
from petseg_runtime.engines.base import DEVICES
from petseg_runtime.errors import EngineError
from petseg_runtime.extras import install
from petseg_runtime.files import replacing
from petseg_runtime.journal import JOURNAL, Journal
from petseg_runtime.parity import Proof, load_proof, proof_of
from petseg_runtime.signals import terminable
from petseg_runtime.sinks import KINDS, VIDEO_FORMATS
from petseg_runtime.verify import sidecar_of

CHELSEA = next(path for path in sample_photos() if path.name == "chelsea.jpg")
Toy: TypeAlias = Callable[..., Any]


def petseg(*args: object, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """The real command line in a process of its own; whatever happens, it never shows a traceback."""
    command = [sys.executable, "-m", "petseg.cli", *map(str, args)]
    done = subprocess.run(
        command, capture_output=True, text=True, encoding="utf-8", timeout=200, env={**os.environ, **(env or {})}
    )
    assert "Traceback" not in done.stderr, done.stderr
    return done


def parts(folder: Path) -> list[Path]:
    """What an interrupted write would leave behind."""
    hidden = (path for path in folder.rglob("*") if ".part" in path.name or path.name.startswith("."))
    return [path for path in hidden if path.name != JOURNAL]


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """A small photo with a pet, in a folder of its own."""
    path = tmp_path / "in" / "cat.jpg"
    path.parent.mkdir()
    path.write_bytes(CHELSEA.read_bytes())
    return path


@dataclass
class Folder:
    """A folder of odd files: name -> what its result's size (width, height) must be; and the bad ones."""

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
def odd(tmp_path_factory: pytest.TempPathFactory) -> Folder:
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
    """A finished run over the odd folder."""

    process: subprocess.CompletedProcess[str]
    records: list[dict[str, Any]]
    output: Path


@pytest.fixture(scope="module")
def batch(odd: Folder, tmp_path_factory: pytest.TempPathFactory) -> Batch:
    output = tmp_path_factory.mktemp("batch") / "out"
    done = petseg("infer", odd.root, "--output", output, "--as", "mask", "--json")
    return Batch(done, [json.loads(line) for line in done.stdout.splitlines()], output)


# ------------------------------------------------------------------------------------- a batch with odd photos


def test_a_batch_with_bad_photos_ends_with_3_and_counts_them(odd: Folder, batch: Batch) -> None:
    assert batch.process.returncode == 3
    summary = batch.records[-1]
    assert summary["event"] == "summary"
    assert summary["photos"] == len(odd.good) + len(odd.bad)
    assert summary["done"] == len(odd.good)
    assert summary["failed"] == len(odd.bad)


def test_each_photo_has_exactly_one_record(odd: Folder, batch: Batch) -> None:
    assert all(record["schema_version"] == 1 for record in batch.records)
    by_event: dict[str, list[str]] = {"result": [], "failure": []}
    for record in batch.records[:-1]:
        by_event[record["event"]].append(str(Path(record["input"]).relative_to(odd.root)))
    assert sorted(by_event["result"]) == sorted(odd.good)
    assert sorted(by_event["failure"]) == sorted(odd.bad)


def test_each_result_has_the_upright_size_of_its_photo(odd: Folder, batch: Batch) -> None:
    for record in batch.records:
        if record["event"] != "result":
            continue
        size = odd.good[str(Path(record["input"]).relative_to(odd.root))]
        assert (record["width"], record["height"]) == size
        with Image.open(record["output"]) as mask:
            assert mask.size == size
            share = np.mean(np.array(mask) == 255)
        assert record["coverage"] == pytest.approx(share, abs=1e-6)


def test_results_lie_in_folders_like_the_photos_and_nothing_else_does(odd: Folder, batch: Batch) -> None:
    written = sorted(str(path.relative_to(batch.output)) for path in batch.output.rglob("*") if path.is_file())
    assert written == sorted([JOURNAL, *(str(Path(name).with_suffix(".png")) for name in odd.good)])
    assert parts(batch.output) == []


def test_each_line_on_stderr_is_petsegs_and_names_its_file(odd: Folder, batch: Batch) -> None:
    lines = batch.process.stderr.splitlines()
    noted = [record for record in batch.records if record.get("notes")]
    assert len(lines) == len(odd.bad) + sum(len(record["notes"]) for record in noted)
    for name in (*odd.bad, *(Path(record["input"]).name for record in noted)):
        shown = name.replace("\n", "\\n")
        assert any(line.startswith(f"petseg: {odd.root}") and f"/{shown}: " in line for line in lines), name


def test_what_was_decided_about_a_photo_is_noted(batch: Batch) -> None:
    notes = {Path(record["input"]).name: record["notes"] for record in batch.records if record["event"] == "result"}
    assert any("the first frame" in note for note in notes["moving.gif"])
    assert any("16-bit" in note for note in notes["grey16.png"])
    assert any("transparency" in note for note in notes["palette.png"])
    assert notes["plain.jpg"] == notes["phone.jpg"] == []


def test_each_failure_says_why(batch: Batch) -> None:
    errors = {Path(r["input"]).name: r["error"] for r in batch.records if r["event"] == "failure"}
    assert "truncated" in errors["truncated.jpg"]
    assert "not an image" in errors["text.jpg"]
    assert "empty" in errors["zero.jpg"]


def test_for_people_there_is_a_line_per_result_and_a_count(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photo.parent / "bad.jpg").write_bytes(b"no")
    assert run(["infer", str(photo.parent), "--output", str(tmp_path / "out")]) == 3
    out, err = capsys.readouterr()
    result, count = out.splitlines()
    assert result.startswith(f"{photo} -> {tmp_path / 'out' / 'cat.png'}  ")
    assert result.endswith("% pet")
    assert count == f"2 photos: 1 written to {tmp_path / 'out'}, 1 failed"
    assert err.startswith(f"petseg: {photo.parent / 'bad.jpg'}: ")
    assert len(err.splitlines()) == 1


# ------------------------------------------------------------------------------------------------- exit codes


def test_all_done_is_0(photo: Path, tmp_path: Path) -> None:
    done = petseg("infer", photo, "--output", tmp_path / "out")
    assert (done.returncode, done.stderr) == (0, "")
    assert len(done.stdout.splitlines()) == 1  # no count where there is nothing to count
    with Image.open(tmp_path / "out" / "cat.png") as cutout:
        assert cutout.mode == "RGBA"  # cutouts are what is written by default


def test_all_failed_is_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        (folder / name).write_bytes(b"no photo")
    assert run(["infer", str(folder), str(tmp_path / "missing.jpg"), "--output", str(tmp_path / "out")]) == 1
    out, err = capsys.readouterr()
    assert len(err.splitlines()) == 3
    assert "missing.jpg: no such file" in err
    assert "3 photos: 0 written" in out


def test_a_folder_without_photos_is_1_and_makes_no_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").touch()
    assert run(["infer", str(empty), "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr() == ("", f"petseg: no photos or videos in {empty}\n")
    assert not (tmp_path / "out").exists()


def test_photos_of_kinds_that_are_not_read_are_told_of(
    photo: Path, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("1.NEF", "2.NEF", "3.NEF", "4.jp2", "no suffix", "notes.txt"):
        (photo.parent / name).touch()
    said = "passed over by their suffix: 3 .nef, 1 without a suffix, 1 .jp2\n"
    command = ["infer", str(photo.parent), "--model", str(toy(tmp_path / "toy.onnx").path)]
    assert run([*command, "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().err == f"petseg: {said}"
    assert run([*command, "--output", str(tmp_path / "out"), "--quiet"]) == 0
    assert capsys.readouterr().err == ""
    photo.unlink()
    assert run([*command, "--output", str(tmp_path / "out"), "--quiet"]) == 1
    assert capsys.readouterr().err == f"petseg: no photos or videos in {photo.parent}; {said}"


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["infer"],
        ["infer", "--nonsense", "cat.jpg"],
        ["infer", "cat.jpg", "--as", "painting"],
        ["infer", "cat.jpg", "--threads", "0"],
        ["infer", "cat.jpg", "--threads", "two"],
        ["info", "one.onnx", "two.onnx"],
        ["verify", "one.onnx", "two.onnx"],
        ["verify", "--threads", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2_and_is_explained_on_stderr(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "Usage: petseg" in err


@pytest.mark.parametrize("value", ["1.5", "0", "1", "-0.1", "nan", "half"])
def test_a_threshold_outside_its_bounds_is_refused_before_anything_is_written(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    assert run(["infer", str(photo), "--output", str(tmp_path / "out"), f"--threshold={value}"]) != 0
    err = capsys.readouterr().err
    assert "threshold" in err
    assert value in err
    assert not list(tmp_path.rglob("*.png"))


def test_a_missing_or_damaged_model_is_4(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = tmp_path / "damaged.onnx"
    damaged.write_bytes(default_model().read_bytes()[:5000])
    for model in (tmp_path / "missing.onnx", damaged, photo):
        assert run(["infer", str(photo), "--model", str(model), "--output", str(tmp_path / "out")]) == 4
        out, err = capsys.readouterr()
        assert out == ""
        assert ("a file that `petseg export` made is expected" in err) == (model.name != "missing.onnx")
        assert err.startswith(f"petseg: {model}: ")
        assert len(err.splitlines()) == 1


def uninstall(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    monkeypatch.delitem(sys.modules, f"petseg_runtime.engines.{engine}", raising=False)


def test_no_engine_is_5_and_says_what_to_install(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for engine in ("onnxruntime", "openvino"):
        uninstall(engine, monkeypatch)
    assert run(["infer", str(photo), "--output", str(tmp_path / "out")]) == 5
    err = capsys.readouterr().err
    assert install("cpu") in err
    assert install("openvino") in err
    assert not (tmp_path / "out").exists()


def test_an_output_that_cannot_be_written_is_6(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").touch()
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        assert run(["infer", str(photo), "--output", str(output)]) == 6
        err = capsys.readouterr().err
        assert err.startswith(f"petseg: {output}: cannot be written to")
        assert len(err.splitlines()) == 1


def test_a_result_that_would_replace_a_photo_is_6_and_the_photo_stays(tmp_path: Path) -> None:
    photo = tmp_path / "cat.png"
    Image.new("RGB", (9, 9)).save(photo)
    before = photo.read_bytes()
    done = petseg("infer", photo, "--output", tmp_path)
    assert done.returncode == 6
    assert "would replace a photo" in done.stderr
    assert photo.read_bytes() == before
    assert list(tmp_path.iterdir()) == [photo]


# --------------------------------------------------------------------------------------------------- options


MODES = {"mask": "L", "probability": "L", "cutout": "RGBA", "overlay": "RGB", "background": "RGB"}


@pytest.mark.parametrize("kind", sorted(MODES))
def test_each_kind_of_result_is_what_it_is_called(photo: Path, tmp_path: Path, kind: str) -> None:
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
def test_coco_is_one_file_for_all_photos(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    (photo.parent / "bad.jpg").write_bytes(b"no")
    out = tmp_path / "out"
    # At this threshold the mask has no hole, which polygons could not tell.
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


def test_a_background_says_by_itself_what_to_write(photo: Path, tmp_path: Path) -> None:
    # Chelsea fills her photo, and an edge is soft: one whose corner is surely no pet, whatever the model.
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
        (["--format", "jpg"], "a cutout is not written as jpg; it can be: png, webp"),
        (["--as", "mask", "--format", "jpg"], "a mask is not written as jpg; it can be: png, webp"),
        (["--format", "mp4"], "a cutout is not written as mp4; it can be: png, webp"),
        (["--as", "lines"], "lines are of videos; for photos, --json prints the same"),
        (["--start", "1"], "--start is for videos and streams, and there is none"),
        (["--as", "coco-rle", "--format", "png"], "a coco-rle is not written as png; it can be: JSON only"),
        (["--as", "background"], "--background COLOUR or FILE and --as background belong together"),
        (["--as", "mask", "--background", "white"], "--background COLOUR or FILE and --as background belong together"),
        (["--as", "coco-rle", "--background", "white"], "--as background belong together"),
        (["--threshold", "0.6"], "--threshold is for masks, and a cutout has --cutout-threshold"),
        (["--background", "white", "--threshold", "0.6"], "and a background has --cutout-threshold"),
        (["--as", "mask", "--cutout-threshold", "0.1"], "--cutout-threshold is for cutouts and backgrounds; mask has"),
        (["--fast-decode"], "--fast-decode is for photos of which only the mask is written (--as mask, probability, "),
        (["--as", "overlay", "--fast-decode"], "--fast-decode is for photos of which only the mask is written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_go_together_is_2_and_makes_no_folder(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert run(["infer", str(photo), *options, "--output", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_background_that_is_neither_colour_nor_file_is_1(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["infer", str(photo), "--background", "beech.jpg", "--output", str(tmp_path / "out")]) == 1
    assert "background 'beech.jpg': neither a colour (white, #00ff00) nor a file" in capsys.readouterr().err


def test_regions_smaller_than_asked_for_are_dropped(toy: Toy, tmp_path: Path) -> None:
    """The toy takes red for pet; of the photo, 6 per cent are one red square, and 0.2 per cent another."""
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


def test_what_is_doubtful_is_shown_where_that_is_asked_for(toy: Toy, tmp_path: Path) -> None:
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
def test_an_area_outside_its_bounds_is_2(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], value: str
) -> None:
    assert run(["infer", str(photo), f"--min-area={value}", "--output", str(tmp_path / "out")]) == 2
    assert "--min-area" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["infer", ""],
        ["infer", "cat.jpg", ""],
        *(["infer", "cat.jpg", option, ""] for option in ("--output", "--model", "--background")),
        ["info", ""],
        ["benchmark", ""],
        ["verify", "--output", ""],
    ],
    ids=" ".join,
)
def test_a_name_that_is_empty_is_2_and_never_the_current_folder(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], args: list[str]
) -> None:
    monkeypatch.chdir(photo.parent)
    assert run(args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith("it is empty; is a variable not set?\n")
    assert files(photo.parent) == {"cat.jpg"}


@pytest.mark.parametrize("value", ["nan", "inf"])
@pytest.mark.parametrize(
    "args",
    [
        *(["infer", "a.mp4", f"--{name}"] for name in ("start", "smooth", "segment", "stall", "give-up")),
        *(["infer", "a.jpg", f"--{name}"] for name in ("threshold", "cutout-threshold", "min-area")),
        ["benchmark", "--seconds"],
        ["evaluate", "a.onnx", "--data", ".", "--threshold"],
        ["export", "a.safetensors", "--int8-budget"],
    ],
    ids=" ".join,
)
def test_a_number_that_is_none_is_2(args: list[str], value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*args, value]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert f"Invalid value for '{args[-1]}': {value} is not" in err


def test_the_kinds_that_are_offered_are_those_that_can_be_written() -> None:
    (option,) = (parameter for parameter in infer.params if parameter.name == "kind")
    assert set(getattr(option.type, "choices", ())) == set(KINDS) | set(VIDEO_FORMATS)


def test_results_go_to_a_folder_named_after_their_kind_by_default(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["infer", str(photo), "--as", "overlay"]) == 0
    assert (tmp_path / "petseg-output" / "overlay" / "cat.jpg").is_file()


def test_masks_and_cutouts_have_each_their_threshold(photo: Path, tmp_path: Path) -> None:
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


def test_with_both_thresholds_a_cutout_and_what_is_said_of_it_have_each_their_own(
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
    """A JPEG that may be decoded at an eighth of its size for the toy's 16 x 32, full of what is lost by that."""
    pixels = np.random.default_rng(0).integers(0, 256, (480, 960, 3), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    Image.fromarray(pixels).save(tmp_path / "in" / "large.jpg", quality=95)
    return tmp_path / "in" / "large.jpg"


@pytest.mark.parametrize("kind", ["mask", "probability"])
def test_masks_are_those_of_the_api_unless_faster_ones_are_asked_for(
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


def test_a_run_with_faster_masks_is_another_one(
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


def test_quiet_says_nothing_of_what_went_well(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGBA", (30, 20)).save(photo.parent / "clear.png")  # would be noted
    assert run(["infer", str(photo.parent), "-q", "--output", str(tmp_path / "out")]) == 0
    assert capsys.readouterr() == ("", "")
    (photo.parent / "bad.jpg").write_bytes(b"no")
    assert run(["infer", str(photo.parent), "-q", "--output", str(tmp_path / "out")]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "bad.jpg" in err
    assert len(err.splitlines()) == 1


def test_verbose_names_what_runs_it_on_stderr_and_the_time_it_took(
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
    assert all(re.search(r": median [\d.]+ ms, 95 % below [\d.]+ ms, [\d.]+ s in all$", line) for line in steps)
    assert "photos/s" in out


@pytest.mark.parametrize("kept", ["edge.onnx", "edge.onnx.parity.npz"])
def test_a_verification_never_writes_over_the_model(
    kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("edge.onnx", "edge.onnx.parity.npz"):
        (tmp_path / name).write_bytes(default_model().with_name(name).read_bytes())
    before = (tmp_path / kept).read_bytes()
    assert run(["verify", str(tmp_path / "edge.onnx"), "--output", str(tmp_path / kept)]) == 6
    assert "--output" in capsys.readouterr().err
    assert (tmp_path / kept).read_bytes() == before


def test_a_result_that_cannot_be_written_is_told_all_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--output", "/proc/nowhere.json"]) == 6
    out, err = capsys.readouterr()
    assert "passed" in out
    assert "--output" in err


def test_the_engine_can_be_chosen(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'petseg[openvino]'")
    command = ["infer", str(photo), "-v", "--output", str(tmp_path / "out"), "--backend"]
    assert run([*command, "openvino"]) == 0
    assert " in openvino " in capsys.readouterr().err
    assert run([*command, "onnxruntime"]) == 0
    assert " in onnxruntime " in capsys.readouterr().err
    assert run([*command, "abacus"]) == 5
    assert "there is no engine 'abacus'; there are: auto, onnxruntime, openvino" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--device", "cuda"], "cuda:0 cannot be had: this machine shows no NVIDIA GPU: install its driver, or use"),
        (["--device", "cuda:1"], "cuda:1 cannot be had: this machine shows no NVIDIA GPU: install its driver, or use"),
        (["--device", "gpu"], "there is no device 'gpu'; there are: auto, cpu, cuda, cuda:N"),
        (["--device", "cuda", "--backend", "openvino"], "openvino cannot run it on cuda:0; what can: openvino on cpu"),
        (["--device", "intel-gpu", "--backend", "onnxruntime"], "onnxruntime cannot run it on intel-gpu:0; what can: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_device_that_cannot_be_had_is_5_with_the_remedy_and_never_another_one(
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


def test_the_cpu_can_be_asked_for(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["infer", str(photo), "-v", "--device", "cpu", "--output", str(tmp_path / "out")]) == 0
    assert " on cpu, " in capsys.readouterr().err


def test_an_engine_that_was_passed_over_is_told_of_on_stderr(
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
    assert run([*command, "-q"]) == 0
    assert capsys.readouterr().err == ""


def test_json_is_all_there_is_on_stdout_also_for_one_photo(
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


def test_where_there_is_no_pet_there_is_no_box(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (30, 20), "blue").save(tmp_path / "sky.png")
    model = str(toy(tmp_path / "toy.onnx").path)
    command = ["infer", str(tmp_path / "sky.png"), "--model", model, "--output", str(tmp_path / "out")]
    assert run([*command, "--json"]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[0])
    assert (record["found"], record["box"], record["coverage"]) == (False, None, 0)
    assert run(command) == 0
    assert capsys.readouterr().out.endswith("sky.png  no pet, it seems\n")


# ------------------------------------------------------------------------------------------- photos without a pet


@pytest.fixture
def some(reds: list[str], tmp_path: Path) -> list[str]:
    """The five red photos, and two blue ones without a pet between and behind them."""
    for name in ("1-blue.png", "9-blue.png"):
        Image.new("RGB", (30, 20), "blue").save(tmp_path / "photos" / name)
    return reds


def test_of_photos_without_a_pet_nothing_is_written_where_that_is_asked(
    some: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run([*some, str(out), "--only-found"]) == 0
    assert files(out) == {JOURNAL, *(f"{index}.png" for index in range(5))}
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{tmp_path / 'photos' / '1-blue.png'}  no pet: nothing written"
    assert lines[-1] == f"7 photos: 5 written to {out}, 2 without a pet"
    assert run([*some, str(tmp_path / "json"), "--only-found", "--json"]) == 0
    *records, summary = map(json.loads, capsys.readouterr().out.splitlines())
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


def test_a_run_that_goes_on_knows_what_was_left_out_and_what_was_asked(
    some: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run([*some, str(out), "--only-found"]) == 0
    (out / "3.png").unlink()
    capsys.readouterr()
    assert run([*some, str(out), "--only-found", "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"7 photos: 1 written to {out}, 6 there already"
    assert run([*some, str(out), "--resume"]) == 6
    assert "only_found was True, now None" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["coco-polygons", "coco-rle"])
def test_in_coco_a_photo_without_a_pet_is_one_that_was_looked_at(
    some: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    monkeypatch.setattr("petseg_runtime.result.Segmentation.found", property(lambda result: result.coverage > 0.2))
    assert run([*some, str(tmp_path / "out"), "--only-found", "--as", kind]) == 0
    file = json.loads((tmp_path / "out" / "annotations.json").read_text(encoding="utf-8"))
    assert len(file["images"]) == 7
    large = [4 + index for index in range(5) if (6 + index) * 15 / 600 > 0.2]
    assert len(file["annotations"]) == len(large) < 5, "of a mask that is no pet by the rule there is none either"


def test_what_is_there_already_stays_though_there_is_no_pet(some: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run([*some, str(out)]) == 0
    before = (out / "9-blue.png").read_bytes()
    assert run([*some, str(out), "--only-found"]) == 0
    assert (out / "9-blue.png").read_bytes() == before


def test_without_a_pet_standard_output_stays_empty_and_stderr_says_why(some: list[str], tmp_path: Path) -> None:
    blue = tmp_path / "photos" / "9-blue.png"
    done = petseg("infer", blue, *some[2:4], "--output", "-", "--only-found")
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr == f"petseg: {blue}: no pet: nothing written\n"
    assert petseg("infer", blue, *some[2:4], "--output", "-", "--only-found", "-q").stderr == ""


def test_a_second_run_passes_over_the_results_of_the_first(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photo.parent)
    for _ in range(2):
        assert run(["infer", ".", "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["photos"] == 1


# ------------------------------------------------------------------------------------------------ going on


@pytest.fixture
def reds(toy: Toy, tmp_path: Path) -> list[str]:
    """A command for five small photos and a model that takes red for pet; but for the output and what is written."""
    (tmp_path / "photos").mkdir()
    for index in range(5):
        pixels = np.zeros((20, 30, 3), np.uint8)
        pixels[4 : 10 + index, 5:20, 0] = 255
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{index}.png")
    return ["infer", str(tmp_path / "photos"), "--model", str(toy(tmp_path / "toy.onnx").path), "--output"]


def test_a_run_that_goes_on_says_what_was_there_already(
    reds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run([*reds, str(out)]) == 0
    (out / "1.png").unlink()
    capsys.readouterr()
    assert run([*reds, str(out), "--resume"]) == 0
    line, count = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'photos' / '1.png'} -> {out / '1.png'}  ")
    assert count == f"5 photos: 1 written to {out}, 4 there already"
    assert run([*reds, str(out), "--resume", "--json"]) == 0
    (summary,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (summary["photos"], summary["done"], summary["failed"], summary["skipped"]) == (5, 0, 0, 5)


def test_where_some_were_there_already_a_failure_is_3(reds: list[str], tmp_path: Path) -> None:
    assert run([*reds, str(tmp_path / "out")]) == 0
    (tmp_path / "photos" / "1.png").write_bytes(b"no photo any more")
    assert run([*reds, str(tmp_path / "out"), "--resume"]) == 3


def test_a_run_goes_on_however_its_folder_is_spelled(
    reds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And where nothing that is noted helps, it says so."""
    out = str(tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    reds[1] = "photos"
    assert run([*reds, out]) == 0
    monkeypatch.chdir(tmp_path / "photos")
    for spelled in (".", "../photos", str(tmp_path / "photos")):
        reds[1] = spelled
        capsys.readouterr()
        assert run([*reds, out, "--resume"]) == 0
        printed = capsys.readouterr()
        assert printed.out.splitlines()[-1] == f"5 photos: 0 written to {out}, 5 there already"
        assert printed.err == ""
    shutil.copytree(tmp_path / "photos", tmp_path / "copy")
    reds[1] = str(tmp_path / "copy")
    why = "the 5 results noted there are of other files, or of these before they changed: all are done anew"
    for options, said in ([], f"petseg: {Path(out) / JOURNAL}: {why}\n"), (["-q"], ""):
        assert run([*reds, out, "--resume", *options]) == 0
        assert capsys.readouterr().err == said
        reds[1] = str(tmp_path / "photos")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--as", "mask"], "as was 'cutout', now 'mask'"),
        (["--format", "webp"], "format was 'png', now 'webp'"),
        (["--cutout-threshold", "0.9"], "cutout_threshold was 0.5, now 0.9"),
        (["--min-area", "0.25"], "min_area was 0.0, now 0.25"),
        (["--keep-doubtful"], "doubtful was 'left out', now None"),
        (["--background", "white"], "background was None, now [255, 255, 255]"),
        (["--backend", "openvino"], "engine was 'onnxruntime "),
        (["--model", "other.onnx"], "model was '"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_another_run_than_the_one_that_was_stopped_is_6_and_changes_nothing(
    reds: list[str],
    toy: Toy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    toy(tmp_path / "other.onnx", channel=1)
    command = [*reds, str(tmp_path / "out"), "--backend", "onnxruntime"]
    assert run(command) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert run([*command, "--resume", *options]) == 6
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"petseg: {tmp_path / 'out'}: the run there was another (")
    assert said in err
    assert err.endswith("resume it with its own settings, or start again without --resume\n")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert run([*command, "--resume"]) == 0


def test_what_means_the_same_is_no_other_run(
    photo: Path, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8), "blue").save("beach.png")
    command = ["infer", str(photo.parent), "--model", str(toy(tmp_path / "toy.onnx").path), "--output", "out"]
    assert run([*command, "--background", "beach.png"]) == 0
    for same in (["--background", "./beach.png"], ["--background", "beach.png", "--format", "jpg"]):
        assert run([*command, "--resume", *same]) == 0
    Image.new("RGB", (8, 8), "red").save("beach.png")
    assert run([*command, "--resume", "--background", "beach.png"]) == 6


def test_a_video_that_has_come_since_is_no_other_run(
    photo: Path, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    folder = photo.parent
    command = ["infer", str(folder), "--as", "mask", "--model", str(toy(tmp_path / "toy.onnx").path)]
    command += ["--output", str(tmp_path / "out")]
    assert run(command) == 0
    (folder / "clip.mp4").write_bytes(b"no video, as it turns out")
    capsys.readouterr()
    assert run([*command, "--resume"]) == 3
    assert "clip.mp4" in capsys.readouterr().err


def test_a_format_of_videos_counts_where_there_are_some(
    photo: Path, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    (photo.parent / "clip.mp4").write_bytes(b"no video, as it turns out")
    command = ["infer", str(photo.parent), "--as", "mask", "--model", str(toy(tmp_path / "toy.onnx").path)]
    command += ["--output", str(tmp_path / "out")]
    assert run(command) == 3
    capsys.readouterr()
    assert run([*command, "--resume", "--format", "png"]) == 6  # of photos the usual one, of videos not
    assert "video_format was 'mp4', now 'png'" in capsys.readouterr().err


def on_a_terminal(*command: str) -> str:
    """What a command that ends well shows there, line by line, without colours."""
    pty = pytest.importorskip("pty")
    mine, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "200"}
    call = [sys.executable, "-m", "petseg.cli", *command]
    running = subprocess.Popen(call, stdin=theirs, stdout=theirs, stderr=theirs, env=environment, close_fds=True)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # what Linux raises at the end
        while part := os.read(mine, 65536):
            said += part
    os.close(mine)
    assert running.wait(60) == 0
    return re.sub(r"[\r\n]+", "\n", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", said.decode()))


def test_on_a_terminal_lines_stand_above_the_bar(reds: list[str], tmp_path: Path) -> None:
    """And are whole: nothing of the bar is before them."""
    text = on_a_terminal(*reds, str(tmp_path / "out"))
    for number in range(5):
        source, result = tmp_path / "photos" / f"{number}.png", tmp_path / "out" / f"{number}.png"
        assert f"\n{source} -> {result}  " in f"\n{text}"
    assert "segmenting" in text


def test_the_bar_of_a_run_that_goes_on_is_of_what_is_left(reds: list[str], tmp_path: Path) -> None:
    assert run([*reds, str(tmp_path / "out")]) == 0
    for number in (1, 3):
        (tmp_path / "out" / f"{number}.png").unlink()
    text = on_a_terminal(*reds, str(tmp_path / "out"), "--resume")
    assert re.search(r"segmenting .*100%", text), text
    (tmp_path / "out" / "1.png").unlink()
    assert "segmenting" not in on_a_terminal(*reds, str(tmp_path / "out"), "--resume"), "of one there is none"


def test_results_do_not_go_among_the_photos_that_are_searched(
    reds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos = tmp_path / "photos"
    before = files(photos)
    assert run([*reds, str(photos)]) == 2
    assert "later searches pass over folders with results" in capsys.readouterr().err
    sub = photos / "sub"
    sub.mkdir()
    Image.new("RGB", (20, 30), "red").save(sub / "1.png")
    assert run([*reds, str(sub)]) == 2
    assert "holds photos that are no known results (1.png, for one)" in capsys.readouterr().err
    with Image.open(sub / "1.png") as kept:
        assert kept.getpixel((0, 0)) == (255, 0, 0)
    (sub / "1.png").unlink()
    for _ in range(2):  # its own results it knows
        assert run([*reds, str(sub)]) == 0
    assert files(sub) == {*before, JOURNAL}


def test_the_result_of_the_only_photo_in_a_folder_is_not_searched_the_next_time(
    photo: Path, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["infer", str(photo.parent), "--model", str(toy(tmp_path / "toy.onnx").path), "--json"]
    command += ["--output", str(photo.parent / "out")]
    for _ in range(2):
        assert run(command) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["photos"] == 1


def test_more_or_fewer_threads_are_no_other_run(reds: list[str], tmp_path: Path) -> None:
    for threads in ("1", "2"):
        assert run([*reds, str(tmp_path / "out"), "--resume", "--threads", threads]) == 0


def test_one_photo_leaves_no_journal_unless_it_may_be_resumed(photo: Path, tmp_path: Path) -> None:
    assert run(["infer", str(photo), "--output", str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == {"cat.png"}
    assert run(["infer", str(photo), "--output", str(tmp_path / "out"), "--resume"]) == 0
    assert files(tmp_path / "out") == {"cat.png", JOURNAL}


def test_a_file_whose_name_is_like_a_pattern_is_no_search(photo: Path, toy: Toy, tmp_path: Path) -> None:
    odd = photo.rename(photo.with_name("cat[1].png"))
    command = ["--as", "overlay", "--model", str(toy(tmp_path / "toy.onnx").path), "--output", str(odd.parent)]
    assert run(["infer", str(odd), *command]) == 0
    assert files(odd.parent) == {odd.name, "cat[1].jpg"}


def test_a_closed_standard_output_and_a_terminal(reds: list[str], tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    mine, theirs = pty.openpty()
    command = [sys.executable, "-m", "petseg.cli", *reds, str(tmp_path / "out")]
    running = subprocess.Popen(["sh", "-c", 'exec "$@" >&-', "sh", *command], stdin=theirs, stderr=theirs)
    os.close(theirs)
    with contextlib.suppress(OSError):
        while os.read(mine, 65536):
            pass
    os.close(mine)
    assert running.wait(60) == 0
    assert len(files(tmp_path / "out")) == 6


def test_beside_an_active_run_another_may_begin_but_none_may_go_on(
    reds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with Journal(out, {}, resume=False):
        assert run([*reds, str(out)]) == 0
        capsys.readouterr()
        assert run([*reds, str(out), "--resume"]) == 6
        assert capsys.readouterr().err == f"petseg: {out}: another run writes there; wait for it, or stop it\n"


def test_going_on_beside_the_photos_replaces_only_what_a_run_wrote(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "cat.png"
    Image.new("RGB", (20, 30), "red").save(photo)
    (tmp_path / "cat.jpg").write_bytes(b"somebody's own")
    command = ["infer", str(photo), "--as", "overlay", "--model", str(toy(tmp_path / "toy.onnx").path), "--resume"]
    assert run([*command, "--output", str(tmp_path)]) == 6
    assert "there already, beside the photos" in capsys.readouterr().err
    assert (tmp_path / "cat.jpg").read_bytes() == b"somebody's own"
    (tmp_path / "cat.jpg").unlink()
    assert run([*command, "--output", str(tmp_path)]) == 0
    (tmp_path / "cat.jpg").write_bytes(b"cut off")
    assert run([*command, "--output", str(tmp_path)]) == 0
    with Image.open(tmp_path / "cat.jpg") as overlay:
        assert overlay.size == (20, 30)


# ----------------------------------------------------------------------------------------- patterns and pipes


def test_a_pattern_is_searched_and_one_that_nothing_fits_is_a_failure(
    reds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "deep").mkdir()
    shutil.copy(tmp_path / "photos" / "0.png", tmp_path / "photos" / "deep" / "0.png")
    reds[1:2] = [str(tmp_path / "photos" / "**" / "[0-2].png"), str(tmp_path / "*.gif")]
    assert run([*reds, str(tmp_path / "out")]) == 3
    assert capsys.readouterr().err == f"petseg: {tmp_path / '*.gif'}: no file fits this pattern\n"
    written = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert written == {"0.png", "1.png", "2.png", "deep/0.png"}


def piped(data: bytes, *args: object, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The real command line, with bytes on standard input."""
    command = [sys.executable, "-m", "petseg.cli", *map(str, args)]
    done = subprocess.run(command, input=data, timeout=100, **({"capture_output": True} | options))
    assert b"Traceback" not in (done.stderr or b"")
    return done


def test_a_photo_on_standard_input_is_a_picture_on_standard_output(
    reds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = tmp_path / "photos" / "0.png"
    done = piped(photo.read_bytes(), "infer", "-", *reds[2:4], "--as", "mask", "--threads", 1)
    assert (done.returncode, done.stderr) == (0, b"")
    assert run(["infer", str(photo), *reds[2:], str(tmp_path / "out"), "--as", "mask"]) == 0
    assert done.stdout == (tmp_path / "out" / "0.png").read_bytes()


@pytest.mark.parametrize(("data", "why"), [(b"no photo", b"not an image"), (b"", b"empty (0 bytes)")])
def test_what_is_no_photo_on_standard_input_is_1_with_nothing_on_standard_output(
    reds: list[str], data: bytes, why: bytes
) -> None:
    done = piped(data, "infer", "-", *reds[2:4])
    assert (done.returncode, done.stdout) == (1, b"")
    assert done.stderr.startswith(b"petseg: standard input: " + why)
    assert len(done.stderr.splitlines()) == 1


def test_a_full_disk_behind_standard_output_is_6(reds: list[str], tmp_path: Path) -> None:
    data = (tmp_path / "photos" / "0.png").read_bytes()
    with Path("/dev/full").open("wb") as full:
        done = piped(data, "infer", "-", *reds[2:4], capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 6
    assert done.stderr == b"petseg: standard output cannot be written to (No space left on device)\n"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "args", [["--version"], ["info", str(default_model())], ["infer"], ["infer", "--json"]], ids=" ".join
)
def test_a_full_disk_behind_what_is_told_is_6(
    reds: list[str], tmp_path: Path, args: list[str], unbuffered: str
) -> None:
    if args[0] == "infer":
        args = [*reds, str(tmp_path / "out"), *args[1:]]
    command = [sys.executable, "-m", "petseg.cli", *args]
    env = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, env=env, timeout=100)
    assert done.stderr == b"petseg: standard output cannot be written to (No space left on device)\n"
    assert done.returncode == 6


@pytest.mark.parametrize(
    ("closed", "code", "said"),
    [
        ("<&-", 1, "petseg: standard input (-) is closed: pipe something into it, or name a file\n"),
        (">&-", 6, "petseg: standard output is closed: give a folder with --output\n"),
    ],
)
def test_a_closed_standard_stream_is_told_in_one_line(closed: str, code: int, said: str) -> None:
    shell = ["sh", "-c", f'exec "$0" -m petseg.cli infer - {closed}', sys.executable]
    done = subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stderr) == (code, said)


class Stdin:
    """Standard input, in a test."""

    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)


def test_with_an_output_standard_input_becomes_a_file(
    reds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (tmp_path / "photos" / "0.png").read_bytes()
    for options in ([], ["--json"], ["--as", "mask", "--resume"], ["--as", "coco-rle"]):
        monkeypatch.setattr(sys, "stdin", Stdin(data))
        out = tmp_path / "-".join(["out", *options])
        assert run(["infer", "-", *reds[2:], str(out), *options]) == 0
        written = "annotations.json" if "coco-rle" in options else "stdin.png"
        assert files(out) - {JOURNAL} == {written}
    monkeypatch.setattr(sys, "stdin", Stdin(data))
    both = ["infer", str(tmp_path / "photos" / "1.png"), "-", *reds[2:], str(tmp_path / "both")]
    assert run(both) == 0
    assert files(tmp_path / "both") == {JOURNAL, "1.png", "stdin.png"}


@pytest.mark.parametrize("options", [["--json"], ["--resume"], ["--as", "coco-rle"]], ids=" ".join)
def test_what_needs_a_folder_is_2_on_standard_output(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", None)  # it is not even read
    assert run(["infer", "-", *options]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "give a folder with --output" in err


def test_a_file_that_is_called_like_standard_input_is_read(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("RGB", (30, 20), "red").save(tmp_path / "-", "png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", None)
    assert (
        run(["infer", "./-", "--as", "mask", "--model", str(toy(tmp_path / "toy.onnx").path), "--output", "out"]) == 0
    )
    assert files(tmp_path / "out") == {"-.png"}


def test_standard_input_twice_is_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["infer", "-", "-", "--output", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "petseg: standard input (-) can be read once only\n"
    assert not (tmp_path / "out").exists()


def test_what_a_search_passes_over_is_named_on_stderr(
    reds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    photos = tmp_path / "photos"
    (photos / "phone.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    (photos / "more").symlink_to(tmp_path)
    assert run([*reds, str(tmp_path / "out")]) == 3
    link, heic = capsys.readouterr().err.splitlines()
    assert link == f"petseg: {photos / 'more'}: a link to a folder, which is not followed: to take its photos, name it"
    assert heic == (
        f"petseg: {photos / 'phone.heic'}: a HEIC photo, which needs pillow-heif: {install('heic')}, or convert the "
        "photo to JPEG"
    )
    assert run([*reds, str(tmp_path / "quiet"), "--quiet"]) == 3
    assert capsys.readouterr().err == heic + "\n"


def test_the_results_of_one_kind_are_no_sources_of_another(reds: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(reds[1])
    monkeypatch.chdir(folder)
    for kind in ("overlay", "cutout", "mask"):
        assert run(["infer", ".", *reds[2:4], "--as", kind]) == 0
        assert len(files(folder / "petseg-output" / kind) - {JOURNAL}) == 5


# ------------------------------------------------------------------------------------- hard names, hard sizes


def test_links_in_a_loop_and_impossible_names_are_counted_and_passed_over(
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


def test_a_name_that_is_no_utf_8_is_shown_escaped_and_segmented(photo: Path, tmp_path: Path) -> None:
    odd = os.fsencode(photo.parent) + b"/caf\xe9.jpg"
    try:
        Path(os.fsdecode(odd)).write_bytes(photo.read_bytes())
    except OSError:
        pytest.skip("this file system takes only UTF-8")
    # A terminal in a UTF-8 locale refuses what cannot be encoded; the C locale would let it pass.
    done = petseg("infer", photo.parent, "--output", tmp_path / "out", env={"PYTHONIOENCODING": "utf-8:strict"})
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


# ----------------------------------------------------------------------------- pipes that close, and Ctrl-C


def test_a_reader_that_goes_away_gets_no_traceback_and_leaves_no_part(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for index in range(100):
        (folder / f"{index:03d}.jpg").symlink_to(CHELSEA)
    command = [sys.executable, "-m", "petseg.cli", "infer", str(folder), "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "% pet" in process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=100)
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert len(list((tmp_path / "out").iterdir())) < 50  # it stopped early, as it should
    assert parts(tmp_path) == []


@pytest.mark.parametrize("args", [["--help"], ["info", str(default_model())]], ids=["help", "info"])
def test_a_reader_that_was_never_there_gets_no_traceback(args: list[str]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "petseg.cli", *args], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=100
        )
    finally:
        os.close(writer)
    assert done.stderr == ""


def test_ctrl_c_ends_with_130_and_leaves_only_whole_results(tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for index in range(300):
        (folder / f"{index:03d}.jpg").symlink_to(CHELSEA)
    # A shell that starts this test in the background makes its children ignore Ctrl-C.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import petseg.cli as c; c.main()"
    )
    command = [sys.executable, "-c", program, "infer", str(folder), "--as", "overlay", "--output", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(3):
            assert "% pet" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert err.strip() == "petseg: interrupted"
    assert parts(tmp_path) == []
    results = sorted(out.glob("*.jpg"))
    assert 3 <= len(results) < 300
    for result in results:
        with Image.open(result) as picture:
            picture.load()


def test_a_closed_terminal_leaves_whole_results_and_nothing_half_written(tmp_path: Path) -> None:
    pty = pytest.importorskip("pty")
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    for index in range(300):
        (folder / f"{index:03d}.jpg").symlink_to(CHELSEA)
    mine, theirs = pty.openpty()
    # The terminal becomes the process's own, as that of a login.
    program = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); import petseg.cli as c; c.main()"
    command = [sys.executable, "-c", program, "infer", str(folder), "--as", "overlay", "--output", str(out)]
    terminal = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with subprocess.Popen(command, start_new_session=True, **terminal) as process:
        os.close(theirs)
        said = b""
        while said.count(b"% pet") < 3:
            said += os.read(mine, 4096)
        os.close(mine)
        assert process.wait(100) == 129
    assert parts(tmp_path) == []
    assert 3 <= len(list(out.glob("*.jpg"))) < 300


def test_what_cannot_be_told_to_a_terminal_that_is_gone_is_a_hang_up(tmp_path: Path) -> None:
    """The last words of a run that nobody has ended: they may come before the signal does."""
    pty = pytest.importorskip("pty")
    mine, theirs = pty.openpty()
    os.close(mine)  # it is not the process's own, so that no signal comes
    command = [sys.executable, "-m", "petseg.cli", "cache"]
    with subprocess.Popen(
        command, stdout=theirs, stderr=subprocess.PIPE, env={**os.environ, "HOME": str(tmp_path)}
    ) as run_:
        os.close(theirs)
        assert run_.stderr is not None
        said = run_.stderr.read()
    assert (run_.returncode, said) == (129, b"")


@pytest.mark.parametrize(("number", "code", "said"), [(15, 143, "terminated"), (1, 129, "hung up")])
def test_a_signal_that_is_sent_twice_does_not_cut_short_what_the_first_one_cleans_up(
    number: int, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `timeout` sends SIGTERM, and the shell and the system SIGHUP."""
    before, cleaned_up = signal.getsignal(number), []

    @terminable()
    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            signal.raise_signal(number)
            cleaned_up.append(True)

    with pytest.raises(SystemExit) as end:
        work()
    assert end.value.code == code
    assert cleaned_up
    assert signal.getsignal(number) is before
    assert capsys.readouterr().err == f"petseg: {said}\n"


@pytest.mark.parametrize(("number", "code"), [(15, 143), (1, 129)])
def test_a_signal_leaves_nothing_half_written_whatever_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    """A scheduler's way, or a laptop's that is closed, to end an export, an evaluation, a verification: the default
    would end Python at once.
    """
    path = tmp_path / "model.onnx"

    def exported() -> None:
        with replacing(path) as beside:
            beside.write_bytes(b"half")
            signal.raise_signal(number)

    monkeypatch.setattr("petseg.cli.petseg.main", lambda **_: exported())
    with pytest.raises(SystemExit) as end:
        run(["export"])
    assert end.value.code == code
    assert list(tmp_path.iterdir()) == []


#: A probe that says who it is, and hangs.
HANGS = """
import sys
from petseg.cli import main
from petseg_runtime import doctor

probe = "import os, time; open({path!r}, 'w').write(str(os.getpid()) + chr(10)); time.sleep(600)"
doctor.probe = lambda *words, **options: doctor.ask([sys.executable, "-c", probe], 600)
main()
"""


@pytest.mark.parametrize("command", ["doctor", "benchmark"])
def test_sigterm_ends_what_a_command_has_started(tmp_path: Path, command: str) -> None:
    """It has a session of its own, and would hear of nothing."""
    path = tmp_path / "pid"
    program = HANGS.format(path=str(path))
    with subprocess.Popen([sys.executable, "-c", program, command], stderr=subprocess.PIPE, text=True) as process:
        end = time.monotonic() + 60
        while not (path.exists() and path.read_text().endswith("\n")):
            assert time.monotonic() < end
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    probe = int(path.read_text())
    gone = not Path(f"/proc/{probe}").exists()
    if not gone:
        os.kill(probe, signal.SIGKILL)
    assert gone
    assert (process.returncode, err) == (143, "petseg: terminated\n")


# ----------------------------------------------------------------------------------------- help, version, info


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command_and_exit_code(flag: str) -> None:
    done = petseg(flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert "130, 143 and 129 stopped by Ctrl-C, SIGTERM and SIGHUP" in " ".join(done.stdout.split())


def test_help_names_every_form_of_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["infer", "--help"]) == 0
    text = capsys.readouterr().out
    for kind in DEVICES:
        form = kind if kind == "cpu" else f"{kind}[:N]"
        assert f" {form}" in text, form


@pytest.mark.parametrize("command", ["infer", "info", "verify"])
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    assert f"Usage: petseg {command}" in capsys.readouterr().out


def test_version_is_the_packages() -> None:
    done = petseg("--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert __version__ in done.stdout


def test_info_tells_people_what_a_model_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(default_model())]) == 0
    out = capsys.readouterr().out
    artifact = open_artifact(default_model())
    for told in (
        str(default_model()),
        artifact.spec.name,
        artifact.identity,
        f"image: uint8 [N, {artifact.spec.height}, {artifact.spec.width}, 3]",
        f"probability: uint8 [N, {artifact.spec.height}, {artifact.spec.width}]",
        f"{artifact.spec.threshold:.2g} for masks, {artifact.spec.cutout_threshold:.2g} for cutouts",
        *(row["summary"] for row in artifact.receipt["rows"]),
    ):
        assert told in out


def test_info_says_by_which_rule_a_pet_is_found(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for share, said in (
        (0.25, "at least 25 % of the pixels with a probability of 0.5 or more reach 0.98, and the mask is not empty"),
        (None, "the mask is not empty (no rule was chosen for this model)"),
    ):
        assert run(["info", str(toy(tmp_path / "toy.onnx", certain_share=share).path)]) == 0
        assert f"a pet is found where  {said}\n" in capsys.readouterr().out


def test_info_tells_programs_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(default_model()), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    artifact = open_artifact(default_model())
    assert record["schema_version"] == 1
    assert record["bytes"] == default_model().stat().st_size
    assert record["identity"] == artifact.identity
    assert (record["spec"]["height"], record["spec"]["width"]) == (artifact.spec.height, artifact.spec.width)
    assert (record["provenance"], record["receipt"]) == (artifact.provenance, artifact.receipt)
    assert [tensor["name"] for tensor in record["inputs"] + record["outputs"]] == ["image", "probability"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_info_on_what_is_no_model_is_4(tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(bytes(range(256)) * 20)
    for path in (garbage, CHELSEA, tmp_path, tmp_path / "missing.onnx"):
        assert run(["info", str(path), *options]) == 4
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"petseg: {path}: ")
        assert len(err.splitlines()) == 1


@pytest.fixture
def toy_ir(toy: Toy, ir: Toy, tmp_path: Path) -> Artifact:
    """The toy as an OpenVINO IR."""
    artifact: Artifact = ir(toy(tmp_path / "toy.onnx"))
    return artifact


def test_info_on_a_compiled_model_tells_what_it_was_built_for(
    toy_ir: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", str(toy_ir.path)]) == 0
    out = capsys.readouterr().out
    weights = toy_ir.path.with_suffix(".bin")
    size = toy_ir.path.stat().st_size + weights.stat().st_size
    for told in (
        f"{toy_ir.path} ({size / 1e6:.1f} MB, openvino, fp32)",
        f"sha256 {toy_ir.identity}",
        "built for  library: openvino",
        "built for  version: 2026.1",
        "16 x 32",
    ):
        assert told in out
    assert "opset" not in out
    assert run(["info", str(toy_ir.path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["format"], record["bytes"], record["opset"]) == ("openvino", size, None)
    assert (record["inputs"], record["outputs"]) == ([], [])
    assert record["environment"] == {"library": "openvino", "version": "2026.1"}
    assert record["identity"] == open_artifact(toy_ir.path.with_suffix(".onnx")).identity


@pytest.mark.parametrize("missing", [".xml.json", ".bin"])
def test_info_on_a_compiled_model_without_its_other_files_is_4(
    toy_ir: Artifact, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    toy_ir.path.with_suffix(missing).unlink()
    assert run(["info", str(toy_ir.path)]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert f"toy{missing}" in err
    assert len(err.splitlines()) == 1


def test_info_says_that_a_size_is_free_and_what_a_file_is_stored_in(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", str(toy(tmp_path / "toy.onnx", dynamic_size=True, precision="fp16").path)]) == 0
    out = capsys.readouterr().out
    assert "stretch to 16 x 32, or any multiples of 16, bilinear" in out
    assert "onnx, fp16, opset 20" in out


# ------------------------------------------------------------------------------------------ another input size


@pytest.mark.parametrize(
    ("text", "size"), [("192", (192, 192)), ("192x256", (192, 256)), ("64X32", (64, 32)), ("0", (0, 0))]
)
def test_a_size_is_height_by_width(text: str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "32x", "x32", "32x32x3", "-32", "3.5", "32 px", "3²"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        parse_size(text)


def segmented(photo: Path, out: Path, *options: str) -> np.ndarray:
    assert run(["infer", str(photo), "--as", "probability", "--output", str(out), *options]) == 0
    with Image.open(out / f"{photo.stem}.png") as picture:
        return np.array(picture)


def test_infer_takes_the_size_that_is_asked_for(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The toy's answer is the photo's red, which a larger input keeps and a smaller one blurs."""
    model = str(toy(tmp_path / "toy.onnx", dynamic_size=True).path)
    pixels = np.random.default_rng(0).integers(0, 256, (48, 80, 3), dtype=np.uint8)
    photo = tmp_path / "photo.png"
    Image.fromarray(pixels).save(photo)
    exact = segmented(photo, tmp_path / "a", "--model", model, "--size", "48x80", "--keep-doubtful")
    np.testing.assert_array_equal(exact, pixels[..., 0])
    said = "petseg: --size 48 x 80: the model's own is 16 x 32; at another its masks may be much worse\n"
    assert capsys.readouterr().err == said
    own = segmented(photo, tmp_path / "b", "--model", model)
    np.testing.assert_array_equal(own, segmented(photo, tmp_path / "c", "--model", model, "--size", "16x32"))
    assert capsys.readouterr().err == ""
    assert np.std(own) < 0.8 * np.std(exact)


@pytest.mark.parametrize(("size", "said"), [("64", "only, not 64 x 64"), ("0", "only, not 0 x 0")])
def test_a_size_that_the_model_does_not_take_is_2(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str, said: str
) -> None:
    assert run(["infer", str(photo), "--size", size, "--output", str(tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert len(err.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_a_size_that_no_network_takes_is_2(
    toy: Toy, photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(toy(tmp_path / "toy.onnx", dynamic_size=True).path)
    assert run(["infer", str(photo), "--model", model, "--size", "16x30", "--output", str(tmp_path / "out")]) == 2
    assert "multiple of 16" in capsys.readouterr().err


def test_what_is_no_size_is_2(photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["infer", str(photo), "--size", "large", "--output", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "--size" in err
    assert "'large'" in err
    assert not (tmp_path / "out").exists()


def test_infer_runs_a_compiled_model(toy_ir: Artifact, photo: Path, tmp_path: Path) -> None:
    onnx = str(toy_ir.path.with_suffix(".onnx"))
    one = segmented(photo, tmp_path / "a", "--model", onnx)
    np.testing.assert_array_equal(one, segmented(photo, tmp_path / "b", "--model", str(toy_ir.path)))


# ------------------------------------------------------------------------------------------------------ verify


#: For tests that count lines: with another engine, there may be one more for what it computes in by itself.
IN_ONNXRUNTIME = ["--backend", "onnxruntime"]
L4 = host.Gpu(index=0, name="Stand-in L4", compute_capability="8.9", memory=2**34, driver="CUDA 13.0")
T4 = host.Gpu(index=0, name="Stand-in T4", compute_capability="7.5", memory=2**34, driver="CUDA 13.0")


def tampered(artifact: Artifact) -> Path:
    """The proof says something else now."""
    path = proof_of(artifact.path)
    proof = load_proof(path, artifact.spec, artifact.provenance["checkpoint_sha256"])
    path.write_bytes(dataclasses.replace(proof, expected=255 - proof.expected).to_bytes())
    return path


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_file_that_does_what_its_checkpoint_does_is_0(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    before = proven.path.read_bytes()
    assert run(["verify", str(proven.path), *IN_ONNXRUNTIME]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    said = dict(line.strip().split("  ", 1) for line in out.splitlines())
    assert (
        said["PASSED"] == f"{proven.path} gives what its checkpoint gives, on 4 photos, a smoke test: 16 make a proof"
    )
    assert said["model"] == f"sha256 {proven.identity}"
    assert said["machine"].startswith(host.host().cpu.name)
    assert said["engine"].startswith("onnxruntime ")
    assert said["engine"].endswith(", computes in f32: passed")
    assert "at most 0/255 (1/255 is the limit), in the mean 0.0000/255" in said["difference"]
    assert said["masks"] == "IoU at least 1.0000 (0.999 is the limit), in the mean 1.0000"
    assert said["photo road"].startswith("passed, 9 photos with Pillow ")
    assert said["result"] == f"in {sidecar_of(proven.path)}"
    assert proven.path.read_bytes() == before, "what is learnt on a device never goes into the model"
    assert files(proven.path.parent) == {"toy.onnx", "toy.onnx.parity.npz", "toy.onnx.verified.json"}


def test_the_result_says_what_was_found_of_which_file_where_and_when(proven: Artifact) -> None:
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    result = json.loads(sidecar_of(proven.path).read_text(encoding="utf-8"))
    assert (result["identity"], result["format"], result["passed"]) == (proven.identity, "onnx", True)
    assert result["petseg"] == __version__
    assert result["date"].endswith("+00:00")
    assert result["host"]["cpu"] == json.loads(json.dumps(dataclasses.asdict(host.host().cpu)))
    assert result["host"]["gpus"] == [dataclasses.asdict(gpu) for gpu in host.gpus()]
    assert result["host"]["nvidia_gpus"] == host.nvidia_gpus()
    assert result["spec"] == json.loads(proven.spec.to_json())
    assert [row["precision"] for row in result["rows"]] == ["f32"]
    assert "schema_version" in result


def test_info_shows_what_was_verified(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(proven.path)]) == 0
    assert "verified here" not in capsys.readouterr().out
    assert run(["verify", str(proven.path), "-q"]) == 0
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert "verified here  smoke, 4 photos, passed, f32 in onnxruntime" in out
    assert "verified here  the road around the network: passed, 9 photos with Pillow " in out
    assert run(["info", str(proven.path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["verified"] == json.loads(sidecar_of(proven.path).read_text(encoding="utf-8"))


def test_a_file_that_does_something_else_is_10_and_the_result_is_kept(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    tampered(proven)
    assert run(["verify", str(proven.path), *IN_ONNXRUNTIME]) == 10
    out, err = capsys.readouterr()
    assert f"FAILED  {proven.path} does NOT give what its checkpoint gives" in out
    assert "computes in f32: FAILED" in out
    lines = err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("petseg: f32 in onnxruntime") for line in lines)
    assert any("largest difference" in line and "allowed 1/255" in line and ".png at y" in line for line in lines)
    assert json.loads(sidecar_of(proven.path).read_text(encoding="utf-8"))["passed"] is False
    assert run(["info", str(proven.path)]) == 0
    assert "verified here  smoke, 4 photos, FAILED" in capsys.readouterr().out


def test_as_json_the_receipt_is_all_there_is_on_stdout(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(proven.path), "--json", *IN_ONNXRUNTIME]) == 0
    good = json.loads(capsys.readouterr().out)
    assert good == json.loads(sidecar_of(proven.path).read_text(encoding="utf-8"))
    of_receipt = "kind passed summary identity proof photos photos_sha256 names reference stored rows scan quantization"
    assert set(good) == {
        *of_receipt.split(),
        *["note", "schema_version", "format", "spec", "files", "date", "petseg", "host", "device", "road", "others"],
    }
    assert (good["schema_version"], good["kind"], good["passed"], good["photos"]) == (3, "smoke", True, 4)
    assert (good["road"]["passed"], len(good["road"]["rows"]), good["road"]["failures"]) == (True, 9, [])
    assert (good["stored"], good["reference"], good["names"][0]) == ("fp32", "numpy", "00.png")
    (row,) = good["rows"]
    assert (row["precision"], row["passed"], row["failures"], row["max_difference"]) == ("f32", True, [], 0)
    tampered(proven)
    assert run(["verify", str(proven.path), "--json", *IN_ONNXRUNTIME]) == 10
    out, err = capsys.readouterr()
    assert json.loads(out)["passed"] is False
    assert err.startswith("petseg: f32 in onnxruntime")


def test_quiet_verifying_says_only_what_failed(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(proven.path), "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    tampered(proven)
    assert run(["verify", str(proven.path), "-q"]) == 10
    out, err = capsys.readouterr()
    assert out == ""
    assert err


def test_without_a_proof_there_is_nothing_to_verify_and_nothing_is_written(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    proof_of(proven.path).unlink()
    assert run(["verify", str(proven.path)]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"petseg: {proof_of(proven.path)}: not there")
    assert len(err.splitlines()) == 1
    assert files(proven.path.parent) == {"toy.onnx"}


def test_a_damaged_proof_is_4(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    path = proof_of(proven.path)
    path.write_bytes(path.read_bytes()[:-99])
    assert run(["verify", str(proven.path)]) == 4
    assert capsys.readouterr().err.startswith(f"petseg: {path}: ")
    assert not sidecar_of(proven.path).exists()


def test_the_proof_of_another_model_is_4(
    proven: Artifact, prove: Callable[..., Proof], capsys: pytest.CaptureFixture[str]
) -> None:
    other = dataclasses.replace(prove(proven.spec), checkpoint_sha256="ab" * 32)
    proof_of(proven.path).write_bytes(other.to_bytes())
    assert run(["verify", str(proven.path)]) == 4
    assert "another model" in capsys.readouterr().err


def test_the_proof_may_lie_elsewhere(proven: Artifact, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    proof = proof_of(proven.path).rename(tmp_path / "far" / "proof.npz")
    assert run(["verify", str(proven.path), "-q", "--proof", str(proof)]) == 0
    tampered_proof = tmp_path / "missing.npz"
    assert run(["verify", str(proven.path), "-q", "--proof", str(tampered_proof)]) == 4


def test_the_result_may_go_elsewhere(proven: Artifact, tmp_path: Path) -> None:
    result = tmp_path / "results" / "a.json"
    assert run(["verify", str(proven.path), "-q", "--output", str(result)]) == 0
    assert json.loads(result.read_text(encoding="utf-8"))["passed"] is True
    assert not sidecar_of(proven.path).exists()
    assert files(result.parent) == {"a.json"}


def test_a_file_that_does_something_else_is_10_though_the_result_cannot_be_written(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    tampered(proven)
    sidecar_of(proven.path).mkdir()
    assert run(["verify", str(proven.path), "-q"]) == 10
    assert f"petseg: {sidecar_of(proven.path)}: cannot be written" in capsys.readouterr().err


def test_what_was_verified_with_another_threshold_or_on_another_machine_is_not_shown(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(proven.path), "-q"]) == 0
    path = sidecar_of(proven.path)
    result = json.loads(path.read_text(encoding="utf-8"))
    packages = result["host"]["packages"]
    for key, change, said in (
        ("spec", {"threshold": 0.9}, "of another file"),
        ("host", {"cpu": {**result["host"]["cpu"], "name": "Cortex-A76"}}, "on another machine (Cortex-A76, "),
        ("host", {"cpu": None}, "on another machine (unknown, "),
        ("host", {"packages": {**packages, "onnxruntime": "1.20.0"}}, "with onnxruntime 1.20.0, and now it is 1."),
        ("host", {"packages": {**packages, "tensorrt": "10.9"}}, "with tensorrt 10.9, and now it is "),
        ("host", {"packages": {**packages, "tensorrt-cu12": "10.9"}}, "with tensorrt-cu12 10.9, and now it is "),
        ("host", {"nvidia_driver": "570.1"}, "with NVIDIA's driver 570.1, and now it is "),
    ):
        path.write_text(json.dumps({**result, key: {**result[key], **change}}))
        assert run(["info", str(proven.path)]) == 0
        assert f"verified here  {path.name}: {said}" in capsys.readouterr().out


def test_what_was_verified_in_one_engine_is_kept_when_another_is(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    for backend in ("onnxruntime", "openvino", "onnxruntime"):
        assert run(["verify", str(proven.path), "-q", "--backend", backend]) == 0
    result = json.loads(sidecar_of(proven.path).read_text(encoding="utf-8"))
    (other,) = result["others"]
    assert {(row["backend"], row["device"]) for row in result["rows"]} == {("onnxruntime", "cpu")}, "the latest"
    assert {(row["backend"], row["device"]) for row in other["rows"]} == {("openvino", "cpu")}
    assert other["passed"] is True
    assert "others" not in other
    assert run(["info", str(proven.path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "verified here  smoke" in line]
    assert " in onnxruntime " in lines[0]
    assert len(lines) == 1 + len(other["rows"])
    assert all(" in openvino " in line for line in lines[1:])


def test_a_failure_in_one_engine_is_told_though_another_passes(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    right = proof_of(proven.path).read_bytes()
    tampered(proven)
    assert run(["verify", str(proven.path), "-q", "--backend", "openvino"]) == 10
    proof_of(proven.path).write_bytes(right)
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    capsys.readouterr()
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert "verified here  smoke, 4 photos, passed, f32 in onnxruntime" in out
    assert "verified here  smoke, 4 photos, FAILED, f32 in openvino" in out


def test_each_device_of_an_engine_has_a_result_of_its_own(proven: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "gpus", lambda: (L4,))
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    path = sidecar_of(proven.path)
    result = json.loads(path.read_text(encoding="utf-8"))
    result["rows"][0]["device"] = "cuda:0"
    path.write_text(json.dumps(result))
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    (other,) = json.loads(path.read_text(encoding="utf-8"))["others"]
    assert [row["device"] for row in other["rows"]] == ["cuda:0"]


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "of another file"},
        {"schema_version": 9},
        {"device": "of another machine"},
        {"rows": [{"engine": "onnxruntime 1.20 (cpu, CPUExecutionProvider)"}]},  # of before rows named their engine
        {"rows": 7},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_does_not_hold_here_or_cannot_be_told_apart_is_replaced(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(host, "identity", lambda: "this machine")
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    path = sidecar_of(proven.path)
    sound = json.loads(path.read_text(encoding="utf-8"))
    sound["rows"][0]["backend"] = "abacus"
    odd = {**sound, **change}
    for there, kept in ((odd, []), ({**sound, "others": [odd, 7]}, ["abacus"])):
        path.write_text(json.dumps(there))
        assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
        others = json.loads(path.read_text(encoding="utf-8"))["others"]
        assert [other["rows"][0]["backend"] for other in others] == kept


@pytest.mark.parametrize("others", [None, 7, {}, "others", [7], [{}], [[]]], ids=json.dumps)
def test_odd_others_in_a_result_do_not_keep_info_from_its_work(
    proven: Artifact, capsys: pytest.CaptureFixture[str], others: object
) -> None:
    """Any program may have written them."""
    assert run(["verify", str(proven.path), "-q"]) == 0
    path = sidecar_of(proven.path)
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "others": others}))
    assert run(["info", str(proven.path)]) == 0
    assert capsys.readouterr().out.count("verified here  smoke") >= 1
    assert run(["verify", str(proven.path), "-q"]) == 0


def test_what_was_verified_before_the_rule_of_pets_was_in_the_specification_still_holds(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(proven.path), "-q"]) == 0
    path = sidecar_of(proven.path)
    result = json.loads(path.read_text(encoding="utf-8"))
    del result["spec"]["certain_share"]
    path.write_text(json.dumps(result))
    assert run(["info", str(proven.path)]) == 0
    assert "verified here  smoke, 4 photos, passed" in capsys.readouterr().out


def test_what_was_verified_on_another_machine_of_the_same_kind_is_not_shown(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for there, here, shown in (("a", "b", False), ("a", "a", True), ("", "b", True), ("a", "", True)):
        monkeypatch.setattr(host, "identity", lambda there=there: there)
        assert run(["verify", str(proven.path), "-q"]) == 0
        monkeypatch.setattr(host, "identity", lambda here=here: here)
        assert run(["info", str(proven.path)]) == 0
        out = capsys.readouterr().out
        assert ("verified here  smoke, 4 photos, passed" in out) is shown
        assert ("on another machine of this kind; run `petseg verify` again" in out) is not shown


@pytest.mark.parametrize(
    ("told", "here", "said"),
    [
        ([dataclasses.asdict(L4)], (L4,), ""),
        (
            [dataclasses.asdict(L4), {**dataclasses.asdict(T4), "index": 1}],
            (L4,),
            "",
        ),  # what has no row does not matter
        (
            [dataclasses.asdict(T4)],
            (L4,),
            "on another cuda:0 (Stand-in T4, compute capability 7.5, this is Stand-in L4, ",
        ),
        ([dataclasses.asdict(L4)], (), "on another cuda:0 (Stand-in L4, compute capability 8.9, this is none)"),
        (1, (L4,), "on another cuda:0 (unknown, this is Stand-in L4, compute capability 8.9)"),
        ([7, {"index": 0}], (L4,), "on another cuda:0 (unknown, this is "),
        ([{"index": 0}], (), "on another cuda:0 (unknown, this is none)"),
        (None, (), "on another cuda:0 (unknown, this is none)"),
    ],
)
def test_what_was_verified_on_another_gpu_is_not_shown(
    proven: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: object,
    here: tuple[host.Gpu, ...],
    said: str,
) -> None:
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    path = sidecar_of(proven.path)
    result = json.loads(path.read_text(encoding="utf-8"))
    on_cpu = json.loads(path.read_text(encoding="utf-8"))
    result["rows"][0]["device"] = "cuda:0"
    for one in (result, on_cpu):
        one["host"]["gpus"] = told
    path.write_text(json.dumps({**result, "others": [on_cpu]}))
    monkeypatch.setattr(host, "gpus", lambda: here)
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert ("verified here  smoke, 4 photos, passed" in out) is (not said)
    assert (f"verified here  {path.name}: {said}" in out) is bool(said)
    path.write_text(json.dumps(on_cpu))
    assert run(["info", str(proven.path)]) == 0
    assert "verified here  smoke, 4 photos, passed" in capsys.readouterr().out, "a CPU's row is of no GPU"


def test_of_what_another_petseg_verified_only_the_network_is_left(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    path = sidecar_of(proven.path)
    result = json.loads(path.read_text(encoding="utf-8"))
    older = {**result, "petseg": "0.0.1", "passed": False, "road": {**result["road"], "passed": False}}
    path.write_text(json.dumps({**older, "others": [older]}))
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    said = f"found by petseg 0.0.1, and this is {__version__}: run `petseg verify` again"
    assert "verified here  smoke, 4 photos, passed, f32 in onnxruntime" in out
    assert f"verified here  the road around the network: {said}" in out
    assert "9 photos with Pillow" not in out
    assert run(["info", str(proven.path), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)["verified"]
    for one in (verified, *verified["others"]):
        assert (one["road"], one["passed"]) == ({"summary": said}, True)
        assert one["summary"].startswith("smoke, 4 photos: passed, f32 in onnxruntime")
        assert "road" not in one["summary"]


def test_without_a_name_the_model_that_ships_is_told_of(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info"]) == 0
    assert open_artifact(default_model()).identity in capsys.readouterr().out


def test_a_result_of_before_is_shown_as_what_it_is_of_the_network_alone(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(proven.path), "-q"]) == 0
    path = sidecar_of(proven.path)
    result = json.loads(path.read_text(encoding="utf-8"))
    del result["road"]
    path.write_text(json.dumps({**result, "schema_version": 2}))
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert "verified here  smoke, 4 photos, passed, f32 in onnxruntime" in out
    assert "verified here  not yet the road around the network, from a photo's file to its mask: run `petseg v" in out


@pytest.mark.parametrize("version", [1, 4, "3", None, []])
def test_a_result_of_a_version_that_is_not_known_is_not_shown(
    proven: Artifact, capsys: pytest.CaptureFixture[str], version: object
) -> None:
    assert run(["verify", str(proven.path), "-q"]) == 0
    path = sidecar_of(proven.path)
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "schema_version": version}))
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert f"{path.name}: its schema_version is {version!r}, not 3; run `petseg verify` again" in out
    assert "passed" not in out


def test_verifying_tells_of_an_engine_that_was_passed_over(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Or a script would take exit code 0 for a proof of the GPU."""
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 1)
    monkeypatch.setattr(registry, "RULE", [line for line in registry.RULE if line.engine == "onnxruntime"])
    load = onnxruntime.load

    def broken(artifact: Artifact, options: Any) -> Any:
        if options.device.kind == "cuda":
            raise EngineError("cuda is broken")
        return load(artifact, options)

    monkeypatch.setattr(onnxruntime, "load", broken)
    assert run(["verify", str(proven.path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "petseg: cuda is broken\n"
    assert [row["notes"] for row in json.loads(out)["rows"]] == [["cuda is broken"]]


def test_a_file_that_is_not_what_its_receipt_certifies_is_4(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    """A lost page of a flash drive, in the weights: it loads, and runs, and finds nothing."""
    metadata = onnx_metadata.read(proven.path).metadata
    receipt = json.dumps({"identity": proven.identity, "rows": []})
    proven.path.write_bytes(onnx_metadata.with_metadata(proven.path.read_bytes(), {**metadata, RECEIPT_KEY: receipt}))
    assert open_artifact(proven.path).identity == proven.identity
    data = bytearray(proven.path.read_bytes())
    at = data.index(b"toy")  # the graph's name: no engine minds
    data[at : at + 3] = b"lot"
    proven.path.write_bytes(data)
    for command in (["info"], ["verify"], ["infer", "cat.jpg", "--model"]):
        assert run([*command, str(proven.path)]) == 4
        assert f"petseg: {proven.path}: damaged, or changed since" in capsys.readouterr().err


def test_a_proof_of_this_checkpoint_that_is_not_this_files_is_4_unless_it_is_named(
    proven: Artifact, prove: Callable[..., Proof], capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = onnx_metadata.read(proven.path).metadata
    receipt = json.dumps({"proof": prove(proven.spec, 7).identity})
    proven.path.write_bytes(onnx_metadata.with_metadata(proven.path.read_bytes(), {**metadata, RECEIPT_KEY: receipt}))
    assert run(["verify", str(proven.path), "-q"]) == 4
    assert "not the proof that toy.onnx was exported with" in capsys.readouterr().err
    assert run(["verify", str(proven.path), "-q", "--proof", str(proof_of(proven.path))]) == 0
    proof_of(proven.path).write_bytes(prove(proven.spec, 7).to_bytes())
    assert run(["verify", str(proven.path), "-q"]) == 0


def test_what_a_model_says_of_itself_does_not_reach_the_terminal_as_it_is(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = onnx_metadata.read(proven.path).metadata
    spoilt = {key: text.replace("toy", "\\u001b[2Jtoy\\nidentity") for key, text in metadata.items()}
    proven.path.write_bytes(onnx_metadata.with_metadata(proven.path.read_bytes(), spoilt))
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[2Jtoy\\nidentity" in out


def test_a_result_that_cannot_be_written_is_6(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    sidecar_of(proven.path).mkdir()
    assert run(["verify", str(proven.path), "-q"]) == 6
    err = capsys.readouterr().err
    assert err.startswith(f"petseg: {sidecar_of(proven.path)}: cannot be written")
    assert len(err.splitlines()) == 1


def test_the_result_of_another_file_is_not_shown_as_this_ones(
    proven: Artifact, toy: Toy, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(proven.path), "-q"]) == 0
    toy(proven.path, channel=1)
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert "of another file; run `petseg verify` again" in out
    assert "passed" not in out
    assert run(["info", str(proven.path), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["verified"]) == {"summary"}
    assert run(["verify", str(proven.path), "-q"]) == 10, "and the new file is not the checkpoint's"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000],
    ids=lambda content: ascii(content[:5]),
)
def test_a_result_that_cannot_be_read_does_not_keep_info_from_its_work(
    proven: Artifact, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    sidecar_of(proven.path).write_bytes(content)
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert "verified here  toy.onnx.verified.json: " in out
    assert proven.identity in out


@pytest.mark.parametrize("road", [None, 7, [], {}, {"summary": ["passed"]}], ids=json.dumps)
def test_an_odd_road_in_a_result_does_not_keep_info_from_its_work(
    proven: Artifact, capsys: pytest.CaptureFixture[str], road: object
) -> None:
    """Any program may have written it."""
    assert run(["verify", str(proven.path), "-q"]) == 0
    path = sidecar_of(proven.path)
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "road": road}))
    assert run(["info", str(proven.path)]) == 0
    assert "the road around the network" in capsys.readouterr().out


@pytest.mark.parametrize(
    "rows", [[{}], [7], ["passed"], {"a": 1}, "rows", [{"summary": "passed"}]], ids=lambda rows: json.dumps(rows)
)
@pytest.mark.parametrize("where", ["receipt", "verified"])
def test_odd_rows_in_a_receipt_do_not_keep_info_from_its_work(
    proven: Artifact, capsys: pytest.CaptureFixture[str], where: str, rows: object
) -> None:
    """Any program may have written them."""
    if where == "receipt":
        model = onnx.load(proven.path)
        onnx.helper.set_model_props(
            model,
            {entry.key: entry.value for entry in model.metadata_props} | {RECEIPT_KEY: json.dumps({"rows": rows})},
        )
        onnx.save(model, proven.path)
    else:
        spec, machine = json.loads(proven.spec.to_json()), dataclasses.asdict(host.host())
        odd = {"identity": proven.identity, "format": "onnx", "spec": spec, "files": {}, "host": machine, "rows": rows}
        sidecar_of(proven.path).write_text(json.dumps({**odd, "schema_version": 3}))
    assert run(["info", str(proven.path)]) in (0, 4)
    out, err = capsys.readouterr()
    assert proven.identity in out or str(proven.path) in err


def test_a_model_of_free_size_and_fixed_batch_is_verified_too(
    toy: Toy, prove: Callable[..., Proof], tmp_path: Path
) -> None:
    artifact = toy(tmp_path / "toy.onnx", batch=3, dynamic_size=True)
    proof_of(artifact.path).write_bytes(prove(artifact.spec, 5).to_bytes())
    assert run(["verify", str(artifact.path), "-q"]) == 0


def test_a_compiled_model_is_verified_in_its_own_engine(
    toy_ir: Artifact, prove: Callable[..., Proof], capsys: pytest.CaptureFixture[str]
) -> None:
    proof_of(toy_ir.path).write_bytes(prove(toy_ir.spec).to_bytes())
    assert run(["verify", str(toy_ir.path)]) == 0
    out = capsys.readouterr().out
    assert f"PASSED  {toy_ir.path} gives" in out
    lines = [line for line in out.splitlines() if " engine  " in line]
    assert all("engine  openvino " in line and line.endswith(": passed") for line in lines)
    assert ", computes in f32: " in lines[0]
    assert json.loads(sidecar_of(toy_ir.path).read_text(encoding="utf-8"))["format"] == "openvino"
    assert run(["info", str(toy_ir.path)]) == 0
    assert capsys.readouterr().out.count("verified here") == len(lines) + 1
    shutil.copy(sidecar_of(toy_ir.path), sidecar_of(toy_ir.path.with_suffix(".onnx")))
    assert run(["info", str(toy_ir.path.with_suffix(".onnx"))]) == 0
    assert "of another file" in capsys.readouterr().out, "what one engine did with the IR says nothing of the ONNX"


def test_the_result_of_an_earlier_build_is_not_shown_as_this_ones(
    toy_ir: Artifact, prove: Callable[..., Proof], capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that is compiled again has the identity of its ONNX file, as before."""
    proof_of(toy_ir.path).write_bytes(prove(toy_ir.spec).to_bytes())
    assert run(["verify", str(toy_ir.path), "-q"]) == 0
    toy_ir.path.write_bytes(toy_ir.path.read_bytes().replace(b"<net", b"<!-- again --><net"))
    beside(toy_ir.path).write_text(sidecar_text(toy_ir), encoding="utf-8")
    assert open_artifact(toy_ir.path).identity == toy_ir.identity
    assert run(["info", str(toy_ir.path)]) == 0
    assert "of another file; run `petseg verify` again" in capsys.readouterr().out


def test_the_backend_that_is_asked_for_verifies(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    for backend in ("onnxruntime", "openvino"):
        assert run(["verify", str(proven.path), "--backend", backend, "--threads", "1", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert rows
        assert all(row["engine"].startswith(f"{backend} ") for row in rows)


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("openvino", install("openvino")),
        ("ov", install("openvino")),
        ("abacus", "there is no engine 'abacus'"),
    ],
)
def test_a_backend_that_cannot_be_had_is_5_and_no_other_steps_in(
    proven: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    backend: str,
    said: str,
) -> None:
    uninstall("openvino", monkeypatch)
    assert run(["verify", str(proven.path), "--backend", backend]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert not sidecar_of(proven.path).exists()


def test_without_a_file_the_model_that_ships_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written beside it."""
    before = files(default_model().parent)
    assert run(["verify"]) == 0
    out = capsys.readouterr().out
    assert out.strip().startswith(f"PASSED  {default_model()} gives what its checkpoint gives, on 16 photos\n")
    assert "computes in f32: passed" in out
    assert "result  in" not in out
    assert files(default_model().parent) == before


def test_beside_the_model_that_ships_a_result_is_written_only_where_it_is_told_to_go(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("petseg_runtime.artifact.default_model", lambda: proven.path)
    before = files(tmp_path)
    assert run(["verify", "-q"]) == 0
    assert files(tmp_path) == before
    assert run(["verify", "-q", "--output", str(tmp_path / "result.json")]) == 0
    assert files(tmp_path) == {*before, "result.json"}
    tampered(proven)
    assert run(["verify", "-q"]) == 10


@pytest.mark.parametrize("command", [["info"], ["infer", "cat.jpg", "--model"], ["verify"]], ids=" ".join)
def test_a_fatal_error_shows_names_escaped(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*command, "no\x1b]0;title\x07\nmodel.onnx"]) == 4
    assert capsys.readouterr().err.startswith("petseg: no\\x1b]0;title\\x07\\nmodel.onnx: ")


def test_names_that_would_break_the_line_are_escaped(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    odd = proven.path.with_name("two\nlines.onnx")
    proof_of(proven.path).rename(proof_of(odd))
    proven.path.rename(odd)
    assert run(["verify", str(odd), *IN_ONNXRUNTIME]) == 0
    out = capsys.readouterr().out
    assert "two\\nlines.onnx gives what its checkpoint gives" in out
    assert all("  " in line for line in out.splitlines()), "a name and what is told, in each line"
