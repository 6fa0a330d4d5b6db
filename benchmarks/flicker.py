"""``python -m benchmarks flicker``: how much ``--smooth`` reduces flicker, and what it costs where something moves.

    python -m benchmarks flicker --data data

There are no videos with masks here, so one-second clips are synthesized from photos with trimaps, which gives the
ground truth of every frame: still scenes with a camera's noise, a lamp's flicker and an encoder's artefacts; and scenes
in which the camera or the pet moves, also with noise. A moving pet is cut out by its trimap and composited over a strip
of another photo that has no pet in it. Frames have at most 480 pixels a side, so resizing to the model's size averages
their noise less than that of a large video.

The constants of :mod:`petseg_runtime.video.smoothing` were chosen on *choose* (photos of trainval); *report* (test
photos) is the half to quote. The record has both, with the alternatives that were considered.
"""

from __future__ import annotations

import io
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeAlias
from unittest import mock

import av
import click
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from benchmarks import records
from benchmarks.found import crops
from benchmarks.photos import data_option, original_size
from petseg.data import Pair, Split, find, read_pair
from petseg.metrics import BORDER, PET
from petseg_runtime import Segmenter
from petseg_runtime.parity import mask_iou
from petseg_runtime.regions import without_doubtful
from petseg_runtime.video import smoothing

U8: TypeAlias = npt.NDArray[np.uint8]
Bool: TypeAlias = npt.NDArray[np.bool_]
#: A smoother: (image, probability, seconds) -> probability.
Smoothing: TypeAlias = Callable[[U8, U8, float], U8]

HALVES: Final = {"choose": Split.TRAIN, "report": Split.TEST}
STRENGTHS: Final = (0.0, 0.5, 0.7, 0.85, 0.95)
RECOMMENDED: Final = 0.85
FRAMES: Final = 30
RATE: Final = 30
#: The longer side of a frame.
SIDE: Final = 480
#: Standard deviation of the noise in clips that are not about noise, in levels of 255.
NOISE: Final = 3.0
#: Noise is drawn once; each frame uses a piece of it from a random offset.
_BANK: Final = np.random.default_rng(7).standard_normal(4_000_037, np.float32)


@dataclass(frozen=True, eq=False)
class Scene:
    """A photo, another one for the cut, and a backdrop for the moving pet; all of one size.

    Attributes:
        photo: RGB.
        truth: One channel: 255 pet, 128 border, 0 background.
        other: The photo after the cut.
        other_truth: Its ground truth.
        backdrop: RGB, without a pet.
    """

    photo: Image.Image
    truth: Image.Image
    other: Image.Image
    other_truth: Image.Image
    backdrop: Image.Image


Shot: TypeAlias = tuple[Image.Image, Image.Image]


def still(scene: Scene, frame: int) -> Shot:
    return scene.photo, scene.truth


def cut(scene: Scene, frame: int) -> Shot:
    return (scene.photo, scene.truth) if frame < FRAMES // 2 else (scene.other, scene.other_truth)


def camera(path: Callable[[int], tuple[float, float, float]]) -> Callable[[Scene, int], Shot]:
    """Move the camera over the photo; ``path`` returns x and y from the centre, in pixels of a frame, and the zoom."""

    def shot(scene: Scene, frame: int) -> Shot:
        x, y, zoom = path(frame)
        width, height = scene.photo.size
        w, h = 0.75 * width / zoom, 0.75 * height / zoom
        left, top = (width - w) / 2 + 0.75 * x, (height - h) / 2 + 0.75 * y
        return _view(scene.photo, left, top, w, h), _view(scene.truth, left, top, w, h)

    return shot


def pet(path: Callable[[int], float]) -> Callable[[Scene, int], Shot]:
    """Move the pet sideways over the backdrop; ``path`` returns the offset in pixels of a frame."""

    def shot(scene: Scene, frame: int) -> Shot:
        width, height = scene.photo.size
        moved = [_view(picture, -path(frame), 0, width, height) for picture in (scene.photo, scene.truth)]
        return Image.composite(moved[0], scene.backdrop, moved[1]), moved[1]

    return shot


