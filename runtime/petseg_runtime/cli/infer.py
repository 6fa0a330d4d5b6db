"""``petseg infer``: segment photos, videos and streams into masks, cutouts and other results."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import json
import os
import sys
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import click

from petseg_runtime.cli.text import (
    BACKEND,
    HELP,
    NAME,
    PATH,
    SCHEMA_VERSION,
    SECONDS,
    SHARE,
    UNIT,
    Finite,
    bar,
    parse_size,
    watched,
)
from petseg_runtime.errors import EXIT_PARTIAL, InputError, OutputError, UsageError
from petseg_runtime.signals import held
from petseg_runtime.text import counted, shown

if TYPE_CHECKING:
    from petseg_runtime.batch import Done, Report
    from petseg_runtime.cli.infer_video import Output, Videos
    from petseg_runtime.journal import Journal
    from petseg_runtime.pipeline import Outcome
    from petseg_runtime.segmenter import Segmenter
    from petseg_runtime.sinks import Background, Sink
    from petseg_runtime.sources import Item, Origin

__all__ = ["infer"]

#: What makes a terminal show its cursor, which rich's progress bar hides.
_SHOW_CURSOR: Final = "\x1b[?25h"

#: Options that apply to videos and streams only.
VIDEO_OPTIONS = ("start", "stride", "max_frames", "smooth", "segment", "no_audio", "policy", "stall", "give_up")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Options:
    """The command line of `petseg infer`: the fields are named after its options, whose help texts describe them."""

    sources: tuple[str, ...]
    model: Path | None
    output: Path | None
    kind: str | None
    format: str | None
    background: str | None
    threshold: float | None
    cutout_threshold: float | None
    min_area: float
    keep_doubtful: bool
    only_found: bool
    fast_decode: bool
    backend: str
    device: str
    size: str | None
    threads: int | None
    resume: bool
    start: float | None
    stride: int | None
    max_frames: int | None
    smooth: float | None
    segment: float | None
    no_audio: bool
    policy: str | None
    stall: float | None
    give_up: float | None
    input_option: tuple[str, ...]
    raw: str | None
    as_json: bool
    verbose: bool
    quiet: bool

    @property
    def result(self) -> str:
        """The kind of result, with the default if ``--as`` is not given."""
        return self.kind or ("background" if self.background else "cutout")

    @property
    def photo_format(self) -> str | None:
        """The format of photos, with the default if none was given; None: photos have no picture each."""
        from petseg_runtime.sinks import KINDS

        return self.format or next(iter(KINDS[self.result].formats), None)

    @property
    def video_format(self) -> str:
        """The format of videos, with the default if none was given."""
        from petseg_runtime.sinks import VIDEO_FORMATS

        return self.format or VIDEO_FORMATS[self.result][0]

    @property
    def coco(self) -> bool:
        """Whether the results of all photos go into one file."""
        return self.result.startswith("coco")

    @property
    def folder(self) -> Path | None:
        """The output folder; None: standard output."""
        from petseg_runtime.sources import RESULTS

        to_stdout = self.output == Path("-") or (self.sources == ("-",) and self.output is None)
        return None if to_stdout else self.output or Path(RESULTS) / self.result


@click.command()
@click.argument("sources", nargs=-1, required=True, type=NAME, metavar="SOURCE...")
@click.option("--model", type=PATH, help="Model file written by `petseg export`.  [default: the built-in model]")
@click.option("--output", type=PATH, help="Output folder, or - for standard output.  [default: petseg-output/KIND]")
@click.option(
    "--as",
    "kind",
    type=click.Choice(["mask", "probability", "cutout", "overlay", "background", "coco-polygons", "coco-rle", "lines"]),
    help="Kind of result. coco-*: one file for all photos; lines: one line of JSON per video frame.  [default: cutout]",
)
@click.option(
    "--format",
    type=click.Choice(["png", "jpg", "webp", "mp4", "webm"]),
    help="File format of the results. For videos, png, jpg and webp mean one picture per frame.  "
    "[default: depends on --as]",
)
@click.option(
    "--background",
    type=NAME,
    metavar="COLOUR|FILE",
    help="Colour or picture to put behind the pet, such as white, '#00ff00' or beach.jpg.",
)
@click.option(
    "--threshold",
    type=UNIT,
    help="Masks: pixels with at least this probability (0 to 1) are pet. Probabilities: only changes whether a pet is "
    "found.  [default: the model's]",
)
@click.option(
    "--cutout-threshold",
    type=UNIT,
    help="Cutouts and backgrounds: pixels with this probability (0 to 1) are half transparent.  [default: the model's]",
)
@click.option(
    "--min-area", type=SHARE, default=0.0, help="Drop regions smaller than this fraction of the picture (0 to 1)."
)
@click.option(
    "--keep-doubtful",
    is_flag=True,
    help="Keep low-confidence regions. By default, regions in which no pixel reaches a probability of 0.98 are dropped "
    "if another region has such a pixel.",
)
@click.option("--only-found", is_flag=True, help="Photos: write no result if no pet is found.")
@click.option(
    "--fast-decode",
    is_flag=True,
    help="Decode large JPEGs at a reduced size. Faster, but masks differ slightly; only for results without the "
    "photo itself.",
)
@click.option("--backend", type=BACKEND, default="auto", show_default=True, help=HELP["backend"])
@click.option("--device", default="auto", show_default=True, help=HELP["device"])
@click.option(
    "--size",
    metavar="HxW",
    help="Input size of a model that was exported with --dynamic-size.  [default: the model's]",
)
@click.option("--threads", type=click.IntRange(min=1), help=HELP["threads"])
@click.option("--resume", is_flag=True, help="Resume an interrupted run over several files.")
@click.option("--start", type=Finite(0), help="Videos: skip this many seconds at the beginning.")
@click.option("--stride", type=click.IntRange(min=1), help="Videos: process only every Nth frame.")
@click.option("--max-frames", type=click.IntRange(min=1), help="Videos: stop after this many frames.")
@click.option(
    "--smooth",
    type=SHARE,
    help="Videos: reduce flicker. Fraction (0 to 1) of past masks that remains after 1/30 s where the picture stands "
    "still; try 0.85.",
)
@click.option("--segment", type=SECONDS, help="Videos: start a new file after this many seconds.")
@click.option("--no-audio", is_flag=True, help="Videos: write no sound.")
@click.option(
    "--policy",
    type=click.Choice(["block", "drop-oldest", "latest"]),
    help="Videos: what to do when frames arrive faster than they are processed: make the source wait, drop the "
    "oldest waiting frame, or keep only the newest.  [default: block for files, drop-oldest for streams]",
)
@click.option(
    "--stall", type=SECONDS, help="Streams: reconnect after this many seconds without a frame.  [default: 10]"
)
@click.option(
    "--give-up",
    type=SECONDS,
    help="Streams: give up after this many seconds without a frame.  "
    "[default: 30 before the first frame, never after it]",
)
@click.option(
    "--input-option",
    multiple=True,
    metavar="NAME=VALUE",
    help="Streams: option for FFmpeg, such as rtsp_transport=udp. May be repeated.",
)
@click.option(
    "--raw",
    metavar="WxH@RATE[:FORMAT]",
    help="Read raw video frames from standard input.  [default of FORMAT: rgb24]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per photo or video event, then a summary.")
@click.option("-v", "--verbose", is_flag=True, help="Also print the engine and the time that each step took.")
@click.option("-q", "--quiet", is_flag=True, help=HELP["quiet"])
def infer(**values: Any) -> int:
    """Segment photos, videos and streams.

    A SOURCE is a file, a folder (searched with its subfolders), a pattern ('photos/**/*.jpg'), a camera (0,
    /dev/video0), a URL (rtsp, rtmp, http, udp, ...), or - for standard input; the result of standard input goes to
    standard output.

    Inputs that cannot be used are reported, counted and skipped. Ctrl-C, SIGTERM and SIGHUP (the terminal was closed)
    stop a run cleanly: a video that was being written can be played, no other file is left incomplete, and --resume
    continues the run.

    Exit codes: 0 if all inputs succeeded, 3 if some failed, 1 if all failed; 130, 143 and 129 if Ctrl-C, SIGTERM or
    SIGHUP stopped the run and no live source failed.
    """
    from petseg_runtime.sinks import background_of

    options = _Options(**values)
    _check_output(options)
    found = _without_videos(_find(options), _no_video(options), options.quiet)
    _check(found, options)
    _check_masks(found, options)
    background = None if options.background is None else background_of(options.background)
    return _run(options, found, background)


def _run(options: _Options, found: _Found, background: Background | None) -> int:
    """Run the command on the sources that were found; returns the exit code."""
    output = _video_output(found, options, background) if found.streams else None
    with contextlib.ExitStack() as stack:
        segmenter = stack.enter_context(_segmenter(len(found.photos), options))
        _print_engine(segmenter, options)
        videos = _videos(segmenter, output, options) if output else None
        # This creates the folder, so only call it when there is something to write.
        sink = _sink(found, options, background) if found.photos else None
        journal = _journal(segmenter, found, options, background)
        if journal:
            stack.enter_context(journal)
        report = _segment(segmenter, found.photos, sink, journal, options) if sink else None
        items = {str(item.name): item for item in found.videos}
        stopped = videos.run(found.streams, items, journal) if videos else None
    _print_report(report, videos, options)
    return _exit_code(report, videos, stopped)


def _segment(
    segmenter: Segmenter, photos: Sequence[Item], sink: Sink, journal: Journal | None, options: _Options
) -> Report:
    from petseg_runtime.batch import segment_photos
    from petseg_runtime.sinks import KINDS

    kind = KINDS[options.result]
    with _Watcher(options.as_json, options.quiet, to_files=options.folder is not None) as watcher:
        return segment_photos(
            photos,
            segmenter,
            sink,
            watcher.watch,
            begun=watcher.expect,
            journal=journal,
            mask_only=not kind.needs_photo,
            fast_decode=options.fast_decode,
            only_found=options.only_found,
            spare=kind.spare,
        )


def _exit_code(report: Report | None, videos: Videos | None, stopped: int | None) -> int:
    """Returns the exit code of the run; ``stopped`` is the one that a signal asks for."""
    failed = (len(report.failed) if report else 0) + (len(videos.failed) if videos else 0)
    done = (report.done + report.skipped if report else 0) + (videos.done + videos.skipped if videos else 0)
    if videos and (code := videos.problem_code()) is not None:
        return code
    if stopped is not None:
        return stopped
    if not failed:
        return 0
    return EXIT_PARTIAL if done else InputError.exit_code


def _journal(segmenter: Segmenter, found: _Found, options: _Options, background: Background | None) -> Journal | None:
    """Returns the journal of this run, or None where ``--resume`` and later searches need none.

    Raises:
        OutputError: The journal cannot be written, or belongs to another run.
    """
    from petseg_runtime.journal import JOURNAL, Journal
    from petseg_runtime.sinks import probe

    folder = options.folder
    # One photo that was found by a search needs a journal, too: the next search must recognise its result.
    noted = options.resume or _searched(options.sources) or len(found.items) > 1
    if folder is None or found.live or not noted:
        return None
    settings = _appearance(found, options, background) | _settings(segmenter)
    settings |= {name: getattr(options, name) or None for name in VIDEO_OPTIONS}
    settings |= {"fast_decode": options.fast_decode, "only_found": options.only_found or None}
    probe(folder)
    journal = Journal(folder, settings, resume=options.resume)
    if journal.noted and not any(map(journal.knows, found.items)):
        what = f"the {journal.noted} results noted there are of other files, or of these before they changed"
        _print_note(f"{folder / JOURNAL}: {what}; all are processed again", options.quiet)
    return journal


def _searched(sources: Sequence[str]) -> bool:
    """Whether any source is a folder or a pattern, so that its files are found by a search."""
    return any(
        os.path.isdir(source)  # noqa: PTH112 - Path.is_dir raises if the text is too long for a file name
        or (glob.has_magic(source) and "://" not in source and not os.path.lexists(source))
        for source in sources
    )


@dataclasses.dataclass(frozen=True)
class _Found:
    """The photos and videos that the sources stand for.

    Attributes:
        photos: Photo files, and a photo on standard input.
        videos: Video files.
        streams: The video files, then a video on standard input, cameras and network streams.
    """

    photos: list[Item]
    videos: list[Item]
    streams: list[Origin]

    @property
    def items(self) -> list[Item]:
        return self.photos + self.videos

    @property
    def live(self) -> bool:
        return any(origin.endless for origin in self.streams)

    @property
    def remote(self) -> bool:
        """Whether FFmpeg opens a camera or URL."""
        return any(origin.options is not None and isinstance(origin.target, str) for origin in self.streams)


def _find(options: _Options) -> _Found:
    """Finds the photos, videos and streams of the sources.

    Raises:
        InputError: There are none.
        UsageError: They cannot be combined, or do not fit the output; see :func:`_check_sources`.
    """
    from petseg_runtime.sources import IMAGE_SUFFIXES, STDIN, VIDEO_SUFFIXES, Origin, find_photos, stream_origin

    input_options = _pairs(options.input_option)
    named = [stream_origin(text, input_options) for text in options.sources]
    streams = [origin for origin in named if origin]
    texts = [text for text, origin in zip(options.sources, named, strict=True) if not origin]
    # "./-" names a file, but Path("./-") would be "-", which means standard input.
    paths = [Path(text) if text == str(STDIN) or Path(text) != STDIN else Path(text).absolute() for text in texts]
    piped, data = _from_stdin(paths.count(STDIN), options.raw)
    if piped:
        streams.append(piped)
        paths.remove(STDIN)
    notes: list[str] = []
    items = find_photos(paths, options.folder, IMAGE_SUFFIXES | VIDEO_SUFFIXES, data, notes.append)
    if not items and not streams:
        raise InputError("; ".join([f"no photos or videos in {', '.join(options.sources)}", *notes]))
    for note in notes:
        _print_note(note, options.quiet)
    photos, videos = _by_kind(items)
    files = [Origin(str(video.source), str(video.source), video.name) for video in videos]
    found = _Found(photos, videos, _distinct([*files, *streams]))
    _check_sources(found, options)
    return found


def _from_stdin(times: int, raw: str | None) -> tuple[Origin | None, bytes | None]:
    """Returns the video on standard input, or the bytes of the photo there; neither unless ``times`` is 1.

    Raises:
        UsageError: ``--raw`` without standard input as a source.
        InputError: Standard input is closed.
    """
    from petseg_runtime.sources import from_pipe, raw_video

    if raw and times != 1:
        raise UsageError("--raw describes standard input; give - as a source, once")
    if raw:
        return raw_video(raw), b""
    return from_pipe() if times == 1 else (None, None)


def _by_kind(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Splits items into photos and videos."""
    from petseg_runtime.sources import IMAGE_SUFFIXES, is_video

    photos: list[Item] = []
    videos: list[Item] = []
    for item in items:
        (videos if is_video(item) else photos).append(item)
    if videos and all(item.problem and item.source.suffix.lower() not in IMAGE_SUFFIXES for item in photos):
        return [], videos + photos  # no photos, only folders that cannot be listed and patterns that match nothing
    return photos, videos


