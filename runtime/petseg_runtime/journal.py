"""The journal of a run: a file beside its results that notes each one, from which ``--resume`` continues the run.

``.petseg-run.ndjson`` in the output folder has a header line with the settings that determine how results look, then
one line for each result that is in its place. A line cut off by a crash is ignored; so is one whose photo or result has
changed since.

Before a result is put beside the sources, a line says so, since a file there may also be the user's: see
:class:`OwnFiles`.

Runs that share the folder share the file: each run writes its own header, and each line names its run. If several
runs wrote to one path, the last line tells whose result is there. The entries of a file with all results are stored in
the journal itself, so that no other run replaces them.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import re
import stat
import threading
import time
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple, Self

from petseg_runtime.errors import OutputError
from petseg_runtime.files import STEM, real_paths, write_all
from petseg_runtime.sources import JOURNAL, Item

__all__ = ["JOURNAL", "Journal", "OwnFiles", "Values"]

SCHEMA_VERSION: Final = 2

#: Settings that only photos or only videos have: a run without photos or videos lacks one, and matches any value of it.
_OPTIONAL: Final = ("format", "video_format")

#: Every journal begins with these bytes.
_MAGIC: Final = b'{"schema_version": '

#: The names of incomplete files and folders that :mod:`petseg_runtime.files` leaves behind if the process is killed.
_PART: Final = re.compile(r"\.(.+)\.[0-9a-f]{8}\.part(?:\.\w+)?", re.DOTALL)

#: How often a lock is tried, and the seconds in between: a run that starts holds it exclusively for a moment, one that
#: resumes until its end.
_TRIES: Final = 5
_PAUSE: Final = 0.02


class _Note(NamedTuple):
    """One line of the journal without its value, which may be large and stays in the file.

    Attributes:
        source: The identity of the photo; see :meth:`Journal._identity`.
        size: Bytes of the file with the result; None: there is none.
        suffix: The suffix of that file; None: there is none.
        offset: The line's position in the file, in bytes.
        length: The line's length in bytes.
    """

    source: list[Any]
    size: int | None
    suffix: str | None
    offset: int
    length: int


class Journal:
    """The journal of one run. Use it as a context manager.

    Attributes:
        noted: The number of results that the interrupted run has noted; 0 for a new run.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, resume: bool) -> None:
        """Open the journal of an output folder: a new one, or with ``resume`` the existing one.

        Args:
            folder: The output folder, which exists.
            settings: The settings that determine how results look; JSON values.
            resume: Continue the existing journal. Incomplete files that a killed run left for an item are removed when
                :meth:`finished` is called for it; those of other items, which others may be writing, are not touched.

        Raises:
            OutputError: It cannot be written, another run is writing it, the runs in it had other settings, or it is
                not a journal: a symlink, not a regular file, or a file with other content.
        """
        self._folder, self._path, self._real = folder, folder / JOURNAL, real_paths()
        self._done: dict[str, _Note] = {}
        self._sources: dict[str, list[Any]] = {}  # identities of the photos, taken before they are read
        self._parts: dict[tuple[Path, str], list[Path]] = {}  # incomplete files by folder and (shortened) stem
        header = {"schema_version": SCHEMA_VERSION, "settings": dict(settings)}
        self._run = _run_of(header)
        self._appending = threading.Lock()
        self._file = _open(self._path)
        try:
            if resume:
                self._continue(header)
            else:
                self._start(header)
        except BaseException as error:
            self.close()
            if isinstance(error, OSError):
                raise OutputError(f"{self._path}: cannot be written ({error.strerror or error})") from error
            raise
        self.noted = len(self._done)

    def finished(self, item: Item, path: Path | None) -> bool:
        """Whether an item's result is noted, exists, is complete, and was made from the photo as it is now.

        Args:
            item: The photo.
            path: The file with its result; None if results share one file.
        """
        self._clear_parts_of(self._folder / item.name)
        if not self.knows(item):
            return False
        note = self._done[str(item.name)]
        if note.size is None and note.suffix is None:  # nothing was written; a file there is another run's
            return True
        return path is None or _size(path) == note.size

    def knows(self, item: Item) -> bool:
        """Whether a result is noted for an item as it is now, wherever that result may be."""
        # `add` notes this identity: if the photo changes while it is read, the next run segments it again.
        source = self._sources[str(item.name)] = self._identity(item)
        note = self._done.get(str(item.name))
        return note is not None and note.source == source

    def add(self, item: Item, path: Path | None, value: Mapping[str, Any] | None = None) -> None:
        """Note that an item's result is in its place.

        Args:
            item: The photo.
            path: The file with its result; None if results share one file.
            value: Its entry in a file that is written at the end, if there is one; JSON values.

        Raises:
            OutputError: The line cannot be written.
        """
        name = str(item.name)
        source = self._sources.get(name) or self._identity(item)
        size, suffix = (_size(path), path.suffix) if path else (None, None)
        line = {"run": self._run, "name": name, "source": source, "bytes": size, "suffix": suffix, "value": value}
        offset, length = self._note(line)
        self._done[name] = _Note(source, size, suffix, offset, length)

    def begin(self, path: Path) -> None:
        """Note that a result is about to be written, so that it is one of :class:`OwnFiles`. Called from any thread.

        Args:
            path: The file or folder, in the output folder.

        Raises:
            OutputError: The line cannot be written.
        """
        self._note({"run": self._run, "begun": str(path.relative_to(self._folder))})

    def value(self, item: Item) -> dict[str, Any] | None:
        """The value that :meth:`add` noted for an item, in this run or before; None if its photo has changed since.

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
            raise OutputError(f"{self._path}: changed by another program ({error}); run again with --resume") from error
        value: dict[str, Any] | None = line.get("value")
        return value

    def close(self) -> None:
        """Close the file; it stays for a later run."""
        with contextlib.suppress(OSError):  # a failed write was reported already, and fails here again
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self, header: dict[str, Any]) -> None:
        """Start a new journal; if another run is writing it, keep its lines and append the header to them."""
        alone = self._lock(fcntl.LOCK_EX)
        self._check_is_journal()
        if alone:
            self._file.truncate(0)
        # While this lock is held, no other run truncates the file.
        self._lock_until_closed(fcntl.LOCK_SH)
        self._append_header(header)

    def _continue(self, header: dict[str, Any]) -> None:
        """Continue the existing journal. No other run may be active, because its incomplete files would be removed.

        Raises:
            OutputError: Another run is active, or all runs in the journal had other settings.
        """
        self._lock_until_closed(fcntl.LOCK_EX)
        self._check_is_journal()
        self._find_parts()
        headers = self._load_all(header)
        agreeing = [found for found in headers if not _differences(found, header)]
        if self._done or agreeing:
            if self._run not in map(_run_of, agreeing):
                self._append_header(header)
            elif self._file.seek(0, os.SEEK_END):
                write_all(self._file, b"\n")  # ends a line that a crash cut off
        elif headers:
            self._reject(headers[-1], header)
        else:
            self._file.truncate(0)  # removes the fragment of a header that a crash cut off
            self._append_header(header)

    def _lock(self, kind: int) -> bool:
        """Lock the journal, and with it the folder; returns False if another run holds the lock.

        On a file system without locks, other runs cannot be detected.
        """
        try:
            fcntl.flock(self._file, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    def _lock_until_closed(self, kind: int) -> None:
        """Lock the folder: several runs may share it, but not with a resumed one, which removes incomplete files.

        Raises:
            OutputError: Another run holds the lock.
        """
        for _ in range(_TRIES):
            if self._lock(kind):
                return
            time.sleep(_PAUSE)
        raise OutputError(f"{self._folder}: another run is writing there; wait for it, or stop it")

    def _check_is_journal(self) -> None:
        """Reject a file that is not a journal. An empty file is accepted, and so is a header that a crash cut off.

        Raises:
            OutputError: It is not a journal.
        """
        begun = os.pread(self._file.fileno(), len(_MAGIC), 0)
        if not _MAGIC.startswith(begun):
            raise OutputError(
                f"{self._path}: not a journal of petseg, so it was not changed; move it away, or choose another "
                "--output"
            )

    def _load_all(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        """Load the complete lines of runs with these settings; returns the headers of all runs."""
        headers, own = [], {self._run}
        for offset, length, line in self._lines():
            if "settings" in line or "schema_version" in line:
                headers.append(line)
                if not _differences(line, header):
                    own.add(_run_of(line))
            elif isinstance(line.get("name"), str):
                self._load(line, offset, length, is_own=line.get("run") in own)
        return headers

    def _load(self, line: dict[str, Any], offset: int, length: int, *, is_own: bool) -> None:
        """Load one line. One of a run with other settings means that it replaced our result, if the paths are equal."""
        name, suffix = line["name"], line.get("suffix")
        if is_own:
            self._done[name] = _Note(line.get("source", []), line.get("bytes"), suffix, offset, length)
            return
        ours = self._done.get(name)
        if suffix is not None and ours and ours.suffix == suffix:  # both wrote a file
            del self._done[name]

    def _lines(self) -> Iterator[tuple[int, int, dict[str, Any]]]:
        """The complete lines: position and length in bytes, and the parsed JSON object."""
        with os.fdopen(os.dup(self._file.fileno()), "rb") as file:
            file.seek(0)
            yield from _lines_of(file)

    def _reject(self, found: Mapping[str, Any], header: Mapping[str, Any]) -> None:
        """Raise an error that names the settings in which the latest run differs.

        Raises:
            OutputError: Always.
        """
        before, now = found.get("settings"), header["settings"]
        if found.get("schema_version") != SCHEMA_VERSION or not isinstance(before, dict):
            raise OutputError(f"{self._path}: not a journal of this version of petseg; start again without --resume")
        changes = (f"{key} was {before.get(key)!r}, now {now.get(key)!r}" for key in _differences(found, header))
        raise OutputError(
            f"{self._folder}: the run there had other settings ({'; '.join(changes)}); resume it with those, or start "
            "again without --resume"
        )

    def _find_parts(self) -> None:
        """Find all incomplete files in the folder; removes that of the file with all results."""
        for where, _, names in os.walk(self._folder):
            for match in filter(None, map(_PART.fullmatch, names)):
                self._parts.setdefault((Path(where), match[1]), []).append(Path(where, match[0]))
        self._clear_parts_of(self._folder / "annotations")  # of the COCO sink, for all items

    def _clear_parts_of(self, name: Path) -> None:
        """Remove the incomplete files of a result, given its path without suffix: a file, several, or a folder."""
        if not self._parts:  # nearly always, and this is called for each of a million photos
            return
        files = re.compile(re.escape(name.name[:STEM]) + r"(-\d+)?")
        for key in [
            (at, stem) for at, stem in self._parts if at == name or (at == name.parent and files.fullmatch(stem))
        ]:
            for part in self._parts.pop(key):
                part.unlink(missing_ok=True)

    def _identity(self, item: Item) -> list[Any]:
        """JSON values that change with the photo: real path, size and modification time, or the SHA-256 of its data."""
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
            write_all(self._file, b"\n")  # ends a line that a crash cut off
        self._append(header)

    def _note(self, line: Mapping[str, Any]) -> tuple[int, int]:
        """Append a line like :meth:`_append`.

        Raises:
            OutputError: It cannot be written.
        """
        try:
            return self._append(line)
        except OSError as error:
            raise OutputError(f"{self._path}: cannot be written ({error.strerror or error})") from error

    def _append(self, line: Mapping[str, Any]) -> tuple[int, int]:
        """Append a line in one write, so that other runs' lines do not split it; returns its position and length."""
        data = (json.dumps(line) + "\n").encode()
        with self._appending:  # else the position may be that of another thread's line
            write_all(self._file, data)
            return self._file.tell() - len(data), len(data)


