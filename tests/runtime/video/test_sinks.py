"""Written files, as other programs read them: times, audio, colours, transparency; complete files or none."""

from __future__ import annotations

import errno
import io
import itertools
import json
import os
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from clips import HEIGHT, WIDTH, picture, write_clip
from petseg_runtime.errors import InputError, OutputError, UsageError
from petseg_runtime.result import Segmentation
from petseg_runtime.segmenter import Segmenter
from petseg_runtime.sinks import Picture, render_of
from petseg_runtime.sources import Origin
from petseg_runtime.video import movie as movie_module
from petseg_runtime.video import sinks
from petseg_runtime.video.frame import Converter, Frame
from petseg_runtime.video.looks import Painter
from petseg_runtime.video.movie import MovieSink
from petseg_runtime.video.numbered import OWN, drop_later, next_number, numbered, pieces
from petseg_runtime.video.reader import VideoReader
from petseg_runtime.video.run import VideoReport, segment_video
from petseg_runtime.video.sinks import LinesSink, PicturesSink, RawSink
from petseg_runtime.video.sound import Sound
from petseg_runtime.video.stream import Reading

ffprobe = pytest.mark.skipif(shutil.which("ffprobe") is None, reason="ffprobe is not installed (Debian: ffmpeg)")


class Model:
    """Pet where the picture is red."""

    size = (HEIGHT, WIDTH)
    threads = None
    threshold, cutout_threshold, certain_share, min_area, keep_doubtful = 0.5, 0.3, 0.25, 0.0, True

    def describe(self) -> Any:
        return type("Info", (), {"batch": 4, "streams": 1})()

    def infer(self, images: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(images[..., 0])

    finish = Segmenter.finish


def write_tone(
    path: Path, codec: str, sound: str, rate: int, layout: str = "stereo", *, broken: range = range(0), seconds: int = 2
) -> Path:
    """A clip with silence, then a tone, in any codec and at any rate; the samples in ``broken`` are NaN."""
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        tone: Any = file.add_stream(sound, rate=rate, layout=layout, **({"bit_rate": 64000} if "wma" in sound else {}))
        samples = (0.25 * np.sin(np.arange(rate * seconds) * 2 * np.pi * 440 / rate)).astype(np.float32)
        samples[: rate // 10] = 0
        samples[broken.start : broken.stop] = np.nan
        resampler = av.AudioResampler(tone.codec_context.format, layout, rate)
        channels = av.AudioLayout(layout).nb_channels
        for start in range(0, len(samples), 1024):
            chunk = np.repeat(samples[start : start + 1024, None], channels, axis=1).reshape(1, -1)
            audio = av.AudioFrame.from_ndarray(chunk, format="flt", layout=layout)
            audio.sample_rate, audio.pts, audio.time_base = rate, start, Fraction(1, rate)
            for converted in resampler.resample(audio):
                file.mux(tone.encode(converted))
        file.mux(tone.encode(None))
        for number in range(25 * seconds):
            frame = av.VideoFrame.from_ndarray(picture(number))
            frame.pts, frame.time_base = number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return path


def run(clip: Path, sink: Any, **reading: Any) -> VideoReport:
    origin = Origin(str(clip), str(clip), Path(clip.stem))
    model: Any = Model()
    report = segment_video(origin, model, sink, Reading(**reading))
    assert report.error is None
    frames = report.frames
    assert frames.decoded == report.written + frames.dropped + frames.failed
    return report


def movie(path: Path, kind: str = "overlay", **options: Any) -> MovieSink:
    return MovieSink(iter([path]), Painter(kind), **{"endless": False, **options})


def probe(path: Path, kind: str = "v", *, count: bool = False) -> dict[str, Any]:
    command = ["ffprobe", "-v", "error", "-select_streams", kind, "-show_streams", "-of", "json", str(path)]
    found = json.loads(subprocess.check_output([*command, *(["-count_frames"] if count else [])]))
    streams: list[dict[str, Any]] = found["streams"]
    return streams[0] if streams else {}


def packets(path: Path) -> list[tuple[float, bytes]]:
    with av.open(str(path)) as file:
        stream = file.streams.audio[0]
        return [(float(p.pts * p.time_base), bytes(p)) for p in file.demux(stream) if p.pts is not None]


def frame_times(path: Path) -> list[Fraction]:
    with av.open(str(path)) as file:
        return [frame.pts * frame.time_base for frame in file.decode(video=0)]


def start_of_tone(path: Path) -> float:
    """Seconds, from the first frame."""
    with av.open(str(path)) as file:
        for frame in file.decode(audio=0):
            samples = np.abs(frame.to_ndarray().astype(np.float64)).reshape(-1)
            loud = np.flatnonzero(samples > 0.05 * (32768 if samples.max() > 2 else 1))
            if len(loud):
                channels = 1 if frame.format.is_planar else 2
                return float(frame.pts * frame.time_base) + loud[0] % (len(samples)) / channels / frame.sample_rate
    raise AssertionError("no tone")


@ffprobe
@pytest.mark.parametrize("rate", [Fraction(30000, 1001), Fraction(24000, 1001), Fraction(25), Fraction(60)])
def test_rates_and_counts_are_those_of_the_source(tmp_path: Path, rate: Fraction) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 45, rate=rate)
    report = run(clip, movie(tmp_path / "out.mp4"))
    about = probe(tmp_path / "out.mp4", count=True)
    assert Fraction(about["avg_frame_rate"]) == Fraction(about["r_frame_rate"]) == rate
    assert int(about["nb_read_frames"]) == int(about["nb_frames"]) == report.written == 45
    assert float(about["duration"]) == pytest.approx(float(45 / rate), abs=1e-3)
    assert float(about["start_time"]) == 0
    assert (about["codec_name"], about["pix_fmt"]) == ("h264", "yuv420p")


def test_a_variable_rate_stays_variable_frame_by_frame(tmp_path: Path) -> None:
    times = [0, 40, 50, 130, 131, 400, 1000, 1040]
    clip = write_clip(tmp_path / "clip.mkv", len(times), times=times, sound=None)
    run(clip, movie(tmp_path / "out.mp4"))
    assert [round(1000 * time) for time in frame_times(tmp_path / "out.mp4")] == times


@pytest.mark.parametrize("seconds", [1, 4])
def test_times_in_nanoseconds_fit_into_a_movie(tmp_path: Path, seconds: int) -> None:
    with movie(tmp_path / "out.mp4") as sink:
        for number in range(8):
            frame = frame_of(number)
            frame.duration, frame.time_base = seconds * 10**9, Fraction(1, 10**9)
            frame.pts *= frame.duration
            sink.write(frame, result_of(frame))
    assert frame_times(tmp_path / "out.mp4") == [number * seconds for number in range(8)]


@pytest.mark.parametrize("name", ["out.mp4", "out.webm"])
def test_the_last_frame_is_shown_as_long_as_in_the_source(tmp_path: Path, name: str) -> None:
    pictures = [Image.fromarray(picture(number)) for number in range(4)]
    pictures[0].save(tmp_path / "clip.gif", save_all=True, append_images=pictures[1:], duration=[40, 40, 1000, 3000])
    run(tmp_path / "clip.gif", movie(tmp_path / name))
    with av.open(str(tmp_path / name)) as file:
        last = max((packet for packet in file.demux(video=0) if packet.pts is not None), key=lambda packet: packet.pts)
        assert float(last.duration * last.time_base) == 3


@pytest.mark.parametrize("stride", [1, 3, 25, 90_000])
def test_a_stride_does_not_change_how_long_a_video_is(tmp_path: Path, stride: int) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 40, sound=None)
    run(clip, movie(tmp_path / "out.mp4"), stride=stride)
    with av.open(str(tmp_path / "out.mp4")) as file:
        video = file.streams.video[0]
        assert video.duration * video.time_base == pytest.approx(40 / 25, abs=1e-3)


