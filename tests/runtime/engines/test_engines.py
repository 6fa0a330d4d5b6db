"""Tests of the engines: uint8 images in, uint8 probabilities out, and petseg's errors for everything else."""

from __future__ import annotations

import dataclasses
import functools
import gc
import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import json
import os
import platform
import re
import sys
import threading
import traceback
import types
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from command_line import uninstall
from petseg_runtime import host, images
from petseg_runtime.artifact import Artifact, default_model, open_artifact, sample_photos, sidecar_of
from petseg_runtime.engines import registry
from petseg_runtime.engines.base import (
    DEVICES,
    Device,
    Engine,
    EngineInfo,
    EngineOptions,
    check_batch,
    in_batches,
)
from petseg_runtime.engines.registry import ENGINES, MAX_THREADS, RULE, load_engine
from petseg_runtime.errors import EngineError, EngineMissing, ModelError, UsageError
from petseg_runtime.extras import install
from petseg_runtime.host import Gpu
from petseg_runtime.spec import ModelSpec

Toy: TypeAlias = Callable[..., Any]

#: The engines that run ONNX files on a CPU; those that are not installed are skipped, with the reason.
ON_CPU = {line.engine for line in RULE if line.kind == "cpu"}
BACKENDS = [name for name, entry in ENGINES.items() if "onnx" in entry.formats and name in ON_CPU]


def module_of(backend: str) -> str:
    return ENGINES[backend].loader.partition(":")[0]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Each engine that runs ONNX files on a CPU and is installed."""
    name = str(request.param)
    if importlib.util.find_spec(ENGINES[name].module) is None:
        pytest.skip(f"{name} is not installed: {install(ENGINES[name].extra)}")
    return name


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return open_artifact(default_model())


@pytest.fixture(scope="module")
def engine(artifact: Artifact, backend: str) -> Iterator[Engine]:
    with load_engine(artifact, backend, threads=1, exact=True) as engine:
        yield engine


@pytest.fixture(scope="module")
def batch(artifact: Artifact) -> np.ndarray:
    """Three different photos, preprocessed."""
    spec = artifact.spec
    photos = [images.read(path).pixels for path in sample_photos()[:3]]
    return np.stack([images.to_model(photo, spec.height, spec.width) for photo in photos])


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.parametrize("count", [1, 3])
def test_a_uint8_batch_gives_as_many_uint8_maps(engine: Engine, batch: np.ndarray, count: int) -> None:
    result = engine.run(batch[:count])
    assert result.shape == (count, engine.spec.height, engine.spec.width)
    assert result.dtype == np.uint8


def test_a_batch_matches_its_photos_run_one_by_one(engine: Engine, batch: np.ndarray) -> None:
    together = engine.run(batch)
    for photo, result in zip(batch, together, strict=True):
        # Kernels may tile a batch differently, so a byte may be rounded differently, by one.
        assert difference(engine.run(photo[None])[0], result) <= 1
    assert difference(together[0], together[1]) > 50  # otherwise the comparison above would be meaningless


def test_the_graph_receives_rgb_order(backend: str, toy: Toy, tmp_path: Path) -> None:
    pixels = noise(2, 16, 32)
    for channel in range(3):
        with load_engine(toy(tmp_path / "toy.onnx", channel), backend, threads=1) as engine:
            np.testing.assert_array_equal(engine.run(pixels), pixels[..., channel])


@pytest.mark.skipif(sys.platform != "linux", reason="file names are Unicode on this system")
def test_a_model_with_a_non_utf8_path_is_loaded(backend: str, toy: Toy, tmp_path: Path) -> None:
    pixels = noise(2, 16, 32)
    with load_engine(toy(tmp_path / os.fsdecode(b"t\xff.onnx"), 0), backend, threads=1) as engine:
        np.testing.assert_array_equal(engine.run(pixels), pixels[..., 0])


def test_memory_layout_does_not_matter(engine: Engine, batch: np.ndarray) -> None:
    strided = np.asfortranarray(batch)
    assert not strided.flags.c_contiguous
    np.testing.assert_array_equal(engine.run(strided), engine.run(batch))


def test_the_input_is_not_modified(engine: Engine, batch: np.ndarray) -> None:
    before = batch.copy()
    engine.run(batch)
    np.testing.assert_array_equal(batch, before)


def test_results_are_not_shared_buffers(engine: Engine, batch: np.ndarray) -> None:
    first = engine.run(batch[:1])
    kept = first.copy()
    engine.run(255 - batch[:1])
    np.testing.assert_array_equal(first, kept)
    first[:] = 7
    np.testing.assert_array_equal(engine.run(batch[:1]), kept)


def test_a_batch_of_another_shape_is_rejected_with_both_shapes(engine: Engine) -> None:
    h, w = engine.spec.height, engine.spec.width
    wrong: list[np.ndarray] = [
        np.zeros((1, h, w, 3), np.float32),
        np.zeros((1, h, w, 3), np.int8),
        np.zeros((h, w, 3), np.uint8),
        np.zeros((0, h, w, 3), np.uint8),
        np.zeros((1, h, w, 4), np.uint8),
        np.zeros((1, 3, h, w), np.uint8),
    ]
    for batch in wrong:
        with pytest.raises(UsageError) as caught:
            engine.run(batch)
        assert f"{batch.dtype} {list(batch.shape)}" in str(caught.value)
        assert f"uint8 [N, {h}, {w}, 3] is expected" in str(caught.value)
    for size in ((h + 16, w), (h, w - 1), (16, 16)):
        with pytest.raises(UsageError, match=f"{h} x {w} only, not {size[0]} x {size[1]}"):
            engine.run(np.zeros((1, *size, 3), np.uint8))


def test_eight_threads_get_the_same_results_as_one(engine: Engine, batch: np.ndarray) -> None:
    alone = [engine.run(batch[i : i + 1]) for i in range(3)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: engine.run(batch[i % 3 : i % 3 + 1]), range(24)))
    for i, result in enumerate(results):
        assert difference(result, alone[i % 3]) <= 1


def test_a_closed_engine_raises_and_can_be_closed_again(backend: str, toy: Toy, tmp_path: Path) -> None:
    engine = load_engine(toy(tmp_path / "toy.onnx", 0), backend, threads=1)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(np.zeros((1, 16, 32, 3), np.uint8))


def test_leaving_the_context_closes_the_engine(backend: str, toy: Toy, tmp_path: Path) -> None:
    engine = load_engine(toy(tmp_path / "toy.onnx", 0), backend, threads=1)
    with engine as entered:
        assert entered is engine
    with pytest.raises(EngineError, match="closed"):
        engine.run(np.zeros((1, 16, 32, 3), np.uint8))


def test_an_error_inside_the_context_closes_the_engine_and_propagates(backend: str, toy: Toy, tmp_path: Path) -> None:
    engine = load_engine(toy(tmp_path / "toy.onnx", 0), backend, threads=1)
    with pytest.raises(UsageError), engine:
        engine.run(np.zeros((1, 1, 1, 3), np.uint8))
    with pytest.raises(EngineError, match="closed"):
        engine.run(np.zeros((1, 16, 32, 3), np.uint8))


def test_an_engine_describes_what_is_actually_running(engine: Engine, backend: str) -> None:
    info = engine.describe()
    assert (info.name, info.device, info.precision, info.threads) == (backend, "cpu", "f32", 1)
    assert importlib.import_module(ENGINES[backend].module).__version__.startswith(info.version)
    assert len(info.version.split(".")) >= 3
    assert info.provider == {"onnxruntime": "CPUExecutionProvider", "openvino": "CPU plugin"}[backend]


def test_the_default_thread_count_is_the_usable_cpus(
    backend: str, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6}, raising=False)
    with load_engine(toy(tmp_path / "toy.onnx"), backend) as engine:
        assert engine.describe().threads == 3


@pytest.mark.parametrize("threads", [1, 2])
def test_the_requested_number_of_threads_is_used(backend: str, toy: Toy, tmp_path: Path, threads: int) -> None:
    with load_engine(toy(tmp_path / "toy.onnx"), backend, threads=threads) as engine:
        assert engine.describe().threads == threads
        np.testing.assert_array_equal(engine.run(noise(1, 16, 32)), noise(1, 16, 32)[..., 0])


@pytest.mark.parametrize("threads", [0, -1])
def test_fewer_than_one_thread_is_rejected(artifact: Artifact, backend: str, threads: int) -> None:
    with pytest.raises(UsageError, match=f"threads is {threads}"):
        load_engine(artifact, backend, threads=threads)


@pytest.mark.parametrize("streams", [0, -1])
def test_fewer_than_one_stream_is_rejected(artifact: Artifact, backend: str, streams: int) -> None:
    with pytest.raises(UsageError, match=f"streams is {streams}; it must be a whole number, 1 to {MAX_THREADS}"):
        load_engine(artifact, backend, streams=streams)


@pytest.mark.parametrize(("threads", "streams", "real"), [(4, 1, 1), (4, 2, 2), (4, 4, 4), (2, 5, 2), (1, 3, 1)])
def test_there_are_no_more_streams_than_threads(
    backend: str, toy: Toy, tmp_path: Path, threads: int, streams: int, real: int
) -> None:
    with load_engine(toy(tmp_path / "toy.onnx"), backend, threads, streams=streams) as engine:
        info = engine.describe()
        assert (info.threads, info.streams) == (threads, real)
        with ThreadPoolExecutor(streams) as pool:
            work = [noise(1, 16, 32, seed=seed) for seed in range(3 * streams)]
            for pixels, result in zip(work, pool.map(engine.run, work), strict=True):
                np.testing.assert_array_equal(result, pixels[..., 0])


@pytest.mark.parametrize(
    ("threads", "streams", "told"), [(16, 1, 16), (16, 4, 13), (16, 15, 2), (16, 16, 1), (2, 5, 1), (1, 1, 1)]
)
def test_onnx_runtime_callers_and_pool_add_up_to_the_threads(
    toy: Toy, tmp_path: Path, threads: int, streams: int, told: int
) -> None:
    """A session with intra_op_num_threads N has a pool of N - 1 threads, which all callers share."""
    engine: Any = load_engine(toy(tmp_path / "toy.onnx"), "onnxruntime", threads, device="cpu", streams=streams)
    with engine:
        own = engine._session.get_session_options().intra_op_num_threads
        assert own == told
        assert own - 1 + engine.describe().streams == threads


def test_threads_get_their_results_unchanged_by_other_runs(backend: str, toy: Toy, tmp_path: Path) -> None:
    with (
        load_engine(toy(tmp_path / "toy.onnx"), backend, 4, streams=4) as engine,
        ThreadPoolExecutor(8) as pool,
    ):
        work = [noise(1 + seed % 3, 16, 32, seed=seed) for seed in range(64)]
        results = list(pool.map(engine.run, work))
        for pixels, result in zip(work, results, strict=True):  # once all are done
            np.testing.assert_array_equal(result, pixels[..., 0])
        results[0][:] = 7
        np.testing.assert_array_equal(engine.run(work[0]), work[0][..., 0])
        np.testing.assert_array_equal(results[3], work[3][..., 0])


def test_notes_on_engine_selection_are_kept(backend: str, toy: Toy, tmp_path: Path) -> None:
    artifact, options = toy(tmp_path / "toy.onnx"), EngineOptions(threads=1, notes=("another was passed over",))
    with importlib.import_module(module_of(backend)).load(artifact, options) as engine:
        assert engine.describe().notes == ("another was passed over",)
    with load_engine(artifact, backend, 1) as engine:
        assert engine.describe().notes == ()


@pytest.mark.parametrize("count", [1, 3])
def test_warm_up_runs_blank_batches_of_the_requested_size(
    backend: str, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    with load_engine(toy(tmp_path / "toy.onnx"), backend, 1) as engine:
        seen: list[np.ndarray] = []
        run = engine.run
        monkeypatch.setattr(engine, "run", lambda batch: seen.append(batch) or run(batch))
        engine.warm_up(count)
        assert [batch.shape for batch in seen] == [(count, 16, 32, 3)] * 2
        assert not any(batch.any() for batch in seen)
        np.testing.assert_array_equal(run(noise(1, 16, 32)), noise(1, 16, 32)[..., 0])


def test_openvino_runs_once_at_the_requested_size_when_loading(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A size that is too large for a device fails when the model is loaded, not at the first photo."""
    module = pytest.importorskip("petseg_runtime.engines.openvino")
    shapes: list[tuple[int, ...]] = []
    run = module.OpenVINOEngine.run
    monkeypatch.setattr(
        module.OpenVINOEngine, "run", lambda self, images: shapes.append(images.shape) or run(self, images)
    )
    artifact = toy(tmp_path / "toy.onnx", dynamic_size=True)
    for size, expected in (((64, 48), (64, 48)), (None, (16, 32))):
        load_engine(artifact, "openvino", 1, size=size).close()
        assert shapes.pop() == (1, *expected, 3)
    assert shapes == []


