"""The result for one photo: its probability map, and the masks, pictures and polygons made from it."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from petseg_runtime import images
from petseg_runtime.errors import UsageError
from petseg_runtime.regions import CERTAIN, connected_components, runs, without_runs
from petseg_runtime.spec import lowest_pet

__all__ = ["Polygon", "Segmentation", "fitted"]

U8: TypeAlias = npt.NDArray[np.uint8]
Bool: TypeAlias = npt.NDArray[np.bool_]
Points: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]

#: Half the width of a cutout's ramp from transparent to opaque, in log-odds, so that edges are equally soft at low and
#: high thresholds.
_SOFTNESS: Final = 1.0

#: Green, a colour that no pet has.
OVERLAY_COLOR: Final = (0, 200, 83)
OVERLAY_STRENGTH: Final = 0.5

#: From this probability (of 255) on, a pixel is more likely pet than background; see :attr:`Segmentation.found`.
LIKELY: Final = 128


@dataclass(frozen=True, eq=False)
class Polygon:
    """The outlines of one region of the mask, in pixel coordinates of the photo.

    Coordinates are continuous, as in COCO: the pixel in row i and column j covers x from j to j + 1 and y from i to
    i + 1, and its centre is (j + 0.5, i + 0.5). The first point is not repeated at the end.

    Attributes:
        exterior: float64 [n, 2], x and y, from 0 to the photo's width and height.
        holes: float64 [m, 2] each, inside the exterior and with the opposite orientation.
    """

    exterior: Points
    holes: tuple[Points, ...] = ()


@dataclass(frozen=True, eq=False)
class Segmentation:
    """The segmentation of one photo.

    Attributes:
        pixels: uint8 [H, W, 3], the photo: RGB, upright; None if it was decoded for the mask only.
        probability: uint8 [H, W], ``round(255 * p(pet))``, 0 in regions that were removed (low-confidence or small).
            Read-only, since :attr:`mask` is computed from it once.
        threshold: Probability from which a pixel is in the mask, in (0, 1).
        cutout_threshold: Probability at which a cutout is half transparent, in (0, 1); lower, to keep the fur.
        notes: Decisions made while decoding the photo; see :class:`petseg_runtime.Photo`.
        icc_profile: The ICC profile of ``pixels``; None: sRGB. The pictures that show the photo have it in
            ``info["icc_profile"]``. Pillow writes it to PNG files by itself, to JPEG and WebP only if it is passed:
            ``picture.save("x.jpg", icc_profile=result.icc_profile)``.
        certain_share: The model's rule for whether there is a pet, in (0, 1]; None: it has none. See :attr:`found`.
    """

    pixels: U8 | None
    probability: U8
    threshold: float
    cutout_threshold: float
    notes: tuple[str, ...] = ()
    icc_profile: bytes | None = None
    certain_share: float | None = None

    def __post_init__(self) -> None:
        """Replaces the probability with a read-only view of it."""
        probability = self.probability.view()
        probability.flags.writeable = False
        object.__setattr__(self, "probability", probability)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickling and copying call the constructor, which keeps the probability read-only and the mask in step."""
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @cached_property
    def mask(self) -> Bool:
        """The pet as bool [H, W]: ``probability >= 255 * threshold``. Read-only."""
        mask = self.probability >= self._lowest_pet
        mask.flags.writeable = False  # computed once, and shared
        return mask

    @property
    def coverage(self) -> float:
        """The share of the photo that is pet, in [0, 1]."""
        return np.count_nonzero(self.mask) / self.mask.size

    @property
    def found(self) -> bool:
        """Whether the photo shows a pet at all.

        For a model without a rule (``certain_share`` is None): whether the mask is not empty.

        The rule, which is stored in the model: of the pixels that are more likely pet than background (p >= 0.5), at
        least ``certain_share`` are near-certain (p >= 0.98), and the mask is not empty. The size of the pet does not
        matter, nor does the threshold as long as some pixel reaches it.

        The built-in model has a ``certain_share`` of a quarter. It was trained on photos with pets only: unfamiliar
        content makes it unsure, not silent. The runtime's README says how often the rule is wrong ("No pet here").
        Treat it as a hint, not as a classifier.
        """
        if self.certain_share is None:
            return bool(self.mask.any())
        likely = np.count_nonzero(self.probability >= LIKELY)
        certain = np.count_nonzero(self.probability >= CERTAIN)
        return bool(certain and certain >= self.certain_share * likely and self.mask.any())

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """The bounding box of the mask: x, y, width, height in pixels. None if the mask is empty."""
        columns, rows = np.flatnonzero(self.mask.any(axis=0)), np.flatnonzero(self.mask.any(axis=1))
        if not len(rows):
            return None
        x, y = int(columns[0]), int(rows[0])
        return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y

    def mask_image(self) -> Image.Image:
        """The mask as a greyscale picture: 255 is pet, 0 is background."""
        return Image.fromarray(self.mask.view(np.uint8) * np.uint8(255))

    def probability_image(self) -> Image.Image:
        """The probability as a greyscale picture, 0 to 255."""
        return Image.fromarray(self.probability)

    def cutout(self) -> Image.Image:
        """The pet alone as an RGBA picture with soft edges, half transparent at ``cutout_threshold``.

        Fully transparent pixels are set to black: a file would otherwise keep the hidden photo and be twice as large.

        Raises:
            UsageError: The photo was decoded for the mask only.
        """
        picture, alpha = self._photo(), self._alpha()
        picture.paste((0, 0, 0), mask=alpha.point([255] + [0] * 255))
        picture.putalpha(alpha)
        return self._with_photo_profile(picture)

    def on_background(self, background: images.ImageSource | tuple[int, int, int]) -> Image.Image:
        """The pet on another background, as an RGB picture of the photo's size, with the edges of the cutout.

        Args:
            background: An RGB colour in the photo's own colour space; or a picture, in any form that can be segmented.
                A picture is scaled until it covers the photo, cropped equally on both sides, and converted to the
                photo's ICC profile.

        Raises:
            UsageError: The photo was decoded for the mask only, or the colour is invalid.
            InputError: The picture cannot be used.
        """
        height, width = self.probability.shape
        if isinstance(background, tuple):
            return self.before(Image.new("RGB", (width, height), _rgb(background)))
        read = images.read(background)
        picture = images.with_profile(Image.fromarray(read.pixels), read.icc_profile)
        return self.before(fitted(picture, (width, height), self.icc_profile))

    def before(self, behind: Image.Image) -> Image.Image:
        """As :meth:`on_background`, for a picture that :func:`fitted` has made; it is not modified.

        Raises:
            UsageError: The photo was decoded for the mask only.
        """
        return self._with_photo_profile(Image.composite(self._photo(), behind, self._alpha()))

    @property
    def opacity(self) -> U8:
        """The alpha channel of a cutout, uint8 [H, W]: a soft ramp around ``cutout_threshold``."""
        return _opacity(self.cutout_threshold)[self.probability]

    @property
    def outline(self) -> Bool:
        """The mask's pixels along its edge, bool [H, W], 1/250 of the photo's shorter side thick, at least 1 pixel."""
        return _outline(self.mask, max(1, round(min(self.mask.shape) / 250)))

    def overlay(self, color: tuple[int, int, int] = OVERLAY_COLOR, strength: float = OVERLAY_STRENGTH) -> Image.Image:
        """The photo with the mask tinted and outlined, as an RGB picture.

        Args:
            color: RGB.
            strength: Opacity of the tint, in [0, 1].

        Raises:
            UsageError: The photo was decoded for the mask only, or a value is out of range.
        """
        if not 0 <= strength <= 1:
            raise UsageError(f"strength is {strength}; it must be between 0 and 1")
        color = _rgb(color)
        picture = self._photo()
        tinted = Image.blend(picture, Image.new("RGB", picture.size, color), strength)
        picture.paste(tinted, mask=Image.fromarray(self.mask))
        picture.paste(color, mask=Image.fromarray(self.outline))
        return self._with_photo_profile(picture)

    def polygons(self, tolerance: float = 0.5) -> list[Polygon]:
        """The outlines of the mask at subpixel precision, where the interpolated probability crosses the threshold.

        With a tolerance of 0, a pixel is pet exactly if its centre lies in a polygon and in none of its holes; with a
        larger one, centres within that distance of an outline may change sides. An outline that reaches the photo's
        edge is closed along it.

        Args:
            tolerance: Outlines are simplified by at most this many pixels (Douglas and Peucker 1973); 0 keeps all
                points. An outline that would collapse to a line keeps all of its points.

        Returns:
            One polygon for each region of the mask; an empty list if the mask is empty.

        Raises:
            UsageError: The tolerance is negative or NaN.
        """
        if not tolerance >= 0:
            raise UsageError(f"tolerance is {tolerance}; it must be a number of pixels, 0 or more")
        if (box := self.box) is None:
            return []
        x, y = max(box[0] - 1, 0), max(box[1] - 1, 0)
        near = self.probability[y : box[1] + box[3] + 1, x : box[0] + box[2] + 1]
        # The ring of copies carries outlines beyond the photo's edge (the clip below brings them back onto it); the
        # ring of zeros closes them. With zeros alone, faint pixels at the edge would be outlined half a pixel short.
        level = np.pad(np.pad(near, 1, mode="edge"), 1).astype(np.float64)
        import contourpy  # most programs need no outlines

        fill_type = contourpy.FillType.ChunkCombinedOffsetOffset
        # Between two byte values: no pixel's centre is on an outline.
        filled: Any = contourpy.contour_generator(z=level, fill_type=fill_type).filled(self._lowest_pet - 0.5, 256)
        (points,), (bounds,), (exteriors,) = filled
        points = (points + np.array((x - 1.5, y - 1.5))).clip(0, self.probability.shape[::-1])
        rings = _simplified(points, bounds.astype(np.int64), tolerance)
        return [Polygon(rings[i], tuple(rings[i + 1 : end])) for i, end in itertools.pairwise(exteriors)]

    def rle(self) -> dict[str, Any]:
        """The mask in COCO's compressed run-length encoding, as pycocotools writes it, but as ``str`` for JSON.

        The lengths of alternating runs of background and pet are counted down the columns, background first (it may be
        0). From the fourth on, the difference to the run before the previous one is stored. Each number is split into
        groups of 5 bits, lowest first; a sixth bit says that more follow, and the characters start at "0"
        (``rleToString`` in cocoapi's ``maskApi.c``).

        Returns:
            ``{"size": [H, W], "counts": "..."}``.
        """
        height, width = self.mask.shape
        counts = np.diff(_column_major_changes(self.mask), prepend=0, append=height * width)
        counts[3:] -= counts[1:-2]
        return {"size": [height, width], "counts": _rle_to_string(counts)}

    def coco(self, tolerance: float = 0.5, *, exact: bool = False) -> dict[str, Any]:
        """The fields of a COCO annotation that follow from the mask.

        COCO's list of polygons cannot express holes. It is used if there are none; a pet with a hole, and a photo
        without a pet, get the exact mask as of :meth:`rle` instead.

        Args:
            tolerance: As for :meth:`polygons`.
            exact: Always use the exact mask. Skips the outlines, which take most of the time and memory.

        Returns:
            ``segmentation`` (a list of ``[x1, y1, x2, y2, ...]``, to a hundredth of a pixel, or a run-length encoding),
            ``bbox`` (x, y, width, height), ``area`` (pixels in the mask) and ``iscrowd`` (0).
        """
        polygons = [] if exact else self.polygons(tolerance)
        # To a hundredth of a pixel: further digits would be three quarters of the file.
        rings = [polygon.exterior.round(2).ravel().tolist() for polygon in polygons if not polygon.holes]
        return {
            "segmentation": rings if rings and len(rings) == len(polygons) else self.rle(),
            "bbox": list(self.box or (0, 0, 0, 0)),
            "area": int(np.count_nonzero(self.mask)),
            "iscrowd": 0,
        }

    def without_small(self, min_area: float) -> Segmentation:
        """A copy without small regions: their probability is set to 0.

        A region is a 4-connected component of all pixels that the mask or a cutout shows, so it is removed together
        with its soft edge. It is small if its pixels in the mask are less than ``min_area`` of the photo.

        Args:
            min_area: Share of the photo, in [0, 1).

        Returns:
            The new segmentation, or this one if it has no small regions.

        Raises:
            UsageError: ``min_area`` is out of range.
        """
        if not 0 <= min_area < 1:
            raise UsageError(f"min_area is {min_area}; it must be a share of the photo, at least 0 and below 1")
        shown = int(np.argmax(_opacity(self.cutout_threshold) > 0))
        starts, ends = runs(self.probability >= min(shown, self._lowest_pet))
        pet_starts, pet_ends = runs(self.mask)
        label = connected_components(starts, ends, self.probability.shape[1] + 1)
        # Each run of the mask lies within a run of the shown pixels.
        pet_label = label[np.searchsorted(starts, pet_starts, side="right") - 1]
        area = np.bincount(pet_label, weights=pet_ends - pet_starts, minlength=len(starts))
        small = area[label] / self.probability.size < min_area
        if not small.any():
            return self
        return dataclasses.replace(self, probability=without_runs(self.probability, starts[small], ends[small]))

    @property
    def _lowest_pet(self) -> int:
        """The lowest probability value, 1 to 255, that is in the mask."""
        return max(1, lowest_pet(self.threshold))

    def _photo(self) -> Image.Image:
        """A copy of the photo as a PIL image.

        Raises:
            UsageError: The photo was decoded for the mask only.
        """
        if self.pixels is None:
            raise UsageError("this photo was decoded for its mask only; segment it again, keeping its pixels")
        return Image.fromarray(self.pixels)

    def _with_photo_profile(self, picture: Image.Image) -> Image.Image:
        """Sets the picture's ICC profile to the photo's, and returns the picture.

        It may have another one, from a background that could not be converted.
        """
        return images.with_profile(picture, self.icc_profile)

    def _alpha(self) -> Image.Image:
        """:attr:`opacity` as a greyscale picture."""
        return Image.fromarray(self.probability).point(_opacity(self.cutout_threshold).tolist())


