"""``petseg infer`` with videos: all are accounted for, stopped cleanly and resumed; invalid requests are rejected."""

from __future__ import annotations

import collections
import dataclasses
import fcntl
import itertools
import json
import os
import pty
import re
import resource
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, TypeAlias

import av
import numpy as np
import pytest
from PIL import Image

from clips import HEIGHT, WIDTH, picture, write_clip
from command_line import IN_ONNXRUNTIME, shown_on
from petseg.cli import run
from petseg_runtime import images
from petseg_runtime.cli import infer_video
from petseg_runtime.errors import EXIT_PARTIAL, InputError, OutputError, UnsupportedVideo
from petseg_runtime.journal import JOURNAL
from petseg_runtime.sources import Item, Origin, stream_origin
from petseg_runtime.video import movie
from petseg_runtime.video import run as run_module
from petseg_runtime.video.frame import Frame
from petseg_runtime.video.numbered import OWN
from petseg_runtime.video.stream import Reading, Segmented, Stream

Toy: TypeAlias = Callable[..., Any]

needs_ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed (Debian: ffmpeg)")


def frames_in(path: Path) -> int:
    with av.open(str(path)) as file:
        return sum(1 for _ in file.decode(video=0))


def tree(folder: Path) -> list[str]:
    """All files in a folder, with hidden ones, except for the markers of folders of numbered files."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != OWN)
    return sorted(str(path.relative_to(folder)) for path in files)


@pytest.fixture(scope="session")
def model(toy: Toy, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model for which red is pet."""
    return str(toy(tmp_path_factory.mktemp("model") / "toy.onnx", height=HEIGHT, width=WIDTH).path)


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``short.mp4`` with 20 frames, ``long.mp4`` with 500, and ``cut.mp4``, the second half of which is damaged.

    The lines of 500 frames do not fit into a pipe: a run with --json cannot end before they are read.
    """
    folder = tmp_path_factory.mktemp("clips")
    write_clip(folder / "short.mp4", 20)
    write_clip(folder / "long.mp4", 500)
    whole = write_clip(folder / "whole.ts", 100).read_bytes()
    (folder / "cut.mp4").write_bytes(cut(write_clip(folder / "whole.mp4", 100)))
    assert len(whole) > 0
    return folder


def cut(path: Path) -> bytes:
    """An MP4 with its index first, truncated in the middle of its frames."""
    front = path.with_name("front.mp4")
    with av.open(str(path)) as source, av.open(str(front), "w", options={"movflags": "faststart"}) as file:
        stream = file.add_stream_from_template(source.streams.video[0], opaque=True)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)
    data = front.read_bytes()
    return data[: data.index(b"mdat") + (len(data) - data.index(b"mdat")) // 2]


def infer(*args: object) -> int:
    return run(["infer", *map(str, args)])


@dataclass
class Command:
    """The real command in a separate process."""

    process: subprocess.Popen[str]

    def lines(self, count: int) -> list[dict[str, Any]]:
        assert self.process.stdout
        return [json.loads(self.process.stdout.readline()) for _ in range(count)]

    def end(self) -> tuple[list[dict[str, Any]], str, int]:
        out, err = self.process.communicate(timeout=60)
        return [json.loads(line) for line in out.splitlines()], err, self.process.returncode


@pytest.fixture
def start(model: str) -> Iterator[Callable[..., Command]]:
    """Starts ``petseg infer``; it blocks when the pipe is full unless the caller reads its standard output."""
    begun: list[subprocess.Popen[str]] = []

    def begin(*args: object, **options: Any) -> Command:
        command = [sys.executable, "-m", "petseg.cli", "infer", "--model", model, *IN_ONNXRUNTIME, *map(str, args)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        begun.append(subprocess.Popen(command, **pipes))
        return Command(begun[-1])

    yield begin
    for process in begun:
        process.kill()
        process.communicate()


def events(out: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in out.splitlines()]
    assert all(event["schema_version"] == 1 for event in found)
    return found


# ------------------------------------------------------------------------------------------------ folders


def mixed(folder: Path, clips: Path) -> Path:
    """Photos and videos with the same stems, damaged files, subfolders."""
    write = {"a/clip.mp4": "short.mp4", "a/clip.mov": "short.mp4", "b/x.mp4": "short.mp4", "cut.mp4": "cut.mp4"}
    for name, source in write.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clips / source, folder / name)
    for name in ("a/clip.jpg", "b/x2.png"):
        Image.fromarray(picture(0)).save(folder / name)
    (folder / "bad.mp4").write_bytes(b"no video")
    (folder / "bad.jpg").write_bytes(b"no photo")
    (folder / "empty.webm").touch()
    return folder


def test_every_file_of_a_mixed_folder_is_accounted_for(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer_video, "_STATISTICS", 0.0)
    source, out = mixed(tmp_path / "in", clips), tmp_path / "out"
    os.mkfifo(source / "pipe.mp4")  # nobody writes into it
    assert infer(source, "--as", "mask", "--model", model, "--output", out, "--json") == 3
    shown = capsys.readouterr()
    *told, summary = events(shown.out)
    assert summary["event"] == "summary"
    assert (summary["photos"], summary["done"], summary["failed"]) == (3, 2, 1)
    assert summary["videos"] == {"count": 7, "done": 3, "failed": 4, "stopped": 0, "skipped": 0}
    assert {event["event"] for event in told} == {"result", "failure", "frame", "video"}, "statistics are of streams"
    assert not any("latency" in event for event in told)
    names = ["a/clip.jpg.png", "a/clip.mov.mp4", "a/clip.mp4.mp4", "b/x.mp4", "b/x2.png", "cut.mp4"]
    assert tree(out) == sorted([JOURNAL, *names])
    of_cut = next(event for event in told if event["event"] == "video" and event["input"].endswith("cut.mp4"))
    assert of_cut["error"].startswith(f"{source / 'cut.mp4'}: ")
    assert frames_in(out / "cut.mp4") == of_cut["written"] > 20
    for name in ("bad.mp4", "bad.jpg", "empty.webm", "cut.mp4", "pipe.mp4"):
        assert shown.err.count(f"petseg: {source / name}: ") == 1
    for event in told:
        if event["event"] == "video":
            frames = event["frames"]
            assert frames["decoded"] == event["written"] + frames["dropped"] + frames["failed"]
            assert sum(e["event"] == "frame" and e["input"] == event["input"] for e in told) == event["written"]


@pytest.mark.parametrize("pattern", ["*.nothing", None])
def test_an_unreadable_file_among_videos_is_not_taken_for_a_photo(
    tmp_path: Path,
    clips: Path,
    model: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    pattern: str | None,
) -> None:
    def scandir(path: Any = ".") -> Any:
        if Path(path).name == "secret":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    listed = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    source = tmp_path / "in"
    (source / "secret").mkdir(parents=True)
    os.mkfifo(source / "pipe.mp4")
    shutil.copy(clips / "short.mp4", source / "clip.mp4")
    sources = [source / "clip.mp4", source / pattern] if pattern else [source]
    assert infer(*sources, "--as", "lines", "--model", model, "--output", tmp_path / "out", "--json") == 3
    out, err = capsys.readouterr()
    assert events(out)[-1] == {
        "schema_version": 1,
        "event": "summary",
        "videos": {"count": 3 - bool(pattern), "done": 1, "failed": 2 - bool(pattern), "stopped": 0, "skipped": 0},
    }
    assert len(err.splitlines()) == 2 - bool(pattern)
    assert tree(tmp_path / "out") == [JOURNAL, "clip.ndjson"]


@pytest.mark.parametrize(("source", "photos"), [("*.JPG", 1), ("photo.png *.nothing", 2)])
def test_a_pattern_without_matches_is_counted_among_the_photos_if_it_may_be_one(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str], source: str, photos: int
) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "photo.png")
    sources = [clips / "short.mp4", *(tmp_path / name for name in source.split())]
    assert infer(*sources, "--as", "mask", "--model", model, "--output", tmp_path / "out", "--json") == 3
    summary = events(capsys.readouterr().out)[-1]
    assert (summary["photos"], summary["failed"], summary["videos"]["count"]) == (photos, 1, 1)


def test_one_bad_video_does_not_stop_a_folder(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_clip(source / "a.mkv", 2, sound=None, size=(16, 16400), codec="libvpx-vp9")  # H.264 allows 16384 at most
    for name in ("0.mp4", "b.mp4"):
        shutil.copy(clips / "short.mp4", source / name)
    assert infer(source, "--as", "mask", "--model", model, "--output", out) == 3
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"petseg: {source / 'a.mkv'}: its result {out / 'a.mp4'} cannot be written (")
    assert tree(out) == [JOURNAL, "0.mp4", "b.mp4"]
    for line in (out / JOURNAL).read_text().splitlines()[1:]:
        assert json.loads(line)["name"] in ("0", "b"), "--resume tries it again"


def test_a_background_is_decoded_only_once(
    tmp_path: Path, clips: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[Any] = []
    real = images.read
    monkeypatch.setattr(images, "read", lambda source: decoded.append(source) or real(source))
    beach = tmp_path / "beach.png"
    Image.new("RGB", (40, 30), "green").save(beach)
    source = tmp_path / "in"
    source.mkdir()
    for name in ("a.mp4", "b.mp4"):
        shutil.copy(clips / "short.mp4", source / name)
    Image.fromarray(picture(0)).save(source / "photo.png")
    assert infer(source, "--background", beach, "--model", model, "--output", tmp_path / "out") == 0
    assert [source for source in decoded if not isinstance(source, Image.Image)] == [str(beach)]
    assert tree(tmp_path / "out") == [JOURNAL, "a.mp4", "b.mp4", "photo.jpg"]


def test_output_path_checks_of_many_files_are_not_pairwise(tmp_path: Path) -> None:
    """Pairwise comparison would take minutes."""
    count = 10_000
    origins = [Origin(f"in/{n}.mp4", f"in/{n}.mp4", PurePath(f"{n}")) for n in range(count)]
    photos = {f"in/{n}.jpg": str(tmp_path / "out" / f"{n}.jpg.png") for n in range(count)}
    output = infer_video.Output(folder=tmp_path / "out", kind="mask", format="png")
    start = time.monotonic()
    checked = infer_video.check_places(output, origins, photos)
    assert time.monotonic() - start < 10
    assert len(checked.reserved) == 4 * count
    photos["in/x.jpg"] = str(tmp_path / "out" / "9999" / "deep" / "x.png")
    with pytest.raises(OutputError, match=r"results of in/9999\.mp4 and in/x\.jpg would mix"):
        infer_video.check_places(output, origins, photos)


def test_full_failure_exits_with_1(tmp_path: Path, clips: Path, model: str) -> None:
    assert infer(clips / "cut.mp4", "--model", model, "--output", tmp_path, "--as", "mask") == 1
    assert frames_in(tmp_path / "cut.mp4") > 20
    assert infer(tmp_path / "nowhere" / "none.mp4", "--model", model, "--output", tmp_path, "--as", "mask") == 1


def spoil(path: Path, damaged: range) -> Path:
    """Overwrite some of the packets with pictures."""
    data = bytearray(path.read_bytes())
    with av.open(str(path)) as file:
        packets = [bytes(packet) for packet in file.demux(video=0) if packet.size]
    for number in damaged:
        at = data.index(packets[number])
        data[at : at + len(packets[number])] = b"\xff" * len(packets[number])
    path.write_bytes(data)
    return path


def test_a_damaged_video_fails_is_partly_written_and_retried(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    write_clip(source / "good.mp4", 20)
    bad = spoil(write_clip(source / "bad.mp4", 40), range(10, 20))
    options = ["--as", "mask", "--model", model, "--output", out, "--json"]
    for resume, done, skipped in (([], 1, 0), (["--resume"], 0, 1)):
        assert infer(source, *options, *resume) == 3
        shown = capsys.readouterr()
        assert shown.err == f"petseg: {bad}: 10 of 40 packets could not be decoded; the rest was written\n"
        *told, summary = events(shown.out)
        (video,) = (event for event in told if event["event"] == "video" and event["input"] == str(bad))
        assert (video["error"], video["undecodable"]) == (shown.err[len("petseg: ") : -1], 10)
        assert 20 <= video["written"] == frames_in(out / "bad.mp4") <= 30
        assert summary["videos"] == {"count": 2, "done": done, "failed": 1, "stopped": 0, "skipped": skipped}
    shutil.copy(source / "good.mp4", bad)
    assert infer(source, *options, "--resume") == 0
    assert frames_in(out / "bad.mp4") == 20


def test_damage_beyond_max_frames_is_ignored(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    clip = spoil(write_clip(tmp_path / "clip.mp4", 40), range(10, 20))
    options = ["--as", "mask", "--model", model, "--output", tmp_path / "out"]
    assert infer(clip, *options, "--max-frames", 5) == 0
    assert infer(clip, *options, "--max-frames", 25) == 1
    assert "packets could not be decoded; the rest was written" in capsys.readouterr().err


def test_frames_that_cannot_be_converted_are_reported(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pixels(frame: Any, *size: Any) -> Any:
        if frame.number in failing:
            raise UnsupportedVideo("frames in odd colours cannot be converted")
        return real(frame, *size)

    failing, real = {3, 4}, Frame.pixels
    monkeypatch.setattr(Frame, "pixels", pixels)
    options = ["--as", "mask", "--model", model, "--output", tmp_path]
    assert infer(clips / "short.mp4", *options) == 1
    out, err = capsys.readouterr()
    assert f"{clips / 'short.mp4'} -> {tmp_path / 'short.mp4'}  18 frames, 2 failed, 100 % with a pet, " in out
    assert err == (
        f"petseg: {clips / 'short.mp4'}: 2 of 20 frames could not be converted (frames in odd colours cannot be "
        "converted); the rest was written\n"
    )
    assert frames_in(tmp_path / "short.mp4") == 18
    failing.update(range(20))
    assert infer(clips / "short.mp4", *options) == 1
    why = "no frame was written: frames in odd colours cannot be converted"
    assert capsys.readouterr().err == f"petseg: {clips / 'short.mp4'}: {why}\n"


@pytest.mark.parametrize("suffix", ["mkv", "avi"])
def test_a_truncated_video_fails_and_its_frames_are_written(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], suffix: str
) -> None:
    clip = write_clip(tmp_path / f"clip.{suffix}", 200, sound="aac" if suffix == "mkv" else None)
    options = ["--as", "mask", "--model", model, "--output", tmp_path / "out"]
    assert infer(clip, *options) == 0
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    assert infer(clip, *options) == 1
    assert f"petseg: {clip}: truncated: it declares a duration of 8.0 s, but ends after " in capsys.readouterr().err
    assert 50 < frames_in(tmp_path / "out" / "clip.mp4") < 150
    assert infer(clip, *options, "--max-frames", 50) == 0
    assert infer(clip, *options, "--stride", 3) == 1


def test_a_name_that_is_too_long_is_counted_as_a_failure(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name, good = "a" * 300 + ".mp4", clips / "short.mp4"
    for long in (name, f"{good}/{name}", tmp_path / name / "clip.mp4"):
        assert infer(long, good, "--as", "mask", "--model", model, "--output", tmp_path / "out", "--json") == 3
        out, err = capsys.readouterr()
        assert err.startswith(f"petseg: {long}: ")
        assert len(err.splitlines()) == 1
        assert events(out)[-1]["videos"] == {"count": 2, "done": 1, "failed": 1, "stopped": 0, "skipped": 0}


def test_an_output_inside_the_source_is_not_read_again(tmp_path: Path, clips: Path, model: str) -> None:
    shutil.copy(clips / "short.mp4", tmp_path / "clip.mov")
    for _ in range(2):
        assert infer(tmp_path, "--as", "mask", "--model", model, "--output", tmp_path / "out") == 0
    assert tree(tmp_path) == ["clip.mov", "out/.petseg-run.ndjson", "out/clip.mp4"]


@pytest.mark.parametrize(
    ("options", "there", "said"),
    [
        (["--as", "mask"], "clip.mp4", "would replace a source"),
        (["--as", "mask"], None, "would replace a source"),
        (["--as", "cutout"], "clip.webm", "already exists beside the videos"),
        (["--as", "mask", "--segment", "1"], "clip/0001.mp4", "already exists beside the videos"),
        (["--as", "mask", "--format", "png"], "clip/000000.png", "already exists beside the videos"),
    ],
)
def test_a_result_never_replaces_files_beside_the_source(
    tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str], options: list[str], there: str | None, said: str
) -> None:
    clip = tmp_path / "clip.mp4"
    shutil.copy(clips / "short.mp4", clip)
    if there and there != "clip.mp4":
        (tmp_path / there).parent.mkdir(exist_ok=True)
        (tmp_path / there).write_text("mine")
    before = {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)}
    assert infer(clip, *options, "--output", tmp_path, "--model", "none.onnx") == 6
    assert said in capsys.readouterr().err
    assert {name: (tmp_path / name).read_bytes() for name in tree(tmp_path)} == before


def test_a_photos_result_never_replaces_a_file_beside_a_video(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("photos", "videos"):
        (tmp_path / name).mkdir()
    Image.fromarray(picture(0)).save(tmp_path / "photos" / "cat.jpg")
    clip = shutil.copy(clips / "short.mp4", tmp_path / "videos" / "clip.mov")
    (tmp_path / "videos" / "cat.png").write_text("mine")
    options = ["--as", "mask", "--output", tmp_path / "videos", "--model", model]
    assert infer(tmp_path / "photos" / "cat.jpg", clip, *options) == 6
    assert "already exists, beside the" in capsys.readouterr().err
    assert (tmp_path / "videos" / "cat.png").read_text() == "mine"


def test_a_videos_pictures_are_not_mixed_with_photo_results(
    tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    (source / "clip").mkdir(parents=True)
    shutil.copy(clips / "short.mp4", source / "clip.mp4")
    Image.fromarray(picture(0)).save(source / "clip" / "000000.jpg")
    assert infer(source, "--as", "mask", "--format", "png", "--output", tmp_path / "out", "--model", "none.onnx") == 6
    assert "would mix; use one --output for each" in capsys.readouterr().err
    assert tree(tmp_path / "out") == []


def write_two_sizes(path: Path) -> Path:
    """A clip whose frame size changes in the middle."""
    parts = [
        write_clip(path.with_suffix(".part.ts"), 10, sound=None, size=s).read_bytes() for s in ((48, 64), (64, 96))
    ]
    path.with_suffix(".part.ts").unlink()
    path.write_bytes(b"".join(parts))
    return path


def test_a_frame_size_change_never_replaces_another_result(tmp_path: Path, model: str) -> None:
    source = tmp_path / "in"
    write_clip(source / "clip-2.mp4", 5, sound=None)
    write_two_sizes(source / "clip.ts")
    assert infer(source, "--as", "mask", "--model", model, "--output", tmp_path / "out") == 0
    assert tree(tmp_path / "out") == [JOURNAL, "clip-2.mp4", "clip-3.mp4", "clip.mp4"]
    assert [frames_in(tmp_path / "out" / f"clip{n}.mp4") for n in ("", "-2", "-3")] == [10, 5, 10]


@pytest.mark.parametrize("linked", [False, True], ids=["", "through a link"])
def test_a_frame_size_change_never_replaces_files_beside_the_source(tmp_path: Path, model: str, linked: bool) -> None:
    clip = write_two_sizes(tmp_path / "clip.ts")
    (tmp_path / "clip-2.mp4").write_text("mine")
    (tmp_path / "clip-3.mp4").symlink_to("nowhere")
    (tmp_path / "link").symlink_to(tmp_path)
    assert infer(clip, "--as", "mask", "--model", model, "--output", tmp_path / "link" if linked else tmp_path) == 0
    assert (tmp_path / "clip-2.mp4").read_text() == "mine"
    assert tree(tmp_path) == ["clip-2.mp4", "clip-4.mp4", "clip.mp4", "clip.ts"]
    assert (tmp_path / "clip-3.mp4").is_symlink()
    assert [frames_in(tmp_path / f"clip{n}.mp4") for n in ("", "-4")] == [10, 10]


def test_a_frame_size_change_replaces_an_earlier_runs_movie_in_a_separate_folder(tmp_path: Path, model: str) -> None:
    clip = write_two_sizes(tmp_path / "clip.ts")
    for _ in range(2):
        assert infer(clip, "--as", "mask", "--model", model, "--output", tmp_path / "out") == 0
    assert tree(tmp_path / "out") == ["clip-2.mp4", "clip.mp4"]


# ------------------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize(
    ("asked", "why", "result"),
    [
        (["--as", "coco-rle"], "--as coco-rle is for photos", "annotations.json"),
        (["--as", "mask", "--only-found"], "--only-found is for photos", "photo.png"),
        (["--as", "overlay", "--format", "webp"], "--as overlay of a video cannot be written as webp", "photo.webp"),
    ],
)
def test_videos_found_beside_photos_are_skipped_if_the_kind_is_unsupported(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str], asked: list[str], why: str, result: str
) -> None:
    """As beside Live Photos; a video given by name is an error, and so are videos alone."""
    source = tmp_path / "in"
    source.mkdir()
    Image.fromarray(picture(0)).save(source / "photo.png")
    for name in ("a.mov", "b.mov"):
        shutil.copy(clips / "short.mp4", source / name)
    words = [*asked, "--model", model, "--output", tmp_path / "out"]
    assert infer(source, *words) == 0
    assert capsys.readouterr().err.startswith(f"petseg: {source / 'a.mov'} and 1 more: skipped: {why}")
    assert tree(tmp_path / "out") == [JOURNAL, result]
    assert infer(source, *words, "-q") == 0
    assert capsys.readouterr().err == ""
    assert infer(source, source / "b.mov", *words) == 2
    assert f"petseg: {source / 'b.mov'}: {why}" in capsys.readouterr().err
    (source / "photo.png").unlink()
    assert infer(source, *words) == 2
    assert f"petseg: {source / 'a.mov'}: {why}" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_stops_a_long_file_cleanly(
    tmp_path: Path, clips: Path, start: Callable[..., Command], number: int, code: int
) -> None:
    command = start(clips / "long.mp4", "--as", "overlay", "--output", tmp_path, "--json")
    told = command.lines(5)
    command.process.send_signal(number)
    more, err, returned = command.end()
    assert (returned, err) == (code, "")
    *_, video, summary = told + more
    assert video["stopped"] is True
    assert video["error"] is None
    assert summary["videos"] == {"count": 1, "done": 0, "failed": 0, "stopped": 1, "skipped": 0}
    assert tree(tmp_path) == ["long.mp4"]
    assert frames_in(tmp_path / "long.mp4") == video["written"] == video["frames"]["decoded"]
    assert 5 <= video["written"] < 500
    with av.open(str(tmp_path / "long.mp4")) as file:
        length = max(packet.pts * packet.time_base for packet in file.demux(audio=0) if packet.pts is not None)
    assert abs(length - video["written"] / 25) < 0.1  # the sound ends with the picture


def test_a_closed_terminal_stops_a_long_file_cleanly(tmp_path: Path, clips: Path, model: str) -> None:
    mine, theirs = pty.openpty()
    # The terminal becomes the controlling terminal of the process, as after a login.
    program = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); from petseg.cli import main; main()"
    words = ["infer", str(clips / "long.mp4"), "--as", "overlay", "--output", str(tmp_path), "--model", model]
    terminal = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    with subprocess.Popen([sys.executable, "-c", program, *words, "--json"], start_new_session=True, **terminal) as run:
        os.close(theirs)
        said = b""
        while said.count(b'"frame"') < 5:
            said += os.read(mine, 4096)
        os.close(mine)
        assert run.wait(60) == 129
    assert tree(tmp_path) == ["long.mp4"]
    assert frames_in(tmp_path / "long.mp4") >= 5


def test_separating_photos_from_videos_is_not_pairwise(
    tmp_path: Path, clips: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compare(item: Item, other: object) -> bool:
        raise AssertionError("a folder of thousands of each would take minutes")

    monkeypatch.setattr(Item, "__eq__", compare)
    source = tmp_path / "in"
    source.mkdir()
    shutil.copy(clips / "short.mp4", source / "clip.mp4")
    Image.fromarray(picture(0)).save(source / "photo.png")
    assert infer(source, "--as", "mask", "--output", tmp_path / "out", "--model", model) == 0
    assert tree(tmp_path / "out") == [JOURNAL, "clip.mp4", "photo.png"]


def test_a_signal_during_photos_skips_the_videos(tmp_path: Path, clips: Path, start: Callable[..., Command]) -> None:
    source = tmp_path / "in"
    source.mkdir()
    for number in range(300):
        Image.fromarray(picture(0)).save(source / f"{number:03d}.png")
    shutil.copy(clips / "short.mp4", source / "clip.mp4")
    command = start(source, "--as", "mask", "--output", tmp_path / "out", "--json")
    told = command.lines(1)
    command.process.send_signal(signal.SIGTERM)
    more, err, returned = command.end()
    assert (returned, err) == (143, "petseg: terminated\n")
    assert {event["event"] for event in told + more} == {"result"}
    assert {name.rpartition(".")[2] for name in tree(tmp_path / "out") if name != JOURNAL} == {"png"}


#: A live source that works on every machine.
CAMERA = "lavfi:testsrc=size=64x48:rate=50,realtime"


@pytest.mark.parametrize(
    ("live", "number", "code"), [(True, signal.SIGINT, 130), (False, signal.SIGINT, 130), (False, signal.SIGTERM, 143)]
)
def test_a_second_signal_exits_immediately_with_blocked_output(
    tmp_path: Path, clips: Path, start: Callable[..., Command], live: bool, number: int, code: int
) -> None:
    source = CAMERA if live else clips / "long.mp4"
    process = start(source, "--as", "overlay", "--output", tmp_path, "--json").process
    assert process.stdout
    fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
    wait_until_full(process.stdout.fileno())
    process.send_signal(number)
    time.sleep(1)
    process.send_signal(number)
    assert process.wait(10) == code
    assert process.stderr
    assert process.stderr.read() == ""
    assert tree(tmp_path) == (["lavfi/0001.mp4"] if live else [])


def wait_until_full(pipe: int) -> None:
    """Waits until a pipe of one page is nearly full, and nothing more arrives."""
    before, end = -1, time.monotonic() + 60
    while (
        held := int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)
    ) != before or held < 3000:
        assert time.monotonic() < end
        before = held
        time.sleep(0.5)


#: SIGTERM comes twice, as `timeout` sends it, at the fifth frame.
TWICE = """
import signal
from petseg.cli import main
from petseg_runtime.cli.infer_video import Videos

