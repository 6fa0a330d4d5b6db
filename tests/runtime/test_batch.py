"""Batches of photos: each accounted for, and a run that is interrupted and resumed gives the same results."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from petseg_runtime import Segmenter, batch, images, sinks
from petseg_runtime.batch import Done, Report, segment_photos
from petseg_runtime.engines.base import Engine, EngineInfo
from petseg_runtime.errors import EngineError, InputError, OutputError
from petseg_runtime.images import to_model
from petseg_runtime.journal import JOURNAL, Journal, OwnFiles
from petseg_runtime.pipeline import Outcome
from petseg_runtime.result import Segmentation
from petseg_runtime.segmenter import MAX_WORKERS, Prepared
from petseg_runtime.sinks import CocoSink, ImageSink, Sink, StreamSink, Written, picture
from petseg_runtime.sources import STDIN, Item, find_photos
from petseg_runtime.spec import ModelSpec

COUNT = 30


def draw_pet(index: int) -> np.ndarray:
    """uint8 [48, 64, 3]: a warm ellipse on a cool, noisy background."""
    rng = np.random.default_rng(index)
    (cy, cx), (ry, rx) = rng.uniform(0.4, 0.6, 2) * (48, 64), rng.uniform(0.18, 0.32, 2) * (48, 64)
    y, x = np.mgrid[:48, :64]
    inside = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 < 1
    colour = np.where(inside[..., None], (280, 140, 70), (50, 90, 130))
    return np.clip(colour + rng.normal(0, 12, (48, 64, 3)), 0, 255).astype(np.uint8)


def write_photos(folder: Path, count: int) -> Path:
    for index in range(count):
        path = folder / f"{'ab'[index % 2]}" / f"{index:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_pet(index)).save(path, quality=90)
    return folder


@pytest.fixture(scope="module")
def model(toy: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose probability is the red channel; small, because the network is not tested here."""
    path: Path = toy(tmp_path_factory.mktemp("model") / "toy.onnx", height=64, width=64).path
    return path


@pytest.fixture(scope="module")
def segmenter(model: Path) -> Iterator[Segmenter]:
    with Segmenter(model, backend="onnxruntime", threads=2, streams=2) as segmenter:
        yield segmenter


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Thirty photos in two folders; tests must not modify them."""
    return write_photos(tmp_path_factory.mktemp("batch") / "photos", COUNT)


@pytest.fixture
def photo_copies(tmp_path: Path) -> Path:
    """Eight photos that a test may modify."""
    return write_photos(tmp_path / "photos", 8)


class Counted(Segmenter):
    """Records the engine's inputs, and fails on purpose after a number of photos."""

    def __init__(self, model: Path, fails_after: int | None = None) -> None:
        super().__init__(model, backend="onnxruntime", threads=2, streams=2)
        self.seen: list[bytes] = []
        self._left = fails_after
        self._counting = threading.Lock()

    def infer(self, batch: np.ndarray) -> np.ndarray:
        with self._counting:
            for image in batch:
                if self._left is not None and len(self.seen) >= self._left:
                    raise EngineError("the engine broke")
                self.seen.append(image.tobytes())
        return super().infer(batch)


def ignore(outcome: Outcome[Item, Done]) -> None:
    """Ignores the outcome."""


def make_sink(kind: str, out: Path, items: list[Item], resume: bool) -> Sink:
    own = OwnFiles(out) if resume else ()
    if kind.startswith("coco"):
        return CocoSink(out, kind, items, own=own)
    return ImageSink(out, picture(kind), items, own=own)


def segment_folder(
    segmenter: Segmenter,
    folder: Path,
    out: Path,
    kind: str = "mask",
    *,
    resume: bool = False,
    watch: Callable[[Outcome[Item, Done]], None] = ignore,
    begun: Callable[[int], None] = lambda left: None,
    sink: Callable[[Sink], Sink] = lambda sink: sink,
) -> Report:
    """Does what `petseg infer FOLDER --as KIND` does."""
    items = find_photos([folder], out)
    to = sink(make_sink(kind, out, items, resume))
    with Journal(out, {"as": kind}, resume=resume) as journal:
        return segment_photos(items, segmenter, to, watch, begun=begun, journal=journal, mask_only=kind == "mask")


