"""Latency of the model in every engine that works here, compared with PyTorch and with the machine's matmul peak.

Two networks are measured: the built-in model's, and the published width with random weights, for speed only. For the
built-in one, with one photo per run, each engine is first opened in a separate process to measure its cold start (from
the file to the first output) and its memory.
Then all engines run the same batch in turns (turns.py), round after round, interleaved with matmuls (roofline.py).
If there is an NVIDIA GPU, engines and matmuls also have turns on it. Each engine is compared with PyTorch on the same
device. Every run ends with its output in CPU memory, so that the GPU's time is included.

torch is imported only where it is used: a process that measures another engine must not load it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, TypeAlias
from unittest import mock

import click
import numpy as np

from benchmarks import photos, records
from benchmarks.turns import FEWEST, U8, Job, Turns, alternated, count, timed
from petseg_runtime import cache, host
from petseg_runtime.artifact import PROVENANCE_KEY, default_model, open_artifact, sample_photos
from petseg_runtime.engines.base import Engine
from petseg_runtime.engines.registry import ENGINES, RULE, load_engine
from petseg_runtime.errors import one_line
from petseg_runtime.host import usable_cpus
from petseg_runtime.onnx_metadata import with_metadata
from petseg_runtime.spec import SPEC_KEY, ModelSpec

if TYPE_CHECKING:
    from benchmarks.roofline import Matmul

#: For each kind of device, the operations per second of its matmuls, round by round.
Rates: TypeAlias = "Mapping[str, dict[Matmul, list[float]]]"

CHECKPOINT = records.ROOT / "petseg" / "weights" / "edge.safetensors"
#: The checkpoint in a network's folder, beside its exported files (fp32.onnx, int8.onnx, ...).
WEIGHTS: Final = "model.safetensors"
PYTORCH: Final = "PyTorch"
AS_TRAINED, FOLDED = "as trained", "BatchNorm folded"
#: The forms of the network that PyTorch runs: precision, and whether compiled.
FORMS: Final = {
    AS_TRAINED: ("f32", False),
    FOLDED: ("f32", False),
    f"{FOLDED}, bf16": ("bf16", False),
    f"{FOLDED}, fp16": ("fp16", False),
    f"{FOLDED}, compiled": ("f32", True),
}
#: The forms that are also measured with several photos per run: each start of PyTorch takes seconds.
FORMS_OF_BATCHES: Final = (AS_TRAINED, f"{FOLDED}, bf16", f"{FOLDED}, fp16")
#: Percentiles, and the number of runs (of all rounds) that each needs: with fewer it would just be the maximum.
OF_RUNS: Final = {50: 1, 95: 20, 99: 100}
#: The record's note on them.
PERCENTILES: Final = "of the runs of all rounds, p95 of 20 or more, p99 of 100 or more; disturbed turns are repeated"


@dataclass(frozen=True)
class Network:
    """A network to measure.

    Attributes:
        name: A name for display.
        width: Width of the attention U-Net; 0: the built-in model, with its weights, stem and size.
        stem: Its stem.
        size: Height and width of the photo.
        batches: Photos per run.
        compiled: Whether to measure torch.compile as well, which takes half a minute each time.
    """

    name: str
    width: int
    stem: str
    size: int
    batches: tuple[int, ...]
    compiled: bool = False


NETWORKS: Final = (
    Network("the built-in model", 0, "", 0, (1, 8), compiled=True),
    Network("width 64", 64, "full", 128, (1,)),
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """One engine with one file.

    Attributes:
        folder: Folder of the network's files.
        engine: One of the registry's, or :data:`PYTORCH`.
        stored: The precision that the file is stored in; for PyTorch, one of :data:`FORMS`.
        exact: See :class:`petseg_runtime.engines.base.EngineOptions`.
        device: ``cpu``, ``cuda``, ...
        batch: Photos per run.
        threads: CPU threads.
    """

    folder: str
    engine: str
    stored: str
    exact: bool = True
    device: str = "cpu"
    batch: int = 1
    threads: int = 1

    @property
    def name(self) -> str:
        """A name that is unique among the cases of a network and batch."""
        manner = "" if self.engine == PYTORCH else " exact" if self.exact else " as it likes"
        return f"{self.engine} {self.stored}{manner}" + (f" on {self.device}" if self.device != "cpu" else "")

    @property
    def is_reference(self) -> bool:
        """Whether the other cases on its device are compared with it."""
        return (self.engine, self.stored) == (PYTORCH, AS_TRAINED)


@dataclass(frozen=True)
class Opened:
    """An opened case: the function that runs a batch, the description for the record, and the function to close it."""

    run: Callable[[U8], U8]
    about: dict[str, str]
    close: Callable[[], None]


@click.command()
@photos.data_option
@click.option("--int8", type=click.Path(path_type=Path), help="The built-in model in int8.  [default: exported here]")
@click.option("--rounds", type=click.IntRange(1), default=11, show_default=True, help="Turns of each engine.")
@click.option("--threads", type=click.IntRange(1), default=usable_cpus(), help="CPU threads.  [default: all]")
@click.option("--compile/--no-compile", "compiled", default=True, help="Measure torch.compile (30 s a network).")
@click.option("--family/--no-family", default=True, help="Measure the networks that do not ship.")
@click.option("--output", type=click.Path(path_type=Path), help="Path of the record.  [default: among the results]")
def latency(
    data: Path, int8: Path | None, rounds: int, threads: int, compiled: bool, family: bool, output: Path | None
) -> None:
    """Measure each engine, precision, batch and network, and its share of the matmul peak."""
    from benchmarks import roofline

    kinds = ["cpu", *(["cuda"] if host.nvidia_gpus() else [])]
    with scratch() as folder:
        groups: list[dict[str, Any]] = []
        made = {kind: roofline.matmuls(kind, threads) for kind in kinds}
        rates: Rates = {kind: {matmul: [] for matmul in matmuls} for kind, (matmuls, _) in made.items()}
        failed = [reason for _, reasons in made.values() for reason in reasons]
        for network in NETWORKS if family else NETWORKS[:1]:
            about = make_files(network, folder / network.name, data, int8)
            for batch in network.batches:
                found = cases(folder / network.name, batch, threads, compiled=compiled and network.compiled)
                group, reasons = measure(worth_it(found, groups), rounds, rates, about, cold=not groups)
                groups.append(group)
                failed += [f"{group['name']}: {reason}" for reason in reasons]
    first, *others = groups
    del first["name"]  # its rows keep the names that they have in older records, for `compare`
    peaks = {kind: roofline.as_rows(values) for kind, values in rates.items()}
    rest = {"threads": threads, "percentiles": PERCENTILES, "matmul_peaks": peaks, "not_measured": failed}
    command = f"python -m benchmarks latency --data DATA --rounds {rounds}"
    options = {"--int8 FILE": int8, "--no-compile": not compiled, "--no-family": not family}
    command = " ".join([command, *(option for option, given in options.items() if given)])
    # The README's first table shows the built-in model with one photo per run.
    click.echo(records.write("latency", command, {**first, **rest, "networks": others}, output))


def worth_it(found: Sequence[Case], groups: Sequence[Mapping[str, Any]]) -> list[Case]:
    """Drop the cases that failed, or duplicated another, in the first group: they would do so again."""
    tried = {name for group in groups[:1] for name in group["tried"]}
    measured = {row["name"] for group in groups[:1] for row in group["rows"]}
    return [case for case in found if case.name not in tried - measured]


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """Make a folder for files and for the caches of engines and torch.compile, so that cold starts are cold."""
    with tempfile.TemporaryDirectory() as folder:
        caches = {name: f"{folder}/caches/{name}" for name in (cache.VARIABLE, "TORCHINDUCTOR_CACHE_DIR")}
        with mock.patch.dict(os.environ, caches):
            yield Path(folder)


# Files


def make_files(network: Network, folder: Path, data: Path, int8: Path | None = None) -> dict[str, Any]:
    """Write the network's weights and ONNX files to a folder; return their description for the record."""
    from petseg.checkpoint import load_model

    folder.mkdir(parents=True)
    if network.width:
        spec = random_weights(network, folder / WEIGHTS)
        write_onnx(folder, spec, ("fp32", "int8", *(("fp16",) if host.nvidia_gpus() else ())))
        weights = "random, speed only; int8: all layers"
    else:
        spec = open_artifact(default_model()).spec
        (folder / WEIGHTS).symlink_to(CHECKPOINT)
        (folder / "fp32.onnx").symlink_to(default_model())
        weights = "trained; " + ship_int8(folder, data, int8)
        write_onnx(folder, spec, ("fp16",) if host.nvidia_gpus() else ())  # a CPU would compute it in another precision
    model, _ = load_model(folder / WEIGHTS)
    return {
        "model": spec.name,
        "size": [spec.height, spec.width],
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": weights,
    }


