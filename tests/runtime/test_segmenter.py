"""The Python API: from photos in any form to masks of their size."""

from __future__ import annotations

import dataclasses
import io
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image, ImageCms, ImageSequence

from petseg_runtime import Segmenter, images, sample_photos
from petseg_runtime.artifact import Artifact
from petseg_runtime.engines import onnxruntime, registry
from petseg_runtime.engines.base import EngineOptions
from petseg_runtime.errors import EngineError, InputError, ModelError, UnreadableImage, UnsupportedImage, UsageError
from petseg_runtime.memory_budget import MemoryBudget, Reservation
from petseg_runtime.parity import Proof
from petseg_runtime.result import Segmentation
from petseg_runtime.segmenter import Prepared
from petseg_runtime.sources import Origin
from petseg_runtime.spec import SPEC_KEY, ModelSpec

H, W = 16, 32
CONFIDENT = ("Abyssinian_204.jpg", "american_bulldog_60.jpg", "chelsea.jpg")


@pytest.fixture(scope="module")
def red(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose probability is the image's red channel."""
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
    """Outputs the photo's red channel, without removing low-confidence regions."""
    with Segmenter(red, threads=1, keep_doubtful=True) as segmenter:
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


def encoded(pixels: np.ndarray) -> bytes:
    """The pixels as a PNG."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_a_number_selects_the_same_camera_as_its_text(
    segmenter: Segmenter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []

    def open_frames(origin: Origin, reading: Any, *, threads: int | None, tell: Any) -> list[Any]:
        assert threads == segmenter.threads == 1, "FFmpeg would take all cores"
        opened.append(origin)
        return []

    monkeypatch.setattr("petseg_runtime.video.live.open_frames", open_frames)
    monkeypatch.chdir(tmp_path)
    for source in (0, "0", 12):
        with segmenter.stream(source) as stream:
            assert list(stream) == []
    (tmp_path / "0").touch()
    with segmenter.stream(0):
        pass
    assert [(origin.target, origin.container) for origin in opened] == [
        (f"/dev/video{number}", "v4l2") for number in (0, 0, 12, 0)
    ]
    assert all(origin.endless for origin in opened)


@pytest.mark.parametrize(
    "wrong", [{"policy": "newest"}, {"stride": 1.5}, {"max_frames": 2.5}, {"smooth": 1.0}, {"stall": 0}], ids=str
)
def test_an_invalid_stream_request_opens_nothing(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch, wrong: dict[str, Any]
) -> None:
    opened: list[Any] = []
    monkeypatch.setattr("petseg_runtime.video.live.open_frames", lambda *given, **_: opened.append(given))
    with pytest.raises(UsageError, match=next(iter(wrong)).replace("smooth", "smoothing")):
        segmenter.stream("clip.mp4", **wrong)
    assert opened == []


def test_results_carry_the_photos_icc_profile(segmenter: Segmenter, tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (70, 45), "red").save(tmp_path / "photo.jpg", icc_profile=profile)
    mapped = next(segmenter.map([tmp_path / "photo.jpg"]))
    assert isinstance(mapped, Segmentation)
    for result in (segmenter(tmp_path / "photo.jpg"), mapped, mapped.without_small(0.1)):
        for picture in (result.cutout(), result.overlay(), result.on_background((1, 2, 3))):
            assert picture.info["icc_profile"] == profile
        assert "icc_profile" not in result.mask_image().info | result.probability_image().info
        result.cutout().save(tmp_path / "cutout.png")
        with Image.open(tmp_path / "cutout.png") as picture:
            assert picture.info["icc_profile"] == profile


def noise(seed: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def half_red(height: int, width: int) -> np.ndarray:
    """Red on the left, blue on the right."""
    photo = np.zeros((height, width, 3), np.uint8)
    photo[:, : width // 2, 0] = 255
    photo[:, width // 2 :, 2] = 255
    return photo


def test_all_forms_of_a_photo_give_the_same_result(segmenter: Segmenter, pixels: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    forms: list[Any] = [path, str(path), path.read_bytes(), io.BytesIO(path.read_bytes()), pixels]
    forms += [Image.fromarray(pixels), bytearray(path.read_bytes()), memoryview(path.read_bytes())]
    expected = images.from_model(images.to_model(pixels, H, W)[..., 0], *pixels.shape[:2])
    for form in forms:
        result = segmenter(form)
        np.testing.assert_array_equal(result.pixels, pixels)
        np.testing.assert_array_equal(result.probability, expected)


@pytest.mark.parametrize(
    "wrong", [None, 3, ("cat.jpg",), {"cat.jpg"}, io.StringIO("text")], ids=lambda wrong: type(wrong).__name__
)
def test_a_value_that_is_not_a_photo_is_an_error_naming_its_type(segmenter: Segmenter, wrong: Any) -> None:
    for take in (segmenter.prepare, lambda source: next(segmenter.map([source]))):
        try:
            error = take(wrong)
        except InputError as raised:
            error = raised
        said = "a photo must be a path, bytes, an open binary file, a uint8 array or a PIL image, not "
        assert str(error).startswith(said + type(wrong).__name__)
        assert ("cv2.imread" in str(error)) == (wrong is None)


@pytest.mark.parametrize("shape", [(45, 70), (H, W), (W, H), (1, 1), (1, 200), (200, 1), (3, 500)])
def test_mask_and_probability_have_the_photos_size(segmenter: Segmenter, shape: tuple[int, int]) -> None:
    result = segmenter(np.full((*shape, 3), 200, np.uint8))
    assert result.mask.shape == result.probability.shape == shape
    assert result.mask.dtype == np.bool_
    assert result.probability.dtype == np.uint8
    assert (result.probability == 200).all()


def test_a_photo_at_the_models_size_is_not_resampled(segmenter: Segmenter) -> None:
    photo = np.random.default_rng(0).integers(0, 256, (H, W, 3), dtype=np.uint8)
    np.testing.assert_array_equal(segmenter(photo).probability, photo[..., 0])


def test_the_mask_is_where_the_pet_is(segmenter: Segmenter) -> None:
    mask = segmenter(half_red(60, 90)).mask
    assert mask[:, :42].all()
    assert not mask[:, 48:].any()


def test_the_models_thresholds_are_used(red: Path, segmenter: Segmenter) -> None:
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
def test_a_threshold_out_of_range_is_rejected(red: Path, name: str, value: float) -> None:
    keywords: dict[str, Any] = {name: value}
    with pytest.raises(UsageError, match=rf"^{name} is {value}"):
        Segmenter(red, **keywords)


@pytest.mark.parametrize(
    ("orientation", "turned"),
    [(1, np.asarray), (3, lambda a: np.rot90(a, 2)), (6, lambda a: np.rot90(a, -1)), (8, np.rot90)],
)
def test_a_photo_rotated_by_exif_gives_the_upright_mask(segmenter: Segmenter, orientation: int, turned: Any) -> None:
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


def test_a_transparent_array_is_composited_over_white_with_a_note(segmenter: Segmenter) -> None:
    rgba = np.zeros((20, 30, 4), np.uint8)
    rgba[:10, :, 3] = 255
    result = segmenter(rgba)
    assert result.pixels.shape == (20, 30, 3)
    assert (result.pixels[:10] == 0).all()
    assert (result.pixels[10:] == 255).all()
    assert any("transparency" in note for note in result.notes)
    assert result.mask[15:].all()
    assert not result.mask[:5].any()


def test_an_unreadable_photo_leaves_the_segmenter_usable(segmenter: Segmenter, tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"missing\.jpg"):
        segmenter(tmp_path / "missing.jpg")
    assert segmenter(half_red(20, 20)).coverage > 0.3


@pytest.mark.parametrize("streams", [1, 2, 8])
def test_eight_threads_can_share_a_segmenter_with_the_same_results(red: Path, streams: int) -> None:
    photos = [noise(seed, 10 + seed, 40 - seed) for seed in range(24)]
    with Segmenter(red, threads=8, streams=streams) as segmenter, ThreadPoolExecutor(8) as pool:
        alone = [segmenter(photo) for photo in photos]
        kept = [result.probability.copy() for result in alone]
        for _ in range(3):
            for photo, one, other in zip(photos, alone, pool.map(segmenter, photos), strict=True):
                np.testing.assert_array_equal(other.probability, one.probability)
                np.testing.assert_array_equal(other.pixels, photo)
    for result, before in zip(alone, kept, strict=True):
        np.testing.assert_array_equal(result.probability, before)


def test_eight_threads_can_share_the_bundled_model(embedded: Segmenter) -> None:
    photos = sample_photos()[:4] * 2
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(embedded, photos))
    for photo, result in zip(photos, results, strict=True):
        expected = embedded(photo)
        assert np.abs(result.probability.astype(int) - expected.probability).max() <= 1  # kernels may round differently


# ---------------------------------------------------------------------------------------------- several photos


@pytest.mark.parametrize("kind", [list, tuple])
def test_a_list_of_photos_gives_a_list_of_results(
    segmenter: Segmenter, pixels: np.ndarray, tmp_path: Path, kind: Any
) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(pixels).save(path)
    photos: list[Any] = [half_red(20, 30), path, path.read_bytes(), Image.fromarray(pixels), noise(1, 9, 8)]
    results = segmenter(kind(photos))
    assert isinstance(results, list)
    assert len(results) == len(photos)
    for photo, result in zip(photos, results, strict=True):
        np.testing.assert_array_equal(result.probability, segmenter(photo).probability)
        np.testing.assert_array_equal(result.pixels, segmenter(photo).pixels)


def test_no_photos_give_no_results(segmenter: Segmenter) -> None:
    assert segmenter([]) == []
    assert list(segmenter.map([])) == []


def test_a_list_with_a_bad_photo_raises_its_error(segmenter: Segmenter, tmp_path: Path) -> None:
    with pytest.raises(UnreadableImage, match=r"missing\.jpg: no such file"):
        segmenter([half_red(8, 8), tmp_path / "missing.jpg", half_red(8, 8)])


def test_a_list_raises_the_first_error_without_processing_the_rest(red: Path, tmp_path: Path) -> None:
    done: list[int] = []

    class Counting(Segmenter):
        def finish(self, prepared: Prepared, probability: np.ndarray) -> Segmentation:
            done.append(1)
            return super().finish(prepared, probability)

    bad: list[Any] = [tmp_path / "missing.jpg", tmp_path / "other.jpg"]
    with Counting(red) as segmenter, pytest.raises(UnreadableImage, match=r"missing\.jpg: no such file"):
        segmenter([half_red(8, 8), *bad, *[half_red(8, 8)] * 300])
    assert len(done) < 100
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("petseg")]


def test_a_map_continues_after_a_bad_photo_in_order(segmenter: Segmenter, tmp_path: Path) -> None:
    photos: list[Any] = [noise(seed, 20, 30) for seed in range(20)]
    photos[3], photos[11] = tmp_path / "missing.jpg", b"no photo"
    results = list(segmenter.map(iter(photos)))
    assert len(results) == 20
    for number, (photo, result) in enumerate(zip(photos, results, strict=True)):
        if number in (3, 11):
            assert isinstance(result, UnreadableImage)
        else:
            assert isinstance(result, Segmentation)
            np.testing.assert_array_equal(result.pixels, photo)
            np.testing.assert_array_equal(result.probability, segmenter(photo).probability)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": 1.5}, "threads is 1.5"),
        ({"threads": 10**20}, "threads is 100000000000000000000; it must be a whole number, 1 to 1024"),
        ({"streams": 0}, "streams is 0"),
        ({"size": 256}, r"size is 256; it must be \(height, width\)"),
        ({"size": ()}, r"size is \(\)"),
        ({"size": "16x32"}, "size is '16x32'"),
    ],
)
def test_an_option_out_of_range_is_a_usage_error(red: Path, asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        Segmenter(red, **asked)


@pytest.mark.parametrize("asked", [{"start": -1.0}, {"stall": 0.0}, {"stall": float("nan")}, {"patience": -3.0}])
def test_an_invalid_time_is_a_usage_error(segmenter: Segmenter, asked: dict[str, float]) -> None:
    ((name, value),) = asked.items()
    with pytest.raises(UsageError, match=f"{name} is {value}; it must be a number of seconds"):
        segmenter.stream("clip.mp4", **asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("batch", [np.zeros((1, H, W, 3), np.float32), np.zeros((1, H, W + 16, 3), np.uint8)])
def test_a_batch_of_another_shape_is_a_usage_error(segmenter: Segmenter, batch: np.ndarray) -> None:
    with pytest.raises(UsageError, match=rf"{H}(, | x ){W}"):
        segmenter.infer(batch)


def test_a_skipped_engine_raises_a_warning(red: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a user's program would run on another device than intended without notice."""
    monkeypatch.setattr("petseg_runtime.host.nvidia_gpus", lambda: 1)
    monkeypatch.setattr(registry, "RULE", [line for line in registry.RULE if line.engine == "onnxruntime"])
    monkeypatch.setattr("petseg_runtime.engines.onnxruntime.load", broken := Broken(onnxruntime.load))
    with pytest.warns(RuntimeWarning, match="skipped: the library of cuda is broken") as caught:
        Segmenter(red).close()
    assert {warning.filename for warning in caught} == {__file__}
    assert broken.asked == ["cuda", "cpu"]
    told: list[str] = []
    Segmenter(red, tell=told.append).close()
    assert told == ["the library of cuda is broken"]


class Broken:
    """ONNX Runtime's loader on a machine where it fails on the GPU."""

    def __init__(self, load: Any) -> None:
        self.load, self.asked = load, []

    def __call__(self, artifact: Artifact, options: EngineOptions) -> Any:
        self.asked.append(options.device.kind)
        if options.device.kind == "cuda":
            raise EngineError("the library of cuda is broken")
        return self.load(artifact, options)


@pytest.mark.parametrize(
    "one",
    ["cat.jpg", Path("cat.jpg"), b"bytes", bytearray(2), memoryview(b""), io.BytesIO(), Image.new("L", (1, 1))],
    ids=lambda one: type(one).__name__,
)
def test_a_single_photo_passed_to_map_is_rejected_immediately(
    segmenter: Segmenter, one: Any, pixels: np.ndarray
) -> None:
    for source in (one, pixels):
        with pytest.raises(UsageError, match=rf"not a single one \({type(source).__name__}\); call the"):
            segmenter.map(source)


def test_a_map_over_an_array_of_photos_yields_each(segmenter: Segmenter, pixels: np.ndarray) -> None:
    assert len(list(segmenter.map(np.stack([pixels, pixels])))) == 2


@pytest.mark.parametrize("kind", [np.ndarray, bytearray, memoryview, io.BytesIO])
def test_a_map_copies_a_buffer_that_is_refilled(
    segmenter: Segmenter, pixels: np.ndarray, kind: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loop over a camera refills its buffer while photos wait for a reader thread."""
    photos = [np.roll(pixels, shift, axis=1) for shift in range(12)]
    array, buffer = np.empty_like(pixels), bytearray(max(len(encoded(photo)) for photo in photos))
    held = {np.ndarray: array, bytearray: buffer, memoryview: memoryview(buffer), io.BytesIO: io.BytesIO()}[kind]

    refilled, open_photo = threading.Event(), images.open_photo

    def later(source: Any, **options: Any) -> Any:
        assert refilled.wait(60)
        return open_photo(source, **options)

    monkeypatch.setattr(images, "open_photo", later)

    def taken() -> Iterator[Any]:
        for number, photo in enumerate(photos):
            array[:] = photo
            file = encoded(photo)  # bytes of a longer file may remain after it, which are not part of the PNG
            buffer[: len(file)] = file
            if kind is io.BytesIO:
                held.seek(0)
                held.write(file)
            if number:
                refilled.set()
            yield held

    for photo, result in zip(photos, segmenter.map(taken()), strict=True):
        assert isinstance(result, Segmentation)
        np.testing.assert_array_equal(result.pixels, photo)


def test_a_map_copies_a_pillow_image_that_is_modified_later(
    segmenter: Segmenter,
) -> None:
    reds = range(0, 240, 20)
    film = io.BytesIO()
    first, *rest = (Image.new("RGB", (W, H), (red, 0, 0)) for red in reds)
    first.save(film, "WEBP", save_all=True, append_images=rest, lossless=True)
    file = io.BytesIO()
    first.save(file, "PNG")

    def drawn(canvas: Image.Image) -> Iterator[Image.Image]:
        for red in reds:
            canvas.paste((red, 0, 0), (0, 0, W, H))
            yield canvas

    canvases = (Image.new("RGB", (W, H)), Image.open(file))
    for photos in (*map(drawn, canvases), ImageSequence.Iterator(Image.open(film))):
        results = [result.probability[0, 0] for result in segmenter.map(photos) if isinstance(result, Segmentation)]
        assert results == list(reds)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF", "WEBP", "GIF"])
def test_an_unloaded_pillow_image_can_be_mapped_several_times(red: Path, form: str) -> None:
    """The threads that read it share the position in its file."""
    file = io.BytesIO()
    Image.effect_noise((600, 600), 60).convert("L" if form == "GIF" else "RGB").save(file, form)
    expected = None
    with Segmenter(red, threads=4, streams=4, keep_doubtful=True) as segmenter:
        for _ in range(3):
            for result in segmenter.map([Image.open(file)] * 12):
                assert isinstance(result, Segmentation), result
                expected = result.probability if expected is None else expected
                np.testing.assert_array_equal(result.probability, expected)


def test_files_can_be_closed_or_reused_before_a_map_has_segmented_them(
    red: Path, pixels: np.ndarray, tmp_path: Path
) -> None:
    """A generator closes a file when the next one is requested; threads that read one file share its position."""
    photos = [np.roll(pixels, shift, axis=1) for shift in range(12)]
    for number, photo in enumerate(photos):
        (tmp_path / f"{number}.png").write_bytes(encoded(photo))
    (tmp_path / "cut.png").write_bytes(encoded(pixels)[:-100])

    def opened() -> Iterator[Any]:
        for number in (*range(len(photos)), "cut"):
            with (tmp_path / f"{number}.png").open("rb") as file:
                yield file

    with Segmenter(red, threads=4, streams=4, keep_doubtful=True) as segmenter:
        *results, of_a_cut_file = segmenter.map(opened())
        assert str(of_a_cut_file).startswith(f"{tmp_path / 'cut.png'}: damaged or truncated")
        for photo, result in zip(photos, results, strict=True):
            assert isinstance(result, Segmentation), result
            np.testing.assert_array_equal(result.pixels, photo)
        with (tmp_path / "0.png").open("rb") as file:
            for result in segmenter([file] * 12):
                np.testing.assert_array_equal(result.pixels, photos[0])


def test_a_map_continues_after_unreadable_pillow_images(segmenter: Segmenter, pixels: np.ndarray) -> None:
    film = io.BytesIO()
    first, second = (Image.effect_noise((W, H), sigma).convert("RGB") for sigma in (50, 60))
    first.save(film, "GIF", save_all=True, append_images=[second])
    cut = Image.open(io.BytesIO(film.getvalue()[: len(film.getvalue()) * 3 // 4]))
    of_32_bits, of_a_cut_film, result = segmenter.map([Image.new("I", (W, H)), cut, pixels])
    assert isinstance(of_32_bits, UnsupportedImage)
    assert isinstance(of_a_cut_film, UnreadableImage)
    assert isinstance(result, Segmentation)


@pytest.mark.parametrize("streams", [1, 4])
def test_a_map_consumes_a_generator_lazily(red: Path, streams: int) -> None:
    taken = []

    def photos() -> Iterator[np.ndarray]:
        for number in range(1000):
            taken.append(number)
            yield np.full((4, 4, 3), number % 256, np.uint8)

    with Segmenter(red, threads=streams, streams=streams) as segmenter:
        results = segmenter.map(photos())
        assert taken == []
        for number in range(20):
            result = next(results)
            assert isinstance(result, Segmentation)
            assert (result.probability == number).all()
            assert len(taken) <= number + 8 * streams, "memory is bounded"
        results.close()  # type: ignore[attr-defined]
    assert len(taken) < 20 + 8 * streams
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("petseg")]


def test_a_map_reserves_the_memory_of_its_photos(segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a few large photos that are read at once could exhaust the memory."""
    reserve, reserved = MemoryBudget.reserve, []

    def told(budget: MemoryBudget, reservation: Reservation, size: int) -> None:
        reserved.append(size)
        reserve(budget, reservation, size)

    monkeypatch.setattr(MemoryBudget, "reserve", told)
    photos, needed = [encoded(noise(0, 20 * number, 30)) for number in (1, 2, 3)], []
    for photo in photos:
        with images.open_photo(photo) as opened:
            needed.append(opened.memory)
    assert all(isinstance(result, Segmentation) for result in segmenter.map(photos))
    assert sorted(reserved) == needed
    assert needed[2] > needed[1] > needed[0] > 0


def test_an_error_of_the_engine_ends_a_map(red: Path) -> None:
    segmenter = Segmenter(red, threads=1)
    segmenter.close()
    with pytest.raises(EngineError, match="closed"):
        list(segmenter.map([half_red(8, 8)] * 50))
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith("petseg")]


# ------------------------------------------------------------------------------------------- step by step


def test_the_separate_steps_match_a_call(segmenter: Segmenter, pixels: np.ndarray) -> None:
    prepared = segmenter.prepare(pixels)
    assert (prepared.image.shape, prepared.image.dtype) == ((H, W, 3), np.uint8)
    assert (prepared.height, prepared.width, prepared.notes) == (45, 70, ())
    answer = segmenter.infer(np.stack([prepared.image] * 3))
    assert (answer.shape, answer.dtype) == ((3, H, W), np.uint8)
    result = segmenter.finish(prepared, answer[2])
    np.testing.assert_array_equal(result.probability, segmenter(pixels).probability)
    np.testing.assert_array_equal(result.pixels, pixels)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (np.zeros((H, W), np.float32), rf"^probability is float32 \[{H}, {W}\]; it must be uint8 \[{H}, {W}\]"),
        (np.zeros((H, W), np.bool_), "^probability is bool"),
        (np.zeros((1, H, W), np.uint8), rf"^probability is uint8 \[1, {H}, {W}\]"),
        (np.zeros((W, H), np.uint8), rf"^probability is uint8 \[{W}, {H}\]"),
    ],
)
def test_an_invalid_network_output_is_a_usage_error(
    segmenter: Segmenter, pixels: np.ndarray, output: np.ndarray, said: str
) -> None:
    """Most of these would otherwise be resized to a wrong mask, without an error."""
    with pytest.raises(UsageError, match=said):
        segmenter.finish(segmenter.prepare(pixels), output)