def _check_sources(found: _Found, options: _Options) -> None:
    """Reject sources that cannot be combined.

    Raises:
        UsageError: There is more than one result for standard output, or live sources are mixed with files.
    """
    if options.folder is None and len(found.photos) + len(found.streams) > 1:
        raise UsageError("standard output takes one result only; for more, give a folder with --output")
    if found.live and (found.photos or not all(origin.endless for origin in found.streams)):
        raise UsageError("live sources run until they are stopped; process photos and videos in another run")


def _distinct(origins: list[Origin]) -> list[Origin]:
    """Gives each origin a unique name: cameras at the same address may differ in parts that their names do not show."""
    from petseg_runtime.sources import distinct

    names = distinct(origin.name for origin in origins)
    return [dataclasses.replace(origin, name=name) for origin, name in zip(origins, names, strict=True)]


def _check_output(options: _Options) -> None:
    """Reject options that do not work with results on standard output.

    Raises:
        UsageError: An option needs an output folder.
        OutputError: Standard output is closed.
    """
    if options.folder is not None:
        return
    if options.as_json or options.resume or options.coco or options.result == "lines":
        raise UsageError(
            "the picture goes to standard output; for --json, --resume, COCO or lines, give a folder with --output"
        )
    if sys.stdout is None:
        raise OutputError("standard output is closed; give a folder with --output")