def _view(picture: Image.Image, left: float, top: float, width: float, height: float) -> Image.Image:
    """Enlarge a part of a picture to the whole size; the outside is black, which is background in a ground truth."""
    how = Image.Resampling.BILINEAR if picture.mode == "L" else Image.Resampling.BICUBIC
    box = (left, top, left + width, top + height)
    return picture.transform(picture.size, Image.Transform.EXTENT, box, how)


def _shake(size: float) -> Callable[[int], tuple[float, float, float]]:
    """Imitate a hand's tremor with two incommensurable oscillations of about 2 and 8 Hz."""

    def path(t: int) -> tuple[float, float, float]:
        return (
            size * (0.6 * math.sin(0.43 * t) + 0.4 * math.sin(1.71 * t + 1)),
            size * (0.6 * math.cos(0.37 * t + 2) + 0.4 * math.sin(1.53 * t)),
            1.0,
        )

    return path


#: For each clip: its group, its shots, the noise, the lamp's flicker, and x264's crf (None: not encoded).
CLIPS: Final[dict[str, tuple[str, Callable[[Scene, int], Shot], float, float, int | None]]] = {
    "noise 3": ("still", still, 3.0, 0.0, None),
    "noise 8": ("still", still, 8.0, 0.0, None),
    "noise 16": ("still", still, 16.0, 0.0, None),
    "exposure +-4 %": ("still", still, NOISE, 0.04, None),
    "noise 8, H.264 crf 28": ("still", still, 8.0, 0.0, 28),
    "noise 8, H.264 crf 38": ("still", still, 8.0, 0.0, 38),
    "hand-held, 1 px": ("hand-held", camera(_shake(1.0)), NOISE, 0.0, None),
    "hand-held, 2.5 px": ("hand-held", camera(_shake(2.5)), NOISE, 0.0, None),
    "pan, 0.6 px a frame": ("moving", camera(lambda t: (0.6 * t - 9, 0, 1)), NOISE, 0.0, None),
    "pan, 4 px a frame": ("moving", camera(lambda t: (4 * t - 60, 0, 1)), NOISE, 0.0, None),
    "zoom, 0.3 % a frame": ("moving", camera(lambda t: (0, 0, 1.003**t)), NOISE, 0.0, None),
    "zoom, 1.5 % a frame": ("moving", camera(lambda t: (0, 0, 1.015**t)), NOISE, 0.0, None),
    "pet, 0.6 px a frame": ("moving", pet(lambda t: 0.6 * t - 9), NOISE, 0.0, None),
    "pet, 5 px a frame": ("moving", pet(lambda t: 5 * t - 75), NOISE, 0.0, None),
    "pet, to and fro": ("moving", pet(lambda t: 20 * math.sin(0.4 * t)), NOISE, 0.0, None),
    "cut": ("cut", cut, NOISE, 0.0, None),
}


@dataclass(frozen=True, eq=False)
class Clip:
    """A clip at the model's size, with the model's outputs.

    Attributes:
        group: ``still``, ``hand-held``, ``moving`` or ``cut``.
        name: A key of CLIPS.
        images: uint8 [frames, h, w, 3].
        outputs: uint8 [frames, h, w], the model's outputs.
        truth: uint8 [frames, h, w]: 255 pet, 0 background, between: border.
    """

    group: str
    name: str
    images: U8
    outputs: U8
    truth: U8


def clips(segmenter: Segmenter, scene: Scene, seed: int) -> Iterator[Clip]:
    """Make the clips of a scene."""
    height, width = segmenter.size
    for name, (group, shot, sigma, flicker, crf) in CLIPS.items():
        rng = np.random.default_rng([seed, len(name), ord(name[0])])
        shots = [shot(scene, frame) for frame in range(FRAMES)]
        frames = [_with_noise(picture, sigma, flicker, rng) for picture, _ in shots]
        if crf is not None:
            frames = _encoded(frames, crf)
        small = [frame.resize((width, height), Image.Resampling.BILINEAR) for frame in frames]
        truth = [value.resize((width, height), Image.Resampling.BILINEAR) for _, value in shots]
        images = np.stack([np.asarray(frame) for frame in small])
        yield Clip(group, name, images, segmenter.infer(images), np.stack([np.asarray(value) for value in truth]))


