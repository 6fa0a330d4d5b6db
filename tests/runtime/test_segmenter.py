"""Photo in, mask at the photo's size out, whatever form the photo comes in."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from petseg_runtime import Segmenter, images, sample_photos
from petseg_runtime.errors import EngineError, ModelError, UnreadableImage
from petseg_runtime.spec import SPEC_KEY, ModelSpec

H, W = 16, 32
CONFIDENT = ("Abyssinian_204.jpg", "american_bulldog_60.jpg", "chelsea.jpg")


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that takes red for pet: its probability is the image's red channel."""
    spec = ModelSpec(name="red", height=H, width=W, threshold=0.7, cutout_threshold=0.2)
    graph = helper.make_graph(
        [helper.make_node("Gather", ["image", "index"], ["probability"], axis=3)],
        "red",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", H, W, 3])],
        [helper.make_tensor_value_info("probability", TensorProto.UINT8, ["N", H, W])],
        [helper.make_tensor("index", TensorProto.INT64, [], [0])],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    helper.set_model_props(model, {SPEC_KEY: spec.to_json()})
    path = tmp_path_factory.mktemp("model") / "red.onnx"
    onnx.save(model, path)
    return path


@pytest.fixture(scope="module")
def segmenter(red: Path) -> Iterator[Segmenter]:
    with Segmenter(red, threads=1) as segmenter:
        yield segmenter


@pytest.fixture(scope="module")
def embedded() -> Iterator[Segmenter]:
    with Segmenter(threads=1) as segmenter:
        yield segmenter


@pytest.fixture
def pixels() -> np.ndarray:
    """A photo, neither square nor of the model's size, whose channels differ."""
    y, x = np.mgrid[:45, :70]
    return np.dstack((x * 255 // 69, y * 255 // 44, 255 - x * 255 // 69)).astype(np.uint8)


def half_red(height: int, width: int) -> np.ndarray:
    """Red on the left, blue on the right."""
    photo = np.zeros((height, width, 3), np.uint8)
    photo[:, : width // 2, 0] = 255
    photo[:, width // 2 :, 2] = 255
    return photo


def test_all_forms_of_a_photo_give_the_same(segmenter: Segmenter, pixels: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    forms: list[Any] = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), pixels]
    forms.append(Image.fromarray(pixels))
    expected = images.from_model(images.to_model(pixels, H, W)[..., 0], *pixels.shape[:2])
    for form in forms:
        result = segmenter(form)
        np.testing.assert_array_equal(result.pixels, pixels)
        np.testing.assert_array_equal(result.probability, expected)


@pytest.mark.parametrize("shape", [(45, 70), (H, W), (W, H), (1, 1), (1, 200), (200, 1), (3, 500)])
def test_mask_and_probability_have_the_photos_size(segmenter: Segmenter, shape: tuple[int, int]) -> None:
    result = segmenter(np.full((*shape, 3), 200, np.uint8))
    assert result.mask.shape == result.probability.shape == shape
    assert result.mask.dtype == np.bool_
    assert result.probability.dtype == np.uint8
    assert (result.probability == 200).all()


def test_a_photo_of_the_models_size_is_not_resampled(segmenter: Segmenter) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    np.testing.assert_array_equal(segmenter(photo).probability, photo[..., 0])


def test_the_mask_lies_where_the_pet_is(segmenter: Segmenter) -> None:
    mask = segmenter(half_red(60, 90)).mask
    assert mask[:, :42].all()
    assert not mask[:, 48:].any()


def test_the_models_own_thresholds_are_used(red: Path, segmenter: Segmenter) -> None:
    assert (segmenter.threshold, segmenter.cutout_threshold) == (0.7, 0.2)
    result = segmenter(np.full((5, 5, 3), 150, np.uint8))  # probability 0.59
    assert (result.threshold, result.cutout_threshold) == (0.7, 0.2)
    assert not result.mask.any()


def test_each_threshold_may_be_overridden_alone(red: Path) -> None:
    grey = np.full((5, 5, 3), 150, np.uint8)
    with Segmenter(red, threads=1, threshold=0.5) as lower:
        assert (lower.threshold, lower.cutout_threshold) == (0.5, 0.2)
        assert lower(grey).mask.all()
    with Segmenter(red, threads=1, cutout_threshold=0.9) as other:
        assert (other.threshold, other.cutout_threshold) == (0.7, 0.9)
        assert other(grey).cutout_threshold == 0.9


@pytest.mark.parametrize("name", ["threshold", "cutout_threshold"])
@pytest.mark.parametrize("value", [0, 0.0, 1, 1.5, -0.1, float("nan"), float("inf")])
def test_a_threshold_outside_its_bounds_is_refused(red: Path, name: str, value: float) -> None:
    keywords: dict[str, Any] = {name: value}
    with pytest.raises(ModelError, match=rf"^{name} is {value}"):
        Segmenter(red, **keywords)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, np.asarray), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_a_photo_turned_by_exif_gives_the_upright_mask(segmenter: Segmenter, orientation: int, turned: Any) -> None:
    stored, buffer = half_red(40, 80), io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(buffer, format="PNG", exif=exif)
    result = segmenter(buffer.getvalue())
    np.testing.assert_array_equal(result.pixels, turned(stored))
    expected = turned(stored)[..., 0] == 255
    assert result.mask.shape == expected.shape
    assert np.mean(result.mask == expected) > 0.9


def test_a_grey_array_is_read_as_grey(segmenter: Segmenter) -> None:
    result = segmenter(np.full((20, 30), 180, np.uint8))
    assert (result.pixels == 180).all()
    assert result.pixels.shape == (20, 30, 3)
    assert (result.probability == 180).all()


def test_a_transparent_array_is_laid_over_white_and_that_is_noted(segmenter: Segmenter) -> None:
    rgba = np.zeros((20, 30, 4), np.uint8)
    rgba[:10, :, 3] = 255
    result = segmenter(rgba)
    assert result.pixels.shape == (20, 30, 3)
    assert (result.pixels[:10] == 0).all()
    assert (result.pixels[10:] == 255).all()
    assert any("transparency" in note for note in result.notes)
    assert result.mask[15:].all()
    assert not result.mask[:5].any()


def test_a_photo_that_cannot_be_read_leaves_the_segmenter_usable(segmenter: Segmenter, tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"missing\.jpg"):
        segmenter(tmp_path / "missing.jpg")
    assert segmenter(half_red(20, 20)).coverage > 0.3


def test_threads_may_share_it(segmenter: Segmenter) -> None:
    photos = [np.full((10 + i, 20, 3), 10 * i, np.uint8) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        for photo, result in zip(photos, pool.map(segmenter, photos), strict=True):
            np.testing.assert_array_equal(result.probability, photo[..., 0])


def test_it_closes_with_its_context(red: Path) -> None:
    with Segmenter(str(red), threads=1) as segmenter:
        assert segmenter.describe().threads == 1
    segmenter.close()
    with pytest.raises(EngineError, match="closed"):
        segmenter(half_red(8, 8))


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.onnx"):
        Segmenter(tmp_path / "nowhere.onnx")


def test_an_unknown_backend_is_refused(red: Path) -> None:
    with pytest.raises(EngineError, match="abacus"):
        Segmenter(red, backend="abacus")


@pytest.mark.parametrize("name", CONFIDENT)
def test_the_model_that_ships_finds_a_pet_that_is_not_the_whole_photo(embedded: Segmenter, name: str) -> None:
    (photo,) = (path for path in sample_photos() if path.name == name)
    result = embedded(photo)
    with Image.open(photo) as image:
        assert result.mask.shape == (image.height, image.width)
    assert 0.05 < result.coverage < 0.95
    assert result.threshold == embedded.artifact.spec.threshold


# ------------------------------------------------------------------------------------------------ another input size


@pytest.fixture(scope="module")
def free(toy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The red model for any input size; proven at 16 x 32."""
    path: Path = toy(tmp_path_factory.mktemp("free") / "free.onnx", dynamic_size=True).path
    return path


@pytest.mark.parametrize("size", [(48, 80), (16, 16), (160, 16)])
def test_a_model_of_free_size_is_given_photos_of_the_size_asked_for(
    free: Path, pixels: np.ndarray, size: tuple[int, int]
) -> None:
    with Segmenter(free, threads=1, size=size) as segmenter:
        result = segmenter(pixels)
        exact = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        np.testing.assert_array_equal(segmenter(exact).probability, exact[..., 0])  # not resampled
    expected = images.from_model(images.to_model(pixels, *size)[..., 0], *pixels.shape[:2])
    np.testing.assert_array_equal(result.probability, expected)


def test_without_a_size_a_model_of_free_size_uses_the_one_it_was_proven_at(free: Path, pixels: np.ndarray) -> None:
    with Segmenter(free, threads=1) as own, Segmenter(free, threads=1, size=(H, W)) as same:
        np.testing.assert_array_equal(own(pixels).probability, same(pixels).probability)
        assert own.artifact.spec == same.artifact.spec


@pytest.mark.parametrize("size", [(0, 0), (17, 32), (16, -32), (24, 32)])
def test_a_size_that_the_network_cannot_take_is_refused(free: Path, size: tuple[int, int]) -> None:
    with pytest.raises(ModelError, match="multiple of 16"):
        Segmenter(free, size=size)


def test_a_model_of_one_size_takes_no_other(red: Path) -> None:
    with Segmenter(red, threads=1, size=(H, W)) as segmenter:
        assert segmenter(half_red(20, 20)).mask.shape == (20, 20)
    for size in ((W, H), (0, 0), (32, 32)):
        with pytest.raises(ModelError, match=f"{H} x {W} only, not {size[0]} x {size[1]}"):
            Segmenter(red, size=size)


def test_the_size_is_looked_at_before_an_engine_is(red: Path) -> None:
    with pytest.raises(ModelError, match="only"):
        Segmenter(red, size=(64, 64), backend="abacus")


def test_a_model_for_batches_of_three_takes_single_photos(toy: Callable[..., Any], tmp_path: Path) -> None:
    with Segmenter(toy(tmp_path / "three.onnx", batch=3).path, threads=1) as segmenter:
        assert (segmenter(np.full((20, 30, 3), 77, np.uint8)).probability == 77).all()


def test_a_compiled_model_is_a_model_too(
    toy: Callable[..., Any], ir: Callable[..., Any], tmp_path: Path, pixels: np.ndarray
) -> None:
    onnx_file = toy(tmp_path / "toy.onnx")
    with Segmenter(onnx_file.path, threads=1) as one, Segmenter(ir(onnx_file).path, threads=1) as two:
        assert (one.describe().name, two.describe().name) == ("onnxruntime", "openvino")
        np.testing.assert_array_equal(one(pixels).probability, two(pixels).probability)