def tree(folder: Path) -> dict[str, str]:
    """The contents of every file below, hidden ones included, except the journal."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != JOURNAL)
    return {str(path.relative_to(folder)): hashlib.md5(path.read_bytes()).hexdigest() for path in files}


# ----------------------------------------------------------------------------------------- one complete run


def test_each_photo_is_reported_once_and_in_order(segmenter: Segmenter, photos: Path, tmp_path: Path) -> None:
    told: list[Outcome[Item, Done]] = []
    report = segment_folder(segmenter, photos, tmp_path / "out", watch=told.append)
    items = find_photos([photos])
    assert [outcome.source for outcome in told] == items
    assert (report.done, report.failed, report.skipped, report.path) == (COUNT, [], 0, None)
    assert set(tree(tmp_path / "out")) == {f"{item.name}.png" for item in items}


def test_results_match_those_of_a_direct_call(segmenter: Segmenter, photos: Path, tmp_path: Path) -> None:
    told: list[Outcome[Item, Done]] = []
    segment_folder(segmenter, photos, tmp_path / "out", "probability", watch=told.append)
    for outcome in told:
        expected = segmenter(outcome.source.source)
        done = outcome.value
        assert done is not None
        assert done.path is not None
        with Image.open(done.path) as saved:
            np.testing.assert_array_equal(np.array(saved), expected.probability)
        assert (done.height, done.width) == (48, 64)
        assert (done.coverage, done.found, done.box) == (expected.coverage, True, expected.box)
        assert (done.notes, done.value) == ((), None)


def test_a_bad_photo_is_named_and_the_others_continue(segmenter: Segmenter, photo_copies: Path, tmp_path: Path) -> None:
    (photo_copies / "a" / "002.jpg").write_bytes(b"no photo")
    (photo_copies / "empty.jpg").touch()
    report = segment_folder(segmenter, photo_copies, tmp_path / "out")
    assert (report.done, len(report.failed), report.skipped) == (7, 2, 0)
    assert sorted(line.partition(":")[0] for line in report.failed) == [
        str(photo_copies / "a/002.jpg"),
        str(photo_copies / "empty.jpg"),
    ]
    assert len(tree(tmp_path / "out")) == 7


def test_a_problem_found_by_the_search_is_reported_unchanged(
    segmenter: Segmenter, photo_copies: Path, tmp_path: Path
) -> None:
    items = [Item(photo_copies / "a" / "000.jpg", PurePath("0"), problem="photos/*.png: no file fits this pattern")]
    report = segment_photos(items, segmenter, ImageSink(tmp_path / "out", picture("mask"), items), ignore)
    assert report.failed == ["photos/*.png: no file fits this pattern"]
    assert tree(tmp_path / "out") == {}


def test_an_unwritable_result_does_not_stop_the_others(
    segmenter: Segmenter, photo_copies: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / "a" / "002.png").mkdir(parents=True)
    report = segment_folder(segmenter, photo_copies, tmp_path / "out")
    assert report.done == 7
    (line,) = report.failed
    assert line.startswith(f"{photo_copies / 'a/002.jpg'}: its result {tmp_path / 'out/a/002.png'} cannot be written")
    assert len(tree(tmp_path / "out")) == 7


def test_an_image_given_as_bytes_is_segmented(segmenter: Segmenter, photo_copies: Path, tmp_path: Path) -> None:
    data = (photo_copies / "a" / "000.jpg").read_bytes()
    item = Item(STDIN, PurePath("stdin"), data=data)
    report = segment_photos([item], segmenter, ImageSink(tmp_path / "out", picture("mask"), [item]), ignore)
    assert report.done == 1
    with Image.open(tmp_path / "out" / "stdin.png") as saved:
        np.testing.assert_array_equal(np.array(saved) == 255, segmenter(data).mask)


def test_photos_without_a_pet_are_not_counted_as_found(segmenter: Segmenter, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    Image.new("RGB", (20, 10), "blue").save(tmp_path / "in" / "sky.png")
    told: list[Outcome[Item, Done]] = []
    segment_folder(segmenter, tmp_path / "in", tmp_path / "out", watch=told.append)
    done = told[0].value
    assert done is not None
    assert (done.coverage, done.found, done.box) == (0.0, False, None)


def test_an_empty_list_of_photos_is_not_an_error(segmenter: Segmenter, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    report = segment_folder(segmenter, tmp_path / "in", tmp_path / "out")
    assert (report.done, report.failed, report.skipped, report.steps) == (0, [], 0, {})


def test_the_report_has_the_time_of_each_step(segmenter: Segmenter, photo_copies: Path, tmp_path: Path) -> None:
    (photo_copies / "a" / "002.jpg").write_bytes(b"no photo")
    report = segment_folder(segmenter, photo_copies, tmp_path / "out")
    assert list(report.steps) == ["read", "infer", "write"]
    for seconds in report.steps.values():
        assert 0 < seconds["p50"] <= seconds["p95"] <= seconds["p99"] <= 1.02 * seconds["sum"]
    assert report.seconds > 0


def test_step_times_cover_the_photos_that_reached_a_step_and_are_not_kept(
    segmenter: Segmenter, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = [{"read": 1.0, "infer": 10.0}, {"read": 3.0}, {"read": 2.0, "infer": 30.0}]
    outcomes = [Outcome(Item(Path("x.jpg"), PurePath("x")), error=InputError("no"), seconds=step) for step in taken]
    kept = [weakref.ref(outcome) for outcome in outcomes]

    def run(pipeline: Any, items: Any) -> Iterator[Any]:
        while outcomes:
            yield outcomes.pop(0)
            assert not any(ref() for ref in kept[: -len(outcomes) - 1]), (
                "the times of a million photos would fill the memory"
            )

    monkeypatch.setattr(batch.Pipeline, "run", run)
    sink = StreamSink(io.BytesIO(), picture("mask"))
    report = segment_photos([], segmenter, sink, lambda outcome: None)
    assert {step: seconds["sum"] for step, seconds in report.steps.items()} == {"read": 6.0, "infer": 40.0}
    assert report.steps["read"]["p50"] == pytest.approx(2.0, rel=0.02)


def test_for_masks_alone_photos_are_not_kept_or_converted_to_arrays(
    segmenter: Segmenter, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Making such an array of a large photo takes as long as its mask."""
    kept, whole = [], []
    photo = images.Photo

    def noted(pixels: np.ndarray, *args: Any) -> images.Photo:
        whole.append(pixels.shape[:2] != segmenter.size)
        return photo(pixels, *args)

    monkeypatch.setattr(images, "Photo", noted)

    class Spy(ImageSink):
        def write(self, item: Item, result: Segmentation) -> Written:
            kept.append(result.pixels is not None)
            return super().write(item, result)

    items = find_photos([photos])
    for mask_only in (True, False):
        out = tmp_path / str(mask_only)
        segment_photos(items, segmenter, Spy(out, picture("mask"), items), ignore, mask_only=mask_only)
    assert kept == whole == [False] * COUNT + [True] * COUNT


