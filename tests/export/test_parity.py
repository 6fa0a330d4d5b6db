"""The receipt: what it measures, and that it turns away every file that is not the checkpoint's network."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from petseg.evaluate import torch_run
from petseg.model import normalize
from petseg_export import parity
from petseg_runtime.artifact import open_artifact
from petseg_runtime.engines.base import EngineInfo
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.errors import ParityError, ParityShapes, ParityTolerance, UnreadableImage
from petseg_runtime.spec import ModelSpec

if TYPE_CHECKING:
    from petseg.model import AttentionUNet

H, W = 16, 32
SPEC = ModelSpec(name="test", height=H, width=W, threshold=0.5)
INFO = EngineInfo(name="fake", version="1.2", device="cpu", provider="none", precision="f32", threads=1)
Run = Callable[[np.ndarray], np.ndarray]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """20 noise photos of the model's own size, as PNG: their red channel serves as the reference's probability."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(20):
        Image.fromarray(rng.integers(0, 256, (H, W, 3), np.uint8)).save(folder / f"{i:02d}.png")
    return sorted(folder.iterdir())


def red(batch: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(batch[..., 0])


def constant(value: np.ndarray) -> Run:
    return lambda batch: value[None].copy()


def compare(reference: Run, candidate: Run, photos: list[Path], spec: ModelSpec = SPEC) -> parity.Receipt:
    return parity.compare(reference, candidate, INFO, photos, spec)


# ------------------------------------------------------------------------------------------------ what is measured


def test_identical_runs_differ_by_nothing_and_pass(pictures: list[Path]) -> None:
    receipt = compare(red, red, pictures)
    assert receipt.passed
    assert receipt.photos == 20
    assert (receipt.max_difference, receipt.mean_difference, receipt.p99_difference) == (0, 0, 0)
    assert (receipt.min_mask_iou, receipt.mean_mask_iou) == (1, 1)
    assert receipt.precision == "f32"
    assert receipt.tolerance == parity.Tolerance(max_difference=1, min_mask_iou=0.999)
    for word in ("fake", "1.2", "cpu"):
        assert word in receipt.engine


def test_the_digest_is_of_the_pixels_that_the_model_saw_in_order(pictures: list[Path]) -> None:
    pixels = [np.asarray(Image.open(path)).tobytes() for path in pictures]
    receipt = compare(red, red, pictures)
    assert receipt.photos_sha256 == hashlib.sha256(b"".join(pixels)).hexdigest()
    assert compare(red, red, pictures[::-1]).photos_sha256 != receipt.photos_sha256


def test_both_runs_get_the_same_single_photo_at_the_size_of_the_spec(tmp_path: Path) -> None:
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (37, 61, 3), np.uint8)).save(tmp_path / "odd.png")
    seen: list[np.ndarray] = []

    def watching(batch: np.ndarray) -> np.ndarray:
        seen.append(batch.copy())
        return red(batch)

    compare(watching, watching, [tmp_path / "odd.png"])
    first, second = seen
    assert first.shape == (1, H, W, 3)
    assert first.dtype == np.uint8
    assert (first == second).all()


@pytest.mark.parametrize(("count", "kind"), [(1, "smoke"), (15, "smoke"), (16, "full"), (20, "full")])
def test_fewer_than_sixteen_photos_are_a_smoke_test_and_say_so(pictures: list[Path], count: int, kind: str) -> None:
    receipt = compare(red, red, pictures[:count])
    assert receipt.kind == kind
    assert kind in receipt.summary


