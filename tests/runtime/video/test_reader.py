"""Frames are upright, in the right colours, with exact times; what cannot be read is an error in one line."""

from __future__ import annotations

import ctypes
import gc
import http.server
import io
import itertools
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Container
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
from av.stream import Disposition
from av.video.reformatter import ColorRange
from hypothesis import given
from hypothesis import strategies as st

from petseg_runtime import sources
from petseg_runtime.errors import InputError, SilentVideo, UnreadableVideo, UnsupportedVideo, UsageError
from petseg_runtime.sources import Replayed, _begins_a_video, from_pipe, raw_video
from petseg_runtime.video import reader as reader_module
from petseg_runtime.video.clock import Clock, Joined
from petseg_runtime.video.frame import Colours, Converter, Frame
from petseg_runtime.video.reader import VideoReader

#: Red and blue weights of luma.
MATRICES = {"BT.601": (6, 0.299, 0.114), "BT.709": (1, 0.2126, 0.0722), "BT.2020": (9, 0.2627, 0.0593)}
COLOURS = [(250, 20, 30), (20, 200, 40), (30, 40, 230), (255, 255, 255), (0, 0, 0), (128, 128, 128), (200, 180, 20)]


def to_yuv(rgb: tuple[int, int, int], weights: tuple[float, float], full: bool) -> tuple[int, int, int]:
    """Convert by the definition (ITU-R BT.601, BT.709, BT.2020)."""
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
@pytest.mark.parametrize(
    "pixels", ["yuv420p", "yuv422p", "yuv444p", "yuv420p10le", "yuv422p10le", "yuv444p10le", "yuva420p"]
)
def test_colours_are_those_of_the_matrix_and_range(name: str, full: bool, pixels: str) -> None:
    tag, *weights = MATRICES[name]
    for rgb in COLOURS:
        values = to_yuv(rgb, tuple(weights), full)  # type: ignore[arg-type]
        frame = flat((*values, 77) if pixels == "yuva420p" else values, pixels)
        frame.colorspace, frame.color_range = tag, ColorRange.JPEG if full else ColorRange.MPEG
        for size in ((64, 96), (32, 48), (16, 24), (100, 120)):
            pixel = Converter()(frame, *size).astype(int)
            assert np.abs(pixel - rgb).max() <= 2, (rgb, pixel[0, 0])


@pytest.mark.parametrize(("height", "name"), [(480, "BT.601"), (576, "BT.601"), (720, "BT.709")])
def test_an_unspecified_matrix_depends_on_the_size(height: int, name: str) -> None:
    _, *weights = MATRICES[name]
    frame = flat(to_yuv((250, 20, 30), tuple(weights), False), "yuv420p", height, 640)  # type: ignore[arg-type]
    assert np.abs(Converter()(frame, 16, 16).astype(int) - (250, 20, 30)).max() <= 3


class FakeColours:
    def __init__(self, matrix: int, range_: int, height: int, width: int, name: str) -> None:
        self.colorspace, self.color_range, self.height, self.width = matrix, range_, height, width
        self.format, self.color_primaries, self.color_trc = SimpleNamespace(name=name), 9, 16


@given(
    st.integers(0, 20),
    st.integers(0, 3),
    st.integers(1, 8192),
    st.integers(1, 8192),
    st.sampled_from(["yuv420p", "yuvj420p", "rgb24"]),
)
def test_every_frame_has_a_matrix_and_a_range(matrix: int, range_: int, height: int, width: int, name: str) -> None:
    colours = Colours.of(FakeColours(matrix, range_, height, width, name))  # type: ignore[arg-type]
    assert colours.matrix == (matrix if matrix not in (0, 2, 3) else 1 if height > 576 or width > 1024 else 6)
    assert colours.full_range == (range_ == 2 or name == "yuvj420p")
    assert (colours.primaries, colours.transfer) == (9, 16)


