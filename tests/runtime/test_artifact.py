"""A model file is opened only if petseg exported it, it is complete and keeps the contract; errors name the file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import pytest
from onnx import TensorProto, helper
from PIL import Image

from petseg_runtime import artifact as artifacts
from petseg_runtime.artifact import (
    COMPILED,
    PROVENANCE_KEY,
    RECEIPT_KEY,
    Artifact,
    default_model,
    open_artifact,
    sample_photos,
    sidecar_of,
    sidecar_text,
)
from petseg_runtime.errors import ModelError
from petseg_runtime.parity import load_proof, proof_of, spread
from petseg_runtime.spec import SPEC_KEY, ModelSpec

Tensors: TypeAlias = list[tuple[str, int, list[int | str]]]
Make: TypeAlias = Callable[..., Path]

SPEC = ModelSpec(name="toy", height=16, width=32, threshold=0.3, cutout_threshold=0.2)
IMAGE: tuple[str, int, list[int | str]] = ("image", TensorProto.UINT8, ["N", 16, 32, 3])
PROBABILITY: tuple[str, int, list[int | str]] = ("probability", TensorProto.UINT8, ["N", 16, 32])


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Writes an ONNX file that keeps the contract, except for what the test changes."""

    def write(inputs: Tensors | None = None, outputs: Tensors | None = None, **metadata: str | None) -> Path:
        graph = helper.make_graph(
            [helper.make_node("Identity", ["image"], ["probability"])],
            "toy",
            [helper.make_tensor_value_info(*tensor) for tensor in ([IMAGE] if inputs is None else inputs)],
            [helper.make_tensor_value_info(*tensor) for tensor in ([PROBABILITY] if outputs is None else outputs)],
        )
        model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 20)])
        values = {"spec": SPEC.to_json(), "provenance": '{"data": "pets"}', "receipt": '{"passed": true}', **metadata}
        helper.set_model_props(model, {f"petseg.{key}": text for key, text in values.items() if text is not None})
        path = tmp_path / "some model.onnx"
        onnx.save(model, path)
        return path

    return write


def refused(path: Path, named: Path | None = None) -> str:
    """The error message for a file: one line that begins with its path, or with that of the faulty file."""
    with pytest.raises(ModelError) as caught:
        open_artifact(path)
    message = str(caught.value)
    begin = f"{named or path}: "
    assert message.startswith(begin)
    assert len(message.splitlines()) == 1
    return message.removeprefix(begin)


def test_metadata_written_into_a_file_is_read_back(make: Make) -> None:
    path = make()
    artifact = open_artifact(path)
    assert artifact.path == path
    assert artifact.spec == SPEC
    assert artifact.provenance == {"data": "pets"}
    assert artifact.receipt == {"passed": True}
    assert artifact.onnx is not None
    assert artifact.onnx.opset == 20
    assert artifact.onnx.size == artifact.size == path.stat().st_size
    assert artifact.onnx.identity == artifact.identity
    assert (artifact.format, artifact.environment) == ("onnx", {})


def test_a_spec_that_differs_from_the_receipts_is_rejected(make: Make) -> None:
    spec = json.loads(SPEC.to_json())
    assert open_artifact(make(receipt=json.dumps({"spec": {**spec, "of_a_later_version": 1}}))).spec == SPEC
    assert open_artifact(make(receipt=json.dumps({"spec": None}))).spec == SPEC
    told = refused(make(receipt=json.dumps({"spec": {**spec, "threshold": 0.25}})))
    assert told.startswith(
        "its specification is not the one that its receipt certifies (threshold 0.3 instead of 0.25)"
    )
    assert "lacks 'height'" in refused(make(receipt=json.dumps({"spec": {"schema_version": 1, "name": "toy"}})))
    assert "not a JSON object" in refused(make(receipt=json.dumps({"spec": 7})))


def test_an_edited_spec_of_a_compiled_file_is_rejected(openvino: Artifact) -> None:
    spec = json.loads(openvino.spec.to_json())
    sidecar = edited(openvino.path, receipt={"spec": spec})
    assert open_artifact(openvino.path).receipt == {"spec": spec}
    edited(openvino.path, spec={**spec, "threshold": 0.75})
    assert "certifies (threshold 0.75 instead of 0.3)" in refused(openvino.path, sidecar)


