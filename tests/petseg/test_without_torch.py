"""Exported files are measured without PyTorch, which devices do not have."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import contents
from petseg_export import OpenVINOConfig, export
from petseg_runtime import default_model
from petseg_runtime.extras import install

PACKAGES = {"torch", "torchvision", "safetensors", "tensorboard", "onnx", "onnxscript"}
DRAWING = {"matplotlib"}
MEASURE = ("evaluate", default_model(), "--device", "cpu")

#: Runs the command line as if the packages named first were not installed; prints what it imported.
PROGRAM = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

blocked = sys.argv[1].split()
sys.meta_path.insert(0, Blocker())
from petseg.cli import run
code = run(sys.argv[2:])
print("MODULES", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
sys.exit(code)
"""


def petseg(*args: object, blocked: set[str] | None = None) -> tuple[int, str, list[str], set[str]]:
    """Exit code, stdout, the lines of stderr, and the imported packages."""
    command = [sys.executable, "-W", "error", "-c", PROGRAM, " ".join(blocked or ()), *map(str, args)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    *lines, modules = done.stderr.splitlines()
    assert modules.startswith("MODULES "), done.stderr
    return done.returncode, done.stdout, lines, set(modules.split()[1:])


def test_an_exported_file_is_measured_alike_with_torch_and_without(oxford_root: Path, tmp_path: Path) -> None:
    args = (*MEASURE, "--data", oxford_root, "--json", "--output")
    there = petseg(*args, tmp_path / "there")
    gone = petseg(*args, tmp_path / "gone", blocked=PACKAGES | DRAWING)
    assert (there[0], there[2]) == (0, []), there
    assert gone[0] == 0, gone
    assert json.loads(gone[1])["photos"] == 6
    assert gone[1] == there[1]
    picture = tmp_path / "gone" / "worst.png"
    assert gone[2] == [f"petseg: {picture}: not drawn, because it needs matplotlib: pip install matplotlib"]
    files = contents(tmp_path / "there")
    assert files.pop("worst.png")
    assert contents(tmp_path / "gone") == files
    assert set(files) == {"evaluation.json", "images.csv"}
    assert there[3] & PACKAGES == set(), "nor is it imported where it is installed"


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model as an OpenVINO IR, made like `petseg export` makes it."""
    pytest.importorskip("openvino")
    file = tmp_path_factory.mktemp("compiled") / "edge.xml"
    checkpoint = Path(__file__).parents[2] / "petseg" / "weights" / "edge.safetensors"
    export(checkpoint, OpenVINOConfig(output=file, photos=2))
    return file


def test_a_compiled_file_is_measured_without_torch_as_the_onnx_file_is(
    compiled: Path, oxford_root: Path, tmp_path: Path
) -> None:
    args = ("--data", oxford_root, "--device", "cpu", "--backend", "ov", "--json")
    code, out, lines, modules = petseg("evaluate", compiled, *args, blocked=PACKAGES | DRAWING)
    assert (code, lines) == (0, [])
    assert modules & PACKAGES == set()
    result, of_onnx = json.loads(out), json.loads(petseg("evaluate", default_model(), *args)[1])
    assert result["model"]["file"] == "edge.xml"
    assert result["model"]["engine"].startswith("openvino ")
    assert result["model"]["identity"] == of_onnx["model"]["identity"]
    assert result["photos"] == 6
    assert result["iou"] == pytest.approx(of_onnx["iou"], abs=2e-3)


def test_an_engine_that_cannot_be_had_is_no_measurement(compiled: Path, oxford_root: Path) -> None:
    code, out, lines, _ = petseg("evaluate", compiled, "--data", oxford_root, "--backend", "ort", blocked=PACKAGES)
    assert (code, out) == (5, "")
    assert lines == [f"petseg: {compiled}: onnxruntime does not run openvino files; engines that do: openvino"]


def test_measuring_imports_nothing_that_it_does_not_need(folder_root: Path) -> None:
    code, _, _, modules = petseg(*MEASURE, "--data", folder_root, "--split", "val")
    assert code == 0
    assert modules & {*PACKAGES, *DRAWING, "av", "petseg_export"} == set()
    assert {"numpy", "PIL"} <= modules


def test_a_report_needs_matplotlib_and_no_torch(oxford_root: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    args = (*MEASURE, "--data", oxford_root, "-q", "--report", tmp_path / "report")
    code, _, lines, _ = petseg(*args, blocked=DRAWING)
    assert code == 7
    (line,) = lines
    assert line.startswith("petseg: `petseg evaluate --report` needs matplotlib for its charts")
    assert "pip install matplotlib" in line
    assert not (tmp_path / "report").exists()
    assert petseg(*args, blocked=PACKAGES)[:3] == (0, "", [])
    assert set(contents(tmp_path / "report")) == {"report.html", "report.json"}


def test_a_checkpoint_without_torch_names_the_extra(oxford_root: Path) -> None:
    code, out, lines, _ = petseg("evaluate", "best.safetensors", "--data", oxford_root, blocked=PACKAGES | DRAWING)
    assert (code, out) == (7, "")
    assert lines == [f"petseg: `petseg evaluate` needs torch, which is not installed: {install('train')}"]
