"""The table of export formats, and requests that are rejected before anything heavy is imported."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest

from petseg_export import (
    ExportConfig,
    OnnxConfig,
    OpenVINOConfig,
    QuantizeConfig,
    TensorRTConfig,
    TensorRTRTXConfig,
    registry,
)
from petseg_export.registry import FORMATS, check, format_of, why_not
from petseg_runtime import host
from petseg_runtime.artifact import COMPILED
from petseg_runtime.engines.registry import ENGINES
from petseg_runtime.errors import (
    EngineError,
    EngineMissing,
    MissingExtra,
    PetsegError,
    UsageError,
)
from petseg_runtime.extras import install
from petseg_runtime.spec import PRECISIONS

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def missing(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Names of packages that appear not to be installed; initially empty."""
    gone: set[str] = set()
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in gone else real(name))
    return gone


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with every package and a GPU."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 1)


# ----------------------------------------------------------------------------------------- the format table


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_matches_what_the_runtime_supports(name: str) -> None:
    form = FORMATS[name]
    assert form.suffix == (COMPILED[name][0] if name in COMPILED else ".onnx")
    assert set(form.precisions) <= set(PRECISIONS)
    assert any(name in entry.formats for entry in ENGINES.values()), "an engine runs it"
    assert (form.compiler is None) == (name == "onnx")
    assert set(form.sources) <= set(form.precisions)
    assert set(form.sources.values()) <= set(FORMATS["onnx"].precisions)
    assert form.help
    assert form.proven


@pytest.mark.parametrize("name", FORMATS)
def test_every_formats_requirements_are_in_an_extra(name: str) -> None:
    extras = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    for need in FORMATS[name].needs:
        assert any(line.startswith(need.module.replace("_", "-")) for line in extras[need.extra])


def test_every_config_maps_to_its_format() -> None:
    assert [format_of(form.config()) for form in FORMATS.values()] == list(FORMATS.items())


def test_a_config_without_format_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="ExportConfig is not the config of a format"):
        format_of(ExportConfig())


# ------------------------------------------------------------------------------------------------ requirements


@pytest.mark.parametrize(
    ("name", "gone", "extra"),
    [
        ("onnx", "torch", "export"),
        ("onnx", "onnxscript", "export"),
        ("openvino", "openvino", "openvino"),
        ("trt", "tensorrt", "trt"),
        ("trt-rtx", "tensorrt_rtx", "rtx"),
        ("trt-rtx", "torch", "export"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    everything: None, missing: set[str], name: str, gone: str, extra: str
) -> None:
    assert why_not(FORMATS[name]) is None
    missing.add(gone)
    reason = why_not(FORMATS[name])
    assert isinstance(reason, MissingExtra)
    assert gone in str(reason)
    assert str(reason).endswith(f": {install(extra)}")
    with pytest.raises(MissingExtra, match=f"{name}: {gone} is not installed"):
        check(FORMATS[name].config())


def test_a_missing_gpu_is_reported_with_two_remedies(everything: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 0)
    with pytest.raises(EngineError, match=r"no NVIDIA GPU here.*export to ONNX here.*or use trt-rtx") as caught:
        check(TensorRTConfig())
    assert not isinstance(caught.value, EngineMissing)
    for config in (OnnxConfig(), OpenVINOConfig(), TensorRTRTXConfig()):
        check(config)
    monkeypatch.setattr(host, "driver_trouble", lambda: "the driver does not start: reboot")
    with pytest.raises(EngineError, match=r"^trt: the driver does not start: reboot; an engine must be built on"):
        check(TensorRTConfig())
    with pytest.raises(EngineError, match=r"^onnx: cuda:0 is not available: the driver does not start: reboot$"):
        check(OnnxConfig(device="cuda"))


@pytest.mark.parametrize("gone", ["cuda", "cuda.bindings"])
@pytest.mark.parametrize("name", ["trt", "trt-rtx"])
def test_an_engine_to_be_run_is_not_built_without_its_runtime_packages(
    everything: None, missing: set[str], name: str, gone: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing.add(gone)
    with pytest.raises(MissingExtra, match=f"{name}: cuda-bindings is not installed.*: pip install cuda-bindings$"):
        check(FORMATS[name].config())
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 0)
    check(TensorRTRTXConfig())  # builds without a GPU, and does not run the engine


@pytest.mark.parametrize(("config", "extras"), [(OnnxConfig, ("cpu", "openvino")), (OpenVINOConfig, ("openvino",))])
def test_without_an_engine_for_the_parity_test_the_error_says_what_to_install(
    missing: set[str], config: type[ExportConfig], extras: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    missing |= {"onnxruntime", "openvino"}
    monkeypatch.setattr(registry, "why_not", lambda form: None)
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 0)
    with pytest.raises(EngineMissing) as caught:
        check(config())
    assert all(install(extra) in str(caught.value) for extra in extras)


def test_one_engine_suffices_for_the_parity_test(missing: set[str]) -> None:
    missing.add("onnxruntime")
    check(OnnxConfig())
    with pytest.raises(EngineMissing, match=re.escape(install("cpu"))):
        check(OnnxConfig(backends=("onnxruntime",)))


@pytest.mark.parametrize(
    "config",
    [
        OnnxConfig(backends=("nonsense",)),
        OnnxConfig(backends=("auto", "pytorch")),
        OpenVINOConfig(backends=("onnxruntime",)),
        TensorRTRTXConfig(backends=("openvino",)),
    ],
)
def test_an_engine_that_does_not_run_the_format_is_rejected_early(config: ExportConfig) -> None:
    said = f"unknown engine {config.backends[-1]!r}|: {config.backends[-1]} does not run .* files; engines that do: "
    with pytest.raises(EngineError, match=said) as caught:
        check(config)
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (OnnxConfig(device="gpu"), "unknown device 'gpu'"),
        (OnnxConfig(device="cpu:1"), "unknown device 'cpu:1'"),
        (OnnxConfig(device="intel-gpu", backends=("onnxruntime",)), "on intel-gpu:0; supported: onnxruntime on cuda"),
        (OpenVINOConfig(device="cuda:1"), "on cuda:1; supported: openvino on cpu.*openvino on intel-gpu"),
        (
            TensorRTRTXConfig(device="cpu"),
            "trt-rtx: tensorrt-rtx cannot run it on cpu; supported: tensorrt-rtx on cuda",
        ),
    ],
)
@pytest.mark.usefixtures("everything")
def test_a_device_that_does_not_run_the_format_is_rejected_early(config: ExportConfig, said: str) -> None:
    with pytest.raises(EngineError, match=said):
        check(config)


