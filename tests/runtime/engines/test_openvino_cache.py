"""Tests of the cache of models that OpenVINO has compiled: when it is used, and that results stay the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

openvino = pytest.importorskip("openvino", reason="needs OpenVINO: pip install 'petseg[openvino]'")

from petseg_runtime import cache  # noqa: E402
from petseg_runtime.artifact import Artifact, default_model, open_artifact  # noqa: E402
from petseg_runtime.engines import openvino as engine_module  # noqa: E402
from petseg_runtime.engines.base import EngineInfo, EngineOptions  # noqa: E402
from petseg_runtime.engines.openvino import OpenVINOEngine  # noqa: E402
from petseg_runtime.errors import EngineError, ModelError  # noqa: E402


class Core:
    """OpenVINO's core, with its calls counted."""

    def __init__(self) -> None:
        self.real = openvino.Core()
        self.calls: list[str] = []
        self.refuses = False
        self.properties: dict[str, str] = {}

    def get_property(self, where: str, name: str) -> Any:
        return self.properties[str(name)] if str(name) in self.properties else self.real.get_property(where, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def compile_model(self, *args: Any) -> Any:
        self.calls.append("compile")
        return self.real.compile_model(*args)

    def import_model(self, *args: Any) -> Any:
        self.calls.append("import")
        if self.refuses:
            raise RuntimeError("Exception from src/inference\ncannot deserialize")
        return self.real.import_model(*args)


@pytest.fixture
def core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    core = Core()
    monkeypatch.setattr(engine_module, "_core", lambda: core)
    return core


@pytest.fixture(scope="module")
def edge() -> Artifact:
    return open_artifact(default_model())


def answer(artifact: Artifact, **options: Any) -> tuple[bytes, EngineInfo]:
    """An engine's output for noise, and its description."""
    shape = (2, artifact.spec.height, artifact.spec.width, 3)
    photos = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    with OpenVINOEngine(artifact, EngineOptions(**{"threads": 1, **options})) as engine:
        return engine.run(photos).tobytes(), engine.describe()


@pytest.mark.parametrize("exact", [True, False])
def test_a_cached_model_gives_identical_output_and_precision(
    exact: bool, core: Core, edge: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh, again = answer(edge, exact=exact), answer(edge, exact=exact)
    assert core.calls == ["compile", "import"]
    assert fresh == again
    assert fresh[1].notes == again[1].notes == ()
    monkeypatch.setenv(cache.VARIABLE, "")
    assert answer(edge, exact=exact) == fresh
    assert core.calls == ["compile", "import", "compile"]
    if exact:
        assert fresh[1].precision == "f32"


def test_differing_settings_have_separate_cache_entries(core: Core, edge: Artifact) -> None:
    for options in ({"threads": 1}, {"threads": 2}, {"threads": 2, "streams": 2}, {"exact": True}):
        answer(edge, **options)
    assert core.calls == ["compile"] * 4
    assert len(cache.entries()) == 4
    (entry, *_) = cache.entries()
    assert entry.key
    assert (entry.key.model, entry.key.version) == (edge.identity, openvino.__version__)
    assert entry.key.device == f"CPU, {core.get_property('CPU', 'FULL_DEVICE_NAME')}"
    assert entry.key.settings["capabilities"] == sorted(core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"))


def test_another_version_recompiles_with_a_note(core: Core, edge: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = answer(edge)
    real = openvino.__version__
    monkeypatch.setattr(openvino, "__version__", "2099.1-x")
    second, info = answer(edge)
    assert (core.calls, first) == (["compile"] * 2, second)
    (note,) = info.notes
    assert note.startswith("OpenVINO: compiled again in ")
    assert note.endswith(f" s: openvino 2099.1-x instead of {real}")


def test_another_driver_recompiles_with_a_note(core: Core, edge: Artifact) -> None:
    core.properties["GPU_DRIVER_VERSION"] = "25.1"
    first, _ = answer(edge)
    core.properties["GPU_DRIVER_VERSION"] = "26.2"
    second, info = answer(edge)
    assert (core.calls, first) == (["compile"] * 2, second)
    assert info.notes[0].endswith(" s: driver 26.2 instead of 25.1")
    core.properties["DEVICE_ARCHITECTURE"] = "another"
    answer(edge)
    assert (core.calls, len(cache.entries())) == (["compile"] * 3, 3)


def test_a_modified_blob_is_never_passed_to_openvino(core: Core, edge: Artifact) -> None:
    first, _ = answer(edge)
    (entry,) = cache.entries()
    data = bytearray(entry.path.read_bytes())
    data[len(data) // 2] ^= 1
    entry.path.write_bytes(data)
    again, info = answer(edge)
    assert (core.calls, first) == (["compile"] * 2, again)
    assert info.notes[0].endswith(": the cached file's SHA-256 differs")
    assert (answer(edge)[1].notes, core.calls[-1]) == ((), "import")


def test_a_blob_rejected_by_openvino_is_recompiled(core: Core, edge: Artifact) -> None:
    first, _ = answer(edge)
    core.refuses = True
    again, info = answer(edge, notes=("passed over",))
    assert (core.calls, first) == (["compile", "import", "compile"], again)
    assert info.notes[0] == "passed over"
    assert "OpenVINO rejects the cached file (Exception from src/inference cannot deserialize)" in info.notes[1]


def test_an_unusable_cache_is_reported(core: Core, edge: Artifact, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    _, info = answer(edge)
    assert info.notes[0].endswith(" s; not kept: Not a directory")


def test_only_onnx_files_up_to_the_size_limit_are_cached(
    core: Core,
    blur: Callable[[Path], Artifact],
    ir: Callable[[Artifact], Artifact],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    onnx = blur(tmp_path / "blur.onnx")
    answer(ir(onnx))
    monkeypatch.setattr(engine_module, "_SMALL", onnx.size - 1)
    answer(onnx)
    assert cache.entries() == []
    monkeypatch.setattr(engine_module, "_SMALL", onnx.size)
    answer(onnx)
    assert len(cache.entries()) == 1


def test_a_device_without_export_support_is_not_cached(
    core: Core, blur: Callable[[Path], Artifact], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core, "get_property", lambda *_: ["FP32"], raising=False)
    answer(blur(tmp_path / "blur.onnx"))
    assert (core.calls, cache.entries()) == (["compile"], [])


def test_a_file_changed_while_loading_is_not_cached(core: Core, toy: Callable[..., Artifact], tmp_path: Path) -> None:
    artifact = toy(tmp_path / "toy.onnx")
    toy(tmp_path / "toy.onnx", channel=1)
    with pytest.raises(ModelError, match="changed while it was loaded"):
        answer(artifact)
    artifact.path.write_bytes(b"not a graph")
    with pytest.raises(EngineError, match="OpenVINO cannot load it"):
        answer(artifact)
    assert cache.entries() == []