def fitted(picture: Image.Image, size: tuple[int, int], profile: bytes | None) -> Image.Image:
    """Fit a background to a photo: scale it until it covers the photo, and crop it equally on both sides.

    Args:
        picture: RGB; ``info["icc_profile"]`` is its ICC profile, if missing sRGB.
        size: The photo's width and height.
        profile: The photo's ICC profile, to which the colours are converted; None: sRGB.
    """
    return images.in_profile(ImageOps.fit(picture, size), profile)


def _opacity(cutout_threshold: float) -> U8:
    """The opacity of a cutout at each probability value, uint8 [256]."""
    with np.errstate(divide="ignore"):  # the log-odds of 0 and 255 are infinite
        odds = np.log(np.arange(256)) - np.log(255 - np.arange(256))
    threshold = np.log(cutout_threshold) - np.log(1 - cutout_threshold)
    opacity = 0.5 + (odds - threshold) / (2 * _SOFTNESS)
    table: U8 = np.rint(255 * np.clip(opacity, 0, 1)).astype(np.uint8)
    return table


def _outline(mask: Bool, thickness: int) -> Bool:
    """Pixels of the mask with background ``thickness`` pixels above, below, left or right; the photo's edge is none."""
    t = thickness
    padded = np.pad(mask, t, mode="edge")
    inside = padded[: -2 * t, t:-t] & padded[2 * t :, t:-t] & padded[t:-t, : -2 * t] & padded[t:-t, 2 * t :]
    return mask & ~inside


