"""The measurement, checked against counting pixels one by one."""

from __future__ import annotations

import csv
import hashlib
import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from petseg import plots
from petseg.checkpoint import save_checkpoint
from petseg.data import Layout, Pair, Split, find, photo_key
from petseg.evaluate import (
    Evaluation,
    OpenedModel,
    evaluate,
    is_split_of,
    listed_by,
    open_model,
    split_of,
    split_warning,
    train_keys,
    trained_on,
    write_evaluation,
)
from petseg.metrics import Border
from petseg.model import AttentionUNet
from petseg_export import OnnxConfig, export
from petseg_runtime import images
from petseg_runtime.artifact import open_artifact
from petseg_runtime.errors import CheckpointError, DataError, EngineError, ModelError, OutputError, UsageError
from tiny_runs import red

H, W = 16, 48
RATIOS = ("iou", "dice", "accuracy", "precision", "recall")
READINGS = ("background", "pet", "ignored")
#: Height and width of each photo, and of its trimap.
SIZES = [((37, 53), (37, 53)), ((64, 64), (64, 64)), ((120, 80), (60, 40)), ((16, 48), (16, 48)), ((9, 200), (9, 200))]


def smooth(rng: np.random.Generator, height: int, width: int, channels: int) -> np.ndarray:
    """A random field with structures larger than a pixel, uint8 [H, W, C]."""
    coarse = rng.integers(0, 256, (4, 5, channels), np.uint8)
    layers = [
        Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)
    ]
    return np.stack([np.asarray(layer) for layer in layers], axis=2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> list[Pair]:
    """Photos of unequal sizes; one trimap is smaller than its photo, and the last has no pet."""
    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(5)
    found = []
    for i, (photo_size, trimap_size) in enumerate(SIZES):
        photo = folder / f"{i}.png"
        Image.fromarray(smooth(rng, *photo_size, 3)).save(photo)
        field = smooth(rng, *trimap_size, 1)[..., 0]
        trimap = np.where(field > 150, 1, np.where(field > 120, 3, 2)).astype(np.uint8)
        if i == len(SIZES) - 1:
            trimap[trimap == 1] = 2
        Image.fromarray(trimap).save(folder / f"{i}-trimap.png")
        found.append(Pair(f"photo {i}", photo, folder / f"{i}-trimap.png", Layout.OXFORD))
    return found


def brute(pairs: list[Pair], threshold: float, reading: str) -> list[tuple[int, int, int, int]]:
    """(TP, FP, FN, TN) of the model `red` for each photo, at its trimap's resolution."""
    found = []
    for pair in pairs:
        trimap = np.asarray(Image.open(pair.mask))
        seen = Image.open(pair.image).resize((W, H), Image.Resampling.BILINEAR).getchannel("R")
        probability = np.asarray(seen.resize(trimap.shape[::-1], Image.Resampling.BILINEAR))
        tp = fp = fn = tn = 0
        for value, label in zip(probability.ravel().tolist(), trimap.ravel().tolist(), strict=True):
            if label == 3 and reading == "ignored":
                continue
            says, is_pet = value >= 255 * threshold, label == 1 or (label == 3 and reading == "pet")
            tp += says and is_pet
            fp += says and not is_pet
            fn += not says and is_pet
            tn += not says and not is_pet
        found.append((tp, fp, fn, tn))
    return found


def ratios(tp: int, fp: int, fn: int, tn: int) -> dict[str, float]:
    return {
        "iou": tp / (tp + fp + fn),
        "dice": 2 * tp / (2 * tp + fp + fn),
        "accuracy": (tp + tn) / (tp + fp + fn + tn),
        "precision": tp / (tp + fp),
        "recall": tp / (tp + fn),
    }


# ------------------------------------------------------------------------------------------------ the numbers


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.7373])
def test_every_number_is_what_counting_pixels_gives(pairs: list[Pair], threshold: float) -> None:
    summary = evaluate(red, pairs, H, W).summary(threshold)
    assert set(summary["readings"]) == set(READINGS)
    for reading in READINGS:
        each = brute(pairs, threshold, reading)
        total = tuple(map(sum, zip(*each, strict=True)))
        got = summary["readings"][reading]
        assert got["pixels"] == dict(zip(("tp", "fp", "fn", "tn"), total, strict=True))
        assert {name: got[name] for name in RATIOS} == pytest.approx(ratios(*total))
        ious = [tp / (tp + fp + fn) if tp + fp + fn else 1.0 for tp, fp, fn, _ in each]
        assert got["mean_image_iou"] == pytest.approx(sum(ious) / len(ious))
    values = [summary["readings"][reading]["iou"] for reading in READINGS]
    assert len(set(values)) == 3, "the border makes a difference here"


