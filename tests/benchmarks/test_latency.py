"""Every engine is opened cold and takes its turns; ratios are taken within a round."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from benchmarks import latency, roofline
from petseg import device
from petseg_runtime import host
from petseg_runtime.artifact import open_artifact


@pytest.fixture(scope="module")
def folder(tracer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a network that is small enough to make in a test."""
    made: Path = tmp_path_factory.mktemp("latency") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host, "nvidia_gpus", lambda: 1)  # for fp16, which a CPU would compute in another precision
        patch.setattr("petseg_export.onnx.graph_bytes", tracer)
        about = latency.make_files(latency.Network("tiny", 2, "strided", 32, (1,)), made, made)
    assert {path.name for path in made.glob("*.onnx")} == {"fp32.onnx", "fp16.onnx", "int8.onnx"}
    assert about["size"] == [32, 32]
    assert about["weights"].startswith("random")
    assert about["parameters"] > 0
    return made


def test_the_engines_match_the_registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fp32", "int8"):
        (tmp_path / f"{name}.onnx").touch()
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 0)
    found = latency.cases(tmp_path, 4, 2, compiled=False)
    assert {case.engine for case in found} == {"PyTorch", "onnxruntime", "openvino"}
    assert {case.device for case in found} == {"cpu"}
    assert not [case for case in found if "compiled" in case.stored or "fp16" in case.stored]
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 1)
    with_gpu = latency.cases(tmp_path, 4, 2, compiled=True)
    assert {case.engine for case in with_gpu if case.device == "cuda"} == {
        *("PyTorch", "onnxruntime", "tensorrt", "tensorrt-rtx")
    }
    on_gpu = {case.stored for case in with_gpu if (case.engine, case.device) == ("PyTorch", "cuda")}
    assert on_gpu == {"as trained", "BatchNorm folded, bf16", "BatchNorm folded, fp16"}
    assert {(case.batch, case.threads) for case in with_gpu} == {(4, 2)}
    assert len({case.name for case in with_gpu}) == len(with_gpu)


@pytest.mark.parametrize("native", [True, False])
def test_bf16_is_measured_only_on_cpus_with_bf16_matmuls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: bool
) -> None:
    monkeypatch.setattr(device, "_cpu_has_bf16", lambda: native)
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 0)
    stored = {case.stored for case in latency.cases(tmp_path, 1, 2, compiled=False)}
    assert stored == {"as trained", "BatchNorm folded", *(["BatchNorm folded, bf16"] if native else [])}


def test_a_cold_start_reports_times_and_memory(folder: Path) -> None:
    case = latency.Case(folder=str(folder), engine="onnxruntime", stored="int8")
    found = latency.cold_start(case)
    assert found["precision"] == "int8", found
    assert min(found[key] for key in ("load_ms", "first_run_ms", "later_run_ms")) > 0
    assert found["peak_memory_mb"] >= found["memory_mb"]


def test_the_import_of_torch_is_not_counted_as_opening_a_model(folder: Path) -> None:
    """Nor is that of the exporter, which folds BatchNorm; `test_all_cases_alternate...` has the form as trained."""
    found = latency.cold_start(latency.Case(folder=str(folder), engine="PyTorch", stored="BatchNorm folded"))
    assert found["memory_mb"] < 150, found  # torch takes more


def test_a_failed_case_gives_the_reason_without_paths(folder: Path) -> None:
    why = latency.cold_start(latency.Case(folder=str(folder), engine="onnxruntime", stored="fp8"))["why"]
    assert "fp8.onnx" in why
    assert str(folder) not in why


