"""What may be asked of an export: one frozen config per format, so that a knob which does not apply cannot be passed.

Light on purpose: a request is put together and checked before torch is imported. Every value that cannot be is a
:class:`petseg_runtime.errors.UsageError`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from petseg_runtime.errors import UsageError
from petseg_runtime.spec import PRECISIONS, STRIDE

__all__ = [
    "ExportConfig",
    "OnnxConfig",
    "OpenVINOConfig",
    "QuantizeConfig",
    "TensorRTConfig",
    "TensorRTRTXConfig",
]

_METHODS: Final = ("minmax", "percentile", "entropy")
#: Keys of the provenance that the export writes (:func:`petseg_export.onnx.provenance_of`); notes cannot replace them.
RESERVED: Final = frozenset(
    {"schema_version", "checkpoint", "checkpoint_sha256", "model", "data", "validation", "training", "versions"}
)
_CAPABILITY: Final = re.compile(r"\d+\.\d", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """How int8 is chosen.

    Attributes:
        data: Labelled data folder to calibrate and judge on; None: the one of the parity test.
        budget: Largest loss of IoU on the labelled validation photos, in points (hundredths).
        methods: Ways to choose the ranges of activations, of ``minmax``, ``percentile`` and ``entropy``; the one that
            loses least IoU is kept.
        photos: Training photos to calibrate on.
        judges: The validation part must have at least so many labelled photos; all of them judge.
        seed: Of the choice of the calibration photos.
    """

    data: Path | None = None
    budget: float = 0.5
    methods: tuple[str, ...] = _METHODS
    photos: int = 64
    judges: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        """Check every field.

        Raises:
            UsageError: One of them makes no sense.
        """
        _check_path("the data folder of int8", self.data)
        if not (_is_number(self.budget) and self.budget >= 0):
            raise UsageError(f"the budget of int8 is {self.budget!r}; a number of IoU points, 0 or more, is expected")
        if not isinstance(self.methods, tuple):
            raise UsageError(f"calibration methods are {self.methods!r}; a tuple of {', '.join(_METHODS)} is expected")
        odd = [str(method) for method in self.methods if method not in _METHODS]
        if odd or not self.methods:
            raise UsageError(f"calibration methods: {', '.join(odd) or 'none'}; there are {', '.join(_METHODS)}")
        _check_count("the number of calibration photos of int8", self.photos)
        _check_count("the number of photos that judge int8", self.judges)
        _check_kind("the seed of int8", self.seed, int, "a whole number")


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
        certain_share: The rule of whether there is a pet (:class:`petseg_runtime.spec.ModelSpec`), in (0, 1], for a
            model for which one was chosen; None: the checkpoint's.
        data: Folder with photos for the parity test, and for int8; None: the samples that ship with petseg.
        split: The part of labelled data that the parity test uses, ``val`` or ``test``.
        photos: At most so many photos in the parity test.
        seed: Of the choice of those photos.
        backends: Engines of the parity test; ``auto`` is the one that would run the file here.
        device: What they run on: ``cpu``, ``cuda``, ``cuda:N``, ``intel-gpu``, ``intel-gpu:N`` or ``auto``. A TensorRT
            engine is built for the GPU that it names.
        threads: CPU threads of these engines; None: as many as this process may use.
        quantize: How int8 is chosen.
        notes: JSON values that are added to the file's provenance unchanged (measured metrics, for example). Keys that
            the export writes, such as ``checkpoint``, are reserved.
    """

    output: Path | None = None
    name: str = "petseg attention U-Net"
    precision: str = "fp32"
    height: int | None = None
    width: int | None = None
    dynamic_size: bool = False
    batch: int = 0
    certain_share: float | None = None
    data: Path | None = None
    split: str = "val"
    photos: int = 200
    seed: int = 0
    backends: tuple[str, ...] = ("auto",)
    device: str = "auto"
    threads: int | None = None
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    notes: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without a checkpoint and without numpy.

        Raises:
            UsageError: A value that cannot be, or that the network does not take.
        """
        _check_kind("name", self.name, str, "a text")
        _check_kind("device", self.device, str, "a text")
        _check_kind("seed", self.seed, int, "a whole number")
        _check_kind("quantize", self.quantize, QuantizeConfig, "a QuantizeConfig")
        _check_path("output", self.output)
        _check_path("data", self.data)
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is {self.precision!r}; there are {', '.join(PRECISIONS)}")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None:
                _check_size(name, size)
        if not isinstance(self.dynamic_size, bool):
            raise UsageError(f"dynamic_size is {self.dynamic_size!r}; True or False is expected")
        if not _is_count(self.batch, 0):
            raise UsageError(f"batch is {self.batch!r}; a number of photos is expected, or 0 for any")
        _check_share("certain_share", self.certain_share)
        _check_count("the number of photos of the parity test", self.photos)
        if self.threads is not None:
            _check_count("threads", self.threads)
        if not (isinstance(self.backends, tuple) and self.backends and all(isinstance(b, str) for b in self.backends)):
            raise UsageError(f"backends is {self.backends!r}; a tuple of at least one engine is expected")
        if self.split not in ("val", "test"):
            raise UsageError(f"split is {self.split!r}; val or test is expected")
        if self.notes is not None:
            _check_notes(self.notes)


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

    def __post_init__(self) -> None:
        """See :class:`ExportConfig`."""
        super().__post_init__()
        _check_path("onnx", self.onnx)


@dataclass(frozen=True, kw_only=True)
class OpenVINOConfig(CompiledConfig):
    """An OpenVINO IR: ``.xml`` and ``.bin``."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(CompiledConfig):
    """What TensorRT and TensorRT for RTX both take.

    Attributes:
        max_batch: Largest batch of a graph that takes any.
        max_size: Largest height and width of a graph that takes any; None: twice the specification's.
    """

    max_batch: int = 8
    max_size: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """See :class:`ExportConfig`."""
        super().__post_init__()
        _check_count("max_batch", self.max_batch)
        size = self.max_size
        if size is not None and not (isinstance(size, tuple) and len(size) == 2 and all(map(_is_size, size))):
            raise UsageError(f"max_size is {size!r}; a tuple of two positive multiples of {STRIDE} is expected")


