"""An engine takes bytes and gives bytes; what it cannot do it says in one of petseg's own errors."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import sys
import types
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest

from petseg_runtime import images
from petseg_runtime.artifact import Artifact, default_model, open_artifact, sample_photos, sidecar_of
from petseg_runtime.engines.base import Engine, check_batch, in_batches
from petseg_runtime.engines.registry import ENGINES, load_engine
from petseg_runtime.errors import EngineError, EngineMissing, ModelError
from petseg_runtime.spec import ModelSpec

Toy: TypeAlias = Callable[..., Any]

#: The engines that run ONNX files, in the order of `auto`; those that are not installed are skipped with the reason.
BACKENDS = [name for name, entry in ENGINES.items() if "onnx" in entry.formats]


def module_of(backend: str) -> str:
    return ENGINES[backend].loader.partition(":")[0]


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> str:
    """Every engine that runs ONNX files and is installed."""
    name = str(request.param)
    if importlib.util.find_spec(ENGINES[name].module) is None:
        pytest.skip(f"{name} is not installed: pip install 'petseg[{ENGINES[name].extra}]'")
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
    """Three different photos, as the model takes them."""
    spec = artifact.spec
    photos = [images.read(path).pixels for path in sample_photos()[:3]]
    return np.stack([images.to_model(photo, spec.height, spec.width) for photo in photos])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8)


def uninstall(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make an engine look as if it were not installed."""
    monkeypatch.setitem(sys.modules, ENGINES[backend].module, None)
    monkeypatch.delitem(sys.modules, module_of(backend), raising=False)


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


def test_the_graph_gets_the_bytes_in_the_order_of_rgb(backend: str, toy: Toy, tmp_path: Path) -> None:
    pixels = noise(2, 16, 32)
    for channel in range(3):
        with load_engine(toy(tmp_path / "toy.onnx", channel), backend, threads=1) as engine:
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
    ]
    for batch in wrong:
        with pytest.raises(ModelError) as caught:
            engine.run(batch)
        assert f"{batch.dtype} {list(batch.shape)}" in str(caught.value)
        assert f"uint8 [N, {h}, {w}, 3] is expected" in str(caught.value)
    for size in ((h + 16, w), (h, w - 1), (16, 16)):
        with pytest.raises(ModelError, match=f"{h} x {w} only, not {size[0]} x {size[1]}"):
            engine.run(np.zeros((1, *size, 3), np.uint8))


def test_eight_threads_get_what_one_gets(engine: Engine, batch: np.ndarray) -> None:
    alone = [engine.run(batch[i : i + 1]) for i in range(3)]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: engine.run(batch[i % 3 : i % 3 + 1]), range(24)))
    for i, result in enumerate(results):
        assert difference(result, alone[i % 3]) <= 1


def test_a_closed_engine_says_so_and_may_be_closed_again(backend: str, toy: Toy, tmp_path: Path) -> None:
    engine = load_engine(toy(tmp_path / "toy.onnx", 0), backend, threads=1)
    engine.close()
    engine.close()
    with pytest.raises(EngineError, match="closed"):
        engine.run(np.zeros((1, 16, 32, 3), np.uint8))


def test_leaving_the_context_closes(backend: str, toy: Toy, tmp_path: Path) -> None:
    engine = load_engine(toy(tmp_path / "toy.onnx", 0), backend, threads=1)
    with engine as entered:
        assert entered is engine
    with pytest.raises(EngineError, match="closed"):
        engine.run(np.zeros((1, 16, 32, 3), np.uint8))


def test_an_error_inside_the_context_closes_it_and_goes_on(backend: str, toy: Toy, tmp_path: Path) -> None:
    engine = load_engine(toy(tmp_path / "toy.onnx", 0), backend, threads=1)
    with pytest.raises(ModelError), engine:
        engine.run(np.zeros((1, 1, 1, 3), np.uint8))
    with pytest.raises(EngineError, match="closed"):
        engine.run(np.zeros((1, 16, 32, 3), np.uint8))


def test_an_engine_says_what_is_really_running(engine: Engine, backend: str) -> None:
    info = engine.describe()
    assert (info.name, info.device, info.precision, info.threads) == (backend, "cpu", "f32", 1)
    assert importlib.import_module(ENGINES[backend].module).__version__.startswith(info.version)
    assert len(info.version.split(".")) >= 3
    assert info.provider == {"onnxruntime": "CPUExecutionProvider", "openvino": "CPU plugin"}[backend]


