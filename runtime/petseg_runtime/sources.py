"""Finds photos and videos: in files, folders, patterns, cameras, streams and standard input.

Each gets the name of its result. Of files, at most the first bytes are read here, to tell videos from photos.
"""

from __future__ import annotations

import glob
import io
import os
import re
import stat
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import IO, Final

from petseg_runtime.errors import InputError, UsageError
from petseg_runtime.images import HEIF_BRANDS, drained

__all__ = [
    "IMAGE_SUFFIXES",
    "JOURNAL",
    "RESULTS",
    "STDIN",
    "VIDEO_SUFFIXES",
    "Item",
    "Origin",
    "distinct",
    "find_photos",
    "from_pipe",
    "is_video",
    "raw_video",
    "redacted",
    "stream_origin",
]

#: Standard input, on the command line.
STDIN: Final = Path("-")

#: The default output folder, and the journal of a run over several files in it. Searches skip such folders: otherwise a
#: second run would segment the results of the first.
RESULTS: Final = "petseg-output"
JOURNAL: Final = ".petseg-run.ndjson"

#: The suffixes of photos that a search finds; a file that is named explicitly is tried whatever its suffix. HEIC, the
#: photos of iPhones, needs a plug-in for Pillow: found in any case, so that unreadable ones are reported and counted.
IMAGE_SUFFIXES: Final = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".ppm"),
        *(".tif", ".tiff", ".webp"),
    }
)