@pytest.mark.parametrize("options", [{}, {"stride": 3}])
def test_audio_is_passed_through_bit_for_bit(tmp_path: Path, options: dict[str, Any]) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 50)
    run(clip, movie(tmp_path / "out.mp4"), **options)
    assert [data for _, data in packets(tmp_path / "out.mp4")] == [data for _, data in packets(clip)]
    for (before, _), (after, _) in zip(packets(clip), packets(tmp_path / "out.mp4"), strict=True):
        assert after == pytest.approx(before, abs=1e-4)


@pytest.mark.parametrize(
    ("source", "target", "kind", "codec"),
    [("mp4", "webm", "cutout", "opus"), ("mkv", "mp4", "overlay", "aac"), ("webm", "mp4", "overlay", "opus")],
)
def test_audio_that_does_not_fit_is_reencoded_in_sync(
    tmp_path: Path, source: str, target: str, kind: str, codec: str
) -> None:
    codecs = {"mp4": ("libx264", "aac"), "mkv": ("libx264", "pcm_s16le"), "webm": ("libvpx-vp9", "libopus")}
    video, sound = codecs[source]
    clip = write_clip(tmp_path / f"clip.{source}", 50, codec=video, sound=sound)
    report = run(clip, movie(tmp_path / f"out.{target}", kind))
    with av.open(str(tmp_path / f"out.{target}")) as file:
        assert file.streams.audio[0].codec_context.codec.canonical_name == codec
    assert bool(report.notes) == (source != "webm")
    assert start_of_tone(tmp_path / f"out.{target}") == pytest.approx(start_of_tone(clip), abs=0.03)
    length = sum(1 for _ in packets(tmp_path / f"out.{target}")) * (0.02 if codec == "opus" else 1024 / 48000)
    assert length == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(
    ("source", "sound", "passed"),
    [
        ("mp4", "aac", True),
        ("ts", "libmp3lame", True),
        ("ts", "libopus", True),
        ("ts", "aac", False),
        ("ts", "ac3", False),
        ("mkv", "eac3", False),
    ],
)
def test_audio_described_by_its_packets_is_reencoded_if_the_header_comes_first(
    tmp_path: Path, source: str, sound: str, passed: bool
) -> None:
    clip = write_clip(tmp_path / f"clip.{source}", 50, sound=sound)
    for endless in (False, True):
        out = tmp_path / f"out-{endless}.mp4"
        report = run(clip, movie(out, endless=endless))
        assert bool(report.notes) == (endless and not passed)
        assert start_of_tone(out) == pytest.approx(0.1, abs=0.05)
        with av.open(str(out)) as file:
            heard = sum(frame.samples for frame in file.decode(audio=0)) / 48000
        assert heard == pytest.approx(2.0, abs=0.1)


@pytest.mark.parametrize(("target", "kind"), [("mp4", "overlay"), ("webm", "cutout")])
@pytest.mark.parametrize(
    ("name", "codec", "sound", "rate", "layout"),
    [
        ("clip.asf", "wmv2", "wmav1", 44100, "stereo"),
        ("clip.wmv", "wmv2", "wmav2", 44100, "stereo"),
        ("clip.avi", "mpeg4", "adpcm_ms", 22050, "stereo"),
        ("clip.avi", "mpeg4", "adpcm_ima_wav", 22050, "mono"),
        ("clip.avi", "mpeg4", "g726", 8000, "mono"),
        ("clip.mov", "mpeg4", "adpcm_ima_qt", 22050, "stereo"),
        ("clip.mov", "mpeg4", "pcm_mulaw", 8000, "mono"),
        ("clip.3gp", "mpeg4", "libopencore_amrnb", 8000, "mono"),
        ("clip.flv", "flv", "nellymoser", 22050, "mono"),
        ("clip.m2ts", "libx264", "pcm_bluray", 48000, "stereo"),
        ("clip.mkv", "libx264", "libmp3lame", 8000, "stereo"),  # which MP4 does not support
    ],
)
def test_audio_not_described_by_its_packets_is_reencoded_with_a_note(
    tmp_path: Path, name: str, codec: str, sound: str, rate: int, layout: str, target: str, kind: str
) -> None:
    if sound not in av.codecs_available:
        pytest.skip(f"PyAV {av.__version__} has no encoder {sound}")  # AMR: not in the wheels of 19
    clip, out = write_tone(tmp_path / name, codec, sound, rate, layout), tmp_path / f"out.{target}"
    report = run(clip, movie(out, kind))
    (note,) = report.notes
    assert note.endswith("is re-encoded as " + {"mp4": "aac", "webm": "opus"}[target])
    assert len(frame_times(out)) == 50
    with av.open(str(out)) as file:
        heard = [(frame.samples / frame.sample_rate, frame.to_ndarray()) for frame in file.decode(audio=0)]
    assert sum(seconds for seconds, _ in heard) == pytest.approx(2, abs=0.15)
    assert max(np.abs(samples).max() for _, samples in heard) == pytest.approx(0.25, abs=0.05)
    assert start_of_tone(out) == pytest.approx(0.1, abs=0.05)