@pytest.mark.parametrize("form", ["as trained", *(f"BatchNorm folded{more}" for more in ("", ", bf16", ", fp16"))])
def test_pytorch_and_the_exported_file_agree(folder: Path, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed, forward = set(), torch.nn.Conv2d.forward
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: computed.add(self.weight.dtype) or forward(self, x))
    case = latency.Case(folder=str(folder), engine="PyTorch", stored=form)
    opened, other = (
        latency.opened(case),
        latency.opened(latency.Case(folder=str(folder), engine="onnxruntime", stored="fp32")),
    )
    batch = latency.images_of(case)
    assert np.abs(opened.run(batch).astype(int) - other.run(batch)).max() <= (8 if "bf16" in form else 1)
    types = {"f32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    assert computed == {types[opened.about["precision"]]}
    assert opened.about["precision"] == (form[-4:] if form[-4:] in ("bf16", "fp16") else "f32")
    assert opened.about["stored"] == form.partition(",")[0]
    other.close()


def test_an_int8_file_can_be_given(tmp_path: Path) -> None:
    given = tmp_path / "mine.onnx"
    given.touch()
    (tmp_path / "folder").mkdir()
    assert latency.ship_int8(tmp_path / "folder", tmp_path, given) == "int8: as given"
    assert (tmp_path / "folder" / "int8.onnx").samefile(given)


def test_every_layer_of_a_random_network_is_in_int8(folder: Path) -> None:
    assert open_artifact(folder / "int8.onnx").spec.precision == "int8"
    work = roofline.operations((folder / "int8.onnx").read_bytes(), 1, 32, 32)
    assert work["int8"] > 0
    assert work["others"] == 0


def test_a_case_with_the_same_computation_as_another_is_dropped() -> None:
    exact, free = (latency.Case(folder="f", engine="openvino", stored="fp32", exact=exact) for exact in (True, False))
    one, other = {"engine": "openvino 1", "precision": "f32"}, {"engine": "openvino 1", "precision": "bf16"}
    assert list(latency.distinct({exact: one, free: one})) == [exact]
    assert list(latency.distinct({exact: one, free: other})) == [exact, free]


def test_cases_that_failed_in_the_first_group_are_not_retried() -> None:
    names = ("openvino fp32 exact", "openvino fp32 as it likes", "openvino fp16 exact")
    one, two, three = (
        latency.Case(folder="f", engine="openvino", stored=name.split()[1], exact=name.endswith("exact"))
        for name in names
    )
    assert latency.worth_it([one, two], []) == [one, two]
    first = {"tried": list(names[:2]), "rows": [{"name": names[0]}]}
    later = {"tried": [], "rows": []}
    assert latency.worth_it([one, two, three], [first, later]) == [one, three]


def test_all_cases_alternate_with_the_matmuls(folder: Path) -> None:
    calls: list[str] = []
    matmul = roofline.Matmul("fake", "f32", 10**6, lambda: calls.append("matmul"))
    found = latency.cases(folder, 1, 1, compiled=False)
    chosen = [case for case in found if case.name in ("PyTorch as trained", "onnxruntime fp32 exact")]
    rates: dict[str, Any] = {"cpu": {matmul: []}}
    group, failed = latency.measure(chosen, 2, rates, {"model": "tiny", "size": [32, 32]})
    assert failed == []
    assert [row["name"] for row in group["rows"]] == ["PyTorch as trained", "onnxruntime fp32 exact"]
    assert group["rows"][0]["memory_mb"] < 150, "the import of torch, which takes more, is not counted"
    assert len(rates["cpu"][matmul]) == 2
    for row in group["rows"]:
        assert len(row["milliseconds"]) == 2
        assert row["share_of_matmul_peak"] > 0
        assert (row["p95"] is None) == (row["runs"] < 20), "a slow machine has fewer runs in its turns"
    assert group["rows"][0]["times_faster_than_pytorch"] == 1
    assert group["name"] == "tiny, 32x32, batch 1"


def test_ratios_are_taken_within_a_round() -> None:
    times, peak = [[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]], {"f32": [1e9, 2e9]}
    found = latency.row(times, [4.0, 4.0], {"int8": 0, "others": 10**6}, "f32", peak)
    assert found["milliseconds"] == [2.0, 4.0]
    assert found["times_faster_than_pytorch"] == pytest.approx(1.5)
    assert found["times_faster_than_pytorch_each"] == [2.0, 1.0]
    assert found["share_of_matmul_peak"] == pytest.approx((0.5 + 0.125) / 2)
    assert found["runs"] == 6
    assert latency.row(times, [4.0, 4.0], {"int8": 0, "others": 1}, "tf32", peak)["share_of_matmul_peak"] is None


@pytest.mark.parametrize(("runs", "told"), [(19, ["p50"]), (20, ["p50", "p95"]), (100, ["p50", "p95", "p99"])])
def test_percentiles_need_enough_runs(runs: int, told: list[str]) -> None:
    rounds = np.array_split(np.arange(1.0, runs + 1), 5)
    found = latency.row([list(values) for values in rounds], None, {"int8": 0, "others": 1}, "f32", {})
    every = {f"p{share}": np.percentile(np.arange(1.0, runs + 1), share) for share in (50, 95, 99)}
    assert {name: found[name] for name in every} == {
        name: pytest.approx(value) if name in told else None for name, value in every.items()
    }
    assert found["times_faster_than_pytorch"] is None


def test_cold_starts_are_measured_for_the_first_group_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "cold_start", lambda case: pytest.fail("started a separate process"))
    found = latency.cases(folder, 2, 1, compiled=False)
    names = ("PyTorch as trained", "onnxruntime fp32 exact", "onnxruntime fp32 as it likes", "tensorrt fp32 exact")
    chosen = [case for case in found if case.name in names]
    group, failed = latency.measure(chosen, 1, {}, {"model": "tiny", "size": [32, 32]}, cold=False)
    assert [row["name"] for row in group["rows"]] == list(names[:2]), "the third computes as the second"
    assert not [row for row in group["rows"] if "load_ms" in row or "memory_mb" in row]
    assert group["tried"] == [case.name for case in chosen]
    assert all("tensorrt" in reason for reason in failed)


