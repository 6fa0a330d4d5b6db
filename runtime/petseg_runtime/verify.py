"""``petseg verify``: repeats the parity test on the device, with the parity record saved beside the model file.

It has two parts: the network, on photos that are already decoded and resized, and the pre- and postprocessing around it
(:mod:`petseg_runtime.road`), which is the same for every model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Set
from dataclasses import dataclass
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
    from petseg_runtime.engines.base import Engine
    from petseg_runtime.parity import Comparison, Proof, Receipt
    from petseg_runtime.road import RoadReceipt

__all__ = [
    "Verification",
    "parts_of",
    "proof_for",
    "record",
    "save",
    "sidecar_of",
    "verified",
    "verify_artifact",
    "verify_engine",
    "verify_file",
    "with_others",
]

SCHEMA_VERSION = 3
_ROAD = "pre- and postprocessing: "
#: Largest file of results, in bytes; it has a few lines for each engine.
MAX_RESULT = 2**20


@dataclass(frozen=True, kw_only=True)
class Verification:
    """The results of a verification on this device.

    Attributes:
        network: The comparison of a model file, in an engine, with its checkpoint.
        road: The comparison of the pre- and postprocessing (reading and resizing photos, resizing the output back) with
            the record in the package.
    """

    network: Receipt
    road: RoadReceipt

    @property
    def failures(self) -> tuple[str, ...]:
        """All failures of both parts."""
        return (*self.network.failures, *(f"{_ROAD}{failure}" for failure in self.road.failures))

    @property
    def passed(self) -> bool:
        """Whether both parts passed."""
        return not self.failures

    @property
    def summary(self) -> str:
        """The results in one line."""
        return f"{self.network.summary}; {_ROAD}{self.road.summary}"


def sidecar_of(path: Path) -> Path:
    """The path of the results for a model file: its full name and ``.verified.json``. Never the model file itself."""
    return path.with_name(f"{path.name}.verified.json")


def verify_file(
    artifact: Artifact,
    backend: str = "auto",
    threads: int | None = None,
    proof: Path | None = None,
    device: str = "auto",
    tell: Callable[[str], None] | None = None,
) -> Verification:
    """Verify a model file and the pre- and postprocessing, as ``petseg verify`` does; see :func:`verify_artifact`.

    Raises:
        ModelError: Also if the record of the pre- and postprocessing or a sample photo is missing or damaged.
    """
    from petseg_runtime.road import verify_road

    network = verify_artifact(artifact, backend, threads, proof, device, tell)
    return Verification(network=network, road=verify_road())


def verify_engine(artifact: Artifact, engine: Engine, proof: Path | None = None) -> Verification:
    """Verify a model in an engine that is already loaded, and the pre- and postprocessing.

    Args:
        artifact: The model that the engine runs.
        engine: The engine, at the size of the artifact's specification.
        proof: See :func:`verify_artifact`.

    Raises:
        ModelError: The parity record is missing, damaged, or of another model.
        EngineError: The engine failed.
        ParityShapes: The outputs' shapes or types break the contract.
    """
    from petseg_runtime.parity import compare
    from petseg_runtime.road import verify_road

    photos = proof_for(artifact, proof)
    row = compare(engine.run, engine.describe(), photos, artifact.spec)
    return Verification(network=_receipt(artifact, photos, (row,)), road=verify_road())


def verify_artifact(
    artifact: Artifact,
    backend: str = "auto",
    threads: int | None = None,
    proof: Path | None = None,
    device: str = "auto",
    tell: Callable[[str], None] | None = None,
) -> Receipt:
    """Compare a model file, in an engine of this device, with the checkpoint's outputs recorded at export.

    Args:
        artifact: The file.
        backend: The engine, or ``auto``.
        threads: CPU threads; None: as many as this process may use.
        proof: The parity record, which may be another one of this checkpoint than the file was exported with; None:
            ``FILE.parity.npz`` beside the file, which must be the one it was exported with.
        device: The device that it runs on, or ``auto``.
        tell: Called with a short text before a slow step (compiling the model for this GPU).

    Returns:
        The receipt; its ``passed`` is the verdict.

    Raises:
        ModelError: The parity record is missing, damaged, or of another model.
        EngineError: The engine is not available, or cannot run the file.
        ParityShapes: The outputs' shapes or types break the contract.
    """
    from petseg_runtime.parity import measure  # imports numpy, which `petseg info` does not need

    photos = proof_for(artifact, proof)
    rows = measure(artifact, photos, backend=backend, device=device, threads=threads, tell=tell)
    return _receipt(artifact, photos, rows)


def proof_for(artifact: Artifact, proof: Path | None = None) -> Proof:
    """Load the parity record that a file is compared with.

    Args:
        artifact: The file.
        proof: See :func:`verify_artifact`.

    Raises:
        ModelError: It is missing, damaged, of another model, or not the one that the file was exported with.
    """
    from petseg_runtime.parity import load_proof, proof_of

    checkpoint = str(artifact.provenance.get("checkpoint_sha256", ""))
    path = proof or proof_of(artifact.path)
    photos = load_proof(path, artifact.spec, checkpoint)
    if proof is None and artifact.receipt.get("proof", photos.identity) != photos.identity:
        raise ModelError(
            f"{path}: not the parity record that {artifact.path.name} was exported with (the SHA-256 digests differ): "
            "copy that one, or name this one with --proof"
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
        spec=json.loads(artifact.spec.to_json()),
    )


def parts_of(artifact: Artifact, proof: Path | None) -> list[Path]:
    """All files that a verification reads: the model, the files that belong to it, and the parity record."""
    from petseg_runtime.parity import proof_of

    path = artifact.path
    return [path, path.with_suffix(".bin"), artifacts.sidecar_of(path), proof or proof_of(path)]


def record(artifact: Artifact, done: Verification) -> dict[str, Any]:
    """The result as JSON values, with the file that was verified and the device.

    ``rows`` and the fields that belong to them are of the network, ``road`` is of the pre- and postprocessing;
    ``passed`` and ``summary`` are of both.
    """
    return {
        **done.network.as_dict(),
        "road": done.road.as_dict(),
        "passed": done.passed,
        "summary": done.summary,
        **_identify(artifact),
        "schema_version": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "petseg": __version__,
        "host": {
            **dataclasses.asdict(hosts.host()),
            "nvidia_gpus": hosts.nvidia_gpus(),
            "gpus": [dataclasses.asdict(gpu) for gpu in hosts.gpus()],
        },
        "device": hosts.identity(),
    }


def with_others(result: dict[str, Any], artifact: Artifact, path: Path) -> dict[str, Any]:
    """Merge a new result with the file's earlier results for other engines and devices, which become its ``others``.

    Earlier results that no longer hold on this device are dropped, and so are those that the new result repeats.

    Args:
        result: As returned by :func:`record`.
        artifact: The model that was verified.
        path: The file that the result will be written to.
    """
    try:
        known = _read(path)
    except (OSError, ValueError, RecursionError):  # no file, or an unreadable one, which the result replaces
        known = None
    new, others = _ran_in(result), []
    for earlier in (known, *_others(known)):
        where = _ran_in(earlier)
        if where and not where & new and not _fault(artifact, earlier):
            others.append({key: value for key, value in earlier.items() if key != "others"})
    return {**result, "others": others}


def save(result: dict[str, Any], path: Path) -> None:
    """Write a result to a file.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        write_atomic(path, (json.dumps(result, indent=2) + "\n").encode())
    except OSError as error:
        raise OutputError(
            f"{path}: cannot be written ({error.strerror or error}): name another file with --output"
        ) from error


