"""OpenVINO IRs: their files, metadata and output, from a new or a given ONNX file, and verified on the device."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import openvino
import pytest
import torch

from petseg.checkpoint import save_checkpoint
from petseg.cli import run
from petseg.reference import torch_run
from petseg_export import OnnxConfig, OpenVINOConfig, export
from petseg_export.openvino import compile_openvino
from petseg_runtime.artifact import RECEIPT_KEY, open_artifact, sidecar_of
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.errors import ModelError, OutputError, ParityTolerance, PetsegError, UsageError
from petseg_runtime.onnx_metadata import with_metadata
from petseg_runtime.parity import Proof, load_proof, proof_of
from petseg_runtime.spec import SPEC_KEY
from petseg_runtime.verify import sidecar_of as verified_of
from petseg_runtime.verify import verify_artifact

PARTS = {"small.xml", "small.bin", "small.xml.json", "small.xml.parity.npz"}


@pytest.fixture(scope="module")
def exported_ir_half(make_export: Any, oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The checkpoint as an IR in fp16. Read only."""
    file = tmp_path_factory.mktemp("exported_ir_half") / "small.xml"
    config = OpenVINOConfig(output=file, data=oxford_root / "images", photos=16, precision="fp16")
    return make_export(config)


@pytest.fixture(params=["exported_ir", "exported_ir_half"])
def variant(request: pytest.FixtureRequest) -> Any:
    """Each of the session's IRs."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def copied(exported_ir: Any, tmp_path: Path) -> Path:
    """A copy of the fp32 IR and its companion files, as on a device."""
    return Path(shutil.copytree(exported_ir.file.parent, tmp_path / "device")) / exported_ir.file.name


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


# ------------------------------------------------------------------------------------------------ the files


def test_an_ir_is_four_files_without_the_intermediate_onnx(variant: Any) -> None:
    assert names(variant.file.parent) == PARTS


def test_the_ir_opens_with_the_checkpoints_specification(variant: Any, exported: Any, meta: dict[str, Any]) -> None:
    artifact = open_artifact(variant.file)
    precision = "fp32" if artifact.spec.precision == "fp32" else "fp16"
    spec = json.loads(artifact.spec.to_json())
    assert spec == {**spec, **meta["spec"], "precision": precision}
    assert artifact.format == "openvino"
    assert artifact.onnx is None
    assert artifact.provenance == open_artifact(exported.file).provenance
    assert artifact.identity == open_artifact(exported.file).identity, "the identity is that of the ONNX file"
    assert artifact.receipt == json.loads(json.dumps(variant.receipt.as_dict(), allow_nan=False))
    assert artifact.size == sum((variant.file.with_suffix(suffix)).stat().st_size for suffix in (".xml", ".bin"))
    assert artifact.environment["library"] == "openvino"
    assert openvino.__version__.startswith(artifact.environment["version"])
    assert artifact.environment["precision"] == precision


def test_the_precision_is_that_of_the_stored_weights(exported_ir: Any, exported_ir_half: Any) -> None:
    def kinds(file: Path) -> list[str]:
        constants = [
            op for op in openvino.Core().read_model(file).get_ordered_ops() if op.get_type_name() == "Constant"
        ]
        return [op.get_element_type().get_type_name() for op in constants if len(op.get_output_shape(0)) == 4]

    assert "f16" not in kinds(exported_ir.file)
    assert kinds(exported_ir_half.file).count("f16") >= 30, "the convolutions"
    sizes = [made.file.with_suffix(".bin").stat().st_size for made in (exported_ir, exported_ir_half)]
    assert sizes[1] < 0.55 * sizes[0]


def test_no_file_of_the_ir_contains_a_local_path(variant: Any, checkpoint_file: Path) -> None:
    for name in PARTS:
        data = variant.file.with_name(name).read_bytes()
        for path in (Path(sys.prefix), Path.home(), Path(torch.__file__).parent, checkpoint_file.parent):
            if len(path.parts) > 2:
                assert str(path).encode() not in data
        assert b"source.onnx" not in data
        assert str(variant.file.parent).encode() not in data


# ---------------------------------------------------------------------------------------------------------- output


def test_the_receipt_has_a_float32_row_and_a_default_precision_row(variant: Any) -> None:
    rows = variant.receipt.rows
    assert rows[0].precision == "f32"
    with load_engine(open_artifact(variant.file)) as engine:
        own = engine.describe().precision
    assert [row.precision for row in rows] == (["f32"] if own == "f32" else ["f32", own])
    assert all(row.engine.startswith("openvino") and row.passed for row in rows)
    assert variant.receipt.kind == "full"
    allowed = rows[0].tolerance
    assert allowed.max_difference == (1 if variant.receipt.stored == "fp32" else None)


@pytest.mark.parametrize("count", [1, 5])
def test_the_ir_matches_the_network_at_any_batch_size(
    variant: Any, trained: Any, random_images: Any, count: int
) -> None:
    batch = random_images(count, 32, 32, count)
    with load_engine(open_artifact(variant.file), threads=1, exact=True) as engine:
        got = engine.run(batch)
    want = torch_run(trained.model)(batch)
    assert len(np.unique(want)) > 20
    assert np.abs(got.astype(int) - want).max() <= (1 if variant.receipt.stored == "fp32" else 8)


@pytest.mark.parametrize("size", [(32, 32), (16, 64), (48, 80)])
def test_an_ir_with_dynamic_size_can_be_exported(
    size: tuple[int, int], checkpoint_file: Path, exported_any: Any, trained: Any, random_images: Any, tmp_path: Path
) -> None:
    file = tmp_path / "any.xml"
    assert export(checkpoint_file, OpenVINOConfig(output=file, onnx=exported_any.file, photos=2)).receipt.passed
    batch = random_images(2, *size)
    with load_engine(open_artifact(file), threads=1, exact=True) as engine:
        assert np.abs(engine.run(batch).astype(int) - torch_run(trained.model)(batch)).max() <= 1


def test_weights_beyond_float16_never_become_infinity_silently(
    trained: Any, meta: dict[str, Any], oxford_root: Path, tmp_path: Path, known_graph: None
) -> None:
    """Either the compiler leaves such weights in float32, or the parity test fails: a written file is correct."""
    model = trained.model
    save_checkpoint(tmp_path / "large.safetensors", _too_large(model), meta)
    file = tmp_path / "large.xml"
    config = OpenVINOConfig(output=file, precision="fp16", data=oxford_root / "images")
    try:
        done = export(tmp_path / "large.safetensors", config)
    except ParityTolerance:
        assert names(tmp_path) == {"large.safetensors"}
    else:
        assert done.receipt.passed
        assert done.receipt.rows[0].p99_difference <= 4


def _too_large(model: Any) -> dict[str, torch.Tensor]:
    """Weights of one layer scaled beyond 65504, and the next layer's scaled back: the same function."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name in ("down2.0.weight", "down2.1.running_mean", "down2.1.bias"):
        state[name] *= 1e7
    state["down2.3.weight"] /= 1e7
    return state