# -------------------------------------------------------------------------------------------------- with a GPU


class Gpu(Engine):
    """Stands for an engine on a GPU: one run at a time, of up to eight photos; red is pet."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.sizes: list[int] = []
        self.before = lambda: None

    def run(self, images: np.ndarray) -> np.ndarray:
        if not self.sizes:
            self.before()
        self.sizes.append(len(images))
        return np.ascontiguousarray(images[..., 0])

    def describe(self) -> EngineInfo:
        return EngineInfo(
            name="tensorrt", version="1", device="cuda:0", provider="", precision="f32", threads=0, batch=8
        )

    def close(self) -> None:
        """Does nothing."""


class Watched(Segmenter):
    """Has an engine on a GPU; calls a hook when each photo has been read, and before it is written."""

    def __init__(self, model: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None) -> None:
        monkeypatch.setattr("petseg_runtime.segmenter.load_engine", lambda artifact, *_, **__: Gpu(artifact.spec))
        super().__init__(model, threads=threads)
        self.reading = self.writing = lambda: None

    @property
    def gpu(self) -> Gpu:
        assert isinstance(self._engine, Gpu)
        return self._engine

    def prepare_opened(self, photo: images.OpenPhoto, *, mask_only: bool = False) -> Prepared:
        prepared = super().prepare_opened(photo, mask_only=mask_only)
        self.reading()
        return prepared

    def finish(self, prepared: Prepared, probability: np.ndarray) -> Segmentation:
        self.writing()
        return super().finish(prepared, probability)


def test_with_a_gpu_several_photos_are_read_and_written_concurrently(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    items = find_photos([photos])[:8]
    readers, writers = threading.Barrier(4), threading.Barrier(4)
    with Watched(model, monkeypatch, threads=4) as segmenter:
        # No thread passes before four are here.
        segmenter.reading, segmenter.writing = lambda: readers.wait(20), lambda: writers.wait(20)
        report = segment_photos(items, segmenter, ImageSink(tmp_path, picture("mask"), items), ignore)
        assert report.done == 8
        assert all(isinstance(result, Segmentation) for result in segmenter.map(item.source for item in items))


def test_with_a_gpu_batches_fill_up(model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items, ahead = find_photos([photos]), threading.Semaphore(0)

    def all_ahead() -> None:
        for _ in range(20):  # the first run may have eight of them, and four readers one each
            assert ahead.acquire(timeout=20)

    with Watched(model, monkeypatch, threads=4) as segmenter:
        segmenter.reading, segmenter.gpu.before = ahead.release, all_ahead
        segment_photos(items, segmenter, ImageSink(tmp_path, picture("mask"), items), ignore)
        assert segmenter.gpu.sizes[1] == 8
        assert sum(segmenter.gpu.sizes) == COUNT


@pytest.mark.parametrize(("threads", "cpus", "workers"), [(None, 6, 6), (3, 6, 3), (None, 64, MAX_WORKERS)])
def test_with_a_gpu_the_cpus_read_and_write(
    model: Path, monkeypatch: pytest.MonkeyPatch, threads: int | None, cpus: int, workers: int
) -> None:
    monkeypatch.setattr("petseg_runtime.host.usable_cpus", lambda: cpus)
    with Watched(model, monkeypatch, threads) as segmenter:
        assert segmenter.workers == workers


def test_on_the_cpu_as_many_photos_are_read_as_inferred_concurrently(model: Path) -> None:
    for streams in (1, 2):
        with Segmenter(model, backend="onnxruntime", threads=3, streams=streams) as segmenter:
            assert segmenter.workers == streams


# ------------------------------------------------------------------------------------------------ resuming


KINDS = ["mask", "overlay", "coco-polygons", "coco-rle"]


@pytest.fixture(scope="module")
def undisturbed(segmenter: Segmenter, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The results of a run that is not interrupted, of each kind."""
    root = tmp_path_factory.mktemp("undisturbed")
    for kind in KINDS:
        segment_folder(segmenter, photos, root / kind, kind)
    return {kind: tree(root / kind) for kind in KINDS}