@pytest.mark.parametrize(("tag", "name"), [(1, "BT.709"), (6, "BT.601"), (2, "BT.601")])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "ts"])
def test_colours_are_right_through_a_real_file(tmp_path: Path, tag: int, name: str, full: bool, suffix: str) -> None:
    rgb, range_ = (200, 60, 30), ColorRange.JPEG if full else ColorRange.MPEG
    with av.open(str(tmp_path / f"clip.{suffix}"), "w") as file:
        stream: Any = file.add_stream("libx264", rate=25, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.codec_context.colorspace, stream.codec_context.color_range = tag, range_
        frame = flat(to_yuv(rgb, MATRICES[name][1:], full), "yuv420p")
        frame.colorspace, frame.color_range = tag, range_
        file.mux([*stream.encode(frame), *stream.encode(None)])
    (frame_,) = read(tmp_path / f"clip.{suffix}")
    assert np.abs(frame_.pixels(Converter()).astype(int) - rgb).max() <= 3


def test_yuvj_formats_are_full_range() -> None:
    weights = MATRICES["BT.601"][1:]
    frame = flat(to_yuv((200, 180, 20), weights, True), "yuvj420p")
    assert Colours.of(frame).full_range
    assert np.abs(Converter()(frame, 16, 16).astype(int) - (200, 180, 20)).max() <= 3


def test_an_unsupported_matrix_is_named_in_the_error() -> None:
    frame = flat((100, 100, 100), "yuv420p")
    frame.colorspace = 8  # YCgCo
    with pytest.raises(UnsupportedVideo, match="frames in yuv420p with the colour matrix 8 cannot be converted"):
        Frame(0, 0, Fraction(1, 25), frame).pixels(Converter(), 16, 16)


@pytest.mark.parametrize("value", [0, 16, 128, 235, 255])
@pytest.mark.parametrize("range_", [ColorRange.UNSPECIFIED, ColorRange.JPEG])
def test_grey_needs_no_range(value: int, range_: ColorRange) -> None:
    frame = flat((value,), "gray")
    frame.color_range = range_
    assert np.unique(Converter()(frame, 16, 16)).tolist() == [value]


@pytest.mark.parametrize("pixels", ["rgb24", "bgr24", "rgba", "gbrp", "gbrp10le", "gray", "gray10le", "pal8"])
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
    """Frame n is grey with brightness 20 + 2 n; its upper left corner is white."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=rate, options={"crf": "1", **options} if "264" in codec else options)
        stream.height, stream.width = size
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        for number in range(count):
            pixels = np.full((*size, 3), 20 + 2 * (number % 100), np.uint8)
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


def test_times_start_at_zero(tmp_path: Path) -> None:
    frames = read(write(tmp_path / "clip.ts", first=100, codec="mpeg2video"))
    assert frames[0].pts == 0
    assert [round(frame.time * 25) for frame in frames] == list(range(10))


def test_a_stream_without_timestamps_gets_those_of_its_rate(tmp_path: Path) -> None:
    frames = read(write(tmp_path / "clip.h264", bf="0"))
    assert len(frames) == 10
    steps = np.diff([frame.time for frame in frames])
    assert np.allclose(steps, steps[0])
    assert steps[0] > 0


@pytest.mark.parametrize("start", [0.04, 0.2, 0.33, 1.0, 1.96])
def test_a_start_skips_exactly_the_frames_before_it(tmp_path: Path, start: float) -> None:
    clip = write(tmp_path / "clip.mp4", 50, g="12")
    frames = read(clip, start=start)
    first = int(np.ceil(start * 25 - 1e-9))
    assert len(frames) == 50 - first
    assert frames[0].pts == 0
    assert brightness(frames[0]) == pytest.approx(20 + 2 * first, abs=1)


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        *(("clip.ts", "libx264"), ("clip.flv", "libx264"), ("clip.avi", "libx264"), ("clip.h264", "libx264")),
        *(("clip.mkv", "libx264"), ("clip.mpg", "mpeg2video"), ("clip.ts", "mpeg2video"), ("clip.webm", "libvpx-vp9")),
    ],
)
def test_a_start_is_exact_without_an_index(tmp_path: Path, name: str, codec: str) -> None:
    clip = write(tmp_path / name, 100, codec=codec, g="12")
    whole = [(frame.time, brightness(frame)) for frame in read(clip)]
    for start in (0.04, 0.1, 1.02, 3.9):
        frames = read(clip, start=start)
        later = [light for time, light in whole if time >= start - 1e-3]
        assert [brightness(frame) for frame in frames] == pytest.approx(later, abs=1), start
        assert frames[0].pts == frames[0].number == 0


def test_a_start_shifts_the_audio(tmp_path: Path) -> None:
    clip = with_audio(tmp_path / "clip.mp4")
    for start in (0.0, 0.52):
        frames = read(clip, start=start)
        times = [sound.time + start for frame in frames for sound in frame.sound]
        assert len(times) > 10
        # AAC packets of 1024 samples at 48 kHz, the first before time 0.
        assert [round(time * 48000) % 1024 for time in times] == [0] * len(times)


def with_audio(path: Path) -> Path:
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=25, options={"g": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        tone: Any = file.add_stream("aac", rate=48000, layout="mono")
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8))
            frame.pts, frame.time_base = number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 96000), np.float32), format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 48000, 0
        file.mux([*tone.encode(sound), *tone.encode(None), *stream.encode(None)])
    return path


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_a_variable_frame_rate_is_kept(tmp_path: Path, suffix: str) -> None:
    times = [0, 40, 80, 500, 510, 1000, 3000]
    with av.open(str(tmp_path / f"clip.{suffix}"), "w") as file:
        stream: Any = file.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for pts in times:
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))
            frame.pts, frame.time_base = pts, Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    assert [frame.pts * frame.time_base * 1000 for frame in read(tmp_path / f"clip.{suffix}")] == times


def test_frames_outside_the_edit_list_are_not_shown(tmp_path: Path) -> None:
    clip, cut = write(tmp_path / "clip.mp4", 40, bf="0", g="100"), tmp_path / "cut.mp4"
    with av.open(str(clip)) as source, av.open(str(cut), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.dts is not None:
                shift = round(Fraction(10, 25) / packet.time_base)
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, stream
                file.mux(packet)
    frames = read(cut)
    assert len(frames) == 30
    assert frames[0].pts == 0
    assert brightness(frames[0]) == pytest.approx(40, abs=1)


def test_a_start_after_the_end_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UnreadableVideo, match=r"clip\.mp4: .*"):
        read(write(tmp_path / "clip.mp4"), start=9)


def turned(clip: Path, other: Path, degrees: int) -> None:
    """Copy a clip with a display matrix that rotates it counter-clockwise."""
    with av.open(str(clip)) as source, av.open(str(other), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0], opaque=True)
        stream.set_display_rotation(degrees)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)


@pytest.mark.parametrize("degrees", [0, 90, 180, -90])
def test_frames_are_upright(tmp_path: Path, degrees: int) -> None:
    clip = tmp_path / "turned.mp4"
    turned(write(tmp_path / "clip.mp4"), clip, degrees)
    stored = read(tmp_path / "clip.mp4")[0].pixels(Converter())
    frame = read(clip)[0]
    quarters = {0: 0, 90: 1, 180: 2, -90: 3}[degrees]  # as the ffmpeg command rotates them
    assert frame.quarters == quarters
    upright = frame.pixels(Converter())
    np.testing.assert_array_equal(upright, np.rot90(stored, quarters))
    assert upright.flags.c_contiguous
    assert frame.size == upright.shape[:2] == ((48, 64) if degrees in (0, 180) else (64, 48))
    small = frame.pixels(Converter(), 16, 32)
    assert small.shape == (16, 32, 3)
    assert abs(int(small[0, 0, 0]) - int(upright[4, 4, 0])) < 30


def shown_by(matrix: tuple[int, int, int, int], clip: Path, other: Path) -> None:
    """Copy an MP4 with another display matrix, of which the four numbers that rotate and mirror are given."""
    data, numbers = clip.read_bytes(), struct.Struct(">9i")
    (a, b, c, d), one, whole = (0x10000 * number for number in matrix), 0x10000, 0x40000000
    at = data.index(numbers.pack(one, 0, 0, 0, one, 0, 0, 0, whole), data.index(b"tkhd"))
    other.write_bytes(data[:at] + numbers.pack(a, b, 0, c, d, 0, 0, 0, whole) + data[at + numbers.size :])


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((-1, 0, 0, 1), np.fliplr),
        ((1, 0, 0, -1), np.flipud),
        ((0, 1, 1, 0), lambda stored: stored.transpose(1, 0, 2)),
        ((0, -1, -1, 0), lambda stored: np.rot90(stored.transpose(1, 0, 2), 2)),
    ],
)
def test_mirrored_frames_follow_the_display_matrix(tmp_path: Path, matrix: Any, shown: Any) -> None:
    shown_by(matrix, write(tmp_path / "clip.mp4"), tmp_path / "mirrored.mp4")
    stored = read(tmp_path / "clip.mp4")[0].pixels(Converter())
    pixels = read(tmp_path / "mirrored.mp4")[0].pixels(Converter())
    np.testing.assert_array_equal(pixels, shown(stored))
    assert pixels.flags.c_contiguous


def test_frames_are_freed_without_a_garbage_collection(tmp_path: Path) -> None:
    """There may be 60 MB of them per second."""
    alive = []
    with VideoReader(write(tmp_path / "clip.mp4", 100), threads=2) as reader:
        gc.freeze()  # what is there already is not listed below
        gc.disable()
        try:
            for frame in reader:
                del frame
                alive.append(sum(type(thing) is av.VideoFrame for thing in gc.get_objects()))
        finally:
            gc.enable()
    assert len(alive) == 100
    assert max(alive) < 20, "those that the decoder has ready"


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="the ffmpeg command is the reference")
@pytest.mark.parametrize("degrees", [90, 180, -90])
def test_frames_are_rotated_as_by_the_ffmpeg_command(tmp_path: Path, degrees: int) -> None:
    turned(write(tmp_path / "clip.mp4"), tmp_path / "turned.mp4", degrees)
    command = "ffmpeg -v error -i turned.mp4 -frames:v 1 -sws_flags bilinear -pix_fmt rgb24 -f rawvideo -"
    raw = subprocess.run(command.split(), cwd=tmp_path, capture_output=True, check=True).stdout
    pixels = read(tmp_path / "turned.mp4")[0].pixels(Converter())
    assert np.abs(np.frombuffer(raw, np.uint8).reshape(pixels.shape).astype(int) - pixels).max() < 16


def test_another_size_in_mid_stream(tmp_path: Path) -> None:
    parts = [write(tmp_path / f"{n}.ts", size=size, bf="0") for n, size in enumerate([(48, 64), (64, 96)])]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    frames = read(tmp_path / "both.ts")
    assert {frame.size for frame in frames} == {(48, 64), (64, 96)}
    assert len(frames) == 20
    assert all(b.pts > a.pts for a, b in itertools.pairwise(frames))


def test_concatenated_transport_streams_are_continuous(tmp_path: Path) -> None:
    part = write(tmp_path / "part.ts", 50).read_bytes()
    (tmp_path / "joined.ts").write_bytes(part + part)
    frames = read(tmp_path / "joined.ts")
    assert [round(frame.time * 25, 2) for frame in frames] == list(range(100))


@pytest.mark.parametrize("size", [(241, 321), (1, 1), (2, 499), (16, 16)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    frame = read(write(tmp_path / "clip.mkv", 1, codec="ffv1", size=size))[0]
    assert frame.size == frame.pixels(Converter()).shape[:2] == size
    assert frame.pixels(Converter(), 160, 160).shape == (160, 160, 3)
    assert brightness(frame) in (20, 255)


def test_the_first_video_stream_that_is_not_cover_art_is_read(tmp_path: Path) -> None:
    for cover, shown in ((True, (96, 128)), (False, (48, 64))):
        with av.open(str(tmp_path / "clip.mp4"), "w") as file:
            streams: list[Any] = [file.add_stream("mjpeg", rate=25), file.add_stream("libx264", rate=25)]
            for stream, (height, width) in zip(streams, ((48, 64), (96, 128)), strict=True):
                stream.height, stream.width = height, width
                stream.pix_fmt = "yuvj420p" if stream.name == "mjpeg" else "yuv420p"
            if cover:
                streams[0].disposition = Disposition.attached_pic
            for stream in streams:
                picture = av.VideoFrame.from_ndarray(np.zeros((stream.height, stream.width, 3), np.uint8))
                file.mux([*stream.encode(picture), *stream.encode(None)])
        assert {frame.size for frame in read(tmp_path / "clip.mp4")} == {shown}


@pytest.mark.parametrize("default", [None, 0, 1])
def test_the_audio_track_that_players_choose_is_read(tmp_path: Path, default: int | None) -> None:
    with av.open(str(tmp_path / "clip.mkv"), "w") as file:
        picture: Any = file.add_stream("mjpeg", rate=25)
        picture.width, picture.height, picture.pix_fmt = 64, 48, "yuvj420p"
        for number, codec in enumerate(("pcm_s16be", "pcm_s16le")):
            sound = file.add_stream(codec, 8000, layout="mono")
            sound.disposition = Disposition.default if number == default else Disposition(0)
        file.mux([*picture.encode(flat((100, 128, 128), "yuvj420p", 48, 64)), *picture.encode(None)])
    with VideoReader(tmp_path / "clip.mkv") as reader:
        assert reader.info.audio == ("pcm_s16le" if default == 1 else "pcm_s16be")


def test_interlaced_pictures_are_not_changed(tmp_path: Path) -> None:
    frames = read(write(tmp_path / "clip.mpg", codec="mpeg2video", flags="+ilme+ildct"))
    assert len(frames) == 10
    assert brightness(frames[0]) == pytest.approx(20, abs=2)


@pytest.mark.parametrize("codec", ["mpeg1video", "mpeg2video", "mpeg4", "libx264", "libx265"])
def test_live_frames_come_in_presentation_order(tmp_path: Path, codec: str) -> None:
    """B-frames are sent after the frame that is shown after them."""
    options = {"x265-params": "bframes=2:log-level=none"} if codec == "libx265" else {"bf": "2", "b": "4M"}
    clip = write(tmp_path / "clip.ts", 40, codec=codec, **options)
    with av.open(str(clip)) as file:
        sent = [packet.pts for packet in file.demux(video=0) if packet.size]
    assert sent != sorted(sent), "no B-frames in it"
    frames = read(clip, low_delay=True)
    times = [frame.picture.pts or 0 for frame in frames]
    assert times == sorted(sent)
    shown = [brightness(frame) for frame in frames]
    assert shown == sorted(shown)
    assert shown == pytest.approx([20 + 2 * n for n in range(40)], abs=4)


def test_live_av1_frames_are_not_delayed(tmp_path: Path) -> None:
    """Its decoder has threads of its own, each of which would hold one back."""
    clip = write(tmp_path / "clip.mkv", 12, codec="libsvtav1", preset="10", **{"svtav1-params": "pred-struct=1"})
    with VideoReader(clip, low_delay=True, threads=4) as reader:
        assert all(reader._packets_read == frame.number + 1 for frame in reader)


@pytest.mark.parametrize(("transfer", "kind"), [(16, "PQ"), (18, "HLG"), (14, None), (1, None)])
def test_a_note_says_that_hdr_is_read_as_sdr_and_how_to_convert_it(
    tmp_path: Path, transfer: int, kind: str | None
) -> None:
    with av.open(str(tmp_path / "clip.mkv"), "w") as file:  # as MP4, FFmpeg sometimes rejects it
        stream: Any = file.add_stream("libx265", rate=25, options={"x265-params": "log-level=none"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p10le"
        stream.codec_context.colorspace, stream.codec_context.color_primaries = 9, 9
        stream.codec_context.color_trc = transfer
        frame = flat((100, 128, 128), "yuv420p10le")
        frame.pts, frame.time_base = 0, Fraction(1, 25)
        file.mux([*stream.encode(frame), *stream.encode(None)])
    (frame_,) = read(tmp_path / "clip.mkv")
    assert len(frame_.notes) == (kind is not None)
    for note in frame_.notes:
        assert note.startswith(f"it is HDR ({kind}), and is read as SDR")
        assert "ffmpeg -i IN.mp4 -vf zscale" in note


def system_threads() -> int:
    return len(os.listdir("/proc/self/task"))  # noqa: PTH208 (not a folder of ours)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="Linux lists the threads of a process")
@pytest.mark.parametrize("low_delay", [False, True])
def test_the_requested_number_of_threads_decodes_and_converts(tmp_path: Path, low_delay: bool) -> None:
    clip, begun = write(tmp_path / "clip.mp4", size=(480, 640)), {}
    for threads in (1, 4):
        before = system_threads()
        with VideoReader(clip, threads=threads, low_delay=low_delay) as reader:
            frame = next(iter(reader))
            decoding = system_threads() - before
            convert = Converter(threads)
            for size in ((480, 640), (160, 160), (400, 400)):
                frame.pixels(convert, *size)
            begun[threads] = decoding, system_threads() - before - decoding
            del convert
    assert begun[1] == (0, 0)
    assert min(begun[4]) >= 3


class Sender:
    """A fake connection: at first as fast as possible; then one UDP packet per 10 ms."""

    def __init__(self, data: bytes) -> None:
        self._data, self.slow = io.BytesIO(data), False

    def read(self, size: int) -> bytes:
        if self.slow:
            time.sleep(0.01)
        return self._data.read(min(size, 1316))

    def rest(self) -> bytes:
        return self._data.read()


def test_audio_that_goes_on_after_the_video_does_not_prevent_a_timeout(tmp_path: Path) -> None:
    """The video and the selected audio last a second, and another audio track, which is not read, a minute."""
    clip = tmp_path / "clip.ts"
    with av.open(str(clip), "w") as file:
        stream: Any = file.add_stream("mpeg2video", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        tones: list[Any] = [file.add_stream("mp2", rate=48000, layout="mono") for _ in range(2)]
        for number in range(25):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8))
            file.mux(stream.encode(frame))
        for tone, seconds in zip(tones, (1, 60), strict=True):
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 48000 * seconds), np.int16), format="s16", layout="mono")
            sound.sample_rate, sound.pts = 48000, 0
            file.mux([*tone.encode(sound), *tone.encode(None)])
        file.mux(stream.encode(None))
    sender: Any = Sender(clip.read_bytes())
    frames: list[Frame] = []
    with VideoReader(sender, name="cam", low_delay=True, timeout=(20, 0.5)) as reader:
        sender.slow = True
        with pytest.raises(SilentVideo, match="cam: it sent data, but no frame, for too long"):
            frames.extend(reader)
    assert 0 < len(frames) <= 25
    assert len(sender.rest()) > clip.stat().st_size // 2, "it was noticed late"


def test_packets_have_the_zero_padding_that_ffmpeg_reads() -> None:
    data = [b"\xff" * 188 for _ in range(100)]  # adjacent in memory
    for packet in map(reader_module._packet, data):
        assert bytes(packet) == data[0]
        assert ctypes.string_at(packet.buffer_ptr + packet.buffer_size, 64) == bytes(64)


def test_subtitles_are_not_a_video(tmp_path: Path) -> None:
    path = tmp_path / "clip.srt"
    path.write_text("1\n00:00:01,000 --> 00:00:02,000\nA cat.\n")
    with pytest.raises(UnsupportedVideo, match=r"clip\.srt: no video in it, only subtitle"):
        VideoReader(path)


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv"])
def test_titles_may_have_any_encoding(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"clip.{suffix}")
    data = path.read_bytes()
    assert b"Lavf" in data  # the name of the program that wrote it, in the metadata
    path.write_bytes(data.replace(b"Lavf", "Lävf".encode("latin-1")))
    assert len(read(path)) == 10


def test_an_unknown_codec_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(write(path).read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
    with pytest.raises(UnsupportedVideo, match=r"clip\.mp4: this FFmpeg does not support its video codec"):
        VideoReader(path)


def test_info_is_what_the_file_declares(tmp_path: Path) -> None:
    with VideoReader(write(tmp_path / "clip.mp4", rate=Fraction(30000, 1001))) as reader:
        info = reader.info
    assert (info.width, info.height, info.rate, info.codec, info.audio) == (64, 48, Fraction(30000, 1001), "h264", None)
    assert info.duration == pytest.approx(10 * 1001 / 30000, abs=2e-3)


def test_cover_art_is_not_a_video(tmp_path: Path) -> None:
    song = tmp_path / "song.mp4"
    with av.open(str(song), "w") as file:
        tone: Any = file.add_stream("aac", rate=48000, layout="mono")
        samples = np.zeros((1, 48000), np.float32)
        sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        sound.sample_rate, sound.pts = 48000, 0
        file.mux(tone.encode(sound))
        file.mux(tone.encode(None))
    with pytest.raises(UnsupportedVideo, match=r"song\.mp4: no video in it, only audio"):
        VideoReader(song)


def test_frames_that_are_too_large_are_rejected_before_decoding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip = write(tmp_path / "clip.mp4", 2)
    monkeypatch.setattr(reader_module, "MAX_FRAME_PIXELS", 1000)
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
def test_what_is_not_a_video_is_named(tmp_path: Path, make: Any, message: str) -> None:
    path = tmp_path / "clip.mp4"
    make(path)
    with pytest.raises(UnreadableVideo, match=rf"clip\.mp4: .*{message}"):
        VideoReader(path)


def test_a_local_playlist_opens_nothing_on_the_network(tmp_path: Path) -> None:
    path = tmp_path / "list.mp4"
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(InputError), VideoReader(path) as reader:
        list(reader)


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{}\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize("name", ["list.mp4", "list.m3u8", "list"])
@pytest.mark.parametrize("text", ["ffconcat version 1.0\nfile good.mp4\n", PLAYLIST.format("good.ts")])
def test_a_playlist_opens_no_other_file(tmp_path: Path, name: str, text: str) -> None:
    write(tmp_path / "good.mp4")
    write(tmp_path / "good.ts")
    (tmp_path / name).write_text(text)
    with pytest.raises(UnreadableVideo, match=rf"{name}: .*\(not a video"):
        VideoReader(tmp_path / name)


@pytest.mark.parametrize("name", ["http:clip.mp4", "concat:a|b.mp4", "pipe:0", "%03d.mp4", "rtsp:x.mp4"])
def test_a_name_is_only_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write(tmp_path / "clip.mp4").rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert len(read(Path(name))) == 10


def read_until_error(path: Path, **options: Any) -> tuple[int, str | None, str | None]:
    """The number of frames, the error at the end, and the damage."""
    count = 0
    with VideoReader(path, **options) as reader:
        try:
            for _ in reader:
                count += 1
        except UnreadableVideo as error:
            return count, str(error), reader.damage
        return count, None, reader.damage


def lively(path: Path, codec: str, *, sound: bool = False) -> bytes:
    """Four seconds of noise, whose frames have all about the same size, with or without audio."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=25, options={"g": "5"})
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        tone: Any = file.add_stream("aac", rate=48000, layout="mono") if sound else None
        for number in range(100):
            noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(noise)))
            if tone:
                samples = av.AudioFrame.from_ndarray(np.zeros((1, 1920), np.float32), format="fltp", layout="mono")
                samples.sample_rate, samples.pts = 48000, 1920 * number
                file.mux(tone.encode(samples))
        file.mux([*stream.encode(None), *(tone.encode(None) if tone else [])])
    return path.read_bytes()