def test_the_headline_counts_the_border_as_background(pairs: list[Pair]) -> None:
    summary = evaluate(red, pairs, H, W).summary(0.5)
    assert summary["schema_version"] == 1
    assert summary["border"] == "background"
    assert summary["threshold"] == 0.5
    assert summary["photos"] == len(pairs)
    for name in (*RATIOS, "mean_image_iou"):
        assert summary[name] == summary["readings"]["background"][name]


def test_masks_without_any_pet_are_named_and_counted(pairs: list[Pair]) -> None:
    result = evaluate(red, pairs, H, W)
    assert result.summary(0.5)["photos_without_pet"] == [pairs[-1].name]
    assert result.image_ious(0.1)[-1] == 0, "pet was found where none is"


def test_where_nothing_is_found_the_undefined_ratio_is_null(pairs: list[Pair]) -> None:
    summary = evaluate(lambda batch: np.zeros(batch.shape[:3], np.uint8), pairs, H, W).summary(0.5)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["precision"] is None
    assert (summary["iou"], summary["recall"]) == (0, 0)


def test_where_nothing_is_to_be_found_and_nothing_is_all_is_well(pairs: list[Pair]) -> None:
    summary = evaluate(lambda batch: np.zeros(batch.shape[:3], np.uint8), pairs[-1:], H, W).summary(0.5)
    assert [summary[name] for name in RATIOS] == [1] * 5


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_the_batch_changes_nothing(pairs: list[Pair], batch: int) -> None:
    shapes: list[tuple[int, ...]] = []
    watched: list[int] = []

    def run(photos: np.ndarray) -> np.ndarray:
        assert photos.dtype == np.uint8
        shapes.append(photos.shape)
        return red(photos)

    result = evaluate(run, pairs, H, W, batch=batch, watch=watched.append)
    assert (result.histograms == evaluate(red, pairs, H, W).histograms).all()
    assert result.names == tuple(pair.name for pair in pairs)
    steps = [*range(batch, len(pairs), batch), len(pairs)]
    assert watched == steps
    assert shapes == [(b - a, H, W, 3) for a, b in zip([0, *steps], steps, strict=False)]


def test_photos_are_read_at_the_same_time_ahead_of_the_model(
    pairs: list[Pair], monkeypatch: pytest.MonkeyPatch
) -> None:
    want, together, open_photo = evaluate(red, pairs, H, W, batch=1), threading.Barrier(len(pairs)), images.open_photo
    begun: list[Path] = []

    def slow(path: Path, **options: Any) -> Any:
        together.wait(20)  # none is done before all have begun
        begun.append(path)
        return open_photo(path, **options)

    monkeypatch.setattr("petseg.data.usable_cpus", lambda: len(pairs))
    monkeypatch.setattr(images, "open_photo", slow)
    got = evaluate(red, pairs, H, W, batch=1)
    assert len(begun) == len(pairs)
    assert got.names == want.names
    assert (got.histograms == want.histograms).all()