#: Milliseconds per run of the stand-ins, by device and engine; engines that are not listed fail.
FAKES = {
    ("cpu", "PyTorch"): 40.0,
    ("cpu", "onnxruntime"): 10.0,
    ("cuda", "PyTorch"): 4.0,
    ("cuda", "onnxruntime"): 2.0,
    ("cuda", "tensorrt"): 0.5,
}


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    """Imitate a machine with a GPU and without OpenVINO; returns what works there, which a test can change."""
    works = dict(FAKES)

    def about(case: Any) -> dict[str, str]:
        precision = {"fp32": "f32"}.get(case.stored, "fp16")
        return {"engine": f"{case.engine} 1", "stored": case.stored, "precision": precision}

    def cold_start(case: Any) -> dict[str, Any]:
        if (case.device, case.engine) not in works:
            return {"why": "not installed"}
        return {**about(case), "load_ms": 1.0, "first_run_ms": 1.0, "later_run_ms": 1.0, "memory_mb": 1.0}

    def alternated(jobs: Any, rounds: int, at_end: Any) -> Any:
        for _ in range(rounds):
            at_end()
        return latency.Turns({case: [[works[case.device, case.engine]] * 3] * rounds for case in jobs}, 0)

    monkeypatch.setitem(sys.modules, "openvino", None)
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 1)
    monkeypatch.setattr(roofline, "SIZE", 32)
    peak = roofline.Matmul("PyTorch 1 on a GPU", "fp16", 10**9, lambda: None)
    monkeypatch.setattr(roofline, "_on_cuda", lambda threads: [peak])
    monkeypatch.setattr(latency, "NETWORKS", (latency.Network("tiny", 2, "strided", 32, (1, 2)),))
    monkeypatch.setattr(latency, "cold_start", cold_start)
    monkeypatch.setattr(latency, "opened", lambda case: latency.Opened(lambda batch: batch, about(case), lambda: None))
    monkeypatch.setattr(latency, "alternated", alternated)
    return works


