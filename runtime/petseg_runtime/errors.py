"""All errors that petseg raises on purpose, with the exit code of each.

    PetsegError                      1
    ├── InputError                   1   a photo cannot be used (a batch continues without it)
    │   ├── UnreadableImage              missing, truncated, not an image
    │   ├── UnsupportedImage             an image whose pixel values have no agreed meaning as RGB
    │   ├── ImageTooLarge                more pixels or bytes than the limit allows
    │   └── VideoError                   a video or stream cannot be used
    │       ├── UnreadableVideo          missing, truncated, not a video, or a stream that breaks
    │       │   └── SilentVideo          a stream sends nothing, or nothing that can be decoded, for too long
    │       └── UnsupportedVideo         a video of a type or size that cannot be used
    ├── UsageError                   2   options contradict each other, or do not fit this input or model;
    │                                    also a ValueError
    ├── ModelError                   4   a model file is damaged, not petseg's, or violates its contract
    │   └── CheckpointError              the same for a training checkpoint
    ├── EngineError                  5   an engine or device is not available, or fails
    │   ├── EngineMissing                no inference engine is installed
    │   └── EngineForeign                compiled for another GPU, or the GPU here cannot be used
    ├── OutputError                  6   a result cannot be written to its destination
    ├── MissingExtra                 7   a command needs packages that are not installed
    ├── DataError                    8   a data set cannot be used
    ├── TrainingError                9   a training run cannot start or continue
    │   ├── FirstRankFailed              the first of several processes failed, and says why
    │   └── NonFiniteLoss                the loss became NaN or infinite
    └── ParityError                 10   the outputs of an exported file differ from its checkpoint's
        ├── ParityNames                  inputs or outputs have other names
        ├── ParityShapes                 shapes or types differ
        └── ParityTolerance              the values differ by more than the tolerance

Four exit codes belong to no single error: ``EXIT_PARTIAL`` (3: some inputs failed, the others succeeded), and those of
signals that stopped photos, a video, a stream, training, the doctor or a benchmark cleanly: ``EXIT_INTERRUPTED`` (130:
Ctrl-C), ``EXIT_TERMINATED`` (143: SIGTERM) and ``EXIT_HUNG_UP`` (129: SIGHUP, the terminal is gone). Click also uses 2,
for a command line that it cannot parse.
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
    "FirstRankFailed",
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
    """Base class of all errors that petseg raises on purpose; the message names the file, the value and the remedy."""

    exit_code: ClassVar[int] = 1


class InputError(PetsegError):
    """One input cannot be used; a batch counts it and continues."""


class UnreadableImage(InputError):
    """The file is missing, truncated, or not an image."""


class UnsupportedImage(InputError):
    """The pixel values have no agreed meaning as RGB (32-bit float, for example), or the type of source is unknown."""


class ImageTooLarge(InputError):
    """The image has more pixels or bytes than the limit allows."""


class VideoError(InputError):
    """A video or stream cannot be used.

    Attributes:
        reason: Why, without the source's name.
        name: The source's name, without secrets; "" if unknown.
    """

    def __init__(self, reason: str, name: str = "") -> None:
        """Make the message from both: ``NAME: REASON``."""
        super().__init__(f"{name}: {reason}" if name else reason)
        self.reason, self.name = reason, name


class UnreadableVideo(VideoError):
    """The video is missing, damaged or not a video, or the stream breaks."""


class SilentVideo(UnreadableVideo):
    """The stream sends nothing, or nothing that can be decoded, for longer than the time limit."""


class UnsupportedVideo(VideoError):
    """The video has no pictures, or frames that are too large or of a type that cannot be converted."""


class UsageError(PetsegError, ValueError):
    """Options or values contradict each other, are out of range, or do not fit this input or model.

    Also a ``ValueError``, which Python programs expect for a value that is out of range.
    """

    exit_code = 2


class ModelError(PetsegError):
    """A model file is damaged, was not made by petseg, or violates its contract."""

    exit_code = 4


class CheckpointError(ModelError):
    """A training checkpoint is damaged, was not made by petseg, or is of another network."""


class EngineError(PetsegError):
    """An engine or device is not available, cannot load the model, or fails."""

    exit_code = 5


class EngineMissing(EngineError):
    """No inference engine is installed."""


class EngineForeign(EngineError):
    """A compiled engine is for another GPU than the one in this machine, or that GPU cannot be used at all."""


class OutputError(PetsegError):
    """A result cannot be written to its destination."""

    exit_code = 6


class MissingExtra(PetsegError):
    """A command needs packages of an extra of petseg that are not installed."""

    exit_code = 7


class DataError(PetsegError):
    """A data set cannot be used."""

    exit_code = 8


class TrainingError(PetsegError):
    """A training run cannot start or continue."""

    exit_code = 9


class FirstRankFailed(TrainingError):
    """The first of several processes failed; its own error says why."""


class NonFiniteLoss(TrainingError):
    """The loss became NaN or infinite; the last good checkpoint is kept."""


class ParityError(PetsegError):
    """The outputs of an exported file differ from those of its checkpoint."""

    exit_code = 10


class ParityNames(ParityError):
    """The names of inputs or outputs differ from the contract."""


class ParityShapes(ParityError):
    """Shapes or element types differ from the contract."""


class ParityTolerance(ParityError):
    """Output values differ by more than the tolerance."""


def one_line(error: object) -> str:
    """Returns a library's error message as one line of at most 300 characters; the type's name if it is empty."""
    return " ".join(str(error).split())[:300] or type(error).__name__