def random_weights(network: Network, path: Path) -> ModelSpec:
    """Write a checkpoint with random weights; return its specification, which the exported files share."""
    import torch

    from petseg.checkpoint import save_checkpoint
    from petseg.model import AttentionUNet, AttentionUNetConfig

    torch.manual_seed(0)
    config = AttentionUNetConfig(width=network.width, stem=network.stem)  # type: ignore[arg-type]
    save_checkpoint(path, AttentionUNet(config).state_dict(), {"kind": "model", "model": dataclasses.asdict(config)})
    return ModelSpec(name=f"attention U-Net, {network.name}", height=network.size, width=network.size)


def ship_int8(folder: Path, data: Path, given: Path | None) -> str:
    """Link the given int8 file of the built-in model, or export it as `petseg export` does; return how it was made."""
    from petseg_export import OnnxConfig, QuantizeConfig, export

    if given:
        (folder / "int8.onnx").symlink_to(given.resolve())
        return "int8: as given"
    if not data.is_dir():
        write_onnx(folder, open_artifact(default_model()).spec, ("int8",))
        return "int8: all layers, speed only (no data to judge it on)"
    quantize, judge = QuantizeConfig(data=photos.training_set(data)), photos.original_size(data)
    export(CHECKPOINT, OnnxConfig(output=folder / "int8.onnx", precision="int8", data=judge, quantize=quantize))
    return "int8: within 0.5 points of IoU"