def _with_noise(picture: Image.Image, sigma: float, flicker: float, rng: np.random.Generator) -> Image.Image:
    """Add a sensor's noise, and a gain that changes from frame to frame."""
    pixels = np.asarray(picture)
    start = int(rng.integers(len(_BANK) - pixels.size))
    noise = _BANK[start : start + pixels.size].reshape(pixels.shape)
    lit = pixels * np.float32(1 + flicker * rng.uniform(-1, 1)) + np.float32(sigma) * noise
    return Image.fromarray(np.rint(lit).clip(0, 255).astype(np.uint8))


def _encoded(frames: list[Image.Image], crf: int) -> list[Image.Image]:
    """Encode the frames in H.264 and decode them, with a keyframe each half second, which adds to the flicker."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as sink:
        stream = sink.add_stream("libx264", rate=RATE)
        stream.width, stream.height, stream.pix_fmt = *frames[0].size, "yuv420p"
        stream.options = {"crf": str(crf), "preset": "veryfast", "g": str(RATE // 2)}
        for frame in frames:
            sink.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(frame), format="rgb24")))
        sink.mux(stream.encode(None))
    file.seek(0)
    with av.open(file, "r") as source:
        return [Image.fromarray(frame.to_ndarray(format="rgb24")) for frame in source.decode(video=0)]


def scenes(folder: Path, split: Split, count: int) -> list[Scene]:
    """Make scenes from photos spread over the split; photos with empty trimaps, a known flaw, are skipped."""
    pairs = find(folder, split)
    pairs = [pairs[i] for i in np.linspace(0, len(pairs) - 1, min(3 * count, len(pairs))).astype(int)]
    photos, backdrops = [], []
    for pair in pairs:
        photos.append(_photo_and_truth(pair))
        backdrops += [Image.fromarray(strip) for _, strip in crops(pair) if isinstance(strip, np.ndarray)]
    usable = [shot for shot in photos if np.asarray(shot[1]).max() == 255]
    usable = [usable[i] for i in np.linspace(0, len(usable) - 1, count).astype(int)]
    made = []
    for index, (photo, truth) in enumerate(usable):
        other, other_truth = (picture.resize(photo.size) for picture in usable[(index + count // 2) % count])
        backdrop = ImageOps.fit(backdrops[index % len(backdrops)], photo.size)
        made.append(Scene(photo, truth, other, other_truth, backdrop))
    return made


def _photo_and_truth(pair: Pair) -> Shot:
    pixels, trimap = read_pair(pair)
    factor = SIDE / max(trimap.shape)
    size = tuple(16 * max(1, round(side * factor / 16)) for side in trimap.shape[::-1])  # multiples of 16, as cameras'
    truth = np.select([trimap == PET, trimap == BORDER], [255, 128]).astype(np.uint8)
    return Image.fromarray(pixels).resize(size), Image.fromarray(truth).resize(size, Image.Resampling.BILINEAR)


@dataclass(frozen=True, eq=False)
class Measure:
    """The quality of a clip's smoothed outputs.

    Attributes:
        flicker: Share of pixels whose mask changes between frames, in [0, 1], among those whose ground truth does not;
            the border counts in still scenes only, as its motion is unknown elsewhere.
        change: Mean absolute change of the probability of the same pixels, in [0, 1].
        iou: IoU with the ground truth over all frames; the border is ignored.
        agreement: IoU with the unsmoothed masks, border included: where things move, it shows how far masks lag.
        residue: The largest difference, of 255, from the unsmoothed output in the frame after a cut; else 0.
    """

    flicker: float
    change: float
    iou: float
    agreement: float
    residue: int


def measure(clip: Clip, smoothed: U8, lowest_pet: float) -> Measure:
    """Compute :class:`Measure` for masks without low-confidence regions, which `petseg infer` drops in each frame."""
    residue = int(np.abs(smoothed[len(smoothed) // 2].astype(int) - clip.outputs[len(smoothed) // 2]).max())
    smoothed, outputs = (np.stack([without_doubtful(one) for one in each]) for each in (smoothed, clip.outputs))
    masks, plain = smoothed >= lowest_pet, outputs >= lowest_pet
    pet, known = clip.truth >= 250, (clip.truth >= 250) | (clip.truth <= 5)
    steady = np.ones_like(known[1:]) if clip.group == "still" else known[1:] & known[:-1] & (pet[1:] == pet[:-1])
    change = np.abs(smoothed[1:].astype(np.int16) - smoothed[:-1])[steady]
    return Measure(
        float((masks[1:] != masks[:-1])[steady].mean()),
        float(change.mean()) / 255,
        mask_iou(masks & known, pet),
        mask_iou(masks, plain),
        residue if clip.group == "cut" else 0,
    )


def smooth(clip: Clip, smoother: Smoothing, rate: float = RATE) -> U8:
    """Return a clip's outputs smoothed, uint8 [frames, h, w]."""
    pairs = zip(clip.images, clip.outputs, strict=True)
    return np.stack([smoother(image, output, frame / rate) for frame, (image, output) in enumerate(pairs)])