@pytest.mark.parametrize("endless", [False, True])
def test_audio_that_the_file_does_not_support_is_reencoded(tmp_path: Path, endless: bool) -> None:
    clip = write_tone(tmp_path / "clip.mkv", "libx264", "libmp3lame", 11025)
    report = run(clip, movie(tmp_path / "out.mp4", endless=endless))
    assert report.notes == ["the audio (mp3) is re-encoded as aac"]
    assert len(frame_times(tmp_path / "out.mp4")) == 50
    # The encoder's first packet, which only an edit list removes, and that is written last.
    lead = 1024 / 11025 if endless else 0
    assert start_of_tone(tmp_path / "out.mp4") == pytest.approx(0.1 + lead, abs=0.05)


def test_audio_in_an_unknown_codec_is_left_out_with_a_note(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mkv", 50)
    clip.write_bytes(clip.read_bytes().replace(b"A_AAC", b"A_XXX"))
    report = run(clip, movie(tmp_path / "out.mp4"))
    assert report.notes == ["the audio is left out: this FFmpeg cannot decode its codec"]
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert [stream.type for stream in file.streams] == ["video"]
    assert len(frame_times(tmp_path / "out.mp4")) == 50


def test_audio_that_the_encoder_rejects_does_not_end_the_video(tmp_path: Path) -> None:
    clip = write_tone(tmp_path / "clip.mkv", "libx264", "pcm_f32le", 48000, broken=range(40000, 44000))
    report = run(clip, movie(tmp_path / "out.mp4"))
    assert "part of the audio (pcm_f32le) cannot be converted and is left out" in report.notes
    assert len(frame_times(tmp_path / "out.mp4")) == 50
    with av.open(str(tmp_path / "out.mp4")) as file:
        last = [(frame.time, frame.to_ndarray()) for frame in file.decode(audio=0)][-10:]
    assert last[-1][0] > 1.9
    assert max(np.abs(samples).max() for _, samples in last) > 0.2, "it continues after that"


def write_broadcast(path: Path, codec: str, kinds: list[tuple[str, int]]) -> Path:
    """A transport stream with one audio stream: a second of a tone in each layout and rate, one after the other."""
    with av.open(str(path), "w", format="mpegts") as file:
        stream: Any = file.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        tone: Any = file.add_stream(codec, rate=kinds[0][1], layout=kinds[0][0])
        for number in range(25 * len(kinds)):
            frame = av.VideoFrame.from_ndarray(picture(number))
            frame.pts, frame.time_base = number, Fraction(1, 25)
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
        for second, (layout, rate) in enumerate(kinds):
            encoder: Any = av.CodecContext.create(codec, "w")
            encoder.format, encoder.layout, encoder.sample_rate = tone.codec_context.format, layout, rate
            samples = (8000 * np.sin(np.arange(rate) * 2 * np.pi * 440 / rate)).astype(np.int16)
            both = np.repeat(samples[:, None], encoder.layout.nb_channels, axis=1).reshape(1, -1)
            audio = av.AudioFrame.from_ndarray(both, format="s16", layout=layout)
            audio.sample_rate, audio.pts, audio.time_base = rate, 0, Fraction(1, rate)
            for packet in [*encoder.encode(audio), *encoder.encode(None)]:
                packet.stream = tone
                packet.time_base = Fraction(1, rate)
                packet.pts, packet.dts = packet.pts + second * rate, packet.dts + second * rate
                file.mux(packet)
    return path


@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.parametrize(
    ("codec", "kinds"),
    [
        ("mp2", [("mono", 48000), ("stereo", 48000)]),
        ("mp2", [("stereo", 48000), ("mono", 32000), ("stereo", 44100)]),
        ("ac3", [("stereo", 48000), ("5.1", 48000)]),
    ],
)
def test_audio_that_changes_its_layout_or_rate_continues(
    tmp_path: Path, codec: str, kinds: list[tuple[str, int]], endless: bool
) -> None:
    clip = write_broadcast(tmp_path / "clip.ts", codec, kinds)
    report = run(clip, movie(tmp_path / "out.mp4", endless=endless))
    assert len(frame_times(tmp_path / "out.mp4")) == 25 * len(kinds)
    assert not [note for note in report.notes if "left out" in note]
    with av.open(str(tmp_path / "out.mp4")) as file:
        heard = [(frame.samples / frame.sample_rate, frame.to_ndarray()) for frame in file.decode(audio=0)]
    assert sum(seconds for seconds, _ in heard) == pytest.approx(len(kinds), abs=0.15)
    loud = sum(seconds for seconds, samples in heard if np.abs(samples).max() > 0.1)
    assert loud == pytest.approx(len(kinds), abs=0.15)


@pytest.mark.parametrize("codec", ["aac", "ac3", "mp2"])
@pytest.mark.parametrize("endless", [False, True])
def test_damaged_audio_does_not_end_the_video(tmp_path: Path, codec: str, endless: bool) -> None:
    clip = write_clip(tmp_path / "clip.ts", 50, sound=codec)
    packet_numbers = itertools.count()

    def damaged(sound: Sound) -> Sound:
        packet = sound.packet
        if next(packet_numbers) % 10 == 5:
            packet = av.Packet(b"\x55" * packet.size)
            packet.time_base, packet.pts, packet.dts = sound.packet.time_base, sound.packet.pts, sound.packet.dts
        return Sound(packet, sound.shift)

    with VideoReader(clip) as reader, movie(tmp_path / "out.mp4", endless=endless) as sink:
        for frame in reader:
            frame.sound = [damaged(sound) for sound in frame.sound]
            sink.write(frame, result_of(frame))
        sink.end([damaged(sound) for sound in reader.rest], whole=True)
    assert [note for note in sink.notes if note.startswith("part of the audio") and note.endswith("is left out")]
    assert len(frame_times(tmp_path / "out.mp4")) == 50
    with av.open(str(tmp_path / "out.mp4")) as file:
        heard = sum(frame.samples for frame in file.decode(audio=0)) / 48000
    assert 1.6 < heard < 2.1


def with_audio_ahead(clip: Path, sink: MovieSink, seconds: int) -> MovieSink:
    """Write a clip whose audio is so many seconds ahead of the picture."""
    with VideoReader(clip) as reader, sink:
        for frame in reader:
            frame.sound = [Sound(sound.packet, sound.shift + seconds) for sound in frame.sound]
            sink.write(frame, result_of(frame))
        sink.end([], whole=True)
    return sink


def test_audio_far_ahead_of_an_endless_picture_is_left_out(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 50)
    near = with_audio_ahead(clip, movie(tmp_path / "near.mp4", endless=True), 3)
    assert not near.notes
    assert packets(tmp_path / "near.mp4")[1][0] == pytest.approx(3, abs=0.05)  # the first fills what is before it
    far = with_audio_ahead(clip, movie(tmp_path / "far.mp4", endless=True), 3600)
    assert far.notes == ["audio more than 5 s ahead of the picture is left out"]
    assert not packets(tmp_path / "far.mp4")
    assert len(frame_times(tmp_path / "far.mp4")) == 50


def test_waiting_audio_is_not_scanned_for_each_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = itertools.count()
    time: Any = Sound.time
    monkeypatch.setattr(Sound, "time", property(lambda sound: (next(asked), time.fget(sound))[1]))
    clip = write_clip(tmp_path / "clip.mp4", 50)
    with_audio_ahead(clip, movie(tmp_path / "out.mp4"), 3600)
    assert next(asked) <= 2 * len(packets(clip))


def test_audio_starts_and_ends_with_the_selected_part(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 100)
    run(clip, movie(tmp_path / "out.mp4"), start=1.0, max_frames=50)
    times = [time for time, _ in packets(tmp_path / "out.mp4")]
    assert times[0] == pytest.approx(0, abs=0.03)
    assert 1.6 < times[-1] < 2.3
    assert len(frame_times(tmp_path / "out.mp4")) == 50
    assert frame_times(tmp_path / "out.mp4")[0] == 0


def test_no_audio_is_written_without_audio_or_on_request(tmp_path: Path) -> None:
    run(write_clip(tmp_path / "silent.mp4", sound=None), movie(tmp_path / "a.mp4"))
    run(write_clip(tmp_path / "clip.mp4"), movie(tmp_path / "b.mp4", audio=False))
    for name in "ab":
        with av.open(str(tmp_path / f"{name}.mp4")) as file:
            assert not file.streams.audio


@pytest.mark.parametrize(
    ("codec", "rate", "layout", "files"),
    [("aac", 48000, "stereo", 1), ("aac", 44100, "stereo", 2), ("aac", 48000, "mono", 2), ("mp3", 48000, "stereo", 2)],
)
def test_a_reconnect_continues_the_movie_if_its_audio_fits(
    tmp_path: Path, codec: str, rate: int, layout: str, files: int
) -> None:
    first = write_tone(tmp_path / "first.mp4", "libx264", "aac", 48000)
    second = write_tone(tmp_path / "second.mp4", "libx264", codec, rate, layout)
    with MovieSink(numbered(tmp_path / "out", "mp4"), Painter("mask"), endless=True) as sink:
        for number, clip in enumerate((first, second)):
            with VideoReader(clip) as reader:
                for frame in reader:
                    frame.pts += round(2 * number / frame.time_base)
                    frame.sound = [Sound(sound.packet, sound.shift + 2 * number) for sound in frame.sound]
                    sink.write(frame, result_of(frame))
        sink.end([], whole=True)
    assert sink.files == files
    heard = [len(packets(path)) * 1024 / 48000 for path in sink.paths]
    assert heard[0] == pytest.approx(4 / files, abs=0.15)


@ffprobe
def test_a_phones_portrait_video_is_upright_without_a_display_matrix(tmp_path: Path) -> None:
    lying = write_clip(tmp_path / "lying.mp4", sound=None)
    clip = tmp_path / "clip.mp4"
    with av.open(str(lying)) as source, av.open(str(clip), "w") as file:
        stream = file.add_stream_from_template(source.streams.video[0], opaque=True)
        stream.set_display_rotation(90)
        for packet in source.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                file.mux(packet)
    run(clip, movie(tmp_path / "out.mp4"))
    about = probe(tmp_path / "out.mp4")
    assert (about["height"], about["width"]) == (WIDTH, HEIGHT)
    assert "side_data_list" not in about
    shown = tmp_path / "shown.png"  # the ffmpeg command applies the display matrix
    subprocess.run(["ffmpeg", "-v", "error", "-i", str(clip), "-frames:v", "1", str(shown)], check=True)
    with VideoReader(tmp_path / "out.mp4") as reader:
        first = next(iter(reader)).pixels(Converter())
    with Image.open(shown) as wanted:
        upright = np.asarray(wanted.convert("RGB")).astype(int)
    blue = upright[..., 0] < 60  # not painted on
    assert 0.5 < blue.mean() < 0.95
    assert np.median(np.abs(first.astype(int) - upright)[blue]) < 4
    assert first[~blue][:, 1].mean() > 80  # painted on, in green


@ffprobe
@pytest.mark.parametrize(("size", "space"), [((48, 64), "smpte170m"), ((720, 1280), "bt709")])
def test_colours_are_tagged_and_unpainted_pixels_keep_theirs(tmp_path: Path, size: tuple[int, int], space: str) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 3, size=size, sound=None, options={"crf": "5"})
    run(clip, movie(tmp_path / "out.mp4"))
    about = probe(tmp_path / "out.mp4")
    assert (about["color_space"], about["color_range"]) == (space, "tv")
    with VideoReader(clip) as before, VideoReader(tmp_path / "out.mp4") as after:
        pairs = [(a.pixels(Converter()), b.pixels(Converter())) for a, b in zip(before, after, strict=True)]
    blue = pairs[0][0][..., 0] < 60
    for source, written in pairs[:1]:
        difference = np.abs(source[blue].astype(int) - written[blue])
        assert difference.mean() < 3


