"""Compiled models, kept for the next time.

An entry is two files, ``DIGEST.KIND`` and ``DIGEST.KIND.json``. DIGEST is the SHA-256 of a :class:`Key`, which names
all that a compiled file depends on; the JSON has the key in clear, and the file's own SHA-256.

A compiled file is code. It is used only if it lies in a folder that belongs to the user and that nobody else may write
to, belongs to the user itself, and is what its JSON says; the bytes that were checked are those that are loaded.
Whatever does not fit is compiled again, and the reason said. A cache that cannot be used costs time, not results.

Nothing is removed on its own: what another version of a library left may still be wanted by another environment.
``petseg cache`` shows the sizes, and clears. The environment variable ``PETSEG_CACHE`` names another folder than the
user's cache folder for petseg; if it is empty, nothing is kept. Without a home folder, or away from POSIX, nothing is
kept either.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import errno
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

#: An engine of TensorRT, a compiled model of OpenVINO, kernels of TensorRT for RTX, and what TensorRT has timed.
KINDS: Final = ("engine", "blob", "kernels", "timings")

#: Of the entries; part of every key, so to be raised as well when the same key would give another compiled file.
SCHEMA_VERSION: Final = 1
MAX_SIDECAR: Final = 2**20

_ENTRY: Final = re.compile(rf"([0-9a-f]{{64}}\.({'|'.join(KINDS)}))(\.json|\.lock)?")
_UNFINISHED: Final = re.compile(r"\.[0-9a-f]{35}\.[0-9a-f]{8}\.part\.\w+")  # of files.replacing


@dataclass(frozen=True, kw_only=True)
class Key:
    """All that a compiled file depends on.

    Attributes:
        model: Identity of what is compiled, a SHA-256.
        name: What people call it.
        engine: What runs it, as ``--backend`` calls it.
        version: Of the engine's library.
        device: What it is compiled for, as its driver describes it.
        driver: Its version; "" if there is none.
        settings: How it is compiled; JSON values.
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
        """The same text for the same key."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}, sort_keys=True)

    def differs(self, other: Key) -> str:
        """How another key that is the same but for versions differs, in words; "" if more does, or nothing."""
        if dataclasses.replace(other, version=self.version, driver=self.driver).text != self.text:
            return ""
        pairs = ((self.engine, self.version, other.version), ("driver", self.driver, other.driver))
        return ", ".join(f"{what} {mine} instead of {theirs}" for what, mine, theirs in pairs if mine != theirs)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One file that is kept.

    Attributes:
        path: The compiled file.
        size: Bytes, with what belongs to it.
        key: What it depends on; None if that cannot be told.
        created: When it was compiled, in ISO 8601; "" if that cannot be told.
        sha256: Of the compiled file, by what describes it; likewise.
        environment: What its maker said of it; JSON values.
        problem: Why it will be compiled again, as far as that can be told without reading all of it; "" if it is well.
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
        """One of :data:`KINDS`; of a file that is not finished, maybe ``json``."""
        return self.path.suffix.removeprefix(".")


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """A compiled file, and whether it came from the cache.

    Attributes:
        data: The file.
        environment: What its maker said of it; JSON values.
        seconds: That compiling took; None: it was in the cache.
        why: Why it was compiled again; "" if for the first time.
        not_kept: Why it could not be kept; "" if it is, or shall not be.
    """

    data: bytes = field(repr=False)
    environment: dict[str, Any]
    seconds: float | None = None
    why: str = ""
    not_kept: str = ""

    @property
    def note(self) -> str:
        """Where it came from, for people."""
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
        """Of the file, in the cache's folder."""
        return folder / f"{hashlib.sha256(self.key.text.encode()).hexdigest()}.{self.kind}"

    def read(self) -> tuple[Compiled | None, str]:
        """What is kept; or None, and why it cannot be used ("": there is nothing, or no cache)."""
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
            return None, f"the cached file cannot be used ({_words(error)})"
        if entry.key is None or entry.key.text != self.key.text:
            return None, "the cached file was compiled from or for something else"
        if hashlib.sha256(data).hexdigest() != entry.sha256:
            return None, "the cached file's SHA-256 differs"
        return Compiled(data=data, environment=entry.environment), ""

    def write(self, data: bytes) -> str:
        """Keep a file; returns why it cannot be, "" if it is, or if there is no cache."""
        folder = cache_folder()
        if folder is None:
            return ""
        try:
            _make_own(folder)
            with _alone(self.path(folder)):
                self._write(folder, data, {})
        except OSError as error:
            return _words(error)
        return ""

    def _write(self, folder: Path, data: bytes, environment: dict[str, Any]) -> None:
        """What describes the file comes last: without it, or beside another file than it names, nothing is used."""
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
    """Where compiled files are kept; None: nowhere."""
    asked = os.environ.get(VARIABLE)
    if asked == "" or os.name != "posix":  # elsewhere, owners and modes say less
        return None
    place = Path(asked).absolute() if asked else _users_folder()
    return place and place / "engines"