class OwnFiles(Container[Path]):
    """The files and folders in an output folder that petseg has written, or begun to, by its journal.

    Beside the sources, any other file may be the user's. The journal is read when this is asked for the first time:
    that of a million photos takes seconds.
    """

    def __init__(self, folder: Path) -> None:
        """Create the container.

        Args:
            folder: The output folder, which need not exist nor have a journal: then nothing there is petseg's own.
        """
        self._folder = folder

    def __contains__(self, path: object) -> bool:
        """Whether a path, spelled as below the output folder, was noted by any run."""
        return str(path) in self._paths

    @functools.cached_property
    def _paths(self) -> frozenset[str]:
        def opened(path: str, flags: int) -> int:
            return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)  # opening a pipe would block

        try:
            with io.BufferedReader(io.FileIO(self._folder / JOURNAL, opener=opened)) as file:
                names = map(_written, (line for _, _, line in _lines_of(file)))
                return frozenset(str(self._folder / name) for name in names if name is not None)
        except OSError:  # there is none, or the run will reject it
            return frozenset()


def _written(line: Mapping[str, Any]) -> str | None:
    """The path that a journal's line says is written or begun, in the output folder; None: it says nothing of that."""
    name, suffix, begun = line.get("name"), line.get("suffix"), line.get("begun")
    if isinstance(begun, str):
        return begun
    return f"{name}{suffix or ''}" if isinstance(name, str) else None