def _simplified(points: Points, bounds: Indices, tolerance: float) -> list[Points]:
    """Simplify closed rings, and split them.

    Args:
        points: float64 [n, 2], all rings concatenated, each with its first point repeated at its end.
        bounds: int64 [rings + 1], the index of each ring's first point, and n.
        tolerance: In pixels; 0 keeps all points.

    Returns:
        One array for each ring, without the repeated point.
    """
    distinct = np.ones(len(points), np.bool_)
    distinct[1:] = (points[1:] != points[:-1]).any(axis=1)  # clipping to the photo merged some
    distinct[bounds[:-1]] = True
    points, bounds = points[distinct], np.concatenate(([0], np.cumsum(distinct)[bounds[1:] - 1]))
    first, last = bounds[:-1], bounds[1:] - 1
    keep = np.ones(len(points), np.bool_)
    if tolerance:
        keep = _douglas_peucker(points, np.union1d(first, last), tolerance)
        corners = np.add.reduceat(keep.astype(np.int64), first) - 1
        keep |= np.repeat(corners < 3, np.diff(bounds))
    keep[last] = False
    return np.split(points[keep], np.cumsum(keep)[last[:-1]])


def _douglas_peucker(points: Points, anchors: Indices, tolerance: float) -> Bool:
    """The points of a polyline to keep: bool [n], all segments between anchors simplified at once.

    Args:
        points: float64 [n, 2].
        anchors: Indices of points that are kept in any case.
        tolerance: The largest distance from the original, in pixels.
    """
    keep = np.zeros(len(points), np.bool_)
    keep[anchors] = True
    undecided = np.flatnonzero(~keep)  # points of segments that may still have to be split
    while True:
        anchors = np.flatnonzero(keep)
        segment = np.cumsum(keep)[undecided] - 1
        distance = _distance(points[undecided], points[anchors[segment]], points[anchors[segment + 1]])
        farthest = np.zeros(len(anchors))
        np.maximum.at(farthest, segment, distance)
        split = farthest[segment] > tolerance
        if not split.any():
            return keep
        candidates = np.flatnonzero(split & (distance == farthest[segment]))
        _, first = np.unique(segment[candidates], return_index=True)
        keep[undecided[candidates[first]]] = True
        undecided = undecided[split]


