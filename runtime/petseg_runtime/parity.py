"""The parity test: compares a model file, in its engine, with the fp32 checkpoint it was made from, on real photos.

Its results are the receipt. The comparison needs numpy and an engine, not torch: `petseg export` computes the reference
(a :class:`Proof`: photos and the checkpoint's outputs for them) and compares where it can. The proof is saved beside
the file as its parity record, and `petseg verify` repeats the comparison on the device.
"""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg_runtime.artifact import Artifact
from petseg_runtime.engines.base import EngineInfo
from petseg_runtime.engines.registry import load_engine
from petseg_runtime.errors import ModelError, ParityShapes, ParityTolerance, one_line
from petseg_runtime.spec import ModelSpec, lowest_pet
from petseg_runtime.text import counted

__all__ = [
    "MAX_PROOF",
    "SMOKE",
    "TOLERANCES",
    "Checks",
    "Comparison",
    "Proof",
    "Receipt",
    "Tolerance",
    "compare",
    "load_proof",
    "mask_iou",
    "measure",
    "proof_of",
    "require",
    "spread",
    "tolerance_for",
]

U8: TypeAlias = npt.NDArray[np.uint8]
#: uint8 [N, H, W, 3] RGB in, uint8 [N, H, W] probability out.
Run: TypeAlias = Callable[[U8], U8]

SCHEMA_VERSION: Final = 3

#: With fewer photos than this, a receipt is of the kind "smoke": it shows that the file works, not how well.
SMOKE: Final = 16

#: Batch in which a model with a dynamic batch is run as well, if the engine does not gain from batches.
FEW: Final = 3
#: Runs of each batch: a new shape, the capture of a CUDA graph for it, and a replay of that.
REPEATS: Final = 3

#: Largest size in bytes of a proof in memory, and of its text, which takes twenty times as much memory as objects. A
#: file that declares more is rejected unread.
MAX_PROOF: Final = 2**30
MAX_ABOUT: Final = 2**20
#: The members of a proof's archive; no others are allowed.
_MEMBERS: Final = ["about.npy", "expected.npy", "images.npy"]


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far the outputs of a file may differ from its checkpoint's; None: no limit.

    Attributes:
        max_difference: Largest difference of a pixel's probability, in steps of 1/255.
        mean_difference: Mean difference.
        p99_difference: 99th percentile of the differences.
        min_mask_iou: Smallest IoU of the two masks of a photo.
        mean_mask_iou: Mean IoU of the two masks.
        mean_cutout_iou: Mean IoU of the two masks at the cutout threshold.
        task_loss: Loss of IoU on labelled photos, in points (hundredths), if there are labels.
    """

    max_difference: int | None = None
    mean_difference: float | None = None
    p99_difference: int | None = None
    min_mask_iou: float | None = None
    mean_mask_iou: float | None = None
    mean_cutout_iou: float | None = None
    task_loss: float | None = None


#: The smallest IoU says little about a precision: in a photo with a small pet, or none, a few pixels make it low. Its
#: limit is meant to find failures in a single photo.
_HALF: Final = Tolerance(p99_difference=4, min_mask_iou=0.85, mean_mask_iou=0.995, mean_cutout_iou=0.995)

#: Tolerances by the precision actually computed in, from the finest to the coarsest.
TOLERANCES: Final = {
    "f32": Tolerance(max_difference=1, min_mask_iou=0.999),
    "tf32": _HALF,
    "fp16": _HALF,
    "bf16": _HALF,
    # The mean difference is limited because a mask instead of a probability has the same mask IoU, but is useless for
    # cutouts.
    "int8": Tolerance(mean_difference=2, min_mask_iou=0.5, mean_mask_iou=0.97, mean_cutout_iou=0.93, task_loss=0.5),
}


def tolerance_for(stored: str, computed: str) -> Tolerance:
    """The tolerance of the coarser of two precisions: the one stored in the file and the one the engine computes in."""
    order = list(TOLERANCES)
    return TOLERANCES[max("f32" if stored == "fp32" else stored, computed, key=order.index)]


@dataclass(frozen=True, eq=False)
class Proof:
    """The parity record: preprocessed photos, and the outputs of the fp32 checkpoint in PyTorch for them.

    Attributes:
        names: Names of the photos, for the report.
        images: uint8 [N, H, W, 3] RGB.
        expected: The checkpoint's outputs, uint8 [N, H, W], ``round(255 * p(pet))``.
        checkpoint_sha256: Digest of that checkpoint.
        reference: The software and device that computed the outputs.
    """

    names: tuple[str, ...]
    images: U8
    expected: U8
    checkpoint_sha256: str
    reference: str

    @property
    def sha256(self) -> str:
        """Digest over the photos' pixels, in order."""
        return hashlib.sha256(self.images.tobytes()).hexdigest()

    @property
    def identity(self) -> str:
        """Digest over the photos' pixels and the expected outputs."""
        return hashlib.sha256(f"{self.sha256}\n".encode() + self.expected.tobytes()).hexdigest()

    def spread(self, count: int) -> Proof:
        """A subset of at most ``count`` photos, and of no more than :func:`load_proof` accepts; see :func:`spread`."""
        room = (MAX_PROOF - MAX_ABOUT) // (self.images[:1].nbytes + self.expected[:1].nbytes)
        index = spread(len(self.names), min(count, max(1, room)))
        names = tuple(self.names[i] for i in index)
        return replace(self, names=names, images=self.images[index], expected=self.expected[index])

    def to_bytes(self) -> bytes:
        """Serialize as an ``.npz`` file; equal proofs give equal bytes."""
        about = {"schema_version": 1, "checkpoint_sha256": self.checkpoint_sha256, "reference": self.reference}
        about["names"] = list(self.names)
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        out = io.BytesIO()
        np.savez_compressed(out, about=text, images=self.images, expected=self.expected)
        return out.getvalue()