def write_onnx(folder: Path, spec: ModelSpec, precisions: Sequence[str]) -> None:
    """Write the folder's network as ONNX files; int8 in all layers, calibrated on the sample photos, never judged."""
    from petseg.checkpoint import load_model
    from petseg_export import parity
    from petseg_export.deploy import DeployedUNet
    from petseg_export.onnx import graph_bytes

    model, _ = load_model(folder / WEIGHTS)
    samples = parity.read(sample_photos(), spec).images
    convolutions = {name.removesuffix(".weight") for name, p in model.named_parameters() if p.ndim == 4}
    for precision in precisions:
        half = convolutions if precision == "fp16" else frozenset()
        graph = graph_bytes(DeployedUNet(model, half), spec)
        if precision == "int8":
            graph = all_int8(graph, samples)
        text = dataclasses.replace(spec, precision=precision).to_json()
        (folder / f"{precision}.onnx").write_bytes(with_metadata(graph, {SPEC_KEY: text, PROVENANCE_KEY: "{}"}))


def all_int8(graph: bytes, samples: U8) -> bytes:
    """Quantize every convolution to int8, calibrated on some photos, uint8 [N, H, W, 3]."""
    import onnx

    from petseg_export.quantize import METHODS, calibrate, layers_of, with_int8

    proto = onnx.load_from_string(graph)
    seen = calibrate(proto, samples, lambda what, done, total: None)
    ranges = {name: METHODS["minmax"](values) for name, values in seen.items()}
    return with_int8(proto, layers_of(proto).keys(), ranges)


