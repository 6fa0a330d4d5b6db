"""Clips for the tests of several folders: a moving red square on blue, and a tone."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

HEIGHT, WIDTH = 48, 64
TONE = 1024  # samples per audio frame


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """A moving red square, which is a near-certain pet for the toy model, on blue."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[...] = (20, 40, 160)
    left = 4 + number % (width // 2)
    pixels[height // 4 : height // 2 + 8, left : left + width // 3] = (255, 10, 20)
    return pixels


def tone_frames(count: int, whole: bool) -> Iterator[av.AudioFrame]:
    """Yield ``count`` samples of a tone after 0.1 s of silence, whose end tests can locate; as int16 or float32."""
    samples = (0.2 * np.sin(np.arange(count) * 2 * np.pi * 440 / 48000)).astype(np.float32)
    samples[: 48000 // 10] = 0
    for start in range(0, count, TONE):
        chunk = np.repeat(samples[None, start : start + TONE], 2, axis=0)
        chunk = (chunk * 32767).astype(np.int16) if whole else chunk
        audio = av.AudioFrame.from_ndarray(chunk, format="s16p" if whole else "fltp", layout="stereo")
        audio.sample_rate, audio.pts, audio.time_base = 48000, start, Fraction(1, 48000)
        yield audio


def write_clip(
    path: Path,
    frames: int = 30,
    *,
    rate: Fraction = Fraction(25),
    times: list[int] | None = None,
    sound: str | None = "aac",
    size: tuple[int, int] = (HEIGHT, WIDTH),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
) -> Path:
    """Write a clip with a tone after a silence; ``times`` are in milliseconds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        if times:
            stream.codec_context.time_base = Fraction(1, 1000)
        tone: Any = file.add_stream(sound, rate=48000, layout="stereo") if sound else None
        sounds = tone_frames(int(48000 * (times[-1] / 1000 if times else frames / rate)), sound == "pcm_s16le")
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number, *size))
            frame.pts, frame.time_base = (times[number], Fraction(1, 1000)) if times else (number, 1 / rate)
            file.mux(stream.encode(frame))
            if tone:  # interleaved: about as much sound as video
                for audio in itertools.islice(sounds, math.ceil(48000 / rate / TONE)):
                    file.mux(tone.encode(audio))
        if tone:
            file.mux([packet for audio in [*sounds, None] for packet in tone.encode(audio)])
        file.mux(stream.encode(None))
    return path