#: The suffixes of videos that a search finds.
VIDEO_SUFFIXES: Final = frozenset(
    {
        *(".3g2", ".3gp", ".asf", ".avi", ".dv", ".f4v", ".flv", ".h264", ".h265", ".hevc", ".m2ts", ".m4v", ".mkv"),
        *(".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
    }
)

#: Suffixes of other files that often lie beside photos and videos; a search skips them without mention.
_COMPANIONS: Final = frozenset(
    {
        *(".aae", ".csv", ".db", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".ndjson", ".pdf", ".toml"),
        *(".txt", ".url", ".xml", ".xmp", ".yaml", ".yml"),
    }
)
#: At most this many of all other suffixes are listed in the note on skipped files.
_MAX_LISTED: Final = 5

#: This many bytes at the beginning of a file tell whether it is a video: three packets of MPEG-TS begin in them.
_HEAD: Final = 400

#: Suffixes of MPEG-TS that are also those of TypeScript.
_TYPESCRIPT: Final = frozenset({".ts", ".mts"})
#: The possible sizes of an MPEG-TS packet in bytes: plain, with a leading timestamp (M2TS), with trailing error
#: correction. Each begins with the sync byte "G"; this many at equal distances do not occur in text.
_PACKET_SIZES: Final = (188, 192, 204)
_SYNC_BYTES: Final = 5


@dataclass(frozen=True)
class Origin:
    """One video or stream to segment.

    Attributes:
        target: What FFmpeg opens (it may contain a password), or a pipe.
        shown: The target for messages and logs, without user, password and query; see :func:`redacted`.
        name: The path of its results relative to the output folder, without suffix.
        container: FFmpeg's name of the container format; None: detected.
        options: Options for FFmpeg; None: a local file, from which FFmpeg may open no other files or URLs.
        endless: Whether it is a camera or live stream: frames may be dropped, connections may break.
    """

    target: str | IO[bytes]
    shown: str
    name: PurePath
    container: str | None = None
    options: Mapping[str, str] | None = None
    endless: bool = False


@dataclass(frozen=True)
class Item:
    """One photo, or video file, to segment.

    Attributes:
        source: Its path; :data:`STDIN` for standard input.
        name: The path of its result relative to the output folder, without suffix; unique among items.
        problem: Why it cannot be read, if that is known beforehand (a folder without permission to list it, a pipe
            found by a search).
        data: The encoded image, if it is not in the file ``source``.
        found: Whether a search found it, in a folder or by a pattern, rather than the user naming it.
    """

    source: Path
    name: PurePath
    problem: str | None = None
    data: bytes | None = None
    found: bool = False


def find_photos(
    paths: Sequence[Path],
    output: Path | None = None,
    suffixes: frozenset[str] = IMAGE_SUFFIXES,
    pipe: bytes | None = None,
    tell: Callable[[str], None] = lambda text: None,
) -> list[Item]:
    """Find the photos to segment, in a stable order, with unique names that keep the structure of the folders.

    A result is named after its photo's stem. Photos with the same stem (``cat.jpg`` and ``cat.png``) keep their suffix
    as part of the name (``cat.jpg.png`` and ``cat.png.png``), and names that still collide are numbered. The names
    depend on the arguments and the contents of the folders only, so a second run gives the same ones.

    Args:
        paths: Files, folders to search with all their subfolders, patterns such as ``photos/**/*.jpg`` (for shells
            that do not expand them), and ``-`` for an image on standard input. With several folders, each folder's name
            is the first part of its results' names; for a pattern, names are relative to its part without wildcards. A
            search does not follow links to folders, and skips folders with results of petseg, unless they are named
            explicitly.
        output: The output folder, which a search skips. It must not be one of the folders to search; below one, it must
            contain nothing but results.
        suffixes: The suffixes of files that a search finds.
        pipe: The data from standard input; None: read it here.
        tell: Called with a text for each skipped folder that may be missed, and one with the number of skipped files
            by suffix.

    Returns:
        One item per photo. A path that does not exist is an item, too: it will fail and be counted.

    Raises:
        UsageError: Standard input is given twice; or ``output`` is where a later search would take results for photos,
            or photos for results.
        InputError: Standard input is closed.
    """
    if sum(path == STDIN for path in paths) > 1:
        raise UsageError("standard input (-) can be given only once")
    several = sum(path != STDIN and _is_folder(path) for path in paths) > 1
    search = _Search(os.path.realpath(output) if output else None, suffixes)  # Path.resolve raises on a loop of links
    found: list[tuple[Path, PurePath, str | None]] = []
    named: set[int] = set()  # indices of those named explicitly
    for path in paths:
        if path == STDIN:
            named.add(len(found))
            found.append((path, PurePath("stdin"), None))
        elif _is_folder(path):
            search.check_is_not_output(path)
            own_name = PurePath(path.resolve().name or "root")
            prefix = own_name if several else PurePath()
            for file, problem in search.below(path):
                relative = prefix / file.relative_to(path)
                found.append((file, relative if relative.name else own_name, problem))
        elif glob.has_magic(str(path)) and not os.path.lexists(path):
            found += search.matching(path)
        else:
            named.add(len(found))
            found.append((path, PurePath(path.name), None))
    # A pattern or an explicit name may have found a file that another search has skipped.
    search.others.difference_update(str(file) for file, _, _ in found)
    for what in search.notes():
        tell(what)
    names = _unique([relative for _, relative, _ in found])
    items = []
    for number, ((file, _, problem), name) in enumerate(zip(found, names, strict=True)):
        if file == STDIN and number in named:
            items.append(Item(file, name, problem, from_pipe()[1] if pipe is None else pipe))
        else:  # a pattern may have found a file with that name
            file = file.absolute() if file == STDIN else file
            items.append(Item(file, name, problem, found=number not in named))
    return items


def stream_origin(text: str, options: Mapping[str, str] | None = None) -> Origin | None:
    """Parse a source that is not a file's path: a camera's number or device, a URL, or ``lavfi:GRAPH``.

    Args:
        text: As on the command line.
        options: Additional options for FFmpeg (``rtsp_transport=udp``, ``video_size=1280x720``); they override ours.

    Returns:
        The source, endless unless it is a video file on a server; None if the text is a path.

    Raises:
        UsageError: The URL is that of a photo, by its suffix. Some streaming cameras have such URLs, too: with
            ``options``, which apply to streams only, it is taken for a camera.
    """
    given = dict(options or {})
    if text.startswith("lavfi:"):  # FFmpeg's generator of test pictures, as a camera for tests
        return Origin(text[6:], text, PurePath("lavfi"), "lavfi", given, endless=True)
    device = f"/dev/video{text}" if text.isdecimal() and not os.path.lexists(text) else text
    if re.fullmatch(r"/dev/video\d+", device):
        return Origin(device, device, PurePath(Path(device).name), "v4l2", given, endless=True)
    # Not urlsplit, which raises on brackets that are not of an IPv6 address, such as one in a password.
    scheme = text.partition(":")[0].lower() if "://" in text else ""
    if not re.fullmatch(r"[a-z][a-z\d+.-]*", scheme, re.ASCII) or scheme == "file":
        return None
    shown = redacted(text)
    name = PurePath(_file_name(shown))
    path = re.split(r"[?#]", text.partition("://")[2], maxsplit=1)[0].partition("/")[2]
    suffix = PurePath(path).suffix.lower() if scheme in ("http", "https") else ""
    if suffix in IMAGE_SUFFIXES and not given:
        raise UsageError(
            f"{shown}: a photo on a server, by its suffix; download it first (curl -s URL | petseg infer -), or if it "
            "is a streaming camera, pass an option for streams (--input-option seekable=0)"
        )
    target = scheme + text[len(scheme) :]  # FFmpeg does not know RTSP:// and HTTP://
    if suffix in VIDEO_SUFFIXES - {".ts"}:
        return Origin(target, shown, name.with_suffix(""), None, given)
    usual = {"rtsp_transport": "tcp"} if scheme in ("rtsp", "rtsps") else {}
    return Origin(target, shown, name, None, {"analyzeduration": "2000000", **usual, **given}, endless=True)


#: Credentials that some cameras expect in the path of a URL: ``user=admin&password=secret&channel=1``,
#: ``/token=secret/live``. A value that contains a slash extends to the next ``&``.
_SECRET: Final = re.compile(
    r"((?:user|usr|login|pass|pwd|token|key|auth|secret)[\w-]*(?:=|%3d))[^&/]*(?:/[^&]*(?=&))?", re.IGNORECASE
)


def redacted(url: str) -> str:
    """A URL without user, password, query and fragment, which may be secret, and without named secrets in its path.

    Also recognises passwords that contain ``/``, ``?`` or ``#``, which ought to be encoded; in doubt, keeps only the
    scheme.
    """
    scheme, _, rest = url.partition("://")
    if not rest:
        return url
    shown, asked = re.match(r"([^?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr] # it always matches
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    clear = "/" in shown and re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d+)?", authority.rpartition("@")[2])
    if "@" in asked and ":" in authority and not clear:  # user:pass?word@host
        return f"{scheme}://***"
    if _SECRET.search(shown[len(authority) :].rpartition("@")[0]):  # text after the @ may be the end of the password
        return f"{scheme}://***"
    if "@" in authority or ":" in shown.rpartition("@")[0]:
        shown = "***@" + shown.rpartition("@")[2]
    return f"{scheme}://" + _SECRET.sub(r"\1***", shown) + ("?***" if asked else "")


def _file_name(shown: str) -> str:
    """The name of a stream's results: its host and path."""
    rest = shown.partition("://")[2].removeprefix("***@").removesuffix("?***")
    return re.sub(r"[^\w.-]+", "-", rest).strip("-.")[:100] or "stream"


def is_video(item: Item) -> bool:
    """Whether to read a file as a video: decided by its suffix, or if that is unknown, by its first bytes."""
    suffix = item.source.suffix.lower()
    if item.data is not None or suffix in IMAGE_SUFFIXES:
        return False
    if suffix in VIDEO_SUFFIXES:
        return True
    try:
        if item.problem or not item.source.is_file():
            return False
        with item.source.open("rb") as file:
            return _begins_a_video(file.read(_HEAD))
    except OSError:  # reading it as a photo will say why
        return False


def _begins_a_video(head: bytes) -> bool:
    """Whether a file is a video, by its signature: MP4 (not HEIF, AVIF), Matroska, AVI, FLV, Ogg, MPEG or yuv4mpeg."""
    if head[4:8] == b"ftyp":
        return head[8:12] not in (b"avif", b"avis", *HEIF_BRANDS)
    if head[:4] == b"RIFF":
        return head[8:12] == b"AVI "
    starts = (b"\x1a\x45\xdf\xa3", b"FLV", b"OggS", b"\x00\x00\x01\xba", b"YUV4MPEG2")
    return head.startswith(starts) or head[:377:188] == b"GGG"  # sync bytes of MPEG-TS; a GIF may match two by chance


def _is_transport_stream(file: Path) -> bool:
    """Whether a file is MPEG-TS, not TypeScript; also if it cannot be read, since reading it will report that.

    It may begin in the middle of a packet, as recordings do.
    """
    try:
        if not file.is_file():
            return True
        with file.open("rb") as opened:
            head = opened.read(_PACKET_SIZES[-1] * (_SYNC_BYTES + 1))
    except OSError:
        return True
    return any(head[at::size][:_SYNC_BYTES] == b"G" * _SYNC_BYTES for size in _PACKET_SIZES for at in range(size))


class Replayed(io.RawIOBase):
    """A pipe whose first bytes were read already, and are returned again."""

    def __init__(self, head: bytes, pipe: IO[bytes]) -> None:
        """Create the stream.

        Args:
            head: The bytes that were read already.
            pipe: Where to read the rest.
        """
        self._head, self._pipe = head, pipe

    def readable(self) -> bool:
        """Returns True."""
        return True

    def read(self, size: int = -1) -> bytes:
        """Read at most ``size`` bytes; returns as soon as there are any."""
        if self._head and size >= 0:
            taken, self._head = self._head[:size], self._head[size:]
            return taken
        head, self._head = self._head, b""
        return head + (self._pipe.read(size) or b"")


def from_pipe() -> tuple[Origin | None, bytes]:
    """Read standard input: returns a video as an :class:`Origin`, to be read later, or else the bytes of a photo.

    At most one byte more than the limit is read, which shows that the photo is too large.

    Raises:
        InputError: Standard input is closed.
    """
    pipe = _standard_input()
    head = b""
    while len(head) < _HEAD and (more := pipe.read(_HEAD - len(head))):
        head += more
    whole = Replayed(head, pipe)
    if _begins_a_video(head):
        return Origin(whole, "standard input", PurePath("stdin")), b""  # type: ignore[arg-type]
    return None, drained(whole)


def raw_video(text: str) -> Origin:
    """The source for raw frames on standard input.

    Args:
        text: ``WIDTHxHEIGHT@RATE``, optionally followed by a colon and FFmpeg's name of the pixel format, by default
            ``rgb24``.

    Raises:
        UsageError: It does not have that form, or FFmpeg has no such pixel format.
        InputError: Standard input is closed.
    """
    match = re.fullmatch(r"(0*[1-9]\d*x0*[1-9]\d*)@(\d+(?:/0*[1-9]\d*|\.\d+)?)(?::(\w+))?", text)
    if not match or not float(match[2].partition("/")[0]):
        raise UsageError(f"--raw {text}: WIDTHxHEIGHT@RATE is expected, for example 1280x720@30 or 640x480@25:yuv420p")
    from av.video.format import VideoFormat  # loads FFmpeg, which photos do not need

    size, rate, pixels = match[1], match[2], match[3] or "rgb24"
    try:
        VideoFormat(pixels)
    except ValueError as error:
        raise UsageError(
            f"--raw {text}: FFmpeg has no pixel format {pixels}; use one such as rgb24, bgr24 or yuv420p"
        ) from error
    options = {"video_size": size, "framerate": rate, "pixel_format": pixels}
    return Origin(_standard_input(), "standard input", PurePath("stdin"), "rawvideo", options)


def _standard_input() -> IO[bytes]:
    """Standard input, unbuffered: a thread blocked on a buffered one would hold its lock when the process ends.

    Raises:
        InputError: It is closed (``<&-`` in a shell, or in a service).
    """
    if sys.stdin is None:
        raise InputError("standard input (-) is closed; pipe something into it, or name a file")
    try:
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    except (AttributeError, OSError, ValueError):  # not a file of the operating system
        return sys.stdin.buffer


@dataclass
class _Search:
    """A search of folders and patterns.

    Attributes:
        output: The output folder, a real path; it is skipped.
        suffixes: The suffixes of files that are found in folders.
        skipped: Folders that were skipped and may be missed, with the reason.
        others: Files that were skipped because of their suffix, as strings: there may be 100,000.
    """

    output: str | None
    suffixes: frozenset[str]
    skipped: dict[Path, str] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)

    def notes(self) -> Iterator[str]:
        """Yields the texts for ``tell``: which folders and files were skipped and may be missed."""
        for folder, why in sorted(self.skipped.items()):
            yield f"{folder}: {why}"
        suffixes = (os.path.splitext(file)[1].lower() for file in self.others)  # noqa: PTH122
        # In some names a dot is not followed by a suffix.
        kinds = Counter(suffix if suffix[1:].isalnum() else "" for suffix in suffixes)
        counts = sorted((-count, suffix) for suffix, count in kinds.items())
        texts = [f"{-count} {suffix or 'without a suffix'}" for count, suffix in counts]
        if rest := -sum(count for count, _ in counts[_MAX_LISTED:]):
            texts[_MAX_LISTED:] = [f"{rest} of other kinds"]
        if texts:
            yield f"skipped because of their suffix: {', '.join(texts)}"

    def check_is_not_output(self, folder: Path) -> None:
        """Check that a folder to search is not the output: the next run would take results for photos, or skip all.

        Raises:
            UsageError: It is the output.
        """
        if os.path.realpath(folder) == self.output:
            raise UsageError(
                f"--output {folder}: this folder is searched for photos, and later searches skip folders with results; "
                "choose another folder, such as one in it"
            )

    def below(self, top: Path) -> Iterator[tuple[Path, str | None]]:
        """Yields photos below a folder, sorted, each with its problem or None, and folders that cannot be listed."""
        known = self.suffixes | _COMPANIONS
        for folder, files, problem in self._walk(top):
            if problem:
                yield folder, problem
            by_suffix = [(name, os.path.splitext(name)[1].lower()) for name in files]  # noqa: PTH122
            within = f"{folder}{os.sep}" if folder.parts else ""
            self.others.update(within + name for name, suffix in by_suffix if suffix not in known)
            for file, suffix in ((folder / name, suffix) for name, suffix in by_suffix if suffix in self.suffixes):
                if suffix not in _TYPESCRIPT or _is_transport_stream(file):
                    yield file, _why_not_regular(file)

    def matching(self, pattern: Path) -> list[tuple[Path, PurePath, str | None]]:
        """Returns photos that match a pattern, sorted, and those in matching folders; a problem if there are none."""
        fixed = next(path for path in pattern.parents if not glob.has_magic(str(path)) or os.path.lexists(path))
        if ".." in pattern.relative_to(fixed).parts:
            why = f"{pattern}: .. after a wildcard leads out of the searched folders; name the folder you mean"
            return [(pattern, PurePath("pattern"), why)]
        matches = sorted(set(self._glob(fixed, pattern.relative_to(fixed).parts)), key=str)
        # The folders on each match's way that wildcards stand for, to be skipped as in a search; the folders before
        # these are named explicitly.
        ways = [
            {way for way in (match, *match.parents) if way != fixed and way.is_relative_to(fixed)} for match in matches
        ]
        skipped = {folder for folder in set().union(*ways) if not self._is_searched(folder)}
        found: list[tuple[Path, PurePath, str | None]] = []
        for match in (match for match, way in zip(matches, ways, strict=True) if way.isdisjoint(skipped)):
            self.check_is_not_output(match if _is_folder(match) else match.parent)
            files = self.below(match) if _is_folder(match) else [(match, _why_not_regular(match))]
            # With `**`, both a folder and the files in it match: each photo is kept once.
            found += [(file, file.relative_to(fixed), problem) for file, problem in files]
        once = list({file: (file, relative, problem) for file, relative, problem in found}.values())
        return once or [(pattern, PurePath("pattern"), f"{pattern}: no file matches this pattern")]

    def _glob(self, base: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        """Yields the paths below a folder that match the parts of a pattern.

        ``**`` is implemented here: that of ``glob`` follows links to folders, forever if two lead to each other; that
        of ``pathlib`` matches hidden folders, and files at its end only since Python 3.13.
        """
        if "**" not in parts:
            yield from (base / match for match in glob.glob(str(PurePath(*parts)), root_dir=base))  # noqa: PTH207
            return
        before, after = parts[: parts.index("**")], parts[parts.index("**") + 1 :]
        for start in filter(_is_folder, self._glob(base, before) if before else [base]):
            for folder, files, problem in self._walk(start):
                if problem:
                    yield folder  # searching it will report the problem
                yield from self._glob(folder, after) if after else (folder / name for name in files)

    def _walk(self, top: Path) -> Iterator[tuple[Path, list[str], str | None]]:
        """Yields a folder and those below it, sorted, with their files; last, those that cannot be listed, and why."""
        problems: list[OSError] = []
        for where, folders, files in os.walk(top, onerror=problems.append):
            here = Path(where)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and self._is_searched(here / name))
            yield here, sorted(name for name in files if not name.startswith(".")), None
        for error in problems:
            yield Path(str(error.filename)), [], f"{error.filename}: the folder cannot be listed ({error.strerror})"

    def _is_searched(self, folder: Path) -> bool:
        """Whether a search enters a folder that it finds."""
        return not self._is_link(folder) and not self._is_results(folder)

    def _is_link(self, folder: Path) -> bool:
        """Whether a folder is a symlink, which is not followed: it may form a loop, or lead to photos found already."""
        if not folder.is_symlink() or not _is_folder(folder):
            return False
        self.skipped[folder] = "skipped, because it is a link to a folder; to segment its photos, name it"
        return True

    def _is_results(self, folder: Path) -> bool:
        """Whether a folder has results of petseg, or will have; a search skips it.

        Raises:
            UsageError: The output has photos that are not known to be results: they would be skipped, and replaced.
        """
        if folder.name == RESULTS:
            return True
        noted = os.path.lexists(folder / JOURNAL)
        if os.path.realpath(folder) == self.output:
            inner = _Search(self.output, self.suffixes)  # separate, so that its notes are dropped
            if not noted and (photo := next((file for file, problem in inner.below(folder) if not problem), None)):
                raise UsageError(
                    f"--output {folder}: it is in a folder that is searched, and contains photos that may not be "
                    f"results ({photo.name}, for one); choose a new folder, or remove them if they are results"
                )
            return True
        if not noted:
            return False
        self.skipped[folder] = "skipped, because it has results of an earlier run; to segment them, name it"
        return True


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # the name is too long, or a parent may not be entered: reading it will report that
        return False


