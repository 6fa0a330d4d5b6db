"""An engine takes bytes and gives bytes; what it cannot do it says in one of petseg's own errors."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from petseg_runtime import images
from petseg_runtime.artifact import Artifact, default_model, open_artifact, sample_photos
from petseg_runtime.engines.base import Engine
from petseg_runtime.engines.registry import ENGINES, load_engine
from petseg_runtime.errors import EngineError, EngineMissing, ModelError
from petseg_runtime.spec import SPEC_KEY, ModelSpec

ENGINE_MODULE = "petseg_runtime.engines.onnxruntime"


@pytest.fixture(scope="module")
def artifact() -> Artifact:
    return open_artifact(default_model())


@pytest.fixture(scope="module")
def engine(artifact: Artifact) -> Iterator[Engine]:
    with load_engine(artifact, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def batch(artifact: Artifact) -> np.ndarray:
    """Three different photos, as the model takes them."""
    spec = artifact.spec
    photos = [images.read(path).pixels for path in sample_photos()[:3]]
    return np.stack([images.to_model(photo, spec.height, spec.width) for photo in photos])


def toy(path: Path, index: int, op: str = "Gather") -> Artifact:
    """A file that keeps the contract on paper: it returns channel ``index`` of the image, if ``op`` is Gather."""
    spec = ModelSpec(name="toy", height=16, width=32)
    graph = helper.make_graph(
        [helper.make_node(op, ["image", "index"], ["probability"], axis=3)],
        "toy",
        [helper.make_tensor_value_info("image", TensorProto.UINT8, ["N", 16, 32, 3])],
        [helper.make_tensor_value_info("probability", TensorProto.UINT8, ["N", 16, 32])],
        [helper.make_tensor("index", TensorProto.INT64, [], [index])],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
    helper.set_model_props(model, {SPEC_KEY: spec.to_json()})
    onnx.save(model, path)
    return open_artifact(path)


def difference(a: np.ndarray, b: np.ndarray) -> int:
    return int(np.abs(a.astype(int) - b).max())


@pytest.mark.parametrize("count", [1, 3])
def test_a_batch_of_bytes_gives_as_many_maps_of_bytes(engine: Engine, batch: np.ndarray, count: int) -> None:
    result = engine.run(batch[:count])
    assert result.shape == (count, engine.spec.height, engine.spec.width)
    assert result.dtype == np.uint8


def test_a_batch_gives_what_its_photos_give_one_by_one(engine: Engine, batch: np.ndarray) -> None:
    together = engine.run(batch)
    for photo, result in zip(batch, together, strict=True):
        # Kernels may tile a batch otherwise; what rounds to another byte may do so by one.
        assert difference(engine.run(photo[None])[0], result) <= 1
    assert difference(together[0], together[1]) > 50  # or the comparison above says nothing


def test_the_graph_gets_the_bytes_in_the_order_of_rgb(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 16, 32, 3), dtype=np.uint8)
    for channel in range(3):
        with load_engine(toy(tmp_path / "toy.onnx", channel), threads=1) as engine:
            np.testing.assert_array_equal(engine.run(pixels), pixels[..., channel])


def test_memory_layout_does_not_matter(engine: Engine, batch: np.ndarray) -> None:
    strided = np.asfortranarray(batch)
    assert not strided.flags.c_contiguous
    np.testing.assert_array_equal(engine.run(strided), engine.run(batch))


def test_the_input_is_left_as_it_was(engine: Engine, batch: np.ndarray) -> None:
    before = batch.copy()
    engine.run(batch)
    np.testing.assert_array_equal(batch, before)


def test_results_are_the_callers_own(engine: Engine, batch: np.ndarray) -> None:
    first = engine.run(batch[:1])
    kept = first.copy()
    engine.run(255 - batch[:1])
    np.testing.assert_array_equal(first, kept)
    first[:] = 7
    np.testing.assert_array_equal(engine.run(batch[:1]), kept)


def test_a_batch_that_does_not_fit_is_refused_with_both_shapes(engine: Engine) -> None:
    h, w = engine.spec.height, engine.spec.width
    wrong: list[np.ndarray] = [
        np.zeros((1, h, w, 3), np.float32),
        np.zeros((1, h, w, 3), np.int8),
        np.zeros((h, w, 3), np.uint8),
        np.zeros((0, h, w, 3), np.uint8),
        np.zeros((1, h, w, 4), np.uint8),
        np.zeros((1, 3, h, w), np.uint8),
        np.zeros((1, h + 16, w, 3), np.uint8),
        np.zeros((1, h, w - 1, 3), np.uint8),
    ]
    for batch in wrong:
        with pytest.raises(ModelError) as caught:
            engine.run(batch)
        assert f"{batch.dtype} {list(batch.shape)}" in str(caught.value)
        assert f"uint8 [N, {h}, {w}, 3] is expected" in str(caught.value)


def test_eight_threads_get_what_one_gets(engine: Engine, batch: np.ndarray) -> None:
    alone = [engine.run(batch[i : i + 1]) for i in range(3)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: engine.run(batch[i % 3 : i % 3 + 1]), range(24)))
    for i, result in enumerate(results):
        assert difference(result, alone[i % 3]) <= 1


def test_a_closed_engine_says_so_and_may_be_closed_again(tmp_path: Path) -> None:
    engine = load_engine(toy(tmp_path / "toy.onnx", 0), threads=1)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(np.zeros((1, 16, 32, 3), np.uint8))


def test_leaving_the_context_closes(tmp_path: Path) -> None:
    engine = load_engine(toy(tmp_path / "toy.onnx", 0), threads=1)
    with engine as entered:
        assert entered is engine
    with pytest.raises(EngineError, match="closed"):
        engine.run(np.zeros((1, 16, 32, 3), np.uint8))


def test_an_error_inside_the_context_closes_it_and_goes_on(tmp_path: Path) -> None:
    engine = load_engine(toy(tmp_path / "toy.onnx", 0), threads=1)
    with pytest.raises(ModelError), engine:
        engine.run(np.zeros((1, 1, 1, 3), np.uint8))
    with pytest.raises(EngineError, match="closed"):
        engine.run(np.zeros((1, 16, 32, 3), np.uint8))


def test_an_engine_says_what_is_really_running(engine: Engine) -> None:
    info = engine.describe()
    assert info.name in ENGINES
    assert info.version == onnxruntime.__version__
    assert (info.device, info.provider, info.precision, info.threads) == ("cpu", "CPUExecutionProvider", "f32", 1)


def test_by_default_it_uses_the_cpus_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6}, raising=False)
    with load_engine(toy(tmp_path / "toy.onnx", 0)) as engine:
        assert engine.describe().threads == 3


@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(artifact: Artifact, threads: int) -> None:
    with pytest.raises(EngineError, match=f"threads is {threads}"):
        load_engine(artifact, threads=threads)


def test_a_backend_asked_for_by_name_is_the_one_that_runs(artifact: Artifact) -> None:
    for name in ENGINES:
        with load_engine(artifact, name, threads=1) as engine:
            assert engine.describe().name == name


def test_an_unknown_backend_is_answered_with_those_there_are(artifact: Artifact) -> None:
    with pytest.raises(EngineError, match="abacus") as caught:
        load_engine(artifact, "abacus")
    assert all(name in str(caught.value) for name in ("auto", *ENGINES))


@pytest.mark.parametrize("backend", ["auto", "onnxruntime"])
def test_a_missing_engine_says_what_to_install(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    monkeypatch.delitem(sys.modules, ENGINE_MODULE, raising=False)
    with pytest.raises(EngineMissing, match=r"pip install 'petseg\[cpu\]'"):
        load_engine(artifact, backend)


def test_an_engine_that_is_installed_but_broken_is_an_error_of_ours(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "onnxruntime.py").write_text("raise ImportError('libgomp.so.1: cannot open\\nshared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "onnxruntime")
    monkeypatch.delitem(sys.modules, ENGINE_MODULE, raising=False)
    with pytest.raises(EngineError, match="cannot open shared object") as caught:
        load_engine(artifact)
    assert not isinstance(caught.value, EngineMissing)


def test_a_module_of_ours_that_is_missing_is_not_taken_for_a_missing_engine(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, ENGINE_MODULE, None)
    with pytest.raises(ModuleNotFoundError, match="petseg_runtime"):
        load_engine(artifact)


def test_a_graph_that_no_engine_can_load_is_an_engine_error_that_names_the_file(tmp_path: Path) -> None:
    artifact = toy(tmp_path / "toy.onnx", 0, op="Nonsense")
    with pytest.raises(EngineError) as caught:
        load_engine(artifact, threads=1)
    assert str(caught.value).startswith(f"{tmp_path / 'toy.onnx'}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_graph_that_fails_while_running_is_an_engine_error(tmp_path: Path) -> None:
    engine = load_engine(toy(tmp_path / "toy.onnx", 7), threads=1)  # there is no channel 7
    with engine, pytest.raises(EngineError, match="failed"):
        engine.run(np.zeros((1, 16, 32, 3), np.uint8))
