"""What may be asked of an export: one frozen config per format, so that a knob which does not apply cannot be passed.

Light on purpose: a request is put together and checked before torch is imported.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from petseg_runtime.errors import DataError, ModelError
from petseg_runtime.spec import PRECISIONS, STRIDE

__all__ = [
    "ExportConfig",
    "OnnxConfig",
    "OpenVINOConfig",
    "QuantizeConfig",
    "TensorRTConfig",
    "TensorRTRTXConfig",
]


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How int8 is chosen.

    Attributes:
        data: Labelled data folder to calibrate and judge on; None: the one of the parity test.
        budget: Largest loss of IoU on the labelled validation photos, in points (hundredths).
        methods: Ways to choose the ranges of activations, of ``minmax``, ``percentile`` and ``entropy``; the one that
            loses least IoU is kept.
        photos: Training photos to calibrate on.
        judges: At least this many labelled photos of the validation part judge it.
        seed: Of the choice of the calibration photos.
    """

    data: Path | None = None
    budget: float = 0.5
    methods: tuple[str, ...] = ("minmax", "percentile", "entropy")
    photos: int = 64
    judges: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            DataError: One of them makes no sense.
        """
        if not (math.isfinite(self.budget) and self.budget >= 0):
            raise DataError(f"the budget of int8 is {self.budget}; a number of IoU points, 0 or more, is expected")
        known = ("minmax", "percentile", "entropy")
        if not self.methods or (odd := set(self.methods) - set(known)):
            raise DataError(f"calibration methods {sorted(odd) if self.methods else 'none'}; there are {known}")
        if self.photos < 1 or self.judges < 1:
            raise DataError(f"int8 on {self.photos} calibration photos, judged on {self.judges}: 1 or more of each")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What every format takes.

    Attributes:
        output: The file to write; None: the checkpoint's name with the format's suffix, beside it.
        name: What the model is called in its specification.
        precision: ``fp32``, ``fp16`` or ``int8``.
        height: Input height, a multiple of 16; None: the checkpoint's training size.
        width: Input width; likewise.
        dynamic_size: Whether the graph takes any height and width that are multiples of 16.
        batch: The one batch size that the graph takes; 0: any.
        data: Folder with photos for the parity test, and for int8; None: the samples that ship with petseg.
        split: The part of labelled data that the parity test uses, ``val`` or ``test``.
        photos: At most so many photos in the parity test.
        seed: Of the choice of those photos.
        backends: Engines of the parity test; ``auto`` is the one that would run the file here.
        quantize: How int8 is chosen.
        notes: Kept in the file's provenance as they are (measured metrics, for example). JSON values.
    """

    output: Path | None = None
    name: str = "petseg attention U-Net"
    precision: str = "fp32"
    height: int | None = None
    width: int | None = None
    dynamic_size: bool = False
    batch: int = 0
    data: Path | None = None
    split: str = "val"
    photos: int = 200
    seed: int = 0
    backends: tuple[str, ...] = ("auto",)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    notes: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a checkpoint.

        Raises:
            ModelError: No such precision, or a size or batch that the network does not take.
            DataError: int8 without data, or no photos.
        """
        if self.precision not in PRECISIONS:
            raise ModelError(f"precision is {self.precision!r}; there are {', '.join(PRECISIONS)}")
        for name, value in (("height", self.height), ("width", self.width)):
            if value is not None and (value < STRIDE or value % STRIDE):
                raise ModelError(f"model {name} is {value}; it must be a positive multiple of {STRIDE}")
        if self.batch < 0:
            raise ModelError(f"batch is {self.batch}; a number of photos is expected, or 0 for any")
        if self.photos < 1 or not self.backends:
            raise DataError("a parity test needs at least one photo and one engine")
        if self.split not in ("val", "test"):
            raise DataError(f"split is {self.split!r}; val or test is expected")


@dataclass(frozen=True, kw_only=True)
class OnnxConfig(ExportConfig):
    """An ONNX file."""


@dataclass(frozen=True, kw_only=True)
class CompiledConfig(ExportConfig):
    """What every format takes that is compiled from ONNX.

    Attributes:
        onnx: An ONNX file that was exported from the same checkpoint, to be compiled as it is; its precision, size and
            batch are then those of the result. None: one is made on the way.
    """

    onnx: Path | None = None


@dataclass(frozen=True, kw_only=True)
class OpenVINOConfig(CompiledConfig):
    """An OpenVINO IR: ``.xml`` and ``.bin``."""


@dataclass(frozen=True, kw_only=True)
class TensorRTConfig(CompiledConfig):
    """A TensorRT engine, for the GPU and the library it is built with.

    Attributes:
        max_batch: Largest batch of a graph that takes any.
        max_size: Largest height and width of a graph that takes any; None: twice the specification's.
        timing_cache: File in which TensorRT keeps what it measured, to build faster the next time; None: one in the
            user's cache folder. TensorRT for RTX measures nothing, and has none.
    """

    max_batch: int = 8
    max_size: tuple[int, int] | None = None
    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        """See :class:`ExportConfig`."""
        super().__post_init__()
        if self.max_batch < 1:
            raise ModelError(f"max_batch is {self.max_batch}; it must be 1 or more")
        if self.max_size and any(value < STRIDE or value % STRIDE for value in self.max_size):
            raise ModelError(f"max_size is {self.max_size}; both must be positive multiples of {STRIDE}")


@dataclass(frozen=True, kw_only=True)
class TensorRTRTXConfig(TensorRTConfig):
    """A TensorRT for RTX engine; it is finished on the device, and needs no GPU to be built.

    Attributes:
        compute_capabilities: GPUs to build for, such as ``8.9``; empty: what the library calls
            portable, Ampere and later.
    """

    compute_capabilities: tuple[str, ...] = ()