def _check(found: _Found, options: _Options) -> None:
    """Reject contradictory options, before anything is loaded.

    Raises:
        UsageError: The kind, the format and the background do not fit each other or the sources, or an option is for a
            type of source that was not given.
    """
    from petseg_runtime.sinks import KINDS, check_looks

    kind = options.result
    if found.photos:
        if kind == "lines":
            raise UsageError("--as lines is for videos; for photos, --json prints the same")
        check_looks(kind, options.format, options.background)
    if found.streams:
        if why := _no_video(options):
            apart = "; process videos and streams in another run" if found.photos else ""
            raise UsageError(f"{found.streams[0].shown}: {why}{apart}")
        if kind in KINDS:
            check_looks(kind, None, options.background)
        elif options.background is not None:
            raise UsageError("--background is for pictures; --as lines has none")
    for what, names, there in (
        ("videos and streams", VIDEO_OPTIONS, bool(found.streams)),
        ("cameras and streams", ("give_up",), found.live),
        ("cameras, streams and other URLs", ("stall", "input_option"), found.remote),
        ("sources that have an end", ("start",), not found.live),
    ):
        if not there and (unused := [name for name in names if getattr(options, name)]):
            raise UsageError(f"--{unused[0].replace('_', '-')} is for {what}, and none was given")


