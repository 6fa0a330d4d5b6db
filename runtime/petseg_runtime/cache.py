"""A cache of compiled models.

An entry is two files, ``DIGEST.KIND`` and ``DIGEST.KIND.json``. DIGEST is the SHA-256 of a :class:`Key`, which contains
everything that a compiled file depends on; the JSON file has the key in plain text, and the SHA-256 of the compiled
file.

A compiled file is code. It is used only if its folder belongs to the user and nobody else may write to it, if the file
belongs to the user, and if it matches its JSON file; the bytes that were checked are the bytes that are loaded.
Anything that does not match is compiled again, and the reason is reported. If the cache cannot be used, only
compilation time is lost.

Nothing is removed automatically: another environment may still need the files of another version of a library.
``petseg cache`` shows the sizes, and clears the cache. The environment variable ``PETSEG_CACHE`` names a folder to use
instead of the user's cache folder for petseg; if it is empty, nothing is cached. Without a home folder, nothing is
cached either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
import fcntl
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import platformdirs

from petseg_runtime.errors import OutputError
from petseg_runtime.files import is_at, write_atomic

__all__ = [
    "KINDS",
    "VARIABLE",
    "Compiled",
    "Entry",
    "Key",
    "Slot",
    "cache_folder",
    "clear",
    "compiled",
    "entries",
    "no_folder",
]

VARIABLE: Final = "PETSEG_CACHE"

#: A TensorRT engine, an OpenVINO blob, the runtime cache of TensorRT for RTX, and a TensorRT timing cache.
KINDS: Final = ("engine", "blob", "kernels", "timings")

#: Version of the entries. It is part of every key: increment it also if the same key would give another compiled file.
SCHEMA_VERSION: Final = 1
MAX_SIDECAR: Final = 2**20

_ENTRY: Final = re.compile(rf"([0-9a-f]{{64}}\.({'|'.join(KINDS)}))(\.json|\.lock)?")
_UNFINISHED: Final = re.compile(r"\.[0-9a-f]{35}\.[0-9a-f]{8}\.part\.\w+")  # temporary files of files.replacing


@dataclass(frozen=True, kw_only=True)
class Key:
    """Everything that a compiled file depends on.

    Attributes:
        model: Identity of the model, a SHA-256.
        name: Name of the model, for people.
        engine: Name of the engine that runs it, as in ``--backend``.
        version: Version of the engine's library.
        device: The device that it is compiled for, as its driver describes it.
        driver: Version of the driver; "" if there is none.
        settings: Settings of the compilation; JSON values.
    """

    model: str
    name: str
    engine: str
    version: str
    device: str
    driver: str = ""
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """A canonical text: equal keys have equal texts."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}, sort_keys=True)

    def differs(self, other: Key) -> str:
        """Describe the difference if another key differs in versions only; "" if it is equal or differs in more."""
        if dataclasses.replace(other, version=self.version, driver=self.driver).text != self.text:
            return ""
        pairs = ((self.engine, self.version, other.version), ("driver", self.driver, other.driver))
        return ", ".join(f"{what} {mine} instead of {theirs}" for what, mine, theirs in pairs if mine != theirs)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """An entry of the cache.

    Attributes:
        path: The compiled file.
        size: Size in bytes, including its JSON file.
        key: What it depends on; None if unknown.
        created: When it was compiled, in ISO 8601; "" if unknown.
        sha256: Digest of the compiled file according to its JSON file; "" if unknown.
        environment: The engine's description of the compiled file; JSON values.
        problem: Why it will be compiled again, as far as is known without reading all of it; "" if it is valid.
    """

    path: Path
    size: int
    key: Key | None = None
    created: str = ""
    sha256: str = ""
    environment: dict[str, Any] = field(default_factory=dict)
    problem: str = ""

    @property
    def kind(self) -> str:
        """One of :data:`KINDS`; for an unfinished file, possibly ``json``."""
        return self.path.suffix.removeprefix(".")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled file, and whether it came from the cache.

    Attributes:
        data: Content of the file.
        environment: The engine's description of it; JSON values.
        seconds: Time that the compilation took; None: it was in the cache.
        why: Why it was compiled again; "" if it was compiled for the first time.
        not_kept: Why it could not be cached; "" if it was, or if there is no cache.
    """

    data: bytes = field(repr=False)
    environment: dict[str, Any]
    seconds: float | None = None
    why: str = ""
    not_kept: str = ""

    @property
    def note(self) -> str:
        """Where the file came from, as text for people."""
        if self.seconds is None:
            return "from the cache"
        again, reason = (" again", f": {self.why}") if self.why else ("", "")
        return f"compiled{again} in {self.seconds:.1f} s{reason}" + (self.not_kept and f"; not kept: {self.not_kept}")


@dataclass(frozen=True)
class Slot:
    """The place of one compiled file in the cache.

    Attributes:
        key: What the file depends on.
        kind: One of :data:`KINDS`.
    """

    key: Key
    kind: str

    def path(self, folder: Path) -> Path:
        """The path of the file in the cache's folder."""
        return folder / f"{hashlib.sha256(self.key.text.encode()).hexdigest()}.{self.kind}"

    def read(self) -> tuple[Compiled | None, str]:
        """Read the file; returns None and the reason if it cannot be used ("" if there is no file or no cache)."""
        folder = cache_folder()
        if folder is None or not os.path.lexists(folder):
            return None, ""
        path = self.path(folder)
        if not any(os.path.lexists(file) for file in (path, _sidecar(path))):
            return None, ""
        try:
            _check_own(folder)
            entry = _described(path)
            data = _read_own(path)
        except (OSError, ValueError) as error:
            return None, f"the cached file cannot be used ({_reason(error)})"
        if entry.key is None or entry.key.text != self.key.text:
            return None, "the cached file was compiled from or for something else"
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            return None, "the cached file's SHA-256 differs"
        return Compiled(data=data, environment=entry.environment), ""

    def write(self, data: bytes) -> str:
        """Write the file; returns the reason if that fails, "" if it succeeds or there is no cache."""
        folder = cache_folder()
        if folder is None:
            return ""
        try:
            _make_own(folder)
            with _locked(self.path(folder)):
                self._write(folder, data, {})
        except OSError as error:
            return _reason(error)
        return ""

    def _write(self, folder: Path, data: bytes, environment: dict[str, Any]) -> None:
        """Write the JSON file last: a compiled file without it, or with another digest than it states, is not used."""
        path = self.path(folder)
        write_atomic(path, data)
        described = {
            "schema_version": SCHEMA_VERSION,
            "key": dataclasses.asdict(self.key),
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "created": datetime.datetime.now(datetime.UTC).isoformat(),
            "environment": environment,
        }
        write_atomic(_sidecar(path), json.dumps(described, indent=2).encode())


