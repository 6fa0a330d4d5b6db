"""What a run has done so far, in a file beside its results, so that ``--resume`` goes on where it was stopped.

``.petseg-run.ndjson`` in the output folder: a line with what decides how results look, then one line per result that is
in its place. A line that was cut by a crash counts for nothing; so does one whose photo or result has changed since.

Runs that share the folder share the file: each has its own first line, and each line names its run. Of what they wrote
to one place, the last line says whose result is there. What goes into a file for all results lies in the journal
itself, so that no other run replaces it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

from petseg_runtime.errors import OutputError
from petseg_runtime.files import STEM, real_paths
from petseg_runtime.sources import JOURNAL, Item

__all__ = ["JOURNAL", "Journal", "Values"]

SCHEMA_VERSION: Final = 2

#: Settings of photos or of videos alone: a run without such has none, and may go on with any.
_OF_SOME: Final = ("format", "video_format")

#: The beginning of every journal.
_BEGINS: Final = b'{"schema_version": '

#: What :func:`petseg_runtime.files.replacing` leaves behind when the process is killed.
_PART: Final = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part(?:\.\w+)?", re.DOTALL)

#: How often a lock is asked for, and seconds in between: a run that begins holds it alone for a moment, one that goes
#: on until its end.
_TRIES: Final = 5
_PAUSE: Final = 0.02


class _Note(NamedTuple):
    """What is kept of a line; its value, which may be large, stays in the file.

    Attributes:
        source: What the photo was.
        size: Bytes of the result, if it is a file of its own.
        suffix: Of that file; None: not known, or there is none.
        has_value: Whether the line holds a value.
        offset: Where the line begins in the file.
        length: Its bytes.
    """

    source: list[Any]
    size: int | None
    suffix: str | None
    has_value: bool
    offset: int
    length: int


class Journal:
    """One run's lines. Use it as a context manager.

    Attributes:
        noted: How many results the run that was stopped has noted.
    """

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
        self._folder, self._path, self._real = folder, folder / JOURNAL, real_paths()
        self._done: dict[str, _Note] = {}
        self._sources: dict[str, list[Any]] = {}  # the photos as they were when they were asked about
        self._parts: dict[tuple[Path, str], list[Path]] = {}  # by folder and the result's stem, as far as it is in them
        header = {"schema_version": SCHEMA_VERSION, "settings": dict(settings)}
        self._run = _run_of(header)
        self._file = _opened(self._path)
        try:
            if resume:
                self._go_on(header)
            else:
                self._begin(header)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise OutputError(f"{self._path}: cannot be written ({error.strerror or error})") from error
            raise
        self.noted = len(self._done)

    def finished(self, item: Item, path: Path | None) -> bool:
        """Whether an item's result is noted, there, whole, and made from the photo as it is now.

        Args:
            item: The photo.
            path: Where its result is, if it is a file of its own.
        """
        self._clear_parts_of(self._folder / item.name)
        if not self.knows(item):
            return False
        note = self._done[str(item.name)]
        if note.size is None and note.suffix is None:  # nothing was written of it; what lies there is another run's
            return True
        return path is None or _size(path) == note.size

    def knows(self, item: Item) -> bool:
        """Whether a result is noted of an item as it is now, wherever that result may be."""
        # What is noted later is this state: if the photo changes while it is read, it is done again next time.
        source = self._sources[str(item.name)] = self._identity(item)
        note = self._done.get(str(item.name))
        return note is not None and note.source == source

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
        source = self._sources.get(name) or self._identity(item)
        size, suffix = (_size(path), path.suffix) if path else (None, None)
        line = {"run": self._run, "name": name, "source": source, "bytes": size, "suffix": suffix, "value": value}
        try:
            offset, length = self._append(line)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written ({error.strerror or error})") from error
        self._done[name] = _Note(source, size, suffix, value is not None, offset, length)

    def value(self, item: Item) -> dict[str, Any] | None:
        """What :meth:`add` was given for an item, in this run or before; None if its photo has changed since.

        Raises:
            OutputError: It cannot be read back.
        """
        note = self._done.get(str(item.name))
        if note is None or note.source != (self._sources.get(str(item.name)) or self._identity(item)):
            return None
        try:
            line = json.loads(os.pread(self._file.fileno(), note.length, note.offset))
            if line["name"] != str(item.name):
                raise ValueError(f"another photo's line at byte {note.offset}")
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise OutputError(f"{self._path}: changed by another program ({error}): run again with --resume") from error
        value: dict[str, Any] | None = line.get("value")
        return value

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

    def _begin(self, header: dict[str, Any]) -> None:
        """Begin anew where no other run is at work; beside one its lines stay, and the header follows them."""
        alone = self._lock(fcntl.LOCK_EX)
        self._check_own()
        if alone:
            self._file.truncate(0)
        # Under this lock, nobody empties the file.
        self._lock_for_good(fcntl.LOCK_SH)
        self._append_header(header)

    def _go_on(self, header: dict[str, Any]) -> None:
        """Take over what is there. No other run may be at work: its half-written files would be removed.

        Raises:
            OutputError: Another run is, or all runs there had other settings.
        """
        self._lock_for_good(fcntl.LOCK_EX)
        self._check_own()
        self._find_parts()
        headers = self._read(header)
        agreeing = [found for found in headers if not _differing(found, header)]
        if self._done or agreeing:
            if self._run not in map(_run_of, agreeing):
                self._append_header(header)
            elif self._file.seek(0, os.SEEK_END):
                self._write(b"\n")  # ends a line that was cut
        elif headers:
            self._refuse(headers[-1], header)
        else:
            self._file.truncate(0)  # so that a journal begins as one, whatever was cut
            self._append_header(header)

    def _lock(self, kind: int) -> bool:
        """Lock the journal, and with it the folder; whether no other run is in the way.

        Where the file system has no locks, nobody can be told of.
        """
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _lock_for_good(self, kind: int) -> None:
        """Lock the folder: several runs may share it, but not with one that removes half-written files.

        Raises:
            OutputError: Another run is in the way.
        """
        for _ in range(_TRIES):
            if self._lock(kind):
                return
            time.sleep(_PAUSE)
        raise OutputError(f"{self._folder}: another run writes there; wait for it, or stop it")

    def _check_own(self) -> None:
        """Refuse a file that no run has begun. An empty one is fine, and so is a beginning that a crash has cut.

        Raises:
            OutputError: It is such a file.
        """
        begun = os.pread(self._file.fileno(), len(_BEGINS), 0)
        if not _BEGINS.startswith(begun):
            raise OutputError(
                f"{self._path}: not a journal of petseg, so it is left as it is: move it away, or choose another "
                "--output"
            )

    def _read(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        """Take in the lines that are whole, of runs with these settings; returns the headers of all runs."""
        headers, own = [], {self._run}
        for offset, length, line in self._lines():
            if "settings" in line or "schema_version" in line:
                headers.append(line)
                if not _differing(line, header):
                    own.add(_run_of(line))
            elif isinstance(line.get("name"), str):
                self._take(line, offset, length, is_own=line.get("run") in own)
        return headers

    def _take(self, line: dict[str, Any], offset: int, length: int, *, is_own: bool) -> None:
        """Take in one line; one of another run says that a result of ours was replaced, if it had the same place."""
        name, source, suffix = line["name"], line.get("source"), line.get("suffix")
        if is_own and isinstance(source, list) and source:
            source = self._resolved(source)
            has_value = line.get("value") is not None
            self._done[name] = _Note(source, line.get("bytes"), suffix, has_value, offset, length)
            return
        ours = self._done.get(name)
        wrote_a_file = not is_own and suffix is not None
        if wrote_a_file and ours and not ours.has_value and suffix == (ours.suffix or suffix):
            del self._done[name]

    def _resolved(self, source: list[Any]) -> list[Any]:
        """A photo as it was noted, by its real path: earlier versions noted it as it was typed."""
        path, *rest = source
        if path == "-" or not isinstance(path, str) or "\0" in path:  # which no path has: another program's line
            return source
        return [self._real(path), *rest]

    def _lines(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """The lines that are whole: where each begins, its length, and what it says."""
        offset = 0
        with os.fdopen(os.dup(self._file.fileno()), "rb") as file:
            file.seek(0)
            for text in file:
                line = None
                with contextlib.suppress(ValueError, RecursionError):  # cut by a crash: that photo is done again
                    line = json.loads(text)
                if isinstance(line, dict):
                    yield offset, len(text), line
                offset += len(text)

    def _refuse(self, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        """Say what was otherwise in the run that was begun last.

        Raises:
            OutputError: Always.
        """
        before, now = found.get("settings"), header["settings"]
        if found.get("schema_version") != SCHEMA_VERSION or not isinstance(before, dict):
            raise OutputError(f"{self._path}: not a journal of this version of petseg: start again without --resume")
        changes = (f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in _differing(found, header))
        raise OutputError(
            f"{self._folder}: the run there was another ({'; '.join(changes)}): resume it with its own settings, or "
            "start again without --resume"
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

    def _identity(self, item: Item) -> list[Any]:
        """JSON values that differ once the photo has changed: real path, size and time, or the SHA-256 of its data."""
        if item.data is not None:
            return ["-", hashlib.sha256(item.data).hexdigest()]
        path = self._real(item.source)
        try:
            about = item.source.stat()
        except OSError:
            return [path]
        return [path, about.st_size, about.st_mtime_ns]

    def _append_header(self, header: Mapping[str, Any]) -> None:
        if self._file.seek(0, os.SEEK_END):
            self._write(b"\n")  # ends a line that was cut
        self._append(header)

    def _append(self, line: Mapping[str, Any]) -> tuple[int, int]:
        """Add a line in one piece, so that those of other runs do not come between; returns its place and length."""
        data = (json.dumps(line) + "\n").encode()
        self._write(data)
        return self._file.tell() - len(data), len(data)

    def _write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:  # of a disk that is full, the first call takes a part, and the second one says so
            left = left[self._file.write(left) :]


@dataclass(frozen=True)
class Values:
    """The values of items in a journal, each read when its turn comes; may be gone through again.

    Attributes:
        journal: Where they are noted.
        items: Those of which there is none are left out.
    """

    journal: Journal
    items: Iterable[Item]

    def __iter__(self) -> Iterator[tuple[Item, dict[str, Any]]]:
        """Each with its item."""
        for item in self.items:
            if value := self.journal.value(item):
                yield item, value


def _run_of(header: Mapping[str, Any]) -> str:
    """What names a run on each of its lines: runs with the same settings have the same name."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]


def _differing(found: Mapping[str, Any], header: Mapping[str, Any]) -> list[str]:
    """The settings in which a run that was found differs, if its header is of this version."""
    before, now = found.get("settings"), header["settings"]
    if found.get("schema_version") != SCHEMA_VERSION or not isinstance(before, dict):
        return ["schema_version"]
    compared = (key for key in {**before, **now} if key not in _OF_SOME or (key in before and key in now))
    return [key for key in compared if before.get(key) != now.get(key)]


def _opened(path: Path) -> io.FileIO:
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
    return io.FileIO(descriptor, "a+")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