def test_provenance_and_receipt_may_be_absent(make: Make) -> None:
    artifact = open_artifact(make(provenance=None, receipt=None))
    assert artifact.provenance == artifact.receipt == {}


def test_the_metadata_keys_match_released_files() -> None:
    assert (SPEC_KEY, PROVENANCE_KEY, RECEIPT_KEY) == ("petseg.spec", "petseg.provenance", "petseg.receipt")


def test_a_foreign_onnx_file_is_reported_as_foreign(make: Make) -> None:
    assert "that petseg did not export" in refused(make(spec=None))


@pytest.mark.parametrize(
    ("broken", "named"),
    [
        pytest.param({"inputs": [("picture", *IMAGE[1:])]}, "picture", id="input-name"),
        pytest.param({"inputs": [IMAGE, ("mean", *IMAGE[1:])]}, "image, mean", id="two-inputs"),
        pytest.param({"inputs": []}, "inputs are none", id="no-input"),
        pytest.param({"inputs": [("image", TensorProto.FLOAT, IMAGE[2])]}, "float32", id="input-dtype"),
        pytest.param({"inputs": [("image", TensorProto.INT8, IMAGE[2])]}, "int8", id="input-signed"),
        pytest.param({"inputs": [(*IMAGE[:2], ["N", 3, 16, 32])]}, "3, 16, 32", id="input-channels-first"),
        pytest.param({"inputs": [(*IMAGE[:2], ["N", 32, 16, 3])]}, "32, 16, 3", id="input-turned"),
        pytest.param({"inputs": [(*IMAGE[:2], ["N", 16, 32, 4])]}, "16, 32, 4", id="input-four-channels"),
        pytest.param({"inputs": [(*IMAGE[:2], [16, 32, 3])]}, "16, 32, 3", id="input-without-batch"),
        pytest.param({"inputs": [(*IMAGE[:2], ["N", "H", "W", 3])]}, "H", id="input-dynamic"),
        pytest.param({"outputs": [("mask", *PROBABILITY[1:])]}, "mask", id="output-name"),
        pytest.param({"outputs": [PROBABILITY, ("logits", *PROBABILITY[1:])]}, "logits", id="two-outputs"),
        pytest.param({"outputs": []}, "outputs are none", id="no-output"),
        pytest.param({"outputs": [("probability", TensorProto.FLOAT, PROBABILITY[2])]}, "float32", id="output-dtype"),
        pytest.param({"outputs": [(*PROBABILITY[:2], ["N", 16, 16])]}, "16, 16", id="output-size"),
        pytest.param({"outputs": [(*PROBABILITY[:2], ["N", 1, 16, 32])]}, "1, 16, 32", id="output-channel"),
    ],
)
def test_a_graph_that_violates_the_contract_is_rejected_with_details(
    make: Make, broken: dict[str, Tensors], named: str
) -> None:
    message = refused(make(**broken))
    assert named in message
    assert "expected" in message
    assert ("output" if "outputs" in broken else "input") in message


@pytest.mark.parametrize("key", ["spec", "provenance", "receipt"])
@pytest.mark.parametrize(
    "text", ["", "{", "[1]", "null", '"text"', "7", "[" * 100_000], ids=lambda text: text[:6] or "empty"
)
def test_damaged_json_is_rejected(make: Make, key: str, text: str) -> None:
    assert "JSON" in refused(make(**{key: text}))


def spec_with(**changes: Any) -> str:
    return json.dumps({**json.loads(SPEC.to_json()), **changes})


def test_a_spec_of_a_newer_schema_says_to_upgrade(make: Make) -> None:
    message = refused(make(spec=spec_with(schema_version=2)))
    assert "schema_version 2" in message
    assert "upgrade" in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"threshold": float("nan")}, "threshold"),
        ({"cutout_threshold": 1}, "cutout_threshold"),
        ({"height": "16"}, "height"),
        ({"height": 17}, "height"),
        ({"resize": "letterbox"}, "letterbox"),
    ],
)
def test_an_invalid_spec_error_names_file_and_field(make: Make, changes: dict[str, Any], named: str) -> None:
    assert named in refused(make(spec=spec_with(**changes)))


