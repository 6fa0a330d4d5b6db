"""An ONNX graph as a TensorRT engine: one road for TensorRT 10 and 11 and for TensorRT for RTX.

All of them compile a strongly typed network: every tensor has the type that the graph gives it, and there are no flags
for precision. TF32 is switched off, because an fp32 receipt promises float32.

TensorRT for RTX builds on any machine, without a GPU; the device chooses the kernels when it loads the engine. The road
through ``tensorrt`` was built from its documentation; what of it we have run is in
:data:`petseg_runtime.engines.registry.ENGINES`. It differs from the other in the lines that ask for ``library``: it
needs a GPU, is built for that one, and has a timing cache.

Two builds of one graph need not give the same bytes (TensorRT for RTX 1.7: equal length, other internal names), so an
engine is identified by the graph and the environment that it was built from, not by a digest of its own.

Needs neither torch nor onnx: ``petseg export`` and the runtime, which compiles at first use, share it.
"""

from __future__ import annotations

import platform
import re
import threading
from collections import Counter
from collections.abc import Callable
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
from petseg_runtime.spec import STRIDE, ModelSpec

__all__ = ["MAX_BATCH", "Built", "Profile", "Watch", "build", "profile_of", "timings_slot"]

Shape: TypeAlias = tuple[int, int, int, int]

#: Called with the name of a phase, how many of its steps are done, and how many it has; from another thread.
Watch: TypeAlias = Callable[[str, int, int], None]

#: Of a graph that takes any batch, unless another is asked for.
MAX_BATCH: Final = 8

#: Of TensorRT; the first that takes uint8 inputs in a strongly typed network.
_OLDEST: Final = (10, 9)

#: How the libraries write the type of a tensor, and how we do.
_TYPES: Final = {"float": "fp32", "half": "fp16", "bfloat16": "bf16"}
_TYPE_WORD: Final = re.compile(r"\b(float|fp32|half|fp16|bfloat16|bf16|fp8|u?int8|int32|int64|bool)\b", re.IGNORECASE)

#: What the parser says, and no more, when it takes uint8 Q/DQ for int8: activations are then cut off at 127.
_REINTERPRETED: Final = "Defaulting to INT8"

#: A library has one logger for all that it does in a process.
_ONE_AT_A_TIME: Final = threading.Lock()


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The shapes of ``image``, uint8 [N, H, W, 3], that an engine takes, and the one it is tuned for.

    Attributes:
        minimum: Smallest N, H and W.
        optimum: The shape to be fastest at.
        maximum: Largest N, H and W.
    """

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def __post_init__(self) -> None:
        """Check what TensorRT would refuse with more words, and the sizes that it would accept and fail at later.

        Raises:
            ModelError: A shape is none that the network takes, or the three are not in order.
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
    """A finished engine.

    Attributes:
        engine: The serialised engine.
        environment: What a device must match, and how it was built; JSON values. ``library``, ``version``,
            ``platform``, ``compute_capability`` (of the GPU, such as ``8.9``; for TensorRT for RTX a list of those
            asked for, or ``portable``), ``gpu`` and ``driver`` (None for TensorRT for RTX: its engines depend on
            neither), ``profile``, ``flags``.
        description: What the library says of the engine it built; JSON values. ``bytes``; ``inputs`` and ``outputs``
            (name, dtype, shape, -1 for any); ``layers``, how many; ``computed``, how many layers of each kind read and
            write which types (weights not counted); ``unknown``, what cannot be said here and why.
        messages: Warnings of the library, and what became of the timing cache.
    """

    engine: bytes = field(repr=False)
    environment: dict[str, Any]
    description: dict[str, Any]
    messages: tuple[str, ...]

    @property
    def record(self) -> dict[str, Any]:
        """All but the engine itself, as it is kept beside one: the environment, ``engine`` and ``messages``."""
        return {**self.environment, "engine": self.description, "messages": list(self.messages)}


