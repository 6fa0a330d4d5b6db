"""Translates errors of FFmpeg and the system, about sources and files being written, into petseg's errors."""

from __future__ import annotations

import errno
import math
import os
import time
from pathlib import Path
from typing import Final

import av.error

from petseg_runtime.errors import InputError, OutputError, SilentVideo, UnreadableVideo

__all__ = ["reading_errors", "reason_of", "unwritable", "writing_errors"]

#: System errors that concern this file name only: the next video's file may well be writable.
_NAME_ERRORS: Final = {errno.EISDIR, errno.ENAMETOOLONG}


class reading_errors:  # noqa: N801 (used like a function)
    """Translates FFmpeg's errors about a source, without its credentials."""

    def __init__(
        self, name: str, what: str, timeout: tuple[float, float] | None = None, *, invalid: str | None = None
    ) -> None:
        """Prepare the translation.

        Args:
            name: Of the source, for people.
            what: The failure, in a few words.
            timeout: FFmpeg's timeouts for opening and reading, in seconds.
            invalid: What FFmpeg's "invalid argument" means here; None: use FFmpeg's words.
        """
        self._name, self._what, self._timeout = name, what, timeout[0] if timeout else math.inf
        self._invalid = invalid

    def __enter__(self) -> None:
        self._begun = time.monotonic()

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, av.error.FFmpegError):
            # FFmpeg reports a timeout in different ways. Without `from error`: that names the URL with the password,
            # which a traceback would print.
            if isinstance(error, av.error.ExitError) or time.monotonic() - self._begun >= self._timeout:
                raise SilentVideo(f"{self._what} (it sent nothing for too long)", self._name) from None
            invalid = self._invalid if isinstance(error, av.error.ArgumentError) else None
            raise UnreadableVideo(f"{self._what} ({invalid or reason_of(error)})", self._name) from None
        if isinstance(error, (OSError, ValueError, MemoryError)) and not isinstance(error, InputError):
            raise UnreadableVideo(f"{self._what} ({error})", self._name) from error


def reason_of(error: av.error.FFmpegError) -> str:
    """FFmpeg's description of an error, without the file name, which may contain a password."""
    if isinstance(error, av.error.InvalidDataError):
        return "not a video, damaged or truncated"
    return error.strerror or type(error).__name__


class writing_errors:  # noqa: N801 (used like a function)
    """Translates errors while writing into one error that names the file.

    Errors of the system concern the output, and end the run. Errors of an encoder or a format concern this source only,
    whose frames it does not accept. Any other exception is a bug, and passes unchanged.
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
        # Pillow also raises OSError, but without an errno.
        if isinstance(error, OSError) and code is not None and code not in _NAME_ERRORS:
            raise OutputError(f"{self._path}: cannot be written ({reason})") from error
        raise unwritable(self._path, reason) from error


def unwritable(path: Path, reason: str) -> InputError:
    """The error of a source whose result cannot be written."""
    return InputError(f"its result {path} cannot be written ({reason})")
