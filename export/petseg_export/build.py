"""Export a checkpoint to a file of any format, with its parity test: the pipeline that all formats share.

checkpoint -> photos and reference answers -> ONNX graph -> (compiled form) -> receipt -> files moved into place
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from petseg import checkpoint
from petseg.memory import enough_memory
from petseg.model import AttentionUNet
from petseg_export import parity, registry
from petseg_export.config import CompiledConfig, EngineConfig, ExportConfig
from petseg_export.deploy import HALF_LIMIT, DeployedUNet, activation_peaks
from petseg_export.onnx import graph_bytes, provenance_of, scan, spec_of
from petseg_export.registry import Compiler, Watch
from petseg_runtime import images, onnx_metadata
from petseg_runtime.artifact import (
    COMPILED,
    INPUT,
    OUTPUT,
    PROVENANCE_KEY,
    RECEIPT_KEY,
    Artifact,
    open_artifact,
    sidecar_of,
    sidecar_text,
    signature_of,
)
from petseg_runtime.errors import (
    CheckpointError,
    DataError,
    EngineForeign,
    InputError,
    ModelError,
    OutputError,
    ParityNames,
    ParityShapes,
    ParityTolerance,
    UsageError,
)
from petseg_runtime.extras import install
from petseg_runtime.files import staging
from petseg_runtime.host import driver_trouble, nvidia_gpus
from petseg_runtime.onnx_metadata import with_metadata
from petseg_runtime.parity import SMOKE, Checks, Comparison, Proof, Receipt, measure, proof_of, require, spread
from petseg_runtime.spec import SPEC_KEY, STRIDE, ModelSpec
from petseg_runtime.text import counted

__all__ = ["Exported", "export"]

#: Photos stored beside the file for `petseg verify`: as many as a full receipt needs.
TRAVELLING: Final = SMOKE
#: Photos of the activation scans; few, because a scan holds all activations of the network in memory.
SCANNED: Final = 8
#: Key in a receipt's ``quantization``: on how many of the receipt's photos int8 was chosen; None: not known.
SHARED: Final = "judged_on_photos_of_the_receipt"
#: Key in a receipt's ``quantization``: why int8 may have been chosen on training photos, or None.
DOUBT: Final = "doubt"
#: The kind of layer that TensorRT for RTX calls a convolution.
_CONVOLUTION: Final = "correlation"
#: Photos of the test at a second size, for a graph with dynamic height and width.
ANOTHER_SIZE: Final = 3


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        path: The exported file.
        files: All files that were written, ``path`` first.
        receipt: The parity receipt.
        notes: Warnings about what the parity test cannot show, one line each.
    """

    path: Path
    files: tuple[Path, ...]
    receipt: Receipt
    notes: tuple[str, ...] = ()


