"""Tests of building TensorRT engines that need no graph: missing and broken libraries, GPUs, and profiles.

Tests that build exported graphs are in tests/export/test_tensorrt.py.
"""

from __future__ import annotations

import dataclasses
import importlib
import platform
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from petseg_runtime import doctor, extras, host
from petseg_runtime.engines import tensorrt_build
from petseg_runtime.engines.tensorrt_build import Profile, build, profile_of, timings_slot
from petseg_runtime.engines.tensorrt_library import RTX, TRT, Library, Record
from petseg_runtime.errors import EngineError, EngineMissing, ModelError
from petseg_runtime.spec import ModelSpec

SPEC = ModelSpec(name="x", height=64, width=48)
GPU = host.Gpu(index=1, name="NVIDIA Fake", compute_capability="8.7", memory=2**33, driver="CUDA 12.6")


def install(monkeypatch: pytest.MonkeyPatch, name: str, **contents: Any) -> None:
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize(("library", "name"), [(TRT, "tensorrt"), (RTX, "tensorrt-rtx")])
def test_a_missing_library_error_names_its_packages(
    library: Library, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(EngineMissing) as caught:
        build(b"", None, library=library)
    message = str(caught.value)
    assert message == f"{name} is not installed: {extras.install(library.extra)}"
    # Both packages by their names: somebody else may have registered "petseg" on the package index.
    assert re.search(rf"pip install 'cuda-bindings[^']*' '{name}>=[0-9.]+'$", message)


@pytest.mark.parametrize(
    "error",
    [
        ModuleNotFoundError("No module named 'tensorrt_bindings'", name="tensorrt_bindings"),
        ImportError("libnvinfer.so.10: cannot open shared object file"),
        OSError("libnvinfer.so.10: cannot open shared object file"),
        RuntimeError("the wheel was not built"),
    ],
)
def test_a_library_that_fails_to_import_gives_the_reason(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise error

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(EngineError, match="tensorrt is installed but cannot be imported") as caught:
        build(b"", None, library=TRT)
    assert str(error) in str(caught.value)
    assert not isinstance(caught.value, EngineMissing)


@pytest.mark.tensorrt
def test_the_gpus_that_the_pages_name_are_those_of_the_library() -> None:
    """If this fails, the library has changed: see what NVIDIA lists now, and correct doctor and both READMEs."""
    members = pytest.importorskip("tensorrt_rtx").ComputeCapability.__members__
    known = {"7.5", "8.0", "8.6", "8.9", "12.0", "12.1"}
    assert {f"{name[2:-1]}.{name[-1]}" for name in members if name.startswith("SM")} == known
    assert {*doctor._RTX_GPUS} == known - {"7.5", "8.0"}


def test_a_placeholder_package_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", __version__="0.0.1")
    with pytest.raises(EngineError, match=r"holds no library \(it is a placeholder\): pip install '.*' 'tensorrt>="):
        build(b"", None, library=TRT)


@pytest.mark.parametrize("version", ["8.6.1", "10.3.0", "10.8.0.43"])
def test_an_old_library_is_rejected(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", __version__=version, Builder=None, OnnxParser=None)
    with pytest.raises(EngineError, match=rf"TensorRT {re.escape(version)} is too old: 10\.9 or newer is needed"):
        build(b"", None, library=TRT)


def test_tensorrt_requires_a_gpu_and_builds_only_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", __version__="10.9.0", Builder=None, OnnxParser=None)
    monkeypatch.setattr(host, "gpus", tuple)
    for ask in (lambda: build(b"", None, library=TRT), timings_slot):
        with pytest.raises(EngineError, match=r"there is no cuda:0 \(found: none\).*tensorrt_rtx"):
            ask()
    with pytest.raises(EngineError, match=r"cannot build for 8\.9 on request"):
        build(b"", None, library=TRT, compute_capabilities=("8.9",))
    monkeypatch.setattr(host, "gpus", lambda: (GPU,))
    with pytest.raises(EngineError, match=r"no cuda:2 \(found: cuda:1 NVIDIA Fake\)"):
        build(b"", None, library=TRT, device=2)
    assert timings_slot(1).key.driver == "CUDA 12.6"


@pytest.mark.parametrize(("driver", "old"), [("CUDA 12.6", True), ("CUDA 13.0", False)])
def test_a_library_failing_with_an_old_driver_gives_a_remedy(
    driver: str, old: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Logger:
        Severity = types.SimpleNamespace(INTERNAL_ERROR=0, ERROR=1, WARNING=2)

    def refuse(logger: Any) -> None:
        logger.log(1, "CUDA initialization failure with error: 35")
        raise TypeError

    install(monkeypatch, "tensorrt", __version__="10.9.0", Builder=refuse, OnnxParser=None, ILogger=Logger)
    monkeypatch.setattr(host, "gpus", lambda: (dataclasses.replace(GPU, driver=driver),))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(EngineError, match=r"does not start \(CUDA initialization failure with error: 35") as caught:
        build(b"", None, library=TRT, device=1)
    assert ("update it to 580" in str(caught.value)) is old
    assert ("pip install tensorrt-cu12 'cuda-bindings<13'" in str(caught.value)) is old


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"minimum": (1, 30, 32, 3)}, r"minimum of the profile is \[1, 30, 32, 3\].* multiples of 16"),
        ({"minimum": (1, 32, 32, 4)}, r"\[N, H, W, 3\] is expected"),
        ({"minimum": (0, 32, 32, 3)}, "minimum of the profile"),
        ({"minimum": (8, 32, 32, 3)}, r"\[8, 32, 32, 3\] to \[4, .*minimum <= optimum <= maximum"),
        ({"optimum": (2, 32, 40, 3)}, r"optimum of the profile is \[2, 32, 40, 3\]"),
        ({"optimum": (2, 80, 32, 3)}, r"best at \[2, 80, 32, 3\]: minimum <= optimum <= maximum"),
        ({"maximum": (4, 70, 64, 3)}, r"maximum of the profile is \[4, 70, 64, 3\]"),
    ],
)
def test_an_invalid_profile_is_rejected(shapes: dict[str, tuple[int, int, int, int]], words: str) -> None:
    valid = {"minimum": (1, 32, 32, 3), "optimum": (2, 32, 32, 3), "maximum": (4, 64, 64, 3)}
    with pytest.raises(ModelError, match=words):
        Profile(**{**valid, **shapes})


