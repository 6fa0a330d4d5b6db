"""What a run has done so far, in a file beside its results, so that ``--resume`` goes on where it was stopped.

``.petseg-run.ndjson`` in the output folder: a line with what decides how results look, then one line per result that is
in its place. A line that was cut by a crash counts for nothing; so does one whose photo or result has changed since.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, TextIO

from petseg_runtime.errors import OutputError
from petseg_runtime.files import STEM
from petseg_runtime.sources import JOURNAL, Item

__all__ = ["JOURNAL", "Journal"]

SCHEMA_VERSION: Final = 2

#: Settings of photos or of videos alone: a run without such has none, and may go on with any.
_OF_SOME: Final = ("format", "video_format")

#: The beginning of every journal.
_BEGINS: Final = '{"schema_version": '

#: What :func:`petseg_runtime.files.replacing` leaves behind when the process is killed.
_PART: Final = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part(?:\.\w+)?", re.DOTALL)


class Journal:
    """One run's lines. Use it as a context manager."""

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Open the journal of an output folder: a new one, or with ``resume`` the one that is there.

        Args:
            folder: Where results go; it exists.
            settings: What decides how they look; JSON values.
            resume: Go on with what is there. What a killed run left half-written of an item is removed when the item
                is asked about (:meth:`finished`); what others are writing there is left alone.

        Raises:
            OutputError: It cannot be written, is being written by another run, belongs to other settings, or is
                something else: a link, no regular file, or a file that no run has begun.
        """
        self._folder, self._path = folder, folder / JOURNAL
        self._done: dict[str, dict[str, Any]] = {}
        self._sources: dict[str, list[Any]] = {}  # the photos as they were when they were asked about
        self._parts: dict[tuple[Path, str], list[Path]] = {}  # by folder and the result's stem, as far as it is in them
        header = {"schema_version": SCHEMA_VERSION, "settings": dict(settings)}
        # On each line, because runs that share the folder share the file.
        self._run = hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]
        self._file = _opened(self._path)
        try:
            self._lock(exclusive=resume)
            self._check_own()
            if resume:
                self._find_parts()
                self._go_on(header)
            else:
                self._file.truncate(0)
                self._write([header])
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise OutputError(f"{self._path}: cannot be written ({error.strerror or error})") from error
            raise

    def finished(self, item: Item, path: Path | None) -> dict[str, Any] | None:
        """The line of an item whose result is there, whole, and made from the photo as it is now; else None.

        Args:
            item: The photo.
            path: Where its result is, if it is a file of its own.
        """
        self._clear_parts_of(self._folder / item.name)
        # What is noted later is this state: if the photo changes while it is read, it is done again next time.
        source = self._sources[str(item.name)] = _identity(item)
        line = self._done.get(str(item.name))
        if line is None or line.get("source") != source:
            return None
        return line if path is None or _size(path) == line.get("bytes") else None

    def add(self, item: Item, path: Path | None, value: Mapping[str, Any] | None = None) -> None:
        """Note that an item's result is in its place.

        Args:
            item: The photo.
            path: Its result, if it is a file of its own.
            value: Its result, if it is part of a file that is written at the end; JSON values.

        Raises:
            OutputError: The line cannot be written.
        """
        name = str(item.name)
        source = self._sources.get(name) or _identity(item)
        line = {"run": self._run, "name": name, "source": source, "bytes": path and _size(path), "value": value}
        self._done[name] = line
        self._write([line])

    def value(self, item: Item) -> dict[str, Any] | None:
        """What :meth:`add` was given for an item, in this run or before; None if its photo has changed since."""
        line = self._done.get(str(item.name))
        if line is None or line.get("source") != (self._sources.get(str(item.name)) or _identity(item)):
            return None
        return line.get("value")

    def close(self) -> None:
        """Close the file; it stays for a later run."""
        with contextlib.suppress(OSError):  # what could not be written cannot be written now; that was said
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _lock(self, *, exclusive: bool) -> None:
        """Lock the folder: several runs may share it, but not with one that removes half-written files (``exclusive``).

        Raises:
            OutputError: Another run is in the way.
        """
        try:
            fcntl.flock(self._file, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{self._folder}: another run writes there; wait for it, or stop it") from error
        except OSError:  # a file system without locks
            return

    def _check_own(self) -> None:
        """Refuse a file that no run has begun. An empty one is fine, and so is a beginning that a crash has cut.

        Raises:
            OutputError: It is such a file.
        """
        self._file.seek(0)
        begun = self._file.read(len(_BEGINS))
        if not _BEGINS.startswith(begun):
            raise OutputError(
                f"{self._path}: not a journal of petseg, so it is left as it is: move it away, or choose another "
                "--output"
            )

    def _go_on(self, header: dict[str, Any]) -> None:
        lines = self._lines()
        if lines:
            self._check(lines[0], header)
            own = (line for line in lines[1:] if line.get("run") == self._run)
            self._done = {line["name"]: line for line in own if isinstance(line.get("name"), str)}
        if not lines:
            self._file.truncate(0)  # so that a journal begins as one, whatever was cut
            self._write([header])
        elif self._file.seek(0, os.SEEK_END):
            self._file.write("\n")  # ends a line that was cut

    def _lines(self) -> list[dict[str, Any]]:
        """The lines that are whole."""
        self._file.seek(0)
        lines = []
        for text in self._file:
            with contextlib.suppress(ValueError, RecursionError):  # cut by a crash: that photo is done again
                line = json.loads(text)
                if isinstance(line, dict):
                    lines.append(line)
        return lines

    def _check(self, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        before, now = found.get("settings"), header["settings"]
        if found.get("schema_version") != SCHEMA_VERSION or not isinstance(before, dict):
            raise OutputError(f"{self._path}: not a journal of this version of petseg: start again without --resume")
        everything = {**before, **now}
        compared = (key for key in everything if key not in _OF_SOME or (key in before and key in now))
        differing = [key for key in compared if before.get(key) != now.get(key)]
        if differing:
            changes = "; ".join(f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in differing)
            raise OutputError(
                f"{self._folder}: the run there was another ({changes}): resume it with its own settings, or start "
                "again without --resume"
            )

    def _find_parts(self) -> None:
        for where, _, names in os.walk(self._folder):
            for match in filter(None, map(_PART.fullmatch, names)):
                self._parts.setdefault((Path(where), match[1]), []).append(Path(where, match[0]))
        self._clear_parts_of(self._folder / "annotations")  # of all items

    def _clear_parts_of(self, name: Path) -> None:
        """Remove what was left half-written of a result, by its name without suffix: a file, several, or a folder."""
        if not self._parts:  # as nearly always, and this is asked for each of a million photos
            return
        files = re.compile(re.escape(name.name[:STEM]) + r"(-\d+)?")
        for key in [
            (at, stem) for at, stem in self._parts if at == name or (at == name.parent and files.fullmatch(stem))
        ]:
            for part in self._parts.pop(key):
                part.unlink(missing_ok=True)

    def _write(self, lines: list[dict[str, Any]]) -> None:
        try:
            self._file.writelines(json.dumps(line) + "\n" for line in lines)
            self._file.flush()
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written ({error.strerror or error})") from error


def _opened(path: Path) -> TextIO:
    """The journal, made if it is not there. It may lie in a folder that came from elsewhere, so no link is followed: it
    would lead to a file of the user's, to be emptied.

    Raises:
        OutputError: It cannot be written, or is a link or no regular file.
    """
    # Without O_NONBLOCK, a pipe would be waited for.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | getattr(os, "O_NOFOLLOW", 0)
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise OutputError(f"{path}: a link, which is not written through: remove it") from error
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OutputError(f"{path}: not a regular file: remove it")
    return os.fdopen(descriptor, "a+", encoding="utf-8", errors="replace")


def _identity(item: Item) -> list[Any]:
    """JSON values that differ once the photo has changed: path, size and time, or the SHA-256 of its data."""
    if item.data is not None:
        return ["-", hashlib.sha256(item.data).hexdigest()]
    try:
        about = item.source.stat()
    except OSError:
        return [str(item.source)]
    return [str(item.source), about.st_size, about.st_mtime_ns]


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