def export(checkpoint_path: str | os.PathLike[str], config: ExportConfig, watch: Watch | None = None) -> Exported:
    """Export a checkpoint to the format that ``config`` describes, and run the parity test.

    Writes the file and ``FILE.parity.npz``, the photos and reference answers for `petseg verify`. The specification,
    the provenance and the receipt are stored in an ONNX file itself, and beside a compiled one in ``FILE.json``.

    Args:
        checkpoint_path: A checkpoint that ``petseg train`` wrote.
        config: Its class selects the format.
        watch: Called with progress; see :data:`petseg_export.registry.Watch`.

    Raises:
        UsageError: The options contradict each other, the checkpoint, or the given ONNX file.
        MissingExtra: A required package is not installed.
        EngineError: A required device or engine is missing or fails, or memory runs out.
        CheckpointError: The checkpoint cannot be used.
        ModelError: The given ONNX file is not of this checkpoint, or the compiler cannot read the graph.
        DataError: The data cannot be used.
        InputError: A photo of the parity test cannot be read.
        ParityError: The file does not agree with the checkpoint; no file is written.
        OutputError: The files cannot be written.
    """
    registry.check(config)
    tell: Watch = watch or (lambda what, done, total: None)
    path = Path(checkpoint_path)
    name, form = registry.format_of(config)
    checkpoint.peek(path)  # first: "not a checkpoint" is the better error for `petseg export mine.onnx` and for `.`
    output = config.output or path.with_suffix(form.suffix)
    _check_overwrites(_output_files(output, name), path, getattr(config, "onnx", None))
    tell("reading", 0, 0)
    model, loaded = checkpoint.load_model(path)
    given = _open_given(config, loaded)
    with _with_path(path), enough_memory("use a smaller --size or --batch, or fewer --photos"):
        spec = dataclasses.replace(given.spec, precision=config.precision) if given else spec_of(loaded, config)
        _check_limits(config, spec)
        provenance = provenance_of(path.name, loaded, config)
        if config.precision == "int8" and not given:
            _check_int8_photos(config, loaded)
        chosen = parity.choose(config.data, config.split, config.photos, config.seed, loaded)
        photos = parity.read(chosen, spec)
        doubt = parity.overlap_warning(config.data, config.split, loaded) or ""
        job = _Job(name, form, config, path, model, loaded, spec, given, provenance, photos, doubt, tell)
        try:
            with staging(output) as folder:
                receipt, environment = job.run(folder / output.name)
                others = sorted(file.name for file in folder.iterdir() if file.name != output.name)
        except OSError as error:
            raise OutputError(f"{output}: cannot be written ({error.strerror or error})") from error
    files = (output, *(output.with_name(other) for other in others))
    notes = (*_size_notes(path, loaded, spec), *_receipt_notes(receipt), *_engine_notes(environment))
    return Exported(output, files, receipt, notes)


def _output_files(output: Path, name: str) -> list[Path]:
    """All files that an export to a format writes."""
    compiled = COMPILED.get(name)
    beside = [*(output.with_suffix(suffix) for suffix in compiled[1]), sidecar_of(output)] if compiled else []
    return [output, *beside, proof_of(output)]


def _check_overwrites(places: list[Path], *sources: Path | None) -> None:
    """Make sure that no output file overwrites a source: a checkpoint may be called ``model.bin``.

    Raises:
        OutputError: One would.
    """
    for source in sources:
        for place in places:
            if source and source.exists() and place.exists() and place.samefile(source):
                raise OutputError(f"{place}: the export would overwrite its source; choose another file with --output")


def _size_notes(path: Path, loaded: checkpoint.Checkpoint, spec: ModelSpec) -> tuple[str, ...]:
    """A warning if the file's size is not the one that the network was trained at.

    The parity test cannot show the loss: at that size, the checkpoint itself does no better.
    """
    trained = loaded.meta.get("spec")
    if not isinstance(trained, dict) or (trained.get("height"), trained.get("width")) == (spec.height, spec.width):
        return ()
    before, now = f"{trained.get('height')} x {trained.get('width')}", f"{spec.height} x {spec.width}"
    remedy = "measure them with `petseg evaluate`, or train at that size"
    return (f"{path}: trained at {before}; at {now} its masks may be much worse: {remedy}",)


def _engine_notes(environment: dict[str, Any]) -> tuple[str, ...]:
    """A warning if most int8 convolutions of an engine write float, which other kernels convert back to int8.

    TensorRT for RTX 1.7 builds every int8 graph so; its documentation lists int8 only for the weights of matrix
    products.
    """
    rows = environment.get("engine", {}).get("computed") or ()
    convolutions = [row for row in rows if row["layer"] == _CONVOLUTION and "int8" in row["reads"]]
    count = sum(row["count"] for row in convolutions)
    wide = sum(row["count"] for row in convolutions if "int8" not in row["writes"])
    if 2 * wide <= count:
        return ()
    return (
        f"{wide} of {count} int8 convolutions write float in this library, which is converted to int8 again: "
        "--precision fp16 is probably faster (not measured by us)",
    )


