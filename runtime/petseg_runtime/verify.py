"""``petseg verify``: the parity test once more, on the device, with what travelled beside the model file.

Two proofs make it whole: of the network, from photos that are decoded and resized already, and of the road around it
(:mod:`petseg_runtime.road`), which is the same for every model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Set
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
from petseg_runtime.spec import ModelSpec

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
#: What is read, too: results of the network alone.
WITHOUT_ROAD = 2
_AND_THE_ROAD = "; the road around the network: "
#: Bytes of a file of results, which has a line or two for each engine.
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
        return f"{self.network.summary}{_AND_THE_ROAD}{self.road.summary}"


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

    photos = proof_for(artifact, proof)
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

    photos = proof_for(artifact, proof)
    return _receipt(artifact, photos, measure(artifact, photos, backend=backend, device=device, threads=threads))


def proof_for(artifact: Artifact, proof: Path | None = None) -> Proof:
    """The photos and answers that a file is held against.

    Args:
        artifact: The file.
        proof: See :func:`verify_artifact`.

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
        spec=json.loads(artifact.spec.to_json()),
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
        "host": {
            **dataclasses.asdict(hosts.host()),
            "nvidia_gpus": hosts.nvidia_gpus(),
            "gpus": [dataclasses.asdict(gpu) for gpu in hosts.gpus()],
        },
        "device": hosts.identity(),
    }


def with_others(result: dict[str, Any], artifact: Artifact, path: Path) -> dict[str, Any]:
    """A new result as it is to be written, with what is there already of other engines and devices, as ``others``.

    What does not hold here is forgotten, and so is what the new result is a repetition of.

    Args:
        result: As of :func:`record`.
        artifact: What was verified.
        path: Where it is to be written.
    """
    try:
        known = _read(path)
    except (OSError, ValueError, RecursionError):  # none, or nothing that could be told of, which a result replaces
        known = None
    new, others = _ran_in(result), []
    for earlier in (known, *_others(known)):
        where = _ran_in(earlier)
        if where and not where & new and not _fault(artifact, earlier):
            others.append({key: value for key, value in earlier.items() if key != "others"})
    return {**result, "others": others}


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

    The latest result; those of other engines and devices that hold, too, are its ``others``, the latest first. Where
    the latest does not hold, a ``summary`` says why not.

    A result of an earlier version, of the network alone, is one without ``road``. Of one that another version of petseg
    found of both, only the network's is left, and ``road`` says so.
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
    """A result without what was found of the road, if petseg was another then: the road is petseg's own code."""
    was = result.get("petseg")
    if "road" not in result or was == __version__:
        return result
    rows = result.get("rows")
    return {
        **result,
        "road": {"summary": f"found by petseg {was}, and this is {__version__}: run `petseg verify` again"},
        "passed": isinstance(rows, list) and all(isinstance(row, dict) and row.get("passed") is True for row in rows),
        "summary": str(result.get("summary", "")).partition(_AND_THE_ROAD)[0],
    }


def _read(path: Path) -> Any:
    """What is in a file of results, which any program may have written."""
    return json.loads(read_text(path, MAX_RESULT))


def _others(result: Any) -> list[Any]:
    others = result.get("others") if isinstance(result, dict) else None
    return others if isinstance(others, list) else []


def _ran_in(result: Any) -> set[tuple[str, str]]:
    """The engine and the device of a result, in which it has a row for each precision; empty if it does not say."""
    try:
        return {(str(row["backend"]), str(row["device"])) for row in result["rows"]}
    except (KeyError, TypeError):  # of an earlier version; or edited by somebody
        return set()


def _fault(artifact: Artifact, result: Any) -> str:
    """Why a result says nothing of a file on this device as it is now; "" if it does."""
    if not isinstance(result, dict) or _of(result) != _this(artifact):
        return "of another file"
    if (version := result.get("schema_version")) not in (WITHOUT_ROAD, SCHEMA_VERSION):
        return f"its schema_version is {version!r}, not {SCHEMA_VERSION}"
    return _change(result)


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
    pairs = [(name, then.get(name), now["packages"].get(name)) for name in hosts.MASK_PACKAGES]
    pairs.append(("NVIDIA's driver", was.get("nvidia_driver"), now["nvidia_driver"]))
    for name, before, installed in pairs:
        if (before or "none") != (installed or "none"):
            return f"with {name} {before or 'none'}, and now it is {installed or 'none'}"
    return _other_gpu(was, {device for _, device in _ran_in(result) if device.startswith("cuda:")})


def _other_gpu(was: dict[str, Any], devices: Set[str]) -> str:
    """Which of these GPUs is another one here than in the x-ray of a result; "" if none is."""
    if not devices:  # asking the driver takes a while
        return ""
    told = was.get("gpus")  # an earlier version told how many there are, and no more
    then = {_index(gpu): _kind_of(gpu) for gpu in told} if isinstance(told, list) else {}
    here = {f"cuda:{gpu.index}": _kind_of(dataclasses.asdict(gpu)) for gpu in hosts.gpus()}
    for device in sorted(devices):
        before, now = then.get(device, "unknown"), here.get(device, "none")
        if before != now or before == "unknown":
            return f"on another {device} ({before}, this is {now})"
    return ""


def _index(gpu: Any) -> str:
    return f"cuda:{gpu.get('index')}" if isinstance(gpu, dict) else ""


def _kind_of(gpu: Any) -> str:
    """What a GPU is, of one in an x-ray; any program may have written it."""
    try:
        return f"{gpu['name']}, compute capability {gpu['compute_capability']}"
    except (KeyError, TypeError):
        return "unknown"


def _processor(host: Any) -> str:
    """Of a machine's x-ray; any program may have written it."""
    try:
        return f"{host['cpu']['name']}, {host['cpu']['machine']}"
    except (KeyError, TypeError):
        return "unknown"


def _of(result: dict[str, Any]) -> dict[str, Any]:
    """What a result says that it is of, as :func:`_this` does; of a specification of before, with today's defaults."""
    told = {key: result.get(key) for key in ("identity", "format", "spec", "files")}
    try:
        return {**told, "spec": json.loads(ModelSpec.from_json(json.dumps(told["spec"])).to_json())}
    except ModelError:
        return told


def _this(artifact: Artifact) -> dict[str, Any]:
    """What tells a file from all others; one that is compiled again has the same identity, but other digests."""
    compiled = artifact.format != "onnx"
    files = json.loads(artifacts.sidecar_of(artifact.path).read_text(encoding="utf-8"))["files"] if compiled else {}
    spec = json.loads(artifact.spec.to_json())
    return {"identity": artifact.identity, "format": artifact.format, "spec": spec, "files": files}
