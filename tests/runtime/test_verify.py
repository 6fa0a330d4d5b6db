"""The results of verifications saved beside a model, and which of them are still valid on this device."""

from __future__ import annotations

import dataclasses
import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from command_line import IN_ONNXRUNTIME, tampered
from petseg.cli import run
from petseg_runtime import __version__, host
from petseg_runtime.artifact import Artifact, open_artifact, sidecar_text
from petseg_runtime.artifact import sidecar_of as artifact_sidecar_of
from petseg_runtime.errors import OutputError
from petseg_runtime.parity import Proof, proof_of
from petseg_runtime.verify import MAX_RESULT, save, sidecar_of

Toy: TypeAlias = Callable[..., Any]

L4 = host.Gpu(index=0, name="Stand-in L4", compute_capability="8.9", memory=2**34, driver="CUDA 13.0")
T4 = host.Gpu(index=0, name="Stand-in T4", compute_capability="7.5", memory=2**34, driver="CUDA 13.0")


def test_the_result_records_outcome_file_machine_and_time(proven: Artifact) -> None:
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    result = json.loads(sidecar_of(proven.path).read_text(encoding="utf-8"))
    assert (result["identity"], result["format"], result["passed"]) == (proven.identity, "onnx", True)
    assert result["petseg"] == __version__
    assert result["date"].endswith("+00:00")
    assert result["host"]["cpu"] == json.loads(json.dumps(dataclasses.asdict(host.host().cpu)))
    assert result["host"]["gpus"] == [dataclasses.asdict(gpu) for gpu in host.gpus()]
    assert result["host"]["nvidia_gpus"] == host.nvidia_gpus()
    assert result["spec"] == json.loads(proven.spec.to_json())
    assert [row["precision"] for row in result["rows"]] == ["f32"]
    assert "schema_version" in result


