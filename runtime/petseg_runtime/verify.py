"""``petseg verify``: the parity test once more, on the device, with what travelled beside the model file.

Two proofs make it whole: of the network, from photos that are decoded and resized already, and of the road around it
(:mod:`petseg_runtime.road`), which is the same for every model.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from petseg_runtime import __version__
from petseg_runtime import artifact as artifacts
from petseg_runtime import host as hosts
from petseg_runtime.artifact import Artifact
from petseg_runtime.errors import ModelError, OutputError
from petseg_runtime.files import read_text, write_atomic

if TYPE_CHECKING:
    from petseg_runtime.engines.base import Engine
    from petseg_runtime.parity import Comparison, Proof, Receipt
    from petseg_runtime.road import RoadReceipt

__all__ = [
    "Verification",
    "parts_of",
    "record",
    "save",
    "sidecar_of",
    "verified",
    "verify_artifact",
    "verify_engine",
    "verify_file",
]

SCHEMA_VERSION = 3
#: What is read, too: results of the network alone.
WITHOUT_ROAD = 2
#: Packages whose other versions may give other answers.
_PROVEN: Final = ("pillow", "onnxruntime", "onnxruntime-gpu", "openvino", "tensorrt", "tensorrt-rtx")
#: Bytes of a result, which has a line or two for each engine.
MAX_RESULT = 2**20


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What was found on this device.

    Attributes:
        network: A model file in an engine, against its checkpoint.
        road: Reading, resizing and bringing back, against the record in the package.
    """

    network: Receipt
    road: RoadReceipt

    @property
    def failures(self) -> tuple[str, ...]:
        """Everything that was not as it should be."""
        return (*self.network.failures, *(f"the road around the network: {failure}" for failure in self.road.failures))

    @property
    def passed(self) -> bool:
        """The verdict."""
        return not self.failures

    @property
    def summary(self) -> str:
        """One line for people."""
        return f"{self.network.summary}; the road around the network: {self.road.summary}"


def sidecar_of(path: Path) -> Path:
    """Where the result for a model file goes: its whole name and ``.verified.json``. Never into the model."""
    return path.with_name(f"{path.name}.verified.json")


def verify_file(
    artifact: Artifact,
    backend: str = "auto",
    threads: int | None = None,
    proof: Path | None = None,
    device: str = "auto",
) -> Verification:
    """Both proofs, as ``petseg verify`` makes them; see :func:`verify_artifact`.

    Raises:
        ModelError: Also, the record of the road or a sample photo is missing or damaged.
    """
    from petseg_runtime.road import verify_road

    return Verification(network=verify_artifact(artifact, backend, threads, proof, device), road=verify_road())


def verify_engine(artifact: Artifact, engine: Engine, proof: Path | None = None) -> Verification:
    """Both proofs, in an engine that is loaded already and computes as it will.

    Args:
        artifact: What the engine runs.
        engine: That engine, at the size of the artifact's specification.
        proof: See :func:`verify_artifact`.

    Raises:
        ModelError: No proof, or one that is damaged or of another model.
        EngineError: The engine failed.
        ParityShapes: The outputs' shapes or types are not the contract's.
    """
    from petseg_runtime.parity import compare
    from petseg_runtime.road import verify_road

    photos = _proof(artifact, proof)
    row = compare(engine.run, engine.describe(), photos, artifact.spec)
    return Verification(network=_receipt(artifact, photos, (row,)), road=verify_road())


def verify_artifact(
    artifact: Artifact,
    backend: str = "auto",
    threads: int | None = None,
    proof: Path | None = None,
    device: str = "auto",
) -> Receipt:
    """Compare a model file, in this device's engine, with what its checkpoint said when it was exported.

    Args:
        artifact: The file.
        backend: The engine, or ``auto``.
        threads: CPU threads; None: as many as this process may use.
        proof: The photos and answers, which may be others of this checkpoint than those that the file was exported
            with; None: ``FILE.parity.npz`` beside it, which may not.
        device: What it runs on, or ``auto``.

    Returns:
        The receipt; ``passed`` is its verdict.

    Raises:
        ModelError: No proof, or one that is damaged or of another model.
        EngineError: The engine cannot be had, or cannot run the file.
        ParityShapes: The outputs' shapes or types are not the contract's.
    """
    from petseg_runtime.parity import measure  # numpy: `petseg info` needs none

    photos = _proof(artifact, proof)
    return _receipt(artifact, photos, measure(artifact, photos, backend, threads, device=device))


