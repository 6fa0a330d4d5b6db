"""Over a hundred malformed videos: each yields frames or a one-line error; none crashes, hangs, or takes gigabytes."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

#: Bytes that may be allocated in addition to the loaded program, and seconds that one file may take.
MEMORY, SECONDS = 1_500_000_000, 20

#: Reads each file named on stdin and prints the outcome; the last one begun is the one that hangs or crashes.
PROGRAM = """
import json, resource, signal, sys
from petseg_runtime.errors import InputError
from petseg_runtime.video.frame import Converter
from petseg_runtime.video.reader import VideoReader
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + int(sys.argv[1]), resource.RLIM_INFINITY))
for line in sys.stdin:
    path = line.rstrip("\\n")
    print(json.dumps({"begun": path}), flush=True)
    signal.alarm(int(sys.argv[2]))
    frames, error, convert = 0, None, Converter()
    try:
        with VideoReader(path) as reader:
            for frame in reader:
                frame.pixels(convert, 16, 16)
                frames += 1
                if frames == 1:
                    frame.pixels(convert)
    except InputError as problem:
        error = str(problem)
    try:
        with VideoReader(path, start=0.2) as reader:
            for frame in reader:
                assert frame.pts >= 0
    except InputError as problem:
        assert path in str(problem) or frames
    signal.alarm(0)
    print(json.dumps({"frames": frames, "error": error}), flush=True)