@pytest.mark.parametrize(
    ("suffix", "codec", "sound"),
    [("mkv", "libx264", False), ("mkv", "libx264", True), ("webm", "libvpx-vp9", False), ("avi", "mpeg4", False)],
)
def test_a_file_that_is_more_than_a_second_short_is_truncated_but_read(
    tmp_path: Path, suffix: str, codec: str, sound: bool
) -> None:
    clip, cut = tmp_path / f"clip.{suffix}", tmp_path / f"cut.{suffix}"
    whole = lively(clip, codec, sound=sound)
    assert read_until_error(clip) == (100, None, None)
    cut.write_bytes(whole[: len(whole) // 2])
    count, error, _ = read_until_error(cut)
    assert 30 < count < 60
    assert error
    assert error.startswith(f"{cut}: truncated: it declares a duration of 4.0 s, but ends after ")
    assert read_until_error(cut, start=0.04)[1] is None  # skipped frames do not count as missing
    with cut.open("rb") as pipe, VideoReader(pipe) as reader:
        assert len(list(reader)) == count
    cut.write_bytes(whole[: round(0.85 * len(whole))])
    assert read_until_error(cut)[1] is None  # too little to be sure


@pytest.mark.parametrize("sound", [0, 20])
@pytest.mark.parametrize("first", [0, 5000])
@pytest.mark.parametrize(("suffix", "codec"), [("mkv", "libx264"), ("webm", "libvpx-vp9"), ("mp4", "libx264")])
def test_a_variable_rate_and_longer_audio_are_not_truncation(
    tmp_path: Path, suffix: str, codec: str, first: int, sound: int
) -> None:
    """The last frame is shown for ten seconds."""
    with av.open(str(tmp_path / f"clip.{suffix}"), "w") as file:
        stream: Any = file.add_stream(codec, rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        tone: Any = file.add_stream("libopus" if suffix == "webm" else "aac", rate=48000) if sound else None
        packets = []
        for pts in (0, 40, 80, 500, 510, 1000, 3000):
            frame = av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8))
            frame.pts, frame.time_base = first + pts, Fraction(1, 1000)
            packets += stream.encode(frame)
        for packet in [*packets, *stream.encode(None)]:
            packet.duration = 10_000 if packet.pts == first + 3000 else packet.duration
            file.mux(packet)
        if tone:
            samples = av.AudioFrame.from_ndarray(np.zeros((2, 48000 * sound), np.float32), "fltp", "stereo")
            samples.sample_rate = 48000
            file.mux([*tone.encode(samples), *tone.encode(None)])
    assert read_until_error(tmp_path / f"clip.{suffix}") == (7, None, None)


def test_an_avi_that_ends_with_empty_frames_is_complete(tmp_path: Path) -> None:
    """Empty frames repeat the last one. The index and the number of frames include them, but they are never decoded."""
    data = bytearray(write(tmp_path / "clip.avi", 100, codec="mpeg4").read_bytes())
    at, number = data.index(b"movi") + 4, 0
    while data[at : at + 4] == b"00dc":
        size = int.from_bytes(data[at + 4 : at + 8], "little")
        data[at : at + 4] = b"00dc" if number < 30 else b"JUNK"
        at, number = at + 8 + size + size % 2, number + 1
    index = data.index(b"idx1")
    data[index:] = data[index:].replace(b"00dc", b"JUNK").replace(b"JUNK", b"00dc", 30)
    (tmp_path / "clip.avi").write_bytes(data)
    with av.open(str(tmp_path / "clip.avi")) as file:
        assert file.streams.video[0].frames == 100
    assert read_until_error(tmp_path / "clip.avi") == (30, None, None)


def packets_of(path: Path) -> list[bytes]:
    with av.open(str(path)) as file:
        return [bytes(packet) for packet in file.demux(video=0) if packet.size]


def spoil(path: Path, damaged: Container[int]) -> Path:
    """Overwrite some packets of a file that stores each in one piece."""
    data = bytearray(path.read_bytes())
    for number, packet in enumerate(packets_of(path)):
        if number in damaged:
            at = data.index(packet)
            data[at : at + len(packet)] = b"\xff" * len(packet)
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(("suffix", "codec"), [("mp4", "libx264"), ("mkv", "libx264"), ("avi", "mpeg4")])
def test_packets_that_cannot_be_decoded_are_damage(tmp_path: Path, suffix: str, codec: str) -> None:
    clip = write(tmp_path / f"clip.{suffix}", 40, codec=codec, g="1")
    assert read_until_error(clip) == (40, None, None)
    count, error, damage = read_until_error(spoil(clip, range(10, 20)))
    assert (count, error, damage) == (30, None, "10 of 40 packets could not be decoded")


def spoil_part(path: Path, damaged: Container[int]) -> Path:
    """Overwrite some bytes in the middle of some packets, which need not be stored in one piece."""
    data = bytearray(path.read_bytes())
    for number, packet in enumerate(packets_of(path)):
        if number in damaged:
            pieces = (packet[at : at + 20] for at in range(len(packet) // 2, len(packet), 10))
            at = next(at for at in map(data.find, pieces) if at >= 0)
            data[at : at + 20] = b"\xff" * 20
    path.write_bytes(data)
    return path


@pytest.mark.parametrize(
    ("suffix", "codec"), [("mp4", "mpeg4"), ("avi", "mpeg4"), ("ts", "mpeg2video"), ("mpg", "mpeg2video")]
)
def test_frames_whose_damage_the_decoder_hides_are_damage(tmp_path: Path, suffix: str, codec: str) -> None:
    clip = tmp_path / f"clip.{suffix}"
    lively(clip, codec)
    assert read_until_error(clip) == (100, None, None)
    assert read_until_error(clip, start=1.3)[2] is None
    assert read_until_error(spoil_part(clip, (20, 40, 60))) == (100, None, "3 of 100 frames are damaged")


@pytest.mark.parametrize("suffix", ["ts", "mpg"])
def test_frames_at_the_cuts_of_a_broadcast_are_not_damage(tmp_path: Path, suffix: str) -> None:
    """The first ones refer to missing pictures, and the last one is incomplete."""
    whole, clip = lively(tmp_path / f"clip.{suffix}", "mpeg2video"), tmp_path / f"part.{suffix}"
    marked = 0
    for cut in range(0, 4000, 500):
        clip.write_bytes(whole[cut + len(whole) // 4 : -cut - len(whole) // 4])
        with VideoReader(clip) as reader:
            marked += sum(frame.picture.is_corrupt for frame in reader)
            assert reader.damage is None
    assert marked


#: SEI (user data of one byte) and access unit delimiter of H.264 and H.265, without length or start code.
SETTINGS = {"libx264": ["0605010080", "09f0"], "libx265": ["4e0105010080", "460150"]}


@pytest.mark.parametrize("codec", SETTINGS)
@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_separate_packets_of_parameter_sets_are_not_damage(tmp_path: Path, codec: str, suffix: str) -> None:
    """As some recorders write them: in the middle, one after the other, and at the end, where no picture follows."""
    options = {"bf": "0"} if codec == "libx264" else {"x265-params": "bframes=0:log-level=none"}
    clip, odd = write(tmp_path / f"clip.{suffix}", 20, codec=codec, **options), tmp_path / f"odd.{suffix}"
    with av.open(str(clip)) as source, av.open(str(odd), "w") as sink:
        stream = source.streams.video[0]
        copied = sink.add_stream_from_template(stream)
        packets = [packet for packet in source.demux(stream) if packet.size]
        for number, packet in enumerate(packets):
            payloads = [bytes(packet)]
            if number in (5, 6, 19):
                units = [bytes.fromhex(unit) for unit in SETTINGS[codec]]
                payloads = [*(len(unit).to_bytes(4) + unit for unit in units), *payloads]
                payloads = payloads[::-1] if number == 19 else payloads
            for place, payload in enumerate(payloads):
                part = av.Packet(payload)
                part.stream, part.time_base = copied, packet.time_base
                part.pts = part.dts = packet.pts - len(payloads) + 1 + place
                sink.mux(part)
    assert read_until_error(odd) == (20, None, None)


def test_a_transport_stream_that_begins_in_the_middle_is_not_damaged(tmp_path: Path) -> None:
    """So far from the next keyframe that the decoder rejects what comes before it."""
    options = {"g": "700", "bf": "0", "sc_threshold": "0", "preset": "ultrafast"}
    whole = write(tmp_path / "clip.ts", 800, **options).read_bytes()
    clip = tmp_path / "rest.ts"
    clip.write_bytes(whole[len(whole) // 188 // 20 * 188 :])
    with VideoReader(clip) as reader:
        assert len(list(reader)) == 100
        assert reader.undecodable > 500
        assert reader.damage is None


def test_a_program_stream_that_ends_in_the_middle_of_a_picture_is_not_damaged(tmp_path: Path) -> None:
    whole, clip, refused = lively(tmp_path / "clip.mpg", "mpeg2video"), tmp_path / "part.mpg", 0
    begins = whole.index(b"\0\0\1\0", len(whole) // 2)
    for length in range(10, 40):
        clip.write_bytes(whole[: begins + length])
        with VideoReader(clip) as reader:
            assert len(list(reader)) > 40
            assert reader.damage is None
            refused += reader.undecodable
    assert refused


# The clock.


class FakeStream:
    def __init__(self, **values: Any) -> None:
        self.time_base, self.average_rate, self.guessed_rate, self.start_time = Fraction(1, 1000), None, None, None
        vars(self).update(values)


class FakePicture:
    def __init__(self, pts: int | None, duration: int = 0) -> None:
        self.pts, self.time_base, self.duration = pts, Fraction(1, 1000), duration


@given(st.lists(st.one_of(st.none(), st.integers(-(10**9), 10**9)), min_size=1, max_size=50))
def test_times_increase_whatever_the_source_says(values: list[int | None]) -> None:
    clock = Clock(FakeStream(average_rate=Fraction(25)), 0.0)
    times = [clock.at(FakePicture(pts))[0] for pts in values]  # type: ignore[arg-type]
    assert times[0] == 0
    assert times == sorted(set(times))  # type: ignore[type-var]
    assert clock.count == len(values)


@given(st.integers(1, 200), st.sampled_from([Fraction(30000, 1001), Fraction(25), Fraction(24000, 1001), Fraction(60)]))
def test_a_start_of_frame_n_is_frame_n(number: int, rate: Fraction) -> None:
    clock = Clock(FakeStream(time_base=1 / rate), float(number / rate))
    pictures = [FakePicture(pts) for pts in range(7, 307)]
    for picture in pictures:
        picture.time_base = 1 / rate
    times = [clock.at(picture)[0] for picture in pictures]  # type: ignore[arg-type]
    assert times == [None] * number + list(range(300 - number))
    assert clock.origin == (7 + number) / rate


def test_one_timestamp_far_in_the_future_does_not_delay_all_later_ones() -> None:
    clock = Clock(FakeStream(average_rate=Fraction(25)), 0.0)
    times = [clock.at(FakePicture(pts))[0] for pts in (0, 40, 9_000_000, 120, 160)]  # type: ignore[arg-type]
    assert times == [0, 40, 9_000_000, 9_000_040, 9_000_080]


def test_a_damaged_timestamp_in_a_transport_stream_changes_no_other() -> None:
    joined, stream, times = Joined("mpegts"), SimpleNamespace(index=0), []
    for number in range(20):
        dts = (number + (90_000 if number == 7 else 0)) * 3600
        packet = SimpleNamespace(dts=dts, pts=dts + 3600, time_base=Fraction(1, 90000), duration=3600, stream=stream)
        joined.move(packet)  # type: ignore[arg-type]
        times.append((packet.dts, packet.pts))
    assert times == [(3600 * number, 3600 * number + 3600) for number in range(20)]


def test_a_start_counts_frames_without_timestamps() -> None:
    clock = Clock(FakeStream(average_rate=Fraction(25)), 0.2)
    assert [clock.at(FakePicture(None))[0] for _ in range(7)] == [None] * 5 + [0, 40]  # type: ignore[arg-type]


def test_the_clock_keeps_timestamps_in_order() -> None:
    clock = Clock(FakeStream(), 0.0)
    assert [clock.at(FakePicture(pts, 40))[0] for pts in (700, 740, 780, 1500)] == [0, 40, 80, 800]  # type: ignore[arg-type]
    assert clock.origin == Fraction(7, 10)


@pytest.mark.parametrize(("first", "last", "end"), [(700, 1500, 1.54), (0, 1500, 1.54), (-2000, 1500, 3.54)])
def test_the_end_is_in_the_sources_time_but_counts_what_is_before_zero(first: int, last: int, end: float) -> None:
    clock = Clock(FakeStream(), 0.0)
    for pts in (first, last):
        clock.at(FakePicture(pts, 40))  # type: ignore[arg-type]
    assert float(clock.end) == end


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


def noisy(path: Path, **options: str) -> bytes:
    """An MP4 that is too large for FFmpeg's buffers."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w", options=options) as file:
        stream: Any = file.add_stream("libx264", rate=25, options={"crf": "1", "g": "5"})
        stream.width, stream.height, stream.pix_fmt = 320, 240, "yuv420p"
        for _ in range(20):
            noise = rng.integers(0, 256, (240, 320, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(noise)))
        file.mux(stream.encode(None))
    return path.read_bytes()


@pytest.mark.parametrize("flags", ["faststart", "frag_keyframe+empty_moov"])
@pytest.mark.parametrize("start", [0.0, 0.4])
def test_an_mp4_in_a_pipe_with_its_index_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: str, start: float
) -> None:
    pipe(monkeypatch, noisy(tmp_path / "clip.mp4", movflags=flags))
    origin = from_pipe()[0]
    assert origin is not None
    with VideoReader(origin.target, name=origin.shown, start=start) as reader:
        assert len(list(reader)) == 20 - round(start * 25)


def test_an_mp4_in_a_pipe_with_its_index_last_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, noisy(tmp_path / "clip.mp4"))
    origin = from_pipe()[0]
    assert origin is not None
    with (
        pytest.raises(UnreadableVideo, match=r"standard input: .* needs its index first .*faststart.* the file itself"),
        VideoReader(origin.target, name=origin.shown) as reader,
    ):
        list(reader)


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


@pytest.mark.parametrize(
    "text",
    [
        *("", "64x48", "64x48@", "64@25", "64x48@25:", "ax48@25", "64x48@25:x y"),
        *("0x0@25", "64x0@25", "64x48@0", "64x48@0.0", "64x48@0/5", "64x48@25/0"),
    ],
)
def test_malformed_descriptions_of_raw_frames_are_rejected(text: str) -> None:
    with pytest.raises(UsageError, match="WIDTHxHEIGHT@RATE is expected"):
        raw_video(text)


def test_raw_frames_of_an_unknown_pixel_format_are_rejected() -> None:
    with pytest.raises(
        UsageError, match="--raw 64x48@25:nothing: FFmpeg has no pixel format nothing; use one such as rgb24"
    ):
        raw_video("64x48@25:nothing")


def test_rejected_options_are_not_called_a_playlist() -> None:
    with pytest.raises(
        UnreadableVideo, match=r"cam: cannot be opened \(not a video, or one that does not accept these opt"
    ):
        VideoReader("testsrc2=size=wide", name="cam", container="lavfi", options={})


def test_raw_frames_that_are_too_large_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe(monkeypatch, bytes(64 * 48 * 3))
    origin = raw_video("99999x99999@25")
    with (
        pytest.raises(InputError, match="standard input: "),
        VideoReader(origin.target, name=origin.shown, container=origin.container, options=origin.options) as reader,
    ):
        list(reader)


@given(st.binary(max_size=300), st.binary(max_size=300), st.lists(st.integers(1, 64), min_size=1, max_size=40))
def test_a_replayed_pipe_returns_every_byte_once(head: bytes, rest: bytes, sizes: list[int]) -> None:
    replayed, got = Replayed(head, io.BytesIO(rest)), b""
    for size in sizes:
        part = replayed.read(size)
        assert len(part) <= size
        got += part
    assert (got + replayed.read()) == head + rest


@given(st.binary(max_size=250))
def test_any_beginning_of_a_file_can_be_classified(head: bytes) -> None:
    assert _begins_a_video(head) in (True, False)


def test_beginnings_of_files_are_classified(tmp_path: Path) -> None:
    for suffix in ("mp4", "mov", "mkv", "avi", "ts", "flv"):
        assert _begins_a_video(write(tmp_path / f"clip.{suffix}").read_bytes()[:400]), suffix
    for head in (b"\xff\xd8\xff", b"\x89PNG", b"GIF89a", b"RIFF....WEBP", b"....ftypavif", b"....ftypheic", b"P6 1 1"):
        assert not _begins_a_video(head + b"\0" * 300)


ORDER = """
import json, sys
from petseg_runtime.video.reader import VideoReader
with VideoReader(sys.argv[1]) as reader:
    print(json.dumps([frame.pts for frame in reader]))
"""


def test_it_works_with_warnings_as_errors(tmp_path: Path) -> None:
    clip = write(tmp_path / "clip.mp4")
    done = subprocess.run([sys.executable, "-W", "error", "-c", ORDER, str(clip)], capture_output=True, text=True)
    assert done.stderr == ""
    assert len(json.loads(done.stdout)) == 10


@pytest.mark.parametrize("start", [float("inf"), float("nan"), -1.0])
def test_a_start_that_is_not_a_number_of_seconds_is_rejected(tmp_path: Path, start: float) -> None:
    clip = write(tmp_path / "clip.mp4")
    with pytest.raises(UsageError, match=f"start {start} must be a number of seconds"):
        VideoReader(clip, start=start)


def test_only_one_of_several_sizes_of_a_video_is_downloaded(tmp_path: Path) -> None:
    """The first one listed. Of the other, only a few segments may be requested before the choice is made."""
    playlist = ["#EXTM3U"]
    for name, size in (("small", (48, 64)), ("large", (96, 128))):
        (tmp_path / name).mkdir()
        clip = write(tmp_path / f"{name}.mp4", 100, size=size, g="10")
        with (
            av.open(str(clip)) as source,
            av.open(
                str(tmp_path / name / "list.m3u8"), "w", format="hls", options={"hls_time": "0.4", "hls_list_size": "0"}
            ) as pieces,
        ):
            stream = pieces.add_stream_from_template(source.streams.video[0])
            for packet in source.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    pieces.mux(packet)
        playlist += [f"#EXT-X-STREAM-INF:BANDWIDTH=10000,RESOLUTION={size[1]}x{size[0]}", f"{name}/list.m3u8"]
    (tmp_path / "all.m3u8").write_text("\n".join(playlist) + "\n")
    fetched: Counter[str] = Counter()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args, directory=str(tmp_path))

        def log_message(self, *_: object) -> None:
            pass

        def do_GET(self) -> None:
            fetched[self.path.split("/")[1]] += self.path.endswith(".ts")
            super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/all.m3u8"
        try:
            with VideoReader(url, options={}, timeout=(20, 20)) as reader:
                frames = list(reader)
        finally:
            server.shutdown()
    assert (len(frames), frames[0].size) == (100, (48, 64))
    assert fetched["small"] >= 10
    assert fetched["large"] <= 4