tell = Videos._print_frame

def interrupted(self, origin, segmented):
    tell(self, origin, segmented)
    if segmented.frame.number == 4:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)

Videos._print_frame = interrupted
main()
"""


def test_a_duplicate_signal_counts_once(tmp_path: Path, clips: Path, model: str) -> None:
    words = ["infer", str(clips / "long.mp4"), "--as", "overlay", "--output", str(tmp_path), "--model", model, "--json"]
    done = subprocess.run([sys.executable, "-c", TWICE, *words], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (143, "")
    *_, video, summary = events(done.stdout)
    assert summary["videos"]["stopped"] == 1
    assert frames_in(tmp_path / "long.mp4") == video["written"] >= 5


def test_a_stopped_file_is_not_done_and_the_next_is_not_begun(
    tmp_path: Path, clips: Path, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(videos: infer_video.Videos, origin: Origin, segmented: Segmented) -> None:
        if segmented.frame.number == 4:
            signal.raise_signal(signal.SIGTERM)

    options = [clips / "long.mp4", clips / "short.mp4", "--as", "lines", "--output", tmp_path, "--model", model]
    with monkeypatch.context() as patch:
        patch.setattr(infer_video.Videos, "_print_frame", interrupted)
        assert infer(*options) == 143
    (line,) = capsys.readouterr().out.splitlines()
    assert re.match(rf"{re.escape(str(clips / 'long.mp4'))} -> .*  stopped, \d+ frames", line)
    assert tree(tmp_path) == [JOURNAL, "long.ndjson"]
    assert infer(*options, "--resume") == 0
    assert tree(tmp_path) == [JOURNAL, "long.ndjson", "short.ndjson"]
    assert len((tmp_path / "long.ndjson").read_text().splitlines()) == 500


def test_a_killed_run_is_resumed(
    tmp_path: Path, clips: Path, model: str, start: Callable[..., Command], capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in", tmp_path / "out"
    for name, clip in {"a/one.mp4": "short.mp4", "b/two.mp4": "long.mp4", "b/three.mp4": "short.mp4"}.items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(clips / clip, source / name)
    Image.fromarray(picture(0)).save(source / "photo.png")
    command = start(source, "--as", "mask", "--output", out, "--json")
    assert command.process.stdout
    for line in command.process.stdout:
        event = json.loads(line)
        if event["event"] == "frame" and event["input"].endswith("two.mp4"):
            break
    command.process.kill()
    command.process.wait()
    done = tree(out)
    assert "b/two.mp4" not in done
    assert {"a/one.mp4", "b/three.mp4", "photo.png"} < set(done)
    assert any(".part" in name for name in done)
    before = (out / "a" / "one.mp4").stat().st_mtime_ns
    options = ("--as", "mask", "--output", out, "--model", model, *IN_ONNXRUNTIME, "--json", "--resume")
    assert infer(source, *options) == 0
    summary = events(capsys.readouterr().out)[-1]
    assert (summary["done"], summary["skipped"]) == (0, 1)
    assert summary["videos"] == {"count": 3, "done": 1, "failed": 0, "stopped": 0, "skipped": 2}
    assert tree(out) == [JOURNAL, "a/one.mp4", "b/three.mp4", "b/two.mp4", "photo.png"]
    assert (out / "a" / "one.mp4").stat().st_mtime_ns == before
    assert [frames_in(out / name) for name in ("a/one.mp4", "b/two.mp4", "b/three.mp4")] == [20, 500, 20]


def test_a_deleted_picture_folder_is_recreated(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--as", "mask", "--format", "png", "--output", tmp_path, "--model", model, "--json", "--resume"]
    for expected in ("done", "skipped", "done"):
        assert infer(clips / "short.mp4", *options) == 0
        assert events(capsys.readouterr().out)[-1]["videos"][expected] == 1
        assert tree(tmp_path / "short") == [f"{number:06d}.png" for number in range(20)]
        if expected == "skipped":
            shutil.rmtree(tmp_path / "short")


def test_a_shorter_run_removes_pictures_of_a_longer_one(tmp_path: Path, clips: Path, model: str) -> None:
    options = ["--as", "mask", "--format", "png", "--output", tmp_path, "--model", model]
    assert infer(clips / "short.mp4", *options) == 0
    (tmp_path / "short" / "notes.txt").write_text("mine")
    assert infer(clips / "short.mp4", *options, "--max-frames", 3) == 0
    assert tree(tmp_path / "short") == ["000000.png", "000001.png", "000002.png", "notes.txt"]


@pytest.mark.parametrize("options", [["--as", "mask", "--format", "png"], ["--as", "overlay", "--segment", 0.2]])
def test_foreign_numbered_files_are_never_touched(
    tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str], options: list[Any]
) -> None:
    (tmp_path / "short").mkdir()
    mine = [f"000{n}.mp4" for n in (1, 2, 9)] + ["000000.png", "000009.png", "003.png", "20240512.png"]
    for name in mine:
        (tmp_path / "short" / name).write_text("mine")
    assert infer(clips / "short.mp4", *options, "--output", tmp_path, "--model", "none.onnx") == 6
    assert "holds files that petseg did not write" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in (tmp_path / "short").iterdir()} == dict.fromkeys(mine, "mine")


def test_other_numbered_files_in_a_petseg_folder_stay(tmp_path: Path, clips: Path, model: str) -> None:
    options = ["--as", "mask", "--format", "png", "--output", tmp_path, "--model", model]
    assert infer(clips / "short.mp4", *options) == 0
    for name in ("999.png", "20240512.png"):
        (tmp_path / "short" / name).write_text("mine")
    assert infer(clips / "short.mp4", *options, "--max-frames", 1) == 0
    assert tree(tmp_path / "short") == ["000000.png", "20240512.png", "999.png"]


def test_numbered_files_are_never_written_among_the_sources(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--as", "mask", "--format", "png", "--output", tmp_path, "--model", model]
    assert infer(clips / "short.mp4", *options) == 0  # so that the folder is marked as petseg's
    photos = {path: path.read_bytes() for path in (tmp_path / "short").glob("*.png")}
    assert infer(clips / "short.mp4", tmp_path / "short", *options, "--max-frames", 3) == 6
    assert "would mix with sources such as" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (tmp_path / "short").glob("*.png")} == photos


def test_segments_of_a_longer_run_are_removed(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--as", "mask", "--output", tmp_path, "--model", model, "--segment"]
    assert infer(clips / "short.mp4", *options, 0.2) == 0
    assert f" -> {tmp_path / 'short' / '0001.mp4'} and 3 more  20 frames, " in capsys.readouterr().out
    assert tree(tmp_path / "short") == ["0001.mp4", "0002.mp4", "0003.mp4", "0004.mp4"]
    assert infer(clips / "short.mp4", *options, 0.4) == 0
    assert f" -> {tmp_path / 'short' / '0001.mp4'} and 1 more  20 frames, " in capsys.readouterr().out
    assert tree(tmp_path / "short") == ["0001.mp4", "0002.mp4"]
    assert [frames_in(tmp_path / "short" / f"000{n}.mp4") for n in (1, 2)] == [10, 10]


# ---------------------------------------------------------------------------------------------- full disks


def assert_full(command: Command, out: Path, name: str) -> None:
    _, err, code = command.end()
    assert code == 6
    # The disk of the engine's cache is full, too, which causes a note.
    last = err.splitlines()[-1]
    assert re.fullmatch(rf"petseg: {re.escape(str(out / name))}: cannot be written \(File too large\)", last)


@pytest.mark.parametrize(
    ("kind", "name", "room"),
    [("overlay", "long.mp4", 20000), ("overlay", "long.mp4", 0), ("lines", "long.ndjson", 20000)],
)
def test_a_full_disk_exits_with_6_and_leaves_no_partial_file(
    tmp_path: Path, clips: Path, start: Callable[..., Command], kind: str, name: str, room: int
) -> None:
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    options = ["--as", kind, "--output", tmp_path / "out"]
    assert_full(start(clips / "long.mp4", *options, preexec_fn=limit, env=environment), tmp_path / "out", name)
    assert tree(tmp_path / "out") == []
    assert (tmp_path / "out").is_dir(), "it had started"


def test_a_disk_filling_up_keeps_complete_pictures(
    tmp_path: Path, clips: Path, model: str, start: Callable[..., Command]
) -> None:
    options = [clips / "short.mp4", "--as", "cutout", "--format", "png", "--output"]
    assert infer(*options, tmp_path / "all", "--model", model) == 0
    sizes = {path: (tmp_path / "all" / path).stat().st_size for path in tree(tmp_path / "all")}
    room = next(iter(sizes.values()))
    whole = list(itertools.takewhile(lambda path: sizes[path] <= room, sizes))
    assert 0 < len(whole) < len(sizes), "one of them is larger than the first"

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))

    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    out = tmp_path / "out"
    assert_full(start(*options, out, preexec_fn=limit, env=environment), out, list(sizes)[len(whole)])
    assert tree(out) == whole


def test_an_unwritable_folder_exits_with_6(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert infer(clips / "short.mp4", "--output", tmp_path / "file" / "out", "--model", model) == 6
    assert "cannot be written" in capsys.readouterr().err


def test_a_file_as_output_for_several_videos_exits_with_6(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    both = [shutil.copy(clips / "short.mp4", tmp_path / name) for name in ("a.mp4", "b.mp4")]
    for output in (tmp_path / "file", tmp_path / "file" / "out"):
        assert infer(*both, "--as", "mask", "--output", output, "--model", model) == 6
        assert f"petseg: {output}: cannot be written to (" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- pipes


def test_raw_frames_on_a_pipe_match_the_pictures(
    tmp_path: Path, clips: Path, model: str, start: Callable[..., Command]
) -> None:
    for kind, channels in (("mask", ()), ("overlay", (3,)), ("cutout", (4,))):
        command = start(clips / "short.mp4", "--as", kind, "--output", "-", text=False)
        out, err = command.process.communicate(timeout=60)
        assert command.process.returncode == 0
        frames = np.frombuffer(out, np.uint8).reshape(20, HEIGHT, WIDTH, *channels)  # type: ignore[call-overload]
        assert infer(clips / "short.mp4", "--as", kind, "--format", "png", "--output", tmp_path, "--model", model) == 0
        for number, frame in enumerate(frames):
            with Image.open(tmp_path / "short" / f"{number:06d}.png") as saved:
                np.testing.assert_array_equal(np.asarray(saved), frame)
        assert b"20 frames" in err  # type: ignore[operator]


def test_a_video_is_piped_through_stdin_and_stdout(tmp_path: Path, clips: Path, start: Callable[..., Command]) -> None:
    with (clips / "whole.ts").open("rb") as source:
        out, _ = start("-", "--as", "mask", "-q", stdin=source, text=False).process.communicate(timeout=60)
    assert len(out) == 100 * HEIGHT * WIDTH
    raw = np.stack([picture(number) for number in range(7)]).tobytes()
    command = start("-", "--raw", f"{WIDTH}x{HEIGHT}@25", "--as", "mask", stdin=subprocess.PIPE, text=False)
    out, _ = command.process.communicate(raw, timeout=60)  # type: ignore[arg-type]
    masks = np.frombuffer(out, np.uint8).reshape(7, HEIGHT, WIDTH)  # type: ignore[call-overload]
    np.testing.assert_array_equal(masks[3], np.where(picture(3)[..., 0] > 128, 255, 0))


@pytest.mark.parametrize("source", ["long.mp4", "lavfi:testsrc=size=64x48:rate=25"])
def test_a_broken_pipe_is_not_reported_as_an_error(clips: Path, start: Callable[..., Command], source: str) -> None:
    given = source if ":" in source else clips / source
    process = start(given, "--as", "overlay", "--output", "-", text=False).process
    assert process.stdout
    assert process.stderr
    process.stdout.read(1000)
    process.stdout.close()
    process.wait(timeout=60)
    said = process.stderr.read()
    assert b"Traceback" not in said
    assert b"Broken" not in said
    assert process.returncode == 1


# ------------------------------------------------------------------------------------- reports and events


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux lists the threads of a process")
@pytest.mark.parametrize("kind", ["overlay", "cutout"])
def test_one_thread_means_one_per_concurrent_step(
    tmp_path: Path, clips: Path, model: str, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Python's threads: the decoder's, the engine's, and the writer's. FFmpeg and the engine start none."""

    def foreign() -> int:
        return len(list(Path("/proc/self/task").iterdir())) - threading.active_count()

    def write(sink: Any, frame: Any, result: Any) -> None:
        real(sink, frame, result)
        seen.append(foreign())

    real, seen = movie.MovieSink.write, list[int]()
    monkeypatch.setattr(movie.MovieSink, "write", write)
    # Not in the results' pixel format, so that frames are converted for them, too.
    clip = write_clip(tmp_path / "clip.mp4", 40, sound=None, size=(480, 640), pixels="yuv444p")
    for number, threads in enumerate((4, 1)):
        before = foreign()
        options = ["--as", kind, "--output", tmp_path / f"{number}", "--model", model, "--threads", threads]
        assert infer(clip, *options, "--backend", "onnxruntime", "-q") == 0
        assert (max(seen) > before) == (threads > 1)
        seen.clear()


