"""How scaling frames from YUV to the model's size with FFmpeg changes masks, and how much time it saves.

The reference is the preprocessing of photos: the whole frame converted to RGB, then resized with Pillow. Frames are
made from real photos as limited-range YUV 4:2:0, as in videos. Masks are compared at the frames' size.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from statistics import median
from typing import Any, Final, TypeAlias
from unittest import mock

import av
import click
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from PIL import Image, ImageOps

from benchmarks import records
from benchmarks.photos import chosen, data_option
from petseg_runtime import Segmenter, images
from petseg_runtime.parity import mask_iou
from petseg_runtime.spec import lowest_pet
from petseg_runtime.video import frame as frames
from petseg_runtime.video.frame import Converter, Frame

U8: TypeAlias = npt.NDArray[np.uint8]

#: Frame sizes; None: the size of the photo.
SIZES: Final = {"as it is": None, "1280x720": (720, 1280)}
#: The value of ``AVColorSpace``, and swscale's name for it.
MATRICES: Final = {"BT.601": (6, Colorspace.ITU601), "BT.709": (1, Colorspace.ITU709)}
_EXACT: Final = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP | Interpolation.FULL_CHR_H_INT
#: Flags of swscale for downscaling. All but ONE_STEP scale small frames as petseg does: first chroma to luma's size.
ONE_STEP: Final = "bilinear, exact, always in one step"
SCALERS: Final = {
    "bilinear, exact": Interpolation.BILINEAR | _EXACT,
    ONE_STEP: Interpolation.BILINEAR | _EXACT,
    "bilinear": Interpolation.BILINEAR,
    "fast bilinear": Interpolation.FAST_BILINEAR,
    "area, exact": Interpolation.AREA | _EXACT,
    "area": Interpolation.AREA,
    "bicubic, exact": Interpolation.BICUBIC | _EXACT,
}
#: Flags of swscale for conversion to RGB at the same size.
COLOURS: Final = {
    "exact": Interpolation.BILINEAR | _EXACT,
    "without chroma interpolation": Interpolation.BILINEAR | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
    "fast": Interpolation.BILINEAR,
}
#: Minimum mean IoU with the reference's masks.
BAR: Final = 0.995
ROUNDS: Final = 20


@click.command(name="video-road")
@data_option
@click.option("--photos", type=click.IntRange(1), default=200, show_default=True, help="Photos to make frames from.")
@click.option(
    "--timed", type=click.IntRange(1), default=6, show_default=True, help="How many of these photos are also timed."
)
def video_road(data: Path, photos: int, timed: int) -> None:
    """Compare masks of frames that FFmpeg scales from YUV to the model's size with those by RGB and Pillow."""
    paths, rows = chosen(data, photos), []
    with Segmenter(backend="onnxruntime") as segmenter:
        for size, shape in SIZES.items():
            for matrix in MATRICES:
                for row in agreement(segmenter, paths, shape, matrix):
                    rows.append({"size": size, "matrix": matrix, **row})
                    iou = f"mean IoU {row['mean_iou']:.4f}, minimum {row['min_iou']:.4f}"
                    click.echo(f"{size}, {matrix}, {row['scaler']}: {iou}", err=True)
        times = timing(paths[:timed], segmenter.size)
        values = {"model": segmenter.artifact.spec.name, "input": segmenter.size, "photos": photos, "bar": BAR}
    in_use = next(name for name, flags in SCALERS.items() if flags == frames._SHRINKING)
    values |= {"agreement": rows, "in_use": in_use, "milliseconds_at_1280x720": times}
    values |= {"rgb_at_1280x720": list(whole(paths[:24]))}
    command = f"python -m benchmarks video-road --data DATA --photos {photos} --timed {timed}"
    click.echo(records.write("video-road", command, values))