def proof_of(path: Path) -> Path:
    """The path of a model file's parity record: its full name and ``.parity.npz``."""
    return path.with_name(f"{path.name}.parity.npz")


def load_proof(path: Path, spec: ModelSpec, checkpoint_sha256: str) -> Proof:
    """Read a parity record, and check that it belongs to this model.

    Raises:
        ModelError: It is missing, damaged, too large, or of another model.
    """
    try:
        if path.exists() and not path.is_file():  # opening a pipe would block
            raise ModelError(f"{path}: not a regular file")
        with zipfile.ZipFile(path) as archive:
            _check_members(path, archive.infolist())
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            images, expected = np.asarray(arrays["images"]), np.asarray(arrays["expected"])
        proof = Proof(tuple(map(str, about["names"])), images, expected, about["checkpoint_sha256"], about["reference"])
        version = about["schema_version"]
    except ModelError:
        raise
    except FileNotFoundError as error:
        raise ModelError(
            f"{path}: no such file; `petseg export` writes this parity record beside the model: copy it to the device, "
            "too"
        ) from error
    except Exception as error:  # anything that numpy, zipfile and its decompressors raise for a damaged file
        raise ModelError(f"{path}: not a parity record written by petseg, or damaged ({one_line(error)})") from error
    if version != 1:
        raise ModelError(f"{path}: schema_version {version!r}; this version of petseg reads 1: upgrade petseg")
    count, shape = len(proof.names), (spec.height, spec.width)
    sound = images.dtype == expected.dtype == np.uint8 and count > 0
    if not sound or images.shape != (count, *shape, 3) or expected.shape != (count, *shape):
        raise ModelError(
            f"{path}: photos {images.dtype} {list(images.shape)} with outputs {expected.dtype} "
            f"{list(expected.shape)}; uint8 [{count}, {shape[0]}, {shape[1]}, 3] and [{count}, {shape[0]}, "
            f"{shape[1]}] are expected"
        )
    if proof.checkpoint_sha256 != checkpoint_sha256:
        raise ModelError(
            f"{path}: the parity record of another model (checkpoint {str(proof.checkpoint_sha256)[:12]}..., but this "
            f"model was made from {checkpoint_sha256[:12] or 'none'}...)"
        )
    return proof


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    """Check an archive's members: numpy also accepts a name without its suffix, and the last of two equal names.

    Raises:
        ModelError: There are other members, or larger ones than allowed.
    """
    names = sorted(member.filename for member in members)
    if names != _MEMBERS:
        raise ModelError(
            f"{path}: contains {str(names)[:200]}, where {', '.join(_MEMBERS)} are expected; not a parity record "
            "written by petseg"
        )
    sizes = {member.filename: member.file_size for member in members}
    if sum(sizes.values()) > MAX_PROOF or sizes["about.npy"] > MAX_ABOUT:
        raise ModelError(
            f"{path}: declares more than {MAX_PROOF} bytes, or {MAX_ABOUT} of text; not a parity record written by "
            "petseg"
        )


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The results of one engine in the parity test. Differences are in steps of 1/255 of probability, over all pixels.

    Attributes:
        engine: The engine that ran the file, as text for people.
        backend: Its name, as in ``--backend``.
        device: The device that it computed on ("cpu", "cuda:0").
        precision: The precision that it computed in.
        max_difference: Largest difference.
        mean_difference: Mean difference.
        p99_difference: 99th percentile of the differences.
        min_mask_iou: Smallest mask IoU of a photo, at the model's threshold.
        mean_mask_iou: Mean mask IoU.
        mean_cutout_iou: Mean mask IoU at the model's cutout threshold.
        registration: Mean difference away from the image border, with the output as it is (``0,0``) and shifted by one
            pixel (``dy,dx``); the first must be the smallest.
        worst: The location of the largest difference: photo, y, x, expected, got.
        task: IoU on the labels, if there are any: ``photos``, ``reference``, ``this``, ``loss`` in points.
        tolerance: The tolerance that was applied.
        failures: What exceeded it; empty if the test passed.
        batch: The batch in which photos were run as well, within the same tolerance; 1: only one by one. All numbers
            are of the runs one by one.
        notes: How the engine was chosen; see :class:`petseg_runtime.engines.base.EngineInfo`.
    """

    engine: str
    backend: str
    device: str
    precision: str
    max_difference: int
    mean_difference: float
    p99_difference: int
    min_mask_iou: float
    mean_mask_iou: float
    mean_cutout_iou: float
    registration: dict[str, float]
    worst: dict[str, Any]
    task: dict[str, Any] | None
    tolerance: Tolerance
    failures: tuple[str, ...]
    batch: int = 1
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether the test passed."""
        return not self.failures

    @property
    def summary(self) -> str:
        """The results in one line."""
        task = (
            f"; task IoU {self.task['this']:.4f}, {0.0 - round(self.task['loss'], 2):+.2f} points" if self.task else ""
        )
        return (
            f"{'passed' if self.passed else 'FAILED'}, {self.precision} in {self.engine}: difference max "
            f"{self.max_difference}/255, mean {self.mean_difference:.4f}/255, p99 {self.p99_difference}/255; "
            f"mask IoU min {self.min_mask_iou:.5f}, mean {self.mean_mask_iou:.5f}{task}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the results as JSON values."""
        lists = {"failures": list(self.failures), "notes": list(self.notes)}
        return {**asdict(self), **lists, "passed": self.passed, "summary": self.summary}


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """The results of a file's parity test.

    Attributes:
        identity: Identity of the ONNX graph that it certifies; see :attr:`petseg_runtime.artifact.Artifact.identity`.
        proof: :attr:`Proof.identity` of the parity record saved beside the file for `petseg verify`; in the receipt of
            such a verification, of the record that the file was compared with.
        photos: Number of photos that were compared.
        photos_sha256: Digest over their pixels as the model saw them, in order.
        names: Names of these photos.
        reference: The software and device that computed the expected outputs.
        stored: The precision that the file is stored in.
        rows: One per engine and precision that ran the file; empty: built, not run.
        spec: The specification that the file was tested with, as JSON values.
        scan: What the scan of the ONNX graph's activations found (``photos``, ``tensors``, ``non_finite``, ...); None
            if there was no scan.
        quantization: How the int8 quantization was chosen; None for other precisions.
        note: If no engine ran the file, why; otherwise a reason why the IoU on labelled photos may be too high.
    """

    identity: str
    proof: str
    photos: int
    photos_sha256: str
    names: tuple[str, ...]
    reference: str
    stored: str
    rows: tuple[Comparison, ...]
    spec: dict[str, Any]
    scan: dict[str, Any] | None = None
    quantization: dict[str, Any] | None = None
    note: str = ""

    @property
    def kind(self) -> str:
        """The kind of the receipt: ``full``, ``smoke`` (fewer than 16 photos) or ``built, not run``."""
        if not self.rows:
            return "built, not run"
        return "smoke" if self.photos < SMOKE else "full"

    @property
    def failures(self) -> tuple[str, ...]:
        """All failures of all engines and of the scan."""
        found = [f"{row.precision} in {row.engine}: {failure}" for row in self.rows for failure in row.failures]
        if self.scan and self.scan["non_finite"]:
            found.append(f"NaN or infinity in {', '.join(self.scan['non_finite'][:5])}")
        return tuple(found)

    @property
    def passed(self) -> bool | None:
        """Whether the test passed; None if no engine ran the file."""
        if self.failures:
            return False
        return True if self.rows else None

    @property
    def summary(self) -> str:
        """The results in one line."""
        if not self.rows:
            return f"built, not run: {self.note}"
        return f"{self.kind}, {counted(self.photos, 'photo')}: " + "; ".join(row.summary for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return the receipt as JSON values, including the summary."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "passed": self.passed,
            "summary": self.summary,
            **asdict(self),
            "names": list(self.names),
            "rows": [row.as_dict() for row in self.rows],
        }


def spread(photos: int, count: int) -> npt.NDArray[np.int64]:
    """Indices of at most ``count`` photos, int64, ascending; spread evenly, because data sets are ordered."""
    return np.unique(np.linspace(0, photos - 1, min(count, photos)).round().astype(np.int64))


@dataclass(frozen=True, kw_only=True)
class Checks:
    """Additional checks of a comparison, beyond the outputs for a proof's photos.

    Attributes:
        task: Takes the model's outputs, uint8 [N, H, W], and evaluates them on the labels; see
            :attr:`Comparison.task`.
        budget: The allowed loss of IoU, which replaces the tolerance's limit if it has one.
        another_size: A few photos at another size, for a model with a dynamic size. For these, as for a batch, only the
            differences of probabilities are checked against the tolerance: they are too few for IoUs.
    """

    task: Callable[[U8], dict[str, Any]] | None = None
    budget: float | None = None
    another_size: Proof | None = None


_NO_MORE: Final = Checks()


def compare(
    run: Run,
    info: EngineInfo,
    proof: Proof,
    spec: ModelSpec,
    *,
    checks: Checks = _NO_MORE,
    watch: Callable[[int], None] | None = None,
) -> Comparison:
    """Run a model on every photo of a proof, one by one, and measure how far its outputs are from the reference.

    The first photos are then run again as a batch: as large as the engine gains from, or of three photos if the engine
    does not gain from batches and the batch is dynamic. Each photo must have the same output as alone, within the
    tolerance. A batch is run three times, because an engine may compute repeated batches in another way.

    Args:
        run: The model, in the engine that will run it.
        info: The description of that engine.
        proof: Photos and expected outputs.
        spec: The model's specification.
        checks: Additional checks.
        watch: Called with the number of photos done so far.

    Raises:
        ParityShapes: An output's shape or type breaks the contract.
    """
    outputs = np.empty_like(proof.expected)
    for i, (image, expected) in enumerate(zip(proof.images, proof.expected, strict=True)):
        got = run(image[None])
        _check_output(got, expected[None])
        outputs[i] = got[0]
        if watch:
            watch(i + 1)
    tolerance = tolerance_for(spec.precision, info.precision)
    if checks.budget is not None and tolerance.task_loss is not None:
        tolerance = replace(tolerance, task_loss=checks.budget)
    row, failures = _judge(proof, outputs, spec, info, tolerance, checks.task)
    together = info.batch if info.batch > 1 or spec.batch else FEW
    if together > 1:
        index = np.arange(together) % len(proof.names)
        found = _repeated(run, proof.images[index], outputs[index], tolerance)
        failures += [f"{together} at a time: {failure}" for failure in found]
    if (other := checks.another_size) is not None:
        found = _repeated(run, other.images, other.expected, tolerance)
        failures += [f"at another size: {failure}" for failure in found]
    return replace(row, failures=tuple(failures), batch=max(1, together))


def measure(
    artifact: Artifact,
    proof: Proof,
    *,
    backend: str = "auto",
    device: str = "auto",
    threads: int | None = None,
    checks: Checks = _NO_MORE,
    watch: Callable[[int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> tuple[Comparison, ...]:
    """Compare an engine in its default precision, and also with ``exact`` if the default is less than float32.

    ``auto`` may choose a different engine for each of the two.

    Args:
        artifact: The file.
        proof: Photos and expected outputs.
        backend: The engine, or ``auto``.
        device: The device that it runs on, or ``auto``.
        threads: CPU threads; None: as many as this process may use.
        checks: Additional checks.
        watch: Called with the number of photos done so far, from 1 for each row.
        tell: See :class:`petseg_runtime.engines.base.EngineOptions`.

    Returns:
        The results with ``exact``, if any, and those in the default precision.

    Raises:
        EngineError: The engine is not available, or cannot load or run the file.
        ParityShapes: An output's shape or type breaks the contract.
    """

    def row(exact: bool) -> tuple[EngineInfo, Comparison]:
        with load_engine(artifact, backend, threads, device=device, exact=exact, tell=tell) as engine:
            info = engine.describe()
            return info, compare(engine.run, info, proof, artifact.spec, checks=checks, watch=watch)

    info, default = row(exact=False)
    if not info.narrowed:  # a second load would compute the same, and in TensorRT it takes long
        return (default,)
    _, exact = row(exact=True)
    return exact, default


def require(receipt: Receipt) -> None:
    """Raise an error for a failed receipt, which makes an export fail.

    Raises:
        ParityTolerance: The receipt failed; the message says where and by how much.
    """
    if receipt.failures:
        good = [f"{row.precision} in {row.engine}" for row in receipt.rows if not row.failures]
        raise ParityTolerance(
            f"the file's outputs differ too much from its checkpoint's ({counted(receipt.photos, 'photo')}, FAILED): "
            + "; ".join(receipt.failures)
            + (
                f". It passes in {', '.join(good)}: with --backend it is tested in one engine only, which then must "
                "run it"
                if good
                else ""
            )
        )


def _judge(
    proof: Proof,
    outputs: U8,
    spec: ModelSpec,
    info: EngineInfo,
    allowed: Tolerance,
    task: Callable[[U8], dict[str, Any]] | None,
) -> tuple[Comparison, list[str]]:
    """Compare the outputs for a proof's photos with the expected ones; returns the row and its failures."""
    ious = _ious(proof.expected, outputs, spec.threshold)
    found = _differences(proof.expected, outputs)
    row = Comparison(
        engine=f"{info.name} {info.version} ({info.device}, {info.provider})",
        backend=info.name,
        device=info.device,
        precision=info.precision,
        max_difference=found.largest,
        mean_difference=found.mean,
        p99_difference=found.p99,
        min_mask_iou=min(ious),
        mean_mask_iou=float(np.mean(ious)),
        mean_cutout_iou=float(np.mean(_ious(proof.expected, outputs, spec.cutout_threshold))),
        registration=_registration(proof.expected, outputs),
        worst=_worst(proof, outputs),
        task=task(outputs) if task else None,
        tolerance=allowed,
        failures=(),
        notes=info.notes,
    )
    return row, list(_failures(row, proof.names[int(np.argmin(ious))]))


def _repeated(run: Run, images: U8, expected: U8, allowed: Tolerance) -> list[str]:
    """Messages on the first of several runs of a batch whose output differs by more than the tolerance allows.

    TensorRT captures a CUDA graph when a shape is repeated, and replays it from then on. The photos are in another
    order each time, so that the output of the run before, still in a buffer, would be wrong.

    Raises:
        ParityShapes: The outputs differ in shape.
    """
    for turn in range(REPEATS):
        got = run(np.roll(images, turn, axis=0))
        if messages := _too_far(np.roll(expected, turn, axis=0), got, allowed):
            return messages
    return []


def _too_far(expected: U8, got: U8, allowed: Tolerance) -> list[str]:
    """Messages on the probabilities of a few photos that differ by more than the tolerance allows.

    Raises:
        ParityShapes: The outputs differ in shape.
    """
    _check_output(got, expected)
    return list(_exceeded(_differences(expected, got), allowed))


@dataclass(frozen=True)
class _Differences:
    """Differences of probabilities over all pixels; see :class:`Comparison`."""

    largest: int
    mean: float
    p99: int


def _differences(expected: U8, got: U8) -> _Differences:
    """Differences between two arrays, uint8 [N, H, W]."""
    counts = np.zeros(256, np.int64)  # how often each difference occurs
    for one, other in zip(expected, got, strict=True):
        counts += np.bincount(_absolute(one, other).ravel(), minlength=256)
    total = counts.sum()
    return _Differences(
        largest=int(np.flatnonzero(counts)[-1]),
        mean=float((np.arange(256) * counts).sum() / total),
        # The smallest difference that 99 of 100 pixels do not exceed; in integers, as 0.99 has no exact binary form.
        p99=int(np.searchsorted(100 * counts.cumsum(), 99 * total)),
    )


def _absolute(expected: U8, got: U8) -> npt.NDArray[np.int16]:
    """Absolute differences of probabilities, in steps of 1/255."""
    difference: npt.NDArray[np.int16] = np.abs(got.astype(np.int16) - expected)
    return difference


def _exceeded(found: _Differences, allowed: Tolerance, place: str = "") -> Iterator[str]:
    """Messages on the differences that exceed their tolerance; ``place`` is the location of the largest."""
    at, largest_at = (f" ({place})", f" (largest in {place})") if place else ("", "")
    for text, value, limit, where in (
        ("largest difference", found.largest, allowed.max_difference, at),
        ("mean difference", found.mean, allowed.mean_difference, largest_at),
        ("99th percentile of the differences", found.p99, allowed.p99_difference, largest_at),
    ):
        if limit is not None and value > limit:
            yield f"{text} {value:.4g}/255, allowed {limit}/255{where}"


def _failures(row: Comparison, name: str) -> Iterator[str]:
    """Messages on what exceeds its tolerance, with the location; ``name`` is the photo with the smallest IoU."""
    worst, allowed = row.worst, row.tolerance
    place = f"{worst['photo']} at y {worst['y']}, x {worst['x']}: {worst['got']} instead of {worst['expected']}"
    yield from _exceeded(_Differences(row.max_difference, row.mean_difference, row.p99_difference), allowed, place)
    for text, value, limit, where in (
        ("smallest mask IoU", row.min_mask_iou, allowed.min_mask_iou, f" ({name})"),
        ("mean mask IoU", row.mean_mask_iou, allowed.mean_mask_iou, f" (smallest in {name})"),
        ("mean mask IoU at the cutout threshold", row.mean_cutout_iou, allowed.mean_cutout_iou, ""),
    ):
        if limit is not None and not value >= limit:
            yield f"{text} {value:.5f}, allowed {limit}{where}"
    task = row.task
    if task and allowed.task_loss is not None and not task["loss"] <= allowed.task_loss:
        yield f"IoU on {task['photos']} labelled photos falls by {task['loss']:.2f} points, allowed {allowed.task_loss}"
    yield from _misaligned(row.registration)


def _misaligned(registration: dict[str, float]) -> Iterator[str]:
    """A message if the output, shifted by one pixel, agrees with the reference at least as well."""
    (_, as_it_is), *moved = registration.items()
    for where, difference in moved:
        if not difference > as_it_is:
            yield (
                f"not aligned: shifted by (dy, dx) = ({where}), the output agrees no worse than as it is (mean "
                f"difference {difference:.3f}/255 against {as_it_is:.3f}/255); if both are 0, the photos show the "
                "model nothing"
            )
            return


def _registration(expected: U8, got: U8) -> dict[str, float]:
    """Mean difference in the interior with the output as it is, and shifted by one pixel in each direction."""
    inside = expected[:, 1:-1, 1:-1].astype(np.int16)
    height, width = expected.shape[1:]
    return {
        f"{dy},{dx}": float(np.abs(inside - got[:, 1 - dy : height - 1 - dy, 1 - dx : width - 1 - dx]).mean())
        for dy, dx in ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
    }


def _worst(proof: Proof, outputs: U8) -> dict[str, Any]:
    """The location of the largest difference (the first of several); see :class:`Comparison`."""
    largest = [int(_absolute(*pair).max()) for pair in zip(proof.expected, outputs, strict=True)]
    index = int(np.argmax(largest))
    expected, got = proof.expected[index], outputs[index]
    y, x = np.unravel_index(int(_absolute(expected, got).argmax()), got.shape)
    return {
        "photo": proof.names[index],
        "y": int(y),
        "x": int(x),
        "expected": int(expected[y, x]),
        "got": int(got[y, x]),
    }


def _check_output(got: U8, expected: U8) -> None:
    if got.shape != expected.shape or got.dtype != np.uint8:
        raise ParityShapes(
            f"the output is {got.dtype} {list(got.shape)}; {expected.dtype} {list(expected.shape)} is expected"
        )


def _ious(expected: U8, got: U8, threshold: float) -> list[float]:
    """IoU of the two masks of each photo."""
    lowest = lowest_pet(threshold)
    return [mask_iou(a >= lowest, b >= lowest) for a, b in zip(expected, got, strict=True)]


def mask_iou(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """IoU of two masks; 1 where both are empty."""
    union = int((a | b).sum())
    return float((a & b).sum() / union) if union else 1.0
