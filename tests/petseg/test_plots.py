"""The plots: they are complete, and show what they claim to show."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from petseg import plots
from petseg.checkpoint import save_checkpoint
from petseg.data import Layout, Pair
from petseg.log import Row
from petseg.model import AttentionUNet, AttentionUNetConfig
from petseg.reference import torch_run
from petseg_runtime import images
from petseg_runtime.errors import DataError
from tiny_runs import a_row, red

SIZES = [(64, 64), (37, 101), (300, 20), (1, 1), (5, 400)]  # height, width


def write_pair(folder: Path, name: str, height: int, width: int) -> Pair:
    rng = np.random.default_rng(height * width)
    photo, mask = folder / f"{name}.png", folder / f"{name}-mask.png"
    Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(photo)
    Image.fromarray(rng.integers(1, 4, (height, width), np.uint8)).save(mask)
    return Pair(name, photo, mask, Layout.OXFORD)


@pytest.fixture
def pairs(tmp_path: Path) -> list[Pair]:
    (tmp_path / "data").mkdir()
    return [write_pair(tmp_path / "data", f"photo_{i}", *size) for i, size in enumerate(SIZES)]


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The saved figures."""
    figures: list[Figure] = []
    save = plots._save

    def keep(figure: Figure, path: Path) -> None:
        figures.append(figure)
        save(figure, path)

    monkeypatch.setattr(plots, "_save", keep)
    return figures


def history(epochs: int) -> list[Row]:
    return [
        a_row(epoch=i + 1, loss=1 / (i + 1), val_iou=0.5 + 0.4 * i / epochs, val_dice=0.6 + 0.3 * i / epochs)
        for i in range(epochs)
    ]


