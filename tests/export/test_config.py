"""Export configs: frozen, validated when they are made, and made without torch."""

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
from petseg_export.config import RESERVED
from petseg_runtime.errors import UsageError

CONFIGS = [OnnxConfig, OpenVINOConfig, TensorRTConfig, TensorRTRTXConfig]


@pytest.mark.parametrize("kind", [*CONFIGS, QuantizeConfig])
def test_a_config_is_immutable(kind: type) -> None:
    config = kind()
    for field in dataclasses.fields(config):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, field.name, None)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_setting_unknown_to_a_format_cannot_be_passed(kind: type) -> None:
    every = {field.name for other in CONFIGS for field in dataclasses.fields(other)} | {"opset", "workspace"}
    for knob in every - {field.name for field in dataclasses.fields(kind)}:
        with pytest.raises(TypeError, match=knob):
            kind(**{knob: None})


def test_each_format_has_its_specific_settings() -> None:
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
def test_every_setting_has_a_description(kind: type) -> None:
    with pytest.raises(TypeError):
        kind(Path("out"))


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"precision": "bf16"}, "'bf16'; choose from fp32, fp16, int8"),
        ({"height": 33}, "height is 33; it must be a positive multiple of 16"),
        ({"height": 0}, "height is 0"),
        ({"height": 32.0}, "height is 32.0"),
        ({"width": -16}, "width is -16"),
        ({"width": 8}, "width is 8"),
        ({"width": "64"}, "width is '64'"),
        ({"batch": -1}, "batch is -1"),
        ({"batch": True}, "batch is True"),
        ({"dynamic_size": 1}, "dynamic_size is 1; True or False"),
        ({"photos": 0}, "photos of the parity test is 0; an integer, 1 or more"),
        ({"photos": 2.5}, "photos of the parity test is 2.5"),
        ({"threads": 0}, "threads is 0"),
        ({"backends": ()}, "at least one engine"),
        ({"backends": "auto"}, "backends is 'auto'; a tuple"),
        ({"split": "train"}, "'train'; val or test"),
        ({"precision": ["fp32"]}, "precision is \\['fp32'\\]; choose from"),
        ({"backends": 7}, "backends is 7; a tuple"),
        ({"backends": (7,)}, "backends is \\(7,\\); a tuple"),
        ({"certain_share": "x"}, "certain_share is 'x'; it must be above 0 and at most 1"),
        ({"certain_share": float("nan")}, "certain_share is nan"),
        ({"certain_share": True}, "certain_share is True"),
        ({"certain_share": 0}, "certain_share is 0"),
        ({"certain_share": 1.01}, "certain_share is 1.01"),
        ({"name": 7}, "name is 7; a string"),
        ({"device": None}, "device is None; a string"),
        ({"seed": "x"}, "seed is 'x'; an integer"),
        ({"quantize": 0.5}, "quantize is 0.5; a QuantizeConfig"),
        ({"output": "x.onnx"}, "output is 'x.onnx'; a pathlib.Path"),
        ({"data": 7}, "data is 7; a pathlib.Path"),
        ({"notes": ["measured"]}, "notes are list; a dict"),
        ({"notes": {"measured": Path("x")}}, "notes cannot be written as JSON: .*Path"),
        ({"notes": {"iou": float("nan")}}, "notes cannot be written as JSON: Out of range float"),
        *(({"notes": {key: "mine"}}, f"notes: {key}: reserved") for key in sorted(RESERVED)),
    ],
)
def test_invalid_values_are_usage_errors_that_name_setting_and_value(
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
        ({"budget": "1"}, "budget of int8 is '1'; a number of IoU points"),
        ({"budget": None}, "budget of int8 is None"),
        ({"budget": True}, "budget of int8 is True"),
        ({"data": "pets"}, "data folder of int8 is 'pets'; a pathlib.Path"),
        ({"seed": 0.5}, "seed of int8 is 0.5; an integer"),
        ({"methods": "minmax"}, "calibration methods are 'minmax'; a tuple"),
        ({"methods": 7}, "calibration methods are 7; a tuple"),
        ({"methods": ([],)}, r"calibration methods: \[\]; choose from"),
        ({"methods": ()}, "none"),
        ({"methods": ("minmax", "guess")}, "guess"),
        ({"photos": 0}, "calibration photos of int8 is 0"),
        ({"judges": 0}, "validation photos of int8 is 0"),
        ({"judges": 1.5}, "validation photos of int8 is 1.5"),
    ],
)
def test_invalid_int8_settings_are_rejected(knobs: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        QuantizeConfig(**knobs)


def test_the_smallest_and_largest_values_are_valid() -> None:
    config = TensorRTConfig(certain_share=1, height=16, width=16, photos=1, threads=1, max_batch=1, max_size=(16, 16))
    assert config.certain_share == 1
    assert QuantizeConfig(budget=0, photos=1, judges=1).budget == 0


@pytest.mark.parametrize("kind", [TensorRTConfig, TensorRTRTXConfig])
@pytest.mark.parametrize(
    "knobs",
    [
        {"max_batch": 0},
        *({"max_size": size} for size in ((64, 20), (0, 16), (64,), (), 512, 1.5, "64", ("64", "64"))),
    ],
)
def test_the_largest_batch_and_size_of_an_engine_are_checked(kind: type, knobs: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=re.escape(str(next(iter(knobs.values()))))):
        kind(**knobs)


@pytest.mark.parametrize("odd", ["8", "sm_89", "8.9.1", "", "89"])
def test_an_invalid_compute_capability_is_rejected(odd: str) -> None:
    with pytest.raises(UsageError, match=f"'{odd}': a string such as 8.9"):
        TensorRTRTXConfig(compute_capabilities=("12.0", odd))


@pytest.mark.parametrize("odd", [(8.9,), (None,)])
def test_a_compute_capability_that_is_not_a_string_is_rejected(odd: Any) -> None:
    with pytest.raises(UsageError, match=f"compute capability {odd[0]}: a string such as 8.9"):
        TensorRTRTXConfig(compute_capabilities=odd)


@pytest.mark.parametrize("odd", ["8.9", 8.9, None])
def test_compute_capabilities_that_are_not_a_tuple_are_rejected(odd: Any) -> None:
    with pytest.raises(UsageError, match=re.escape(f"compute_capabilities is {odd!r}; a tuple such as")):
        TensorRTRTXConfig(compute_capabilities=odd)


@pytest.mark.parametrize("kind", [OpenVINOConfig, TensorRTConfig])
def test_an_onnx_file_is_a_path(kind: type) -> None:
    with pytest.raises(UsageError, match=r"onnx is 'x\.onnx'; a pathlib\.Path"):
        kind(onnx="x.onnx")


def test_a_timing_cache_is_a_path() -> None:
    with pytest.raises(UsageError, match=r"timing_cache is 'x'; a pathlib\.Path"):
        TensorRTConfig(timing_cache="x")  # type: ignore[arg-type]


def test_all_names_exported_by_the_package_exist() -> None:
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