"""


def clip(path: Path, codec: str = "libx264", sound: bool = True, pixels: str = "yuv420p") -> bytes:
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=25)
        stream.height, stream.width, stream.pix_fmt = 48, 64, pixels
        tone: Any = file.add_stream("aac" if path.suffix != ".webm" else "libopus", rate=48000) if sound else None
        for _ in range(12):
            noise = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(noise)))
        if tone:
            samples = av.AudioFrame.from_ndarray(np.zeros((2, 24000), np.float32), format="fltp", layout="stereo")
            samples.sample_rate = 48000
            file.mux(tone.encode(samples))
            file.mux(tone.encode(None))
        file.mux(stream.encode(None))
    return path.read_bytes()


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("good")
    return {
        "mp4": clip(folder / "a.mp4"),
        "mkv": clip(folder / "a.mkv"),
        "webm": clip(folder / "a.webm", "libvpx-vp9"),
        "avi": clip(folder / "a.avi", "mpeg4", sound=False),
        "ts": clip(folder / "a.ts", "mpeg2video", sound=False),
        "mov": clip(folder / "a.mov", "prores_ks", sound=False, pixels="yuv422p10le"),
        "flv": clip(folder / "a.flv"),
    }


def parameters(width: int, height: int) -> bytes:
    """An H.264 sequence parameter set (SPS) with a size in macroblocks (16 x 16 pixels)."""

    def code(value: int) -> str:
        bits = f"{value + 1:b}"
        return "0" * (len(bits) - 1) + bits

    # Id, bits of frame_num, order type, reference frames; no gaps; size; progressive, 8x8 inference, no crop, no VUI.
    bits = (
        code(0) + code(0) + code(2) + code(1) + "0" + code(width - 1) + code(height - 1) + "1" + "1" + "0" + "0" + "1"
    )
    bits += "0" * (-len(bits) % 8)
    body = bytes(int(bits[at : at + 8], 2) for at in range(0, len(bits), 8))
    return b"\0\0\0\1\x67\x42\0\x3e" + body


def endless() -> bytes:
    """A Matroska file with elements nested a hundred deep, whose declared sizes are the largest possible."""
    return (
        b"\x1a\x45\xdf\xa3\x84\x42\x82\x81\x77" + b"\x18\x53\x80\x67\x01" + b"\xff" * 7 + b"\x1f\x43\xb6\x75\xff" * 100
    )


def patched(data: bytes, what: bytes, offset: int, value: bytes) -> bytes:
    """Replace the bytes at an offset from each occurrence of ``what``."""
    changed, at = bytearray(data), data.find(what)
    while at >= 0:
        changed[at + offset : at + offset + len(value)] = value
        at = data.find(what, at + 1)
    return bytes(changed)


def malformed(good: dict[str, bytes], folder: Path) -> dict[str, bytes]:
    """Malformed files by name, which says what is wrong. Intact files that are not in ``good`` are made in a folder."""
    rng, found = random.Random(5), {}
    for suffix, data in good.items():
        for share in (0.01, 0.1, 0.3, 0.5, 0.8, 0.99):
            found[f"cut-{share}.{suffix}"] = data[: int(share * len(data))]
        found[f"beginning-lost.{suffix}"] = data[len(data) // 3 :]
        found[f"middle-lost.{suffix}"] = data[: len(data) // 3] + data[len(data) // 2 :]
        found[f"zeros.{suffix}"] = data[: len(data) // 3] + bytes(len(data) // 3) + data[2 * len(data) // 3 :]
        for number in range(10):
            changed = bytearray(data)
            for _ in range(2 ** (number // 2)):
                changed[rng.randrange(len(data) if number % 2 else min(2000, len(data)))] = rng.randrange(256)
            found[f"flipped-{number}.{suffix}"] = bytes(changed)
    mp4, huge = good["mp4"], (2**31 - 1).to_bytes(4, "big")
    nal, huge_side = b"\0\0\0\1", b"\xff\xfe"
    raw = clip(folder / "good.h264", sound=False)
    pictures = raw[raw.index(nal + b"\x68") :] if nal + b"\x68" in raw else raw[len(raw) // 20 :]
    photos = clip(folder / "good.avi", "mjpeg", sound=False, pixels="yuvj420p")
    old = clip(folder / "good.webm", "libvpx", sound=False)
    found |= {
        "index-lost.mp4": patched(mp4, b"moov", 0, b"free"),
        "data-lost.mp4": patched(mp4, b"mdat", 0, b"free"),
        "duration-wrong.mp4": patched(mp4, b"mvhd", 20, huge),
        "duration-0.mp4": patched(mp4, b"mdhd", 20, bytes(4)),
        "rate-0.mp4": patched(mp4, b"mdhd", 16, bytes(4)),
        "size-0.mp4": patched(mp4, b"avc1", 28, bytes(4)),
        "size-huge.mp4": patched(mp4, b"avc1", 28, b"\xff\xff\xff\xff"),
        "samples-huge.mp4": patched(mp4, b"stsz", 12, huge),
        "sample-size-huge.mp4": patched(mp4, b"stsz", 8, huge),
        "chunks-huge.mp4": patched(mp4, b"stco", 8, huge),
        "times-huge.mp4": patched(mp4, b"stts", 8, huge),
        "box-0.mp4": patched(mp4, b"trak", -4, bytes(4)),
        "box-huge.mp4": patched(mp4, b"trak", -4, huge),
        "parameters-wrong.mp4": patched(mp4, b"avcC", 8, bytes(24)),
        "parameters-huge.h264": parameters(4095, 4095) + pictures,
        "parameters-8k.h264": parameters(512, 270) + pictures,
        "parameters-long.h264": parameters(65535, 1) + pictures,
        "parameters-0.h264": parameters(2**32 - 1, 2**32 - 1) + pictures,
        "parameters-change.h264": raw + parameters(4095, 4095) + pictures + parameters(4, 3) + pictures,
        "photos-huge.avi": patched(photos, b"\xff\xc0", 5, huge_side * 2),
        "photos-0.avi": patched(photos, b"\xff\xc0", 5, bytes(4)),
        "vp8-huge.webm": patched(old, b"\x9d\x01\x2a", 3, b"\xff\x3f\xff\x3f"),
        "vp8-0.webm": patched(old, b"\x9d\x01\x2a", 3, bytes(4)),
        "mpeg2-huge.ts": patched(good["ts"], b"\0\0\1\xb3", 4, b"\xff\xff\xff"),
        "mpeg2-0.ts": patched(good["ts"], b"\0\0\1\xb3", 4, bytes(3)),
        "prores-huge.mov": patched(good["mov"], b"icpf", 12, huge_side * 2),
        "flv-back.flv": good["flv"][:2000] + good["flv"] * 3,
        "joined.ts": good["ts"] * 5,
        "joined-back.ts": good["ts"][188 * 20 :] + good["ts"],
        "endless.mkv": endless(),
        "only-sound.mp4": patched(mp4, b"vide", 0, b"soun"),
        "empty.mp4": b"",
        "text.mp4": b"This is no video.\n" * 1000,
        "nothing-but-a-name.mkv": b"\x1a\x45\xdf\xa3",
        "y4m-huge.y4m": b"YUV4MPEG2 W999999 H999999 F25:1\nFRAME\n" + bytes(1000),
        "y4m-0.y4m": b"YUV4MPEG2 W0 H0 F25:1\nFRAME\n" + bytes(1000),
        "y4m-rate-0.y4m": b"YUV4MPEG2 W4 H4 F0:0\n" + (b"FRAME\n" + bytes(24)) * 5,
        "itself.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nitself.m3u8\n#EXT-X-ENDLIST\n",
        "itself.mp4": b"ffconcat version 1.0\nfile itself.mp4\n",
        "secrets.mp4": b"ffconcat version 1.0\nfile /etc/passwd\n",
        "secrets.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        "other.mp4": b"ffconcat version 1.0\nfile good.h264\n",
        "other.m3u8": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nflv-back.flv\n#EXT-X-ENDLIST\n",
        "network.mp4": b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nhttp://127.0.0.1:1/a.ts\n",
        "session.mp4": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5000 RTP/AVP 96\n",
    }
    return found


def run(paths: list[Path]) -> dict[str, dict[str, Any]]:
    """Read each file and return the outcomes; after a crash or a hang, another process continues with the next file."""
    results: dict[str, dict[str, Any]] = {}
    left = list(paths)
    while left:
        command = [sys.executable, "-c", PROGRAM, str(MEMORY), str(SECONDS)]
        done = subprocess.run(command, input="\n".join(map(str, left)) + "\n", capture_output=True, text=True)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        begun = [line["begun"] for line in lines if "begun" in line]
        for path, line in zip(begun, (line for line in lines if "begun" not in line), strict=False):
            results[Path(path).name] = line
        if len(results) < len(paths) - len(left) + len(begun):
            results[Path(begun[-1]).name] = {"crash": done.returncode, "stderr": done.stderr[-500:]}
        elif done.returncode:
            raise AssertionError(done.stderr)
        left = left[len(begun) :]
    return results


def test_each_yields_frames_or_an_error_in_one_line(tmp_path: Path, good: dict[str, bytes]) -> None:
    files = malformed(good, tmp_path)
    assert len(files) > 100
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    results = run([tmp_path / name for name in files])
    assert {name: result for name, result in results.items() if "crash" in result} == {}
    assert set(results) == set(files)
    for name, result in results.items():
        assert result["frames"] or result["error"], name
        if result["error"]:
            assert name in result["error"]
            assert "\n" not in result["error"]
        assert "root:" not in str(result)
    lists = ("itself.m3u8", "itself.mp4", "network.mp4", "other.mp4", "other.m3u8", "secrets.mp4", "secrets.m3u8")
    for name in ("empty.mp4", "text.mp4", "y4m-huge.y4m", "y4m-0.y4m", "parameters-huge.h264", *lists):
        assert results[name]["error"], name
        assert not results[name]["frames"], name
    assert sum(result["frames"] > 0 for result in results.values()) > 30, "damage leaves most videos something to show"


def test_intact_files_are_read(tmp_path: Path, good: dict[str, bytes]) -> None:
    paths = []
    for suffix, data in good.items():
        paths.append(tmp_path / f"good.{suffix}")
        paths[-1].write_bytes(data)
    for name, result in run(paths).items():
        assert result == {"frames": 12, "error": None}, name