def test_a_spec_with_another_size_than_the_graph_is_rejected(make: Make) -> None:
    assert "[N, 16, 48, 3] is expected" in refused(make(spec=spec_with(width=48)))


def free(*dimensions: int | str) -> dict[str, Tensors]:
    """The contract's tensors, with these for N, H and W."""
    return {"inputs": [(*IMAGE[:2], [*dimensions, 3])], "outputs": [(*PROBABILITY[:2], [*dimensions])]}


FREE, BATCH, BOTH = {"dynamic_size": True}, {"batch": 3}, {"dynamic_size": True, "batch": 3}


@pytest.mark.parametrize(
    ("changes", "graph"),
    [({}, ("N", 16, 32)), (FREE, ("N", "H", "W")), (BATCH, (3, 16, 32)), (BOTH, (3, "H", "W"))],
    ids=str,
)
def test_a_graph_may_have_the_dynamic_axes_of_its_spec(
    make: Make, changes: dict[str, Any], graph: tuple[int | str, ...]
) -> None:
    spec = open_artifact(make(spec=spec_with(**changes), **free(*graph))).spec
    assert spec == dataclasses.replace(SPEC, **changes)


@pytest.mark.parametrize("names", [("batch", "height", "width"), ("s0", "16*h", "16*w"), ("", "", "")])
def test_dynamic_axes_may_have_any_name(make: Make, names: tuple[str, ...]) -> None:
    assert open_artifact(make(spec=spec_with(dynamic_size=True), **free(*names))).spec.dynamic_size


@pytest.mark.parametrize(
    ("changes", "graph", "expected"),
    [
        ({}, ("N", "H", "W"), "[N, 16, 32, 3]"),
        ({}, ("N", 16, "W"), "[N, 16, 32, 3]"),
        ({}, ("N", "H", 32), "[N, 16, 32, 3]"),
        ({}, (1, 16, 32), "[N, 16, 32, 3]"),
        ({}, (3, 16, 32), "[N, 16, 32, 3]"),
        (FREE, ("N", 16, 32), "[N, H, W, 3]"),
        (FREE, ("N", "H", 32), "[N, H, W, 3]"),
        (FREE, ("N", 16, "W"), "[N, H, W, 3]"),
        (FREE, (1, "H", "W"), "[N, H, W, 3]"),
        (BATCH, ("N", 16, 32), "[3, 16, 32, 3]"),
        (BATCH, (1, 16, 32), "[3, 16, 32, 3]"),
        (BATCH, (4, 16, 32), "[3, 16, 32, 3]"),
        (BATCH, (3, "H", "W"), "[3, 16, 32, 3]"),
        (BOTH, ("N", "H", "W"), "[3, H, W, 3]"),
        (BOTH, (3, 16, 32), "[3, H, W, 3]"),
    ],
    ids=str,
)
def test_a_graph_with_other_dynamic_axes_than_its_spec_is_rejected(
    make: Make, changes: dict[str, Any], graph: tuple[int | str, ...], expected: str
) -> None:
    text = spec_with(**changes)
    message = refused(make(spec=text, **free(*graph)))
    assert message.startswith("input 'image'")
    assert f"uint8 {expected} is expected" in message
    good_input = {"inputs": [(*IMAGE[:2], [*_dimensions(changes), 3])]}
    message = refused(make(spec=text, **{**free(*graph), **good_input}))
    assert message.startswith("output 'probability'")
    assert f"uint8 {expected.removesuffix(', 3]')}] is expected" in message


def _dimensions(changes: dict[str, Any]) -> tuple[int | str, ...]:
    return (changes.get("batch", "N"), *(("H", "W") if "dynamic_size" in changes else (16, 32)))


def test_a_file_that_is_not_onnx_is_rejected(tmp_path: Path) -> None:
    empty, photo, folder = tmp_path / "empty.onnx", tmp_path / "photo.onnx", tmp_path / "folder.onnx"
    empty.touch()
    Image.new("RGB", (8, 8)).save(photo, format="JPEG")
    folder.mkdir()
    for path in (empty, photo, folder, tmp_path / "missing.onnx"):
        assert refused(path)


def test_a_truncated_model_is_rejected(make: Make) -> None:
    path = make()
    path.write_bytes(path.read_bytes()[:-40])
    refused(path)