@ffprobe
@pytest.mark.parametrize(
    ("kind", "primaries", "transfer"),
    [("overlay", "bt2020", "smpte2084"), ("mask", None, None), ("probability", None, None)],
)
def test_only_kinds_that_show_the_source_have_its_primaries_and_transfer(
    tmp_path: Path, kind: str, primaries: str | None, transfer: str | None
) -> None:
    """The white of a mask tagged as PQ would be 10,000 cd/m²."""
    clip = tmp_path / "clip.mkv"
    with av.open(str(clip), "w") as file:
        stream: Any = file.add_stream("libx264", rate=25)
        stream.height, stream.width, stream.pix_fmt = HEIGHT, WIDTH, "yuv420p"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = 9, 9, 16
        file.mux([*stream.encode(av.VideoFrame.from_ndarray(picture(0))), *stream.encode(None)])
    run(clip, movie(tmp_path / "out.mp4", kind))
    about = probe(tmp_path / "out.mp4")
    assert about["color_space"] == "bt2020nc"
    assert (about.get("color_primaries"), about.get("color_transfer")) == (primaries, transfer)


def test_masks_survive_the_encoder(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", size=(240, 320), sound=None)
    run(clip, movie(tmp_path / "out.mp4", "mask"))
    with VideoReader(clip) as before, VideoReader(tmp_path / "out.mp4") as after:
        for source, written in zip(before, after, strict=True):
            small = source.pixels(Converter(), HEIGHT, WIDTH)[..., 0]
            wanted = np.asarray(Image.fromarray(small).resize((320, 240), Image.Resampling.BILINEAR)) >= 128
            got = written.pixels(Converter())[..., 0] >= 128
            assert (wanted & got).sum() / (wanted | got).sum() > 0.99


def test_cutouts_are_transparent(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", sound=None)
    run(clip, movie(tmp_path / "out.webm", "cutout"))
    with av.open(str(tmp_path / "out.webm")) as file:
        stream = file.streams.video[0]
        assert stream.metadata.get("ALPHA_MODE", stream.metadata.get("alpha_mode")) == "1"
        decoder: Any = av.CodecContext.create("libvpx-vp9", "r")
        frames = [frame for packet in file.demux(stream) for frame in decoder.decode(packet)]
    assert len(frames) == 30
    assert frames[0].format.name == "yuva420p"
    alpha = np.frombuffer(frames[0].planes[3], np.uint8).reshape(HEIGHT, -1)[:, :WIDTH]
    red = picture(0)[..., 0] > 200
    assert alpha[red].mean() > 240
    assert alpha[: HEIGHT // 4 - 4].max() < 16


@pytest.mark.parametrize("size", [(49, 64), (48, 65), (49, 65)])
def test_odd_sides_are_made_even(tmp_path: Path, size: tuple[int, int]) -> None:
    clip = tmp_path / "clip.mkv"
    with av.open(str(clip), "w") as file:
        stream: Any = file.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = *size, "bgr0"
        for number in range(5):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture(number, *size))))
        file.mux(stream.encode(None))
    run(clip, movie(tmp_path / "out.mp4"))
    with av.open(str(tmp_path / "out.mp4")) as file:
        video = file.streams.video[0]
        assert (video.height, video.width) == (size[0] + size[0] % 2, size[1] + size[1] % 2)


