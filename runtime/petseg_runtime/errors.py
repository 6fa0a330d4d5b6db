"""Every error petseg raises on purpose, on one page, and the exit code of each.

    PetsegError                      1
    ├── InputError                   1   a photo that cannot be used (a batch goes on without it)
    │   ├── UnreadableImage              missing, truncated, not an image
    │   ├── UnsupportedImage             an image, but of a kind whose pixel values mean nothing to us
    │   ├── ImageTooLarge                more pixels or bytes than the limit allows
    │   └── VideoError                   a video or stream that cannot be used
    │       ├── UnreadableVideo          missing, truncated, not a video, or a stream that breaks
    │       │   └── SilentVideo          a stream that sends nothing, or nothing that can be decoded, for too long
    │       └── UnsupportedVideo         a video, but of a kind or size that cannot be used
    ├── UsageError                   2   what was asked for does not go together, or not with this input or model;
    │                                    a ValueError, too
    ├── ModelError                   4   a model file that is damaged, foreign or breaks its contract
    │   └── CheckpointError              the same for a training checkpoint
    ├── EngineError                  5   an engine or device that was asked for cannot be had
    │   ├── EngineMissing                no inference engine is installed
    │   └── EngineForeign                compiled for another GPU, or the one here cannot be used
    ├── OutputError                  6   a result cannot be written where it should go
    ├── MissingExtra                 7   a command needs packages that are not installed
    ├── DataError                    8   a data set that cannot be used
    ├── TrainingError                9   a training run that cannot go on
    │   └── NonFiniteLoss                the loss became NaN or infinite
    └── ParityError                 10   an exported file does not do what its checkpoint does
        ├── ParityNames                  inputs or outputs are named differently
        ├── ParityShapes                 shapes or types differ
        └── ParityTolerance              the values differ by more than the tolerance

Four codes belong to no single error: ``EXIT_PARTIAL`` (3: some inputs failed, the rest is done), and those of signals
that ended photos, a video, a stream, training, the doctor or a benchmark in order: ``EXIT_INTERRUPTED`` (130: Ctrl-C),
``EXIT_TERMINATED`` (143: SIGTERM) and ``EXIT_HUNG_UP`` (129: SIGHUP, the terminal is gone).
Click, too, uses 2: for a command line it cannot parse.
"""

from __future__ import annotations

from typing import ClassVar

__all__ = [
    "EXIT_HUNG_UP",
    "EXIT_INTERRUPTED",
    "EXIT_PARTIAL",
    "EXIT_TERMINATED",
    "CheckpointError",
    "DataError",
    "EngineError",
    "EngineForeign",
    "EngineMissing",
    "ImageTooLarge",
    "InputError",
    "MissingExtra",
    "ModelError",
    "NonFiniteLoss",
    "OutputError",
    "ParityError",
    "ParityNames",
    "ParityShapes",
    "ParityTolerance",
    "PetsegError",
    "SilentVideo",
    "TrainingError",
    "UnreadableImage",
    "UnreadableVideo",
    "UnsupportedImage",
    "UnsupportedVideo",
    "UsageError",
    "VideoError",
    "one_line",
]

EXIT_PARTIAL = 3
EXIT_HUNG_UP = 129
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class PetsegError(Exception):
    """Base of all errors raised on purpose; the message names the file, the value and the remedy."""

    exit_code: ClassVar[int] = 1


class InputError(PetsegError):
    """One input cannot be used; a batch counts it and goes on."""


class UnreadableImage(InputError):
    """The file is missing, truncated, or not an image."""


class UnsupportedImage(InputError):
    """An image whose pixel values have no agreed meaning as RGB (32-bit float, for example)."""


class ImageTooLarge(InputError):
    """More pixels or bytes than the limit allows."""


class VideoError(InputError):
    """A video or stream cannot be used.

    Attributes:
        reason: Why, without the source's name.
        name: The source's name, without secrets; "" where the error does not know it.
    """

    def __init__(self, reason: str, name: str = "") -> None:
        """The message is both: ``NAME: REASON``."""
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason, self.name = reason, name


class UnreadableVideo(VideoError):
    """The video is missing, damaged or not one, or the stream breaks."""


class SilentVideo(UnreadableVideo):
    """The stream sends nothing, or nothing that can be decoded, for longer than is waited for."""


class UnsupportedVideo(VideoError):
    """A video without pictures, or with frames too large or of a kind that cannot be converted."""


class UsageError(PetsegError, ValueError):
    """Options or values contradict each other, are out of range, or do not fit this input or model.

    Also a ``ValueError``, which is what Python programs expect of a value that is out of range.
    """

    exit_code = 2


class ModelError(PetsegError):
    """A model file is damaged, foreign, or breaks its contract."""

    exit_code = 4


class CheckpointError(ModelError):
    """A training checkpoint is damaged, foreign, or of another network."""


class EngineError(PetsegError):
    """An engine or a device that was asked for cannot be had."""

    exit_code = 5


class EngineMissing(EngineError):
    """No inference engine is installed."""


class EngineForeign(EngineError):
    """A compiled engine is for another GPU than the one that is here, or that one cannot be used at all."""


class OutputError(PetsegError):
    """A result cannot be written where it should go."""

    exit_code = 6


class MissingExtra(PetsegError):
    """A command needs packages that an extra of petseg brings."""

    exit_code = 7


class DataError(PetsegError):
    """A data set cannot be used."""

    exit_code = 8


class TrainingError(PetsegError):
    """A training run cannot start or go on."""

    exit_code = 9


class NonFiniteLoss(TrainingError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class ParityError(PetsegError):
    """An exported file does not do what its checkpoint does."""

    exit_code = 10


class ParityNames(ParityError):
    """Inputs or outputs are named differently from the contract."""


class ParityShapes(ParityError):
    """Shapes or element types differ from the contract."""


class ParityTolerance(ParityError):
    """Values differ by more than the tolerance."""


def one_line(error: object) -> str:
    """A library's message in one line of at most 300 characters; the name of its type if it says nothing."""
    return " ".join(str(error).split())[:300] or type(error).__name__
