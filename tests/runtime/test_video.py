"""Frames come upright, in the right colours, at their exact times; what cannot be read is said in one line."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import ColorRange
from hypothesis import given
from hypothesis import strategies as st

from petseg_runtime import sources, video
from petseg_runtime.errors import InputError, UnreadableVideo, UnsupportedVideo
from petseg_runtime.sources import Replayed, _begins_a_video, from_pipe, raw_video, redacted
from petseg_runtime.video import Colours, Converter, Frame, VideoReader, _Clock

#: Red and blue weights of luma.
MATRICES = {"BT.601": (6, 0.299, 0.114), "BT.709": (1, 0.2126, 0.0722), "BT.2020": (9, 0.2627, 0.0593)}
COLOURS = [(250, 20, 30), (20, 200, 40), (30, 40, 230), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 180, 20)]


def to_yuv(rgb: tuple[int, int, int], weights: tuple[float, float], full: bool) -> tuple[int, int, int]:
    """By the definition (ITU-R BT.601, BT.709, BT.2020)."""
    red, green, blue = (value / 255 for value in rgb)
    of_red, of_blue = weights
    y = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    u, v = (blue - y) / (2 - 2 * of_blue), (red - y) / (2 - 2 * of_red)
    if full:
        return round(255 * y), round(128 + 255 * u), round(128 + 255 * v)
    return round(16 + 219 * y), round(128 + 224 * u), round(128 + 224 * v)


def flat(values: tuple[int, ...], pixels: str, height: int = 64, width: int = 96) -> av.VideoFrame:
    """A frame of one colour."""
    frame = av.VideoFrame(width, height, pixels)
    deep = "10le" in pixels
    for plane, value in zip(frame.planes, values, strict=True):
        samples = np.full(plane.buffer_size // (2 if deep else 1), value * (4 if deep else 1), "<u2" if deep else "u1")
        plane.update(samples.tobytes())
    return frame


@pytest.mark.parametrize("name", MATRICES)
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("pixels", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le"])
def test_colours_are_those_of_the_matrix_and_range(name: str, full: bool, pixels: str) -> None:
    tag, *weights = MATRICES[name]
    for rgb in COLOURS:
        frame = flat(to_yuv(rgb, tuple(weights), full), pixels)  # type: ignore[arg-type]
        frame.colorspace, frame.color_range = tag, ColorRange.JPEG if full else ColorRange.MPEG
        for size in ((64, 96), (16, 24)):
            pixel = Converter()(frame, *size).astype(int)
            assert np.abs(pixel - rgb).max() <= 3, (rgb, pixel[0, 0])


@pytest.mark.parametrize(("height", "name"), [(480, "BT.601"), (576, "BT.601"), (720, "BT.709")])
def test_a_video_that_names_no_matrix_has_that_of_its_size(height: int, name: str) -> None:
    _, *weights = MATRICES[name]
    frame = flat(to_yuv((250, 20, 30), tuple(weights), False), "yuv420p", height, 640)  # type: ignore[arg-type]
    assert np.abs(Converter()(frame, 16, 16).astype(int) - (250, 20, 30)).max() <= 3


def test_full_range_by_the_name_of_the_format() -> None:
    weights = MATRICES["BT.601"][1:]
    frame = flat(to_yuv((200, 180, 20), weights, True), "yuvj420p")
    assert Colours.of(frame).full_range
    assert np.abs(Converter()(frame, 16, 16).astype(int) - (200, 180, 20)).max() <= 3


@pytest.mark.parametrize("pixels", ["rgb24", "bgr24", "rgba", "gbrp", "gray", "gray10le", "pal8"])
def test_pictures_that_are_not_yuv(pixels: str) -> None:
    rgb = np.zeros((48, 64, 3), np.uint8)
    rgb[:, :32], rgb[:, 32:] = ((90, 90, 90), (200, 200, 200)) if "gray" in pixels else ((250, 20, 30), (30, 40, 230))
    frame = av.VideoFrame.from_ndarray(rgb).reformat(format="rgb8" if pixels == "pal8" else pixels)
    tolerance = 60 if pixels == "pal8" else 2
    assert np.abs(Converter()(frame, 48, 64).astype(int) - rgb).max() <= tolerance


def write(
    path: Path,
    count: int = 10,
    *,
    rate: Fraction = Fraction(25),
    first: int = 0,
    size: tuple[int, int] = (48, 64),
    codec: str = "libx264",
    **options: str,
) -> Path:
    """Frame n is grey, of brightness 20 + 2 n; in its left upper corner white."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=rate, options={"crf": "1", **options} if "264" in codec else options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(count):
            pixels = np.full((*size, 3), 20 + 2 * number, np.uint8)
            pixels[: size[0] // 3, : size[1] // 3] = 255
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = first + number, 1 / rate
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def read(path: Path, **options: Any) -> list[Frame]:
    with VideoReader(path, **options) as reader:
        return list(reader)


def brightness(frame: Frame) -> int:
    return int(np.median(frame.pixels(Converter())[..., 1]))


@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24000, 1001), Fraction(25), Fraction(60)])
@pytest.mark.parametrize("suffix", ["mp4", "avi", "mov"])
def test_times_are_exact(tmp_path: Path, rate: Fraction, suffix: str) -> None:
    frames = read(write(tmp_path / f"clip.{suffix}", rate=rate))
    assert [frame.pts * frame.time_base for frame in frames] == [n / rate for n in range(10)]
    assert [frame.number for frame in frames] == list(range(10))
    assert [brightness(frame) for frame in frames] == pytest.approx([20 + 2 * n for n in range(10)], abs=1)