# ------------------------------------------------------------------------------------- from a given ONNX file


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_given_onnx_file_is_compiled_unchanged(
    precision: str, checkpoint_file: Path, exported: Any, oxford_root: Path, tmp_path: Path
) -> None:
    """Both from the fp32 file, because fp16 is only how an IR stores weights. Nothing is traced again."""
    file = tmp_path / "out.xml"
    config = OpenVINOConfig(output=file, onnx=exported.file, precision=precision, data=oxford_root / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("petseg_export.build.graph_bytes", None)
        done = export(checkpoint_file, config)
    artifact = open_artifact(file)
    assert done.receipt.passed
    assert artifact.spec == dataclasses.replace(open_artifact(exported.file).spec, precision=precision)
    assert artifact.identity == open_artifact(exported.file).identity
    assert names(tmp_path) == {"out.xml", "out.bin", "out.xml.json", "out.xml.parity.npz"}


def test_a_given_fp16_onnx_file_is_compiled(
    checkpoint_file: Path, exported_half: Any, oxford_root: Path, tmp_path: Path
) -> None:
    config = OpenVINOConfig(
        output=tmp_path / "out.xml", onnx=exported_half.file, precision="fp16", data=oxford_root / "images"
    )
    assert export(checkpoint_file, config).receipt.stored == "fp16"


def test_the_ir_keeps_the_onnx_files_metadata(checkpoint_file: Path, exported: Any, tmp_path: Path) -> None:
    noted = tmp_path / "noted.onnx"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("petseg_export.build.graph_bytes", lambda deployed, spec: exported.file.read_bytes())
        export(checkpoint_file, OnnxConfig(output=noted, name="mine", notes={"measured": 0.9}, photos=1))
    export(checkpoint_file, OpenVINOConfig(output=tmp_path / "out.xml", onnx=noted, name="mine", photos=1))
    artifact = open_artifact(tmp_path / "out.xml")
    assert artifact.spec.name == "mine"
    assert artifact.provenance["measured"] == 0.9


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"height": 64}, "height 64 does not apply"),
        ({"width": 64}, "width 64 does not apply"),
        ({"batch": 4}, "batch 4 does not apply"),
        ({"dynamic_size": True}, "dynamic_size True does not apply"),
        ({"name": "mine"}, "name 'mine' does not apply"),
        ({"notes": {"measured": 1}}, "notes {'measured': 1} does not apply"),
    ],
)
def test_settings_that_contradict_the_onnx_file_are_rejected(
    asked: dict[str, Any], told: str, checkpoint_file: Path, exported: Any, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=r"small\.onnx: the file is compiled unchanged") as caught:
        export(checkpoint_file, OpenVINOConfig(output=tmp_path / "out.xml", onnx=exported.file, **asked))
    assert told in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_settings_that_match_the_onnx_file_are_accepted(checkpoint_file: Path, exported: Any, tmp_path: Path) -> None:
    config = OpenVINOConfig(output=tmp_path / "out.xml", onnx=exported.file, height=32, width=32, photos=1)
    assert export(checkpoint_file, config).receipt.passed