def _proof(artifact: Artifact, proof: Path | None) -> Proof:
    """The photos and answers that a file is held against.

    Raises:
        ModelError: None, or damaged, of another model, or not those that the file was exported with.
    """
    from petseg_runtime.parity import load_proof, proof_of

    checkpoint = str(artifact.provenance.get("checkpoint_sha256", ""))
    path = proof or proof_of(artifact.path)
    photos = load_proof(path, artifact.spec, checkpoint)
    if proof is None and artifact.receipt.get("proof", photos.identity) != photos.identity:
        raise ModelError(
            f"{path}: not the proof that {artifact.path.name} was exported with (their SHA-256 differ): copy that one, "
            "or name this one with --proof"
        )
    return photos


def _receipt(artifact: Artifact, photos: Proof, rows: tuple[Comparison, ...]) -> Receipt:
    from petseg_runtime.parity import Receipt

    return Receipt(
        identity=artifact.identity,
        proof=photos.identity,
        photos=len(photos.names),
        photos_sha256=photos.sha256,
        names=photos.names,
        reference=photos.reference,
        stored=artifact.spec.precision,
        rows=rows,
    )


def parts_of(artifact: Artifact, proof: Path | None) -> list[Path]:
    """Everything that a verification reads: the model, what belongs to it, and the proof."""
    from petseg_runtime.parity import proof_of

    path = artifact.path
    return [path, path.with_suffix(".bin"), artifacts.sidecar_of(path), proof or proof_of(path)]


def record(artifact: Artifact, done: Verification) -> dict[str, Any]:
    """The result, with the file and the device that it was measured on; JSON values.

    ``rows`` and what they are of are the network's, ``road`` is the road's; ``passed`` and ``summary`` are of both.
    """
    return {
        **done.network.as_dict(),
        "road": done.road.as_dict(),
        "passed": done.passed,
        "summary": done.summary,
        **_this(artifact),
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "petseg": __version__,
        "host": {**dataclasses.asdict(hosts.host()), "nvidia_gpus": hosts.nvidia_gpus()},
        "device": hosts.identity(),
    }


def save(result: dict[str, Any], path: Path) -> None:
    """Write a result.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        write_atomic(path, (json.dumps(result, indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}): give another place with --output"
        ) from error


def verified(artifact: Artifact) -> dict[str, Any]:
    """What was verified of this very file, on this device, with what is installed now; empty: nothing.

    Where there is a result that does not hold, a ``summary`` says why not.

    A result of an earlier version, of the network alone, is one without ``road``.
    """
    path, again = sidecar_of(artifact.path), "run `petseg verify` again"
    try:
        value = json.loads(read_text(path, MAX_RESULT))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        return {"summary": f"{path.name}: cannot be read ({error})"}
    if not isinstance(value, dict) or any(value.get(key) != known for key, known in _this(artifact).items()):
        return {"summary": f"{path.name}: of another file; {again}"}
    if (version := value.get("schema_version")) not in (WITHOUT_ROAD, SCHEMA_VERSION):
        return {"summary": f"{path.name}: its schema_version is {version!r}, not {SCHEMA_VERSION}; {again}"}
    if change := _change(value):
        return {"summary": f"{path.name}: {change}; {again}"}
    return value


def _change(result: dict[str, Any]) -> str:
    """What is another here than where a result was found; "" if nothing that matters is."""
    told, now = result.get("host"), dataclasses.asdict(hosts.host())
    was: dict[str, Any] = told if isinstance(told, dict) else {}
    there, here = _processor(was), _processor(now)
    if there != here:
        return f"on another machine ({there}, this is {here})"
    device, this = result.get("device"), hosts.identity()
    if device and this and device != this:  # systems that say nothing may be the same one
        return "on another machine of this kind"
    packages = was.get("packages")
    then = packages if isinstance(packages, dict) else now["packages"]  # a result of before does not tell
    pairs = [(name, then.get(name), now["packages"].get(name)) for name in _PROVEN]
    pairs.append(("NVIDIA's driver", was.get("nvidia_driver"), now["nvidia_driver"]))
    for name, before, installed in pairs:
        if (before or "none") != (installed or "none"):
            return f"with {name} {before or 'none'}, and now it is {installed or 'none'}"
    return ""


def _processor(host: Any) -> str:
    """Of a machine's x-ray; any program may have written it."""
    try:
        return f"{host['cpu']['name']}, {host['cpu']['machine']}"
    except (KeyError, TypeError):
        return "unknown"


def _this(artifact: Artifact) -> dict[str, Any]:
    """What tells a file from all others; one that is compiled again has the same identity, but other digests."""
    compiled = artifact.format != "onnx"
    files = json.loads(artifacts.sidecar_of(artifact.path).read_text(encoding="utf-8"))["files"] if compiled else {}
    spec = json.loads(artifact.spec.to_json())
    return {"identity": artifact.identity, "format": artifact.format, "spec": spec, "files": files}
