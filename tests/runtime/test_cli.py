"""What people type: every photo answered for, one line per trouble, an exit code that tells scripts what happened."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from PIL import Image

from petseg.cli import COMMANDS, run
from petseg_runtime import __version__, default_model, sample_photos
from petseg_runtime.artifact import open_artifact
from petseg_runtime.cli import infer
from petseg_runtime.sinks import KINDS

CHELSEA = next(path for path in sample_photos() if path.name == "chelsea.jpg")
Petseg: TypeAlias = Callable[..., subprocess.CompletedProcess[str]]


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
    return [path for path in folder.rglob("*") if ".part" in path.name or path.name.startswith(".")]


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
    assert written == sorted(str(Path(name).with_suffix(".png")) for name in odd.good)
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
    assert any("2 frames" in note for note in notes["moving.gif"])
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
    assert capsys.readouterr() == ("", f"petseg: no photos in {empty}\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "args",
    [
        ["nonsense"],
        ["infer"],
        ["infer", "--nonsense", "cat.jpg"],
        ["infer", "cat.jpg", "--as", "painting"],
        ["infer", "cat.jpg", "--threads", "0"],
        ["infer", "cat.jpg", "--threads", "two"],
        ["info"],
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
        assert err.startswith(f"petseg: {model}: ")
        assert len(err.splitlines()) == 1


@pytest.mark.parametrize("engine", ["onnxruntime"])
def test_no_engine_is_5_and_says_what_to_install(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], engine: str
) -> None:
    monkeypatch.setitem(sys.modules, engine, None)
    monkeypatch.delitem(sys.modules, f"petseg_runtime.engines.{engine}", raising=False)
    assert run(["infer", str(photo), "--output", str(tmp_path / "out")]) == 5
    assert "pip install 'petseg[cpu]'" in capsys.readouterr().err


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


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_each_kind_of_result_is_what_it_is_called(photo: Path, tmp_path: Path, kind: str) -> None:
    mode = {"mask": "L", "probability": "L", "cutout": "RGBA", "overlay": "RGB"}[kind]
    suffix, form = (".jpg", "JPEG") if kind == "overlay" else (".png", "PNG")
    assert run(["infer", str(photo), "--as", kind, "--output", str(tmp_path / "out")]) == 0
    with Image.open(photo) as original:
        pixels = np.array(original)
    with Image.open(tmp_path / "out" / f"cat{suffix}") as picture:
        assert (picture.mode, picture.size, picture.format) == (mode, pixels.shape[1::-1], form)
        written = np.array(picture)
    if kind == "mask":
        assert set(np.unique(written)) == {0, 255}
    elif kind == "probability":
        assert len(np.unique(written)) > 50
    elif kind == "cutout":
        np.testing.assert_array_equal(written[..., :3], pixels)
        assert written[..., 3].min() < 128 < written[..., 3].max()
    else:
        assert 1 < np.abs(written.astype(int) - pixels).mean() < 100


def test_the_kinds_that_are_offered_are_those_that_can_be_written() -> None:
    (option,) = (parameter for parameter in infer.params if parameter.name == "kind")
    assert set(getattr(option.type, "choices", ())) == set(KINDS)


def test_results_go_to_a_folder_named_after_their_kind_by_default(
    photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["infer", str(photo), "--as", "overlay"]) == 0
    assert (tmp_path / "petseg-output" / "overlay" / "cat.jpg").is_file()


def test_the_threshold_moves_the_mask_and_the_cutout(photo: Path, tmp_path: Path) -> None:
    pictures = {}
    for kind in ("mask", "cutout"):
        for threshold in ("0.02", "0.98"):
            out = tmp_path / kind / threshold
            assert run(["infer", str(photo), "--as", kind, "--output", str(out), "--threshold", threshold]) == 0
            with Image.open(out / "cat.png") as picture:
                pictures[kind, threshold] = np.array(picture)
    low, high = (pictures["mask", threshold] == 255 for threshold in ("0.02", "0.98"))
    assert (low | ~high).all()
    assert low.sum() > high.sum()
    assert pictures["cutout", "0.02"][..., 3].sum() > pictures["cutout", "0.98"][..., 3].sum()


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
    assert run(["infer", str(photo), "-v", "--threads", "1", "--output", str(tmp_path / "out")]) == 0
    out, err = capsys.readouterr()
    assert open_artifact(default_model()).spec.name in err
    assert "onnxruntime" in err
    assert "cpu" in err
    assert "1 threads" in err
    assert "photos/s" in out


def test_json_is_all_there_is_on_stdout_also_for_one_photo(
    photo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["infer", str(photo), "--json", "--output", str(tmp_path / "out")]) == 0
    result, summary = map(json.loads, capsys.readouterr().out.splitlines())
    assert (result["event"], result["input"]) == ("result", str(photo))
    assert result["output"] == str(tmp_path / "out" / "cat.png")
    assert (summary["event"], summary["photos"], summary["done"], summary["failed"]) == ("summary", 1, 1, 0)
    assert summary["seconds"] >= 0


def test_a_second_run_passes_over_the_results_of_the_first(
    photo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(photo.parent)
    for _ in range(2):
        assert run(["infer", ".", "--json"]) == 0
        assert json.loads(capsys.readouterr().out.splitlines()[-1])["photos"] == 1


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
    command = [sys.executable, "-m", "petseg.cli", "infer", str(CHELSEA.parent), "--output", str(tmp_path / "out")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert "% pet" in process.stdout.readline()
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=100)
    assert "Traceback" not in err
    assert "Exception ignored" not in err
    assert len(list((tmp_path / "out").iterdir())) < len(sample_photos())  # it stopped early, as it should
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
    results = sorted(out.iterdir())
    assert 3 <= len(results) < 300
    for result in results:
        with Image.open(result) as picture:
            picture.load()


# ----------------------------------------------------------------------------------------- help, version, info


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_names_every_command_and_exit_code(flag: str) -> None:
    done = petseg(flag)
    assert (done.returncode, done.stderr) == (0, "")
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert "130 interrupted" in " ".join(done.stdout.split())


@pytest.mark.parametrize("command", ["infer", "info"])
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
        f"{artifact.spec.threshold} for masks, {artifact.spec.cutout_threshold} for cutouts",
        artifact.receipt["summary"],
    ):
        assert told in out


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
