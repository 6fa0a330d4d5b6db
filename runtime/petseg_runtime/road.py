"""Verify the pre- and postprocessing on a device: reading and resizing photos, and resizing the output back.

The parity test of a network starts from photos that are already decoded and resized. The effect of another JPEG
library, another Pillow or another processor on the steps before and after is tested here: the sample photos take the
same path as in :class:`~petseg_runtime.segmenter.Segmenter`, with a fixed output instead of a network's, and the
results are compared with the record in the package (made by ``python -m benchmarks.embedded.road``). No model is
involved. The code calls the whole path the road.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import PIL
from PIL import Image, features

from petseg_runtime import images
from petseg_runtime.artifact import sample_photos
from petseg_runtime.errors import InputError, ModelError, one_line
from petseg_runtime.parity import mask_iou
from petseg_runtime.segmenter import finish, prepare_opened

__all__ = [
    "LIMITS",
    "RECORD",
    "SIZE",
    "Case",
    "Passage",
    "RoadLimits",
    "RoadProof",
    "RoadReceipt",
    "RoadRow",
    "load_road",
    "record_road",
    "verify_road",
]

U8: TypeAlias = npt.NDArray[np.uint8]
Bool: TypeAlias = npt.NDArray[np.bool_]

SCHEMA_VERSION: Final = 1

#: The recorded results, from the machine on which petseg was made.
RECORD: Final = Path(__file__).parent / "models" / "road.npz"

#: Height and width that photos are resized to here: small enough for a record of tens of kB, and for a JPEG of
#: 600 x 400 to be decoded at half its size.
SIZE: Final = 64

#: Threshold of the masks; fixed, so that it does not depend on a model.
_THRESHOLD: Final = 0.5


@dataclass(frozen=True, kw_only=True)
class RoadLimits:
    """Limits on the differences from the record, for each photo; differences are in levels of 0 to 255.

    Attributes:
        max_difference: Largest difference of a value of the network's input.
        mean_difference: Mean difference of the input's values.
        answer_difference: Largest difference of the probability at the photo's size.
        min_mask_iou: IoU of the two masks at the photo's size.
    """

    max_difference: int
    mean_difference: float
    answer_difference: int
    min_mask_iou: float


#: Pillow 10.1 to 13.0, with libjpeg-turbo 3.0 to 3.2, give bit-identical results. The largest legitimate difference of
#: JPEG decoders (libjpeg-turbo's fast inverse DCT, chroma upsampled without interpolation) is 5 levels and 0.94 in the
#: mean; FFmpeg's decoder differs by 3 and 0.68. Of the errors that we tried, the smallest effect was that of a lost
#: last row (9 levels in one photo, 23 in another); another filter changes each photo by 13 or more. Pillow 9.5 rounds
#: some enlargements differently, by one level: with an output one level off everywhere, the IoU of the masks would be
#: 0.997; shifted by one pixel, it is 0.990 or less.
LIMITS: Final = RoadLimits(max_difference=8, mean_difference=1.25, answer_difference=2, min_mask_iou=0.995)


@dataclass(frozen=True)
class Case:
    """A photo to be processed.

    Attributes:
        name: Its name in the report.
        source: The encoded photo.
        reduced: Whether it may be decoded at a reduced size, as by ``petseg infer --fast-decode``.
    """

    name: str
    source: bytes
    reduced: bool = False


@dataclass(frozen=True, eq=False)
class Passage:
    """The results for a photo.

    Attributes:
        image: The network's input, uint8 [SIZE, SIZE, 3] RGB.
        answer: The probability at the photo's size, sampled evenly from edge to edge, uint8 [SIZE, SIZE].
        mask: The mask at the photo's size, bool [height, width].
    """

    image: U8
    answer: U8
    mask: Bool


@dataclass(frozen=True, eq=False)
class RoadProof:
    """The recorded results.

    Attributes:
        recorded_with: The versions of Pillow and its JPEG library.
        photos: SHA-256 of each sample photo's file, by its name.
        probability: The output used instead of a network's, uint8 [SIZE, SIZE], ``round(255 * p)``.
        passages: The results for each case, by its name.
    """

    recorded_with: str
    photos: dict[str, str]
    probability: U8
    passages: dict[str, Passage]

    def to_bytes(self) -> bytes:
        """Serialize as an ``.npz`` file; equal records give equal bytes, with the same version of zlib."""
        passages = self.passages.values()
        about = {
            "schema_version": SCHEMA_VERSION,
            "recorded_with": self.recorded_with,
            "photos": self.photos,
            "sizes": {name: list(passage.mask.shape) for name, passage in self.passages.items()},
        }
        out = io.BytesIO()
        np.savez_compressed(
            out,
            about=np.frombuffer(json.dumps(about).encode(), np.uint8),
            probability=self.probability,
            images=np.stack([passage.image for passage in passages]),
            answers=np.stack([passage.answer for passage in passages]),
            masks=np.packbits(np.concatenate([passage.mask.ravel() for passage in passages])),
        )
        return out.getvalue()


@dataclass(frozen=True, kw_only=True)
class RoadRow:
    """The differences of one photo's results from the record, in levels of 0 to 255.

    Attributes:
        photo: The photo's name.
        max_difference: Largest difference of a value of the network's input.
        mean_difference: Mean difference of the input's values.
        answer_difference: Largest difference of the probability at the photo's size.
        mask_iou: IoU of the two masks at the photo's size; 0 if the sizes differ.
        failures: What exceeded the limits; empty if the photo passed.
    """

    photo: str
    max_difference: int
    mean_difference: float
    answer_difference: int
    mask_iou: float
    failures: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class RoadReceipt:
    """The results of verifying the pre- and postprocessing on this device.

    Attributes:
        rows: One for each photo.
        limits: The limits that were applied.
        here: The versions of Pillow and its JPEG library on this device.
        recorded_with: The versions that the record was made with.
    """

    rows: tuple[RoadRow, ...]
    limits: RoadLimits
    here: str
    recorded_with: str

    @property
    def failures(self) -> tuple[str, ...]:
        """All failures, each with its photo, and finally the remedy."""
        found = [f"{row.photo}: {failure}" for row in self.rows for failure in row.failures]
        remedy = (
            f"check Pillow and its JPEG library (`python -m PIL` lists them): here {self.here}, recorded with "
            f"{self.recorded_with}; Pillow's official wheels include the library that they were tested with"
        )
        return (*found, remedy) if found else ()

    @property
    def passed(self) -> bool:
        """Whether all photos passed."""
        return not self.failures

    @property
    def summary(self) -> str:
        """The results in one line."""
        rows = self.rows
        return (
            f"{'passed' if self.passed else 'FAILED'}, {len(rows)} photos with {self.here}: read and resized, "
            f"difference max {max(row.max_difference for row in rows)}/255, "
            f"mean {sum(row.mean_difference for row in rows) / len(rows):.4f}/255; output resized back, difference "
            f"max {max(row.answer_difference for row in rows)}/255, "
            f"mask IoU min {min(row.mask_iou for row in rows):.5f}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the results as JSON values, including verdict and summary."""
        return {
            "passed": self.passed,
            "summary": self.summary,
            "here": self.here,
            "recorded_with": self.recorded_with,
            "limits": asdict(self.limits),
            "rows": [{**asdict(row), "failures": list(row.failures)} for row in self.rows],
            "failures": list(self.failures),
        }


