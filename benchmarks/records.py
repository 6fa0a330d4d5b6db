"""Records: what was measured, on which machine, with which command. One JSON file each, in ``results/``."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from petseg_runtime import host
from petseg_runtime.artifact import default_model, open_artifact
from petseg_runtime.files import write_atomic

RESULTS: Final = Path(__file__).parent / "results"
ROOT: Final = Path(__file__).parent.parent

_PACKAGES: Final = ("petseg", "numpy", "pillow", "onnxruntime", "openvino", "torch", "torchvision", "onnx")


def machine() -> dict[str, Any]:
    """Processor, cores, memory, GPUs, system, Python: what a number depends on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpus": [gpu.name for gpu in host.gpus()],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    """Versions of the packages that matter, of those that are installed."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def write(name: str, command: str, values: dict[str, Any]) -> Path:
    """Write the record ``results/NAME.json``; a name may hold a folder."""
    record = {
        "schema_version": 1,
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "commit": git("rev-parse", "HEAD").strip() or None,
        # Of what was measured, what the commit does not have; records and the README's tables are made on the way.
        "uncommitted": git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!README.md").splitlines(),
        "shipped_model": shipped_model(),
        "machine": machine(),
        "versions": versions(),
        **values,
    }
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    write_atomic(path, (json.dumps(record, indent=2) + "\n").encode())
    return path


def shipped_model() -> str:
    """The model in the package: its name, and the beginning of its digest."""
    artifact = open_artifact(default_model())
    return f"{artifact.spec.name}, {artifact.identity[:12]}"


def git(*arguments: str) -> str:
    """What git says; nothing where this is no checkout."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""


def load(name: str) -> dict[str, Any]:
    """The record of that name."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return record