def _distance(points: Points, start: Points, end: Points) -> Points:
    """The distance of each point, [n, 2], from its line segment, which may have no length: float64 [n]."""
    along, offset = end - start, points - start
    length = np.einsum("ij,ij->i", along, along)
    share = np.einsum("ij,ij->i", along, offset) / np.where(length, length, 1)
    distance: Points = np.hypot(*(offset - along * share.clip(0, 1)[:, None]).T)
    return distance


def _column_major_changes(mask: Bool) -> Indices:
    """Where the mask, read down its columns, differs from the pixel before (0 at first): int64 [n], ascending."""
    height, width = mask.shape
    row, column = np.divmod(np.flatnonzero(mask[1:] != mask[:-1]), width)
    # The pixel before the top of a column is the bottom of the column to its left.
    top = np.flatnonzero(mask[0] != np.concatenate(([False], mask[-1, :-1])))
    return np.sort(np.concatenate((column * height + row + 1, top * height)))


def _rle_to_string(numbers: Indices) -> str:
    """Signed numbers as text; see :meth:`Segmentation.rle`."""
    characters, used = [], []
    active = np.ones(len(numbers), np.bool_)
    while active.any():
        low, numbers = numbers & 0x1F, numbers >> 5
        more = numbers != -(low >> 4)  # the highest bit of a group is the sign of all above it
        characters.append((low | more << 5) + ord("0"))
        used.append(active)
        active = active & more
    return np.stack(characters, axis=1)[np.stack(used, axis=1)].astype(np.uint8).tobytes().decode("ascii")


def _rgb(color: Sequence[int]) -> tuple[int, int, int]:
    """An RGB colour as a tuple of Python ints, which Pillow requires.

    Raises:
        UsageError: It is not three integers from 0 to 255.
    """
    try:
        red, green, blue = map(operator.index, color)
    except (TypeError, ValueError):
        red = green = blue = -1
    if not 0 <= min(red, green, blue) <= max(red, green, blue) <= 255:
        raise UsageError(f"colour is {color!r}; it must be red, green and blue, each an integer from 0 to 255")
    return red, green, blue