def test_a_profile_that_the_library_rejects_is_an_error() -> None:
    """None that passes our own checks is known; a later version may have further ones."""
    record = Record()
    record.errors.append("too many")
    builder = types.SimpleNamespace(
        create_optimization_profile=lambda: types.SimpleNamespace(set_shape=lambda *shapes: None)
    )
    config = types.SimpleNamespace(add_optimization_profile=lambda optimization: -1)
    image = types.SimpleNamespace(shape=(-1, 64, 48, 3))
    with pytest.raises(ModelError, match=r"the library rejects profile \[1, 64, 48, 3\] .* \(too many\)"):
        tensorrt_build._set_profile(builder, config, image, profile_of(SPEC), record)


def test_a_timing_cache_of_another_gpu_is_replaced(tmp_path: Path) -> None:
    """TensorRT for RTX, which takes its place in the other tests, refuses none."""
    offered: list[tuple[bytes, bool]] = []

    def set_timing_cache(cache: bytes, *, ignore_mismatch: bool) -> bool:
        offered.append((cache, ignore_mismatch))
        return cache != b"another GPU's"

    config = types.SimpleNamespace(create_timing_cache=bytes, set_timing_cache=set_timing_cache)
    compiler = tensorrt_build._Compiler(None, TRT, GPU, ())
    place = tmp_path / "timings"
    for kept, messages in (
        (b"own", []),
        (
            b"another GPU's",
            [f"{place}: the timing cache is created again: damaged, or of another GPU or version (rejected)"],
        ),
    ):
        place.write_bytes(kept)
        cache, said = tensorrt_build._timing_cache(compiler, config, place, Record())
        assert (cache, said) == (b"" if messages else kept, messages)
    assert offered == [(b"own", False), (b"another GPU's", False), (b"", False)]


@pytest.mark.parametrize(
    ("spec", "arguments", "shapes"),
    [
        ({"batch": 4}, (), None),
        ({}, (), ((1, 64, 48, 3), (1, 64, 48, 3), (8, 64, 48, 3))),
        ({}, (2,), ((1, 64, 48, 3), (1, 64, 48, 3), (2, 64, 48, 3))),
        ({"dynamic_size": True}, (), ((1, 16, 16, 3), (1, 64, 48, 3), (8, 128, 96, 3))),
        ({"dynamic_size": True, "batch": 2}, (), ((2, 16, 16, 3), (2, 64, 48, 3), (2, 128, 96, 3))),
        ({"dynamic_size": True}, (8, (64, 512)), ((1, 16, 16, 3), (1, 64, 48, 3), (8, 64, 512, 3))),
        ({"dynamic_size": True}, (8, (64, 512), (32, 512)), ((1, 16, 16, 3), (1, 32, 512, 3), (8, 64, 512, 3))),
        ({}, (8, None, (32, 512)), ((1, 64, 48, 3), (1, 64, 48, 3), (8, 64, 48, 3))),
    ],
)
def test_the_profile_follows_from_the_specification(
    spec: dict[str, Any], arguments: tuple[Any, ...], shapes: tuple[tuple[int, ...], ...] | None
) -> None:
    profile = profile_of(ModelSpec(name="x", height=64, width=48, **spec), *arguments)
    assert (profile and (profile.minimum, profile.optimum, profile.maximum)) == shapes


def test_the_line_about_a_missing_driver_is_shown_only_if_there_is_no_other() -> None:
    driver = "Unable to determine GPU memory usage: CUDA driver version is insufficient (cudaError 35)"
    assert tensorrt_build._one_line(f"{driver}\n\n  no such operator\n") == "no such operator"
    assert tensorrt_build._one_line(f"{driver}\n") == driver


def test_layer_types_are_parsed_in_the_format_of_tensorrt_10() -> None:
    tensor = "{ Name: %s, Location: Device, Dimensions: [1,64,8,8], Format/Datatype: %s }"
    text = "\n".join(
        f"Name: {name}, LayerType: {kind}, Inputs: [ {tensor % ('x', reads)}], Outputs: [ {tensor % ('y', writes)}], "
        "ParameterType: Convolution, Weights: { Type: Int8, Count: 9 }, TacticName: sm80"
        for name, kind, reads, writes in (
            (
                "a",
                "CaskConvolution",
                "Thirty-two wide channel vectorized row major Int8 format",
                "Row major linear FP32",
            ),
            ("b", "CaskPooling", "Channel major FP16 format where channel % 8 == 0", "Row major linear FP16 format"),
        )
    )
    assert tensorrt_build._layers(f"Layers:\n{text}\n\nBindings:\nimage") == {
        ("CaskConvolution", "int8", "fp32"): 1,
        ("CaskPooling", "fp16", "fp16"): 1,
    }