def refused(
    checkpoint: Path, folder: Path, onnx: Path, precision: str = "fp32", error: type[PetsegError] = ModelError
) -> str:
    before = names(folder)
    with pytest.raises(error) as caught:
        export(checkpoint, OpenVINOConfig(output=folder / "out.xml", onnx=onnx, precision=precision))
    assert onnx.name in str(caught.value)
    assert names(folder) == before
    return str(caught.value)


def test_an_onnx_file_of_another_checkpoint_is_rejected(
    trained: Any, meta: dict[str, Any], exported: Any, tmp_path: Path
) -> None:
    save_checkpoint(tmp_path / "other.safetensors", trained.earlier.state_dict(), meta)
    assert "another checkpoint" in refused(tmp_path / "other.safetensors", tmp_path, exported.file)


def test_an_onnx_file_of_another_precision_is_rejected(
    checkpoint_file: Path, exported: Any, exported_half: Any, tmp_path: Path
) -> None:
    assert "the file is fp16, not fp32" in refused(checkpoint_file, tmp_path, exported_half.file, error=UsageError)
    assert "the file is fp32, not int8" in refused(checkpoint_file, tmp_path, exported.file, "int8", UsageError)


def test_a_foreign_onnx_file_is_rejected(
    checkpoint_file: Path, exported: Any, exported_ir: Any, tmp_path: Path
) -> None:
    data = exported.file.read_bytes()
    (tmp_path / "garbage.onnx").write_bytes(b"no protobuf" * 100)
    (tmp_path / "truncated.onnx").write_bytes(data[: len(data) // 2])
    proto = onnx.load_from_string(data)
    del proto.metadata_props[:]
    onnx.save(proto, tmp_path / "foreign.onnx")
    spec = open_artifact(exported.file).spec
    (tmp_path / "unknown.onnx").write_bytes(with_metadata(data, {SPEC_KEY: spec.to_json()}))
    assert "another checkpoint" in refused(checkpoint_file, tmp_path, tmp_path / "unknown.onnx")
    for name in ("garbage.onnx", "truncated.onnx", "foreign.onnx", "none.onnx"):
        refused(checkpoint_file, tmp_path, tmp_path / name)
    assert "an ONNX file is expected, not openvino" in refused(checkpoint_file, tmp_path, exported_ir.file)
    refused(checkpoint_file, tmp_path, checkpoint_file)


def test_an_onnx_file_with_modified_weights_fails(
    checkpoint_file: Path, exported: Any, oxford_root: Path, tmp_path: Path
) -> None:
    """It still names this checkpoint, and has a new receipt.

    With the old receipt, which certifies another graph, it is not even opened.
    """
    proto = onnx.load(exported.file)
    weight = next(tensor for tensor in proto.graph.initializer if tensor.name == "network.head.bias")
    weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) + 0.3, weight.name))
    onnx.save(proto, tmp_path / "changed.onnx")
    with pytest.raises(ModelError, match="not the one that its receipt certifies"):
        open_artifact(tmp_path / "changed.onnx")
    kept = {entry.key: entry.value for entry in proto.metadata_props if entry.key != RECEIPT_KEY}
    onnx.helper.set_model_props(proto, kept)
    onnx.save(proto, tmp_path / "changed.onnx")
    config = OpenVINOConfig(output=tmp_path / "out.xml", onnx=tmp_path / "changed.onnx", data=oxford_root / "images")
    with pytest.raises(ParityTolerance, match="FAILED"):
        export(checkpoint_file, config)
    assert names(tmp_path) == {"changed.onnx"}