def test_photos_wait_for_memory_and_none_for_ever(pairs: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    want = evaluate(red, pairs, H, W).histograms
    monkeypatch.setattr("petseg.data.available_memory", lambda: 0)
    assert (evaluate(red, pairs, H, W).histograms == want).all()


def test_unreadable_photos_are_reported_in_order_in_the_calling_thread(pairs: list[Pair], tmp_path: Path) -> None:
    bad = [Pair(f"bad {i}", tmp_path / f"{i}.jpg", pairs[0].mask, Layout.OXFORD) for i in range(2)]
    told: list[tuple[str, threading.Thread]] = []
    watched: list[int] = []
    result = evaluate(
        red,
        [bad[0], *pairs, bad[1]],
        H,
        W,
        batch=2,
        watch=watched.append,
        failed=lambda pair, error: told.append((pair.name, threading.current_thread())),
    )
    assert told == [(pair.name, threading.current_thread()) for pair in bad]
    assert result.names == tuple(pair.name for pair in pairs)
    assert (result.histograms == evaluate(red, pairs, H, W).histograms).all()
    assert watched == [2, 4, 6, 7]


def test_a_photo_that_cannot_be_read_is_done_when_its_turn_has_come(pairs: list[Pair], tmp_path: Path) -> None:
    bad = Pair("bad", tmp_path / "bad.jpg", pairs[0].mask, Layout.OXFORD)
    done: list[object] = []

    def run(batch: np.ndarray) -> np.ndarray:
        done.append("run")
        return red(batch)

    evaluate(run, [bad, *pairs[:2]], H, W, batch=1, watch=done.append, failed=lambda pair, error: None)
    assert done == [1, "run", 2, "run", 3]


def test_a_measurement_that_is_ended_leaves_no_reader(pairs: list[Pair]) -> None:
    before = {*threading.enumerate()}

    def end(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) as caught:
        evaluate(red, 40 * pairs, H, W, batch=1, watch=end)
    assert {*threading.enumerate()} <= before, "not even while the error, with its frames, is still there"
    del caught


def test_a_photo_that_cannot_be_read_is_named(pairs: list[Pair], tmp_path: Path) -> None:
    broken = Pair("broken", tmp_path / "broken.jpg", pairs[0].mask, Layout.OXFORD)
    broken.image.write_bytes(b"no photo")
    with pytest.raises(DataError, match=r"broken\.jpg"):
        evaluate(red, [pairs[0], broken], H, W)


# ------------------------------------------------------------------------------------------------ models


@pytest.fixture(scope="module")
def checkpoint(model: AttentionUNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    spec = {"height": 32, "width": 48, "threshold": 0.55, "cutout_threshold": 0.4, "border_target": 0.0}
    save_checkpoint(path, model.state_dict(), {"kind": "model", "model": {"width": 4}, "spec": spec})
    return path


@pytest.fixture(scope="module")
def exported(checkpoint: Path, pairs: list[Pair]) -> Path:
    export(checkpoint, OnnxConfig(data=pairs[0].image.parent))
    return checkpoint.with_suffix(".onnx")


def test_a_checkpoint_and_its_exported_file_score_the_same(
    checkpoint: Path, exported: Path, pairs: list[Pair], oxford_root: Path
) -> None:
    pets = [*pairs, *find(oxford_root, Split.TEST)]
    summaries = []
    for path in (checkpoint, exported):
        with open_model(path, "cpu") as opened:
            assert (opened.height, opened.width, opened.threshold, opened.cutout_threshold) == (32, 48, 0.55, 0.4)
            summaries.append(evaluate(opened.run, pets, opened.height, opened.width).summary(opened.threshold))
    first, second = summaries
    assert 0.01 < first["iou"] < 0.99, "neither an empty nor a perfect mask would prove anything"
    for reading in READINGS:
        for name in (*RATIOS, "mean_image_iou"):
            assert first["readings"][reading][name] == pytest.approx(second["readings"][reading][name], abs=2e-3)


def test_a_model_says_what_it_is_and_what_runs_it(checkpoint: Path, exported: Path) -> None:
    with open_model(checkpoint, "cpu") as opened:
        about = opened.describe()
    assert about["file"] == "best.safetensors"
    assert about["identity"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert "PyTorch" in about["engine"]
    assert "cpu" in about["engine"]
    with open_model(exported) as opened:
        about = opened.describe()
    assert about["file"] == "best.onnx"
    assert about["identity"] == open_artifact(exported).identity
    assert "onnxruntime" in about["engine"]


def test_an_exported_file_is_measured_in_the_engine_that_is_asked_for(checkpoint: Path, exported: Path) -> None:
    pytest.importorskip("openvino")
    for backend in ("onnxruntime", "openvino"):
        with open_model(exported, "cpu", backend) as opened:
            assert opened.engine.startswith(f"{backend} ")
    with (
        pytest.raises(UsageError, match="a checkpoint is measured in PyTorch, not in openvino"),
        open_model(checkpoint, "cpu", "openvino"),
    ):
        pass


def test_an_exported_file_is_closed_afterwards(exported: Path) -> None:
    with open_model(exported) as opened:
        assert opened.run(np.zeros((1, 32, 48, 3), np.uint8)).shape == (1, 32, 48)
    with pytest.raises(EngineError, match="closed"):
        opened.run(np.zeros((1, 32, 48, 3), np.uint8))


@pytest.mark.parametrize(
    "provenance",
    [{}, *({"data": data} for data in (None, 3, [], {}, {"val_fraction": 0.1}))]
    + [{"data": {"val_fraction": f, "split_seed": s}} for f, s in ((2, 0), ("x", 0), (math.nan, 0), (0.1, math.inf))],
)
def test_a_split_that_is_missing_or_nonsense_is_none(provenance: dict[str, Any]) -> None:
    assert split_of(provenance) is None
    assert split_of({"data": {"val_fraction": 0.2, "split_seed": 4}}) == (0.2, 4)


def test_the_split_of_a_run_is_known_by_its_photos(oxford_root: Path) -> None:
    train, val = (find(oxford_root, split, val_fraction=0.2) for split in (Split.TRAIN, Split.VAL))
    names = "\n".join([*(pair.name for pair in train[2:]), "--", *(pair.name for pair in val)])
    data = {"names_sha256": hashlib.sha256(names.encode()).hexdigest(), "skipped_without_pet": [train[0].name]}
    told = {"data": {**data, "skipped_bad": [train[1].name]}}
    assert is_split_of(told, train, val) is True
    assert is_split_of(told, val, train) is False
    assert is_split_of({"data": data}, train, val) is False
    for untold in ({}, {"data": None}, {"data": {}}, {"data": {"names_sha256": "x"}}):
        assert is_split_of(untold, train, val) is None


@pytest.mark.parametrize("data", [None, 3, {}, {"val_names": "pet"}, {"val_names": [{}]}])
def test_validation_photos_that_are_not_listed_or_nonsense_are_none(data: object) -> None:
    assert listed_by({} if data is None else {"data": data}) is None


def test_a_run_whose_validation_photos_were_listed_records_their_names_not_a_share() -> None:
    """Its settings also have a share and a seed, which had no effect."""
    told = {"data": {"val_names": ["own_01", "own_07"]}, "config": {"data": {"val_fraction": 0.05, "split_seed": 0}}}
    assert listed_by(told) == {"own_01", "own_07"}
    assert split_of(told) is None


def test_what_was_trained_on_is_known_though_the_listing_is_another_now(folder_copy: Path) -> None:
    (folder_copy / "val.txt").write_text("own_01\nown_07\n")
    parts = {split: find(folder_copy, split) for split in (Split.TRAIN, Split.VAL)}
    names = "\n".join([*(pair.name for pair in parts[Split.TRAIN]), "--", "own_01", "own_07"])
    data = {
        "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
        "val_names": ["own_01", "own_07"],
        "skipped_without_pet": [],
    }
    for listing in (["own_01", "own_02", "own_03"], None):
        (folder_copy / "val.txt").unlink()
        if listing:
            (folder_copy / "val.txt").write_text("\n".join(listing))
        pairs = find(folder_copy, Split.TRAINVAL)
        assert trained_on({"data": data}, folder_copy, pairs) == parts[Split.TRAIN]
        assert trained_on({"data": data}, folder_copy, parts[Split.VAL]) == []
    assert trained_on({"data": {**data, "val_names": ["own_01"]}}, folder_copy, pairs) == [], "it is of other photos"
    assert trained_on({"data": {"val_names": data["val_names"]}}, folder_copy, pairs) == [], "it may be of others"


def test_photos_of_the_training_are_known_though_the_folder_holds_others_too(folder_copy: Path) -> None:
    trained, others = find(folder_copy, Split.TRAINVAL)[:3], find(folder_copy, Split.TRAINVAL)[3:]
    data: dict[str, Any] = {"names_sha256": "0" * 64, "val_fraction": 0.1, "split_seed": 0, "skipped_without_pet": []}
    assert trained_on({"data": data}, folder_copy, trained) == [], "a file of before says no more"
    told = {"data": {**data, "train_keys": "".join(photo_key(pair) or "" for pair in trained)}}
    assert trained_on(told, folder_copy, [*others, *trained]) == trained
    assert trained_on(told, folder_copy / "images", trained) == trained, "whatever the folder is"
    said = "the model was trained on 3 of the 3 photos of test"
    assert split_warning(told, folder_copy, {Split.TEST: trained}, Split.TEST, None, None) == said
    assert split_warning(told, folder_copy, {Split.TEST: others}, Split.TEST, None, None) is None
    parts = {Split.TRAIN: others, Split.VAL: trained}
    said = "the model was trained on 3 of the 3 photos of val"
    assert split_warning(told, folder_copy, parts, Split.VAL, 0.1, 0) == said
    parts = {Split.TRAIN: trained, Split.VAL: others}
    assert split_warning(told, folder_copy, parts, Split.VAL, 0.1, 0) is None, "another folder is no reason for doubt"
    said = "val, 0.1 of trainval by seed 0, is not what the model was validated on: photos that it was trained on may"
    assert (split_warning({"data": data}, folder_copy, parts, Split.VAL, 0.1, 0) or "").startswith(said)


@pytest.mark.parametrize("keys", [None, 5, [], {}, ["abcdef"]])
def test_keys_that_are_none_are_of_no_photo(keys: object) -> None:
    assert train_keys({"data": {"train_keys": keys}}) == train_keys({}) == frozenset()


def opening(path: Path, device: str = "cpu") -> None:
    with open_model(path, device):
        pass


def test_a_gpu_that_is_not_there_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(EngineError, match="cuda:99"):
        opening(checkpoint, "cuda:99")


@pytest.mark.parametrize(("name", "error"), [("x.safetensors", CheckpointError), ("x.onnx", ModelError)])
def test_a_model_that_is_missing_or_damaged_is_named(tmp_path: Path, name: str, error: type[ModelError]) -> None:
    with pytest.raises(error, match=f"{name}: no such file"):
        opening(tmp_path / name)
    (tmp_path / name).write_bytes(b"\xff" * 100)
    with pytest.raises(error, match=name):
        opening(tmp_path / name)


# ------------------------------------------------------------------------------------------------ the report


def report(pairs: list[Pair], folder: Path, threshold: float = 0.5) -> tuple[Evaluation, dict[str, Any]]:
    result = evaluate(red, pairs, H, W)
    record = {**result.summary(threshold), "split": "test"}
    write_evaluation(result, record, folder)
    return result, record


def test_the_report_is_the_record_and_the_photos(pairs: list[Pair], tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    _, record = report(pairs, folder, 0.4)
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "images.csv"}
    assert json.loads((folder / "evaluation.json").read_text()) == record
    with (folder / "images.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == [pair.name for pair in pairs]
    for reading in READINGS:
        for row, (tp, fp, fn, _) in zip(rows, brute(pairs, 0.4, reading), strict=True):
            iou = tp / (tp + fp + fn) if tp + fp + fn else 1.0
            assert math.isclose(float(row[f"iou_border_{reading}"]), iou, abs_tol=1e-6)


def test_the_picture_shows_the_eight_worst_at_a_threshold(
    oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[Any, ...]] = []
    monkeypatch.setattr(plots, "grid", lambda *args: shown.append(args))
    pairs = find(oxford_root, Split.TRAINVAL)[:12]
    result = evaluate(red, pairs, H, W)
    plots.worst(
        result, OpenedModel(red, H, W, 0.9, "m.onnx", "ab" * 32, "red", 0.3), pairs, 0.6, tmp_path / "worst.png"
    )
    ious = dict(zip(result.names, result.image_ious(0.6, Border.BACKGROUND), strict=True))
    ((run, worst, height, width, threshold, path),) = shown
    assert (run, height, width, threshold, path) == (red, H, W, 0.6, tmp_path / "worst.png")
    assert len(worst) == 8
    got = [ious[pair.name] for pair in worst]
    assert got == sorted(ious.values())[:8]
    assert got[0] < got[-1]


def test_a_folder_that_cannot_be_written_to_is_an_error_of_its_own(pairs: list[Pair], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written to") as caught:
        report(pairs, tmp_path / "file")
    assert str(tmp_path / "file") in str(caught.value)
    assert caught.value.exit_code == 6