def test_json_lines_are_written_to_a_file(tmp_path: Path, clips: Path, model: str) -> None:
    assert infer(clips / "short.mp4", "--as", "lines", "--output", tmp_path, "--model", model) == 0
    lines = [json.loads(line) for line in (tmp_path / "short.ndjson").read_text().splitlines()]
    assert infer(clips / "short.mp4", "--as", "mask", "--format", "png", "--output", tmp_path, "--model", model) == 0
    for number, line in enumerate(lines):
        with Image.open(tmp_path / "short" / f"{number:06d}.png") as saved:
            rows, columns = np.nonzero(np.asarray(saved))
        box = [columns.min(), rows.min(), np.ptp(columns) + 1, np.ptp(rows) + 1]
        assert line == {
            "number": number,
            "time": number / 25,
            "height": HEIGHT,
            "width": WIDTH,
            "coverage": round(len(rows) / HEIGHT / WIDTH, 6),
            "found": True,
            "box": box,
        }
    assert len(lines) == 20
    assert len({line["box"][0] for line in lines}) > 10, "the pet moves"


def test_events_of_a_stream_account_for_every_frame(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Slow(Stream):
        """Takes no frame until some have been dropped."""

        def __iter__(self) -> Iterator[Segmented]:
            while not self.counts.dropped and self.counts.decoded < 30:
                time.sleep(0.01)
            return super().__iter__()

    monkeypatch.setattr(run_module, "Stream", Slow)
    options = ["--as", "mask", "--output", tmp_path, "--json", "--max-frames", 30, "--policy", "latest"]
    assert infer("lavfi:testsrc=size=64x48:rate=100,realtime", *options, "--model", model) == 0
    told = events(capsys.readouterr().out)
    kinds = {event["event"] for event in told}
    assert kinds == {"state", "frame", "video", "summary"}
    video = next(event for event in told if event["event"] == "video")
    states = [event for event in told if event["event"] == "state"]
    assert [(event["state"], event["attempt"]) for event in states] == [("connecting", 1), ("live", 1), ("ended", 1)]
    assert all(None not in event.values() for event in states)
    assert (video["frames"]["decoded"], video["frames"]["failed"]) == (30, 0)
    assert video["frames"]["dropped"] == 30 - video["written"] > 0
    frames = [event for event in told if event["event"] == "frame"]
    numbers = [event["number"] for event in frames]
    assert len(numbers) == video["written"]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == 29, "the newest frame is never dropped"
    assert all(event["latency"] >= 0 for event in frames)
    (file,) = video["paths"]
    assert frames_in(Path(file)) == video["written"]


def test_statistics_come_at_intervals(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer_video, "_STATISTICS", 0.3)
    options = ["--as", "lines", "--output", tmp_path, "--model", model, "--json", "--max-frames", 30]
    assert infer("lavfi:testsrc=size=64x48:rate=25,realtime", *options) == 0
    told = events(capsys.readouterr().out)
    seconds = [event["seconds"] for event in told if event["event"] == "statistics"]
    assert len(seconds) >= 2
    assert all(later - earlier > 0.29 for earlier, later in itertools.pairwise(seconds))


def test_sources_displayed_alike_have_separate_names_and_statistics(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(infer_video, "_STATISTICS", 0.0)
    monkeypatch.setattr(run_module, "_SUMMING_UP", 0.0)
    sources = [f"lavfi:testsrc=size={size}:rate=25" for size in ("64x48", "80x60", "96x72")]
    monkeypatch.setattr(
        "petseg_runtime.sources.stream_origin",
        lambda text, options: dataclasses.replace(stream_origin(text, options), shown="rtsp://cam/live?***"),
    )
    options = ["--as", "mask", "--output", tmp_path, "--model", model, "--json", "--max-frames", 30, "--segment", 0.4]
    assert infer(*sources, *options) == 0
    told = events(capsys.readouterr().out)[:-1]
    assert {event["input"] for event in told} == {"rtsp://cam/live?***"}
    by_name = {event["name"]: event for event in told if event["event"] == "video"}
    assert set(by_name) == {"lavfi", "lavfi-2", "lavfi-3"}
    for name, video in by_name.items():
        own = [event for event in told if event["name"] == name]
        kinds = collections.Counter(event["event"] for event in own)
        assert kinds.pop("statistics") >= video["written"]  # more if the start takes long
        assert kinds == {"state": 3, "frame": video["written"], "video": 1}
        assert {event["width"] for event in own if event["event"] == "frame"} == {
            WIDTH + 16 * sorted(by_name).index(name)
        }
        assert {Path(path).parent.name for path in video["paths"]} == {name}
        assert len(video["paths"]) == video["files"]
        last = [event for event in own if event["event"] == "statistics"][-1]
        assert "paths" not in last
        assert (last["files"], last["newest"]) == (video["files"], video["paths"][-1])
        assert last["connections"] == 1
        assert set(last["steps"]) == set(video["steps"])
        assert 0 < last["steps"]["write"]["sum"] <= video["steps"]["write"]["sum"]


def test_text_output_has_a_line_per_video_and_a_count(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    for name in ("a.mp4", "b.mp4"):
        write_clip(source / name, 5)
    options = ["--as", "mask", "--output", tmp_path / "out", "--model", model]
    assert infer(source, *options) == 0
    shown = capsys.readouterr()
    *lines, count = shown.out.splitlines()
    for name, line in zip("ab", lines, strict=True):
        place = re.escape(f"{source / name}.mp4 -> {tmp_path / 'out' / name}.mp4")
        assert re.fullmatch(place + r"  5 frames, 100 % with a pet, [\d.]+ frames/s", line)
    assert count == "2 videos: 2 done"
    assert shown.err == ""
    assert infer(source, *options, "-q") == 0
    assert capsys.readouterr() == ("", "")
    assert infer(source, *options, "-v") == 0
    assert {"decode:", "convert:", "infer:", "write:", "latency:"} <= set(capsys.readouterr().err.split())
    (tmp_path / "out" / "b.mp4").unlink()
    assert infer(source, *options, "--resume") == 0
    _, count = capsys.readouterr().out.splitlines()
    assert count == "2 videos: 1 done, 1 already there"


def test_the_states_of_a_stream_and_notes_about_a_video_are_printed_unless_quiet(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    stream, clip = "lavfi:testsrc=size=64x48:rate=25", clips / "short.mp4"
    for source, printed in (
        (stream, [f"{stream}: connecting", f"{stream}: live, 64 x 48", f"{stream}: ended (frame limit reached)"]),
        (clip, [f"{clip}: the audio (aac) is re-encoded as opus"]),
    ):
        options = [source, "--as", "cutout", "--output", tmp_path, "--model", model, "--max-frames", 3]
        assert infer(*options) == 0
        assert capsys.readouterr().err.splitlines() == [f"petseg: {line}" for line in printed]
        assert infer(*options, "-q") == 0
        assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("options", [[], ["--max-frames", "30"]])
def test_a_terminal_shows_a_bar_with_a_percentage(
    tmp_path: Path, clips: Path, start: Callable[..., Command], options: list[str]
) -> None:
    terminal, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    process = start(
        clips / "long.mp4", "--as", "mask", "--output", tmp_path, *options, stderr=theirs, env=environment
    ).process
    os.close(theirs)
    seen = shown_on(terminal)
    assert process.wait(timeout=60) == 0
    text = seen.decode(errors="replace")
    assert re.search(r"\d+%", text)
    assert "long.mp4" in text
    assert re.search(r"\d+ frames", text)


def test_with_a_bar_every_event_still_goes_to_stdout(
    tmp_path: Path, clips: Path, start: Callable[..., Command]
) -> None:
    terminal, theirs = pty.openpty()
    told = tmp_path / "told.ndjson"
    with told.open("w") as file:
        options = ("--as", "mask", "--output", tmp_path / "out", "--json")
        process = start(clips / "short.mp4", *options, stdout=file, stderr=theirs).process
    os.close(theirs)
    seen = shown_on(terminal)
    assert process.wait(timeout=60) == 0
    assert b"short.mp4" in seen
    assert b"{" not in seen
    assert [event["event"] for event in events(told.read_text())] == ["frame"] * 20 + ["video", "summary"]


def test_a_closed_stderr_does_not_stop_the_run(tmp_path: Path, clips: Path, model: str) -> None:
    words = ["infer", clips / "short.mp4", "--as", "mask", "--output", tmp_path, "--model", model]
    shell = ["sh", "-c", 'exec "$@" 2>&-', "sh", sys.executable, "-m", "petseg.cli", *map(str, words)]
    assert subprocess.run(shell, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=100).returncode == 0
    assert tree(tmp_path) == ["short.mp4"]


# ------------------------------------------------------------------------------------------- conflicting options


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["{photo}", "--start", "1"], 2, "--start is for videos and streams, and none was given"),
        (["{photo}", "--no-audio"], 2, "--no-audio is for videos and streams, and none was given"),
        (["{photo}", "--policy", "block"], 2, "--policy is for videos and streams, and none was given"),
        (["{photo}", "--as", "lines"], 2, "--as lines is for videos; for photos, --json prints the same"),
        (["{photo}", "--input-option", "a=b"], 2, "--input-option is for cameras, streams and other URLs"),
        (["{clip}", "--input-option", "a=b"], 2, "--input-option is for cameras, streams and other URLs"),
        (["{clip}", "--input-option", "ab"], 2, "expected NAME=VALUE"),
        (["{clip}", "--input-option", "=b"], 2, "expected NAME=VALUE"),
        (["{clip}", "--stall", "3"], 2, "--stall is for cameras, streams and other URLs"),
        (["{clip}", "--give-up", "3"], 2, "--give-up is for cameras and streams, and none was given"),
        (["lavfi:testsrc", "--start", "3"], 2, "--start is for sources that have an end, and none was given"),
        (["lavfi:testsrc", "--resume"], 2, "--resume is for files"),
        (["lavfi:testsrc", "{clip}"], 2, "live sources run until they are stopped"),
        (["lavfi:testsrc", "{photo}"], 2, "live sources run until they are stopped"),
        (["{clip}", "--raw", "64x48@25"], 2, "give - as a source, once"),
        (["-", "-", "--raw", "64x48@25"], 2, "give - as a source, once"),
        (["-", "--raw", "64x48"], 2, "WIDTHxHEIGHT@RATE is expected"),
        (["-", "--raw", "64x48@25", "--stall", "3"], 2, "--stall is for cameras, streams and other URLs"),
        (["{clip}", "--only-found"], 2, "clip.mp4: --only-found is for photos\n"),
        (["{clip}", "--as", "mask", "--fast-decode"], 2, "--fast-decode is for photos"),
        (
            ["{photo}", "{clip}", "--only-found"],
            2,
            "clip.mp4: --only-found is for photos; process videos and streams in another run\n",
        ),
        (["{clip}", "--as", "coco-rle"], 2, "clip.mp4: --as coco-rle is for photos; for videos, choose one of: mask, "),
        (["{clip}", "--as", "mask", "--format", "webm"], 2, "choose one of: mp4, png"),
        (["{clip}", "--as", "cutout", "--format", "mp4"], 2, "choose one of: webm, png, webp"),
        (
            ["{clip}", "--as", "mask", "--format", "png", "--segment", "2"],
            2,
            "--segment is for movies (mp4, webm) and lines, not png",
        ),
        (
            ["{clip}", "--as", "mask", "--format", "png", "--no-audio"],
            2,
            "--no-audio is for movies (mp4, webm); png has no sound anyway",
        ),
        (["{clip}", "--as", "lines", "--no-audio"], 2, "ndjson has no sound anyway"),
        (["{clip}", "--as", "lines", "--background", "red"], 2, "--background is for pictures; --as lines has none"),
        (["{clip}", "--as", "lines", "--format", "png"], 2, "--format is for pictures and movies; --as lines has none"),
        (["{clip}", "--as", "background"], 2, "--background COLOUR or FILE and --as background belong together"),
        (["{clip}", "--background", "chartruse"], 1, "neither a colour"),
        (["{clip}", "--background", "{clip}"], 1, "clip.mp4: "),
        (["{clip}", "--smooth", "1"], 2, "--smooth"),
        (["{clip}", "--stride", "0"], 2, "--stride"),
        (["http://127.0.0.1:9/clip.mp4", "--resume"], 2, "127.0.0.1:9/clip.mp4: --resume is for files; a video on"),
        (["-", "--raw", "16x16@5", "--resume"], 2, "--resume is for files; a video on standard input"),
        (["{clip}", "--as", "mask", "--output", "-", "--format", "mp4"], 2, "give a folder with --output"),
        (["{clip}", "--as", "lines", "--output", "-"], 2, "give a folder with --output"),
        (["{clip}", "--output", "-", "--json"], 2, "give a folder with --output"),
        (["{clip}", "{clip}", "--output", "-"], 2, "standard output takes one result only"),
        (["{photo}", "{clip}", "--output", "-"], 2, "standard output takes one result only"),
    ],
)
def test_conflicting_options_are_rejected_before_loading_anything(
    tmp_path: Path, clips: Path, capsys: pytest.CaptureFixture[str], options: list[str], code: int, said: str
) -> None:
    places = {"photo": tmp_path / "photo.png", "clip": clips / "short.mp4"}
    places["clip"] = Path(shutil.copy(clips / "short.mp4", tmp_path / "clip.mp4"))
    Image.fromarray(picture(0)).save(places["photo"])
    given = [option.format(**places) for option in options]
    output = [] if "--output" in options else ["--output", str(tmp_path / "out")]
    assert infer(*given, *output, "--model", tmp_path / "none.onnx") == code
    out, err = capsys.readouterr()
    assert said in err
    assert "none.onnx" not in err
    assert out == ""
    assert not (tmp_path / "out").exists()


def test_every_option_of_videos_reaches_the_run(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(videos: infer_video.Videos, origins: list[Origin], *_: object) -> None:
        started.append((videos.reading, videos.output.segment, videos.output.audio, videos.verbose))
        passed.append(origins[0].options)

    started: list[tuple[Reading, float | None, bool, bool]] = []
    passed: list[Any] = []
    monkeypatch.setattr(infer_video.Videos, "run", run)
    options = ["--as", "mask", "--output", tmp_path, "--model", model]
    given = ["--start", 1, "--stride", 2, "--max-frames", 3, "--policy", "latest", "--stall", 4, "--smooth", 0.5]
    reading = Reading(start=1, stride=2, max_frames=3, policy="latest", stall=4, smooth=0.5)
    file = "http://127.0.0.1:9/clip.mp4?token=[a]"  # on a server: it has an end, and FFmpeg opens it
    assert infer(file, *options) == 0
    assert infer("lavfi:testsrc", *options, "--give-up", 6) == 0
    assert tree(tmp_path) == [], "an address is no pattern, whose results would need a journal"
    given += ["--segment", 5, "--no-audio", "-v", "--input-option", "headers=a=b"]
    assert infer(file, *options, *given) == 0
    defaults = [(Reading(patience=patience), None, True, False) for patience in (None, 6)]
    assert started == [*defaults, (reading, 5, False, True)]
    assert passed[2] == {"headers": "a=b"}
    assert infer(file, *options, "--give-up", 6) == 2
    assert "--give-up is for cameras and streams, and none was given" in capsys.readouterr().err


def test_a_video_that_is_no_file_is_not_resumed_and_a_note_says_so(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, server = shutil.copy(clips / "short.mp4", tmp_path / "clip.mkv"), "http://127.0.0.1:9/clip.mp4"
    options = ["--as", "lines", "--model", model, "--output", tmp_path / "out", "--resume"]
    for more in ([], ["-q"]):
        assert infer(clip, server, *options, *more) == 3
        note = f"petseg: {server}: not a file, so --resume processes it from the start"
        assert (note in capsys.readouterr().err.splitlines()) == (not more)


def test_a_start_beyond_the_end_is_reported(
    tmp_path: Path, clips: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert infer(clips / "short.mp4", "--start", 100, "--output", out, "--model", model) == 1
    assert "it ends before 100 s" in capsys.readouterr().err
    assert not out.exists()


def test_a_start_at_the_beginning_skips_nothing(tmp_path: Path, clips: Path, model: str) -> None:
    pictures = ("--as", "mask", "--format", "png", "--model", model)
    assert infer(clips / "short.mp4", "--start", 0, "--output", tmp_path / "from", *pictures) == 0
    assert infer(clips / "short.mp4", "--output", tmp_path / "whole", *pictures) == 0
    assert tree(tmp_path / "from") == tree(tmp_path / "whole") != []


def test_photos_need_no_video_library(tmp_path: Path, model: str) -> None:
    Image.fromarray(picture(0)).save(tmp_path / "photo.png")
    code = (
        "import sys; from petseg.cli import run\n"
        f"code = run(['infer', {str(tmp_path / 'photo.png')!r}, '--as', 'mask', '--output', {str(tmp_path / 'o')!r}, "
        f"'--model', {model!r}])\n"
        "assert code == 0; assert 'av' not in sys.modules; assert 'rich' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, capture_output=True)


# --------------------------------------------------------------------------------------------- live sources that fail


def test_a_streams_json_lines_are_segmented_with_continued_numbers(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--as", "lines", "--output", tmp_path, "--model", model, "--segment", 1, "--policy", "block", "--json"]
    for run_number in (1, 2):
        # The brackets make no pattern of it, and so no search, whose results would need a journal.
        assert infer("lavfi:testsrc=size=64x48:rate=25[out0]", *options, "--max-frames", 60) == 0
        video = events(capsys.readouterr().out)[-2]
        assert (video["event"], video["files"]) == ("video", 3)
        assert tree(tmp_path) == [f"lavfi/{number:04d}.ndjson" for number in range(1, 3 * run_number + 1)]
    sizes = [len(path.read_text().splitlines()) for path in sorted((tmp_path / "lavfi").iterdir())]
    assert sizes == [25, 25, 10] * 2


def test_a_streams_pictures_go_into_a_new_folder_each_time(tmp_path: Path, model: str) -> None:
    options = ["--as", "mask", "--format", "png", "--output", tmp_path, "--model", model, "--max-frames", 2, "-q"]
    for _ in range(2):
        assert infer("lavfi:testsrc=size=64x48:rate=25", *options) == 0
    assert tree(tmp_path) == [f"lavfi/000{folder}/00000{number}.png" for folder in (1, 2) for number in (0, 1)]


def test_a_videos_json_lines_can_be_segmented(tmp_path: Path, clips: Path, model: str) -> None:
    options = ["--as", "lines", "--output", tmp_path, "--model", model, "--segment"]
    assert infer(clips / "short.mp4", *options, 0.2) == 0
    assert tree(tmp_path / "short") == [f"000{number}.ndjson" for number in range(1, 5)]
    assert infer(clips / "short.mp4", *options, 0.4) == 0
    assert tree(tmp_path / "short") == ["0001.ndjson", "0002.ndjson"]


@needs_ffmpeg
def test_a_streams_segments_continue_numbering_and_replace_nothing(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--as", "mask", "--output", tmp_path, "--model", model, "--segment", 1, "--policy", "block"]
    for run_number in (1, 2):
        assert infer("lavfi:testsrc=size=64x48:rate=25", *options, "--max-frames", 60) == 0
        capsys.readouterr()
        assert tree(tmp_path / "lavfi") == [f"{number:04d}.mp4" for number in range(1, 3 * run_number + 1)]
    for number, frames in enumerate([25, 25, 10] * 2, start=1):
        path = tmp_path / "lavfi" / f"{number:04d}.mp4"
        told = subprocess.check_output(["ffprobe", "-v", "error", "-show_format", "-of", "json", str(path)])
        about = json.loads(told)["format"]
        assert float(about["start_time"]) == 0
        assert float(about["duration"]) == pytest.approx(frames / 25, abs=0.05)
        assert frames_in(path) == frames


def test_a_live_source_with_a_failing_output_is_reported_immediately_and_others_continue(
    tmp_path: Path, start: Callable[..., Command]
) -> None:
    """The output folder of the second source is a file; the first continues until it is stopped."""
    (tmp_path / "lavfi-2").touch()
    sources = ["lavfi:testsrc=size=64x48:rate=50,realtime"] * 2
    command = start(*sources, "--as", "mask", "--output", tmp_path, "--json", "--policy", "block")
    told: list[dict[str, Any]] = []
    while sum(event["event"] == "frame" for event in told) < 20:
        told += command.lines(1)
    (video,) = (event for event in told if event["event"] == "video")
    assert video["name"] == "lavfi-2"
    assert video["error"] == f"{sources[0]}: {tmp_path / 'lavfi-2'}: cannot be written (Not a directory)"
    assert video["connections"] == 1
    assert video["frames"]["decoded"] >= 1
    command.process.send_signal(signal.SIGINT)
    more, err, code = command.end()
    assert code == OutputError.exit_code  # and not 130, which would hide it
    assert err == f"petseg: {video['error']}\n"
    assert more[-1]["videos"] == {"count": 2, "done": 0, "failed": 1, "stopped": 1, "skipped": 0}


@pytest.mark.parametrize(
    ("failing", "reason"),
    [
        ("lavfi:testsrc=size=16400x16:rate=5,realtime", "cannot be written"),  # H.264 allows 16384 at most
        ("http://127.0.0.1:9/live.ts", "no frame for 2 s"),
    ],
    ids=["refused", "given up"],
)
def test_a_live_sources_failure_outweighs_the_signal_exit_code(
    tmp_path: Path, start: Callable[..., Command], failing: str, reason: str
) -> None:
    good = "lavfi:testsrc=size=64x48:rate=25,realtime"
    command = start(good, failing, "--as", "mask", "--output", tmp_path, "--json", "--give-up", 2)
    told = command.lines(1)
    while told[-1]["event"] != "video":
        told += command.lines(1)
    assert told[-1]["input"] == failing
    assert reason in told[-1]["error"]
    command.process.send_signal(signal.SIGTERM)
    more, _, code = command.end()
    assert more[-1]["videos"] == {"count": 2, "done": 0, "failed": 1, "stopped": 1, "skipped": 0}
    assert code == EXIT_PARTIAL


@pytest.mark.parametrize("opens", [True, False])
def test_a_live_source_whose_end_cannot_be_reported_is_counted_once(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, opens: bool
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise InputError("no such camera")

    def tell_end(*about: Any) -> None:
        monkeypatch.setattr(infer_video.Videos, "_print_end", real)
        raise LookupError("nobody there")

    real = infer_video.Videos._print_end
    monkeypatch.setattr(infer_video.Videos, "_print_end", tell_end)
    if not opens:
        monkeypatch.setattr(run_module, "open_frames", refuse)
    options = ["--as", "mask", "--output", tmp_path, "--model", model, "--json", "--max-frames", 3]
    with pytest.raises(LookupError, match="nobody there"):
        infer("lavfi:testsrc=size=64x48:rate=25", *options)
    (summary,) = (event for event in events(capsys.readouterr().out) if event["event"] == "summary")
    assert summary["videos"] == {"count": 1, "done": 0, "failed": 1, "stopped": 0, "skipped": 0}


@pytest.mark.parametrize("policy", ["block", "latest"])
def test_a_live_source_that_fails_midway_reports_what_was_written(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    def write(sink: Any, frame: Any, result: Any) -> None:
        if len(written) == 5 and frame.picture.width == WIDTH:
            raise OutputError("the disk is full")
        written.extend([frame.number] * (frame.picture.width == WIDTH))
        real(sink, frame, result)

    real = movie.MovieSink.write
    written: list[int] = []
    monkeypatch.setattr(movie.MovieSink, "write", write)
    sources = [f"lavfi:testsrc=size={size}:rate=25,realtime" for size in ("64x48", "80x60")]
    options = ["--as", "mask", "--output", tmp_path, "--model", model, "--json", "--max-frames", 30]
    assert infer(*sources, *options, "--policy", policy) == OutputError.exit_code
    out, err = capsys.readouterr()
    *told, summary = events(out)
    assert err == f"petseg: {sources[0]}: the disk is full\n"
    own = [event for event in told if event["name"] == "lavfi" and event["event"] != "frame"]
    assert [event.get("state") for event in own] == ["connecting", "live", "ended", None]
    assert own[2]["reason"] == "the disk is full"
    assert (own[3]["error"], own[3]["written"], own[3]["connections"]) == (f"{sources[0]}: the disk is full", 5, 1)
    other = next(e for e in told if e["event"] == "video" and e["name"] == "lavfi-2")
    assert other["written"] + other["frames"]["dropped"] == 30
    assert summary["videos"] == {"count": 2, "done": 1, "failed": 1, "stopped": 0, "skipped": 0}


def test_an_internal_error_in_one_live_source_is_reported_immediately_and_raised_at_the_end(
    tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(movie.MovieSink, "write", lambda *_: {}["none"])
    options = ["--as", "mask", "--output", tmp_path, "--model", model, "--json", "--max-frames", 3]
    with pytest.raises(KeyError):
        infer("lavfi:testsrc=size=64x48:rate=25", *options)
    out, err = capsys.readouterr()
    assert "petseg: lavfi:testsrc=size=64x48:rate=25: KeyError: 'none'" in err
    assert events(out)[-1]["videos"]["failed"] == 1
