"""``petseg verify``: the parity test once more, on the device, with what travelled beside the model file."""

from __future__ import annotations

import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from petseg_runtime import __version__
from petseg_runtime import artifact as artifacts
from petseg_runtime.artifact import Artifact
from petseg_runtime.errors import OutputError
from petseg_runtime.files import write_atomic

if TYPE_CHECKING:
    from petseg_runtime.parity import Receipt

__all__ = ["parts_of", "save", "sidecar_of", "verified", "verify_artifact"]

SCHEMA_VERSION = 1


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
        proof: The photos and answers; None: ``FILE.parity.npz`` beside it.
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
    photos = load_proof(proof or proof_of(artifact.path), artifact.spec, checkpoint)
    return Receipt(
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


def save(artifact: Artifact, receipt: Receipt, path: Path) -> None:
    """Write the result, with the device it was measured on.

    Raises:
        OutputError: It cannot be written.
    """
    value = {
        **_this(artifact),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "petseg": __version__,
        "host": {"system": platform.platform(), "machine": platform.machine(), "cores": os.cpu_count()},
        **receipt.as_dict(),
        "schema_version": SCHEMA_VERSION,
    }
    try:
        write_atomic(path, (json.dumps(value, indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}): give another place with --output"
        ) from error


def verified(artifact: Artifact) -> dict[str, Any]:
    """What was verified of this very file before; empty if nothing was, and a ``summary`` that says why if unusable."""
    path = sidecar_of(artifact.path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        return {"summary": f"{path.name}: cannot be read ({error})"}
    if not isinstance(value, dict) or any(value.get(key) != known for key, known in _this(artifact).items()):
        return {"summary": f"{path.name}: of another file; run `petseg verify` again"}
    return value


def _this(artifact: Artifact) -> dict[str, Any]:
    """What tells a file from all others; one that is compiled again has the same identity, but other digests."""
    compiled = artifact.format != "onnx"
    files = json.loads(artifacts.sidecar_of(artifact.path).read_text(encoding="utf-8"))["files"] if compiled else {}
    return {"identity": artifact.identity, "format": artifact.format, "files": files}
