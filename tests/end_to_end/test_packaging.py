"""The wheel, installed in a clean environment outside the repository, as users install it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHELSEA = ROOT / "runtime" / "petseg_runtime" / "models" / "samples" / "chelsea.jpg"

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]


#: The environment without variables that would make the checkout importable.
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "PETSEG_"))}


def sh(*args: object, cwd: Path | None = None) -> str:
    command = list(map(str, args))
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False, env=CLEAN)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    sh(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="module")
def names(dist: Path) -> set[str]:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def installed(folder: Path, *words: object) -> Path:
    """Create an environment with these packages, using this environment's pip, because installing pip takes long."""
    venv.create(folder)
    sh(sys.executable, "-m", "pip", "--python", folder / "bin" / "python", "install", "-q", "--retries", "10", *words)
    return folder


@pytest.fixture(scope="module")
def light(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment with the wheel and a CPU engine only."""
    (wheel,) = dist.glob("*.whl")
    return installed(tmp_path_factory.mktemp("light") / "venv", f"{wheel}[cpu]")


@pytest.fixture(scope="module")
def gpu(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an environment with the wheel and ONNX Runtime's GPU package (without CUDA itself, 3 GB)."""
    (wheel,) = dist.glob("*.whl")
    return installed(tmp_path_factory.mktemp("gpu") / "venv", "--no-compile", wheel, "onnxruntime-gpu")


def test_the_wheel_contains_three_packages_and_nothing_else(names: set[str]) -> None:
    tops = {name.partition("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"petseg", "petseg_export", "petseg_runtime"}


def test_the_wheel_has_model_samples_types_and_licence(names: set[str]) -> None:
    assert names >= {
        "petseg/py.typed",
        "petseg/recipes/best.toml",
        "petseg/recipes/edge.toml",
        "petseg/recipes/published.toml",
        "petseg_export/py.typed",
        "petseg_runtime/py.typed",
        "petseg_runtime/models/edge.onnx",
        "petseg_runtime/models/edge.onnx.parity.npz",
        "petseg_runtime/models/README.md",
        "petseg_runtime/models/road.npz",
        "petseg_runtime/models/samples/chelsea.jpg",
    }
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_names_the_licence_of_everything_in_it(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
        card = archive.read("petseg_runtime/models/README.md").decode()
    assert "License-Expression: Apache-2.0 AND CC-BY-SA-4.0 AND CC0-1.0" in lines
    assert "https://creativecommons.org/licenses/by-sa/4.0/" in card, "who passes photos on has to say where it is"


def test_the_wheel_has_every_module_of_the_repository(names: set[str]) -> None:
    modules = {
        path.relative_to(home).as_posix()
        for home, package in (("", "petseg"), ("export", "petseg_export"), ("runtime", "petseg_runtime"))
        for home in [ROOT / home]
        for path in (home / package).rglob("*.py")
    }
    assert modules == {name for name in names if name.endswith(".py")}


def test_wheel_and_sdist_exclude_checkpoints_and_records(dist: Path, names: set[str]) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = set(archive.getnames())
    for name in names | packed:
        assert not name.endswith(".safetensors"), name
        assert "benchmarks/results" not in name, name
    assert any(name.endswith("tests/end_to_end/test_packaging.py") for name in packed)
    assert sdist.stat().st_size < 12e6


def test_the_embedded_model_is_at_most_8_mb(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert archive.getinfo("petseg_runtime/models/edge.onnx").file_size <= 8e6


def test_the_light_install_segments_a_photo_without_torch(light: Path, tmp_path: Path) -> None:
    named = "import importlib.metadata, json; print(json.dumps([d.name for d in importlib.metadata.distributions()]))"
    packages = {name.lower() for name in json.loads(sh(light / "bin" / "python", "-c", named, cwd=tmp_path))}
    assert {"petseg", "numpy", "pillow"} <= packages
    assert not packages & {"torch", "torchvision", "onnx", "onnxscript", "matplotlib", "safetensors"}
    out = sh(light / "bin" / "petseg", "infer", CHELSEA, "--output", tmp_path, "--json", cwd=tmp_path)
    assert json.loads(out.splitlines()[-1])["done"] == 1
    assert (tmp_path / "chelsea.png").stat().st_size > 0


def test_the_light_install_verifies_its_model_and_lists_formats(light: Path, tmp_path: Path) -> None:
    receipt = json.loads(sh(light / "bin" / "petseg", "verify", "--json", cwd=tmp_path))
    assert receipt["passed"] is True
    assert receipt["kind"] == "full"
    assert receipt["road"]["passed"] is True
    listed = sh(light / "bin" / "petseg", "export", "--list", cwd=tmp_path)
    assert "torch is not installed: pip install " in listed
    assert "'onnxscript>=" in listed, "what the extra brings, read from the installed package"


def test_the_light_install_measures_its_model_on_labelled_photos(
    light: Path, folder_root: Path, tmp_path: Path
) -> None:
    (model,) = light.rglob("edge.onnx")
    args = ("evaluate", model, "--data", folder_root, "--split", "trainval", "--json")
    assert json.loads(sh(light / "bin" / "petseg", *args, cwd=tmp_path))["photos"] == 9


def test_the_light_install_occupies_no_repository_folder_names(light: Path, tmp_path: Path) -> None:
    for name in ("export", "runtime", "benchmarks", "tests"):
        probe = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({name!r}) is not None)"
        sh(light / "bin" / "python", "-c", probe, cwd=tmp_path)


def test_the_light_install_says_which_extra_training_needs(light: Path, tmp_path: Path) -> None:
    command = [str(light / "bin" / "petseg"), "train", "--data", "x", "--output", "y"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 7
    assert "pip install" in done.stderr
    assert "'torch>=" in done.stderr


def test_the_light_install_takes_less_than_350_mb(light: Path) -> None:
    packages = next((light / "lib").glob("python*")) / "site-packages"
    size = sum(path.stat().st_size for path in packages.rglob("*") if path.is_file())
    assert size < 350e6, f"{size / 1e6:.0f} MB"


def test_onnxruntime_gpu_falling_back_to_the_cpu_is_an_error(gpu: Path, tmp_path: Path) -> None:
    hidden = {**CLEAN, "CUDA_VISIBLE_DEVICES": ""}
    command = [str(gpu / "bin" / "petseg"), "infer", str(CHELSEA), "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--backend", "onnxruntime", "--device", "cuda"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
        env=hidden,
    )
    assert done.returncode == 5
    assert done.stdout == ""
    assert "petseg: cuda:0 is not available" in done.stderr
    assert "would run it with CPUExecutionProvider instead of CUDAExecutionProvider" in done.stderr
    assert not list((tmp_path / "out").rglob("*.png"))


def test_onnxruntime_gpu_runs_on_the_cpu_on_request(gpu: Path, tmp_path: Path) -> None:
    sh(gpu / "bin" / "petseg", "infer", CHELSEA, "--device", "cpu", "--output", tmp_path)
    assert (tmp_path / "chelsea.png").stat().st_size > 0
