"""The reference of the parity test: its photos, labels and outputs; and wrong files that the test must reject."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from PIL import Image

from petseg.checkpoint import Checkpoint, load_model
from petseg.data import Layout, Pair, Split, find, names_sha256, photo_key, read_trimap
from petseg.evaluate import evaluate
from petseg.model import normalize
from petseg.reference import torch_run
from petseg_export import OnnxConfig, build, export, parity
from petseg_export.deploy import DeployedUNet
from petseg_runtime import images
from petseg_runtime.artifact import open_artifact, sample_photos
from petseg_runtime.engines.base import EngineInfo
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.errors import CheckpointError, DataError, ParityTolerance, UnreadableImage
from petseg_runtime.parity import TOLERANCES, Checks, Comparison, Proof, Receipt, compare, require
from petseg_runtime.spec import ModelSpec

if TYPE_CHECKING:
    from petseg.model import AttentionUNet

Run = Callable[[np.ndarray], np.ndarray]
SPEC = ModelSpec(name="test", height=32, width=48, threshold=0.6)


def checkpoint_of(data: Any = None, **config: Any) -> Checkpoint:
    """A checkpoint with what the choice of photos reads: how training split the data."""
    return Checkpoint({}, {"config": {"data": config if data is None else data}}, "a" * 64)


def names(chosen: list[Any]) -> list[str]:
    return [photo.name for photo in chosen]


# -------------------------------------------------------------------------------------------- choice of photos


def test_without_data_the_bundled_samples_are_used() -> None:
    assert parity.choose(None, "val", 200, 0, checkpoint_of()) == sample_photos()
    assert parity.choose(None, "val", 2, 0, checkpoint_of()) == sample_photos()[:2]


def test_the_photo_selection_is_deterministic_for_a_seed(photos: list[Path]) -> None:
    folder = photos[0].parent
    chosen = parity.choose(folder, "val", 5, 0, checkpoint_of())
    assert len(set(chosen)) == 5
    assert set(chosen) <= set(photos)
    assert chosen == sorted(chosen)
    assert chosen == parity.choose(folder, "val", 5, 0, checkpoint_of())
    assert chosen != parity.choose(folder, "val", 5, 1, checkpoint_of())
    assert parity.choose(folder, "val", 200, 0, checkpoint_of()) == photos


@pytest.mark.parametrize(("fraction", "seed"), [(0.25, 0), (0.25, 3), (0.5, 3)])
def test_the_validation_split_is_that_of_the_checkpoints_training(
    oxford_root: Path, fraction: float, seed: int
) -> None:
    loaded = checkpoint_of(val_fraction=fraction, split_seed=seed)
    parts = {part: names(find(oxford_root, part, val_fraction=fraction, seed=seed)) for part in Split}
    assert names(parity.choose(oxford_root, "val", 200, 0, loaded)) == parts[Split.VAL]
    assert names(parity.choose(oxford_root, "test", 200, 0, loaded)) == parts[Split.TEST]
    assert names(parity.labelled(oxford_root, "train", loaded)) == parts[Split.TRAIN]
    assert not set(parts[Split.VAL]) & set(parts[Split.TRAIN]), "no evaluation on training photos"
    assert len(parts[Split.VAL]) == 24 * fraction


def test_two_trainings_have_different_validation_splits(oxford_root: Path) -> None:
    parts = [names(parity.labelled(oxford_root, "val", checkpoint_of(val_fraction=0.5, split_seed=s))) for s in (0, 1)]
    assert parts[0] != parts[1]


def test_a_checkpoint_without_training_config_uses_the_default_split(oxford_root: Path) -> None:
    want = names(find(oxford_root, Split.VAL))
    assert names(parity.labelled(oxford_root, "val", Checkpoint({}, {}, ""))) == want


@pytest.mark.parametrize(
    "data",
    [
        *(5, "pets"),
        *({"val_fraction": value} for value in ("many", None, math.nan, 10**400, 2.0)),
        *({"split_seed": value} for value in ([1], math.inf)),
    ],
)
def test_an_invalid_training_config_is_an_error(oxford_root: Path, data: Any) -> None:
    with pytest.raises(CheckpointError, match="training config is damaged"):
        parity.labelled(oxford_root, "val", checkpoint_of(data))


def test_photos_held_out_by_a_since_deleted_listing_stay_held_out(folder_copy: Path) -> None:
    """Otherwise int8 would be tuned, and the export tested, on photos that the checkpoint was trained on."""
    held = ["own_01", "own_07"]
    (folder_copy / "val.txt").write_text("\n".join(held))
    digest = names_sha256(names(find(folder_copy, Split.TRAIN)), find(folder_copy, Split.VAL))
    (folder_copy / "val.txt").unlink()
    data = {"val_names": held, "names_sha256": digest, "skipped_without_pet": []}
    config = {"data": {"val_fraction": 0.5, "split_seed": 0}}  # a run's config contains both, without effect
    loaded = Checkpoint({}, {"config": config, "data": data}, "")
    assert names(parity.labelled(folder_copy, "val", loaded)) == held
    assert not {*held} & {*names(parity.labelled(folder_copy, "train", loaded))}
    assert len(parity.labelled(folder_copy, "train", loaded)) == 7
    assert names(parity.choose(folder_copy, "test", 200, 0, loaded)) == ["own_09", "own_10", "own_11"]
    (folder_copy / "val.txt").write_text("own_02\n")  # an existing listing takes precedence
    assert names(parity.labelled(folder_copy, "val", loaded)) == ["own_02"]


def test_val_that_may_contain_training_photos_is_flagged(folder_copy: Path) -> None:
    """For example after photos were added, so that the same share and seed choose others."""
    parts = (find(folder_copy, part, val_fraction=0.25, seed=3) for part in (Split.TRAIN, Split.VAL))
    train, val = parts
    data = {"names_sha256": names_sha256(names(train), val), "skipped_without_pet": []}
    loaded = Checkpoint({}, {"config": {"data": {"val_fraction": 0.25, "split_seed": 3}}, "data": data}, "")
    assert parity.overlap_warning(folder_copy, "val", loaded) is None
    for part in ("images", "masks"):
        shutil.copy(folder_copy / part / "own_00.png", folder_copy / part / "own_99.png")
    said = "val, 0.25 of trainval by seed 3, is not what the model was validated on: photos that it was trained on"
    assert said in (parity.overlap_warning(folder_copy, "val", loaded) or "")
    assert parity.overlap_warning(folder_copy, "test", loaded) is None
    assert parity.overlap_warning(folder_copy, "val", checkpoint_of()) is None, "it does not record its photos"
    assert parity.overlap_warning(folder_copy / "images", "val", loaded) is None, "without labels there is no IoU"
    assert parity.overlap_warning(None, "val", loaded) is None
    (folder_copy / "val.txt").write_text(val[0].name)
    assert "val, as val.txt lists it, is not what" in (parity.overlap_warning(folder_copy, "val", loaded) or "")


def test_val_of_a_folder_without_training_photos_is_checked(folder_copy: Path) -> None:
    """A folder that is only for measuring."""
    every = find(folder_copy, Split.TRAINVAL)
    (folder_copy / "val.txt").write_text("\n".join(names(every)))
    data: dict[str, Any] = {"names_sha256": "0" * 64, "skipped_without_pet": []}
    loaded = Checkpoint({}, {"data": data}, "")
    assert "is not what the model was validated on" in (parity.overlap_warning(folder_copy, "val", loaded) or "")
    key = photo_key(every[0])
    loaded = Checkpoint({}, {"data": {**data, "train_keys": key}}, "")
    assert f"trained on 1 of the {len(every)} photos of val" in (
        parity.overlap_warning(folder_copy, "val", loaded) or ""
    )
    with pytest.raises(DataError, match="the train split has no photos"):
        parity.overlap_warning(folder_copy, "train", loaded)


def test_another_folder_with_the_same_names_gets_its_regular_split(folder_root: Path) -> None:
    data = {"val_names": ["own_01", "own_07"], "names_sha256": "0" * 64, "skipped_without_pet": []}
    loaded = Checkpoint({}, {"data": data}, "")
    assert names(parity.labelled(folder_root, "val", loaded)) == names(find(folder_root, Split.VAL))


def test_a_custom_folder_with_masks_is_labelled(folder_root: Path) -> None:
    chosen = parity.choose(folder_root, "test", 200, 0, checkpoint_of())
    assert names(chosen) == ["own_09", "own_10", "own_11"]
    assert parity.read(chosen, SPEC).labels is not None


def test_torchvisions_download_folder_is_labelled(oxford_root: Path, tmp_path: Path) -> None:
    """Otherwise its trimaps would count as photos."""
    shutil.copytree(oxford_root, tmp_path / "oxford-iiit-pet")
    chosen = parity.choose(tmp_path, "test", 200, 0, checkpoint_of())
    assert names(chosen) == [f"pet_{i}" for i in range(24, 30)]
    assert all(isinstance(photo, Pair) for photo in chosen)


@pytest.mark.parametrize("place", ["nowhere", "file", "empty", "images_alone"])
def test_data_without_photos_is_an_error_naming_the_folder(tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "images_alone" / "images").mkdir(parents=True)
    with pytest.raises(DataError, match=place):
        parity.choose(tmp_path / place, "val", 200, 0, checkpoint_of())


# ------------------------------------------------------------------------------------------------ photos and labels


def test_photos_are_read_in_order_at_the_specs_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    paths = []
    for i, (height, width) in enumerate([(37, 61), (32, 48), (90, 20)]):
        paths.append(tmp_path / f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(paths[-1])
    read = parity.read(paths, SPEC)
    assert read.names == ("0.png", "1.png", "2.png")
    assert read.images.shape == (3, 32, 48, 3)
    assert read.images.dtype == np.uint8
    assert read.labels is None
    for path, image in zip(paths, read.images, strict=True):
        assert (image == images.to_model(np.asarray(Image.open(path)), 32, 48)).all()


def test_photos_are_identified_by_pixels_not_names() -> None:
    pixels = np.arange(3, dtype=np.uint8).reshape(3, 1, 1, 1)
    some = parity.Photos(("a", "b"), pixels[:2], None)
    assert some.among(parity.Photos(("a", "b"), pixels[1:], None)) == 1
    assert some.among(parity.Photos(("c", "d", "e"), pixels, None)) == 2
    assert some.among(parity.Photos(("a",), pixels[2:], None)) == 0


def test_the_digest_of_photos_is_over_names_and_pixels() -> None:
    pixels = np.zeros((2, 16, 16, 3), np.uint8)
    about = parity.Photos(("a", "b"), pixels, None).about
    assert about["photos"] == 2
    renamed = parity.Photos(("a", "c"), pixels, None).about
    changed = parity.Photos(("a", "b"), pixels + 1, None).about
    assert len({each["sha256"] for each in (about, renamed, changed)}) == 3


def test_labels_keep_their_original_size(oxford_root: Path) -> None:
    pairs = find(oxford_root, Split.TEST)
    read = parity.read(pairs, SPEC)
    assert read.labels is not None
    assert read.labels.threshold == SPEC.threshold
    for trimap, pair in zip(read.labels.trimaps, pairs, strict=True):
        assert (trimap == read_trimap(pair)).all()


def test_an_unreadable_photo_is_an_error_in_the_parity_test(photos: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff\xe0 not a photo")
    with pytest.raises(UnreadableImage, match=r"broken\.jpg"):
        parity.read([photos[0], broken], SPEC)
    with pytest.raises(DataError, match=r"broken\.jpg"):
        parity.read([Pair("broken", broken, broken, Layout.FOLDER)], SPEC)


def test_the_reference_is_the_pytorch_output(trained: Any, photos: list[Path]) -> None:
    read = parity.read(photos[:5], SPEC)
    told: list[int] = []
    proof = parity.prove(trained.model, checkpoint_of(), read, told.append)
    assert (proof.expected == torch_run(trained.model)(read.images)).all()
    assert (proof.images == read.images).all()
    assert proof.names == read.names
    assert proof.checkpoint_sha256 == "a" * 64
    assert torch.__version__ in proof.reference
    assert told == [1, 2, 3, 4, 5]


def test_iou_on_labels_matches_petseg_evaluate(trained: Any, oxford_root: Path) -> None:
    """Photos of 64 x 64 evaluated at that size, from outputs of 32 x 48; the border counts as background."""
    pairs = find(oxford_root, Split.TRAINVAL)
    read = parity.read(pairs, SPEC)
    assert read.labels is not None
    run, other = torch_run(trained.model), torch_run(trained.earlier)
    want = {r: evaluate(r, pairs, 32, 48).counts(SPEC.threshold).iou for r in (run, other)}
    assert read.labels.iou(run(read.images)) == pytest.approx(want[run], abs=1e-12)
    task = read.labels.task(run(read.images))(other(read.images))
    assert task["photos"] == 24
    assert task["reference"] == pytest.approx(want[run])
    assert task["this"] == pytest.approx(want[other])
    assert task["loss"] == pytest.approx(100 * (want[run] - want[other]), abs=1e-4)


# --------------------------------------------------------------------------------------------- wrong files must fail


@dataclasses.dataclass(frozen=True)
class Gate:
    """The parity test of an export: the reference on 30 labelled photos, and the finished file in its engine."""

    proof: Proof
    spec: ModelSpec
    task: Callable[[np.ndarray], dict[str, Any]]
    run: Run

    def row(self, candidate: Run, precision: str) -> Comparison:
        """The row of a candidate, as if an engine had computed it in that precision."""
        info = EngineInfo(name="fake", version="1.2", device="cpu", provider="none", precision=precision, threads=1)
        return compare(candidate, info, self.proof, self.spec, checks=Checks(task=self.task))

    def receipt(self, row: Comparison) -> Receipt:
        return Receipt(
            identity="1d",
            proof=self.proof.identity,
            photos=len(self.proof.names),
            photos_sha256=self.proof.sha256,
            names=self.proof.names,
            reference=self.proof.reference,
            stored=self.spec.precision,
            rows=(row,),
            spec=json.loads(self.spec.to_json()),
        )


@pytest.fixture(scope="module")
def gate(exported: Any, checkpoint_file: Path, oxford_root: Path) -> Iterator[Gate]:
    artifact = open_artifact(exported.file)
    model, loaded = load_model(checkpoint_file)
    photos = parity.read(find(oxford_root, Split.TRAINVAL) + find(oxford_root, Split.TEST), artifact.spec)
    proof = parity.prove(model, loaded, photos)
    assert photos.labels is not None
    with load_engine(artifact, "onnxruntime", threads=1) as engine:
        yield Gate(proof, artifact.spec, photos.labels.task(proof.expected), engine.run)


def changed(model: AttentionUNet, change: Callable[[AttentionUNet], None]) -> Run:
    other = copy.deepcopy(model)
    with torch.no_grad():
        change(other)
    return torch_run(other)


def zero_strongest_filter(model: AttentionUNet) -> None:
    convolution, norm = model.down1[0], model.down1[1]
    strength = convolution.weight.flatten(1).norm(dim=1) * norm.weight.abs() / norm.running_var.sqrt()
    convolution.weight[strength.argmax()] = 0


def without_normalisation(model: AttentionUNet) -> Run:
    def run(batch: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            logits = model(torch.from_numpy(batch).permute(0, 3, 1, 2).float() / 255)
        return torch.round(255 * torch.sigmoid(logits[:, 0])).to(torch.uint8).numpy()

    return run


def with_mean_only(model: AttentionUNet) -> Run:
    def run(batch: np.ndarray) -> np.ndarray:
        x = normalize(torch.from_numpy(batch)) * torch.tensor([0.229, 0.224, 0.225]).reshape(1, 3, 1, 1)
        with torch.no_grad():
            return torch.round(255 * torch.sigmoid(model(x)[:, 0])).to(torch.uint8).numpy()

    return run


def with_filter_at_zero(index: int) -> Callable[[AttentionUNet], None]:
    def change(model: AttentionUNet) -> None:
        model.down1[0].weight[index] = 0

    return change


#: (trained, run function of the file) -> run function that is not the checkpoint's network.
MUTATIONS: dict[str, Callable[[Any, Run], Run]] = {
    "BGR for RGB": lambda t, run: lambda batch: run(np.ascontiguousarray(batch[..., ::-1])),
    "mask one pixel to the right": lambda t, run: lambda batch: np.roll(run(batch), 1, axis=2),
    "mask one pixel to the left": lambda t, run: lambda batch: np.roll(run(batch), -1, axis=2),
    "mask one pixel down": lambda t, run: lambda batch: np.roll(run(batch), 1, axis=1),
    "mask one pixel up": lambda t, run: lambda batch: np.roll(run(batch), -1, axis=1),
    "mirrored": lambda t, run: lambda batch: run(batch)[:, :, ::-1],
    "rows and columns swapped": lambda t, run: lambda batch: run(batch).transpose(0, 2, 1),
    "background for pet": lambda t, run: lambda batch: 255 - run(batch),
    "a mask for a probability": lambda t, run: lambda batch: np.where(run(batch) >= 153, 255, 0).astype(np.uint8),
    "without normalisation": lambda t, run: without_normalisation(t.model),
    "without the division by the deviation": lambda t, run: with_mean_only(t.model),
    "filter 0 of the first convolution is zero": lambda t, run: changed(t.model, with_filter_at_zero(0)),
    "filter 1 of the first convolution is zero": lambda t, run: changed(t.model, with_filter_at_zero(1)),
    "filter 2 of the first convolution is zero": lambda t, run: changed(t.model, with_filter_at_zero(2)),
    "filter 3 of the first convolution is zero": lambda t, run: changed(t.model, with_filter_at_zero(3)),
    "a mean of BatchNorm is lost": lambda t, run: changed(t.model, lambda m: m.down1[1].running_mean.zero_()),
    "weights of another epoch": lambda t, run: torch_run(t.earlier),
    "NaN": lambda t, run: changed(t.model, lambda m: m.head.bias.fill_(float("nan"))),
    "constant 0": lambda t, run: lambda batch: np.zeros(batch.shape[:3], np.uint8),
    "constant 255": lambda t, run: lambda batch: np.full(batch.shape[:3], 255, np.uint8),
    "always the answer to the first photo": lambda t, run: _stuck(run),
}


#: Losing one of four filters, hardly used by the trained network, changes less than int8 itself; finer rows catch it.
PASSES_AS_INT8 = {name for name in MUTATIONS if name.startswith("filter")}


def _stuck(run: Run) -> Run:
    first: list[np.ndarray] = []

    def stuck(batch: np.ndarray) -> np.ndarray:
        if not first:
            first.append(run(batch))
        return np.repeat(first[0], len(batch), axis=0)

    return stuck


@pytest.mark.parametrize("precision", TOLERANCES)
def test_the_real_file_passes_and_its_output_is_not_constant(gate: Gate, precision: str) -> None:
    """The control for the mutations below."""
    seen: list[np.ndarray] = []

    def watched(batch: np.ndarray) -> np.ndarray:
        seen.append(gate.run(batch))
        return seen[-1]

    row = gate.row(watched, precision)
    require(gate.receipt(row))
    assert row.passed
    assert len(np.unique(np.concatenate(seen))) > 100
    shares = [float((out >= 255 * gate.spec.threshold).mean()) for out in np.concatenate(seen)]
    assert 0.02 < min(shares) <= max(shares) < 0.7, "each mask has pet and background"


@pytest.mark.parametrize(
    ("mutation", "precision"),
    [(m, p) for m in MUTATIONS for p in TOLERANCES if not (p == "int8" and m in PASSES_AS_INT8)],
)
def test_a_file_of_another_network_fails(mutation: str, precision: str, trained: Any, gate: Gate) -> None:
    row = gate.row(MUTATIONS[mutation](trained, gate.run), precision)
    assert not row.passed
    with pytest.raises(ParityTolerance, match="FAILED"):
        require(gate.receipt(row))


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize(
    ("shift", "axis", "back"), [(1, 1, "-1,0"), (-1, 1, "1,0"), (1, 2, "0,-1"), (-1, 2, "0,1")], ids=str
)
def test_a_shifted_mask_is_identified_in_every_precision(
    gate: Gate, precision: str, shift: int, axis: int, back: str
) -> None:
    row = gate.row(lambda batch: np.roll(gate.run(batch), shift, axis=axis), precision)
    assert row.registration[back] < 0.05 < 1 < row.registration["0,0"]
    assert any(f"not aligned: shifted by (dy, dx) = ({back})" in failure for failure in row.failures)


#: Bugs that an exporter could have.
EXPORTER_BUGS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "BGR": lambda honest, image: honest(image.flip(3)),
    "shifted": lambda honest, image: torch.roll(honest(image), 1, dims=2),
}


@pytest.mark.parametrize(("bug", "precision"), [("BGR", "fp32"), ("shifted", "fp16")])
def test_exporting_the_wrong_network_is_caught(
    bug: str,
    precision: str,
    checkpoint_file: Path,
    oxford_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    honest = DeployedUNet.forward
    change = EXPORTER_BUGS[bug]
    monkeypatch.setattr(DeployedUNet, "forward", lambda self, image: change(lambda batch: honest(self, batch), image))
    config = OnnxConfig(output=tmp_path / "out.onnx", data=oxford_root / "images", precision=precision)
    with pytest.raises(ParityTolerance, match="FAILED"):
        export(checkpoint_file, config)
    assert not list(tmp_path.iterdir())


def test_weights_lost_during_export_are_caught(
    checkpoint_file: Path, trained: Any, oxford_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tracer: Any
) -> None:
    """Through the complete export: the graph of another epoch's network is traced."""
    monkeypatch.setattr(build, "graph_bytes", lambda deployed, spec: tracer(DeployedUNet(trained.earlier), spec))
    with pytest.raises(ParityTolerance, match=r"mask IoU 0\.\d+, allowed 0\.999"):
        export(checkpoint_file, OnnxConfig(output=tmp_path / "out.onnx", data=oxford_root / "images"))
    assert not list(tmp_path.iterdir())