def test_info_shows_the_verification(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", str(proven.path)]) == 0
    assert "verified here" not in capsys.readouterr().out
    assert run(["verify", str(proven.path), "-q"]) == 0
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert "verified here  smoke, 4 photos, passed, f32 in onnxruntime" in out
    assert "verified here  pre- and postprocessing: passed, 9 photos with Pillow " in out
    assert run(["info", str(proven.path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["verified"] == json.loads(sidecar_of(proven.path).read_text(encoding="utf-8"))


def test_a_verification_at_another_threshold_or_machine_is_not_shown(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(proven.path), "-q"]) == 0
    path = sidecar_of(proven.path)
    result = json.loads(path.read_text(encoding="utf-8"))
    packages = result["host"]["packages"]
    for key, change, said in (
        ("spec", {"threshold": 0.9}, "is of another file"),
        ("host", {"cpu": {**result["host"]["cpu"], "name": "Cortex-A76"}}, "was made on another machine (Cortex-A76, "),
        ("host", {"cpu": None}, "was made on another machine (unknown, "),
        (
            "host",
            {"packages": {**packages, "onnxruntime": "1.19.0"}},
            "was made with onnxruntime 1.19.0, and now it is 1.",
        ),
        ("host", {"packages": {**packages, "tensorrt": "10.9"}}, "was made with tensorrt 10.9, and now it is "),
        (
            "host",
            {"packages": {**packages, "tensorrt-cu12": "10.9"}},
            "was made with tensorrt-cu12 10.9, and now it is ",
        ),
        ("host", {"nvidia_driver": "570.1"}, "was made with NVIDIA's driver 570.1, and now it is "),
    ):
        path.write_text(json.dumps({**result, key: {**result[key], **change}}))
        assert run(["info", str(proven.path)]) == 0
        assert f"verified here  {path.name}: {said}" in capsys.readouterr().out


def test_verifying_one_engine_keeps_the_results_of_others(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openvino")
    for backend in ("onnxruntime", "openvino", "onnxruntime"):
        assert run(["verify", str(proven.path), "-q", "--backend", backend]) == 0
    result = json.loads(sidecar_of(proven.path).read_text(encoding="utf-8"))
    (other,) = result["others"]
    assert {(row["backend"], row["device"]) for row in result["rows"]} == {("onnxruntime", "cpu")}, "the latest"
    assert {(row["backend"], row["device"]) for row in other["rows"]} == {("openvino", "cpu")}
    assert other["passed"] is True
    assert "others" not in other
    assert run(["info", str(proven.path)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "verified here  smoke" in line]
    assert " in onnxruntime " in lines[0]
    assert len(lines) == 1 + len(other["rows"])
    assert all(" in openvino " in line for line in lines[1:])


def test_a_failure_in_one_engine_is_shown_even_if_another_passes(
    proven: Artifact, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("openvino")
    right = proof_of(proven.path).read_bytes()
    tampered(proven)
    assert run(["verify", str(proven.path), "-q", "--backend", "openvino"]) == 10
    proof_of(proven.path).write_bytes(right)
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    capsys.readouterr()
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert "verified here  smoke, 4 photos, passed, f32 in onnxruntime" in out
    assert "verified here  smoke, 4 photos, FAILED, f32 in openvino" in out


def test_each_device_of_an_engine_has_a_separate_result(proven: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "gpus", lambda: (L4,))
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    path = sidecar_of(proven.path)
    result = json.loads(path.read_text(encoding="utf-8"))
    result["rows"][0]["device"] = "cuda:0"
    path.write_text(json.dumps(result))
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    (other,) = json.loads(path.read_text(encoding="utf-8"))["others"]
    assert [row["device"] for row in other["rows"]] == ["cuda:0"]


@pytest.mark.parametrize(
    "change",
    [
        {"identity": "of another file"},
        {"schema_version": 9},
        {"device": "of another machine"},
        {"rows": [{"engine": "onnxruntime 1.20 (cpu, CPUExecutionProvider)"}]},
        {"rows": 7},
        {"rows": [{"backend": name, "device": "cpu"} for name in ("onnxruntime", "abacus")]},  # repeated in part
    ],
    ids=lambda change: next(iter(change)),
)
def test_results_invalid_here_or_malformed_are_replaced(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    monkeypatch.setattr(host, "identity", lambda: "this machine")
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    path = sidecar_of(proven.path)
    sound = json.loads(path.read_text(encoding="utf-8"))
    sound["rows"][0]["backend"] = "abacus"
    older = {**sound, "rows": [{**sound["rows"][0], "backend": "slide rule"}]}
    odd = {**sound, **change}
    for there, kept in ((odd, []), ({**sound, "others": [odd, 7, older]}, ["abacus", "slide rule"])):
        path.write_text(json.dumps(there))
        assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
        others = json.loads(path.read_text(encoding="utf-8"))["others"]
        assert [other["rows"][0]["backend"] for other in others] == kept


@pytest.mark.parametrize("others", [None, 7, {}, "others", [7], [{}], [[]]], ids=json.dumps)
def test_malformed_other_results_do_not_break_info(
    proven: Artifact, capsys: pytest.CaptureFixture[str], others: object
) -> None:
    """Any program may have written the results."""
    assert run(["verify", str(proven.path), "-q"]) == 0
    path = sidecar_of(proven.path)
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "others": others}))
    assert run(["info", str(proven.path)]) == 0
    assert capsys.readouterr().out.count("verified here  smoke") >= 1
    assert run(["verify", str(proven.path), "-q"]) == 0


def test_a_verification_on_another_machine_of_the_same_kind_is_not_shown(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for there, here, shown in (("a", "b", False), ("a", "a", True), ("", "b", True), ("a", "", True)):
        monkeypatch.setattr(host, "identity", lambda there=there: there)
        assert run(["verify", str(proven.path), "-q"]) == 0
        monkeypatch.setattr(host, "identity", lambda here=here: here)
        assert run(["info", str(proven.path)]) == 0
        out = capsys.readouterr().out
        assert ("verified here  smoke, 4 photos, passed" in out) is shown
        assert ("on another machine of this kind; run `petseg verify` again" in out) is not shown


@pytest.mark.parametrize(
    ("told", "here", "said"),
    [
        ([dataclasses.asdict(L4)], (L4,), ""),
        (
            [dataclasses.asdict(L4), {**dataclasses.asdict(T4), "index": 1}],
            (L4,),
            "",
        ),  # a GPU without a row does not matter
        (
            [dataclasses.asdict(T4)],
            (L4,),
            "was made on another cuda:0 (Stand-in T4, compute capability 7.5, this is Stand-in L4, ",
        ),
        (
            [dataclasses.asdict(L4)],
            (),
            "was made on another cuda:0 (Stand-in L4, compute capability 8.9, this is none)",
        ),
        (1, (L4,), "was made on another cuda:0 (unknown, this is Stand-in L4, compute capability 8.9)"),
        ([7, {"index": 0}], (L4,), "was made on another cuda:0 (unknown, this is "),
        ([{"index": 0}], (), "was made on another cuda:0 (unknown, this is none)"),
        (None, (), "was made on another cuda:0 (unknown, this is none)"),
    ],
)
def test_a_verification_on_another_gpu_is_not_shown(
    proven: Artifact,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    told: object,
    here: tuple[host.Gpu, ...],
    said: str,
) -> None:
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    path = sidecar_of(proven.path)
    result = json.loads(path.read_text(encoding="utf-8"))
    on_cpu = json.loads(path.read_text(encoding="utf-8"))
    result["rows"][0]["device"] = "cuda:0"
    for one in (result, on_cpu):
        one["host"]["gpus"] = told
    path.write_text(json.dumps({**result, "others": [on_cpu]}))
    monkeypatch.setattr(host, "gpus", lambda: here)
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert ("verified here  smoke, 4 photos, passed" in out) is (not said)
    assert (f"verified here  {path.name}: {said}" in out) is bool(said)
    path.write_text(json.dumps(on_cpu))
    assert run(["info", str(proven.path)]) == 0
    assert "verified here  smoke, 4 photos, passed" in capsys.readouterr().out, "a CPU's row is of no GPU"


def test_a_verification_by_another_version_is_shown_for_the_network_only(
    proven: Artifact, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0
    path = sidecar_of(proven.path)
    result = json.loads(path.read_text(encoding="utf-8"))
    older = {**result, "petseg": "0.0.1", "passed": False, "road": {**result["road"], "passed": False}}
    path.write_text(json.dumps({**older, "others": [older]}))
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    said = f"verified by petseg 0.0.1, and this is {__version__}: run `petseg verify` again"
    assert "verified here  smoke, 4 photos, passed, f32 in onnxruntime" in out
    assert f"verified here  pre- and postprocessing: {said}" in out
    assert "9 photos with Pillow" not in out
    assert run(["info", str(proven.path), "--json"]) == 0
    verified = json.loads(capsys.readouterr().out)["verified"]
    for one in (verified, *verified["others"]):
        assert (one["road"], one["passed"]) == ({"summary": said}, True)
        assert one["summary"].startswith("smoke, 4 photos: passed, f32 in onnxruntime")
        assert "road" not in one["summary"]
    for rows in ([*result["rows"], {**result["rows"][0], "passed": False}], []):  # one engine's failure is enough
        path.write_text(json.dumps({**older, "rows": rows}))
        assert run(["info", str(proven.path), "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["verified"]["passed"] is False


@pytest.mark.parametrize("version", [2, 4, "3", None, []])
def test_a_result_with_an_unknown_schema_version_is_not_shown(
    proven: Artifact, capsys: pytest.CaptureFixture[str], version: object
) -> None:
    assert run(["verify", str(proven.path), "-q"]) == 0
    path = sidecar_of(proven.path)
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "schema_version": version}))
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert f"{path.name}: its schema_version is {version!r}, not 3; run `petseg verify` again" in out
    assert "passed" not in out


def test_another_files_result_is_not_shown(proven: Artifact, toy: Toy, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["verify", str(proven.path), "-q"]) == 0
    toy(proven.path, channel=1)
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert "of another file; run `petseg verify` again" in out
    assert "passed" not in out
    assert run(["info", str(proven.path), "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["verified"]) == {"summary"}
    assert run(["verify", str(proven.path), "-q"]) == 10, "and the new file is not the checkpoint's"


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"{}", b"[]", b"null", b"7", b"\xff\xfe", b"[" * 100_000],
    ids=lambda content: ascii(content[:5]),
)
def test_an_unreadable_result_does_not_break_info(
    proven: Artifact, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    sidecar_of(proven.path).write_bytes(content)
    assert run(["info", str(proven.path)]) == 0
    out = capsys.readouterr().out
    assert "verified here  toy.onnx.verified.json: " in out
    assert proven.identity in out
    assert run(["verify", str(proven.path), "-q", *IN_ONNXRUNTIME]) == 0, "which replaces it"
    assert json.loads(sidecar_of(proven.path).read_text(encoding="utf-8"))["others"] == []


def test_a_full_disk_leaves_the_earlier_result(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx.verified.json"
    save({"passed": True}, path)
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, hard))  # Python ignores the signal
    try:
        with pytest.raises(OutputError, match=r"cannot be written \(File too large\): name another file with --output"):
            save({"passed": False}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_result_that_is_too_large_is_not_read(proven: Artifact, capsys: pytest.CaptureFixture[str]) -> None:
    sidecar_of(proven.path).write_bytes(b" " * MAX_RESULT + b"{}")
    assert run(["info", str(proven.path)]) == 0
    assert f"{sidecar_of(proven.path).name}: cannot be read (" in capsys.readouterr().out


@pytest.mark.parametrize("road", [None, 7, [], {}, {"summary": ["passed"]}], ids=json.dumps)
def test_a_malformed_road_entry_does_not_break_info(
    proven: Artifact, capsys: pytest.CaptureFixture[str], road: object
) -> None:
    """Any program may have written the file."""
    assert run(["verify", str(proven.path), "-q"]) == 0
    path = sidecar_of(proven.path)
    path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), "road": road}))
    assert run(["info", str(proven.path)]) == 0
    assert "pre- and postprocessing" in capsys.readouterr().out


def test_an_earlier_builds_result_is_not_shown(
    toy_ir: Artifact, prove: Callable[..., Proof], capsys: pytest.CaptureFixture[str]
) -> None:
    """A model that is compiled again still has the identity of its ONNX file."""
    proof_of(toy_ir.path).write_bytes(prove(toy_ir.spec).to_bytes())
    assert run(["verify", str(toy_ir.path), "-q"]) == 0
    toy_ir.path.write_bytes(toy_ir.path.read_bytes().replace(b"<net", b"<!-- again --><net"))
    artifact_sidecar_of(toy_ir.path).write_text(sidecar_text(toy_ir), encoding="utf-8")
    assert open_artifact(toy_ir.path).identity == toy_ir.identity
    assert run(["info", str(toy_ir.path)]) == 0
    assert "of another file; run `petseg verify` again" in capsys.readouterr().out
