"""Speed of a video end to end: frames per second of the whole command, and the time of each step.

The clip is made from real photos (a slow pan and zoom over each for two seconds), 1280x720 at 30 frames per second,
H.264 with sound, so that decoding and encoding cost what they cost in practice. Immediately before and after each run
of `petseg infer` in the engine that ``auto`` chooses, a plain loop processes the same frames in the same engine: one
with petseg's Python API, one with a peer's network in the environment of benchmarks.peers. The loops decode on all
cores, as petseg does, encode with its default settings, and draw with Pillow, frame by frame. The other engines and
kinds, which no loop is compared with, run in every second round.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeAlias

import av
import click
import numpy as np
from PIL import Image

from benchmarks import records
from benchmarks.peers import environments
from benchmarks.peers.contenders import MODELS
from benchmarks.peers.pipeline import make_models
from benchmarks.photos import data_option, original_size
from benchmarks.processes import seconds_of
from petseg_runtime import Segmenter
from petseg_runtime.sources import find_photos

WIDTH, HEIGHT, RATE, SOUND = 1280, 720, 30, 48000
#: Frames per photo.
SHOT: Final = 60

#: petseg's engines for CPUs.
ENGINES: Final = ("openvino", "onnxruntime")
#: Length in seconds of the clip for the warm-up runs.
WARM: Final = 1
#: The cases that no loop is compared with run every so many rounds.
BETWEEN: Final = 2
#: The network that is closest to petseg's in speed (``python -m benchmarks peers``).
PEER: Final = "lraspp_mobilenet_v3_large"

#: The plain loop that people write without a pipeline: read a frame, segment it, draw, write it.
LOOP = """
import sys
import av, numpy as np
from petseg_runtime import Segmenter
clip, backend, output = sys.argv[1:]
with Segmenter(backend=backend) as segmenter, av.open(clip) as source, av.open(output, "w") as sink:
    picture = source.streams.video[0]
    picture.thread_type = "AUTO"
    options = {"preset": "veryfast", "crf": "21"}
    stream = sink.add_stream("libx264", rate=picture.average_rate, options=options)
    stream.width, stream.height, stream.pix_fmt = picture.width, picture.height, "yuv420p"
    for frame in source.decode(video=0):
        overlay = segmenter(frame.to_ndarray(format="rgb24")).overlay()
        sink.mux(stream.encode(av.VideoFrame.from_image(overlay)))
    sink.mux(stream.encode(None))
"""


@click.command()
@data_option
@click.option("--seconds", type=click.IntRange(1), default=4, show_default=True, help="Length of the clip.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Runs beside the plain loops.")
def video(data: Path, seconds: int, rounds: int) -> None:
    """Measure the frames per second of `petseg infer CLIP`, by engine and kind, and of plain loops."""
    first, other = engines()
    cases = [(first, "overlay"), (other, "overlay"), (first, "mask"), (first, "cutout")]
    with tempfile.TemporaryDirectory() as scratch:
        clip, short = Path(scratch) / "clip.mp4", Path(scratch) / "short.mp4"
        make_clip(clip, data, seconds * RATE)
        make_clip(short, data, WARM * RATE)
        runs: dict[tuple[str, str], list[dict[str, Any]]] = {case: [] for case in cases}
        loops = plain_loops(first, Path(scratch) / "loop.mp4")
        taken: dict[str, list[float]] = {name: [] for name in loops}

        def loop(name: str, source: Path) -> float:
            python, words = loops[name]
            return seconds_of(words(source), python)

        for case in cases:
            one(short, Path(scratch) / "out", *case)
        for name in loops:
            loop(name, short)
        before, after = loops
        for number in range(rounds):
            taken[before].append(loop(before, clip))
            runs[cases[0]].append(one(clip, Path(scratch) / "out", *cases[0]))
            taken[after].append(loop(after, clip))
            click.echo(f"loops in {first}: {taken[before][-1]:.1f}, {taken[after][-1]:.1f} s", err=True)
            click.echo(f"{' '.join(cases[0])}: {runs[cases[0]][-1]['seconds']:.1f} s", err=True)
            for case in cases[1:] if number % BETWEEN == 0 else ():
                runs[case].append(one(clip, Path(scratch) / "out", *case))
                click.echo(f"{' '.join(case)}: {runs[case][-1]['seconds']:.1f} s", err=True)
    frames = seconds * RATE
    about = {"clip": f"{WIDTH}x{HEIGHT}, {RATE} frames/s, {seconds} s, H.264 and AAC", "frames": frames}
    rows = [row(backend, kind, seconds, several) for (backend, kind), several in runs.items()]
    ours = [run["seconds"] for run in runs[cases[0]]]
    beside = [loop_row(name, first, frames, times, ours) for name, times in taken.items()]
    command = f"python -m benchmarks video --data DATA --seconds {seconds} --rounds {rounds}"
    click.echo(records.write("video", command, {**about, "rows": rows, "loops": beside}))


def engines() -> tuple[str, str]:
    """Return petseg's CPU engines, the one that ``auto`` chooses first."""
    with Segmenter(device="cpu") as segmenter:
        chosen = segmenter.describe().name
    first = chosen if chosen in ENGINES else ENGINES[0]
    return first, next(name for name in ENGINES if name != first)