class Stop(BaseException):
    """Stands for Ctrl-C in a test."""


def stopping(after: int) -> Callable[[Outcome[Item, Done]], None]:
    """A callback that stops the run after a number of photos."""
    left = [after]

    def watch(outcome: Outcome[Item, Done]) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise Stop

    return watch


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_resumes_with_identical_results(
    model: Path, photos: Path, tmp_path: Path, undisturbed: dict[str, Any], kind: str
) -> None:
    out = tmp_path / "out"
    with Counted(model) as first, pytest.raises(Stop):
        segment_folder(first, photos, out, kind, watch=stopping(after=9))
    with Counted(model) as second:
        report = segment_folder(second, photos, out, kind, resume=True)
    assert (report.done, report.failed, report.skipped) == (COUNT - 10, [], 10)
    assert len(second.seen) == COUNT - 10, "no photo that was reported is done twice"
    assert {*first.seen, *second.seen} == {image_of(path) for path in photos.rglob("*.jpg")}
    assert tree(out) == undisturbed[kind]


def image_of(path: Path) -> bytes:
    """The engine's input for a photo."""
    with Image.open(path) as photo:
        return to_model(np.array(photo), 64, 64).tobytes()


@given(stops=st.lists(st.integers(0, 12), min_size=1, max_size=4), kind=st.sampled_from(["mask", "coco-rle"]))
@settings(max_examples=12)
def test_a_run_can_be_stopped_anywhere_any_number_of_times(
    tmp_path_factory: pytest.TempPathFactory,
    segmenter: Segmenter,
    photos: Path,
    undisturbed: dict[str, Any],
    stops: list[int],
    kind: str,
) -> None:
    out = tmp_path_factory.mktemp("stops") / "out"
    behind = 0
    for after in stops:
        try:
            segment_folder(segmenter, photos, out, kind, resume=True, watch=stopping(after))
            behind = COUNT
        except Stop:
            behind += after + 1
    report = segment_folder(segmenter, photos, out, kind, resume=True)
    assert (report.done, report.failed, report.skipped) == (COUNT - behind, [], behind)
    assert tree(out) == undisturbed[kind]