def _check_masks(found: _Found, options: _Options) -> None:
    """Reject options that have no effect on this kind of result.

    Raises:
        UsageError: An option has no effect; the message names the one that has.
    """
    from petseg_runtime.sinks import KINDS

    kind = options.result
    cut_out = kind in ("cutout", "background")
    if cut_out and options.threshold is not None and options.cutout_threshold is None:
        raise UsageError(
            f"--threshold is for masks; for --as {kind}, use --cutout-threshold (if both are given, --threshold "
            "decides what counts as pet for --json and --min-area)"
        )
    if options.cutout_threshold is not None and not cut_out:
        raise UsageError(f"--cutout-threshold is for cutouts and backgrounds; for --as {kind}, use --threshold")
    if options.fast_decode and (not found.photos or kind not in KINDS or KINDS[kind].needs_photo):
        alone = ", ".join(name for name, one in KINDS.items() if not one.needs_photo)
        raise UsageError(f"--fast-decode is for photos whose result does not contain the photo itself (--as {alone})")


def _no_video(options: _Options) -> str | None:
    """Why this kind of result cannot be made from a video, and which can; None: it can."""
    from petseg_runtime.sinks import VIDEO_FORMATS

    if options.only_found:
        return "--only-found is for photos"
    formats = VIDEO_FORMATS.get(options.result, ())
    if not formats:
        return f"--as {options.result} is for photos; for videos, choose one of: {', '.join(VIDEO_FORMATS)}"
    if options.format and options.result == "lines":
        return "--format is for pictures and movies; --as lines has none"
    if options.format and options.format not in formats:
        files = ", ".join(name for name in formats if name != "raw")  # raw is for --output - only
        return f"--as {options.result} of a video cannot be written as {options.format}; choose one of: {files}"
    return None


