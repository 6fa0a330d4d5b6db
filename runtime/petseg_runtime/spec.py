"""What a model expects and returns, and where it comes from: the JSON that travels inside the file."""

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

#: Height and width are multiples of this: four 2x2 poolings.
STRIDE: Final = 16

#: What a graph's numbers can be stored in. int8: the operands of most convolutions, the rest is fp32.
PRECISIONS: Final = ("fp32", "fp16", "int8")


#: What is computed in float32 if a scan finds more than this in it: an eighth of the largest float16, because photos
#: that the scan did not see may go higher, and the gates add two results up.
HALF_LIMIT: Final = 65504 / 8


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The contract of an exported model: ``image`` uint8 [N, H, W, 3] RGB in, ``probability`` uint8 [N, H, W] out.

    The output is ``round(255 * p(pet))``; normalisation and sigmoid are inside the graph. What is left to the
    caller is the resize, and it is named here.

    Attributes:
        name: What the model is called.
        height: Input height in pixels, a multiple of 16.
        width: Input width in pixels, a multiple of 16.
        dynamic_size: Whether the graph takes other heights and widths too (multiples of 16); ``height`` and ``width``
            are then the ones it was proven at.
        batch: The one batch size that the graph takes; 0: any.
        precision: What the graph's numbers are stored in: ``fp32``, ``fp16`` or ``int8`` (see :data:`PRECISIONS`). An
            engine may compute in something else, and says so.
        resize: How a photo becomes H x W; ``"stretch"`` ignores its aspect ratio.
        filter: Resampling filter; ``"bilinear"``, with support scaled when shrinking (antialiasing).
        threshold: A pixel is pet where ``probability >= 255 * threshold``; a product that rounding leaves a billionth
            above a whole number counts as that number (:func:`lowest_pet`). Chosen on validation photos for the
            headline metric, which counts the trimap's border (fur, outline) as background. In (0, 1).
        cutout_threshold: The lower threshold at which the border belongs to the pet: the one for cutouts. In (0, 1).
        border_target: What the network was taught to say on the trimap's border; in [0, 1]. What it came to say there
            is not quite that: the Dice loss pushes soft targets below half of the Dice coefficient to 0, others to 1.
        certain_share: There is a pet where at least this share of the pixels that are likelier pet than not are all but
            certain; see :attr:`petseg_runtime.result.Segmentation.found`. Chosen on photos with and without pets, in
            (0, 1]; None: nobody has chosen one for this model, and there is a pet where its mask is not empty. The
            default is that of files of before there was this field, which were all judged by it.
    """

    name: str
    height: int
    width: int
    resize: str = "stretch"
    filter: str = "bilinear"
    threshold: float = 0.5
    cutout_threshold: float = 0.5
    border_target: float = 0.0
    certain_share: float | None = 0.25
    dynamic_size: bool = False
    batch: int = 0
    precision: str = "fp32"

    def __post_init__(self) -> None:
        """Check every field; see Raises.

        Raises:
            ModelError: A field has a value that this version of petseg cannot honour.
        """
        for field, value in (("height", self.height), ("width", self.width)):
            if not isinstance(value, int) or value < STRIDE or value % STRIDE:
                raise ModelError(f"model {field} is {value!r}; it must be a positive multiple of {STRIDE}")
        if type(self.batch) is not int or self.batch < 0:  # True is an int, too
            raise ModelError(f"model batch is {self.batch!r}; it must be a number of photos, or 0 for any")
        if not isinstance(self.dynamic_size, bool):
            raise ModelError(f"model dynamic_size is {self.dynamic_size!r}; it must be true or false")
        if self.precision not in PRECISIONS:
            raise ModelError(
                f"model precision is {self.precision!r}; this version of petseg knows {', '.join(PRECISIONS)}"
            )
        if (self.resize, self.filter) != ("stretch", "bilinear"):
            raise ModelError(
                f"this model wants resize={self.resize!r} with filter={self.filter!r}; this version of petseg "
                "knows 'stretch' with 'bilinear': upgrade petseg, or export the model again"
            )
        for field, number, closed in (
            ("threshold", self.threshold, False),
            ("cutout_threshold", self.cutout_threshold, False),
            ("border_target", self.border_target, True),
        ):
            inside = 0 <= number <= 1 if closed else 0 < number < 1
            if not inside:  # NaN and infinity are not either
                raise ModelError(f"model {field} is {number!r}; it must lie between 0 and 1")
        if self.certain_share is not None and not 0 < self.certain_share <= 1:
            raise ModelError(f"model certain_share is {self.certain_share!r}; it must lie above 0, up to 1, or be null")

    def sized(self, height: int, width: int) -> ModelSpec:
        """The same model at another input size.

        Raises:
            ModelError: The graph has one size only, or the new one is no multiple of 16.
        """
        if not self.dynamic_size and (height, width) != (self.height, self.width):
            raise ModelError(
                f"this model takes {self.height} x {self.width} only, not {height} x {width}: export it with "
                "`--dynamic-size`, or at that `--size`"
            )
        return dataclasses.replace(self, height=height, width=width)

    def to_json(self) -> str:
        """The spec as one line of JSON, with its ``schema_version``."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}, sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ModelSpec:
        """Read a spec back.

        Raises:
            ModelError: The text is not a spec, or one of a newer schema than this version understands.
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
    """The smallest byte of a model's output that counts as pet: pet is ``probability >= 255 * threshold``.

    At a threshold of k / 255 that is k, also where the threshold was computed (as 1 - j / 255) and 255 times it comes
    out a rounding error above k: what is less than a thousand-millionth above a whole number is that number.

    Args:
        threshold: Between 0 and 1, both included.

    Returns:
        0 to 255.

    Raises:
        UsageError: It is outside, or NaN.
    """
    if not 0 <= threshold <= 1:
        raise UsageError(f"threshold is {threshold}; it must lie between 0 and 1")
    return math.ceil(255 * threshold - 1e-9)


def _checked(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Keep known fields, refuse missing ones and wrong types (unknown ones may come from a later minor version)."""
    fields = {field.name: field for field in dataclasses.fields(ModelSpec)}
    kinds: dict[str, type | tuple[type, ...]] = {
        "str": str,
        "int": int,
        "float": (int, float),
        "float | None": (int, float, type(None)),
        "bool": bool,
    }
    values: dict[str, Any] = {}
    for name, field in fields.items():
        if name not in raw:
            if field.default is dataclasses.MISSING:
                raise ModelError(f"the model's specification lacks {name!r}")
            continue
        value = raw[name]
        if not isinstance(value, kinds[str(field.type)]) or isinstance(value, bool) != (field.type == "bool"):
            raise ModelError(f"the model's specification has {name} = {value!r}; a {field.type} is expected")
        values[name] = value
    return values