def test_a_failing_engine_ends_the_run_and_the_next_resumes(
    model: Path, segmenter: Segmenter, photos: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    with Counted(model, fails_after=15) as broken, pytest.raises(EngineError, match="the engine broke"):
        segment_folder(broken, photos, tmp_path / "out")
    report = segment_folder(segmenter, photos, tmp_path / "out", resume=True)
    assert report.done + report.skipped == COUNT
    assert 0 < report.skipped <= 15
    assert tree(tmp_path / "out") == undisturbed["mask"]


def test_a_full_disk_ends_the_run_and_the_next_resumes(
    segmenter: Segmenter, photos: Path, tmp_path: Path, undisturbed: dict[str, Any]
) -> None:
    class Full:
        """Stands for a disk with room for eleven results."""

        def __init__(self, sink: Sink) -> None:
            self._sink, self._room = sink, [None] * 11
            self.path_of, self.beside_sources, self.finish = sink.path_of, sink.beside_sources, sink.finish

        def write(self, item: Item, result: Segmentation) -> Written:
            try:
                self._room.pop()
            except IndexError:
                raise OutputError("no space left on device") from None
            return self._sink.write(item, result)

    with pytest.raises(OutputError, match="no space left"):
        segment_folder(segmenter, photos, tmp_path / "out", sink=Full)
    assert len(tree(tmp_path / "out")) == 11
    report = segment_folder(segmenter, photos, tmp_path / "out", resume=True)
    assert report.done + report.skipped == COUNT
    assert tree(tmp_path / "out") == undisturbed["mask"]


def test_finished_results_are_not_touched_again(model: Path, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Counted(model) as segmenter:
        segment_folder(segmenter, photos, out)
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
        segmenter.seen.clear()
        report = segment_folder(segmenter, photos, out, resume=True)
        assert (report.done, report.skipped, segmenter.seen) == (0, COUNT, [])
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == before


def test_only_changed_photos_are_redone(model: Path, photo_copies: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Counted(model) as segmenter:
        segment_folder(segmenter, photo_copies, out)
        whole = tree(out)
        Image.fromarray(draw_pet(99)).save(photo_copies / "a" / "000.jpg")  # changed
        (out / "a" / "002.png").unlink()  # gone
        cut = out / "b" / "003.png"
        cut.write_bytes(cut.read_bytes()[:40])  # truncated
        Image.fromarray(draw_pet(98)).save(photo_copies / "new.jpg")  # new
        segmenter.seen.clear()
        report = segment_folder(segmenter, photo_copies, out, resume=True)
        assert (report.done, report.skipped) == (4, 5)
        assert sorted(segmenter.seen) == sorted(
            image_of(photo_copies / name) for name in ("a/000.jpg", "a/002.jpg", "b/003.jpg", "new.jpg")
        )
        after = tree(out)
        assert {name for name in after if after[name] != whole.get(name)} == {"a/000.png", "new.png"}
        with Image.open(out / "a" / "000.png") as saved:
            np.testing.assert_array_equal(np.array(saved) == 255, segmenter(photo_copies / "a" / "000.jpg").mask)


def test_the_progress_callback_gets_the_number_remaining(
    segmenter: Segmenter, photo_copies: Path, tmp_path: Path
) -> None:
    told: list[Any] = []
    for resume in (False, True, True):
        watched = len(told)
        segment_folder(segmenter, photo_copies, tmp_path / "out", resume=resume, begun=told.append, watch=told.append)
        left, *outcomes = told[watched:]
        assert left == len(outcomes)
        (tmp_path / "out" / "a" / "002.png").unlink()
        (tmp_path / "out" / "b" / "003.png").unlink()
    assert [left for left in told if isinstance(left, int)] == [8, 2, 2]


def test_failed_photos_are_retried(segmenter: Segmenter, photo_copies: Path, tmp_path: Path) -> None:
    good = (photo_copies / "a" / "002.jpg").read_bytes()
    (photo_copies / "a" / "002.jpg").write_bytes(b"no photo")
    for resume in (False, True):
        report = segment_folder(segmenter, photo_copies, tmp_path / "out", resume=resume)
        assert len(report.failed) == 1
    assert (report.done, report.skipped) == (0, 7)
    (photo_copies / "a" / "002.jpg").write_bytes(good)
    report = segment_folder(segmenter, photo_copies, tmp_path / "out", resume=True)
    assert (report.done, report.failed, report.skipped) == (1, [], 7)


def annotated(out: Path) -> dict[str, Any]:
    """The annotations of a COCO file by photo."""
    file = json.loads((out / "annotations.json").read_text(encoding="utf-8"))
    names = {image["id"]: Path(image["file_name"]).name for image in file["images"]}
    return {names[annotation["image_id"]]: annotation["area"] for annotation in file["annotations"]}


def test_a_coco_file_has_only_current_photos(segmenter: Segmenter, photo_copies: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = segment_folder(segmenter, photo_copies, out, "coco-rle")
    assert report.path == out / "annotations.json"
    first = annotated(out)
    assert set(first) == {f"{index:03d}.jpg" for index in range(8)}
    (photo_copies / "a" / "000.jpg").write_bytes(b"no photo any more")
    (photo_copies / "a" / "002.jpg").unlink()
    Image.fromarray(draw_pet(99)).save(photo_copies / "a" / "004.jpg")
    report = segment_folder(segmenter, photo_copies, out, "coco-rle", resume=True)
    assert (report.done, len(report.failed), report.skipped) == (1, 1, 5)
    second = annotated(out)
    assert set(second) == set(first) - {"000.jpg", "002.jpg"}
    assert {name for name in second if second[name] != first[name]} == {"004.jpg"}


# ------------------------------------------------------------------------------- real processes, and kill -9

PHOTOS = 300


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hundred small photos."""
    return write_photos(tmp_path_factory.mktemp("many") / "photos", PHOTOS)


def command(model: Path, folder: Path, out: Path) -> list[str]:
    # If a shell runs this test in the background, its children ignore Ctrl-C.
    program = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import petseg.cli as c; c.main()"
    )
    options = ["--as", "mask", "--resume", "--json", "--backend", "onnxruntime", "--model", str(model)]
    options += ["--threads", "2"]  # with many cores it would finish before it is stopped
    return [sys.executable, "-c", program, "infer", str(folder), "--output", str(out), *options]


def results(out: Path) -> int:
    """The number of results in their place."""
    return sum(
        name.name.endswith(".png") and not name.name.startswith(".")
        for part in ("a", "b")
        if (out / part).is_dir()
        for name in os.scandir(out / part)
    )


def stop_at(count: int, with_signal: int, call: list[str], out: Path) -> subprocess.CompletedProcess[str]:
    """Starts a run, and stops it once it has written a number of results."""
    with subprocess.Popen(call, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        # Its output is drained, or it would block.
        printed: list[tuple[str, str]] = []
        listener = threading.Thread(target=lambda: printed.append(process.communicate()))
        listener.start()
        while results(out) < count and process.poll() is None:
            time.sleep(0.002)
        process.send_signal(with_signal)
        listener.join(100)
        process.wait(100)
    return subprocess.CompletedProcess(call, process.returncode, *printed[0])


def noted(out: Path) -> dict[Path, int]:
    """The results that the journal has noted, and when they were written."""
    lines = (out / JOURNAL).read_text(encoding="utf-8").splitlines()
    found = {}
    for text in lines:
        try:
            line = json.loads(text)
        except ValueError:  # cut
            continue
        if "name" in line:
            path = out / f"{line['name']}.png"
            found[path] = path.stat().st_mtime_ns
    return found


def test_a_signal_leaves_complete_results_and_journal(model: Path, many_photos: Path, tmp_path: Path) -> None:
    """Ctrl-C and a closed terminal are tested in `cli/test_infer_pipes.py`."""
    done = stop_at(30, signal.SIGTERM, command(model, many_photos, tmp_path / "out"), tmp_path / "out")
    assert (done.returncode, done.stderr.strip()) == (143, "petseg: terminated")
    assert json.loads(done.stdout.splitlines()[-1])["event"] == "result"
    there = {path for path in (tmp_path / "out").rglob("*") if path.is_file() and path.name != JOURNAL}
    assert all(path.suffix == ".png" and not path.name.startswith(".") for path in there), "nothing is half-written"
    lines = (tmp_path / "out" / JOURNAL).read_text(encoding="utf-8").splitlines()
    assert all(json.loads(line) for line in lines)
    assert noted(tmp_path / "out").keys() <= there
    assert 20 < len(there) < PHOTOS


def test_a_repeatedly_killed_run_gives_identical_results(
    segmenter: Segmenter, model: Path, many_photos: Path, tmp_path: Path
) -> None:
    """kill -9 twice, and Ctrl-C once."""
    out, whole = tmp_path / "out", tmp_path / "whole"
    call = command(model, many_photos, out)
    codes = []
    before: dict[Path, int] = {}
    for round_, with_signal in enumerate((signal.SIGKILL, signal.SIGINT, signal.SIGKILL)):
        done = stop_at(60 + 60 * round_, with_signal, call, out)
        assert "Traceback" not in done.stderr
        codes.append(done.returncode)
        for path in out.rglob("*.png"):
            if not path.name.startswith("."):
                with Image.open(path) as mask:
                    mask.load()
        now = noted(out)
        assert now.items() >= before.items(), "noted results are not written again"
        assert len(before) < len(now) < PHOTOS
        before = now
        photos = [path.relative_to(many_photos) for path in sorted(many_photos.rglob("*.*"))]
        left = next(photo for photo in photos if (out / photo).with_suffix(".png") not in now)
        # A kill rarely falls between write and rename.
        (out / left.with_name(f".{left.stem}.0123abcd.part.png")).write_bytes(b"half")
    assert codes == [-9, 130, -9]
    last = subprocess.run(call, capture_output=True, text=True, timeout=100)
    assert (last.returncode, last.stderr) == (0, "")
    summary = json.loads(last.stdout.splitlines()[-1])
    assert (summary["photos"], summary["failed"], summary["skipped"]) == (PHOTOS, 0, len(before))
    assert summary["done"] == PHOTOS - len(before)
    assert noted(out).items() >= before.items()
    assert segment_folder(segmenter, many_photos, whole).done == PHOTOS
    assert tree(out) == tree(whole)


@pytest.mark.parametrize("step", ["prepare_opened", "finish"])
def test_a_photo_too_large_for_memory_fails_alone(model: Path, photo_copies: Path, tmp_path: Path, step: str) -> None:
    class Small(Segmenter):
        """Runs out of memory at the third photo."""

        calls = 0

        def __getattribute__(self, name: str) -> Any:
            if name == step:
                Small.calls += 1
                if Small.calls == 3:
                    raise MemoryError
            return super().__getattribute__(name)

    with Small(model, backend="onnxruntime", threads=1) as segmenter:
        report = segment_folder(segmenter, photo_copies, tmp_path / "out", "mask")
    assert report.done == 7
    assert len(report.failed) == 1
    assert "not enough memory for it; make it smaller first" in report.failed[0]


@pytest.mark.parametrize("kind", sorted(sinks.KINDS))
def test_the_memory_of_results_is_counted(photo_copies: Path, segmenter: Segmenter, tmp_path: Path, kind: str) -> None:
    asked: list[int] = []
    items = [Item(next(photo_copies.rglob("*.jpg")), PurePath("one"))]
    for spare in (0, sinks.KINDS[kind].spare):
        sink = ImageSink(tmp_path / str(spare), picture("mask"), items)
        read = batch._steps(segmenter, sink, None, True, False, False, spare).read
        read(items[0], asked.append)
    with Image.open(items[0].source) as image:
        assert asked[1] - asked[0] == sinks.KINDS[kind].spare * image.width * image.height
    assert (sinks.KINDS[kind].spare > 0) == (kind in ("coco-polygons", "background"))
