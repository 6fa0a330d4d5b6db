"""The embedded model in every CPU engine beside its checkpoint in PyTorch, one photo at a time, in alternation."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
import torch

from benchmarks import records
from petseg.checkpoint import load_model
from petseg.evaluate import torch_run
from petseg.model import AttentionUNet
from petseg_export.deploy import DeployedUNet
from petseg_runtime.artifact import default_model, open_artifact
from petseg_runtime.engines.base import Engine, usable_cpus
from petseg_runtime.engines.registry import load_engine

CHECKPOINT = records.ROOT / "petseg" / "weights" / "edge.safetensors"


@click.command()
@click.option("--int8", type=click.Path(path_type=Path), help="The same model in int8, as `petseg export` made it.")
@click.option("--rounds", type=int, default=20, show_default=True)
@click.option("--runs", type=int, default=20, show_default=True, help="Of each engine in each round.")
def latency(int8: Path | None, rounds: int, runs: int) -> None:
    """Milliseconds a photo of each engine, and how many times faster than PyTorch that is."""
    artifacts = {"fp32": open_artifact(default_model())}
    if int8:
        artifacts["int8"] = open_artifact(int8)
    spec = artifacts["fp32"].spec
    image = np.random.default_rng(0).integers(0, 256, (1, spec.height, spec.width, 3), dtype=np.uint8)
    engines = {
        f"{name} {stored} {'exact' if exact else 'as it likes'}": load_engine(artifact, name, exact=exact)
        for stored, artifact in artifacts.items()
        for name in ("onnxruntime", "openvino")
        for exact in ((True, False) if name == "openvino" else (True,))  # the other computes in float32 anyway
    }
    model, _ = load_model(CHECKPOINT)
    torch.set_num_threads(usable_cpus())
    networks = {"as trained": torch_run(model), "BatchNorm folded": folded(model)}
    functions: dict[str, Callable[[], Any]] = {
        f"PyTorch {name}": lambda run=run: run(image)  # type: ignore[misc]
        for name, run in networks.items()
    }
    functions |= {name: lambda engine=engine: engine.run(image) for name, engine in engines.items()}  # type: ignore[misc]
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function()  # what the engine before it has left in the caches and pools
            times[name].append(median(measured(function, runs)))
    reference = times["PyTorch as trained"]
    rows = [
        {
            "name": name,
            **(told(engines[name]) if name in engines else eager(name)),
            "milliseconds": values,
            "median": median(values),
            "times_faster_than_pytorch": median(a / b for a, b in zip(reference, values, strict=True)),
        }
        for name, values in times.items()
    ]
    for row in rows:
        click.echo(f"{row['name']:>32} {row['median']:7.2f} ms {row['times_faster_than_pytorch']:6.2f}x", err=True)
    command = f"python -m benchmarks latency --rounds {rounds} --runs {runs}" + (" --int8 FILE" if int8 else "")
    size = [spec.height, spec.width]
    records.write("latency", command, {"model": spec.name, "size": size, "threads": usable_cpus(), "rows": rows})


def eager(name: str) -> dict[str, str]:
    """What is told of PyTorch, which has no description of its own."""
    version = torch.__version__.partition("+")[0]
    return {"engine": f"PyTorch {version}, eager", "stored": name.removeprefix("PyTorch "), "precision": "f32"}


def told(engine: Engine) -> dict[str, str]:
    """An engine, what the file is stored in, and what is computed in."""
    info = engine.describe()
    between = re.search(r", (\w+) between the int8 layers", info.provider)
    precision = info.precision + (f" and {between[1]}" if between else "")
    return {"engine": f"{info.name} {info.version}", "stored": engine.spec.precision, "precision": precision}


def measured(function: Callable[[], Any], runs: int) -> list[float]:
    """Milliseconds of each run; every engine has its answer in memory when it returns."""
    found = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        found.append(1e3 * (time.perf_counter() - start))
    return found


def folded(model: AttentionUNet) -> Callable[[Any], Any]:
    """The network as it is exported: half of what a compiler does to it is done already."""
    deployed = DeployedUNet(model)

    def run(batch: Any) -> Any:
        with torch.inference_mode():
            return deployed(torch.from_numpy(batch)).numpy()

    return run