@pytest.fixture
def made(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the files in `folder`, made by `make_files`, for every network."""

    def copied(network: Any, target: Path, *_: Any) -> dict[str, Any]:
        target.symlink_to(folder)
        return {"model": network.name, "size": [32, 32]}

    monkeypatch.setattr(latency, "make_files", copied)


@pytest.mark.usefixtures("fakes", "made")
def test_a_gpu_gets_rows_and_a_peak(tmp_path: Path) -> None:
    output = tmp_path / "mine.json"
    done = CliRunner().invoke(latency.latency, ["--output", str(output), "--rounds", "2", "--data", str(tmp_path)])
    assert done.exit_code == 0, done.output
    record = json.loads(output.read_text(encoding="utf-8"))
    assert [network["batch"] for network in (record, *record["networks"])] == [1, 2]
    for group in (record, *record["networks"]):
        found = {(row["device"], row["engine"]): row["times_faster_than_pytorch"] for row in group["rows"]}
        assert {key: found[key] for key in found if key[1] == "PyTorch 1"} == {
            ("cpu", "PyTorch 1"): 1.0,
            ("cuda", "PyTorch 1"): 1.0,
        }
        assert found["cpu", "onnxruntime 1"] == 4.0
        assert (found["cuda", "onnxruntime 1"], found["cuda", "tensorrt 1"]) == (2.0, 8.0)
        assert len({row["name"] for row in group["rows"]}) == len(group["rows"])
        shares = {(row["device"], row["precision"]): row["share_of_matmul_peak"] for row in group["rows"]}
        assert shares["cuda", "fp16"] > 0
        assert ("cpu", "fp16") not in shares or shares["cpu", "fp16"] is None, "the GPU's peak says nothing of the CPU"
    assert [row["name"] for row in record["matmul_peaks"]["cuda"]] == ["PyTorch 1 on a GPU fp16"]
    assert {row["name"].split()[0] for row in record["matmul_peaks"]["cpu"]} == {"PyTorch", "onnxruntime"}
    assert [reason for reason in record["not_measured"] if "matmuls on cpu" in reason and "openvino" in reason]


@pytest.mark.usefixtures("fakes", "made")
def test_unbundled_networks_can_be_excluded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "NETWORKS", [latency.Network(f"{n}", 2, "strided", 32, (1,)) for n in range(2)])
    for options, others in (([], 1), (["--no-family"], 0)):
        words = ["--output", str(tmp_path / "mine.json"), "--rounds", "1", "--data", str(tmp_path), *options]
        assert CliRunner().invoke(latency.latency, words).exit_code == 0
        record = json.loads((tmp_path / "mine.json").read_text(encoding="utf-8"))
        assert len(record["networks"]) == others
        assert record["command"].endswith(" ".join(["--rounds 1", *options]))


def test_without_pytorch_on_a_device_its_rows_have_no_ratio(folder: Path, fakes: dict[tuple[str, str], float]) -> None:
    del fakes["cuda", "PyTorch"]
    cases = [latency.Case(folder=str(folder), engine=engine, stored="fp32", device=device) for device, engine in FAKES]
    group, failed = latency.measure(cases[1:], 1, {}, {"model": "tiny", "size": [32, 32]})
    assert {row["device"]: row["times_faster_than_pytorch"] for row in group["rows"]} == {"cpu": None, "cuda": None}
    assert failed == ["PyTorch fp32 on cuda: not installed"]


@pytest.mark.usefixtures("fakes")
def test_a_case_that_cannot_be_loaded_alongside_the_others_is_reported(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def opened(case: Any) -> Any:
        if case.engine == "tensorrt":
            raise OSError("libcudart: version mismatch")
        return latency.Opened(lambda batch: batch, {}, lambda: None)

    monkeypatch.setattr(latency, "opened", opened)
    cases = [latency.Case(folder=str(folder), engine=engine, stored="fp32", device=device) for device, engine in FAKES]
    group, failed = latency.measure(cases, 1, {}, {"model": "tiny", "size": [32, 32]})
    assert failed == ["tensorrt fp32 exact on cuda, beside the others: libcudart: version mismatch"]
    assert len(group["rows"]) == len(cases) - 1


@pytest.mark.parametrize(("said", "mb"), [("1000\n24\n", 1024 * 2**20 / 1e6), ("[N/A]\n", None), ("", None)])
def test_gpu_memory_is_read_from_nvidia_smi(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str, mb: float | None
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nprintf '{said}'\n[ -n '{said}' ]\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert latency.gpu_memory() == mb
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert latency.gpu_memory() is None


def test_a_case_on_a_gpu_reports_its_gpu_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3_000_000)
    monkeypatch.setattr(latency, "gpu_memory", lambda: 700.0)
    pytorch, other, cpu = (
        latency.Case(folder="f", engine=engine, stored="as trained", device=device)
        for engine, device in (("PyTorch", "cuda"), ("tensorrt", "cuda"), ("PyTorch", "cpu"))
    )
    assert latency.on_gpu(pytorch, 200.0) == {"gpu_memory_mb": 500.0, "gpu_tensors_peak_mb": 3.0}
    assert latency.on_gpu(other, 200.0) == {"gpu_memory_mb": 500.0, "gpu_tensors_peak_mb": None}
    assert latency.on_gpu(other, None) == {"gpu_memory_mb": None, "gpu_tensors_peak_mb": None}
    assert latency.on_gpu(cpu, None) == {"gpu_memory_mb": None, "gpu_tensors_peak_mb": None}


def test_caches_start_empty_and_the_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETSEG_CACHE", "mine")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with latency.scratch() as folder:
        assert os.environ["PETSEG_CACHE"].startswith(str(folder))
        assert "TORCHINDUCTOR_CACHE_DIR" in os.environ
    assert os.environ["PETSEG_CACHE"] == "mine"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