def _receipt_notes(receipt: Receipt) -> tuple[str, ...]:
    """Warnings about a receipt: facts in it that are easily overlooked."""
    notes = []
    doubts = (receipt.note if receipt.rows else None, (receipt.quantization or {}).get(DOUBT))
    notes += [f"{doubt}; the IoU on such photos is optimistic" for doubt in dict.fromkeys(doubts) if doubt]
    if receipt.scan is None:
        notes.append(
            "the ONNX graph was neither run nor scanned for NaN and infinity, because onnxruntime is not installed: "
            f"{install('cpu')}"
        )
    has_labels = any(row.task for row in receipt.rows)  # without labels there is no loss of IoU
    shared = (receipt.quantization or {}).get(SHARED, 0) if has_labels else 0
    if shared is None:
        notes.append(
            "int8 was not tuned on the validation photos of --data, so it is not known whether it was tuned on photos "
            "of the parity test; if it was, the loss of IoU is underestimated"
        )
    elif shared:
        notes.append(
            f"int8 was chosen on {shared} of the {receipt.photos} photos of the parity test, so the loss of IoU is "
            "underestimated: choose other photos with --split test"
        )
    return tuple(notes)


def _check_limits(config: ExportConfig, spec: ModelSpec) -> None:
    """Check the limits of an optimization profile against the graph's axes, before minutes of work.

    Raises:
        UsageError: They contradict each other.
    """
    if not isinstance(config, EngineConfig):
        return
    registry.check_limits(config, batch=spec.batch, dynamic_size=spec.dynamic_size)
    if config.max_size and (config.max_size[0] < spec.height or config.max_size[1] < spec.width):
        largest = " x ".join(map(str, config.max_size))
        raise UsageError(f"max_size is {largest}; it must be at least the model's {spec.height} x {spec.width}")


def _check_int8_photos(config: ExportConfig, loaded: checkpoint.Checkpoint) -> None:
    """Check that there are photos to calibrate int8 on, and enough to evaluate it on, before minutes of work.

    Raises:
        CheckpointError: The checkpoint's record of its split is damaged.
        DataError: The training split is empty, or the validation split has fewer photos than required.
    """
    data, least = _int8_data(config), config.quantize.judges
    parity.labelled(data, "train", loaded)
    if (found := len(parity.labelled(data, "val", loaded))) < least:
        raise DataError(
            f"{data}: int8 is evaluated on the validation split, which has {found} photos, and {least} are required; "
            "train with a larger val_fraction, or require fewer with --int8-judges"
        )


def _int8_data(config: ExportConfig) -> Path:
    """The folder of labelled photos that int8 is calibrated and evaluated on."""
    data = config.quantize.data or config.data
    assert data is not None  # registry.check requires it
    return data


