"""Where photos and videos come from: files, folders, patterns, cameras, streams, standard input.

Each has the name that its result gets. Of files only the first bytes are read here, to tell videos from photos.
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
from urllib.parse import urlsplit

from petseg_runtime.errors import InputError, UsageError
from petseg_runtime.images import HEIF_BRANDS, MAX_BYTES

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

#: Where results go unless another folder is named, and what a run over several files notes there. Searches pass over
#: such folders: else a second run would segment the results of the first.
RESULTS: Final = "petseg-output"
JOURNAL: Final = ".petseg-run.ndjson"

#: What is taken from a folder; a file that is named outright is tried whatever its suffix. HEIC, the photos of iPhones,
#: cannot be read without a plug-in for Pillow: taken all the same, they are named and counted.
IMAGE_SUFFIXES: Final = frozenset(
    {
        *(".avif", ".bmp", ".gif", ".heic", ".heif", ".hif", ".jfif", ".jpe", ".jpeg", ".jpg", ".mpo", ".png", ".ppm"),
        *(".tif", ".tiff", ".webp"),
    }
)

#: The same for videos.
VIDEO_SUFFIXES: Final = frozenset(
    {
        *(".3g2", ".3gp", ".asf", ".avi", ".dv", ".f4v", ".flv", ".h264", ".h265", ".hevc", ".m2ts", ".m4v", ".mkv"),
        *(".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".vob", ".webm", ".wmv", ".y4m"),
    }
)

#: What lies beside photos and videos without being any; a search need not mention it.
_BESIDE: Final = frozenset(
    {
        *(".aae", ".csv", ".db", ".htm", ".html", ".ini", ".json", ".jsonl", ".log", ".md", ".ndjson", ".pdf", ".toml"),
        *(".txt", ".url", ".xml", ".xmp", ".yaml", ".yml"),
    }
)
#: So many other suffixes are mentioned.
_MENTIONED: Final = 5

#: So much of a file's beginning tells whether it is a video: three packets of MPEG-TS begin in it.
_HEAD: Final = 400

#: Suffixes of MPEG-TS that are those of TypeScript, too.
_SHARED: Final = frozenset({".ts", ".mts"})
#: So long a packet of MPEG-TS is, in bytes: alone, with a time before it (M2TS), with a checksum behind it. Each begins
#: with the letter G; so many in a row are no text.
_PACKETS: Final = (188, 192, 204)
_IN_A_ROW: Final = 5


@dataclass(frozen=True)
class Origin:
    """One video or stream to segment.

    Attributes:
        target: What FFmpeg opens (it may hold a password), or a pipe.
        shown: The same for people and logs, without user, password and query; see :func:`redacted`.
        name: Its results' path relative to the output folder, without suffix.
        container: FFmpeg's name of the format; None: found out.
        options: For FFmpeg; None: a local file, which may open nothing else.
        endless: A camera or a stream: frames may be lost, connections may break.
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
        source: Where it is; :data:`STDIN` for standard input.
        name: Its result's path relative to the output folder, without suffix; no two items share one.
        problem: Why it cannot be read, where that is known before trying (a folder that may not be listed, a pipe that
            was found).
        data: The encoded image, where it does not lie at ``source``.
        found: A search came upon it, in a folder or by a pattern; nobody has named it.
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
    """What to segment, in a stable order, with names that keep the folders' structure and never collide.

    A result is named after its photo's stem. Photos whose stems collide (``cat.jpg`` and ``cat.png``) keep their
    suffix as part of the name (``cat.jpg.png`` and ``cat.png.png``), and what still collides is numbered. The names
    follow from the arguments and the folders' contents alone, so a second run gives the same ones.

    Args:
        paths: Files, folders to be searched with all their sub-folders, patterns such as ``photos/**/*.jpg`` (for
            shells that do not expand them), and ``-`` for an image on standard input. With several folders, each
            one's own name is the first part of its results' names; below a pattern, the part without wildcards is
            left out of them. While searching, links to folders are not followed, and folders with results of petseg
            are passed over; one that is named is taken whatever it is.
        output: Where results will be written; a search passes over it. It is none of the folders that are searched, and
            below them holds nothing but results.
        suffixes: What is taken from folders.
        pipe: What came on standard input; None: it is read here.
        tell: Told of each folder that was passed over and may be missed, and how many files were, by their suffixes.

    Returns:
        One item per photo. What does not exist is an item too: it will fail and be counted.

    Raises:
        UsageError: Standard input is asked for twice; or ``output`` lies where it would be taken for photos the next
            time, or photos for its results.
        InputError: Standard input is closed.
    """
    if sum(path == STDIN for path in paths) > 1:
        raise UsageError("standard input (-) can be read once only")
    several = sum(_is_folder(path) for path in paths) > 1
    search = _Search(os.path.realpath(output) if output else None, suffixes)  # Path.resolve raises on a loop of links
    found: list[tuple[Path, PurePath, str | None]] = []
    named: set[int] = set()  # which of them
    for path in paths:
        if _is_folder(path):
            search.refuse_as_output(path)
            own_name = PurePath(path.resolve().name or "root")
            prefix = own_name if several else PurePath()
            for file, problem in search.below(path):
                relative = prefix / file.relative_to(path)
                found.append((file, relative if relative.name else own_name, problem))
        elif path == STDIN:
            named.add(len(found))
            found.append((path, PurePath("stdin"), None))
        elif glob.has_magic(str(path)) and not os.path.lexists(path):
            found += search.matching(path)
        else:
            named.add(len(found))
            found.append((path, PurePath(path.name), None))
    # What a search has passed over may be taken all the same: by a pattern, or because it is named.
    search.others.difference_update(str(file) for file, _, _ in found)
    for what in search.notes():
        tell(what)
    names = _unique([relative for _, relative, _ in found])
    return [
        Item(
            file, name, problem, (from_pipe()[1] if pipe is None else pipe) if file == STDIN else None, at not in named
        )
        for at, ((file, _, problem), name) in enumerate(zip(found, names, strict=True))
    ]


