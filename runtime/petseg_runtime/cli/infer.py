"""``petseg infer``: photos in, masks and cutouts out."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

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
from petseg_runtime.text import shown

if TYPE_CHECKING:
    from petseg_runtime.batch import Done, Report
    from petseg_runtime.cli.infer_video import Output, Videos
    from petseg_runtime.journal import Journal
    from petseg_runtime.pipeline import Outcome
    from petseg_runtime.segmenter import Segmenter
    from petseg_runtime.sinks import Background, Sink
    from petseg_runtime.sources import Item, Origin

__all__ = ["infer"]

#: Without meaning for photos.
VIDEO_OPTIONS = ("start", "stride", "max_frames", "smooth", "segment", "no_audio", "policy", "stall", "give_up")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Asked:
    """What `petseg infer` is to do: the fields are named after its options, whose help says what they mean."""

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
        """The kind of result, also where none is named."""
        return self.kind or ("background" if self.background else "cutout")

    @property
    def coco(self) -> bool:
        """Whether results go into one file for all photos."""
        return self.result.startswith("coco")

    @property
    def folder(self) -> Path | None:
        """Where results go; None: standard output."""
        from petseg_runtime.sources import RESULTS

        to_stdout = self.output == Path("-") or (self.sources == ("-",) and self.output is None)
        return None if to_stdout else self.output or Path(RESULTS) / self.result


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Looks:
    """What decides what a result is like, read and checked.

    Attributes:
        kind: A name in ``KINDS`` or ``VIDEO_FORMATS``.
        format: What was asked for; None: the usual one.
        background: For the kind ``background``.
    """

    kind: str
    format: str | None
    background: Background | None

    @property
    def photo_format(self) -> str | None:
        """What photos become, also where none is named; None: no picture each."""
        from petseg_runtime.sinks import KINDS

        return self.format or next(iter(KINDS[self.kind].formats), None)

    @property
    def video_format(self) -> str:
        """What videos become, also where none is named."""
        from petseg_runtime.sinks import VIDEO_FORMATS

        return self.format or VIDEO_FORMATS[self.kind][0]


@click.command()
@click.argument("sources", nargs=-1, required=True, type=NAME, metavar="SOURCE...")
@click.option("--model", type=PATH, help="A file that `petseg export` made.  [default: the one that ships]")
@click.option("--output", type=PATH, help="Folder for the results; - is stdout.  [default: petseg-output/KIND]")
@click.option(
    "--as",
    "kind",
    type=click.Choice(["mask", "probability", "cutout", "overlay", "background", "coco-polygons", "coco-rle", "lines"]),
    help="What to write; COCO is one file for all photos, lines is one of JSON for each frame.  [default: cutout]",
)
@click.option(
    "--format",
    type=click.Choice(["png", "jpg", "webp", "mp4", "webm"]),
    help="Of pictures and videos; png of a video: a picture for each frame.  [default: what is usual for the kind]",
)
@click.option(
    "--background", type=NAME, metavar="COLOUR|FILE", help="What to put behind the pet: white, '#00ff00', beach.jpg."
)
@click.option(
    "--threshold", type=UNIT, help="Of masks: pet from this probability on, 0 to 1.  [default: the model's own]"
)
@click.option(
    "--cutout-threshold",
    type=UNIT,
    help="Of cutouts and backgrounds: half transparent at this probability, 0 to 1.  [default: the model's own]",
)
@click.option("--min-area", type=SHARE, default=0.0, help="Drop regions below this share of the picture, 0 to 1.")
@click.option(
    "--keep-doubtful", is_flag=True, help="Show also regions in which the model is sure of no pixel; else left out."
)
@click.option("--only-found", is_flag=True, help="Photos: write nothing where no pet is found.")
@click.option(
    "--fast-decode",
    is_flag=True,
    help="Decode large JPEGs at a reduced size where only masks are written: faster, and the masks differ a little.",
)
@click.option("--backend", type=BACKEND, default="auto", show_default=True, help=HELP["backend"])
@click.option("--device", default="auto", show_default=True, help=HELP["device"])
@click.option(
    "--size",
    metavar="HxW",
    help="Size of the model's input, if it was exported with --dynamic-size.  [default: the model's own]",
)
@click.option("--threads", type=click.IntRange(min=1), help=HELP["threads"])
@click.option("--resume", is_flag=True, help="Go on with a run over several files that was stopped.")
@click.option("--start", type=Finite(0), help="Videos: seconds to pass over.")
@click.option("--stride", type=click.IntRange(min=1), help="Videos: use every Nth frame.")
@click.option("--max-frames", type=click.IntRange(min=1), help="Videos: stop after this many frames.")
@click.option(
    "--smooth",
    type=SHARE,
    help="Videos: against flicker, 0 to 1: how much of a still place's past stays after 1/30 s; 0.85 is a good start.",
)
@click.option("--segment", type=SECONDS, help="Videos: begin a new file after this many seconds.")
@click.option("--no-audio", is_flag=True, help="Videos: leave the sound out.")
@click.option(
    "--policy",
    type=click.Choice(["block", "drop-oldest", "latest"]),
    help="Frames that come too fast wait, replace the oldest, or only the newest waits.  "
    "[default: block for files, drop-oldest for streams]",
)
@click.option(
    "--stall", type=SECONDS, help="Streams: reconnect after this many seconds without a frame.  [default: 10]"
)
@click.option(
    "--give-up",
    type=SECONDS,
    help="Streams: give up after this many seconds without a frame.  [default: 30 until the first one, then never]",
)
@click.option(
    "--input-option", multiple=True, metavar="NAME=VALUE", help="Streams: for FFmpeg, like rtsp_transport=udp."
)
@click.option("--raw", metavar="WxH@RATE[:FORMAT]", help="Standard input is raw frames, rgb24 unless said otherwise.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per photo or frame on stdout, then a summary.")
@click.option("-v", "--verbose", is_flag=True, help="Say what runs it, and what each step took.")
@click.option("-q", "--quiet", is_flag=True, help=HELP["quiet"])
def infer(**options: Any) -> int:
    """Segment photos, videos and streams.

    A SOURCE is a file, a folder with its sub-folders, a pattern ('photos/**/*.jpg'), a camera (0, /dev/video0), a URL
    (rtsp, rtmp, http, udp, ...) or - for standard input, whose result goes to standard output.

    What cannot be used is named, counted and passed over. Ctrl-C, SIGTERM and the end of the
    terminal stop a run in order: videos that were begun can be played, no half-written photo is left, and --resume
    continues.
    Exit code 0: all done; 3: some failed; 1: all failed; 130, 143, 129: stopped by Ctrl-C, SIGTERM or SIGHUP, and no
    live source has failed.
    """
    from petseg_runtime.sinks import background_of

    asked = _Asked(**options)
    _check_output(asked)
    found = _without_videos(_find(asked), _no_video(asked), asked.quiet)
    _check(found, asked)
    _check_masks(found, asked)
    background = None if asked.background is None else background_of(asked.background)
    return _run(asked, found, _Looks(kind=asked.result, format=asked.format, background=background))


def _run(asked: _Asked, found: _Found, looks: _Looks) -> int:
    """Do what was asked; returns the exit code."""
    made = _made(found, asked, looks) if found.streams else None
    with contextlib.ExitStack() as stack:
        segmenter = stack.enter_context(_segmenter(len(found.photos), asked))
        _tell(segmenter, asked)
        videos = _videos(segmenter, made, asked) if made else None
        # Makes the folder, so not before there is something to write.
        sink = _sink(found, asked, looks) if found.photos else None
        journal = _journal(segmenter, found, asked, looks)
        if journal:
            stack.enter_context(journal)
        report = _segment(segmenter, found.photos, sink, journal, asked) if sink else None
        items = {str(item.name): item for item in found.videos}
        stopped = videos.run(found.streams, items, journal) if videos else None
    _print_report(report, videos, asked)
    return _exit_code(report, videos, stopped)


def _segment(
    segmenter: Segmenter, photos: Sequence[Item], sink: Sink, journal: Journal | None, asked: _Asked
) -> Report:
    from petseg_runtime.batch import segment_photos
    from petseg_runtime.sinks import KINDS

    kind = KINDS[asked.result]
    with _Watcher(asked.as_json, asked.quiet, to_files=asked.folder is not None) as watcher:
        return segment_photos(
            photos,
            segmenter,
            sink,
            watcher.watch,
            begun=watcher.expect,
            journal=journal,
            mask_only=not kind.needs_photo,
            fast_decode=asked.fast_decode,
            spare=kind.spare,
        )


def _exit_code(report: Report | None, videos: Videos | None, stopped: int | None) -> int:
    """What tells scripts how it ended; ``stopped`` is what a signal asks for."""
    failed = (len(report.failed) if report else 0) + (len(videos.failed) if videos else 0)
    done = (report.done + report.skipped if report else 0) + (videos.done + videos.skipped if videos else 0)
    if videos and (code := videos.problem_code()) is not None:
        return code
    if stopped is not None:
        return stopped
    return 0 if not failed else EXIT_PARTIAL if done else InputError.exit_code


def _journal(segmenter: Segmenter, found: _Found, asked: _Asked, looks: _Looks) -> Journal | None:
    """Where it is noted what is done, if that is worth it.

    Raises:
        OutputError: It cannot be written, or is of another run.
    """
    from petseg_runtime.journal import JOURNAL, Journal
    from petseg_runtime.sinks import probe

    folder = asked.folder
    # Of one photo that was searched for, too: the next search must know the result for what it is.
    noted = asked.resume or _searched(asked.sources) or len(found.items) > 1 or asked.coco
    if folder is None or found.live or not noted:
        return None
    settings = _appearance(found, looks) | _settings(segmenter)
    settings |= {name: getattr(asked, name) or None for name in VIDEO_OPTIONS}
    settings |= {"fast_decode": asked.fast_decode, "only_found": asked.only_found or None}
    probe(folder)
    journal = Journal(folder, settings, resume=asked.resume)
    if journal.noted and not any(map(journal.knows, found.items)):
        what = f"the {journal.noted} results noted there are of other files, or of these before they changed"
        _say(f"{folder / JOURNAL}: {what}: all are done anew", asked.quiet)
    return journal


def _searched(sources: Sequence[str]) -> bool:
    """Whether files are found in folders, not all named."""
    return any(
        os.path.isdir(source)  # noqa: PTH112 - of a text too long for a name, Path.is_dir raises
        or (glob.has_magic(source) and "://" not in source and not os.path.lexists(source))
        for source in sources
    )


@dataclasses.dataclass(frozen=True)
class _Found:
    """What the sources are.

    Attributes:
        photos: Files, and a photo on standard input.
        videos: Files.
        streams: These, a video on standard input, cameras and network streams.
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
        """Whether FFmpeg opens more than local files."""
        return any(origin.options is not None and isinstance(origin.target, str) for origin in self.streams)