def cases(folder: Path, batch: int, threads: int, *, compiled: bool) -> list[Case]:
    """Return a case for each engine with each file, and for PyTorch, whether they work here or not."""
    gpu = ("cuda",) if host.nvidia_gpus() else ()
    on_cpu = precisions_of_the_cpu()
    common: dict[str, Any] = {"folder": str(folder), "batch": batch, "threads": threads}
    found = [
        Case(engine=PYTORCH, stored=stored, device=device, **common)
        for device in ("cpu", *gpu)
        for stored, (precision, slow_to_make) in FORMS.items()
        if (compiled or not slow_to_make) and (batch == 1 or stored in FORMS_OF_BATCHES)
        if device != "cpu" or precision in on_cpu
    ]
    files = sorted(path.stem for path in folder.glob("*.onnx"))
    lines = dict.fromkeys((line.engine, line.kind) for line in RULE if "onnx" in ENGINES[line.engine].formats)
    return found + [
        Case(engine=engine, stored=stored, exact=exact, device=kind, **common)
        for stored in files
        for engine, kind in lines
        if kind in ("cpu", *gpu)
        for exact in (True, False)
    ]


def precisions_of_the_cpu() -> set[str]:
    """Return the precisions to measure PyTorch in on a CPU.

    bf16 only where the CPU has instructions for it: elsewhere it is six times slower. Never fp16: none of our CPUs
    computes it faster than float32.
    """
    import torch

    from petseg.device import pick_precision

    return {"f32", *(("bf16",) if pick_precision("auto", torch.device("cpu")) is torch.bfloat16 else ())}


# One engine, opened here or in a separate process


def opened(case: Case) -> Opened:
    """Open a case."""
    if case.engine == PYTORCH:
        return in_pytorch(case)
    artifact = open_artifact(Path(case.folder) / f"{case.stored}.onnx")
    engine = load_engine(artifact, case.engine, case.threads, device=case.device, exact=case.exact)
    return Opened(engine.run, described(engine), engine.close)


def described(engine: Engine) -> dict[str, str]:
    """Describe an engine: name and version, the precision that the file is stored in, and the one it computes in."""
    info = engine.describe()
    between = re.search(r", (\w+) between the int8 layers", info.provider)
    precision = info.precision + (f" and {between[1]}" if between else "")
    return {"engine": f"{info.name} {info.version}", "stored": engine.spec.precision, "precision": precision}


def in_pytorch(case: Case) -> Opened:
    """Open the network in PyTorch, as trained or as exported, where half of a compiler's work is already done."""
    import torch

    from petseg.checkpoint import load_model

    torch.set_num_threads(case.threads)
    precision, compiled = FORMS[case.stored]
    about = {
        "engine": f"{PYTORCH} {torch.__version__.partition('+')[0]}, {'compiled' if compiled else 'eager'}",
        "stored": case.stored.partition(",")[0],
        "precision": precision,
    }
    model, _ = load_model(Path(case.folder) / WEIGHTS)
    if case.stored == AS_TRAINED:
        from petseg.reference import torch_run

        return Opened(torch_run(model, case.device), about, lambda: None)
    from petseg_export.deploy import DeployedUNet

    deployed: Any = DeployedUNet(model).to(case.device)
    if dtype := {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision):
        deployed.network.to(dtype)
        deployed.network.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(dtype),))
    called = torch.compile(deployed, dynamic=False) if compiled else deployed

    def run(batch: U8) -> U8:
        with torch.inference_mode(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            answer: U8 = called(torch.from_numpy(batch).to(case.device)).cpu().numpy()  # waits for a GPU, too
        return answer

    return Opened(run, about, lambda: None)


def cold_start(case: Case) -> dict[str, Any]:
    """Open a case in a separate process; return its first times and its memory, or ``why`` it does not work."""
    code = "from benchmarks.latency import cold; cold()"
    words = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(case))]
    done = subprocess.run(words, cwd=records.ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"why": said.replace(f"{case.folder}{os.sep}", "")}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def cold() -> None:
    """Run in the process of :func:`cold_start`; libraries are imported first, as that is not part of loading."""
    case = Case(**json.loads(sys.argv[1]))
    if case.engine == PYTORCH:
        for module in ("petseg.reference", "petseg_export.deploy"):  # torch with them
            importlib.import_module(module)
    elif case.engine in ENGINES:
        with contextlib.suppress(ImportError):  # if it is missing, loading raises the better message
            importlib.import_module(ENGINES[case.engine].loader.partition(":")[0])
    before, before_on_gpu = resident("VmRSS"), gpu_memory() if case.device == "cuda" else None
    start = time.perf_counter()
    engine = opened(case)
    loaded = time.perf_counter()
    batch = images_of(case)
    engine.run(batch)
    first = time.perf_counter()
    later = timed(engine.run, batch, FEWEST + 2)
    found = {
        "load_ms": 1e3 * (loaded - start),
        "first_run_ms": 1e3 * (first - loaded),
        "later_run_ms": min(later),
        "memory_mb": resident("VmRSS") - before,
        "peak_memory_mb": resident("VmHWM") - before,
        **on_gpu(case, before_on_gpu),
    }
    print(json.dumps({**engine.about, **found}))


