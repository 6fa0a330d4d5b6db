"""The result for one photo: a probability map at its size, and the masks, pictures and outlines made of it."""

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
from petseg_runtime.regions import CERTAIN, leave_out, regions, runs
from petseg_runtime.spec import lowest_pet

__all__ = ["Polygon", "Segmentation", "fitted"]

U8: TypeAlias = npt.NDArray[np.uint8]
Bool: TypeAlias = npt.NDArray[np.bool_]
Points: TypeAlias = npt.NDArray[np.float64]
Indices: TypeAlias = npt.NDArray[np.int64]

#: Half the width of the ramp from transparent to opaque in a cutout, in log-odds, in which it is as soft at a low
#: threshold as at a high one.
_SOFTNESS: Final = 1.0

#: Green, as no pet is.
OVERLAY_COLOR: Final = (0, 200, 83)
OVERLAY_STRENGTH: Final = 0.5

#: From this probability on, of 255, a pixel is likelier pet than not; see :attr:`Segmentation.found`.
LIKELY: Final = 128


@dataclass(frozen=True, eq=False)
class Polygon:
    """One region of the mask as outlines, in the photo's pixels.

    Coordinates are continuous, as in COCO: the pixel in row i and column j covers x from j to j + 1 and y from i to
    i + 1, and its centre is (j + 0.5, i + 0.5). The first point is not repeated at the end.

    Attributes:
        exterior: float64 [n, 2], x and y, 0 to the photo's width and height.
        holes: float64 [m, 2] each, inside the exterior and turning the other way.
    """

    exterior: Points
    holes: tuple[Points, ...] = ()


