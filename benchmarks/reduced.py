"""``petseg infer --fast-decode``, which decodes JPEGs at a reduced size: how much do masks change, and what is saved?

    python -m benchmarks reduced --data data

Photos are used at their original size (about 500 x 375) and enlarged to a number of megapixels with LANCZOS and saved
as JPEG with quality 90 and 4:2:0. This stands in for a camera's files: it has a camera's size and encoding, but no
finer detail than the photo had. For each margin, the mask of the reduced photo is compared with that of the photo
decoded at full size, both at the model's size and threshold. Only photos that a margin really reduces count. A margin
is good enough with a mean IoU of :data:`BAR`; single masks may be far below it, and a larger margin is not always
better, which is why the option is off by default. ``petseg_runtime.images._MARGIN`` is the margin in use, and the pages
have its results for each size.
"""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, Final
from unittest import mock

import click
import numpy as np
import numpy.typing as npt
from PIL import Image

from benchmarks import records
from benchmarks.photos import chosen, data_option
from petseg_runtime import Segmenter, images
from petseg_runtime.parity import mask_iou
from petseg_runtime.spec import lowest_pet

MARGINS: Final = (1.0, 1.5, 2.0, 3.0, 4.0)
#: Megapixels of the enlarged photos; None: the original file.
SIZES: Final = {"as it is": None, "1.3 MP": 1.3, "2.4 MP": 2.4, "5 MP": 5.0, "12 MP": 12.0}
#: Minimum mean IoU between the masks of photos decoded at reduced and at full size.
BAR: Final = 0.995
ROUNDS: Final = 5


@click.command()
@data_option
@click.option(
    "--photos", type=click.IntRange(1), default=200, show_default=True, help="Photos whose masks are compared."
)
@click.option(
    "--timed", type=click.IntRange(1), default=6, show_default=True, help="How many of these photos are also timed."
)
def reduced(data: Path, photos: int, timed: int) -> None:
    """Compare masks from JPEGs decoded at 1/2, 1/4 and 1/8, and measure the time that this saves."""
    paths, rows = chosen(data, photos), []
    with Segmenter(backend="onnxruntime") as segmenter:
        for name, megapixels in SIZES.items():
            for row in agreement(segmenter, paths, megapixels):
                rows.append({"size": name, **row})
                iou = f", mean IoU {row['mean_iou']:.4f}, minimum {row['min_iou']:.4f}" if row["reduced"] else ""
                click.echo(f"{name}, margin {row['margin']:g}: {row['reduced']} photos reduced{iou}", err=True)
        good = {m for m in MARGINS if all(row["good"] for row in rows if row["margin"] == m)}
        saved = [{"size": name, **timing(segmenter, paths[:timed], SIZES[name])} for name in SIZES]
        values = {"model": segmenter.artifact.spec.name, "input": segmenter.size, "photos": photos, "bar": BAR}
    values |= {"agreement": rows, "smallest_good_margin": min(good, default=None), "margin_in_use": images._MARGIN}
    command = f"python -m benchmarks reduced --data DATA --photos {photos} --timed {timed}"
    click.echo(records.write("reduced-decoding", command, {**values, "milliseconds": saved}))


def agreement(segmenter: Segmenter, paths: list[Path], megapixels: float | None) -> Iterator[dict[str, Any]]:
    """Yield a row for each margin: the IoU of the masks of the photos that it reduced."""
    ious: dict[float, list[float]] = {margin: [] for margin in MARGINS}
    for path in paths:
        data = enlarged(path, megapixels)
        whole = images.read(data)
        reference = mask(segmenter, whole.pixels)
        for margin in MARGINS:
            photo = read_with(margin, data, segmenter.size)
            if photo.pixels.shape != whole.pixels.shape:
                ious[margin].append(mask_iou(mask(segmenter, photo.pixels), reference))
    for margin, values in ious.items():
        row: dict[str, Any] = {"margin": margin, "reduced": len(values), "good": True}
        if values:
            lowest, percentile = min(values), float(np.percentile(values, 1))
            mean = float(np.mean(values))
            row |= {"mean_iou": mean, "p1_iou": percentile, "min_iou": lowest, "good": mean >= BAR}
        yield row


def timing(segmenter: Segmenter, paths: list[Path], megapixels: float | None) -> dict[str, dict[str, float]]:
    """Return the median milliseconds from encoded bytes to the model's input, full and reduced size in alternation.

    Wall time, and this thread's CPU time, which other work on the machine disturbs less (the decoders use no threads).
    """
    clocks = {"wall": time.perf_counter, "cpu": time.thread_time}
    taken: dict[str, dict[str, list[float]]] = {clock: {"whole": [], "reduced": []} for clock in clocks}
    for path in paths:
        data = enlarged(path, megapixels)
        for _ in range(ROUNDS):
            for name, at_least in (("whole", None), ("reduced", segmenter.size)):
                start = {clock: now() for clock, now in clocks.items()}
                images.to_model(images.read(data, at_least=at_least).pixels, *segmenter.size)
                for clock, now in clocks.items():
                    taken[clock][name].append(1000 * (now() - start[clock]))
    medians = {clock: {name: median(values) for name, values in both.items()} for clock, both in taken.items()}
    return {clock: {**both, "ratio": both["whole"] / both["reduced"]} for clock, both in medians.items()}


def read_with(margin: float, data: bytes, size: tuple[int, int]) -> images.Photo:
    with mock.patch.object(images, "_MARGIN", margin):
        return images.read(data, at_least=size)


def enlarged(path: Path, megapixels: float | None) -> bytes:
    """Return a photo's JPEG file: the original, or one enlarged to that many megapixels."""
    if megapixels is None:
        return path.read_bytes()
    photo = Image.fromarray(images.read(path).pixels)
    factor = (megapixels * 1e6 / (photo.width * photo.height)) ** 0.5
    size = 16 * round(photo.width * factor / 16), 16 * round(photo.height * factor / 16)  # multiples of 16, as cameras'
    file = io.BytesIO()
    photo.resize(size, Image.Resampling.LANCZOS).save(file, "JPEG", quality=90, subsampling="4:2:0")
    return file.getvalue()


def mask(segmenter: Segmenter, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.bool_]:
    """Return the mask at the model's size."""
    probability = segmenter.infer(images.to_model(pixels, *segmenter.size)[None])[0]
    pet: npt.NDArray[np.bool_] = probability >= lowest_pet(segmenter.threshold)
    return pet