@given(data=st.data(), seed=st.integers(0, 2**32 - 1), count=st.integers(1, 3), threshold=st.floats(0.05, 0.95))
def test_every_number_is_what_brute_force_finds(
    data: st.DataObject, seed: int, count: int, threshold: float, pictures: list[Path]
) -> None:
    rng = np.random.default_rng(seed)
    spread = data.draw(st.sampled_from([0, 1, 2, 30, 255]))
    share = data.draw(st.sampled_from([0.001, 0.02, 0.5, 1.0]))
    expected = rng.integers(0, 256, (count, H, W), np.uint8)
    change = rng.integers(-spread, spread + 1, expected.shape) * (rng.random(expected.shape) < share)
    got = np.clip(expected + change, 0, 255).astype(np.uint8)
    calls = {"reference": iter(expected), "candidate": iter(got)}
    receipt = compare(
        lambda batch: next(calls["reference"])[None],
        lambda batch: next(calls["candidate"])[None],
        pictures[:count],
        dataclasses.replace(SPEC, threshold=threshold),
    )
    difference = np.sort([abs(int(a) - int(b)) for a, b in zip(expected.ravel(), got.ravel(), strict=True)])
    assert receipt.max_difference == difference[-1]
    assert receipt.mean_difference == pytest.approx(difference.mean())
    assert receipt.p99_difference == difference[-(-99 * len(difference) // 100) - 1], "99 of 100 are no larger"
    ious = []
    for a, b in zip(expected, got, strict=True):
        pet_a = {i for i, value in enumerate(a.ravel().tolist()) if value >= 255 * threshold}
        pet_b = {i for i, value in enumerate(b.ravel().tolist()) if value >= 255 * threshold}
        ious.append(len(pet_a & pet_b) / len(pet_a | pet_b) if pet_a | pet_b else 1.0)
    assert receipt.min_mask_iou == pytest.approx(min(ious))
    assert receipt.mean_mask_iou == pytest.approx(sum(ious) / count)
    assert receipt.passed == (difference[-1] <= 1 and min(ious) >= 0.999)


# ------------------------------------------------------------------------------------------------ the verdict


@pytest.mark.parametrize(("steps", "passes"), [(-2, False), (-1, True), (1, True), (2, False)])
def test_one_pixel_off_by_one_step_passes_and_by_two_fails(pictures: list[Path], steps: int, passes: bool) -> None:
    base = np.full((H, W), 200, np.uint8)
    other = base.copy()
    other[3, 4] = 200 + steps
    receipt = compare(constant(base), constant(other), pictures[:2])
    assert receipt.max_difference == abs(steps)
    assert receipt.min_mask_iou == 1
    assert receipt.passed is passes


def test_masks_that_differ_fail_although_no_pixel_is_off_by_more_than_a_step(pictures: list[Path]) -> None:
    base = np.full((H, W), 127, np.uint8)  # just not pet at 0.5
    base[:8] = 200
    other = base.copy()
    other[8:10] = 128  # just pet
    receipt = compare(constant(base), constant(other), pictures[:1])
    assert receipt.max_difference == 1
    assert receipt.min_mask_iou == pytest.approx(8 / 10)
    assert not receipt.passed
    assert compare(constant(base), constant(other), pictures[:1], dataclasses.replace(SPEC, threshold=0.4)).passed


def test_one_bad_photo_among_many_is_enough_to_fail(pictures: list[Path]) -> None:
    calls = iter(range(20))

    def wrong_once(batch: np.ndarray) -> np.ndarray:
        out = red(batch)
        return 255 - out if next(calls) == 13 else out

    receipt = compare(red, wrong_once, pictures)
    assert not receipt.passed
    assert receipt.min_mask_iou < 0.1 < 0.9 < receipt.mean_mask_iou


def test_the_worst_mask_decides_and_not_the_mean(pictures: list[Path]) -> None:
    base = np.full((H, W), 127, np.uint8)
    base[:15] = 200
    other = base.copy()
    other[15, :3] = 128  # three pixels in 480, in one photo of 20
    calls = iter(range(20))
    receipt = compare(constant(base), lambda batch: (other if next(calls) == 7 else base)[None], pictures)
    assert receipt.max_difference == 1
    assert receipt.min_mask_iou < 0.999 < receipt.mean_mask_iou
    assert not receipt.passed


def test_two_empty_masks_agree(pictures: list[Path]) -> None:
    receipt = compare(constant(np.zeros((H, W), np.uint8)), constant(np.ones((H, W), np.uint8)), pictures[:1])
    assert receipt.min_mask_iou == 1
    assert receipt.passed


def test_differences_do_not_wrap_around_in_bytes(pictures: list[Path]) -> None:
    black, white = np.zeros((H, W), np.uint8), np.full((H, W), 255, np.uint8)
    assert compare(constant(black), constant(white), pictures[:1]).max_difference == 255
    assert compare(constant(white), constant(black), pictures[:1]).max_difference == 255


@pytest.mark.parametrize(
    "wrong",
    [
        lambda out: out[..., None],
        lambda out: out[0],
        lambda out: out.transpose(0, 2, 1),
        lambda out: out[:, :, :-1],
        lambda out: np.concatenate([out, out]),
        lambda out: out.astype(np.float32),
        lambda out: out.astype(np.int8),
        lambda out: out.astype(bool),
    ],
)
def test_an_output_of_another_shape_or_type_is_named(pictures: list[Path], wrong: Callable[[Any], Any]) -> None:
    with pytest.raises(ParityShapes) as caught:
        compare(red, lambda batch: wrong(red(batch)), pictures[:1])
    got = wrong(np.zeros((1, H, W), np.uint8))
    assert f"{got.dtype} {list(got.shape)}" in str(caught.value)
    assert f"uint8 [1, {H}, {W}]" in str(caught.value)
    assert isinstance(caught.value, ParityError)
    assert caught.value.exit_code == 10


def test_a_photo_that_cannot_be_read_is_no_proof(pictures: list[Path], tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not a photo")
    with pytest.raises(UnreadableImage, match=r"broken\.jpg"):
        compare(red, red, [pictures[0], tmp_path / "broken.jpg"])


def test_a_failed_receipt_is_an_error_that_says_by_how_much(pictures: list[Path]) -> None:
    bad = compare(red, lambda batch: 255 - red(batch), pictures[:3])
    with pytest.raises(ParityTolerance) as caught:
        parity.require(bad, SPEC)
    for part in ("FAILED", f"{bad.max_difference}/255", "smoke", "allowed: max 1/255", "0.999", "threshold 0.5"):
        assert part in str(caught.value)


def test_a_passed_receipt_is_no_error(pictures: list[Path]) -> None:
    good = compare(red, red, pictures[:3])
    parity.require(good, SPEC)
    assert "passed" in good.summary
    assert "FAILED" not in good.summary


@pytest.mark.parametrize("candidate", [red, lambda batch: 255 - red(batch)])
def test_a_receipt_survives_json(pictures: list[Path], candidate: Run) -> None:
    receipt = compare(red, candidate, pictures[:3])
    raw = json.loads(json.dumps(receipt.as_dict(), allow_nan=False))
    assert raw == receipt.as_dict()
    assert raw.pop("schema_version") == 1
    assert raw.pop("summary") == receipt.summary
    tolerance = parity.Tolerance(**raw.pop("tolerance"))
    assert parity.Receipt(**raw, tolerance=tolerance) == receipt


# ------------------------------------------------------------------------------------------------ the gate, attacked


@pytest.fixture(scope="module")
def engine_run(exported: Any) -> Iterator[Run]:
    with load_engine(open_artifact(exported.file), threads=1) as engine:
        yield engine.run


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


#: (trained, the file's run) -> a run that is not the checkpoint's network.
MUTATIONS: dict[str, Callable[[Any, Run], Run]] = {
    "BGR for RGB": lambda t, run: lambda batch: run(np.ascontiguousarray(batch[..., ::-1])),
    "mask one pixel to the right": lambda t, run: lambda batch: np.roll(run(batch), 1, axis=2),
    "mask one pixel down": lambda t, run: lambda batch: np.roll(run(batch), 1, axis=1),
    "mirrored": lambda t, run: lambda batch: run(batch)[:, :, ::-1],
    "rows and columns swapped": lambda t, run: lambda batch: run(batch).transpose(0, 2, 1),
    "background for pet": lambda t, run: lambda batch: 255 - run(batch),
    "a mask for a probability": lambda t, run: lambda batch: np.where(run(batch) >= 153, 255, 0).astype(np.uint8),
    "without normalisation": lambda t, run: without_normalisation(t.model),
    "without the division by the deviation": lambda t, run: with_mean_only(t.model),
    "a filter of the first convolution is zero": lambda t, run: changed(t.model, zero_strongest_filter),
    "BatchNorm in training mode": lambda t, run: changed(t.model, lambda m: m.down1[1].running_mean.zero_()),
    "weights of another epoch": lambda t, run: torch_run(t.earlier),
    "constant 0": lambda t, run: lambda batch: np.zeros(batch.shape[:3], np.uint8),
    "constant 255": lambda t, run: lambda batch: np.full(batch.shape[:3], 255, np.uint8),
    "always the answer to the first photo": lambda t, run: _stuck(run),
}


def _stuck(run: Run) -> Run:
    first: list[np.ndarray] = []

    def stuck(batch: np.ndarray) -> np.ndarray:
        if not first:
            first.append(run(batch))
        return first[0]

    return stuck


def test_the_real_file_passes_and_its_output_is_not_flat(
    trained: Any, exported: Any, engine_run: Run, photos: list[Path]
) -> None:
    """The control: without it, the mutations below would prove nothing."""
    spec = open_artifact(exported.file).spec
    seen: list[np.ndarray] = []

    def watched(batch: np.ndarray) -> np.ndarray:
        seen.append(engine_run(batch))
        return seen[-1]

    receipt = parity.compare(torch_run(trained.model), watched, INFO, photos, spec)
    parity.require(receipt, spec)
    assert len(np.unique(np.stack(seen))) > 100
    shares = [float((out >= 255 * spec.threshold).mean()) for out in seen]
    assert 0.02 < min(shares) <= max(shares) < 0.7, "each mask has pet and background"


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_a_file_that_is_not_the_checkpoints_network_fails(
    mutation: str, trained: Any, exported: Any, engine_run: Run, photos: list[Path]
) -> None:
    spec = open_artifact(exported.file).spec
    candidate = MUTATIONS[mutation](trained, engine_run)
    receipt = parity.compare(torch_run(trained.model), candidate, INFO, photos, spec)
    assert not receipt.passed
    with pytest.raises(ParityTolerance):
        parity.require(receipt, spec)
