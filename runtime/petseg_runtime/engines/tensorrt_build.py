"""Build TensorRT engines from ONNX graphs: one code path for TensorRT 10 and 11 and for TensorRT for RTX.

All of them build a strongly typed network: every tensor has the type that the graph gives it, and there are no flags
for precision. TF32 is switched off, because an fp32 receipt promises float32.

TensorRT for RTX builds on any machine, without a GPU; the device compiles the kernels when it loads the engine. The
path for ``tensorrt`` was written from its documentation; :data:`petseg_runtime.engines.registry.ENGINES` lists what we
have run. It differs from the other where the code tests ``library``: TensorRT needs a GPU, builds for that GPU, and has
a timing cache.

Two builds of one graph need not be identical (TensorRT for RTX 1.7: equal length, other internal names), so an engine
is identified by its graph and its build environment, not by a digest of its bytes.

Needs neither torch nor onnx: shared by ``petseg export`` and by the runtime, which builds at first use.
"""

from __future__ import annotations

import platform
import re
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from petseg_runtime import host
from petseg_runtime.artifact import INPUT, OUTPUT
from petseg_runtime.cache import Key, Slot
from petseg_runtime.engines.tensorrt_library import RTX, TRT, Library, Record, imported, logger_of
from petseg_runtime.errors import EngineError, ModelError
from petseg_runtime.extras import install
from petseg_runtime.files import write_atomic
from petseg_runtime.signals import let_through
from petseg_runtime.spec import STRIDE, ModelSpec

__all__ = ["MAX_BATCH", "Built", "Profile", "Watch", "build", "known_targets", "profile_of", "timings_slot"]

Shape: TypeAlias = tuple[int, int, int, int]

#: Called, on another thread, with the name of a build phase, the number of finished steps, and their total number.
Watch: TypeAlias = Callable[[str, int, int], None]

#: The default maximum batch of a graph with a dynamic batch.
MAX_BATCH: Final = 8

#: The oldest supported version of TensorRT, the first with uint8 inputs in a strongly typed network.
_OLDEST: Final = (10, 9)

#: The libraries' names of tensor types, and ours.
_TYPES: Final = {"float": "fp32", "half": "fp16", "bfloat16": "bf16"}
_TYPE_WORD: Final = re.compile(r"\b(float|fp32|half|fp16|bfloat16|bf16|fp8|u?int8|int32|int64|bool)\b", re.IGNORECASE)

#: The parser's warning, and its only reaction, when it treats uint8 Q/DQ as int8, which clips activations at 127.
_REINTERPRETED: Final = "Defaulting to INT8"