def _find(asked: _Asked) -> _Found:
    """What the sources are.

    Raises:
        InputError: There is nothing.
        UsageError: They do not go together, or not to the output; see :func:`_check_sources`.
    """
    from petseg_runtime.sources import IMAGE_SUFFIXES, STDIN, VIDEO_SUFFIXES, find_photos, stream_origin

    options = _pairs(asked.input_option)
    named = [stream_origin(text, options) for text in asked.sources]
    streams = [origin for origin in named if origin]
    texts = [text for text, origin in zip(asked.sources, named, strict=True) if not origin]
    # A file that is called so is named ./-, of which Path makes a mere -.
    paths = [Path(text) if text == str(STDIN) or Path(text) != STDIN else Path(text).absolute() for text in texts]
    piped, data = _from_stdin(paths.count(STDIN), asked.raw)
    if piped:
        streams.append(piped)
        paths.remove(STDIN)
    told: list[str] = []
    items = find_photos(paths, asked.folder, IMAGE_SUFFIXES | VIDEO_SUFFIXES, data, told.append)
    if not items and not streams:
        raise InputError("; ".join([f"no photos or videos in {', '.join(asked.sources)}", *told]))
    for what in told:
        _say(what, asked.quiet)
    photos, videos = _by_kind(items)
    found = _Found(photos, videos, _distinct([*map(_origin_of, videos), *streams]))
    _check_sources(found, asked)
    return found


