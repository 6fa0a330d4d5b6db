"""What a segmentation is: a probability map at the photo's size, and what people make of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

__all__ = ["Segmentation"]

U8: TypeAlias = npt.NDArray[np.uint8]

#: Half the width of the ramp from transparent to opaque in a cutout, in log-odds, in which it is as soft at a low
#: threshold as at a high one.
_SOFTNESS: Final = 1.0


@dataclass(frozen=True, eq=False)
class Segmentation:
    """One segmented photo.

    Attributes:
        pixels: uint8 [H, W, 3], the photo: RGB, upright.
        probability: uint8 [H, W], ``round(255 * p(pet))``.
        threshold: Where the mask is cut, in (0, 1).
        cutout_threshold: Where a cutout is half transparent, in (0, 1); lower, so that the fur stays.
        notes: What had to be decided while reading the photo.
    """

    pixels: U8
    probability: U8
    threshold: float
    cutout_threshold: float
    notes: tuple[str, ...] = ()

    @property
    def mask(self) -> npt.NDArray[np.bool_]:
        """bool [H, W]: pet, where ``probability >= 255 * threshold``."""
        return self.probability >= 255 * self.threshold

    @property
    def coverage(self) -> float:
        """The share of the photo that is pet, in [0, 1]."""
        return float(self.mask.mean())

    def mask_image(self) -> Image.Image:
        """The mask as a one-channel picture: 255 pet, 0 background."""
        return Image.fromarray(np.where(self.mask, 255, 0).astype(np.uint8))

    def probability_image(self) -> Image.Image:
        """The probability as a one-channel picture, 0 to 255."""
        return Image.fromarray(self.probability)

    def cutout(self) -> Image.Image:
        """The pet alone, as an RGBA picture with soft edges: half transparent at ``cutout_threshold``."""
        with np.errstate(divide="ignore"):  # certainty is at infinity
            odds = np.log(np.arange(256)) - np.log(255 - np.arange(256))
        threshold = np.log(self.cutout_threshold) - np.log(1 - self.cutout_threshold)
        opacity = 0.5 + (odds - threshold) / (2 * _SOFTNESS)
        table = np.rint(255 * np.clip(opacity, 0, 1)).astype(np.uint8)
        return Image.fromarray(np.dstack((self.pixels, table[self.probability])))

    def overlay(self, color: tuple[int, int, int] = (0, 200, 83), strength: float = 0.5) -> Image.Image:
        """The photo with the mask laid over it and its outline drawn.

        Args:
            color: RGB.
            strength: How much of it, in [0, 1].
        """
        picture = Image.fromarray(self.pixels)
        mask = self.mask
        tinted = Image.blend(picture, Image.new("RGB", picture.size, color), strength)
        picture.paste(tinted, mask=Image.fromarray(mask))
        thickness = max(1, round(min(mask.shape) / 250))
        picture.paste(color, mask=Image.fromarray(_outline(mask, thickness)))
        return picture


def _outline(mask: npt.NDArray[np.bool_], thickness: int) -> npt.NDArray[np.bool_]:
    """Pixels of the mask nearer than ``thickness`` to one outside it (the picture's edge is not outside)."""
    t = thickness
    padded = np.pad(mask, t, mode="edge")
    inside = padded[: -2 * t, t:-t] & padded[2 * t :, t:-t] & padded[t:-t, : -2 * t] & padded[t:-t, 2 * t :]
    return mask & ~inside
