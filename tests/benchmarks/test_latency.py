"""Every engine is opened cold and takes its turns; ratios are taken within a round."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from petseg_runtime import host
from petseg_runtime.artifact import open_artifact

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def latency(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, which is not installed."""
    monkeypatch.syspath_prepend(ROOT)
    return importlib.import_module("benchmarks.latency")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of a network that is small enough to make in a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT)
        latency = importlib.import_module("benchmarks.latency")
    made: Path = tmp_path_factory.mktemp("latency") / "tiny"
    about = latency.make_files(latency.Network("tiny", 2, "strided", 32, (1,)), made, made)
    assert about["size"] == [32, 32]
    assert about["weights"].startswith("random")
    assert about["parameters"] > 0
    return made


def test_the_engines_are_those_of_the_registry(latency: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("fp32", "int8"):
        (tmp_path / f"{name}.onnx").touch()
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 0)
    found = latency.cases(tmp_path, 4, 2, compiled=False)
    assert {case.engine for case in found} == {"PyTorch", "onnxruntime", "openvino"}
    assert {case.device for case in found} == {"cpu"}
    assert not [case for case in found if "compiled" in case.stored]
    monkeypatch.setattr(host, "nvidia_gpus", lambda: 1)
    with_gpu = latency.cases(tmp_path, 4, 2, compiled=True)
    assert {case.engine for case in with_gpu if case.device == "cuda"} == {
        *("PyTorch", "onnxruntime", "tensorrt", "tensorrt-rtx")
    }
    assert {(case.batch, case.threads) for case in with_gpu} == {(4, 2)}
    assert len({case.name for case in with_gpu}) == len(with_gpu)


def test_a_cold_start_tells_times_and_memory(latency: Any, folder: Path) -> None:
    case = latency.Case(folder=str(folder), engine="onnxruntime", stored="int8")
    found = latency.cold_start(case)
    assert found["precision"] == "int8", found
    assert min(found[key] for key in ("load_ms", "first_run_ms", "later_run_ms")) > 0
    assert found["peak_memory_mb"] >= found["memory_mb"]


def test_what_does_not_work_says_why_without_folders(latency: Any, folder: Path) -> None:
    why = latency.cold_start(latency.Case(folder=str(folder), engine="onnxruntime", stored="fp16"))["why"]
    assert "fp16.onnx" in why
    assert str(folder) not in why


@pytest.mark.parametrize("form", ["as trained", "BatchNorm folded", "BatchNorm folded, bf16"])
def test_pytorch_answers_as_the_file_does(latency: Any, folder: Path, form: str) -> None:
    case = latency.Case(folder=str(folder), engine="PyTorch", stored=form)
    opened, other = (
        latency.opened(case),
        latency.opened(latency.Case(folder=str(folder), engine="onnxruntime", stored="fp32")),
    )
    batch = latency.images_of(case)
    assert np.abs(opened.run(batch).astype(int) - other.run(batch)).max() <= (8 if "bf16" in form else 1)
    assert opened.about["precision"] == ("bf16" if "bf16" in form else "f32")
    assert opened.about["stored"] == form.partition(",")[0]
    other.close()


def test_an_int8_file_can_be_given(latency: Any, tmp_path: Path) -> None:
    given = tmp_path / "mine.onnx"
    given.touch()
    (tmp_path / "folder").mkdir()
    assert latency.ship_int8(tmp_path / "folder", tmp_path, given) == "int8: as given"
    assert (tmp_path / "folder" / "int8.onnx").samefile(given)


def test_every_layer_of_a_random_network_is_in_int8(latency: Any, folder: Path) -> None:
    roofline = importlib.import_module("benchmarks.roofline")
    assert open_artifact(folder / "int8.onnx").spec.precision == "int8"
    work = roofline.operations((folder / "int8.onnx").read_bytes(), 1, 32, 32)
    assert work["int8"] > 0
    assert work["others"] == 0


def test_a_choice_that_changes_nothing_is_left_out(latency: Any) -> None:
    exact, free = (latency.Case(folder="f", engine="openvino", stored="fp32", exact=exact) for exact in (True, False))
    one, other = {"engine": "openvino 1", "precision": "f32"}, {"engine": "openvino 1", "precision": "bf16"}
    assert list(latency.distinct({exact: one, free: one})) == [exact]
    assert list(latency.distinct({exact: one, free: other})) == [exact, free]


def test_what_the_first_group_left_out_is_not_tried_again(latency: Any) -> None:
    names = ("openvino fp32 exact", "openvino fp32 as it likes", "openvino fp16 exact")
    one, two, three = (
        latency.Case(folder="f", engine="openvino", stored=name.split()[1], exact=name.endswith("exact"))
        for name in names
    )
    assert latency.worth_it([one, two], []) == [one, two]
    first = {"tried": list(names[:2]), "rows": [{"name": names[0]}]}
    later = {"tried": [], "rows": []}
    assert latency.worth_it([one, two, three], [first, later]) == [one, three]


def test_all_take_turns_with_the_matmuls(latency: Any, folder: Path) -> None:
    roofline = importlib.import_module("benchmarks.roofline")
    calls: list[str] = []
    matmul = roofline.Matmul("fake", "f32", 10**6, lambda: calls.append("matmul"))
    found = latency.cases(folder, 1, 1, compiled=False)
    chosen = [case for case in found if case.name in ("PyTorch as trained", "onnxruntime fp32 exact")]
    rates: dict[str, Any] = {"cpu": {matmul: []}}
    group, failed = latency.measure(chosen, 2, rates, {"model": "tiny", "size": [32, 32]})
    assert failed == []
    assert [row["name"] for row in group["rows"]] == ["PyTorch as trained", "onnxruntime fp32 exact"]
    assert len(rates["cpu"][matmul]) == 2
    for row in group["rows"]:
        assert len(row["milliseconds"]) == 2
        assert row["share_of_matmul_peak"] > 0
        assert row["p50"] <= row["p95"] <= row["p99"]
    assert group["rows"][0]["times_faster_than_pytorch"] == 1
    assert group["name"] == "tiny, 32x32, batch 1"


def test_ratios_are_taken_within_a_round(latency: Any) -> None:
    times, peak = [[1.0, 2.0, 3.0], [4.0, 4.0, 4.0]], {"f32": [1e9, 2e9]}
    found = latency.row(times, [4.0, 4.0], {"int8": 0, "others": 10**6}, "f32", peak)
    assert found["milliseconds"] == [2.0, 4.0]
    assert found["times_faster_than_pytorch"] == pytest.approx(1.5)
    assert found["share_of_matmul_peak"] == pytest.approx((0.5 + 0.125) / 2)
    assert found["runs"] == 6
    assert latency.row(times, [4.0, 4.0], {"int8": 0, "others": 1}, "tf32", peak)["share_of_matmul_peak"] is None


def test_caches_are_new_and_the_environment_is_put_back(latency: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PETSEG_CACHE", "mine")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    with latency.scratch() as folder:
        assert os.environ["PETSEG_CACHE"].startswith(str(folder))
        assert "TORCHINDUCTOR_CACHE_DIR" in os.environ
    assert os.environ["PETSEG_CACHE"] == "mine"
    assert "TORCHINDUCTOR_CACHE_DIR" not in os.environ