def _without_videos(found: _Found, why: str | None, quiet: bool) -> _Found:
    """Skip videos that were found by a search beside photos and that this kind of result cannot be made from."""
    strays = [item for item in found.videos if item.found]
    if why is None or not strays or not found.photos:
        return found
    more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
    _print_note(f"{strays[0].source}{more}: skipped: {why}", quiet)
    videos = [item for item in found.videos if not item.found]
    gone = {item.name for item in strays}  # in `streams`, too: the videos come first there, and keep their names
    return _Found(found.photos, videos, [origin for origin in found.streams if origin.name not in gone])


def _video_output(found: _Found, options: _Options, background: Background | None) -> Output:
    """Returns which results the videos get, and where.

    Raises:
        UsageError: The options do not allow such results.
        OutputError: The results cannot be written there, or would replace something.
    """
    from petseg_runtime.cli.infer_video import Output, check_places
    from petseg_runtime.video.movie import MOVIES

    folder = options.folder
    if folder is None and options.format:
        raise UsageError(f"standard output takes raw frames, not {options.format}; give a folder with --output")
    form = options.video_format if folder else "raw"
    if options.segment and form not in (*MOVIES, "ndjson"):
        raise UsageError(f"--segment is for movies ({', '.join(MOVIES)}) and lines, not {form}")
    if options.no_audio and form not in MOVIES:
        raise UsageError(f"--no-audio is for movies ({', '.join(MOVIES)}); {form} has no sound anyway")
    if options.resume and found.live:
        raise UsageError("--resume is for files; streams need none: their new results never replace earlier ones")
    if options.resume:
        _check_resumable(found, options.quiet)
    output = Output(
        folder=folder,
        kind=options.result,
        format=form,
        background=background,
        segment=options.segment,
        audio=not options.no_audio,
    )
    photos = {str(i.source): f"{folder / i.name}.{options.photo_format}" for i in found.photos} if folder else {}
    return check_places(output, found.streams, photos, _own_files(options))


