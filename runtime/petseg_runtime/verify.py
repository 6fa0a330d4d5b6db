"""``petseg verify``: the parity test once more, on the device, with what travelled beside the model file."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petseg_runtime import __version__
from petseg_runtime import artifact as artifacts
from petseg_runtime import host as hosts
from petseg_runtime.artifact import Artifact
from petseg_runtime.errors import ModelError, OutputError
from petseg_runtime.files import read_text, write_atomic

if TYPE_CHECKING:
    from petseg_runtime.parity import Receipt

__all__ = ["parts_of", "record", "save", "sidecar_of", "verified", "verify_artifact"]

SCHEMA_VERSION = 2
#: Bytes of a result, which has a line or two for each engine.
MAX_RESULT = 2**20


def sidecar_of(path: Path) -> Path:
    """Where the result for a model file goes: its whole name and ``.verified.json``. Never into the model."""
    return path.with_name(f"{path.name}.verified.json")


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
    from petseg_runtime.parity import Receipt, load_proof, measure, proof_of  # numpy: `petseg info` needs none

    checkpoint = str(artifact.provenance.get("checkpoint_sha256", ""))
    path = proof or proof_of(artifact.path)
    photos = load_proof(path, artifact.spec, checkpoint)
    if proof is None and artifact.receipt.get("proof", photos.identity) != photos.identity:
        raise ModelError(
            f"{path}: not the proof that {artifact.path.name} was exported with (their SHA-256 differ): copy that one, "
            "or name this one with --proof"
        )
    return Receipt(
        identity=artifact.identity,
        proof=photos.identity,
        photos=len(photos.names),
        photos_sha256=photos.sha256,
        names=photos.names,
        reference=photos.reference,
        stored=artifact.spec.precision,
        rows=measure(artifact, photos, backend, threads, device=device),
    )


def parts_of(artifact: Artifact, proof: Path | None) -> list[Path]:
    """Everything that a verification reads: the model, what belongs to it, and the proof."""
    from petseg_runtime.parity import proof_of

    path = artifact.path
    return [path, path.with_suffix(".bin"), artifacts.sidecar_of(path), proof or proof_of(path)]


def record(artifact: Artifact, receipt: Receipt) -> dict[str, Any]:
    """The result, with the file and the device that it was measured on; JSON values."""
    return {
        **receipt.as_dict(),
        **_this(artifact),
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "petseg": __version__,
        "host": {**dataclasses.asdict(hosts.host()), "nvidia_gpus": hosts.nvidia_gpus()},
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
    """What was verified of this very file, on such a processor; empty: nothing, or a ``summary`` that says why not."""
    path = sidecar_of(artifact.path)
    try:
        value = json.loads(read_text(path, MAX_RESULT))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        return {"summary": f"{path.name}: cannot be read ({error})"}
    if not isinstance(value, dict) or any(value.get(key) != known for key, known in _this(artifact).items()):
        return {"summary": f"{path.name}: of another file; run `petseg verify` again"}
    there, here = _processor(value.get("host")), _processor(dataclasses.asdict(hosts.host()))
    if there != here:
        return {"summary": f"{path.name}: on another machine ({there}, this is {here}); run `petseg verify` again"}
    return value


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
