"""The GPU check: its message without a GPU, and its record with stand-ins for one."""

from __future__ import annotations

import ast
import functools
import getpass
import importlib.metadata
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

from benchmarks import gpu_check as check
from benchmarks.__main__ import main
from petseg_runtime import doctor
from petseg_runtime.artifact import sample_photos
from petseg_runtime.host import Gpu, nvidia_gpus

ROOT = Path(__file__).resolve().parents[2]
GPU = Gpu(index=0, name="NVIDIA RTX", compute_capability="8.9", memory=2**34, driver="CUDA 13.0")


@pytest.mark.skipif(nvidia_gpus() > 0, reason="there is a GPU")
def test_without_a_gpu_a_message_is_printed_and_nothing_is_written(tmp_path: Path) -> None:
    output = tmp_path / "gpu-check.json"
    command = [sys.executable, "-m", "benchmarks.gpu_check", "--output", str(output)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr.startswith("this machine shows no NVIDIA GPU (")
    assert not output.exists()


@pytest.mark.skipif(nvidia_gpus() > 0, reason="there is a GPU")
def test_gpu_check_is_one_of_the_benchmark_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m benchmarks gpu-check`, in this process, which has imported PyTorch already."""
    with pytest.raises(SystemExit) as ended:
        main(["gpu-check", "--output", str(tmp_path / "gpu-check.json")])
    assert ended.value.code == 5
    assert capsys.readouterr().err.startswith("this machine shows no NVIDIA GPU (")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(nvidia_gpus() > 0, reason="there is a GPU")
@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_installs_nothing_where_there_is_no_gpu(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "runtime" / "petseg_runtime", tmp_path / "runtime" / "petseg_runtime")
    command = ["make", "-C", str(tmp_path), "gpu-check", f"PYTHON={sys.executable}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode != 0
    assert "this machine shows no NVIDIA GPU: install its driver; nothing was installed or checked" in done.stderr
    assert not (tmp_path / ".venv-gpu").exists()


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_uses_only_tensorrt_from_the_system(tmp_path: Path) -> None:
    system, environment = tmp_path / "system", tmp_path / "environment"
    for name in ("tensorrt", "tensorrt_libs", "numpy_of_the_system"):
        (system / name).mkdir(parents=True)
        (system / name / "__init__.py").touch()
    (environment / "tensorrt_libs").mkdir(parents=True)  # installed with the trt extra
    makefile = tmp_path / "Makefile"
    makefile.write_text(f'include {ROOT / "Makefile"}\nlink:\n\t@$(PYTHON) -c "$$LINK_TENSORRT" {environment}\n')
    # -S: without the packages of the tests, which include TensorRT's Python module.
    command = ["make", "--no-print-directory", "-f", str(makefile), "link", f"PYTHON={sys.executable} -S"]
    said = []
    for _ in range(2):
        variables = {**os.environ, "PYTHONPATH": str(system)}
        done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        said.append(done.stdout)
    assert said == ["using the system's tensorrt\n", ""]
    assert {path.name: path.is_symlink() for path in environment.iterdir()} == {
        "tensorrt": True,
        "tensorrt_libs": False,
    }
    assert (environment / "tensorrt").resolve() == system / "tensorrt"


@functools.cache
def ours(name: str) -> list[Path]:
    """The files that an import of our module ``name`` runs: its packages' and its own; none if it is not ours."""
    parts, roots = name.split("."), ("", "export", "runtime", "tests/petseg", "tests/runtime")
    stems = [ROOT.joinpath(root, *parts[: i + 1]) for root in roots for i in range(len(parts))]
    return [file for stem in stems for file in (stem / "__init__.py", stem.with_suffix(".py")) if file.is_file()]


def imports_of(file: Path) -> tuple[set[str], list[Path]]:
    """The packages from elsewhere and our files that a module imports, up to a line that skips it without a package."""
    packages: set[str] = set()
    files: list[Path] = []
    for line in ast.parse(file.read_bytes()).body:
        if isinstance(line, ast.Assign) and "importorskip(" in ast.unparse(line):
            break
        names = [alias.name for alias in line.names] if isinstance(line, ast.Import | ast.ImportFrom) else []
        if isinstance(line, ast.ImportFrom):
            names = [str(line.module), *(f"{line.module}.{name}" for name in names)]
        for name in names:
            inside = ours(name)
            files += inside
            packages |= set() if inside else {name.partition(".")[0]}
    return packages, files


def package(requirement: str) -> str:
    """The name in a requirement."""
    return re.split(r"[\[>]", requirement)[0].lower().replace("_", "-")


def test_the_tests_can_be_imported_with_what_make_gpu_check_installs() -> None:
    """Otherwise their collection would end with an error, and the check would fail on every GPU."""
    rule = (ROOT / "Makefile").read_text(encoding="utf-8")
    extras = re.findall(r"^GPU_EXTRAS := (.+)$", rule, re.MULTILINE)[0].split(",")
    others = re.findall(r'"\.\[\$\(GPU_EXTRAS\)\]" (.+)$', rule, re.MULTILINE)[0].split()
    with (ROOT / "pyproject.toml").open("rb") as toml:
        needed = tomllib.load(toml)["project"]["optional-dependencies"]
    # `gpu` has the module of `cpu`.
    installed = {*others, *(package(line) for extra in (*extras, "cpu") for line in needed[extra])}
    missing = {package(line) for extra in ("dev", "openvino", "heic") for line in needed[extra]} - installed
    there = importlib.metadata.packages_distributions()
    absent = {module for module, names in there.items() if missing & {package(name) for name in names}}
    assert "pycocotools" in absent
    read: set[Path] = set()
    waiting = [(test, test) for test in (ROOT / "tests").rglob("*.py")]
    while waiting:
        file, test = waiting.pop()
        if file not in read:
            read.add(file)
            packages, files = imports_of(file)
            assert not packages & absent, f"{test} imports {file}"
            waiting += [(other, test) for other in files]


def test_each_tests_outcome_is_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_a.py").write_text(
        "import pytest\n"
        "pytestmark = pytest.mark.filterwarnings('ignore')\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2\n"
        "def test_idle(): pytest.skip('too tired')\n"
        "@pytest.fixture\ndef broken(): raise RuntimeError('no')\n"
        "def test_broken(broken): pass\n"
    )
    (tmp_path / "test_b.py").write_text("import os, signal\ndef test_crash(): os.kill(os.getpid(), signal.SIGSEGV)\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    monkeypatch.setattr(check, "ROOT", tmp_path)
    cases = {case["name"].rpartition("::")[2]: case for case in check.tests([])}
    assert {name: case["outcome"] for name, case in cases.items()} == {
        "test_good": "passed",
        "test_bad": "failed",
        "test_idle": "skipped",
        "test_broken": "error",
        "test_b.py": "error",
    }
    assert cases["test_good"]["why"] == ""
    assert "assert 1 == 2" in cases["test_bad"]["why"]
    assert cases["test_idle"]["why"] == "too tired"
    assert cases["test_b.py"]["why"].startswith("exit code -11")
    assert "test_crash" in cases["test_b.py"]["why"]


def test_running_no_tests_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ROOT", tmp_path)
    (case,) = check.tests([])
    assert (case["name"], case["outcome"]) == ("collection", "error")


def test_a_hanging_test_run_is_terminated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "DEADLINE", 1)
    done = check.run_program([sys.executable, "-c", "import time; time.sleep(600)"])
    assert done["exit_code"] == -9
    assert done["err"].endswith("did not end within 1 s")


def engine(name: str = "onnxruntime", **values: Any) -> dict[str, Any]:
    return {"engine": name, "device": "cuda", "packages": [f"{name} 1"], "works": True, "why": "", **values}


def record(**values: Any) -> dict[str, Any]:
    speeds = {"latency_ms": {"p50": 1.234}, "photos_per_second": {"median": 900.4}}
    row = {"name": "onnxruntime", "device": "cuda:0", "precision": "tf32", **speeds}
    alone = {"device": "cuda", "precision": "fp16", "median": 0.5, "times_faster_than_pytorch": 4.04}
    rows = [{**alone, "name": "tensorrt fp16 exact on cuda"}, {**alone, "name": "PyTorch as trained", "device": "cpu"}]
    bare = {**alone, "name": "tensorrt int8 exact on cuda", "precision": "int8", "times_faster_than_pytorch": None}
    measured = {"batch": 1, "rows": rows, "networks": [{"batch": 8, "rows": [bare]}]}
    return {
        "doctor": {"gpus": [{"name": "NVIDIA RTX", "driver": "CUDA 13.0"}], "engines": [engine(precision="tf32")]},
        "tests": [{"name": "a::test", "outcome": "passed"}],
        "parity": {"onnxruntime": {"exit_code": 0}, "tensorrt": {"exit_code": 5}},
        "benchmarks": {"batch 1": {"exit_code": 0, "answer": {"rows": [row]}}},
        "latency": {"exit_code": 0, "answer": measured},
        "photos": {"onnxruntime": {"exit_code": 0, "answer": {"done": 300, "seconds": 0.5}}},
        "video": {"overlay": {"exit_code": 0, "answer": {"rate": 311.2}}},
        "failures": [],
        **values,
    }


def test_every_test_that_did_not_pass_is_listed() -> None:
    assert check.failures(record()) == [], "an engine that is not installed is no failure"
    crash = {"gpus": [], "engines": [engine(works=False, why="it crashed: SIGSEGV")]}
    assert check.failures(record(doctor=crash)) == [
        "onnxruntime on cuda: it crashed: SIGSEGV",
        "no engine works on the GPU",
    ]
    failed = [{"name": "a::test", "outcome": "failed"}, {"name": "b::test", "outcome": "skipped"}]
    assert check.failures(record(tests=failed)) == ["a::test: failed", "no test passed"]
    assert check.failures(record(parity={"onnxruntime": {"exit_code": 10}})) == ["verify in onnxruntime: exit code 10"]
    broken = {"batch 8": {"exit_code": -11, "answer": None}}
    assert check.failures(record(benchmarks=broken)) == ["benchmark, batch 8: exit code -11"]
    assert check.failures(record(latency={"exit_code": 1, "answer": None})) == ["latency: exit code 1"]
    assert check.failures(record(photos={"onnxruntime": {"exit_code": 3}})) == ["photos in onnxruntime: exit code 3"]
    on_cpu = {"exit_code": 0, "answer": {"rows": [{"device": "cpu"}]}}
    assert check.failures(record(latency=on_cpu)) == ["latency: nothing was measured on the GPU"]


def test_an_engine_that_is_not_made_for_the_gpu_is_no_failure() -> None:
    """TensorRT for RTX, which `make gpu-check` installs, does not support the GPUs of data centres from Hopper on."""
    why = (
        "TensorRT for RTX 1.7.1.116 cannot build for compute capability 9.0; it supports 7.5, 8.0, 8.6, 8.9, 12.0, 12.1"
    )
    foreign = {**record()["doctor"], "engines": [engine(), engine("tensorrt-rtx", works=False, why=why)]}
    ended = {"exit_code": 5, "answer": None}
    of_engines = {part: {"tensorrt-rtx": ended} for part in ("parity", "photos")}
    some = {**of_engines, "benchmarks": {check.WITHOUT_GRAPHS: ended}}
    assert check.failures(record(doctor=foreign, **some)) == []
    foreign["engines"] = foreign["engines"][1:]
    assert check.failures(record(doctor=foreign, **some)) == ["no engine works on the GPU"]


def test_the_text_output_is_a_summary() -> None:
    assert check.summary(record(failures=["this", "that"])) == [
        "NVIDIA RTX, CUDA 13.0",
        "onnxruntime: tf32, works",
        "tests: 1 passed",
        "batch 1: onnxruntime on cuda:0, tf32: 1.23 ms, 900 photos/s",
        "interleaved, batch 1: tensorrt fp16 exact on cuda, fp16: 0.50 ms, 4.0 times as fast as PyTorch",
        "interleaved, batch 8: tensorrt int8 exact on cuda, int8: 0.50 ms",
        "photos in onnxruntime: 600 photos/s",
        "video as overlay: 311 frames/s",
        "FAILED this",
        "FAILED that",
    ]


def test_the_latency_record_is_part_of_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[list[str]] = []

    def runs(words: list[str]) -> dict[str, Any]:
        ran.append(words)
        Path(words[words.index("--output") + 1]).write_text('{"rows": []}')
        return {"exit_code": 0, "out": "", "err": "\n".join(map(str, range(12)))}

    monkeypatch.setattr(check, "run_program", runs)
    assert check.latency() == {"exit_code": 0, "answer": {"rows": []}, "said": [str(n) for n in range(2, 12)]}
    monkeypatch.setattr(check, "run_program", lambda words: {"exit_code": 1, "out": "", "err": "no torch"})
    assert check.latency() == {"exit_code": 1, "answer": None, "said": ["no torch"]}
    # The command's options, as far as they can be tested without measuring.
    helped = subprocess.run([*ran[0], "--help"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert helped.returncode == 0, helped.stderr
    assert [words for words in ran[0] if words.startswith("--") and words.lstrip("-") not in helped.stdout] == []
    refused = subprocess.run([*ran[0], "--rounds", "few"], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert "'few' is not a valid integer" in refused.stderr, "the options before it were understood"


def test_a_folder_of_photos_is_processed_on_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU here: the same command, but for the device."""
    real = check.run_program
    ran: list[list[str]] = []

    def on_cpu(words: list[str]) -> dict[str, Any]:
        ran.append(words)
        return real(["cpu" if word == "cuda" else word for word in words])

    monkeypatch.setattr(check, "run_program", on_cpu)
    monkeypatch.setattr(check, "COPIES", 2)
    done = check.photos("onnxruntime")
    assert (done["exit_code"], done["answer"]["done"]) == (0, 2 * len(sample_photos())), done["said"]
    assert ran[0][ran[0].index("--device") + 1] == "cuda"
    assert done["answer"]["seconds"] > 0


def test_names_and_paths_are_removed_from_the_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "annes-box")
    monkeypatch.setattr(getpass, "getuser", lambda: "anne")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/anne b"))
    value = {
        "why": "/home/anne b/src/x.py:3: bad (file:///opt/secret/lib.so) from '/usr/lib/a.py'",
        "list": ["anne on annes-box", "see https://example.org/a/b/c", "255/255, 16 x 32/8", 7, None, 1.5],
        "anne": True,
    }
    assert check.without_names(value) == {
        "why": ".../src/x.py:3: bad (file://.../lib.so) from '.../a.py'",
        "list": ["USER on HOST", "see https://example.org/a/b/c", "255/255, 16 x 32/8", 7, None, 1.5],
        "USER": True,
    }


@pytest.mark.skipif(nvidia_gpus() > 0, reason="there is a GPU, on which engines may work")
def test_the_gpu_record_contains_no_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The complete check, with stand-ins for the GPU and for everything that takes long."""
    monkeypatch.setattr(doctor, "read_gpus", lambda: ((GPU,), ""))
    monkeypatch.setattr(check, "tests", lambda selection: [{"name": "a::test", "outcome": "passed"}])
    monkeypatch.setattr(check, "command", lambda *words: {"exit_code": 0, "answer": None, "said": list(words)})
    machine = {"rows": [], "networks": [], "folder": str(ROOT / "x")}
    monkeypatch.setattr(check, "latency", lambda: {"exit_code": 0, "answer": machine, "said": []})
    monkeypatch.setattr(check, "COPIES", 1)
    output = tmp_path / "gpu-check.json"
    with pytest.raises(SystemExit) as ended:
        check.gpu_check.main(["--output", str(output)])
    text = output.read_text(encoding="utf-8")
    written = json.loads(text)
    assert ended.value.code == 1, "no engine works on the stand-in"
    assert "no engine works on the GPU" in written["failures"]
    assert "latency: nothing was measured on the GPU" in written["failures"]
    assert written["latency"]["answer"]["folder"] == ".../x"
    assert written["schema_version"] == 1
    assert written["doctor"]["gpus"][0]["name"] == "NVIDIA RTX"
    assert set(written["benchmarks"]) == {"batch 1", "batch 8", "batch 32", "without CUDA graphs"}
    assert set(written["photos"]) == {"onnxruntime", "tensorrt", "tensorrt-rtx"}
    assert set(written["parity"]) == {"onnxruntime", "openvino", "tensorrt", "tensorrt-rtx"}
    for private in (str(ROOT), sys.prefix, str(tmp_path), os.environ["XDG_CACHE_HOME"]):
        assert private not in text
    assert "FAILED no engine works on the GPU" in capsys.readouterr().out


def test_an_interrupted_check_keeps_partial_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "read_gpus", lambda: ((GPU,), ""))
    monkeypatch.setattr(doctor, "examine", lambda say: GPU)
    monkeypatch.setattr(check, "tests", lambda selection: [{"name": "a::test", "outcome": "passed"}])
    monkeypatch.setattr(check, "parity", interrupted)
    with pytest.raises(click.Abort):
        check.gpu_check.main(["--output", str(tmp_path / "gpu-check.json")], standalone_mode=False)
    written = json.loads((tmp_path / "gpu-check.json").read_text(encoding="utf-8"))
    assert written["tests"][0]["outcome"] == "passed"
    assert written["doctor"]["name"] == "NVIDIA RTX"
    assert "failures" not in written