def test_segments_have_their_length_their_audio_and_times_from_zero(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 75)
    sink = MovieSink(numbered(tmp_path / "out", "mp4"), Painter("overlay"), endless=True, segment=1.0)
    report = run(clip, sink)
    assert [path.name for path in report.paths] == ["0001.mp4", "0002.mp4", "0003.mp4"]
    lengths = [len(frame_times(path)) for path in report.paths]
    assert lengths == [25, 25, 25]
    assert all(frame_times(path)[0] < Fraction(3, 100) for path in report.paths)
    count = sum(len(packets(path)) for path in report.paths)
    assert count == pytest.approx(len(packets(clip)), abs=1), "nothing is lost between pieces"


@pytest.mark.parametrize(("suffix", "kind"), [("mp4", "overlay"), ("webm", "cutout")])
@pytest.mark.parametrize("slower", [1, 5])
def test_at_most_two_seconds_are_lost_when_the_process_is_killed(
    tmp_path: Path, suffix: str, kind: str, slower: int
) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 110 if slower == 1 else 30)
    with VideoReader(clip) as reader, movie(tmp_path / f"out.{suffix}", kind, endless=True) as sink:
        still = None
        for frame in reader:
            still = still or frame.picture  # else the encoder inserts keyframes itself
            frame.picture, frame.pts, frame.sound = still, frame.pts * slower, []  # the muxer waits for missing audio
            sink.write(frame, result_of(frame))
        shutil.copy(sink.paths[0], tmp_path / f"left.{suffix}")
    assert frame.time > 4
    assert frame_times(tmp_path / f"left.{suffix}")[-1] >= frame.time - 2


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What was synced: inodes and sizes."""
    told: list[tuple[int, int]] = []

    def fsync(descriptor: int) -> None:
        about = os.fstat(descriptor)
        told.append((about.st_ino, 0 if stat.S_ISDIR(about.st_mode) else about.st_size))

    monkeypatch.setattr(os, "fsync", fsync)
    return told


@pytest.mark.skipif(os.name != "posix", reason="elsewhere folders cannot be flushed")
@pytest.mark.parametrize("endless", [False, True])
def test_complete_files_are_synced(tmp_path: Path, synced: list[tuple[int, int]], endless: bool) -> None:
    frames = [frame_of(n) for n in range(50)]
    paths = (tmp_path / f"{n}.mp4" for n in itertools.count())
    lines = LinesSink([tmp_path / "out.ndjson"], endless=endless)
    with MovieSink(paths, Painter("mask"), endless=endless, segment=1.0) as sink, lines:
        for frame in frames[:25]:
            sink.write(frame, result_of(frame))
            lines.write(frame, result_of(frame))
        assert not synced, "with each frame it would be slow"
        for frame in frames[25:]:
            sink.write(frame, result_of(frame))
        folder = tmp_path.stat().st_ino, 0
        first, second, text = tmp_path / "0.mp4", tmp_path / "1.mp4", tmp_path / "out.ndjson"
        while endless and len(synced) < 2:  # in another thread
            time.sleep(0.01)
        assert synced == [(first.stat().st_ino, first.stat().st_size), folder]
    rest = [(path.stat().st_ino, path.stat().st_size) for path in (text, second)]
    assert synced[2:] == [rest[0], folder, rest[1], folder]


def test_a_slow_disk_does_not_block_live_frames_and_its_failure_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(descriptor: int) -> None:
        assert written.wait(20), "the frames wait for the disk"
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    written = threading.Event()
    monkeypatch.setattr(os, "fsync", fsync)
    paths = (tmp_path / f"{n}.mp4" for n in itertools.count())
    sink = MovieSink(paths, Painter("mask"), endless=True, segment=0.5)
    for number in range(40):
        sink.write(frame := frame_of(number), result_of(frame))
    written.set()
    with pytest.raises(OutputError, match=r"0\.mp4: cannot be written \(Input/output error\)"):
        sink.close()
    assert {path.name for path in tmp_path.iterdir()} >= {"0.mp4", "1.mp4"}


def test_a_live_file_may_be_moved_away_while_it_is_written(tmp_path: Path) -> None:
    paths = (tmp_path / f"{n}.mp4" for n in itertools.count())
    with MovieSink(paths, Painter("mask"), endless=True, segment=0.5) as sink:
        for number in range(40):
            sink.write(frame := frame_of(number), result_of(frame))
            if number == 5:
                (tmp_path / "0.mp4").rename(tmp_path / "elsewhere.mp4")
    assert sink.files >= 2
    assert {"1.mp4", "elsewhere.mp4"} <= {path.name for path in tmp_path.iterdir()}
    assert frame_times(tmp_path / "elsewhere.mp4")


def test_two_recorders_in_one_folder_do_not_write_each_others_files(tmp_path: Path) -> None:
    """Two services whose URLs differ in the query alone, or an old process that is still finishing."""
    sinks = [MovieSink(numbered(tmp_path, "mp4"), Painter("mask"), endless=True, segment=0.5) for _ in range(2)]
    for number in range(30):
        for sink in sinks:
            sink.write(frame := frame_of(number), result_of(frame))
    for sink in sinks:
        sink.close()
    first, second = ({path.name for path in sink.paths} for sink in sinks)
    assert len(first) == len(second) >= 2
    assert not first & second
    assert sum(len(frame_times(path)) for path in tmp_path.iterdir()) == 60


def test_a_movie_that_cannot_start_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise av.error.ArgumentError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(movie_module, "_Movie", refused)
    sink = MovieSink(numbered(tmp_path, "mp4"), Painter("mask"), endless=True)
    with pytest.raises(InputError, match=r"its result .*0001\.mp4 cannot be written \(Invalid argument\)"):
        sink.write(frame := frame_of(0), result_of(frame))
    assert not list(tmp_path.iterdir())


def test_lines_are_appended_to_a_truncated_file(tmp_path: Path) -> None:
    """Logrotate truncates with its option copytruncate."""
    path = tmp_path / "0001.ndjson"
    with LinesSink([path], endless=True) as sink:
        for number in range(3):
            sink.write(frame := frame_of(number), result_of(frame))
            if number == 1:
                os.truncate(path, 0)
    (line,) = path.read_text().splitlines()
    assert json.loads(line)["number"] == 2


@pytest.mark.parametrize("quarters", [0, 1])
def test_pixels_keep_their_shape(tmp_path: Path, quarters: int) -> None:
    """DVDs, DV and HDV have pixels that are not square."""
    clip, ratio = tmp_path / "dv.mp4", Fraction(64, 45)
    with av.open(str(clip), "w") as file:
        stream = file.add_stream("libx264", rate=25, options={"preset": "ultrafast"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        stream.codec_context.sample_aspect_ratio = ratio
        for number in range(3):
            frame = av.VideoFrame.from_ndarray(picture(number))
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    with VideoReader(clip) as reader, MovieSink([tmp_path / "out.mp4"], Painter("mask"), endless=False) as sink:
        for frame in reader:
            assert frame.aspect == ratio
            frame.quarters = quarters
            sink.write(frame, result_of(frame))
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert file.streams.video[0].sample_aspect_ratio == (1 / ratio if quarters else ratio)


@pytest.mark.parametrize(("duration", "most"), [(50, 100), (1, 100)])
def test_keyframes_are_close_enough_to_seek(tmp_path: Path, duration: int, most: int) -> None:
    """The first frame of a screen recording may be shown for seconds, or for a tick."""
    base = Fraction(1, 25) if duration > 1 else Fraction(1, 90000)
    with MovieSink([tmp_path / "out.mp4"], Painter("mask"), endless=False) as sink:
        for number in range(4):
            frame = frame_of(number)
            frame.pts, frame.duration, frame.time_base = number * duration, duration, base
            sink.write(frame, result_of(frame))
        (movie,) = sink._movies
        assert most <= movie._picture.codec_context.gop_size <= 1200


def test_numbered_pictures_are_not_synced_one_by_one(tmp_path: Path, synced: list[tuple[int, int]]) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 3, sound=None)
    run(clip, PicturesSink(tmp_path / "out", Picture("mask", "png", render_of("mask"))))
    assert not synced


def test_existing_files_are_not_replaced(tmp_path: Path) -> None:
    assert next_number(tmp_path / "nowhere") == 1
    for name in ("0001.mp4", "0007.ndjson", "notes.txt", "0009"):
        (tmp_path / name).touch()
    assert next_number(tmp_path) == 10
    assert next(numbered(tmp_path, "mp4")) == tmp_path / "0010.mp4"


def test_the_newest_files_of_an_endless_source_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sinks, "_NEWEST", 2)
    for endless in (True, False):
        paths = (tmp_path / f"{n}.mp4" for n in range(5))
        with MovieSink(paths, Painter("mask"), endless=endless) as sink:
            for number in range(5):
                frame = frame_of(number, 48 + 16 * (number % 2))
                sink.write(frame, result_of(frame))
        assert sink.files == 5
        assert [path.name for path in sink.paths] == [f"{n}.mp4" for n in range(5)][3 if endless else 0 :]


def test_frames_of_another_size_start_another_file(tmp_path: Path) -> None:
    frames = [frame_of(n, *((48, 64) if n < 5 else (64, 48))) for n in range(10)]
    paths = (tmp_path / f"{n}.mp4" for n in itertools.count())
    with MovieSink(paths, Painter("mask"), endless=False) as sink:
        for frame in frames:
            sink.write(frame, result_of(frame))
    assert [len(frame_times(path)) for path in sink.paths] == [5, 5]
    assert frame_times(sink.paths[1])[0] == 0


def frame_of(number: int, height: int = HEIGHT, width: int = WIDTH) -> Frame:
    return Frame(
        number, number, Fraction(1, 25), av.VideoFrame.from_ndarray(picture(number, height, width)), duration=1
    )


def result_of(frame: Frame) -> Segmentation:
    pixels = frame.pixels(Converter())
    return Segmentation(pixels, np.ascontiguousarray(pixels[..., 0]), 0.5, 0.3)


SINKS: dict[str, Callable[[Path], Any]] = {
    "movie": lambda path: movie(path / "out.mp4"),
    "lines": lambda path: LinesSink([path / "out.ndjson"], endless=False),
}


@pytest.mark.parametrize("name", SINKS)
def test_a_file_is_complete_or_missing(tmp_path: Path, name: str) -> None:
    with SINKS[name](tmp_path) as sink:
        frame = frame_of(0)
        sink.write(frame, result_of(frame))
        assert all(path.name.startswith(".") for path in tmp_path.iterdir())
    (path,) = tmp_path.iterdir()
    assert path == sink.paths[0]


def test_a_full_disk_is_an_output_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        def __init__(self, *_: Any) -> None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(movie_module, "_Movie", Full)
    frame = frame_of(0)
    full = pytest.raises(OutputError, match=r"out\.mp4: cannot be written \(No space left on device\)")
    with full, movie(tmp_path / "out.mp4") as sink:
        sink.write(frame, result_of(frame))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (av.error.ArgumentError(errno.EINVAL, "Invalid argument"), InputError),
        (av.error.InvalidDataError(1, "Invalid data"), InputError),
        (av.error.ExternalError(1, "Generic error in an external library"), InputError),
        (av.error.MemoryError(errno.ENOMEM, "Cannot allocate memory"), InputError),
        (OSError("encoder error -2 when writing image file"), InputError),  # Pillow's
        (OSError(errno.ENAMETOOLONG, "File name too long"), InputError),
        (IsADirectoryError(errno.EISDIR, "Is a directory"), InputError),
        (av.error.OSError(errno.ENOSPC, "No space left on device"), OutputError),
        (av.error.OSError(errno.EIO, "Input/output error"), OutputError),
        (av.error.PermissionError(errno.EACCES, "Permission denied"), OutputError),
        (FileNotFoundError(errno.ENOENT, "No such file or directory"), OutputError),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value.__name__,
)
def test_system_errors_concern_the_output_and_others_this_video(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(movie_module._Movie, "write", fail)
    frame = frame_of(0)
    with pytest.raises(raised) as told, movie(tmp_path / "out.mp4") as sink:
        sink.write(frame, result_of(frame))
    assert type(told.value) is raised
    assert str(tmp_path / "out.mp4") in str(told.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [ValueError("not enough values to unpack"), UsageError("no such kind")], ids=repr)
def test_a_bug_while_writing_is_not_this_videos_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(movie_module._Movie, "write", fail)
    frame, picture = frame_of(0), Picture("mask", "png", fail)  # type: ignore[arg-type]
    for sink in (movie(tmp_path / "out.mp4"), PicturesSink(tmp_path / "out", picture)):
        with pytest.raises(type(error)) as told, sink:
            sink.write(frame, result_of(frame))
        assert told.value is error
    assert {path.name for path in tmp_path.rglob("*")} == {"out", OWN}


def test_a_movie_is_removed_after_an_error_even_if_open_files_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Windows."""
    unlink, close, is_open = Path.unlink, movie_module._Movie.close, [True]

    def unlink_closed(path: Path, missing_ok: bool = False) -> None:
        if is_open[0]:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        unlink(path, missing_ok=missing_ok)

    def noted_close(self: Any) -> None:
        close(self)
        is_open[0] = False

    monkeypatch.setattr(Path, "unlink", unlink_closed)
    monkeypatch.setattr(movie_module._Movie, "close", noted_close)
    sink = movie(tmp_path / "out.mp4")
    sink.write(frame := frame_of(0), result_of(frame))
    with pytest.raises(RuntimeError, match="first"), sink:
        raise RuntimeError("first")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("endless", [False, True])