def _check_resumable(found: _Found, quiet: bool) -> None:
    """Report videos that ``--resume`` processes from the start: nothing tells whether they are still the same.

    Raises:
        UsageError: There are only such videos.
    """
    files = {video.name for video in found.videos}
    for origin in found.streams:
        if origin.name in files:
            continue
        if not found.items:
            raise UsageError(
                f"{origin.shown}: --resume is for files; a video on standard input or on a server is processed from "
                "the start, so run it without --resume"
            )
        _print_note(f"{origin.shown}: not a file, so --resume processes it from the start", quiet)


def _videos(segmenter: Segmenter, output: Output, options: _Options) -> Videos:
    from petseg_runtime.cli.infer_video import Videos
    from petseg_runtime.video.stream import Reading

    reading = Reading(
        start=options.start or 0.0,
        stride=options.stride or 1,
        max_frames=options.max_frames,
        policy=options.policy,
        stall=options.stall or 10.0,
        patience=options.give_up,
        smooth=options.smooth or 0.0,
    )
    return Videos(segmenter, output, reading, as_json=options.as_json, quiet=options.quiet, verbose=options.verbose)


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{text!r}: expected NAME=VALUE", param_hint="--input-option")
        pairs[name] = value
    return pairs


def _sink(found: _Found, options: _Options, background: Background | None) -> Sink:
    """Returns the sink that writes the photos' results."""
    from petseg_runtime import sinks

    folder, own = options.folder, _own_files(options)
    if folder and options.coco:
        return sinks.CocoSink(folder, options.result, found.items, own=own)
    picture = sinks.picture(options.result, options.format, background)
    if folder is None:
        return sinks.StreamSink(sys.stdout.buffer, picture)
    return sinks.ImageSink(folder, picture, found.photos, beside=found.videos, own=own)