def test_a_graph_that_openvino_cannot_read_is_an_error(
    checkpoint_file: Path, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreadable(self: Any, path: Any) -> Any:
        raise RuntimeError("Exception from core.cpp:\n\nno such operator\n")

    monkeypatch.setattr(openvino.Core, "read_model", unreadable)
    with pytest.raises(ModelError, match=r"OpenVINO cannot read the graph .*no such operator"):
        compile_openvino(open_artifact(exported.file), tmp_path / "out.xml", OpenVINOConfig(), lambda *_: None)


@pytest.mark.parametrize("room", [0, 50_000, 300_000])
def test_a_disk_full_while_openvino_writes_is_an_output_error(
    room: int, checkpoint_file: Path, exported: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO's C++ code writes the files, and fails with another exception."""
    honest = openvino.save_model

    def on_a_full_disk(*args: Any, **options: Any) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            honest(*args, **options)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(openvino, "save_model", on_a_full_disk)
    with pytest.raises(OutputError, match=r"out\.xml: cannot be written"):
        export(checkpoint_file, OpenVINOConfig(output=tmp_path / "out.xml", onnx=exported.file))
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------ on the device


def test_verify_accepts_the_ir_and_saves_the_result(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(copied)]) == 0
    out, err = capsys.readouterr()
    assert not err
    assert "engine  openvino " in out
    result = json.loads(verified_of(copied).read_text())
    assert result["passed"] is True
    assert result["photos"] == 16
    assert names(copied.parent) == PARTS | {"small.xml.verified.json"}
    assert open_artifact(copied).receipt["passed"] is True, "the file's receipt has not changed"


def test_verify_runs_without_torch_and_onnx(copied: Path) -> None:
    program = (
        "import sys; from petseg.cli import run; code = run(sys.argv[1:]);"
        "assert not {'torch', 'onnx', 'petseg_export'} & set(sys.modules), 'heavy'; sys.exit(code)"
    )
    command = [sys.executable, "-W", "error", "-c", program, "verify", str(copied), "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def edit_sidecar(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    raw = json.loads(sidecar_of(file).read_text())
    change(raw)
    sidecar_of(file).write_text(json.dumps(raw))


def flip_weights(file: Path) -> None:
    weights = np.frombuffer(file.with_suffix(".bin").read_bytes(), np.float32).copy()
    weights[2000:40000] *= -1
    file.with_suffix(".bin").write_bytes(weights.tobytes())


def of_another_model(file: Path) -> None:
    proof = load_proof(proof_of(file), open_artifact(file).spec, open_artifact(file).provenance["checkpoint_sha256"])
    proof_of(file).write_bytes(dataclasses.replace(proof, checkpoint_sha256="0" * 64).to_bytes())


@pytest.mark.parametrize(
    ("tamper", "told"),
    [
        (flip_weights, "small.bin: not the file that small.xml.json describes"),
        (lambda file: file.write_bytes(file.read_bytes() + b"\n"), "small.xml: not the file that"),
        (lambda file: file.with_suffix(".bin").unlink(), "small.bin: missing"),
        (lambda file: sidecar_of(file).unlink(), "sidecar file small.xml.json is missing"),
        (lambda file: sidecar_of(file).write_text("{"), "small.xml.json: not JSON"),
        (lambda file: edit_sidecar(file, lambda raw: raw.update(format="trt")), "its format is 'trt'"),
        (lambda file: edit_sidecar(file, lambda raw: raw["spec"].update(height=33)), "height is 33"),
        (lambda file: proof_of(file).unlink(), "small.xml.parity.npz: no such file"),
        (
            lambda file: proof_of(file).write_bytes(proof_of(file).read_bytes()[:-500]),
            "parity.npz: not a parity record",
        ),
        (of_another_model, "the parity record of another model"),
    ],
    ids=["weights", "xml", "no bin", "no sidecar", "sidecar", "format", "spec", "no proof", "proof", "foreign proof"],
)
def test_verify_rejects_mismatched_files(
    tamper: Callable[[Path], Any], told: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tamper(copied)
    before = names(copied.parent)
    assert run(["verify", str(copied)]) == 4
    out, err = capsys.readouterr()
    assert told in err
    assert not out
    assert names(copied.parent) == before


def test_verify_detects_weights_changed_together_with_their_digest(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Digests do not protect against someone who recomputes them; the photos do."""
    flip_weights(copied)
    digest = hashlib.sha256(copied.with_suffix(".bin").read_bytes()).hexdigest()
    edit_sidecar(copied, lambda raw: raw["files"].update({".bin": digest}))
    assert run(["verify", str(copied)]) == 10
    assert "FAILED" in capsys.readouterr().out
    assert json.loads(verified_of(copied).read_text())["passed"] is False


def test_verify_detects_a_tampered_parity_record(copied: Path) -> None:
    artifact = open_artifact(copied)
    proof: Proof = load_proof(proof_of(copied), artifact.spec, artifact.provenance["checkpoint_sha256"])
    moved = dataclasses.replace(proof, expected=np.roll(proof.expected, 1, axis=2))
    proof_of(copied).write_bytes(moved.to_bytes())
    with pytest.raises(ModelError, match="not the parity record that"):
        verify_artifact(artifact)
    receipt = verify_artifact(artifact, proof=proof_of(copied))
    assert receipt.passed is False
    assert any("not aligned" in failure for failure in receipt.failures)