class Everywhere:
    """A moving average with the same strength everywhere, whatever moves."""

    def __init__(self, strength: float) -> None:
        self._strength, self._past = strength, np.zeros(0, np.float32)

    def __call__(self, image: U8, probability: U8, seconds: float) -> U8:
        past = self._past if self._past.size else probability
        self._past = probability + np.float32(self._strength) * (past - probability.astype(np.float32))
        return np.rint(self._past).astype(np.uint8)


class FirstTry:
    """The first version: compares with the previous frame in three channels, without compensating for light."""

    def __init__(self, strength: float) -> None:
        self._strength, self._image, self._past = strength, np.zeros(0, np.int16), np.zeros(0, np.float32)

    def __call__(self, image: U8, probability: U8, seconds: float) -> U8:
        now, fresh = image.astype(np.int16), probability.astype(np.float32)
        if self._image.size:
            change = smoothing._mean(np.abs(now - self._image).mean(axis=2, dtype=np.float32))
            fresh += self._strength * np.exp(-((change / 8) ** 2)) * (self._past - fresh)
        self._image, self._past = now, fresh
        return np.rint(fresh).astype(np.uint8)


class Hysteresis:
    """No average: a pixel's mask changes only if its probability is beyond the threshold by a margin."""

    def __init__(self, lowest_pet: float, margin: float) -> None:
        self._lowest, self._margin, self._mask = math.ceil(lowest_pet), margin, np.zeros(0, np.bool_)

    def __call__(self, image: U8, probability: U8, seconds: float) -> U8:
        past = self._mask if self._mask.size else probability >= self._lowest
        sure, sure_not = probability >= self._lowest + self._margin, probability < self._lowest - self._margin
        self._mask = (past | sure) & ~sure_not
        return np.where(self._mask, np.maximum(probability, self._lowest), np.minimum(probability, self._lowest - 1))


#: Prefix of the names of what was measured at a third of the frame rate.
TENTH: Final = "10/s, "

#: Alternatives to the smoother in use: the constants to change.
CHANGED: Final[dict[str, dict[str, Any]]] = {
    "still below 2": {"_STILL": 2.0},
    "still below 4": {"_STILL": 4.0},
    "still below 6": {"_STILL": 6.0},
    "light as it is": {"_LIGHT": 1.0},
    "no cuts": {"_CUT": 1.0},
}


def ways(clip: Clip, half: str, lowest_pet: float) -> Iterator[tuple[str, U8, Clip]]:
    """Yield, for each way to smooth, its name, the smoothed outputs, and the clip that it was applied to."""
    for strength in STRENGTHS:
        yield str(strength), smooth(clip, smoothing.Smoother(strength)), clip
    if half == "report":
        fewer = slower(clip, 3)
        for strength in (0.0, RECOMMENDED):
            yield f"{TENTH}{strength}", smooth(fewer, smoothing.Smoother(strength), RATE / 3), fewer
        return
    others: dict[str, Smoothing] = {
        "first try": FirstTry(RECOMMENDED),
        "everywhere": Everywhere(RECOMMENDED),
        "hysteresis 0.1": Hysteresis(lowest_pet, 25),
        "hysteresis 0.2": Hysteresis(lowest_pet, 50),
    }
    for name, other in others.items():
        yield name, smooth(clip, other), clip
    for name, constants in CHANGED.items():
        with mock.patch.multiple(smoothing, **constants):
            yield name, smooth(clip, smoothing.Smoother(RECOMMENDED)), clip