def test_the_bundled_model_keeps_the_contract() -> None:
    artifact = open_artifact(default_model())
    assert artifact.spec.name
    assert artifact.receipt["passed"] is True
    assert artifact.provenance
    assert artifact.receipt["identity"] == artifact.identity, "or damage would go unnoticed"


def test_the_bundled_parity_record_samples_the_receipts_photos_evenly() -> None:
    """Data sets are ordered: the first sixteen photos are of one breed."""
    artifact = open_artifact(default_model())
    proof = load_proof(proof_of(artifact.path), artifact.spec, artifact.provenance["checkpoint_sha256"])
    names = artifact.receipt["names"]
    assert proof.names == tuple(names[index] for index in spread(len(names), 16))
    assert proof.identity == artifact.receipt["proof"]


def test_the_bundled_samples_are_sorted() -> None:
    photos = sample_photos()
    assert len(photos) >= 3
    assert photos == sorted(photos)
    assert all(photo.is_file() for photo in photos)


# ----------------------------------------------------------------------------------------------- compiled models

IDENTITY = "1d" * 32


def write_compiled(folder: Path, name: str, stem: str = "a model.v2", **changes: Any) -> Artifact:
    """Files that look like a compiled model until an engine loads them, with their sidecar."""
    suffix, others = COMPILED[name]
    path = folder / f"{stem}{suffix}"
    for number, ending in enumerate((suffix, *others)):
        path.with_suffix(ending).write_bytes(bytes([number]) * (100 + number))
    values: dict[str, Any] = {"provenance": {"data": "pets"}, "receipt": {"passed": True, "rows": []}, **changes}
    environment = {"library": name, "targets": ["8.9", "9.0"], "größe": None}
    size = sum(file.stat().st_size for file in folder.iterdir())
    artifact = Artifact(
        path=path, format=name, spec=SPEC, identity=IDENTITY, size=size, onnx=None, environment=environment, **values
    )
    sidecar_of(path).write_text(sidecar_text(artifact), encoding="utf-8")
    return artifact


@pytest.fixture(params=COMPILED)
def compiled(request: pytest.FixtureRequest, tmp_path: Path) -> Artifact:
    return write_compiled(tmp_path, request.param)


@pytest.fixture
def openvino(tmp_path: Path) -> Artifact:
    return write_compiled(tmp_path, "openvino")


def edited(path: Path, *without: str, **changes: Any) -> Path:
    """Change values in a file's sidecar; returns the path of the sidecar."""
    sidecar = sidecar_of(path)
    raw = {**json.loads(sidecar.read_text(encoding="utf-8")), **changes}
    for key in without:
        del raw[key]
    sidecar.write_text(json.dumps(raw), encoding="utf-8")
    return sidecar


def test_a_sidecar_is_read_back(compiled: Artifact) -> None:
    read = open_artifact(compiled.path)
    assert read == compiled
    assert sidecar_text(read) == sidecar_text(compiled)
    assert read.onnx is None
    assert read.identity == IDENTITY
    assert read.spec == SPEC


def test_any_change_of_a_models_files_is_noticed(compiled: Artifact) -> None:
    for file in (compiled.path.with_suffix(suffix) for suffix in (compiled.path.suffix, *COMPILED[compiled.format][1])):
        for change in ("longer", "touched", "gone"):
            read = open_artifact(compiled.path)
            read.check_unchanged()
            content, times = file.read_bytes(), file.stat()
            if change == "longer":
                file.write_bytes(content + b"x")
                os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            elif change == "touched":
                os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns + 1))
            else:
                file.rename(file.with_name("aside"))
            with pytest.raises(ModelError, match="changed while it was loaded: load it again") as caught:
                read.check_unchanged()
            assert str(caught.value).startswith(f"{compiled.path}: ")
            file.write_bytes(content)


def test_a_sidecar_is_found_by_the_full_file_name(compiled: Artifact) -> None:
    sidecar = sidecar_of(compiled.path)
    assert sidecar.name == f"a model.v2{compiled.path.suffix}.json"
    assert sidecar.parent == compiled.path.parent


