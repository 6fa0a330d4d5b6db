"""Benchmark records: what was measured, on which machine, with which command. One JSON file each, in ``results/``.

Records of other machines are in ``results/machines/NAME/``. New records go to the folder in the environment variable
``PETSEG_RESULTS``, if it is set.

In a virtual machine, the name of the processor says little: two called "AMD EPYC" differ twofold in speed. So a record
contains its family, model, cache size and instruction sets, and the matmul speed at the time of the record.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import numpy as np

from petseg_runtime import host
from petseg_runtime.artifact import default_model, open_artifact
from petseg_runtime.files import write_atomic

#: The records that the pages are made from.
RESULTS: Final = Path(__file__).parent / "results"
#: Environment variable with another folder for new records.
ELSEWHERE: Final = "PETSEG_RESULTS"
ROOT: Final = Path(__file__).parent.parent
#: Pathspecs that exclude records and the pages made from them: they change while other benchmarks run.
MADE: Final = (
    ":!benchmarks/results",
    ":!benchmarks/RESULTS.md",
    ":!README.md",
    ":!runtime/README.md",
    ":!runtime/petseg_runtime/models/README.md",
)

#: Linux's description of the processor.
CPUINFO: Final = Path("/proc/cpuinfo")
#: Instruction sets for short names, best first: the name and the kernel's flag.
BEST_INSTRUCTIONS: Final = {
    "AMX": "amx_bf16",
    "AVX-512 with bf16": "avx512_bf16",
    "AVX-512 with VNNI": "avx512_vnni",
    "AVX-512": "avx512f",
    "AVX2": "avx2",
}
#: Generations of processors whose names virtual machines hide: by name, family and model.
GENERATIONS: Final = {
    ("AMD EPYC", "25", "1"): "Zen 3",
    ("AMD EPYC", "25", "17"): "Zen 4",
    ("AMD EPYC", "26", "2"): "Zen 5",
    ("Intel Xeon", "6", "207"): "Emerald Rapids",
}
#: The matmul that compares machines: its rows and columns, and how long it is repeated; smaller in tests.
CALIBRATION_SIZE, CALIBRATION_SECONDS = 1024, 1.0


def machine() -> dict[str, Any]:
    """Everything that a figure depends on: processor, cores, memory, GPUs, system, Python, and the current speed."""
    cpu = host.host().cpu
    about = processor(cpu)
    return {
        "cpu": short_name(about),
        "cores": cpu.cores,
        "memory_gb": round(cpu.memory / 1e9, 1),
        "gpus": [gpu.name for gpu in host.gpus()],
        "system": f"{platform.system()} {platform.machine()}",
        "kernel": platform.release(),
        "python": platform.python_version(),
        "processor": about,
        "calibration": calibration(),
    }


def processor(cpu: host.Cpu) -> dict[str, Any]:
    """The kernel's description of the first core (None where missing), and the instruction sets that engines use."""
    fields: dict[str, str] = {}
    for line in CPUINFO.read_text(encoding="utf-8").splitlines() if CPUINFO.exists() else ():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    keys = {"vendor": "vendor_id", "family": "cpu family", "model": "model", "stepping": "stepping"}
    found = {name: fields.get(key) for name, key in keys.items()}
    return {"name": cpu.name, **found, "cache": fields.get("cache size"), "instructions": list(cpu.features)}


def short_name(about: Mapping[str, Any]) -> str:
    """The processor in a few words: the product name or, where a virtual machine hides it, what is known instead."""
    name = " ".join(re.sub(r"\((R|TM)\)|\bProcessor\b|\bCPU\b|@.*", " ", str(about["name"])).split())
    if about["family"] is None or re.search(r"\d", name):
        return name
    best = next((label for label, flag in BEST_INSTRUCTIONS.items() if flag in about["instructions"]), "no AVX2")
    kind = (name, about["family"], about["model"])
    return f"{name} ({GENERATIONS.get(kind, f'family {kind[1]}, model {kind[2]}')}, {best})"


def calibration() -> dict[str, Any]:
    """Measure the machine's speed: the fastest of numpy's 1024 x 1024 float32 matmuls within a second.

    ``threads`` is the number of cores they kept busy on average; fewer than all if other processes were running.
    """
    a, b = np.random.default_rng(0).random((2, CALIBRATION_SIZE, CALIBRATION_SIZE), dtype=np.float32)
    product = np.empty_like(a)
    times: list[float] = []
    start, busy = time.perf_counter(), time.process_time()
    while not times or time.perf_counter() < start + CALIBRATION_SECONDS:
        began = time.perf_counter()
        np.matmul(a, b, out=product)
        times.append(time.perf_counter() - began)
    threads = (time.process_time() - busy) / (time.perf_counter() - start)
    built: Any = np.show_config(mode="dicts")
    blas = built.get("Build Dependencies", {}).get("blas", {})
    return {
        "what": f"numpy matmul, float32, {CALIBRATION_SIZE} x {CALIBRATION_SIZE}",
        "gflops": round(2 * CALIBRATION_SIZE**3 / min(times) / 1e9, 1),
        "matmuls": len(times),
        "threads": round(threads, 1),
        "blas": f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip(),
    }


def versions() -> dict[str, str]:
    """Versions of the relevant packages that are installed."""
    return host.versions(("petseg", *host.PACKAGES, "torch", "torchvision", "onnx"))


def write(name: str, command: str, values: dict[str, Any], output: Path | None = None) -> Path:
    """Write a record to ``output``, or as ``NAME.json`` to the folder of new records; the name may contain a folder."""
    record = {
        "schema_version": 1,
        "command": command,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **checkout(),
        "shipped_model": shipped_model(),
        "machine": machine(),
        "versions": versions(),
        **values,
    }
    path = output or Path(os.environ.get(ELSEWHERE) or RESULTS) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, (json.dumps(record, indent=2) + "\n").encode())
    return path


@functools.cache
def checkout() -> dict[str, Any]:
    """The commit, and the uncommitted changes to what is measured; cached, because people commit during a benchmark.

    Both are None where git cannot tell.
    """
    if not (commit := git("rev-parse", "HEAD").strip()):
        return {"commit": None, "uncommitted": None}
    return {"commit": commit, "uncommitted": git("status", "--porcelain", "--", ".", *MADE).splitlines()}


def shipped_model() -> str:
    """The built-in model: its name and the first digits of its digest."""
    artifact = open_artifact(default_model())
    return f"{artifact.spec.name}, {artifact.identity[:12]}"


def git(*arguments: str) -> str:
    """Run git and return its output; empty if this is not a checkout, or without git."""
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    except FileNotFoundError:
        return ""


def load(name: str, folder: Path | None = None) -> dict[str, Any]:
    """Load a record by name, from ``results/`` or another folder; its processor has the name that it has today."""
    record: dict[str, Any] = json.loads(((folder or RESULTS) / f"{name}.json").read_text(encoding="utf-8"))
    about = record.get("machine", {}).get("processor", {})
    if "name" in about:
        record["machine"]["cpu"] = short_name(about)
    return record


def machines() -> list[Path]:
    """The folders with the records of other machines."""
    return sorted(path for path in (RESULTS / "machines").glob("*") if path.is_dir())
