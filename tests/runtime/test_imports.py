"""Imports: the runtime needs no torch, `--help` needs nothing heavy, and missing packages are named."""

from __future__ import annotations

import importlib
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import petseg_runtime
from petseg.cli import COMMANDS, run
from petseg_runtime import parity, sample_photos
from petseg_runtime.artifact import Artifact
from petseg_runtime.extras import install

#: Makes the packages named in BLOCKED look as if they were not installed.
BLOCKER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Blocker())
"""

CLI = """
import sys
from petseg.cli import run
code = run(sys.argv[1:])
print("MODULES", *sorted(sys.modules), file=sys.stderr)
sys.exit(code)
"""


def python(program: str, *args: object, blocked: set[str] | None = None) -> subprocess.CompletedProcess[str]:
    prologue = f"BLOCKED = {blocked!r}\n{BLOCKER}" if blocked else ""
    command = [sys.executable, "-W", "error", "-c", prologue + program, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


UNWANTED = {"torch", "torchvision", "onnx", "onnxscript", "safetensors", "av", "matplotlib", "rich", "petseg_export"}


def imported(*args: object) -> set[str]:
    """The modules that a run of the command line has imported when it ends."""
    done = python(CLI, *args)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].removeprefix("MODULES ").split())


@pytest.mark.parametrize(
    "args",
    [["--help"], ["--version"], ["infer", "--help"], ["info", "--help"], ["verify", "--help"]],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(args: list[str]) -> None:
    modules = imported(*args)
    assert "click" in modules
    heavy = {"torch", "torchvision", "onnx", "av", "numpy", "PIL", "onnxruntime", "openvino", "rich", "matplotlib"}
    assert modules & heavy == set()


#: Not "cuda": cuda-bindings 12 imports that empty namespace whenever Python starts.
ENGINES = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx", "cuda.bindings"}


@pytest.mark.parametrize("kind", ["mask", "cutout", "coco-rle"])
def test_segmenting_imports_only_the_requested_engine(tmp_path: Path, kind: str) -> None:
    options = ("--as", kind, "--resume", "--backend", "onnxruntime", "--output", tmp_path)
    modules = imported("infer", *sample_photos()[:2], *options)
    assert {"numpy", "PIL", "onnxruntime"} <= modules
    assert modules & {*UNWANTED, *ENGINES - {"onnxruntime"}} == set()


def test_segmenting_in_openvino_imports_no_other_engine(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    modules = imported("infer", sample_photos()[0], "--backend", "openvino", "--output", tmp_path)
    assert {"numpy", "PIL", "openvino"} <= modules
    assert modules & {*UNWANTED, *ENGINES - {"openvino"}} == set()


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engines_telemetry_is_off(tmp_path: Path, engine: str) -> None:
    """When an engine is imported or loads a file, it writes the identifier that it reports with to the home folder."""
    pytest.importorskip(engine)
    home = tmp_path / "home"
    home.mkdir()
    env = {name: value for name, value in os.environ.items() if name not in ("CI", "ORT_DISABLE_TELEMETRY")}
    env |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PETSEG_CACHE": ""}
    program = f"from petseg_runtime import Segmenter, sample_photos; Segmenter(backend={engine!r})(sample_photos()[0])"
    subprocess.run([sys.executable, "-c", program], env=env, check=True, timeout=200)
    assert list(home.rglob("*")) == []


def test_without_a_gpu_auto_does_not_look_for_gpu_engines(tmp_path: Path) -> None:
    program = CLI.replace("import sys\n", "import sys\nfrom petseg_runtime import host\nhost.gpus = lambda: ()\n", 1)
    done = python(program, "infer", sample_photos()[0], "--output", tmp_path)
    assert done.returncode == 0, done.stderr
    modules = set(done.stderr.splitlines()[-1].split())
    assert modules & {"tensorrt", "tensorrt_rtx", "cuda.bindings", *UNWANTED} == set()


def test_conflicting_options_are_rejected_before_importing_an_engine(tmp_path: Path) -> None:
    done = python(CLI, "infer", sample_photos()[0], "--format", "jpg", "--output", tmp_path / "out")
    assert done.returncode == 2, done.stderr
    assert set(done.stderr.splitlines()[-1].split()) & ENGINES == set()


def test_info_needs_no_engine_and_no_numpy(proven: Artifact, ir: Callable[..., Artifact]) -> None:
    shutil.copy(parity.proof_of(proven.path), parity.proof_of(ir(proven).path))
    assert run(["verify", str(proven.path), "-q"]) == 0  # so that there is a result to show
    for path in (petseg_runtime.default_model(), proven.path, proven.path.with_suffix(".xml")):
        assert imported("info", path) & {"torch", "onnx", "numpy", "PIL", *ENGINES} == set()


def test_verifying_imports_only_the_requested_engine(proven: Artifact) -> None:
    modules = imported("verify", proven.path, "--backend", "onnxruntime")
    assert {"numpy", "onnxruntime", "PIL"} <= modules
    assert modules & {*UNWANTED, "petseg_export", *ENGINES - {"onnxruntime"}} == set()


def test_the_runtime_verifies_without_torch_and_onnx(proven: Artifact) -> None:
    program = """