@contextlib.contextmanager
def _with_path(path: Path) -> Iterator[None]:
    """Add the checkpoint's path to errors that are raised where only its content is known."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _Job:
    """One export: the request and everything that is read before work starts."""

    name: str
    form: registry.Format
    config: ExportConfig
    path: Path
    model: AttentionUNet
    loaded: checkpoint.Checkpoint
    spec: ModelSpec
    given: Artifact | None
    provenance: str
    photos: parity.Photos
    doubt: str
    tell: Watch

    def run(self, file: Path) -> tuple[Receipt, dict[str, Any]]:
        """Write the file and its companions into the folder of ``file``; return its receipt and its environment.

        Raises:
            ParityError: The file does not agree with the checkpoint.
        """
        photos = self.photos
        compiled = self.form.compiler is not None
        proof = parity.prove(self.model, self.loaded, photos, self._progress("reference in PyTorch"))
        source, quantization = self._source(file.with_name("source.onnx") if compiled else file, proof)
        target = self._compile(source, file) if compiled else source
        rows, note = self._rows(target, proof, _budget(quantization))
        travelling = proof.spread(TRAVELLING)
        receipt = Receipt(
            identity=source.identity,
            proof=travelling.identity,
            photos=len(photos.names),
            photos_sha256=proof.sha256,
            names=photos.names,
            reference=proof.reference,
            stored=self.spec.precision,
            rows=rows,
            scan=self._scan(source),
            quantization=quantization,
            note=note or self.doubt,
            spec=json.loads(target.spec.to_json()),
        )
        require(receipt)
        if compiled:
            text = sidecar_text(dataclasses.replace(target, receipt=receipt.as_dict()))
            sidecar_of(file).write_text(text, encoding="utf-8")
            source.path.unlink()
        else:
            metadata = {**_metadata(source), RECEIPT_KEY: json.dumps(receipt.as_dict())}
            file.write_bytes(with_metadata(file.read_bytes(), metadata))
        proof_of(file).write_bytes(travelling.to_bytes())
        return receipt, target.environment

    def _source(self, file: Path, proof: Proof) -> tuple[Artifact, dict[str, Any] | None]:
        """Write the ONNX file that everything else is made from; return it and how its int8 was chosen."""
        if self.given:
            file.write_bytes(self.given.path.read_bytes())
            return open_artifact(file), self._quantization_of(self.given)
        precision = self.form.sources.get(self.spec.precision, self.spec.precision)
        spec = dataclasses.replace(self.spec, precision=precision)
        metadata = {SPEC_KEY: spec.to_json(), PROVENANCE_KEY: self.provenance}
        self.tell("tracing the network", 0, 0)
        graph, quantization = graph_bytes(DeployedUNet(self.model), spec), None
        file.write_bytes(with_metadata(graph, metadata))
        if precision != "fp32" or self.form.compiler:
            self._check_graph(_opened(file), "fp32", proof)
        if precision == "fp16":
            peaks = activation_peaks(self.model, self.photos.images[spread(len(self.photos.images), SCANNED)])
            half = {name for name, peak in peaks.items() if peak <= HALF_LIMIT}
            file.write_bytes(with_metadata(graph_bytes(DeployedUNet(self.model, half), spec), metadata))
            if self.form.compiler:
                self._check_graph(_opened(file), "fp16", proof)
        elif precision == "int8":
            graph, quantization = self._quantized(graph, spec)
            file.write_bytes(with_metadata(graph, metadata))
        return _opened(file), quantization

    def _check_graph(self, source: Artifact, stored: str, proof: Proof) -> None:
        """Check a traced graph against the checkpoint in ONNX Runtime, before anything is made from it.

        The result may not run on this machine (TensorRT), and the tolerances of fp16 and int8 are so wide that a graph
        with a wrong normalisation passes. So the float32 trace of the same network is checked first, at the tolerance
        of float32.

        Raises:
            ParityTolerance: The graph's output differs from the checkpoint's by more than the tolerance.
        """
        if importlib.util.find_spec("onnxruntime") is None:
            return  # the missing activation scan is reported with the receipt
        source = dataclasses.replace(source, spec=dataclasses.replace(source.spec, precision=stored))
        rows = measure(
            source,
            proof,
            backend="onnxruntime",
            device="cpu",
            threads=self.config.threads,
            checks=Checks(another_size=self._at_another_size()),
            watch=self._progress("parity test of the graph"),
        )
        if failures := [failure for row in rows for failure in row.failures]:
            raise ParityTolerance(
                f"the traced ONNX graph ({stored}) does not match the checkpoint "
                f"({counted(len(proof.names), 'photo')}, FAILED): {'; '.join(failures)}"
            )

    def _quantized(self, graph: bytes, spec: ModelSpec) -> tuple[bytes, dict[str, Any]]:
        """Quantize the graph to int8, calibrated on training photos and evaluated on validation photos."""
        from petseg_export.quantize import judge_on, quantize

        config, data = self.config.quantize, _int8_data(self.config)
        train, val = (parity.labelled(data, split, self.loaded) for split in ("train", "val"))
        calibration = parity.read(parity.sample(train, config.photos, config.seed), spec)
        judges = parity.read(val, spec)
        result = quantize(graph, calibration.images, judge_on(judges), config, self.tell)
        about = {
            "calibrated_on": calibration.about,
            "judged_on": judges.about,
            SHARED: self.photos.among(judges),
            DOUBT: parity.overlap_warning(data, "val", self.loaded),
        }
        return result.graph, {**result.choice, **about}

    def _quantization_of(self, given: Artifact) -> dict[str, Any] | None:
        """The quantization record of the given ONNX file, for this receipt; None if the file is not int8.

        Raises:
            ModelError: The record is damaged.
        """
        found = given.receipt.get("quantization")
        if found is None:
            return None
        if _budget(found) is None:
            raise ModelError(
                f"{given.path}: its receipt is damaged (quantization {str(found)[:40]!r}): export it again"
            )
        return {**found, SHARED: self._shared(found.get("judged_on"))}  # the photos of this receipt may be others

    def _shared(self, judged_on: Any) -> int | None:
        """See :data:`SHARED`; for a given int8 file, which records only a digest of these photos."""
        if self.photos.labels is None or self.config.data is None:
            return 0
        self.tell("looking for the photos that int8 was tuned on", 0, 0)
        try:
            judges = parity.read(parity.labelled(self.config.data, "val", self.loaded), self.spec)
        except (
            DataError,
            InputError,
        ):  # missing or incomplete, so not the split that int8 was tuned on
            return None
        return self.photos.among(judges) if judges.about == judged_on else None

    def _compile(self, source: Artifact, file: Path) -> Artifact:
        assert self.form.compiler is not None
        module, _, function = self.form.compiler.partition(":")
        self.tell(f"compiling with {self.form.needs[0].module}", 0, 0)
        compiler: Compiler = getattr(importlib.import_module(module), function)
        environment = compiler(source, file, self.config, self.tell)
        spec = dataclasses.replace(source.spec, precision=self.spec.precision)
        return dataclasses.replace(
            source,
            path=file,
            format=self.name,
            spec=spec,
            receipt={},
            onnx=None,
            environment=environment,
            signature=signature_of(file, self.name),
        )

    def _rows(self, target: Artifact, proof: Proof, budget: float | None) -> tuple[tuple[Comparison, ...], str]:
        """One row per engine and precision, or no rows and the reason.

        Raises:
            EngineError: An engine is not available or cannot run the file, so the export fails.
        """
        if self.form.cuda and not nvidia_gpus():
            why = driver_trouble() or "no NVIDIA GPU on the machine that built it"
            return (), f"{why}; run `petseg verify` on the device"
        try:
            return tuple(self._measured(target, proof, budget)), ""
        except EngineForeign as error:
            if not self.form.foreign:
                raise
            return (
                (),
                f"the GPU of the machine that built it cannot load it ({error}); run `petseg verify` on the device",
            )

    def _measured(self, target: Artifact, proof: Proof, budget: float | None) -> Iterator[Comparison]:
        """The rows of all requested engines."""
        checks = Checks(
            task=self.photos.labels.task(proof.expected) if self.photos.labels else None,
            budget=budget,
            another_size=self._at_another_size(),
        )
        for backend in self.config.backends:
            yield from measure(
                target,
                proof,
                backend=backend,
                device=self.config.device,
                threads=self.config.threads,
                checks=checks,
                watch=self._progress("parity test"),
                tell=lambda _: self.tell("compiling for the parity test, can take minutes", 0, 0),
            )

    def _at_another_size(self) -> Proof | None:
        """The reference for a few photos at a size that is not the specification's, where the graph accepts any."""
        size = _another_size(self.spec, getattr(self.config, "max_size", None))
        if size is None:
            return None
        chosen = spread(len(self.photos.names), ANOTHER_SIZE)
        resized = np.stack([images.to_model(photo, *size) for photo in self.photos.images[chosen]])
        names = tuple(self.photos.names[i] for i in chosen)
        return parity.prove(self.model, self.loaded, parity.Photos(names, resized, None))

    def _scan(self, source: Artifact) -> dict[str, Any] | None:
        if importlib.util.find_spec("onnxruntime") is None:
            return None
        self.tell("scanning activations", 0, 0)
        return scan(source.path.read_bytes(), list(self.photos.images[spread(len(self.photos.images), SCANNED)]))

    def _progress(self, what: str) -> Callable[[int], None]:
        return lambda done: self.tell(what, done, len(self.photos.names))