def stream_origin(text: str, options: Mapping[str, str] | None = None) -> Origin | None:
    """What is named by more than a file's path: a camera's number or device, a URL, or ``lavfi:GRAPH``.

    Args:
        text: As on the command line.
        options: More for FFmpeg (``rtsp_transport=udp``, ``video_size=1280x720``); they win over ours.

    Returns:
        The source, endless but for a video file on a server; None: it is a path.

    Raises:
        UsageError: It is a photo on a server, by its suffix. Some cameras that stream have such an address, too; with
            ``options``, which only streams have, it is one.
    """
    given = dict(options or {})
    if text.startswith("lavfi:"):  # FFmpeg's own generator of pictures: a camera for tests
        return Origin(text[6:], text, PurePath("lavfi"), "lavfi", given, endless=True)
    device = f"/dev/video{text}" if text.isdecimal() and not os.path.lexists(text) else text
    if re.fullmatch(r"/dev/video\d+", device):
        return Origin(device, device, PurePath(Path(device).name), "v4l2", given, endless=True)
    scheme = urlsplit(text).scheme.lower() if "://" in text else ""
    if not scheme or scheme == "file":
        return None
    shown = redacted(text)
    name = PurePath(_file_name(shown))
    suffix = PurePath(urlsplit(text).path).suffix.lower() if scheme in ("http", "https") else ""
    if suffix in IMAGE_SUFFIXES and not given:
        raise UsageError(
            f"{shown}: a photo on a server, by its suffix: download it first (curl -s URL | petseg infer -); if it is "
            "a camera that streams, say so with an option for streams (--input-option seekable=0)"
        )
    if suffix in VIDEO_SUFFIXES - {".ts"}:
        return Origin(text, shown, name.with_suffix(""), None, given)
    usual = {"rtsp_transport": "tcp"} if scheme in ("rtsp", "rtsps") else {}
    return Origin(text, shown, name, None, {"analyzeduration": "2000000", **usual, **given}, endless=True)


#: What some cameras want in the path of a URL: ``user=admin&password=secret&channel=1``, ``/token=secret/live``. A
#: value with a slash in it is taken up to the next ``&``.
_SECRET: Final = re.compile(
    r"((?:user|usr|login|pass|pwd|token|key|auth|secret)[\w-]*(?:=|%3d))[^&/]*(?:/[^&]*(?=&))?", re.IGNORECASE
)


def redacted(url: str) -> str:
    """A URL without user, password, query and fragment, any of which may be secret; in the path those that are named.

    Passwords with ``/``, ``?`` or ``#`` in them, which ought to be encoded, are recognised too; in doubt everything is
    left out.
    """
    scheme, _, rest = url.partition("://")
    if not rest:
        return url
    shown, asked = re.match(r"([^?#]*)(.*)", rest, re.DOTALL).groups()  # type: ignore[union-attr] # it always fits
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    clear = "/" in shown and re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d*)?", authority.rpartition("@")[2])
    if "@" in asked and ":" in authority and not clear:  # user:pass?word@host
        return f"{scheme}://***"
    if _SECRET.search(shown[len(authority) :].rpartition("@")[0]):  # what is behind the @ may be the password's end
        return f"{scheme}://***"
    if "@" in authority or ":" in shown.rpartition("@")[0]:
        shown = "***@" + shown.rpartition("@")[2]
    return f"{scheme}://" + _SECRET.sub(r"\1***", shown) + ("?***" if asked else "")