def _from_stdin(asked: int, raw: str | None) -> tuple[Origin | None, bytes | None]:
    """What comes on standard input: a video; or the bytes of a photo; neither, where it is not asked for just once.

    Raises:
        UsageError: Raw frames come from nowhere else.
        InputError: It is closed.
    """
    from petseg_runtime.sources import from_pipe, raw_video

    if raw and asked != 1:
        raise UsageError("--raw says what comes on standard input: give - as a source, once")
    if raw:
        return raw_video(raw), b""
    return from_pipe() if asked == 1 else (None, None)


def _by_kind(items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
    """Photos, and videos."""
    from petseg_runtime.sources import IMAGE_SUFFIXES, is_video

    photos: list[Item] = []
    videos: list[Item] = []
    for item in items:
        (videos if is_video(item) else photos).append(item)
    if videos and all(item.problem and item.source.suffix.lower() not in IMAGE_SUFFIXES for item in photos):
        return [], videos + photos  # folders that cannot be listed and patterns that fit nothing, among videos alone
    return photos, videos


def _origin_of(video: Item) -> Origin:
    from petseg_runtime.sources import Origin

    return Origin(str(video.source), str(video.source), video.name)


def _check_sources(found: _Found, asked: _Asked) -> None:
    """Refuse sources that do not go together.

    Raises:
        UsageError: There is more than one result for standard output, or what is live together with what has an end.
    """
    if asked.folder is None and len(found.photos) + len(found.streams) > 1:
        raise UsageError("one result at a time goes to standard output: for more, give a folder with --output")
    if (found.live and not all(origin.endless for origin in found.streams)) or (found.live and found.photos):
        raise UsageError("live sources run until they are stopped: give photos and videos to another run")


def _distinct(origins: list[Origin]) -> list[Origin]:
    """No two of one name: cameras at the same address differ in what their names do not show."""
    from petseg_runtime.sources import distinct

    names = distinct(origin.name for origin in origins)
    return [dataclasses.replace(origin, name=name) for origin, name in zip(origins, names, strict=True)]


def _check_output(asked: _Asked) -> None:
    """Refuse what cannot go to standard output.

    Raises:
        UsageError: More than one picture is asked for.
        OutputError: It is closed.
    """
    if asked.folder is not None:
        return
    if asked.as_json or asked.resume or asked.coco or asked.result == "lines":
        raise UsageError(
            "a picture goes to standard output: for --json, --resume, COCO or lines, give a folder with --output"
        )
    if sys.stdout is None:
        raise OutputError("standard output is closed: give a folder with --output")


def _check(found: _Found, asked: _Asked) -> None:
    """Refuse what cannot be, before anything is loaded.

    Raises:
        UsageError: The kind, the format and the background do not fit together, or not to the sources; or an option is
            for sources of which there is none.
    """
    from petseg_runtime.sinks import KINDS, check_looks

    kind = asked.result
    if found.photos or not found.streams:
        if kind == "lines":
            raise UsageError("lines are of videos; for photos, --json prints the same")
        check_looks(kind, asked.format, asked.background)
    if found.streams:
        if why := _no_video(asked):
            raise UsageError(f"{found.streams[0].shown}: {why}; give videos and streams to another run")
        if kind in KINDS:
            check_looks(kind, None, asked.background)
    for what, names, there in (
        ("videos and streams", VIDEO_OPTIONS, bool(found.streams)),
        ("cameras and streams", ("give_up",), found.live),
        ("cameras, streams and other URLs", ("stall", "input_option"), found.remote),
        ("what has an end", ("start",), not found.live),
    ):
        if not there and (unused := [name for name in names if getattr(asked, name)]):
            raise UsageError(f"--{unused[0].replace('_', '-')} is for {what}, and there is none")


def _check_masks(found: _Found, asked: _Asked) -> None:
    """Refuse what would have no effect on this kind of result.

    Raises:
        UsageError: It would have none; says what would.
    """
    from petseg_runtime.sinks import KINDS

    kind = asked.result
    cut_out = kind in ("cutout", "background")
    if cut_out and asked.threshold is not None and asked.cutout_threshold is None:
        raise UsageError(
            f"--threshold is for masks, and a {kind} has --cutout-threshold (with both, --threshold is what counts "
            "as pet, for --json and --min-area)"
        )
    if asked.cutout_threshold is not None and not cut_out:
        raise UsageError(f"--cutout-threshold is for cutouts and backgrounds; {kind} has --threshold")
    if asked.fast_decode and (not found.photos or kind not in KINDS or KINDS[kind].needs_photo):
        alone = ", ".join(name for name, one in KINDS.items() if not one.needs_photo)
        raise UsageError(f"--fast-decode is for photos of which only the mask is written (--as {alone})")


def _no_video(asked: _Asked) -> str | None:
    """Why no video can become what is asked for, and what it can become; None: it can."""
    from petseg_runtime.sinks import VIDEO_FORMATS

    if asked.only_found:
        return "--only-found is for photos"
    formats = VIDEO_FORMATS.get(asked.result, ())
    if not formats:
        return f"{asked.result} is of photos; a video can be: {', '.join(VIDEO_FORMATS)}"
    if asked.format and asked.format not in formats:
        files = ", ".join(name for name in formats if name != "raw")  # which is for --output - only
        return f"{asked.result} of a video is not written as {asked.format}; it can be: {files}"
    return None


def _without_videos(found: _Found, why: str | None, quiet: bool) -> _Found:
    """Pass over videos that cannot become what is asked for, where they were found beside photos, and not named."""
    strays = [item for item in found.videos if item.found]
    if why is None or not strays or not found.photos:
        return found
    more = f" and {len(strays) - 1} more videos" if len(strays) > 1 else ""
    _say(f"passed over {strays[0].source}{more}: {why}", quiet)
    kept = [not item.found for item in found.videos]
    kept += [True] * (len(found.streams) - len(kept))  # the videos come first
    videos = [item for item in found.videos if not item.found]
    return _Found(found.photos, videos, list(itertools.compress(found.streams, kept)))


def _made(found: _Found, asked: _Asked, looks: _Looks) -> Output:
    """What is made of the videos, and where.

    Raises:
        UsageError: It cannot be made of them.
        OutputError: It cannot go there, or would replace something.
    """
    from petseg_runtime.cli.infer_video import Output, check_places
    from petseg_runtime.video.movie import MOVIES

    folder = asked.folder
    if folder is None and looks.format:
        raise UsageError(f"raw frames go to standard output, not {looks.format}: give a folder with --output")
    form = looks.video_format if folder else "raw"
    if asked.segment and form not in (*MOVIES, "ndjson"):
        raise UsageError(f"--segment is for movies ({', '.join(MOVIES)}) and lines, not {form}")
    if asked.resume and found.live:
        raise UsageError("--resume is for files: a stream's results are numbered on, and nothing is replaced")
    output = Output(
        folder=folder,
        kind=looks.kind,
        format=form,
        background=looks.background,
        segment=asked.segment,
        audio=not asked.no_audio,
    )
    photos = {str(i.source): f"{folder / i.name}.{looks.photo_format}" for i in found.photos} if folder else {}
    return check_places(output, found.streams, photos, resume=asked.resume)


def _videos(segmenter: Segmenter, made: Output, asked: _Asked) -> Videos:
    from petseg_runtime.cli.infer_video import Videos
    from petseg_runtime.video.stream import Reading

    reading = Reading(
        start=asked.start or 0.0,
        stride=asked.stride or 1,
        max_frames=asked.max_frames,
        policy=asked.policy,
        stall=asked.stall or 10.0,
        patience=asked.give_up,
        smooth=asked.smooth or 0.0,
    )
    return Videos(segmenter, made, reading, as_json=asked.as_json, quiet=asked.quiet, verbose=asked.verbose)


def _pairs(texts: Sequence[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not name or not equals:
            raise click.BadParameter(f"{text!r}: NAME=VALUE is expected", param_hint="--input-option")
        pairs[name] = value
    return pairs


def _sink(found: _Found, asked: _Asked, looks: _Looks) -> Sink:
    """Where the results go."""
    from petseg_runtime.sinks import OnlyFound

    sink = _sink_of_all(found, asked, looks)
    return OnlyFound(sink) if asked.only_found else sink


def _sink_of_all(found: _Found, asked: _Asked, looks: _Looks) -> Sink:
    from petseg_runtime import sinks
    from petseg_runtime.journal import JOURNAL

    folder = asked.folder
    # Without a journal, no run was here, and what lies there is not its own.
    resume = asked.resume and folder is not None and (folder / JOURNAL).exists()
    if folder and not sinks.KINDS[looks.kind].formats:
        return sinks.CocoSink(folder, looks.kind, found.items, resume=resume)
    picture = sinks.picture(looks.kind, looks.format, looks.background)
    if folder is None:
        return sinks.StreamSink(sys.stdout.buffer, picture)
    return sinks.ImageSink(folder, picture, found.photos, beside=found.videos, resume=resume)


def _segmenter(photos: int, asked: _Asked) -> Segmenter:
    from petseg_runtime.host import usable_cpus
    from petseg_runtime.segmenter import Segmenter

    told = []

    def tell(what: str) -> None:
        told.append(what)
        _say(what, asked.quiet)

    segmenter = Segmenter(
        asked.model,
        backend=asked.backend,
        device=asked.device,
        threads=asked.threads,
        streams=max(1, min(asked.threads or usable_cpus(), photos)),
        size=None if asked.size is None else parse_size(asked.size),
        threshold=asked.threshold,
        cutout_threshold=asked.cutout_threshold,
        min_area=asked.min_area,
        keep_doubtful=asked.keep_doubtful,
        tell=tell,
    )
    for note in segmenter.describe().notes:
        if note not in told:
            _say(note, asked.quiet)
    return segmenter


def _appearance(found: _Found, looks: _Looks) -> dict[str, Any]:
    """What is asked of the results' looks, as it is meant: with the usual formats, and the background itself."""
    background = looks.background
    meant: dict[str, Any] = {"as": looks.kind, "background": background}
    if found.photos:
        meant["format"] = looks.photo_format
    if found.videos:
        meant["video_format"] = looks.video_format
    if background is not None:
        meant["background"] = (
            list(background)
            if isinstance(background, tuple)
            else f"a picture, SHA-256 {hashlib.sha256(background.tobytes()).hexdigest()}"
        )
    return meant


def _settings(segmenter: Segmenter) -> dict[str, Any]:
    """What decides how results look, beside their kind."""
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


def _tell(segmenter: Segmenter, asked: _Asked) -> None:
    engine, spec = segmenter.describe(), segmenter.artifact.spec
    if segmenter.size != (spec.height, spec.width):
        own, taken = f"{spec.height} x {spec.width}", "{} x {}".format(*segmenter.size)
        _say(f"--size {taken}: the model's own is {own}; at another its masks may be much worse", asked.quiet)
    if asked.verbose:
        click.echo(
            f"{shown(spec.name)} in {engine.name} {engine.version} on {engine.device}, "
            f"{engine.precision}, {engine.threads} threads",
            err=True,
        )


def _say(note: str, quiet: bool) -> None:
    if not quiet:
        click.echo(f"petseg: {shown(note)}", err=True)


class _Watcher:
    """Prints what becomes of each photo; a progress bar where people watch a batch."""

    def __init__(self, as_json: bool, quiet: bool, to_files: bool) -> None:
        self._as_json, self._quiet, self._to_files = as_json, quiet, to_files
        self._progress: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def expect(self, photos: int) -> None:
        """So many are to be done."""
        if photos > 1 and watched() and not self._quiet:
            self._progress = bar()
            self._task = self._progress.add_task("segmenting", total=photos)
            self._progress.start()

    def watch(self, outcome: Outcome[Item, Done]) -> None:
        """Tell of one photo that is done or has failed."""
        source, done = shown(outcome.source.source), outcome.value
        if done is None:
            self._print(f"petseg: {shown(outcome.error)}", err=True)
        else:
            for note in () if self._quiet else done.notes:
                self._print(f"petseg: {source}: {note}", err=True)
            if self._to_files and not self._as_json and not self._quiet:
                self._print(f"{source}{_became(done)}")
            elif done.left_out and not self._to_files and not self._quiet:  # an empty standard output says too little
                self._print(f"petseg: {source}: no pet: nothing written", err=True)
        if self._as_json:
            self._print(json.dumps(_record(outcome)))
        if self._progress:
            self._progress.advance(self._task)

    def _print(self, line: str, err: bool = False) -> None:
        """Print a line; above the bar, where both are seen on one terminal."""
        if self._progress and (err or (sys.stdout is not None and sys.stdout.isatty())):
            self._progress.console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
        else:
            click.echo(line, err=err)


def _became(done: Done) -> str:
    """What became of a photo, for people."""
    if done.left_out:
        return "  no pet: nothing written"
    where = f" -> {shown(done.path)}" if done.path else ""
    return f"{where}  " + (f"{100 * done.coverage:.0f} % pet" if done.found else "no pet, it seems")


def _record(outcome: Outcome[Item, Done]) -> dict[str, Any]:
    record: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "input": str(outcome.source.source)}
    if outcome.value is None:
        return {**record, "event": "failure", "error": str(outcome.error)}
    done = dataclasses.asdict(outcome.value)
    path, value = done.pop("path"), done.pop("value")
    done["coverage"] = round(done["coverage"], 6)
    annotation = {"annotation": value["annotation"]} if value else {}
    return {**record, "event": "result", "output": path and str(path), **done, **annotation}


def _print_report(report: Report | None, videos: Videos | None, asked: _Asked) -> None:
    if asked.as_json:
        of_photos, of_videos = _summary(report), {"videos": videos.summary()} if videos else {}
        click.echo(json.dumps({"schema_version": SCHEMA_VERSION, "event": "summary", **of_photos, **of_videos}))
        return
    if report:
        _print_photos(report, asked.folder, asked.verbose, asked.quiet)
    if videos and not asked.quiet and asked.folder and len(videos.reports) + videos.skipped > 1:
        counts = videos.summary()
        words = {"done": "done", "skipped": "there already", "stopped": "stopped", "failed": "failed"}
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
        skipped = f", {report.skipped} there already" if report.skipped else ""
        left_out = f", {report.left_out} without a pet" if report.left_out else ""
        photos = "photo" if total == 1 else "photos"
        where = shown(report.path or folder)
        written = f"{report.done - report.left_out} written to {where}"
        click.echo(f"{total} {photos}: {written}{left_out}{skipped}{failed}{_took(report, verbose)}")
    if verbose:
        for step, seconds in report.steps.items():
            p50, p95 = 1e3 * seconds["p50"], 1e3 * seconds["p95"]
            click.echo(
                f"{step:>6}: median {p50:.1f} ms, 95 % below {p95:.1f} ms, {seconds['sum']:.2f} s in all", err=True
            )


def _took(report: Report, verbose: bool) -> str:
    worked = report.done + len(report.failed)
    return f" in {report.seconds:.2f} s ({worked / max(report.seconds, 1e-9):.1f} photos/s)" if verbose else ""