def verify_road(proof: RoadProof | None = None) -> RoadReceipt:
    """Process the sample photos, and compare the results with the record.

    Args:
        proof: The record; None: the one in the package.

    Raises:
        ModelError: The record or a sample photo is missing or damaged.
    """
    proof = proof or load_road()
    cases = list(_cases(_samples(proof.photos)))
    if [case.name for case in cases] != list(proof.passages):
        raise ModelError(f"{RECORD}: of another version of petseg, with other photos; install petseg again")
    rows = [_row(case, proof.passages[case.name], proof.probability) for case in cases]
    return RoadReceipt(rows=tuple(rows), limits=LIMITS, here=_versions(), recorded_with=proof.recorded_with)


def record_road(probability: U8) -> RoadProof:
    """Record the results on this machine.

    Args:
        probability: The output to be resized back, uint8 [SIZE, SIZE].
    """
    samples = {path.name: path.read_bytes() for path in sample_photos()}
    return RoadProof(
        _versions(),
        {name: hashlib.sha256(data).hexdigest() for name, data in samples.items()},
        probability,
        {case.name: _process(case, probability) for case in _cases(samples)},
    )


def load_road(path: Path = RECORD) -> RoadProof:
    """Read a record.

    Raises:
        ModelError: It is missing, damaged, or of another version of petseg.
    """
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            images, answers, probability = arrays["images"], arrays["answers"], arrays["probability"]
            bits = np.unpackbits(arrays["masks"]).astype(np.bool_)
        if about["schema_version"] != SCHEMA_VERSION:
            raise ValueError(f"schema_version {about['schema_version']!r} instead of {SCHEMA_VERSION}")
        sizes: dict[str, tuple[int, int]] = about["sizes"]
        ends = list(accumulate(height * width for height, width in sizes.values()))
        parts = np.split(bits[: ends[-1]], ends[:-1])
        masks = (part.reshape(size) for part, size in zip(parts, sizes.values(), strict=True))
        passages = dict(zip(sizes, map(Passage, images, answers, masks), strict=True))
        return RoadProof(about["recorded_with"], about["photos"], probability, passages)
    except Exception as error:  # anything that numpy, zipfile and its decompressors raise for a damaged file
        raise ModelError(f"{path}: missing or damaged ({one_line(error)}): install petseg again") from error