def test_by_default_it_uses_the_cpus_that_this_process_may_use(
    backend: str, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 5, 6}, raising=False)
    with load_engine(toy(tmp_path / "toy.onnx"), backend) as engine:
        assert engine.describe().threads == 3


@pytest.mark.parametrize("threads", [1, 2])
def test_it_uses_as_many_threads_as_it_is_told(backend: str, toy: Toy, tmp_path: Path, threads: int) -> None:
    with load_engine(toy(tmp_path / "toy.onnx"), backend, threads=threads) as engine:
        assert engine.describe().threads == threads
        np.testing.assert_array_equal(engine.run(noise(1, 16, 32)), noise(1, 16, 32)[..., 0])


@pytest.mark.parametrize("threads", [0, -1])
def test_less_than_one_thread_is_refused(artifact: Artifact, backend: str, threads: int) -> None:
    with pytest.raises(EngineError, match=f"threads is {threads}"):
        load_engine(artifact, backend, threads=threads)


# ------------------------------------------------------------------------------------------------ exact or not


def test_exact_is_float32_and_anything_else_is_owned_up_to(backend: str, blur: Toy, tmp_path: Path) -> None:
    """What computes in bf16 rounds otherwise, in a graph whose sums lie close to whole numbers."""
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
def test_what_is_computed_in_follows_from_what_is_stored(
    backend: str, toy: Toy, tmp_path: Path, stored: str, computed: set[str]
) -> None:
    with load_engine(toy(tmp_path / "toy.onnx", precision=stored), backend, 1, exact=True) as engine:
        assert engine.describe().precision in computed


