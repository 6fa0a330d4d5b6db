"""Read a model file's specification, its provenance, and the receipt of its parity test.

An ONNX file contains all three as metadata. A compiled file (an OpenVINO IR, a TensorRT engine) has them in a JSON
sidecar file, ``FILE.json``, with the environment that it was compiled for and the digests of its files.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeAlias

from petseg_runtime import onnx_metadata
from petseg_runtime.errors import ModelError
from petseg_runtime.files import read_text
from petseg_runtime.spec import SPEC_KEY, ModelSpec

__all__ = [
    "COMPILED",
    "INPUT",
    "OUTPUT",
    "PROVENANCE_KEY",
    "RECEIPT_KEY",
    "Artifact",
    "default_model",
    "open_artifact",
    "sample_photos",
    "sidecar_of",
    "sidecar_text",
    "signature_of",
]

PROVENANCE_KEY: Final = "petseg.provenance"
RECEIPT_KEY: Final = "petseg.receipt"
#: Suffix of training checkpoints, from which `petseg export` makes models.
CHECKPOINT_SUFFIX: Final = ".safetensors"
#: The names of the graph's one input and one output.
INPUT: Final = "image"
OUTPUT: Final = "probability"

#: The compiled formats: the suffix of the main file, and the suffixes of the files that belong to it.
COMPILED: Final = {"openvino": (".xml", (".bin",)), "trt": (".engine", ()), "trt-rtx": (".engine", ())}

SCHEMA_VERSION: Final = 1
MAX_SIDECAR: Final = 16 * 2**20

#: Size and time of the last change of each file; None for one that is not there. (Not the inode: some network file
#: systems number a file anew.)
Signature: TypeAlias = tuple[tuple[int, int] | None, ...]

_MODELS: Final = Path(__file__).parent / "models"


@dataclass(frozen=True)
class Artifact:
    """The description of an exported model file, read without loading the model in an engine.

    Attributes:
        path: The file.
        format: ``onnx``, or one of :data:`COMPILED`.
        spec: The model's specification.
        provenance: Where the model comes from: checkpoint digest, training, measured metrics, versions.
        receipt: The results of its parity test; empty if it has none.
        identity: SHA-256 of the ONNX file without its metadata; for a compiled file, of the ONNX file it was made from.
        size: Size in bytes of all files that belong to it.
        onnx: The header of an ONNX file: inputs, outputs, opset. None for a compiled file.
        environment: What a compiled file was built for and needs. Empty for ONNX.
        signature: See :func:`signature_of`; of its files before they were read.
    """

    path: Path
    format: str
    spec: ModelSpec
    provenance: dict[str, Any]
    receipt: dict[str, Any]
    identity: str
    size: int
    onnx: onnx_metadata.OnnxFile | None
    environment: dict[str, Any]
    signature: Signature = field(default=(), compare=False)

    def check_unchanged(self) -> None:
        """Check, without reading them again, that its files are still those that were opened.

        Raises:
            ModelError: One of them was replaced, removed or written to.
        """
        if signature_of(self.path, self.format) != self.signature:
            raise ModelError(f"{self.path}: changed while it was loaded: load it again")

    def check_same(self, identity: str) -> None:
        """Check that the ONNX file, read again and found to have this identity, still has the same graph.

        Raises:
            ModelError: The graph has changed.
        """
        if identity != self.identity:
            raise ModelError(f"{self.path}: changed while it was loaded: load it again")


def default_model() -> Path:
    """The path of the built-in model."""
    return _MODELS / "edge.onnx"


def sample_photos() -> list[Path]:
    """The paths of the sample photos that ship with petseg, sorted."""
    return sorted(path for path in (_MODELS / "samples").iterdir() if path.suffix == ".jpg")


def sidecar_of(path: Path) -> Path:
    """The path of a compiled file's JSON sidecar: its full name and ``.json``."""
    return path.with_name(f"{path.name}.json")


def open_artifact(path: Path) -> Artifact:
    """Read a model file's description, and check its graph, or the digests of its files, against it.

    Raises:
        ModelError: The file is missing, damaged, not exported by petseg, lacks files that belong to it, differs from
            what its receipt certifies, or has inputs and outputs other than ``image`` uint8 [N, H, W, 3] and
            ``probability`` uint8 [N, H, W].
    """
    if path.suffix in {suffix for suffix, _ in COMPILED.values()}:
        return _open_compiled(path)
    if path.suffix == CHECKPOINT_SUFFIX and path.exists():
        raise ModelError(f"{path}: is a checkpoint; export it first: `petseg export {path}`")
    signature = signature_of(path, "onnx")
    onnx = onnx_metadata.read(path)
    if SPEC_KEY not in onnx.metadata:
        raise ModelError(
            f"{path}: is an ONNX file that petseg did not export (it has no {SPEC_KEY!r} metadata); use a file made by "
            "`petseg export`"
        )
    try:
        spec = ModelSpec.from_json(onnx.metadata[SPEC_KEY])
        provenance = _object(onnx.metadata, PROVENANCE_KEY)
        receipt = _object(onnx.metadata, RECEIPT_KEY)
        _check_certified(spec, receipt)
    except ModelError as error:
        raise ModelError(f"{path}: {_short(error)}") from error
    _check_contract(path, onnx, spec)
    if receipt.get("identity", onnx.identity) != onnx.identity:
        raise ModelError(
            f"{path}: damaged, or changed since it was exported: its graph is not the one that its receipt certifies "
            "(the SHA-256 digests differ); copy it again, or export it again"
        )
    return Artifact(path, "onnx", spec, provenance, receipt, onnx.identity, onnx.size, onnx, {}, signature)