def no_folder() -> str:
    """Why there is no folder although files shall be kept; "" if there is one, or they shall not."""
    wanted = os.environ.get(VARIABLE) != "" and os.name == "posix"
    return f"there is no home folder; {VARIABLE} names another" if wanted and cache_folder() is None else ""


def _users_folder() -> Path | None:
    """The user's cache folder for petseg; None where the system does not know the user (a container)."""
    try:
        place = platformdirs.user_cache_path("petseg")
    except RuntimeError:
        return None
    return place if place.is_absolute() else None  # an older platformdirs names a folder "~" in the current one


def compiled(slot: Slot, make: Callable[[], tuple[bytes, dict[str, Any]]], *, again: str = "") -> Compiled:
    """A compiled file from the cache, or made and kept there.

    Of several processes or threads that want the same one at the same time, one compiles and the others wait for it.

    Args:
        slot: Where it is kept.
        make: Compiles it; returns the file, and what there is to say of it (JSON values).
        again: Why what is in the cache must not be used; "" if it may.

    Raises:
        Exception: What ``make`` raises. A cache that cannot be used is no error.
    """
    kept, why = (None, again) if again else slot.read()
    if kept:
        return kept
    folder, outdated, not_kept = cache_folder(), "", no_folder()
    with contextlib.ExitStack() as held:
        if folder is not None:
            try:
                _make_own(folder)
                held.enter_context(_alone(slot.path(folder)))
                outdated = _outdated(folder, slot)
            except OSError as error:
                folder, not_kept = None, _words(error)
        if folder is not None and not again:
            kept, why = slot.read()  # somebody else may have compiled it in the meantime
            if kept:
                return kept
        start = time.monotonic()
        data, environment = make()
        seconds = time.monotonic() - start
        if folder is not None:
            try:
                slot._write(folder, data, environment)
            except OSError as error:
                not_kept = _words(error)
    return Compiled(data=data, environment=environment, seconds=seconds, why=why or outdated, not_kept=not_kept)


def entries() -> list[Entry]:
    """All that lies in the cache, the newest last; unfinished and damaged files too, but nothing that is not ours.

    Raises:
        OutputError: The folder cannot be read.
    """
    folder = cache_folder()
    try:
        if folder is None or not folder.exists():
            return []
        names = sorted(file.name for file in _ours(folder))
        paths = dict.fromkeys(folder / found[1] for name in names if (found := _ENTRY.fullmatch(name)))
        kept = [entry for path in paths if (entry := _entry(path)).size]  # a lock alone is empty, and no entry
        unfinished = [folder / name for name in names if _UNFINISHED.fullmatch(name)]
        kept += [Entry(path=path, size=_size(path), problem="not finished") for path in unfinished]
    except OSError as error:
        raise OutputError(f"{folder}: the cache cannot be read ({_words(error)})") from error
    return sorted(kept, key=lambda entry: entry.created)