def test_a_source_that_does_not_begin_at_nought_does_here(tmp_path: Path) -> None:
    frames = read(write(tmp_path / "clip.ts", first=100, codec="mpeg2video"))
    assert frames[0].pts == 0
    assert [round(frame.time * 25) for frame in frames] == list(range(10))


def test_a_stream_without_times_has_those_of_its_rate(tmp_path: Path) -> None:
    frames = read(write(tmp_path / "clip.h264", bf="0"))
    assert len(frames) == 10
    steps = np.diff([frame.time for frame in frames])
    assert np.allclose(steps, steps[0])
    assert steps[0] > 0


@pytest.mark.parametrize("start", [0.04, 0.2, 0.33, 1.0, 1.96])
def test_a_start_takes_exactly_the_frames_from_there_on(tmp_path: Path, start: float) -> None:
    clip = write(tmp_path / "clip.mp4", 50, g="12")
    frames = read(clip, start=start)
    first = int(np.ceil(start * 25 - 1e-9))
    assert len(frames) == 50 - first
    assert frames[0].pts == 0
    assert brightness(frames[0]) == pytest.approx(20 + 2 * first, abs=1)


def test_a_start_behind_the_end_says_so(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVideo, match=r"clip\.mp4: .*"):
        read(write(tmp_path / "clip.mp4"), start=9)


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_frames_are_upright(tmp_path: Path, degrees: int) -> None:
    clip = tmp_path / "turned.mp4"
    with av.open(str(write(tmp_path / "clip.mp4"))) as source, av.open(str(clip), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0], opaque=True)
        stream.set_display_rotation(degrees)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)
    stored = read(tmp_path / "clip.mp4")[0].pixels(Converter())
    frame = read(clip)[0]
    quarters = round(frame.picture.rotation / 90) % 4
    assert frame.quarters == quarters
    upright = frame.pixels(Converter())
    np.testing.assert_array_equal(upright, np.rot90(stored, quarters))
    assert upright.flags.c_contiguous
    assert frame.size == upright.shape[:2] == ((48, 64) if degrees in (0, 180) else (64, 48))
    small = frame.pixels(Converter(), 16, 32)
    assert small.shape == (16, 32, 3)
    assert abs(int(small[0, 0, 0]) - int(upright[4, 4, 0])) < 30
    assert (degrees == 0) == (quarters == 0)


def test_another_size_in_mid_stream(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"{n}.ts", size=size, bf="0") for n, size in enumerate([(48, 64), (64, 96)])]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    frames = read(tmp_path / "both.ts")
    assert {frame.size for frame in frames} == {(48, 64), (64, 96)}
    assert len(frames) == 20
    assert all(b.pts > a.pts for a, b in itertools.pairwise(frames))