def test_a_sidecar_is_json_with_a_digest_for_each_file(compiled: Artifact) -> None:
    raw = json.loads(sidecar_text(compiled))
    suffix, others = COMPILED[compiled.format]
    assert set(raw["files"]) == {suffix, *others}
    assert all(len(digest) == 64 for digest in raw["files"].values())
    assert (raw["schema_version"], raw["format"], raw["onnx_identity"]) == (1, compiled.format, IDENTITY)
    assert ModelSpec.from_json(json.dumps(raw["spec"])) == SPEC


def test_a_missing_compiled_file_is_named(tmp_path: Path) -> None:
    for name in ("none.xml", "none.engine"):
        assert refused(tmp_path / name) == "no such file"
    (tmp_path / "folder.xml").mkdir()
    assert refused(tmp_path / "folder.xml") == "no such file"


def test_without_its_sidecar_the_error_says_what_to_copy(compiled: Artifact) -> None:
    sidecar_of(compiled.path).unlink()
    message = refused(compiled.path)
    assert f"sidecar file {sidecar_of(compiled.path).name} is missing" in message
    assert "copy both" in message


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"[" * 200_000, b"1" * 5000, b"{}x", b"\x00", b"\xef\xbb\xbf{}"],
    ids=lambda content: ascii(content[:6]),
)
def test_a_sidecar_that_is_not_json_is_rejected(openvino: Artifact, content: bytes) -> None:
    sidecar_of(openvino.path).write_bytes(content)
    assert "not JSON" in refused(openvino.path, sidecar_of(openvino.path))


@pytest.mark.parametrize("text", ["[]", "null", "7", '"text"', "NaN", '[{"schema_version": 1}]'])
def test_a_sidecar_that_is_not_a_json_object_is_rejected(openvino: Artifact, text: str) -> None:
    sidecar_of(openvino.path).write_text(text)
    assert "not a JSON object" in refused(openvino.path, sidecar_of(openvino.path))