def verified(artifact: Artifact) -> dict[str, Any]:
    """The result that is valid for this file, on this device, with the packages installed now; empty if there is none.

    It is the latest result; valid results for other engines and devices are its ``others``, the latest first. If the
    latest is not valid, only a ``summary`` is returned, which says why.

    In a result by another version of petseg, only the network's part is kept, and ``road`` says so.
    """
    path = sidecar_of(artifact.path)
    try:
        value = _read(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        return {"summary": f"{path.name}: cannot be read ({error})"}
    if fault := _fault(artifact, value):
        return {"summary": f"{path.name}: {fault}; run `petseg verify` again"}
    return {
        **_as_of_now(value),
        "others": [_as_of_now(other) for other in _others(value) if not _fault(artifact, other)],
    }


def _as_of_now(result: dict[str, Any]) -> dict[str, Any]:
    """Drop the part on pre- and postprocessing, which is petseg's code, if another version of petseg measured it."""
    was = result.get("petseg")
    if was == __version__:
        return result
    rows = result.get("rows")
    known = rows if isinstance(rows, list) else []
    return {
        **result,
        "road": {"summary": f"verified by petseg {was}, and this is {__version__}: run `petseg verify` again"},
        "passed": bool(known) and all(isinstance(row, dict) and row.get("passed") is True for row in known),
        "summary": str(result.get("summary", "")).partition(f"; {_ROAD}")[0],
    }


def _read(path: Path) -> Any:
    """Read a file of results, which any program may have written."""
    return json.loads(read_text(path, MAX_RESULT))


def _others(result: Any) -> list[Any]:
    others = result.get("others") if isinstance(result, dict) else None
    return others if isinstance(others, list) else []


def _ran_in(result: Any) -> set[tuple[str, str]]:
    """The engine and the device of a result, which has a row for each precision; empty if it does not state them."""
    try:
        return {(str(row["backend"]), str(row["device"])) for row in result["rows"]}
    except (KeyError, TypeError):  # any program may have written them
        return set()


def _fault(artifact: Artifact, result: Any) -> str:
    """Why a result is not valid for a file on this device as it is now; "" if it is."""
    if not isinstance(result, dict):
        return "is of another file"
    if any(result.get(key) != value for key, value in _identify(artifact).items()):
        return "is of another file"
    if (version := result.get("schema_version")) != SCHEMA_VERSION:
        return f"its schema_version is {version!r}, not {SCHEMA_VERSION}"
    return _change(result)


def _change(result: dict[str, Any]) -> str:
    """The first relevant difference between this device and the one that produced a result; "" if there is none."""
    recorded, now = result.get("host"), dataclasses.asdict(hosts.host())
    was: dict[str, Any] = recorded if isinstance(recorded, dict) else {}
    there, here = _processor(was), _processor(now)
    if there != here:
        return f"was made on another machine ({there}, this is {here})"
    device, this = result.get("device"), hosts.identity()
    if device and this and device != this:  # systems without an identity may be the same one
        return "was made on another machine of this kind"
    packages = was.get("packages")
    then = packages if isinstance(packages, dict) else {}
    pairs = [(name, then.get(name), now["packages"].get(name)) for name in hosts.MASK_PACKAGES]
    pairs.append(("NVIDIA's driver", was.get("nvidia_driver"), now["nvidia_driver"]))
    for name, before, installed in pairs:
        if (before or "none") != (installed or "none"):
            return f"was made with {name} {before or 'none'}, and now it is {installed or 'none'}"
    return _other_gpu(was, {device for _, device in _ran_in(result) if device.startswith("cuda:")})


def _other_gpu(was: dict[str, Any], devices: Set[str]) -> str:
    """The first of these GPUs that differs from the one in a result's host record; "" if none does."""
    if not devices:  # querying the driver takes a while
        return ""
    recorded = was.get("gpus")
    then = {_index(gpu): _kind_of(gpu) for gpu in recorded} if isinstance(recorded, list) else {}
    here = {f"cuda:{gpu.index}": _kind_of(dataclasses.asdict(gpu)) for gpu in hosts.gpus()}
    for device in sorted(devices):
        before, now = then.get(device, "unknown"), here.get(device, "none")
        if before != now or before == "unknown":
            return f"was made on another {device} ({before}, this is {now})"
    return ""


def _index(gpu: Any) -> str:
    return f"cuda:{gpu.get('index')}" if isinstance(gpu, dict) else ""


def _kind_of(gpu: Any) -> str:
    """The kind of a GPU in a host record, which any program may have written."""
    try:
        return f"{gpu['name']}, compute capability {gpu['compute_capability']}"
    except (KeyError, TypeError):
        return "unknown"


def _processor(host: Any) -> str:
    """The processor in a host record, which any program may have written."""
    try:
        return f"{host['cpu']['name']}, {host['cpu']['machine']}"
    except (KeyError, TypeError):
        return "unknown"


def _identify(artifact: Artifact) -> dict[str, Any]:
    """What identifies a file; a file that is compiled again has the same identity, but other digests."""
    compiled = artifact.format != "onnx"
    files = json.loads(artifacts.sidecar_of(artifact.path).read_text(encoding="utf-8"))["files"] if compiled else {}
    spec = json.loads(artifact.spec.to_json())
    return {"identity": artifact.identity, "format": artifact.format, "spec": spec, "files": files}