def on_gpu(case: Case, before: float | None) -> dict[str, float | None]:
    """Return a case's GPU memory, CUDA's own included, and the peak of PyTorch's tensors; None: unknown.

    The former is the increase of the memory in use by all processes, so nobody else may use the GPUs meanwhile.
    """
    found: dict[str, float | None] = {"gpu_memory_mb": None, "gpu_tensors_peak_mb": None}
    after = gpu_memory() if before is not None else None
    if before is not None and after is not None:
        found["gpu_memory_mb"] = after - before
    if case.device == "cuda" and case.engine == PYTORCH:
        import torch

        found["gpu_tensors_peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return found


def gpu_memory() -> float | None:
    """Return the megabytes in use on all GPUs (nvidia-smi may order them differently from CUDA); None: unknown."""
    words = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        return sum(map(float, said.split())) * 2**20 / 1e6
    except (OSError, subprocess.CalledProcessError, ValueError):  # a Jetson has none, or it says "[N/A]"
        return None


def resident(what: str) -> float:
    """Return the resident memory of this process in megabytes: ``VmRSS`` now, ``VmHWM`` at its peak."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(re.findall(rf"^{what}:\s+(\d+) kB", text, re.MULTILINE)[0]) * 1024 / 1e6


def images_of(case: Case) -> U8:
    """Return a batch of noise in the size of the network."""
    spec = open_artifact(Path(case.folder) / "fp32.onnx").spec
    return np.random.default_rng(0).integers(0, 256, (case.batch, spec.height, spec.width, 3), dtype=np.uint8)


# All engines, in turns


def measure(
    found: Sequence[Case], rounds: int, rates: Rates, about: dict[str, Any], *, cold: bool = True
) -> tuple[dict[str, Any], list[str]]:
    """Measure a network with one batch size; return its rows, and what could not be measured.

    Args:
        found: The cases.
        rounds: Turns of each case.
        rates: Matmuls of each kind of device; their rate in each round is appended.
        about: Description of the network.
        cold: Whether to open each case in a separate process first; if not, there are no start times and no memory.
    """
    from benchmarks import roofline

    starts = {case: start for case in found if (start := cold_start(case))} if cold else {}
    failed = [f"{case.name}: {start['why']}" for case, start in starts.items() if "why" in start]
    working = distinct({case: start for case, start in starts.items() if "why" not in start}) if cold else found
    descriptions, taken, lost = in_turns(working, starts, rounds, rates)
    latest = {kind: {m: values[-rounds:] for m, values in reached.items()} for kind, reached in rates.items()}
    batch, (height, width), folder = found[0].batch, about["size"], Path(found[0].folder)
    stored_in = {"fp32", *(case.stored for case in descriptions if case.engine != PYTORCH)}
    work = {
        stored: roofline.operations((folder / f"{stored}.onnx").read_bytes(), batch, height, width)
        for stored in stored_in
    }
    pytorch = {case.device: list(map(median, times)) for case, times in taken.times.items() if case.is_reference}
    rows = []
    for case, times in taken.times.items():
        start, peak = descriptions[case], roofline.best(latest.get(case.device, {}))
        counted = work.get(case.stored, work["fp32"])
        figures = row(times, pytorch.get(case.device), counted, start["precision"], peak)
        rows.append({"name": case.name, "device": case.device, **start, **figures})
        print_row(rows[-1])
    name = f"{about['model']}, {height}x{width}, batch {batch}"
    what = {"name": name, "batch": batch, **about, "operations": sum(work["fp32"].values())}
    what |= {"turns": rounds * len(rows), "disturbed_turns": taken.disturbed}
    return {**what, "tried": [case.name for case in found], "rows": rows}, failed + lost


def distinct(starts: Mapping[Case, dict[str, Any]]) -> dict[Case, dict[str, Any]]:
    """Drop the cases that compute in the same precision with ``exact`` as without."""
    seen: dict[tuple[str, ...], Case] = {}
    for case, start in starts.items():
        seen.setdefault((start["engine"], case.device, case.stored, start["precision"]), case)
    return {case: starts[case] for case in seen.values()}


def in_turns(
    working: Iterable[Case], starts: Mapping[Case, dict[str, Any]], rounds: int, rates: Rates
) -> tuple[dict[Case, dict[str, Any]], Turns[Case], list[str]]:
    """Run all cases in turns, and the matmuls at the end of each round.

    Args:
        working: The cases; once open, duplicates that compute in the same way as an earlier case are dropped.
        starts: Results of their cold starts, if any.
        rounds: Turns of each case.
        rates: See :func:`measure`.

    Returns:
        The description of each case, their times, and the cases that could not be opened beside the others.
    """
    lost: list[str] = []
    descriptions: dict[Case, dict[str, Any]] = {}
    with contextlib.ExitStack() as stack:
        jobs: dict[Case, Job] = {}
        for case in working:
            try:
                engine = opened(case)
            except Exception as error:  # noqa: BLE001 - libraries that each bring CUDA may fail together in any way
                lost.append(f"{case.name}, beside the others: {one_line(error)}")
                continue
            start = starts.get(case, engine.about)
            if case not in distinct({**descriptions, case: start}):
                engine.close()
                continue
            stack.callback(engine.close)
            descriptions[case] = start
            batch = images_of(case)
            later = start.get("later_run_ms") or min(timed(engine.run, batch, FEWEST))
            jobs[case] = engine.run, batch, count(later)

        def matmuls() -> None:
            for values in rates.values():
                for matmul, reached in values.items():
                    reached.append(matmul.rate())

        return descriptions, alternated(jobs, rounds, matmuls), lost


def row(
    times: Sequence[Sequence[float]],
    reference: Sequence[float] | None,
    work: Mapping[str, int],
    precision: str,
    peak: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Summarize the times of a case; ratios are taken within a round, so that a slow round does not distort them.

    Args:
        times: Milliseconds of each run, a list for each round.
        reference: PyTorch's median of each round on the same device; None: it does not work there.
        work: Operations of a run; see :func:`benchmarks.roofline.operations`.
        precision: The precision that it computes in.
        peak: Operations per second of each precision, round by round.
    """
    from benchmarks.roofline import least_ms

    medians, every = [median(values) for values in times], [ms for values in times for ms in values]
    faster = [a / b for a, b in zip(reference, medians, strict=True)] if reference else []
    least = [least_ms(work, precision, {name: r[i] for name, r in peak.items()}) for i in range(len(medians))]
    shares = [at_best / ms for at_best, ms in zip(least, medians, strict=True) if at_best]
    return {
        "milliseconds": medians,
        "median": median(medians),
        "lowest_and_highest": [min(medians), max(medians)],
        **{
            f"p{share}": float(np.percentile(every, share)) if len(every) >= fewest else None
            for share, fewest in OF_RUNS.items()
        },
        "runs": len(every),
        "times_faster_than_pytorch": median(faster) if faster else None,
        "times_faster_than_pytorch_each": faster,
        "operations": dict(work),
        "giga_operations_per_second": sum(work.values()) / median(medians) / 1e6,
        "share_of_matmul_peak": median(shares) if shares else None,
    }


def print_row(found: Mapping[str, Any]) -> None:
    share, faster = found["share_of_matmul_peak"], found["times_faster_than_pytorch"]
    start = f", load {found['load_ms']:6.0f} ms, {found['memory_mb']:5.0f} MB" if "load_ms" in found else ""
    click.echo(
        f"{found['name']:>34} {found['median']:8.2f} ms {f'{faster:6.2f}x' if faster else '      ?'} "
        f"{f'{100 * share:3.0f} %' if share else '    ?'} of the peak{start}",
        err=True,
    )
