"""From a checkpoint to a proven file: the one road that every format takes.

checkpoint -> photos and what it says of them -> ONNX graph -> (compiled form) -> receipt -> all files in their place
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
from petseg_runtime.host import nvidia_gpus
from petseg_runtime.onnx_metadata import with_metadata
from petseg_runtime.parity import SMOKE, Checks, Comparison, Proof, Receipt, measure, proof_of, require, spread
from petseg_runtime.spec import SPEC_KEY, STRIDE, ModelSpec

__all__ = ["Exported", "export"]

#: Photos that travel beside the file for `petseg verify`: as many as a full receipt needs.
TRAVELLING: Final = SMOKE
#: Photos of the activation scans, whose outputs are all of a network's activations at once.
SCANNED: Final = 8
#: A field of what a receipt says of int8: how many photos of the receipt were among those that judged it; None: it
#: cannot be told.
SHARED: Final = "judged_on_photos_of_the_receipt"
#: There, too: why photos that the checkpoint was trained on may be among those that int8 was judged on, or None.
DOUBT: Final = "doubt"
#: Photos that a graph of any size is run on at another size than its specification's.
ANOTHER_SIZE: Final = 3


@dataclass(frozen=True)
class Exported:
    """A finished export.

    Attributes:
        path: The file.
        files: All files that were written, that one first.
        receipt: What its parity test measured.
        notes: Warnings for people, a line each: what the parity test cannot show.
    """

    path: Path
    files: tuple[Path, ...]
    receipt: Receipt
    notes: tuple[str, ...] = ()


def export(checkpoint_path: str | os.PathLike[str], config: ExportConfig, watch: Watch | None = None) -> Exported:
    """Turn a checkpoint into the file that a config describes, and prove it.

    The specification, the provenance and the receipt are in the file (ONNX) or in ``FILE.json`` beside it (compiled
    forms); photos and reference answers for `petseg verify` are in ``FILE.parity.npz``.

    Args:
        checkpoint_path: What ``petseg train`` wrote.
        config: Its class says which format.
        watch: Told about progress.

    Raises:
        UsageError: What is asked for does not go together, with that checkpoint, or with the ONNX file that was given.
        MissingExtra: A package that is needed is not installed.
        EngineError: A device or engine that is needed is not there, or fails.
        CheckpointError: The checkpoint cannot be used.
        ModelError: The ONNX file that was given is not of this checkpoint, or the compiler cannot read the graph.
        DataError: The data cannot be used.
        InputError: A photo of the parity test cannot be read.
        ParityError: The file does not do what the checkpoint does; nothing is left of it.
        OutputError: It cannot be written.
    """
    registry.check(config)
    tell: Watch = watch or (lambda what, done, total: None)
    path = Path(checkpoint_path)
    name, form = registry.format_of(config)
    output = config.output or path.with_suffix(form.suffix)
    checkpoint.peek(path)  # an exported file is no checkpoint: that says more than that it would be replaced
    _check_places(_places(output, name), path, getattr(config, "onnx", None))
    tell("reading", 0, 0)
    model, loaded = checkpoint.load_model(path)
    given = _given(config, loaded)
    with _naming(path):
        spec = dataclasses.replace(given.spec, precision=config.precision) if given else spec_of(loaded, config)
        _check_limits(config, spec)
        provenance = provenance_of(path.name, loaded, config)
        if config.precision == "int8" and not given:
            _check_judges(config, loaded)
        chosen = parity.choose(config.data, config.split, config.photos, config.seed, loaded)
        photos = parity.read(chosen, spec)
        doubt = parity.doubt(config.data, config.split, loaded) or ""
        job = _Job(name, form, config, path, model, loaded, spec, given, provenance, photos, doubt, tell)
        try:
            with staging(output) as folder:
                receipt = job.run(folder / output.name)
                others = sorted(file.name for file in folder.iterdir() if file.name != output.name)
        except OSError as error:
            raise OutputError(f"{output}: cannot be written ({error.strerror or error})") from error
    files = (output, *(output.with_name(other) for other in others))
    return Exported(output, files, receipt, (*_size_notes(path, loaded, spec), *_receipt_notes(receipt)))


def _places(output: Path, name: str) -> list[Path]:
    """All files of an export in a format."""
    compiled = COMPILED.get(name)
    beside = [*(output.with_suffix(suffix) for suffix in compiled[1]), sidecar_of(output)] if compiled else []
    return [output, *beside, proof_of(output)]


def _check_places(places: list[Path], *sources: Path | None) -> None:
    """Refuse to write any of the files over what they are made from: a checkpoint may be called ``model.bin``.

    Raises:
        OutputError: Names it.
    """
    for source in sources:
        for place in places:
            if source and source.exists() and place.exists() and place.samefile(source):
                raise OutputError(
                    f"{place}: would be written over what it is made from; give another file with --output"
                )


def _size_notes(path: Path, loaded: checkpoint.Checkpoint, spec: ModelSpec) -> tuple[str, ...]:
    """A warning where the file has another size than the network was trained at.

    The parity test cannot show it: at that size, the checkpoint itself does no better.
    """
    trained = loaded.meta.get("spec")
    if not isinstance(trained, dict) or (trained.get("height"), trained.get("width")) == (spec.height, spec.width):
        return ()
    own, asked = f"{trained.get('height')} x {trained.get('width')}", f"{spec.height} x {spec.width}"
    remedy = "measure them with `petseg evaluate`, or train at that size"
    return (f"{path}: trained at {own}; at {asked} its masks may be much worse: {remedy}",)


def _receipt_notes(receipt: Receipt) -> tuple[str, ...]:
    """What people should know of a receipt, and may overlook in it."""
    notes = []
    doubts = (receipt.note if receipt.rows else None, (receipt.quantization or {}).get(DOUBT))
    notes += [f"{doubt}, and the IoU on them is flattered" for doubt in dict.fromkeys(doubts) if doubt]
    if receipt.scan is None:
        notes.append(
            "the ONNX graph itself was not run, and not searched for NaN and infinity, which onnxruntime does: "
            f"{install('cpu')}"
        )
    of_labels = any(row.task for row in receipt.rows)  # else there is no loss that could be flattered
    shared = (receipt.quantization or {}).get(SHARED, 0) if of_labels else 0
    if shared is None:
        notes.append(
            "whether int8 was chosen on photos of the parity test cannot be told, as --data is not what it was chosen "
            "on; where it was, their loss of IoU is flattered"
        )
    elif shared:
        notes.append(
            f"int8 was chosen on {shared} of the {receipt.photos} photos of the parity test, whose loss of IoU is so "
            "flattered: --split test takes others"
        )
    return tuple(notes)


def _check_limits(config: ExportConfig, spec: ModelSpec) -> None:
    """Hold the largest batch and size that are asked for against what the graph takes, before the minutes of work.

    Raises:
        UsageError: They contradict it.
    """
    if not isinstance(config, EngineConfig):
        return
    registry.check_limits(config, batch=spec.batch, dynamic_size=spec.dynamic_size)
    if config.max_size and (config.max_size[0] < spec.height or config.max_size[1] < spec.width):
        largest = " x ".join(map(str, config.max_size))
        raise UsageError(f"max_size is {largest}, less than the {spec.height} x {spec.width} of the model itself")


def _check_judges(config: ExportConfig, loaded: checkpoint.Checkpoint) -> None:
    """Refuse int8 that too few photos would judge, before the minutes of work.

    Raises:
        CheckpointError: It does not say which photos that would be.
        DataError: There are fewer than are asked for.
    """
    data, least = _int8_data(config), config.quantize.judges
    if (found := len(parity.labelled(data, "val", loaded))) < least:
        raise DataError(
            f"{data}: int8 is judged on the validation part, which has {found} photos; {least} are needed (a larger "
            "val_fraction in training, or fewer with --int8-judges)"
        )


def _int8_data(config: ExportConfig) -> Path:
    """The labelled photos that int8 is calibrated and judged on."""
    data = config.quantize.data or config.data
    assert data is not None  # the registry has seen to it
    return data


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file in errors about what is inside a checkpoint, which are raised where its name is not known."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _Job:
    """One export: what is asked, and what is known before anything is made."""

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

    def run(self, file: Path) -> Receipt:
        """Write the file and what belongs to it; raise if it does not do what the checkpoint does."""
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
        return receipt

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
                f"the traced ONNX graph ({stored}) does not match the checkpoint ({len(proof.names)} photos, FAILED): "
                f"{'; '.join(failures)}"
            )

    def _quantized(self, graph: bytes, spec: ModelSpec) -> tuple[bytes, dict[str, Any]]:
        """The graph in int8, calibrated on training photos and judged on validation photos."""
        from petseg_export.quantize import judge_on, quantize

        config, data = self.config.quantize, _int8_data(self.config)
        train, val = (parity.labelled(data, split, self.loaded) for split in ("train", "val"))
        calibration = parity.read(parity.sample(train, config.photos, config.seed), spec)
        judges = parity.read(val, spec)
        result = quantize(graph, calibration.images, judge_on(judges), config, self.tell)
        about: dict[str, Any] = {"calibrated_on": calibration.about, "judged_on": judges.about}
        of_run = self.loaded.meta.get("data")
        trained_on = of_run.get("val_photos") if isinstance(of_run, dict) else None
        about |= {
            "as_many_as_in_training": trained_on == len(val),
            SHARED: self.photos.among(judges),
            DOUBT: parity.doubt(data, "val", self.loaded),
        }
        return result.graph, {**result.choice, **about}

    def _quantization_of(self, given: Artifact) -> dict[str, Any] | None:
        """How the int8 of the ONNX file that was given was chosen; None if it is not int8.

        Raises:
            ModelError: Its receipt does not say it as we write it.
        """
        found = given.receipt.get("quantization")
        if found is None:
            return None
        if _budget(found) is None:
            raise ModelError(
                f"{given.path}: its receipt is damaged (quantization {str(found)[:40]!r}): export it again"
            )
        return {**found, SHARED: self._shared(found.get("judged_on"))}  # this receipt may be of other photos

    def _shared(self, judged_on: Any) -> int | None:
        """See :data:`SHARED`, of an int8 file that was given, which tells of its judges no more than a digest."""
        if self.photos.labels is None or self.config.data is None:
            return 0
        self.tell("looking for the photos that int8 was chosen on", 0, 0)
        try:
            judges = parity.read(parity.labelled(self.config.data, "val", self.loaded), self.spec)
        except (DataError, InputError):  # it has no such part, or not a whole one: not that of int8, then
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
            source, path=file, format=self.name, spec=spec, receipt={}, onnx=None, environment=environment
        )

    def _rows(self, target: Artifact, proof: Proof, budget: float | None) -> tuple[tuple[Comparison, ...], str]:
        """A row for each engine and precision, or why there is none.

        Raises:
            EngineError: An engine cannot be had, or does not run the file, which is a failed export.
        """
        if self.form.cuda and not nvidia_gpus():
            return (), "no NVIDIA GPU where it was made; `petseg verify` on the device completes this"
        try:
            return tuple(self._measured(target, proof, budget)), ""
        except EngineForeign as error:
            if not self.form.foreign:
                raise
            return (), f"the GPU where it was made does not load it ({error}); `petseg verify` on the device does"

    def _measured(self, target: Artifact, proof: Proof, budget: float | None) -> Iterator[Comparison]:
        """The rows of all engines that are asked for."""
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
    """The loss of IoU, in points, that int8 was allowed."""
    budget = quantization.get("budget") if isinstance(quantization, dict) else None
    return float(budget) if isinstance(budget, int | float) else None


def _given(config: ExportConfig, loaded: checkpoint.Checkpoint) -> Artifact | None:
    """The ONNX file that is to be compiled as it is, if one was given.

    Raises:
        ModelError: Not an ONNX file, or not one of this checkpoint.
        UsageError: Something else is asked for than what it is.
    """
    if not isinstance(config, CompiledConfig) or config.onnx is None:
        return None
    given = open_artifact(config.onnx)
    _, form = registry.format_of(config)
    if given.format != "onnx":
        raise ModelError(f"{config.onnx}: an ONNX file is expected, not {given.format}")
    if given.provenance.get("checkpoint_sha256") != loaded.sha256:
        raise ModelError(f"{config.onnx}: exported from another checkpoint than the one given")
    if given.spec.precision not in (config.precision, form.sources.get(config.precision)):
        own = given.spec.precision
        raise UsageError(f"{config.onnx}: it is {own}, not {config.precision} as asked: ask for --precision {own}")
    standard = type(config)()
    for name in ("name", "height", "width", "dynamic_size", "batch", "certain_share", "notes"):
        asked = getattr(config, name)
        if asked not in (getattr(standard, name), getattr(given.spec, name, None)):
            raise UsageError(f"{config.onnx}: it is compiled as it is, so {name} {asked!r} cannot be asked for with it")
    return given


def _opened(file: Path) -> Artifact:
    """The ONNX file as the runtime reads it.

    Raises:
        ParityNames: Its inputs or outputs are named differently from the contract.
        ParityShapes: Their shapes or types differ.
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