def _file_name(shown: str) -> str:
    """A stream's results' name: its host and path."""
    rest = shown.partition("://")[2].removeprefix("***@").removesuffix("?***")
    return re.sub(r"[^\w.-]+", "-", rest).strip("-.")[:100] or "stream"


def is_video(item: Item) -> bool:
    """Whether to read a file as a video: by its suffix, or where that tells nothing, by its first bytes."""
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
    """By the signatures of MP4 (but not HEIF and AVIF, which share it), Matroska, AVI, FLV, Ogg, MPEG and yuv4mpeg."""
    if head[4:8] == b"ftyp":
        return head[8:12] not in (b"avif", b"avis", *HEIF_BRANDS)
    if head[:4] == b"RIFF":
        return head[8:12] == b"AVI "
    starts = (b"\x1a\x45\xdf\xa3", b"FLV", b"OggS", b"\x00\x00\x01\xba", b"YUV4MPEG2")
    return head.startswith(starts) or head[:377:188] == b"GGG"  # packets of MPEG-TS; a GIF may have two by chance


def _is_transport_stream(file: Path) -> bool:
    """Whether a file that is called so is a video, not a program; of one that cannot be looked into, reading it will
    tell. It may begin anywhere, as recorders cut it.
    """
    try:
        if not file.is_file():
            return True
        with file.open("rb") as opened:
            head = opened.read(_PACKETS[-1] * (_IN_A_ROW + 1))
    except OSError:
        return True
    return any(head[at::size][:_IN_A_ROW] == b"G" * _IN_A_ROW for size in _PACKETS for at in range(size))


class Replayed(io.RawIOBase):
    """A pipe whose first bytes have been looked at: they come again."""

    def __init__(self, head: bytes, pipe: IO[bytes]) -> None:
        """Take both.

        Args:
            head: What was read already.
            pipe: The rest.
        """
        self._head, self._pipe = head, pipe

    def readable(self) -> bool:
        """Always."""
        return True

    def read(self, size: int = -1) -> bytes:
        """At most ``size`` bytes, as soon as there are any."""
        if self._head and size >= 0:
            taken, self._head = self._head[:size], self._head[size:]
            return taken
        head, self._head = self._head, b""
        return head + (self._pipe.read(size) or b"")


def from_pipe() -> tuple[Origin | None, bytes]:
    """What comes on standard input: a video, which is not read yet, or else the bytes of a photo.

    Of these, one more than the limit is enough to see that they are too many.

    Raises:
        InputError: It is closed.
    """
    pipe = _standard_input()
    head = b""
    while len(head) < _HEAD and (more := pipe.read(_HEAD - len(head))):
        head += more
    if _begins_a_video(head):
        return Origin(Replayed(head, pipe), "standard input", PurePath("stdin")), b""  # type: ignore[arg-type]
    parts, size = [head], len(head)
    while size <= MAX_BYTES and (more := pipe.read(min(2**20, MAX_BYTES + 1 - size))):
        parts.append(more)
        size += len(more)
    return None, b"".join(parts)


def raw_video(text: str) -> Origin:
    """Raw frames on standard input.

    Args:
        text: ``WIDTHxHEIGHT@RATE``, and after a colon FFmpeg's name of the pixel format if that is not ``rgb24``.

    Raises:
        UsageError: It is not of that form, or there is no such pixel format.
        InputError: Standard input is closed.
    """
    match = re.fullmatch(r"(0*[1-9]\d*x0*[1-9]\d*)@(\d+(?:/0*[1-9]\d*|\.\d+)?)(?::(\w+))?", text)
    if not match or not float(match[2].partition("/")[0]):
        raise UsageError(f"--raw {text}: WIDTHxHEIGHT@RATE is expected, for example 1280x720@30 or 640x480@25:yuv420p")
    from av.video.format import VideoFormat  # FFmpeg is loaded for those who read videos

    size, rate, pixels = match[1], match[2], match[3] or "rgb24"
    try:
        VideoFormat(pixels)
    except ValueError as error:
        raise UsageError(
            f"--raw {text}: FFmpeg has no pixel format {pixels}; rgb24, bgr24 and yuv420p are some"
        ) from error
    options = {"video_size": size, "framerate": rate, "pixel_format": pixels}
    return Origin(_standard_input(), "standard input", PurePath("stdin"), "rawvideo", options)