#: Serializes builds: a library has a single logger in a process.
_ONE_AT_A_TIME: Final = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The optimization profile of ``image``, uint8 [N, H, W, 3].

    Attributes:
        minimum: Smallest N, H and W.
        optimum: The shape that kernels are tuned for.
        maximum: Largest N, H and W.
    """

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def __post_init__(self) -> None:
        """Check the shapes: TensorRT's own messages are longer, and it accepts some sizes at which it fails later.

        Raises:
            ModelError: The network does not support a shape, or the three are not in ascending order.
        """
        for name, shape in (("minimum", self.minimum), ("optimum", self.optimum), ("maximum", self.maximum)):
            _, height, width, channels = shape
            if min(shape) < 1 or height % STRIDE or width % STRIDE or channels != 3:
                raise ModelError(
                    f"{name} of the profile is {[*shape]}; [N, H, W, 3] is expected, H and W multiples of {STRIDE}"
                )
        for low, middle, high in zip(self.minimum, self.optimum, self.maximum, strict=True):
            if not low <= middle <= high:
                raise ModelError(f"profile {self}: minimum <= optimum <= maximum is expected")

    def __str__(self) -> str:
        return f"{[*self.minimum]} to {[*self.maximum]}, best at {[*self.optimum]}"


@dataclass(frozen=True, kw_only=True)
class Built:
    """A built engine.

    Attributes:
        engine: The serialized engine.
        environment: What a device must match, and how the engine was built; JSON values. ``library``, ``version``,
            ``platform``, ``compute_capability`` (of the GPU, such as ``8.9``; for TensorRT for RTX a list of the
            requested ones, or ``portable``), ``gpu`` and ``driver`` (None for TensorRT for RTX, whose engines depend on
            neither), ``profile``, ``flags``.
        description: What the library reports about the engine; JSON values. ``bytes``; ``inputs`` and ``outputs``
            (name, dtype, shape, -1 for dynamic); ``layers``, their number; ``computed``, the number of layers of each
            kind by the types that they read and write (weights not counted); ``unknown``, what is not known, and why.
        messages: Warnings of the library, and remarks on the timing cache.
    """

    engine: bytes = field(repr=False)
    environment: dict[str, Any]
    description: dict[str, Any]
    messages: tuple[str, ...]

    @property
    def record(self) -> dict[str, Any]:
        """Everything but the engine, as stored beside it: the environment, ``engine`` and ``messages``."""
        return {**self.environment, "engine": self.description, "messages": list(self.messages)}


@dataclass(frozen=True)
class _Compiler:
    """A usable library, and its build target.

    Attributes:
        trt: Its module.
        library: Which library it is.
        gpu: The GPU that it builds for; None: any, or ``compute_capabilities``.
        compute_capabilities: The requested compute capabilities.
    """

    trt: Any
    library: Library
    gpu: host.Gpu | None
    compute_capabilities: tuple[str, ...]

    @property
    def title(self) -> str:
        """Name and version, for messages."""
        return f"{self.library.title} {self.trt.__version__}"


class _Progress:
    """Connects the build thread, which reports progress, with the waiting thread, which can tell it to stop."""

    def __init__(self, watch: Watch | None) -> None:
        self.watch = watch
        self.start = threading.Event()
        self.stop = threading.Event()
        self.failure: BaseException | None = None

    def tell(self, phase: str, done: int, total: int) -> None:
        """Report progress to ``watch``; never raises, because the caller would print the exception and drop it."""
        if self.watch is None or self.stop.is_set():
            return
        try:
            self.watch(phase, done, total)
        except BaseException as error:  # noqa: BLE001 (raised again where the build ends)
            self.failure = error
            self.stop.set()


def build(
    graph: bytes,
    profile: Profile | None,
    *,
    library: Library,
    timing_cache: Path | Slot | None = None,
    watch: Watch | None = None,
    compute_capabilities: tuple[str, ...] = (),
    device: int = 0,
    activate: Callable[[], None] | None = None,
) -> Built:
    """Build an engine from a graph.

    Args:
        graph: Serialized ONNX, from ``image`` uint8 [N, H, W, 3] to ``probability`` uint8 [N, H, W].
        profile: The optimization profile; may be None for a graph without dynamic dimensions.
        library: The library that builds, and later runs, the engine.
        timing_cache: Where TensorRT's timing cache is kept, which makes the next build faster. If it is damaged or of
            another GPU or version, it is created again, and ``messages`` says so.
        watch: Called with the progress. An exception that it raises cancels the build and reaches the caller.
        compute_capabilities: GPUs to build for, such as ``8.9``; TensorRT for RTX only. Empty: what the library calls
            portable, which is Ampere and later, without Turing (7.5).
        device: Number of the GPU that TensorRT builds for, as CUDA counts them.
        activate: Makes that GPU the current device of the calling thread; without it, CUDA's first is.

    Returns:
        The engine and its description.

    Raises:
        EngineMissing: The library is not installed.
        EngineError: It is broken, finds no GPU, does not know such a GPU, or fails to build.
        ModelError: It cannot parse the graph, the graph breaks the contract, or the profile contradicts the graph.
        KeyboardInterrupt: Ctrl-C was pressed; the build is cancelled first.
    """
    compiler = _load(library, compute_capabilities, device)
    progress = _Progress(watch)
    # The bindings print and swallow exceptions raised in their callbacks, and Python raises KeyboardInterrupt in
    # whatever the main thread is running. So the library never runs in the caller's thread.
    with _ONE_AT_A_TIME, ThreadPoolExecutor(1, thread_name_prefix="petseg-tensorrt") as pool:
        try:
            future = pool.submit(_build, compiler, graph, profile, timing_cache, progress, activate)
            progress.start.set()
            while not wait([future], host.LOOK_UP).done:
                let_through()
            return future.result()
        finally:
            progress.stop.set()
            progress.start.set()
            logger_of(compiler.trt.ILogger).record = None


def profile_of(
    spec: ModelSpec,
    max_batch: int = MAX_BATCH,
    max_size: tuple[int, int] | None = None,
    best: tuple[int, int] | None = None,
) -> Profile | None:
    """The optimization profile for a graph; its optimum is a single photo, or the graph's fixed batch.

    Args:
        spec: The graph's specification.
        max_batch: Largest batch, if the batch is dynamic.
        max_size: Largest height and width, if the size is dynamic; None: twice the specification's.
        best: Height and width of the optimum, if the size is dynamic; None: the specification's.

    Returns:
        The profile; None for a graph without dynamic dimensions.
    """
    if spec.batch and not spec.dynamic_size:
        return None
    least, most = (spec.batch, spec.batch) if spec.batch else (1, max_batch)
    size = (spec.height, spec.width)
    smallest, largest = size, size
    if spec.dynamic_size:
        smallest = (STRIDE, STRIDE)
        largest = max_size or (2 * spec.height, 2 * spec.width)
        size = best or size
    return Profile(minimum=(least, *smallest, 3), optimum=(least, *size, 3), maximum=(most, *largest, 3))


def timings_slot(device: int = 0) -> Slot:
    """The entry of a GPU's timing cache in petseg's cache; all models share it.

    Raises:
        EngineMissing: TensorRT is not installed.
        EngineError: TensorRT is broken, or there is no such GPU.
    """
    compiler = _load(TRT, (), device)
    assert compiler.gpu is not None
    key = Key(
        model="",
        name="any model",
        engine=TRT.engine,
        version=compiler.trt.__version__,
        device=f"{compiler.gpu.name}, compute capability {compiler.gpu.compute_capability}",
        driver=compiler.gpu.driver,
    )
    return Slot(key, "timings")


def _build(
    compiler: _Compiler,
    graph: bytes,
    profile: Profile | None,
    timing_cache: Path | Slot | None,
    progress: _Progress,
    activate: Callable[[], None] | None,
) -> Built:
    """See :func:`build`; runs in a separate thread until ``progress`` tells it to stop."""
    # If Ctrl-C arrives while the thread starts, the pool loses track of it and does not wait for it. So nothing begins
    # before `start` is set.
    progress.start.wait()
    if progress.stop.is_set():
        raise KeyboardInterrupt
    if activate is not None:
        activate()
    record = Record()
    builder = _builder(compiler, record)
    network, parser = _parse(compiler, builder, graph, record)
    _check_contract(network)
    config = _config(compiler, builder)
    _set_profile(builder, config, network.get_input(0), profile, record)
    cache, messages = _timing_cache(compiler, config, timing_cache, record)
    config.progress_monitor = monitor = _monitor(compiler.trt, progress)
    serialized = builder.build_serialized_network(network, config)
    del parser, monitor  # the library refers to both until the build has ended
    if progress.failure is not None:
        raise progress.failure
    if serialized is None:
        raise EngineError(f"{compiler.title} cannot build the engine ({_reason(record)})")
    engine = bytes(serialized)
    if cache is not None and timing_cache is not None:
        messages += _save(cache, timing_cache)
    return Built(
        engine=engine,
        environment=_environment(compiler, profile),
        description=_description(compiler, network, engine, record),
        messages=(*dict.fromkeys(_one_line(warning) for warning in record.warnings), *messages),
    )


def _load(library: Library, compute_capabilities: tuple[str, ...], device: int) -> _Compiler:
    """Import a library and check that it can build on this machine.

    Raises:
        EngineMissing: It is not installed.
        EngineError: It is installed but cannot be used.
    """
    trt = imported(library.module, library)
    if not all(hasattr(trt, name) for name in ("__version__", "Builder", "OnnxParser")):
        raise EngineError(
            f"{library.module} is installed, but holds no library (it is a placeholder): {install(library.extra)}"
        )
    if library is RTX:
        return _Compiler(trt, library, None, compute_capabilities)
    if tuple(map(int, trt.__version__.split(".")[:2])) < _OLDEST:
        raise EngineError(f"TensorRT {trt.__version__} is too old: {'.'.join(map(str, _OLDEST))} or newer is needed")
    if compute_capabilities:
        raise EngineError(
            f"TensorRT cannot build for {', '.join(compute_capabilities)} on request; it builds for the GPU it runs on"
        )
    gpus = {gpu.index: gpu for gpu in host.gpus()}
    if device not in gpus:
        shown = ", ".join(f"cuda:{gpu.index} {gpu.name}" for gpu in gpus.values()) or "none"
        raise EngineError(
            f"TensorRT builds an engine for an NVIDIA GPU of the machine it runs on, and there is no cuda:{device} "
            f"(found: {shown}); build on the device, or for tensorrt_rtx, which needs no GPU"
        )
    return _Compiler(trt, library, gpus[device], ())


def _builder(compiler: _Compiler, record: Record) -> Any:
    logger = logger_of(compiler.trt.ILogger)
    logger.record = record
    try:
        return compiler.trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # TypeError: the bindings' reaction if the library returned nullptr
        old = (host.old_driver(gpu.driver, compiler.library.cuda12) for gpu in host.gpus())
        remedy = next((f"; {what}" for what in old if what), "")
        raise EngineError(f"{compiler.title} does not start ({_reason(record)}{remedy})") from error


def _parse(compiler: _Compiler, builder: Any, graph: bytes, record: Record) -> tuple[Any, Any]:
    """Parse a graph; returns the network, and the parser, which owns the weights and must live as long.

    Raises:
        ModelError: The library cannot read the graph (the message names the nodes), or would change its meaning.
    """
    # TensorRT 10 needs the flag for strong typing; the others are always strongly typed, and accept the flag.
    network = builder.create_network(1 << int(compiler.trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = compiler.trt.OnnxParser(network, builder.logger)
    if not parser.parse(graph):
        problems = []
        for i in range(parser.num_errors):
            error = parser.get_error(i)
            where = " ".join(filter(None, (error.node_operator(), error.node_name())))
            problems.append(f"{where}: {_one_line(error.desc())}" if where else _one_line(error.desc()))
        raise ModelError(f"{compiler.title} cannot read the graph ({'; '.join(problems) or _reason(record)})")
    if changed := [warning for warning in record.warnings if _REINTERPRETED in warning]:
        raise ModelError(f"{compiler.title} would change the meaning of the graph ({_one_line(changed[0])})")
    return network, parser


def _check_contract(network: Any) -> None:
    """Check that a network maps uint8 ``image`` to uint8 ``probability``.

    Raises:
        ModelError: It does not; the message names its tensors.
    """
    inputs, outputs = _tensors(network)
    for mode, found, name, rank in (("input", inputs, INPUT, 4), ("output", outputs, OUTPUT, 3)):
        if [(t["name"], t["dtype"], len(t["shape"])) for t in found] != [(name, "uint8", rank)]:
            there = ", ".join(f"{t['name']} {t['dtype']} {t['shape']}" for t in found) or "none"
            raise ModelError(f"the graph's {mode} is {there}; {name} of uint8 with {rank} dimensions is expected")


def _tensors(network: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    def describe(tensor: Any) -> dict[str, Any]:
        return {"name": tensor.name, "dtype": tensor.dtype.name.lower(), "shape": [int(d) for d in tensor.shape]}

    inputs = [describe(network.get_input(i)) for i in range(network.num_inputs)]
    return inputs, [describe(network.get_output(i)) for i in range(network.num_outputs)]


def _config(compiler: _Compiler, builder: Any) -> Any:
    """The builder configuration, without the optimization profile.

    Raises:
        EngineError: The library does not know a requested GPU.
    """
    trt, wanted = compiler.trt, compiler.compute_capabilities
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; computes float32 convolutions with 10 bits of mantissa
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # logs every layer with its types
    if wanted:
        config.num_compute_capabilities = len(wanted)
        for i, (name, target) in enumerate(zip(wanted, known_targets(trt, wanted), strict=True)):
            if not config.set_compute_capability(target, i):
                raise EngineError(f"{compiler.title} cannot build for compute capability {name}")
    return config


def known_targets(trt: Any, wanted: Sequence[str]) -> list[Any]:
    """TensorRT for RTX's own names of compute capabilities such as ``8.9``.

    Raises:
        EngineError: It does not know one of them.
    """
    members = trt.ComputeCapability.__members__
    known = {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name.startswith("SM")}  # SM120
    for name in wanted:
        if name not in known:
            raise EngineError(
                f"{RTX.title} {trt.__version__} cannot build for compute capability {name}; it supports "
                f"{', '.join(known)}"
            )
    return [known[name] for name in wanted]


def _set_profile(builder: Any, config: Any, image: Any, profile: Profile | None, record: Record) -> None:
    """Add the optimization profile to the builder configuration.

    Raises:
        ModelError: It contradicts the graph's ``image``, or is missing although that has dynamic dimensions.
    """
    shape = [int(size) for size in image.shape]
    if profile is None:
        if -1 in shape:
            raise ModelError(f"the graph's {INPUT} is {shape}: an optimization profile for -1 is needed")
        return
    for size, low, high in zip(shape, profile.minimum, profile.maximum, strict=True):
        if size != -1 and not size == low == high:
            raise ModelError(f"profile {profile} contradicts the graph, whose {INPUT} is {shape} (-1: dynamic)")
    optimization = builder.create_optimization_profile()
    optimization.set_shape(INPUT, profile.minimum, profile.optimum, profile.maximum)
    if config.add_optimization_profile(optimization) < 0:
        raise ModelError(f"the library rejects profile {profile} ({_reason(record)})")


def _timing_cache(compiler: _Compiler, config: Any, place: Path | Slot | None, record: Record) -> tuple[Any, list[str]]:
    """Give the builder the timing cache kept at ``place``; returns it (None if none is used) and messages."""
    if place is None:
        return None, []
    if compiler.library is RTX:  # it still has the functions, deprecated and without effect
        return None, [f"{place}: not used; TensorRT for RTX times nothing and has no timing cache"]
    saved, problem = _kept(place)
    before = len(record.warnings)
    cache = config.create_timing_cache(saved)
    fits = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
    warnings = record.warnings[before:]  # the library logs that a cache is damaged, and returns an empty one
    if not fits or warnings:
        problem = f"damaged, or of another GPU or version ({_one_line(' '.join(warnings)) or 'rejected'})"
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache, [f"{_shown(place)} is created again: {problem}"] if problem else []


def _kept(place: Path | Slot) -> tuple[bytes, str]:
    """The timing cache that was kept (empty if there is none), and why it cannot be used."""
    if isinstance(place, Slot):
        kept, why = place.read()
        return kept.data if kept else b"", why
    try:
        return place.read_bytes() if place.exists() else b"", ""
    except OSError as error:
        return b"", f"cannot be read ({error.strerror or error})"


def _save(cache: Any, place: Path | Slot) -> list[str]:
    """Write the timing cache; a failure becomes a message, because the engine has been built all the same."""
    data, problem = bytes(cache.serialize()), ""
    if isinstance(place, Slot):
        problem = place.write(data)
    else:
        try:
            write_atomic(place, data)
        except OSError as error:
            problem = error.strerror or str(error)
    return [f"{_shown(place)} cannot be written ({problem})"] if problem else []


def _shown(place: Path | Slot) -> str:
    return "the timing cache" if isinstance(place, Slot) else f"{place}: the timing cache"


def _monitor(trt: Any, progress: _Progress) -> Any:
    """A progress monitor that reports to ``progress`` and cancels the build at its next step after a stop."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            progress.tell(phase_name, 0, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            progress.tell(phase_name, step + 1, self.steps[phase_name])
            return not progress.stop.is_set()

        def phase_finish(self, phase_name: str) -> None:  # may come before the last step
            progress.tell(phase_name, self.steps[phase_name], self.steps[phase_name])

    return Monitor()


