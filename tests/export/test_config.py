"""What may be asked of an export: frozen, checked where it is written down, and made without torch."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import petseg_export
from petseg_export import (
    ExportConfig,
    OnnxConfig,
    OpenVINOConfig,
    QuantizeConfig,
    TensorRTConfig,
    TensorRTRTXConfig,
    build,
)
from petseg_runtime.errors import DataError, ModelError

CONFIGS = [OnnxConfig, OpenVINOConfig, TensorRTConfig, TensorRTRTXConfig]


@pytest.mark.parametrize("kind", [*CONFIGS, QuantizeConfig])
def test_a_config_does_not_change(kind: type) -> None:
    config = kind()
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_knob_that_a_format_does_not_have_cannot_be_passed(kind: type) -> None:
    every = {field.name for other in CONFIGS for field in dataclasses.fields(other)} | {"opset", "workspace"}
    for knob in every - {field.name for field in dataclasses.fields(kind)}:
        with pytest.raises(TypeError, match=knob):
            kind(**{knob: None})


def test_which_format_has_which_knobs_of_its_own() -> None:
    common = {field.name for field in dataclasses.fields(ExportConfig)}
    own = {kind.__name__: {field.name for field in dataclasses.fields(kind)} - common for kind in CONFIGS}
    tensorrt = {"onnx", "max_batch", "max_size", "timing_cache"}
    assert own == {
        "OnnxConfig": set(),
        "OpenVINOConfig": {"onnx"},
        "TensorRTConfig": tensorrt,
        "TensorRTRTXConfig": tensorrt | {"compute_capabilities"},
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_knob_is_named(kind: type) -> None:
    with pytest.raises(TypeError):
        kind(Path("out"))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("knobs", "error", "told"),
    [
        ({"precision": "bf16"}, ModelError, "'bf16'; there are fp32, fp16, int8"),
        ({"height": 33}, ModelError, "height is 33; it must be a positive multiple of 16"),
        ({"height": 0}, ModelError, "height is 0"),
        ({"width": -16}, ModelError, "width is -16"),
        ({"width": 8}, ModelError, "width is 8"),
        ({"batch": -1}, ModelError, "batch is -1"),
        ({"photos": 0}, DataError, "at least one photo"),
        ({"backends": ()}, DataError, "one engine"),
        ({"split": "train"}, DataError, "'train'; val or test"),
    ],
)
def test_what_makes_no_sense_is_refused_with_its_value(
    kind: type, knobs: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        kind(**knobs)


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"budget": -0.1}, "-0.1"),
        ({"budget": float("nan")}, "nan"),
        ({"budget": float("inf")}, "inf"),
        ({"methods": ()}, "none"),
        ({"methods": ("minmax", "guess")}, "guess"),
        ({"photos": 0}, "0 calibration photos"),
        ({"judges": 0}, "judged on 0"),
    ],
)
def test_int8_is_asked_for_sensibly(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        QuantizeConfig(**knobs)


@pytest.mark.parametrize("kind", [TensorRTConfig, TensorRTRTXConfig])
@pytest.mark.parametrize("knobs", [{"max_batch": 0}, {"max_size": (64, 20)}, {"max_size": (0, 16)}])
def test_the_largest_batch_and_size_of_an_engine_are_checked(kind: type, knobs: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=str(next(iter(knobs.values()))).replace("(", r"\(").replace(")", r"\)")):
        kind(**knobs)


def test_what_is_exported_from_the_package_is_there() -> None:
    assert len(set(petseg_export.__all__)) == len(petseg_export.__all__)
    for name in petseg_export.__all__:
        assert getattr(petseg_export, name).__name__ == name
    assert {kind.__name__ for kind in CONFIGS} < set(petseg_export.__all__)
    assert petseg_export.export is build.export
    with pytest.raises(AttributeError, match="no attribute 'exportt'"):
        _ = petseg_export.exportt


LAZY = """
import sys
from petseg_export import OnnxConfig, OpenVINOConfig, QuantizeConfig, TensorRTConfig, TensorRTRTXConfig
OnnxConfig(precision="fp16"), TensorRTRTXConfig(compute_capabilities=("8.9",))
heavy = {"torch", "onnx", "onnxscript", "onnxruntime", "openvino", "tensorrt_rtx", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""


def test_a_config_is_made_without_torch() -> None:
    done = subprocess.run([sys.executable, "-W", "error", "-c", LAZY], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