def opened(path: Path) -> np.ndarray:
    """A PNG, decoded to the last byte."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return np.asarray(image.convert("RGB"))


def alone(path: Path) -> bool:
    return [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("epochs", [1, 200])
def test_curves_are_a_complete_png(tmp_path: Path, epochs: int) -> None:
    path = tmp_path / "new folder" / "curves.png"
    plots.curves(history(epochs), path)
    picture = opened(path)
    assert 300 <= picture.shape[0] <= 2000
    assert 600 <= picture.shape[1] <= 3000
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 10, "not an empty sheet"
    assert alone(path)


@pytest.mark.parametrize("epochs", [1, 30])
def test_curves_show_loss_iou_and_dice_over_epochs(tmp_path: Path, drawn: list[Figure], epochs: int) -> None:
    rows = history(epochs)
    plots.curves(rows, tmp_path / "curves.png")
    left, right = drawn[0].axes
    assert [line.get_label() for line in right.lines] == ["validation IoU", "validation Dice"]
    for line, name in zip((*left.lines, *right.lines), ("loss", "val_iou", "val_dice"), strict=True):
        assert list(line.get_xdata()) == [row.epoch for row in rows]
        assert list(line.get_ydata()) == [getattr(row, name) for row in rows]


def test_a_single_epoch_can_be_seen(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.curves(history(1), tmp_path / "curves.png")
    for axes in drawn[0].axes:
        for line in axes.lines:
            assert line.get_marker() not in (None, "None", ""), "a line through one point has no length"


def test_an_undefined_value_leaves_a_gap(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = history(5)
    rows[2] = dataclasses.replace(rows[2], val_dice=math.nan)
    plots.curves(rows, tmp_path / "curves.png")
    opened(tmp_path / "curves.png")
    _, dice = drawn[0].axes[1].lines
    assert list(dice.get_xdata()) == [1, 2, 3, 4, 5]
    assert np.flatnonzero(np.isnan(np.asarray(dice.get_ydata(), float))).tolist() == [2], "no line across it"
    low, high = drawn[0].axes[1].get_ylim()
    assert math.isfinite(low)
    assert high < 1, "the others decide what is shown"


@pytest.mark.parametrize("count", [1, 5])
def test_a_grid_has_a_row_for_each_pair_whatever_its_shape(tmp_path: Path, pairs: list[Pair], count: int) -> None:
    path = tmp_path / "out" / "grid.png"
    plots.grid(red, pairs[-count:], 16, 32, 0.5, path)
    picture = opened(path)
    assert 600 <= picture.shape[1] <= 3000
    assert 150 * count <= picture.shape[0] <= 600 * count
    assert alone(path)


def test_a_grid_shows_photo_truth_probability_and_mask(tmp_path: Path, pairs: list[Pair], drawn: list[Figure]) -> None:
    plots.grid(red, pairs, 16, 32, 0.7, tmp_path / "grid.png")
    rows = np.array(drawn[0].axes).reshape(-1, 4)
    assert len(rows) == len(pairs)
    for axes, pair in zip(rows, pairs, strict=True):
        photo, truth, probability, mask = (np.asarray(axis.images[0].get_array()) for axis in axes)
        assert (photo == np.asarray(Image.open(pair.image))).all()
        trimap = np.asarray(Image.open(pair.mask))
        for label, grey in ((1, 255), (2, 0), (3, 128)):
            assert (truth[trimap == label] == grey).all()
        want = images.from_model(red(images.to_model(photo, 16, 32)[None])[0], *trimap.shape)
        assert (probability == want).all()
        assert (mask == np.where(want >= 0.7 * 255, 255, 0)).all()
        pet, found = trimap == 1, want >= 0.7 * 255
        union = (pet | found).sum()
        iou = (pet & found).sum() / union if union else 1.0
        titles = [axis.get_title() for axis in axes]
        assert titles == [pair.name, "truth (border grey)", "probability", f"prediction, IoU {iou:.3f}"]
        for axis in axes:
            assert axis.images[0].get_clim() == (0, 255), "a dark photo stays dark"


@pytest.mark.parametrize("name", ["a_b_c", "$x$", "$\\frac$", "50%", "{x}", "émile"])
def test_a_name_is_shown_as_it_is(tmp_path: Path, drawn: list[Figure], name: str) -> None:
    """Literally: no character of it begins a formula."""
    plots.grid(red, [write_pair(tmp_path, name, 20, 20)], 16, 16, 0.5, tmp_path / "grid.png")
    opened(tmp_path / "grid.png")
    title = drawn[0].axes[0].title
    assert title.get_text() == name
    assert not title.get_parse_math()


def test_letters_that_the_font_lacks_are_escaped_without_a_warning(tmp_path: Path, drawn: list[Figure]) -> None:
    plots.grid(red, [write_pair(tmp_path, "猫_é", 20, 20)], 16, 16, 0.5, tmp_path / "grid.png")
    assert drawn[0].axes[0].title.get_text() == r"\u732b_é"


def test_predictions_are_a_checkpoints_own_at_its_size_and_threshold(
    tmp_path: Path, pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model = AttentionUNet(AttentionUNetConfig(width=2)).eval()
    spec = {"height": 16, "width": 48, "threshold": 0.3, "cutout_threshold": 0.2, "border_target": 0.0}
    path = tmp_path / "best.safetensors"
    save_checkpoint(path, model.state_dict(), {"kind": "model", "model": {"width": 2}, "spec": spec})
    called: list[tuple[Any, ...]] = []
    monkeypatch.setattr(plots, "grid", lambda *args: called.append(args))
    plots.predictions(path, pairs, tmp_path / "p.png")
    ((run, *rest),) = called
    assert rest == [pairs, 16, 48, 0.3, tmp_path / "p.png"]
    batch = np.random.default_rng(0).integers(0, 256, (2, 16, 48, 3), np.uint8)
    assert (run(batch) == torch_run(model)(batch)).all()


def test_a_pair_that_cannot_be_read_leaves_no_picture(tmp_path: Path, pairs: list[Pair]) -> None:
    pairs[2].image.write_bytes(b"no photo")
    with pytest.raises(DataError, match="photo_2"):
        plots.grid(red, pairs, 16, 16, 0.5, tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_a_place_that_cannot_be_written_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="file"):
        plots.curves(history(2), tmp_path / "file" / "curves.png")
    assert (tmp_path / "file").read_text() == "in the way"