def cache_folder() -> Path | None:
    """The folder of the cache; None: nothing is cached."""
    asked = os.environ.get(VARIABLE)
    if asked == "":
        return None
    place = Path(asked).absolute() if asked else _users_folder()
    return place and place / "engines"


def no_folder() -> str:
    """Why there is no folder although caching is wanted; "" if there is one, or if caching is not wanted."""
    wanted = os.environ.get(VARIABLE) != ""
    return f"there is no home folder; set {VARIABLE} to a folder" if wanted and cache_folder() is None else ""


def _users_folder() -> Path | None:
    """The user's cache folder for petseg; None if the system does not know the user (in a container)."""
    try:
        place = platformdirs.user_cache_path("petseg")
    except RuntimeError:
        return None
    return place if place.is_absolute() else None  # older versions of platformdirs return a relative path, "~/..."


def compiled(
    slot: Slot,
    make: Callable[[], tuple[bytes, dict[str, Any]]],
    *,
    again: str = "",
    wait: Callable[[], None] = lambda: None,
) -> Compiled:
    """Return a compiled file from the cache, or compile it and add it to the cache.

    If several processes or threads need the same file at the same time, one compiles it and the others wait.

    Args:
        slot: The file's place in the cache.
        make: Compiles the file; returns its content and a description (JSON values).
        again: Why a cached file must not be used; "" if it may.
        wait: Called before waiting for another process or thread that compiles the file.

    Raises:
        Exception: Any exception of ``make``. If the cache cannot be used, that is not an error.
    """
    kept, why = (None, again) if again else slot.read()
    if kept:
        return kept
    folder, outdated, not_kept = cache_folder(), "", no_folder()
    with contextlib.ExitStack() as held:
        if folder is not None:
            try:
                _make_own(folder)
                held.enter_context(_locked(slot.path(folder), wait))
                outdated = _outdated(folder, slot)
            except OSError as error:
                folder, not_kept = None, _reason(error)
        if folder is not None and not again:
            kept, why = slot.read()  # another process may have compiled it in the meantime
            if kept:
                return kept
        start = time.monotonic()
        data, environment = make()
        seconds = time.monotonic() - start
        if folder is not None:
            try:
                slot._write(folder, data, environment)
            except OSError as error:
                not_kept = _reason(error)
    return Compiled(data=data, environment=environment, seconds=seconds, why=why or outdated, not_kept=not_kept)


