"""A remedy can be pasted into a shell, and installs the missing packages."""

from __future__ import annotations

import importlib.metadata
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from petseg_runtime import host
from petseg_runtime.extras import install, requirements

ROOT = Path(__file__).resolve().parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
#: As hatchling writes them into the package's metadata.
METADATA = [
    "numpy>=2.0",
    "onnxruntime>=1.20; extra == 'cpu'",
    "pytest>=8.3; extra == 'dev'",
    "onnxruntime-gpu[cuda,cudnn]>=1.21; extra == 'gpu'",
    'cuda-bindings>=12.8; extra == "trt"',
    "tensorrt>=10.9; extra == 'trt'",
]


@pytest.mark.parametrize(
    ("extra", "command"),
    [
        ("cpu", "pip install 'onnxruntime>=1.20'"),
        ("gpu", "pip install 'onnxruntime-gpu[cuda,cudnn]>=1.21'"),
        ("trt", "pip install 'cuda-bindings>=12.8' 'tensorrt>=10.9'"),
    ],
)
def test_a_remedy_names_the_extras_packages(monkeypatch: pytest.MonkeyPatch, extra: str, command: str) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: METADATA)
    assert install(extra) == command
    assert shlex.split(command)[2:] == requirements(extra)


def test_on_a_jetson_the_packages_for_a_gpu_are_the_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: METADATA)
    monkeypatch.setattr(host, "jetson", lambda: True)
    assert install("cpu") == "pip install 'onnxruntime>=1.20'"
    for extra in ("gpu", "trt", "rtx"):
        assert "apt install python3-libnvinfer" in install(extra)
        assert not re.search("onnxruntime-gpu|580|tensorrt>=", install(extra))


def test_without_an_installed_petseg_the_remedy_names_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    assert install("cpu") == "pip install '.[cpu]' in a checkout of petseg"


def test_an_extra_unknown_to_the_installed_petseg_is_looked_up_in_the_checkout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: METADATA)
    assert install("heic") == "pip install '.[heic]' in a checkout of petseg"


def test_no_extra_has_a_conditional_requirement() -> None:
    assert not [line for lines in EXTRAS.values() for line in lines if ";" in line]


def test_no_message_suggests_installing_petseg_from_an_index() -> None:
    """petseg is on no index, so such a command would install nothing, or somebody else's package."""
    sent = re.compile(r"pip install (?:-\S+ )*'?petseg\b(?!-)")
    folders = (ROOT / "runtime" / "petseg_runtime", ROOT / "export" / "petseg_export")
    for path in (*(path for folder in folders for path in folder.rglob("*.py")), ROOT / "runtime" / "README.md"):
        if path.name != "extras.py":  # its docstring explains this
            assert not sent.search(path.read_text(encoding="utf-8")), path
