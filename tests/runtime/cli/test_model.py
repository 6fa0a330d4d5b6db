"""``petseg info`` and ``petseg verify``: describe a model, and compare it with its checkpoint on this machine."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import onnx
import pytest

from command_line import CHELSEA, IN_ONNXRUNTIME, files, tampered, uninstall
from petseg.cli import run
from petseg_runtime import default_model, host, onnx_metadata, parity
from petseg_runtime.artifact import PROVENANCE_KEY, RECEIPT_KEY, Artifact, open_artifact
from petseg_runtime.engines import onnxruntime, registry
from petseg_runtime.engines.base import Engine
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.errors import EngineError
from petseg_runtime.extras import install
from petseg_runtime.parity import Proof, proof_of
from petseg_runtime.verify import sidecar_of

Toy: TypeAlias = Callable[..., Any]


@pytest.mark.parametrize("kept", ["edge.onnx", "edge.onnx.parity.npz"])
def test_a_verification_never_overwrites_the_model(
    kept: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("edge.onnx", "edge.onnx.parity.npz"):
        (tmp_path / name).write_bytes(default_model().with_name(name).read_bytes())
    before = (tmp_path / kept).read_bytes()
    assert run(["verify", str(tmp_path / "edge.onnx"), "--output", str(tmp_path / kept)]) == 6
    assert "--output" in capsys.readouterr().err
    assert (tmp_path / kept).read_bytes() == before


@pytest.mark.parametrize("kept", ["toy.xml", "toy.bin", "toy.xml.json", "toy.xml.parity.npz"])
def test_a_verification_never_overwrites_a_part_of_a_compiled_model(
    toy_ir: Artifact, prove: Callable[..., Proof], kept: str, capsys: pytest.CaptureFixture[str]
) -> None:
    proof_of(toy_ir.path).write_bytes(prove(toy_ir.spec).to_bytes())
    before = toy_ir.path.with_name(kept).read_bytes()
    assert run(["verify", str(toy_ir.path), "--output", str(toy_ir.path.with_name(kept))]) == 6
    assert f"{kept}: is part of the model and must not be overwritten" in capsys.readouterr().err
    assert toy_ir.path.with_name(kept).read_bytes() == before


def test_a_verification_never_overwrites_the_given_parity_record(
    proven: Artifact, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = proof_of(proven.path).rename(tmp_path / "kept.npz")
    before = proof.read_bytes()
    assert run(["verify", str(proven.path), "--proof", str(proof), "--output", str(proof)]) == 6
    assert "kept.npz: is part of the model and must not be overwritten" in capsys.readouterr().err
    assert proof.read_bytes() == before


@pytest.mark.parametrize("place", ["/proc/nowhere.json", "."])
def test_an_unwritable_result_is_still_reported(place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", "--output", place]) == 6
    out, err = capsys.readouterr()
    assert "passed" in out
    assert "--output" in err


def test_info_describes_a_model_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(default_model())]) == 0
    out = capsys.readouterr().out
    artifact = open_artifact(default_model())
    for told in (
        str(default_model()),
        artifact.spec.name,
        artifact.identity,
        f"image: uint8 [N, {artifact.spec.height}, {artifact.spec.width}, 3]",
        f"probability: uint8 [N, {artifact.spec.height}, {artifact.spec.width}]",
        f"{artifact.spec.threshold:.2g} for masks, {artifact.spec.cutout_threshold:.2g} for cutouts",
        *(row["summary"] for row in artifact.receipt["rows"]),
    ):
        assert told in out


def test_info_shows_the_rule_for_finding_a_pet(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for share, said in (
        (0.25, "at least 25 % of the pixels with a probability of 0.5 or more reach 0.98, and the mask is not empty"),
        (None, "the mask is not empty (no rule was chosen for this model)"),
    ):
        assert run(["info", str(toy(tmp_path / "toy.onnx", certain_share=share).path)]) == 0
        assert f"a pet is found if  {said}\n" in capsys.readouterr().out


def test_info_json_contains_everything(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(default_model()), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    artifact = open_artifact(default_model())
    assert record["schema_version"] == 1
    assert record["bytes"] == default_model().stat().st_size
    assert record["identity"] == artifact.identity
    assert (record["spec"]["height"], record["spec"]["width"]) == (artifact.spec.height, artifact.spec.width)
    assert (record["provenance"], record["receipt"]) == (artifact.provenance, artifact.receipt)
    assert [tensor["name"] for tensor in record["inputs"] + record["outputs"]] == ["image", "probability"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_info_on_a_file_that_is_not_a_model_exits_with_4(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    garbage = tmp_path / "garbage.onnx"
    garbage.write_bytes(bytes(range(256)) * 20)
    for path in (garbage, CHELSEA, tmp_path, tmp_path / "missing.onnx"):
        assert run(["info", str(path), *options]) == 4
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"petseg: {path}: ")
        assert len(err.splitlines()) == 1


def test_info_on_a_compiled_model_shows_its_target(toy_ir: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(toy_ir.path)]) == 0
    out = capsys.readouterr().out
    weights = toy_ir.path.with_suffix(".bin")
    size = toy_ir.path.stat().st_size + weights.stat().st_size
    for told in (
        f"{toy_ir.path} ({size / 1e6:.1f} MB, openvino, fp32)",
        f"sha256 {toy_ir.identity}",
        "built for  library: openvino",
        "built for  version: 2026.1",
        "16 x 32",
    ):
        assert told in out
    assert "opset" not in out
    assert run(["info", str(toy_ir.path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["format"], record["bytes"], record["opset"]) == ("openvino", size, None)
    assert (record["inputs"], record["outputs"]) == ([], [])
    assert record["environment"] == {"library": "openvino", "version": "2026.1"}
    assert record["identity"] == open_artifact(toy_ir.path.with_suffix(".onnx")).identity


@pytest.mark.parametrize("missing", [".xml.json", ".bin"])
def test_info_on_an_incomplete_compiled_model_exits_with_4(
    toy_ir: Artifact, capsys: pytest.CaptureFixture[str], missing: str
) -> None:
    toy_ir.path.with_suffix(missing).unlink()
    assert run(["info", str(toy_ir.path)]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert f"toy{missing}" in err
    assert len(err.splitlines()) == 1


def test_info_shows_dynamic_size_and_stored_precision(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["info", str(toy(tmp_path / "toy.onnx", dynamic_size=True, precision="fp16").path)]) == 0
    out = capsys.readouterr().out
    assert "stretch to 16 x 32, or any multiples of 16, bilinear" in out
    assert "onnx, fp16, opset 20" in out


def test_verifying_a_matching_file_exits_with_0(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    before = proven.path.read_bytes()
    assert run(["verify", str(proven.path), *IN_ONNXRUNTIME]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    said = dict(line.strip().split("  ", 1) for line in out.splitlines())
    assert said["PASSED"] == f"{proven.path} matches its checkpoint, on 4 photos (a smoke test: a full one needs 16)"
    assert said["model"] == f"sha256 {proven.identity}"
    assert said["machine"].startswith(host.host().cpu.name)
    assert said["engine"].startswith("onnxruntime ")
    assert said["engine"].endswith(", computes in f32: passed")
    assert "maximum 0/255 (limit 1/255), mean 0.0000/255" in said["difference"]
    assert said["masks"] == "IoU minimum 1.0000 (limit 0.999), mean 1.0000"
    assert said["processing"].startswith("passed, 9 photos with Pillow ")
    assert said["result"] == f"in {sidecar_of(proven.path)}"
    assert proven.path.read_bytes() == before, "results on a device are never written into the model"
    assert files(proven.path.parent) == {"toy.onnx", "toy.onnx.parity.npz", "toy.onnx.verified.json"}


def test_verifying_a_differing_file_exits_with_10_and_saves_the_result(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    tampered(proven)
    assert run(["verify", str(proven.path), *IN_ONNXRUNTIME]) == 10
    out, err = capsys.readouterr()
    assert f"FAILED  {proven.path} does NOT match its checkpoint" in out
    assert "computes in f32: FAILED" in out
    lines = err.splitlines()
    assert len(lines) >= 2
    assert all(line.startswith("petseg: f32 in onnxruntime") for line in lines)
    assert any("largest difference" in line and "allowed 1/255" in line and ".png at y" in line for line in lines)
    assert json.loads(sidecar_of(proven.path).read_text(encoding="utf-8"))["passed"] is False
    assert run(["info", str(proven.path)]) == 0
    assert "verified here  smoke, 4 photos, FAILED" in capsys.readouterr().out


def test_json_output_of_verify_is_only_the_receipt(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(proven.path), "--json", *IN_ONNXRUNTIME]) == 0
    good = json.loads(capsys.readouterr().out)
    assert good == json.loads(sidecar_of(proven.path).read_text(encoding="utf-8"))
    of_receipt = "kind passed summary identity proof photos photos_sha256 names reference stored rows scan quantization"
    assert set(good) == {
        *of_receipt.split(),
        *["note", "schema_version", "format", "spec", "files", "date", "petseg", "host", "device", "road", "others"],
    }
    assert (good["schema_version"], good["kind"], good["passed"], good["photos"]) == (3, "smoke", True, 4)
    assert (good["road"]["passed"], len(good["road"]["rows"]), good["road"]["failures"]) == (True, 9, [])
    assert (good["stored"], good["reference"], good["names"][0]) == ("fp32", "numpy", "00.png")
    (row,) = good["rows"]
    assert (row["precision"], row["passed"], row["failures"], row["max_difference"]) == ("f32", True, [], 0)
    tampered(proven)
    assert run(["verify", str(proven.path), "--json", *IN_ONNXRUNTIME]) == 10
    out, err = capsys.readouterr()
    assert json.loads(out)["passed"] is False
    assert err.startswith("petseg: f32 in onnxruntime")


def test_quiet_verify_prints_only_failures(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(proven.path), "-q"]) == 0
    assert capsys.readouterr() == ("", "")
    tampered(proven)
    assert run(["verify", str(proven.path), "-q"]) == 10
    out, err = capsys.readouterr()
    assert out == ""
    assert err


def test_without_a_parity_record_nothing_is_verified_or_written(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    proof_of(proven.path).unlink()
    assert run(["verify", str(proven.path)]) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"petseg: {proof_of(proven.path)}: no such file")
    assert len(err.splitlines()) == 1
    assert files(proven.path.parent) == {"toy.onnx"}


def test_a_damaged_parity_record_exits_with_4(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    path = proof_of(proven.path)
    path.write_bytes(path.read_bytes()[:-99])
    assert run(["verify", str(proven.path)]) == 4
    assert capsys.readouterr().err.startswith(f"petseg: {path}: ")
    assert not sidecar_of(proven.path).exists()


def test_another_models_parity_record_exits_with_4(
    proven: Artifact, prove: Callable[..., Proof], capsys: pytest.CaptureFixture[str]
) -> None:
    other = dataclasses.replace(prove(proven.spec), checkpoint_sha256="ab" * 32)
    proof_of(proven.path).write_bytes(other.to_bytes())
    assert run(["verify", str(proven.path)]) == 4
    assert "another model" in capsys.readouterr().err


def test_the_parity_record_can_be_elsewhere(proven: Artifact, tmp_path: Path) -> None:
    (tmp_path / "far").mkdir()
    proof = proof_of(proven.path).rename(tmp_path / "far" / "proof.npz")
    assert run(["verify", str(proven.path), "-q", "--proof", str(proof)]) == 0
    tampered_proof = tmp_path / "missing.npz"
    assert run(["verify", str(proven.path), "-q", "--proof", str(tampered_proof)]) == 4


def test_the_result_can_be_written_elsewhere(proven: Artifact, tmp_path: Path) -> None:
    result = tmp_path / "results" / "a.json"
    assert run(["verify", str(proven.path), "-q", "--output", str(result)]) == 0
    assert json.loads(result.read_text(encoding="utf-8"))["passed"] is True
    assert not sidecar_of(proven.path).exists()
    assert files(result.parent) == {"a.json"}


def test_a_differing_file_exits_with_10_even_if_the_result_is_unwritable(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    tampered(proven)
    sidecar_of(proven.path).mkdir()
    assert run(["verify", str(proven.path), "-q"]) == 10
    assert f"petseg: {sidecar_of(proven.path)}: cannot be written" in capsys.readouterr().err


def test_without_an_argument_info_describes_the_bundled_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info"]) == 0
    assert open_artifact(default_model()).identity in capsys.readouterr().out


def test_verify_reports_a_skipped_engine(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Otherwise, a script would take exit code 0 as a verification of the GPU."""
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 1)
    monkeypatch.setattr(registry, "RULE", [line for line in registry.RULE if line.engine == "onnxruntime"])
    load = onnxruntime.load

    def broken(artifact: Artifact, options: Any) -> Any:
        if options.device.kind == "cuda":
            raise EngineError("cuda is broken")
        return load(artifact, options)

    monkeypatch.setattr(onnxruntime, "load", broken)
    assert run(["verify", str(proven.path), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == "petseg: cuda is broken\n"
    assert [row["notes"] for row in json.loads(out)["rows"]] == [["cuda is broken"]]


def test_a_file_that_contradicts_its_receipt_exits_with_4(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    """Weights with a lost flash page: the model loads and runs, but finds nothing."""
    metadata = onnx_metadata.read(proven.path).metadata
    receipt = json.dumps({"identity": proven.identity, "rows": []})
    proven.path.write_bytes(onnx_metadata.with_metadata(proven.path.read_bytes(), {**metadata, RECEIPT_KEY: receipt}))
    assert open_artifact(proven.path).identity == proven.identity
    data = bytearray(proven.path.read_bytes())
    at = data.index(b"toy")  # the graph's name, which no engine checks
    data[at : at + 3] = b"lot"
    proven.path.write_bytes(data)
    for command in (["info"], ["verify"], ["infer", "cat.jpg", "--model"]):
        assert run([*command, str(proven.path)]) == 4
        assert f"petseg: {proven.path}: damaged, or changed since" in capsys.readouterr().err


def test_a_parity_record_of_another_export_exits_with_4_unless_given_explicitly(
    proven: Artifact, prove: Callable[..., Proof], capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = onnx_metadata.read(proven.path).metadata
    receipt = json.dumps({"proof": prove(proven.spec, 7).identity})
    proven.path.write_bytes(onnx_metadata.with_metadata(proven.path.read_bytes(), {**metadata, RECEIPT_KEY: receipt}))
    assert run(["verify", str(proven.path), "-q"]) == 4
    assert "not the parity record that toy.onnx was exported with" in capsys.readouterr().err
    assert run(["verify", str(proven.path), "-q", "--proof", str(proof_of(proven.path))]) == 0
    proof_of(proven.path).write_bytes(prove(proven.spec, 7).to_bytes())
    assert run(["verify", str(proven.path), "-q"]) == 0


def test_a_models_metadata_is_escaped_on_the_terminal(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = onnx_metadata.read(proven.path).metadata
    spoilt = {key: text.replace("toy", "\\u001b[2Jtoy\\nidentity") for key, text in metadata.items()}
    proven.path.write_bytes(onnx_metadata.with_metadata(proven.path.read_bytes(), spoilt))
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "\\x1b[2Jtoy\\nidentity" in out


def test_names_in_a_models_metadata_are_escaped_on_the_terminal(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    metadata = onnx_metadata.read(proven.path).metadata
    provenance = json.dumps({**json.loads(metadata[PROVENANCE_KEY]), "two\nlines\x1b[2J": "text"})
    proven.path.write_bytes(
        onnx_metadata.with_metadata(proven.path.read_bytes(), metadata | {PROVENANCE_KEY: provenance})
    )
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert "two\\nlines\\x1b[2J  text\n" in out


def test_an_unwritable_result_exits_with_6(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    sidecar_of(proven.path).mkdir()
    assert run(["verify", str(proven.path), "-q"]) == 6
    err = capsys.readouterr().err
    assert err.startswith(f"petseg: {sidecar_of(proven.path)}: cannot be written")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "rows", [[{}], [7], ["passed"], {"a": 1}, "rows", [{"summary": "passed"}]], ids=lambda rows: json.dumps(rows)
)
@pytest.mark.parametrize("where", ["receipt", "verified"])
def test_malformed_receipt_rows_do_not_break_info(
    proven: Artifact, capsys: pytest.CaptureFixture[str], where: str, rows: object
) -> None:
    """Any program may have written them."""
    if where == "receipt":
        model = onnx.load(proven.path)
        onnx.helper.set_model_props(
            model,
            {entry.key: entry.value for entry in model.metadata_props} | {RECEIPT_KEY: json.dumps({"rows": rows})},
        )
        onnx.save(model, proven.path)
    else:
        spec, machine = json.loads(proven.spec.to_json()), dataclasses.asdict(host.host())
        odd = {"identity": proven.identity, "format": "onnx", "spec": spec, "files": {}, "host": machine, "rows": rows}
        sidecar_of(proven.path).write_text(json.dumps({**odd, "schema_version": 3}))
    assert run(["info", str(proven.path)]) in (0, 4)
    out, err = capsys.readouterr()
    assert proven.identity in out or str(proven.path) in err


def test_a_model_with_dynamic_size_and_fixed_batch_is_verified(
    toy: Toy, prove: Callable[..., Proof], tmp_path: Path
) -> None:
    artifact = toy(tmp_path / "toy.onnx", batch=3, dynamic_size=True)
    proof_of(artifact.path).write_bytes(prove(artifact.spec, 5).to_bytes())
    assert run(["verify", str(artifact.path), "-q"]) == 0


def test_a_compiled_model_is_verified_in_its_engine(
    toy_ir: Artifact, prove: Callable[..., Proof], capsys: pytest.CaptureFixture[str]
) -> None:
    proof_of(toy_ir.path).write_bytes(prove(toy_ir.spec).to_bytes())
    assert run(["verify", str(toy_ir.path)]) == 0
    out = capsys.readouterr().out
    assert f"PASSED  {toy_ir.path} matches its checkpoint" in out
    lines = [line for line in out.splitlines() if " engine  " in line]
    assert all("engine  openvino " in line and line.endswith(": passed") for line in lines)
    assert ", computes in f32: " in lines[0]
    assert json.loads(sidecar_of(toy_ir.path).read_text(encoding="utf-8"))["format"] == "openvino"
    assert run(["info", str(toy_ir.path)]) == 0
    assert capsys.readouterr().out.count("verified here") == len(lines) + 1
    shutil.copy(sidecar_of(toy_ir.path), sidecar_of(toy_ir.path.with_suffix(".onnx")))
    assert run(["info", str(toy_ir.path.with_suffix(".onnx"))]) == 0
    assert "of another file" in capsys.readouterr().out, "what one engine did with the IR says nothing of the ONNX"


def test_verify_uses_the_requested_backend(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    for backend in ("onnxruntime", "openvino"):
        assert run(["verify", str(proven.path), "--backend", backend, "--threads", "1", "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert rows
        assert all(row["engine"].startswith(f"{backend} ") for row in rows)


def test_verify_uses_the_requested_device_and_threads(proven: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, ...]] = []

    def load(artifact: Artifact, backend: str, threads: int | None, *, device: str, **more: Any) -> Engine:
        asked.append((backend, threads, device))
        return load_engine(artifact, backend, threads, device=device, **more)

    monkeypatch.setattr(parity, "load_engine", load)
    options = ["--backend", "onnxruntime", "--device", "cpu", "--threads", "3"]
    assert run(["verify", str(proven.path), "-q", *options]) == 0
    assert asked == [("onnxruntime", 3, "cpu")]


@pytest.mark.parametrize("quiet", [False, True])
def test_verify_announces_a_compilation_unless_quiet(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], quiet: bool
) -> None:
    load = onnxruntime.load

    def compiles(artifact: Artifact, options: Any) -> Any:
        if options.tell:
            options.tell("the engine is built, for minutes")
        return load(artifact, options)

    monkeypatch.setattr(onnxruntime, "load", compiles)
    assert run(["verify", str(proven.path), "--backend", "onnxruntime", *(["-q"] if quiet else [])]) == 0
    assert capsys.readouterr().err == ("" if quiet else "petseg: the engine is built, for minutes\n")


@pytest.mark.parametrize(
    ("backend", "said"),
    [
        ("openvino", install("openvino")),
        ("ov", install("openvino")),
        ("abacus", "unknown engine 'abacus'"),
    ],
)
def test_an_unavailable_backend_exits_with_5_without_fallback(
    proven: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    backend: str,
    said: str,
) -> None:
    uninstall("openvino", monkeypatch)
    assert run(["verify", str(proven.path), "--backend", backend]) == 5
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert not sidecar_of(proven.path).exists()


def test_without_an_argument_the_bundled_model_is_verified(capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is written beside it."""
    before = files(default_model().parent)
    assert run(["verify"]) == 0
    out = capsys.readouterr().out
    assert out.strip().startswith(f"PASSED  {default_model()} matches its checkpoint, on 16 photos\n")
    assert "computes in f32: passed" in out
    assert "result  in" not in out
    assert files(default_model().parent) == before


def test_the_bundled_models_result_is_written_only_to_a_given_path(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("petseg_runtime.artifact.default_model", lambda: proven.path)
    before = files(tmp_path)
    assert run(["verify", "-q"]) == 0
    assert files(tmp_path) == before
    assert run(["verify", "-q", "--output", str(tmp_path / "result.json")]) == 0
    assert files(tmp_path) == {*before, "result.json"}
    tampered(proven)
    assert run(["verify", "-q"]) == 10


def test_names_with_control_characters_are_escaped(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    odd = proven.path.with_name("two\nlines.onnx")
    proof_of(proven.path).rename(proof_of(odd))
    proven.path.rename(odd)
    assert run(["verify", str(odd), *IN_ONNXRUNTIME]) == 0
    out = capsys.readouterr().out
    assert "two\\nlines.onnx matches its checkpoint" in out
    assert all("  " in line for line in out.splitlines()), "each line has a name and a text"