def _own_files(options: _Options) -> Container[Path]:
    """The files beside the sources that the run may replace: those that the run to be resumed has written."""
    from petseg_runtime.journal import OwnFiles

    return OwnFiles(options.folder) if options.resume and options.folder else ()


def _segmenter(photos: int, options: _Options) -> Segmenter:
    from petseg_runtime.host import usable_cpus
    from petseg_runtime.segmenter import Segmenter

    printed = []

    def tell(note: str) -> None:
        printed.append(note)
        _print_note(note, options.quiet)

    segmenter = Segmenter(
        options.model,
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        streams=max(1, min(options.threads or usable_cpus(), photos)),
        size=None if options.size is None else parse_size(options.size),
        threshold=options.threshold,
        cutout_threshold=options.cutout_threshold,
        min_area=options.min_area,
        keep_doubtful=options.keep_doubtful,
        tell=tell,
    )
    for note in segmenter.describe().notes:
        if note not in printed:
            _print_note(note, options.quiet)
    return segmenter


def _appearance(found: _Found, options: _Options, background: Background | None) -> dict[str, Any]:
    """The settings that determine how results look, for the journal: defaults filled in, the background by content."""
    meant: dict[str, Any] = {"as": options.result, "background": background}
    if found.photos:
        meant["format"] = options.photo_format
    if found.videos:
        meant["video_format"] = options.video_format
    if background is not None:
        meant["background"] = (
            list(background)
            if isinstance(background, tuple)
            else f"a picture, SHA-256 {hashlib.sha256(background.tobytes()).hexdigest()}"
        )
    return meant


def _settings(segmenter: Segmenter) -> dict[str, Any]:
    """The model's and engine's settings that determine how results look, for the journal."""
    engine = segmenter.describe()
    return {
        "model": segmenter.artifact.identity,
        "size": list(segmenter.size),
        "threshold": segmenter.threshold,
        "cutout_threshold": segmenter.cutout_threshold,
        "min_area": segmenter.min_area,
        "doubtful": None if segmenter.keep_doubtful else "left out",
        "engine": f"{engine.name} {engine.version} on {engine.device}, {engine.precision}",
    }


def _print_engine(segmenter: Segmenter, options: _Options) -> None:
    engine, spec = segmenter.describe(), segmenter.artifact.spec
    if segmenter.size != (spec.height, spec.width):
        trained, used = f"{spec.height} x {spec.width}", "{} x {}".format(*segmenter.size)
        _print_note(
            f"--size {used}: the model is for {trained}; at other sizes, its masks may be much worse", options.quiet
        )
    if options.verbose:
        click.echo(
            f"{shown(spec.name)} in {engine.name} {engine.version} on {engine.device}, "
            f"{engine.precision}, {engine.threads} threads",
            err=True,
        )


def _print_note(note: str, quiet: bool) -> None:
    if not quiet:
        click.echo(f"petseg: {shown(note)}", err=True)


class _Watcher:
    """Prints the outcome of each photo, and shows a progress bar for a batch on a terminal."""

    def __init__(self, as_json: bool, quiet: bool, to_files: bool) -> None:
        self._as_json, self._quiet, self._to_files = as_json, quiet, to_files
        self._progress: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()
            # Rich may fail to do this after a signal in the middle of what it prints.
            click.echo(_SHOW_CURSOR, nl=False, err=True, color=True)

    def expect(self, photos: int) -> None:
        """Show the progress bar, if there is one, for this many photos."""
        if photos > 1 and watched() and not self._quiet:
            self._progress = bar()
            self._task = self._progress.add_task("segmenting", total=photos)
            with held():  # what a signal leaves half started, `stop` fails on
                self._progress.start()

    def watch(self, outcome: Outcome[Item, Done]) -> None:
        """Print the outcome of one photo."""
        source, done = shown(outcome.source.source), outcome.value
        if done is None:
            self._print(f"petseg: {shown(outcome.error)}", err=True)
        else:
            for note in () if self._quiet else done.notes:
                self._print(f"petseg: {source}: {note}", err=True)
            if self._to_files and not self._as_json and not self._quiet:
                self._print(f"{source}{_outcome_text(done)}")
            elif done.left_out and not self._to_files and not self._quiet:  # else an empty output would go unexplained
                self._print(f"petseg: {source}: no pet found, nothing written", err=True)
        if self._as_json:
            self._print(json.dumps(_record(outcome)))
        if self._progress:
            self._progress.advance(self._task)

    def _print(self, line: str, err: bool = False) -> None:
        """Print a line, above the progress bar if both go to the same terminal."""
        if self._progress and (err or (sys.stdout is not None and sys.stdout.isatty())):
            self._progress.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
        else:
            click.echo(line, err=err)