# ------------------------------------------------------------------------------------------------ batch and size


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6, 7])
@pytest.mark.parametrize("free", [False, True])
def test_a_graph_for_three_photos_takes_any_number(
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
def test_batches_are_cut_filled_up_and_put_together_again(count: int, size: int) -> None:
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
    assert (together[count:] == pixels[-1]).all(), "filled up with what is there, not with what is not"


SIZES = [(16, 32), (32, 16), (48, 48), (16, 160), (112, 16)]


def test_a_graph_of_free_size_takes_any_multiples_of_sixteen(backend: str, toy: Toy, tmp_path: Path) -> None:
    with load_engine(toy(tmp_path / "toy.onnx", dynamic_size=True), backend, 1) as engine:
        for count in (1, 3):
            for size in SIZES:
                pixels = noise(count, *size)
                np.testing.assert_array_equal(engine.run(pixels), pixels[..., 0])


def test_results_of_a_graph_of_free_size_are_the_callers_own(backend: str, toy: Toy, tmp_path: Path) -> None:
    with load_engine(toy(tmp_path / "toy.onnx", dynamic_size=True), backend, 1) as engine:
        kept = [engine.run(noise(1, *size)) for size in SIZES]
    for size, result in zip(SIZES, kept, strict=True):
        np.testing.assert_array_equal(result, noise(1, *size)[..., 0])


def test_threads_may_use_a_graph_of_free_size_each_at_its_own(backend: str, toy: Toy, tmp_path: Path) -> None:
    with (
        load_engine(toy(tmp_path / "toy.onnx", dynamic_size=True), backend, 1) as engine,
        ThreadPoolExecutor(4) as pool,
    ):
        work = [noise(1 + index % 2, *SIZES[index % 5]) for index in range(24)]
        for pixels, result in zip(work, pool.map(engine.run, work), strict=True):
            np.testing.assert_array_equal(result, pixels[..., 0])


@pytest.mark.parametrize("size", [(16, 33), (17, 32), (8, 32), (0, 32)])
def test_a_graph_of_free_size_takes_nothing_else(backend: str, toy: Toy, tmp_path: Path, size: tuple[int, int]) -> None:
    with load_engine(toy(tmp_path / "toy.onnx", dynamic_size=True), backend, 1) as engine:
        with pytest.raises(ModelError, match="multiple of 16"):
            engine.run(np.zeros((1, *size, 3), np.uint8))
        with pytest.raises(ModelError, match="uint8"):
            engine.run(np.zeros((1, 16, 32, 3), np.float32))


def test_a_batch_is_checked_against_the_spec_alone() -> None:
    fixed = ModelSpec(name="m", height=16, width=32, batch=3)
    for count in (1, 3, 7):
        check_batch(np.zeros((count, 16, 32, 3), np.uint8), fixed)  # the engine makes batches of three
    with pytest.raises(ModelError, match=r"uint8 \[0, 16, 32, 3\]"):
        check_batch(np.zeros((0, 16, 32, 3), np.uint8), fixed)


# ------------------------------------------------------------------------------------------------ which engine


def test_a_backend_asked_for_by_name_is_the_one_that_runs(artifact: Artifact, backend: str) -> None:
    with load_engine(artifact, backend, threads=1) as engine:
        assert engine.describe().name == backend


def test_an_unknown_backend_is_answered_with_those_there_are(artifact: Artifact) -> None:
    with pytest.raises(EngineError, match="abacus") as caught:
        load_engine(artifact, "abacus")
    assert all(name in str(caught.value) for name in ("auto", *ENGINES))


@pytest.mark.parametrize("name", [name for name in ENGINES if name not in BACKENDS])
def test_a_backend_that_does_not_run_the_format_is_answered_with_those_that_do(artifact: Artifact, name: str) -> None:
    with pytest.raises(EngineError, match=f"{name} does not run onnx files") as caught:
        load_engine(artifact, name)
    assert str(caught.value).startswith(f"{artifact.path}: ")
    assert all(able in str(caught.value) for able in BACKENDS)
    assert not isinstance(caught.value, EngineMissing)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_missing_engine_says_what_to_install(artifact: Artifact, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    uninstall(name, monkeypatch)
    with pytest.raises(EngineMissing, match=rf"{name} is not installed: pip install 'petseg\[{ENGINES[name].extra}\]'"):
        load_engine(artifact, name)


def test_without_any_engine_all_that_would_do_are_named(artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BACKENDS:
        uninstall(name, monkeypatch)
    with pytest.raises(EngineMissing, match="no inference engine for onnx files") as caught:
        load_engine(artifact)
    assert all(f"pip install 'petseg[{ENGINES[name].extra}]'" in str(caught.value) for name in BACKENDS)
    assert "trt" not in str(caught.value)


def test_auto_passes_over_an_engine_that_is_missing(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("openvino")
    artifact = toy(tmp_path / "toy.onnx")
    with load_engine(artifact, threads=1) as engine:
        assert engine.describe().name == "onnxruntime"
    uninstall("onnxruntime", monkeypatch)
    with load_engine(artifact, threads=1) as engine:
        assert engine.describe().name == "openvino"


def test_an_engine_that_is_installed_but_broken_is_an_error_of_ours(
    artifact: Artifact, backend: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    module = ENGINES[backend].module
    (tmp_path / f"{module}.py").write_text("raise ImportError('libgomp.so.1: cannot open\\nshared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delitem(sys.modules, module_of(backend), raising=False)
    with pytest.raises(EngineError, match="cannot open shared object") as caught:
        load_engine(artifact, backend)
    assert not isinstance(caught.value, EngineMissing)
    if backend == BACKENDS[0]:
        with pytest.raises(EngineError, match="cannot open shared object"):
            load_engine(artifact)  # and `auto` does not hide it behind another engine


@pytest.mark.parametrize("name", BACKENDS)
def test_a_module_of_ours_that_is_missing_is_not_taken_for_a_missing_engine(
    artifact: Artifact, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, module_of(name), None)
    with pytest.raises(ModuleNotFoundError, match="petseg_runtime"):
        load_engine(artifact, name)


def test_the_table_of_engines_is_sound() -> None:
    assert next(iter(ENGINES)) == "onnxruntime", "`auto` begins with the embedded default"
    for entry in ENGINES.values():
        where, _, function = entry.loader.partition(":")
        assert importlib.util.find_spec(where) is not None
        assert function == "load"
        assert entry.formats


# ------------------------------------------------------------------------------------------------ what goes wrong


def test_a_graph_that_cannot_be_loaded_is_an_engine_error_that_names_the_file(
    backend: str, toy: Toy, tmp_path: Path
) -> None:
    artifact = toy(tmp_path / "toy.onnx", op="Nonsense")
    with pytest.raises(EngineError) as caught:
        load_engine(artifact, backend, threads=1)
    assert str(caught.value).startswith(f"{tmp_path / 'toy.onnx'}: ")
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_that_is_gone_or_cut_off_is_an_engine_error(backend: str, toy: Toy, tmp_path: Path) -> None:
    artifact = toy(tmp_path / "toy.onnx")
    whole = artifact.path.read_bytes()
    artifact.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(EngineError, match=r"toy\.onnx"):
        load_engine(artifact, backend, threads=1)
    artifact.path.unlink()
    with pytest.raises(EngineError, match=r"toy\.onnx"):
        load_engine(artifact, backend, threads=1)


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
def test_openvino_is_held_to_its_threads(compiled: Artifact, threads: int) -> None:
    engine: Any = load_engine(compiled, threads=threads)
    with engine:
        assert engine._compiled.get_property("INFERENCE_NUM_THREADS") == threads


def test_openvino_runs_its_own_files_and_is_chosen_for_them(compiled: Artifact) -> None:
    for name in ("openvino", "auto"):
        with load_engine(compiled, name, threads=1) as engine:
            assert engine.describe().name == "openvino"
            assert engine.spec == compiled.spec
            np.testing.assert_array_equal(engine.run(noise(3, 16, 32)), noise(3, 16, 32)[..., 0])


@pytest.mark.parametrize("changes", [{"batch": 3}, {"dynamic_size": True}, {"batch": 3, "dynamic_size": True}], ids=str)
def test_openvinos_own_files_keep_batch_and_free_size(
    changes: dict[str, Any], toy: Toy, ir: Toy, tmp_path: Path
) -> None:
    with load_engine(ir(toy(tmp_path / "toy.onnx", **changes)), threads=1) as engine:
        for size in [(16, 32), *([(48, 16)] if "dynamic_size" in changes else [])]:
            for count in (1, 3, 4):
                pixels = noise(count, *size)
                np.testing.assert_array_equal(engine.run(pixels), pixels[..., 0])


@pytest.mark.parametrize("name", [name for name, entry in ENGINES.items() if "openvino" not in entry.formats])
def test_other_engines_do_not_run_openvinos_files(compiled: Artifact, name: str) -> None:
    with pytest.raises(EngineError, match=f"{name} does not run openvino files; what does: openvino"):
        load_engine(compiled, name)


def test_without_openvino_its_files_say_what_to_install(compiled: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    uninstall("openvino", monkeypatch)
    for name in ("auto", "openvino"):
        with pytest.raises(EngineMissing, match=r"pip install 'petseg\[openvino\]'") as caught:
            load_engine(compiled, name)
        assert "cpu" not in str(caught.value)


def test_an_ir_that_openvino_cannot_read_is_an_engine_error_that_names_the_file(compiled: Artifact) -> None:
    """The digests of its sidecar agree, so only OpenVINO can tell."""
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


def test_weights_that_are_cut_off_are_an_engine_error(compiled: Artifact) -> None:
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
    engine._compiled = Broken()
    with pytest.raises(EngineError, match=r"OpenVINO failed \(Exception from src/x.cpp:1: no memory\)"):
        engine.run(noise(1, 16, 32))


@pytest.mark.parametrize(("computed", "exact"), [("bf16", True), ("f16", True), ("f64", False), ("dynamic", False)])
def test_openvino_that_computes_in_what_was_not_asked_for_is_refused(
    compiled: Artifact, computed: str, exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    class Model:
        def get_property(self, name: str) -> Any:
            return types.SimpleNamespace(get_type_name=lambda: computed)

    core = types.SimpleNamespace(compile_model=lambda *args: Model())
    monkeypatch.setattr(openvino, "Core", lambda: core)
    with pytest.raises(EngineError, match=f"computes in {computed}"):
        load_engine(compiled, exact=exact)


@pytest.mark.parametrize(("computed", "name"), [("f32", "f32"), ("f16", "fp16"), ("bf16", "bf16")])
def test_openvino_says_what_it_computes_in_and_in_int8_also_what_the_rest_is(
    computed: str, name: str, toy: Toy, ir: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    files = [ir(toy(tmp_path / f"{stored}.onnx", precision=stored)) for stored in ("fp32", "int8")]

    class Model:
        def get_property(self, name: str) -> Any:
            return types.SimpleNamespace(get_type_name=lambda: computed)

    monkeypatch.setattr(openvino, "Core", lambda: types.SimpleNamespace(compile_model=lambda *args: Model()))
    plain, quantized = (load_engine(file).describe() for file in files)
    assert (plain.precision, plain.provider) == (name, "CPU plugin")
    assert (quantized.precision, quantized.provider) == ("int8", f"CPU plugin, {name} between the int8 layers")


def test_a_closed_openvino_engine_serves_no_thread_that_used_it_before(compiled: Artifact) -> None:
    engine = load_engine(compiled, threads=1)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(engine.run, noise(1, 16, 32)).result()
        engine.close()
        with pytest.raises(EngineError, match="closed"):
            pool.submit(engine.run, noise(1, 16, 32)).result()
