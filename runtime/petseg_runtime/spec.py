"""A model's specification, stored as JSON in the model file: its input and output, thresholds, and precision."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from petseg_runtime.errors import ModelError, UsageError

__all__ = ["HALF_LIMIT", "PRECISIONS", "SPEC_KEY", "STRIDE", "ModelSpec", "lowest_pet"]

SPEC_KEY: Final = "petseg.spec"
SCHEMA_VERSION: Final = 1

#: Height and width are multiples of this, because of four 2x2 poolings.
STRIDE: Final = 16

#: The precisions that a graph can be stored in. int8: the operands of most convolutions, with the rest in fp32.
PRECISIONS: Final = ("fp32", "fp16", "int8")


#: Operations are computed in float32 if a scan finds activations larger than this: an eighth of the largest float16,
#: because other photos than those scanned may produce larger ones, and the gates add two results.
HALF_LIMIT: Final = 65504 / 8


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The contract of an exported model: ``image`` uint8 [N, H, W, 3] RGB in, ``probability`` uint8 [N, H, W] out.

    The output is ``round(255 * p(pet))``; normalization and sigmoid are part of the graph. Only the resize is left to
    the caller, and is specified here.

    Attributes:
        name: The model's name.
        height: Input height in pixels, a multiple of 16.
        width: Input width in pixels, a multiple of 16.
        dynamic_size: Whether the graph also accepts other heights and widths (multiples of 16); ``height`` and
            ``width`` are then the size of its parity test.
        batch: The fixed batch size of the graph; 0: dynamic.
        precision: The precision that the graph is stored in: ``fp32``, ``fp16`` or ``int8`` (see :data:`PRECISIONS`).
            An engine may compute in another one, and reports it.
        resize: How a photo is resized to H x W; ``"stretch"`` ignores its aspect ratio.
        filter: Resampling filter; ``"bilinear"``, with support scaled when shrinking (antialiasing).
        threshold: A pixel is pet if ``probability >= 255 * threshold``; a product that a rounding error leaves a
            billionth above a whole number counts as that number (:func:`lowest_pet`). Chosen on validation photos for
            the headline metric, which counts the trimap's border (fur, outline) as background. In (0, 1).
        cutout_threshold: The lower threshold, at which the border belongs to the pet; used for cutouts. In (0, 1).
        border_target: The training target on the trimap's border, in [0, 1]. The trained network's output there
            differs: the Dice loss pushes soft targets below half of the Dice coefficient to 0, and others to 1.
        certain_share: A photo has a pet if at least this share of the pixels that are more likely pet than background
            is near-certain; see :attr:`petseg_runtime.result.Segmentation.found`. Chosen on photos with and without
            pets, in (0, 1]; None: not chosen for this model, and a photo has a pet if its mask is not empty.
    """

    name: str
    height: int
    width: int
    resize: str = "stretch"
    filter: str = "bilinear"
    threshold: float = 0.5
    cutout_threshold: float = 0.5
    border_target: float = 0.0
    certain_share: float | None = None
    dynamic_size: bool = False
    batch: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            ModelError: A field has a value that this version of petseg does not support.
        """
        for field, value in (("height", self.height), ("width", self.width)):
            if not isinstance(value, int) or value < STRIDE or value % STRIDE:
                raise ModelError(f"model {field} is {value!r}; it must be a positive multiple of {STRIDE}")
        if type(self.batch) is not int or self.batch < 0:  # isinstance(True, int) is true
            raise ModelError(f"model batch is {self.batch!r}; it must be a number of photos, or 0 for any")
        if not isinstance(self.dynamic_size, bool):
            raise ModelError(f"model dynamic_size is {self.dynamic_size!r}; it must be true or false")
        if self.precision not in PRECISIONS:
            raise ModelError(
                f"model precision is {self.precision!r}; this version of petseg supports {', '.join(PRECISIONS)}"
            )
        if (self.resize, self.filter) != ("stretch", "bilinear"):
            raise ModelError(
                f"this model needs resize={self.resize!r} with filter={self.filter!r}; this version of petseg "
                "supports 'stretch' with 'bilinear': upgrade petseg, or export the model again"
            )
        for field, number, closed in (
            ("threshold", self.threshold, False),
            ("cutout_threshold", self.cutout_threshold, False),
            ("border_target", self.border_target, True),
        ):
            inside = 0 <= number <= 1 if closed else 0 < number < 1
            if not inside:  # also true of NaN and infinity
                raise ModelError(f"model {field} is {number!r}; it must lie between 0 and 1")
        if self.certain_share is not None and not 0 < self.certain_share <= 1:
            raise ModelError(
                f"model certain_share is {self.certain_share!r}; it must be greater than 0 and at most 1, or null"
            )

    def sized(self, height: int, width: int) -> ModelSpec:
        """Return the specification of the same model at another input size.

        Raises:
            ModelError: The graph has a fixed size, or the new size is not a multiple of 16.
        """
        if not self.dynamic_size and (height, width) != (self.height, self.width):
            raise ModelError(
                f"this model accepts {self.height} x {self.width} only, not {height} x {width}: export it with "
                "`--dynamic-size`, or at that `--size`"
            )
        return dataclasses.replace(self, height=height, width=width)

    def to_json(self) -> str:
        """Return the specification as one line of JSON, with its ``schema_version``."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Read a specification from its JSON.

        Raises:
            ModelError: The text is not a specification, or has a newer schema than this version supports.
        """
        try:
            raw: Any = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ModelError(f"the model's specification is not JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ModelError("the model's specification is not a JSON object")
        version = raw.pop("schema_version", None)
        if version != SCHEMA_VERSION:
            raise ModelError(
                f"the model's specification has schema_version {version!r}; this version of petseg reads "
                f"{SCHEMA_VERSION}: upgrade petseg, or export the model again"
            )
        return cls(**_checked(raw))


def lowest_pet(threshold: float) -> int:
    """The smallest output byte that counts as pet, by the rule ``probability >= 255 * threshold``.

    For a threshold of k / 255 it is k, even if the threshold was computed (as 1 - j / 255) so that 255 times the
    threshold is a rounding error above k: a value less than a billionth above a whole number counts as that number.

    Args:
        threshold: Between 0 and 1, inclusive.

    Returns:
        0 to 255.

    Raises:
        UsageError: The threshold is outside that range, or NaN.
    """
    if not 0 <= threshold <= 1:
        raise UsageError(f"threshold is {threshold}; it must lie between 0 and 1")
    return math.ceil(255 * threshold - 1e-9)


def _checked(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the known fields; missing ones and wrong types are errors, unknown ones (of a later version) are not."""
    kinds: dict[str, type | tuple[type, ...]] = {
        "str": str,
        "int": int,
        "float": (int, float),
        "float | None": (int, float, type(None)),
        "bool": bool,
    }
    values: dict[str, Any] = {}
    for field in dataclasses.fields(ModelSpec):
        if field.name not in raw:
            raise ModelError(f"the model's specification lacks {field.name!r}")
        value = values[field.name] = raw[field.name]
        if not isinstance(value, kinds[str(field.type)]) or isinstance(value, bool) != (field.type == "bool"):
            raise ModelError(f"the model's specification has {field.name} = {value!r}; a {field.type} is expected")
    return values