def _outcome_text(done: Done) -> str:
    """Describes the outcome of a photo, for people."""
    if done.left_out:
        return "  no pet found, nothing written"
    where = f" -> {shown(done.path)}" if done.path else ""
    return f"{where}  " + (f"{100 * done.coverage:.0f} % pet" if done.found else "no pet found")


def _record(outcome: Outcome[Item, Done]) -> dict[str, Any]:
    record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "input": str(outcome.source.source)}
    if outcome.value is None:
        return {**record, "event": "failure", "error": str(outcome.error)}
    done = dataclasses.asdict(outcome.value)
    path, value = done.pop("path"), done.pop("value")
    done["coverage"] = round(done["coverage"], 6)
    annotation = {"annotation": value["annotation"]} if value else {}
    return {**record, "event": "result", "output": path and str(path), **done, **annotation}


def _print_report(report: Report | None, videos: Videos | None, options: _Options) -> None:
    if options.as_json:
        of_photos, of_videos = _summary(report), {"videos": videos.summary()} if videos else {}
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "event": "summary", **of_photos, **of_videos}))
        return
    if report:
        _print_photos(report, options.folder, options.verbose, options.quiet)
    if videos and not options.quiet and len(videos.reports) + videos.skipped > 1:
        counts = videos.summary()
        words = {"done": "done", "skipped": "already there", "stopped": "stopped", "failed": "failed"}
        click.echo(f"{counts['count']} videos: " + ", ".join(f"{counts[n]} {w}" for n, w in words.items() if counts[n]))


def _summary(report: Report | None) -> dict[str, Any]:
    if report is None:
        return {}
    total = report.done + len(report.failed) + report.skipped
    counts = {"photos": total, "done": report.done, "failed": len(report.failed), "skipped": report.skipped}
    counts["left_out"] = report.left_out
    timing = {"seconds": round(report.seconds, 4), "steps": report.steps}
    return {**counts, **timing, **({"output": str(report.path)} if report.path else {})}


def _print_photos(report: Report, folder: Path | None, verbose: bool, quiet: bool) -> None:
    total = report.done + len(report.failed) + report.skipped
    if folder and not quiet and (total > 1 or report.failed or verbose or report.path):
        failed = f", {len(report.failed)} failed" if report.failed else ""
        skipped = f", {report.skipped} already there" if report.skipped else ""
        left_out = f", {report.left_out} without a pet" if report.left_out else ""
        where = shown(report.path or folder)
        written = f"{report.done - report.left_out} written to {where}"
        click.echo(f"{counted(total, 'photo')}: {written}{left_out}{skipped}{failed}{_took(report, verbose)}")
    if verbose:
        for step, seconds in report.steps.items():
            p50, p95 = 1e3 * seconds["p50"], 1e3 * seconds["p95"]
            click.echo(f"{step:>6}: median {p50:.1f} ms, p95 {p95:.1f} ms, total {seconds['sum']:.2f} s", err=True)


def _took(report: Report, verbose: bool) -> str:
    worked = report.done + len(report.failed)
    return f" in {report.seconds:.2f} s ({worked / max(report.seconds, 1e-9):.1f} photos/s)" if verbose else ""
