"""The receipt: an exported file against the original fp32 checkpoint in PyTorch, on real photos."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from petseg.evaluate import Run
from petseg_runtime import images
from petseg_runtime.engines.base import EngineInfo
from petseg_runtime.errors import ParityShapes, ParityTolerance
from petseg_runtime.spec import ModelSpec

__all__ = ["SMOKE", "TOLERANCES", "Receipt", "Tolerance", "compare"]

U8: TypeAlias = npt.NDArray[np.uint8]

#: With fewer photos than this, a receipt calls itself "smoke": it shows that the file works, not how well.
SMOKE: Final = 16


@dataclass(frozen=True, kw_only=True)
class Tolerance:
    """How far a file may be from its checkpoint.

    Attributes:
        max_difference: Largest difference of a pixel's probability, in steps of 1/255.
        min_mask_iou: Smallest IoU of the two masks of a photo.
    """

    max_difference: int
    min_mask_iou: float


#: By the precision that was really computed in.
TOLERANCES: Final = {"f32": Tolerance(max_difference=1, min_mask_iou=0.999)}


@dataclass(frozen=True, kw_only=True)
class Receipt:
    """What a comparison measured. Differences are in steps of 1/255 of probability, over all pixels.

    Attributes:
        photos: How many photos were compared.
        photos_sha256: Digest over their pixels as the model saw them, in order.
        kind: ``full``, or ``smoke`` with fewer than 16 photos.
        max_difference: Largest difference.
        mean_difference: Mean difference.
        p99_difference: 99th percentile of the differences.
        min_mask_iou: Smallest mask IoU of a photo, at the model's threshold.
        mean_mask_iou: Mean mask IoU.
        engine: What ran the file.
        precision: What it computed in.
        tolerance: What was allowed.
        passed: The verdict.
    """

    photos: int
    photos_sha256: str
    kind: str
    max_difference: int
    mean_difference: float
    p99_difference: float
    min_mask_iou: float
    mean_mask_iou: float
    engine: str
    precision: str
    tolerance: Tolerance
    passed: bool

    @property
    def summary(self) -> str:
        """One line for people."""
        verdict = "passed" if self.passed else "FAILED"
        return (
            f"{verdict} ({self.kind}, {self.photos} photos, {self.precision} in {self.engine}): difference max "
            f"{self.max_difference}/255, mean {self.mean_difference:.4f}/255, p99 {self.p99_difference:.0f}/255; "
            f"mask IoU min {self.min_mask_iou:.5f}, mean {self.mean_mask_iou:.5f}"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON values, the summary among them."""
        return {"schema_version": 1, **asdict(self), "summary": self.summary}


def compare(reference: Run, candidate: Run, info: EngineInfo, photos: Sequence[Path], spec: ModelSpec) -> Receipt:
    """Run both on every photo, byte for byte the same input, and measure how far they are apart.

    Args:
        reference: The fp32 checkpoint in PyTorch.
        candidate: The exported file, in the engine that will run it.
        info: That engine.
        photos: Real photos, at least one.
        spec: The model's specification.

    Raises:
        InputError: A photo cannot be read.
        ParityShapes: The outputs' shapes or types are not the contract's.
    """
    level = 255 * spec.threshold
    digest = hashlib.sha256()
    differences = np.zeros(256, np.int64)  # how often each difference occurs
    ious = []
    for path in photos:
        image = images.to_model(images.read(path).pixels, spec.height, spec.width)
        digest.update(image.tobytes())
        expected, got = reference(image[None]), candidate(image[None])
        _check_output(got, expected)
        differences += np.bincount(np.abs(got.astype(np.int16) - expected).ravel(), minlength=256)
        ious.append(_iou(got >= level, expected >= level))
    steps = np.arange(256)
    tolerance = TOLERANCES[info.precision]
    largest = int(steps[differences > 0].max())
    return Receipt(
        photos=len(photos),
        photos_sha256=digest.hexdigest(),
        kind="smoke" if len(photos) < SMOKE else "full",
        max_difference=largest,
        mean_difference=float((steps * differences).sum() / differences.sum()),
        p99_difference=float(np.searchsorted(differences.cumsum(), 0.99 * differences.sum())),
        min_mask_iou=min(ious),
        mean_mask_iou=float(np.mean(ious)),
        engine=f"{info.name} {info.version} ({info.device})",
        precision=info.precision,
        tolerance=tolerance,
        passed=largest <= tolerance.max_difference and min(ious) >= tolerance.min_mask_iou,
    )


def require(receipt: Receipt, spec: ModelSpec) -> None:
    """A failed receipt is a failed export.

    Raises:
        ParityTolerance: The receipt failed; the message says by how much.
    """
    if not receipt.passed:
        raise ParityTolerance(
            f"the exported file is not the checkpoint's network: {receipt.summary}; allowed: max "
            f"{receipt.tolerance.max_difference}/255, mask IoU min {receipt.tolerance.min_mask_iou} at threshold "
            f"{spec.threshold}"
        )


def _check_output(got: U8, expected: U8) -> None:
    if got.shape != expected.shape or got.dtype != np.uint8:
        raise ParityShapes(
            f"output is {got.dtype} {list(got.shape)}; the contract is {expected.dtype} {list(expected.shape)}"
        )


def _iou(a: npt.NDArray[np.bool_], b: npt.NDArray[np.bool_]) -> float:
    """IoU of two masks; 1 where both are empty."""
    union = int((a | b).sum())
    return float((a & b).sum() / union) if union else 1.0