@dataclass(frozen=True)
class _Compiler:
    """A library that was found usable, and what it shall build for.

    Attributes:
        trt: Its module.
        library: Its name.
        gpu: The GPU it builds for; None: any, or ``compute_capabilities``.
        compute_capabilities: What was asked for.
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
    """What passes between the thread that builds and the one that waits: news one way, the word to stop the other."""

    def __init__(self, watch: Watch | None) -> None:
        self.watch = watch
        self.start = threading.Event()
        self.stop = threading.Event()
        self.failure: BaseException | None = None

    def tell(self, phase: str, done: int, total: int) -> None:
        """Pass news on; never raises, because who calls it would print and forget it."""
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
    """Compile a graph.

    Args:
        graph: Serialised ONNX, from ``image`` uint8 [N, H, W, 3] to ``probability`` uint8 [N, H, W].
        profile: Shapes to build for; None is enough for a graph without free dimensions.
        library: The one that builds, and later runs, the engine.
        timing_cache: Where TensorRT keeps what it measured, to build faster the next time. One that is damaged or of
            another GPU or version is made anew, and ``messages`` says so.
        watch: Told about the progress. What it raises cancels the build and reaches the caller.
        compute_capabilities: GPUs to build for, such as ``8.9``; only TensorRT for RTX can be asked. Empty: those that
            the library calls portable, Ampere and later. Turing (7.5) is not among them.
        device: The GPU that TensorRT builds for, as CUDA counts them.
        activate: Makes that GPU the current one of the thread that calls it; without it, CUDA's first is.

    Returns:
        The engine, with what is known about it.

    Raises:
        EngineMissing: The library is not installed.
        EngineError: It is broken, lacks its GPU, does not know such a GPU, or fails to build.
        ModelError: It cannot read the graph; the graph breaks the contract, or the profile contradicts it.
        KeyboardInterrupt: Ctrl-C; the build is cancelled first.
    """
    compiler = _load(library, compute_capabilities, device)
    progress = _Progress(watch)
    # The bindings print and swallow what Python raises inside their callbacks, and Python raises KeyboardInterrupt in
    # whatever the main thread runs. So the library never runs in the caller's thread.
    with _ONE_AT_A_TIME, ThreadPoolExecutor(1, thread_name_prefix="petseg-tensorrt") as pool:
        try:
            future = pool.submit(_build, compiler, graph, profile, timing_cache, progress, activate)
            progress.start.set()
            while not wait([future], host.LOOK_UP).done:
                pass
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
    """The shapes that an engine is built for; one photo, or the one batch there is, is what it shall be fastest at.

    Args:
        spec: Of the graph.
        max_batch: Largest batch of a graph that takes any.
        max_size: Largest height and width of a graph that takes any; None: twice the specification's.
        best: Height and width that it shall be fastest at, of such a graph; None: the specification's.

    Returns:
        None for a graph without free dimensions.
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
    """Where TensorRT's measurements on a GPU are kept in the cache; they serve all models.

    Raises:
        EngineMissing: TensorRT is not installed.
        EngineError: It is broken, or there is no such GPU.
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
    """See :func:`build`; runs in a thread of its own until ``progress`` tells it to stop."""
    # A pool forgets a thread, and does not wait for it, if Ctrl-C comes while it starts: nothing is begun before that.
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
    del parser, monitor  # until here the library refers to both
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
    """Import a library, and see that it has what it needs here.

    Raises:
        EngineMissing: It is not installed.
        EngineError: It is, and cannot be used.
    """
    trt = imported(library.module, library)
    if not all(hasattr(trt, name) for name in ("__version__", "Builder", "OnnxParser")):
        raise EngineError(
            f"{library.module} is installed, but holds no library (a placeholder): {install(library.extra)}"
        )
    if library is RTX:
        return _Compiler(trt, library, None, compute_capabilities)
    if tuple(map(int, trt.__version__.split(".")[:2])) < _OLDEST:
        raise EngineError(f"TensorRT {trt.__version__} is too old: {'.'.join(map(str, _OLDEST))} or newer is needed")
    if compute_capabilities:
        raise EngineError(
            f"TensorRT cannot be asked to build for {', '.join(compute_capabilities)}; it builds for its own GPU"
        )
    gpus = {gpu.index: gpu for gpu in host.gpus()}
    if device not in gpus:
        shown = ", ".join(f"cuda:{gpu.index} {gpu.name}" for gpu in gpus.values()) or "none"
        raise EngineError(
            f"TensorRT builds an engine for an NVIDIA GPU of the machine it runs on, and there is no cuda:{device} "
            f"(there is: {shown}); build on the device, or for tensorrt_rtx, which needs no GPU"
        )
    return _Compiler(trt, library, gpus[device], ())


def _builder(compiler: _Compiler, record: Record) -> Any:
    logger = logger_of(compiler.trt.ILogger)
    logger.record = record
    try:
        return compiler.trt.Builder(logger)
    except (TypeError, RuntimeError) as error:  # TypeError: how the bindings say that the library returned nothing
        old = (host.old_driver(gpu.driver, compiler.library.cuda12) for gpu in host.gpus())
        remedy = next((f"; {what}" for what in old if what), "")
        raise EngineError(f"{compiler.title} does not start ({_reason(record)}{remedy})") from error


def _parse(compiler: _Compiler, builder: Any, graph: bytes, record: Record) -> tuple[Any, Any]:
    """The network of a graph, and the parser, which holds the weights and must live as long.

    Raises:
        ModelError: The library cannot read the graph, and names the nodes; or reads it as something else.
    """
    # TensorRT 10 has to be asked for strong typing; the others do it anyway, and take the flag.
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
        raise ModelError(f"{compiler.title} would read the graph as another ({_one_line(changed[0])})")
    return network, parser


def _check_contract(network: Any) -> None:
    """Refuse a network that is not uint8 ``image`` to uint8 ``probability``.

    Raises:
        ModelError: Names what is there.
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
    """The builder's configuration, without shapes.

    Raises:
        EngineError: The library does not know a GPU that was asked for.
    """
    trt, wanted = compiler.trt, compiler.compute_capabilities
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # on by default; it computes float32 convolutions with 10 bits of mantissa
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # lists every layer with its types
    if wanted:
        members = trt.ComputeCapability.__members__
        known = {f"{name[2:-1]}.{name[-1]}": value for name, value in members.items() if name.startswith("SM")}  # SM120
        config.num_compute_capabilities = len(wanted)
        for i, name in enumerate(wanted):
            if name not in known or not config.set_compute_capability(known[name], i):
                raise EngineError(f"{compiler.title} cannot build for a GPU of {name}; it knows {', '.join(known)}")
    return config