def _environment(compiler: _Compiler, profile: Profile | None) -> dict[str, Any]:
    """See :class:`Built`."""
    gpu, wanted = compiler.gpu, [*compiler.compute_capabilities] or "portable"
    shapes = profile and {name: [*getattr(profile, name)] for name in ("minimum", "optimum", "maximum")}
    return {
        "library": compiler.library.module,
        "version": compiler.trt.__version__,
        "platform": f"{platform.system()} {platform.machine()}".lower(),
        "gpu": gpu.name if gpu else None,
        "compute_capability": gpu.compute_capability if gpu else wanted,
        "driver": gpu.driver if gpu else None,
        "profile": shapes,
        "flags": {"strongly_typed": True, "tf32": False},
    }


def _description(compiler: _Compiler, network: Any, engine: bytes, record: Record) -> dict[str, Any]:
    """See :class:`Built`."""
    # Without a GPU the engine cannot be loaded, and so not inspected. But the library logs its layers during the build,
    # in the format of the engine inspector.
    inputs, outputs = _tensors(network)
    layers = _layers(record.layers)
    unknown = [] if layers else ["layers: the library did not list them"]
    if compiler.library is RTX:
        unknown.append("kernels: the device compiles them when it loads the engine")
    return {
        "bytes": len(engine),
        "inputs": inputs,
        "outputs": outputs,
        "layers": sum(layers.values()) or None,
        "computed": [
            {"layer": kind, "reads": reads.split(), "writes": writes.split(), "count": count}
            for (kind, reads, writes), count in sorted(layers.items())
        ]
        or None,
        "unknown": unknown,
    }


def _layers(text: str) -> Counter[tuple[str, str, str]]:
    """Count the layers in a library's log by their kind and by the types that they read and write."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for line in text.split("\n"):  # not splitlines(), which also splits at separators inside a line
        if kind := re.search(r"LayerType: (\w+), Inputs: ", line):
            before, _, after = line[kind.end() :].partition(", Outputs: ")
            reads = before.partition(", Constants: ")[0]
            counts[kind[1], _types(reads), _types(after)] += 1
    return counts


def _types(tensors: str) -> str:
    """The types in a list of tensors, such as ``Datatype: Half, ...`` or ``Format/Datatype: Row major FP16 format``."""
    words = [_TYPE_WORD.search(text) for text in re.findall(r"[Dd]ata[Tt]ype: ([^,}]*)", tensors)]
    found = {word[1].lower() for word in words if word}
    return " ".join(sorted(_TYPES.get(word, word) for word in found))


def _reason(record: Record) -> str:
    """The logged errors in one line."""
    return _one_line("\n".join(record.errors)) or "no reason given"


def _one_line(text: str) -> str:
    """A library's message in one line, without the line that it adds to every error if there is no driver."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    relevant = [line for line in lines if "cudaError 35" not in line] or lines
    return " ".join(relevant)[:1000]