def entries() -> list[Entry]:
    """The entries of the cache, the newest last, with unfinished and damaged files, but without foreign files.

    Raises:
        OutputError: The folder cannot be read.
    """
    folder = cache_folder()
    try:
        if folder is None or _is_missing(folder):
            return []
        names = sorted(file.name for file in _ours(folder))
        paths = dict.fromkeys(folder / found[1] for name in names if (found := _ENTRY.fullmatch(name)))
        kept = [entry for path in paths if (entry := _entry(path)).size]  # a lock file alone is not an entry
        unfinished = [folder / name for name in names if _UNFINISHED.fullmatch(name)]
        kept += [Entry(path=path, size=_size(path), problem="not finished") for path in unfinished]
    except OSError as error:
        raise OutputError(f"{folder}: the cache cannot be read ({_reason(error)})") from error
    return sorted(kept, key=lambda entry: entry.created)


def clear() -> tuple[int, int]:
    """Remove all files of the cache, but no foreign files; links are removed, not followed.

    Returns:
        The number of removed files, and their total size in bytes.

    Raises:
        OutputError: The folder belongs to another user, or some files cannot be removed; all others are.
    """
    folder, count, size = cache_folder(), 0, 0
    if folder is None:
        return 0, 0
    failures = []
    try:
        if _is_missing(folder):
            return 0, 0
        _check_own(folder)
        for file in _ours(folder):
            try:
                size_of = file.stat(follow_symlinks=False).st_size
                if not _remove(Path(file.path)):
                    continue
            except FileNotFoundError:  # another process has removed it
                continue
            except OSError as error:
                failures.append(f"{file.path}: {_reason(error)}")
                continue
            count, size = count + 1, size + size_of
    except OSError as error:
        raise OutputError(f"{folder}: the cache cannot be cleared ({_reason(error)})") from error
    if failures:
        raise OutputError(f"not removed: {'; '.join(failures)} ({count} other files were)")
    return count, size


def _entry(path: Path) -> Entry:
    """The entry at a path, complete or not."""
    size = _size(path) + _size(_sidecar(path))
    try:
        entry, there = _described(path), path.lstat().st_size
    except (OSError, ValueError) as error:
        return Entry(path=path, size=size, problem=_reason(error))
    problem = "" if there == entry.size else "its size differs"
    return dataclasses.replace(entry, size=size, problem=problem)