def _why_not_regular(file: Path) -> str | None:
    """Why a search does not read a file that it found; None: it is a regular file, or reading it will tell why not.

    Reading a pipe or device may block forever; users who name one know that something writes to it.
    """
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return None
    return None if regular else f"{file}: not a regular file, so a search does not read it; to read a pipe, name it"


def _unique(relatives: Sequence[PurePath]) -> list[PurePath]:
    """Unique names for results, also on file systems that ignore case (macOS, Windows, exFAT cards)."""
    by_stem = Counter(_key(relative.with_suffix("")) for relative in relatives)
    wanted = [r.with_suffix("") if by_stem[_key(r.with_suffix(""))] == 1 else r for r in relatives]
    return list(distinct(wanted))


def distinct(wanted: Iterable[PurePath]) -> Iterator[PurePath]:
    """Makes names unique, by appending a number to each that occurred before."""
    wanted = list(wanted)
    taken: set[str] = set()
    reserved = {_key(name) for name in wanted}
    numbers: dict[str, int] = {}  # the latest number of each name; all lower ones are taken
    for name in wanted:
        key = _key(name)
        number = numbers.get(key, 1)
        candidate = _numbered(name, number)
        # A numbered name must not equal the plain name of another photo.
        while _key(candidate) in taken or (number > 1 and _key(candidate) in reserved):
            number += 1
            candidate = _numbered(name, number)
        numbers[key] = number
        taken.add(_key(candidate))
        yield candidate


def _numbered(name: PurePath, number: int) -> PurePath:
    return name if number == 1 else name.with_name(f"{name.name}-{number}")


def _key(name: PurePath) -> str:
    return str(name).casefold()