def slower(clip: Clip, part: int) -> Clip:
    """Keep every ``part``-th frame."""
    return Clip(clip.group, clip.name, clip.images[::part], clip.outputs[::part], clip.truth[::part])


Rows: TypeAlias = dict[str, dict[str, list[Measure]]]


def summary(rows: Rows) -> dict[str, Any]:
    """Average each way and clip over scenes, and each group over its clips, and compare with no smoothing."""
    means = {way: {name: _mean_of(measures) for name, measures in of.items()} for way, of in rows.items()}
    for of in means.values():
        for group in dict.fromkeys(group for group, *_ in CLIPS.values()):
            members = [of[name] for name, (own, *_) in CLIPS.items() if own == group]
            of[f"all {group}"] = {key: float(np.mean([member[key] for member in members])) for key in members[0]}
    for way, of in means.items():
        plain = means[f"{TENTH}0.0" if way.startswith(TENTH) else "0.0"]
        for name, values in of.items():
            values["times_less_flicker"] = plain[name]["flicker"] / max(values["flicker"], 1e-6)
            values["iou_points_gained"] = 100 * (values["iou"] - plain[name]["iou"])
    return {way: {name: _rounded(values) for name, values in of.items()} for way, of in means.items()}


def _mean_of(measures: list[Measure]) -> dict[str, float]:
    means = {field.name: float(np.mean([getattr(m, field.name) for m in measures])) for field in fields(Measure)}
    return {**means, "residue": max(m.residue for m in measures)}


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {key: float(f"{value:.4g}") for key, value in values.items()}


def table(half: str, ways: dict[str, Any]) -> Iterator[str]:
    """Yield a line for each clip: its flicker, by what factor each way reduces it, and the gain in IoU."""
    yield f"{half}: flicker in % of the pixels; for each strength or way: times less flicker, points of IoU gained"
    yield f"{'':24}" + "".join(f"{way[:16]:>17}" for way in ways)
    for name, plain in ways["0.0"].items():
        cells = [f"{100 * plain['flicker']:16.3f}%"]
        others = [of[name] for way, of in ways.items() if way != "0.0"]
        cells += [f"{of['times_less_flicker']:9.1f}x {of['iou_points_gained']:+6.2f}" for of in others]
        yield f"{name:24}" + "".join(cells)


def milliseconds(clip: Clip) -> float:
    """Return the median milliseconds of smoothing one frame."""
    smoother, taken = smoothing.Smoother(RECOMMENDED), []
    for round_ in range(10):
        for frame, (image, output) in enumerate(zip(clip.images, clip.outputs, strict=True)):
            start = time.perf_counter()
            smoother(image, output, round_ + frame / RATE)
            taken.append(1000 * (time.perf_counter() - start))
    return median(taken)


@click.command()
@data_option
@click.option("--photos", type=click.IntRange(1), default=14, show_default=True, help="Photos of each half.")
def flicker(data: Path, photos: int) -> None:
    """Measure how much --smooth reduces flicker, and what it costs where something moves."""
    halves: dict[str, Any] = {}
    folder = original_size(data)
    with Segmenter() as segmenter:
        about = {"model": segmenter.artifact.spec.name, "input": segmenter.size, "engine": segmenter.describe().name}
        for half, split in HALVES.items():
            rows: Rows = defaultdict(lambda: defaultdict(list))
            for index, scene in enumerate(scenes(folder, split, photos)):
                for clip in clips(segmenter, scene, index):
                    for way, smoothed, of in ways(clip, half, 255 * segmenter.threshold):
                        rows[way][clip.name].append(measure(of, smoothed, 255 * segmenter.threshold))
                click.echo(f"{half}: {index + 1} of {photos} scenes", err=True)
            halves[half] = summary(rows)
            click.echo("\n".join(table(half, halves[half])))
        values = {**about, "milliseconds_per_frame": round(milliseconds(clip), 3), "recommended": RECOMMENDED}
    values |= {"scenes_of_each_half": photos, "frames": FRAMES, "frames_per_second": RATE, "side": SIDE, **halves}
    command = f"python -m benchmarks flicker --data DATA --photos {photos}"
    click.echo(records.write("flicker", command, values))