@dataclass(frozen=True, kw_only=True)
class TensorRTConfig(EngineConfig):
    """A TensorRT engine, for the GPU and the library it is built with.

    Attributes:
        timing_cache: File in which TensorRT keeps what it measured, to build faster the next time; None: one in the
            user's cache folder.
    """

    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        """See :class:`ExportConfig`."""
        super().__post_init__()
        _check_path("timing_cache", self.timing_cache)


@dataclass(frozen=True, kw_only=True)
class TensorRTRTXConfig(EngineConfig):
    """A TensorRT for RTX engine; it is finished on the device, and needs no GPU to be built.

    Attributes:
        compute_capabilities: GPUs to build for, such as ``8.9``; empty: what the library calls
            portable, Ampere and later.
    """

    compute_capabilities: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """See :class:`ExportConfig`."""
        super().__post_init__()
        if not isinstance(self.compute_capabilities, tuple):
            raise UsageError(
                f'compute_capabilities is {self.compute_capabilities!r}; a tuple such as ("8.9",) is expected'
            )
        for capability in self.compute_capabilities:
            if not (isinstance(capability, str) and _CAPABILITY.fullmatch(capability)):
                raise UsageError(f"compute capability {capability!r}: one such as 8.9 is expected")


def _is_count(value: object, least: int = 1) -> bool:
    """Whether it is a whole number, and not too small. True and False are integers, too, and no numbers."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value >= STRIDE and value % STRIDE == 0


def _check_count(name: str, value: object) -> None:
    if not _is_count(value):
        raise UsageError(f"{name} is {value!r}; a whole number, 1 or more, is expected")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_kind(name: str, value: object, kind: type, expected: str) -> None:
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UsageError(f"{name} is {value!r}; {expected} is expected")


def _check_path(name: str, value: object) -> None:
    if value is not None:
        _check_kind(name, value, Path, "a pathlib.Path")


def _check_share(name: str, value: float | None) -> None:
    if value is not None and not (_is_number(value) and 0 < value <= 1):
        raise UsageError(f"{name} is {value!r}; it must lie above 0, up to 1")


def _check_size(name: str, value: object) -> None:
    if not _is_size(value):
        raise UsageError(f"{name} is {value!r}; it must be a positive multiple of {STRIDE}")


def _check_notes(notes: object) -> None:
    if not isinstance(notes, dict):
        raise UsageError(f"notes are {type(notes).__name__}; a dict of JSON values is expected")
    if taken := sorted(RESERVED & notes.keys()):
        raise UsageError(f"notes: {', '.join(taken)}: reserved for what the export itself writes; rename them")
    try:
        json.dumps(notes, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"notes are no JSON: {error}") from error
