"""Export configs: one frozen dataclass per format, so that an option which does not apply cannot be passed.

This module is light on purpose: configs are built and validated before torch is imported. Every invalid value raises
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
    """How post-training int8 quantization is calibrated and evaluated.

    Attributes:
        data: Labelled data folder for calibration and evaluation; None: the folder of the parity test.
        budget: Largest loss of IoU on the labelled validation photos, in points (hundredths).
        methods: Calibration methods for the activation ranges: ``minmax``, ``percentile``, ``entropy``. All are tried,
            and the one that loses the least IoU is kept.
        photos: Number of training photos to calibrate on.
        judges: Smallest number of labelled photos in the validation split; all photos of the split are used.
        seed: Seed for choosing the calibration photos.
    """

    data: Path | None = None
    budget: float = 0.5
    methods: tuple[str, ...] = _METHODS
    photos: int = 64
    judges: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        """Validate every field.

        Raises:
            UsageError: A field has an invalid value.
        """
        _check_path("the data folder of int8", self.data)
        if not (_is_number(self.budget) and self.budget >= 0):
            raise UsageError(f"the budget of int8 is {self.budget!r}; a number of IoU points, 0 or more, is expected")
        if not isinstance(self.methods, tuple):
            raise UsageError(f"calibration methods are {self.methods!r}; a tuple of {', '.join(_METHODS)} is expected")
        odd = [str(method) for method in self.methods if method not in _METHODS]
        if odd or not self.methods:
            raise UsageError(f"calibration methods: {', '.join(odd) or 'none'}; choose from {', '.join(_METHODS)}")
        _check_count("the number of calibration photos of int8", self.photos)
        _check_count("the number of validation photos of int8", self.judges)
        _check_kind("the seed of int8", self.seed, int, "an integer")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """The options that all formats share.

    Attributes:
        output: File to write; None: beside the checkpoint, with its name and the format's suffix.
        name: Name of the model in its specification.
        precision: ``fp32``, ``fp16`` or ``int8``.
        height: Input height, a multiple of 16; None: the checkpoint's training size.
        width: Input width; likewise.
        dynamic_size: Whether height and width are dynamic axes: any multiples of 16.
        batch: Fixed batch size; 0: dynamic.
        certain_share: The threshold of the rule that decides whether a photo shows a pet
            (:class:`petseg_runtime.spec.ModelSpec`), in (0, 1]; None: the checkpoint's.
        data: Folder with photos for the parity test, and for int8; None: the samples that ship with petseg.
        split: Split of labelled data for the parity test: ``val`` or ``test``.
        photos: Largest number of photos in the parity test.
        seed: Seed for choosing those photos.
        backends: Engines of the parity test; ``auto`` is the one that would run the file on this machine.
        device: Device of these engines: ``cpu``, ``cuda``, ``cuda:N``, ``intel-gpu``, ``intel-gpu:N`` or ``auto``. A
            TensorRT engine is built for the GPU given here.
        threads: CPU threads of these engines; None: as many as this process may use.
        quantize: How int8 is calibrated and evaluated.
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
        """Validate what can be validated without a checkpoint and without numpy.

        Raises:
            UsageError: A field has an invalid value, or one that the network does not support.
        """
        _check_kind("name", self.name, str, "a string")
        _check_kind("device", self.device, str, "a string")
        _check_kind("seed", self.seed, int, "an integer")
        _check_kind("quantize", self.quantize, QuantizeConfig, "a QuantizeConfig")
        _check_path("output", self.output)
        _check_path("data", self.data)
        if self.precision not in PRECISIONS:
            raise UsageError(f"precision is {self.precision!r}; choose from {', '.join(PRECISIONS)}")
        for name, size in (("height", self.height), ("width", self.width)):
            if size is not None:
                _check_size(name, size)
        if not isinstance(self.dynamic_size, bool):
            raise UsageError(f"dynamic_size is {self.dynamic_size!r}; True or False is expected")
        if not _is_count(self.batch, 0):
            raise UsageError(f"batch is {self.batch!r}; a number of photos is expected, or 0 for a dynamic batch")
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
    """Options of an ONNX export."""


@dataclass(frozen=True, kw_only=True)
class CompiledConfig(ExportConfig):
    """The options of all formats that are compiled from ONNX.

    Attributes:
        onnx: ONNX file exported from the same checkpoint, to compile unchanged; it determines the precision, size and
            batch of the result. None: export a temporary one first.
    """

    onnx: Path | None = None

    def __post_init__(self) -> None:
        """See :class:`ExportConfig`."""
        super().__post_init__()
        _check_path("onnx", self.onnx)


@dataclass(frozen=True, kw_only=True)
class OpenVINOConfig(CompiledConfig):
    """Options of an OpenVINO IR (``.xml`` and ``.bin``)."""


@dataclass(frozen=True, kw_only=True)
class EngineConfig(CompiledConfig):
    """The options that TensorRT and TensorRT for RTX share: the upper end of the optimization profile.

    Attributes:
        max_batch: Largest batch, where the batch is dynamic.
        max_size: Largest height and width, where they are dynamic; None: twice the specification's.
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
    """Options of a TensorRT engine, which runs only on the GPU model and with the TensorRT version it is built with.

    Attributes:
        timing_cache: File in which TensorRT keeps kernel timings, to build faster the next time; None: one in the
            user's cache folder.
    """

    timing_cache: Path | None = None

    def __post_init__(self) -> None:
        """See :class:`ExportConfig`."""
        super().__post_init__()
        _check_path("timing_cache", self.timing_cache)


@dataclass(frozen=True, kw_only=True)
class TensorRTRTXConfig(EngineConfig):
    """Options of a TensorRT for RTX engine, which is built without a GPU; the device finishes the compilation.

    Attributes:
        compute_capabilities: Compute capabilities to build for, such as ``8.9``; empty: Ampere and later, which the
            library calls portable.
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
                raise UsageError(f"compute capability {capability!r}: a string such as 8.9 is expected")


def _is_count(value: object, least: int = 1) -> bool:
    """Whether a value is an integer of at least ``least``; a bool is an int in Python, but not a count."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_size(value: object) -> bool:
    return isinstance(value, int) and value >= STRIDE and value % STRIDE == 0


def _check_count(name: str, value: object) -> None:
    if not _is_count(value):
        raise UsageError(f"{name} is {value!r}; an integer, 1 or more, is expected")


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
        raise UsageError(f"{name} is {value!r}; it must be above 0 and at most 1")


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
        raise UsageError(f"notes cannot be written as JSON: {error}") from error