def _lines_of(file: BinaryIO) -> Iterator[tuple[int, int, dict[str, Any]]]:
    """The complete lines of an open journal: position and length in bytes, and the parsed JSON object."""
    offset = 0
    for text in file:
        line = None
        with contextlib.suppress(ValueError, RecursionError):  # cut off by a crash: that photo is done again
            line = json.loads(text)
        if isinstance(line, dict):
            yield offset, len(text), line
        offset += len(text)


@dataclass(frozen=True)
class Values:
    """An iterable over the values of items in a journal, read lazily; may be iterated over several times.

    Attributes:
        journal: The journal that has the values.
        items: The items; those without a value are skipped.
    """

    journal: Journal
    items: Iterable[Item]

    def __iter__(self) -> Iterator[tuple[Item, dict[str, Any]]]:
        """Yields each item that has a value, with the value."""
        for item in self.items:
            if value := self.journal.value(item):
                yield item, value


def _run_of(header: Mapping[str, Any]) -> str:
    """The name of a run on each of its lines: a hash of its settings, so runs with equal settings share it."""
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()[:16]


def _differences(found: Mapping[str, Any], header: Mapping[str, Any]) -> list[str]:
    """The names of the settings in which a header found in the journal differs; ``schema_version`` if that does."""
    before, now = found.get("settings"), header["settings"]
    if found.get("schema_version") != SCHEMA_VERSION or not isinstance(before, dict):
        return ["schema_version"]
    compared = (key for key in {**before, **now} if key not in _OPTIONAL or (key in before and key in now))
    return [key for key in compared if before.get(key) != now.get(key)]


def _open(path: Path) -> io.FileIO:
    """Open the journal, creating it if it is missing.

    The folder may come from somebody else, so symlinks are not followed: one could lead to a file of the user, which
    would be truncated.

    Raises:
        OutputError: It cannot be written, or is a symlink or not a regular file.
    """
    # O_NONBLOCK, because opening a pipe would block.
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if path.is_symlink():
            raise OutputError(f"{path}: a symlink, which is not followed; remove it") from error
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OutputError(f"{path}: not a regular file; remove it")
    return io.FileIO(descriptor, "a+")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None