def test_an_encoded_photo_is_resized_before_conversion_to_an_array(
    segmenter: Segmenter, pixels: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copying an array of 12 megapixels back into an image takes half as long as resizing it."""
    photo, expected = encoded(pixels), segmenter.prepare(pixels)
    monkeypatch.setattr(Image, "fromarray", None)
    prepared = segmenter.prepare(photo)
    np.testing.assert_array_equal(prepared.image, expected.image)
    np.testing.assert_array_equal(prepared.pixels, pixels)


def agreement(one: np.ndarray, two: np.ndarray) -> float:
    """Intersection over union."""
    return float((one & two).sum() / (one | two).sum())


@pytest.mark.parametrize("larger", [1, 4])
def test_reading_for_the_mask_only_keeps_it_and_reduced_decoding_nearly(
    embedded: Segmenter, tmp_path: Path, larger: int
) -> None:
    shares = []
    for path in sample_photos():
        if path.name == "coffee.jpg":  # no pet: tiny differences decide its mask
            continue
        photo = tmp_path / path.name
        with Image.open(path) as image:
            image.resize((image.width * larger, image.height * larger)).save(photo, quality=90)
            size = (image.height * larger, image.width * larger)
        full = embedded(photo)
        prepared = embedded.prepare(photo, mask_only=True)
        assert (prepared.pixels, prepared.height, prepared.width) == (None, *size)
        same = embedded.finish(prepared, embedded.infer(prepared.image[None])[0])
        np.testing.assert_array_equal(same.probability, full.probability)
        with images.open_photo(photo, at_least=embedded.size) as opened:
            prepared = embedded.prepare_opened(opened)
        assert (prepared.height, prepared.width) == size
        assert (prepared.pixels is None) == (prepared.image != embedded.prepare(photo).image).any()
        quick = embedded.finish(prepared, embedded.infer(prepared.image[None])[0])
        assert quick.mask.shape == full.mask.shape == size
        shares.append(agreement(quick.mask, full.mask))
    assert min(shares) >= 0.995


# ------------------------------------------------------------------------------------------------ small regions


def spotted() -> np.ndarray:
    """A large red square, and a small one of 4 of 2048 pixels."""
    photo = np.zeros((32, 64, 3), np.uint8)
    photo[4:28, 4:36, 0] = 255
    photo[10:12, 50:52, 0] = 255
    return photo


def test_regions_below_the_minimum_area_are_removed(free: Path) -> None:
    for min_area, kept in ((0.0, True), (4 / 2048, True), (5 / 2048, False), (0.9, False)):
        with Segmenter(free, threads=1, size=(32, 64), min_area=min_area) as segmenter:
            (mapped,) = segmenter([spotted()])
            result = segmenter(spotted())
        np.testing.assert_array_equal(mapped.probability, result.probability)
        assert result.mask[10:12, 50:52].all() == kept
        assert result.mask[4:28, 4:36].all() == (min_area < 0.5)
        assert np.count_nonzero(result.mask) == 24 * 32 * (min_area < 0.5) + 4 * kept


@pytest.mark.parametrize("value", [-0.1, 1, 1.5, float("nan")])
def test_an_area_out_of_range_is_rejected(red: Path, value: float) -> None:
    with pytest.raises(UsageError, match=rf"^min_area is {value}"):
        Segmenter(red, min_area=value)


# --------------------------------------------------------------------------------------- engine and device


def test_the_requested_engine_and_device_are_used(red: Path) -> None:
    with Segmenter(red, backend="onnxruntime", device="cpu", threads=3, streams=2) as segmenter:
        info = segmenter.describe()
    assert (info.name, info.device, info.threads, info.streams) == ("onnxruntime", "cpu", 3, 2)


def test_a_missing_device_is_never_replaced_by_another(red: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petseg_runtime.host.gpus", lambda: ())
    for device in ("cuda", "cuda:1"):
        with pytest.raises(EngineError):
            Segmenter(red, device=device)
    with pytest.raises(EngineError, match="unknown device 'tpu'"):
        Segmenter(red, device="tpu")


def test_a_segmenter_closes_with_its_context(red: Path) -> None:
    with Segmenter(str(red), threads=1) as segmenter:
        assert segmenter.describe().threads == 1
    segmenter.close()
    with pytest.raises(EngineError, match="closed"):
        segmenter(half_red(8, 8))


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"nowhere\.onnx"):
        Segmenter(tmp_path / "nowhere.onnx")


def test_an_unknown_backend_is_rejected(red: Path) -> None:
    with pytest.raises(EngineError, match="abacus"):
        Segmenter(red, backend="abacus")


@pytest.mark.parametrize("name", CONFIDENT)
def test_the_bundled_model_finds_a_pet_but_not_the_whole_photo(embedded: Segmenter, name: str) -> None:
    (photo,) = (path for path in sample_photos() if path.name == name)
    result = embedded(photo)
    with Image.open(photo) as image:
        assert result.mask.shape == (image.height, image.width)
    assert 0.05 < result.coverage < 0.95
    assert result.threshold == embedded.artifact.spec.threshold


# ------------------------------------------------------------------------------------------------ another input size


@pytest.fixture(scope="module")
def free(toy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The red model for any input size, with a parity record at 16 x 32."""
    path: Path = toy(tmp_path_factory.mktemp("free") / "free.onnx", dynamic_size=True).path
    return path


@pytest.mark.parametrize("size", [(48, 80), (16, 16), (160, 16)])
def test_a_dynamic_size_model_gets_photos_at_the_requested_size(
    free: Path, pixels: np.ndarray, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def load(*args: Any, **options: Any) -> Any:
        sizes.append(options["size"])
        return registry.load_engine(*args, **options)

    monkeypatch.setattr("petseg_runtime.segmenter.load_engine", load)
    with Segmenter(free, threads=1, size=size, keep_doubtful=True) as segmenter:
        result = segmenter(pixels)
        exact = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
        np.testing.assert_array_equal(segmenter(exact).probability, exact[..., 0])  # not resampled
    assert sizes == [size], "at which an engine compiles, or runs once, while it is loaded"
    expected = images.from_model(images.to_model(pixels, *size)[..., 0], *pixels.shape[:2])
    np.testing.assert_array_equal(result.probability, expected)


def test_a_dynamic_size_model_defaults_to_its_specs_size(free: Path, pixels: np.ndarray) -> None:
    with Segmenter(free, threads=1) as own, Segmenter(free, threads=1, size=(H, W)) as same:
        np.testing.assert_array_equal(own(pixels).probability, same(pixels).probability)
        assert own.artifact.spec == same.artifact.spec


@pytest.mark.parametrize("size", [(0, 0), (17, 32), (16, -32), (24, 32)])
def test_a_size_the_network_does_not_accept_is_rejected(free: Path, size: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="multiple of 16"):
        Segmenter(free, size=size)


def test_a_fixed_size_model_rejects_other_sizes(red: Path) -> None:
    with Segmenter(red, threads=1, size=(H, W)) as segmenter:
        assert segmenter(half_red(20, 20)).mask.shape == (20, 20)
    for size in ((W, H), (0, 0), (32, 32)):
        with pytest.raises(UsageError, match=f"{H} x {W} only, not {size[0]} x {size[1]}"):
            Segmenter(red, size=size)


def test_the_size_is_checked_before_the_engine(red: Path) -> None:
    with pytest.raises(UsageError, match="only"):
        Segmenter(red, size=(64, 64), backend="abacus")


def test_a_fixed_batch_model_accepts_single_photos(toy: Callable[..., Any], tmp_path: Path) -> None:
    with Segmenter(toy(tmp_path / "three.onnx", batch=3).path, threads=1) as segmenter:
        assert (segmenter(np.full((20, 30, 3), 77, np.uint8)).probability == 77).all()


def test_a_compiled_model_can_be_loaded(
    toy: Callable[..., Any], ir: Callable[..., Any], tmp_path: Path, pixels: np.ndarray
) -> None:
    onnx_file = toy(tmp_path / "toy.onnx")
    with (
        Segmenter(onnx_file.path, backend="onnxruntime", threads=1) as one,
        Segmenter(ir(onnx_file).path, threads=1) as two,
    ):
        assert two.describe().name == "openvino"
        np.testing.assert_array_equal(one(pixels).probability, two(pixels).probability)


# ------------------------------------------------------------------------------------------------------ verify


def test_a_loaded_model_can_be_verified(proven: Artifact, prove: Callable[..., Proof], tmp_path: Path) -> None:
    with Segmenter(proven.path, backend="onnxruntime", threads=1) as segmenter:
        done = segmenter.verify()
        assert done.passed
        (row,) = done.network.rows
        assert row.engine.startswith("onnxruntime ")
        assert (done.network.photos, done.network.identity) == (4, proven.identity)
        assert done.summary.endswith(done.road.summary)
        other = dataclasses.replace(prove(proven.spec), expected=np.zeros((4, H, W), np.uint8))
        (tmp_path / "other.npz").write_bytes(other.to_bytes())
        done = segmenter.verify(tmp_path / "other.npz")
        assert not done.passed
        assert done.road.passed
        assert all(failure.startswith("f32 in onnxruntime ") for failure in done.failures)


def test_a_broken_road_is_found_by_a_segmenters_verify(proven: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_transposition", lambda image: None)
    with Segmenter(proven.path, backend="onnxruntime", threads=1) as segmenter:
        done = segmenter.verify()
    assert done.network.passed
    assert not done.passed
    assert "chelsea.jpg on its side by EXIF: is 300 x 451 here, 451 x 300 in the record" in "\n".join(done.failures)


def test_a_model_cannot_be_verified_at_another_size(free: Path) -> None:
    with Segmenter(free, threads=1, size=(32, 48)) as segmenter, pytest.raises(UsageError, match="without a size"):
        segmenter.verify()


def test_a_size_may_be_any_sequence(proven: Artifact) -> None:
    with Segmenter(proven.path, backend="onnxruntime", threads=1, size=[H, W]) as segmenter:  # type: ignore[arg-type]
        assert segmenter.size == (H, W)
        assert segmenter.verify().passed


def test_a_model_without_parity_record_cannot_be_verified(red: Path) -> None:
    with Segmenter(red, threads=1) as segmenter, pytest.raises(ModelError, match=r"parity\.npz: no such file"):
        segmenter.verify()


@pytest.mark.parametrize(("share", "pet"), [(None, True), (0.5, True), (0.6, False)])
def test_found_uses_the_models_rule(
    toy: Callable[..., Artifact], tmp_path: Path, share: float | None, pet: bool
) -> None:
    photo = np.zeros((16, 32, 3), np.uint8)
    photo[:, :16, 0] = 160  # likely
    photo[:, :8, 0] = 255  # and half of it certain
    with Segmenter(toy(tmp_path / "toy.onnx", certain_share=share).path, threads=1) as segmenter:
        result = segmenter(photo)
        assert result.coverage == 0.5
        assert result.found is pet
        assert [one.found for one in segmenter([photo, 0 * photo])] == [pet, False]