def _another_size(spec: ModelSpec, largest: tuple[int, int] | None) -> tuple[int, int] | None:
    """The height and width of the parity test's second size.

    Args:
        spec: The specification of the graph.
        largest: The largest height and width that the file accepts; None: at least twice the specification's.

    Returns:
        None if the size is fixed, or if the specification's is the only one that the file accepts.
    """
    if not spec.dynamic_size:
        return None
    # Smaller, or larger where the side is already the smallest that there is.
    height = max(STRIDE, spec.height - 16) if spec.height > STRIDE else 2 * STRIDE
    width = max(STRIDE, spec.width - 32) if spec.width > STRIDE else 2 * STRIDE
    if largest:
        height, width = min(height, largest[0]), min(width, largest[1])
    return None if (height, width) == (spec.height, spec.width) else (height, width)


def _budget(quantization: Any) -> float | None:
    """The loss of IoU, in points, that int8 was allowed; None if there is no valid record of it."""
    budget = quantization.get("budget") if isinstance(quantization, dict) else None
    return float(budget) if isinstance(budget, int | float) else None


def _open_given(config: ExportConfig, loaded: checkpoint.Checkpoint) -> Artifact | None:
    """Open the ONNX file that the config wants compiled unchanged, if any.

    Raises:
        ModelError: Not an ONNX file, or not of this checkpoint.
        UsageError: The config asks for other properties than the file has.
    """
    if not isinstance(config, CompiledConfig) or config.onnx is None:
        return None
    given = open_artifact(config.onnx)
    _, form = registry.format_of(config)
    if given.format != "onnx":
        raise ModelError(f"{config.onnx}: an ONNX file is expected, not {given.format}")
    if given.provenance.get("checkpoint_sha256") != loaded.sha256:
        raise ModelError(f"{config.onnx}: exported from another checkpoint than the given one")
    if given.spec.precision not in (config.precision, form.sources.get(config.precision)):
        stored = given.spec.precision
        raise UsageError(f"{config.onnx}: the file is {stored}, not {config.precision}; use --precision {stored}")
    default = type(config)()
    for name in ("name", "height", "width", "dynamic_size", "batch", "certain_share", "notes"):
        value = getattr(config, name)
        if value not in (getattr(default, name), getattr(given.spec, name, None)):
            raise UsageError(
                f"{config.onnx}: the file is compiled unchanged; {name} {value!r} does not apply, export again with it"
            )
    return given


def _opened(file: Path) -> Artifact:
    """Open an ONNX file as the runtime does.

    Raises:
        ParityNames: The names of its inputs or outputs break the contract.
        ParityShapes: Their shapes or types do.
    """
    try:
        return open_artifact(file)
    except ModelError as error:
        header = onnx_metadata.read(file)
        names = [tensor.name for tensor in (*header.inputs, *header.outputs)]
        raise (ParityShapes if names == [INPUT, OUTPUT] else ParityNames)(str(error)) from error


def _metadata(artifact: Artifact) -> dict[str, str]:
    assert artifact.onnx is not None
    return artifact.onnx.metadata