def _standard_input() -> IO[bytes]:
    """Without a buffer, whose lock a thread that waits for more would still hold when the process ends.

    Raises:
        InputError: There is none (``<&-`` in a shell, or a service).
    """
    if sys.stdin is None:
        raise InputError("standard input (-) is closed: pipe something into it, or name a file")
    try:
        return open(sys.stdin.fileno(), "rb", buffering=0, closefd=False)
    except (AttributeError, OSError, ValueError):  # not a real one
        return sys.stdin.buffer


@dataclass
class _Search:
    """What is taken from folders and patterns.

    Attributes:
        output: Where results will be written, a real path; it is passed over.
        suffixes: What is taken from folders.
        passed: Folders that were passed over and may be missed, and why.
        others: Files that were, by their suffix; texts, of which there may be 100,000.
    """

    output: str | None
    suffixes: frozenset[str]
    passed: dict[Path, str] = field(default_factory=dict)
    others: set[str] = field(default_factory=set)

    def notes(self) -> Iterator[str]:
        """What was passed over and may be missed."""
        for folder, why in sorted(self.passed.items()):
            yield f"{folder}: {why}"
        suffixes = (os.path.splitext(file)[1].lower() for file in self.others)  # noqa: PTH122
        # Some names have no suffix, but a point within.
        kinds = Counter(suffix if suffix[1:].isalnum() else "" for suffix in suffixes)
        counts = sorted((-count, suffix) for suffix, count in kinds.items())
        texts = [f"{-count} {suffix or 'without a suffix'}" for count, suffix in counts]
        if rest := -sum(count for count, _ in counts[_MENTIONED:]):
            texts[_MENTIONED:] = [f"{rest} of other kinds"]
        if texts:
            yield f"passed over by their suffix: {', '.join(texts)}"

    def refuse_as_output(self, folder: Path) -> None:
        """Refuse to write into a folder whose photos are searched for: the next run would take the results for photos,
        or pass over all that is there.

        Raises:
            UsageError: That is asked for.
        """
        if os.path.realpath(folder) == self.output:
            raise UsageError(
                f"--output {folder}: it is searched for photos, and later searches pass over folders with results: "
                "choose a folder of their own, such as one in it"
            )

    def below(self, top: Path) -> Iterator[tuple[Path, str | None]]:
        """Photos below a folder, sorted; a folder that cannot be listed is a problem, not a silence."""
        known = self.suffixes | _BESIDE
        for folder, files, problem in self._folders(top):
            if problem:
                yield folder, problem
            by_suffix = [(name, os.path.splitext(name)[1].lower()) for name in files]  # noqa: PTH122
            within = f"{folder}{os.sep}" if folder.parts else ""
            self.others.update(within + name for name, suffix in by_suffix if suffix not in known)
            for file, suffix in ((folder / name, suffix) for name, suffix in by_suffix if suffix in self.suffixes):
                if suffix not in _SHARED or _is_transport_stream(file):
                    yield file, _irregular(file)

    def matching(self, pattern: Path) -> list[tuple[Path, PurePath, str | None]]:
        """Photos that fit a pattern, sorted, and those in folders that fit it; none is a problem, not a silence."""
        fixed = next(path for path in pattern.parents if not glob.has_magic(str(path)) or os.path.lexists(path))
        if ".." in pattern.relative_to(fixed).parts:
            why = f"{pattern}: behind a wildcard, .. leads out of what is searched: name the folder that is meant"
            return [(pattern, PurePath("pattern"), why)]
        matches = sorted(set(self._fitting(fixed, pattern.relative_to(fixed).parts)), key=str)
        # The folders that wildcards stand for: what comes before these is asked for by name.
        ways = [
            {way for way in (match, *match.parents) if way != fixed and way.is_relative_to(fixed)} for match in matches
        ]
        passed = {folder for folder in set().union(*ways) if not self._is_searched(folder)}
        found: list[tuple[Path, PurePath, str | None]] = []
        for match in (match for match, way in zip(matches, ways, strict=True) if way.isdisjoint(passed)):
            self.refuse_as_output(match if _is_folder(match) else match.parent)
            files = self.below(match) if _is_folder(match) else [(match, _irregular(match))]
            # With `**` a folder and the files in it both fit: each photo is taken once.
            found += [(file, file.relative_to(fixed), problem) for file, problem in files]
        once = list({file: (file, relative, problem) for file, relative, problem in found}.values())
        return once or [(pattern, PurePath("pattern"), f"{pattern}: no file fits this pattern")]

    def _fitting(self, base: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        """What fits the parts of a pattern, below a folder.

        ``**`` is ours: that of ``glob`` follows links to folders, for ever if two lead to each other, and that of
        ``pathlib`` takes hidden ones, and files at its end from Python 3.13 on only.
        """
        if "**" not in parts:
            yield from (base / match for match in glob.glob(str(PurePath(*parts)), root_dir=base))  # noqa: PTH207
            return
        before, after = parts[: parts.index("**")], parts[parts.index("**") + 1 :]
        for start in filter(_is_folder, self._fitting(base, before) if before else [base]):
            for folder, files, problem in self._folders(start):
                if problem:
                    yield folder  # searching it will say so
                yield from self._fitting(folder, after) if after else (folder / name for name in files)

    def _folders(self, top: Path) -> Iterator[tuple[Path, list[str], str | None]]:
        """A folder and those below it, sorted, with the files in them; last those that cannot be listed, and why."""
        problems: list[OSError] = []
        for where, folders, files in os.walk(top, onerror=problems.append):
            here = Path(where)
            folders[:] = sorted(name for name in folders if not name.startswith(".") and self._is_searched(here / name))
            yield here, sorted(name for name in files if not name.startswith(".")), None
        for error in problems:
            yield Path(str(error.filename)), [], f"{error.filename}: the folder cannot be listed ({error.strerror})"

    def _is_searched(self, folder: Path) -> bool:
        """Whether a search that comes by goes into a folder."""
        return not self._is_link(folder) and not self._is_results(folder)

    def _is_link(self, folder: Path) -> bool:
        """Whether a folder is a link, which is not followed: it may lead in circles, or to photos taken already."""
        if not folder.is_symlink() or not _is_folder(folder):
            return False
        self.passed[folder] = "a link to a folder, which is not followed: to take its photos, name it"
        return True

    def _is_results(self, folder: Path) -> bool:
        """Whether a folder holds results of petseg, or is about to; a search passes over it.

        Raises:
            UsageError: The output holds what nobody knows to be results: it would be passed over, and replaced.
        """
        if folder.name == RESULTS:
            return True
        noted = os.path.lexists(folder / JOURNAL)
        if os.path.realpath(folder) == self.output:
            apart = _Search(self.output, self.suffixes)  # what is passed over in there is no loss
            if not noted and (photo := next((file for file, problem in apart.below(folder) if not problem), None)):
                raise UsageError(
                    f"--output {folder}: it lies in what is searched, and holds photos that are no known results "
                    f"({photo.name}, for one): choose a new folder, or remove them if they are results"
                )
            return True
        if not noted:
            return False
        self.passed[folder] = "results of an earlier run, which are passed over: to take them, name it"
        return True


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long, or a folder on the way that may not be entered: reading it will say so
        return False


def _irregular(file: Path) -> str | None:
    """Why a file that was found, not named, is not read; None: it is a file like any other, or reading it says why not.

    A pipe or a device may keep who reads it waiting for ever; who names one knows who writes into it.
    """
    try:
        regular = stat.S_ISREG(file.stat().st_mode)
    except OSError:
        return None
    return None if regular else f"{file}: not a regular file, which a search does not read: a pipe must be named itself"


def _unique(relatives: Sequence[PurePath]) -> list[PurePath]:
    """Names without collisions, also where upper and lower case are one (macOS, Windows, exFAT cards)."""
    by_stem = Counter(_key(relative.with_suffix("")) for relative in relatives)
    wanted = [r.with_suffix("") if by_stem[_key(r.with_suffix(""))] == 1 else r for r in relatives]
    return list(distinct(wanted))


def distinct(wanted: Iterable[PurePath]) -> Iterator[PurePath]:
    """The same names, with a number added to each that was taken already, so that no two are equal."""
    wanted = list(wanted)
    taken: set[str] = set()
    reserved = {_key(name) for name in wanted}
    numbers: dict[str, int] = {}  # what was given last to each name: all before it stay taken
    for name in wanted:
        key = _key(name)
        number = numbers.get(key, 1)
        candidate = _numbered(name, number)
        # A number must not run into a name that another photo has by right.
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