def clear() -> tuple[int, int]:
    """Remove all that lies in the cache and is ours; links are removed, not followed.

    Returns:
        How many files, and their bytes.

    Raises:
        OutputError: The folder belongs to somebody else, or something in it cannot be removed; the rest is.
    """
    folder, count, size = cache_folder(), 0, 0
    if folder is None or not os.path.lexists(folder):
        return 0, 0
    failures = []
    try:
        _check_own(folder)
        for file in _ours(folder):
            try:
                size_of = file.stat(follow_symlinks=False).st_size
                if not _removed(Path(file.path)):
                    continue
            except FileNotFoundError:  # somebody else was quicker
                continue
            except OSError as error:
                failures.append(f"{file.path}: {_words(error)}")
                continue
            count, size = count + 1, size + size_of
    except OSError as error:
        raise OutputError(f"{folder}: the cache cannot be cleared ({_words(error)})") from error
    if failures:
        raise OutputError(f"not removed: {'; '.join(failures)} ({count} other files were)")
    return count, size


def _entry(path: Path) -> Entry:
    """What lies at the place of an entry, whole or not."""
    size = _size(path) + _size(_sidecar(path))
    try:
        entry, there = _described(path), path.lstat().st_size
    except (OSError, ValueError) as error:
        return Entry(path=path, size=size, problem=_words(error))
    problem = "" if there == entry.size else "its size differs"
    return dataclasses.replace(entry, size=size, problem=problem)


def _described(path: Path) -> Entry:
    """An entry by the JSON beside it; its size without that.

    Raises:
        OSError: The JSON cannot be read, or is not the user's own.
        ValueError: It is not what we write.
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
            raise TypeError("other types than we write")
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError("its description is damaged") from error
    if version != SCHEMA_VERSION:
        raise ValueError("it was written by another version of petseg")
    return Entry(path=path, size=raw["bytes"], key=key, created=created, sha256=sha256, environment=environment)


def _outdated(folder: Path, slot: Slot) -> str:
    """How the newest entry that is the same but for versions differs from the one that is asked for; "": none does."""
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
    """Bytes; 0 of what is not there, or not any more."""
    try:
        return path.lstat().st_size
    except FileNotFoundError:
        return 0


def _sidecar(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _ours(folder: Path) -> list[os.DirEntry[str]]:
    """The files in the cache's folder that have names which we give; links count as what they are."""
    with os.scandir(folder) as files:
        found = [file for file in files if not file.is_dir(follow_symlinks=False)]
    return [file for file in found if _ENTRY.fullmatch(file.name) or _UNFINISHED.fullmatch(file.name)]


def _make_own(folder: Path) -> None:
    """Make the cache's folder, or see that it is the user's own.

    Raises:
        OSError: It cannot be made, or is not.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    _check_own(folder)


def _check_own(folder: Path) -> None:
    """Raise the ``OSError`` of a folder that is not the user's own, or that others may write to."""
    found = folder.stat()
    if found.st_uid != os.getuid():
        raise PermissionError(errno.EPERM, f"{folder} belongs to another user")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(errno.EPERM, f"others may write to {folder}; chmod go-w it, or remove it")


def _read_own(path: Path, limit: int | None = None) -> bytes:
    """A regular file of the user's own; links are not followed.

    Raises:
        OSError: It is none, or larger than ``limit`` bytes, or cannot be read.
    """
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC  # opening a pipe would wait for its writer
    with os.fdopen(os.open(path, flags), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, f"{path.name} is not a file")
        if found.st_uid != os.getuid():
            raise PermissionError(errno.EPERM, f"{path.name} belongs to another user")
        if limit is not None and found.st_size > limit:
            raise OSError(errno.EFBIG, f"{path.name} has more than {limit} bytes")
        return file.read()


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Keep all other processes and threads from writing an entry; the system lets go if this process dies.

    Raises:
        OSError: The file system has no locks, or cannot be written to.
    """
    import fcntl  # POSIX only

    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    file = path.with_name(f"{path.name}.lock")
    while True:
        lock = os.open(file, flags, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_at(lock, file):  # somebody cleared the cache meanwhile: this one keeps nobody out
                continue
            yield
            return
        finally:
            os.close(lock)


def _removed(file: Path) -> bool:
    """Remove a file, but no lock that somebody holds: the next one would compile the same at the same time.

    Raises:
        OSError: It cannot be removed.
    """
    import fcntl  # POSIX only

    if file.suffix != ".lock" or file.is_symlink():  # no lock of ours is a link
        file.unlink()
        return True
    lock = os.open(file, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        file.unlink()  # while it is held: who waits for it will see that it is gone
        return True
    finally:
        os.close(lock)


def _words(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