def test_info_is_what_the_file_says(tmp_path: Path) -> None:
    with VideoReader(write(tmp_path / "clip.mp4", rate=Fraction(30000, 1001))) as reader:
        info = reader.info
    assert (info.width, info.height, info.rate, info.codec, info.audio) == (64, 48, Fraction(30000, 1001), "h264", None)
    assert info.duration == pytest.approx(10 * 1001 / 30000, abs=2e-3)


def test_a_songs_cover_is_no_video(tmp_path: Path) -> None:
    song = tmp_path / "song.mp4"
    with av.open(str(song), "w") as file:
        tone: Any = file.add_stream("aac", rate=48000, layout="mono")
        samples = np.zeros((1, 48000), np.float32)
        sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 48000, 0
        file.mux(tone.encode(sound))
        file.mux(tone.encode(None))
    with pytest.raises(UnsupportedVideo, match=r"song\.mp4: no picture in it, only audio"):
        VideoReader(song)


def test_frames_that_are_too_large_are_refused_before_they_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write(tmp_path / "clip.mp4", 2)
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 1000)
    with pytest.raises(UnsupportedVideo, match=r"clip\.mp4: frames of 64 x 48 are .* megapixels; the limit is"):
        VideoReader(clip)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.mkdir(), "a folder, not a video"),
        (lambda path: path.touch(), r"empty \(0 bytes\)"),
        (lambda path: path.write_text("no video " * 100), "not a video, damaged or truncated"),
    ],
)
def test_what_is_no_video_is_named(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "clip.mp4"
    make(path)
    with pytest.raises(UnreadableVideo, match=rf"clip\.mp4: .*{message}"):
        VideoReader(path)


def test_a_local_playlist_opens_nothing_on_the_network(tmp_path: Path) -> None:
    path = tmp_path / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(InputError), VideoReader(path) as reader:
        list(reader)


@pytest.mark.parametrize("cut", [0.6, 0.9])
def test_a_truncated_file_gives_what_is_there(tmp_path: Path, cut: float) -> None:
    whole = write(tmp_path / "clip.mkv", 50).read_bytes()
    path = tmp_path / "cut.mkv"
    path.write_bytes(whole[: int(cut * len(whole))])
    with VideoReader(path) as reader:
        count = sum(1 for _ in reader)
    assert 0 < count < 50


# The clock.


class FakeStream:
    def __init__(self, **values: Any) -> None:
        self.time_base, self.average_rate, self.guessed_rate, self.start_time = Fraction(1, 1000), None, None, None
        vars(self).update(values)


class FakePicture:
    def __init__(self, pts: int | None, duration: int = 0) -> None:
        self.pts, self.time_base, self.duration = pts, Fraction(1, 1000), duration


@given(st.lists(st.one_of(st.none(), st.integers(-(10**9), 10**9)), min_size=1, max_size=50))
def test_times_grow_whatever_the_source_says(values: list[int | None]) -> None:
    clock = _Clock(FakeStream(average_rate=Fraction(25)), 0.0)
    times = [clock.at(FakePicture(pts))[0] for pts in values]  # type: ignore[arg-type]
    assert times[0] == 0
    assert times == sorted(set(times))  # type: ignore[type-var]
    assert clock.count == len(values)


def test_the_clock_keeps_what_is_in_order() -> None:
    clock = _Clock(FakeStream(), 0.0)
    assert [clock.at(FakePicture(pts, 40))[0] for pts in (700, 740, 780, 1500)] == [0, 40, 80, 800]  # type: ignore[arg-type]
    assert clock.origin == Fraction(7, 10)


# Pipes.


def pipe(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sources, "_standard_input", lambda: io.BytesIO(data))


@pytest.mark.parametrize("suffix", ["mkv", "ts", "y4m", "flv"])
def test_a_video_on_standard_input_is_read_as_it_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    codec = "wrapped_avframe" if suffix == "y4m" else "libx264"
    path = tmp_path / f"clip.{suffix}"
    if suffix == "y4m":
        header = b"YUV4MPEG2 W64 H48 F25:1 Ip A1:1 C420\n"
        path.write_bytes(header + b"".join(b"FRAME\n" + bytes([20 + 2 * n]) * (64 * 48 * 3 // 2) for n in range(10)))
    else:
        write(path, codec=codec, bf="0")
    pipe(monkeypatch, path.read_bytes())
    origin, data = from_pipe()
    assert origin is not None
    assert data == b""
    with VideoReader(origin.target, name=origin.shown) as reader:
        assert len(list(reader)) == 10


def test_a_photo_on_standard_input_stays_a_photo(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = b"\xff\xd8\xff\xe0" + b"x" * 5000
    pipe(monkeypatch, photo)
    assert from_pipe() == (None, photo)


@pytest.mark.parametrize("rate", ["25", "29.97", "30000/1001"])
def test_raw_frames(monkeypatch: pytest.MonkeyPatch, rate: str) -> None:
    frames = [np.full((48, 64, 3), 20 + 20 * n, np.uint8) for n in range(5)]
    pipe(monkeypatch, b"".join(frame.tobytes() for frame in frames) + b"half a frame")
    origin = raw_video(f"64x48@{rate}")
    with VideoReader(origin.target, name=origin.shown, container=origin.container, options=origin.options) as reader:
        got = list(reader)
    for frame, wanted in zip(got, frames, strict=True):
        np.testing.assert_array_equal(frame.pixels(Converter()), wanted)
    assert got[1].time == pytest.approx(1 / float(Fraction(rate)), abs=1e-3)


@pytest.mark.parametrize("text", ["", "64x48", "64x48@", "64@25", "64x48@25:", "ax48@25", "64x48@25/0:x y"])
def test_raw_frames_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="WIDTHxHEIGHT@RATE is expected"):
        raw_video(text)


@given(st.binary(max_size=300), st.binary(max_size=300), st.lists(st.integers(1, 64), min_size=1, max_size=40))
def test_a_replayed_pipe_gives_every_byte_once(head: bytes, rest: bytes, sizes: list[int]) -> None:
    replayed, got = Replayed(head, io.BytesIO(rest)), b""
    for size in sizes:
        part = replayed.read(size)
        assert len(part) <= size
        got += part
    assert (got + replayed.read()) == head + rest


@given(st.binary(max_size=250))
def test_any_beginning_can_be_asked(head: bytes) -> None:
    assert _begins_a_video(head) in (True, False)


def test_beginnings(tmp_path: Path) -> None:
    for suffix in ("mp4", "mov", "mkv", "avi", "ts", "flv"):
        assert _begins_a_video(write(tmp_path / f"clip.{suffix}").read_bytes()[:200]), suffix
    for head in (b"\xff\xd8\xff", b"\x89PNG", b"GIF89a", b"RIFF....WEBP", b"....ftypavif", b"....ftypheic", b"P6 1 1"):
        assert not _begins_a_video(head + b"\0" * 300)


PART = st.text("abcXYZ019._-~%+", min_size=1, max_size=10)


@given(PART, PART, PART, PART, PART)
def test_no_secret_of_a_url_is_left(user: str, password: str, host: str, path: str, token: str) -> None:
    secrets = {f"Q{user}Q", f"Q{password}Q", f"Q{token}Q"}
    url = f"rtsp://Q{user}Q:Q{password}Q@{host}/{path}?key=Q{token}Q"
    shown = redacted(url)
    assert not any(secret in shown for secret in secrets)
    assert host in shown


ORDER = """
import json, sys
from petseg_runtime.video import VideoReader
with VideoReader(sys.argv[1]) as reader:
    print(json.dumps([frame.pts for frame in reader]))
"""


def test_it_works_with_warnings_as_errors_in_a_process_of_its_own(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.mp4")
    done = subprocess.run([sys.executable, "-W", "error", "-c", ORDER, str(clip)], capture_output=True, text=True)
    assert done.stderr == ""
    assert len(json.loads(done.stdout)) == 10
