"""What FFmpeg and the system say of a source, or of a file that is being written, in petseg's own errors."""

from __future__ import annotations

import errno
import math
import os
import time
from pathlib import Path
from typing import Final

import av.error

from petseg_runtime.errors import InputError, OutputError, SilentVideo, UnreadableVideo

__all__ = ["errors_at", "errors_of", "reason_of", "refused"]

#: What the system says of one name alone: the next video's may well be written.
_OF_ONE: Final = {errno.EISDIR, errno.ENAMETOOLONG}


class errors_of:  # noqa: N801 (used like a function)
    """Turns FFmpeg's errors into ours, with the source's name and without its credentials."""

    def __init__(
        self, name: str, what: str, timeout: tuple[float, float] | None = None, *, invalid: str | None = None
    ) -> None:
        """Remember what is tried.

        Args:
            name: Of the source, for people.
            what: What goes wrong.
            timeout: What FFmpeg was given of it.
            invalid: What it means where FFmpeg speaks of an invalid argument; None: it is in its words.
        """
        self._name, self._what, self._longest = name, what, timeout[0] if timeout else math.inf
        self._invalid = invalid

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, av.error.FFmpegError):
            # FFmpeg tells differently of time that is over. Not from it: it names the URL with the password, and a
            # traceback would print that.
            if isinstance(error, av.error.ExitError) or time.monotonic() - self._begun >= self._longest:
                raise SilentVideo(f"{self._what} (it sent nothing for too long)", self._name) from None
            invalid = self._invalid if isinstance(error, av.error.ArgumentError) else None
            raise UnreadableVideo(f"{self._what} ({invalid or reason_of(error)})", self._name) from None
        if isinstance(error, (OSError, ValueError, MemoryError)) and not isinstance(error, InputError):
            raise UnreadableVideo(f"{self._what} ({error})", self._name) from error


def reason_of(error: av.error.FFmpegError) -> str:
    """FFmpeg's words, without the name, which may hold a password."""
    if isinstance(error, av.error.InvalidDataError):
        return "not a video, damaged or truncated"
    return error.strerror or type(error).__name__


class errors_at:  # noqa: N801 (used like a function)
    """Turns what goes wrong while writing into one error that names the file.

    What the system says is of the output, and ends the run. What an encoder or a format says is of this source alone,
    whose frames it does not take. The rest is a defect of the program, and stays what it is.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, (av.error.FFmpegError, OSError)):
            return
        code = getattr(error, "errno", None)
        reason = os.strerror(errno.ENOSPC) if code == errno.ENOSPC else getattr(error, "strerror", None) or str(error)
        # Pillow, too, raises errors of the system's kind, but without a number.
        if isinstance(error, OSError) and code is not None and code not in _OF_ONE:
            raise OutputError(f"{self._path}: cannot be written ({reason})") from error
        raise refused(self._path, reason) from error


def refused(path: Path, reason: str) -> InputError:
    """The error of one source, whose result cannot be written."""
    return InputError(f"its result {path} cannot be written ({reason})")
