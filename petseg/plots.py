"""Plots of a run or an evaluation: training curves, and grids of photo, ground truth and prediction."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font

from petseg.data import Pair, read_pair
from petseg.evaluate import Evaluation, OpenedModel, Run, open_model
from petseg.log import Row
from petseg.metrics import counts, histogram
from petseg_runtime import images
from petseg_runtime.files import replacing
from petseg_runtime.spec import lowest_pet
from petseg_runtime.text import shown

__all__ = ["curves", "grid", "predictions", "worst"]


def curves(history: Sequence[Row], path: Path) -> None:
    """Plot loss, validation IoU and Dice over epochs, as a PNG.

    Raises:
        OSError: It cannot be written.
    """
    epochs = [row.epoch for row in history]
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    marker = "o" if len(epochs) == 1 else None  # a line through one point would not be seen
    left.plot(epochs, [row.loss for row in history], marker=marker, label="training loss")
    right.plot(epochs, [row.val_iou for row in history], marker=marker, label="validation IoU")
    right.plot(epochs, [row.val_dice for row in history], marker=marker, label="validation Dice")
    # The curves fall on the left and rise on the right; "best" would search, and warn on a slow machine.
    for axes, free in ((left, "upper right"), (right, "lower right")):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend(loc=free)
    _save(figure, path)


def predictions(checkpoint: Path, pairs: Sequence[Pair], path: Path) -> None:
    """Plot a grid for some pairs, at a checkpoint's size and threshold: see :func:`grid`."""
    with open_model(checkpoint, "cpu") as model:
        grid(model.run, pairs, model.height, model.width, model.threshold, path)


def worst(result: Evaluation, model: OpenedModel, pairs: Sequence[Pair], threshold: float, path: Path) -> None:
    """Plot a grid of the eight photos with the lowest IoU, with the border as background: see :func:`grid`.

    Args:
        result: The measurement.
        model: The model that was measured.
        pairs: The photos that it was measured on, in the same order.
        threshold: The threshold for the photos' IoU.
        path: The PNG.
    """
    order = np.argsort(result.image_ious(threshold), kind="stable")
    grid(model.run, [pairs[i] for i in order[:8]], model.height, model.width, threshold, path)


def grid(run: Run, pairs: Sequence[Pair], height: int, width: int, threshold: float, path: Path) -> None:
    """Plot photo, ground truth (border grey), probability and mask, one row per pair, as a PNG.

    Args:
        run: The model.
        pairs: The photos to show.
        height: The model's input height.
        width: The model's input width.
        threshold: See :func:`petseg_runtime.spec.lowest_pet`.
        path: The PNG.

    Raises:
        DataError: A pair cannot be read.
        OSError: The picture cannot be written.
    """
    figure = Figure(figsize=(10, 2.6 * len(pairs)), layout="constrained")
    rows = figure.subplots(len(pairs), 4, squeeze=False)
    for axes, pair in zip(rows, pairs, strict=True):
        photo, trimap = read_pair(pair)
        probability = images.from_model(run(images.to_model(photo, height, width)[None])[0], *trimap.shape)
        iou = counts(histogram(probability, trimap), threshold).iou
        truth = np.choose(trimap - 1, (255, 0, 128)).astype(np.uint8)
        mask = np.where(probability >= lowest_pet(threshold), 255, 0).astype(np.uint8)
        titles = (_writable(pair.name), "truth (border grey)", "probability", f"prediction, IoU {iou:.3f}")
        for axis, picture, title in zip(axes, (photo, truth, probability, mask), titles, strict=True):
            axis.imshow(picture, cmap="gray", vmin=0, vmax=255, aspect="auto")
            axis.set_title(title, fontsize=8, parse_math=False)  # a name may contain dollar signs
            axis.axis("off")
    _save(figure, path)


def _writable(name: str) -> str:
    """Escape characters that the plots' font lacks, which would otherwise give a warning and boxes."""
    font = get_font(findfont(FontProperties()))
    return "".join(c if font.get_char_index(ord(c)) else c.encode("unicode_escape").decode() for c in shown(name))


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as beside:
        figure.savefig(beside, dpi=110)