from pathlib import Path
from petseg_runtime.artifact import open_artifact
from petseg_runtime.verify import verify_artifact
receipt = verify_artifact(open_artifact(Path(sys.argv[1])), threads=1)
assert receipt.passed
print(receipt.summary)
"""
    done = python(program, proven.path, blocked={"torch", "onnx", "petseg", "petseg_export", "PIL"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("smoke, 4 photos: passed, f32 in onnxruntime")


def test_the_runtime_segments_without_torch_and_onnx(tmp_path: Path) -> None:
    blocked = {"torch", "torchvision", "onnx", "onnxscript", "safetensors", "matplotlib", "petseg", "petseg_export"}
    program = """
try:
    import torch
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("torch was not blocked")
import petseg_runtime
with petseg_runtime.Segmenter(threads=1) as segmenter:
    result = segmenter(petseg_runtime.sample_photos()[0])
result.cutout().save(sys.argv[1])
print(result.mask.shape, result.coverage)
"""
    done = python(program, tmp_path / "cutout.png", blocked=blocked)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cutout.png").stat().st_size > 0


def modules() -> list[str]:
    return [module.name for module in pkgutil.walk_packages(petseg_runtime.__path__, "petseg_runtime.")]


def test_the_list_of_modules_below_is_complete() -> None:
    source = Path(petseg_runtime.__file__).parent
    files = {path.relative_to(source).with_suffix("") for path in source.rglob("*.py")} - {Path("__init__")}
    assert {Path(*name.split(".")[1:]) for name in modules()} == {
        path.parent if path.name == "__init__" else path for path in files
    }


@pytest.mark.parametrize("name", ["petseg_runtime", *modules()])
def test_every_name_in_dunder_all_exists(name: str) -> None:
    module: Any = importlib.import_module(name)
    offered = getattr(module, "__all__", None)
    if offered is None:
        assert hasattr(module, "__path__"), f"{name} says nothing of what it offers"
        return
    assert len(set(offered)) == len(offered)
    for item in offered:
        assert getattr(module, item) is not None


READMES = ("README.md", "runtime/README.md")


def readme_imports() -> list[str]:
    """The import lines of all Python examples in the READMEs."""
    root = Path(__file__).parents[2]
    shown = (re.findall(r"```python\n(.*?)```", (root / name).read_text(encoding="utf-8"), re.S) for name in READMES)
    lines = (line for blocks in shown for block in blocks for line in block.splitlines())
    return sorted({line for line in lines if line.startswith(("import ", "from "))})


@pytest.mark.parametrize("line", readme_imports())
def test_the_readmes_imports_work(line: str) -> None:
    exec(line, {})


def test_an_unknown_package_attribute_is_an_error() -> None:
    with pytest.raises(AttributeError, match="nonsense"):
        _ = petseg_runtime.nonsense


def test_windows_is_rejected_with_a_reason() -> None:
    done = python("import sys\nsys.platform = 'win32'\nimport petseg_runtime")
    assert done.stderr.splitlines()[-1].startswith(
        "ImportError: petseg does not run on Windows itself; install it in WSL"
    )


def test_a_type_checker_rejects_a_misspelt_name(tmp_path: Path) -> None:
    """And accepts every correct one."""
    pytest.importorskip("mypy")
    names = ", ".join(petseg_runtime.__all__)
    program = f"from petseg_runtime import {names}\nfrom petseg_runtime import Segmentr\n"
    (tmp_path / "program.py").write_text(program, encoding="utf-8")
    options = ("--strict", "--follow-imports=skip", "--config-file=", f"--cache-dir={tmp_path / 'cache'}")
    command = [sys.executable, "-m", "mypy", *options, str(tmp_path / "program.py"), str(petseg_runtime.__file__)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=tmp_path)
    errors = [line for line in done.stdout.splitlines() if ": error: " in line]
    assert len(errors) == 1, done.stdout + done.stderr
    assert "program.py:2:" in errors[0]
    assert '"petseg_runtime" has no attribute "Segmentr"' in errors[0]


CALLS = {
    "train": ["train", "--data", "{folder}", "--output", "{folder}/run"],
    "evaluate": ["evaluate", "{folder}/model.safetensors", "--data", "{folder}"],
    "data": ["data", "download", "{folder}"],
    "export": ["export", "{folder}/model.safetensors"],
}


def test_every_command_that_needs_an_extra_is_tried_below() -> None:
    assert set(CALLS) == {name for name, command in COMMANDS.items() if command.extra}


def test_photos_and_masks_are_checked_without_an_extra(folder_root: Path) -> None:
    packages = {"torch", "torchvision", "safetensors", "tensorboard", "matplotlib", "onnx", "onnxscript"}
    done = python(CLI, "data", "check", str(folder_root), blocked=packages)
    assert done.returncode == 0, done.stderr
    assert "12 pairs: 0 missing" in done.stdout


@pytest.mark.parametrize("command", sorted(CALLS))
def test_a_command_whose_extra_is_missing_names_it_and_exits_with_7(command: str, tmp_path: Path) -> None:
    args = [word.format(folder=tmp_path) for word in CALLS[command]]
    packages = {"torch", "torchvision", "safetensors", "tensorboard", "matplotlib", "onnx", "onnxscript"}
    done = python(CLI, *args, blocked=packages)
    assert done.returncode == 7, done.stderr
    (message,) = (line for line in done.stderr.splitlines() if line.startswith("petseg: "))
    extra = "export" if command == "export" else "train"
    needed = message.removeprefix(f"petseg: `petseg {command}` needs ").partition(",")[0]
    assert needed in packages
    assert message.endswith(f"which is not installed: {install(extra)}")
    assert list(tmp_path.iterdir()) == []
