"""The specification survives a round trip through JSON, and invalid ones are rejected."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from petseg_runtime.errors import ModelError
from petseg_runtime.spec import PRECISIONS, SCHEMA_VERSION, SPEC_KEY, ModelSpec, lowest_pet

GOOD = ModelSpec(
    name="edge",
    height=128,
    width=160,
    threshold=0.4,
    cutout_threshold=0.25,
    border_target=0.5,
    certain_share=0.25,
)
FREE = dataclasses.replace(GOOD, dynamic_size=True)

letters = st.characters(exclude_categories=["Cs"])  # the same as st.text() has, which takes three seconds to begin
texts = st.text(letters)
sizes = st.integers(1, 1000).map(lambda n: 16 * n)
inner = st.floats(0, 1, exclude_min=True, exclude_max=True)
specs = st.builds(
    ModelSpec,
    name=texts,
    height=sizes,
    width=sizes,
    threshold=inner,
    cutout_threshold=inner,
    border_target=st.floats(0, 1),
    certain_share=st.none() | st.floats(0, 1, exclude_min=True),
    dynamic_size=st.booleans(),
    batch=st.integers(0, 10**6),
    precision=st.sampled_from(PRECISIONS),
)
anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | texts | st.sampled_from([10**400, -(10**400)]),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(texts, inside, max_size=3),
    max_leaves=5,
)


def as_dict(**changes: object) -> dict[str, object]:
    return {**json.loads(GOOD.to_json()), **changes}


@settings(deadline=None)
@given(specs)
def test_a_spec_survives_a_round_trip(spec: ModelSpec) -> None:
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_the_json_is_one_ascii_line_with_all_fields_and_version() -> None:
    text = dataclasses.replace(GOOD, name="größe\n猫").to_json()
    assert "\n" not in text
    assert text.isascii()
    assert json.loads(text) == {
        "schema_version": 1,
        "name": "größe\n猫",
        "height": 128,
        "width": 160,
        "resize": "stretch",
        "filter": "bilinear",
        "threshold": 0.4,
        "cutout_threshold": 0.25,
        "border_target": 0.5,
        "certain_share": 0.25,
        "dynamic_size": False,
        "batch": 0,
        "precision": "fp32",
    }
    assert (SPEC_KEY, SCHEMA_VERSION) == ("petseg.spec", 1)  # both are in existing files


def test_the_json_of_equal_specs_is_equal() -> None:
    assert GOOD.to_json() == ModelSpec.from_json(json.dumps(dict(reversed(as_dict().items())))).to_json()


def test_a_spec_is_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GOOD.height = 256  # type: ignore[misc]


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(ModelSpec)])
def test_a_missing_field_is_named(field: str) -> None:
    """Also one with a default: a threshold of 0.5, for one, was not chosen for the model in the file."""
    raw = as_dict()
    del raw[field]
    with pytest.raises(ModelError, match=f"lacks '{field}'"):
        ModelSpec.from_json(json.dumps(raw))


def test_fields_of_a_later_minor_version_are_ignored() -> None:
    assert ModelSpec.from_json(json.dumps(as_dict(colour="red", nested={"a": [1]}))) == GOOD


@pytest.mark.parametrize("version", [0, 2, "1", None, [1], 1.5])
def test_another_schema_version_is_rejected_with_a_remedy(version: object) -> None:
    with pytest.raises(ModelError, match=r"schema_version .*upgrade petseg"):
        ModelSpec.from_json(json.dumps(as_dict(schema_version=version)))


def test_a_spec_without_a_schema_version_is_rejected() -> None:
    raw = as_dict()
    del raw["schema_version"]
    with pytest.raises(ModelError, match="schema_version None"):
        ModelSpec.from_json(json.dumps(raw))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[
            (field, value)
            for field in ("height", "width")
            for value in (0, -16, 8, 17, 24, 16.0, "16", True, None, [16])
        ],
        *[("name", value) for value in (None, 1, ["a"], True)],
        *[("resize", value) for value in ("letterbox", "", None, 1)],
        *[("filter", value) for value in ("nearest", "bicubic", None, 1)],
        *[
            (field, value)
            for field in ("threshold", "cutout_threshold")
            for value in (0, 1, 0.0, 1.0, -0.1, 1.1, math.nan, math.inf, -math.inf, 10**400, "0.5", True, None)
        ],
        *[("border_target", value) for value in (-0.1, 1.1, math.nan, math.inf, 10**400, "0.5", False, None)],
        *[("certain_share", value) for value in (0, -0.1, 1.1, math.nan, math.inf, 10**400, "0.5", True, [])],
        *[("dynamic_size", value) for value in (0, 1, 1.0, "true", "", None, [])],
        *[("batch", value) for value in (-1, 1.0, "1", True, False, None, [1])],
        *[("precision", value) for value in ("", "f32", "FP16", "bf16", "int4", None, 16, ["fp16"])],
    ],
)
def test_a_bad_value_is_rejected_naming_its_field(field: str, value: object) -> None:
    with pytest.raises(ModelError, match=rf"\b{field}\b"):
        ModelSpec.from_json(json.dumps(as_dict(**{field: value})))


@pytest.mark.parametrize(
    ("field", "value"),
    [("height", 0), ("width", 100), ("height", 160.0), ("resize", "letterbox"), ("filter", "nearest")]
    + [(f, v) for f in ("threshold", "cutout_threshold") for v in (0.0, 1.0, math.nan, math.inf, 10**400)]
    + [("border_target", v) for v in (-0.1, 1.1, math.nan, 10**400)]
    + [("certain_share", v) for v in (0, 0.0, 1.1, math.nan, 10**400)]
    + [("dynamic_size", v) for v in (0, 1, None, "no")]
    + [("batch", v) for v in (-1, 2.0, True, False, "1", None)]
    + [("precision", v) for v in ("bf16", "", None, ["fp16"])],
)
def test_a_bad_value_is_rejected_by_the_constructor(field: str, value: object) -> None:
    with pytest.raises(ModelError, match=rf"\b{field}\b"):
        dataclasses.replace(GOOD, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"height": 16, "width": 16},
        {"border_target": 0},
        {"border_target": 1},
        {"border_target": 1.0},
        {"certain_share": None},
        {"certain_share": 1},
        {"certain_share": math.nextafter(0, 1)},
        {"name": ""},
        {"threshold": math.nextafter(0, 1)},
        {"threshold": math.nextafter(1, 0)},
        {"dynamic_size": True, "batch": 1},
        {"batch": 10**9},
        {"precision": "fp16"},
        {"precision": "int8"},
    ],
)
def test_boundary_values_are_accepted(changes: dict[str, object]) -> None:
    spec = ModelSpec.from_json(json.dumps(as_dict(**changes)))
    assert {field: getattr(spec, field) for field in changes} == changes


@pytest.mark.parametrize(
    "text",
    ["", " ", "{", "[]", "null", "1", '"text"', "{]", "[" * 100_000, '{"a":' * 100_000, "1" * 5000, "\x00", "\ufeff{}"],
    ids=lambda text: ascii(text[:8]),
)
def test_json_that_is_not_an_object_is_rejected(text: str) -> None:
    with pytest.raises(ModelError, match="specification is not"):
        ModelSpec.from_json(text)


@settings(deadline=None, max_examples=300)
@given(st.one_of(texts, anything.map(json.dumps)))
def test_garbage_raises_nothing_but_model_errors(text: str) -> None:
    with pytest.raises(ModelError):
        ModelSpec.from_json(text)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from([field.name for field in dataclasses.fields(ModelSpec)]), anything)
def test_garbage_in_one_field_raises_nothing_but_model_errors(field: str, value: object) -> None:
    text = json.dumps(as_dict(**{field: value}))
    try:
        spec = ModelSpec.from_json(text)
    except ModelError:
        return
    assert getattr(spec, field) == value
    if field == "certain_share" and value is None:
        return
    assert type(value) is type(getattr(GOOD, field)) or (type(value) is int and type(getattr(GOOD, field)) is float)


@settings(deadline=None, max_examples=200)
@given(st.data())
def test_a_damaged_spec_raises_nothing_but_model_errors(data: st.DataObject) -> None:
    text = GOOD.to_json()
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    damaged = text[:start] + data.draw(st.text(letters, max_size=3)) + text[end:]
    with contextlib.suppress(ModelError):
        ModelSpec.from_json(damaged)


# ------------------------------------------------------------------------------------------------ another size


@pytest.mark.parametrize("size", [(128, 160), (16, 16), (160, 128), (16, 4096)])
def test_a_dynamic_size_spec_accepts_any_multiple_of_16(size: tuple[int, int]) -> None:
    sized = FREE.sized(*size)
    assert (sized.height, sized.width) == size
    assert dataclasses.replace(sized, height=FREE.height, width=FREE.width) == FREE


@pytest.mark.parametrize(
    ("size", "field"), [((0, 160), "height"), ((128, -16), "width"), ((128, 161), "width"), ((8, 160), "height")]
)
def test_a_dynamic_size_spec_rejects_other_numbers(size: tuple[int, int], field: str) -> None:
    with pytest.raises(ModelError, match=rf"\b{field}\b.* multiple of 16"):
        FREE.sized(*size)


def test_a_fixed_size_spec_rejects_other_sizes_with_a_remedy() -> None:
    assert GOOD.sized(128, 160) == GOOD
    for size in ((160, 128), (128, 176), (0, 0)):
        with pytest.raises(ModelError, match=rf"128 x 160 only, not {size[0]} x {size[1]}: .*--dynamic-size"):
            GOOD.sized(*size)


@given(st.integers(0, 255))
def test_a_threshold_within_rounding_of_a_byte_value_is_that_byte(byte: int) -> None:
    for threshold in (byte / 255, math.nextafter(byte / 255, 0), math.nextafter(byte / 255, 1)):
        assert lowest_pet(threshold) == byte
    if byte < 255:
        assert lowest_pet((byte + 0.001) / 255) == byte + 1