@pytest.mark.parametrize("failing", [1, 2])
def test_the_next_movie_is_completed_if_one_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endless: bool, failing: int
) -> None:
    """Two are open when the size has just changed: the first one waits for late audio."""

    def close(self: Any) -> None:
        real(self)
        closed.append(self)
        if len(closed) <= failing:
            raise OSError(errno.EIO, f"error {len(closed)}")

    closed: list[Any] = []
    real = movie_module._Movie.close
    monkeypatch.setattr(movie_module._Movie, "close", close)
    first, second = tmp_path / "1.mp4", tmp_path / "2.mp4"
    sink = MovieSink(iter([first, second]), Painter("mask"), endless=endless)
    for frame in (frame_of(0), frame_of(1, 64, 48)):
        sink.write(frame, result_of(frame))
    with pytest.raises(OutputError, match=r"1\.mp4: cannot be written \(error 1\)"):
        sink.close()
    assert len(closed) == 2
    left = [first, second] if endless else [second][failing - 1 :]
    assert sorted(tmp_path.iterdir()) == sink.paths == left
    assert sink.files == len(left)
    assert [len(frame_times(path)) for path in left] == [1] * len(left)


@pytest.mark.parametrize("endless", [False, True])
def test_a_result_that_cannot_be_written_is_an_error_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, endless: bool
) -> None:
    def write(self: Any, frame: Frame, painted: Any) -> None:
        if frame.number == 3:
            raise av.error.ArgumentError(errno.EINVAL, "Invalid argument")
        real(self, frame, painted)

    real = movie_module._Movie.write
    monkeypatch.setattr(movie_module._Movie, "write", write)
    clip, out = write_clip(tmp_path / "clip.mkv", sound=None), tmp_path / "out" / "out.mp4"
    model: Any = Model()
    origin = Origin("testsrc=size=64x48:rate=25", "test", Path("a"), "lavfi", {}, endless=True)
    origin = origin if endless else Origin(str(clip), str(clip), Path("clip"))
    states: list[str | None] = []
    report = segment_video(
        origin,
        model,
        movie(out, endless=endless),
        Reading(policy="block"),
        tell=lambda state: states.append(state.reason),
    )
    assert report.error == f"{origin.shown}: its result {out} cannot be written (Invalid argument)"
    assert report.written == (3 if endless else 0), "of frames that are in no file"
    assert bool(report.found) == bool(report.rate) == endless
    assert list(out.parent.iterdir()) == report.paths == ([out] if endless else [])
    assert report.files == len(report.paths)
    if endless:
        assert states[-1] == report.error
        assert len(frame_times(out)) == 3
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("petseg")]