@dataclass(frozen=True, eq=False)
class Segmentation:
    """One segmented photo.

    Attributes:
        pixels: uint8 [H, W, 3], the photo: RGB, upright; None if it was decoded for the mask only.
        probability: uint8 [H, W], ``round(255 * p(pet))``, 0 in what was left out (as doubtful, or small); read-only,
            since the mask is made of it once.
        threshold: Where the mask is cut, in (0, 1).
        cutout_threshold: Where a cutout is half transparent, in (0, 1); lower, so that the fur stays.
        notes: What had to be decided while reading the photo.
        icc_profile: Of the photo's colours, and so of the pictures with the photo in them, whose
            ``info["icc_profile"]`` it is; None: none. PNG files get it from there, JPEG and WebP when it is given:
            ``picture.save("x.jpg", icc_profile=result.icc_profile)``.
        certain_share: The model's rule of whether there is a pet, in (0, 1]; None: it has none. See :attr:`found`.
    """

    pixels: U8 | None
    probability: U8
    threshold: float
    cutout_threshold: float
    notes: tuple[str, ...] = ()
    icc_profile: bytes | None = None
    certain_share: float | None = None

    def __post_init__(self) -> None:
        """Keep a view of the probability that nobody writes through."""
        probability = self.probability.view()
        probability.flags.writeable = False
        object.__setattr__(self, "probability", probability)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled or copied it is made anew: else its arrays could be written to, and the mask not follow."""
        return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    @cached_property
    def mask(self) -> Bool:
        """bool [H, W], read-only: pet, where ``probability >= 255 * threshold``."""
        mask = self.probability >= self._lowest_pet
        mask.flags.writeable = False  # it is computed once, and shared
        return mask

    @property
    def coverage(self) -> float:
        """The share of the photo that is pet, in [0, 1]."""
        return np.count_nonzero(self.mask) / self.mask.size

    @property
    def found(self) -> bool:
        """Whether there is a pet at all.

        Where nobody has chosen a rule for the model (``certain_share`` is None): whether the mask is not empty.

        The rule, which travels with the model: of the pixels that are likelier pet than not (probability 0.5), at least
        the ``certain_share`` are all but certain (0.98), and the mask is not empty. How large the pet is does not
        matter, and neither does the threshold as long as something reaches it.

        The model that ships has a share of a quarter. It learnt from photos with pets only: what it has never seen
        makes it unsure, not silent. How often that is wrong is in the runtime's README ("No pet here"). Take it as a
        hint, not as a classifier.
        """
        if self.certain_share is None:
            return bool(self.mask.any())
        likely = np.count_nonzero(self.probability >= LIKELY)
        certain = np.count_nonzero(self.probability >= CERTAIN)
        return bool(certain and certain >= self.certain_share * likely and self.mask.any())

    @property
    def box(self) -> tuple[int, int, int, int] | None:
        """The smallest box around the mask: x, y, width, height in pixels. None if nothing is pet."""
        columns, rows = np.flatnonzero(self.mask.any(axis=0)), np.flatnonzero(self.mask.any(axis=1))
        if not len(rows):
            return None
        x, y = int(columns[0]), int(rows[0])
        return x, y, int(columns[-1]) + 1 - x, int(rows[-1]) + 1 - y

    def mask_image(self) -> Image.Image:
        """The mask as a one-channel picture: 255 pet, 0 background."""
        return Image.fromarray(self.mask.view(np.uint8) * np.uint8(255))

    def probability_image(self) -> Image.Image:
        """The probability as a one-channel picture, 0 to 255."""
        return Image.fromarray(self.probability)

    def cutout(self) -> Image.Image:
        """The pet alone, as an RGBA picture with soft edges: half transparent at ``cutout_threshold``.

        What is cut away is black, not only invisible: a file would keep it, and be twice as large.

        Raises:
            UsageError: The photo was decoded for the mask only.
        """
        picture, alpha = self._photo(), self._alpha()
        picture.paste((0, 0, 0), mask=alpha.point([255] + [0] * 255))
        picture.putalpha(alpha)
        return self._in_its_colours(picture)

    def on_background(self, background: images.ImageSource | tuple[int, int, int]) -> Image.Image:
        """The pet before another background, as an RGB picture of the photo's size, with the edges of the cutout.

        Args:
            background: A colour, RGB, in the photo's own values; or a picture, in any form that can be segmented. A
                picture is scaled until it covers the photo, what stands out is cut off on both sides alike, and its
                colours are brought to the photo's profile.

        Raises:
            UsageError: The photo was decoded for the mask only, or that is no colour.
            InputError: The picture cannot be used.
        """
        height, width = self.probability.shape
        if isinstance(background, tuple):
            return self.before(Image.new("RGB", (width, height), _colour(background)))
        read = images.read(background)
        picture = images.with_profile(Image.fromarray(read.pixels), read.icc_profile)
        return self.before(fitted(picture, (width, height), self.icc_profile))

    def before(self, behind: Image.Image) -> Image.Image:
        """As :meth:`on_background`, of a picture that fits already, as :func:`fitted` makes it; it is not changed.

        Raises:
            UsageError: The photo was decoded for the mask only.
        """
        return self._in_its_colours(Image.composite(self._photo(), behind, self._alpha()))

    @property
    def opacity(self) -> U8:
        """uint8 [H, W]: how opaque each pixel of a cutout is: soft around ``cutout_threshold``."""
        return _opacity(self.cutout_threshold)[self.probability]

    @property
    def outline(self) -> Bool:
        """bool [H, W]: the mask's own pixels along its edge, as thick as 1/250 of the photo's shorter side."""
        return _outline(self.mask, max(1, round(min(self.mask.shape) / 250)))

    def overlay(self, color: tuple[int, int, int] = OVERLAY_COLOR, strength: float = OVERLAY_STRENGTH) -> Image.Image:
        """The photo with the mask laid over it and its outline drawn.

        Args:
            color: RGB.
            strength: How much of it, in [0, 1].

        Raises:
            UsageError: The photo was decoded for the mask only, or a value is out of range.
        """
        if not 0 <= strength <= 1:
            raise UsageError(f"strength is {strength}; it must lie between 0 and 1")
        color = _colour(color)
        picture = self._photo()
        tinted = Image.blend(picture, Image.new("RGB", picture.size, color), strength)
        picture.paste(tinted, mask=Image.fromarray(self.mask))
        picture.paste(color, mask=Image.fromarray(self.outline))
        return self._in_its_colours(picture)

    def polygons(self, tolerance: float = 0.5) -> list[Polygon]:
        """The outlines of the mask, between the pixels: where the interpolated probability crosses the threshold.

        A pixel is pet exactly if its centre lies in a polygon and in none of its holes; with a tolerance, centres
        nearer to an outline than that may change sides. A pet that is cut by the photo's edge is closed along it.

        Args:
            tolerance: Points are left out as long as no outline moves by more than this, in pixels (Douglas and
                Peucker 1973); 0 keeps them all. An outline that would shrink to a line keeps all of its points.

        Returns:
            One for each piece of the mask; none if nothing is pet.

        Raises:
            UsageError: The tolerance is negative, or no number.
        """
        if not tolerance >= 0:
            raise UsageError(f"tolerance is {tolerance}; it is in pixels, from 0")
        if (box := self.box) is None:
            return []
        x, y = max(box[0] - 1, 0), max(box[1] - 1, 0)
        near = self.probability[y : box[1] + box[3] + 1, x : box[0] + box[2] + 1]
        # The ring of copies carries outlines beyond the photo's edge, from where they are brought back onto it; the
        # ring of zeros closes them. Zeros alone would draw faint pixels at the edge half a pixel too short.
        level = np.pad(np.pad(near, 1, mode="edge"), 1).astype(np.float64)
        import contourpy  # most results are never asked for their outlines

        fill_type = contourpy.FillType.ChunkCombinedOffsetOffset
        # Between two byte values: no pixel's centre is on an outline.
        filled: Any = contourpy.contour_generator(z=level, fill_type=fill_type).filled(self._lowest_pet - 0.5, 256)
        (points,), (bounds,), (exteriors,) = filled
        points = (points + np.array((x - 1.5, y - 1.5))).clip(0, self.probability.shape[::-1])
        rings = _thinned(points, bounds.astype(np.int64), tolerance)
        return [Polygon(rings[i], tuple(rings[i + 1 : end])) for i, end in itertools.pairwise(exteriors)]

    def rle(self) -> dict[str, Any]:
        """The mask in COCO's compressed run-length encoding, as pycocotools writes it (but as text, which JSON takes).

        Runs of background and pet in turn are counted down the columns, the first one background (it may be 0). From
        the fourth on, the difference to the last run but one is stored; each number goes in groups of 5 bits, the
        lowest first, as characters from "0" on, in which a sixth bit says that more follow (``rleToString`` in
        cocoapi's ``maskApi.c``).

        Returns:
            ``{"size": [H, W], "counts": "..."}``.
        """
        height, width = self.mask.shape
        counts = np.diff(_changes_down(self.mask), prepend=0, append=height * width)
        counts[3:] -= counts[1:-2].copy()
        return {"size": [height, width], "counts": _in_groups_of_5_bits(counts)}

    def coco(self, tolerance: float = 0.5, *, exact: bool = False) -> dict[str, Any]:
        """The fields of a COCO annotation that a mask decides.

        COCO's list of polygons knows no holes. It is used where there are none; the exact mask, as of :meth:`rle`,
        stands in its place where the list would not be true: a pet with a hole, and a photo without a pet.

        Args:
            tolerance: As for :meth:`polygons`.
            exact: The exact mask in any case; outlines, which take most of the time and memory, are not looked for.

        Returns:
            ``segmentation`` (a list of ``[x1, y1, x2, y2, ...]``, to a hundredth of a pixel, or a run-length encoding),
            ``bbox`` (x, y, width, height), ``area`` (in pixels of the mask) and ``iscrowd`` (0).
        """
        polygons = [] if exact else self.polygons(tolerance)
        # To a hundredth of a pixel: what lies behind it is three quarters of the file.
        rings = [polygon.exterior.round(2).ravel().tolist() for polygon in polygons if not polygon.holes]
        return {
            "segmentation": rings if rings and len(rings) == len(polygons) else self.rle(),
            "bbox": list(self.box or (0, 0, 0, 0)),
            "area": int(np.count_nonzero(self.mask)),
            "iscrowd": 0,
        }

    def without_small(self, min_area: float) -> Segmentation:
        """The same photo without its small regions: their probability becomes 0.

        A region is what hangs together, by the sides of its pixels, of all that the mask or a cutout shows at all; so
        a region goes with its soft edge. It is small if fewer of its pixels are in the mask than asked for.

        Args:
            min_area: Share of the photo, in [0, 1).

        Raises:
            UsageError: It is out of range.
        """
        if not 0 <= min_area < 1:
            raise UsageError(f"min_area is {min_area}; it is a share of the photo, from 0 to below 1")
        shown = int(np.argmax(_opacity(self.cutout_threshold) > 0))
        starts, ends = runs(self.probability >= min(shown, self._lowest_pet))
        pet_starts, pet_ends = runs(self.mask)
        region = regions(starts, ends, self.probability.shape[1] + 1)
        # A run of the mask lies within one of what is shown.
        of_pet = region[np.searchsorted(starts, pet_starts, side="right") - 1]
        area = np.bincount(of_pet, weights=pet_ends - pet_starts, minlength=len(starts))
        small = area[region] / self.probability.size < min_area
        if not small.any():
            return self
        return dataclasses.replace(self, probability=leave_out(self.probability, starts[small], ends[small]))

    @property
    def _lowest_pet(self) -> int:
        """The lowest probability, 1 to 255, that is in the mask."""
        return max(1, lowest_pet(self.threshold))

    def _photo(self) -> Image.Image:
        """A copy of the photo to work on."""
        if self.pixels is None:
            raise UsageError("this photo was decoded for its mask only, so no picture can be made of it")
        return Image.fromarray(self.pixels)

    def _in_its_colours(self, picture: Image.Image) -> Image.Image:
        """The same picture, with the photo's profile."""
        if self.icc_profile:
            picture.info["icc_profile"] = self.icc_profile
        return picture

    def _alpha(self) -> Image.Image:
        """:attr:`opacity` as a one-channel picture."""
        return Image.fromarray(self.probability).point(_opacity(self.cutout_threshold).tolist())


def fitted(picture: Image.Image, size: tuple[int, int], profile: bytes | None) -> Image.Image:
    """A picture made to stand behind photos of one kind: scaled until it covers them, cut on both sides alike.

    Args:
        picture: RGB; ``info["icc_profile"]`` is its profile, without it sRGB.
        size: The photos' width and height.
        profile: Theirs; None: sRGB.
    """
    return images.in_profile(ImageOps.fit(picture, size), profile)


def _opacity(cutout_threshold: float) -> U8:
    """uint8 [256]: how opaque a cutout is at each probability."""
    with np.errstate(divide="ignore"):  # certainty is at infinity
        odds = np.log(np.arange(256)) - np.log(255 - np.arange(256))
    threshold = np.log(cutout_threshold) - np.log(1 - cutout_threshold)
    opacity = 0.5 + (odds - threshold) / (2 * _SOFTNESS)
    table: U8 = np.rint(255 * np.clip(opacity, 0, 1)).astype(np.uint8)
    return table


def _outline(mask: Bool, thickness: int) -> Bool:
    """Pixels of the mask nearer than ``thickness`` to one outside it (the picture's edge is not outside)."""
    t = thickness
    padded = np.pad(mask, t, mode="edge")
    inside = padded[: -2 * t, t:-t] & padded[2 * t :, t:-t] & padded[t:-t, : -2 * t] & padded[t:-t, 2 * t :]
    return mask & ~inside


def _thinned(points: Points, bounds: Indices, tolerance: float) -> list[Points]:
    """Each ring without its repeated point, and without those that the tolerance allows to leave out.

    Args:
        points: float64 [n, 2], the rings one after another, each with its first point again at its end.
        bounds: int64 [rings + 1], where each begins, and n.
        tolerance: In pixels; 0: all points stay.
    """
    distinct = np.ones(len(points), np.bool_)
    distinct[1:] = (points[1:] != points[:-1]).any(axis=1)  # some met on the photo's edge
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
    """bool [n]: the points of a line, [n, 2], that stay, the anchors among them; in all its segments at once."""
    keep = np.zeros(len(points), np.bool_)
    keep[anchors] = True
    open_ = np.flatnonzero(~keep)  # points of segments that may still have to be divided
    while True:
        anchors = np.flatnonzero(keep)
        segment = np.cumsum(keep)[open_] - 1
        distance = _distance(points[open_], points[anchors[segment]], points[anchors[segment + 1]])
        farthest = np.zeros(len(anchors))
        np.maximum.at(farthest, segment, distance)
        divided = farthest[segment] > tolerance
        if not divided.any():
            return keep
        candidates = np.flatnonzero(divided & (distance == farthest[segment]))
        _, first = np.unique(segment[candidates], return_index=True)
        keep[open_[candidates[first]]] = True
        divided[candidates[first]] = False
        open_ = open_[divided]


def _distance(points: Points, start: Points, end: Points) -> Points:
    """float64 [n]: how far each point is from its segment, which may have no length. All [n, 2]."""
    along, offset = end - start, points - start
    length = np.einsum("ij,ij->i", along, along)
    share = np.einsum("ij,ij->i", along, offset) / np.where(length, length, 1)
    distance: Points = np.hypot(*(offset - along * share.clip(0, 1)[:, None]).T)
    return distance


def _changes_down(mask: Bool) -> Indices:
    """int64 [n], ascending: where, read down its columns, the mask differs from the pixel before; before it is 0."""
    height, width = mask.shape
    row, column = np.divmod(np.flatnonzero(mask[1:] != mask[:-1]), width)
    # The pixel before the top of a column is the bottom of the column to its left.
    top = np.flatnonzero(mask[0] != np.concatenate(([False], mask[-1, :-1])))
    return np.sort(np.concatenate((column * height + row + 1, top * height)))


def _in_groups_of_5_bits(numbers: Indices) -> str:
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


def _colour(color: Sequence[int]) -> tuple[int, int, int]:
    """As Pillow wants it.

    Raises:
        UsageError: Not three whole numbers from 0 to 255.
    """
    try:
        red, green, blue = map(operator.index, color)
    except (TypeError, ValueError):
        red = green = blue = -1
    if not 0 <= min(red, green, blue) <= max(red, green, blue) <= 255:
        raise UsageError(f"colour {color!r}; red, green and blue are expected, each a whole number from 0 to 255")
    return red, green, blue