def _described(path: Path) -> Entry:
    """Read an entry from its JSON file; its size is that of the compiled file alone.

    Raises:
        OSError: The JSON file cannot be read, or belongs to another user.
        ValueError: It was not written by petseg, or is damaged.
    """
    text = _read_own(_sidecar(path), MAX_SIDECAR)
    try:
        raw = json.loads(text)
        version = raw["schema_version"]
        key, created, sha256, environment = Key(**raw["key"]), raw["created"], raw["sha256"], raw["environment"]
        words = (key.model, key.name, key.engine, key.version, key.device, key.driver, sha256)
        types_fit = all(isinstance(word, str) for word in words) and isinstance(raw["bytes"], int)
        dated = datetime.datetime.fromisoformat(created).tzinfo is not None
        if not (types_fit and dated and isinstance(key.settings, dict) and isinstance(environment, dict)):
            raise TypeError("wrong types")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("its description is damaged") from error
    if version != SCHEMA_VERSION:
        raise ValueError("it was written by another version of petseg")
    return Entry(path=path, size=raw["bytes"], key=key, created=created, sha256=sha256, environment=environment)


def _outdated(folder: Path, slot: Slot) -> str:
    """How the newest entry that differs from the slot's key in versions only differs from it; "": there is none."""
    others = [
        entry
        for file in _ours(folder)
        if file.name.endswith(f".{slot.kind}.json") and (entry := _entry(folder / file.name.removesuffix(".json"))).key
    ]
    for entry in sorted(others, key=lambda entry: entry.created, reverse=True):
        if entry.key and (words := slot.key.differs(entry.key)):
            return words
    return ""


def _size(path: Path) -> int:
    """Size in bytes; 0 if the file does not exist, or no longer exists."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _is_missing(folder: Path) -> bool:
    """Whether there is no folder yet; raises OSError if there cannot be one, because its parent is a file."""
    try:
        folder.lstat()
    except FileNotFoundError:
        return True
    return False


def _ours(folder: Path) -> list[os.DirEntry[str]]:
    """The files in the cache's folder whose names are those of the cache; links are not followed."""
    with os.scandir(folder) as files:
        found = [file for file in files if not file.is_dir(follow_symlinks=False)]
    return [file for file in found if _ENTRY.fullmatch(file.name) or _UNFINISHED.fullmatch(file.name)]


def _make_own(folder: Path) -> None:
    """Create the cache's folder if necessary, and check that it belongs to the user.

    Raises:
        OSError: It cannot be created, belongs to another user, or others may write to it.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_own(folder)


def _check_own(folder: Path) -> None:
    """Raise an ``OSError`` if a folder belongs to another user, or if others may write to it."""
    found = folder.stat()
    if found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, f"{folder} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, f"other users may write to {folder}: run chmod go-w on it, or remove it")


def _read_own(path: Path, limit: int | None = None) -> bytes:
    """Read a regular file that belongs to the user; links are not followed.

    Raises:
        OSError: It is not such a file, is larger than ``limit`` bytes, or cannot be read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # nonblocking: opening a pipe would wait
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, f"{path.name} is not a regular file")
        if found.st_uid != os.getuid():
            raise PermissionError(errno.EPERM, f"{path.name} belongs to another user")
        if limit is not None and found.st_size > limit:
            raise OSError(errno.EFBIG, f"{path.name} has more than {limit} bytes")
        return file.read()


@contextlib.contextmanager
def _locked(path: Path, wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Lock an entry against all other processes and threads; the system releases the lock if this process dies.

    Args:
        path: The entry.
        wait: Called before waiting for another process or thread that has locked it.

    Raises:
        OSError: The file system does not support locks, or cannot be written to.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = path.with_name(f"{path.name}.lock")
    while True:
        lock = os.open(file, flags, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                wait()
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_at(lock, file):  # the cache was cleared meanwhile, so that this lock excludes nobody
                continue
            yield
            return
        finally:
            os.close(lock)


def _remove(file: Path) -> bool:
    """Remove a file, except a lock file that is held: another process would then compile the same model concurrently.

    Returns:
        Whether the file was removed.

    Raises:
        OSError: It cannot be removed.
    """
    if file.suffix != ".lock" or file.is_symlink():  # lock files of the cache are never links
        file.unlink()
        return True
    lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # the file system does not support locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        file.unlink()  # while the lock is held: a waiting process will notice that the file is gone
        return True
    finally:
        os.close(lock)


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