def sidecar_text(artifact: Artifact) -> str:
    """The content of a compiled file's JSON sidecar, with the digests of its files as they are now."""
    files = _files(artifact.path, artifact.format)
    value = {
        "schema_version": SCHEMA_VERSION,
        "format": artifact.format,
        "spec": json.loads(artifact.spec.to_json()),
        "onnx_identity": artifact.identity,
        "files": {file.suffix: _sha256(file) for file in files},
        "environment": artifact.environment,
        "provenance": artifact.provenance,
        "receipt": artifact.receipt,
    }
    return json.dumps(value, indent=2) + "\n"


def _open_compiled(path: Path) -> Artifact:
    if not path.is_file():
        raise ModelError(f"{path}: no such file")
    sidecar = sidecar_of(path)
    raw = _read_sidecar(path, sidecar)
    try:
        if raw.pop("schema_version") != SCHEMA_VERSION:
            raise ModelError("written by another version of petseg: export the model again")
        name, digests = raw["format"], raw["files"]
        if COMPILED.get(name, ("",))[0] != path.suffix:
            raise ModelError(f"its format is {name!r}, which does not belong to a {path.suffix} file")
        spec = ModelSpec.from_json(json.dumps(raw["spec"]))
        objects = {key: raw[key] for key in ("provenance", "receipt", "environment")}
        identity = raw["onnx_identity"]
        if not (isinstance(identity, str) and all(isinstance(value, dict) for value in (*objects.values(), digests))):
            raise ModelError("not a sidecar file written by petseg")
        _check_certified(spec, objects["receipt"])
    except (KeyError, TypeError) as error:
        raise ModelError(f"{sidecar}: not a sidecar file written by petseg ({error!r})") from error
    except ModelError as error:
        raise ModelError(f"{sidecar}: {_short(error)}") from error
    files, signature = _files(path, name), signature_of(path, name)
    for file in files:
        if not file.is_file():
            raise ModelError(f"{file}: missing; it belongs to {path.name}")
        if _sha256(file) != digests.get(file.suffix):
            raise ModelError(
                f"{file}: not the file that {sidecar.name} describes (its SHA-256 differs); export it again"
            )
    size = sum(file.stat().st_size for file in files)
    return Artifact(path, name, spec, identity=identity, size=size, onnx=None, signature=signature, **objects)


def signature_of(path: Path, name: str) -> Signature:
    """The signature of the files of a model, which shows at no cost whether an engine read the files that were checked.

    Args:
        path: The main file.
        name: Its format.
    """
    return tuple(map(_signature, _files(path, name)))


def _signature(file: Path) -> tuple[int, int] | None:
    try:
        found = file.stat()
    except (OSError, ValueError):  # ValueError: no file has such a name
        return None
    return found.st_size, found.st_mtime_ns


def _read_sidecar(path: Path, sidecar: Path) -> dict[str, Any]:
    try:
        raw = json.loads(read_text(sidecar, MAX_SIDECAR))
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: its sidecar file {sidecar.name} is missing; it has the model's specification, so copy both files"
        ) from error
    except OSError as error:
        raise ModelError(f"{sidecar}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{sidecar}: not JSON ({error})") from error
    if not isinstance(raw, dict):
        raise ModelError(f"{sidecar}: not a JSON object")
    return raw


def _files(path: Path, name: str) -> list[Path]:
    return [path, *(path.with_suffix(suffix) for suffix in COMPILED.get(name, ("", ()))[1])]


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"{path}: cannot be read ({error.strerror or error})") from error


def _short(text: object) -> str:
    """Shorten text from a file, which may be megabytes or many lines long, to one line for an error message."""
    return " ".join(str(text)[:500].split())


def _object(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    try:
        value = json.loads(metadata.get(key, "{}"))
    except (ValueError, RecursionError) as error:
        raise ModelError(f"its {key} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise ModelError(f"its {key} is not a JSON object")
    return value


def _check_certified(spec: ModelSpec, receipt: Mapping[str, Any]) -> None:
    """Check a specification against the one that its file was tested with, if the receipt states it.

    Raises:
        ModelError: They differ, or the receipt's is damaged.
    """
    certified = receipt.get("spec")
    if certified is None:
        return
    tested = dataclasses.asdict(ModelSpec.from_json(json.dumps(certified)))
    changed = [
        f"{name} {value!r} instead of {tested[name]!r}"
        for name, value in dataclasses.asdict(spec).items()
        if value != tested[name]
    ]
    if changed:
        raise ModelError(
            f"its specification is not the one that its receipt certifies ({'; '.join(changed)}): export it again"
        )


def _check_contract(path: Path, onnx: onnx_metadata.OnnxFile, spec: ModelSpec) -> None:
    for kind, tensors, name, rank in (("input", onnx.inputs, INPUT, 4), ("output", onnx.outputs, OUTPUT, 3)):
        if [tensor.name for tensor in tensors] != [name]:
            found = _short(", ".join(tensor.name for tensor in tensors) or "none")
            raise ModelError(f"{path}: its {kind}s are {found}; exactly one named {name!r} is expected")
        expected = (spec.batch or "N", *(("H", "W") if spec.dynamic_size else (spec.height, spec.width)), 3)[:rank]
        shape = tensors[0].shape
        # Each dimension is either exactly that number, or dynamic, under any name.
        fits = len(shape) == rank and all(
            got == want if isinstance(want, int) else not isinstance(got, int)
            for got, want in zip(shape, expected, strict=True)
        )
        if tensors[0].dtype != "uint8" or not fits:
            raise ModelError(
                f"{path}: {kind} {name!r} is {tensors[0].dtype} {_short(list(shape))}; "
                f"uint8 [{', '.join(map(str, expected))}] is expected"
            )