@pytest.mark.parametrize("size", [(32, 32), (20, 32)])
def test_a_size_the_model_does_not_accept_is_a_usage_error_in_openvino(
    toy: Toy, tmp_path: Path, size: tuple[int, int]
) -> None:
    """An EngineError would make `auto` skip the engine."""
    pytest.importorskip("openvino")
    artifact = toy(tmp_path / "toy.onnx", dynamic_size=size != (32, 32))
    with pytest.raises(UsageError, match=f"{size[0]}"):
        load_engine(artifact, "openvino", threads=1, size=size)


# --------------------------------------------------------------------------------------------------- precision


def test_exact_computes_in_float32_and_other_precisions_are_reported(backend: str, blur: Toy, tmp_path: Path) -> None:
    """The graph's sums lie close to whole numbers, so that bf16 rounds them differently."""
    artifact, pixels = blur(tmp_path / "blur.onnx"), noise(3, 16, 32)
    weight = (np.random.default_rng(1).random((1, 3, 3, 3)) * 0.1).astype(np.float32)[0]
    padded = np.pad(pixels.astype(np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = sum(padded[:, y : y + 16, x : x + 32] @ weight[:, y, x].astype(float) for y in range(3) for x in range(3))
    with load_engine(artifact, backend, 1, exact=True) as engine:
        assert engine.describe().precision == "f32"
        exact = engine.run(pixels)
    assert np.abs(exact - np.clip(total, 0, 255)).max() < 1.001
    assert (exact != np.floor(np.clip(total, 0, 255))).mean() < 0.001
    with load_engine(artifact, backend, 1) as engine:
        precision = engine.describe().precision
        free = engine.run(pixels)
    assert precision in ("f32", "bf16", "fp16")
    assert (difference(free, exact) == 0) is (precision == "f32")
    assert difference(free, exact) <= 2


@pytest.mark.parametrize(("stored", "computed"), [("fp32", {"f32"}), ("fp16", {"f32", "fp16"}), ("int8", {"int8"})])
def test_the_compute_precision_follows_from_the_stored_one(
    backend: str, toy: Toy, tmp_path: Path, stored: str, computed: set[str]
) -> None:
    with load_engine(toy(tmp_path / "toy.onnx", precision=stored), backend, 1, exact=True) as engine:
        assert engine.describe().precision in computed


@pytest.mark.parametrize(
    ("arm", "system", "features", "computed"),
    [
        (True, "linux", ("asimd", "fphp", "asimdhp"), "fp16"),
        (True, "linux", ("asimd",), "f32"),  # a Raspberry Pi 4
        (True, "darwin", (), "fp16"),
        (False, "linux", ("avx2", "avx512_fp16"), "f32"),
    ],
)
def test_onnx_runtime_computes_fp16_on_cpus_that_support_it(
    toy: Toy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arm: bool,
    system: str,
    features: tuple[str, ...],
    computed: str,
) -> None:
    module = importlib.import_module(module_of("onnxruntime"))
    with load_engine(toy(tmp_path / "toy.onnx", precision="fp16"), "onnxruntime", 1, device="cpu") as engine:
        monkeypatch.setattr(module, "_ARM", arm)
        monkeypatch.setattr(sys, "platform", system)
        monkeypatch.setattr(host, "features", lambda: features)
        precision = engine.describe().precision
        monkeypatch.undo()
    assert precision == computed


# ------------------------------------------------------------------------------------------------ batch and size


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("free", [False, True])
def test_a_fixed_batch_graph_runs_any_number_of_photos(
    backend: str, toy: Toy, tmp_path: Path, count: int, free: bool
) -> None:
    pixels = noise(count, 16, 32)
    with load_engine(toy(tmp_path / "toy.onnx", batch=3, dynamic_size=free), backend, 1) as engine:
        result = engine.run(pixels)
        again = engine.run(pixels)
    np.testing.assert_array_equal(result, pixels[..., 0])
    assert result.shape == (count, 16, 32)
    assert result.dtype == np.uint8
    result[:] = 0
    np.testing.assert_array_equal(again, pixels[..., 0])


@pytest.mark.parametrize("count", [1, 3, 4, 7])
@pytest.mark.parametrize("size", [0, 1, 3, 4, 8])
def test_batches_are_split_padded_and_joined(count: int, size: int) -> None:
    seen: list[np.ndarray] = []

    def run(part: np.ndarray) -> np.ndarray:
        seen.append(part)
        return part[..., 0]

    pixels = noise(count, 16, 16)
    np.testing.assert_array_equal(in_batches(run, pixels, size), pixels[..., 0])
    if size == 0:
        assert [len(part) for part in seen] == [count]
        return
    assert [len(part) for part in seen] == [size] * -(-count // size)
    together = np.concatenate(seen)
    np.testing.assert_array_equal(together[:count], pixels)
    assert (together[count:] == pixels[-1]).all(), "batches are padded with the last photo"


SIZES = [(16, 32), (32, 16), (48, 48), (16, 160), (112, 16)]


def test_a_dynamic_size_graph_accepts_any_multiples_of_16(backend: str, toy: Toy, tmp_path: Path) -> None:
    with load_engine(toy(tmp_path / "toy.onnx", dynamic_size=True), backend, 1) as engine:
        for count in (1, 3):
            for size in SIZES:
                pixels = noise(count, *size)
                np.testing.assert_array_equal(engine.run(pixels), pixels[..., 0])


def test_results_of_a_dynamic_size_graph_are_not_shared_buffers(backend: str, toy: Toy, tmp_path: Path) -> None:
    with load_engine(toy(tmp_path / "toy.onnx", dynamic_size=True), backend, 1) as engine:
        kept = [engine.run(noise(1, *size)) for size in SIZES]
    for size, result in zip(SIZES, kept, strict=True):
        np.testing.assert_array_equal(result, noise(1, *size)[..., 0])


def test_threads_can_use_a_dynamic_size_graph_at_different_sizes(backend: str, toy: Toy, tmp_path: Path) -> None:
    with (
        load_engine(toy(tmp_path / "toy.onnx", dynamic_size=True), backend, 1) as engine,
        ThreadPoolExecutor(4) as pool,
    ):
        work = [noise(1 + index % 2, *SIZES[index % 5]) for index in range(24)]
        for pixels, result in zip(work, pool.map(engine.run, work), strict=True):
            np.testing.assert_array_equal(result, pixels[..., 0])


@pytest.mark.parametrize("size", [(16, 33), (17, 32), (8, 32), (0, 32)])
def test_a_dynamic_size_graph_rejects_other_sizes(
    backend: str, toy: Toy, tmp_path: Path, size: tuple[int, int]
) -> None:
    with load_engine(toy(tmp_path / "toy.onnx", dynamic_size=True), backend, 1) as engine:
        with pytest.raises(UsageError, match="multiple of 16"):
            engine.run(np.zeros((1, *size, 3), np.uint8))
        with pytest.raises(UsageError, match="uint8"):
            engine.run(np.zeros((1, 16, 32, 3), np.float32))


def test_a_batch_is_checked_against_the_spec_only() -> None:
    fixed = ModelSpec(name="m", height=16, width=32, batch=3)
    for count in (1, 3, 7):
        check_batch(np.zeros((count, 16, 32, 3), np.uint8), fixed)  # the engine pads it to batches of three
    with pytest.raises(UsageError, match=r"uint8 \[0, 16, 32, 3\]"):
        check_batch(np.zeros((0, 16, 32, 3), np.uint8), fixed)


# -------------------------------------------------------------------------------------------- choice of engine


def test_a_backend_requested_by_name_runs(artifact: Artifact, backend: str) -> None:
    with load_engine(artifact, backend, threads=1) as engine:
        assert engine.describe().name == backend


def test_an_unknown_backend_error_lists_the_known_ones(artifact: Artifact) -> None:
    with pytest.raises(EngineError, match="abacus") as caught:
        load_engine(artifact, "abacus")
    assert all(name in str(caught.value) for name in ("auto", *ENGINES))


@pytest.mark.parametrize("name", BACKENDS)
def test_a_missing_engine_says_what_to_install(artifact: Artifact, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    uninstall(name, monkeypatch)
    with pytest.raises(EngineMissing, match=re.escape(f"{name} is not installed: {install(ENGINES[name].extra)}")):
        load_engine(artifact, name)


def test_on_a_gpu_the_package_for_cuda_is_named(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petseg_runtime.host.nvidia_gpus", lambda: 1)
    uninstall("onnxruntime", monkeypatch)
    with pytest.raises(EngineMissing, match=f"^onnxruntime is not installed: {re.escape(install('gpu'))}$"):
        load_engine(artifact, "onnxruntime", device="cuda")


def test_without_any_engine_all_suitable_ones_are_named(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("petseg_runtime.host.gpus", lambda: ())
    for name in ENGINES:
        uninstall(name, monkeypatch)
    with pytest.raises(EngineMissing, match="no inference engine for onnx files is installed: ") as caught:
        load_engine(artifact)
    assert all(install(entry.extra) in str(caught.value) for entry in ENGINES.values())


@pytest.mark.parametrize(
    ("does", "told"),
    [
        ("raise ImportError('libgomp.so.1: cannot open\\nshared object file')", "cannot open shared"),
        ("raise RuntimeError('Could not determine home directory.')", "Could not determine home directory"),
        ("import package_that_it_needs", "No module named 'package_that_it_needs'"),
    ],
    ids=["library", "home", "package"],
)
def test_an_installed_but_broken_engine_is_an_engine_error(
    artifact: Artifact, backend: str, does: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = ENGINES[backend].module
    (tmp_path / f"{module}.py").write_text(does)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delitem(sys.modules, module_of(backend), raising=False)
    with pytest.raises(EngineError, match=f"{backend} is installed but cannot be imported .*{told}") as caught:
        load_engine(artifact, backend)
    assert not isinstance(caught.value, EngineMissing)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_missing_petseg_module_is_not_taken_for_a_missing_engine(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module_of(name), None)
    with pytest.raises(ModuleNotFoundError, match="petseg_runtime"):
        load_engine(artifact, name)


def test_the_engine_tables_are_consistent() -> None:
    functions = [(line.engine, line.gain) for line in RULE if line.gain]
    functions += [(name, entry.loader) for name, entry in ENGINES.items()]
    for name, function in functions:
        where, _, attribute = function.partition(":")
        assert importlib.util.find_spec(where) is not None
        if importlib.util.find_spec(ENGINES[name].module):
            assert callable(getattr(importlib.import_module(where), attribute))
    assert {line.engine for line in RULE} == set(ENGINES)
    assert {line.kind for line in RULE} == set(DEVICES)
    for line in RULE:
        assert bool(line.gain) is bool(line.when)
        if line.gain:
            assert any(
                other.gain is None and (other.engine, other.kind) == (line.engine, line.kind)
                for other in RULE[RULE.index(line) + 1 :]
            ), "it may be asked for by name where it gains nothing"
    for name, entry in ENGINES.items():
        assert set(entry.run_by_us) <= {line.kind for line in RULE if line.engine == name}


# ------------------------------------------------------------------------------------------- the rule, with fakes


@dataclass
class FakeMachine:
    """A simulated machine on which each engine works, fails or is missing, on each kind of device."""

    artifact: Artifact
    behaviour: dict[tuple[str, str], str]
    gain: bool = False
    tried: list[tuple[str, str]] = field(default_factory=list)

    def load(self, name: str, artifact: Artifact, options: EngineOptions) -> Any:
        kind = options.device.kind
        self.tried.append((name, kind))
        what = self.behaviour.get((name, kind), "works")
        if what == "missing":
            raise EngineMissing(f"{name} on {kind} is not installed: pip install it")
        if what == "fails":
            raise EngineError(f"{name} on {options.device} fails")
        info = EngineInfo(
            name=name,
            version="1",
            device=str(options.device),
            provider="stand-in",
            precision="f32",
            threads=options.threads or 0,
            notes=options.notes,
        )
        return types.SimpleNamespace(describe=lambda: info, options=options)

    def choose(self, backend: str = "auto", **asked: Any) -> EngineInfo:
        return load_engine(self.artifact, backend, **asked).describe()


MakeMachine: TypeAlias = Callable[..., FakeMachine]


@pytest.fixture
def make_machine(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> MakeMachine:
    """Creates a simulated machine; engines that are not mentioned work."""

    def make(
        behaviour: dict[str, str] | None = None, *, gpus: int = 0, gain: bool = False, trouble: str = ""
    ) -> FakeMachine:
        pairs = {tuple(name.split(" on ")): what for name, what in (behaviour or {}).items()}
        machine = FakeMachine(artifact, pairs, gain)  # type: ignore[arg-type]
        module: Any = types.ModuleType("stand_in")
        module.gain = lambda spec, options: machine.gain and not options.exact
        for name, entry in list(ENGINES.items()):
            attribute = name.replace("-", "_")
            setattr(module, attribute, functools.partial(machine.load, name))
            changed = dataclasses.replace(entry, loader=f"stand_in:{attribute}", module="stand_in")
            monkeypatch.setitem(ENGINES, name, changed)
        monkeypatch.setitem(sys.modules, "stand_in", module)
        rule = tuple(dataclasses.replace(line, gain=line.gain and "stand_in:gain") for line in RULE)
        monkeypatch.setattr(registry, "RULE", rule)
        gpu = Gpu(index=0, name="Stand-in", compute_capability="9.0", memory=2**34, driver="CUDA 13.0")
        monkeypatch.setattr(host, "gpus", lambda: (gpu,) * gpus)
        monkeypatch.setattr(host, "driver_trouble", lambda: trouble)
        return machine

    return make


TENSORRT_LESS = {"tensorrt on cuda": "missing", "tensorrt-rtx on cuda": "missing"}


@pytest.mark.parametrize(
    ("gpus", "gain", "behaviour", "taken"),
    [
        (1, True, {}, "tensorrt cuda:0"),
        (1, True, {"tensorrt on cuda": "missing"}, "tensorrt-rtx cuda:0"),
        (1, True, TENSORRT_LESS, "onnxruntime cuda:0"),
        (1, True, {**TENSORRT_LESS, "onnxruntime on cuda": "missing"}, "openvino cpu"),
        (1, False, {**TENSORRT_LESS, "onnxruntime on cuda": "missing"}, "onnxruntime cpu"),
        (0, True, {}, "openvino cpu"),
        (0, False, {}, "onnxruntime cpu"),
        (0, True, {"openvino on cpu": "missing"}, "onnxruntime cpu"),
        (0, False, {"onnxruntime on cpu": "missing"}, "openvino cpu"),
    ],
)
def test_auto_chooses_the_fastest_installed_engine(
    make_machine: MakeMachine, gpus: int, gain: bool, behaviour: dict[str, str], taken: str
) -> None:
    info = make_machine(behaviour, gpus=gpus, gain=gain).choose()
    assert f"{info.name} {info.device}" == taken
    assert info.notes == (), "engines that are not installed give no note"


def test_without_a_gpu_no_gpu_engine_is_tried(make_machine: MakeMachine) -> None:
    machine = make_machine()
    machine.choose()
    assert machine.tried == [("onnxruntime", "cpu")]


def test_if_the_driver_does_not_start_the_engines_installed_for_a_gpu_say_so(make_machine: MakeMachine) -> None:
    told: list[str] = []
    machine = make_machine({**TENSORRT_LESS, "onnxruntime on cuda": "fails"}, trouble="the driver does not start")
    info = machine.choose(warn=told.append)
    assert (info.name, info.device) == ("onnxruntime", "cpu")
    assert [*info.notes] == told == ["onnxruntime on cuda:0 fails"]
    machine = make_machine({**TENSORRT_LESS, "onnxruntime on cuda": "missing"}, trouble="the driver does not start")
    assert machine.choose().notes == (), "nothing that is installed could use the GPU"
    said = "^cuda:0 is not available: the driver does not start, or use --device cpu$"
    with pytest.raises(EngineError, match=said):
        machine.choose(device="cuda")


def test_a_failing_engine_is_skipped_with_a_note(make_machine: MakeMachine) -> None:
    machine = make_machine(
        {"tensorrt on cuda": "fails", "tensorrt-rtx on cuda": "missing", "onnxruntime on cuda": "fails"}, gpus=1
    )
    info = machine.choose()
    assert (info.name, info.device) == ("onnxruntime", "cpu")
    assert info.notes == ("tensorrt on cuda:0 fails", "onnxruntime on cuda:0 fails")


def test_a_failed_engine_is_freed_before_the_next_is_loaded(
    make_machine: MakeMachine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failed session holds GPU memory that the next one needs, and the garbage collector may not have run yet."""
    machine = make_machine({"tensorrt-rtx on cuda": "missing"}, gpus=1)
    load = machine.load
    gone: list[bool] = []

    class Session:
        def run(self) -> None:
            try:
                raise RuntimeError("out of memory")
            except RuntimeError as error:
                raise EngineError("tensorrt on cuda:0 is out of memory") from error

    def loads(name: str, artifact: Artifact, options: EngineOptions) -> Any:
        if name == "tensorrt":
            session = Session()
            sessions.append(weakref.ref(session))
            session.run()
        gone.extend(session() is None for session in sessions)
        return load(name, artifact, options)

    sessions: list[weakref.ref[Session]] = []
    monkeypatch.setattr(machine, "load", loads)
    for name in ENGINES:
        monkeypatch.setattr(sys.modules["stand_in"], name.replace("-", "_"), functools.partial(loads, name))
    gc.disable()
    try:
        info = machine.choose()
    finally:
        gc.enable()
    assert (info.name, info.notes) == ("onnxruntime", ("tensorrt on cuda:0 is out of memory",))
    assert gone == [True, True]


def test_frames_of_the_callers_handled_exception_are_not_cleared(make_machine: MakeMachine) -> None:
    def fail() -> None:
        secret = "kept"  # noqa: F841 (looked for below)
        raise ValueError("of the caller")

    seen: list[dict[str, Any]] = []
    try:
        fail()
    except ValueError as error:
        make_machine({"tensorrt on cuda": "fails"}, gpus=1).choose()
        seen.extend(frame.f_locals.copy() for frame, _ in traceback.walk_tb(error.__traceback__))
    assert seen[-1] == {"secret": "kept"}


def test_the_warn_callback_reports_skipped_engines_once_one_is_found(make_machine: MakeMachine) -> None:
    told: list[str] = []
    machine = make_machine({"tensorrt on cuda": "fails", "tensorrt-rtx on cuda": "missing"}, gpus=1)
    machine.choose(warn=told.append)
    assert told == ["tensorrt on cuda:0 fails"]


def test_openvino_comes_first_only_if_faster_and_not_exact(make_machine: MakeMachine) -> None:
    machine = make_machine(gain=True)
    assert machine.choose().name == "openvino"
    assert machine.choose(exact=True).name == "onnxruntime"
    machine.gain = False
    assert machine.choose().name == "onnxruntime"
    assert machine.choose("openvino").name == "openvino"


@pytest.mark.parametrize("device", ["cuda", "cuda:2", "cpu", "intel-gpu", "intel-gpu:1"])
@pytest.mark.parametrize("backend", ["auto", *ENGINES])
def test_the_requested_engine_runs_or_an_error_is_raised(make_machine: MakeMachine, backend: str, device: str) -> None:
    kind = device.partition(":")[0]
    able = [line for line in RULE if line.kind == kind and backend in ("auto", line.engine)]
    machine = make_machine(gpus=3)
    if not able:
        with pytest.raises(EngineError, match=f"{backend} cannot run it on {kind}.*; supported: {backend} on "):
            machine.choose(backend, device=device)
        assert machine.tried == []
        return
    info = machine.choose(backend, device=device)
    assert info.device == device + (":0" if device in ("cuda", "intel-gpu") else "")
    assert backend in ("auto", info.name)
    broken = make_machine({f"{line.engine} on {kind}": "fails" for line in able}, gpus=3)
    with pytest.raises(EngineError, match="fails"):
        broken.choose(backend, device=device)
    assert {tried_kind for _, tried_kind in broken.tried} == {kind}
    assert backend == "auto" or {name for name, _ in broken.tried} == {backend}


def test_a_requested_backend_is_the_only_one_tried(make_machine: MakeMachine) -> None:
    machine = make_machine({"onnxruntime on cpu": "fails", "onnxruntime on cuda": "fails"}, gpus=1, gain=True)
    with pytest.raises(EngineError, match=r"^onnxruntime on cuda:0 fails; onnxruntime on cpu fails$"):
        machine.choose("onnxruntime")
    assert machine.tried == [("onnxruntime", "cuda"), ("onnxruntime", "cpu")]


def test_requesting_a_missing_gpu_is_an_error_with_a_remedy(make_machine: MakeMachine) -> None:
    everything = {f"{name} on cuda": "missing" for name in ENGINES}
    said = "^cuda:1 is not available: this machine shows no NVIDIA GPU: install its driver, or use --device cpu$"
    with pytest.raises(EngineError, match=said) as caught:
        make_machine(everything, gpus=0).choose(device="cuda:1")
    assert not isinstance(caught.value, EngineMissing)
    with pytest.raises(EngineMissing) as missing:
        make_machine(everything, gpus=1).choose(device="cuda")
    assert [f"{name} on cuda is not installed" in str(missing.value) for name in ENGINES] == [True, False, True, True]


@pytest.mark.parametrize("backend", ["auto", "openvino"])
def test_intels_gpu_is_used_only_on_request(make_machine: MakeMachine, backend: str) -> None:
    machine = make_machine({"openvino on cpu": "fails", "onnxruntime on cpu": "fails"})
    with pytest.raises(EngineError, match="openvino on cpu fails"):
        machine.choose(backend)
    assert ("openvino", "intel-gpu") not in machine.tried
    assert machine.choose(backend, device="intel-gpu").device == "intel-gpu:0"


def test_every_failure_is_reported_once_if_nothing_works(make_machine: MakeMachine) -> None:
    machine = make_machine(
        {"tensorrt on cuda": "missing", "tensorrt-rtx on cuda": "missing", "onnxruntime on cuda": "missing"}
        | {"onnxruntime on cpu": "fails", "openvino on cpu": "fails"},
        gpus=1,
        gain=True,
    )
    with pytest.raises(EngineError) as caught:
        machine.choose()
    missing = "tensorrt on cuda is not installed: pip install it"
    assert str(caught.value).endswith("openvino on cpu fails; onnxruntime on cpu fails")
    assert str(caught.value).count(missing) == 1
    assert not isinstance(caught.value, EngineMissing)


@given(data=st.data())
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_auto_chooses_the_first_working_line_on_any_machine(make_machine: MakeMachine, data: st.DataObject) -> None:
    lines = list(dict.fromkeys(f"{line.engine} on {line.kind}" for line in RULE))
    behaviour = {line: data.draw(st.sampled_from(["works", "fails", "missing"]), line) for line in lines}
    gpus, gain = data.draw(st.integers(0, 1), "gpus"), data.draw(st.booleans(), "gain")
    order = ["openvino on cpu", "onnxruntime on cpu"] if gain else ["onnxruntime on cpu", "openvino on cpu"]
    order = ["tensorrt on cuda", "tensorrt-rtx on cuda", "onnxruntime on cuda"] * gpus + order
    working = [line for line in order if behaviour[line] == "works"]
    machine = make_machine(behaviour, gpus=gpus, gain=gain)
    if not working:
        with pytest.raises(EngineError):
            machine.choose()
        return
    info = machine.choose()
    assert f"{info.name} on {info.device.partition(':')[0]}" == working[0]
    before = order[: order.index(working[0])]
    assert [note.replace(":0", "") for note in info.notes] == [f"{b} fails" for b in before if behaviour[b] == "fails"]


@pytest.mark.parametrize(
    "device",
    [
        "gpu",
        "cuda:",
        "cuda:-1",
        "cuda:x",
        "cuda:1.5",
        "cuda:²",
        "cuda:٣",
        "cuda:" + "9" * 5000,
        "cpu:0",
        "CPU",
        "",
        "auto:1",
    ],
)
def test_an_unknown_device_error_lists_the_existing_ones(make_machine: MakeMachine, device: str) -> None:
    said = f"unknown device {device!r}; choose one of: auto, cpu, cuda, cuda:N, intel-gpu, intel-gpu:N"
    with pytest.raises(EngineError, match=f"^{re.escape(said)}$"):
        make_machine(gpus=1).choose(device=device)


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("cpu", Device()),
        ("cuda", Device("cuda", 0)),
        ("cuda:3", Device("cuda", 3)),
        ("intel-gpu:1", Device("intel-gpu", 1)),
    ],
)
def test_a_device_is_parsed_as_kind_and_number(text: str, device: Device) -> None:
    assert Device.parse(text) == device
    assert Device.parse(str(device)) == device


# ------------------------------------------------------------------------------------- the rule, with real engines


def test_auto_follows_the_rule_on_this_machine(
    artifact: Artifact, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(host, "gpus", lambda: ())
    with load_engine(artifact, "openvino", threads=1) as engine:
        less = engine.describe().precision != "f32"
    for files, exact, expected in [
        (artifact, False, "openvino" if less else "onnxruntime"),
        (artifact, True, "onnxruntime"),
        (toy(tmp_path / "int8.onnx", precision="int8"), False, "openvino"),
    ]:
        with load_engine(files, threads=1, exact=exact) as engine:
            info = engine.describe()
            assert (info.name, info.device, info.notes) == (expected, "cpu", ())
        uninstalled = {"openvino": "onnxruntime", "onnxruntime": "openvino"}
        with monkeypatch.context() as patch:
            uninstall(expected, patch)
            with load_engine(files, threads=1, exact=exact) as engine:
                assert engine.describe().name == uninstalled[expected]


@pytest.mark.parametrize(
    ("machine", "able", "precision", "exact", "gains"),
    [
        ("x86", {"FP32", "INT8"}, "fp32", False, False),
        ("x86 avx512_bf16", {"FP32", "BF16"}, "fp32", False, True),
        ("x86 avx512_bf16", {"FP32", "BF16"}, "fp32", True, False),
        ("x86 avx512_bf16", {"FP32"}, "fp32", False, False),  # it is switched off in the plugin
        ("x86 avx_ne_convert", {"FP32", "BF16", "FP16"}, "fp32", False, False),  # supported, but not the default
        ("arm", {"FP32", "FP16"}, "fp16", False, True),
        ("arm", {"FP32"}, "fp32", False, False),
        ("x86", {"FP32"}, "int8", False, True),
        ("x86", {"FP32"}, "int8", True, True),
    ],
)
def test_openvino_is_preferred_where_it_computes_below_float32(
    monkeypatch: pytest.MonkeyPatch, machine: str, able: set[str], precision: Any, exact: bool, gains: bool
) -> None:
    module = pytest.importorskip("petseg_runtime.engines.openvino")
    monkeypatch.setattr(module, "_X86", machine.startswith("x86"))
    monkeypatch.setattr(host, "features", lambda: machine.split())
    core = types.SimpleNamespace(get_property=lambda where, name: sorted(able))
    monkeypatch.setattr(module, "_core", lambda: core)
    spec = ModelSpec(name="m", height=16, width=32, precision=precision)
    assert module.computes_in_less(spec, EngineOptions(exact=exact)) is gains


@pytest.mark.parametrize("broken", ["core", "plugin"])
def test_auto_skips_a_broken_openvino(toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, broken: str) -> None:
    module = pytest.importorskip("petseg_runtime.engines.openvino")

    def fails(*_: Any) -> Any:
        raise RuntimeError("Device with 'CPU' name is not registered in the OpenVINO Runtime\nmore")

    if broken == "core":
        module._core.cache_clear()
        monkeypatch.setattr(module.openvino, "Core", fails)
    else:
        monkeypatch.setattr(module, "_core", lambda: types.SimpleNamespace(get_property=fails))
    artifact = toy(tmp_path / "toy.onnx")
    try:
        with load_engine(artifact, device="cpu") as engine:
            assert engine.describe().name == "onnxruntime"
            assert "OpenVINO cannot" in engine.describe().notes[0]
        with pytest.raises(EngineError, match="is not registered"):
            load_engine(artifact, "openvino", device="cpu")
    finally:
        if broken == "core":
            module._core.cache_clear()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
@pytest.mark.parametrize(("batch", "told"), [(0, 1), (1, 1), (8, 8)])
def test_a_fixed_batch_graph_runs_in_batches_on_a_cpu(
    toy: Toy, tmp_path: Path, engine: str, batch: int, told: int
) -> None:
    pytest.importorskip(engine)
    with load_engine(toy(tmp_path / "toy.onnx", batch=batch), engine, device="cpu") as opened:
        assert opened.describe().batch == told


def test_an_engine_that_cannot_be_imported_is_skipped_with_a_note(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(host, "gpus", lambda: ())
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libgomp.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime", raising=False)
    monkeypatch.delitem(sys.modules, module_of("onnxruntime"), raising=False)
    with load_engine(toy(tmp_path / "toy.onnx"), threads=1, exact=True) as engine:
        info = engine.describe()
    assert info.name == "openvino"
    assert info.notes == (
        "onnxruntime is installed but cannot be imported (libgomp.so.1: cannot open shared object file)",
    )


def test_an_empty_onnxruntime_folder_is_reported_as_broken(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("openvino")
    monkeypatch.setattr(host, "gpus", lambda: ())
    monkeypatch.setitem(sys.modules, "onnxruntime", types.ModuleType("onnxruntime"))
    monkeypatch.delitem(sys.modules, module_of("onnxruntime"), raising=False)
    artifact = toy(tmp_path / "toy.onnx")
    with load_engine(artifact, threads=1, exact=True) as engine:
        info = engine.describe()
    assert info.name == "openvino"
    assert info.notes[0].startswith("onnxruntime is installed but cannot be imported (only its empty folder is left: ")
    with pytest.raises(EngineError, match="pip uninstall onnxruntime onnxruntime-gpu, then pip install"):
        load_engine(artifact, "onnxruntime")


# ------------------------------------------------------------------------------------- ONNX Runtime on CUDA


def session_of(artifact: Artifact) -> Any:
    import onnxruntime

    return onnxruntime.InferenceSession(artifact.path, providers=["CPUExecutionProvider"])


def bound(artifact: Artifact) -> Any:
    """I/O binding as for a GPU, but on the CPU."""
    from petseg_runtime.engines.onnxruntime import _Bound

    return _Bound(session_of(artifact), Device("cpu"))


def test_buffers_handle_changing_batches_and_results_are_copies(toy: Toy, tmp_path: Path) -> None:
    buffers = bound(toy(tmp_path / "toy.onnx", dynamic_size=True))
    work = [
        noise(count, *size, seed=seed)
        for seed, (count, size) in enumerate(
            [(1, (16, 32)), (1, (16, 32)), (3, (16, 32)), (2, (48, 16)), (1, (16, 32))] * 3
        )
    ]
    results = [buffers.run(pixels) for pixels in work]
    for pixels, result in zip(work, results, strict=True):
        assert (result.shape, result.dtype) == (pixels.shape[:3], np.uint8)
        np.testing.assert_array_equal(result, pixels[..., 0])
    results[-1][:] = 7
    np.testing.assert_array_equal(buffers.run(work[-1]), work[-1][..., 0])


def test_buffers_accept_any_memory_layout(toy: Toy, tmp_path: Path) -> None:
    pixels = noise(3, 16, 32)
    strided = np.asfortranarray(pixels)
    assert not strided.flags.c_contiguous
    np.testing.assert_array_equal(bound(toy(tmp_path / "toy.onnx")).run(strided), pixels[..., 0])


def test_buffers_of_the_same_shape_are_reused(toy: Toy, tmp_path: Path) -> None:
    buffers = bound(toy(tmp_path / "toy.onnx"))
    buffers.run(noise(2, 16, 32))
    sent = buffers._sent
    buffers.run(noise(2, 16, 32, seed=1))
    assert buffers._sent is sent
    buffers.run(noise(1, 16, 32))
    assert buffers._sent is not sent


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Engine]:
    """Creates the engine for CUDA with its session and its buffers on the CPU."""
    module = importlib.import_module("petseg_runtime.engines.onnxruntime")
    gpus = tuple(
        Gpu(index=index, name=f"Stand-in {index}", compute_capability=capability, memory=2**34, driver="CUDA 13.0")
        for index, capability in enumerate(("9.0", "7.5"))
    )
    monkeypatch.setattr(host, "gpus", lambda: gpus)
    real = module._Bound
    monkeypatch.setattr(module, "_cuda_session", lambda artifact, device, *, tf32: session_of(artifact))
    monkeypatch.setattr(module, "_Bound", lambda session, device: real(session, Device("cpu")))
    return lambda artifact, device="cuda", **options: load_engine(artifact, "onnxruntime", device=device, **options)


def test_on_cuda_threads_take_turns_and_get_their_results(
    on_cuda: Callable[..., Engine], toy: Toy, tmp_path: Path
) -> None:
    with on_cuda(toy(tmp_path / "toy.onnx")) as engine, ThreadPoolExecutor(8) as pool:
        work = [noise(1 + seed % 3, 16, 32, seed=seed) for seed in range(64)]
        results = list(pool.map(engine.run, work))
        for pixels, result in zip(work, results, strict=True):
            np.testing.assert_array_equal(result, pixels[..., 0])
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(work[0])


@pytest.mark.parametrize(("size", "expected"), [((64, 48), (64, 48)), (None, (16, 32))])
def test_on_cuda_loading_for_a_size_runs_once_at_it(
    on_cuda: Callable[..., Engine],
    toy: Toy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    size: tuple[int, int] | None,
    expected: tuple[int, int],
) -> None:
    module = importlib.import_module(module_of("onnxruntime"))
    shapes: list[tuple[int, ...]] = []
    run = module.OnnxRuntimeCudaEngine.run
    monkeypatch.setattr(
        module.OnnxRuntimeCudaEngine, "run", lambda self, images: shapes.append(images.shape) or run(self, images)
    )
    on_cuda(toy(tmp_path / "toy.onnx", dynamic_size=True), size=size).close()
    assert set(shapes) == {(1, *expected, 3)}


@pytest.mark.parametrize("count", [1, 3, 4])
def test_on_cuda_a_fixed_batch_graph_runs_any_number_of_photos(
    on_cuda: Callable[..., Engine], toy: Toy, tmp_path: Path, count: int
) -> None:
    with on_cuda(toy(tmp_path / "toy.onnx", batch=3)) as engine:
        np.testing.assert_array_equal(engine.run(noise(count, 16, 32)), noise(count, 16, 32)[..., 0])
        with pytest.raises(UsageError, match="16 x 32 only"):
            engine.run(noise(1, 32, 16))


def test_on_cuda_there_are_few_batch_sizes(
    on_cuda: Callable[..., Any], toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with on_cuda(toy(tmp_path / "toy.onnx")) as engine:
        seen: set[int] = set()
        run = engine._bound.run
        monkeypatch.setattr(engine._bound, "run", lambda part: seen.add(len(part)) or run(part))
        for count in range(1, 18):
            np.testing.assert_array_equal(engine.run(noise(count, 16, 32)), noise(count, 16, 32)[..., 0])
    assert seen == {1, 2, 4, 8}


@pytest.mark.parametrize(
    ("device", "stored", "exact", "precision"),
    [
        ("cuda", "fp32", False, "tf32"),
        ("cuda", "fp32", True, "f32"),
        ("cuda:1", "fp32", False, "f32"),  # before Ampere there is no TF32
        ("cuda", "fp16", False, "fp16"),
        ("cuda:1", "int8", True, "int8"),
    ],
)
def test_on_cuda_the_description_names_gpu_and_precision(
    on_cuda: Callable[..., Engine], toy: Toy, tmp_path: Path, device: str, stored: str, exact: bool, precision: str
) -> None:
    with on_cuda(toy(tmp_path / "toy.onnx", precision=stored), device, exact=exact) as engine:
        info = engine.describe()
    index = device.partition(":")[2] or "0"
    assert (info.name, info.device, info.precision) == ("onnxruntime", f"cuda:{index}", precision)
    wide = "tf32" if not exact and index == "0" else "f32"
    assert (info.float32, info.narrowed) == (wide, wide == "tf32")
    rest = "" if stored == "fp32" else f", {wide} for the graph's float32 operations"
    assert info.provider == f"CUDAExecutionProvider, Stand-in {index}{rest}"
    assert (info.threads, info.streams, info.batch) == (0, 1, 8)


def test_on_cuda_closing_frees_the_buffers(on_cuda: Callable[..., Any], toy: Toy, tmp_path: Path) -> None:
    engine = on_cuda(toy(tmp_path / "toy.onnx"))
    buffers = weakref.ref(engine._bound)
    engine.close()
    assert buffers() is None


def test_on_cuda_a_failing_graph_fails_when_it_is_loaded(
    on_cuda: Callable[..., Engine], toy: Toy, tmp_path: Path
) -> None:
    with pytest.raises(EngineError, match=r"ONNX Runtime on cuda:0 failed \("):
        on_cuda(toy(tmp_path / "toy.onnx", 7))  # there is no channel 7


@pytest.fixture
def gpu_package(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """Makes the installed ONNX Runtime look like the GPU package, with sessions that behave as the test says."""
    onnxruntime = pytest.importorskip("onnxruntime")
    assert "providers" in inspect.signature(onnxruntime.InferenceSession.__init__).parameters

    def make(
        providers: list[str] | Exception, *, gpus: int = 1, says: str = "", driver: str = "CUDA 13.0"
    ) -> list[Any]:
        calls: list[Any] = []

        class Session:
            def __init__(self, path: str, options: Any, *, providers: list[Any], enable_fallback: int) -> None:
                calls.append((providers, options.intra_op_num_threads))
                if isinstance(outcome, Exception):
                    raise outcome

            def get_providers(self) -> list[str]:
                assert isinstance(outcome, list)
                return outcome

        outcome = providers
        gpu = Gpu(index=0, name="Stand-in", compute_capability="9.0", memory=2**34, driver=driver)
        monkeypatch.setattr(host, "gpus", lambda: (gpu,) * gpus)
        there = ["CUDAExecutionProvider", "CPUExecutionProvider"]
        monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: there)
        monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: sys.stdout.write(says), raising=False)  # from 1.21 on
        monkeypatch.setattr(onnxruntime, "InferenceSession", Session)
        return calls

    return make


def test_a_session_that_fell_back_to_the_cpu_is_an_error_with_a_remedy(
    artifact: Artifact, gpu_package: Callable[..., list[Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    gpu_package(["CPUExecutionProvider"], says="Failed to load libcudnn.so.9:\nno such file\n")
    with pytest.raises(EngineError) as caught:
        load_engine(artifact, "onnxruntime", device="cuda")
    message = str(caught.value)
    assert message.startswith("cuda:0 is not available: ")
    assert "would run it with CPUExecutionProvider instead of CUDAExecutionProvider" in message
    assert "GPUs of this machine: cuda:0 Stand-in, CUDA 13.0; the versions of CUDA and cuDNN" in message
    assert install("gpu") in message
    assert "Failed to load libcudnn.so.9: no such file" in message
    assert capsys.readouterr() == ("", ""), "what it prints is part of the message"


def test_two_concurrent_loads_restore_stdout(
    artifact: Artifact, gpu_package: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second thread starts while the first has redirected stdout, and ends after the first has restored it."""
    import onnxruntime

    module = importlib.import_module(module_of("onnxruntime"))
    gpu_package(["CPUExecutionProvider"])
    first_is_in, second_is_there, first_is_out = (threading.Event() for _ in range(3))

    class Lock:
        """The module's lock, if it has one; reports when the second thread reaches it."""

        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __enter__(self) -> None:
            if first_is_in.is_set():
                second_is_there.set()
            self.lock.acquire()

        def __exit__(self, *_: object) -> None:
            self.lock.release()

    def preload() -> None:
        if not first_is_in.is_set():
            first_is_in.set()
            second_is_there.wait()
        elif not second_is_there.is_set():
            second_is_there.set()
            first_is_out.wait()

    def load() -> None:
        with pytest.raises(EngineError):
            load_engine(artifact, "onnxruntime", device="cuda")

    monkeypatch.setattr(module, "_REDIRECTING", Lock(), raising=False)
    monkeypatch.setattr(onnxruntime, "preload_dlls", preload, raising=False)  # from 1.21 on
    before = sys.stdout
    try:
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(load)
            first_is_in.wait()
            second = pool.submit(load)
            first.result()
            first_is_out.set()
            second.result()
        assert sys.stdout is before
    finally:
        sys.stdout = before


def test_with_an_old_driver_a_failed_session_does_not_suggest_the_same_package(
    artifact: Artifact, gpu_package: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    gpu_package(RuntimeError("CUDA failure 35"), driver="CUDA 12.4")
    with pytest.raises(EngineError, match="update it to 580 or newer, or install builds for CUDA 12") as caught:
        load_engine(artifact, "onnxruntime", device="cuda")
    assert "pip install 'onnxruntime-gpu[cuda,cudnn]<1.27'" in str(caught.value)
    assert install("gpu") not in str(caught.value)


def test_without_a_gpu_a_failed_session_says_there_is_none(
    artifact: Artifact, gpu_package: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu_package(RuntimeError("CUDA failure 100:\nno CUDA-capable device"), gpus=0)
    with pytest.raises(EngineError) as caught:
        load_engine(artifact, "onnxruntime", device="cuda")
    assert "ONNX Runtime cannot load it (CUDA failure 100: no CUDA-capable device)" in str(caught.value)
    assert "this machine shows no NVIDIA GPU: install its driver, or use --device cpu" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    monkeypatch.setattr(host, "driver_trouble", lambda: "the driver does not start: reboot")
    with pytest.raises(EngineError, match=r" \(the driver does not start: reboot, or use --device cpu\)$"):
        load_engine(artifact, "onnxruntime", device="cuda")


def test_an_onnx_runtime_that_preloads_nothing_is_used_as_it_is(
    artifact: Artifact, gpu_package: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = gpu_package(["CPUExecutionProvider"])
    monkeypatch.delattr("onnxruntime.preload_dlls")  # before 1.21
    with pytest.raises(EngineError, match="would run it with CPUExecutionProvider"):
        load_engine(artifact, "onnxruntime", device="cuda")
    assert len(calls) == 1


def test_a_gpu_that_is_not_there_is_named_instead_of_a_package(
    artifact: Artifact, gpu_package: Callable[..., list[Any]]
) -> None:
    gpu_package(RuntimeError("provider_options_utils.h:187 Parse Failed"))  # as onnxruntime-gpu 1.31 says it
    with pytest.raises(EngineError, match=r"cuda:0 Stand-in, CUDA 13\.0; there is no cuda:1\)$") as caught:
        load_engine(artifact, "onnxruntime", device="cuda:1")
    assert install("gpu") not in str(caught.value)


@pytest.mark.parametrize(("exact", "tf32"), [(False, "1"), (True, "0")])
def test_the_cuda_session_gets_gpu_tf32_and_a_quick_search_but_no_thread_options(
    artifact: Artifact, gpu_package: Callable[..., list[Any]], exact: bool, tf32: str
) -> None:
    calls = gpu_package(["CPUExecutionProvider"])
    with pytest.raises(EngineError, match="cuda:3 is not available"):
        load_engine(artifact, "onnxruntime", device="cuda:3", exact=exact)
    providers, threads = calls[0]
    settings = {"device_id": "3", "use_tf32": tf32, "cudnn_conv_algo_search": "HEURISTIC"}
    assert providers == [("CUDAExecutionProvider", settings)]
    assert threads == 1, "more threads would only wait, each pinned to a core"


@pytest.mark.parametrize(
    ("installed", "said", "missing"),
    [
        ({"onnxruntime"}, "the installed onnxruntime was built without CUDA: pip uninstall onnxruntime, then", True),
        (
            {"onnxruntime", "onnxruntime-gpu"},
            "onnxruntime and onnxruntime-gpu are both installed and break each other: "
            "pip uninstall onnxruntime onnxruntime-gpu, then",
            False,
        ),
        (set(), "the installed onnxruntime was built without CUDA: uninstall it, then", True),
    ],
)
def test_a_package_without_cuda_gives_a_remedy(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, installed: set[str], said: str, missing: bool
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(host, "versions", lambda names: {name: "1" for name in names if name in installed})
    with pytest.raises(EngineError, match=f"^{said} {re.escape(install('gpu'))}$") as caught:
        load_engine(artifact, "onnxruntime", device="cuda")
    assert isinstance(caught.value, EngineMissing) is missing, "a package conflict is noted"


def test_on_a_jetson_the_remedy_is_the_systems_tensorrt(
    artifact: Artifact, gpu_package: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "jetson", lambda: True)
    gpu_package(["CPUExecutionProvider"])
    with pytest.raises(EngineError) as failed:
        load_engine(artifact, "onnxruntime", device="cuda")
    monkeypatch.setattr("onnxruntime.get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(EngineMissing) as without_cuda:
        load_engine(artifact, "onnxruntime", device="cuda")
    uninstall("tensorrt", monkeypatch)
    with pytest.raises(EngineMissing) as missing:
        load_engine(artifact, "tensorrt", device="cuda")
    for name in ENGINES:
        uninstall(name, monkeypatch)
    with pytest.raises(EngineMissing) as none:
        load_engine(artifact, device="auto")
    for message in (str(caught.value) for caught in (failed, without_cuda, missing, none)):
        assert message.count("apt install python3-libnvinfer") == 1
        assert not re.search("onnxruntime-gpu|580 or newer|tensorrt>=|pip uninstall", message)


# --------------------------------------------------------------------------------------------------------- errors


def test_an_unloadable_graph_is_an_engine_error_naming_the_file(backend: str, toy: Toy, tmp_path: Path) -> None:
    artifact = toy(tmp_path / "toy.onnx", op="Nonsense")
    with pytest.raises(EngineError) as caught:
        load_engine(artifact, backend, threads=1)
    assert str(caught.value).startswith(f"{tmp_path / 'toy.onnx'}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_or_truncated_file_is_an_engine_error(backend: str, toy: Toy, tmp_path: Path) -> None:
    artifact = toy(tmp_path / "toy.onnx")
    whole = artifact.path.read_bytes()
    artifact.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineError, match=r"toy\.onnx"):
        load_engine(artifact, backend, threads=1)
    artifact.path.unlink()
    with pytest.raises(EngineError, match=r"toy\.onnx"):
        load_engine(artifact, backend, threads=1)


def replaced(path: Path, content: bytes) -> None:
    other = path.with_name("other")
    other.write_bytes(content)
    other.replace(path)


def test_a_file_that_changed_after_it_was_opened_is_rejected(backend: str, toy: Toy, tmp_path: Path) -> None:
    """Its digest was checked when it was opened; without this check, another graph would run with its receipt."""
    other = toy(tmp_path / "other.onnx", channel=1).path.read_bytes()
    artifact = toy(tmp_path / "toy.onnx")
    replaced(artifact.path, other)
    with pytest.raises(ModelError, match=r"toy\.onnx: changed while it was loaded: load it again"):
        load_engine(artifact, backend, threads=1)
    load_engine(open_artifact(artifact.path), backend, threads=1).close()


def test_an_engine_whose_file_changed_is_closed(
    make_machine: MakeMachine, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, load = [], FakeMachine.load

    def loads_while_it_is_written(self: FakeMachine, name: str, artifact: Artifact, options: EngineOptions) -> Any:
        with artifact.path.open("ab") as file:
            file.write(b"more")
        loaded = load(self, name, artifact, options)
        loaded.close = lambda: closed.append(name)
        return loaded

    monkeypatch.setattr(FakeMachine, "load", loads_while_it_is_written)
    machine = make_machine()
    machine.artifact = toy(tmp_path / "toy.onnx")
    with pytest.raises(ModelError, match="changed while it was loaded"):
        machine.choose()
    assert closed == ["onnxruntime"]


def test_in_onnx_runtime_a_graph_that_fails_while_running_is_an_engine_error(toy: Toy, tmp_path: Path) -> None:
    engine = load_engine(toy(tmp_path / "toy.onnx", 7), "onnxruntime", threads=1)  # there is no channel 7
    with engine, pytest.raises(EngineError, match="failed"):
        engine.run(np.zeros((1, 16, 32, 3), np.uint8))


# ------------------------------------------------------------------------------------------------ OpenVINO


@pytest.fixture
def compiled(toy: Toy, ir: Toy, tmp_path: Path) -> Artifact:
    """The toy as an OpenVINO IR."""
    artifact: Artifact = ir(toy(tmp_path / "toy.onnx"))
    return artifact


@pytest.mark.parametrize("threads", [1, 2])
def test_openvino_uses_no_more_than_its_threads(compiled: Artifact, threads: int) -> None:
    engine: Any = load_engine(compiled, threads=threads)
    with engine:
        assert engine._compiled.get_property("INFERENCE_NUM_THREADS") == threads


@pytest.mark.parametrize("suffix", [".xml", ".bin"])
def test_an_ir_that_changed_after_it_was_opened_is_rejected(compiled: Artifact, suffix: str) -> None:
    file = compiled.path.with_suffix(suffix)
    replaced(file, file.read_bytes())
    with pytest.raises(ModelError, match=r"toy\.xml: changed while it was loaded"):
        load_engine(compiled, threads=1)


def test_openvino_is_chosen_for_ir_files(compiled: Artifact) -> None:
    for name in ("openvino", "auto"):
        with load_engine(compiled, name, threads=1) as engine:
            assert engine.describe().name == "openvino"
            assert engine.spec == compiled.spec
            np.testing.assert_array_equal(engine.run(noise(3, 16, 32)), noise(3, 16, 32)[..., 0])


@pytest.mark.parametrize("changes", [{"batch": 3}, {"dynamic_size": True}, {"batch": 3, "dynamic_size": True}], ids=str)
def test_ir_files_keep_batch_and_dynamic_size(changes: dict[str, Any], toy: Toy, ir: Toy, tmp_path: Path) -> None:
    with load_engine(ir(toy(tmp_path / "toy.onnx", **changes)), threads=1) as engine:
        for size in [(16, 32), *([(48, 16)] if "dynamic_size" in changes else [])]:
            for count in (1, 3, 4):
                pixels = noise(count, *size)
                np.testing.assert_array_equal(engine.run(pixels), pixels[..., 0])


@pytest.mark.parametrize("name", [name for name, entry in ENGINES.items() if "openvino" not in entry.formats])
def test_other_engines_do_not_run_ir_files(compiled: Artifact, name: str) -> None:
    with pytest.raises(EngineError, match=f"{name} does not run openvino files; engines that do: openvino"):
        load_engine(compiled, name)


def test_without_openvino_ir_files_say_what_to_install(compiled: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall("openvino", monkeypatch)
    for name in ("auto", "openvino"):
        with pytest.raises(EngineMissing, match=re.escape(install("openvino"))) as caught:
            load_engine(compiled, name)
        assert "cpu" not in str(caught.value)


def test_an_unreadable_ir_is_an_engine_error_naming_the_file(compiled: Artifact) -> None:
    """The digests in its sidecar match, so that only OpenVINO can detect the damage."""
    sidecar = sidecar_of(compiled.path)
    graph = compiled.path.read_bytes()
    for content in (b"", b"no graph", graph[: len(graph) // 2], graph.replace(b"Gather", b"Nonsense")):
        compiled.path.write_bytes(content)
        raw = json.loads(sidecar.read_text())
        raw["files"][".xml"] = hashlib.sha256(content).hexdigest()
        sidecar.write_text(json.dumps(raw))
        with pytest.raises(EngineError, match="OpenVINO cannot load it") as caught:
            load_engine(open_artifact(compiled.path), threads=1)
        assert str(caught.value).startswith(f"{compiled.path}: ")
        assert len(str(caught.value).splitlines()) == 1


def test_truncated_weights_are_an_engine_error(compiled: Artifact) -> None:
    sidecar, weights = sidecar_of(compiled.path), compiled.path.with_suffix(".bin")
    weights.write_bytes(b"")
    raw = json.loads(sidecar.read_text())
    raw["files"][".bin"] = hashlib.sha256(b"").hexdigest()
    sidecar.write_text(json.dumps(raw))
    with pytest.raises(EngineError, match="OpenVINO cannot load it"):
        load_engine(open_artifact(compiled.path), threads=1)


def test_in_openvino_a_failure_while_running_is_an_engine_error(compiled: Artifact) -> None:
    class Broken:
        def create_infer_request(self) -> Any:
            raise RuntimeError("Exception from src/x.cpp:1:\nno memory\n")

    engine: Any = load_engine(compiled, threads=1)
    engine._compiled, engine._local = Broken(), threading.local()
    with pytest.raises(EngineError, match=r"OpenVINO failed \(Exception from src/x.cpp:1: no memory\)"):
        engine.run(noise(1, 16, 32))


def test_in_openvino_output_of_another_size_is_an_engine_error(compiled: Artifact) -> None:
    """With one thread, OpenVINO raises no error for a failed run: the output tensor keeps its earlier content."""

    class Stuck:
        def create_infer_request(self) -> Any:
            answer = types.SimpleNamespace(data=np.zeros((1, 32, 32), np.uint8))
            return types.SimpleNamespace(infer=lambda inputs: None, get_output_tensor=lambda index: answer)

    engine: Any = load_engine(compiled, threads=1)
    engine._compiled, engine._local = Stuck(), threading.local()
    with pytest.raises(EngineError, match=r"OpenVINO failed \(it returned \[1, 32, 32\] for \[1, 16, 32, 3\]\)"):
        engine.run(noise(1, 16, 32))


def pretend(monkeypatch: pytest.MonkeyPatch, computed: str) -> None:
    """Make OpenVINO report this precision."""

    class Model:
        def get_property(self, name: str) -> Any:
            return types.SimpleNamespace(get_type_name=lambda: computed)

        def create_infer_request(self) -> Any:
            answer = types.SimpleNamespace(data=np.zeros((1, 16, 32), np.uint8))
            return types.SimpleNamespace(infer=lambda inputs: None, get_output_tensor=lambda index: answer)

    core = types.SimpleNamespace(
        available_devices=["CPU"], get_property=lambda *_: ["FP32"], compile_model=lambda *_: Model()
    )
    monkeypatch.setattr(importlib.import_module(module_of("openvino")), "_core", lambda: core)


@pytest.mark.parametrize(("computed", "exact"), [("bf16", True), ("f16", True), ("f64", False), ("dynamic", False)])
def test_openvino_ignoring_the_requested_precision_is_an_error(
    compiled: Artifact, computed: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, computed)
    with pytest.raises(EngineError, match=f"computes in {computed}"):
        load_engine(compiled, exact=exact)


@pytest.mark.parametrize(("computed", "name"), [("f32", "f32"), ("f16", "fp16"), ("bf16", "bf16")])
def test_openvino_reports_its_precision_and_with_int8_that_of_the_rest(
    computed: str, name: str, toy: Toy, ir: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [ir(toy(tmp_path / f"{stored}.onnx", precision=stored)) for stored in ("fp32", "int8")]
    pretend(monkeypatch, computed)
    plain, quantized = (load_engine(file).describe() for file in files)
    assert (plain.precision, plain.provider) == (name, "CPU plugin")
    assert (quantized.precision, quantized.provider) == ("int8", f"CPU plugin, {name} between the int8 layers")


@pytest.mark.parametrize(
    ("largest", "exact", "note"),
    [(8189.0, False, True), (8188.0, False, False), (None, False, False), (8189.0, True, False)],
)
def test_openvino_does_not_compute_in_float16_what_would_overflow(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, largest: float | None, exact: bool, note: bool
) -> None:
    """As on ARM CPUs and on GPUs, where float16 is the default."""
    module = pytest.importorskip("petseg_runtime.engines.openvino")
    receipt = {} if largest is None else {"scan": {"largest": largest}}
    artifact = dataclasses.replace(toy(tmp_path / "toy.onnx"), receipt=receipt)
    asked: list[dict[str, Any]] = []

    def compile_model(path: str, where: str, settings: dict[str, Any]) -> Any:
        asked.append(settings)
        return real.compile_model(path, where, settings)

    real = module._core()
    core = types.SimpleNamespace(
        available_devices=["CPU"], get_property=lambda *_: ["FP32", "FP16"], compile_model=compile_model
    )
    monkeypatch.setattr(module, "_core", lambda: core)
    monkeypatch.setattr(module, "_X86", False)
    with load_engine(artifact, "openvino", threads=1, exact=exact) as engine:
        notes = engine.describe().notes
    assert notes == (
        ("OpenVINO: computes in float32, because some activations are too large for float16",) if note else ()
    )
    assert ("INFERENCE_PRECISION_HINT" in asked[0]) is (note or exact)


@pytest.mark.parametrize(("cores", "pinned"), [({0}, True), ({0, 1, 2}, False)])
def test_openvino_with_fewer_threads_than_cores_does_not_pin(
    compiled: Artifact, monkeypatch: pytest.MonkeyPatch, cores: set[int], pinned: bool
) -> None:
    """With pinning, all processes with one thread would run on the first core."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: cores, raising=False)
    engine: Any = load_engine(compiled, threads=1)
    with engine:
        assert engine._compiled.get_property("ENABLE_CPU_PINNING") is pinned


@pytest.mark.parametrize(
    ("there", "index", "where"),
    [
        (["CPU", "GPU"], 0, "GPU"),
        (["CPU", "GPU.0", "GPU.1", "NPU"], 0, "GPU.0"),
        (["CPU", "GPU.0", "GPU.1", "NPU"], 1, "GPU.1"),
        (["CPU", "GPU.0", "GPU.1"], 2, None),
        (["CPU", "GPU"], 1, None),
        (["CPU"], 0, None),
    ],
)
def test_openvino_takes_the_intel_gpu_of_that_number_or_none(
    monkeypatch: pytest.MonkeyPatch, there: list[str], index: int, where: str | None
) -> None:
    module = pytest.importorskip("petseg_runtime.engines.openvino")
    monkeypatch.setattr(module, "_core", lambda: types.SimpleNamespace(available_devices=there))
    if where:
        assert module._plugin(Device("intel-gpu", index)) == where
        return
    with pytest.raises(EngineError, match=f"^intel-gpu:{index} is not available: OpenVINO finds {', '.join(there)}; "):
        module._plugin(Device("intel-gpu", index))


def test_openvino_runs_once_before_threads_can_use_it(compiled: Artifact) -> None:
    """OpenVINO's Python binding can deadlock if two threads access a tensor's data for the first time."""
    engine: Any = load_engine(compiled, threads=1)
    assert hasattr(engine._local, "request"), "a thread's first run creates the request; loading ran once"


def test_a_closed_openvino_engine_rejects_threads_that_used_it(compiled: Artifact) -> None:
    engine = load_engine(compiled, threads=1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.run, noise(1, 16, 32)).result()
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            pool.submit(engine.run, noise(1, 16, 32)).result()