def _set_profile(builder: Any, config: Any, image: Any, profile: Profile | None, record: Record) -> None:
    """Give the profile to the builder.

    Raises:
        ModelError: It contradicts the graph's ``image``, or is missing where that has free dimensions.
    """
    shape = [int(size) for size in image.shape]
    if profile is None:
        if -1 in shape:
            raise ModelError(f"the graph's {INPUT} is {shape}: a profile has to say what -1 may be")
        return
    for size, low, high in zip(shape, profile.minimum, profile.maximum, strict=True):
        if size != -1 and not size == low == high:
            raise ModelError(f"profile {profile} contradicts the graph, whose {INPUT} is {shape} (-1: any)")
    optimization = builder.create_optimization_profile()
    optimization.set_shape(INPUT, profile.minimum, profile.optimum, profile.maximum)
    if config.add_optimization_profile(optimization) < 0:
        raise ModelError(f"profile {profile} was refused ({_reason(record)})")


def _timing_cache(compiler: _Compiler, config: Any, place: Path | Slot | None, record: Record) -> tuple[Any, list[str]]:
    """Give what is kept at ``place`` to the builder: the cache, None if none is used, and what there is to say."""
    if place is None:
        return None, []
    if compiler.library is RTX:  # its functions are still there, deprecated, and do nothing
        return None, [f"{place}: not used; TensorRT for RTX times nothing and has no timing cache"]
    saved, problem = _kept(place)
    before = len(record.warnings)
    cache = config.create_timing_cache(saved)
    fits = cache is not None and config.set_timing_cache(cache, ignore_mismatch=False)
    said = record.warnings[before:]  # of a damaged one the library says so, and returns an empty cache
    if not fits or said:
        problem = f"damaged, or of another GPU or version ({_one_line(' '.join(said)) or 'refused'})"
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache, [f"{_shown(place)} is made anew: {problem}"] if problem else []


def _kept(place: Path | Slot) -> tuple[bytes, str]:
    """The timing cache that is kept, empty if there is none, and why it cannot be used."""
    if isinstance(place, Slot):
        kept, why = place.read()
        return kept.data if kept else b"", why
    try:
        return place.read_bytes() if place.exists() else b"", ""
    except OSError as error:
        return b"", f"cannot be read ({error.strerror or error})"


def _save(cache: Any, place: Path | Slot) -> list[str]:
    """Write a timing cache; an engine that was built is not lost because that fails."""
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
    """The library's way to ``progress``; a build that shall stop is told so at its next step."""

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

        def phase_finish(self, phase_name: str) -> None:  # perhaps before its last step
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
    # An engine cannot be loaded, and so not inspected, without a GPU. But the library lists its layers when they are
    # built, in the words of its inspector.
    inputs, outputs = _tensors(network)
    layers = _layers(record.layers)
    unknown = [] if layers else ["layers: the library did not list them"]
    if compiler.library is RTX:
        unknown.append("kernels: the device chooses them when it loads the engine")
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
    """How many layers there are of a kind, with the types that they read and write, in a library's list of layers."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for line in text.split("\n"):  # not splitlines: it takes the separators inside a line for ends
        if kind := re.search(r"LayerType: (\w+), Inputs: ", line):
            before, _, after = line[kind.end() :].partition(", Outputs: ")
            reads = before.partition(", Constants: ")[0]
            counts[kind[1], _types(reads), _types(after)] += 1
    return counts


def _types(tensors: str) -> str:
    """The types in a list of tensors: ``Datatype: Half, ...`` or ``Format/Datatype: Row major FP16 format``."""
    words = [_TYPE_WORD.search(text) for text in re.findall(r"[Dd]ata[Tt]ype: ([^,}]*)", tensors)]
    found = {word[1].lower() for word in words if word}
    return " ".join(sorted(_TYPES.get(word, word) for word in found))


def _reason(record: Record) -> str:
    """The errors so far, in one line."""
    return _one_line("\n".join(record.errors)) or "the library gives no reason"


def _one_line(text: str) -> str:
    """A library's message without line ends, and without the one it adds to every error where there is no driver."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    told = [line for line in lines if "cudaError 35" not in line] or lines
    return " ".join(told)[:1000]
