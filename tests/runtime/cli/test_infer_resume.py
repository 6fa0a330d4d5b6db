"""``petseg infer --resume``: continues an interrupted run, and rejects runs with other settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from PIL import Image

from clips import write_clip
from command_line import files
from petseg.cli import run
from petseg_runtime.journal import JOURNAL, Journal

Toy: TypeAlias = Callable[..., Any]


def test_a_resumed_run_reports_existing_results(
    reds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run([*reds, str(out)]) == 0
    (out / "1.png").unlink()
    capsys.readouterr()
    assert run([*reds, str(out), "--resume"]) == 0
    line, count = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{tmp_path / 'photos' / '1.png'} -> {out / '1.png'}  ")
    assert count == f"5 photos: 1 written to {out}, 4 already there"
    assert run([*reds, str(out), "--resume", "--json"]) == 0
    (summary,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert (summary["photos"], summary["done"], summary["failed"], summary["skipped"]) == (5, 0, 0, 5)


def test_a_failure_after_earlier_results_exits_with_3(
    reds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run([*reds, str(tmp_path / "out")]) == 0
    (tmp_path / "photos" / "1.png").write_bytes(b"no photo any more")
    assert run([*reds, str(tmp_path / "out"), "--resume"]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"petseg: {tmp_path / 'photos' / '1.png'}: ")


def test_a_run_resumes_however_its_folder_is_spelled(
    reds: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a note is printed if the journal has no result for the photos."""
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
        assert printed.out.splitlines()[-1] == f"5 photos: 0 written to {out}, 5 already there"
        assert printed.err == ""
    shutil.copytree(tmp_path / "photos", tmp_path / "copy")
    reds[1] = str(tmp_path / "copy")
    why = "the 5 results noted there are of other files, or of these before they changed; all are processed again"
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
        (["--threshold", "0.9", "--cutout-threshold", "0.5"], "(threshold was 0.5, now 0.9)"),
        (["--size", "32x16", "-q"], "size was [16, 32], now [32, 16]"),
        (["--min-area", "0.25"], "min_area was 0.0, now 0.25"),
        (["--keep-doubtful"], "doubtful was 'left out', now None"),
        (["--background", "white"], "background was None, now [255, 255, 255]"),
        (["--backend", "openvino"], "engine was 'onnxruntime "),
        (["--model", "other.onnx"], "model was '"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_resuming_with_other_settings_exits_with_6_and_changes_nothing(
    reds: list[str],
    toy: Toy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    toy(tmp_path / "toy.onnx", dynamic_size=True)
    toy(tmp_path / "other.onnx", channel=1)
    command = [*reds, str(tmp_path / "out"), "--backend", "onnxruntime"]
    assert run(command) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    capsys.readouterr()
    assert run([*command, "--resume", *options]) == 6
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"petseg: {tmp_path / 'out'}: the run there had other settings (")
    assert said in err
    assert err.endswith("resume it with those, or start again without --resume\n")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before
    assert run([*command, "--resume"]) == 0


def test_equivalent_options_resume_the_same_run(
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


def test_a_video_added_later_does_not_prevent_resuming(
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


def test_settings_of_videos_matter_only_with_videos(
    photo: Path, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("av")
    (photo.parent / "clip.mp4").write_bytes(b"no video, as it turns out")
    command = ["infer", str(photo.parent), "--as", "mask", "--model", str(toy(tmp_path / "toy.onnx").path)]
    command += ["--output", str(tmp_path / "out")]
    assert run(command) == 3
    capsys.readouterr()
    assert run([*command, "--resume", "--format", "png"]) == 6  # png is the default for photos, but not for videos
    assert "video_format was 'mp4', now 'png'" in capsys.readouterr().err
    assert run([*command, "--resume", "--smooth", "0.5"]) == 6
    assert "smooth was None, now 0.5" in capsys.readouterr().err
    assert run([*command, "--resume", "--smooth", "0"]) == 3, "as without it"
    photo.unlink()
    assert run(command) == 1
    assert run([*command, "--resume", "--format", "mp4"]) == 1, "the default for videos"


def test_the_number_of_threads_does_not_prevent_resuming(reds: list[str], tmp_path: Path) -> None:
    for threads in ("1", "2"):
        assert run([*reds, str(tmp_path / "out"), "--resume", "--threads", threads]) == 0


def test_a_single_photo_leaves_no_journal_without_resume(photo: Path, tmp_path: Path) -> None:
    assert run(["infer", str(photo), "--output", str(tmp_path / "out")]) == 0
    assert files(tmp_path / "out") == {"cat.png"}
    assert run(["infer", str(photo), "--output", str(tmp_path / "out"), "--resume"]) == 0
    assert files(tmp_path / "out") == {"cat.png", JOURNAL}


@pytest.mark.parametrize("kind", ["coco-polygons", "coco-rle"])
def test_annotations_of_a_single_photo_leave_no_journal_without_resume(photo: Path, tmp_path: Path, kind: str) -> None:
    """Else later searches would skip the folder of the photo."""
    command = ["infer", str(photo), "--as", kind, "--output"]
    assert run([*command, str(photo.parent)]) == 0
    assert files(photo.parent) == {"cat.jpg", "annotations.json"}
    found = json.loads((photo.parent / "annotations.json").read_text())
    assert [len(found[part]) for part in ("images", "annotations")] == [1, 1]
    assert run([*command, str(tmp_path / "out"), "--resume"]) == 0
    assert files(tmp_path / "out") == {"annotations.json", JOURNAL}
    assert json.loads((tmp_path / "out" / "annotations.json").read_text()) == found


def test_during_an_active_run_another_can_start_but_not_resume(
    reds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with Journal(out, {}, resume=False):
        assert run([*reds, str(out)]) == 0
        capsys.readouterr()
        assert run([*reds, str(out), "--resume"]) == 6
        assert capsys.readouterr().err == f"petseg: {out}: another run is writing there; wait for it, or stop it\n"


def test_resuming_beside_the_photos_replaces_only_its_own_results(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photo = tmp_path / "cat.png"
    Image.new("RGB", (20, 30), "red").save(photo)
    (tmp_path / "cat.jpg").write_bytes(b"somebody's own")
    command = ["infer", str(photo), "--as", "overlay", "--model", str(toy(tmp_path / "toy.onnx").path), "--resume"]
    assert run([*command, "--output", str(tmp_path)]) == 6
    assert "already exists, beside the photos" in capsys.readouterr().err
    assert (tmp_path / "cat.jpg").read_bytes() == b"somebody's own"
    (tmp_path / "cat.jpg").unlink()
    assert run([*command, "--output", str(tmp_path)]) == 0
    (tmp_path / "cat.jpg").write_bytes(b"cut off")
    assert run([*command, "--output", str(tmp_path)]) == 0
    with Image.open(tmp_path / "cat.jpg") as overlay:
        assert overlay.size == (20, 30)
    command[command.index("overlay")] = "coco-rle"
    (tmp_path / JOURNAL).unlink()
    for _ in range(2):
        assert run([*command, "--output", str(tmp_path)]) == 0


def in_place(folder: Path, *names: str) -> list[str]:
    """Photos in a folder, and the command that puts their masks beside them; the caller adds options."""
    paths = [folder / name for name in names]
    for path in paths:
        if not path.exists():
            Image.new("RGB", (20, 30), "red").save(path)
    return ["infer", *map(str, paths), "--as", "mask", "--model", str(folder / "toy.onnx"), "--output", str(folder)]


def test_resuming_with_more_photos_replaces_no_file_beside_them(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(tmp_path / "toy.onnx")
    assert run(in_place(tmp_path, "a.jpg", "b.jpg")) == 0
    capsys.readouterr()
    (tmp_path / "c.png").write_bytes(b"somebody's own")
    command = in_place(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    for options, name in ([], "a.png"), (["--resume"], "c.png"):
        assert run([*command, *options]) == 6
        said = f"{tmp_path / name}: already exists, beside the photos; move it, or choose another --output"
        assert capsys.readouterr().err == f"petseg: {said}\n"
    assert (tmp_path / "c.png").read_bytes() == b"somebody's own"
    (tmp_path / "c.png").unlink()
    assert run([*command, "--resume"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"3 photos: 1 written to {tmp_path}, 2 already there"


def test_a_killed_run_beside_the_photos_is_resumed(toy: Toy, tmp_path: Path) -> None:
    """The last results are in place, but not noted yet."""
    toy(tmp_path / "toy.onnx")
    command = in_place(tmp_path, "a.jpg", "b.jpg", "c.jpg")
    assert run(command) == 0
    lines = (tmp_path / JOURNAL).read_text().splitlines()
    (tmp_path / JOURNAL).write_text("\n".join(line for line in lines if '"name"' not in line))
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(b"not noted")
    assert run([*command, "--resume"]) == 0
    with Image.open(tmp_path / "c.png") as mask:
        assert mask.size == (20, 30)


@pytest.mark.parametrize("options", [["--as", "mask"], ["--as", "mask", "--only-found"]], ids=" ".join)
def test_the_place_of_a_photo_without_a_result_may_be_used_by_others(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    """Such as one that could not be read, which the user then converts."""
    toy(tmp_path / "toy.onnx")
    command = [*in_place(tmp_path, "a.jpg", "b.jpg"), *options]
    if "--only-found" in options:
        Image.new("RGB", (20, 30), "blue").save(tmp_path / "b.jpg")
    else:
        (tmp_path / "b.jpg").write_bytes(b"no photo")
    assert run(command) == (0 if "--only-found" in options else 3)
    (tmp_path / "b.png").write_bytes(b"somebody's own")
    assert run([*command, "--resume"]) == 6
    assert "b.png: already exists" in capsys.readouterr().err
    assert (tmp_path / "b.png").read_bytes() == b"somebody's own"


def test_a_run_to_another_folder_notes_only_results_in_place(reds: list[str], tmp_path: Path) -> None:
    """A line more for each photo would be twice the file."""
    assert run([*reds, str(tmp_path / "out")]) == 0
    assert len((tmp_path / "out" / JOURNAL).read_text().splitlines()) == 1 + 5


def test_annotations_of_a_run_that_did_not_reach_its_end_are_somebodys_own(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy(tmp_path / "toy.onnx")
    command = [*in_place(tmp_path, "a.jpg", "b.jpg"), "--as", "coco-rle"]
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "begin", lambda *_: pytest.fail("killed"))
        with pytest.raises(pytest.fail.Exception):
            run(command)
    (tmp_path / "annotations.json").write_bytes(b"weeks of work")
    assert run([*command, "--resume"]) == 6
    assert "annotations.json: already exists, beside the photos" in capsys.readouterr().err
    (tmp_path / "annotations.json").unlink()
    for _ in range(2):
        assert run([*command, "--resume"]) == 0


def test_resuming_beside_the_videos_replaces_only_its_own_results(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_clip(tmp_path / "clip.mp4", 3, sound=None)
    (tmp_path / "clip.webm").write_bytes(b"somebody's own")
    command = ["infer", str(tmp_path / "clip.mp4"), "--model", str(toy(tmp_path / "toy.onnx").path), "--resume"]
    assert run([*command, "--output", str(tmp_path)]) == 6
    assert "already exists beside the videos" in capsys.readouterr().err
    assert (tmp_path / "clip.webm").read_bytes() == b"somebody's own"
    (tmp_path / "clip.webm").unlink()
    for printed in (1, 0):  # its own result is neither in the way nor made again
        assert run([*command, "--output", str(tmp_path)]) == 0
        assert len(capsys.readouterr().out.splitlines()) == printed


@pytest.mark.parametrize("form", ["mp4", "png"])
def test_resuming_with_more_videos_replaces_no_file_beside_them(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str
) -> None:
    model = str(toy(tmp_path / "toy.onnx").path)
    videos = [write_clip(tmp_path / f"{name}.mkv", 3, sound=None) for name in "ab"]
    options = ["--as", "mask", "--format", form, "--model", model, "--output", str(tmp_path)]
    assert run(["infer", *map(str, videos), *options]) == 0
    videos.append(write_clip(tmp_path / "c.mkv", 3, sound=None))
    mine = tmp_path / ("c.mp4" if form == "mp4" else "c/000000.png")
    mine.parent.mkdir(exist_ok=True)
    mine.write_bytes(b"somebody's own")
    capsys.readouterr()
    assert run(["infer", *map(str, videos), *options, "--resume"]) == 6
    assert "already exists beside the videos" in capsys.readouterr().err
    assert mine.read_bytes() == b"somebody's own"
    mine.rename(tmp_path / "elsewhere")
    if form == "png":
        mine.parent.rmdir()
    assert run(["infer", *map(str, videos), *options, "--resume"]) == 0
    assert "3 videos: 1 done, 2 already there" in capsys.readouterr().out


def test_a_stopped_or_failed_video_is_resumed_beside_its_source(toy: Toy, tmp_path: Path) -> None:
    """Its movie is in place, but not noted."""
    good, bad = (write_clip(tmp_path / f"{name}.mkv", 60, sound=None) for name in ("good", "bad"))
    bad.write_bytes(bad.read_bytes()[: bad.stat().st_size // 2])
    options = ["--as", "mask", "--model", str(toy(tmp_path / "toy.onnx").path), "--output", str(tmp_path)]
    for more in ([], ["--resume"]):
        assert run(["infer", str(good), str(bad), *options, *more]) == 3
        assert {"good.mp4", "bad.mp4"} <= files(tmp_path)