def _samples(photos: Mapping[str, str]) -> dict[str, bytes]:
    """Read the sample photos, by their names, and check their SHA-256 digests.

    Raises:
        ModelError: A photo is missing, or differs.
    """
    samples = {}
    for name, sha256 in photos.items():
        path = RECORD.with_name("samples") / name
        try:
            samples[name] = path.read_bytes()
        except OSError as error:
            raise ModelError(f"{path}: cannot be read ({error.strerror or error}): install petseg again") from error
        if hashlib.sha256(samples[name]).hexdigest() != sha256:
            raise ModelError(f"{path}: not the photo that {RECORD.name} was made with: install petseg again")
    return samples


def _cases(samples: Mapping[str, bytes]) -> Iterator[Case]:
    """The sample photos, and photos with what these lack: an EXIF orientation, a halved size, transparency."""
    yield from (Case(name, data) for name, data in samples.items())
    yield Case("chelsea.jpg on its side by EXIF", _on_its_side(samples["chelsea.jpg"]))
    yield Case("coffee.jpg decoded at half its size", samples["coffee.jpg"], reduced=True)
    yield Case("a PNG with transparency", _transparent())


def _on_its_side(jpeg: bytes) -> bytes:
    """The same JPEG with EXIF orientation 6 (rotate by 90 degrees); built by hand, since the reader is under test."""
    entry = b"\x01\x12\0\x03\0\0\0\x01\0\x06\0\0"  # tag 274, one short: 6
    exif = b"Exif\0\0MM\0*\0\0\0\x08\0\x01" + entry + b"\0\0\0\0"  # a TIFF with one entry, and no more
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif + jpeg[2:]


def _transparent() -> bytes:
    """A PNG of 120 x 80 with alpha from fully opaque to fully transparent."""
    y, x = np.mgrid[:80, :120]
    channels = (2 * x, 3 * y, 255 - x - y, np.clip(4 * x - 2 * y, 0, 255))
    out = io.BytesIO()
    Image.fromarray(np.stack(channels, axis=2).astype(np.uint8)).save(out, "PNG")
    return out.getvalue()


def _process(case: Case, probability: U8) -> Passage:
    """Process a photo.

    Raises:
        InputError: It cannot be read.
    """
    size = (SIZE, SIZE)
    with images.open_photo(case.source, at_least=size if case.reduced else None) as photo:
        prepared = prepare_opened(photo, size)
    result = finish(prepared, probability, _THRESHOLD, _THRESHOLD)
    places = [np.linspace(0, length - 1, SIZE).round().astype(np.int64) for length in result.probability.shape]
    return Passage(prepared.image, result.probability[np.ix_(*places)], result.mask)


def _row(case: Case, expected: Passage, probability: U8) -> RoadRow:
    """Process a photo and compare the results; a photo that cannot be read gets the largest possible differences."""
    try:
        got = _process(case, probability)
    except InputError as error:
        return RoadRow(
            photo=case.name,
            max_difference=255,
            mean_difference=255.0,
            answer_difference=255,
            mask_iou=0.0,
            failures=(f"cannot be read here ({error})",),
        )
    differences = np.abs(got.image.astype(np.int16) - expected.image)
    sizes = expected.mask.shape, got.mask.shape
    row = RoadRow(
        photo=case.name,
        max_difference=int(differences.max()),
        mean_difference=float(differences.mean()),
        answer_difference=int(np.abs(got.answer.astype(np.int16) - expected.answer).max()),
        mask_iou=mask_iou(expected.mask, got.mask) if sizes[0] == sizes[1] else 0.0,
        failures=(),
    )
    return replace(row, failures=tuple(_failures(row, *sizes)))


def _failures(row: RoadRow, expected: tuple[int, ...], got: tuple[int, ...]) -> Iterator[str]:
    """Messages on what exceeds its limit; the sizes are those of the photo, upright."""
    for text, found, limit in (
        ("read and resized: largest difference", row.max_difference, LIMITS.max_difference),
        ("read and resized: mean difference", row.mean_difference, LIMITS.mean_difference),
        ("output resized back: largest difference", row.answer_difference, LIMITS.answer_difference),
    ):
        if found > limit:
            yield f"{text} {found:.4g}/255, allowed {limit}/255"
    if expected != got:
        yield f"is {got[0]} x {got[1]} here, {expected[0]} x {expected[1]} in the record"
    elif row.mask_iou < LIMITS.min_mask_iou:
        yield f"output resized back: mask IoU {row.mask_iou:.5f}, allowed {LIMITS.min_mask_iou}"


def _versions() -> str:
    """The versions of the libraries that read and resize photos."""
    turbo = features.version_feature("libjpeg_turbo")
    jpeg = f"libjpeg-turbo {turbo}" if turbo else f"libjpeg {features.version_codec('jpg') or 'missing'}"
    return f"Pillow {PIL.__version__}, {jpeg}"