def agreement(
    segmenter: Segmenter, paths: list[Path], shape: tuple[int, int] | None, matrix: str
) -> Iterator[dict[str, Any]]:
    """Yield a row for each scaler: the IoU of its masks with those of the reference."""
    ious: dict[str, list[float]] = {name: [] for name in SCALERS}
    differences: dict[str, list[float]] = {name: [] for name in SCALERS}
    for path in paths:
        frame = frame_of(photo(path, shape), matrix)
        reference = images.to_model(frame.pixels(Converter()), *segmenter.size)
        wanted = mask(segmenter, reference, frame)
        for name in SCALERS:
            small = shrunk(name, frame, segmenter.size)
            ious[name].append(mask_iou(mask(segmenter, small, frame), wanted))
            differences[name].append(float(np.abs(small.astype(int) - reference).mean()))
    for name, values in ious.items():
        mean = float(np.mean(values))
        row = {"mean_iou": mean, "p1_iou": float(np.percentile(values, 1)), "min_iou": min(values)}
        yield {"scaler": name, **row, "mean_difference": float(np.mean(differences[name])), "good": mean >= BAR}


def timing(paths: list[Path], size: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Return the median milliseconds from a decoded 1280 x 720 frame to the model's input, all ways in alternation.

    Wall time, and the CPU time of all of swscale's threads.
    """
    frames = [frame_of(photo(path, SIZES["1280x720"]), "BT.709") for path in paths]
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in ("reference", *SCALERS)}
    converters = {name: Converter() for name in taken}
    for frame in frames:
        for _ in range(ROUNDS):
            for name, convert in converters.items():
                wall, cpu = time.perf_counter(), time.process_time()
                if name == "reference":
                    images.to_model(frame.pixels(convert), *size)
                else:
                    shrunk(name, frame, size, convert)
                taken[name].append((1000 * (time.perf_counter() - wall), 1000 * (time.process_time() - cpu)))
    return {
        name: {"wall": median(wall for wall, _ in pairs), "cpu": median(cpu for _, cpu in pairs)}
        for name, pairs in taken.items()
    }


def whole(paths: list[Path]) -> Iterator[dict[str, Any]]:
    """Yield a row for each conversion to RGB at the same size: milliseconds, and the error against the photo."""
    for name, flags in COLOURS.items():
        errors, milliseconds, convert = [], [], Converter()
        for path in paths:
            original = photo(path, SIZES["1280x720"])
            frame = frame_of(original, "BT.709")
            with mock.patch.object(frames, "_SAME_SIZE", flags):
                for _ in range(ROUNDS // 4):
                    start = time.perf_counter()
                    pixels = frame.pixels(convert)
                    milliseconds.append(1000 * (time.perf_counter() - start))
            errors.append(pixels.astype(float) - original)
        error = np.stack(errors)
        psnr = 10 * np.log10(255**2 / np.square(error).mean(axis=(1, 2, 3)).mean())
        yield {
            "flags": name,
            "milliseconds": median(milliseconds),
            "psnr_db": float(psnr),
            "mean_error": float(error.mean()),
            "mean_absolute_error": float(np.abs(error).mean()),
        }


def photo(path: Path, shape: tuple[int, int] | None) -> U8:
    """Read a photo, and crop it to even sides, or crop and enlarge it to height and width."""
    pixels = images.read(path).pixels
    if shape is None:
        return np.ascontiguousarray(pixels[: pixels.shape[0] // 2 * 2, : pixels.shape[1] // 2 * 2])
    return np.array(ImageOps.fit(Image.fromarray(pixels), (shape[1], shape[0]), Image.Resampling.LANCZOS))


def frame_of(pixels: U8, matrix: str) -> Frame:
    """Make a frame as a decoder returns it: yuv420p, limited range, tagged."""
    tag, name = MATRICES[matrix]
    picture = VideoReformatter().reformat(
        av.VideoFrame.from_ndarray(pixels),
        format="yuv420p",
        dst_colorspace=name,
        dst_color_range=ColorRange.MPEG,
        interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INP,
    )
    picture.colorspace, picture.color_range = tag, ColorRange.MPEG
    return Frame(0, 0, Fraction(1, 30), picture)


def shrunk(name: str, frame: Frame, size: tuple[int, int], convert: Converter | None = None) -> U8:
    margin = 0 if name == ONE_STEP else frames._MARGIN
    with mock.patch.multiple(frames, _SHRINKING=SCALERS[name], _MARGIN=margin):
        return frame.pixels(convert or Converter(), *size)


def mask(segmenter: Segmenter, small: U8, frame: Frame) -> npt.NDArray[np.bool_]:
    """Return the mask at the frame's size."""
    probability = images.from_model(segmenter.infer(small[None])[0], *frame.size)
    pet: npt.NDArray[np.bool_] = probability >= lowest_pet(segmenter.threshold)
    return pet