@pytest.mark.usefixtures("everything")
def test_an_unknown_compute_capability_is_rejected_early(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by the builder, after the parity test of the graph and minutes of int8."""
    known = types.SimpleNamespace(__members__={"NONE": 0, "SM89": 89, "SM120": 120})
    library = types.SimpleNamespace(__version__="1.7", ComputeCapability=known)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", library)
    check(TensorRTRTXConfig(compute_capabilities=("8.9", "12.0")))
    said = r"TensorRT for RTX 1\.7 cannot build for compute capability 9\.0; it supports 8\.9, 12\.0"
    with pytest.raises(EngineError, match=said):
        check(TensorRTRTXConfig(compute_capabilities=("8.9", "9.0")))


@pytest.mark.usefixtures("everything")
def test_a_device_that_runs_the_format_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    for config in (OnnxConfig(device="cpu"), OnnxConfig(device="cuda:1"), OpenVINOConfig(device="intel-gpu")):
        check(config)
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 0)
    for config in (OnnxConfig(device="cpu"), OpenVINOConfig(device="intel-gpu")):
        check(config)
    with pytest.raises(EngineError, match="trt-rtx: cuda:0 is not available: this machine shows no NVIDIA GPU"):
        check(TensorRTRTXConfig(device="cuda"))


# ----------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize("config", [OnnxConfig, OpenVINOConfig, TensorRTRTXConfig])
def test_int8_needs_labelled_photos(config: type[ExportConfig]) -> None:
    with pytest.raises(UsageError, match="--data"):
        check(config(precision="int8"))
    check(config(precision="int8", data=Path("pets")))
    check(config(precision="int8", quantize=QuantizeConfig(data=Path("pets"))))


def test_an_existing_int8_file_needs_no_labelled_photos() -> None:
    check(OpenVINOConfig(precision="int8", onnx=Path("int8.onnx")))


def test_int8_is_calibrated_in_onnxruntime(missing: set[str]) -> None:
    missing.add("onnxruntime")
    with pytest.raises(MissingExtra, match="calibrated in onnxruntime"):
        check(OnnxConfig(precision="int8", data=Path("pets")))


def test_a_precision_unsupported_by_the_format_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FORMATS, "openvino", dataclasses.replace(FORMATS["openvino"], precisions=("fp32",)))
    with pytest.raises(UsageError, match="openvino supports fp32, not fp16"):
        check(OpenVINOConfig(precision="fp16"))


LIGHT = """
import sys
from petseg_export import OnnxConfig, OpenVINOConfig, TensorRTConfig, TensorRTRTXConfig
from petseg_export.registry import check
from petseg_runtime.errors import PetsegError
check(OnnxConfig())
check(OpenVINOConfig())
for config in (OnnxConfig(precision="int8"), OnnxConfig(backends=("nonsense",))):
    try:
        check(config)
    except PetsegError as error:
        print(error.exit_code)
heavy = {"torch", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt_rtx"} & set(sys.modules)
assert not heavy, heavy
"""


def test_requests_are_checked_without_heavy_imports() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", LIGHT], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(error.exit_code) for error in (UsageError, EngineError)]


def test_every_rejection_is_a_petseg_error() -> None:
    assert issubclass(EngineMissing, PetsegError)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (OnnxConfig(quantize=QuantizeConfig(budget=0.1)), "int8 options .* the precision is fp32"),
        (
            OpenVINOConfig(precision="int8", onnx=Path("x.onnx"), quantize=QuantizeConfig(photos=7)),
            "compiled unchanged",
        ),
        (OnnxConfig(split="test"), "give their folder with --data"),
        (
            OnnxConfig(precision="int8", split="test", quantize=QuantizeConfig(data=Path("pets"))),
            "split test needs labelled photos: give their folder with --data",
        ),
        (TensorRTRTXConfig(batch=1, max_batch=4), "this one has a batch of 1"),
        (TensorRTConfig(max_size=(64, 64)), "--dynamic-size"),
    ],
)
@pytest.mark.usefixtures("everything")
def test_a_setting_without_effect_is_rejected(config: ExportConfig, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check(config)


@pytest.mark.parametrize(
    "config",
    [
        TensorRTRTXConfig(max_batch=4, max_size=(64, 64), dynamic_size=True),
        TensorRTRTXConfig(onnx=Path("x.onnx"), max_batch=4, max_size=(64, 64)),
        OnnxConfig(precision="int8", data=Path("x"), quantize=QuantizeConfig(budget=0.1), split="test"),
    ],
)
@pytest.mark.usefixtures("everything")
def test_a_setting_with_an_effect_is_accepted(config: ExportConfig) -> None:
    check(config)