def test_an_oversized_sidecar_is_rejected_unread(openvino: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    sidecar = sidecar_of(openvino.path)
    monkeypatch.setattr(artifacts, "MAX_SIDECAR", sidecar.stat().st_size)
    assert open_artifact(openvino.path) == openvino
    monkeypatch.setattr(artifacts, "MAX_SIDECAR", sidecar.stat().st_size - 1)
    monkeypatch.delattr(Path, "read_text")
    assert "larger than" in refused(openvino.path, sidecar)


@pytest.mark.parametrize("what", ["pipe", "link to a device without an end"])
def test_a_sidecar_that_is_a_pipe_or_device_neither_blocks_nor_is_read_endlessly(openvino: Artifact, what: str) -> None:
    sidecar = sidecar_of(openvino.path)
    sidecar.unlink()
    if what == "pipe":
        os.mkfifo(sidecar)
    else:
        sidecar.symlink_to("/dev/zero")
    assert "not a regular file" in refused(openvino.path, sidecar)


def test_a_folder_as_sidecar_is_rejected(openvino: Artifact) -> None:
    sidecar_of(openvino.path).unlink()
    sidecar_of(openvino.path).mkdir()
    assert "cannot be read" in refused(openvino.path, sidecar_of(openvino.path))


@pytest.mark.parametrize("version", [0, 2, "1", None, [1]])
def test_a_sidecar_with_another_schema_says_to_export_again(openvino: Artifact, version: object) -> None:
    message = refused(openvino.path, edited(openvino.path, schema_version=version))
    assert "another version of petseg: export" in message


@pytest.mark.parametrize("name", ["trt", "trt-rtx", "onnx", "", "OpenVINO", None, 7, [], ["openvino"], {}])
def test_a_format_with_another_suffix_is_rejected(openvino: Artifact, name: object) -> None:
    message = refused(openvino.path, edited(openvino.path, format=name))
    assert "does not belong to a .xml file" in message or "not a sidecar file written by petseg" in message


def test_engine_files_with_the_same_suffix_are_distinguished_by_sidecar(tmp_path: Path) -> None:
    for name in ("trt", "trt-rtx"):
        (tmp_path / name).mkdir()
        assert open_artifact(write_compiled(tmp_path / name, name).path).format == name
    assert refused(
        tmp_path / "trt" / "a model.v2.engine", edited(tmp_path / "trt" / "a model.v2.engine", format="openvino")
    )


@pytest.mark.parametrize("change", [b"\x07", b""], ids=["another", "empty"])
def test_a_file_with_another_digest_is_named(compiled: Artifact, change: bytes) -> None:
    suffix, others = COMPILED[compiled.format]
    for ending in (suffix, *others):
        file = compiled.path.with_suffix(ending)
        before = file.read_bytes()
        file.write_bytes(change and before[:-1] + change)
        message = refused(compiled.path, file)
        assert sidecar_of(compiled.path).name in message
        assert "SHA-256 differs" in message
        file.write_bytes(before)
    assert open_artifact(compiled.path) == compiled


def test_another_models_sidecar_is_detected(tmp_path: Path) -> None:
    one, two = write_compiled(tmp_path, "trt", "one"), write_compiled(tmp_path, "trt", "two")
    two.path.write_bytes(b"another engine")
    sidecar_of(two.path).write_bytes(sidecar_of(one.path).read_bytes())
    assert "SHA-256 differs" in refused(two.path)


@pytest.mark.parametrize("as_folder", [False, True])
def test_missing_weights_are_named(openvino: Artifact, as_folder: bool) -> None:
    weights = openvino.path.with_suffix(".bin")
    weights.unlink()
    if as_folder:
        weights.mkdir()
    assert refused(openvino.path, weights) == f"missing; it belongs to {openvino.path.name}"


def test_a_checkpoint_is_not_taken_for_a_model(tmp_path: Path) -> None:
    path = tmp_path / "best.safetensors"
    with pytest.raises(ModelError, match="no such file"):
        open_artifact(path)
    path.write_bytes(bytes(9))
    with pytest.raises(ModelError, match=r"is a checkpoint; export it first: `petseg export "):
        open_artifact(path)


def test_an_unreadable_file_is_a_model_error(openvino: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def denied(self: Path, *args: Any, **options: Any) -> Any:
        if self.suffix == ".bin":
            raise PermissionError(13, "Permission denied")
        return opened(self, *args, **options)

    monkeypatch.setattr(Path, "open", denied)
    message = refused(openvino.path, openvino.path.with_suffix(".bin"))
    assert message == "cannot be read (Permission denied)"


@pytest.mark.parametrize(
    "key", ["schema_version", "format", "spec", "onnx_identity", "files", "environment", "provenance", "receipt"]
)
def test_a_missing_sidecar_key_is_named(openvino: Artifact, key: str) -> None:
    assert key in refused(openvino.path, edited(openvino.path, key))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[
            (key, value)
            for key in ("files", "environment", "provenance", "receipt")
            for value in (None, 7, "text", [], ["a"], True)
        ],
        *[("onnx_identity", value) for value in (None, 7, ["a"], {})],
        *[("spec", value) for value in (None, 7, "text", [], {}, {"schema_version": 1})],
        ("files", {}),
        ("files", {".xml": None, ".bin": 7}),
    ],
)
def test_a_wrong_type_in_a_sidecar_is_rejected(openvino: Artifact, key: str, value: object) -> None:
    sidecar = edited(openvino.path, **{key: value})
    with pytest.raises(ModelError) as caught:
        open_artifact(openvino.path)
    assert str(caught.value).startswith((f"{sidecar}: ", f"{openvino.path}: "))


def test_a_newer_spec_in_a_sidecar_says_to_upgrade(openvino: Artifact) -> None:
    newer = {**json.loads(SPEC.to_json()), "schema_version": 2}
    message = refused(openvino.path, edited(openvino.path, spec=newer))
    assert "schema_version 2" in message
    assert "upgrade" in message


@pytest.mark.parametrize(
    ("field", "value"), [("precision", "int4"), ("batch", True), ("dynamic_size", 1), ("threshold", float("nan"))]
)
def test_an_invalid_spec_in_a_sidecar_is_named(openvino: Artifact, field: str, value: object) -> None:
    spec = {**json.loads(SPEC.to_json()), field: value}
    assert field in refused(openvino.path, edited(openvino.path, spec=spec))


def test_unknown_keys_of_a_later_minor_version_are_ignored(openvino: Artifact) -> None:
    edited(openvino.path, colour="red")
    assert open_artifact(openvino.path) == openvino