#: The interpreter, and a function that returns its arguments for a clip.
Loop: TypeAlias = tuple[str | Path, Callable[[Path], list[str | Path]]]


def plain_loops(backend: str, output: Path) -> dict[str, Loop]:
    """Return both loops by name: petseg's and the peer's."""
    peers = environments.peers_environment()
    make_models(peers)
    model = MODELS / f"{PEER}.onnx"
    return {
        "petseg's Python API": (sys.executable, lambda clip: ["-c", LOOP, clip, backend, output]),
        f"torchvision {PEER}": (peers, lambda clip: ["-m", "benchmarks.peers.loops", backend, model, clip, output]),
    }


def row(backend: str, kind: str, seconds: int, taken: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the row of an engine and kind: medians, and the raw times."""
    wall = [run["seconds"] for run in taken]
    steps = {
        step: {p: median(run["steps"][step][p] for run in taken) for p in ("p50", "p95", "p99")}
        for step in taken[0]["steps"]
    }
    return {
        "backend": backend,
        "kind": kind,
        "seconds": wall,
        "frames_per_second": seconds * RATE / median(wall),
        "times_real_time": seconds / median(wall),
        "cpu_seconds_per_frame": median(run["cpu"] for run in taken) / (seconds * RATE),
        "steps": steps,
    }


def loop_row(name: str, backend: str, frames: int, taken: list[float], ours: list[float]) -> dict[str, Any]:
    """Return the row of a plain loop: its times, and how many times as fast `petseg infer` is in the same engine."""
    ratios = [a / b for a, b in zip(taken, ours, strict=True)]
    return {
        "name": f"{name}, {backend}",
        "seconds": taken,
        "frames_per_second": frames / median(taken),
        "petseg_times_as_fast": median(ratios),
        "petseg_times_as_fast_each": ratios,
    }


def one(clip: Path, output: Path, backend: str, kind: str) -> dict[str, Any]:
    """Run the whole process once; return its wall and CPU seconds, and the times of its steps."""
    command = ["-m", "petseg.cli", "infer", str(clip), "--as", kind, "--backend", backend, "--json"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CPU, sys.executable, *command, "--output", str(output)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    wall = time.perf_counter() - start
    *_, video_event, _, cpu = done.stdout.splitlines()
    event = json.loads(video_event)
    if event["written"] != event["frames"]["decoded"]:
        raise SystemExit(f"frames were lost: {event}")
    return {"seconds": wall, "cpu": float(cpu), "steps": event["steps"]}


#: Runs a command, and prints its CPU seconds.
CPU = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(used.ru_utime + used.ru_stime)
"""


def make_clip(path: Path, data: Path, frames: int) -> None:
    """Write a clip of photos, panned and zoomed, and a tone."""
    photos = find_photos([original_size(data) / "images"])[:: max(1, 200 // max(1, frames // SHOT))]
    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=RATE, options={"preset": "veryfast", "crf": "20"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        tone: Any = file.add_stream("aac", rate=SOUND, layout="mono")
        for number in range(frames):
            if number % SHOT == 0:
                with Image.open(photos[number // SHOT % len(photos)].source) as photo:
                    picture = photo.convert("RGB")
            frame = av.VideoFrame.from_ndarray(np.asarray(view(picture, number % SHOT / SHOT)), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            file.mux(stream.encode(frame))
            file.mux(tone.encode(second_of_tone(number // RATE)) if number % RATE == 0 else [])
        file.mux(stream.encode(None))
        file.mux(tone.encode(None))


def view(picture: Image.Image, progress: float) -> Image.Image:
    """Cut a part with the clip's aspect ratio out of a photo; it shrinks and moves with ``progress``."""
    width, height = picture.size
    scale = min(width / WIDTH, height / HEIGHT) * (1 - 0.25 * progress)
    across, down = scale * WIDTH, scale * HEIGHT
    left, top = (width - across) * progress, (height - down) / 2
    box = (left, top, left + across, top + down)
    return picture.resize((WIDTH, HEIGHT), Image.Resampling.BILINEAR, box=box)


def second_of_tone(second: int) -> Any:
    """Return one second of a 440 Hz tone."""
    times = np.arange(SOUND, dtype=np.float32) / SOUND
    samples = (0.1 * np.sin(2 * np.pi * 440 * times)).astype(np.float32)[None]
    sound = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
    sound.sample_rate, sound.pts, sound.time_base = SOUND, second * SOUND, Fraction(1, SOUND)
    return sound