def test_frames_too_wide_for_a_format_are_this_videos_error(tmp_path: Path) -> None:
    """H.264 supports up to 16384 pixels, WebP up to 16383."""
    clip = write_clip(tmp_path / "clip.mkv", 2, sound=None, size=(16, 16400), codec="libvpx-vp9")
    model: Any = Model()
    webp = PicturesSink(tmp_path / "out", Picture("cutout", "webp", render_of("cutout")))
    for sink in (movie(tmp_path / "out.mp4"), webp):
        report = segment_video(Origin(str(clip), str(clip), Path("clip")), model, sink, Reading())
        assert str(report.error).startswith(f"{clip}: its result {tmp_path / 'out'}")
        assert "cannot be written" in str(report.error)
    assert {path.name for path in tmp_path.rglob("*")} == {"clip.mkv", "out", OWN}


@pytest.mark.parametrize("endless", [False, True])
def test_files_of_lines_have_the_segments_length(tmp_path: Path, endless: bool) -> None:
    for name in ("0001", "0002", "0003", "0004"):
        (tmp_path / f"{name}.ndjson").write_text("of an earlier run")
    (tmp_path / OWN).touch()
    paths = numbered(tmp_path, "ndjson") if endless else pieces(tmp_path, "ndjson")
    first = 5 if endless else 1
    with LinesSink(paths, endless=endless, segment=1.0) as sink:
        for number in range(60):
            sink.write(frame := frame_of(number), result_of(frame))
    assert [path.name for path in sink.paths] == [f"{first + n:04d}.ndjson" for n in range(3)]
    lines = [path.read_text().splitlines() for path in sink.paths]
    assert [len(piece) for piece in lines] == [25, 25, 10]
    assert [json.loads(line)["number"] for piece in lines for line in piece] == list(range(60))
    left = {path.name for path in tmp_path.iterdir()} - {path.name for path in sink.paths}
    assert left == ({"0001.ndjson", "0002.ndjson", "0003.ndjson", "0004.ndjson", OWN} if endless else {OWN})


