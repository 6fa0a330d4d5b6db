"""What may be asked of an export: frozen, checked where it is written down, and made without torch."""

from __future__ import annotations

import dataclasses
import re
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
from petseg_runtime.errors import UsageError

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
    engine = {"onnx", "max_batch", "max_size"}
    assert own == {
        "OnnxConfig": set(),
        "OpenVINOConfig": {"onnx"},
        "TensorRTConfig": engine | {"timing_cache"},
        "TensorRTRTXConfig": engine | {"compute_capabilities"},
    }


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_knob_is_named(kind: type) -> None:
    with pytest.raises(TypeError):
        kind(Path("out"))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"precision": "bf16"}, "'bf16'; there are fp32, fp16, int8"),
        ({"height": 33}, "height is 33; it must be a positive multiple of 16"),
        ({"height": 0}, "height is 0"),
        ({"height": 32.0}, "height is 32.0"),
        ({"width": -16}, "width is -16"),
        ({"width": 8}, "width is 8"),
        ({"width": "64"}, "width is '64'"),
        ({"batch": -1}, "batch is -1"),
        ({"batch": True}, "batch is True"),
        ({"dynamic_size": 1}, "dynamic_size is 1; True or False"),
        ({"photos": 0}, "photos of the parity test is 0; a whole number, 1 or more"),
        ({"photos": 2.5}, "photos of the parity test is 2.5"),
        ({"threads": 0}, "threads is 0"),
        ({"backends": ()}, "at least one engine"),
        ({"backends": "auto"}, "backends is 'auto'; a tuple"),
        ({"split": "train"}, "'train'; val or test"),
        ({"notes": ["measured"]}, "notes are list; a dict"),
        ({"notes": {"measured": Path("x")}}, "notes are no JSON: .*Path"),
        ({"notes": {"iou": float("nan")}}, "notes are no JSON: Out of range float"),
    ],
)
def test_what_makes_no_sense_is_wrong_usage_and_named_with_its_value(
    kind: type, knobs: dict[str, Any], told: str
) -> None:
    with pytest.raises(UsageError, match=told) as caught:
        kind(**knobs)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"budget": -0.1}, "-0.1"),
        ({"budget": float("nan")}, "nan"),
        ({"budget": float("inf")}, "inf"),
        ({"methods": ()}, "none"),
        ({"methods": ("minmax", "guess")}, "guess"),
        ({"photos": 0}, "calibration photos of int8 is 0"),
        ({"judges": 0}, "photos that judge int8 is 0"),
        ({"judges": 1.5}, "photos that judge int8 is 1.5"),
    ],
)
def test_int8_is_asked_for_sensibly(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        QuantizeConfig(**knobs)


@pytest.mark.parametrize("kind", [TensorRTConfig, TensorRTRTXConfig])
@pytest.mark.parametrize(
    "knobs", [{"max_batch": 0}, {"max_size": (64, 20)}, {"max_size": (0, 16)}, {"max_size": (64,)}, {"max_size": ()}]
)
def test_the_largest_batch_and_size_of_an_engine_are_checked(kind: type, knobs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=re.escape(str(next(iter(knobs.values()))))):
        kind(**knobs)


@pytest.mark.parametrize("odd", ["8", "sm_89", "8.9.1", "", "89"])
def test_what_is_no_compute_capability_is_refused(odd: str) -> None:
    with pytest.raises(UsageError, match=f"'{odd}': one such as 8.9"):
        TensorRTRTXConfig(compute_capabilities=("12.0", odd))


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
