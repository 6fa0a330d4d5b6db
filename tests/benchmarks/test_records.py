"""A record contains what was measured, on which machine, with which versions."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import records
from petseg_runtime import host
from petseg_runtime.artifact import default_model, open_artifact


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A calibration of one small matmul; each test is a program that has just begun."""
    monkeypatch.setattr(records, "CALIBRATION_SIZE", 256)
    records.checkout.cache_clear()
    yield
    records.checkout.cache_clear()


def test_a_record_names_model_commit_and_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"rev-parse": "abc\n", "status": " M runtime/petseg_runtime/live.py\n"}
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(records, "git", lambda *words: answers[words[0]])
    records.checkout()  # as at the first call
    answers |= {"rev-parse": "later\n", "status": ""}
    path = records.write("training/mine", "python -m benchmarks mine", {"milliseconds": [1.5]})
    found = json.loads(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "training" / "mine.json"
    assert (found["commit"], found["uncommitted"]) == ("abc", [" M runtime/petseg_runtime/live.py"])
    assert open_artifact(default_model()).identity.startswith(found["shipped_model"].rpartition(", ")[2])
    assert {"cpu", "cores", "gpus", "python"} <= set(found["machine"])
    assert found["milliseconds"] == [1.5]
    assert records.load("training/mine") == found
    elsewhere = records.write("mine", "x", {}, tmp_path / "other" / "here.json")
    assert elsewhere == tmp_path / "other" / "here.json"
    assert elsewhere.exists()
    assert not (tmp_path / "mine.json").exists()


def test_records_of_another_machine_are_stored_separately(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    (tmp_path / "machines" / "other").mkdir(parents=True)
    monkeypatch.setenv(records.ELSEWHERE, str(tmp_path / "machines" / "other"))
    path = records.write("mine", "x", {"milliseconds": [1.5]})
    assert path == tmp_path / "machines" / "other" / "mine.json"
    assert records.machines() == [path.parent]
    assert records.load("mine", path.parent)["milliseconds"] == [1.5]
    assert not (tmp_path / "mine.json").exists()


def test_without_git_a_record_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    found = json.loads(records.write("mine", "x", {}).read_text(encoding="utf-8"))
    assert (found["commit"], found["uncommitted"]) == (None, None)


#: Linux's description of the first of two cores, on a machine like that of our records of 2026.
CPUINFO = """processor\t: 0
vendor_id\t: AuthenticAMD
cpu family\t: 25
model\t\t: 17
model name\t: AMD EPYC
stepping\t: 1
cache size\t: 1024 KB
flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16

processor\t: 1
model\t\t: 99
flags\t\t: fpu avx2 avx512f avx512_vnni avx512_bf16
"""


def cpu(text: str) -> host.Cpu:
    name, features = host.parse_cpuinfo(text)
    return host.Cpu(name=name, machine="x86_64", cores=2, quota=None, memory=1, memory_limit=None, features=features)


def test_the_processor_is_described_beyond_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CPUINFO", tmp_path / "cpuinfo")
    (tmp_path / "cpuinfo").write_text(CPUINFO)
    found = records.processor(cpu(CPUINFO))
    assert found == {
        "name": "AMD EPYC",
        "vendor": "AuthenticAMD",
        "family": "25",
        "model": "17",
        "stepping": "1",
        "cache": "1024 KB",
        "instructions": ["avx2", "avx512f", "avx512_vnni", "avx512_bf16"],
    }
    assert records.short_name(found) == "AMD EPYC (Zen 4, AVX-512 with bf16)"


def test_without_linux_the_processor_has_pythons_name_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "CPUINFO", tmp_path / "none")
    found = records.processor(replace(cpu(""), name="Apple processor arm"))
    assert (found["family"], found["cache"], found["instructions"]) == (None, None, [])
    assert records.short_name(found) == "Apple processor arm"


@pytest.mark.parametrize(
    ("name", "flags", "short"),
    [
        ("AMD EPYC 9654 96-Core Processor", ["avx2"], "AMD EPYC 9654 96-Core"),
        ("Intel(R) Xeon(R) Platinum 8375C CPU @ 2.90GHz", ["avx2"], "Intel Xeon Platinum 8375C"),
        ("Intel(R) Xeon(R) CPU @ 2.20GHz", ["avx2", "avx512f"], "Intel Xeon (family 6, model 143, AVX-512)"),
        ("Intel(R) Xeon(R) Processor", ["avx2", "amx_bf16"], "Intel Xeon (family 6, model 143, AMX)"),
        ("QEMU Virtual CPU", [], "QEMU Virtual (family 6, model 143, no AVX2)"),
    ],
)
def test_a_machine_is_named_by_product_or_else_described(name: str, flags: list[str], short: str) -> None:
    about = {"name": name, "family": "6", "model": "143", "instructions": flags}
    assert records.short_name(about) == short


def test_a_record_is_read_with_the_name_that_its_processor_has_today(tmp_path: Path) -> None:
    about = {"name": "AMD EPYC", "family": "26", "model": "2", "instructions": ["avx2"]}
    for name, machine in {"new": {"cpu": "family 26", "processor": about}, "old": {"cpu": "AMD EPYC"}}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"machine": machine}))
    assert records.load("new", tmp_path)["machine"]["cpu"] == "AMD EPYC (Zen 5, AVX2)"
    assert records.load("old", tmp_path)["machine"]["cpu"] == "AMD EPYC"


def test_the_speed_of_the_machine_is_that_of_its_best_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, *(0.0, 4.0, 4.0), *(4.0, 5.0, 5.0), *(5.0, 7.0, 7.0), 8.0])  # matmuls of 4, 1 and 2 seconds
    monkeypatch.setattr(records.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(records.time, "process_time", iter([0.0, 12.0]).__next__)
    monkeypatch.setattr(records, "CALIBRATION_SECONDS", 6.0)
    monkeypatch.setattr(records, "CALIBRATION_SIZE", 1000)
    found = records.calibration()
    assert (found["gflops"], found["matmuls"], found["threads"]) == (2.0, 3, 1.5)
    assert found["what"] == "numpy matmul, float32, 1000 x 1000"
    assert found["blas"]


def test_a_machine_record_has_kernel_and_speed() -> None:
    found = records.machine()
    assert found["kernel"] == platform.release()
    assert found["cpu"] == records.short_name(found["processor"])
    assert found["calibration"]["gflops"] > 0
    assert found["calibration"]["what"] == "numpy matmul, float32, 256 x 256"