def test_two_writers_of_lines_in_one_folder_do_not_write_each_others_files(tmp_path: Path) -> None:
    sinks = [LinesSink(numbered(tmp_path, "ndjson"), endless=True) for _ in range(2)]
    for number in range(3):
        for sink in sinks:
            sink.write(frame := frame_of(number), result_of(frame))
    for sink in sinks:
        sink.close()
    assert [sink.paths[0].name for sink in sinks] == ["0001.ndjson", "0002.ndjson"]
    assert [len(sink.paths[0].read_text().splitlines()) for sink in sinks] == [3, 3]


@pytest.mark.parametrize(
    ("there", "last", "left"),
    [
        (["0001", "0002", "0003"], "0001", ["0001"]),
        (["9998", "9999", "10000", "10001", "240512"], "9998", ["240512", "9998"]),  # four digits were used up
        (
            ["0001", "0002", "10000", "20240512", "00003", "2b", "٣"],
            "0001",
            ["00003", "0001", "10000", "20240512", "2b", "٣"],
        ),
        (["9999", "10000", "99999", "100000"], "10000", ["10000", "9999"]),
    ],
)
def test_only_later_numbers_of_a_longer_run_are_removed(
    tmp_path: Path, there: list[str], last: str, left: list[str]
) -> None:
    for name in there:
        (tmp_path / f"{name}.mp4").touch()
    drop_later(tmp_path / f"{last}.mp4", 4)
    assert sorted(path.stem for path in tmp_path.iterdir()) == left


def test_an_encoder_that_fails_at_the_end_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Any) -> None:
        self._file.close()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(movie_module._Movie, "close", fail)
    frame = frame_of(0)
    with pytest.raises(OutputError, match="No space left"), movie(tmp_path / "out.mp4") as sink:
        sink.write(frame, result_of(frame))
    assert not list(tmp_path.iterdir())
    assert (sink.paths, sink.files) == ([], 0)


def test_an_abandoned_movie_is_removed_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[Any] = []
    monkeypatch.setattr(movie_module._Movie, "close", lambda movie: closed.append(movie))
    frame, sink = frame_of(0), movie(tmp_path / "out.mp4")
    sink.write(frame, result_of(frame))
    sink.__exit__(KeyError, KeyError(), None)
    assert len(closed) == 1
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_created_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    frame = frame_of(0)
    for sink in (movie(tmp_path / "file" / "out.mp4"), LinesSink([tmp_path / "file" / "x.ndjson"], endless=True)):
        with pytest.raises(OutputError, match="cannot be written"), sink:
            sink.write(frame, result_of(frame))


@pytest.mark.parametrize(("kind", "channels"), [("mask", 0), ("overlay", 3), ("cutout", 4)])
def test_raw_frames_are_those_of_the_numbered_pictures(tmp_path: Path, kind: str, channels: int) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 4, sound=None)
    with (tmp_path / "raw").open("wb") as stream:
        run(clip, RawSink(stream, Picture(kind, "raw", render_of(kind))))
    run(clip, PicturesSink(tmp_path / "out", Picture(kind, "png", render_of(kind))))
    names = sorted(path.name for path in (tmp_path / "out").iterdir() if path.name != OWN)
    assert names == [f"{n:06d}.png" for n in range(4)]
    shape = (4, HEIGHT, WIDTH, *([channels] if channels else []))
    raw = np.fromfile(tmp_path / "raw", np.uint8).reshape(shape)
    for name, frame in zip(names, raw, strict=True):
        with Image.open(tmp_path / "out" / name) as saved:
            np.testing.assert_array_equal(np.asarray(saved), frame)


def test_a_pipe_of_raw_frames_rejects_another_size(tmp_path: Path) -> None:
    with (tmp_path / "raw").open("wb") as stream, RawSink(stream, Picture("mask", "raw", render_of("mask"))) as sink:
        sink.write(frame_of(0), result_of(frame_of(0)))
        other = frame_of(1, 20, 20)
        with pytest.raises(OutputError, match="cannot signal; give a folder with --output"):
            sink.write(other, result_of(other))


class Pipe(io.RawIOBase):
    """An unbuffered pipe. Each write is interrupted by a signal, or fails with an error."""

    def __init__(self, error: OSError | None = None) -> None:
        self.got, self._error = b"", error

    def write(self, data: Any) -> int:
        if self._error:
            raise self._error
        part = bytes(data[:1000])
        self.got += part
        return len(part)


def test_raw_frames_are_whole_if_signals_interrupt_writes() -> None:
    pipe: Any = Pipe()
    with RawSink(pipe, Picture("overlay", "raw", render_of("overlay"))) as sink:
        for number in range(2):
            frame = frame_of(number)
            sink.write(frame, result_of(frame))
            assert len(pipe.got) == (number + 1) * HEIGHT * WIDTH * 3


def test_a_full_disk_behind_a_pipe_of_raw_frames_is_an_output_error() -> None:
    full: Any = Pipe(OSError(errno.ENOSPC, "No space left on device"))
    sink = RawSink(full, Picture("mask", "raw", render_of("mask")))
    with pytest.raises(OutputError, match=r"standard output cannot be written to \(No space left on device\)"):
        sink.write(frame_of(0), result_of(frame_of(0)))


def test_lines_say_what_was_found(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 5)
    run(clip, LinesSink([tmp_path / "out.ndjson"], endless=False))
    lines = [json.loads(line) for line in (tmp_path / "out.ndjson").read_text().splitlines()]
    assert [line["number"] for line in lines] == list(range(5))
    assert [line["time"] for line in lines] == [0.0, 0.04, 0.08, 0.12, 0.16]
    for line in lines:
        assert set(line) == {"number", "time", "height", "width", "coverage", "found", "box"}
        assert line["coverage"] == pytest.approx((picture(0)[..., 0] > 200).mean(), abs=0.05)


def test_a_failing_begun_callback_leaves_nothing_running(tmp_path: Path) -> None:
    def begun(*_: object) -> None:
        raise LookupError("no place for it")

    clip = write_clip(tmp_path / "clip.mp4", sound=None)
    model: Any = Model()
    with pytest.raises(LookupError, match="no place"):
        segment_video(
            Origin(str(clip), str(clip), Path("clip")), model, movie(tmp_path / "out.mp4"), Reading(), begun=begun
        )
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("petseg")] == []
    assert [path.name for path in tmp_path.iterdir()] == ["clip.mp4"]
